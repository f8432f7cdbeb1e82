"""Conversions of TFLite files, against LiteRT's interpreter."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from conversions import assert_fails_without_a_trace, assert_wrong_tables_are_noticed, read
from oracles import logits
from torch import Tensor

from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor
from mobilenet.conversion import from_tflite
from mobilenet.conversion.convert import build, convert
from mobilenet.conversion.graph import Squeeze, expected
from mobilenet.conversion.parity import compare_with_source, rounded
from mobilenet.synthetic import draw_images


pytestmark = pytest.mark.any_version


litert = pytest.importorskip("ai_edge_litert.interpreter", reason="ai-edge-litert is not installed")

FLOAT = "mobilenet_v1_0.25_224_1_default_1.tflite"
V1, V2, V2_PER_CHANNEL, EDGETPU = (
    "mobilenet_v1_0.25_128_quant.tflite",
    "mobilenet_v2_1.0_224_quant.tflite",
    "tf2_mobilenet_v2_1.0_224_ptq.tflite",
    "mobilenet_edgetpu_224_1.0_uint8.tflite",
)


def probabilities(path: Path, photographs: list[Path], size: int) -> Tensor:
    """What the interpreter makes of photographs, resized and cropped but not normalized by our processor."""
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "agreement"),
    [(V1, 128, 0.92), (V2, 224, 0.98), (V2_PER_CHANNEL, 224, 0.95), (EDGETPU, 224, 0.97)],
)
def test_the_float_network_agrees_with_the_quantized_one(
    name: str, size: int, agreement: float, data: Path, photographs: list[Path]
) -> None:
    path = data / "tflite" / name
    same = ours(path, photographs).argmax(-1) == probabilities(path, photographs, size).argmax(-1)
    assert same.float().mean().item() >= agreement


def test_edgetpu_is_right_on_photographs(data: Path, photographs: list[Path]) -> None:
    """Fused inverted bottlenecks, from a file that leaves the shapes of activations to the runtime."""
    checkpoint = read(data / "tflite" / EDGETPU)
    assert checkpoint.config["architecture"] == "mobilenet_edgetpu"
    assert checkpoint.warnings == []
    chosen = photographs[::38]
    predictions = ours(data / "tflite" / EDGETPU, chosen).argmax(-1)
    rows = csv.DictReader((data / "imagenet_sample" / "labels.csv").read_text().splitlines())
    labels = {row["file"]: int(row["index_1001"]) for row in rows}
    assert (predictions == torch.tensor([labels[photograph.name] for photograph in chosen])).sum() >= 7


@pytest.mark.parametrize("name", [V1, V2, V2_PER_CHANNEL])
def test_rounded_as_quantization_json_says_logits_are_the_interpreters(
    name: str, data: Path, photographs: list[Path]
) -> None:
    checkpoint = read(data / "tflite" / name)
    model = build(checkpoint, "")
    images = checkpoint.processor(photographs[::20], return_tensors="pt").pixel_values
    step = checkpoint.quantization["activations"]["classifier"]["scale"]
    expected = checkpoint.oracle().logits(images)
    with rounded(model, checkpoint.quantization["activations"]):
        alike = logits(model, images)
    plain = logits(model, images)
    assert (alike - expected).abs().mean() < 1.1 * step
    assert (alike / step - (alike / step).round()).abs().max() < 1e-3
    assert (plain / step - (plain / step).round()).abs().max() > 0.4  # nothing rounds any more
    levels = checkpoint.processor(photographs[:1], return_tensors="pt").pixel_values
    levels = levels / checkpoint.quantization["activations"]["pixel_values"]["scale"]
    assert (levels - levels.round()).abs().max() < 1e-3  # each byte of an image is one of the file's


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
    checkpoint = read(data / "tflite" / FLOAT, image_size=128)
    _, comparisons, caveats = compare_with_source(build(checkpoint, ""), checkpoint, draw_images(tmp_path))
    assert comparisons == []
    assert "the TFLite file takes images of 224 pixels, not of 128." in caveats[0]


def test_batch_norms_are_unfolded_for_fine_tuning(data: Path, tmp_path: Path, cats: Path) -> None:
    source = data / "tflite" / V1
    convert(str(source), tmp_path / "output", unfuse=True, drop_background=True, compare_on=cats.parent, compare=False)
    model = MobileNetForImageClassification.from_pretrained(tmp_path / "output")
    processor = MobileNetImageProcessor.from_pretrained(tmp_path / "output")
    images = processor(
        [cats, cats.with_name("parrot.jpg"), cats.with_name("owl.jpg")], return_tensors="pt"
    ).pixel_values
    folded = logits(build(read(source), ""), images)[:, 1:]
    torch.testing.assert_close(logits(model.eval(), images), folded, atol=1e-4, rtol=0)
    assert model.config.id2label[281] == "tabby, tabby cat"
    # With statistics of real images, a step of training starts near where evaluation stands.
    images = processor([*cats.parent.glob("*.*")], return_tensors="pt").pixel_values
    before = logits(model, images)
    after = logits(model.train(), images)
    assert torch.nn.functional.cosine_similarity(before, after).min() > 0.9
    quantization = json.loads((tmp_path / "output" / "quantization.json").read_text())
    assert quantization["weights"]["classifier.weight"]["scale"] == [pytest.approx(0.0055403, rel=1e-4)]
    assert "`quantization.json`" in (tmp_path / "output" / "README.md").read_text()


def test_a_quantized_classifier_loses_the_scale_of_the_background(data: Path, tmp_path: Path) -> None:
    convert(str(data / "tflite" / V2_PER_CHANNEL), tmp_path / "output", drop_background=True, compare=False)
    kept = json.loads((tmp_path / "output" / "quantization.json").read_text())["weights"]["classifier.weight"]
    whole = read(data / "tflite" / V2_PER_CHANNEL).quantization["weights"]["classifier.weight"]
    assert (kept["scale"], kept["zero_point"]) == (whole["scale"][1:], whole["zero_point"][1:])


def test_broken_files_are_refused(data: Path, tmp_path: Path) -> None:
    whole = (data / "tflite" / FLOAT).read_bytes()
    source = tmp_path / "model.tflite"
    for part in (whole[: len(whole) // 2], whole[:100], b"", whole[:4] + b"XXXX" + whole[8:]):
        source.write_bytes(part)
        assert_fails_without_a_trace(source, tmp_path / "output", "model.tflite: truncated or corrupt")


def changed(data: bytes, change: Callable[[object, object], None], path: Path) -> Path:
    """Write a file in which a function of the schema and the model has changed something."""
    schema, flatbuffers = pytest.importorskip("ai_edge_litert.schema_py_generated"), pytest.importorskip("flatbuffers")
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    change(schema, model)
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(builder.Output())
    return path


def add_fill(schema: object, model: object) -> object:
    """Let a model begin with an operator that makes 640 GB of zeros, which nothing takes."""
    graph = model.subgraphs[0]

    def tensor(kind: int, values: np.ndarray | None) -> int:
        buffer, new = schema.BufferT(), schema.TensorT()
        buffer.data = None if values is None else np.frombuffer(values.tobytes(), np.uint8)
        model.buffers.append(buffer)
        new.type, new.buffer = kind, len(model.buffers) - 1
        new.shape = np.array([] if values is None else values.shape, np.int32)
        graph.tensors.append(new)
        return len(graph.tensors) - 1

    code, operator = schema.OperatorCodeT(), schema.OperatorT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.FILL
    code.version = 1
    model.operatorCodes.append(code)
    sides = tensor(schema.TensorType.INT32, np.int32([400_000, 400_000]))
    zero = tensor(schema.TensorType.FLOAT32, np.float32(0).reshape(()))
    operator.inputs = np.array([sides, zero], np.int32)
    operator.outputs = np.array([tensor(schema.TensorType.FLOAT32, None)], np.int32)
    operator.opcodeIndex = len(model.operatorCodes) - 1
    operator.builtinOptionsType, operator.builtinOptions = schema.BuiltinOptions.FillOptions, schema.FillOptionsT()
    graph.operators.insert(0, operator)
    return operator


def test_what_nobody_needs_is_not_run(data: Path, tmp_path: Path) -> None:
    """LiteRT would run every operator of a file, whether its output is of use or not."""

    def overwrite(schema: object, model: object) -> None:
        operator = add_fill(schema, model)
        operator.outputs = model.subgraphs[0].operators[1].outputs

    whole = next(hostile.tflite_files())
    for change, words in (
        (add_fill, "is no MobileNet that can be converted: FILL 0 makes what the network does not use."),
        (overwrite, "overwrites a value."),
    ):
        assert_fails_without_a_trace(changed(whole, change, tmp_path / "a.tflite"), tmp_path / "output", words)


def flattened(numbers: int) -> bytes:
    """A small classifier whose features are flattened as Keras does it: to a form that is computed from their own.

    Args:
        numbers: How many each part of the form has; one, where the form is right.
    """
    config = MobileNetConfig("mobilenet_v1", 0.1, image_size=32, num_labels=3)
    file, channels = hostile.TFLiteFile(32), config.stages[-1][-1].out_channels
    integers = file.schema.TensorType.INT32

    def integer(value: int) -> int:
        file.graph.tensors[value].type = integers
        return value

    value = file.input
    for step in expected(config):
        value = file.conv(value, step)
    pooled = file.add("MEAN", (value, file.value(np.int32([1, 2]))), "ReducerOptions", keepDims=True)
    form = integer(file.add("SHAPE", (pooled,), "ShapeOptions", outType=integers))
    bounds = [file.value(np.int32([edge])) for edge in (0, 1, 1)]
    batch = integer(file.add("STRIDED_SLICE", (form, *bounds), "StridedSliceOptions", shrinkAxisMask=1))
    width = file.value(np.full(() if numbers == 1 else numbers, channels, np.int32))
    form = integer(file.add("PACK", (batch, width), "PackOptions", valuesCount=2))
    flat = file.add("RESHAPE", (pooled, form), "ReshapeOptions")
    weight, bias = (file.value(file.random.random(shape, np.float32)) for shape in ((3, channels), 3))
    linear = file.add("FULLY_CONNECTED", (flat, weight, bias), "FullyConnectedOptions")
    return file.finish([file.add("SOFTMAX", (linear,), "SoftmaxOptions", beta=1.0)])


def test_forms_that_are_computed_are_run_where_they_are_small(tmp_path: Path) -> None:
    path = tmp_path / "a.tflite"
    path.write_bytes(flattened(1))
    checkpoint, images = read(path), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(checkpoint.oracle().logits(images), logits(build(checkpoint, ""), images))
    path.write_bytes(flattened(60))
    words = "PACK 30 makes what the network does not use."
    assert_fails_without_a_trace(path, tmp_path / "output", words)


def test_weights_of_three_axes_are_refused(data: Path, tmp_path: Path) -> None:
    def flatten(_: object, model: object) -> None:
        weights = model.subgraphs[0].tensors[model.subgraphs[0].operators[0].inputs[1]]
        weights.shape = np.array([8, 9, 3], np.int32)

    path = changed((data / "tflite" / FLOAT).read_bytes(), flatten, tmp_path / "a.tflite")
    assert_fails_without_a_trace(path, tmp_path / "output", "must have weights of 4 axes, got [8, 9, 3].")


def test_an_archive_of_labels_that_cannot_be_read_holds_none(data: Path, tmp_path: Path) -> None:
    """An encrypted member, and one whose packed bytes are damaged."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.txt", "\n".join(f"kind {index}" for index in range(8)))
    whole, path = buffer.getvalue(), tmp_path / "model.tflite"
    encrypted, damaged = bytearray(whole), bytearray(whole)
    for start, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        encrypted[whole.index(start) + place] |= 1
    packed = whole.index(b"labels.txt") + len(b"labels.txt")
    damaged[packed : packed + 8] = b"\xff" * 8
    model = list(hostile.tflite_files())[-1]
    for archive, labels in ((whole, [f"kind {index}" for index in range(8)]), (encrypted, None), (damaged, None)):
        path.write_bytes(model + archive)
        assert read(path).labels == labels


def test_without_litert_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ai_edge_litert", None)
    (tmp_path / "model.tflite").touch()
    with pytest.raises(
        ImportError, match=r'clone of this project, pip install -c constraints\.txt -e "\.\[tflite\]"$'
    ):
        convert(str(tmp_path / "model.tflite"), tmp_path / "output")


# Files that people make: written by TensorFlow's converter, in a process that runs Keras on it.

WRITE = """
import functools
import sys
from pathlib import Path
import numpy as np
import tensorflow as tf
from variants import KerasBuilder, Variant
import keras

folder = Path(sys.argv[1])
random = np.random.default_rng(0)
keras.utils.set_random_seed(0)

@functools.cache
def saved(model):
    path = folder / f"saved{len(list(folder.iterdir()))}"
    model.export(path, verbose=False)
    return str(path)

def write(name, model, change=lambda converter: None):
    converter = tf.lite.TFLiteConverter.from_saved_model(saved(model))
    change(converter)
    (folder / f"{name}.tflite").write_bytes(converter.convert())

def whole(converter):
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([random.random((1, 32, 32, 3), np.float32)] for _ in range(8))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.uint8

def half(converter):
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]

def weights(converter):
    converter.optimizations = [tf.lite.Optimize.DEFAULT]

class Gray(KerasBuilder):
    def conv(self, x, before, after, kernel, stride, pads, depthwise, bias):
        if before > 1:
            return super().conv(x, before, after, kernel, stride, pads, depthwise, bias)
        layer = keras.layers.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=after, use_bias=bias)
        x = layer(x)
        self.values.append((layer, [self.weights(3, 3, 1, after, fan=9)]))
        return x

def v3(**fields):
    model = keras.applications.MobileNetV3Small(weights=None, input_shape=(32, 32, 3), classes=5, **fields)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.get_weights()[0].shape
            draws = random.uniform(0.7, 1.3, shape), random.normal(0, 0.2, shape), random.normal(0, 0.05, shape)
            layer.set_weights([*draws, random.uniform(0.5, 1.5, shape)])
        elif isinstance(layer, keras.layers.DepthwiseConv2D):
            layer.set_weights([random.normal(0, (2 / 9) ** 0.5, weights.shape) for weights in layer.get_weights()])
        elif isinstance(layer, keras.layers.Conv2D) and not layer.use_bias:
            layer.set_weights([random.normal(0, (2 / w[..., 0].size) ** 0.5, w.shape) for w in layer.get_weights()])
    return model

plain = KerasBuilder(Variant(size=32), 0).build()
write("v3", v3())
write("v3_whole", v3(include_preprocessing=False), whole)
write("v3_minimalistic", v3(minimalistic=True, include_preprocessing=False))
write("float", plain)
write("half", plain, half)
write("weights", plain, weights)
write("whole", plain, whole)
write("gray", Gray(Variant(size=32, channels=1, head="sigmoid", scaling="127.5"), 0).build())
write("model_unquant", KerasBuilder(Variant(2, size=32, hidden=(100,), form="sequential"), 0).build())
inputs = keras.Input((3, 32, 32))
write("transposed", keras.Model(inputs, plain(keras.layers.Permute((2, 3, 1))(inputs))))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that TensorFlow's converter wrote."""
    pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    folder = tmp_path_factory.mktemp("made")
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parents[1]), str(Path(__file__).parents[2])))
    command = [sys.executable, "-W", "ignore", "-c", WRITE, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def run_file(path: Path, pixels: Tensor) -> Tensor:
    """What the interpreter makes of what the file takes: (B, H, W, C), or (B, C, H, W) if it takes channels first."""
    interpreter = litert.Interpreter(str(path))
    interpreter.allocate_tensors()
    given, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    rows = []
    for image in pixels.numpy():
        interpreter.set_tensor(given["index"], image[None].astype(given["dtype"]))
        interpreter.invoke()
        rows.append(interpreter.get_tensor(result["index"])[0])
    scale, zero_point = result["quantization"]
    values = torch.from_numpy(np.stack(rows)).float()
    return (values - zero_point) * scale if scale else values


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float", "half", "gray", "model_unquant", "transposed", "v3", "v3_minimalistic"])
def test_files_of_the_converter_are_exact(name: str, made: Path, tmp_path: Path) -> None:
    source = made / f"{name}.tflite"
    checkpoint = read(source)
    model = build(checkpoint, "")
    channels = model.config.num_channels
    bytes_ = torch.randint(0, 256, (3, 32, 32, channels), generator=torch.Generator().manual_seed(0)).float()
    given = bytes_ if name in ("gray", "v3") else bytes_ / 127.5 - 1  # with its own scaling, a file takes bytes
    expected = run_file(source, given.permute(0, 3, 1, 2).contiguous() if name == "transposed" else given)
    ours = logits(model, (bytes_ / 127.5 - 1).permute(0, 3, 1, 2))
    ours = ours.sigmoid() if name == "gray" else ours.softmax(-1)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert expected.std(0).max() > 1e-3
    assert (model.config.problem_type == "multi_label_classification") == (name == "gray")
    assert model.config.classifier_hidden_sizes == ([100] if name == "model_unquant" else [])
    assert checkpoint.oracle().predictions is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weights", "whole"])
def test_quantized_files_of_the_converter_convert(name: str, made: Path, tmp_path: Path) -> None:
    checkpoint = read(made / f"{name}.tflite")
    _, (first, *rest), _ = compare_with_source(build(checkpoint, ""), checkpoint, draw_images(tmp_path))
    assert first.limits
    assert any("softmax" in comparison.against for comparison in rest)
    quantization = checkpoint.quantization
    assert len(quantization["weights"]) == (28 if name == "whole" else 19)  # small ones stay as they are
    assert ("classifier" in quantization["activations"]) == (name == "whole")
    if name == "whole":  # bytes are what the file takes
        processor = checkpoint.processor
        pixels = processor(np.full((32, 32, 3), 77, np.uint8), return_tensors="pt").pixel_values
        scale = quantization["activations"]["pixel_values"]
        assert (pixels / scale["scale"] + scale["zero_point"]).round().unique().tolist() == [77]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*experimental_preserve_all_tensors")  # it takes memory
def test_squeeze_and_excite_of_8_bits_rounds_within(made: Path) -> None:
    """With what quantization.json says of its branch, the bytes of the first are the interpreter's, but for a few."""
    path = made / "v3_whole.tflite"
    checkpoint, file = read(path), from_tflite.File(path.read_bytes(), path)
    model, activations = build(checkpoint, ""), checkpoint.quantization["activations"]
    output = next(op.output for op in file.graph.chain() if isinstance(op, Squeeze))
    interpreter = litert.Interpreter(str(path), experimental_preserve_all_tensors=True)
    interpreter.allocate_tensors()
    pixels = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8)
    bytes_ = []
    for image in pixels.numpy():
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None])
        interpreter.invoke()
        bytes_.append(torch.from_numpy(interpreter.get_tensor(output)))
    expected = torch.cat(bytes_).permute(0, 3, 1, 2).float()
    whole = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    images = checkpoint.processor(list(pixels.numpy()), **whole).pixel_values
    scale = activations["backbone.stages.0.0.squeeze"]
    found: list[Tensor] = []
    model.backbone.stages[0][0].squeeze.register_forward_hook(lambda *each: found.append(each[-1]))
    for chosen in (activations, {name: each for name, each in activations.items() if ".squeeze." not in name}):
        with rounded(model, chosen):
            logits(model, images)
    within, around = (
        ((each / scale["scale"] + scale["zero_point"]).round() - expected).abs().mean() for each in found
    )
    # The file rounds what it multiplies by once more, to some 1/255, which no layer of ours gives.
    assert within < 0.75 * around
    assert within < 0.04


@pytest.mark.slow
def test_v3_of_8_bits_predicts_what_rounding_leaves(made: Path) -> None:
    """Of a whole network: where ours rounds what the file rounds, it answers within a few of its steps."""
    path = made / "v3_whole.tflite"
    checkpoint = read(path)
    model = build(checkpoint, "")
    pixels = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = run_file(path, pixels)
    whole = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    images = checkpoint.processor(list(pixels.numpy()), **whole).pixel_values
    exact = logits(model, images).softmax(-1)
    with rounded(model, checkpoint.quantization["activations"]):
        alike = logits(model, images).softmax(-1)
    step = 1 / 256  # of what the file answers
    assert expected.std(0).mean() > 5 * step
    assert (alike - expected).abs().max() < 8 * step
    assert (alike - expected).abs().mean() < 2 * step
    assert (alike - expected).abs().mean() < 0.6 * (exact - expected).abs().mean()


@pytest.mark.slow
def test_teachable_machine_has_its_labels_and_its_recipe(made: Path, tmp_path: Path) -> None:
    source = shutil.copy(made / "model_unquant.tflite", tmp_path)
    assert "Assumed: that the network takes pixels scaled to -1..1" in read(source).warnings[0]
    (tmp_path / "labels.txt").write_text("\n".join(f"{index} thing {index}" for index in range(5)))
    checkpoint = read(source)
    assert checkpoint.labels == [f"thing {index}" for index in range(5)]
    assert checkpoint.warnings == []
    assert checkpoint.processor.size == {"shortest_edge": 32}


@pytest.mark.slow
def test_what_the_user_says_of_images_counts(made: Path, tmp_path: Path) -> None:
    source = made / "float.tflite"
    for options, mean, std in (
        ({"pixel_range": "0..1"}, [0], [1]),
        ({"pixel_range": "0..255"}, [0], [1 / 255]),
        ({"pixel_range": "imagenet"}, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ({"mean": [0.1], "std": [0.2]}, [0.1], [0.2]),
    ):
        processor = read(source, **options).processor
        assert (processor.image_mean, processor.image_std) == (mean, std)
        assert "(--range" not in " ".join(read(source, **options).warnings)
    stretched = read(source, fit="stretch").processor
    assert (stretched.size, stretched.do_center_crop) == ({"height": 32, "width": 32}, False)
    padded = read(source, fit="pad", pixel_range="-1..1").processor
    pixels = padded(np.full((20, 40, 3), 255, np.uint8), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels[0, 0, :, 16].unique().tolist() == [-1, 1]
    for options, words in (
        ({"fit": "squeeze"}, "fit must be one of crop, stretch, pad, corner, whole, got 'squeeze'"),
        ({"pixel_range": "0..2"}, "pixel_range must be one of 0..1, -1..1, 0..255, imagenet, got '0..2'"),
        ({"mean": [0.5]}, "mean must be given together with std"),
        ({"mean": [0.5], "std": [0.0]}, "std must be numbers above 0, got 0.0"),
    ):
        assert_fails_without_a_trace(source, tmp_path / "output", words, **options)


@pytest.mark.slow
def test_metadata_tells_the_range(made: Path, tmp_path: Path) -> None:
    from ai_edge_litert import schema_py_generated as schema
    from flatbuffers import Builder

    def of_table(builder: Builder, fields: dict[int, tuple[str, object]]) -> int:
        builder.StartObject(6)
        for slot, (kind, value) in fields.items():
            getattr(builder, f"Prepend{kind}Slot")(slot, value, 0)
        return builder.EndObject()

    def vector(builder: Builder, items: list, size: int, prepend: str) -> int:
        builder.StartVector(size, len(items), size)
        for item in reversed(items):
            getattr(builder, prepend)(item)
        return builder.EndVector()

    builder = Builder(256)
    mean, std = (vector(builder, [value], 4, "PrependFloat32") for value in (0.0, 255.0))
    options = of_table(builder, {0: ("UOffsetTRelative", mean), 1: ("UOffsetTRelative", std)})
    unit = of_table(builder, {0: ("Uint8", 1), 1: ("UOffsetTRelative", options)})
    units = vector(builder, [unit], 4, "PrependUOffsetTRelative")
    tensor = of_table(builder, {4: ("UOffsetTRelative", units)})
    tensors = vector(builder, [tensor], 4, "PrependUOffsetTRelative")
    graph = of_table(builder, {2: ("UOffsetTRelative", tensors)})
    graphs = vector(builder, [graph], 4, "PrependUOffsetTRelative")
    builder.Finish(of_table(builder, {3: ("UOffsetTRelative", graphs)}), b"M001")
    metadata = bytes(builder.Output())

    def with_metadata(data: bytes) -> Path:
        model = schema.ModelT.InitFromPackedBuf((made / "float.tflite").read_bytes(), 0)
        entry, buffer = schema.MetadataT(), schema.BufferT()
        entry.name, entry.buffer = b"TFLITE_METADATA", len(model.buffers)
        buffer.data = np.frombuffer(data, np.uint8)
        model.buffers.append(buffer)
        model.metadata = [*(model.metadata or []), entry]
        packed = Builder(1 << 20)
        packed.Finish(model.Pack(packed), b"TFL3")
        path = tmp_path / "described.tflite"
        path.write_bytes(bytes(packed.Output()))
        return path

    described = with_metadata(metadata)
    whole, start = described.read_bytes(), described.read_bytes().index(metadata)
    checkpoint = read(described)
    assert (checkpoint.processor.image_mean, checkpoint.processor.image_std) == ([0], [1])
    assert "(--range" not in checkpoint.warnings[0]
    chance = np.random.default_rng(0)
    for _ in range(40):  # offsets that lead anywhere
        data = bytearray(whole)
        data[start + chance.integers(len(metadata))] = chance.integers(256)
        described.write_bytes(data)
        read(described)


@pytest.mark.slow
def test_a_file_that_the_runtime_lacks_an_operator_for_is_called_intact(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise ValueError("Didn't find op for builtin opcode 'CONV_2D' version '99'")

    monkeypatch.setattr(litert, "Interpreter", refuse)
    assert_fails_without_a_trace(made / "float.tflite", tmp_path / "output", "is intact, but LiteRT does not run it")
