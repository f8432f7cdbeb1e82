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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checkpoint import MAX_BYTES, Checkpoint, NoOracleError, Options, Oracle, Origin, first_line, understanding
from .graph import SAME, Act, Add, Conv, Graph, Match, Norm, Op, Other, Pad, Pool, Reshape, match, table
from .graph import Affine
from .labels import beside
from .names import Convention, ConversionError, Part, Row, Table, closest, measure
from .preprocessing import find, published


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
# The classifier of V1 is a 1x1 convolution.
KERAS_V1 = KERAS._replace(linear={"weight": Part("/kernel", "HWIO"), "bias": Part("/bias", "O")})


def _unit(name: str) -> Row:
    return Row(name, f"{name}_BN")


# keras/src/applications/mobilenet.py and mobilenet_v2.py
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
)



_HDF5 = b"\x89HDF\r\n\x1a\n"
_ARCHIVED = ("config.json", "model.weights.h5")  # in a .keras archive
_MODELS = ("Functional", "Model", "Sequential")
MAX_DEPTH = 16  # of models in models

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
_KNOWN = {
    *_IDENTITIES,
    *_SIZES,
    *_MODELS,
    *_ACTIVATION_LAYERS,
    *_POOLS,
    *_ARITHMETIC,
    *("BatchNormalization", "Conv2D", "Dense", "DepthwiseConv2D", "Flatten", "Normalization", "Rescaling", "Reshape"),
    "ZeroPadding2D",
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
    except (OSError, zipfile.BadZipFile):
        return False


class Stored(NamedTuple):
    """What a file of Keras holds."""

    config: dict[str, Any] | None  # of the network; None where there are weights alone
    # Weights by the way to a layer, through the models that it lies in, and by their names; a file of weights alone
    # has the layer's name for a way.
    weights: dict[tuple[str, ...], dict[str, Tensor]]


def read(origin: Origin, options: Options) -> Checkpoint:
    """Read a file of Keras.

    Raises:
        ConversionError: The file is broken, or holds another network.
        ImportError: h5py is not installed.
    """
    stored = _load(origin.path)
    with understanding(origin.path):
        if stored.config is None:
            return _read_weights(origin, stored, options)
        reader = Reader(stored, origin.path)
        found = match(reader.graph, str(origin.path), options.size(None))
    count, size = found.config["num_labels"], reader.graph.size
    labels, numbered = beside(origin.path, count)
    processor, feed, said = find(
        options,
        "keras",
        size,
        publisher=published(origin.path.name, count, numbered),
        scaling=found.scaling,
    )
    return Checkpoint(
        kind="a Keras file",
        tensors=found.tensors,
        table=table(found.config),
        config=found.config | {"image_size": options.size(size)},
        processor=processor,
        feed=feed,
        files=[origin.path],
        oracle=lambda: _own_runtime(origin.path, reader, found, options.size(size)),
        labels=labels,
        license="apache-2.0" if count in (1000, 1001) else None,
        prediction=found.prediction,
        warnings=said,
    )


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
    try:
        import h5py
    except ImportError as error:
        raise ImportError("a file of Keras needs h5py: pip install 'mobilenet[keras]'") from error
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
                    named = dict(_named_weights(file.get("model_weights", file), config is None))
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


def _named_weights(file: Any, flat: bool) -> Iterator[tuple[tuple[str, ...], dict[str, str]]]:
    """Weights in the older layout, where a layer has a list of their names."""
    for layer in file.attrs["layer_names"]:
        group = file[layer]
        layer = _text(layer)
        found: dict[tuple[str, ...], dict[str, str]] = {}
        for weight in group.attrs["weight_names"]:
            *_, inner, name = ["", *_text(weight).split("/")]
            name = name.partition(":")[0]
            name = name.removeprefix("depthwise_") if name.startswith("depthwise_kernel") else name
            found.setdefault((layer, inner), {})[name] = group[weight].name
        # Whatever its weights are called, a layer that is no model has all of its group.
        for (_, inner), parts in found.items():
            yield (layer if len(found) == 1 and not flat else inner,) if flat else (layer, inner), parts
        if len(found) == 1:
            yield (layer,), next(iter(found.values()))


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


