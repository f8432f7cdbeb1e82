"""Conversions of Keras' files, against Keras on its torch backend."""

import os
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conversions import assert_fails_without_a_trace, assert_wrong_tables_are_noticed, read
from oracles import logits
from torch import Tensor

from mobilenet.conversion.convert import build, convert


pytestmark = pytest.mark.any_version


h5py = pytest.importorskip("h5py", reason="h5py is not installed")


@pytest.fixture(scope="module")
def keras() -> ModuleType:
    os.environ["KERAS_BACKEND"] = "torch"
    return pytest.importorskip("keras", reason="Keras is not installed")


def network(keras: ModuleType, version: int, alpha: float, size: int, classes: int = 10) -> Any:
    """A network of Keras applications whose norms have statistics of their own."""
    make = {1: keras.applications.MobileNet, 2: keras.applications.MobileNetV2}[version]
    keras.utils.set_random_seed(0)
    shape = (size, size, 3)
    model = make(weights=None, alpha=alpha, input_shape=shape, classes=classes, classifier_activation=None)
    random = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            gamma, *rest = (weight.shape for weight in layer.get_weights())
            layer.set_weights(
                [
                    random.uniform(0.5, 1.5, gamma),
                    random.normal(0, 0.2, rest[0]),
                    random.normal(0, 0.2, rest[1]),
                    random.uniform(0.5, 1.5, rest[2]),
                ]
            )
        elif isinstance(layer, keras.layers.DepthwiseConv2D):
            layer.set_weights([random.normal(0, (2 / 9) ** 0.5, w.shape) for w in layer.get_weights()])
        elif isinstance(layer, keras.layers.Conv2D) and not layer.use_bias:
            layer.set_weights([random.normal(0, (2 / w[..., 0].size) ** 0.5, w.shape) for w in layer.get_weights()])
    return model


def save(model: Any, path: Path) -> Path:
    (model.save_weights if path.name.endswith(".weights.h5") else model.save)(path)
    return path


def run(keras: ModuleType, model: Any, pictures: Tensor) -> Tensor:
    outputs = model(pictures.permute(0, 2, 3, 1).numpy(), training=False)
    return torch.from_numpy(keras.ops.convert_to_numpy(outputs))


@pytest.mark.parametrize(
    ("version", "alpha", "size", "suffix"),
    [
        # Odd, and such that Keras' V1 pads its strided convolutions as SAME does.
        (1, 0.25, 95, ".h5"),
        (1, 0.75, 127, ".keras"),
        (1, 1.0, 95, ".weights.h5"),
        (2, 0.35, 97, ".keras"),
        (2, 1.0, 75, ".h5"),
        (2, 1.4, 97, ".weights.h5"),
    ],
)
def test_logits_equal_those_of_keras(
    keras: ModuleType, version: int, alpha: float, size: int, suffix: str, tmp_path: Path
) -> None:
    theirs = network(keras, version, alpha, size)
    path = save(theirs, tmp_path / f"model{suffix}")
    # Weights alone do not tell the size.
    checkpoint = read(path, image_size=size if suffix == ".weights.h5" else None)
    ours = build(checkpoint, "")
    assert (ours.config.width_multiplier, ours.config.image_size) == (alpha, size)
    pictures = torch.randn(2, 3, size, size)
    expected = run(keras, theirs, pictures)
    torch.testing.assert_close(logits(ours, pictures), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(checkpoint.oracle().logits(pictures), expected)


@pytest.mark.parametrize("version", [1, 2])
def test_every_wrong_row_is_noticed(keras: ModuleType, version: int, tmp_path: Path) -> None:
    checkpoint = read(save(network(keras, version, 0.5, 64), tmp_path / "model.weights.h5"), image_size=64)
    assert_wrong_tables_are_noticed(checkpoint)


def test_it_converts_and_is_proved(keras: ModuleType, tmp_path: Path) -> None:
    model = network(keras, 2, 0.35, 96)
    classifier = model.layers[-1]
    classifier.set_weights([weights / 3 for weights in classifier.get_weights()])  # random norms exaggerate
    source = save(model, tmp_path / "model.keras")
    theirs, _ = convert(str(source), tmp_path / "output")
    assert theirs.against == f"the file in Keras {keras.__version__}"
    assert theirs.largest < 1e-4
    assert theirs.agreement == 1


# What the older files on Keras' server call the layers of MobileNetV2, which no Keras of today writes.
OLD_NAMES = {"expanded_conv": "mobl0_conv_0", "predictions": "Logits"} | {
    f"block_{block}": f"mobl{block}_conv_{block}" for block in range(1, 17)
}


def old_name(layer: str) -> str:
    stem, found, role = layer.removesuffix("_BN").rpartition("_")
    name = f"{OLD_NAMES[stem]}_{role}" if found and stem in OLD_NAMES else OLD_NAMES.get(layer, layer)
    return name.replace("mobl", "bn").replace(f"_{role}", f"_bn_{role}") if layer.endswith("_BN") else name


def test_files_of_keras_2_are_read(keras: ModuleType, tmp_path: Path) -> None:
    """Names of layers and weights, their order and attributes as Keras 2 wrote them; Keras 3 loads them by order."""
    theirs = network(keras, 2, 0.35, 96)
    path = tmp_path / "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.35_96.h5"
    with h5py.File(path, "w") as file:
        layers = [layer for layer in theirs.layers if layer.weights]
        file.attrs["layer_names"] = [old_name(layer.name).encode() for layer in layers]
        for layer in layers:
            name = old_name(layer.name)
            prefix = "depthwise_" if "Depthwise" in type(layer).__name__ else ""
            weights = {f"{name}/{prefix}{weight.name}:0": weight for weight in layer.weights}
            group = file.create_group(name)
            group.attrs["weight_names"] = [weight.encode() for weight in weights]
            for weight, values in weights.items():
                group[weight] = keras.ops.convert_to_numpy(values)
        assert "mobl3_conv_3_expand/mobl3_conv_3_expand/kernel:0" in file
        assert "bn16_conv_16_bn_project/bn16_conv_16_bn_project/moving_variance:0" in file
    checkpoint = read(path)
    assert checkpoint.config["image_size"] == 96
    pictures = torch.randn(1, 3, 96, 96)
    expected = run(keras, theirs, pictures)
    torch.testing.assert_close(logits(build(checkpoint, ""), pictures), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(checkpoint.oracle().logits(pictures), expected)
    assert_wrong_tables_are_noticed(checkpoint)


def test_a_size_at_which_keras_pads_otherwise_is_refused(keras: ModuleType, tmp_path: Path) -> None:
    source = save(network(keras, 1, 0.25, 97), tmp_path / "model.keras")
    assert_fails_without_a_trace(
        source, tmp_path / "output", "an image_size that is a multiple of 32, or one less, got 97"
    )


@pytest.mark.parametrize("suffix", [".h5", ".weights.h5", ".keras"])
def test_broken_files_are_refused(keras: ModuleType, suffix: str, tmp_path: Path) -> None:
    source = save(network(keras, 2, 0.35, 32), tmp_path / f"model{suffix}")
    whole = source.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:100], b""):
        source.write_bytes(part)
        assert_fails_without_a_trace(source, tmp_path / "output", f"model{suffix}: truncated or corrupt")


def test_other_networks_are_refused(keras: ModuleType, tmp_path: Path) -> None:
    model = keras.applications.MobileNetV3Small(weights=None, input_shape=(32, 32, 3), classes=3)
    source = save(model, tmp_path / "model.keras")
    assert_fails_without_a_trace(
        source, tmp_path / "output", "is no MobileNet that can be converted: expanded_conv_squeeze_excite_avg_pool"
    )


def test_weights_that_lie_in_other_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(4 * 27 * 8))
    with h5py.File(tmp_path / "model.h5", "w") as file:
        file.attrs["layer_names"] = ["conv1"]
        group = file.create_group("conv1")
        group.attrs["weight_names"] = ["conv1/kernel"]
        external = [(str(tmp_path / "secret"), 0, 4 * 27 * 8)]
        group.create_dataset("conv1/kernel", (3, 3, 3, 8), "float32", external=external)
    assert_fails_without_a_trace(tmp_path / "model.h5", tmp_path / "output", "conv1/kernel lies in another file")


def test_an_archive_of_absurd_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobilenet.conversion.from_keras.MAX_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "model.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", bytes(1001))
    assert_fails_without_a_trace(tmp_path / "model.keras", tmp_path / "output", "unpacks to more than 1000 bytes")


def test_without_h5py_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    (tmp_path / "model.h5").touch()
    with pytest.raises(ImportError, match=r"pip install 'mobilenet\[keras\]'"):
        convert(str(tmp_path / "model.h5"), tmp_path / "output")
    assert not (tmp_path / "output").exists()
