"""What a MobileNet is for: the table of tasks, and which one a checkpoint was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Task(NamedTuple):
    """What a network does with images."""

    name: str  # of the pipeline of transformers
    kind: str  # of network, in words
    command: str  # of `mobilenet` that takes such a network
    architecture: str  # its class, as config.json names it
    auto_class: str  # that loads it
    outputs: tuple[str, ...]  # of the network, that are used


CLASSIFICATION = Task(
    "image-classification",
    "a classifier",
    "classify",
    "MobileNetForImageClassification",
    "AutoModelForImageClassification",
    ("logits",),
)
DETECTION = Task(
    "object-detection",
    "a detector",
    "detect",
    "MobileNetForObjectDetection",
    "AutoModelForObjectDetection",
    ("scores", "pred_boxes"),
)
SEGMENTATION = Task(
    "image-segmentation",
    "a segmenter",
    "segment",
    "MobileNetForSemanticSegmentation",
    "AutoModelForSemanticSegmentation",
    ("logits",),
)
TASKS = {task.name: task for task in (CLASSIFICATION, DETECTION, SEGMENTATION)}


def task_of(config: Mapping[str, Any]) -> Task:
    """The task of a checkpoint, by what its config.json says; a classifier's where it names no class of these."""
    named = config.get("architectures")
    named = named if isinstance(named, list) else []
    return next((task for task in TASKS.values() if task.architecture in named), CLASSIFICATION)


def check_task(config: Mapping[str, Any], task: Task) -> None:
    """Raise ValueError, with the command that fits, where a checkpoint was made for another task."""
    if (found := task_of(config)) is not task:
        raise ValueError(f"it must be {task.kind}, got {found.kind}: `mobilenet {found.command}` takes it.")
