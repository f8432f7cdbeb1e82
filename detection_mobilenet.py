"""SSD and SSDLite in plain torch: layers, anchors, boxes and the loss.

Boxes are relative to the image, as (cx, cy, w, h) unless they are called corners, which are (x0, y0, x1, y1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_mobilenet import MobileNetConfig
from .cpu_mobilenet import makes_graph
from .heads_mobilenet import DETECTORS, AnchorShape, Detector, HardNegatives
from .layers_mobilenet import Conv2d, ConvNormAct
from .postprocessing_mobilenet import corners, overlap, suppress


ACT = "relu6"  # of all layers of a detector that the backbone has not
MIN_CHANNELS = 16  # of an extra layer, whatever the width
# A box is at most this many times as wide or high as its anchor, as in torchvision/models/detection/_utils.py.
MAX_GROWTH = 1000 / 16
TOLERANCE = 0.01  # by which a box may leave the image, as annotators round


class PredictionConv(Conv2d):
    """The last convolution of a prediction, by torch's arguments: with small initial weights and a bias of its own."""

    def __init__(self, *args: Any, initial_bias: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.initial_bias = initial_bias


class Predictor(nn.Module):
    """What predicts numbers for every anchor from a map; SSDLite's filters depthwise first.

    Shape: (B, in, H, W) -> (B, H * W * anchors, numbers)
    Source: MobileNetV2, Section 6.2 (arXiv:1801.04381)
    """

    def __init__(self, config: MobileNetConfig, in_channels: int, anchors: int, numbers: int, bias: float = 0) -> None:
        super().__init__()
        detector = DETECTORS[config.detector]
        self.numbers = numbers
        kernel = detector.kernel_size
        filters = ConvNormAct(config, in_channels, in_channels, kernel, groups=in_channels, act=ACT)
        self.depthwise = filters if detector.is_lite else nn.Identity()
        kernel = 1 if detector.is_lite else kernel
        self.conv = PredictionConv(in_channels, anchors * numbers, kernel, padding=kernel // 2, initial_bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.depthwise(x))
        # Without a copy of what is in the channels-last format.
        batch, channels, height, width = x.shape
        return x.permute(0, 2, 3, 1).reshape(batch, height * width * (channels // self.numbers), self.numbers)


class ExtraLayer(nn.Module):
    """A map of half the size: reduce 1x1, filter 3x3 with stride 2; SSDLite's filters depthwise and combines 1x1.

    Shape: (B, in, H, W) -> (B, out, ceil(H / 2), ceil(W / 2))
    Source: multi_resolution_feature_maps of object_detection/models/feature_map_generators.py
    """

    def __init__(self, config: MobileNetConfig, in_channels: int, reduced: int, channels: int) -> None:
        super().__init__()
        self.reduce = ConvNormAct(config, in_channels, reduced, act=ACT)
        if DETECTORS[config.detector].is_lite:
            self.depthwise = ConvNormAct(config, reduced, reduced, 3, 2, groups=reduced, act=ACT)
            self.expand = ConvNormAct(config, reduced, channels, act=ACT)
        else:
            self.depthwise = nn.Identity()
            self.expand = ConvNormAct(config, reduced, channels, 3, 2, act=ACT)

    def forward(self, x: Tensor) -> Tensor:
        is_single = x.shape[0] == 1 and max(x.shape[-2:]) <= 2  # what comes out is one pixel
        if is_single and isinstance(self.expand.norm, nn.BatchNorm2d) and self.expand.norm.training:
            raise ValueError(
                "pixel_values must hold at least 2 images in training mode, as a map of one pixel is normalized over "
                "the batch, got 1."
            )
        return self.expand(self.depthwise(self.reduce(x)))


class DetectionLayers:
    """What detects objects in the maps of a backbone, for a module to inherit that has one with layers of Features."""

    def add_detection_layers(self, config: MobileNetConfig) -> None:
        """Add the layers that follow the backbone to this module.

        Raises:
            ValueError: The backbone has no such maps.
        """
        self.detector, self.anchor_step = DETECTORS[config.detector], config.anchor_step
        self.classes = config.num_labels + (self.detector.background is not None)
        self.extras = nn.ModuleList(ExtraLayer(config, *sizes) for sizes in extra_channels(config))
        self.box_predictors = nn.ModuleList()
        self.class_predictors = nn.ModuleList()
        for channels, shapes in zip(map_channels(config), anchor_shapes(self.detector), strict=True):
            self.box_predictors.append(Predictor(config, channels, len(shapes), 4))
            bias = self.detector.class_bias
            self.class_predictors.append(Predictor(config, channels, len(shapes), self.classes, bias))

    def endpoints(self, x: Tensor, hidden_states: list[Tensor] | None = None) -> list[Tensor]:
        """The maps of the backbone to predict from, by Detector.endpoints.

        Args:
            x: Images, of shape (B, num_channels, H, W).
            hidden_states: Collects the feature maps of the stem and of every block.
        """
        collect = (lambda x: None) if hidden_states is None else hidden_states.append
        names, backbone, maps = self.detector.endpoints, self.backbone, {}
        x = backbone.stem(x)
        collect(x)
        for number, stage in enumerate(backbone.stages, start=1):
            maps["previous"] = x
            for index, block in enumerate(stage):
                if "expansion" in names and number == len(backbone.stages) and index == 0:
                    x, maps["expansion"] = block(x, with_expansion=True)
                else:
                    x = block(x)
                collect(x)
        maps["last"] = x
        if "head" in names:
            maps["head"] = backbone.head(x)
        return [maps[name] for name in names]

    def predict(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Predict from the maps of the backbone.

        Args:
            maps: By Detector.endpoints, of shape (B, C, H, W).

        Returns:
            Logits of shape (B, anchors, classes), the background first where there is one; codes of boxes, of shape
            (B, anchors, 4); the anchors, of shape (anchors, 4).
        """
        maps = list(maps)
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        logits = torch.cat([predict(x) for predict, x in zip(self.class_predictors, maps, strict=True)], 1)
        codes = torch.cat([predict(x) for predict, x in zip(self.box_predictors, maps, strict=True)], 1)
        sizes = tuple((x.shape[-2], x.shape[-1]) for x in maps)
        return logits, codes, find_anchors(self.detector, sizes, self.anchor_step, codes.device)

    def boxes_and_scores(self, logits: Tensor, codes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """What the predictions mean, in float32.

        Returns:
            Boxes of shape (B, anchors, 4), and probabilities of shape (B, anchors, num_labels), without background.
        """
        logits = logits.float()
        scores = logits.softmax(-1) if self.detector.score == "softmax" else logits.sigmoid()
        return decode(codes, anchors, self.detector), scores[..., self.detector.background is not None :]


def map_channels(config: MobileNetConfig) -> list[int]:
    """Channels of the maps that a detector predicts from.

    Raises:
        ValueError: The backbone has no such maps.
    """
    *_, before, last = config.stages
    if "expansion" in DETECTORS[config.detector].endpoints and last[0].kind != "inverted":
        others = [name for name, detector in DETECTORS.items() if "expansion" not in detector.endpoints]
        raise ValueError(f"detector must be {' or '.join(others)} for {config.architecture}, got {config.detector!r}.")
    of_backbone = {
        "previous": before[-1].out_channels,
        "expansion": last[0].hidden_channels,
        "last": last[-1].out_channels,
        "head": (config.head_block or last[-1]).out_channels,
    }
    found = [of_backbone[name] for name in DETECTORS[config.detector].endpoints]
    return found + [channels for _, _, channels in extra_channels(config)]


def extra_channels(config: MobileNetConfig) -> list[tuple[int, int, int]]:
    """Channels of each extra layer: of its input, between its convolutions, of its output."""
    detector, result = DETECTORS[config.detector], []
    channels = (config.head_block or config.stages[-1][-1]).out_channels
    if detector.endpoints[-1] != "head":
        channels = config.stages[-1][-1].out_channels
    for printed in detector.extra_channels:
        reduced, wide = (max(MIN_CHANNELS, int(c * config.width_multiplier)) for c in (printed / 2, printed))
        result.append((channels, reduced, wide))
        channels = wide
    return result


def head_weights(config: MobileNetConfig) -> int:
    """Weights of the extra layers and of the predictions, but for those of depthwise convolutions."""
    detector = DETECTORS[config.detector]
    numbers = 4 + config.num_labels + (detector.background is not None)
    area, extra_area = (1, 1) if detector.is_lite else (detector.kernel_size**2, 9)
    pairs = zip(map_channels(config), anchor_shapes(detector), strict=True)
    predictors = sum(channels * len(shapes) * numbers * area for channels, shapes in pairs)
    extras = sum(reduced * (before + after * extra_area) for before, reduced, after in extra_channels(config))
    return predictors + extras


def anchor_shapes(detector: Detector) -> list[tuple[AnchorShape, ...]]:
    """The anchors of a cell of each map."""
    others = len(detector.endpoints) + len(detector.extra_channels) - 1
    return [detector.first_anchors, *[detector.anchors] * others]


def generate_anchors(
    detector: Detector, sizes: Sequence[tuple[int, int]], step: float = 0.0, device: Any = "cpu"
) -> Tensor:
    """The anchors of all cells: map by map, row by row, cell by cell, in the order of their shapes.

    Args:
        detector: Says which.
        sizes: Height and width of each map.
        step: What they are rounded to multiples of; 0 for nothing.
        device: Where to make them.

    Returns:
        float32 of shape (anchors, 4).

    Source: object_detection/anchor_generators/multiple_grid_anchor_generator.py;
        torchvision/models/detection/anchor_utils.py
    """
    first, last = detector.scales
    count = len(sizes)
    scales = [first + (last - first) * index / (count - 1) for index in range(count)] + [1.0]
    result = []
    for index, ((height, width), shapes) in enumerate(zip(sizes, anchor_shapes(detector), strict=True)):
        named = {"own": scales[index], "between": math.sqrt(scales[index] * scales[index + 1])}
        forms = []
        for shape in shapes:
            scale, root = named.get(shape.scale, shape.scale), math.sqrt(shape.ratio)
            forms.append((scale * root, scale / root))
        forms = torch.tensor(forms, dtype=torch.float32, device=device)
        if detector.clips_anchors:
            forms = forms.clamp(max=1)
        x = ((torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width).expand(height, -1)
        y = ((torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height)[:, None].expand(-1, width)
        centers = torch.stack((x, y), -1).reshape(-1, 1, 2).expand(-1, len(shapes), -1)
        result.append(torch.cat((centers, forms.expand(height * width, -1, -1)), -1).reshape(-1, 4))
    result = torch.cat(result)
    return (result / step).round() * step if step else result


@lru_cache(maxsize=16)  # of detectors and sizes of images, which are few
def _known_anchors(detector: Detector, sizes: tuple[tuple[int, int], ...], step: float) -> np.ndarray:
    return generate_anchors(detector, sizes, step).numpy()


def find_anchors(detector: Detector, sizes: tuple[tuple[int, int], ...], step: float, device: torch.device) -> Tensor:
    """What `generate_anchors` gives, which is remembered where torch records no calls."""
    if makes_graph():
        return generate_anchors(detector, sizes, step, device)
    return torch.from_numpy(_known_anchors(detector, sizes, step).copy()).to(device)


def decode(codes: Tensor, anchors: Tensor, detector: Detector) -> Tensor:
    """Boxes from what is predicted of them, relative to their anchors, in float32.

    Shape: (..., anchors, 4), (anchors, 4) -> (..., anchors, 4)
    Source: object_detection/box_coders/faster_rcnn_box_coder.py
    """
    of_centers, of_sizes = detector.box_scales
    centers, sizes = codes.float().split(2, -1)
    anchor_centers, anchor_sizes = anchors.split(2, -1)
    centers = centers / of_centers * anchor_sizes + anchor_centers
    sizes = (sizes / of_sizes).clamp(max=math.log(MAX_GROWTH)).exp() * anchor_sizes
    return torch.cat((centers, sizes), -1)


def encode(boxes: Tensor, anchors: Tensor, detector: Detector) -> Tensor:
    """What `decode` makes boxes of.

    Shape: (n, 4), (n, 4) -> (n, 4)
    """
    of_centers, of_sizes = detector.box_scales
    centers, sizes = boxes.split(2, -1)
    anchor_centers, anchor_sizes = anchors.split(2, -1)
    centers = (centers - anchor_centers) / anchor_sizes * of_centers
    return torch.cat((centers, (sizes / anchor_sizes).log() * of_sizes), -1)


def match_anchors(boxes: Tensor, anchors: Tensor, threshold: float) -> Tensor:
    """Which box each anchor stands for: the one that it overlaps most, if by a threshold at least.

    The anchor that overlaps a box most stands for it, whatever the overlap; of several such boxes, for the first.

    Args:
        boxes: Of shape (n, 4).
        anchors: Of shape (anchors, 4).
        threshold: Intersection over union.

    Returns:
        Indices of boxes, of shape (anchors,); -1 where there is none.

    Source: SSD, Section 2.2 (arXiv:1512.02325); object_detection/matchers/argmax_matcher.py
    """
    if not len(boxes):
        return torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
    overlaps = overlap(corners(boxes)[:, None], corners(anchors)[None])
    best, matched = overlaps.max(0)
    matched = torch.where(best >= threshold, matched, -1)
    is_best = F.one_hot(overlaps.argmax(1), len(anchors))
    return torch.where(is_best.any(0), is_best.argmax(0), matched)


def detection_loss(
    detector: Detector, logits: Tensor, codes: Tensor, anchors: Tensor, labels: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The loss of classes and that of boxes, each a sum over the batch by the number of matched anchors.

    Args:
        detector: Says which loss.
        logits: Of shape (B, anchors, classes).
        codes: Of shape (B, anchors, 4).
        anchors: Of shape (anchors, 4).
        labels: Of each image, as check_labels gives them.

    Source: SSD, Equations 1 to 3 (arXiv:1512.02325); object_detection/core/losses.py;
        torchvision/models/detection/ssd.py
    """
    logits, codes = logits.float(), codes.float()
    has_background = detector.background is not None
    classes, boxes = [], []
    for label in labels:
        matched = match_anchors(label["boxes"], anchors, detector.matched_iou)
        # What comes last stands for no object: index -1.
        padded = F.pad(label["class_labels"] + 1, (0, 1))
        classes.append(padded[matched])
        boxes.append(F.pad(label["boxes"], (0, 0, 0, 1), value=1.0)[matched])
    classes, boxes = torch.stack(classes), torch.stack(boxes)
    positive = classes > 0
    count = positive.sum().clamp(min=1)
    of_boxes = F.smooth_l1_loss(codes, encode(boxes, anchors, detector), reduction="none")
    of_boxes = of_boxes.mean(-1) if detector.averages_code else of_boxes.sum(-1)
    if detector.score == "softmax":
        of_classes = F.cross_entropy(logits.transpose(1, 2), classes, reduction="none")
    else:
        wide = F.one_hot(classes, logits.shape[-1] + (not has_background)).to(logits.dtype)
        if detector.background == "zero":
            wide = torch.cat((torch.zeros_like(wide[..., :1]), wide[..., 1:]), -1)
        of_classes = _sigmoid_loss(detector, logits, wide if has_background else wide[..., 1:]).sum(-1)
    if isinstance(detector.loss, HardNegatives):
        of_classes = of_classes * (positive | hard_negatives(of_classes, positive, detector.loss))
    return {
        "loss_classification": of_classes.sum() / count,
        "loss_localization": torch.where(positive, of_boxes, 0).sum() / count,
    }


def _sigmoid_loss(detector: Detector, logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of every class; where the loss is focal, scaled by how wrong the prediction is."""
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if isinstance(detector.loss, HardNegatives):
        return loss
    alpha, gamma = detector.loss
    wrong = torch.where(targets > 0, 1 - logits.sigmoid(), logits.sigmoid())
    return torch.where(targets > 0, alpha, 1 - alpha) * wrong**gamma * loss


@torch.no_grad()
def hard_negatives(loss: Tensor, positive: Tensor, rule: HardNegatives) -> Tensor:
    """Which anchors without an object count: of each image, those of the largest loss.

    Shape: (B, anchors), (B, anchors) -> (B, anchors)
    Source: SSD, Section 2.2 (arXiv:1512.02325)
    """
    wanted = (rule.ratio * positive.sum(1, keepdim=True)).clamp(min=rule.minimum)
    order = loss.masked_fill(positive, -math.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(1) < wanted) & ~positive


def check_labels(
    labels: Any, batch: int, num_labels: int, device: torch.device | str = "cpu"
) -> list[dict[str, Tensor]]:
    """Labels of a batch on a device, boxes as float32.

    Args:
        labels: For each image a mapping of `class_labels`, integers of shape (n,), and `boxes`, of shape (n, 4) and
            relative to the image; n may be 0.
        batch: How many images there are.
        num_labels: How many classes there are.
        device: Where to put them.

    Raises:
        ValueError: They are something else, or a box has no area or does not lie within the image.
    """
    if not isinstance(labels, Sequence) or isinstance(labels, str) or len(labels) != batch:
        got = f"{len(labels)} of them" if isinstance(labels, Sequence) else type(labels).__name__
        raise ValueError(f"labels must be a list of {batch} dicts, one for each image, got {got}.")
    return [_check_label(f"labels[{index}]", label, num_labels, device) for index, label in enumerate(labels)]


def _check_label(name: str, label: Any, num_labels: int, device: torch.device | str) -> dict[str, Tensor]:
    if not isinstance(label, Mapping) or not {"class_labels", "boxes"} <= set(label):
        got = f"keys {', '.join(map(str, label))}" if isinstance(label, Mapping) else type(label).__name__
        raise ValueError(f"{name} must be a dict with class_labels and boxes, got {got}.")
    try:
        classes, boxes = (torch.as_tensor(label[key], device=device) for key in ("class_labels", "boxes"))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must hold tensors: {error}") from error
    if not classes.numel() and not boxes.numel():
        classes, boxes = classes.reshape(0).long(), boxes.reshape(0, 4)
    if classes.ndim != 1 or boxes.shape != (len(classes), 4):
        shapes = f"{tuple(classes.shape)} and {tuple(boxes.shape)}"
        raise ValueError(f"{name} must have class_labels of shape (n,) and boxes of shape (n, 4), got {shapes}.")
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise ValueError(f"{name} must have integers as class_labels, got {classes.dtype}.")
    classes, boxes = classes.long(), boxes.float()
    wrong = (classes < 0) | (classes >= num_labels)
    if wrong.any():
        raise ValueError(f"{name} must have class_labels from 0 to {num_labels - 1}, got {classes[wrong][0]}.")
    edges = corners(boxes)
    inside = ((edges >= -TOLERANCE) & (edges <= 1 + TOLERANCE)).all(-1)  # false for NaN too
    wrong = ~(inside & (boxes[:, 2:] > 0).all(-1))
    if wrong.any():
        got = [round(number, 4) for number in boxes[wrong][0].tolist()]
        raise ValueError(
            f"{name} must have boxes (cx, cy, w, h) relative to the image, with an area and within the image, "
            f"got {got}."
        )
    return {"class_labels": classes, "boxes": boxes}


__all__ = [
    "DetectionLayers",
    "check_labels",
    "detection_loss",
    "generate_anchors",
    "head_weights",
    "suppress",
]
