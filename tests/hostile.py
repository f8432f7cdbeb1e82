"""What broken and hostile input is fed to, with seeds that a fuzzer starts from; `fuzz.py` and the tests share it.

A target takes any bytes. It returns, or raises one of its errors: anything else is a finding.
"""

from __future__ import annotations

import csv
import inspect
import io
import json
import os
import struct
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mobilenet.detection_mobilenet import anchor_shapes, generate_anchors
from mobilenet.heads_mobilenet import DETECTORS
from mobilenet.preprocessing_mobilenet import FITS, OPTIONS, is_url, place, read_options
from PIL import Image
from rich.console import Console
from safetensors.torch import save

from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor
from mobilenet import postprocessing_mobilenet as post
from mobilenet.classify import classify
from mobilenet.conversion import (
    ConversionError,
    from_google,
    from_keras,
    from_plain,
    from_timm,
    from_torchvision,
    read_source,
)
from mobilenet.conversion.checkpoint import NoOracleError
from mobilenet.conversion.convert import build, choose_labels
from mobilenet.conversion.detectors import detection_steps, map_ends
from mobilenet.conversion.from_tflite import POST_PROCESS
from mobilenet.conversion.graph import Step, expected
from mobilenet.conversion.parity import Comparison
from mobilenet.conversion.rename import Table, places, skeleton
from mobilenet.detect import detect, draws_to
from mobilenet.drawings import Drawings
from mobilenet.find_images import FoundImage
from mobilenet.loading import load
from mobilenet.output import (
    CLASSIFIED,
    DETECTED,
    SEGMENTED,
    Detection,
    DetectionResult,
    Form,
    Layout,
    Prediction,
    Result,
    Segment,
    SegmentationResult,
    writer,
)
from mobilenet.segment import draws_to as segments_to
from mobilenet.segment import segment
from mobilenet.tasks import CLASSIFICATION, DETECTION, SEGMENTATION
from mobilenet.visualize import draw_boxes, draw_segments, encode, to_mask


try:
    import resource
except ImportError:  # not on Windows
    resource = None


class Target(NamedTuple):
    """Where input goes, what it may be told, and what it looks like when it is sound."""

    use: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    seeds: Callable[[], Iterator[bytes]]


def attempt(target: Target, data: bytes) -> Exception | None:
    """Use input; give the error that it was told, if it was told one. Anything but a clear error is raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about what it reads all the same
            target.use(data)
    except target.errors as caught:
        error = caught
    else:
        return None
    assert str(error).strip(), f"an error without words: {error!r}"
    return error


@contextmanager
def bounded_memory(size: int = 4 << 30) -> Iterator[None]:
    """Let this process have no more than so many bytes beyond what it has."""
    if resource is None:
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


# Images


def _encoded(image: Image.Image, name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def images() -> Iterator[bytes]:
    """A small image in every format and mode that Pillow writes, and in some that it only reads."""
    random = np.random.default_rng(0)
    rgba = Image.fromarray(random.integers(0, 256, (24, 32, 4), np.uint8))
    rgb, gray = rgba.convert("RGB"), rgba.convert("L")
    deep = Image.fromarray(random.integers(0, 65536, (24, 32), np.uint16))
    palette = rgb.quantize(16)
    images = (rgb, rgba, gray, gray.convert("1"), palette, rgb.convert("CMYK"), rgba.convert("LA"), deep)
    images += (gray.convert("I"), gray.convert("F"), rgb.convert("YCbCr"), rgb.convert("LAB"), rgb.convert("HSV"))
    Image.init()
    for name in sorted(Image.SAVE.keys() & Image.OPEN.keys()):
        for image in images:
            with suppress(OSError, ValueError, KeyError, SystemError):
                data = _encoded(image, name)
                if len(data) < 20_000:  # ICNS and some others store no small images
                    yield data
    exif = Image.Exif()
    exif[0x0112] = 6
    yield _encoded(rgb, "JPEG", exif=exif, progressive=True, icc_profile=bytes(200))
    yield _encoded(rgb, "PNG", exif=exif)
    # Orientation 6, and a width of letters.
    fields = struct.pack("<HHHI4sHHI4sI", 2, 0x0100, 2, 2, b"a", 0x0112, 3, 1, b"\6", 0)
    yield _encoded(rgb, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + fields)
    yield _encoded(palette, "PNG", transparency=3)
    yield _encoded(palette, "GIF", transparency=3, save_all=True, append_images=[palette.rotate(90), palette])
    yield _encoded(rgb, "PNG", save_all=True, append_images=[rgb.rotate(90)])
    yield _encoded(rgba, "WEBP", save_all=True, append_images=[rgba.rotate(90)])
    yield _encoded(rgb, "AVIF", save_all=True, append_images=[rgb.rotate(90)])
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits", "group4"):
        yield _encoded(gray.convert("1") if compression == "group4" else rgb, "TIFF", compression=compression)
    yield _encoded(rgb, "TIFF", save_all=True, append_images=[rgb, rgb], exif=exif)
    yield _encoded(rgb, "TGA", compression="tga_rle")
    yield _encoded(Image.new("RGB", (1, 1)), "PNG")
    yield _encoded(Image.new("L", (60_000, 1), 9), "PNG")
    yield b"P6 0 0 255\n"
    yield b'/* XPM */\nstatic char *x[] = {\n"2 1 2 1",\n"a c #ff0000",\n"b c #00ff00",\n"ab"\n};\n'
    yield b"#define x_width 8\n#define x_height 1\nstatic char x_bits[] = {\n0x2a };\n"
    yield b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 2, 2, 8, 3) + bytes(12) + b"\0\0" + bytes(12)


PROCESSOR = MobileNetImageProcessor.from_recipe("google", 32)


def use_image(data: bytes) -> None:
    """Read an image as `mobilenet classify` does."""
    pixels = PROCESSOR(data, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels.abs().max() <= 1


# Arrays

_TYPES = "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 float32 float64 complex64 S3 U2 M8[s] object"
_AXES = (0, 1, 2, 3, 4, 5, 7, 12, 33, 1, 3)
_LAYOUTS = (None, "channels_first", "channels_last", "channels_middle")


def array(data: bytes) -> tuple[np.ndarray, dict[str, Any]]:
    """An array of any type, rank and shape, and options of the image processor."""
    head, values = data[:10].ljust(10, b"\0"), data[10:]
    names = _TYPES.split()
    dtype = np.dtype(names[head[0] % len(names)])
    shape = tuple(_AXES[axis % len(_AXES)] for axis in head[2 : 2 + head[1] % 6])
    shape = shape if np.prod(shape, dtype=np.int64) < 50_000 else shape[:2]
    size = int(np.prod(shape, dtype=np.int64))
    if dtype.hasobject:
        content = np.array([*values, None][: max(size, 1)] * size, object)[:size]
    else:
        repeated = (values or b"\0") * (1 + size * dtype.itemsize // max(1, len(values)))
        content = np.frombuffer(repeated[: size * dtype.itemsize], dtype)
    flags = head[7]
    options = {
        "do_convert_rgb": bool(flags & 1),
        "do_resize": bool(flags & 2),
        "do_center_crop": bool(flags & 4),
        "do_rescale": bool(flags & 8),
        "do_normalize": bool(flags & 16),
        "input_data_format": _LAYOUTS[head[8] % 4],
        "data_format": _LAYOUTS[1 + head[9] % 3],
    }
    return content.reshape(shape), options


def arrays() -> Iterator[bytes]:
    """Arrays of every type and of several shapes."""
    for kind in range(len(_TYPES.split())):
        for rank, axes in ((2, (5, 7)), (3, (9, 5, 3)), (3, (3, 5, 5)), (4, (1, 7, 8, 4))):
            for flags in (31, 0):
                head = bytes([kind, rank, *axes]).ljust(7, b"\0") + bytes([flags, 0, 0])
                yield head + np.linspace(0, 1, 8, dtype=np.float32).tobytes()
                yield head + bytes(range(40))


def use_array(data: bytes) -> None:
    """Preprocess an array, and check what can be known of the result."""
    given, options = array(data)
    before = given.copy()
    result = PROCESSOR(given, return_tensors="np", **options).pixel_values
    assert np.array_equal(given, before, equal_nan=given.dtype.kind in "fc")
    assert result.ndim == 4
    assert result.dtype == np.float32
    assert np.isfinite(result).all()
    channels = result.shape[1 if options["data_format"] == "channels_first" else -1]
    assert channels == 3 if options["do_convert_rgb"] else channels in (1, 3, 4)
    limit = 1 if options["do_rescale"] else 510
    assert abs(result).max() <= limit + 1e-5


# Configurations

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 8, 16, 32, 64, 224, 4096, 65536, 1 << 20, 1 << 31, 1 << 63, 10**400),
    *(0.0, 0.25, 0.5, 1.0, -1.0, 1e-30, 16.0, 1e308, float("nan"), float("inf"), -float("inf")),
    *("ssd_mobilenet_v1", "ssdlite_mobilenet_v2", "deeplab_v3_light", "lraspp", "blur", "max", "sigmoid"),
    *("", "mobilenet_v1", "mobilenet_v2", "mobilenet", "relu", "same", "float32", "float8", "int8", "\0", "../.."),
    *([], [0], [1, 2, 3], ["stem", "stage2"], ["stage9"], [[]], [None], [0.5] * 3, [-1], [1e308] * 3),
    *({}, {"0": "a"}, {"0": "a", "1": "b"}, {"x": 1}, {"a": 0}, {"shortest_edge": 1}, {"height": 65536, "width": 1}),
    *({"height": 1, "width": None}, {"0": None}, {"-1": "a"}, {"1e3": "a"}, {"0": ["a"], "1": {}}),
)

_COMMON = (
    *("id2label", "label2id", "num_labels", "problem_type", "dtype", "torch_dtype", "architectures", "return_dict"),
    *("output_hidden_states", "output_attentions", "quantization_config", "transformers_version", "auto_map"),
    *("attn_implementation", "tie_word_embeddings", "pruned_heads", "name_or_path", "is_encoder_decoder", "use_cache"),
    *("task_specific_params", "gradient_checkpointing", "generation_config", "custom_pipelines", "model_type"),
    *("device_map", "torchscript", "use_bfloat16", "finetuning_task", "encoder", "tokenizer_class", "experts"),
)


def fields(names: tuple[str, ...], data: bytes) -> dict[str, Any]:
    """Choose fields and their values, a pair of bytes for each."""
    return {
        names[name % len(names)]: VALUES[value % len(VALUES)]
        for name, value in zip(data[::2], data[1::2], strict=False)
    }


def pairs() -> Iterator[bytes]:
    """Every value once, for some field."""
    for value in range(len(VALUES)):
        yield bytes([value, value, 5 * value % 256, value])


@cache
def repository() -> Path:
    """A small model that loads."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    config = MobileNetConfig("mobilenet_v1", 0.01, image_size=32)
    MobileNetForImageClassification(config).save_pretrained(folder)
    MobileNetImageProcessor.from_recipe("google", 32).save_pretrained(folder)
    return folder


def _edited(name: str, edits: dict[str, Any]) -> Callable[[], None]:
    path = repository() / name
    original = path.read_text(encoding="utf-8")
    path.write_text(json.dumps(json.loads(original) | edits), encoding="utf-8")
    return lambda: path.write_text(original, encoding="utf-8")


def use_edited(name: str, edits: dict[str, Any]) -> None:
    """Load a model, one of whose configurations is edited, and classify with it."""
    restore = _edited(name, edits)
    try:
        classifier = load(str(repository()), engine="torch")
        scores = classifier.network(classifier.read(_encoded(Image.new("RGB", (40, 30)), "PNG")))
    finally:
        restore()
    assert scores.shape[0] == 1
    assert all(isinstance(classifier.label(index), str) for index in range(scores.shape[1]))
    assert np.isfinite(scores).all()


# What to_dict() leaves out where it says nothing, too.
OWN_FIELDS = (*list(inspect.signature(MobileNetConfig.__init__).parameters)[1:-1], "num_labels", "depth_multiplier")
CONFIG_FIELDS = tuple(dict.fromkeys((*OWN_FIELDS, *MobileNetConfig().to_dict(), *_COMMON)))
_TYPES_OF_PROCESSORS = ("image_processor_type", "processor_class", "feature_extractor_type")
PROCESSOR_FIELDS = (*OPTIONS, *_TYPES_OF_PROCESSORS, "do_pad", "auto_map", "image")


# Sources of conversions


def tensors(table: Table, **config: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a small network as a source names and stores it."""
    torch.manual_seed(0)
    model = skeleton(**{**table.config, "width_multiplier": 0.01, "num_labels": 2, **config})
    return {
        name: torch.tensor(0) if place.optional else torch.rand(place.source_shape) + 0.1
        for name, place in places(model, table).items()
    }


TORCH_TABLES = (*from_timm.TABLES, *from_torchvision.TABLES, from_plain.TABLE)


def safetensors() -> Iterator[bytes]:
    """State dicts of every kind, as safetensors."""
    for table in TORCH_TABLES:
        yield save(tensors(table))


def pickles() -> Iterator[bytes]:
    """State dicts of every kind as torch saves them, by themselves and in a training checkpoint, old and new."""
    for table in TORCH_TABLES:
        for content in (tensors(table), {"state_dict": tensors(table), "epoch": 3}):
            for zipped in (True, False):
                buffer = io.BytesIO()
                torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
                yield buffer.getvalue()


def keras_files() -> Iterator[bytes]:
    """Keras' networks in the layout of the published .h5 files."""
    import h5py

    for table in from_keras.TABLES:
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            layers: dict[str, dict[str, torch.Tensor]] = {}
            for name, tensor in tensors(table).items():
                layer, _, weight = name.rpartition("/")
                layers.setdefault(layer, {})[weight] = tensor
            file.attrs["layer_names"] = [layer.encode() for layer in layers]
            if table is from_keras.TABLES[0]:  # with a graph too, which then decides
                file.attrs["model_config"] = json.dumps(keras_graph())
            for layer, weights in layers.items():
                group = file.create_group(layer)
                group.attrs["weight_names"] = [f"{layer}/{weight}:0".encode() for weight in weights]
                for weight, tensor in weights.items():
                    group[f"{layer}/{weight}:0"] = tensor.numpy()
        yield buffer.getvalue()


def keras_graph() -> dict[str, Any]:
    """Keras' configuration of a small MobileNet, without what it has for its initial weights."""
    layers = [{"class_name": "InputLayer", "config": {"name": "in", "batch_input_shape": [None, 32, 32, 3]}}]
    names = iter(name for name in tensors(from_keras.TABLES[0]) if name.endswith("/kernel"))
    for step in expected(MobileNetConfig("mobilenet_v1", 0.01, num_labels=2)):
        kind, name = "DepthwiseConv2D" if step.groups > 1 else "Conv2D", next(names).removesuffix("/kernel")
        fields = {"name": name, "strides": [step.stride] * 2, "padding": "same", "use_bias": False}
        layers += [
            {"class_name": kind, "config": fields},
            {"class_name": "BatchNormalization", "config": {"name": f"{name}_bn", "epsilon": 0.001}},
            {"class_name": "ReLU", "config": {"name": f"{name}_relu", "max_value": 6.0}},
        ]
    layers.append({"class_name": "GlobalAveragePooling2D", "config": {"name": "pool", "keepdims": True}})
    layers.append({"class_name": "Conv2D", "config": {"name": next(names).removesuffix("/kernel")}})
    layers.append({"class_name": "Activation", "config": {"name": "end", "activation": "softmax"}})
    return {"class_name": "Sequential", "config": {"name": "network", "layers": layers}}


def onnx_files() -> Iterator[bytes]:
    """Graphs of narrow networks, as PyTorch exports them."""
    import variants

    with tempfile.TemporaryDirectory() as folder:
        for version in (1, 2):
            path, _ = variants.write(variants.Variant(version, 0.1, 32, suffix=".onnx"), Path(folder))
            yield path.read_bytes()


def tflite_files(folder: Path | None = None) -> Iterator[bytes]:
    """Google's TFLite files with as few channels as can be; none where they are not at hand."""
    from ai_edge_litert import schema_py_generated as schema
    from flatbuffers import Builder
    from oracles import DATA

    for path in sorted((folder or DATA / "tflite").glob("mobilenet_v1_0.25*.tflite")):
        model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
        for value in model.subgraphs[0].tensors:
            data = model.buffers[value.buffer].data
            if value.shape is None or not len(value.shape) or value.name == b"input":
                continue
            if value.type == schema.TensorType.INT32 and len(value.shape) == 1 and len(data) == 8:
                model.buffers[value.buffer].data = np.frombuffer(np.int32([1, 8]).tobytes(), np.uint8)
                continue  # a shape
            sides = (1, 2) if len(value.shape) == 4 else ()
            few = [size if axis in sides else min(size, 8) for axis, size in enumerate(value.shape)]
            if data is not None:
                name = {0: "float32", 2: "int32", 3: "uint8", 9: "int8"}[value.type]
                whole = np.frombuffer(bytes(data), name).reshape(value.shape)
                part = whole[tuple(slice(size) for size in few)]
                model.buffers[value.buffer].data = np.frombuffer(part.tobytes(), np.uint8)
            value.shape = np.array(few, np.int32)
        builder = Builder(1 << 16)
        builder.Finish(model.Pack(builder), b"TFL3")
        yield bytes(builder.Output())


def archives() -> Iterator[bytes]:
    """Archives as slim published them, good and bad."""
    for names in (("./a.ckpt.index", "./a.ckpt.data-00000-of-00001"), ("a.ckpt.index", "../b.index"), ("/a",), ()):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = 20
                archive.addfile(member, io.BytesIO(bytes(20)))
        yield buffer.getvalue()


def convert_file(path: Path) -> None:
    """Read a source, and build its network; where the source has a runtime at hand, run both on one image."""
    _, checkpoint = read_source(str(path))
    choose_labels(checkpoint, None, False)
    model = build(checkpoint, "the source")
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    size = checkpoint.config["image_size"]
    if path.suffix in (".tflite", ".onnx") and size <= 256:
        image = torch.rand(1, model.config.num_channels, size, size)
        with suppress(NoOracleError), torch.no_grad():
            oracle = checkpoint.oracle()
            if checkpoint.task is DETECTION:
                ours, theirs = model(image).scores, oracle.results(image).scores
            else:
                ours, theirs = model(image).logits, oracle.logits(image)
            if checkpoint.task is SEGMENTATION and oracle.predictions:
                assert oracle.predictions(image).shape == (1, size, size)
            Comparison.of("the runtime", ours, theirs)


def source(name: str) -> Callable[[bytes], None]:
    """A target that converts a file of a name."""

    def use(data: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
            path = Path(folder, name)
            path.write_bytes(data)
            convert_file(path)

    return use


def described(kind: str) -> Callable[[bytes], None]:
    """A target that converts a repository whose configuration is edited."""

    def use(data: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
            for name, content in described_files(kind).items():
                Path(folder, name).write_bytes(content)
            names = GOOGLE_FIELDS if kind == "google" else TIMM_FIELDS
            half = len(data) // 4 * 2  # the first half is for config.json, the second for what it says of images
            config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
            config |= fields(names, data[:half])
            images = fields((*PROCESSOR_FIELDS, *_PRETRAINED), data[half:])
            if kind == "google":
                content = PROCESSOR.to_dict() | {"image_processor_type": "MobileNetV1ImageProcessor"} | images
                Path(folder, "preprocessor_config.json").write_text(json.dumps(content), encoding="utf-8")
            elif isinstance(config.get("pretrained_cfg"), dict):
                config["pretrained_cfg"] = config["pretrained_cfg"] | images
            Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
            convert_file(Path(folder))

    return use


_PRETRAINED = ("input_size", "crop_pct", "interpolation", "mean", "std", "license")
GOOGLE_FIELDS = (
    *("depth_multiplier", "num_channels", "image_size", "hidden_act", "tf_padding", "layer_norm_eps", "min_depth"),
    *("classifier_dropout_prob", "output_stride", "depth_divisible_by", "expand_ratio", "first_layer_is_expansion"),
    *("finegrained_output", "semantic_loss_ignore_index", "initializer_range", *_COMMON),
)
TIMM_FIELDS = ("architecture", "num_classes", "num_features", "label_names", "label_descriptions", "pretrained_cfg")


@cache
def described_files(kind: str) -> dict[str, bytes]:
    """A small repository of transformers' own or of timm: content by name."""
    if kind == "google":
        config = {"model_type": "mobilenet_v1", "depth_multiplier": 0.01, "num_labels": 2, "image_size": 32}
        weights = save(tensors(from_google.TABLES["mobilenet_v1"]))
    else:
        recorded = {"input_size": [3, 32, 32], "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3}
        config = {"architecture": "mobilenetv1_001", "num_classes": 2, "pretrained_cfg": recorded}
        weights = save(tensors(from_timm.TABLES[0]))
    return {"config.json": json.dumps(config).encode(), "model.safetensors": weights}


# Detectors and segmenters of TFLite, and graphs of ONNX that compute more than a network


class TFLiteFile:
    """A TFLite file in the making. Values are numbers, as operators take and give them."""

    def __init__(self, size: int) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.schema, self.random = schema, np.random.default_rng(0)
        self.graph = self.make("SubGraph", tensors=[], operators=[])
        self.model = self.make(
            "Model", version=3, subgraphs=[self.graph], operatorCodes=[], buffers=[self.make("Buffer")]
        )
        self.input = self.value(shape=(1, size, size, 3))

    def make(self, kind: str, **fields: Any) -> Any:
        """An object of the schema."""
        result = getattr(self.schema, f"{kind}T")()
        for name, value in fields.items():
            setattr(result, name, value)
        return result

    def value(self, constant: np.ndarray | None = None, shape: tuple[int, ...] = ()) -> int:
        """A new value, or a constant."""
        kind, buffer = self.schema.TensorType.FLOAT32, 0
        if constant is not None:
            kind = self.schema.TensorType.INT32 if constant.dtype == np.int32 else kind
            buffer, shape = len(self.model.buffers), constant.shape
            self.model.buffers.append(self.make("Buffer", data=np.frombuffer(constant.tobytes(), np.uint8)))
        numbers = np.array(shape, np.int32)
        self.graph.tensors.append(self.make("Tensor", name=b"", shape=numbers, type=kind, buffer=buffer))
        return len(self.graph.tensors) - 1

    def add(self, kind: str, inputs: Sequence[int], options: str | None = None, **fields: Any) -> int:
        """A new operator; its value."""
        codes, builtin = self.schema.BuiltinOperator, self.schema.BuiltinOptions
        code = getattr(codes, kind)
        self.model.operatorCodes.append(
            self.make("OperatorCode", builtinCode=code, deprecatedBuiltinCode=code, version=1)
        )
        operator = self.make("Operator", opcodeIndex=len(self.model.operatorCodes) - 1)
        operator.inputs, operator.outputs = np.array(inputs, np.int32), np.array([self.value()], np.int32)
        if options:
            operator.builtinOptionsType = getattr(builtin, options)
            operator.builtinOptions = self.make(options, **fields)
        self.graph.operators.append(operator)
        return int(operator.outputs[0])

    def conv(self, value: int, step: Step) -> int:
        """A convolution with the activation that follows it."""
        depthwise, side, outputs = step.groups > 1, step.kernel_size, step.out_channels
        shape = (1, side, side, outputs) if depthwise else (outputs, side, side, step.in_channels)
        arrays = (self.random.normal(0, 0.2, sizes).astype(np.float32) for sizes in (shape, outputs))
        fields = dict.fromkeys(("strideW", "strideH"), step.stride)
        fields |= dict.fromkeys(("dilationWFactor", "dilationHFactor"), step.dilation)
        fields |= {"fusedActivationFunction": {None: 0, "relu": 1, "relu6": 3}[step.act]}
        kind, options = ("CONV_2D", "Conv2DOptions")
        if depthwise:
            kind, options, fields["depthMultiplier"] = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions", 1
        return self.add(kind, (value, *map(self.value, arrays)), options, **fields)

    def finish(self, outputs: Sequence[int]) -> bytes:
        """The file."""
        from flatbuffers import Builder

        self.graph.inputs, self.graph.outputs = np.array([self.input], np.int32), np.array(outputs, np.int32)
        builder = Builder(1 << 16)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


SUPPRESSION = {
    **{"max_detections": 10, "max_classes_per_detection": 1, "num_classes": 2, "nms_score_threshold": 1e-8},
    **{"nms_iou_threshold": 0.6, "y_scale": 10.0, "x_scale": 10.0, "h_scale": 5.0, "w_scale": 5.0},
}


@cache
def tflite_detector() -> tuple[TFLiteFile, Any]:
    """A small detector, and its last operator, which has no options so far."""
    config = MobileNetConfig.from_preset("ssd_mobilenet_v1", width_multiplier=1 / 16, image_size=32, num_labels=2)
    file, detector, steps = TFLiteFile(32), DETECTORS[config.detector], detection_steps(config)
    value, side, maps, sizes = file.input, 32, [], []
    for index, step in enumerate(steps):
        value, side = file.conv(value, step), -(-side // step.stride)
        if index in map_ends(config, steps):
            maps.append((value, step.out_channels))
            sizes.append((side, side))
    joined = []
    for numbers in (4, 3):
        form, parts = file.value(np.int32([1, -1, numbers])), []
        for (start, channels), shapes in zip(maps, anchor_shapes(detector), strict=True):
            predicted = file.conv(start, Step("", "conv", channels, len(shapes) * numbers))
            parts.append(file.add("RESHAPE", (predicted, form), "ReshapeOptions"))
        joined.append(file.add("CONCATENATION", parts, "ConcatenationOptions", axis=1))
    scores = file.add("LOGISTIC", joined[1:])
    anchors = file.value(generate_anchors(detector, sizes)[:, [1, 0, 3, 2]].numpy())
    file.add("CUSTOM", (joined[0], scores, anchors))
    file.model.operatorCodes[-1].customCode = POST_PROCESS
    last = file.graph.operators[-1]
    last.outputs = np.array([*last.outputs, *(file.value() for _ in range(3))], np.int32)
    return file, last


@cache
def tflite_segmenter() -> bytes:
    """A small segmenter, DeepLab V3 in its light form."""
    fields = {"image_size": 33, "output_stride": 16, "segmentation_head": "deeplab_v3_light", "num_labels": 3}
    file, starts = TFLiteFile(33), {}
    value = file.input
    for step in expected(config := MobileNetConfig("mobilenet_v2", 0.1, **fields)):
        if step.kind == "add":
            value = file.add("ADD", (value, starts[step.name]), "AddOptions")
        else:
            starts.setdefault(step.name.rpartition(".")[0], value)
            value = file.conv(value, step)
    channels = config.stages[-1][-1].out_channels

    def resized(value: int, side: int) -> int:
        size = file.value(np.int32([side, side]))
        return file.add("RESIZE_BILINEAR", (value, size), "ResizeBilinearOptions", alignCorners=True)

    axes = file.value(np.int32([1, 2]))
    pooled = file.add("MEAN", (value, axes), "ReducerOptions", keepDims=True)
    branches = [file.conv(each, Step("", "conv", channels, 256, act="relu")) for each in (pooled, value)]
    joined = file.add("CONCATENATION", (resized(branches[0], 3), branches[1]), "ConcatenationOptions", axis=3)
    projected = file.conv(joined, Step("", "conv", 512, 256, act="relu"))
    return file.finish([resized(file.conv(projected, Step("", "conv", 256, 3)), 33)])


def post_processes() -> Iterator[bytes]:
    """Options of a detector's last operator, as TensorFlow writes them and otherwise."""
    from flatbuffers import flexbuffers

    regular = {"use_regular_nms": True, "detections_per_class": 3}
    for more in ({}, regular, {"_output_types": [1, 2], "_output_quantized": True}, {"max_detections": 65536}):
        yield bytes(flexbuffers.Dumps(SUPPRESSION | more))
    yield bytes(flexbuffers.Dumps([SUPPRESSION]))


def use_post_process(data: bytes) -> None:
    """Convert a detector whose last operator has other options."""
    file, last = tflite_detector()
    last.customOptions = np.array(bytearray(data), np.uint8)
    source("detector.tflite")(file.finish(last.outputs))


def tflite_detectors() -> Iterator[bytes]:
    """A detector with each of some options."""
    file, last = tflite_detector()
    for options in list(post_processes())[:2]:
        last.customOptions = np.frombuffer(options, np.uint8)
        yield file.finish(last.outputs)


@cache
def onnx_graph() -> bytes:
    """The graph of a narrow network, whose output may have others beside it."""
    import onnx

    model = onnx.load_from_string(next(onnx_files()))
    end = next(node for node in model.graph.node if model.graph.output[0].name in node.output)
    end.output[0] = model.graph.output[0].name = "logits"
    return model.SerializeToString()


def use_onnx_outputs(data: bytes) -> None:
    """Convert a graph to which something is done by each pair of bytes: zeros, outputs, constants, connections."""
    import onnx

    model = onnx.load_from_string(onnx_graph())
    graph, float32 = model.graph, onnx.TensorProto.FLOAT
    for index, (change, value) in enumerate(zip(data[::2], data[1::2], strict=False)):
        node, name = graph.node[value % len(graph.node)], f"zeros {index}"
        if change % 5 < 2:
            shape = onnx.numpy_helper.from_array(np.int64([1 << value % 40]), f"shape {index}")
            graph.initializer.append(shape)
            graph.node.insert(0, onnx.helper.make_node("ConstantOfShape", [shape.name], [name]))
            if change % 5:
                graph.output.append(onnx.helper.make_tensor_value_info(name, float32, None))
        elif change % 5 == 2:
            tensor = graph.initializer[value % len(graph.initializer)]
            longer = np.resize(onnx.numpy_helper.to_array(tensor), change + 1)
            tensor.CopyFrom(onnx.numpy_helper.from_array(longer, tensor.name))
        elif node.input:
            other = graph.node[change % len(graph.node)]
            node.input[value % len(node.input)] = other.output[0]
    source("model.onnx")(model.SerializeToString())


# What comes after the network: suppression, label maps, drawings, results

# Numbers that a byte stands for: from -0.5 to 2, and extremes.
_NUMBERS = np.array([*((np.arange(250) - 50) / 100), 0, 1, 1e-30, 1e30, -1e30, 3e38], np.float32)


def numbers(data: bytes, *shape: int) -> np.ndarray:
    """An array of as many numbers as are asked for."""
    size = int(np.prod(shape, dtype=np.int64))
    return _NUMBERS[np.resize(np.frombuffer(data or b"\0", np.uint8), size)].reshape(shape)


def noise() -> Iterator[bytes]:
    """Bytes of several lengths."""
    random = np.random.default_rng(0)
    for length in (0, 9, 40, 200, 700):
        yield random.bytes(length)


def _plain_nms(
    scores: np.ndarray, overlaps: list[list[bool]], threshold: float, limits: tuple[int, int, int | None]
) -> list[tuple[int, int]]:
    """Labels and anchors of what is detected, class by class and box by box."""
    total, by_class, candidates = limits
    found = []
    for label, column in enumerate(scores.T.tolist()):
        kept: list[int] = []
        rows = [row for row, score in enumerate(column) if score > threshold]
        for row in sorted(rows, key=lambda row, column=column: -column[row])[:candidates]:
            if len(kept) < by_class and not any(overlaps[other][row] for other in kept):
                kept.append(row)
        found += [(label, row) for row in kept]
    return sorted(found, key=lambda pair: -scores[pair[1], pair[0]])[:total]


def use_suppress(data: bytes) -> None:
    """Suppress boxes, and compare with what is said box by box."""
    head, values = data[:8].ljust(8, b"\0"), data[8:]
    labels, total, by_class = 1 + head[0] % 5, 1 + head[1] % 20, 1 + head[2] % 9
    candidates, classes, clips = head[3] % 16 or None, head[4] % 4 or None, bool(head[7] & 1)
    iou, threshold = head[5] / 256, head[6] / 256
    count = min(len(values) // (labels + 4), 60)
    rows = torch.from_numpy(numbers(values, count, labels + 4))
    scores, boxes = rows[:, :labels].clamp(0, 1), rows[:, labels:]
    found, indices, edges = post.suppress(
        scores,
        boxes,
        threshold,
        nms_iou_threshold=iou,
        max_detections=total,
        max_detections_per_class=by_class,
        max_candidates_per_class=candidates,
        max_classes_per_box=classes,
        clip_boxes=clips,
    )
    corners = post.corners(boxes)
    corners = corners.clamp(0, 1) if clips else corners
    overlaps = (post.overlap(corners[:, None], corners[None]) > iou).tolist()
    plain = scores.numpy()
    if classes is None:
        expected = _plain_nms(plain, overlaps, threshold, (total, by_class, candidates))
    else:
        best = _plain_nms(plain.max(1, keepdims=True), overlaps, threshold, (total, total, candidates))
        expected = [
            (label, row)
            for _, row in best
            for label in np.argsort(-plain[row], kind="stable")[:classes].tolist()
            if plain[row, label] > threshold
        ]
    assert len(found) <= total * (classes or 1)
    assert indices.tolist() == [label for label, _ in expected]
    assert found.tolist() == [plain[row, label] for label, row in expected]
    assert torch.equal(edges, corners[[row for _, row in expected]])


def use_label_map(data: bytes) -> None:
    """Make a label map, and compare it with all logits of each pixel."""
    head, values = data[:8].ljust(8, b"\0"), data[8:]
    height, width, rows, columns = 1 + head[0] % 50, 1 + head[1] % 50, 1 + head[2] % 9, 1 + head[3] % 9
    labels, fit, side = 1 + head[4] % 6, list(FITS)[head[5] % len(FITS)], 1 + head[6] % 64
    axes = place(width, height, read_options(FITS[fit](side, side + head[7] % 9)))
    is_aligned = bool(head[7] & 128)
    logits = torch.from_numpy(numbers(values, labels, rows, columns)).clamp(-10, 10)
    found = post.label_map(logits, axes, is_aligned)
    scores = post.resize_to_image(logits, axes, is_aligned)
    assert found.shape == (height, width)
    assert scores.shape == (labels, height, width)
    assert 0 <= found.min() <= found.max() < labels
    torch.testing.assert_close(scores.gather(0, found[None])[0], scores.amax(0))


_TASKS = {
    "logits": (CLASSIFICATION, {}),
    "maps": (SEGMENTATION, {"segmentation_head": "lraspp"}),
    "scores": (DETECTION, {"detector": "ssd_mobilenet_v1"}),
    "detections": (DETECTION, {"detector": "ssd_mobilenet_v1"}),
}


@cache
def exported_folder(kind: str) -> Path:
    """A folder with the configuration of a network of three labels, and an image, but without a graph."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    task, options = _TASKS[kind]
    config = {"model_type": "mobilenet", "architectures": [task.architecture], "num_labels": 3, **options}
    config["id2label"] = {str(index): label for index, label in enumerate(("background", "=a", "b\x1b[2J"))}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    processor = MobileNetImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    processor.save_pretrained(folder)
    Image.new("RGB", (40, 30)).save(folder / "image.png")
    return folder


def exports() -> Iterator[bytes]:
    """Shapes and outputs of every kind that are sound, and one that is not."""
    values = bytes(range(50, 140))
    for kind, shape in enumerate(((1, 3), (1, 3, 4, 4), (1, 9, 3), (5, 7), (0, 7))):
        yield bytes([min(kind, 3), 0, len(shape), *shape]).ljust(8, b"\0") + values
    yield bytes([1, 2, 4, 1, 3, 0, 4]).ljust(8, b"\0") + values


def use_exported(data: bytes) -> None:
    """Run a graph of constant outputs, of any shape, type and value, and write what comes of it."""
    import onnx

    head, values = data[:8].ljust(8, b"\0"), data[8:]
    kind = list(_TASKS)[head[0] % len(_TASKS)]
    shape = tuple(side % 12 for side in head[3 : 3 + head[2] % 6])
    content = np.nan_to_num(numbers(values, *shape), posinf=1e38).astype(
        ("float32", "float32", "int64", "float16", "float64", "bool")[head[1] % 6]
    )
    outputs = {kind if kind in ("scores", "detections") else "logits": content}
    if kind == "scores":
        outputs["pred_boxes"] = numbers(values[1:], *(*shape[:2], 4))
    nodes = [
        onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(value, name))
        for name, value in outputs.items()
    ]
    types = [onnx.helper.np_dtype_to_tensor_dtype(value.dtype) for value in outputs.values()]
    ends = [onnx.helper.make_tensor_value_info(*pair, None) for pair in zip(outputs, types, strict=True)]
    pixels = onnx.helper.make_tensor_value_info("pixel_values", onnx.TensorProto.FLOAT, ["batch", 3, 32, 32])
    graph = onnx.helper.make_graph(nodes, "graph", [pixels], ends)
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
    folder, (task, _) = exported_folder(kind), _TASKS[kind]
    onnx.save(model, folder / "model.onnx")
    manifest = {"export_format": "onnx", "components": {"model": {"file": "model.onnx"}}, "outputs": list(outputs)}
    (folder / "export.json").write_text(json.dumps(manifest), encoding="utf-8")
    network = load(str(folder), task=task)
    images = [FoundImage(str(folder / "image.png"))]
    if task is CLASSIFICATION:
        (result,) = classify(images, network, 5, 1)
    elif task is DETECTION:
        (result,) = detect(images, network, 0.5, 1)
        assert all(0 <= edge <= 40 for p in result.predictions for edge in p.box)
    else:
        (result,) = segment(images, network, 1)
        assert sum(p.pixels for p in result.predictions) == 40 * 30
    assert result.error is None
    written(result, {CLASSIFICATION: CLASSIFIED, DETECTION: DETECTED, SEGMENTATION: SEGMENTED}[task])


def written(result: Any, form: Form) -> None:
    """Write a result in every layout, and read it back."""
    texts = {}
    for layout in Layout if form is DETECTED else (Layout.TABLE, Layout.JSON, Layout.CSV):
        out = Console(file=io.StringIO(), highlight=False)
        lines = writer(layout, out, form=form)
        lines.write(result)
        lines.close()
        texts[layout] = out.file.getvalue()
        assert all(c.isprintable() or c == "\n" for c in texts[layout])

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    line = json.loads(texts[Layout.JSON], parse_constant=refuse)
    assert line["file"] == result.name
    assert [p["label"] for p in line["predictions"]] == [p.label for p in result.predictions]
    _, *rows = csv.reader(io.StringIO(texts[Layout.CSV], newline=""))
    assert len(rows) == len(result.predictions)
    assert not any(cell.startswith(tuple("=+-@\uff1d\uff0b\uff0d\uff20")) for row in rows for cell in (row[0], row[3]))
    if form is DETECTED:
        assert len(json.loads(texts[Layout.COCO], parse_constant=refuse)) == len(result.predictions)


def use_results(data: bytes) -> None:
    """Write results with any name, labels and scores."""
    text = data.decode("utf-8", "surrogateescape")
    scores = numbers(data, 1 + len(data) % 5).clip(0, 1).tolist()
    name, labels = text[::2], (text, text[1:], "\uff1d1", "", "a" * 300)
    found = [Detection(i, labels[i], score, (0.0, score, 9.5, 1e6)) for i, score in enumerate(scores)]
    written(DetectionResult(name, found, None, (10, 10)), DETECTED)
    written(Result(name, [Prediction(*p[:3]) for p in found], None), CLASSIFIED)
    written(SegmentationResult(name, [Segment(*p[:3], 7) for p in found], None, (1, 1)), SEGMENTED)


def use_draw(data: bytes) -> None:
    """Draw boxes and classes of any label on an image of any shape."""
    head, values = data[:4].ljust(4, b"\0"), data[4:]
    width, height = 1 + head[0] * (4 if head[3] & 1 else 1), 1 + head[1] % 40
    image, label = (
        Image.new(("RGB", "L", "RGBA", "P")[head[2] % 4], (width, height)),
        values.decode("utf-8", "replace"),
    )
    boxes = numbers(values, min(len(values) // 4, 20), 4).clip(0, 1) * (width, height, width, height)
    found = [Detection(int(box[0]) - 1, label[i:], 0.5, tuple(box.tolist())) for i, box in enumerate(boxes)]
    classes = np.resize(np.frombuffer(values or b"\0", np.uint8), (height, width))
    classes = classes.astype(np.int32) * 200 if head[3] & 2 else classes
    named = [Segment(int(index), label, 0.5, 1) for index in np.unique(classes)[:9]]
    scale = -(-480 // max(width, height))
    for drawn in (draw_boxes(image, found), draw_segments(image, classes, named, 0 if head[3] & 4 else None)):
        assert (drawn.mode, drawn.size) == ("RGB", (scale * width, scale * height))
        encode(drawn, ".jpg" if head[3] & 8 else ".png")
    assert np.array_equal(np.asarray(to_mask(classes)), classes)
    assert not image.convert("L").getbbox()


def use_drawings(data: bytes) -> None:
    """Name sources, by lines, and look where they would be drawn to."""
    lines = [line.replace("..", "").lstrip("/") for line in os.fsdecode(data[1:]).split("\n")]
    with tempfile.TemporaryDirectory(prefix="hostile-") as top:
        sources, out = Path(top, "photos"), Path(top, "out")
        (sources / "sub").mkdir(parents=True)
        out.mkdir()
        for name in ("a.jpg", "sub/a.jpg", "sub/b.gif"):
            (sources / name).touch()
        if os.name == "posix":
            (out / "sub").symlink_to(sources / "sub")
        names = [line if is_url(line) else os.path.join(str(sources), line) for line in lines]
        drawings = Drawings(out, names, draws_to if data[:1] > b"\x7f" else segments_to, data[:1] > b"\x3f")
        drawn = [target for image in drawings.find() for target in image.targets if image.error is None]
        assert len({target.casefold() for target in drawn}) == len(drawn)
        for target in drawn:
            assert Path(os.path.realpath(out / target)).is_relative_to(os.path.realpath(out))
            assert all(len(os.fsencode(part)) <= 255 for part in Path(target).parts)


def drawing_names() -> Iterator[bytes]:
    """Names of files, folders and patterns, and URLs, for each kind of drawing."""
    names = (
        "a.jpg\nsub\nsub/*.gif\n**/a.jpg\na.jpg\nhttp://[::1/a.png\nhttps://host/con.png?a\nhttps://host/x./..%2f\0"
    )
    for first in (b"\0", b"\x50", b"\xff"):
        yield first + names.encode() + b"\nhttps://host/" + 200 * "\u732b".encode() + b".png\nsub/" + 300 * b"x"


_CONVERSION = (ConversionError,)
TARGETS = {
    "image": Target(use_image, (ValueError,), images),
    "array": Target(use_array, (ValueError,), arrays),
    "config": Target(
        lambda data: use_edited("config.json", fields(CONFIG_FIELDS, data)), (ValueError, ImportError), pairs
    ),
    "processor": Target(
        lambda data: use_edited("preprocessor_config.json", fields(PROCESSOR_FIELDS, data)), (ValueError,), pairs
    ),
    "google": Target(described("google"), _CONVERSION, pairs),
    "timm": Target(described("timm"), _CONVERSION, pairs),
    "safetensors": Target(source("model.safetensors"), _CONVERSION, safetensors),
    "bin": Target(source("model.bin"), _CONVERSION, pickles),
    "h5": Target(source("model.h5"), _CONVERSION, keras_files),
    "tflite": Target(source("model.tflite"), _CONVERSION, tflite_files),
    "onnx": Target(source("model.onnx"), _CONVERSION, onnx_files),
    "tgz": Target(source("mobilenet_v1_0.25_128.tgz"), (*_CONVERSION, ImportError), archives),
    "suppress": Target(use_suppress, (ValueError,), noise),
    "label_map": Target(use_label_map, (ValueError,), noise),
    "exported": Target(use_exported, (ValueError,), exports),
    "draw": Target(use_draw, (ValueError,), noise),
    "drawings": Target(use_drawings, (ValueError,), drawing_names),
    "results": Target(use_results, (ValueError,), noise),
    "post_process": Target(use_post_process, _CONVERSION, post_processes),
    "tflite_detector": Target(source("detector.tflite"), _CONVERSION, tflite_detectors),
    "tflite_segmenter": Target(source("segmenter.tflite"), _CONVERSION, lambda: iter([tflite_segmenter()])),
    "onnx_outputs": Target(use_onnx_outputs, _CONVERSION, pairs),
}


# Datasets that are trained on


def _check_entries(entries: np.ndarray, classes: int) -> None:
    """Every box is of a class, and lies in its image."""
    kept = entries[entries[..., 0] >= 0]
    assert (kept[:, 0] < classes).all()
    assert (kept[:, 2:] >= 0).all()
    assert (kept[:, 2:] <= 1).all()
    assert (kept[:, 2:4] < kept[:, 4:]).all()


def coco_files() -> Iterator[bytes]:
    """Annotations of two images in COCO's format."""
    images = [{"id": index, "file_name": f"{index}.png", "width": 40, "height": 30} for index in range(2)]
    box = {"id": 1, "image_id": 0, "category_id": 7, "bbox": [1, 2.5, 30, 9], "area": 270, "iscrowd": 0}
    category = {"id": 7, "name": "circle", "supercategory": "shape"}
    yield json.dumps({"images": images, "annotations": [box], "categories": [category]}).encode()
    heading = {"id": 0, "name": "shape", "supercategory": None}
    boxes = [{**box, "image_id": "b", "category_id": "c", "iscrowd": 1}, {**box, "bbox": [-5, -5, 99, 99]}]
    categories = [category, heading, {"id": "c", "name": "\u00e9"}]
    images = [{"id": "b", "file_name": "1.png"}, images[0]]
    yield json.dumps({"info": {}, "images": images, "annotations": boxes, "categories": categories}).encode()


def use_coco(data: bytes) -> None:
    """Read annotations of two images, and decode both."""
    from mobilenet.training.boxes import BOXES
    from mobilenet.training.data import Storage, decode, folders_of, load_splits

    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        folder = Path(name)
        (folder / "annotations").mkdir()
        (folder / "annotations" / "instances_train.json").write_bytes(data)
        for index in range(2):
            Image.new("RGB", (40, 30)).save(folder / f"{index}.png")
        rows = load_splits(name, labels=BOXES)["train"]
        BOXES.check_rows(rows)
        given = {"storage": Storage(folder / "work"), "quiet": True, "folders": folders_of(name), "labels": BOXES}
        images = decode(rows, PROCESSOR, name="train", **given)
    _check_entries(images.labels, len(BOXES.names(rows)))


def objects() -> Iterator[bytes]:
    """Rows of objects, in every form."""
    for boxes in (
        {"bbox": [[1, 2, 30, 9]], "category": [0]},
        {"id": [4], "boxes": [[1.5, 2, 30, 9]], "labels": ["circle"], "is_crowd": [True]},
        [{"bbox": [1, 2, 30, 9], "category_id": 3}],
    ):
        yield json.dumps([boxes, boxes]).encode()


def use_objects(data: bytes) -> None:
    """Read rows of objects, and decode their boxes."""
    import datasets
    import pyarrow

    from mobilenet.training.boxes import BOXES
    from mobilenet.training.data import IMAGE, LABEL

    try:
        rows = json.loads(data)
        table = datasets.Dataset.from_dict({IMAGE: [*map(str, range(len(rows)))], LABEL: rows})
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
        pyarrow.ArrowException,
    ):
        return  # they are no column
    rows = BOXES.unify(datasets.DatasetDict({"train": table}))["train"]
    BOXES.check_rows(rows)
    image = Image.new("RGB", (40, 30))
    entries = BOXES.stack([BOXES.decode(label, image, (30, 40), lambda row: row) for label in rows[LABEL][:]])
    _check_entries(entries, len(BOXES.names(rows)))


def masks() -> Iterator[bytes]:
    """Masks of every depth, as Pillow and others write them; some are refused."""
    from shapes import encode_png

    random = np.random.default_rng(0)
    for bits in (1, 2, 4, 8):
        values = random.integers(0, 1 << bits, (9, 13), np.uint8)
        yield encode_png(values, bits)
        yield encode_png(values, bits, palette=True)
        yield _encoded(Image.fromarray(values), "PNG")
    yield _encoded(Image.fromarray(values), "JPEG")


def use_mask(data: bytes) -> None:
    """Read a mask: its classes are what the file stores."""
    import datasets
    from mobilenet.preprocessing_mobilenet import open_image
    from shapes import decode_png

    from mobilenet.training.data import IMAGE, LABEL
    from mobilenet.training.masks import IGNORED, Masks, _largest

    label, kind = {"bytes": data, "path": None}, datasets.Image(decode=False)
    features = datasets.Features({IMAGE: kind, LABEL: kind})
    rows = datasets.Dataset.from_dict({IMAGE: [label], LABEL: [label]}, features)
    classes = _largest(datasets.DatasetDict({"train": rows}), None) + 1
    image = Image.new("L", open_image(data).size)
    mask = Masks([*map(str, range(classes))]).decode_whole(label, image, lambda row: row["bytes"])
    assert mask[mask != IGNORED].max(initial=0) == max(classes - 1, 0)
    if b"\0\0\0\rIHDR" in data[:16] and (stored := decode_png(data)) is not None:
        assert np.array_equal(mask, stored)


def names() -> Iterator[bytes]:
    """Files of names; the first byte says what the file is called."""
    yield b"\0ground\r\n red circle \n\n"
    yield b"\1\xef\xbb\xbfground\ncircle"
    yield b'\2["ground", "circle"]'
    yield b'\3{"1": "circle", "0": "ground"}'


def use_names(data: bytes) -> None:
    """Read the names of the classes of masks."""
    from mobilenet.training.masks import NAME_FILES, read_names

    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        path = Path(folder, NAME_FILES[next(iter(data), 0) % len(NAME_FILES)])
        path.write_bytes(data[1:])
        found = read_names(path)
    assert 0 < len({*found}) == len(found) <= 255
    assert all(name and name == name.strip() for name in found)


def class_names() -> Iterator[bytes]:
    """Names of classes, between zeros."""
    yield "ground\0circle \u00e9\0\u732b".encode()
    yield b"US$ & CA$\0$\\foo$\0_a\0{}"
    yield "\x1b]0;x\x07\0\x9b2J\0\u202ea".encode()


def use_class_names(data: bytes) -> None:
    """Say names of classes and of images on stdout, and draw them."""
    import datasets

    from mobilenet.training.boxes import BOXES, NO_BOX
    from mobilenet.training.data import IMAGE, LABEL, Storage, decode, tell
    from mobilenet.training.report import plot_matrix, plot_precisions

    names = [*dict.fromkeys(data.decode("utf-8", "replace").split("\0"))][:6]
    images = [{"bytes": _encoded(Image.new("L", (9, 9)), "PNG"), "path": None}]
    images += [{"bytes": b"no image", "path": name} for name in names]
    features = datasets.Features({IMAGE: datasets.Image(decode=False), LABEL: datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({IMAGE: images, LABEL: [0] * len(images)}, features)
    entries = np.full((1, 1, 6), NO_BOX, np.float32)
    entries[..., 0] = 0
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder, redirect_stdout(io.StringIO()) as out:
        decode(rows, PROCESSOR, Storage(Path(folder, "work")), "train", skip_unreadable=True)
        tell(f"Note: {BOXES.check(entries, names)}")
        plot_matrix(np.eye(len(names)), names, Path(folder, "matrix.png"))
        plot_precisions(np.ones((5, len(names))), names, Path(folder, "precisions.png"))
    lines = out.getvalue().splitlines()
    assert len(lines) == len(names) + 1
    assert all(line.isprintable() for line in lines)


TRAINING = {
    "coco": Target(use_coco, (ValueError,), coco_files),
    "objects": Target(use_objects, (ValueError,), objects),
    "mask": Target(use_mask, (ValueError,), masks),
    "names": Target(use_names, (ValueError,), names),
    "class_names": Target(use_class_names, (ValueError,), class_names),
}
TARGETS |= TRAINING
