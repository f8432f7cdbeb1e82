"""Broken and hostile input: a right answer or one clear error, whatever comes; and what fuzzing has found."""

import argparse
import codecs
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from hostile import (
    OWN_FIELDS,
    TARGETS,
    VALUES,
    attempt,
    bounded_memory,
    convert_file,
    described_files,
    tensors,
    use_edited,
    use_image,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mobilenet.heads_mobilenet import DETECTORS
from mobilenet.image_processing_mobilenet import UnreadableImageError, open_image
from PIL import Image

from mobilenet import (
    MobileNetConfig,
    MobileNetForImageClassification,
    MobileNetForObjectDetection,
    MobileNetImageProcessor,
)
from mobilenet.conversion import ConversionError, from_timm
from mobilenet.conversion.checkpoint import read_json, read_torch
from mobilenet.conversion.labels import read_labels
from mobilenet.loading import load


# How many inputs each target gets: some take a tenth of a second.
COUNTS = {"image": 300, "array": 300, "config": 60, "processor": 80, "google": 50, "timm": 50}
COUNTS |= {"names": 100, "objects": 60, "mask": 60}
QUICK = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

edits = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete", "cut", "fill"]),
        st.floats(0, 1),  # where
        st.binary(min_size=1, max_size=8),
    ),
    max_size=4,
)


def edited(seed: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    """A sound input with a few changes."""
    data = bytearray(seed)
    for change, where, part in changes:
        start = int(where * len(data))
        if change == "cut":
            del data[start:]
        elif change == "insert":
            data[start:start] = part
        elif change == "delete":
            del data[start : start + len(part)]
        elif change == "fill":
            data[start : start + 40] = part[:1] * 40
        else:
            data[start : start + len(part)] = part
    return bytes(data)


@pytest.fixture(scope="module", autouse=True)
def _memory() -> Iterator[None]:
    """No input takes more than 4 GB."""
    with bounded_memory():
        yield


# What they say of these, transformers may change.
CONFIGURED = ("array", "config", "processor", "google", "timm")
MARKS = {name: [pytest.mark.any_version] for name in TARGETS if name not in CONFIGURED}
MARKS["bin"].append(pytest.mark.slow)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=MARKS.get(name, ())) for name in TARGETS])
def target(request: pytest.FixtureRequest) -> tuple:
    """A target's name, the target, and its seeds."""
    tflite = ["tflite", "post_process", "tflite_detector", "tflite_segmenter"]
    needs = {
        "h5py": ["h5"],
        "ai_edge_litert": tflite,
        "flatbuffers": tflite,
        "onnx": ["exported"],
        "onnxruntime": ["onnx", "onnx_outputs", "exported"],
    }
    for module, names in needs.items():
        if request.param in names:
            pytest.importorskip(module)
    if request.param == "tflite":
        request.getfixturevalue("data")
    if request.param in hostile.TRAINING:
        for module in ("datasets", "psutil", "torchmetrics"):
            pytest.importorskip(module)
    target = TARGETS[request.param]
    return request.param, target, list(target.seeds())


def test_sound_input_is_answered(target: tuple) -> None:
    name, target, seeds = target
    errors = [error for error in (attempt(target, seed) for seed in seeds) if error is not None]
    files = ("image", "safetensors", "bin", "h5", "tflite", "tflite_detector", "tflite_segmenter")
    if name in (*files, "suppress", "label_map", "draw", "drawings", "results"):
        assert len(errors) <= 0.04 * len(seeds), errors
    if name in hostile.TRAINING and name != "mask":
        assert not errors


def test_any_input_is_answered_or_refused_in_words(target: tuple) -> None:
    name, target, seeds = target
    if name in ("config", "processor", "google", "timm", "onnx_outputs"):
        inputs = st.binary(max_size=12)
    else:
        inputs = st.builds(edited, st.sampled_from(seeds), edits)

    @settings(QUICK, max_examples=COUNTS.get(name, 25))
    @given(inputs)
    def use(data: bytes) -> None:
        attempt(target, data)

    use()


@settings(QUICK, max_examples=150)
@given(st.dictionaries(st.sampled_from(OWN_FIELDS), st.sampled_from(VALUES) | st.text(max_size=5), max_size=4))
def test_a_configuration_is_taken_as_it_is_or_refused(edits: dict) -> None:
    try:
        config = MobileNetConfig(**edits)
    except ValueError:
        return
    kept = config.to_dict()
    for name, value in edits.items():
        if name not in ("out_features", "out_indices", "num_labels") and value is not None:
            assert kept[name] == value
    assert all(block.out_channels <= 8 * 1280 for stage in config.stages for block in stage)


# What fuzzing found, as it was found or smaller


@pytest.mark.parametrize(
    ("file", "edits", "message"),
    [
        ("config.json", {"width_multiplier": 10**400}, "width_multiplier must be a number above 0"),
        ("config.json", {"num_labels": 1 << 31}, "num_labels must be an integer from 0 to 131072, got 2147483648"),
        ("config.json", {"dtype": "relu"}, "cannot be loaded: "),
        ("config.json", {"num_labels": 1 << 16, "width_multiplier": 8}, "lacks weights of the right shape"),
        ("preprocessor_config.json", {"image_mean": 10**400}, "image_mean must be a number"),
        ("preprocessor_config.json", {"crop_size": {"0": None}}, "crop_size must be an integer"),
        (
            "preprocessor_config.json",
            {"crop_size": 65536},
            "would be cropped to 65536x65536, which is over",
        ),
        (
            "preprocessor_config.json",
            {"size": {"height": 65536, "width": 65536}},
            "would be resized to 65536x65536, which is over",
        ),
        (
            "preprocessor_config.json",
            {"size": 65536, "do_center_crop": False},
            "would be resized to 87381x65536, which is over",
        ),
        (
            "preprocessor_config.json",
            {"pad_size": 65536},
            "pad_size must be at most 178956970 pixels, got 65536x65536",
        ),
    ],
)
def test_absurd_models_are_refused(file: str, edits: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use_edited(file, edits)


def test_errors_of_transformers_become_clear_ones() -> None:
    """Which fields it refuses, and how, differs from version to version."""
    for edits in ({"attn_implementation": True, "output_attentions": True}, {"dtype": 1e-30}, {"dtype": "float8"}):
        with suppress(ValueError):
            use_edited("config.json", edits)


def test_a_configuration_cannot_ask_for_tuples() -> None:
    use_edited("config.json", {"return_dict": False})


def edit_json(path: Path, edits: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | edits))


@pytest.mark.parametrize(
    ("kind", "edits", "message"),
    [
        ("google", {"model_type": ["mobilenet_v1"]}, "no known source of a MobileNet"),
        ("google", {"num_labels": 1 << 31}, "config.json: num_labels must be at most 131072, got 2147483648"),
        (
            "google",
            {"architectures": 3},
            "config.json: (cannot be understood|Validation error for field 'architectures'): ",
        ),
        (
            "google",
            {"id2label": {"0": ["a"], "1": {}}},
            "config.json: (labels must be texts|Validation error for field 'id2label')",
        ),
        ("google", {"preprocessor_config.json": {"size": 0}}, "preprocessor_config.json: cannot be understood: size"),
        ("google", {"preprocessor_config.json": {"do_resize": 7}}, "do_resize must be true or false, got 7"),
        ("timm", {"label_names": 7}, "config.json: labels must be texts"),
        ("timm", {"label_names": ["owl"]}, "config.json: must hold a label for each of 2 classes, got 1"),
        ("timm", {"pretrained_cfg": True}, "config.json: cannot be understood: "),
        ("timm", {"pretrained_cfg": {"mean": 0.5}}, "config.json: cannot be understood: "),
        ("timm", {"pretrained_cfg": {"mean": "x", "std": 1, "input_size": [9]}}, "image_mean must be a number"),
        ("timm", {"pretrained_cfg": {"mean": 0.5, "input_size": []}}, "config.json: cannot be understood: "),
        ("timm", {"pretrained_cfg": {"mean": 0, "input_size": [9], "interpolation": []}}, "cannot be understood: "),
        ("timm", {"pretrained_cfg": {"mean": 0, "input_size": [9], "crop_pct": []}}, "cannot be understood: "),
    ],
)
def test_sources_with_absurd_configurations_are_refused(kind: str, edits: dict, message: str, tmp_path: Path) -> None:
    for name, content in described_files(kind).items():
        (tmp_path / name).write_bytes(content)
    convert_file(tmp_path)
    if kind == "google":
        images = MobileNetImageProcessor.from_recipe("google", 32).to_dict() | edits.pop(
            "preprocessor_config.json", {}
        )
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    edit_json(tmp_path / "config.json", edits)
    with pytest.raises(ConversionError, match=message):
        convert_file(tmp_path)


def test_archives_that_unpack_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reads a compressed archive too, though it writes none: 20 kB may stand for 20 MB."""
    monkeypatch.setattr("mobilenet.pickles.MAX_BYTES", 1_000_000)
    buffer = io.BytesIO()
    torch.save({"fc.weight": torch.zeros(500_000)}, buffer)
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for member in whole.infolist():
            bomb.writestr(member.filename, whole.read(member))
    assert (tmp_path / "bomb.pth").stat().st_size < 10_000
    with pytest.raises(ConversionError, match=r"bomb\.pth: unpacks to more than 1000000 bytes"):
        convert_file(tmp_path / "bomb.pth")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        # A file of gzip that ends within its header, at which Python's tarfile stumbles.
        ("mobilenet_v1_0.25_128.tgz", b"\037\213\010\037A*\203\213\010"),
        ("model.tgz", b""),
        ("model.keras", b"PK\5\6" + bytes(18)),
    ],
)
def test_archives_that_are_cut_off_are_refused(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConversionError, match=f"{name}: truncated or corrupt: "):
        convert_file(tmp_path / name)


@pytest.mark.parametrize(("part", "other"), [("ä".encode(), b"\xdd\xdd"), (b"PK\1\2\x14\3\x14", b"PK\1\2\x14\3\xff")])
def test_archives_with_odd_directories_are_refused(part: bytes, other: bytes, tmp_path: Path) -> None:
    """Python's zipfile stumbles over a name that is no UTF-8, and over a version that it does not know."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("ä", b"")
    assert part in buffer.getvalue()
    (tmp_path / "model.bin").write_bytes(buffer.getvalue().replace(part, other))
    with pytest.raises(ConversionError, match=r"model\.bin: truncated or corrupt: "):
        convert_file(tmp_path / "model.bin")


def test_long_names_in_archives_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tarfile holds them in memory, and a megabyte of gzip stands for a gigabyte."""
    monkeypatch.setattr("mobilenet.conversion.from_slim.MAX_BYTES", 1_000_000)
    with tarfile.open(tmp_path / "model.tgz", "w:gz", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("a" * 2_000_000))
    assert (tmp_path / "model.tgz").stat().st_size < 10_000
    with pytest.raises(ConversionError, match=r"model\.tgz: unpacks to more than 1000000 bytes"):
        convert_file(tmp_path / "model.tgz")


@pytest.mark.parametrize("change", [{"operator": 3}, {"ring": True}])
def test_graphs_that_make_no_sense_are_refused(change: dict, data: Path, tmp_path: Path) -> None:
    """LiteRT takes a file whose operators lack their inputs, or feed themselves, until it is run."""
    pytest.importorskip("ai_edge_litert")
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    flatbuffers = pytest.importorskip("flatbuffers")
    model = schema.ModelT.InitFromPackedBuf(next(TARGETS["tflite"].seeds()), 0)
    operators = model.subgraphs[0].operators
    if "operator" in change:
        operators[change["operator"]].inputs = operators[change["operator"]].inputs[:1]
    else:
        names = [model.operatorCodes[operator.opcodeIndex].builtinCode for operator in operators]
        reshape = operators[next(i for i, code in enumerate(names) if code == schema.BuiltinOperator.RESHAPE)]
        reshape.inputs = np.array([reshape.outputs[0], *reshape.inputs[1:]], np.int32)
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    (tmp_path / "model.tflite").write_bytes(bytes(builder.Output()))
    with pytest.raises(ConversionError, match=r"model\.tflite: "):
        convert_file(tmp_path / "model.tflite")


def test_empty_weights_of_absurd_size_are_refused(tmp_path: Path) -> None:
    """HDF5 stores nothing of what was never written, and reads zeros."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        file.attrs["layer_names"] = ["conv1"]
        group = file.create_group("conv1")
        group.attrs["weight_names"] = [f"conv1/kernel{number}" for number in range(3)]
        for number in range(3):
            group.create_dataset(f"conv1/kernel{number}", (1 << 28,), "float32", chunks=(1 << 20,))
    assert (tmp_path / "bomb.h5").stat().st_size < 20_000
    with pytest.raises(ConversionError, match=r"bomb\.h5: its weights have more than 2147483648 bytes"):
        convert_file(tmp_path / "bomb.h5")


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("classifier.weight", (1 << 17, 1 << 20), "does not hold a mobilenet_v1"),
        ("classifier.weight", (1 << 21, 8), "num_labels must be an integer from 0 to 131072, got 2097152"),
        ("conv_stem.weight", (8, 1 << 20, 3, 3), "num_channels must be an integer from 1 to 4096, got 1048576"),
        ("blocks.4.1.conv_pw.weight", (1 << 20, 8, 1, 1), "width_multiplier must be a number above 0 and at most 8"),
    ],
)
def test_shapes_without_end_are_refused(name: str, shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    """Values that repeat take a few bytes, whatever their shape, and could make a network of gigabytes."""
    content = tensors(from_timm.TABLES[0]) | {name: torch.zeros(1).expand(shape)}
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ConversionError, match=message):
        convert_file(tmp_path / "model.pth")


class Call:
    """Is pickled as a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple:
        return self.reduced


def _announcing(count: int) -> bytes:
    """A state dict whose only storage claims to have so many numbers, in the older format and the newer one."""
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(77)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue().replace(b"KM", b"J" + struct.pack("<i", count))


def _zipped(pickled: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


GREEDY = {
    "bytearray": pickle.dumps(Call(bytearray, 6 << 30), 2),
    "bytearray in an archive": _zipped(pickle.dumps({"a": Call(bytearray, 6 << 30)}, 2)),
    "untyped storage": _zipped(pickle.dumps({"a": Call(torch.UntypedStorage, 6 << 30)}, 2)),
    "tensor class": _zipped(b"\x80\x02ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R."),
    "encodings of encodings": _zipped(pickle.dumps(Call(codecs.encode, b"a" * 1000, "hex"), 2)),
    "storage of more than the file": _announcing(1 << 30),
    "behind the archive": _zipped(b"\x80\x02}.")[:-2] + b"\2\0ab",
    "before the archive": b"PK\3\4" + _zipped(b"\x80\x02}."),
}


@pytest.mark.parametrize("data", GREEDY.values(), ids=GREEDY)
def test_pickles_that_take_more_than_they_hold_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(data)
    with pytest.raises(ConversionError, match=r"model\.pth: holds more than tensors, or is broken"):
        convert_file(tmp_path / "model.pth")
    shutil.copytree(hostile.repository(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(ValueError, match="model cannot be loaded: it"):
        load(str(tmp_path / "model"))
    (tmp_path / "model" / "pytorch_model.bin").rename(tmp_path / "model" / "w.dat")
    index = {"metadata": {}, "weight_map": {"classifier.weight": "w.dat"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model cannot be loaded: it"):
        load(str(tmp_path / "model"))


def test_graphs_that_compute_without_end_are_refused(tmp_path: Path) -> None:
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from onnx import helper

    shape = helper.make_tensor("shape", onnx.TensorProto.INT64, [1], [1 << 34])
    images = helper.make_tensor_value_info("pixel_values", onnx.TensorProto.FLOAT, ["batch", 3, "height", "width"])
    logits = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 3])
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("ReduceMean", ["zeros"], ["zero"], keepdims=0),
        helper.make_node("ReduceMean", ["pixel_values"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("Add", ["means", "zero"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "graph", [images], [logits], [shape])
    shutil.copytree(hostile.repository(), tmp_path / "model")
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8),
        tmp_path / "model" / "model.onnx",
    )
    manifest = {"export_format": "onnx", "components": {"model": {"file": "model.onnx"}}}
    (tmp_path / "model" / "export.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"model cannot be run: it may take no more than \d+ MiB in all"):
        load(str(tmp_path / "model")).network(np.zeros((1, 3, 8, 8), np.float32))


def test_graphs_of_openvino_with_values_without_end_are_refused(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    from openvino import opset13

    pixels = opset13.parameter([-1, 3, -1, -1], np.float32, name="pixel_values")
    ones = opset13.broadcast(opset13.constant(np.float32(1)), opset13.constant(np.int64([1 << 30])))
    means = opset13.reduce_mean(pixels, opset13.constant(np.int64([2, 3])))
    logits = opset13.add(means, opset13.reduce_mean(ones, opset13.constant(np.int64([0]))))
    shutil.copytree(hostile.repository(), tmp_path / "model")
    openvino.save_model(openvino.Model([logits], [pixels]), tmp_path / "model" / "model.xml")
    manifest = {"export_format": "openvino", "components": {"model": {"file": "model.xml"}}}
    (tmp_path / "model" / "export.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"model cannot be loaded: .*Broadcast_\d+ has more than 2147483648 bytes"):
        load(str(tmp_path / "model"))


def test_checkpoints_of_trainers_are_read(tmp_path: Path) -> None:
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {
        **{"state_dict": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "best": 0.5},
        **{"args": argparse.Namespace(lr=0.1, names=["a", None]), "parameter": torch.nn.Parameter(torch.ones(2))},
        **{"device": torch.device("cpu"), "dtype": torch.float16, "half": torch.ones(3, dtype=torch.bfloat16)},
    }
    for zipped in (True, False):
        torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
        assert read_torch(tmp_path / "model.pth").keys() == {"weight", "bias"}


def test_labels_nested_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text("[" * 100_000)
    with pytest.raises(ConversionError, match=r"labels\.json: no labels: "):
        read_labels(str(tmp_path / "labels.json"), 2)


def test_texts_without_end_are_not_read(tmp_path: Path) -> None:
    for name in ("labels.txt", "config.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate((64 << 20) + 1)  # most file systems store nothing of it
    with pytest.raises(ConversionError, match=r"labels\.txt: no labels: .*; it has more than 67108864 bytes"):
        read_labels(str(tmp_path / "labels.txt"), 2)
    with pytest.raises(ConversionError, match=r"config\.json: has more than 67108864 bytes"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["EPS", "WMF", "IPTC"])
def test_images_that_are_programs_are_not_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would start Ghostscript for the first, ask Windows to draw the second, and unwrap the third."""
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program ran"))
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    data = buffer.getvalue()
    if name == "IPTC":  # around the EPS file
        parts = [(3, 60, b"\1\0"), (3, 20, b"\x08"), (3, 30, b"\x08"), (3, 120, b"\5")]
        parts += [(8, 10, data[start : start + 100]) for start in range(0, len(data), 100)]
        data = b"".join(bytes([0x1C, *tag, 0, len(value)]) + value for *tag, value in parts) + bytes(5)
    elif name == "WMF":
        data = b"\xd7\xcd\xc6\x9a\0\0" + np.int16([0, 0, 80, 80, 72]).tobytes() + bytes(6) + b"\1\0\t\0" + bytes(40)
    with pytest.raises(UnreadableImageError, match=f"{name} is not read: it "):
        use_image(data)


def _chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(
    "data",
    [
        b"P6" + bytes([32]) * 5_000_000,
        b"P6\n#" + bytes(5_000_000),
        b"P3 100 100 255\n" + b"#a\n" * 500_000,
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", b"\0\0\0\x08" * 2 + b"\x08" + bytes(4)) + _chunk(b"prVt") * 400_000,
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", b"\0\0\0\x08" * 2 + b"\x08" + bytes(4)) + _chunk(b"IDAT") * 400_000,
        b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe\1a\0" * 1_000_000,
    ],
    ids=["blanks", "comment", "comments", "chunks before the image", "chunks of the image", "extensions"],
)
def test_headers_without_end_are_refused_early(data: bytes) -> None:
    begin = time.process_time()
    with pytest.raises(UnreadableImageError, match=r"it takes more than 100000 reads|more than 1000 comments"):
        use_image(data)
    assert time.process_time() - begin < 1.5


def test_plain_images_may_have_comments() -> None:
    image = open_image(b"P3 # a comment\n2 1 255\n# another\n1 2 3 # and one more\n4 5 6")
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(1, 2, 3), (4, 5, 6)]


# Images that are large, and as wide as can be


@pytest.mark.parametrize("size", [(1, 1), (60_000, 1), (1, 60_000), (60_000, 3)])
def test_images_of_any_shape_give_what_they_show(size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", size, (255, 0, 51)).save(buffer, "PNG")
    pixels = MobileNetImageProcessor(do_normalize=False)(buffer.getvalue(), return_tensors="np").pixel_values[0]
    for channel, value in zip(pixels, (1, 0, 0.2), strict=True):
        assert np.allclose(channel, value)


MEASURE = """
import io, sys
import numpy as np
from PIL import Image
from mobilenet import MobileNetImageProcessor

def status(field):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(field)]
    return 1024 * int(line.split()[1])

process, side = MobileNetImageProcessor(), 2500
for mode in ("RGB", "RGBA", "LA", "L", "1", "P", "I", "I;16", "F", "CMYK", "LAB", "YCbCr"):
    buffer = io.BytesIO()
    deep = mode in ("CMYK", "I", "I;16", "F", "LAB", "YCbCr")
    options = {"compression": "tiff_deflate"} if deep else {"transparency": 0} if mode == "P" else {}
    Image.new(mode, (side, side)).save(buffer, "TIFF" if deep else "PNG", **options)
    data = buffer.getvalue()
    process(data[:], return_tensors="np", do_resize=False)
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    before = status("VmRSS")
    process(data, return_tensors="np")
    print(mode, (status("VmHWM") - before) / side**2)
"""


@pytest.mark.any_version
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="this system does not tell the peak of memory")
@pytest.mark.slow
def test_an_image_takes_no_more_memory_than_is_stated() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True)
    used = {mode: float(size) for mode, size in (line.split() for line in done.stdout.splitlines())}
    assert len(used) == 12
    assert max(used.values()) <= 24, used
    assert used["RGB"] > 3, used  # or nothing was measured


def test_the_largest_networks_are_bounded() -> None:
    """The largest network that a configuration may ask for takes about 2 GB."""
    for architecture in ("mobilenet_v1", "mobilenet_v2"):
        with torch.device("meta"):
            config = MobileNetConfig(architecture, 8.0, num_channels=4096, num_labels=2)
            model = MobileNetForImageClassification(config)
        weights = sum(tensor.numel() for tensor in model.state_dict().values())
        assert 4 * (weights + (1 << 28)) < 2.2e9
    sizes = []
    for name, detector in DETECTORS.items():
        for width in (1.0, 2.0, 4.0, 8.0):
            fields = {"detector": name, "num_labels": 4, **dict(detector.config)}
            config = MobileNetConfig(detector.architecture, width, **fields)
            with torch.device("meta"), suppress(ValueError):
                model = MobileNetForObjectDetection(config)
                sizes.append(4 * sum(tensor.numel() for tensor in model.state_dict().values()))
    assert len(sizes) > 14
    assert max(sizes) < 2.2e9


def test_loading_does_not_build_what_the_weights_are_not(tmp_path: Path) -> None:
    """A small file with a configuration of a large network: one error."""
    MobileNetForImageClassification(MobileNetConfig("mobilenet_v1", 0.01)).save_pretrained(tmp_path)
    MobileNetImageProcessor().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", {"width_multiplier": 2.0})
    with pytest.raises(ValueError, match="it lacks weights of the right shape"):
        load(str(tmp_path))
