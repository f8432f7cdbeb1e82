"""Conversions of Keras' files, against Keras on its torch backend."""

import json
import os
import re
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

from mobilenet import MobileNetForImageClassification
from mobilenet.conversion.checkpoint import NoOracleError
from mobilenet.conversion.convert import build, convert
from mobilenet.conversion.graph import PREDICTIONS
from mobilenet.conversion.parity import compare_with_source
from mobilenet.synthetic import draw_images


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
    return own_weights(keras, model)


def own_weights(keras: ModuleType, model: Any) -> Any:
    """Give every norm statistics and every layer weights of its own, of a scale that images come through."""
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
        elif isinstance(layer, keras.layers.Conv2D):
            kernel, bias = layer.get_weights()
            layer.set_weights([kernel, random.normal(0, 0.2, bias.shape)])
    return model


def in_double(keras: ModuleType, model: Any) -> Any:
    """A network in double precision: hard swishes of random weights magnify rounding, ours and Keras' alike.

    Its batch norms compute in float32 all the same, on the torch backend.
    """

    def in_words(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: in_words(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(in_words(each) for each in value)
        return "float64" if value == "float32" else value

    double = model.__class__.from_config(in_words(model.get_config()))
    double.set_weights(model.get_weights())
    return double


def save(model: Any, path: Path) -> Path:
    (model.save_weights if path.name.endswith(".weights.h5") else model.save)(path)
    return path


def run(keras: ModuleType, model: Any, images: Tensor) -> Tensor:
    outputs = model(images.permute(0, 2, 3, 1).numpy(), training=False)
    return torch.from_numpy(keras.ops.convert_to_numpy(outputs))


@pytest.mark.parametrize(
    ("version", "alpha", "size", "suffix"),
    [
        # Odd, and such that Keras' V1 pads its strided convolutions as SAME does.
        (1, 0.75, 127, ".keras"),
        (1, 1.0, 95, ".weights.h5"),
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
    images = torch.randn(2, 3, size, size)
    expected = run(keras, theirs, images)
    torch.testing.assert_close(logits(ours, images), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(checkpoint.oracle().logits(images), expected)


@pytest.mark.parametrize(
    ("kind", "alpha", "minimalistic", "preprocesses", "size", "suffix"),
    [
        ("Large", 0.75, False, True, 95, ".keras"),
        ("Small", 1.0, False, False, 64, ".h5"),
        ("Large", 1.0, True, False, 64, ".keras"),
        ("Small", 0.75, True, True, 97, ".h5"),
    ],
)
def test_v3_gives_the_logits_of_keras(
    keras: ModuleType,
    kind: str,
    alpha: float,
    minimalistic: bool,
    preprocesses: bool,
    size: int,
    suffix: str,
    tmp_path: Path,
) -> None:
    """Its Rescaling goes out of the network, and into the image processor as the very numbers of -1 to 1."""
    keras.utils.set_random_seed(0)
    fields = {"minimalistic": minimalistic, "include_preprocessing": preprocesses, "classifier_activation": None}
    make = getattr(keras.applications, f"MobileNetV3{kind}")
    theirs = make(weights=None, alpha=alpha, input_shape=(size, size, 3), classes=6, **fields)
    pixels = torch.randint(0, 256, (2, 3, size, size)).float()
    scaled = pixels / 127.5 - 1
    given = pixels if preprocesses else scaled
    own_weights(keras, theirs)
    kernel, bias = theirs.get_layer("logits").get_weights()
    kernel *= 3 / (run(keras, theirs, given) - torch.from_numpy(bias)).std().item()  # as of a trained network
    theirs.get_layer("logits").set_weights([kernel, bias])
    checkpoint = read(save(theirs, tmp_path / f"model{suffix}"))
    table = f"mobilenet_v3_{kind.lower()}" + "_minimalistic" * minimalistic
    assert (checkpoint.config["architecture"], checkpoint.config["width_multiplier"]) == (table, alpha)
    assert {*checkpoint.processor.image_mean, *checkpoint.processor.image_std} == {0.5}
    assert ("--range" in " ".join(checkpoint.warnings)) == (not preprocesses)
    torch.testing.assert_close(checkpoint.oracle().logits(given), run(keras, theirs, given))
    pixels = pixels.double()
    expected = run(keras, in_double(keras, theirs), pixels if preprocesses else pixels / 127.5 - 1)
    ours = logits(build(checkpoint, "").double(), pixels / 127.5 - 1)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert expected.std(0).max() > 0.1


@pytest.mark.parametrize("version", [1, 2])
def test_every_wrong_row_is_noticed(keras: ModuleType, version: int, tmp_path: Path) -> None:
    checkpoint = read(save(network(keras, version, 0.5, 64), tmp_path / "model.weights.h5"), image_size=64)
    assert_wrong_tables_are_noticed(checkpoint)


def test_it_is_compared_with_the_file_itself(keras: ModuleType, tmp_path: Path) -> None:
    model = network(keras, 2, 0.35, 96)
    classifier = model.layers[-1]
    classifier.set_weights([weights / 3 for weights in classifier.get_weights()])  # random norms exaggerate
    checkpoint = read(save(model, tmp_path / "model.keras"))
    _, (theirs,), caveats = compare_with_source(build(checkpoint, ""), checkpoint, draw_images(tmp_path))
    assert caveats == []
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
    images = torch.randn(1, 3, 96, 96)
    expected = run(keras, theirs, images)
    torch.testing.assert_close(logits(build(checkpoint, ""), images), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(checkpoint.oracle().logits(images), expected)
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
    model = keras.applications.EfficientNetB0(weights=None, input_shape=(32, 32, 3), classes=3)
    source = save(model, tmp_path / "model.keras")
    assert_fails_without_a_trace(source, tmp_path / "output", "is no MobileNet that can be converted: ")


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
    with pytest.raises(ImportError, match=r'clone of this project, pip install -c constraints\.txt -e "\.\[keras\]"$'):
        convert(str(tmp_path / "model.h5"), tmp_path / "output")
    assert not (tmp_path / "output").exists()


# Fine-tunes as the documentation of keras.applications shows them.


def own_statistics(keras: ModuleType, model: Any) -> Any:
    """Give every norm statistics of its own, in models in models too."""
    random = np.random.default_rng(1)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.get_weights()[0].shape
            draws = (random.uniform(0.7, 1.3, shape), random.normal(0, 0.2, shape))
            layer.set_weights([*draws, random.normal(0, 0.2, shape), random.uniform(0.5, 1.5, shape)])
    return model


def fine_tune(keras: ModuleType, version: int, alpha: float, form: str) -> Any:
    """A network with a classifier of three classes on features of Keras applications'."""
    layers, applications = keras.layers, keras.applications
    make = {1: applications.MobileNet, 2: applications.MobileNetV2}[version]
    module = {1: applications.mobilenet, 2: applications.mobilenet_v2}[version]
    keras.utils.set_random_seed(0)
    base = make(weights=None, include_top=False, alpha=alpha, input_shape=(32, 32, 3))
    if form == "functional":
        x = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(base.output))
        return own_statistics(keras, keras.Model(base.input, layers.Dense(3, activation="softmax")(x)))
    if form == "sequential":
        head = [
            layers.GlobalAveragePooling2D(),
            layers.Dense(16, activation="relu", name="dense"),
            layers.Dense(1, name="dense_1"),
        ]
        return own_statistics(keras, keras.Sequential([base, *head]))
    inputs = keras.Input((32, 32, 3))
    x = keras.Sequential([layers.RandomFlip("horizontal"), layers.RandomRotation(0.1)])(inputs)
    x = module.preprocess_input(x) if form == "arithmetic" else layers.Rescaling(1 / 127.5, offset=-1)(x)
    x = layers.GlobalAveragePooling2D()(base(x, training=False))
    outputs = layers.Dense(3, activation="sigmoid")(layers.Dropout(0.2)(x))
    return own_statistics(keras, keras.Model(inputs, outputs))


@pytest.mark.parametrize("form", ["functional", "sequential", "nested", "arithmetic"])
@pytest.mark.parametrize(("version", "alpha"), [(1, 0.25), (1, 0.5), (2, 0.35), (2, 0.5)])
def test_fine_tunes_of_the_documentation_convert(
    keras: ModuleType, version: int, alpha: float, form: str, tmp_path: Path
) -> None:
    """In every kind of file; one of weights tells neither the function at the end nor what lies between two layers."""
    theirs = fine_tune(keras, version, alpha, form)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    scaled = form in ("nested", "arithmetic")
    given = pixels.permute(0, 3, 1, 2).float()
    expected = run(keras, theirs, given if scaled else given / 127.5 - 1)
    ending = {"functional": "softmax", "sequential": None}.get(form, "sigmoid")
    for suffix in (".h5", ".keras", ".weights.h5"):
        path, is_whole = save(theirs, tmp_path / f"model{suffix}"), suffix != ".weights.h5"
        if form == "sequential" and not is_whole:
            words = "holds 2 layers after the pooling (dense/kernel, dense_1/kernel), and weights do not say what lies"
            assert_fails_without_a_trace(path, tmp_path / "output", words)
            continue
        checkpoint = read(path, image_size=None if is_whole else 32)
        model = build(checkpoint, "")
        assert model.config.width_multiplier == alpha
        assert checkpoint.prediction == (ending if is_whole else None)
        assert (model.config.problem_type == "multi_label_classification") == (is_whole and ending == "sigmoid")
        assert ("scaled to -1..1" in " ".join(checkpoint.warnings)) == (not scaled or not is_whole)
        prepared = {"return_tensors": "pt", "do_resize": False, "do_center_crop": False}
        ours = logits(model, checkpoint.processor(list(pixels.numpy()), **prepared).pixel_values)
        predictions = PREDICTIONS[ending](ours) if ending else ours
        torch.testing.assert_close(predictions, expected, atol=1e-4, rtol=1e-4)
        if is_whole and alpha < 0.5:
            seen = (checkpoint.feed or checkpoint.processor)(list(pixels.numpy()), **prepared).pixel_values
            torch.testing.assert_close(checkpoint.oracle().logits(seen), ours, atol=1e-4, rtol=1e-4)


def test_teachable_machine_converts_whole(keras: ModuleType, tmp_path: Path) -> None:
    """Sequential models in a Sequential one, as its keras_model.h5 has them, with the labels that lie beside it."""
    layers = keras.layers
    keras.utils.set_random_seed(0)
    base = keras.applications.MobileNetV2(weights=None, include_top=False, alpha=0.35, input_shape=(64, 64, 3))
    features = keras.Sequential([base, layers.GlobalAveragePooling2D()])
    head = keras.Sequential(
        [layers.Dense(100, activation="relu"), layers.Dense(2, activation="softmax", use_bias=False)]
    )
    theirs = own_statistics(keras, keras.Sequential([features, head]))
    theirs.build((None, 64, 64, 3))
    path = save(theirs, tmp_path / "keras_model.h5")
    (tmp_path / "labels.txt").write_text("0 A cup\n1 No cup\n")
    checkpoint = read(path)
    assert checkpoint.labels == ["A cup", "No cup"]
    assert checkpoint.config["classifier_hidden_sizes"] == (100,)
    assert checkpoint.warnings == []
    assert checkpoint.processor.size == {"shortest_edge": 64}
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    expected = run(keras, theirs, images)
    torch.testing.assert_close(logits(build(checkpoint, ""), images).softmax(-1), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(checkpoint.oracle().predictions(images), expected)


@pytest.mark.parametrize("suffix", [".h5", ".keras", ".weights.h5"])
def test_features_without_a_classifier_convert(keras: ModuleType, suffix: str, tmp_path: Path) -> None:
    make = keras.applications.MobileNetV2
    theirs = own_statistics(keras, make(weights=None, include_top=False, alpha=0.35, input_shape=(64, 64, 3)))
    checkpoint = read(save(theirs, tmp_path / f"model{suffix}"), image_size=64 if suffix == ".weights.h5" else None)
    assert checkpoint.config["num_labels"] == 0
    images = torch.randn(2, 3, 64, 64)
    expected = run(keras, theirs, images).mean((1, 2))
    torch.testing.assert_close(logits(build(checkpoint, ""), images), expected, atol=1e-4, rtol=1e-4)


def v3(keras: ModuleType, kind: str, minimalistic: bool, size: int, top: bool = True) -> Any:
    """A MobileNetV3 of Keras applications whose norms have statistics of their own."""
    keras.utils.set_random_seed(0)
    make = getattr(keras.applications, f"MobileNetV3{kind}")
    fields = {"minimalistic": minimalistic, "include_preprocessing": False, "classifier_activation": None}
    return own_weights(
        keras, make(weights=None, input_shape=(size, size, 3), include_top=top, classes=7, pooling="avg", **fields)
    )


def save_under_published_names(model: Any, path: Path) -> Path:
    """Weights as the published weights_mobilenet_v3_*.h5 hold them: of the layers' older names, in an older layout."""
    with h5py.File(path, "w") as file:
        names = []
        for layer in model.layers:
            name = re.sub(r"_?squeeze_excite_conv", "/squeeze_excite/Conv", layer.name)
            name = re.sub(r"_(expand|depthwise|project)", r"/\1", name)
            name = re.sub(r"_bn$", "/BatchNorm", name)
            name = re.sub(r"^(conv|logits)", lambda found: found[0].capitalize(), name)
            names.append(name)
            group = file.create_group(name)
            weights = [f"{name}/{weight.name}:0" for weight in layer.weights]
            weights = [re.sub(r"kernel:0$", f"{'depthwise_' * ('depthwise' in name)}kernel:0", w) for w in weights]
            group.attrs["weight_names"] = [weight.encode() for weight in weights]
            for weight, value in zip(weights, layer.get_weights(), strict=True):
                group.create_dataset(weight, data=value)
        file.attrs["layer_names"] = [name.encode() for name in names]
    return path


@pytest.mark.parametrize(
    ("kind", "minimalistic", "top", "published"),
    [
        ("Small", False, True, True),
        ("Small", False, False, False),
        ("Large", True, False, True),
        ("Large", True, True, False),
    ],
)
def test_weights_of_v3_without_a_graph_convert(
    keras: ModuleType, kind: str, minimalistic: bool, top: bool, published: bool, tmp_path: Path
) -> None:
    theirs = v3(keras, kind, minimalistic, 64, top)
    if published:
        path = save_under_published_names(theirs, tmp_path / "weights_mobilenet_v3.h5")
    else:
        path = save(theirs, tmp_path / "model.weights.h5")
    checkpoint = read(path, image_size=64)
    table = f"mobilenet_v3_{kind.lower()}" + "_minimalistic" * minimalistic
    assert (checkpoint.config["architecture"], checkpoint.config["num_labels"]) == (table, 7 * top)
    assert checkpoint.config.get("use_pre_logits", True) == top
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(checkpoint.oracle().logits(images), run(keras, theirs, images))
    expected = run(keras, in_double(keras, theirs), images.double())
    ours = logits(build(checkpoint, "").double(), images.double())
    torch.testing.assert_close(ours, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
    assert_wrong_tables_are_noticed(checkpoint)


@pytest.mark.parametrize("widths", [(5,), (256, 5), ()])
def test_v3_without_its_top_converts(keras: ModuleType, widths: tuple[int, ...], tmp_path: Path) -> None:
    """The commonest fine-tune: include_top=False, a pooling, and layers of one's own."""
    theirs = v3(keras, "Small", False, 64, top=False)
    x = theirs.output
    for width in widths:
        x = keras.layers.Dense(width, activation=None if width == 5 else "relu")(x)
    theirs = keras.Model(theirs.input, x)
    checkpoint = read(save(theirs, tmp_path / "model.keras"))
    assert checkpoint.config["use_pre_logits"] is False
    build(checkpoint, "").save_pretrained(tmp_path / "saved")
    ours = MobileNetForImageClassification.from_pretrained(tmp_path / "saved").double()
    images = torch.rand(2, 3, 64, 64).double() * 2 - 1
    expected = run(keras, in_double(keras, theirs), images)
    torch.testing.assert_close(logits(ours, images), expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


def test_a_file_is_what_its_first_bytes_say(keras: ModuleType, tmp_path: Path) -> None:
    save(network(keras, 1, 0.25, 32), tmp_path / "model.h5").rename(tmp_path / "best.model")
    assert read(tmp_path / "best.model").kind == "a Keras file"
    save(network(keras, 1, 0.25, 32), tmp_path / "model.keras").rename(tmp_path / "download")
    assert read(tmp_path / "download").kind == "a Keras file"
    (tmp_path / "page.h5").write_bytes(b"<!doctype html>")
    assert_fails_without_a_trace(tmp_path / "page.h5", tmp_path / "output", "page.h5: truncated or corrupt")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").touch()
    assert_fails_without_a_trace(tmp_path / "saved", tmp_path / "output", "it is TensorFlow's SavedModel")


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_code_in_a_file_is_never_run(keras: ModuleType, suffix: str, tmp_path: Path) -> None:
    inputs = keras.Input((32, 32, 3))
    base = keras.applications.MobileNet(weights=None, alpha=0.25, input_shape=(32, 32, 3), classes=3)
    run_me = keras.layers.Lambda(lambda x: x * 2, output_shape=(32, 32, 3), name="run_me")
    source = save(keras.Model(inputs, base(run_me(inputs))), tmp_path / f"model{suffix}")
    assert_fails_without_a_trace(source, tmp_path / "output", "run_me is a Lambda layer, which holds code")


@pytest.mark.parametrize(
    "layer",
    [
        {"class_name": "Lambda", "config": {"name": "side"}},
        {"class_name": "StringLookup", "config": {"name": "side", "vocabulary": "/etc/passwd"}},
        {"class_name": "Dense", "module": "os", "config": {"name": "side"}},
        {"class_name": "Dense", "config": {"name": "side", "activation": {"class_name": "__lambda__", "config": {}}}},
    ],
)
def test_keras_does_not_load_a_file_with_code_on_a_branch(keras: ModuleType, layer: dict, tmp_path: Path) -> None:
    """What leads nowhere is no part of the network, but Keras would make it."""
    model = keras.applications.MobileNet(weights=None, alpha=0.25, input_shape=(32, 32, 3), classes=3)
    source = save(model, tmp_path / "model.keras")
    with zipfile.ZipFile(source) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(parts["config.json"])
    config["config"]["layers"].append({**layer, "name": "side", "inbound_nodes": []})
    parts["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(source, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(NoOracleError, match="which could run code, so Keras does not load it"):
        read(source).oracle()


def test_a_resizing_inside_is_refused_in_words(keras: ModuleType, tmp_path: Path) -> None:
    layers = keras.layers
    base = keras.applications.MobileNet(weights=None, alpha=0.25, input_shape=(32, 32, 3), classes=3)
    for size, refused in ((32, False), (48, True)):
        inputs = keras.Input((size, size, 3))
        source = save(keras.Model(inputs, base(layers.Resizing(32, 32)(inputs))), tmp_path / f"model{size}.keras")
        if refused:
            words = "is a Resizing to 32x32, and images must have that size before they enter the network"
            assert_fails_without_a_trace(source, tmp_path / "output", words)
        else:
            assert read(source).config["num_labels"] == 3


def test_files_that_list_no_weights_are_called_intact(keras: ModuleType, tmp_path: Path) -> None:
    """Other HDF5 files, networks without weights, and the archives of some versions of TensorFlow."""
    path, output = tmp_path / "model.h5", tmp_path / "output"
    with h5py.File(path, "w") as file:
        file["measurements"] = [1, 2]
    words = "model.h5: is intact, but lists no weights as Keras does (layer_names): / holds measurements; save the"
    assert_fails_without_a_trace(path, output, words)
    save(keras.applications.MobileNet(weights=None, alpha=0.25, input_shape=(32, 32, 3), classes=3), path)
    with h5py.File(path, "r+") as file:
        del file["model_weights"]["conv1"].attrs["weight_names"]
    assert_fails_without_a_trace(path, output, "(weight_names): /model_weights/conv1 holds conv1; save the whole")
    with h5py.File(tmp_path / "model.weights.h5", "w") as file:
        file["_layer_checkpoint_dependencies/conv2d/vars/0"] = [1.0]
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Functional", "config": {"layers": []}}))
        archive.write(tmp_path / "model.weights.h5", "model.weights.h5")
    words = "holds _layer_checkpoint_dependencies; load it with the TensorFlow that wrote it, and save it as .h5."
    assert_fails_without_a_trace(tmp_path / "model.keras", output, words)


def test_long_lists_of_names_are_read_in_parts(keras: ModuleType, tmp_path: Path) -> None:
    """HDF5 bounds an attribute to 64 kB, so that Keras cuts longer ones."""
    path = save(network(keras, 1, 0.25, 32), tmp_path / "model.h5")
    whole = read(path).tensors
    with h5py.File(path, "r+") as file:
        names = file["model_weights"].attrs["layer_names"]
        del file["model_weights"].attrs["layer_names"]
        for index, part in enumerate(np.array_split(names, 12)):
            file["model_weights"].attrs[f"layer_names{index}"] = part
    again = read(path).tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
