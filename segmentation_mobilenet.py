"""What makes a segmenter of a backbone: DeepLab V3 and LR-ASPP, in torch alone, and their loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from operator import mul

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_mobilenet import MobileNetConfig
from .layers_mobilenet import Conv2d, ConvNormAct


def taken_channels(config: MobileNetConfig) -> int:
    """Channels of the feature map that a segmenter's head takes."""
    last = config.stages[-1][-1]
    return ((config.head_block if config.segmentation.takes_head else None) or last).out_channels


class AtrousPyramidHead(nn.Module):
    """DeepLab V3: look at a feature map at several scales, and classify each of its pixels.

    Shape: (B, in, h, w) -> (B, num_labels, h, w)
    Source: Chen et al., Section 3.3 (arXiv:1706.05587); the rows of SEGMENTATION_HEADS name the files
    """

    def __init__(self, config: MobileNetConfig) -> None:
        super().__init__()
        table, channels = config.segmentation, taken_channels(config)
        unit = partial(ConvNormAct, config, act="relu", eps=table.norm_eps)
        self.rates = table.rates
        self.branches = nn.ModuleList(
            unit(channels, table.channels, 3, dilation=rate) if rate > 1 else unit(channels, table.channels)
            for rate in table.rates
        )
        self.project = unit(len(table.rates) * table.channels, table.channels)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.refine = unit(table.channels, table.channels, 3) if table.refines else nn.Identity()
        self.classifier = Conv2d(table.channels, config.num_labels, 1)

    def forward(self, x: Tensor, maps: Sequence[Tensor] = ()) -> Tensor:
        """Logits of a feature map; other maps are ignored."""
        pooled = self.branches[self.rates.index(0)].norm
        if x.shape[0] == 1 and isinstance(pooled, nn.BatchNorm2d) and pooled.training:
            raise ValueError(
                "pixel_values must hold at least 2 images in training mode, as pooled features are normalized over "
                "the batch, got 1."
            )
        parts = [
            branch(x if rate else x.mean((-2, -1), keepdim=True))
            for rate, branch in zip(self.rates, self.branches, strict=True)
        ]
        # To resize a single pixel is to repeat it.
        parts = [
            part if rate else part.expand(-1, -1, *x.shape[-2:]) for rate, part in zip(self.rates, parts, strict=True)
        ]
        return self.classifier(self.refine(self.dropout(self.project(torch.cat(parts, 1)))))


class LiteAtrousPyramidHead(nn.Module):
    """LR-ASPP: weigh the channels of a feature map by their means, classify, and add what finer features say.

    Shape: (B, in, h, w) and the feature maps before -> (B, num_labels, H / low_stride, W / low_stride)
    Source: MobileNetV3, Section 6.4 and Figure 10 (arXiv:1905.02244)
    """

    def __init__(self, config: MobileNetConfig) -> None:
        super().__init__()
        table, channels = config.segmentation, taken_channels(config)
        blocks = [config.stem_block, *(block for stage in config.stages for block in stage)]
        strides = accumulate((block.stride for block in blocks), mul)
        self.low = next(index for index, stride in enumerate(strides) if stride >= table.low_stride)
        self.align_corners = table.align_corners
        self.project = ConvNormAct(config, channels, table.channels, act="relu", eps=table.norm_eps)
        self.gate = Conv2d(channels, table.channels, 1, bias=False)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.low_classifier = Conv2d(blocks[self.low].out_channels, config.num_labels, 1)
        self.classifier = Conv2d(table.channels, config.num_labels, 1)

    def forward(self, x: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Logits of a feature map and of those that came before it: of the stem and of every block."""
        low = maps[self.low]
        y = self.project(x) * torch.sigmoid(self.gate(x.mean((-2, -1), keepdim=True)))
        # A 1x1 convolution may come before the resizing too, where it has fewer pixels and leaves fewer channels.
        return self.low_classifier(low) + resize(self.classifier(self.dropout(y)), low.shape[-2:], self.align_corners)


HEADS = {"atrous pyramid": AtrousPyramidHead, "lite atrous pyramid": LiteAtrousPyramidHead}


class Segments:
    """What segments, for a module to inherit that has a backbone with the layers of Features."""

    def add_segmentation_head(self, config: MobileNetConfig) -> None:
        """Add the head that the configuration names.

        Raises:
            ValueError: It names none, or there are no labels.
        """
        if config.num_labels < 1:
            raise ValueError(f"num_labels must be at least 1 for a segmenter, got {config.num_labels}.")
        self.takes_head = config.segmentation.takes_head
        self.segmentation_head = HEADS[config.segmentation.kind](config)

    def segment(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits of the feature maps of the stem and of every block, of shape (B, num_labels, h, w)."""
        x = self.backbone.head(maps[-1]) if self.takes_head else maps[-1]
        return self.segmentation_head(x, maps)


def resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Resize maps of shape (B, C, h, w), bilinearly.

    Args:
        x: Maps.
        size: Height and width.
        align_corners: Whether the centers of corner pixels stay in place, as in TensorFlow's of that name, or edges.
    """
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


def segmentation_loss(logits: Tensor, labels: Tensor, config: MobileNetConfig) -> Tensor:
    """Mean cross entropy over pixels, with logits resized to the labels.

    Args:
        logits: Of shape (B, num_labels, h, w).
        labels: Integers of shape (B, H, W); where they are config.semantic_loss_ignore_index, pixels do not count.
        config: Of the network.

    Raises:
        ValueError: Labels have another shape, or there is one class alone.
    """
    if config.num_labels < 2:
        raise ValueError(f"num_labels must be at least 2 for a loss, got {config.num_labels}.")
    if labels.ndim != 3 or labels.shape[0] != logits.shape[0]:
        raise ValueError(f"labels must have shape ({logits.shape[0]}, H, W), got {tuple(labels.shape)}.")
    logits = resize(logits.float(), labels.shape[-2:], config.segmentation.align_corners)
    ignored = config.semantic_loss_ignore_index
    total = F.cross_entropy(logits, labels.long(), ignore_index=ignored, reduction="sum")
    return total / (labels != ignored).sum().clamp(min=1)  # or it would not be a number where nothing counts


__all__ = [
    "AtrousPyramidHead",
    "LiteAtrousPyramidHead",
    "Segments",
    "resize",
    "segmentation_loss",
]
