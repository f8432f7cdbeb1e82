"""Conversions of ONNX files, against the networks that they were exported from, and ONNX Runtime."""

import contextlib
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conversions import assert_fails_without_a_trace, read
from oracles import logits, native, randomize_norms
from torch import Tensor, nn

from mobilenet import MobileNetConfig, MobileNetForImageClassification
from mobilenet.conversion import ConversionError
from mobilenet.conversion.checkpoint import NoOracleError
from mobilenet.conversion.convert import build, convert
from mobilenet.conversion.parity import compare_with_source
from mobilenet.synthetic import draw_images


pytestmark = pytest.mark.any_version

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

SIZE = 64


class Logits(nn.Module):
    """A network that gives a tensor."""

    def __init__(self, model: nn.Module, last: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.last = model, last or nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.last(self.model(pixels).logits)


def network(architecture: str = "mobilenet_v2", width: float = 0.35, padding: str = "symmetric") -> nn.Module:
    config = MobileNetConfig(architecture, width, padding=padding, num_labels=5)
    return randomize_norms(MobileNetForImageClassification(config)).eval()


def export(model: nn.Module, path: Path, **options: object) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = (torch.randn(1, 3, SIZE, SIZE),)
        torch.onnx.export(
            Logits(model).eval(), given, path, input_names=["pixels"], output_names=["logits"], **options
        )
    return path


IMAGES = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def assert_equal(path: Path, theirs: nn.Module) -> None:
    checkpoint = read(path)
    ours, expected = logits(build(checkpoint, ""), IMAGES), logits(theirs, IMAGES)
    limit = {"atol": 1e-5 * expected.abs().max().item() + 1e-5, "rtol": 0}
    torch.testing.assert_close(ours, expected, **limit)
    torch.testing.assert_close(checkpoint.oracle().logits(IMAGES), expected, **limit)


@pytest.mark.parametrize(
    ("architecture", "width", "padding", "options"),
    [
        ("mobilenet_v1", 0.25, "symmetric", {"dynamo": False}),
        ("mobilenet_v1", 0.5, "same", {"dynamo": False, "dynamic_axes": {"pixels": {0: "batch"}}}),
        ("mobilenet_v2", 0.35, "symmetric", {"dynamo": False, "opset_version": 11}),
        ("mobilenet_v2", 0.35, "symmetric", {"dynamo": True, "verbose": False}),  # weights lie in another file
        ("mobilenet_v2", 0.5, "same", {"dynamo": False, "dynamic_axes": {"pixels": {0: "b", 2: "h", 3: "w"}}}),
        (
            "mobilenet_v2",
            0.35,
            "symmetric",
            {"dynamo": False, "do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE},
        ),
    ],
)
def test_exports_of_pytorch_convert(
    architecture: str, width: float, padding: str, options: dict, tmp_path: Path
) -> None:
    model = network(architecture, width, padding)
    if options.get("dynamic_axes", {}).get("pixels", {}).get(2):
        model = network(architecture, width)  # SAME depends on sizes, which are not known then
    path = export(model, tmp_path / "model.onnx", **options)
    assert read(path).config["width_multiplier"] == width
    assert_equal(path, model)


def test_transformers_own_networks_convert(tmp_path: Path) -> None:
    """Their padding is computed in the graph, as repositories of transformers.js have it."""
    theirs = native(MobileNetConfig("mobilenet_v2", 0.35, num_labels=5))
    (tmp_path / "onnx").mkdir()
    export(theirs, tmp_path / "onnx" / "model.onnx", dynamo=False, dynamic_axes={"pixels": {0: "batch"}})
    assert_equal(tmp_path / "onnx" / "model.onnx", theirs)
    config = {"model_type": "mobilenet_v2", "id2label": {str(index): f"kind {index}" for index in range(5)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "crop_size": {"height": SIZE, "width": SIZE}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    checkpoint = read(tmp_path)
    assert checkpoint.labels == [f"kind {index}" for index in range(5)]
    assert checkpoint.processor.image_mean == [0.1, 0.2, 0.3]
    assert checkpoint.warnings == []


@pytest.mark.parametrize("kind", ["QDQ", "QOperator", "dynamic", "half"])
def test_fewer_bits_convert(kind: str, tmp_path: Path) -> None:
    from onnxruntime import quantization

    model = network()
    whole = export(model, tmp_path / "whole.onnx", dynamo=False)
    path = tmp_path / "model.onnx"
    images = draw_images(tmp_path, 6)
    processor = read(whole).processor
    given = processor(images, return_tensors="np").pixel_values

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter({"pixels": np.ascontiguousarray(image[None])} for image in given)

        def get_next(self) -> dict | None:
            return next(self.rows, None)

    if kind == "half":
        export(model, path, dynamo=False)
        content = onnx.load(path)
        for tensor in content.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        for value in (*content.graph.input, *content.graph.output):
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
        for node in content.graph.node:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.t.data_type == onnx.TensorProto.FLOAT:
                    values = onnx.numpy_helper.to_array(attribute.t).astype(np.float16)
                    attribute.t.CopyFrom(onnx.numpy_helper.from_array(values))
                if node.op_type == "Cast" and attribute.name == "to":
                    attribute.i = onnx.TensorProto.FLOAT16
        onnx.save(content, path)
    elif kind == "dynamic":
        quantization.quantize_dynamic(whole, path)
    else:
        quantization.quantize_static(
            whole, path, Reader(), quant_format=quantization.QuantFormat[kind], per_channel=kind == "QDQ"
        )
    checkpoint = read(path, image_size=SIZE)
    converted = build(checkpoint, "")
    comparison, *_ = compare_with_source(converted, checkpoint, images)[1]
    assert comparison.against.startswith("the file in ONNX Runtime")
    assert comparison.limits
    ours, expected = logits(converted, IMAGES), logits(model, IMAGES)
    assert (ours - expected).abs().mean() < 0.1 * expected.std() + 0.01 * expected.abs().max()
    assert (checkpoint.quantization is None) == (kind == "half")
    if kind in ("QDQ", "QOperator"):
        activations = checkpoint.quantization["activations"]
        assert {"pixel_values", "backbone.stem", "backbone.head", "backbone.stages.1.1"} <= set(activations)


def test_an_onnx_zoo_name_tells_the_recipe(tmp_path: Path) -> None:
    config = MobileNetConfig("mobilenet_v2", 0.35, padding="symmetric", num_labels=1000)
    model = MobileNetForImageClassification(config).eval()
    path = export(model, tmp_path / "mobilenetv2-12.onnx", dynamo=False)
    checkpoint = read(path)
    assert checkpoint.warnings == []
    assert checkpoint.processor.image_mean == [0.485, 0.456, 0.406]
    other = Path(shutil.copy(path, tmp_path / "mine.onnx"))
    assert "Assumed: that the network takes pixels scaled to imagenet" in read(other).warnings[0]
    assert read(other, pixel_range="0..1", fit="stretch").warnings == []


def test_broken_and_other_files_are_refused(tmp_path: Path) -> None:
    path = export(network(), tmp_path / "model.onnx", dynamo=False)
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:100], b"", b"\xff" * 100):
        path.write_bytes(part)
        assert_fails_without_a_trace(path, tmp_path / "output", "model.onnx: truncated or corrupt, or no ONNX file")
    other = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(other, (torch.randn(1, 3, 64, 64),), path, dynamo=False)
    assert_fails_without_a_trace(
        path, tmp_path / "output", "/0/Conv is a convolution of 7x7 with stride 2: MobileNet V"
    )


def test_weights_in_other_folders_are_not_read(tmp_path: Path) -> None:
    path = export(network("mobilenet_v1", 0.25), tmp_path / "model.onnx", dynamo=False)
    content = onnx.load(path)
    onnx.external_data_helper.convert_model_to_external_data(content, location="../secret")
    for tensor in content.graph.initializer:
        tensor.ClearField("raw_data")
    path.write_bytes(content.SerializeToString())
    assert_fails_without_a_trace(path, tmp_path / "output", "needs '../secret', which must be a file beside it")


@pytest.mark.parametrize("seed", range(2))
def test_edited_files_are_refused_in_words(seed: int, tmp_path: Path) -> None:
    """Bytes by chance lead to a network or to one kind of error, whatever they say."""
    path = export(network("mobilenet_v1", 0.25), tmp_path / "model.onnx", dynamo=False)
    content = onnx.load(path)
    for tensor in content.graph.initializer:
        tensor.raw_data = bytes(len(tensor.raw_data))
    whole = bytearray(content.SerializeToString())
    chance = np.random.default_rng(seed)
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(chance.integers(1, 6)):
            data[chance.integers(len(data) if chance.random() < 0.3 else 4000)] = chance.integers(256)
        path.write_bytes(data)
        with contextlib.suppress(ConversionError):
            build(read(path), "")


def test_without_onnx_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ImportError, match=r'clone of this project, pip install -c constraints\.txt -e "\.\[onnx\]"$'):
        convert(str(tmp_path / "model.onnx"), tmp_path / "output")


def add_zeros(content: object, count: int, name: str) -> None:
    """Let a graph compute so many zeros."""
    shape = onnx.helper.make_tensor(f"shape of {name}", onnx.TensorProto.INT64, [1], [count])
    content.graph.initializer.append(shape)
    content.graph.node.insert(0, onnx.helper.make_node("ConstantOfShape", [shape.name], [name]))


def test_what_nobody_needs_is_not_run(tmp_path: Path) -> None:
    """Zeros of 400 GB, which nothing takes; with a second output that does, too."""
    model = network("mobilenet_v1", 0.25)
    path = export(model, tmp_path / "model.onnx", dynamo=False)
    content = onnx.load(path)
    add_zeros(content, 10**11, "dead")
    add_zeros(content, 10**11, "zeros")
    content.graph.node.append(onnx.helper.make_node("ReduceMax", ["zeros"], ["other"], keepdims=0))
    content.graph.output.append(onnx.helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, []))
    onnx.save(content, path)
    assert_equal(path, model)


def test_what_is_needed_takes_no_more_than_it_may(tmp_path: Path) -> None:
    """The form of a value, which nothing but the runtime computes: from 400 GB of zeros, or without an end."""
    path = export(network("mobilenet_v1", 0.25), tmp_path / "model.onnx", dynamo=False)
    content = onnx.load(path)
    last = content.graph.node[-1]
    whole, last.output[0] = last.output[0], "flat"
    add_zeros(content, 10**11, "zeros")
    form = onnx.numpy_helper.from_array(np.int64([1, 5]), "form")
    content.graph.initializer.append(form)
    for node in (
        onnx.helper.make_node("ReduceMax", ["zeros"], ["zero"], keepdims=0),
        onnx.helper.make_node("Cast", ["zero"], ["nothing"], to=onnx.TensorProto.INT64),
        onnx.helper.make_node("Add", ["form", "nothing"], ["computed"]),
        onnx.helper.make_node("Reshape", ["flat", "computed"], [whole]),
    ):
        content.graph.node.append(node)
    onnx.save(content, path)
    with pytest.raises(ConversionError, match=r"model\.onnx: ONNX Runtime does not run it: .*Available memory"):
        read(path).oracle().logits(IMAGES)
    body = onnx.helper.make_graph([], "body", [], [])
    content.graph.node[-3].CopyFrom(onnx.helper.make_node("Loop", ["", ""], ["nothing"], body=body))
    onnx.save(content, path)
    with pytest.raises(NoOracleError, match="has operators that run others"):
        read(path).oracle()


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        (
            [("Conv", ["pixels", "weight"], ["conv"]), ("Mul", ["conv", "five"], ["end"])],
            "model.onnx: cannot be understood: ",
        ),
        ([("Gather", ["many", "places"], ["made"]), ("Mul", ["pixels", "made"], ["end"])], "Gather on constants"),
        ([("Add", ["many", "column"], ["made"]), ("Mul", ["pixels", "made"], ["end"])], "Add on constants"),
    ],
)
def test_constants_of_other_shapes_are_refused(nodes: list, words: str, tmp_path: Path) -> None:
    """A factor for five of eight channels; and a few thousand numbers of which a million would be made."""
    constants = {
        "weight": np.ones((8, 3, 3, 3), np.float32),
        "five": np.ones((5, 1, 1), np.float32),
        "many": np.ones((1, 1000), np.float32),
        "column": np.ones((1000, 1), np.float32),
        "places": np.zeros(1000, np.int64),
    }
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(*node) for node in nodes],
        "graph",
        [onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, [1, 3, 32, 32])],
        [onnx.helper.make_tensor_value_info("end", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    assert_fails_without_a_trace(tmp_path / "model.onnx", tmp_path / "output", words)


@pytest.mark.parametrize(
    ("depth", "words"), [(40, "has more than 100000 operators."), (0, "truncated or corrupt, or no ONNX file")]
)
def test_functions_that_call_each_other_without_end_are_refused(depth: int, words: str, tmp_path: Path) -> None:
    """Forty functions of which each calls the one before it twice; and one that calls itself."""
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("own", 1)]
    functions = []
    for level in range(depth + 1):
        kind, domain = (f"f{max(level - 1, 0)}", "own") if level or not depth else ("Relu", "")
        nodes = [
            onnx.helper.make_node(kind, ["x"], ["between"], domain=domain),
            onnx.helper.make_node(kind, ["between"], ["y"], domain=domain),
        ]
        functions.append(onnx.helper.make_function("own", f"f{level}", ["x"], ["y"], nodes, opsets))
    values = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 32, 32]) for name in ("pixels", "end")
    )
    call = onnx.helper.make_node(f"f{depth}", ["pixels"], ["end"], domain="own")
    graph = onnx.helper.make_graph([call], "graph", *([value] for value in values))
    onnx.save(onnx.helper.make_model(graph, functions=functions, opset_imports=opsets), tmp_path / "model.onnx")
    assert_fails_without_a_trace(tmp_path / "model.onnx", tmp_path / "output", words)
