"""Accuracy on images of known classes, under each way to prepare them that a network may have been trained with."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from mobilenet.find_images import EXTENSIONS
from mobilenet.image_processing_mobilenet import MobileNetImageProcessor
from mobilenet.preprocessing_mobilenet import FITS, RANGES, SQUARE_FITS
from mobilenet.progress import track

from .checkpoint import Checkpoint
from .rename import ConversionError


BATCH = 16
MAX_IMAGES = 500  # more would not tell recipes apart any better


class Measured(NamedTuple):
    """Top-1 accuracy under a recipe."""

    name: str  # as options say it
    accuracy: float
    is_ours: bool  # whether the conversion has chosen it

    COLUMNS = ("recipe", "accuracy", "")

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of the table that is printed."""
        return self.name, f"{100 * self.accuracy:.4g} %", "written" if self.is_ours else ""


def find_labeled(folder: Path, labels: Sequence[str]) -> list[tuple[str, int]]:
    """Images and their classes: from a labels.csv with columns "file" and "label", or by folders named by classes.

    A class goes by its label, one of its synonyms, or its number.

    Returns:
        Paths and indices; nothing where images are not labeled.

    Raises:
        ConversionError: A labels.csv names a class that there is not.
    """
    numbers = {str(index): index for index in range(len(labels))}
    for index, label in reversed(list(enumerate(labels))):
        numbers |= {name.strip().casefold(): index for name in (label, *label.split(","))}
    listing = folder / "labels.csv"
    if listing.is_file():
        return _from_listing(listing, numbers)
    found = [(path, numbers.get(path.parent.name.casefold())) for path in sorted(folder.glob("*/*"))]
    return [(str(p), index) for p, index in found if index is not None and p.suffix.lower() in EXTENSIONS]


def _from_listing(listing: Path, numbers: dict[str, int]) -> list[tuple[str, int]]:
    try:
        with listing.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise ConversionError(f"{listing}: cannot be read: {error}") from error
    if not rows or not {"file", "label"} <= rows[0].keys():
        raise ConversionError(f'{listing}: must have the columns "file" and "label".')
    result = []
    for row in rows:
        index = numbers.get(str(row["label"]).strip().casefold())
        if index is None:
            raise ConversionError(f"{listing}: the network has no class {row['label']!r}; --labels names its classes.")
        result.append((str(listing.parent / str(row["file"])), index))
    return result


@torch.no_grad()
def measure_recipes(model: nn.Module, checkpoint: Checkpoint, images: Sequence[tuple[str, int]]) -> list[Measured]:
    """Top-1 accuracy of a network under each range of pixels and each fit, best first.

    Args:
        model: The converted network.
        checkpoint: Its source, with the preprocessing that was chosen.
        images: Paths and classes.
    """
    step = max(1, len(images) // MAX_IMAGES)
    images = images[::step][:MAX_IMAGES]
    side = checkpoint.processor.crop_size["height"]
    candidates = {"as written": checkpoint.processor}
    for fit, options in ((fit, FITS[fit]) for fit in SQUARE_FITS):
        for name, (mean, std) in RANGES.items():
            # What the file scales by itself is known; how images become squares is not.
            chosen = {"image_mean": checkpoint.processor.image_mean, "image_std": checkpoint.processor.image_std}
            if checkpoint.feed is None and checkpoint.quantization is None:
                chosen = {"image_mean": list(mean), "image_std": list(std)}
            elif name != next(iter(RANGES)):
                continue
            words = f"--fit {fit}" + ("" if checkpoint.feed or checkpoint.quantization else f" --range={name}")
            base = checkpoint.processor.to_dict() | options(side, int(side / 0.875)) | chosen
            base["do_center_crop"] = fit != "stretch"
            if base["do_grayscale"] and len(base["image_mean"]) > 1:
                base |= {key: [sum(base[key]) / len(base[key])] for key in ("image_mean", "image_std")}
            del base["image_processor_type"]
            candidates[words] = MobileNetImageProcessor(**base)
    result = []
    truth = torch.tensor([index for _, index in images])
    for name, processor in track(list(candidates.items()), "measuring accuracy"):
        guesses = [
            model(
                processor([path for path, _ in images[start : start + BATCH]], return_tensors="pt").pixel_values
            ).logits.argmax(-1)
            for start in range(0, len(images), BATCH)
        ]
        result.append(Measured(name, (torch.cat(guesses) == truth).float().mean().item(), name == "as written"))
    return sorted(result, key=lambda each: (-each.accuracy, not each.is_ours))


def advise(measured: Sequence[Measured], count: int) -> str | None:
    """What to change, if anything: two standard errors of the accuracy tell recipes apart."""
    best, ours = measured[0], next(each for each in measured if each.is_ours)
    error = (best.accuracy * (1 - best.accuracy) / count) ** 0.5
    if best.accuracy <= ours.accuracy + max(2 * error, 1 / count):
        return None
    return (
        f"On the labeled images the network is right on {100 * ours.accuracy:.3g} % as written, and on "
        f"{100 * best.accuracy:.3g} % with {best.name}: convert again with that, if the images are like those that "
        "it is for."
    )
