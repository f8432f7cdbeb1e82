"""Parity of a converted detector with its source: scores and boxes of every anchor, and what is detected."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from mobilenet.detection_mobilenet import overlap
from mobilenet.image_processing_mobilenet import MobileNetImageProcessor

from .checkpoint import DetectionResults


# A detection counts that is surer than this.
THRESHOLD = 0.5
# Two detections are the same whose class is, whose boxes overlap by this at least, and whose scores differ by no more.
SAME_IOU, SAME_SCORE = 0.9, 0.06

Detections = list[dict[str, Tensor]]  # of each image, as post_process_object_detection gives them


def run(model: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and boxes of every anchor."""
    outputs = model(pixel_values)
    return outputs.scores, outputs.pred_boxes


def detect(processor: MobileNetImageProcessor, scores: Tensor, boxes: Tensor) -> Detections:
    """What a processor detects in scores and boxes, with more than the scores that count."""
    outputs = SimpleNamespace(scores=scores, pred_boxes=boxes)
    return processor.post_process_object_detection(outputs, THRESHOLD - SAME_SCORE)


def found_again(first: Detections, second: Detections) -> tuple[int, int]:
    """How many detections count in first, and how many of those are in second too."""
    count = same = 0
    for ours, theirs in zip(first, second, strict=True):
        for score, label, box in zip(ours["scores"], ours["labels"], ours["boxes"], strict=True):
            if score > THRESHOLD:
                count += 1
                close = (theirs["scores"] - score).abs() <= SAME_SCORE
                alike = (theirs["labels"] == label) & (overlap(box[None], theirs["boxes"]) >= SAME_IOU)
                same += bool((close & alike).any())
    return count, same


def agreement(first: Detections, second: Detections) -> float:
    """Share of detections that the other has too, both ways; 1 where there are none."""
    counts, same = zip(found_again(first, second), found_again(second, first), strict=True)
    return sum(same) / sum(counts) if sum(counts) else 1.0


def joined(processor: MobileNetImageProcessor, found: Sequence[DetectionResults]) -> tuple[Tensor, Tensor, Detections]:
    """What a source's runtime makes of batches; what the processor detects in it, where the source detects nothing."""
    scores, boxes = torch.cat([each.scores for each in found]), torch.cat([each.boxes for each in found])
    if any(each.detections is None for each in found):
        return scores, boxes, detect(processor, scores, boxes)
    return scores, boxes, [detections for each in found for detections in each.detections]
