"""Conversions of segmenters: TFLite files against LiteRT's interpreter, Google's layout against the native class."""

import json
import re
from dataclasses import replace
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from conversions import assert_fails_without_a_trace, assert_wrong_tables_are_noticed, read
from mobilenet.preprocessing_mobilenet import OPTIONS, place, read_options
from mobilenet.segmentation_mobilenet import resize
from oracles import logits, native, native_segmenter
from PIL import Image
from torch import Tensor
from transformers import MobileNetV2ForSemanticSegmentation, pipeline

from mobilenet import MobileNetConfig, MobileNetForSemanticSegmentation, MobileNetImageProcessor
from mobilenet.conversion import ConversionError
from mobilenet.conversion.convert import build, convert
from mobilenet.conversion.from_tflite import File
from mobilenet.conversion.graph import Act, Add, ArgMax, Concat, Conv, Graph, Pool, Resize
from mobilenet.conversion.parity import check_parity, compare_with_source, label_maps, logits_step, rounded
from mobilenet.conversion.segmenters import match_segmenter
from mobilenet.segmentation_labels import VOC


pytestmark = pytest.mark.any_version

FLOAT, QUANTIZED = "deeplabv3.tflite", "deeplabv3_mnv2_dm05_pascal_quant.tflite"


@pytest.fixture(scope="session")
def images(data: Path) -> list[Path]:
    """Photographs with people, cats, dogs, birds and a horse, and one of none of VOC's classes."""
    return sorted((data / "images").glob("*.jpg"))


def interpret(path: Path, pixels: Tensor) -> np.ndarray:
    """What the interpreter makes of one image, which is normalized to -1 to 1: the file's own output."""
    litert = pytest.importorskip("ai_edge_litert.interpreter", reason="ai-edge-litert is not installed")
    interpreter = litert.Interpreter(str(path), num_threads=2)
    interpreter.allocate_tensors()
    given, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    values = pixels.permute(0, 2, 3, 1).numpy()
    if given["dtype"] is np.uint8:
        values = np.clip(np.rint(values * 128 + 128), 0, 255).astype(np.uint8)
    interpreter.set_tensor(given["index"], values)
    interpreter.invoke()
    return interpreter.get_tensor(result["index"])[0]


def test_a_float_file_gives_the_interpreters_logits_and_labels(data: Path, images: list[Path]) -> None:
    checkpoint = read(data / "tflite" / FLOAT)
    assert (checkpoint.config["output_stride"], checkpoint.config["width_multiplier"]) == (8, 0.5)
    assert checkpoint.labels[15] == "person"
    assert checkpoint.warnings == []
    model = build(checkpoint, "")
    assert len(images) == 7
    for image in images:
        pixels = checkpoint.processor(image, return_tensors="pt").pixel_values
        theirs = torch.from_numpy(interpret(data / "tflite" / FLOAT, pixels)).permute(2, 0, 1)[None]
        ours = resize(logits(model, pixels), (257, 257), align_corners=True)
        assert (ours - theirs).abs().max() < 1e-3, image.name
        assert (ours.argmax(1) == theirs.argmax(1)).float().mean() >= 0.999, image.name


def test_a_quantized_file_gives_the_interpreters_labels_but_for_its_rounding(data: Path, images: list[Path]) -> None:
    """Of the pixels that show an image: 98.9 % are alike, and 99.4 % where the network rounds as the file does."""
    checkpoint = read(data / "tflite" / QUANTIZED)
    assert (checkpoint.config["output_stride"], checkpoint.config["channel_divisor"]) == (16, 1)
    model, activations = build(checkpoint, ""), checkpoint.quantization["activations"]
    options = read_options({name: getattr(checkpoint.processor, name) for name in OPTIONS})
    shares = []
    for image in images:
        pixels = checkpoint.processor(image, return_tensors="pt").pixel_values
        theirs = torch.from_numpy(interpret(data / "tflite" / QUANTIZED, pixels)).long()
        plain = label_maps(logits(model, pixels), (513, 513), align_corners=True)[0]
        with rounded(model, activations):
            alike = label_maps(logits(model, pixels), (513, 513), True, logits_step(activations))[0]
        with Image.open(image) as opened:
            rows, columns = (slice(axis.resized) for axis in place(*opened.size, options))
        shares.append([(each == theirs)[rows, columns].float().mean().item() for each in (plain, alike)])
        assert shares[-1][0] >= 0.97, image.name
    plain, alike = torch.tensor(shares).mean(0)
    assert plain >= 0.985
    assert alike >= 0.992


def test_quantization_json_covers_a_segmenter(data: Path) -> None:
    checkpoint = read(data / "tflite" / QUANTIZED)
    activations, weights = checkpoint.quantization["activations"], checkpoint.quantization["weights"]
    model = build(checkpoint, "")
    layers = {name for name, module in model.named_modules() if type(module).__name__ == "ConvNormAct"}
    assert layers <= activations.keys()
    assert {name for name in activations if name.startswith("segmentation_head.")} - layers == {
        f"segmentation_head.{name}" for name in ("classifier", "pooled", "joined")
    }
    assert weights.keys() == {name for name in model.state_dict() if name.endswith(".weight")}
    kept = weights["segmentation_head.classifier.weight"]
    levels = model.segmentation_head.classifier.weight.detach() / kept["scale"][0]
    assert (levels - levels.round()).abs().max() < 1e-3


@pytest.mark.slow
def test_a_file_becomes_a_repository_that_segments(data: Path, images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    rider = data / "images" / "segmentation_input_rotation0.jpg"
    (tmp_path / "images" / rider.name).write_bytes(rider.read_bytes())
    output = tmp_path / "my-segmenter"
    comparisons = convert(str(data / "tflite" / FLOAT), output, compare_on=tmp_path / "images")
    assert [each.agreement > 0.999 for each in comparisons] == [True] * 3
    card = (output / "README.md").read_text()
    for part in (
        "pipeline_tag: image-segmentation",
        "license: apache-2.0",
        "arxiv:1706.05587",
        'segment = pipeline("image-segmentation", model=',
        "labels of pixels",
    ):
        assert part in card
    found = pipeline("image-segmentation", model=str(output), trust_remote_code=False)(str(rider))
    areas = {each["label"]: (np.asarray(each["mask"]) == 255).mean() for each in found}
    assert areas.keys() == {"background", "horse", "person"}
    assert 0.2 < areas["horse"] < areas["person"] < 0.4
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["MobileNetForSemanticSegmentation"]
    assert config["segmentation_head"] == "deeplab_v3_light"
    assert MobileNetImageProcessor.from_pretrained(output).align_corners


@pytest.mark.slow
def test_a_segmenter_gets_its_batch_norms_back(data: Path, tmp_path: Path) -> None:
    convert(str(data / "tflite" / FLOAT), tmp_path / "output", unfuse=True)
    model = MobileNetForSemanticSegmentation.from_pretrained(tmp_path / "output")
    assert model.config.has_batch_norm
    assert model.segmentation_head.project.norm.eps == 1e-5


# What is no segmenter of ours


def changed(graph: object, which: type, index: int, /, **fields: object) -> object:
    """A graph with another operation in place of one: that of a kind which has an index among them."""
    old = [op for op in graph.ops if isinstance(op, which)][index]
    return replace(graph, ops=[replace(op, **fields) if op is old else op for op in graph.ops])


@pytest.fixture(scope="module")
def file(data: Path) -> File:
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
    return File((data / "tflite" / FLOAT).read_bytes(), data / "tflite" / FLOAT)


def test_graphs_that_differ_are_refused_by_the_layer(file: File) -> None:
    graph = file.graph
    concat = next(op for op in graph.ops if isinstance(op, Concat))
    convs = [op for op in graph.ops if isinstance(op, Conv)]
    logits_value = convs[-1].output
    for wrong, message in (
        (changed(graph, Resize, 0, align_corners=False), "RESIZE_BILINEAR 63 .* must leave the centers"),
        (changed(graph, Resize, 2, align_corners=False), "RESIZE_BILINEAR 69 .* must leave the centers"),
        (changed(graph, Pool, 0, kind="max"), "CONCATENATION 65 .* must join an average pooling"),
        (changed(graph, Pool, 0, window=(8, 8)), "AVERAGE_POOL_2D 61 .* pools over .*8, 8.*, and must over 33"),
        (changed(graph, Concat, 0, inputs=concat.inputs[::-1]), "must be what resizes the pooled features"),
        (changed(graph, Concat, 0, inputs=concat.inputs * 2), "CONCATENATION 65 .* got 4 branches"),
        (changed(graph, Act, -1, function="relu6"), "must have 256 channels and relu, got 256 and relu6"),
        (changed(graph, Conv, -1, stride=(2, 2)), "CONV_2D 67 .* and must be one of 1x1"),
        (changed(graph, Conv, 7, stride=(2, 2)), "is a depthwise convolution of 3x3"),
        (replace(graph, output=concat.output), "the end of the network must come after|must join"),
    ):
        with pytest.raises(ConversionError) as error:
            match_segmenter(wrong, "source")
        assert re.search(f"is no MobileNet that can be converted: .*{message}", str(error.value)), error.value
    # It may end in labels, in resized logits or in logits.
    labels = ArgMax(name="argmax", inputs=(graph.output,), output="labels")
    for ends, prediction in (
        (replace(graph, ops=[*graph.ops, labels], output="labels"), "label map"),
        (graph, "label map"),
        (replace(graph, output=logits_value), None),
    ):
        found = match_segmenter(ends, "source")
        assert (found.prediction, found.logits) == (prediction, logits_value)
        assert found.config["num_labels"] == 21


@pytest.mark.parametrize("kinds", [[Resize], [ArgMax, Resize]])
def test_a_ring_at_the_end_is_refused(kinds: list[type]) -> None:
    ops = []
    for index, kind in enumerate(kinds, start=1):
        fields = {"name": "op", "inputs": (index % len(kinds) + 1,), "output": index}
        ops.append(kind(**fields, **({"align_corners": True} if kind is Resize else {})))
    with pytest.raises(ConversionError, match=r"op must not come before|must come after the joined channels"):
        match_segmenter(Graph(ops=ops, input=0, output=1, channels=3, size=33), "source")


def test_a_sum_of_what_nobody_makes_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
    graph = File(hostile.tflite_segmenter(), tmp_path / "a.tflite").graph
    first = next(op for op in graph.ops if isinstance(op, Add))
    assert graph.ops.index(first) < 8  # the block after the stem adds
    wrong = changed(graph, Add, 0, inputs=(first.inputs[0], 10**6))
    with pytest.raises(ConversionError, match=r"ADD \d+ does not add what its block started from"):
        match_segmenter(wrong, "source")


def test_a_map_is_not_resized_to_more_than_the_image(data: Path, tmp_path: Path) -> None:
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="ai-edge-litert is not installed")
    flatbuffers = pytest.importorskip("flatbuffers")
    model = schema.ModelT.InitFromPackedBuf((data / "tflite" / FLOAT).read_bytes(), 0)
    (graph,) = model.subgraphs
    last = next(operator for operator in graph.operators[::-1] if len(operator.inputs) == 2)
    size = np.frombuffer(np.int32([90_000, 90_000]).tobytes(), np.uint8)
    model.buffers[graph.tensors[last.inputs[1]].buffer].data = size
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    (tmp_path / "a.tflite").write_bytes(builder.Output())
    words = "resizes to [90000, 90000], which is more than the image has."
    assert_fails_without_a_trace(tmp_path / "a.tflite", tmp_path / "output", words)


# Google's layout on the Hub


def save_native(folder: Path, **fields: object) -> MobileNetV2ForSemanticSegmentation:
    """A segmenter of transformers' own, with its config.json and model.safetensors."""
    config = MobileNetConfig(**{"num_labels": 21, "segmentation_head": "deeplab_v3_light", **fields})
    model = native_segmenter(config)
    model.config.image_size = 513
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("output_stride", "width", "padding"), [(8, 1.0, "same"), (16, 0.5, "symmetric")])
def test_logits_equal_those_of_the_native_class(
    output_stride: int, width: float, padding: str, tmp_path: Path
) -> None:
    theirs = save_native(tmp_path, output_stride=output_stride, width_multiplier=width, padding=padding)
    checkpoint = read(tmp_path)
    assert (checkpoint.task.name, checkpoint.kind) == (
        "image-segmentation",
        "transformers' MobileNetV2ForSemanticSegmentation",
    )
    ours = build(checkpoint, "")
    assert ours.config.output_stride == output_stride
    assert ours.config.image_size == 513
    assert ours.segmentation_head.dropout.p == 0.1  # deeplab/model.py keeps 0.9; 0.8 is what transformers writes
    for size in ((97, 130), (161, 95), (65, 33)):
        pixels = torch.randn(2, 3, *size)
        torch.testing.assert_close(logits(ours, pixels), logits(theirs, pixels), atol=1e-4, rtol=0)
    pixels = torch.randn(1, 3, 97, 130).double()
    expected = logits(theirs.double(), pixels)
    torch.testing.assert_close(logits(ours.double(), pixels), expected, atol=1e-9, rtol=0)


def test_every_wrong_row_is_noticed(tmp_path: Path) -> None:
    save_native(tmp_path, output_stride=16, width_multiplier=0.35)
    assert_wrong_tables_are_noticed(read(tmp_path), size=33)


def test_a_segmenter_with_its_runtime_and_loaded_anew(tmp_path: Path, images: list[Path]) -> None:
    save_native(tmp_path / "source", output_stride=16, width_multiplier=0.35)
    checkpoint = read(tmp_path / "source", image_size=129)
    model = build(checkpoint, "")
    _, comparisons, caveats = compare_with_source(model, checkpoint, list(map(str, images[:3])))
    (only,) = comparisons
    assert only.against.startswith("transformers' MobileNetV2 ")
    assert (only.images, only.agreement > 0.999, caveats) == (3, True, [])
    assert only.largest < 1e-4


@pytest.mark.parametrize("crops", [True, False])
def test_preprocessing_is_taken_over_unless_it_crops(crops: bool, tmp_path: Path) -> None:
    save_native(tmp_path, output_stride=16, width_multiplier=0.35)
    recorded = {
        "do_center_crop": crops,
        "crop_size": {"height": 513, "width": 513},
        "size": {"height": 513, "width": 513} if not crops else {"shortest_edge": 545},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(recorded))
    checkpoint = read(tmp_path)
    processor = checkpoint.processor
    if crops:
        assert (processor.size, processor.pad_size) == ({"longest_edge": 513}, {"height": 513, "width": 513})
        assert "as DeepLab's demo does" in checkpoint.notes[0]
    else:
        assert (processor.size, processor.pad_size) == ({"height": 513, "width": 513}, {"height": 513, "width": 513})
        assert checkpoint.notes == []
    assert not processor.do_center_crop
    assert processor.align_corners
    assert read(tmp_path, fit="stretch").processor.size == {"height": 513, "width": 513}


def test_other_classes_are_refused(tmp_path: Path) -> None:
    native(MobileNetConfig(width_multiplier=0.35, num_labels=3)).save_pretrained(tmp_path / "source")
    config = tmp_path / "source" / "config.json"
    for architecture, message in (
        ("MobileNetV2Model", "must hold a MobileNetV2ForImageClassification or a MobileNetV2ForSemanticSegmentation"),
        ("MobileNetV2ForSemanticSegmentation", "missing: segmentation_head.conv_pool.convolution.weight"),
    ):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": [architecture]}))
        assert_fails_without_a_trace(tmp_path / "source", tmp_path / "output", message)


def test_labels_are_those_of_voc_where_there_are_as_many(data: Path, tmp_path: Path) -> None:
    checkpoint = read(data / "tflite" / QUANTIZED)
    assert checkpoint.labels is None
    convert(str(data / "tflite" / QUANTIZED), tmp_path / "output", compare=False)
    config = json.loads((tmp_path / "output" / "config.json").read_text())
    assert list(config["id2label"].values()) == list(VOC)
    assert "those of PASCAL VOC, since there are 21" in (tmp_path / "output" / "README.md").read_text()


def test_a_repository_of_images_of_any_shape_is_compared_one_by_one(tmp_path: Path, images: list[Path]) -> None:
    config = MobileNetConfig(
        width_multiplier=0.35, num_labels=2, segmentation_head="lraspp", output_stride=16, image_size=64
    )
    model = MobileNetForSemanticSegmentation(config).eval()
    save_native(tmp_path / "source", output_stride=16, width_multiplier=0.35)
    checkpoint = read(tmp_path / "source")
    checkpoint.processor = MobileNetImageProcessor.from_recipe("torchvision_segmentation", 64)
    checkpoint.oracle, checkpoint.config = lambda: None, config.to_dict()
    model.save_pretrained(tmp_path / "output")
    checkpoint.processor.save_pretrained(tmp_path / "output")
    comparisons, _ = check_parity(tmp_path / "output", model, checkpoint, list(map(str, images[:2])), slice(0, None))
    assert [(each.images, each.agreement) for each in comparisons] == [(2, 1.0)]
