"""The layers of MobileNet: a convolution with TensorFlow's padding, Conv-Norm-Act, the blocks of the papers, features.

They need torch alone, and are complete without what makes them fast on a CPU, which is in a file of its own.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architectures_mobilenet import Block
from .configuration_mobilenet import MobileNetConfig
from .cpu_mobilenet import (
    convolve_in_float32,
    convolve_shifted,
    is_cheaper_to_fold,
    is_cheaper_to_shift,
    trains_faster_in_float32,
)


def same_padding(size: int, kernel_size: int, stride: int, dilation: int) -> int:
    """Rows (or columns) that TensorFlow's SAME adds in all, half of them rounded down at the start.

    The kernel must reach as far as the stride, or the result would be negative where TensorFlow's is 0; a maximum
    with 0 would make the symbolic sizes of an exported graph grow with every layer.

    Source: "Notes on padding" of tf.nn.
    """
    outputs = (size + stride - 1) // stride
    return (outputs - 1) * stride + (kernel_size - 1) * dilation + 1 - size


class Conv2d(nn.Conv2d):
    """torch's convolution, by torch's arguments, which can also pad as TensorFlow does.

    Args:
        padding: Rows and columns on each side, or "same", which goes with a stride too, and with a square odd kernel:
            the output has ceil(input / stride) rows and columns.
        activated: Whether an activation follows, which decides the scale of initial weights.

    Shape: (B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        *args: Any,
        activated: bool = False,
        **kwargs: Any,
    ) -> None:
        pads_same = padding == "same"  # which torch's own refuses beside a stride
        super().__init__(in_channels, out_channels, kernel_size, stride, 0 if pads_same else padding, *args, **kwargs)
        self.activated = activated
        if pads_same:
            # SAME can only be lopsided where the kernel skips pixels.
            symmetric = (self.dilation[0] * (self.kernel_size[0] // 2),) * 2
            self.padding = "same" if self.stride[0] > 1 else symmetric

    def forward(self, x: Tensor) -> Tensor:
        if trains_faster_in_float32(self, x):
            return convolve_in_float32(self, x)
        return self.convolve(x, self.weight, self.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with other weights than its own."""
        if self.padding != "same":
            return self._conv_forward(x, weight, bias)
        stride, dilation = self.stride[0], self.dilation[0]
        pads = [same_padding(size, self.kernel_size[0], stride, dilation) for size in x.shape[-2:]]
        if is_cheaper_to_shift(self):
            return convolve_shifted(self, x, weight, bias, pads)
        (top, bottom), (left, right) = ((pad // 2, pad - pad // 2) for pad in pads)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride, 0, dilation, self.groups)


class ReLU6(nn.ReLU6):
    """ReLU6, in place where nobody differentiates it: for that, torch's own copies what it overwrites."""

    def forward(self, x: Tensor) -> Tensor:
        # torch.jit.trace looks once with gradients and once without.
        return F.relu6(x, inplace=not (x.requires_grad or torch.jit.is_tracing()))


ACTIVATION_LAYERS = {
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": ReLU6,
    "hardswish": lambda: nn.Hardswish(inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
}

# timm's: means of 2x2 pixels, which leave out the last of an odd number; or binomial filters of 3x3, which do not.
ANTI_ALIASING_LAYERS = {
    "average": lambda: nn.AvgPool2d(2),
    "blur": lambda: nn.Sequential(nn.AvgPool2d(2, 1, padding=1), nn.AvgPool2d(2)),
}


def fold(
    weight: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does the work of a convolution and of the batch norm after it.

    Source: Jacob et al., Section 3.2 (arXiv:1712.05877).
    """
    scale = scale * torch.rsqrt(variance + eps)
    return weight * scale[:, None, None, None], torch.addcmul(shift, mean, scale, value=-1)


class ConvNormAct(nn.Module):
    """Convolution, batch norm, activation. Without batch norm the convolution has a bias.

    Shape: (B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))
    """

    def __init__(
        self,
        config: MobileNetConfig,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        act: str | None = None,
        has_norm: bool = True,
        anti_aliasing: str = "none",
        eps: float | None = None,
    ) -> None:
        super().__init__()
        self.normalizes = has_norm  # unless it is fused, or the network has no batch norm
        has_norm = has_norm and config.has_batch_norm
        self.conv = Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            1 if anti_aliasing in ANTI_ALIASING_LAYERS else stride,
            padding="same" if config.padding == "same" else dilation * (kernel_size // 2),
            dilation=dilation,
            groups=groups,
            bias=not has_norm,
            activated=act is not None,
        )
        norm = config.batch_norm_eps if eps is None else eps, config.batch_norm_momentum
        self.norm = nn.BatchNorm2d(out_channels, *norm) if has_norm else nn.Identity()
        self.act = nn.Identity() if act is None else ACTIVATION_LAYERS[act]()
        if anti_aliasing in ANTI_ALIASING_LAYERS:
            self.act = nn.Sequential(self.act, ANTI_ALIASING_LAYERS[anti_aliasing]())

    @classmethod
    def of(cls, config: MobileNetConfig, block: Block) -> ConvNormAct:
        """The convolution that a block consists of."""
        kernel = block.kernel_size, block.stride, block.dilation
        kinds = {"act": block.act, "has_norm": block.has_norm, "anti_aliasing": block.anti_aliasing}
        return cls(config, block.in_channels, block.out_channels, *kernel, **kinds)

    def forward(self, x: Tensor) -> Tensor:
        if is_cheaper_to_fold(self.conv, self.norm, x, Conv2d):
            return self.act(self.conv.convolve(x, *fold(*self.terms(), self.norm.eps)))
        return self.act(self.norm(self.conv(x)))

    def terms(self) -> tuple[Tensor, ...]:
        """What `fold` takes, but for the batch norm's epsilon."""
        norm = self.norm
        return self.conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var

    def fuse(self) -> None:
        """Fold the batch norm's running statistics into the convolution's weight and bias, in double precision."""
        if isinstance(self.norm, nn.Identity):
            return
        conv = self.conv
        # Not every device has double precision, the CPU does.
        weight, bias = fold(*(term.to("cpu", torch.float64) for term in self.terms()), self.norm.eps)
        conv.weight.copy_(weight)
        conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=conv.weight.requires_grad)
        self.norm = nn.Identity()


class DepthwiseSeparable(nn.Module):
    """Filter each channel 3x3 (depthwise), then combine channels 1x1 (pointwise).

    Shape: (B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))
    Source: MobileNetV1, Section 3.1 and Figure 3 (arXiv:1704.04861)
    """

    def __init__(self, config: MobileNetConfig, block: Block) -> None:
        super().__init__()
        channels = block.in_channels
        kernel = block.kernel_size, block.stride, block.dilation
        act = block.act if config.depthwise_activation else None
        self.depthwise = ConvNormAct(config, channels, channels, *kernel, groups=channels, act=act)
        self.pointwise = ConvNormAct(config, channels, block.out_channels, act=block.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class SqueezeExcite(nn.Module):
    """Scale each channel by what the means of all channels say.

    Shape: (B, C, H, W) -> (B, C, H, W)
    Source: MobileNetV3, Section 5.3 (arXiv:1905.02244); Hu et al., Section 3 (arXiv:1709.01507)
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = Conv2d(channels, squeezed, 1, activated=True)
        self.expand = Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(x.mean((-2, -1), keepdim=True)))))


class LayerScale(nn.Module):
    """Scale each channel by a number of its own.

    Shape: (B, C, H, W) -> (B, C, H, W)
    Source: Touvron et al., Section 2 (arXiv:2103.17239)
    """

    def __init__(self, channels: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.weight = nn.Parameter(torch.full((channels,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None]


class ResidualBlock(nn.Module):
    """What blocks share that may add their input to their output, and scale it first.

    Shape: (B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride)); means against aliasing round down instead.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.has_shortcut = block.is_residual and block.stride == 1 and block.in_channels == block.out_channels

    def layer_scale(self, config: MobileNetConfig, block: Block) -> nn.Module:
        """Small at first, so that a block begins as the identity; which one without a shortcut must not."""
        if not block.has_scale or config.fused:
            return nn.Identity()
        return LayerScale(block.out_channels, 1e-5 if self.has_shortcut else 1.0)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Scale what the block makes of its input, and add the input."""
        y = self.scale(y)
        return x + y if self.has_shortcut else y

    def fuse(self) -> None:
        """Fold the layer scale into the last convolution, whose batch norm is folded already."""
        if isinstance(self.scale, LayerScale):
            *_, last = (module for module in self.modules() if isinstance(module, Conv2d))
            for parameter in last.parameters():
                parameter.mul_(self.scale.weight.view(-1, *[1] * (parameter.ndim - 1)))
            self.scale = nn.Identity()


class InvertedResidual(ResidualBlock):
    """Expand 1x1, filter depthwise, project 1x1 without activation (linear bottleneck).

    MobileNetV3 puts squeeze-and-excite before the projection. MobileNetV4 may filter before it expands, without
    activation, or not filter after (universal inverted bottleneck).

    Source: MobileNetV2, Section 3.3 and Table 1 (arXiv:1801.04381); MobileNetV3, Figure 4 (arXiv:1905.02244);
        MobileNetV4, Section 4.1 (arXiv:2404.10518)
    """

    def __init__(self, config: MobileNetConfig, block: Block) -> None:
        super().__init__(block)
        inputs, hidden, act = block.in_channels, block.hidden_channels, block.act

        def depthwise(channels: int, kernel_size: int, strides: bool, act: str | None) -> nn.Module:
            if not kernel_size:
                return nn.Identity()
            kernel = kernel_size, block.stride if strides else 1, block.dilation, channels
            return ConvNormAct(
                config, channels, channels, *kernel, act, anti_aliasing=block.anti_aliasing if strides else "none"
            )

        self.start_depthwise = depthwise(inputs, block.start_kernel_size, not block.kernel_size, None)
        # The first block does not expand, and has no convolution for it either.
        self.expand = ConvNormAct(config, inputs, hidden, act=act) if hidden != inputs else nn.Identity()
        self.depthwise = depthwise(hidden, block.kernel_size, True, act)
        self.squeeze = SqueezeExcite(hidden, block.squeeze_channels) if block.squeeze_channels else nn.Identity()
        self.project = ConvNormAct(config, hidden, block.out_channels)
        self.scale = self.layer_scale(config, block)

    def forward(self, x: Tensor, with_expansion: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        expanded = self.expand(self.start_depthwise(x))
        y = self.add(x, self.project(self.squeeze(self.depthwise(expanded))))
        return (y, expanded) if with_expansion else y


class FusedInvertedResidual(ResidualBlock):
    """Expand and filter at once, project 1x1 without activation.

    Source: MobileNetV4, Section 4.1 (arXiv:2404.10518); mbv3_fused of slim/nets/mobilenet/mobilenet_v3.py
    """

    def __init__(self, config: MobileNetConfig, block: Block) -> None:
        super().__init__(block)
        inputs, hidden = block.in_channels, block.hidden_channels
        expand = block._replace(out_channels=hidden)
        self.expand = ConvNormAct.of(config, expand) if hidden != inputs else nn.Identity()
        self.project = ConvNormAct(config, hidden, block.out_channels)
        self.scale = self.layer_scale(config, block)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.project(self.expand(x)))


class MultiQueryAttention(ResidualBlock):
    """Let each pixel look at all others, or at a reduced map of them: Mobile MQA.

    Heads share keys and values, so that to attend with all heads is to attend with one that has more queries.

    Shape: (B, in, H, W) -> (B, out, H, W)
    Source: MobileNetV4, Section 4.2 (arXiv:2404.10518)
    """

    def __init__(self, config: MobileNetConfig, block: Block) -> None:
        super().__init__(block)
        inputs, hidden = block.in_channels, block.hidden_channels
        self.head_channels = hidden // block.heads
        conv = partial(Conv2d, kernel_size=1, bias=False)

        def reduction() -> nn.Module:
            if block.key_stride == 1:
                return nn.Identity()
            kernel = block.kernel_size, block.key_stride, block.dilation
            return ConvNormAct(config, inputs, inputs, *kernel, groups=inputs)

        # No convolution comes before this norm that it could be folded into.
        norm = config.batch_norm_eps, config.batch_norm_momentum
        self.norm = nn.BatchNorm2d(inputs, *norm) if config.use_batch_norm else nn.Identity()
        self.query = conv(inputs, hidden)
        self.key_reduction = reduction()
        self.key = conv(inputs, self.head_channels)
        self.value_reduction = reduction()
        self.value = conv(inputs, self.head_channels)
        self.output = conv(hidden, block.out_channels)
        self.scale = self.layer_scale(config, block)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        maps = self.query(y), self.key(self.key_reduction(y)), self.value(self.value_reduction(y))
        # (B, C, H, W) -> (B, 1, H * W * heads, C / heads), without a copy of what is in the channels-last format
        rows = (m.permute(0, 2, 3, 1).unflatten(3, (-1, self.head_channels)).flatten(1, 3)[:, None] for m in maps)
        y = F.scaled_dot_product_attention(*rows).reshape(*x.shape[:1], *x.shape[2:], self.query.out_channels)
        return self.add(x, self.output(y.permute(0, 3, 1, 2)))


# By the kind of block, which is a word: transformers may import a file twice, and then there are two of a class.
LAYERS = {
    "conv": ConvNormAct.of,
    "separable": DepthwiseSeparable,
    "inverted": InvertedResidual,
    "fused": FusedInvertedResidual,
    "attention": MultiQueryAttention,
}


class Features:
    """What computes features, for a module to inherit: stem, stages of blocks, and a head before the pooling."""

    layers = LAYERS

    def add_layers(self, config: MobileNetConfig, with_head: bool = True, with_pre_logits: bool = True) -> None:
        """Add the layers of a configured network to this module.

        Args:
            config: Of the network.
            with_head: Whether to add the 1x1 convolution before the pooling.
            with_pre_logits: Whether to add the one after it too.
        """

        def build(block: Block) -> nn.Module:
            return self.layers[block.kind](config, block)

        self.stem = build(config.stem_block)
        self.stages = nn.ModuleList(nn.ModuleList(map(build, stage)) for stage in config.stages)
        self.pooling = config.pooling
        if with_head:
            self.head = build(config.head_block) if config.head_block else nn.Identity()
        if with_head and with_pre_logits:
            self.pre_logits = build(config.pre_logits_block) if config.pre_logits_block else nn.Identity()

    def features(self, x: Tensor, hidden_states: list[Tensor] | None = None) -> Tensor:
        """The feature map of the last block, of shape (B, C, H / 32, W / 32) at output stride 32.

        Args:
            x: Images, of shape (B, num_channels, H, W).
            hidden_states: Collects the feature maps of the stem and of every block.
        """
        x = self.stem(x)
        if hidden_states is not None:
            hidden_states.append(x)
        for stage in self.stages:
            for block in stage:
                x = block(x)
                if hidden_states is not None:
                    hidden_states.append(x)
        return x

    def pool(self, x: Tensor) -> Tensor:
        """Pooled features of a feature map, of shape (B, config.feature_channels)."""
        x = self.head(x)
        pooled = x.amax((-2, -1)) if self.pooling == "max" else x.mean((-2, -1))
        if isinstance(self.pre_logits, nn.Identity):
            return pooled
        return self.pre_logits(pooled[:, :, None, None]).flatten(1)


def hidden_layers(config: MobileNetConfig) -> nn.Sequential:
    """What lies between pooled features and classifier: fully connected layers, or nothing.

    Shape: (B, config.feature_channels) -> (B, the last of config.classifier_hidden_sizes)
    """
    widths = [config.feature_channels, *config.classifier_hidden_sizes]
    act = ACTIVATION_LAYERS[config.classifier_hidden_act]
    return nn.Sequential(*(layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), act())))


def fuse(network: nn.Module) -> None:
    """Fold batch norms and layer scales of all layers into their convolutions.

    Raises:
        ValueError: Adapters of PEFT wrap layers.
    """
    if wrapped := [name for name, module in network.named_modules() if hasattr(module, "base_layer")]:
        raise ValueError(f"adapters must be merged before fuse(), by merge_and_unload(), got one on {wrapped[0]}.")
    for kind in (ConvNormAct, ResidualBlock):  # in this order
        for module in network.modules():
            if isinstance(module, kind):
                module.fuse()
