"""Keras applications' MobileNet and MobileNetV2: .h5, .weights.h5 and .keras."""

from __future__ import annotations

import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import MAX_BYTES, Checkpoint, Options, Oracle, Origin, first_line, understanding
from .names import Convention, ConversionError, Part, Row, Table, closest, measure


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


def detect(origin: Origin) -> bool:
    """Whether a path is a file of Keras."""
    return origin.path.suffix in (".h5", ".hdf5", ".keras")


def read(origin: Origin, options: Options) -> Checkpoint:
    """Read a file of Keras.

    Raises:
        ConversionError: The file is broken, or holds another network.
        ImportError: h5py is not installed.
    """
    with _weights(origin.path) as (weights, config):
        tensors, config = _load(weights, config, origin.path)
    table, share = closest(tensors, TABLES)
    if share < 0.5:
        raise ConversionError(f"{origin.path}: holds no MobileNet or MobileNetV2 of Keras applications.")
    with understanding(origin.path):
        epsilons = _collect(config, "BatchNormalization", "epsilon")
        shapes = _collect(config, "InputLayer", "batch_shape") or _collect(config, "InputLayer", "batch_input_shape")
    # mobilenet_1_0_224_tf.h5, mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224.h5
    named = re.search(r"_(\d{2,3})(_tf)?\.h5$", origin.path.name)
    with understanding(origin.path):
        image_size = shapes[0][1] if shapes else int(named[1]) if named else None
        if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
            raise ConversionError(f"{origin.path}: the input must have a size of pixels, got {image_size!r}.")
    fields = measure(tensors, table) | {"image_size": options.size(image_size)}
    notes = []
    if fields["architecture"] == "mobilenet_v1":
        # Before its strided convolutions, Keras' V1 pads one row after the last, whatever the size.
        if fields["image_size"] % 32 not in (0, 31):
            raise ConversionError(
                f"{origin.path}: for Keras' MobileNet (V1), image_size must be a multiple of 32, or one less, got "
                f"{fields['image_size']}: at other sizes Keras pads as no other source does."
            )
        notes.append("For pictures whose size is no multiple of 32 (or one less), Keras pads V1 in another way.")
    if epsilons:
        fields["batch_norm_eps"] = epsilons[0]
    return Checkpoint(
        kind="Keras applications",
        tensors=tensors,
        table=table,
        config=fields,
        processor=options.processor("keras", image_size),
        files=[origin.path],
        oracle=lambda: _oracle(origin.path, fields),
        notes=notes,
    )


@contextmanager
def _weights(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The HDF5 file of a path, and the configuration beside it in a .keras archive."""
    if path.suffix != ".keras":
        yield path, {}
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                if sum(archive.getinfo(name).file_size for name in ("config.json", "model.weights.h5")) > MAX_BYTES:
                    raise ConversionError(f"{path}: unpacks to more than {MAX_BYTES} bytes.")
                config = json.loads(archive.read("config.json"))
                weights = Path(archive.extract("model.weights.h5", folder))
        except ConversionError:
            raise
        # NotImplementedError, a RuntimeError, is of ways to compress that Python does not know.
        except (zipfile.BadZipFile, KeyError, RuntimeError, ValueError, EOFError, OSError) as error:
            raise ConversionError(f"{path}: truncated or corrupt: {first_line(error)}") from error
        yield weights, config


def _load(weights: Path, config: dict[str, Any], origin: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by layer and weight, such as "conv1/kernel", and the network's configuration if there is one."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError("a file of Keras needs h5py: pip install 'mobilenet[keras]'") from error
    try:
        with h5py.File(weights) as file:
            if "model_config" in file.attrs:
                config = json.loads(file.attrs["model_config"])
            arrays = dict(_arrays(file))
            for name, array in arrays.items():
                if array.external or array.is_virtual or array.file.filename != file.filename:
                    raise ConversionError(f"{origin}: {name} lies in another file.")
            if sum(array.nbytes for array in arrays.values()) > MAX_BYTES:  # a small file may say so of empty ones
                raise ConversionError(f"{origin}: its weights have more than {MAX_BYTES} bytes.")
            return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}, config
    except ConversionError:
        raise
    except Exception as error:  # h5py says for few causes what a broken file raises
        raise ConversionError(f"{origin}: truncated or corrupt: {first_line(error)}") from error


def _arrays(file: Any) -> Iterator[tuple[str, Any]]:
    """Every weight of a file, in the layout of Keras 3 or in the older one."""
    if "layers" in file:
        for layer in file["layers"].values():
            values = layer.get("vars")
            if not values:
                continue
            names = ("gamma", "beta", "moving_mean", "moving_variance") if len(values) == 4 else ("kernel", "bias")
            for index, name in zip(sorted(values, key=int), names, strict=False):
                yield f"{values.attrs['name']}/{name}", values[index]
        return
    file = file.get("model_weights", file)
    for layer in file.attrs["layer_names"]:
        group = file[layer]
        for weight in group.attrs["weight_names"]:
            weight, layer = (text.decode() if isinstance(text, bytes) else text for text in (weight, layer))
            name = weight.rpartition("/")[2].removesuffix(":0").removeprefix("depthwise_")
            yield f"{layer}/{name}", group[weight]


def _collect(config: dict[str, Any], layer: str, field: str) -> list[Any]:
    """A field of every layer of a class, in a network's configuration."""
    layers: Sequence[dict[str, Any]] = config.get("config", {}).get("layers", [])
    found = [entry["config"].get(field) for entry in layers if entry.get("class_name") == layer]
    return [value for value in found if value is not None]


def _oracle(path: Path, fields: dict[str, Any]) -> Oracle:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    build = {
        "mobilenet_v1": keras.applications.MobileNet,
        "mobilenet_v2": keras.applications.MobileNetV2,
    }[fields["architecture"]]
    size = fields["image_size"]
    model = build(
        input_shape=(size, size, fields["num_channels"]),
        alpha=fields.get("width_multiplier", 1.0),
        classes=fields["num_labels"],
        classifier_activation=None,
        weights=None,
    )
    with _weights(path) as (weights, _):
        model.load_weights(weights)

    def logits(pixel_values: Tensor) -> Tensor:
        outputs = model(pixel_values.permute(0, 2, 3, 1).numpy(), training=False)
        return torch.from_numpy(keras.ops.convert_to_numpy(outputs))

    return Oracle(f"Keras' {build.__name__}", keras.__version__, logits)
