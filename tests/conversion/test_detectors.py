"""Conversions of detectors: TFLite files against LiteRT, other layouts against networks written out here."""

import json
import math
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conversions import assert_fails_without_a_trace, read
from mobilenet.detection_mobilenet import suppress
from mobilenet.heads_mobilenet import DETECTORS
from mobilenet.preprocessing_mobilenet import SUPPRESSION
from oracles import randomize_norms
from torch import Tensor, nn

from mobilenet import MobileNetConfig, MobileNetForObjectDetection
from mobilenet.conversion import ConversionError, from_slim
from mobilenet.conversion.convert import build, convert
from mobilenet.conversion.detectors import Branch, DetectorMatcher
from mobilenet.conversion.from_tflite import read_numbers
from mobilenet.conversion.graph import Conv, Graph
from mobilenet.conversion.parity import compare_detections
from mobilenet.conversion.parity_detection import agreement, detect


pytestmark = pytest.mark.any_version

QUANTIZED = "coco_ssd_mobilenet_v1_1.0_quant_2018_06_29.tflite"
SHOWN = ("kite_and_cold.jpg", "cats_and_dogs.jpg", "cat_1080p.jpg", "parrot.jpg", "burger.jpg")


@torch.no_grad()
def outputs(model: MobileNetForObjectDetection, images: Tensor) -> tuple[Tensor, Tensor]:
    found = model(images)
    return found.scores, found.pred_boxes


def shown(data: Path) -> list[str]:
    return [str(data / "images" / name) for name in SHOWN]


# TFLite


def ssd_anchors(sizes: list[tuple[int, int]]) -> list[tuple[float, ...]]:
    """Anchors (y, x, h, w) as create_ssd_anchors of the object detection API makes them, written out."""
    scales = [0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0]
    anchors = []
    for k, (height, width) in enumerate(sizes):
        pairs = [(scales[k], ratio) for ratio in (1.0, 2.0, 0.5, 3.0, 0.3333)]
        pairs.append((math.sqrt(scales[k] * scales[k + 1]), 1.0))
        if k == 0:
            pairs = [(0.1, 1.0), (0.2, 2.0), (0.2, 0.5)]
        for row in range(height):
            for column in range(width):
                center = (row + 0.5) / height, (column + 0.5) / width
                anchors += [(*center, s / math.sqrt(ratio), s * math.sqrt(ratio)) for s, ratio in pairs]
    return anchors


def in_floats(source: Path, target: Path, **options: object) -> Path:
    """Write a quantized file anew with real numbers instead of bytes, and with other options of its last operator."""
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="ai-edge-litert is not installed")
    import flatbuffers
    from flatbuffers import flexbuffers

    model = schema.ModelT.InitFromPackedBuf(source.read_bytes(), 0)
    (graph,) = model.subgraphs
    kinds = {schema.TensorType.UINT8: np.uint8, schema.TensorType.INT32: np.int32}
    dequantized = {}
    for index, tensor in enumerate(graph.tensors):
        scale = tensor.quantization.scale if tensor.quantization else None
        if scale is None:
            continue
        buffer = model.buffers[tensor.buffer]
        if buffer.data is not None:
            values = np.frombuffer(bytes(buffer.data), kinds[tensor.type]).astype(np.float64)
            values = ((values - tensor.quantization.zeroPoint[0]) * scale[0]).astype(np.float32)
            buffer.data = np.frombuffer(values.tobytes(), np.uint8)
            dequantized[index] = values
        tensor.type, tensor.quantization = schema.TensorType.FLOAT32, None
    for operator in graph.operators:  # the range of bytes has stood for the activation
        if graph.tensors[operator.outputs[0]].name.endswith(b"/Relu6"):
            operator.builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.RELU6
    last = graph.operators[-1]
    anchors = np.array(ssd_anchors([(19, 19), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1)]), np.float32)
    assert np.abs(anchors - dequantized[last.inputs[2]].reshape(-1, 4)).max() < 0.0033
    model.buffers[graph.tensors[last.inputs[2]].buffer].data = np.frombuffer(anchors.tobytes(), np.uint8)
    known = flexbuffers.Loads(bytes(last.customOptions)) | options
    last.customOptions = np.frombuffer(bytes(flexbuffers.Dumps(known)), np.uint8)
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    target.write_bytes(builder.Output())
    return target


@pytest.fixture(scope="module")
def float_file(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_floats(data / "tflite" / QUANTIZED, tmp_path_factory.mktemp("float") / "detector.tflite")


def test_a_float_file_gives_the_interpreters_boxes_and_scores(
    float_file: Path, data: Path, photographs: list[Path]
) -> None:
    checkpoint = read(float_file)
    assert checkpoint.config["detector"] == "ssd_mobilenet_v1"
    assert checkpoint.quantization is None
    model = build(checkpoint, "")
    images = checkpoint.processor([*shown(data), *photographs[::30]], return_tensors="pt").pixel_values
    scores, boxes = outputs(model, images)
    theirs = checkpoint.oracle().results(images)
    torch.testing.assert_close(scores, theirs.scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(boxes, theirs.boxes, atol=1e-3, rtol=0)
    ours = detect(checkpoint.processor, scores, boxes)
    assert agreement(ours, theirs.detections) == 1
    assert sum((each["scores"] > 0.5).sum() for each in ours) > 20


@pytest.mark.parametrize(
    "options",
    [
        {"max_detections": 10},
        {"max_detections": 25, "max_classes_per_detection": 3, "nms_iou_threshold": 0.3},
        {"use_regular_nms": True, "max_detections": 40, "nms_iou_threshold": 0.5},
        {"use_regular_nms": True, "max_detections": 60, "detections_per_class": 2, "nms_score_threshold": 0.2},
    ],
)
def test_suppression_is_that_of_the_operator(options: dict, data: Path, tmp_path: Path) -> None:
    """On the operator's own inputs, in order, whichever way its options ask for."""
    path = in_floats(data / "tflite" / QUANTIZED, tmp_path / "detector.tflite", **options)
    checkpoint = read(path)
    images = checkpoint.processor(shown(data)[:3], return_tensors="pt").pixel_values
    found = checkpoint.oracle().results(images)
    settings = {name: getattr(checkpoint.processor, name) for name in SUPPRESSION}
    for scores, boxes, expected in zip(found.scores, found.boxes, found.detections, strict=True):
        ours = dict(zip(("scores", "labels", "boxes"), suppress(scores, boxes, **settings), strict=True))
        torch.testing.assert_close(ours["scores"], expected["scores"], atol=0, rtol=0)
        torch.testing.assert_close(ours["labels"], expected["labels"])
        torch.testing.assert_close(ours["boxes"], expected["boxes"], atol=1e-6, rtol=0)
        assert len(ours["scores"]) >= 10


def test_a_quantized_file_detects_what_the_interpreter_does(data: Path) -> None:
    """Of what either sees with more than 0.5, the other has the same class at nearly the same place and score.

    The interpreter rounds scores to 1 / 256 and logits to coarser steps, so that anchors tie which do not for us: of
    two that overlap, another may remain. Where it is the same anchor, scores differ by at most 0.06.
    """
    checkpoint = read(data / "tflite" / QUANTIZED)
    assert checkpoint.config["width_multiplier"] == 0.75
    assert checkpoint.config["detector"] == "ssd_mobilenet_v1_focal"
    assert (checkpoint.labels[0], checkpoint.labels[37], checkpoint.labels[89]) == ("person", "kite", "toothbrush")
    model = build(checkpoint, "")
    images = checkpoint.processor(shown(data), return_tensors="pt").pixel_values
    scores, boxes = outputs(model, images)
    theirs = checkpoint.oracle().results(images)
    assert (scores - theirs.scores).abs().max() < 0.06
    assert (scores - theirs.scores).abs().mean() < 0.0015
    assert (boxes - theirs.boxes).abs().mean() < 0.002
    assert agreement(detect(checkpoint.processor, scores, boxes), theirs.detections) >= 0.85


@pytest.mark.slow
def test_on_all_photographs_nearly_all_detections_are_the_interpreters(data: Path, photographs: list[Path]) -> None:
    checkpoint = read(data / "tflite" / QUANTIZED)
    images = [*map(str, photographs), *shown(data)]
    _, _, (alike, _, plain, _), caveats = compare_detections(build(checkpoint, ""), checkpoint, images)
    assert caveats == []
    assert alike.agreement >= 0.96
    assert plain.agreement >= 0.95
    assert plain.largest <= 0.061


def test_the_converted_folder_is_a_detectors(data: Path, tmp_path: Path) -> None:
    comparisons = convert(str(data / "tflite" / QUANTIZED), tmp_path / "detector")
    assert [row.against.rpartition(": ")[2] for row in comparisons] == ["scores", "boxes"] * 3
    card = (tmp_path / "detector" / "README.md").read_text()
    assert "pipeline_tag: object-detection" in card
    assert 'detect = pipeline("object-detection"' in card
    assert "same detections" in card
    options = json.loads((tmp_path / "detector" / "preprocessor_config.json").read_text())
    assert (options["max_detections"], options["max_classes_per_box"]) == (10, 1)
    assert options["nms_iou_threshold"] == pytest.approx(0.6)
    model = MobileNetForObjectDetection.from_pretrained(tmp_path / "detector")
    assert model.config.id2label[16] == "cat"


def test_unfused_and_fused_it_detects_the_same(data: Path, tmp_path: Path) -> None:
    source = str(data / "tflite" / QUANTIZED)
    images = torch.rand(1, 3, 300, 300) * 2 - 1
    scores, boxes = outputs(build(read(source), ""), images)
    for option in ("unfuse", "fuse"):
        convert(source, tmp_path / option, compare=False, **{option: True})
        model = MobileNetForObjectDetection.from_pretrained(tmp_path / option).eval()
        assert model.config.has_batch_norm == (option == "unfuse")
        found = outputs(model, images)
        torch.testing.assert_close(found[0], scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(found[1], boxes, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"y_scale": 5.0}, "the last operator scales boxes by 10, 5, 5, 5, and must by 10.0, 5.0"),
        ({"nms_iou_threshold": 2.0}, "nms_iou_threshold must be a number from 0 to 1, got 2.0"),
        ({"max_detections": -3}, "must be above 0 and their product at most 65536, got -3 and 1"),
        (
            {"max_detections": 65536, "max_classes_per_detection": 65536},
            "must be above 0 and their product at most 65536, got 65536 and 65536",
        ),
        (
            {"use_regular_nms": True, "max_classes_per_detection": 0},
            "must be above 0 and their product at most 65536, got 10 and 0",
        ),
        ({"num_classes": "many"}, "cannot be understood: num_classes must be a number"),
        ({"num_classes": None}, "num_classes of TFLite_Detection_PostProcess must be a number"),
        ({"num_classes": 80}, "must predict 80 classes and the background for 3 anchors, has 273 channels"),
    ],
)
def test_files_with_other_options_are_refused(options: dict, reason: str, data: Path, tmp_path: Path) -> None:
    path = in_floats(data / "tflite" / QUANTIZED, tmp_path / "detector.tflite", **options)
    assert_fails_without_a_trace(path, tmp_path / "output", reason)


def nested(key: bytes) -> bytes:
    """A map of one vector, which holds one vector 255 times, and so on: 255 ** 9 numbers in 12 kB."""
    data, child, kind = b"", 0, 1 << 2 | 2  # kinds are those of FlexBuffers, of 4 bytes each
    for _ in range(9):
        start = len(data) + 4
        data += struct.pack("<256I", 255, *(start + 4 * index - child for index in range(255))) + bytes([kind]) * 255
        child, kind = start, 10 << 2 | 2
    data, place = data + key + b"\0", len(data)
    data, keys = data + struct.pack("<II", 1, len(data) + 4 - place), len(data) + 4
    start = len(data) + 12
    data += struct.pack("<4IB", len(data) - keys, 4, 1, start - child, kind)
    return data + struct.pack("<IBB", len(data) - start, 9 << 2 | 2, 4)


def test_options_are_read_within_their_bytes() -> None:
    """And only the numbers: a vector may hold itself, or another many times."""
    flexbuffers = pytest.importorskip("flatbuffers.flexbuffers")
    known = {"max_detections": 10, "nms_iou_threshold": 0.6, "num_classes": 90, "use_regular_nms": True, "w_scale": 5}
    whole = bytes(flexbuffers.Dumps({**known, "_output_types": [1, 2]}))
    assert read_numbers(whole) == pytest.approx(known | {"use_regular_nms": 1})
    assert read_numbers(nested(b"_x")) == {}
    for broken, words in (
        (nested(b"x"), "x must be a number"),
        (bytes(flexbuffers.Dumps({"a": "b"})), "a must be a number"),
        (bytes(flexbuffers.Dumps([1, 2])), "must be a map"),
        (b"", "must be a map"),
        (whole[5:], "must"),
    ):
        with pytest.raises(ValueError, match=words):
            read_numbers(broken)
    chance, refused = np.random.default_rng(0), 0
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(chance.integers(1, 4)):
            data[chance.integers(len(data))] = chance.integers(256)
        try:
            read_numbers(bytes(data))
        except ValueError:
            refused += 1
    assert 200 < refused < 1000


@pytest.mark.parametrize(
    ("size", "words"),
    [
        # Sums of the cells of 6 maps, whose sides are half of each other: 3750, 1875, 938, ... with 3 or 6 anchors.
        (60_000, "must have the 70294974 anchors of SSD MobileNet V1"),
        (300_000, "with a size of at most 65536, got [1, 300000, 300000, 3]"),
    ],
)
def test_images_of_absurd_size_are_refused(size: int, words: str, data: Path, tmp_path: Path) -> None:
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="ai-edge-litert is not installed")
    flatbuffers = pytest.importorskip("flatbuffers")
    model = schema.ModelT.InitFromPackedBuf((data / "tflite" / QUANTIZED).read_bytes(), 0)
    (graph,) = model.subgraphs
    graph.tensors[graph.inputs[0]].shape = np.array([1, size, size, 3], np.int32)
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    (tmp_path / "detector.tflite").write_bytes(builder.Output())
    assert_fails_without_a_trace(tmp_path / "detector.tflite", tmp_path / "output", words)


def test_predictors_with_odd_channels_are_refused() -> None:
    """Boxes have four numbers; what is no tensor of boxes is left as it is, until it is refused by its name."""
    matcher = DetectorMatcher(Graph(ops=[], input=0, output=1, channels=3, size=32), "source", None)
    conv = Conv(name="boxes", inputs=(0,), output=1, weight=torch.zeros(11, 8, 1, 1))
    with pytest.raises(ConversionError, match="boxes must predict 4 numbers for each box, has 11 channels"):
        matcher.predictor("box_predictors.0", Branch(0, [conv]), DETECTORS["ssd_mobilenet_v1"])
    name = "BoxPredictor_0/BoxEncodingPredictor/biases"
    assert from_slim.without_sizes({name: torch.tensor(1.0)}) == {name: torch.tensor(1.0)}


def in_tensorflow(model: MobileNetForObjectDetection, size: int, path: Path) -> Path:
    """Write a fused detector of inverted residuals as TensorFlow's converter does, and the operator behind it."""
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="ai-edge-litert is not installed")
    import flatbuffers
    from flatbuffers import flexbuffers

    acts = {"ReLU6": tf.nn.relu6, "ReLU": tf.nn.relu, "Hardswish": lambda x: x * tf.nn.relu6(x + 3) / 6}

    def conv(x: object, layer: nn.Module) -> object:
        inner = getattr(layer, "conv", layer)
        weight, bias = (t.detach().numpy() for t in (inner.weight, inner.bias))
        if inner.groups > 1:
            weight = weight.transpose(2, 3, 0, 1)
            x = tf.nn.depthwise_conv2d(x, weight, [1, *inner.stride, 1], "SAME")
        else:
            x = tf.nn.conv2d(x, weight.transpose(2, 3, 1, 0), inner.stride, "SAME")
        return acts.get(type(getattr(layer, "act", None)).__name__, lambda x: x)(x + bias)

    def block(x: object, layer: nn.Module) -> tuple[object, object]:
        expanded = x if isinstance(layer.expand, nn.Identity) else conv(x, layer.expand)
        y = conv(expanded, layer.depthwise)
        if not isinstance(layer.squeeze, nn.Identity):
            gate = tf.nn.relu(conv(tf.reduce_mean(y, [1, 2], keepdims=True), layer.squeeze.reduce))
            y = y * (tf.nn.relu6(conv(gate, layer.squeeze.expand) + 3) / 6)
        y = conv(y, layer.project)
        return expanded, x + y if layer.has_shortcut else y

    def predict(x: object, layer: nn.Module, order: list[int]) -> object:
        y = conv(conv(x, layer.depthwise), layer.conv)
        y = tf.reshape(y, [1, -1, layer.numbers])
        return tf.gather(y, order, axis=-1) if order != list(range(layer.numbers)) else y

    # Boxes are predicted as y, x, h, w.
    for predictor in model.box_predictors:
        for parameter in predictor.conv.parameters():
            parameter.data = parameter.data.unflatten(0, (-1, 4))[:, [1, 0, 3, 2]].flatten(0, 1)

    @tf.function(input_signature=[tf.TensorSpec([1, size, size, 3], tf.float32)])
    def run(x: object) -> tuple[object, object]:
        x = conv(x, model.backbone.stem)
        blocks = [layer for stage in model.backbone.stages for layer in stage]
        cut = model.backbone.stages[-1][0]
        for layer in blocks:
            expanded, x = block(x, layer)
            if layer is cut:
                maps = [expanded]
        maps.append(conv(x, model.backbone.head))
        for extra in model.extras:
            maps.append(conv(conv(conv(maps[-1], extra.reduce), extra.depthwise), extra.expand))
        parts = []
        for predictors in (model.box_predictors, model.class_predictors):
            order = list(range(predictors[0].numbers))
            parts.append(tf.concat([predict(m, p, order) for m, p in zip(maps, predictors, strict=True)], 1))
        return parts[0], tf.sigmoid(parts[1])

    converter = tf.lite.TFLiteConverter.from_concrete_functions([run.get_concrete_function()])
    flat = schema.ModelT.InitFromPackedBuf(converter.convert(), 0)
    (graph,) = flat.subgraphs
    by_width = {list(graph.tensors[number].shape)[-1]: number for number in graph.outputs}
    codes, scores = by_width[4], by_width[model.classes]
    sizes = [(side, side) for side in (size // 16, size // 32, size // 64, max(1, size // 128), 1, 1)]
    anchors = np.array(ssd_anchors(sizes), np.float32)

    def tensor(name: str, shape: tuple[int, ...], data: bytes | None = None) -> int:
        buffer = schema.BufferT()
        buffer.data = data and np.frombuffer(data, np.uint8)
        flat.buffers.append(buffer)
        new = schema.TensorT()
        new.name, new.type, new.buffer = name.encode(), schema.TensorType.FLOAT32, len(flat.buffers) - 1
        new.shape = np.array(shape, np.int32)
        graph.tensors.append(new)
        return len(graph.tensors) - 1

    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM, schema.BuiltinOperator.CUSTOM
    code.customCode, code.version = b"TFLite_Detection_PostProcess", 1
    flat.operatorCodes.append(code)
    operator = schema.OperatorT()
    operator.opcodeIndex = len(flat.operatorCodes) - 1
    operator.inputs = np.array([codes, scores, tensor("anchors", anchors.shape, anchors.tobytes())], np.int32)
    operator.outputs = np.array([tensor(f"result{index}", (1,)) for index in range(4)], np.int32)
    options = {"max_detections": 20, "max_classes_per_detection": 1, "num_classes": model.config.num_labels}
    options |= {"nms_score_threshold": 1e-8, "nms_iou_threshold": 0.6}
    options |= {"y_scale": 10.0, "x_scale": 10.0, "h_scale": 5.0, "w_scale": 5.0}
    operator.customOptions = np.frombuffer(bytes(flexbuffers.Dumps(options)), np.uint8)
    graph.operators.append(operator)
    graph.outputs, flat.signatureDefs = operator.outputs, None
    builder = flatbuffers.Builder()
    builder.Finish(flat.Pack(builder), b"TFL3")
    path.write_bytes(builder.Output())
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "width"),
    [("ssdlite_mobilenet_v2", 0.35), ("ssdlite_mobilenet_v3_large", 1.0), ("ssdlite_mobilenet_v3_small", 0.75)],
)
def test_ssdlite_in_tflite_gives_the_interpreters_boxes_and_scores(name: str, width: float, tmp_path: Path) -> None:
    config = MobileNetConfig.from_preset(name, width_multiplier=width, num_labels=6)
    model = randomize_norms(MobileNetForObjectDetection(config)).eval().fuse()
    checkpoint = read(in_tensorflow(model, 128, tmp_path / "detector.tflite"))
    assert (checkpoint.config["detector"], checkpoint.config["width_multiplier"]) == (name, width)
    images = torch.randn(2, 3, 128, 128)
    scores, boxes = outputs(build(checkpoint, ""), images)
    theirs = checkpoint.oracle().results(images)
    torch.testing.assert_close(scores, theirs.scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(boxes, theirs.boxes, atol=1e-3, rtol=0)
    assert scores.std() > 1e-3


# torchvision


def unit(inputs: int, outputs: int, act: type, *args: int, **kwargs: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, *args, bias=False, **kwargs)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, 1e-3), act())


def depthwise(channels: int, act: type, kernel: int, stride: int) -> nn.Sequential:
    return unit(channels, channels, act, kernel, stride, kernel // 2, groups=channels)


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * nn.functional.hardsigmoid(self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()))


class Bneck(nn.Module):
    def __init__(self, inputs: int, kernel: int, hidden: int, outputs: int, squeezed: int, act: type, stride: int):
        super().__init__()
        layers = [] if hidden == inputs else [unit(inputs, hidden, act, 1)]
        layers.append(depthwise(hidden, act, kernel, stride))
        layers += [SqueezeExcitation(hidden, squeezed)] if squeezed else []
        self.block = nn.Sequential(*layers, unit(hidden, outputs, nn.Identity, 1))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.adds else self.block(x)


# Table 1 of arXiv:1905.02244, with half the channels in the last stage: kernel, exp size, #out, squeezed, NL, s.
RE, HS, R6 = nn.ReLU, nn.Hardswish, nn.ReLU6
REDUCED = (
    *((3, 16, 16, 0, RE, 1), (3, 64, 24, 0, RE, 2), (3, 72, 24, 0, RE, 1)),
    *((5, 72, 40, 24, RE, 2), (5, 120, 40, 32, RE, 1), (5, 120, 40, 32, RE, 1)),
    *((3, 240, 80, 0, HS, 2), (3, 200, 80, 0, HS, 1), (3, 184, 80, 0, HS, 1), (3, 184, 80, 0, HS, 1)),
    *((3, 480, 112, 120, HS, 1), (3, 672, 112, 168, HS, 1)),
    *((5, 672, 80, 168, HS, 2), (5, 480, 80, 120, HS, 1), (5, 480, 80, 120, HS, 1)),
)


class SSDLite(nn.Module):
    """The layout of torchvision/models/detection/ssdlite.py, without its image transform."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        inputs = (16, *(row[2] for row in REDUCED))
        *blocks, cut, second, third = (Bneck(before, *row) for before, row in zip(inputs, REDUCED, strict=False))
        expand, *rest = cut.block.named_children()
        self.backbone = nn.Module()
        self.backbone.features = nn.Sequential(
            nn.Sequential(unit(3, 16, HS, 3, 2, 1), *blocks, expand[1]),
            nn.Sequential(nn.Sequential(OrderedDict(rest)), second, third, unit(80, 480, HS, 1)),
        )
        extra, before = [], 480
        for channels in (512, 256, 256, 128):
            half = channels // 2
            extra.append(
                nn.Sequential(unit(before, half, R6, 1), depthwise(half, R6, 3, 2), unit(half, channels, R6, 1))
            )
            before = channels
        self.backbone.extra = nn.ModuleList(extra)
        self.head = nn.Module()
        for name, numbers in (("classification_head", classes), ("regression_head", 4)):
            head = nn.Module()
            head.module_list = nn.ModuleList(
                nn.Sequential(depthwise(channels, R6, 3, 1), nn.Conv2d(channels, 6 * numbers, 1))
                for channels in (672, 480, 512, 256, 256, 128)
            )
            setattr(self.head, name, head)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores without background, and boxes (cx, cy, w, h) relative to the image."""
        maps = []
        for layer in (*self.backbone.features, *self.backbone.extra):
            x = layer(x)
            maps.append(x)
        parts = []
        for head in (self.head.classification_head, self.head.regression_head):
            rows = []
            for predict, x in zip(head.module_list, maps, strict=True):
                batch, channels, height, width = (y := predict(x)).shape
                rows.append(y.view(batch, 6, channels // 6, height, width).permute(0, 3, 4, 1, 2).flatten(1, 3))
            parts.append(torch.cat(rows, 1))
        anchors = torch.tensor(default_boxes([m.shape[-2:] for m in maps]))
        codes, (cx, cy, w, h) = parts[1], anchors.T
        boxes = codes[..., 0] / 10 * w + cx, codes[..., 1] / 10 * h + cy
        limit = math.log(1000 / 16)
        sides = ((codes[..., i] / 5).clamp(max=limit).exp() * side for i, side in ((2, w), (3, h)))
        return parts[0].softmax(-1)[..., 1:], torch.stack((*boxes, *sides), -1)


def default_boxes(sizes: list[tuple[int, int]]) -> list[tuple[float, ...]]:
    """Equations 4 and the text after it of SSD (arXiv:1512.02325), in the order of torchvision's generator."""
    scales = [0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0]
    boxes = []
    for k, (height, width) in enumerate(sizes):
        between = math.sqrt(scales[k] * scales[k + 1])
        sides = [(scales[k], scales[k]), (between, between)]
        for ratio in (2, 3):
            long, short = scales[k] * math.sqrt(ratio), scales[k] / math.sqrt(ratio)
            sides += [(long, short), (short, long)]
        for row in range(height):
            for column in range(width):
                center = (column + 0.5) / width, (row + 0.5) / height
                boxes += [(*center, min(w, 1.0), min(h, 1.0)) for w, h in sides]
    return boxes


@pytest.fixture(scope="module")
def ssdlite(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = randomize_norms(SSDLite(91)).eval()
    for predict in model.head.classification_head.module_list:
        predict[1].weight.data *= 10  # as sure of its predictions as trained networks are
    path = tmp_path_factory.mktemp("torchvision") / "ssdlite320_mobilenet_v3_large_coco.pth"
    torch.save(model.state_dict(), path)
    return model, path


def test_torchvisions_ssdlite_gives_its_boxes_and_scores(ssdlite: tuple[nn.Module, Path]) -> None:
    theirs, path = ssdlite
    # As many as the documentation of SSDLite320_MobileNet_V3_Large_Weights says.
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 3_440_060
    checkpoint = read(path)
    assert checkpoint.config["detector"] == "ssdlite320_mobilenet_v3_large"
    assert (checkpoint.config["image_size"], checkpoint.config["num_labels"]) == (320, 90)
    model = build(checkpoint, "")
    for size in ((320, 320), (160, 224)):
        images = torch.randn(2, 3, *size)
        scores, boxes = outputs(model, images)
        with torch.no_grad():
            expected_scores, expected_boxes = theirs(images)
        torch.testing.assert_close(scores, expected_scores, atol=1e-4, rtol=0)
        torch.testing.assert_close(boxes, expected_boxes, atol=1e-3, rtol=0)
        assert scores.max() > 0.05
        assert scores.std() > 1e-3


def test_torchvisions_suppression_and_labels_come_along(ssdlite: tuple[nn.Module, Path], tmp_path: Path) -> None:
    comparisons = convert(str(ssdlite[1]), tmp_path / "detector")
    # torchvision's own code is the oracle where it is installed.
    assert comparisons[-1].against == "the repository, loaded anew: boxes"
    options = json.loads((tmp_path / "detector" / "preprocessor_config.json").read_text())
    assert (options["nms_iou_threshold"], options["max_detections"]) == (0.55, 300)
    assert (options["max_candidates_per_class"], options["score_threshold"]) == (300, 0.001)
    assert options["image_mean"] == [0.5, 0.5, 0.5]
    config = json.loads((tmp_path / "detector" / "config.json").read_text())
    assert config["id2label"]["0"] == "person"
    assert config["id2label"]["11"] == "N/A"


def test_a_table_with_two_names_swapped_is_noticed(ssdlite: tuple[nn.Module, Path]) -> None:
    checkpoint = read(ssdlite[1])
    names = [name for name in checkpoint.table.rows if not name.startswith(("extras.3", "box_predictors.5"))]
    assert len(names) > 40
    right = outputs(build(checkpoint, ""), images := torch.randn(1, 3, 320, 320))
    rows = checkpoint.table.rows
    swaps = (
        ("box_predictors.2", "box_predictors.5"),
        ("box_predictors.3.depthwise", "class_predictors.3.depthwise"),
        ("extras.2.reduce", "extras.1.reduce"),
        ("block_13.depthwise", "block_14.depthwise"),
    )
    for first, second in swaps:
        wrong = checkpoint.table._replace(rows={**rows, first: rows[second], second: rows[first]})
        try:
            checkpoint.table = wrong
            found = outputs(build(checkpoint, ""), images)
        except ValueError:
            continue
        finally:
            checkpoint.table = checkpoint.table._replace(rows=rows)
        assert max((a - b).abs().max() for a, b in zip(found, right, strict=True)) > 1e-4, (first, second)


# TensorFlow's object detection API


def api_names(model: MobileNetForObjectDetection, scope: str, last: str) -> dict[str, np.ndarray]:
    """The variables of a detector as the API names and stores them, written out from our layers."""
    lite = DETECTORS[model.config.detector].is_lite
    variables: dict[str, np.ndarray] = {}

    def put(name: str, layer: nn.Module, is_boxes: bool = False) -> None:
        conv = getattr(layer, "conv", layer)
        weight = conv.weight.detach()
        if is_boxes:  # y, x, h, w
            weight = weight.unflatten(0, (-1, 4))[:, [1, 0, 3, 2]].flatten(0, 1)
        if conv.groups > 1:
            variables[f"{name}/depthwise_weights"] = weight.permute(2, 3, 0, 1).numpy()
        else:
            variables[f"{name}/weights"] = weight.permute(2, 3, 1, 0).numpy()
        if conv.bias is not None:
            bias = conv.bias.detach()
            variables[f"{name}/biases"] = (
                bias.unflatten(0, (-1, 4))[:, [1, 0, 3, 2]].flatten() if is_boxes else bias
            ).numpy()
        if isinstance(norm := getattr(layer, "norm", None), nn.BatchNorm2d):
            parts = {"gamma": norm.weight, "beta": norm.bias}
            parts |= {"moving_mean": norm.running_mean, "moving_variance": norm.running_var}
            variables.update({f"{name}/BatchNorm/{part}": t.detach().numpy() for part, t in parts.items()})

    backbone, top = model.backbone, f"FeatureExtractor/{scope}"
    blocks = [block for stage in backbone.stages for block in stage]
    if scope == "MobilenetV1":
        put(f"{top}/Conv2d_0", backbone.stem)
        for index, block in enumerate(blocks, start=1):
            put(f"{top}/Conv2d_{index}_depthwise", block.depthwise)
            put(f"{top}/Conv2d_{index}_pointwise", block.pointwise)
    else:
        put(f"{top}/Conv", backbone.stem)
        for index, block in enumerate(blocks):
            name = f"{top}/expanded_conv" + (f"_{index}" if index else "")
            for role in ("expand", "depthwise", "project"):
                if not isinstance(getattr(block, role), nn.Identity):
                    put(f"{name}/{role}", getattr(block, role))
        put(f"{top}/Conv_1", backbone.head)
    for index, extra in enumerate(model.extras, start=2):
        reduced, wide = extra.reduce.conv.out_channels, extra.expand.conv.out_channels
        put(f"{top}/{last}_1_Conv2d_{index}_1x1_{reduced}", extra.reduce)
        name = f"{top}/{last}_2_Conv2d_{index}_3x3_s2_{wide}"
        put(name, extra.expand)
        if lite:
            put(f"{name}_depthwise", extra.depthwise)
    for theirs, predictors in (
        ("BoxEncodingPredictor", model.box_predictors),
        ("ClassPredictor", model.class_predictors),
    ):
        for index, predictor in enumerate(predictors):
            name = f"BoxPredictor_{index}/{theirs}"
            put(name, predictor.conv, theirs == "BoxEncodingPredictor")
            if lite:
                put(f"{name}_depthwise", predictor.depthwise)
    return variables


@pytest.mark.parametrize(
    ("detector", "scope", "last", "width"),
    [
        ("ssd_mobilenet_v1", "MobilenetV1", "Conv2d_13_pointwise", 0.25),
        ("ssdlite_mobilenet_v2", "MobilenetV2", "layer_19", 0.35),
        ("ssd_mobilenet_v2", "MobilenetV2", "layer_19", 0.35),
    ],
)
def test_checkpoints_of_the_api_are_read_by_their_names(
    detector: str, scope: str, last: str, width: float, tmp_path: Path
) -> None:
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    config = MobileNetConfig.from_preset(detector, width_multiplier=width, num_labels=7)
    model = randomize_norms(MobileNetForObjectDetection(config)).eval()
    variables = api_names(model, scope, last)
    assert f"FeatureExtractor/{scope}/{last}_2_Conv2d_5_3x3_s2_{max(16, int(128 * width))}/weights" in variables
    variables |= {"global_step": np.int64(7), f"FeatureExtractor/{scope}/x/weights/RMSProp": np.zeros(3, np.float32)}
    names, values = zip(*variables.items(), strict=True)
    prefix = str(tmp_path / "model.ckpt")
    tf.raw_ops.SaveV2(
        prefix=prefix, tensor_names=names, shape_and_slices=[""] * len(names), tensors=[tf.constant(v) for v in values]
    )
    checkpoint = read(Path(prefix))
    assert checkpoint.config["detector"] == detector
    assert checkpoint.config["width_multiplier"] == width
    assert checkpoint.config["num_labels"] == 7
    images = torch.randn(1, 3, 96, 96)
    for ours, theirs in zip(outputs(build(checkpoint, ""), images), outputs(model, images), strict=True):
        torch.testing.assert_close(ours, theirs)
