"""Measure a checkpoint on labeled images."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mobilenet.cards import metric_on_card
from mobilenet.loading import Files, loading, read_config
from mobilenet.pretrained import load_network
from mobilenet.tasks import CLASSIFICATION, DETECTION, SEGMENTATION, task_of

from .data import Reader, Storage, decode, folders_of, listed, load_splits
from .options import BATCH_SIZES
from .task import Split, training_task


# What the option `task` calls them.
NAMES = {CLASSIFICATION: "classification", DETECTION: "detection", SEGMENTATION: "segmentation"}


class Evaluation(NamedTuple):
    """What a checkpoint scores on a split."""

    split: str
    images: int
    metrics: dict[str, float]
    by_class: dict[str, float | None]
    on_card: float | None  # the first of the metrics, as the checkpoint's model card gives it for this split
    task: str = "classification"  # of the checkpoint, as the option `task` calls it


def evaluate_checkpoint(
    model: str,
    dataset: str,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    batch_size: int | None = None,
    skip_unreadable: bool = False,
    external_images: bool = False,
    label_names: str | None = None,
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
        batch_size: Images that the network sees at once; by default as Options has it.
        skip_unreadable: As Options has it.
        external_images: As Options has it.
        label_names: As Options has it.

    Raises:
        ValueError: The labels of checkpoint and dataset differ, or there is no such split.
    """
    with loading(model):
        kind = task_of(read_config(Files(model)))
    task = training_task(NAMES[kind])
    splits = load_splits(dataset, subset, revision, image_column, label_column, task.labels)
    only = next(iter(splits)) if len(splits) == 1 else None
    split = split or next((name for name in ("test", "validation") if name in splits), only)
    if split not in splits:
        raise ValueError(f"split must be one of {', '.join(splits)}, got {split!r}.")
    network, processor = load_network(model, task=kind)
    known: dict[str, int] = {}
    for index, label in network.config.id2label.items():
        known.setdefault(label, index)  # of equal labels, the first
    folders = None if external_images else folders_of(dataset)
    task.labels.find_names(splits, dataset, label_names, folders, default=list(known))
    rows = splits[split]
    task.labels.check_measured(rows)
    names = task.labels.names(rows)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"dataset must have labels that the checkpoint has, {listed(list(known))}; it has {listed(unknown)}."
        )
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(Path(folder))
        images = partial(decode, rows, processor, storage, split, None, skip_unreadable, False, folders, task.labels)
        measured_on = Split(rows, images, Reader(processor, folders), skip_unreadable, [known[name] for name in names])
        measured = task.measure(network, processor, measured_on, batch_size or BATCH_SIZES[NAMES[kind]]).measured
    return Evaluation(
        split,
        measured.images,
        measured.metrics,
        {name: measured.by_class[known[name]] for name in names},
        metric_on_card(model, dataset, split, subset, task.trainer.metric),
        NAMES[kind],
    )
