"""Measure a checkpoint on labeled images."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mobilenet.cards import accuracy_on_card
from mobilenet.image_processing_mobilenet import MobileNetImageProcessor
from mobilenet.modeling_mobilenet import MobileNetForImageClassification
from mobilenet.pretrained import load_network
from mobilenet.progress import progress_bar

from .augment import Normalize
from .data import LABEL, Images, Storage, decode, folders_of, listed, load_splits
from .report import class_accuracies, metrics


@torch.no_grad()
def predict(
    model: MobileNetForImageClassification,
    processor: MobileNetImageProcessor,
    images: Images,
    batch_size: int = 128,
) -> Tensor:
    """Logits of images that the processor has resized and cropped, computed in float32: (N, classes)."""

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    normalize = Normalize(processor).to(device)
    logits = []
    with progress_bar("measuring") as bar:
        for start in bar.track(range(0, len(images), batch_size)):
            pixels = torch.from_numpy(images.pixels[start : start + batch_size])
            logits.append(model(normalize(pixels.to(device))).logits.float().cpu())
    return torch.cat(logits)


class Evaluation(NamedTuple):
    """What a checkpoint scores on a split."""

    split: str
    images: int
    metrics: dict[str, float]
    by_class: dict[str, float]
    on_card: float | None  # the accuracy that the checkpoint's model card gives for this split


def evaluate_checkpoint(
    model: str,
    dataset: str,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    batch_size: int = 128,
    skip_unreadable: bool = False,
    external_images: bool = False,
) -> Evaluation:
    """Measure a checkpoint on labeled images, in float32 and with its own processor.

    Args:
        model: Folder or Hub id.
        dataset: As Options has it.
        split: By default test, or else validation, or else the only one.
        subset: As Options has it.
        revision: Of a dataset of the Hub.
        image_column: As Options has it.
        label_column: As Options has it.
        batch_size: Images that the network sees at once.
        skip_unreadable: As Options has it.
        external_images: As Options has it.

    Raises:
        ValueError: The labels of checkpoint and dataset differ, or there is no such split.
    """
    splits = load_splits(dataset, subset, revision, image_column, label_column)
    split = split or next((name for name in ("test", "validation") if name in splits), next(iter(splits)))
    if split not in splits:
        raise ValueError(f"split must be one of {', '.join(splits)}, got {split!r}.")
    network, processor = load_network(model)
    names = splits[split].features[LABEL].names
    known = {label: index for index, label in network.config.id2label.items()}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"dataset must have labels that the checkpoint has, {listed(list(known))}; it has {listed(unknown)}."
        )
    with tempfile.TemporaryDirectory() as folder:
        folders = None if external_images else folders_of(dataset)
        images = decode(splits[split], processor, Storage(Path(folder)), split, None, skip_unreadable, False, folders)
        logits = predict(network, processor, images, batch_size)
    labels = torch.tensor([known[name] for name in names])[torch.from_numpy(images.labels)]
    accuracies = class_accuracies(logits, labels)
    return Evaluation(
        split,
        len(images),
        metrics(logits, labels),
        {name: accuracies[known[name]] for name in names},
        accuracy_on_card(model, dataset, split, subset),
    )
