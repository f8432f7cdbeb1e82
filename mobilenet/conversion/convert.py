"""A conversion, from the source to a finished repository."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError

from mobilenet.cards import conversion_card
from mobilenet.configuration_mobilenet import MobileNetConfig
from mobilenet.image_processing_mobilenet import MobileNetImageProcessor
from mobilenet.modeling_mobilenet import MobileNetForImageClassification, MobileNetPreTrainedModel
from mobilenet.progress import warn
from mobilenet.repository import staged
from mobilenet.synthetic import draw_images
from mobilenet.tables import table
from mobilenet.tasks import CLASSIFICATION, SEGMENTATION

from . import Checkpoint, ConversionError, Options, read_source
from .accuracy import Measured, advise, find_labeled, measure_recipes
from .labels import DATASETS, known, read_labels
from .parity import BATCH, Comparison, check_parity, columns, find_images
from .rename import network_class, rename
from .unfuse import unfuse_batch_norm


UNFUSED = (
    "The source comes with its batch norms folded. They were put back, so that it can be fine-tuned; what the network "
    "computes is the same."
)
FUSED = "Batch norms are folded into the convolutions: for inference. To fine-tune, convert without `--fuse`."
# Statistics of unfused batch norms settle with fewer images than this.
MAX_STATISTICS = 256


def convert(
    source: str,
    output: str | os.PathLike,
    *,
    revision: str | None = None,
    recipe: str | None = None,
    image_size: int | None = None,
    pixel_range: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    fit: str | None = None,
    labels: str | None = None,
    drop_background: bool = False,
    unfuse: bool = False,
    fuse: bool = False,
    compare: bool = True,
    compare_on: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> list[Comparison]:
    """Convert a checkpoint into a repository for transformers.

    Args:
        source: Path, Hub id, or the name of published weights of torchvision.
        output: Folder to write. It appears complete or not at all.
        revision: Branch, tag or commit of a Hub id.
        recipe: Preprocessing, a key of RECIPES; by default, what the source records, or its publisher's recipe.
        image_size: Side of the images in pixels; by default, what the source records, or 224.
        pixel_range: What the network sees of pixels, a key of RANGES; by default, what the source records, or as the
            recipe says.
        mean: Mean of values in 0 to 1, one or one for each channel; with `std`, instead of a range.
        std: Deviation of values in 0 to 1.
        fit: How images become squares, a key of FITS; by default, as the recipe says.
        labels: File of labels, "imagenet" or "imagenet-background"; by default, the source's own, or those of
            ImageNet for 1000 and 1001 classes.
        drop_background: Whether to leave out class 0, "background", so that ImageNet's classes count from 0.
        unfuse: Whether to put batch norms back into a network that comes folded, so that it can be fine-tuned.
        fuse: Whether to fold batch norms into the convolutions: for inference, from a third of the tensors.
        compare: Whether to load the result back and compare it with the source's own runtime.
        compare_on: Folder of images to compare on, and to take the statistics of unfused batch norms from; by
            default, synthetic ones. Where it has a folder for each class, or a labels.csv with the columns "file" and
            "label", accuracy is measured under each plausible recipe.
        overwrite: Whether to replace a repository that exists.

    Returns:
        What was compared.

    Raises:
        ConversionError: The source cannot be read or converted, or the result is another network.
        ImportError: The reader of the source is not installed.
        ValueError: Both unfuse and fuse are set.
    """
    if unfuse and fuse:
        raise ValueError("unfuse must be left out where fuse is set.")
    with staged(Path(output), overwrite, source) as folder, tempfile.TemporaryDirectory() as scratch:
        images = find_images(Path(compare_on)) if compare_on else []
        options = Options(recipe, image_size, pixel_range, mean, std, fit)
        origin, checkpoint = read_source(source, revision, options)
        choose_labels(checkpoint, labels, drop_background)
        if checkpoint.task is SEGMENTATION:
            checkpoint.processor.align_corners = MobileNetConfig(**checkpoint.config).segmentation.align_corners
        if checkpoint.config["num_channels"] == 1:
            for processor in filter(None, (checkpoint.processor, checkpoint.feed)):
                keep_gray(processor)
        if not images and (compare or unfuse):
            images = draw_images(Path(scratch))
        model = build(checkpoint, origin.given)
        if unfuse:
            starts = range(0, min(len(images), MAX_STATISTICS), BATCH)
            process = checkpoint.processor
            model = unfuse_batch_norm(
                model, (process(images[i : i + BATCH], return_tensors="pt").pixel_values for i in starts)
            )
            checkpoint.notes.append(UNFUSED)
        if drop_background:
            leave_out_background(model, checkpoint.quantization)
        if fuse:
            model.fuse()
            checkpoint.notes.append(FUSED)
        with writing(folder):
            write(folder, model, checkpoint)
        comparisons, caveats = [], ["Not compared: converted with `--no-compare`."]
        if compare:
            classes = slice(1 if drop_background else 0, None)
            comparisons, caveats = check_parity(folder, model, checkpoint, images, classes)
            checkpoint.warnings += caveats
        if compare_on and checkpoint.labels and model.config.num_labels > 1 and checkpoint.task is CLASSIFICATION:
            names = [model.config.id2label[index] for index in range(model.config.num_labels)]
            labeled = find_labeled(Path(compare_on).expanduser(), names)
            if labeled:
                measured = measure_recipes(model, checkpoint, labeled)
                say_accuracy(measured, len(labeled))
                checkpoint.warnings += filter(None, [advise(measured, len(labeled))])
        for warning in checkpoint.warnings:
            warn(warning)
        with writing(folder):
            card = conversion_card(model.config, origin, checkpoint, columns(comparisons), comparisons, caveats)
            card.save(folder / "README.md")
    return comparisons


def say_accuracy(measured: Sequence[Measured], count: int) -> None:
    """Print accuracy by recipe on stderr, where the table of comparisons does not stand."""
    rows = (each.cells for each in measured)
    Console(stderr=True).print(table(Measured.COLUMNS, rows, title=f"top-1 on {count} labeled images"))


def write(folder: Path, model: MobileNetPreTrainedModel, checkpoint: Checkpoint) -> None:
    """Write everything but the card: code, configuration, weights, preprocessing, scales of a quantized source."""
    model.save_pretrained(folder)
    # safetensors lets nobody else read what it writes.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    checkpoint.processor.save_pretrained(folder)
    if checkpoint.quantization:
        (folder / "quantization.json").write_text(json.dumps(checkpoint.quantization), encoding="utf-8")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Tell a full or forbidden disk from other errors."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{folder.name} cannot be written: {error}") from error


def choose_labels(checkpoint: Checkpoint, labels: str | None, drop_background: bool) -> None:
    """Give a checkpoint the labels that a user wants; or its own; or, by their number, those it probably has."""
    count = checkpoint.config["num_labels"]
    if count == 0:
        if labels:
            raise ConversionError("labels are for classifiers: this network ends in features.")
        checkpoint.notes.append("The source has no classifier: what the network gives are features.")
    elif labels:
        checkpoint.labels = read_labels(labels, count, drop_background)
    elif not checkpoint.labels:
        checkpoint.labels = known(count, checkpoint.task)
        guess = (
            f"the labels are those of {DATASETS[checkpoint.task.name]}, since there are {count}"
            if checkpoint.labels
            else "labels are numbers (--labels names them)"
        )
        checkpoint.notes.append(f"The source does not name its classes: {guess}.")


def keep_gray(processor: MobileNetImageProcessor) -> None:
    """Give the network one channel; mean and deviation become those of the three on average."""
    processor.do_grayscale = True
    processor.image_mean = [sum(processor.image_mean) / len(processor.image_mean)]
    processor.image_std = [sum(processor.image_std) / len(processor.image_std)]


def build(checkpoint: Checkpoint, origin: str) -> MobileNetPreTrainedModel:
    """Build the network that a checkpoint describes, with its weights and labels.

    Raises:
        ConversionError: The tensors are not those of such a network.
    """
    try:
        config = MobileNetConfig(**checkpoint.config)
        if checkpoint.labels:
            name_classes(config, checkpoint.labels)
        with torch.device("meta"):  # every weight comes from the checkpoint
            model = network_class(checkpoint.config)(config).eval()
    except ValueError as error:
        raise ConversionError(f"{origin}: {error}") from error
    tensors = rename(checkpoint.tensors, checkpoint.table, model, origin)
    model.load_state_dict(tensors, assign=True)
    return model


def name_classes(config: MobileNetConfig, labels: list[str]) -> None:
    """Set both directions of a configuration's labels; of equal labels, the first keeps the name."""
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in reversed(config.id2label.items())}


@torch.no_grad()
def leave_out_background(model: MobileNetForImageClassification, quantization: dict[str, Any] | None) -> None:
    """Take class 0 out of the classifier, of the labels, and of what is kept of a quantized classifier.

    Raises:
        ConversionError: The network has not 1001 classes.
    """
    config = model.config
    if not isinstance(model, MobileNetForImageClassification) or config.num_labels != 1001:
        got = f"a {type(model).__name__} of {config.num_labels}"
        raise ConversionError(f"--drop-background is for classifiers of 1001 classes, got {got}.")
    old = model.classifier
    name_classes(config, [config.id2label[index] for index in range(1, config.num_labels)])
    model.num_labels = config.num_labels
    model.classifier = torch.nn.Linear(old.in_features, config.num_labels)
    model.classifier.weight.copy_(old.weight[1:])
    model.classifier.bias.copy_(old.bias[1:])
    kept = quantization["weights"]["classifier.weight"] if quantization else {}
    for field, values in kept.items():
        if isinstance(values, list) and len(values) > 1:  # one for each class
            kept[field] = values[1:]
