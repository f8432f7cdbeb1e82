"""Conversions of Google's checkpoints, against transformers' own classes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conversions import assert_fails_without_a_trace, assert_wrong_tables_are_noticed, read, swapped
from oracles import logits, native, randomize_norms
from transformers import MobileNetV1ForImageClassification, MobileNetV2Config, MobileNetV2ForImageClassification

from mobilenet import MobileNetConfig
from mobilenet.conversion import from_google
from mobilenet.conversion.convert import build


NATIVE = {
    "google_mobilenet_v2_1.0_224": MobileNetV2ForImageClassification,
    "google_mobilenet_v1_0.75_192": MobileNetV1ForImageClassification,
    "google_mobilenet_v1_0.25_128": MobileNetV1ForImageClassification,
}


@pytest.fixture
def small(data: Path, tmp_path: Path) -> Path:
    """A copy of the real V1 0.25_128 that a test may break."""
    return Path(shutil.copytree(data / "checkpoints" / "google_mobilenet_v1_0.25_128", tmp_path / "small"))


@pytest.mark.slow
@pytest.mark.any_version
@pytest.mark.parametrize("name", NATIVE)
def test_logits_equal_those_of_the_native_class(name: str, data: Path, photographs: list[Path]) -> None:
    folder = data / "checkpoints" / name
    checkpoint = read(folder)
    ours = build(checkpoint, name)
    theirs = NATIVE[name].from_pretrained(folder).eval()
    assert len(photographs) == 300
    for photograph in photographs:  # one by one, which is what the native class is quickest at
        images = checkpoint.processor(photograph, return_tensors="pt").pixel_values
        our_logits, their_logits = logits(ours, images), logits(theirs, images)
        torch.testing.assert_close(our_logits, their_logits, atol=1e-4, rtol=0)
        assert our_logits.argmax(-1).equal(their_logits.argmax(-1))


@pytest.mark.parametrize("architecture", ["mobilenet_v1", "mobilenet_v2"])
def test_every_wrong_row_is_noticed(architecture: str, tmp_path: Path) -> None:
    native(MobileNetConfig(architecture, 0.5, num_labels=7)).save_pretrained(tmp_path)
    assert_wrong_tables_are_noticed(read(tmp_path))


def test_two_swapped_rows_stop_a_conversion(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = from_google.TABLES["mobilenet_v1"]
    wrong = table._replace(rows=swapped(table.rows, "block.depthwise", "block.pointwise"))
    monkeypatch.setitem(from_google.TABLES, "mobilenet_v1", wrong)
    assert_fails_without_a_trace(small, tmp_path / "output", "misshapen: mobilenet_v1.layer.1.convolution.weight")


@pytest.mark.parametrize("pair", [("weight", "running_var"), ("bias", "running_mean")])
def test_swapped_parts_that_fit_stop_a_conversion(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: tuple
) -> None:
    table = from_google.TABLES["mobilenet_v1"]
    convention = table.convention._replace(norm=swapped(table.convention.norm, *pair))
    monkeypatch.setitem(from_google.TABLES, "mobilenet_v1", table._replace(convention=convention))
    assert_fails_without_a_trace(
        small, tmp_path / "output", "is another than transformers' MobileNetV1", "0.0001 is allowed"
    )


@pytest.mark.parametrize(
    ("architecture", "written", "meant"),
    [
        ("mobilenet_v1", 0.999, 0.001),
        ("mobilenet_v2", 0.8, 0.2),
        ("mobilenet_v2", 0.3, 0.3),  # somebody chose it, and transformers drops with it
    ],
)
def test_dropout_is_taken_for_what_it_meant(architecture: str, written: float, meant: float, tmp_path: Path) -> None:
    model = native(MobileNetConfig(architecture, 0.35, num_labels=3))
    model.config.classifier_dropout_prob = written
    model.save_pretrained(tmp_path)
    assert read(tmp_path).config["classifier_dropout"] == meant


def test_fields_and_preprocessing_are_taken_over(tmp_path: Path) -> None:
    theirs = MobileNetV2Config(
        depth_multiplier=0.5,
        depth_divisible_by=4,
        finegrained_output=False,
        tf_padding=False,
        layer_norm_eps=1e-5,
        output_stride=16,
        hidden_act="relu",
        image_size=96,
        num_channels=1,
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
        problem_type="multi_label_classification",
    )
    model = randomize_norms(MobileNetV2ForImageClassification(theirs))
    model.save_pretrained(tmp_path)
    recorded = {"size": {"shortest_edge": 100}, "image_mean": [0.1], "image_std": [0.2], "resample": 3, "rare": 1}
    recorded["image_processor_type"] = "MobileNetV2ImageProcessor"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(recorded))
    checkpoint = read(tmp_path)
    ours = build(checkpoint, "")
    config = ours.config
    assert (config.width_multiplier, config.channel_divisor, config.shrink_head) == (0.5, 4, True)
    assert (config.padding, config.batch_norm_eps, config.output_stride) == ("symmetric", 1e-5, 16)
    assert (config.hidden_act, config.image_size, config.num_channels) == ("relu", 96, 1)
    assert (config.id2label, config.problem_type) == ({0: "cat", 1: "dog"}, "multi_label_classification")
    processor = checkpoint.processor
    assert (processor.size, processor.resample) == ({"shortest_edge": 100}, 3)
    assert (processor.image_mean, processor.image_std) == ([0.1], [0.2])
    assert processor.crop_size == {"height": 96, "width": 96}
    images = torch.randn(1, 1, 97, 130)
    torch.testing.assert_close(logits(ours, images), logits(model.eval(), images), atol=1e-4, rtol=0)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"depth_multiplier": 0.5}, ("of width 0.5", "136 misshapen", " and so on")),
        ({"depth_multiplier": -1}, ("depth_multiplier",)),
        ({"min_depth": 16}, ("min_depth must be 8, got 16",)),
        ({"architectures": ["MobileNetV1Model"]}, ("must hold a MobileNetV1ForImageClassification",)),
        ({"hidden_act": "tanh"}, ("hidden_act must be", "tanh")),
        ({"hidden_act": None}, ("hidden_act", "None")),
        ({"model_type": "resnet"}, ("no known source",)),
        ({"model_type": "mobilenet_v2"}, ("does not hold a mobilenet_v2",)),
    ],
)
def test_configurations_that_do_not_fit_are_refused(
    small: Path, tmp_path: Path, changes: dict, parts: tuple[str, ...]
) -> None:
    edit_config(small, **changes)
    if "architectures" not in changes:
        edit_config(small, architectures=None)
    assert_fails_without_a_trace(small, tmp_path / "output", str(small), *parts)


def test_a_folder_without_weights_is_refused(small: Path, tmp_path: Path) -> None:
    (small / "pytorch_model.bin").unlink()
    assert_fails_without_a_trace(small, tmp_path / "output", str(small), "neither model.safetensors nor pytorch_model")


def test_safetensors_go_before_a_pickle(small: Path, tmp_path: Path) -> None:
    (small / "pytorch_model.bin").write_bytes(b"not even a pickle")
    shutil.copy(small / "config.json", tmp_path)
    with pytest.raises(ValueError, match="broken"):
        read(small)
    source = native(MobileNetConfig("mobilenet_v1", 0.25, num_labels=1001))
    source.save_pretrained(tmp_path / "safe")
    shutil.copy(tmp_path / "safe" / "model.safetensors", small)
    assert read(small).tensors["classifier.bias"].equal(source.classifier.bias)
