"""The networks as their papers print them, and what a table comes to: blocks with every number worked out.

A row has the columns of its paper, in the paper's order. Its `blocks` lowers it to records of one kind, from which the
layers are built; nothing else computes channels, strides or dilations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from operator import mul
from types import MappingProxyType
from typing import NamedTuple


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

    kind: str  # of layer: "conv", "separable" or "inverted"
    in_channels: int
    hidden_channels: int  # that the depthwise convolution filters; 0 where there is none
    out_channels: int
    act: str
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1


class Conv(NamedTuple):
    """A convolution, such as the one that comes first."""

    kernel_size: int
    channels: int  # before the width multiplier
    stride: int

    def blocks(self, in_channels: int, width: Width, act: str) -> Iterator[Block]:
        """The one block of the row."""
        yield Block("conv", in_channels, 0, width.scale(self.channels), act, self.kernel_size, self.stride)


class Separable(NamedTuple):
    """Depthwise separable convolutions: a 3x3 depthwise one, then a 1x1 one."""

    channels: int  # of the 1x1 convolution, before the width multiplier
    repeats: int
    stride: int  # of the first block; the others have stride 1

    def blocks(self, in_channels: int, width: Width, act: str) -> Iterator[Block]:
        """The blocks of the row."""
        channels = width.scale(self.channels)
        for stride in (self.stride, *[1] * (self.repeats - 1)):
            yield Block("separable", in_channels, in_channels, channels, act, stride=stride)
            in_channels = channels


class Residual(NamedTuple):
    """Inverted residuals with linear bottlenecks."""

    expansion: int  # t: hidden channels = t * input channels
    channels: int  # c: output channels, before the width multiplier
    repeats: int  # n: blocks in the row
    stride: int  # s: of the first block; the others have stride 1

    def blocks(self, in_channels: int, width: Width, act: str) -> Iterator[Block]:
        """The blocks of the row."""
        channels = width.scale(self.channels)
        for stride in (self.stride, *[1] * (self.repeats - 1)):
            yield Block("inverted", in_channels, self.expansion * in_channels, channels, act, stride=stride)
            in_channels = channels


Row = Separable | Residual


class Published(NamedTuple):
    """Checkpoints that the authors published: each width at each resolution."""

    widths: tuple[float, ...]
    resolutions: tuple[int, ...]


class Architecture(NamedTuple):
    """A network as its paper prints it, with what its reference implementation adds."""

    title: str
    paper: str  # on arXiv
    native: str  # what the names of transformers' own classes begin with, as in MobileNetV1Config
    stem: Conv  # what comes first
    rows: tuple[Row, ...]
    head: Conv | None  # what comes last, before the pooling
    hidden_act: str
    channel_divisor: int
    classifier_dropout: float
    published: tuple[Published, ...]

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

    def lower(self, width: Width, act: str, output_stride: int) -> list[list[Block]]:
        """Work out the blocks of each stage.

        Past the output stride a stride becomes dilation, which starts in the next block: the convolution that would
        have strided still looks at its neighbors.

        Args:
            width: Scales the channels of every row.
            act: Activation of every block.
            output_stride: Size of the input over size of the last feature map, at most.
        """
        stages: list[list[Block]] = []
        channels, stride, dilation = width.scale(self.stem.channels), self.stem.stride, 1
        for rows in self.stages:
            stages.append([])
            for row in rows:
                for block in row.blocks(channels, width, act):
                    if stride < output_stride:
                        stages[-1].append(block)
                        stride *= block.stride
                    else:
                        stages[-1].append(block._replace(stride=1, dilation=dilation))
                        dilation *= block.stride
                    channels = block.out_channels
        return stages


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        # MobileNetV1, Table 1, a row for each pair of "Conv dw" and "Conv 1x1". The paper prints stride 2 for the last
        # depthwise convolution; its output size and slim/nets/mobilenet_v1.py say 1. Activation, divisor and dropout:
        # slim/nets/mobilenet_v1.py, which truncates scaled channels and keeps 0.999. Published: mobilenet_v1.md there.
        "mobilenet_v1": Architecture(
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
            head=None,
            hidden_act="relu6",
            channel_divisor=1,
            classifier_dropout=0.001,
            published=(Published((1.0, 0.75, 0.5, 0.25), (224, 192, 160, 128)),),
        ),
        # MobileNetV2, Table 2. Divisor and dropout: slim/nets/mobilenet/mobilenet.py, which keeps 0.8. Published:
        # README.md there.
        "mobilenet_v2": Architecture(
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
            channel_divisor=8,
            classifier_dropout=0.2,
            published=(
                Published((1.4, 1.3), (224,)),
                Published((1.0, 0.75, 0.5, 0.35), (224, 192, 160, 128, 96)),
            ),
        ),
    }
)

__all__ = ["ARCHITECTURES", "Architecture", "Block"]
