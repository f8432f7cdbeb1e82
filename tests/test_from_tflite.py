"""Conversions of TFLite files, against LiteRT's interpreter."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conversions import assert_fails_without_a_trace, assert_wrong_tables_are_noticed, read
from oracles import logits
from torch import Tensor

from mobilenet import MobileNetForImageClassification, MobileNetImageProcessor
from mobilenet.conversion.convert import build, convert
from mobilenet.conversion.parity import rounded


pytestmark = pytest.mark.any_version


litert = pytest.importorskip("ai_edge_litert.interpreter", reason="ai-edge-litert is not installed")

FLOAT = "mobilenet_v1_0.25_224_1_default_1.tflite"
V1, V2, V2_PER_CHANNEL = (
    "mobilenet_v1_0.25_128_quant.tflite",
    "mobilenet_v2_1.0_224_quant.tflite",
    "tf2_mobilenet_v2_1.0_224_ptq.tflite",
)


def probabilities(path: Path, photographs: list[Path], size: int) -> Tensor:
    """What the interpreter makes of photographs, resized and cropped but not normalised by our processor."""
    interpreter = litert.Interpreter(str(path), num_threads=2)
    interpreter.allocate_tensors()
    given, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    crop = MobileNetImageProcessor.from_recipe("google", size, do_rescale=False, do_normalize=False)
    rows = []
    for photograph in photographs:
        pixels = crop(photograph, return_tensors="np", data_format="channels_last").pixel_values
        pixels = pixels.astype(np.uint8) if given["dtype"] is np.uint8 else (pixels / 127.5 - 1).astype(np.float32)
        interpreter.set_tensor(given["index"], pixels)
        interpreter.invoke()
        rows.append(interpreter.get_tensor(result["index"])[0])
    scale, zero_point = result["quantization"]
    values = torch.from_numpy(np.stack(rows)).float()
    return (values - zero_point) * scale if scale else values


def ours(path: Path, photographs: list[Path]) -> Tensor:
    checkpoint = read(path)
    model = build(checkpoint, "")
    batches = [photographs[start : start + 20] for start in range(0, len(photographs), 20)]
    return torch.cat([logits(model, checkpoint.processor(b, return_tensors="pt").pixel_values) for b in batches])


def test_probabilities_of_a_float_file_are_within_1e4(data: Path, photographs: list[Path]) -> None:
    path = data / "tflite" / FLOAT
    torch.testing.assert_close(
        ours(path, photographs).softmax(-1), probabilities(path, photographs, 224), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("name", "size", "agreement"), [(V1, 128, 0.92), (V2, 224, 0.98), (V2_PER_CHANNEL, 224, 0.95)]
)
def test_the_float_network_agrees_with_the_quantized_one(
    name: str, size: int, agreement: float, data: Path, photographs: list[Path]
) -> None:
    path = data / "tflite" / name
    same = ours(path, photographs).argmax(-1) == probabilities(path, photographs, size).argmax(-1)
    assert same.float().mean().item() >= agreement


@pytest.mark.parametrize("name", [V1, V2, V2_PER_CHANNEL])
def test_rounded_as_quantization_json_says_logits_are_the_interpreters(
    name: str, data: Path, photographs: list[Path]
) -> None:
    checkpoint = read(data / "tflite" / name)
    model = build(checkpoint, "")
    pictures = checkpoint.processor(photographs[::20], return_tensors="pt").pixel_values
    step = checkpoint.quantization["activations"]["classifier"]["scale"]
    expected = checkpoint.oracle().logits(pictures)
    with rounded(model, checkpoint.quantization["activations"]):
        alike = logits(model, pictures)
    plain = logits(model, pictures)
    assert (alike - expected).abs().mean() < 1.1 * step
    assert (alike / step - (alike / step).round()).abs().max() < 1e-3
    assert (plain / step - (plain / step).round()).abs().max() > 0.4  # nothing rounds any more
    levels = checkpoint.processor(photographs[:1], return_tensors="pt").pixel_values
    levels = levels / checkpoint.quantization["activations"]["pixel_values"]["scale"]
    assert (levels - levels.round()).abs().max() < 1e-3  # each byte of a picture is one of the file's


def test_quantization_json_covers_every_layer(data: Path) -> None:
    checkpoint = read(data / "tflite" / V2_PER_CHANNEL)
    activations, weights = checkpoint.quantization["activations"], checkpoint.quantization["weights"]
    model = build(checkpoint, "")
    layers = {name for name, module in model.named_modules() if type(module).__name__ == "ConvNormAct"}
    sums = {
        f"backbone.stages.{s}.{b}"
        for s, b in ((1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (3, 5), (3, 6), (4, 1), (4, 2))
    }
    assert activations.keys() == layers | sums | {"pixel_values", "backbone.pooler_output", "classifier"}
    for name in layers:
        weight = model.get_submodule(name).conv.weight
        kept = weights[f"{name}.conv.weight"]
        assert kept["dtype"] == "int8"
        assert len(kept["scale"]) == len(kept["zero_point"]) == len(weight)
        # Every weight is a level of its channel.
        levels = weight.detach().flatten(1) / torch.tensor(kept["scale"])[:, None]
        assert (levels - levels.round()).abs().max() < 1e-3
        assert levels.abs().max() < 127.5
    stem = activations["backbone.stem"]
    assert stem == {
        "dtype": "int8",
        "scale": pytest.approx(6 / 255, rel=1e-4),
        "zero_point": -128,
        "min": 0,
        "max": pytest.approx(6, rel=1e-4),
    }


@pytest.mark.parametrize("name", [FLOAT, V2])
def test_every_wrong_row_is_noticed(name: str, data: Path) -> None:
    assert_wrong_tables_are_noticed(read(data / "tflite" / name))


def test_labels_that_a_file_carries_are_kept(data: Path) -> None:
    labels = (data / "imagenet_labels_1001.txt").read_text().splitlines()
    assert read(data / "tflite" / V1).labels == labels
    assert read(data / "tflite" / FLOAT).labels is None


def test_another_size_than_the_files_cannot_be_compared(data: Path, tmp_path: Path) -> None:
    (comparison,) = convert(str(data / "tflite" / FLOAT), tmp_path / "output", image_size=128)
    assert comparison.against == "the repository, loaded anew"
    card = (tmp_path / "output" / "README.md").read_text()
    assert "the TFLite file takes pictures of 224 pixels, not of 128." in card


def test_batch_norms_are_unfolded_for_fine_tuning(data: Path, tmp_path: Path, cats: Path) -> None:
    source = data / "tflite" / V1
    convert(str(source), tmp_path / "output", unfuse=True, drop_background=True, compare_on=cats.parent)
    model = MobileNetForImageClassification.from_pretrained(tmp_path / "output")
    processor = MobileNetImageProcessor.from_pretrained(tmp_path / "output")
    pictures = processor(
        [cats, cats.with_name("parrot.jpg"), cats.with_name("owl.jpg")], return_tensors="pt"
    ).pixel_values
    folded = logits(build(read(source), ""), pictures)[:, 1:]
    torch.testing.assert_close(logits(model.eval(), pictures), folded, atol=1e-4, rtol=0)
    assert model.config.id2label[281] == "tabby, tabby cat"
    # With statistics of real pictures, a step of training starts near where evaluation stands.
    pictures = processor([*cats.parent.glob("*.*")], return_tensors="pt").pixel_values
    before = logits(model, pictures)
    after = logits(model.train(), pictures)
    assert torch.nn.functional.cosine_similarity(before, after).min() > 0.9
    quantization = json.loads((tmp_path / "output" / "quantization.json").read_text())
    assert quantization["weights"]["classifier.weight"]["scale"] == [pytest.approx(0.0055403, rel=1e-4)]
    assert "`quantization.json`" in (tmp_path / "output" / "README.md").read_text()


def test_a_quantized_classifier_loses_the_scale_of_the_background(data: Path, tmp_path: Path) -> None:
    convert(str(data / "tflite" / V2_PER_CHANNEL), tmp_path / "output", drop_background=True, compare=False)
    kept = json.loads((tmp_path / "output" / "quantization.json").read_text())["weights"]["classifier.weight"]
    whole = read(data / "tflite" / V2_PER_CHANNEL).quantization["weights"]["classifier.weight"]
    assert (kept["scale"], kept["zero_point"]) == (whole["scale"][1:], whole["zero_point"][1:])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "coco_ssd_mobilenet_v1_1.0_quant_2018_06_29.tflite",
            "is no classifier, which has one input and one output: it has 1 and 4",
        ),
        ("deeplabv3.tflite", "is no MobileNet that can be converted: DEPTHWISE_CONV_2D 22"),
    ],
)
def test_other_networks_are_refused(name: str, reason: str, data: Path, tmp_path: Path) -> None:
    source = data / "tflite" / name
    assert_fails_without_a_trace(source, tmp_path / "output", f"{source}: {reason}")


def test_broken_files_are_refused(data: Path, tmp_path: Path) -> None:
    whole = (data / "tflite" / FLOAT).read_bytes()
    source = tmp_path / "model.tflite"
    for part in (whole[: len(whole) // 2], whole[:100], b"", whole[:4] + b"XXXX" + whole[8:]):
        source.write_bytes(part)
        assert_fails_without_a_trace(source, tmp_path / "output", "model.tflite: truncated or corrupt")


def test_without_litert_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ai_edge_litert", None)
    (tmp_path / "model.tflite").touch()
    with pytest.raises(ImportError, match=r"pip install 'mobilenet\[tflite\]'"):
        convert(str(tmp_path / "model.tflite"), tmp_path / "output")
