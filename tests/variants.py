"""Networks that people might have made of MobileNets, drawn by chance: some are MobileNets still, and some are not.

python tests/variants.py 300 0 images/*.jpg
KERAS_BACKEND=tensorflow python tests/variants.py 300 0 images/*.jpg .tflite

writes as many with Keras and with torch.onnx (or with tf.lite's converter), from a seed on, converts each, and
compares what the source itself makes of photographs with what the converted network makes of them. Each must be
refused or equal.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


# What a variant may be, and which of it our network can be: the first of each is what the papers print.
CHOICES: dict[str, tuple[tuple, tuple]] = {
    "version": ((1, 2), ()),
    "width": ((0.25, 0.35, 0.5), ()),
    "size": ((64, 32, 96), ()),
    "channels": ((3, 1), ()),
    "act": (("relu6", "relu", "silu", "hardswish", "gelu"), ("elu", "tanh", "leaky", "relu4", "some other", "none")),
    "padding": (("same", "symmetric"), ("valid", "mixed", "lopsided")),
    "norm": (("own", "no scale", "biased", "epsilons", "none", "some", "twice"), ("after act",)),
    "scaling": ((None, "255", "127.5", "norm", "batch norm", "arithmetic"), ("negative",)),
    "pool": (("avg", "max", "window", "features", "map"), ("part", "flatten")),
    "head": (("softmax", "linear", "sigmoid", "one", "unbiased"), ("tanh", "scaled")),
    "hidden": (((), (16,), (24, 12)), ()),
    "hidden_act": (("relu", "relu6", "linear", "norm"), ("tanh",)),
    "sums": (("all",), ("one missing", "activated", "one more")),
    "body": (("whole",), ("one block less", "other stride", "other kernel", "other channels", "swapped")),
    "form": (("functional", "nested", "sequential"), ()),
    "augment": ((False, True), ()),
    "suffix": ((".keras", ".h5", ".onnx"), ()),
}


@dataclass(frozen=True)
class Variant:
    """A network by its differences from the papers'."""

    version: int = 1
    width: float = 0.25
    size: int = 64
    channels: int = 3
    act: str = "relu6"
    padding: str = "same"
    norm: str = "own"
    scaling: str | None = None
    pool: str = "avg"
    head: str = "softmax"
    hidden: tuple[int, ...] = ()
    hidden_act: str = "relu"
    sums: str = "all"
    body: str = "whole"
    form: str = "functional"
    augment: bool = False
    suffix: str = ".keras"

    @property
    def has_place(self) -> bool:
        """Whether our network can be it."""
        ours = all(
            getattr(self, name) in good
            for name, (good, _) in CHOICES.items()
            if name not in ("sums", "hidden_act", "suffix")
        )
        sums = self.sums == "all" or (self.version == 1 and self.sums != "one more")  # V1 has none to miss
        return (
            ours and sums and not (self.hidden and self.hidden_act == "tanh" and self.pool not in ("features", "map"))
        )

    @property
    def differences(self) -> str:
        """What it is, in words for a failure."""
        return ", ".join(
            f"{name}={value!r}" for name, value in asdict(self).items() if value != getattr(Variant, name)
        )


def draw(seed: int, **fixed: Any) -> Variant:
    """A variant by chance: of what has no place in our network, no more than two things."""
    chance = random.Random(seed)
    chosen = {name: chance.choice(good) for name, (good, _) in CHOICES.items()}
    for name in [
        name for name in CHOICES if name not in ("version", "width", "size", "suffix", "form", "body", "sums")
    ]:
        if chance.random() < 0.5:
            chosen[name] = getattr(Variant, name)  # or everything would be odd at once
    for name in chance.sample([name for name, (_, bad) in CHOICES.items() if bad], chance.choice((0, 0, 1, 1, 2))):
        chosen[name] = chance.choice(CHOICES[name][1])
    return Variant(**{**chosen, **fixed})


def scaled(variant: Variant, channels: int) -> int:
    """Channels under a variant's width, rounded as the papers' own code does."""
    if variant.version == 1:
        return max(8, int(channels * variant.width))
    value = max(8, int(channels * variant.width + 4) // 8 * 8)
    return value + 8 * (value < 0.9 * channels * variant.width)


def blocks(variant: Variant) -> Iterator[tuple[int, int, int, int, int]]:
    """Expansion (0 for none), channels, stride, kernel size and index of each block, as the papers have them."""
    if variant.version == 1:
        rows = [(0, c, s) for c, s in zip(V1_CHANNELS, V1_STRIDES, strict=True)]
    else:
        rows = [(t, c, s if i == 0 else 1) for t, c, n, s in V2_ROWS for i in range(n)]
    if variant.body == "one block less":
        del rows[-2]
    if variant.body == "other stride":
        rows[3] = (*rows[3][:2], 3 - rows[3][2])
    if variant.body == "swapped":
        rows[4], rows[5] = (*rows[4][:2], rows[5][2]), (*rows[5][:2], rows[4][2])
    for index, (expansion, channels, stride) in enumerate(rows):
        channels = scaled(variant, channels) + 8 * (variant.body == "other channels" and index == 2)
        yield expansion, channels, stride, 5 if variant.body == "other kernel" and index == 2 else 3, index


V1_CHANNELS = (64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)
V1_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
V2_ROWS = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)


class Builder:
    """The network of a variant, in the words of a framework that a subclass gives."""

    def __init__(self, variant: Variant, seed: int) -> None:
        self.variant, self.random, self.count = variant, np.random.default_rng(seed), 0

    def body(self, x: Any) -> Any:
        """Stem, blocks and head."""
        v = self.variant
        stem = scaled(v, 32)
        x, channels, size = self.unit(x, v.channels, stem, 3, 2, v.size), stem, (v.size - (v.padding == "valid")) // 2
        for expansion, after, stride, kernel, index in blocks(v):
            entry = x
            hidden = channels * max(expansion, 1)
            if expansion > 1:
                x = self.unit(x, channels, hidden, 1, 1, size)
            x = self.unit(x, hidden, hidden, kernel, stride, size, depthwise=True)
            size = -(-size // stride)
            x = self.unit(x, hidden, after, 1, 1, size, linear=expansion > 0)
            if expansion and stride == 1 and channels == after and not (v.sums == "one missing" and index == 5):
                x = self.add(x, entry)
                if v.sums == "activated" and index == 5:
                    x = self.act(x, "relu6")
            elif v.sums == "one more" and index == len(V2_ROWS):
                x = self.add(x, x)
            channels = after
        if v.version == 2:
            x = self.unit(x, channels, 1280, 1, 1, size)
        self.size, self.features = size, 1280 if v.version == 2 else channels
        return x

    def unit(
        self,
        x: Any,
        before: int,
        after: int,
        kernel: int,
        stride: int,
        size: int,
        depthwise: bool = False,
        linear: bool = False,
    ) -> Any:
        """A convolution with its norm and activation."""
        v, index = self.variant, self.count
        self.count += 1
        act = v.act
        if act == "some other":
            act = "relu" if index == 7 else "relu6"
        if act == "none":
            act = None if index == 3 else "relu6"
        has_norm = v.norm != "none" and not (v.norm == "some" and index % 5 == 2)
        padding = v.padding
        if padding == "mixed":
            padding = "same" if index % 2 else "symmetric"
        total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
        pads = {
            "same": (total // 2, total - total // 2),
            "symmetric": (kernel // 2, kernel // 2),
            "valid": (0, 0),
            "lopsided": (total - total // 2 + (stride == 1), total // 2 - (stride == 1)),
        }[padding]
        if kernel == 1 or (padding == "valid" and index > 0):
            pads = (kernel // 2, kernel // 2)
        x = self.conv(x, before, after, kernel, stride, pads, depthwise, bias=not has_norm or v.norm == "biased")
        if v.norm == "after act":
            x = x if linear else self.act(x, act)
            return self.norm(x, after, 1e-3)
        if has_norm:
            x = self.norm(x, after, 1e-3 if v.norm != "epsilons" or index % 2 else 1e-2)
        if v.norm == "twice" and index == 4:
            x = self.norm(x, after, 1e-3)
        return x if linear else self.act(x, act)

    def top(self, x: Any) -> Any:
        """Pooling and classifier."""
        v = self.variant
        if v.pool == "map":
            return x
        x, features = self.pool(x)
        if v.pool == "features":
            return x
        for width in v.hidden:
            x = self.dense(x, features, width)
            features = width
            x = self.norm(x, width, 1e-3, flat=True) if v.hidden_act == "norm" else x
            x = self.act(x, {"norm": "relu"}.get(v.hidden_act, v.hidden_act))
        x = self.dense(x, features, 1 if v.head == "one" else 5, bias=v.head != "unbiased")
        if v.head == "scaled":
            return self.times(self.act(x, "softmax"), 2.0)
        return self.act(x, {"one": "sigmoid", "unbiased": "softmax"}.get(v.head, v.head))

    def weights(self, *shape: int, fan: int) -> np.ndarray:
        """A kernel that keeps the scale of what comes in."""
        return self.random.normal(0, (2 / fan) ** 0.5, shape).astype(np.float32)

    def statistics(self, channels: int, of_pixels: bool = False) -> list[np.ndarray]:
        """Scale, shift, mean and variance of a batch norm: its own."""
        if of_pixels:
            draws = self.statistics(channels)
            return [*draws[:2], 110 + 50 * draws[2], 5000 * draws[3]]
        draws = (
            self.random.uniform(0.7, 1.3, channels),
            self.random.normal(0.1, 0.2, channels),
            self.random.normal(0, 0.2, channels),
            self.random.uniform(0.5, 1.5, channels),
        )
        return [np.asarray(draw, np.float32) for draw in draws]


class KerasBuilder(Builder):
    """A network of Keras, whose layers have automatic names."""

    def __init__(self, variant: Variant, seed: int) -> None:
        super().__init__(variant, seed)
        os.environ.setdefault("KERAS_BACKEND", "torch")
        import keras

        self.keras, self.values = keras, []

    def build(self) -> Any:
        """The network, as its form says."""
        keras, v = self.keras, self.variant
        layers = keras.layers
        shape = (v.size, v.size, v.channels)
        given = keras.Input(shape)
        x = given
        if v.augment:
            x = layers.RandomRotation(0.1)(layers.RandomFlip()(x))
        x = self.scale(x)
        if v.form == "functional":
            model = keras.Model(given, self.top(self.body(x)))
        else:
            inner = keras.Input(shape)
            base = keras.Model(inner, self.body(inner))
            if v.form == "nested":
                model = keras.Model(given, self.top(base(x, training=False)))
            else:
                after = keras.Input(base.output.shape[1:])
                top = [keras.Model(after, self.top(after))] if v.pool != "map" else []
                first = [keras.Model(given, x)] if x is not given else []
                model = keras.Sequential([keras.Input(shape), *first, base, *top])
        for layer, values in self.values:
            layer.set_weights(values)
        return model

    def scale(self, x: Any) -> Any:
        layers, v = self.keras.layers, self.variant
        if v.scaling == "255":
            return layers.Rescaling(1 / 255)(x)
        if v.scaling == "127.5":
            return layers.Rescaling(1 / 127.5, offset=-1)(x)
        if v.scaling == "norm":
            return layers.Normalization(
                mean=[110.0, 120.0, 130.0][: v.channels], variance=[4000.0, 3000.0, 5000.0][: v.channels]
            )(x)
        if v.scaling == "batch norm":
            return self.norm(x, v.channels, 1e-3, of_pixels=True)
        if v.scaling == "arithmetic":
            return x / 127.5 - 1.0
        return layers.Rescaling(-1 / 255, offset=1)(x) if v.scaling == "negative" else x

    def conv(
        self, x: Any, before: int, after: int, kernel: int, stride: int, pads: tuple, depthwise: bool, bias: bool
    ) -> Any:
        layers = self.keras.layers
        size = x.shape[1]
        total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
        same = pads == (total // 2, total - total // 2) and self.random.random() < 0.5
        if any(pads) and not same:
            x = layers.ZeroPadding2D((pads, pads))(x)
        common = {"strides": stride, "padding": "same" if same else "valid", "use_bias": bias}
        if depthwise:
            layer, shape, fan = layers.DepthwiseConv2D(kernel, **common), (kernel, kernel, before, 1), kernel**2
        else:
            layer, shape, fan = (
                layers.Conv2D(after, kernel, **common),
                (kernel, kernel, before, after),
                kernel**2 * before,
            )
        x = layer(x)
        self.values.append((layer, [self.weights(*shape, fan=fan), *([self.statistics(after)[1]] if bias else [])]))
        return x

    def norm(self, x: Any, channels: int, eps: float, flat: bool = False, of_pixels: bool = False) -> Any:
        scaled = self.variant.norm != "no scale"
        layer = self.keras.layers.BatchNormalization(epsilon=eps, scale=scaled)
        x = layer(x)
        self.values.append((layer, self.statistics(channels, of_pixels)[0 if scaled else 1 :]))
        return x

    def act(self, x: Any, name: str | None) -> Any:
        layers = self.keras.layers
        if name in (None, "linear"):
            return x
        if name == "relu6":
            return layers.ReLU(6.0)(x) if self.random.random() < 0.5 else layers.Activation("relu6")(x)
        made = {
            "relu": lambda: layers.ReLU(),
            "relu4": lambda: layers.ReLU(4.0),
            "leaky": lambda: layers.LeakyReLU(),
            "hardswish": lambda: layers.Activation("hard_silu"),
            "softmax": lambda: layers.Softmax() if self.random.random() < 0.5 else layers.Activation("softmax"),
        }
        return made.get(name, lambda: layers.Activation(name))()(x)

    def add(self, x: Any, y: Any) -> Any:
        return self.keras.layers.Add()([x, y])

    def times(self, x: Any, factor: float) -> Any:
        return self.keras.layers.Rescaling(factor)(x)

    def pool(self, x: Any) -> tuple[Any, int]:
        layers, kind = self.keras.layers, self.variant.pool
        if kind == "max":
            return layers.GlobalMaxPooling2D()(x), self.features
        if kind == "window":
            return layers.Flatten()(layers.AveragePooling2D(x.shape[1])(x)), self.features
        if kind in ("part", "flatten"):
            x = layers.AveragePooling2D(2, padding="same")(x) if kind == "part" else x
            x = layers.Flatten()(x)
            return x, x.shape[-1]
        return layers.GlobalAveragePooling2D()(x), self.features

    def dense(self, x: Any, before: int, after: int, bias: bool = True) -> Any:
        layer = self.keras.layers.Dense(after, use_bias=bias)
        x = layer(self.keras.layers.Dropout(0.2)(x))
        self.values.append(
            (layer, [self.weights(before, after, fan=before), *([self.statistics(after)[1]] if bias else [])])
        )
        return x


class _Layers(nn.Module):
    """Modules in a row; a sum names the module that it adds the output of."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList()
        self.sums: dict[int, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for index, step in enumerate(self.steps):
            x = step(x) + outputs[self.sums[index]] if index in self.sums else step(x)
            outputs.append(x)
        return x


class _Do(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class TorchBuilder(Builder):
    """The same in torch; a value is the index of the module that makes it."""

    def __init__(self, variant: Variant, seed: int) -> None:
        super().__init__(variant, seed)
        self.layers = _Layers()

    def build(self) -> nn.Module:
        """The network."""
        self.top(self.body(self.scale(-1)))
        return self.layers.eval()

    def step(self, module: nn.Module) -> int:
        self.layers.steps.append(module)
        return len(self.layers.steps) - 1

    def scale(self, x: int) -> int:
        v = self.variant
        functions = {
            "255": lambda x: x / 255,
            "127.5": lambda x: x / 127.5 - 1,
            "arithmetic": lambda x: (x - 127.5) * (1 / 127.5),
            "negative": lambda x: 1 - x / 255,
        }
        if v.scaling == "norm":
            mean, std = torch.tensor([110.0, 120.0, 130.0]), torch.tensor([63.0, 55.0, 70.0])
            mean, std = (t[: v.channels].view(1, -1, 1, 1) for t in (mean, std))
            return self.step(_Do(lambda x: (x - mean) / std))
        if v.scaling == "batch norm":
            return self.norm(x, v.channels, 1e-3, of_pixels=True)
        return self.step(_Do(functions[v.scaling])) if v.scaling else x

    def conv(
        self, x: int, before: int, after: int, kernel: int, stride: int, pads: tuple, depthwise: bool, bias: bool
    ) -> int:
        lopsided = pads[0] != pads[1]
        if lopsided:
            self.step(nn.ZeroPad2d((*pads, *pads)))
        groups = before if depthwise else 1
        padding = 0 if lopsided else pads[0]
        layer = nn.Conv2d(before, after, kernel, stride, padding, groups=groups, bias=bias)
        self.fill(layer.weight, self.weights(*layer.weight.shape, fan=layer.weight[0].numel()))
        if bias:
            self.fill(layer.bias, self.statistics(after)[1])
        return self.step(layer)

    @staticmethod
    def fill(target: Tensor, values: np.ndarray) -> None:
        with torch.no_grad():
            target.copy_(torch.from_numpy(values))

    def norm(self, x: int, channels: int, eps: float, flat: bool = False, of_pixels: bool = False) -> int:
        layer = (nn.BatchNorm1d if flat else nn.BatchNorm2d)(channels, eps)
        for target, values in zip(
            (layer.weight, layer.bias, layer.running_mean, layer.running_var),
            self.statistics(channels, of_pixels),
            strict=True,
        ):
            self.fill(target, values)
        return self.step(layer)

    def act(self, x: int, name: str | None) -> int:
        if name in (None, "linear"):
            return self.step(nn.Identity())
        made = {
            "relu6": nn.ReLU6,
            "relu": nn.ReLU,
            "silu": nn.SiLU,
            "hardswish": nn.Hardswish,
            "gelu": nn.GELU,
            "elu": nn.ELU,
            "tanh": nn.Tanh,
            "leaky": nn.LeakyReLU,
            "relu4": lambda: nn.Hardtanh(0.0, 4.0),
            "softmax": lambda: nn.Softmax(-1) if self.random.random() < 0.5 else nn.LogSoftmax(-1),
            "sigmoid": nn.Sigmoid,
        }
        return self.step(made[name]())

    def add(self, x: int, y: int) -> int:
        index = self.step(nn.Identity())
        self.layers.sums[index] = y
        return index

    def times(self, x: int, factor: float) -> int:
        return self.step(_Do(lambda x: x * factor))

    def pool(self, x: int) -> tuple[int, int]:
        kind = self.variant.pool
        if kind in ("part", "flatten"):
            if kind == "part":
                self.step(nn.AvgPool2d(2, ceil_mode=True))
            side = -(-self.size // 2) if kind == "part" else self.size
            return self.step(nn.Flatten()), self.features * side**2
        if kind == "max":
            self.step(nn.AdaptiveMaxPool2d(1))
        elif kind == "window":
            self.step(nn.AvgPool2d(self.size))
        else:
            self.step(nn.AdaptiveAvgPool2d(1))
        return self.step(nn.Flatten()), self.features

    def dense(self, x: int, before: int, after: int, bias: bool = True) -> int:
        layer = nn.Linear(before, after, bias=bias)
        self.fill(layer.weight, self.weights(after, before, fan=before))
        if bias:
            self.fill(layer.bias, self.statistics(after)[1])
        return self.step(layer)


def write(variant: Variant, folder: Path, seed: int = 0) -> tuple[Path, Callable[[Tensor], Tensor]]:
    """Write the file of a variant, and give what its network itself makes of pixels of shape (B, C, H, W)."""
    path = folder / f"variant{variant.suffix}"
    if variant.suffix == ".onnx":
        model = TorchBuilder(variant, seed).build()
        example = torch.rand(2, variant.channels, variant.size, variant.size)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            axes = {"x": {0: "batch"}}
            torch.onnx.export(model, (example,), path, dynamo=False, input_names=["x"], dynamic_axes=axes)

        def run(pixels: Tensor) -> Tensor:
            with torch.no_grad():
                return model(pixels)

        return path, run
    builder = KerasBuilder(variant, seed)
    model = builder.build()
    if variant.suffix == ".tflite":
        import tensorflow as tf

        path.write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())
        return path, lambda pixels: interpreted(path, pixels)
    model.save(path)

    def run_keras(pixels: Tensor) -> Tensor:
        outputs = model(pixels.permute(0, 2, 3, 1).numpy(), training=False)
        return torch.as_tensor(builder.keras.ops.convert_to_numpy(outputs))

    return path, run_keras


def interpreted(path: Path, pixels: Tensor) -> Tensor:
    """What a TFLite file makes of pixels, as its users run it: without what the comparison asks of the interpreter."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    given, result = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    rows = []
    for image in pixels.permute(0, 2, 3, 1).numpy():
        interpreter.set_tensor(given, image[None].astype(np.float32))
        interpreter.invoke()
        rows.append(interpreter.get_tensor(result)[0])
    return torch.from_numpy(np.stack(rows))


class WrongError(AssertionError):
    """A conversion that ended well, and should not have."""


def attempt(
    variant: Variant, folder: Path, photographs: list[str], seed: int = 0, pixel_range: str | None = None
) -> str:
    """Convert a variant: "converted", or why it was refused.

    Raises:
        WrongError: The converted network says something else than its source, or has a place and was refused.
    """
    from mobilenet.conversion import ConversionError, Options, read_source
    from mobilenet.conversion.convert import build, keep_gray
    from mobilenet.conversion.graph import PREDICTIONS
    from mobilenet.conversion.parity import compare_with_source

    path, run = write(variant, folder, seed)
    try:
        _, checkpoint = read_source(str(path), options=Options(pixel_range=pixel_range if variant.scaling else "0..1"))
    except ConversionError as error:
        if variant.has_place:
            raise WrongError(f"refused, though it has a place: {variant.differences}: {error}") from error
        return str(error).replace(str(path), "").strip(": ")
    model = build(checkpoint, str(path))
    if checkpoint.config["num_channels"] == 1:
        keep_gray(checkpoint.processor)
        if checkpoint.feed:
            keep_gray(checkpoint.feed)
    pixels = checkpoint.processor(photographs, return_tensors="pt", do_rescale=False, do_normalize=False).pixel_values
    expected = run(pixels if variant.scaling else pixels / 255)
    if expected.ndim == 4:
        expected = expected.mean((1, 2) if variant.suffix != ".onnx" else (2, 3))
    with torch.no_grad():
        logits = model(checkpoint.processor(photographs, return_tensors="pt").pixel_values).logits
    given = PREDICTIONS[checkpoint.prediction](logits) if checkpoint.prediction else logits
    largest = (given - expected).abs().max().item()
    assumed = any("--range" in warning for warning in checkpoint.warnings)
    if variant.suffix == ".tflite" and assumed and not pixel_range:
        # The converter moves a factor into the first convolution, where nobody sees it: the warning says what to do.
        return attempt(variant, folder, photographs, seed, "0..255").replace("converted", "converted as warned", 1)
    if not largest < max(1e-3, 1e-4 * expected.abs().max().item()):
        raise WrongError(f"silently wrong by {largest:.3g}: {variant.differences}")
    if not variant.has_place and expected.std(0).max() > 1e-3:
        # Equal all the same, as where a layer that is left out does nothing.
        return "equal, though it has no place"
    try:  # the comparison must pass, but for what a random network makes of rounding
        compare_with_source(model, checkpoint, photographs)
    except ConversionError:
        return "converted, but for the comparison's limit"
    return "converted" if expected.std(0).max() > 1e-4 else "converted, and constant"


def main() -> None:
    """Try as many variants as asked for, and count what comes of them."""
    count, first, *photographs = sys.argv[1:]
    fixed = {"suffix": photographs.pop()} if photographs[-1].startswith(".") else {}
    counts: Counter[str] = Counter()
    for seed in range(int(first), int(first) + int(count)):
        variant = draw(seed, **fixed)
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = attempt(variant, Path(folder), photographs, seed)
            except WrongError as error:
                result = "WRONG"
                print(seed, error, flush=True)
        print(seed, result, "|", variant.differences, file=sys.stderr)
        kind = result if result.startswith(("converted", "equal", "WRONG")) else "refused"
        counts[f"{kind} {variant.suffix}"] += 1
    print(dict(sorted(counts.items())))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    assert {field.name for field in fields(Variant)} == set(CHOICES)
    main()
