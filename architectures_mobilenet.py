"""The networks as their papers print them, and what a table comes to: blocks with every number worked out.

A row has the columns of its paper, in the paper's order. Its `blocks` lowers it to records of one kind, from which the
layers are built; nothing else computes channels, strides or dilations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from math import ceil
from operator import mul
from types import MappingProxyType
from typing import Any, NamedTuple


def make_divisible(channels: float, divisor: int) -> int:
    """Round channels to the nearest multiple of a divisor, at least 8 and never more than 10 % down.

    With divisor 1 the whole part is kept, as MobileNetV1 does.

    Source: _make_divisible of slim/nets/mobilenet/conv_blocks.py; depth of slim/nets/mobilenet_v1.py.
    """
    minimum = max(divisor, 8)
    if divisor == 1:
        return max(minimum, int(channels))
    rounded = max(minimum, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


class Width(NamedTuple):
    """How wide a network is; by default, as its table says."""

    multiplier: float = 1.0
    divisor: int = 1

    def scale(self, channels: int) -> int:
        """Channels under the width multiplier."""
        return make_divisible(channels * self.multiplier, self.divisor)


class Block(NamedTuple):
    """A block of a configured network: everything that its layer is built from."""

    kind: str  # of layer: "conv", "separable", "inverted", "fused" or "attention"
    in_channels: int
    hidden_channels: int  # between expansion and projection, or of all queries; 0 where there are none
    out_channels: int
    act: str
    kernel_size: int = 3  # 0 where an inverted residual has no depthwise convolution after the expansion
    stride: int = 1
    dilation: int = 1
    start_kernel_size: int = 0  # of the depthwise convolution before the expansion; 0 where there is none
    squeeze_channels: int = 0  # of squeeze-and-excite, where it is narrow; 0 where there is none
    heads: int = 0  # of attention
    key_stride: int = 1  # size of the map that attends over size of the map that is attended to
    has_norm: bool = True
    has_scale: bool = False  # whether what is added to the input is scaled first, by a weight for each channel
    is_residual: bool = True  # whether the input is added, where it has the shape of the output
    anti_aliasing: str = "none"  # what strides instead of the convolution, after it: "none", "average" or "blur"

    @property
    def weights(self) -> int:
        """Weights of the convolutions that combine channels, but for the few of squeeze-and-excite."""
        kernel = self.kernel_size**2 if self.kind in ("conv", "fused") else 1
        if not self.hidden_channels:
            return self.in_channels * self.out_channels * kernel
        expands = self.hidden_channels != self.in_channels
        return self.hidden_channels * (self.in_channels * kernel * expands + self.out_channels)


def eights(channels: float) -> int:
    """Round channels to a multiple of 8."""
    return make_divisible(channels, 8)


def lowers_to(kind: str, hidden: Callable[[Any, int], int]) -> Callable[[type], type]:
    """Give a class of rows the method `blocks`: first a block that may stride, then others that do not.

    What a row calls as a block does, the block has of it.

    Args:
        kind: Of the blocks.
        hidden: Their hidden channels, by the row and the channels of a block's input.
    """

    def blocks(row: Row, in_channels: int, width: Width, act: str | None) -> Iterator[Block]:
        """Work out the blocks of the row; an activation replaces the row's own."""
        columns = {name: value for name, value in row._asdict().items() if name in Block._fields}
        columns["act"] = act or columns.get("act")
        channels = width.scale(row.channels)
        for _ in range(getattr(row, "repeats", 1)):
            expanded = hidden(row, in_channels)
            squeezed = eights(expanded / 4) if getattr(row, "squeezes", False) else 0
            yield Block(kind, in_channels, expanded, channels, squeeze_channels=squeezed, **columns)
            columns["stride"], in_channels = 1, channels

    def attach(rows: type) -> type:
        rows.blocks = blocks
        return rows

    return attach


# The rows. Channels are those before the width multiplier; the stride is that of the first block, others have 1.


@lowers_to("conv", lambda row, channels: 0)
class Conv(NamedTuple):
    """A convolution, such as the one that comes first."""

    kernel_size: int
    channels: int
    stride: int
    act: str | None = None  # by default, that of the table
    has_norm: bool = True  # without batch norm, it has a bias


@lowers_to("separable", lambda row, channels: channels)
class Separable(NamedTuple):
    """Depthwise separable convolutions: a 3x3 depthwise one, then a 1x1 one."""

    channels: int  # of the 1x1 convolution
    repeats: int
    stride: int


@lowers_to("inverted", lambda row, channels: row.expansion * channels)
class Residual(NamedTuple):
    """Inverted residuals with linear bottlenecks."""

    expansion: int  # t: hidden channels = t * input channels
    channels: int  # c
    repeats: int  # n
    stride: int  # s


@lowers_to("inverted", lambda row, channels: eights(row.expansion * channels))
class Bneck(NamedTuple):
    """An inverted residual that may have squeeze-and-excite, to a quarter of the hidden channels."""

    kernel_size: int
    expansion: float  # exp size / input channels
    channels: int  # #out
    squeezes: bool  # SE
    act: str  # NL
    stride: int  # s


@lowers_to("fused", lambda row, channels: eights(row.expansion * channels))
class Fused(NamedTuple):
    """Fused inverted bottlenecks: one convolution expands and filters."""

    kernel_size: int
    expansion: int  # expanded channels / input channels
    channels: int
    repeats: int
    stride: int


@lowers_to("inverted", lambda row, channels: eights(row.expansion * channels))
class Universal(NamedTuple):
    """A universal inverted bottleneck: either depthwise convolution may be absent."""

    start_kernel_size: int  # DW K1; 0 where it is absent
    kernel_size: int  # DW K2; 0 where it is absent
    expansion: int  # expanded channels / input channels
    channels: int
    stride: int
    is_residual: bool = True
    has_scale: bool = False


@lowers_to("attention", lambda row, channels: row.heads * row.head_channels)
class Attention(NamedTuple):
    """Mobile multi-query attention: each head has queries of its own, and all share keys and values."""

    heads: int
    head_channels: int  # of a query, a key and a value; no width multiplier scales them
    key_stride: int  # of the depthwise convolutions before keys and values; 1 where there are none
    channels: int
    stride: int = 1
    has_scale: bool = True


Row = Conv | Separable | Residual | Bneck | Fused | Universal | Attention


def stage(channels: int, *blocks: tuple[int, int, int] | Attention, stride: int = 2, **columns: bool) -> Iterator[Row]:
    """Rows of equal channels, of which the first may stride: attention, or the first three columns of the others."""
    for block in blocks:
        yield block if isinstance(block, Attention) else Universal(*block, channels, stride, **columns)
        stride = 1


class Architecture(NamedTuple):
    """A network as its paper prints it, with what its reference implementation adds."""

    title: str
    paper: str  # on arXiv
    native: str  # what the names of transformers' own classes begin with, as in MobileNetV1Config
    stem: Conv  # what comes first
    rows: tuple[Row, ...]
    head: Conv | None = None  # what comes last, before the pooling
    pre_logits: Conv | None = None  # what comes after the pooling, before the classifier
    hidden_act: str | None = None  # None where the rows have their own
    channel_divisor: int = 8
    classifier_dropout: float = 0.2
    published: tuple[tuple[tuple[float, ...], tuple[int, ...]], ...] = ()  # widths, where names say them; resolutions

    @property
    def repeats(self) -> bool:
        """Whether every row says how often it is repeated."""
        return all(isinstance(row, Separable | Residual) for row in self.rows)

    def deepen(self, multiplier: float) -> Architecture:
        """Multiply the repeats of all rows but the first and the last, and round them up.

        Source: decode_arch_def with fix_first_last, timm/models/_efficientnet_builder.py.
        """
        if multiplier == 1:
            return self
        first, *inner, last = self.rows
        inner = [row._replace(repeats=ceil(row.repeats * multiplier)) for row in inner]
        return self._replace(rows=(first, *inner, last))

    @property
    def stages(self) -> list[list[Row]]:
        """Rows by stage: a stage is a run of rows that shares a resolution."""
        stages: list[list[Row]] = []
        for row in self.rows:
            if row.stride > 1 or not stages:
                stages.append([])
            stages[-1].append(row)
        return stages

    @property
    def strides(self) -> dict[str, int]:
        """The feature maps by name, "stem", "stage1" and so on: size of the input over size of the map."""
        names = ("stem", *(f"stage{number}" for number in range(1, len(self.stages) + 1)))
        strides = accumulate((stage[0].stride for stage in self.stages), mul, initial=self.stem.stride)
        return dict(zip(names, strides, strict=True))

    def lower(
        self,
        width: Width,
        stem_channels: int,
        act: str | None,
        output_stride: int,
        anti_aliasing: str,
        dilates_strided: bool = False,
    ) -> list[list[Block]]:
        """Work out the blocks of each stage.

        Past the output stride a stride becomes dilation, which starts in the next block: the convolution that would
        have strided still looks at its neighbors.

        Args:
            width: Scales the channels of every row.
            stem_channels: Channels that the first block takes.
            act: Activation of every block; None for that of each row.
            output_stride: Size of the input over size of the last feature map, at most.
            anti_aliasing: What strides in blocks: "none", the convolution; "average" or "blur" after it.
            dilates_strided: Whether dilation starts one convolution earlier: in that which would have strided.
        """
        stages: list[list[Block]] = []
        channels, stride, dilation = stem_channels, self.stem.stride, 1
        for rows in self.stages:
            stages.append([])
            for row in rows:
                for block in row.blocks(channels, width, act):
                    if stride < output_stride:
                        stages[-1].append(block._replace(anti_aliasing=anti_aliasing) if block.stride > 1 else block)
                        stride *= block.stride
                    else:
                        before, dilation = dilation, dilation * block.stride
                        starts = dilation if dilates_strided else before
                        stages[-1].append(block._replace(stride=1, dilation=starts))
                    channels = block.out_channels
        return stages


# MobileNetV1, Table 1, a row for each pair of "Conv dw" and "Conv 1x1". The paper prints stride 2 for the last
# depthwise convolution; its output size and slim/nets/mobilenet_v1.py say 1. Activation, divisor and dropout:
# slim/nets/mobilenet_v1.py, which truncates scaled channels and keeps 0.999. Published: mobilenet_v1.md there.
MOBILENET_V1 = Architecture(
    title="MobileNet V1",
    paper="1704.04861",
    native="MobileNetV1",
    stem=Conv(3, 32, 2),
    rows=(
        #          c  n  s
        Separable(64, 1, 1),
        Separable(128, 1, 2),
        Separable(128, 1, 1),
        Separable(256, 1, 2),
        Separable(256, 1, 1),
        Separable(512, 1, 2),
        Separable(512, 5, 1),
        Separable(1024, 1, 2),
        Separable(1024, 1, 1),
    ),
    hidden_act="relu6",
    channel_divisor=1,
    classifier_dropout=0.001,
    published=(((1.0, 0.75, 0.5, 0.25), (224, 192, 160, 128)),),
)

# MobileNetV2, Table 2. Divisor and dropout, here and below: slim/nets/mobilenet/mobilenet.py, which keeps 0.8.
# Published: README.md there.
MOBILENET_V2 = Architecture(
    title="MobileNet V2",
    paper="1801.04381",
    native="MobileNetV2",
    stem=Conv(3, 32, 2),
    rows=(
        #        t   c  n  s
        Residual(1, 16, 1, 1),
        Residual(6, 24, 2, 2),
        Residual(6, 32, 3, 2),
        Residual(6, 64, 4, 2),
        Residual(6, 96, 3, 1),
        Residual(6, 160, 3, 2),
        Residual(6, 320, 1, 1),
    ),
    head=Conv(1, 1280, 1),
    hidden_act="relu6",
    published=(((1.4, 1.3), (224,)), ((1.0, 0.75, 0.5, 0.35), (224, 192, 160, 128, 96))),
)

# MobileNetV3, Table 1, whose expanded sizes are those of width 1: slim/nets/mobilenet/mobilenet_v3.py multiplies what
# the width makes of the input channels, and rounds to a multiple of 8, squeezed channels too. Published: README.md
# there.
MOBILENET_V3_LARGE = Architecture(
    title="MobileNet V3 large",
    paper="1905.02244",
    native="MobileNetV3",
    stem=Conv(3, 16, 2, "hardswish"),
    rows=(
        #     k  exp / input  #out  SE     NL     s
        Bneck(3, 16 / 16, 16, False, "relu", 1),
        Bneck(3, 64 / 16, 24, False, "relu", 2),
        Bneck(3, 72 / 24, 24, False, "relu", 1),
        Bneck(5, 72 / 24, 40, True, "relu", 2),
        Bneck(5, 120 / 40, 40, True, "relu", 1),
        Bneck(5, 120 / 40, 40, True, "relu", 1),
        Bneck(3, 240 / 40, 80, False, "hardswish", 2),
        Bneck(3, 200 / 80, 80, False, "hardswish", 1),
        Bneck(3, 184 / 80, 80, False, "hardswish", 1),
        Bneck(3, 184 / 80, 80, False, "hardswish", 1),
        Bneck(3, 480 / 80, 112, True, "hardswish", 1),
        Bneck(3, 672 / 112, 112, True, "hardswish", 1),
        Bneck(5, 672 / 112, 160, True, "hardswish", 2),
        Bneck(5, 960 / 160, 160, True, "hardswish", 1),
        Bneck(5, 960 / 160, 160, True, "hardswish", 1),
    ),
    head=Conv(1, 960, 1, "hardswish"),
    pre_logits=Conv(1, 1280, 1, "hardswish", has_norm=False),
    published=(((1.0, 0.75), (224,)),),
)

# MobileNetV3, Table 2. It prints squeeze-and-excite for the head too; slim's file and the published weights have none.
MOBILENET_V3_SMALL = MOBILENET_V3_LARGE._replace(
    title="MobileNet V3 small",
    rows=(
        #     k  exp / input  #out  SE     NL     s
        Bneck(3, 16 / 16, 16, True, "relu", 2),
        Bneck(3, 72 / 16, 24, False, "relu", 2),
        Bneck(3, 88 / 24, 24, False, "relu", 1),
        Bneck(5, 96 / 24, 40, True, "hardswish", 2),
        Bneck(5, 240 / 40, 40, True, "hardswish", 1),
        Bneck(5, 240 / 40, 40, True, "hardswish", 1),
        Bneck(5, 120 / 40, 48, True, "hardswish", 1),
        Bneck(5, 144 / 48, 48, True, "hardswish", 1),
        Bneck(5, 288 / 48, 96, True, "hardswish", 2),
        Bneck(5, 576 / 96, 96, True, "hardswish", 1),
        Bneck(5, 576 / 96, 96, True, "hardswish", 1),
    ),
    head=Conv(1, 576, 1, "hardswish"),
    pre_logits=Conv(1, 1024, 1, "hardswish", has_norm=False),
)


def minimalistic(network: Architecture) -> Architecture:
    """Without squeeze-and-excite, hard swish and 5x5 kernels; README.md of slim/nets/mobilenet."""
    rows = tuple(row._replace(kernel_size=3, squeezes=False) for row in network.rows)
    title, published = f"{network.title} minimalistic", (((1.0,), (224,)),)
    return network._replace(title=title, rows=rows, hidden_act="relu", published=published)


# V3_EDGETPU of slim/nets/mobilenet/mobilenet_v3.py, as in Google's weights. Without expansion, the first row is a 1x1
# convolution without activation; timm's has one.
MOBILENET_EDGETPU = Architecture(
    title="MobileNet EdgeTPU",
    paper="1905.02244",
    native="MobileNetV3",
    stem=Conv(3, 32, 2),
    rows=(
        #     k  e  c  n  s;     k1 k2 e
        Fused(3, 1, 16, 1, 1),
        Fused(3, 8, 32, 1, 2),
        Fused(3, 4, 32, 3, 1),
        Fused(3, 8, 48, 1, 2),
        Fused(3, 4, 48, 3, 1),
        *stage(96, (0, 3, 8), *[(0, 3, 4)] * 3),
        *stage(96, (0, 3, 8), stride=1, is_residual=False),
        *stage(96, *[(0, 3, 4)] * 3, stride=1),
        *stage(160, (0, 5, 8), *[(0, 5, 4)] * 3),
        *stage(192, (0, 3, 8), stride=1),
    ),
    head=Conv(1, 1280, 1),
    hidden_act="relu",
    published=(((1.0,), (224,)),),
)

# MobileNetV4, tables of the appendix, which print expanded channels: here they are over those of the input, as in
# official/vision/modeling/backbones/mobilenet.py of tensorflow/models. As there, and in timm's weights, what the table
# of the small network calls fused is two convolutions that are both activated. Published: timm.
MOBILENET_V4_CONV_SMALL = Architecture(
    title="MobileNet V4 conv small",
    paper="2404.10518",
    native="MobileNetV4",
    stem=Conv(3, 32, 2),
    rows=(
        Conv(3, 32, 2),
        Conv(1, 32, 1),
        Conv(3, 96, 2),
        Conv(1, 64, 1),
        #          k1 k2 e
        *stage(96, (5, 5, 3), *[(0, 3, 2)] * 4, (3, 0, 4)),
        *stage(128, (3, 3, 6), (5, 5, 4), (0, 5, 4), (0, 5, 3), (0, 3, 4), (0, 3, 4)),
    ),
    head=Conv(1, 960, 1),
    pre_logits=Conv(1, 1280, 1),
    hidden_act="relu",
    published=(((), (224, 256)),),
)

MOBILENET_V4_CONV_MEDIUM = MOBILENET_V4_CONV_SMALL._replace(
    title="MobileNet V4 conv medium",
    rows=(
        Fused(3, 4, 48, 1, 2),
        *stage(80, (3, 5, 4), (3, 3, 2)),
        *stage(160, (3, 5, 6), (3, 3, 4), (3, 3, 4), (3, 5, 4), (3, 3, 4), (3, 0, 4), (0, 0, 2), (3, 0, 4)),
        *stage(256, (5, 5, 6), (5, 5, 4), (3, 5, 4), (3, 5, 4), (0, 0, 4), (3, 0, 4), (3, 5, 2), (5, 5, 4)),
        *stage(256, (0, 0, 4), (0, 0, 4), (5, 0, 2), stride=1),
    ),
    published=(((), (224, 256, 384)),),
)

MOBILENET_V4_CONV_LARGE = MOBILENET_V4_CONV_SMALL._replace(
    title="MobileNet V4 conv large",
    stem=Conv(3, 24, 2),
    rows=(
        Fused(3, 4, 48, 1, 2),
        *stage(96, (3, 5, 4), (3, 3, 4)),
        *stage(192, (3, 5, 4), *[(3, 3, 4)] * 3, (3, 5, 4), *[(5, 3, 4)] * 5, (3, 0, 4)),
        *stage(
            512, *[(5, 5, 4)] * 4, (5, 0, 4), (5, 3, 4), (5, 0, 4), (5, 0, 4), (5, 3, 4), (5, 5, 4), *[(5, 0, 4)] * 3
        ),
    ),
    published=(((), (256, 384)),),
)

# In the hybrids, universal inverted bottlenecks have a layer scale, as attention has.
hybrid = partial(stage, has_scale=True)

ATTENTION_160, ATTENTION_256 = Attention(4, 64, 2, 160), Attention(4, 64, 1, 256)
MOBILENET_V4_HYBRID_MEDIUM = MOBILENET_V4_CONV_SMALL._replace(
    title="MobileNet V4 hybrid medium",
    rows=(
        Fused(3, 4, 48, 1, 2),
        *hybrid(80, (3, 5, 4), (3, 3, 2)),
        *hybrid(160, (3, 5, 6), (0, 0, 2), (3, 3, 4), (3, 5, 4)),
        *hybrid(160, *(ATTENTION_160, (3, 3, 4), ATTENTION_160, (3, 0, 4)) * 2, stride=1),
        *hybrid(256, (5, 5, 6), (5, 5, 4), (3, 5, 4), (3, 5, 4), (0, 0, 2), (3, 5, 2), (0, 0, 2), (0, 0, 4)),
        *hybrid(256, ATTENTION_256, (3, 0, 4), ATTENTION_256, (5, 5, 4), stride=1),
        *hybrid(256, *(ATTENTION_256, (5, 0, 4)) * 2, stride=1),
    ),
    published=(((), (224, 256, 384)),),
)

ATTENTION_192, ATTENTION_512 = Attention(8, 48, 2, 192), Attention(8, 64, 1, 512)
MOBILENET_V4_HYBRID_LARGE = MOBILENET_V4_CONV_LARGE._replace(
    title="MobileNet V4 hybrid large",
    rows=(
        Fused(3, 4, 48, 1, 2),
        *hybrid(96, (3, 5, 4), (3, 3, 4)),
        *hybrid(192, (3, 5, 4), *[(3, 3, 4)] * 3, (3, 5, 4), (5, 3, 4), (5, 3, 4)),
        *hybrid(192, *(ATTENTION_192, (5, 3, 4)) * 3, ATTENTION_192, (3, 0, 4), stride=1),
        *hybrid(512, *[(5, 5, 4)] * 4, (5, 0, 4), (5, 3, 4), (5, 0, 4), (5, 0, 4), (5, 3, 4), (5, 5, 4)),
        *hybrid(512, *(ATTENTION_512, (5, 0, 4)) * 4, stride=1),
    ),
    hidden_act="gelu",
    published=(((), (384,)),),
)


def reduced_tail(network: Architecture) -> Architecture:
    """With half the channels from the last stage on, as a detector's backbone.

    Source: MobileNetV3, Section 6.3 (arXiv:1905.02244); V3_LARGE_DETECTION and V3_SMALL_DETECTION of
    slim/nets/mobilenet/mobilenet_v3.py.
    """
    tail = network.stages[-1]
    rows = (*network.rows[: -len(tail)], *(row._replace(channels=row.channels // 2) for row in tail))
    head = network.head._replace(channels=network.head.channels // 2)
    return network._replace(title=f"{network.title} with a reduced tail", rows=rows, head=head, published=())


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "mobilenet_v1": MOBILENET_V1,
        # timm's mobilenetv1_100h: with the last 1x1 convolution that MobileNetV2 has.
        "mobilenet_v1_head": MOBILENET_V1._replace(
            title="MobileNet V1 with a head", head=Conv(1, 1024, 1), channel_divisor=8, published=()
        ),
        "mobilenet_v2": MOBILENET_V2,
        "mobilenet_v3_large": MOBILENET_V3_LARGE,
        "mobilenet_v3_small": MOBILENET_V3_SMALL,
        "mobilenet_v3_large_minimalistic": minimalistic(MOBILENET_V3_LARGE),
        "mobilenet_v3_small_minimalistic": minimalistic(MOBILENET_V3_SMALL),
        "mobilenet_v3_large_reduced_tail": reduced_tail(MOBILENET_V3_LARGE),
        "mobilenet_v3_small_reduced_tail": reduced_tail(MOBILENET_V3_SMALL),
        "mobilenet_edgetpu": MOBILENET_EDGETPU,
        "mobilenet_v4_conv_small": MOBILENET_V4_CONV_SMALL,
        "mobilenet_v4_conv_medium": MOBILENET_V4_CONV_MEDIUM,
        "mobilenet_v4_conv_large": MOBILENET_V4_CONV_LARGE,
        "mobilenet_v4_hybrid_medium": MOBILENET_V4_HYBRID_MEDIUM,
        "mobilenet_v4_hybrid_large": MOBILENET_V4_HYBRID_LARGE,
    }
)
