"""Classify images: what they show, best first."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, TextIO

import numpy as np

from .find_images import FoundImage, find
from .inference import ReadImage, check_positive, choose_model, infer, read_image, report
from .loading import Model, load
from .output import Layout, Prediction, Result, writer


def classify_images(
    images: str | os.PathLike | Iterable[str | os.PathLike],
    model: str | os.PathLike | None = None,
    *,
    top_k: int = 5,
    threshold: float | None = None,
    batch_size: int = 8,
    **options: Any,
) -> Iterator[Result]:
    """Classify a folder of images, or any number of files, folders, patterns and URLs, as `mobilenet classify` does.

    Args:
        images: One name or many. Folders are searched with all below them.
        model: Folder or Hub id of a MobileNet; in a clone, by default its own. Code that comes with it does not run.
        top_k: Labels for each image.
        threshold: Probability below which a label is left out.
        batch_size: Images that the network sees at once.
        **options: Of mobilenet.loading.load: revision, engine, fast_decode, device, dtype.

    Returns:
        For each image, in order, while later ones are read: its `name`, and its `predictions` (of `index`, `label` and
        `score`, best first), or the `error` that says why it could not be read.

    Raises:
        ImportError: The engine is not installed.
        ValueError: The model cannot be loaded, or an option is not what it allows.
    """
    check_positive(top_k=top_k, batch_size=batch_size)
    model = choose_model(model)
    names = [images] if isinstance(images, (str, os.PathLike)) else images
    classifier = load(model, **options)
    check_threshold(threshold, classifier)
    return classify(find(map(os.fspath, names)), classifier, top_k, batch_size, threshold)


def check_threshold(threshold: float | None, classifier: Model) -> None:
    """Raise ValueError where labels cannot be left out by their probability."""
    if threshold is not None and not 0 <= threshold <= 1:  # true for NaN too
        raise ValueError(f"threshold must be from 0 to 1, got {threshold!r}.")
    if threshold is not None and not classifier.gives_probabilities:
        raise ValueError(f"threshold must be left out where a model gives no probabilities, got {threshold!r}.")


def classify(
    images: Iterable[FoundImage],
    classifier: Model,
    top_k: int,
    batch_size: int,
    threshold: float | None = None,
) -> Iterator[Result]:
    """Classify images in batches; every image gives one result, in order."""

    def predict(batch: list[ReadImage]) -> list[Result]:
        scores = classifier.network(np.concatenate([image.pixels for image in batch]))
        best = np.argsort(-scores, axis=-1, kind="stable")[:, :top_k]
        return [
            Result(
                image.found.name,
                [
                    Prediction(index, classifier.label(index), float(row[index]))
                    for index in indices
                    if threshold is None or row[index] >= threshold
                ],
                None,
            )
            for image, row, indices in zip(batch, scores, best.tolist(), strict=True)
        ]

    read = partial(read_image, model=classifier)
    return infer(images, read, predict, lambda name, error: Result(name, [], error), batch_size)


def run(
    names: list[str],
    classifier: Model,
    layout: Layout = Layout.TABLE,
    top_k: int = 5,
    batch_size: int = 8,
    threshold: float | None = None,
    file: TextIO | None = None,
) -> int:
    """Classify what names stand for, print results and, on stderr, failures, and count the failures.

    Args:
        names: Of files, folders and so on, as `find` takes them.
        classifier: A model.
        layout: How results are printed.
        top_k: Labels for each image.
        batch_size: Images that the network sees at once.
        threshold: Probability below which a label is left out.
        file: Where results are printed; by default stdout.
    """
    check_threshold(threshold, classifier)
    return report(
        partial(find, names),
        lambda images: classify(images, classifier, top_k, batch_size, threshold),
        lambda out: writer(layout, out, classifier.gives_probabilities),
        file,
        batch_size,
        "-" not in names,
    )
