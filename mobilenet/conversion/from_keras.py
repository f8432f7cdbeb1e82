"""Keras' files: .h5 and .keras by the graph that they hold, .weights.h5 by the names of Keras applications."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mobilenet.pickles import MAX_BYTES
from mobilenet.require import require

from .checkpoint import Checkpoint, NoOracleError, Options, Oracle, Origin, field_errors, first_line
from .graph import (
    SAME,
    Act,
    Affine,
    Conv,
    Graph,
    Match,
    Norm,
    Op,
    Other,
    Pad,
    Pool,
    Reader,
    Reshape,
    affine,
    match,
    of_two,
    to_checkpoint,
)
from .labels import beside
from .preprocessing import find, published
from .rename import Convention, ConversionError, Part, Row, Table, closest, infer_config, places, skeleton


KERAS = Convention(
    conv={"weight": Part("/kernel", "HWIO")},
    depthwise={"weight": Part("/kernel", "HWOI")},
    norm={
        "weight": Part("/gamma", "O"),
        "bias": Part("/beta", "O"),
        "running_mean": Part("/moving_mean", "O"),
        "running_var": Part("/moving_variance", "O"),
    },
    linear={"weight": Part("/kernel", "IO"), "bias": Part("/bias", "O")},
)
# The classifiers of V1 and V3 are 1x1 convolutions; of V3, others have biases too.
KERAS_V1 = KERAS._replace(linear={"weight": Part("/kernel", "HWIO"), "bias": Part("/bias", "O")})
KERAS_V3 = KERAS_V1._replace(conv=KERAS_V1.linear)


def _unit(name: str) -> Row:
    return Row(name, f"{name}_BN")


def _v3(architecture: str, join: str, norm: str, squeeze: str, upper: bool) -> Table:
    """Names of MobileNetV3's layers.

    Args:
        architecture: The network.
        join: What stands between the name of a block and that of a layer in it.
        norm: What follows the name of a convolution in that of its batch norm.
        squeeze: The name of the first convolution of squeeze-and-excite in a block.
        upper: Whether names of layers outside of blocks begin with a capital.
    """

    def unit(name: str) -> Row:
        return Row(name, name + norm)

    conv, logits = ("Conv", "Logits") if upper else ("conv", "logits")
    rows = {"stem": unit(conv), "head": unit(f"{conv}_1"), "pre_logits": Row(f"{conv}_2"), "classifier": Row(logits)}
    for owner, name in (("first", "expanded_conv"), ("block", "expanded_conv_{index}")):
        rows |= {f"{owner}.{role}": unit(f"{name}{join}{role}") for role in ("expand", "depthwise", "project")}
        rows[f"{owner}.squeeze.reduce"] = Row(f"{name}{join}{squeeze}")
        rows[f"{owner}.squeeze.expand"] = Row(f"{name}{join}{squeeze}_1")
    return Table({"architecture": architecture}, rows, KERAS_V3)


# keras/src/applications/mobilenet.py, mobilenet_v2.py and mobilenet_v3.py
TABLES = (
    Table(
        {"architecture": "mobilenet_v1"},
        {
            "stem": Row("conv1", "conv1_bn"),
            "block.depthwise": Row("conv_dw_{from_1}", "conv_dw_{from_1}_bn"),
            "block.pointwise": Row("conv_pw_{from_1}", "conv_pw_{from_1}_bn"),
            "classifier": Row("conv_preds"),
        },
        KERAS_V1,
    ),
    Table(
        {"architecture": "mobilenet_v2"},
        {
            "stem": Row("Conv1", "bn_Conv1"),
            "first.depthwise": _unit("expanded_conv_depthwise"),
            "first.project": _unit("expanded_conv_project"),
            "block.expand": _unit("block_{index}_expand"),
            "block.depthwise": _unit("block_{index}_depthwise"),
            "block.project": _unit("block_{index}_project"),
            "head": Row("Conv_1", "Conv_1_bn"),
            "classifier": Row("predictions"),
        },
        KERAS,
    ),
    # The published mobilenet_v2_weights_tf_dim_ordering_tf_kernels_*.h5 are older than these names of layers; Keras
    # loads them by their order.
    Table(
        {"architecture": "mobilenet_v2"},
        {
            "stem": Row("Conv1", "bn_Conv1"),
            "block.expand": Row("mobl{index}_conv_{index}_expand", "bn{index}_conv_{index}_bn_expand"),
            "block.depthwise": Row("mobl{index}_conv_{index}_depthwise", "bn{index}_conv_{index}_bn_depthwise"),
            "block.project": Row("mobl{index}_conv_{index}_project", "bn{index}_conv_{index}_bn_project"),
            "head": Row("Conv_1", "Conv_1_bn"),
            "classifier": Row("Logits"),
        },
        KERAS,
    ),
    # So do the published weights_mobilenet_v3_*.h5, whose names are the second of these.
    *(
        _v3(f"mobilenet_v3_{size}{kind}", *style)
        for style in (("_", "_bn", "squeeze_excite_conv", False), ("/", "/BatchNorm", "squeeze_excite/Conv", True))
        for size in ("large", "small")
        for kind in ("", "_minimalistic")
    ),
)


_HDF5 = b"\x89HDF\r\n\x1a\n"
_ARCHIVED = ("config.json", "model.weights.h5")  # in a .keras archive
_MODELS = ("Functional", "Model", "Sequential")
MAX_DEPTH = 16  # of models in models
# What .keras archives of TensorFlow 2.12 to 2.15 call the layers, which are numbered otherwise there.
_OF_TF_KERAS = "_layer_checkpoint_dependencies"

# Layers that do nothing but in training.
_IDENTITIES = {
    *("InputLayer", "Identity", "Dropout", "SpatialDropout2D", "AlphaDropout", "GaussianDropout", "GaussianNoise"),
    *("ActivityRegularization", "RandAugment", "AugMix", "CutMix", "MixUp"),
    *(
        f"Random{what}"
        for what in (
            *("Brightness", "ColorDegeneration", "ColorJitter", "Contrast", "ElasticTransform", "Erasing", "Flip"),
            *("GaussianBlur", "Grayscale", "Height", "Hue", "Invert", "Perspective", "Posterization", "Rotation"),
            *("Saturation", "Sharpness", "Shear", "Translation", "Width", "Zoom"),
        )
    ),
}
_SIZES = ("Resizing", "CenterCrop", "RandomCrop")
_ARITHMETIC = {
    **{"TrueDivide": "DIV", "Divide": "DIV", "Subtract": "SUB", "Multiply": "MUL", "Add": "ADD"},
    **{"math.truediv": "DIV", "math.divide": "DIV", "math.subtract": "SUB", "math.multiply": "MUL", "math.add": "ADD"},
    **{"__operators__.add": "ADD", "__operators__.sub": "SUB"},
}
_ACTIVATIONS = {"swish": "silu", "hard_silu": "hardswish", "hard_swish": "hardswish", "linear": None}
_ACTIVATION_LAYERS = ("Activation", "ELU", "LeakyReLU", "PReLU", "ReLU", "Softmax", "ThresholdedReLU")
_POOLS = {
    **{"GlobalAveragePooling2D": "avg", "GlobalMaxPooling2D": "max"},
    **{"AveragePooling2D": "avg", "MaxPooling2D": "max"},
}
# Where Keras may look for what a configuration names: nothing there does more than compute.
_MODULES = re.compile(
    r"keras|(tf_keras|keras)\.(src\.)?(engine\.)?"
    r"(layers|models|initializers|regularizers|constraints|activations|dtype_policies|ops\.numpy|sequential|functional)"
    r"(\.[a-z0-9_.]+)?"
)


def detect(origin: Origin) -> bool:
    """Whether a path is a file of Keras, whatever its name."""
    return origin.path.suffix in (".h5", ".hdf5", ".keras") or origin.starts_with(_HDF5) or _is_archive(origin.path)


def _is_archive(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return set(_ARCHIVED) <= set(archive.namelist())
    except (OSError, NotImplementedError, UnicodeDecodeError, zipfile.BadZipFile):
        return False


class Stored(NamedTuple):
    """What a file of Keras holds."""

    config: dict[str, Any] | None  # of the network; None where there are weights alone
    # By the way to a layer through the models that it lies in, and by the name of the weight, or by its number.
    weights: dict[tuple[str, ...], dict[str, Tensor]]


def read(origin: Origin, options: Options) -> Checkpoint:
    """Read a file of Keras.

    Raises:
        ConversionError: The file is broken, or holds another network.
        ImportError: h5py is not installed.
    """
    stored = _load(origin.path)
    with field_errors(origin.path):
        if stored.config is None:
            return _read_weights(origin, stored, options)
        file = File(stored, origin.path)
        found = match(file.graph, str(origin.path), options.size(None))
    return to_checkpoint("a Keras file", file, found, options, "keras", _own_runtime)


@contextmanager
def _weights_file(path: Path) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """The HDF5 file of a path, and the configuration beside it in a .keras archive."""
    if path.suffix != ".keras" and not _is_archive(path):
        yield path, None
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                if sum(archive.getinfo(name).file_size for name in _ARCHIVED) > MAX_BYTES:
                    raise ConversionError(f"{path}: unpacks to more than {MAX_BYTES} bytes.")
                config = json.loads(archive.read("config.json"))
                weights = Path(archive.extract("model.weights.h5", folder))
        except ConversionError:
            raise
        # NotImplementedError, a RuntimeError, is of ways to compress that Python does not know.
        except (zipfile.BadZipFile, KeyError, RuntimeError, ValueError, EOFError, OSError) as error:
            raise ConversionError(f"{path}: truncated or corrupt: {first_line(error)}") from error
        yield weights, config


def _load(path: Path) -> Stored:
    """Read the weights of a file, and the network's configuration if there is one.

    Raises:
        ConversionError: The file is broken, or too large.
        ImportError: h5py is not installed.
    """
    h5py = require("h5py", extra="keras", purpose="a file of Keras")
    with _weights_file(path) as (weights, config):
        try:
            with h5py.File(weights) as file:
                arrays = dict(_datasets(file, path))
                if sum(array.nbytes for array in arrays.values()) > MAX_BYTES:  # a small file may say so of empty ones
                    raise ConversionError(f"{path}: its weights have more than {MAX_BYTES} bytes.")
                if "model_config" in file.attrs:
                    config = json.loads(file.attrs["model_config"])
                    if not isinstance(config, dict):
                        raise ConversionError(f"{path}: model_config must be a JSON object.")
                if "layers" in file and "layer_names" not in file.attrs:
                    named = dict(_variables(file, (config or {}).get("config") if config else None))
                else:
                    named = dict(_named_weights(file.get("model_weights", file), path))
                if config is None and not named:
                    raise ConversionError(f"{path}: is HDF5, but holds neither a network nor weights of Keras.")
                return Stored(
                    config,
                    {
                        way: {name: torch.from_numpy(np.asarray(arrays[at])) for name, at in parts.items()}
                        for way, parts in named.items()
                    },
                )
        except ConversionError:
            raise
        except Exception as error:  # h5py says for few causes what a broken file raises
            raise ConversionError(f"{path}: truncated or corrupt: {first_line(error)}") from error


def _datasets(group: Any, origin: Path, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every array of a file by its full name, none of which lies in another file."""
    import h5py

    if depth > 4 * MAX_DEPTH:
        raise ConversionError(f"{origin}: has groups in groups to a depth that no network has.")
    for name in group:
        link, value = group.get(name, getlink=True), None
        at = f"{group.name.rstrip('/')}/{name}"
        if isinstance(link, h5py.HardLink):
            value = group[name]
        if value is None or (
            isinstance(value, h5py.Dataset)
            and (value.external or value.is_virtual or value.file.filename != group.file.filename)
        ):
            raise ConversionError(f"{origin}: {at.lstrip('/')} lies in another file.")
        if isinstance(value, h5py.Dataset):
            yield value.name, value
        else:
            yield from _datasets(value, origin, depth + 1)


def _named_weights(file: Any, path: Path) -> Iterator[tuple[tuple[str, ...], dict[str, str]]]:
    """Weights in the older layout: each layer lists the names of its weights, a model those of all its layers."""
    for layer in _names(file, "layer_names", path):
        group = file[layer]
        found: dict[str, dict[str, str]] = {}
        for weight in _names(group, "weight_names", path):
            *_, inner, name = ["", *weight.split("/")]
            found.setdefault(inner, {})[name.partition(":")[0].removeprefix("depthwise_")] = group[weight].name
        for inner, parts in found.items():
            yield (layer, inner) if len(found) > 1 else (layer,), parts


def _names(group: Any, attribute: str, path: Path) -> list[str]:
    """An attribute that lists names, which Keras cuts into numbered ones where it is long.

    Raises:
        ConversionError: There is none.
    """
    found = [name for name in group.attrs if re.fullmatch(rf"{attribute}\d*", name)]
    if not found:
        held = f"{group.name} holds {', '.join(list(group)[:4]) or 'nothing'}"
        hint = "load it with the TensorFlow that wrote it, and save it as .h5"
        why = hint if _OF_TF_KERAS in group else "save the whole model (model.save) to convert it"
        raise ConversionError(f"{path}: is intact, but lists no weights as Keras does ({attribute}): {held}; {why}.")
    ordered = sorted(found, key=lambda name: int(name.removeprefix(attribute) or 0))
    return [_text(name) for each in ordered for name in group.attrs[each]]


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _variables(
    group: Any, config: Mapping[str, Any] | None, way: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, str]]]:
    """Weights in the layout of Keras 3, where variables have numbers: by what they are called in `_PARTS`."""
    layers = (config or {}).get("layers", [])
    counts: dict[str, int] = {}
    names = {}
    for layer in layers:  # layers have the names of their classes there, counted
        key = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", layer["class_name"]).lower()
        counts[key] = counts.get(key, -1) + 1
        names[f"{key}_{counts[key]}" if counts[key] else key] = layer
    for key, child in group.get("layers", {}).items():
        values = child.get("vars", {})
        name = _text(values.attrs["name"]) if "name" in getattr(values, "attrs", {}) else None
        layer = next((layer for layer in layers if layer["config"].get("name") == name), None) or names.get(key, {})
        name = name or layer.get("config", {}).get("name", key)
        if "layers" in child:
            yield from _variables(child, layer.get("config"), (*way, name) if config else ())
        elif values:
            yield (*way, name), {index: values[index].name for index in sorted(values, key=int)}


Way = tuple[str, ...]  # the names of the models that a layer lies in, and its own
Fields = Mapping[str, Any]  # of a layer's configuration


class File(Reader):
    """The graph of a file of Keras, read without Keras.

    Raises:
        ConversionError: There is none, or a layer lacks its weights.
    """

    def __init__(self, stored: Stored, path: Path) -> None:
        super().__init__(path)
        self.stored = stored
        self.ways: dict[Any, tuple[str, ...]] = {}  # to the layer that makes a value
        self.shape: list[int | None] | None = None  # of the input
        self.unknown: set[str] = set()  # classes of layers that are not run either
        config = stored.config
        if not isinstance(config.get("config"), (dict, list)) or config.get("class_name") not in _MODELS:
            raise ConversionError(
                f"{path}: holds a network of the class {config.get('class_name')}, which code outside of the file "
                "defines: must be Functional or Sequential."
            )
        self.input = ("input",)
        output = self.source(self.model(config, (), [self.input]))
        convs = [op for op in self.ops if isinstance(op, Conv)]
        height, width = (self.shape or [None] * 4)[1:3]
        if height != width or not (height is None or (isinstance(height, int) and height > 0)):
            raise ConversionError(f"{path}: the input must be square, of some size of pixels, got {self.shape}.")
        self.is_half = "16" in re.sub(r"[^\d]+", " ", json.dumps(_collect(config, "dtype"))).split()
        self.graph = Graph(
            ops=self.ops,
            input=self.input,
            output=output,
            channels=convs[0].weight.shape[1] * convs[0].groups if convs else 0,
            size=height,
        )

    def model(self, config: Mapping[str, Any], way: tuple[str, ...], inputs: list[Any]) -> Any:
        """Translate a model, which may be a layer of another, and give the value that it ends in."""
        if len(way) > MAX_DEPTH:
            raise ConversionError(f"{self.path}: has models in models to a depth of more than {MAX_DEPTH}.")
        if len(inputs) != 1:
            raise ConversionError(f"{self.path}: {'/'.join(way) or 'the network'} must have one input.")
        fields = config["config"]
        if config["class_name"] == "Sequential":
            current = inputs[0]
            for layer in fields["layers"] if isinstance(fields, dict) else fields:
                current = self.layer(layer, way, [current], {}, 0)
            return current
        starts, ends = (_references(fields[name]) for name in ("input_layers", "output_layers"))
        if len(starts) != 1 or len(ends) != 1:
            raise ConversionError(
                f"{self.path}: {'/'.join(way) or 'the network'} must have one input and one output, got {len(starts)} "
                f"and {len(ends)}."
            )
        scope = (*way, len(self.ops), len(self.aliases))  # a model may be called twice
        self.aliases[(scope, *starts[0])] = self.source(inputs[0])
        for layer in fields["layers"]:
            name = layer.get("name", layer["config"].get("name"))
            if name == starts[0][0]:
                self.look(layer)
                continue
            for node, call in enumerate(layer["inbound_nodes"]):
                values, constants = _call(call)
                made = self.layer(layer, way, [(scope, *value) for value in values], constants, node)
                self.aliases[scope, name, node, 0] = made
        name, node, index = ends[0]
        # Keras counts the call with which a nested model was made, and does not write it.
        return (scope, name, node if (scope, name, node, index) in self.aliases else node - 1, index)

    def look(self, layer: Mapping[str, Any]) -> None:
        """Take the shape of the network's input from the first layer that says it."""
        fields = layer["config"]
        shape = fields.get("batch_shape") or fields.get("batch_input_shape")
        if self.shape is None and isinstance(shape, list) and len(shape) == 4:
            self.shape = shape

    def layer(
        self, layer: Mapping[str, Any], way: tuple[str, ...], inputs: list[Any], constants: dict[Any, Any], node: int
    ) -> Any:
        """Translate a layer, and give the value that it ends in."""
        kind, fields = layer["class_name"], layer["config"]
        if kind in _MODELS:
            name = layer.get("name") or (fields.get("name") if isinstance(fields, dict) else None) or kind
            return self.model(layer, (*way, name), inputs)
        self.look(layer)
        way = (*way, str(fields.get("name", kind)))
        name, value = "/".join(way), (*way, len(self.ops), node)
        inputs = tuple(self.source(each) for each in inputs)
        common = {"name": name, "inputs": inputs, "output": value}
        self.ways[value] = way
        operation = _ARITHMETIC.get(fields.get("function", kind) if kind == "TFOpLambda" else kind)
        if kind not in _KNOWN and operation is None:
            self.unknown.add(kind)
        known_size = self.shape is not None and [fields.get("height"), fields.get("width")] == self.shape[1:3]
        if kind in _IDENTITIES or (kind in _SIZES and known_size):
            return inputs[0]
        if fields.get("data_format") == "channels_first":
            op: Op = Other(**common, what=f"a {kind} of channels that come first")
        elif operation:
            op = _arithmetic(operation, constants, common)
        elif kind in self.TRANSLATED:
            op = self.TRANSLATED[kind](self, kind, fields, way, common)
        elif kind in _ACTIVATION_LAYERS:
            function = _layer_activation(kind, fields)
            if function is None:
                return inputs[0]
            op = Act(**common, function=function)
        elif kind in _POOLS:
            op = _pool(kind, fields, common)
        elif kind in _SIZES:
            size = f"{fields.get('height')}x{fields.get('width')}"
            what = f"a {kind} to {size}, and images must have that size before they enter the network"
            op = Other(**common, what=what)
        elif kind == "Lambda":
            op = Other(**common, what="a Lambda layer, which holds code, and no code of a file is run")
        else:
            op = Other(**common, what=f"a layer of the class {kind}")
        self.ops.append(op)
        return op.output

    def weights(self, way: Way, *names: str) -> list[Tensor]:
        """The weights of a layer, by their names or in this order.

        Raises:
            ConversionError: They are not in the file.
        """
        stored, ways = self.stored.weights, (way, (way[0], way[-1]), way[:1] if len(way) > 1 else way)
        found = next((stored[each] for each in ways if each in stored), {})
        if found and all(name.isdigit() for name in found):
            found = dict(zip(names, found.values(), strict=False))
        missing = [name for name in names if name not in found]
        if missing:
            raise ConversionError(f"{self.path}: the layer {'/'.join(way)} has no {', '.join(missing)} in the file.")
        return [found[name] for name in names]

    def weighted(self, kind: str, fields: Fields, way: Way, common: dict[str, Any]) -> Op:
        """A convolution or a fully connected layer; its activation is an operation of its own."""
        kernel, *bias = self.weights(way, "kernel", *(["bias"] if fields.get("use_bias", True) else []))
        groups, geometry = fields.get("groups", 1), {} if kind == "Dense" else _geometry(fields)
        kernel = kernel[None, None] if kind == "Dense" else kernel
        if kind == "DepthwiseConv2D":
            groups = kernel.shape[2]
            weight = kernel.permute(2, 3, 0, 1).reshape(-1, 1, *kernel.shape[:2])
        else:
            weight = kernel.permute(3, 2, 0, 1).contiguous()
        conv = Conv(**common, weight=weight, bias=bias[0] if bias else None, groups=groups, **geometry)
        function = _activation(fields.get("activation"))
        if function is None:
            return conv
        linear = (*common["output"], "linear")
        self.ways[linear] = way
        self.ops.append(replace(conv, output=linear))
        return Act(**{**common, "inputs": (linear,)}, function=function)

    def norm(self, kind: str, fields: Fields, way: Way, common: dict[str, Any]) -> Op:
        """A batch norm, which may have no scale and no shift."""
        given = {"gamma": fields.get("scale", True), "beta": fields.get("center", True)}
        learned = [name for name in given if given[name]]
        *parts, mean, variance = self.weights(way, *learned, "moving_mean", "moving_variance")
        if fields.get("axis", -1) not in (-1, 3, [-1], [3]):
            return Other(**common, what=f"a batch norm over axis {fields['axis']}")
        parts = {"gamma": torch.ones_like(mean), "beta": torch.zeros_like(mean)} | dict(
            zip(learned, parts, strict=True)
        )
        eps = float(fields.get("epsilon", 1e-3))
        return Norm(**common, scale=parts["gamma"], shift=parts["beta"], mean=mean, variance=variance, eps=eps)

    def rescaling(self, kind: str, fields: Fields, way: Way, common: dict[str, Any]) -> Op:
        """Arithmetic of pixels with constants."""
        if kind == "Rescaling":
            factor, offset = (
                torch.tensor(_value(fields.get(name, 0)), dtype=torch.float64) for name in ("scale", "offset")
            )
            return Affine(**common, factor=factor, offset=offset)
        if fields.get("mean") is not None:
            mean, variance = (torch.tensor(_value(fields[name]), dtype=torch.float64) for name in ("mean", "variance"))
        else:
            mean, variance = self.weights(way, "mean", "variance")
        mean, scale = mean.reshape(-1).double(), variance.reshape(-1).double().sqrt().clamp_min(1e-7)  # Keras' epsilon
        if fields.get("invert"):
            return Affine(**common, factor=scale, offset=mean)
        return Affine(**common, factor=1 / scale, offset=-mean / scale)

    def reshape(self, kind: str, fields: Fields, way: Way, common: dict[str, Any]) -> Op:
        """Zeros around an image, or another form."""
        if kind != "ZeroPadding2D":
            return Reshape(**common)
        rows, columns = (tuple(pair) for pair in fields["padding"])
        return Pad(**common, pads=(rows, columns))

    TRANSLATED = MappingProxyType(
        {
            **dict.fromkeys(("Conv2D", "DepthwiseConv2D", "Dense"), weighted),
            **dict.fromkeys(("Rescaling", "Normalization"), rescaling),
            **dict.fromkeys(("Flatten", "Reshape", "ZeroPadding2D"), reshape),
            "BatchNormalization": norm,
        }
    )


_KNOWN = {
    *_IDENTITIES,
    *_SIZES,
    *_MODELS,
    *_ACTIVATION_LAYERS,
    *_POOLS,
    *_ARITHMETIC,
    *File.TRANSLATED,
}


def _references(given: Any) -> list[tuple[str, int, int]]:
    """Values of a model as [layer, node, tensor], of which one may stand alone."""
    if isinstance(given, dict):
        given = list(given.values())
    if given and isinstance(given[0], str):
        given = [given]
    return [tuple(reference[:3]) for reference in given]


def _call(call: Any) -> tuple[list[tuple[str, int, int]], dict[Any, Any]]:
    """The values and the constants that a layer is called with; constants by their places or names."""
    values: list[tuple[str, int, int]] = []
    constants: dict[Any, Any] = {}

    def take(given: Any, place: Any) -> None:
        if isinstance(given, dict) and given.get("class_name") == "__keras_tensor__":
            values.append(tuple(given["config"]["keras_history"]))
        elif isinstance(given, list) and len(given) in (3, 4) and isinstance(given[0], str):
            values.append(tuple(given[:3]))
            for name, value in (given[3] if len(given) == 4 else {}).items():
                take(value, name)
        elif isinstance(given, list) and given and not isinstance(given[0], (int, float)):
            for each in given:
                take(each, place)
        elif given is not None:
            constants[place, len(values)] = given

    if isinstance(call, dict):
        for place, given in enumerate(call["args"]):
            take(given, place)
        for name, given in call.get("kwargs", {}).items():
            take(given, name)
    else:
        take(call, 0)
    return values, constants


def _value(given: Any) -> Any:
    """A number or numbers, which Keras may wrap."""
    if isinstance(given, dict):
        given = given["config"].get("value") if isinstance(given.get("config"), dict) else given.get("value")
    return given


def _arithmetic(operation: str, constants: dict[Any, Any], common: dict[str, Any]) -> Op:
    """Arithmetic of two values, or of one and a constant."""
    found = {place: _value(given) for place, given in constants.items() if place[0] in (0, 1, "x1", "x2", "x", "y")}
    if len(common["inputs"]) == 2 and operation in ("ADD", "MUL"):
        return of_two(operation, common)
    if len(common["inputs"]) != 1 or len(found) != 1:
        return Other(**common, what=f"an operation ({operation.lower()}) of {len(common['inputs'])} values")
    (((_, before), value),) = found.items()
    tensor = torch.tensor(value, dtype=torch.float64)
    return affine(operation, tensor, before == 0, common)


def _geometry(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Stride, dilation and padding of a convolution."""
    if fields.get("padding", "valid") not in ("same", "valid"):
        raise ValueError(f"padding must be same or valid, got {fields['padding']!r}")
    return {
        "stride": _pair(fields.get("strides", 1)),
        "dilation": _pair(fields.get("dilation_rate", 1)),
        "pads": SAME if fields.get("padding") == "same" else ((0, 0), (0, 0)),
    }


def _pair(given: Any) -> tuple[int, int]:
    first, second = given if isinstance(given, (list, tuple)) else (given, given)
    return int(first), int(second)


def _pool(kind: str, fields: Mapping[str, Any], common: dict[str, Any]) -> Op:
    """A pooling over the whole image, or over a window that must turn out to be it."""
    if kind.startswith("Global"):
        return Pool(**common, kind=_POOLS[kind])
    window = _pair(fields.get("pool_size", 2))
    strides = _pair(fields.get("strides") or window)
    if fields.get("padding") == "same" and strides != window:
        return Other(**common, what=f"a {kind} with strides {strides}")
    return Pool(**common, kind=_POOLS[kind], window=window)


def _activation(given: Any) -> str | None:
    """Our name for an activation; Keras' where we have none, None for the identity."""
    if isinstance(given, dict):
        inner = given.get("config")
        given = inner if isinstance(inner, str) else _layer_activation(given.get("class_name"), inner or {})
    name = None if given is None else str(given).rpartition(">")[2]
    return _ACTIVATIONS.get(name, name)


def _layer_activation(kind: str, fields: Mapping[str, Any]) -> str | None:
    """Our name for an activation that is a layer."""
    if kind == "Activation":
        return _activation(fields.get("activation"))
    if kind == "Softmax":
        return "softmax" if fields.get("axis", -1) in (-1, 1, [-1]) else "softmax over positions"
    if kind != "ReLU":
        return str(kind)
    highest, slope, threshold = (_value(fields.get(name)) for name in ("max_value", "negative_slope", "threshold"))
    if slope or threshold or highest not in (None, 6):
        return f"ReLU(max_value={highest}, negative_slope={slope or 0}, threshold={threshold or 0})"
    return "relu" if highest is None else "relu6"


def _collect(config: Any, name: str) -> list[Any]:
    """Every value of a field, at any depth."""
    if isinstance(config, list):
        return [value for each in config for value in _collect(each, name)]
    if not isinstance(config, dict):
        return []
    found = [config[name]] if name in config else []
    return found + [value for each in config.values() for value in _collect(each, name)]


def _read_weights(origin: Origin, stored: Stored, options: Options) -> Checkpoint:
    """Read weights without a graph: names tell whose they are, and what follows the pooling must be one layer."""
    tensors: dict[str, Tensor] = {}
    for way, parts in stored.weights.items():
        names = ("gamma", "beta", "moving_mean", "moving_variance") if len(parts) == 4 else ("kernel", "bias")
        numbered = all(name.isdigit() for name in parts)
        for name, tensor in zip(names, parts.values(), strict=False) if numbered else parts.items():
            tensors[f"{way[-1]}/{name}"] = tensor
    chosen, share = closest(tensors, TABLES)
    if share < 0.5:
        raise ConversionError(
            f"{origin.path}: holds weights without a graph, whose layers are called "
            f"{', '.join(dict.fromkeys(way[-1] for way in list(stored.weights)[:4]))} and so on: holds no MobileNet "
            "of Keras applications. Save the whole model (model.save) to convert it by its graph."
        )
    pre_logits, classifier = chosen.rows.get("pre_logits"), chosen.rows["classifier"].conv
    if pre_logits and f"{pre_logits.conv}/kernel" not in tensors:
        chosen = chosen._replace(config=chosen.config | {"use_pre_logits": False})
    own_head = f"{classifier}/kernel" in tensors
    fields: dict[str, Any] = {}
    if not own_head:
        body = {row.conv for row in chosen.rows.values()}
        others = [name for name, t in tensors.items() if name.endswith("/kernel") and t.ndim == 2 and name not in body]
        if len(others) > 1:
            raise ConversionError(
                f"{origin.path}: holds {len(others)} layers after the pooling ({', '.join(others)}), and weights do "
                "not say what lies between them. Save the whole model (model.save) to convert it by its graph."
            )
        if others:
            head = others[0].removesuffix("/kernel")
            kernel = tensors.pop(others[0])
            is_conv = len(chosen.convention.linear["weight"].layout) == 4
            tensors[f"{classifier}/kernel"] = kernel[None, None] if is_conv else kernel
            bias = tensors.pop(f"{head}/bias", None)
            tensors[f"{classifier}/bias"] = torch.zeros(kernel.shape[1]) if bias is None else bias
        else:
            fields["num_labels"] = 0
    # mobilenet_1_0_224_tf.h5, mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5
    named = re.search(r"_(\d{2,3})(_tf)?(_no_top)?\.h5$", origin.path.name)
    image_size = int(named[1]) if named else None
    fields = infer_config(tensors, chosen) | fields | {"image_size": options.size(image_size)}
    if fields["architecture"] == "mobilenet_v1" and fields["image_size"] % 32 not in (0, 31):
        # Before its strided convolutions, Keras' V1 pads one row after the last, whatever the size.
        raise ConversionError(
            f"{origin.path}: for Keras' MobileNet (V1), image_size must be a multiple of 32, or one less, got "
            f"{fields['image_size']}: at other sizes Keras pads as no other source does."
        )
    count = fields["num_labels"]
    labels, _ = beside(origin.path, count)
    processor, _, said = find(options, "keras", image_size, publisher=published(origin.path.name, count))
    return Checkpoint(
        kind="weights of Keras applications",
        tensors=tensors,
        table=chosen,
        config=fields,
        processor=processor,
        files=[origin.path],
        oracle=lambda: _applications(origin.path, fields, None if own_head else (tensors, chosen)),
        labels=labels,
        license="apache-2.0" if count in (1000, 1001) else None,
        notes=["The file holds weights without a graph: it was checked against Keras applications' network."],
        warnings=said,
    )


def _keras() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    return keras


def _applications(path: Path, fields: dict[str, Any], other_head: tuple[dict[str, Tensor], Table] | None) -> Oracle:
    """Keras applications' network with a file's weights; with another head than its own, weights go by names."""
    keras = _keras()
    generation, *variant = fields["architecture"].removeprefix("mobilenet_").split("_")
    name = {"v1": "MobileNet", "v2": "MobileNetV2", "v3": "MobileNetV3"}[generation]
    build = getattr(keras.applications, name + "".join(variant[:1]).capitalize())
    if generation == "v3":
        if other_head and fields.get("use_pre_logits", True):
            raise NoOracleError("Keras applications have no MobileNetV3 with such a classifier")
        build = partial(build, minimalistic="minimalistic" in variant, include_preprocessing=False)
    size, count = fields["image_size"], fields["num_labels"]
    common = {
        "input_shape": (size, size, fields["num_channels"]),
        "alpha": fields.get("width_multiplier", 1.0),
        "weights": None,
    }
    if other_head is None:
        model = build(**common, classes=count, classifier_activation=None)
        with _weights_file(path) as (weights, _):
            suffix = "" if weights.name.endswith((".weights.h5", ".h5")) else ".h5"
            with tempfile.TemporaryDirectory() as folder:
                named = Path(shutil.copy(weights, Path(folder, weights.name + suffix))) if suffix else weights
                model.load_weights(named)
    else:
        tensors, table = _in_new_names(*other_head)
        model = build(**common, include_top=False, pooling="avg")
        if count:
            model = keras.Sequential([model, keras.layers.Dense(count, name=table.rows["classifier"].conv)])
        model.build((None, size, size, fields["num_channels"]))
        for layer in model._flatten_layers():
            if layer.weights and not getattr(layer, "layers", None):
                values = [tensors[f"{layer.name}/{weight.name}"].numpy() for weight in layer.weights]
                layer.set_weights([v.reshape(w.shape) for v, w in zip(values, layer.weights, strict=True)])
    return Oracle(f"Keras' {name}", keras.__version__, lambda x: _run(keras, model, x))


def _in_new_names(tensors: Mapping[str, Tensor], table: Table) -> tuple[dict[str, Tensor], Table]:
    """Tensors by the names that Keras has for them now, which come first among its tables."""
    new = next(each for each in TABLES if each.config["architecture"] == table.config["architecture"])
    network = skeleton(**table.config)
    given = {place.name: name for name, place in places(network, table).items()}
    names = {name: given[place.name] for name, place in places(network, new).items()}
    return {name: tensors[other] for name, other in names.items() if other in tensors}, new


def _run(keras: Any, model: Any, pixel_values: Tensor) -> Tensor:
    outputs = model(pixel_values.permute(0, 2, 3, 1).numpy(), training=False)
    return torch.from_numpy(np.asarray(keras.ops.convert_to_numpy(outputs), np.float32))


def _own_runtime(file: File, found: Match, image_size: int) -> Oracle:
    """The file itself in Keras.

    Raises:
        NoOracleError: Keras does not load it, or what it would load is more than layers and numbers.
    """
    config = file.stored.config
    modules = {str(module) for module in _collect(config, "module") if module is not None}
    # Keras would make layers that lead nowhere too, which the reader has not seen.
    lists = [layers for layers in _collect(config, "layers") if isinstance(layers, list)]
    classes = {str(layer.get("class_name")) for layers in lists for layer in layers if isinstance(layer, dict)}
    unknown = file.unknown | (classes - _KNOWN - {"TFOpLambda"})
    strange = sorted(unknown | {module for module in modules if not _MODULES.fullmatch(module)})
    code = ("Lambda", "__lambda__", "__typespec__")
    strange += [name for name in code if name in _collect(config, "class_name") and name not in strange]
    if strange:
        raise NoOracleError(f"the file names {', '.join(strange)}, which could run code, so Keras does not load it")
    if file.graph.size not in (None, image_size):
        raise NoOracleError(f"the file takes images of {file.graph.size} pixels, not of {image_size}")
    keras = _keras()
    try:
        model = _load_model(keras, file.path)
    except Exception as error:  # whatever a version of Keras makes of another version's file
        raise NoOracleError(f"Keras {keras.__version__} does not load it: {first_line(error)}") from error
    ending = next((op for op in file.ops if found.prediction and op.inputs == (found.logits,)), None)
    before: Any = None
    if ending is not None:
        before = model
        for name in file.ways[ending.output]:
            before = before.get_layer(name)

    def run(pixel_values: Tensor) -> Tensor:
        features = _run(keras, model, pixel_values)
        if features.ndim == 4:  # that the file does not pool
            features = features.amax((1, 2)) if found.config.get("pooling") == "max" else features.mean((1, 2))
        return features

    def logits(pixel_values: Tensor) -> Tensor:
        if before is None:
            return run(pixel_values)
        # The file's own graph, but for the function that it ends in.
        name, without = ("activation", lambda x: x) if hasattr(before, "activation") else ("call", lambda x, **_: x)
        kept = getattr(before, name)
        setattr(before, name, without)
        try:
            return run(pixel_values)
        finally:
            setattr(before, name, kept)

    return Oracle("the file in Keras", keras.__version__, logits, run if found.prediction else None, file.is_half)


def _load_model(keras: Any, path: Path) -> Any:
    """Load a file that was found to hold nothing but layers and numbers, under a name that Keras accepts."""
    options = {"compile": False, "safe_mode": True}
    suffix = ".keras" if _is_archive(path) else ".h5"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copyfile(path, Path(folder, f"model{suffix}")))
        try:
            return keras.saving.load_model(copy, **options)
        except (TypeError, ValueError):
            if suffix == ".keras":
                raise
        config = _modernize(copy)
        try:
            return keras.saving.load_model(copy, **options)
        except (TypeError, ValueError):
            # Of arithmetic between layers, Keras 3 writes into .h5 what it reads from .keras alone.
            model = keras.saving.deserialize_keras_object(_with_modules(config), safe_mode=True)
            model.load_weights(copy)
            return model


def _with_modules(config: Any) -> Any:
    """Say where the class of each layer is, as a .keras file does and an .h5 file does not."""
    if isinstance(config, list):
        return [_with_modules(each) for each in config]
    if not isinstance(config, dict):
        return config
    config = {key: _with_modules(value) for key, value in config.items()}
    kind = config.get("class_name")
    if kind in _KNOWN and "module" not in config:
        given = [value for call in config.get("inbound_nodes") or [] for value in call["args"]]
        number = any(isinstance(value, (int, float)) for value in given)
        where = "keras.src.ops.numpy" if kind in _ARITHMETIC and number else "keras.layers"
        config |= {"module": {"Functional": "keras.src.models.functional", "Sequential": "keras"}.get(kind, where)}
        config |= {"registered_name": None}
    return config


def _modernize(path: Path) -> dict[str, Any]:
    """Leave out what Keras 2 writes of a depthwise convolution and Keras 3 does not know: its groups, always 1."""
    import h5py

    def without(config: Any) -> Any:
        if isinstance(config, list):
            return [without(each) for each in config]
        if not isinstance(config, dict):
            return config
        if config.get("class_name") == "DepthwiseConv2D":
            config = config | {"config": {k: v for k, v in config["config"].items() if k != "groups" or v != 1}}
        return {key: without(value) for key, value in config.items()}

    with h5py.File(path, "r+") as file:
        config = without(json.loads(file.attrs["model_config"]))
        file.attrs["model_config"] = json.dumps(config)
        return config
