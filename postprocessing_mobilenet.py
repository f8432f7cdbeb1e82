"""From what a network gives to what it found: boxes that do not overlap, and label maps that lie over images.

It needs torch alone: transformers 4.57 copies no more of a repository's code than what the file of the image processor
imports, or that of the networks.
"""

from __future__ import annotations

import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor


# Boxes are relative to the image, as (cx, cy, w, h) unless they are called corners, which are (x0, y0, x1, y1).


def corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) to (x0, y0, x1, y1), in the last axis."""
    centers, sizes = boxes.split(2, -1)
    half = sizes * 0.5
    return torch.cat((centers - half, centers + half), -1)


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of corners; 0 where one has no area.

    Shape: (..., 4), (..., 4), which broadcast -> (...)
    """
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (first, second)]
    union = areas[0] + areas[1] - shared
    return torch.where(shared > 0, shared / union, 0)


@torch.no_grad()
def suppress(
    scores: Tensor,
    boxes: Tensor,
    threshold: float = 0.0,
    *,
    nms_iou_threshold: float = 0.6,
    max_detections: int = 100,
    max_detections_per_class: int = 100,
    max_candidates_per_class: int | None = None,
    max_classes_per_box: int | None = None,
    score_threshold: float = 0.0,
    clip_boxes: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """What is detected in an image: boxes of high scores, without those that overlap a better one.

    Args:
        scores: Of shape (anchors, num_labels).
        boxes: Of shape (anchors, 4).
        threshold: Scores count above this.
        nms_iou_threshold: A box is suppressed whose intersection over union with a better one is more.
        max_detections: How many there may be; with max_classes_per_box, of how many boxes.
        max_detections_per_class: How many of a class there may be.
        max_candidates_per_class: How many of each class compete; None for all.
        max_classes_per_box: By default, each class is treated by itself. With a number, boxes of different classes
            suppress each other by their best scores, and a box is detected once for each of so many classes.
        score_threshold: Scores count above this too.
        clip_boxes: Whether to clip boxes to the image first.

    Returns:
        Scores of shape (n,), falling, or with max_classes_per_box falling for each box, and by their best from box to
        box; of equal ones the lower label, then the earlier anchor comes first. Labels of shape (n,). Corners of
        shape (n, 4).

    Source: tensorflow/lite/kernels/detection_postprocess.cc; torchvision/models/detection/ssd.py
    """
    threshold = max(threshold, score_threshold)
    scores, edges = scores.float(), corners(boxes.float())
    if clip_boxes:
        edges = edges.clamp(0, 1)
    if max_classes_per_box is None:
        found, labels, rows = _select(
            scores,
            edges,
            threshold,
            nms_iou_threshold,
            max_detections,
            max_detections_per_class,
            max_candidates_per_class,
        )
        return found, labels, edges[rows]
    best = scores.max(1, keepdim=True).values
    _, _, rows = _select(
        best, edges, threshold, nms_iou_threshold, max_detections, max_detections, max_candidates_per_class
    )
    found, labels = scores[rows].sort(dim=1, descending=True, stable=True)
    found, labels = found[:, :max_classes_per_box], labels[:, :max_classes_per_box]
    kept = found > threshold
    return found[kept], labels[kept], edges[rows][:, None].expand(-1, found.shape[1], -1)[kept]


# Pairs of boxes whose overlap is computed at a time: 250 MB.
MAX_PAIRS = 1 << 22


def _select(
    scores: Tensor,
    edges: Tensor,
    threshold: float,
    nms_iou_threshold: float,
    total: int,
    per_class: int,
    candidates: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, classes and boxes that remain, the best first: greedily, in all classes at a time."""
    classes, rows = ((scores > threshold).any(axis).nonzero()[:, 0] for axis in (0, 1))
    alive = scores[rows][:, classes].T.clone()  # (classes, boxes)
    edges = edges[rows]
    alive[~(alive > threshold)] = -math.inf
    if candidates is not None and candidates < len(rows):
        rank = alive.argsort(dim=1, descending=True, stable=True).argsort(1)
        alive[rank >= candidates] = -math.inf
    picked: list[tuple[Tensor, Tensor, Tensor]] = []
    best = scores.new_empty(0)
    for _ in range(min(per_class, total, len(rows))):
        values, index = alive.max(1)  # of equal scores, the first
        open_classes = (values > -math.inf).nonzero()[:, 0]
        if not len(open_classes):
            break
        values, index = values[open_classes], index[open_classes]
        picked.append((values, classes[open_classes], index))
        best = torch.cat((best, values))
        best = best.topk(min(total, len(best))).values
        alive, classes = alive[open_classes], classes[open_classes]
        step = max(1, MAX_PAIRS // len(rows))
        for start in range(0, len(alive), step):
            some = slice(start, start + step)
            alive[some][overlap(edges[index[some], None], edges[None]) > nms_iou_threshold] = -math.inf
        alive.scatter_(1, index[:, None], -math.inf)
        if len(best) == total:  # what is less can no longer be among the best
            alive[alive < best[-1]] = -math.inf
    if not picked:
        return scores.new_empty(0), classes.new_empty(0), rows.new_empty(0)
    values, labels, index = (torch.cat(parts) for parts in zip(*picked, strict=True))
    order = (labels * len(rows) + index).argsort()
    order = order[values[order].argsort(dim=0, descending=True, stable=True)][:total]
    return values[order], labels[order], rows[index[order]]


# Logits that are resized at a time, in all: 64 MB.
MAX_LOGITS = 1 << 24


# Pixels of the image, of the resized image, where its first is among what the network saw, and how many that were.
Axis = tuple[int, int, int, int]


def label_map(
    logits: Tensor,
    axes: tuple[Axis, Axis],
    align_corners: bool = False,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """The class of each pixel of an image: of the largest logit, resized to where the network saw that pixel.

    What a crop left out gets the class of the nearest pixel that it did not. Memory holds logits of a part at a time.

    Args:
        logits: Of one image, of shape (num_labels, h, w).
        axes: Where the image was in what the network saw, as `place` of preprocessing_mobilenet.py tells.
        align_corners: Whether logits are resized with the centers of corner pixels in place.
        dtype: Of the classes: where they are few, one byte a pixel is enough.

    Returns:
        Classes, of the image's height and width.
    """
    height, width = (image for image, *_ in axes)
    logits = logits.float()
    kept = _contenders(logits)
    logits, kept = logits[kept], kept.to(dtype)
    result = torch.empty(height, width, dtype=dtype, device=logits.device)
    # Of a row of an image, and of the rows of logits along it.
    across = max(1, min(width, MAX_LOGITS // len(logits)))
    down = max(1, MAX_LOGITS // (len(logits) * max(across, logits.shape[-1]) * -(-logits.shape[-2] // height)))
    for top, left in product(range(0, height, down), range(0, width, across)):
        part = slice(top, top + down), slice(left, left + across)
        # max takes a tenth of the time of argmax.
        result[part] = kept[resize_to_image(logits, axes, align_corners, part).max(0).indices]
    return result


def resize_to_image(
    logits: Tensor,
    axes: tuple[Axis, Axis],
    align_corners: bool = False,
    part: tuple[slice, slice] = (slice(None), slice(None)),
) -> Tensor:
    """Logits of each pixel of an image, or of a part of its rows and columns, of shape (num_labels, height, width).

    Other arguments are those of `label_map`.
    """
    (tops, bottoms, down), (lefts, rights, across) = (
        _neighbors(axis, n, align_corners, logits.device, some)
        for axis, n, some in zip(axes, logits.shape[-2:], part, strict=True)
    )
    # Along the rows first, of which there are fewer than pixels: what then remains lies side by side.
    first, last = tops.min(), bottoms.max()
    rows = logits.float()[:, first : last + 1]
    rows = torch.lerp(rows[..., lefts], rows[..., rights], across)
    return torch.lerp(rows[:, tops - first], rows[:, bottoms - first], down[:, None])


def _contenders(logits: Tensor) -> Tensor:
    """The classes that can be the largest somewhere, once logits of shape (num_labels, h, w) are resized: often few.

    Between four pixels, resized logits are means of theirs: what is less than another in all of them is less there.
    """
    padded = F.pad(logits[None], (0, 1, 0, 1), mode="replicate")[0]
    edges = (padded[:, :-1, :-1], padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:])
    best = sum(edges).argmax(0, keepdim=True)
    lead = torch.stack([corner - corner.gather(0, best) for corner in edges]).amax((0, 2, 3))
    rounding = 1e-5 * logits.abs().amax()
    return (~(lead < -rounding)).nonzero()[:, 0]  # with NaN, every class


def _neighbors(
    axis: Axis, count: int, align_corners: bool, device: torch.device, part: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """For pixels along an axis: the two of so many logits around each, and how far it is from the first of them."""
    image, resized, offset, network = axis
    seen = (torch.arange(*part.indices(image), dtype=torch.float64) + 0.5) * resized / image - 0.5 + offset
    seen = seen.clamp(max(offset, 0), min(offset + resized, network) - 1)
    aligned, centered = seen * (count - 1) / max(network - 1, 1), (seen + 0.5) * count / network - 0.5
    places = (aligned if align_corners else centered).clamp(0, count - 1)
    first = places.long()
    return first.to(device), (first + 1).clamp(max=count - 1).to(device), (places - first).float().to(device)


__all__ = ["corners", "label_map", "overlap", "resize_to_image", "suppress"]
