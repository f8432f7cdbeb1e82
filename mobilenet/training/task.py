"""What differs from task to task: a class for each of them, and a table of these."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from torch import nn
from transformers import PreTrainedModel

from mobilenet.cards import Measured
from mobilenet.image_processing_mobilenet import MobileNetImageProcessor
from mobilenet.loading import Files, loading, read_config
from mobilenet.pretrained import load_network
from mobilenet.require import require
from mobilenet.tasks import CLASSIFICATION, Task, check_task, task_of

from .data import Images, Labels, Reader
from .options import Options
from .trainer import ImageTrainer


class Split(NamedTuple):
    """Images to measure a network on."""

    rows: datasets.Dataset
    images: Callable[[], Images]  # decodes them
    reader: Reader
    skip_unreadable: bool = False
    classes: Sequence[int] | None = None  # by the dataset's class, the network's; by default they are the same
    is_known: bool = False  # whether it is known already what is left out


class Scores(NamedTuple):
    """What a network scores."""

    measured: Measured
    plot: Callable[[Path], None]  # draws it


class TrainingTask(ABC):
    """What a run is for: the labels, the network, the loss and the metrics.

    All else is the same for every task: the order of images, the optimizer, averages, checkpoints, the repository.
    """

    labels: Labels  # how they are read, checked, decoded and split
    trainer: type[ImageTrainer]  # has the loss and the metric that is shown
    packages: tuple[str, ...] = ()  # that it needs beside those of every task

    @abstractmethod
    def build(self, options: Options, names: list[str]) -> tuple[PreTrainedModel, MobileNetImageProcessor]:
        """The network and the processor to start with.

        Raises:
            ValueError: An option is not allowed, or the checkpoint cannot be loaded.
        """

    @abstractmethod
    def augment(self, options: Options, size: tuple[int, int]) -> nn.Module:
        """What varies images and their labels in training."""

    def training_side(self, processor: MobileNetImageProcessor) -> int | None:
        """Side of the square that images to train on are decoded to; by default, what the processor gives."""
        return None

    @abstractmethod
    def trainer_options(self, processor: MobileNetImageProcessor, names: list[str]) -> dict[str, Any]:
        """Further arguments of the trainer: how an evaluation is measured."""

    @abstractmethod
    def measure(
        self, network: PreTrainedModel, processor: MobileNetImageProcessor, split: Split, batch_size: int
    ) -> Scores:
        """Measure a network in float32, with its own processor."""


# Modules and classes, by the values of the option `task`.
_TASKS = {
    "classification": ("classification", "Classification"),
    "detection": ("detection", "Detection"),
    "segmentation": ("segmentation", "Segmentation"),
}


def training_task(name: str) -> TrainingTask:
    """A task by its name in the options.

    Raises:
        ImportError: A package that it needs is missing.
    """
    module, kind = _TASKS[name]
    task = getattr(import_module(f".{module}", __package__), kind)
    if task.packages:
        require(*task.packages, extra="train", purpose=name)
    return task()


def input_size(processor: MobileNetImageProcessor) -> tuple[int, int]:
    """Height and width of what the network sees."""
    size = processor.crop_size if processor.do_center_crop else processor.size
    if "height" not in size:
        raise ValueError(f"the image processor must give one height and width, got size {size} without a center crop.")
    return size["height"], size["width"]


def stretch(processor: MobileNetImageProcessor, size: int) -> None:
    """Let a processor give the whole of every image as a square, whatever its shape."""
    square = {"height": size, "width": size}
    processor.size = processor.crop_size = square
    processor.do_resize, processor.do_center_crop, processor.pad_size = True, False, None
    processor.detail_size = None


def device_of() -> str:
    """Where networks are measured."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def labels_by_index(names: list[str]) -> dict[str, Any]:
    """Fields of a configuration that name its classes."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def load_start(
    options: Options,
    names: list[str],
    task: Task,
    field: str,
    tables: Collection[str],
    default: Callable[[str], str],
    **fields: Any,
) -> tuple[PreTrainedModel, MobileNetImageProcessor, bool]:
    """The checkpoint to start from: of the same task, or a classifier's backbone with a head that starts anew.

    Args:
        options: Of the run.
        names: Of the classes.
        task: What the network is for.
        field: Of the configuration and of the options: names the head.
        tables: The heads that there are.
        default: The head that an architecture gets.
        **fields: Others that a classifier's configuration gets with the head.

    Returns:
        The network, its processor, and whether its head is new.

    Raises:
        ValueError: The checkpoint has a head already where the options name one, or cannot be loaded.
    """
    with loading(options.model):
        content = read_config(Files(options.model))
    chosen = getattr(options, field)
    if chosen is not None and chosen not in tables:
        raise ValueError(f"{field} must be one of {', '.join(tables)}, got {chosen!r}.")
    if task_of(content) is not CLASSIFICATION:
        check_task(content, task)
    if task_of(content) is CLASSIFICATION:
        fields[field] = chosen or default(content.get("architecture", "mobilenet_v2"))
        if options.output_stride:
            fields["output_stride"] = options.output_stride
        return *load_network(options.model, labels=names, task=task, **fields), True
    for name in (field, "output_stride"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name} must be left out where model is {task.kind}, as it has its own.")
    return *load_network(options.model, labels=names, task=task), False
