"""Classify images by the thousand: names come in, and one result for each goes out, in order.

Every step is a generator, and threads run only a few batches ahead, so that memory does not grow with the number of
images.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import groupby, islice
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from .find_images import FoundImage, find
from .loading import Classifier, default_model, load
from .output import Layout, Prediction, Result, writer
from .text import clean


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
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer from 1 on, got {value!r}.")
    model = default_model() if model is None else os.fspath(model)
    if model is None:
        raise ValueError("model must be a folder or a Hub id, got None: the default weights come with a clone alone.")
    names = [images] if isinstance(images, (str, os.PathLike)) else images
    classifier = load(model, **options)
    check_threshold(threshold, classifier)
    return classify(find(map(os.fspath, names)), classifier, top_k, batch_size, threshold)


def check_threshold(threshold: float | None, classifier: Classifier) -> None:
    """Raise ValueError where labels cannot be left out by their probability."""
    if threshold is not None and not 0 <= threshold <= 1:  # true for NaN too
        raise ValueError(f"threshold must be from 0 to 1, got {threshold!r}.")
    if threshold is not None and not classifier.gives_probabilities:
        raise ValueError(f"threshold must be left out where a model gives no probabilities, got {threshold!r}.")


def classify(
    images: Iterable[FoundImage],
    classifier: Classifier,
    top_k: int,
    batch_size: int,
    threshold: float | None = None,
) -> Iterator[Result]:
    """Classify images in batches; every image gives one result, in order.

    Each batch is read and run by one thread, beside others: so nothing waits for anything, and the network's own
    threads, which would spin while they wait for each other, are not needed.
    """

    def predict(batch: list[FoundImage]) -> list[Result]:
        read = [image.error or _read(image, classifier) for image in batch]
        readable = [pixels for pixels in read if not isinstance(pixels, str)]
        predictions = iter(
            [
                row
                for _, alike in groupby(readable, key=lambda pixels: pixels.shape)
                for row in _predict(np.concatenate(list(alike)), classifier, top_k, threshold)
            ]
        )
        return [
            Result(image.name, [], what) if isinstance(what, str) else Result(image.name, next(predictions), None)
            for image, what in zip(batch, read, strict=True)
        ]

    images = iter(images)
    batches = iter(lambda: list(islice(images, batch_size)), [])
    with closing(_map_in_threads(predict, batches)) as predictions:
        for results in predictions:
            yield from results


def _read(image: FoundImage, classifier: Classifier) -> np.ndarray | str:
    """The pixels of an image, or why it has none."""
    name, _, data = image
    if data is None and os.path.exists(name) and not os.path.isfile(name):
        return "not a regular file"  # a pipe would keep its reader waiting
    try:
        return classifier.read(name if data is None else data)
    except ValueError as error:  # UnreadableImageError among them
        return str(error).removeprefix(f"{name if data is None else 'bytes'}: ")


def _map_in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Map items in threads, only a few ahead of the consumer; results keep the order of the items."""
    # Two more than processors, so that these are busy while others wait for a disk or a server.
    workers = (os.cpu_count() or 1) + 2
    executor = ThreadPoolExecutor(workers)
    pending: deque[Future] = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _predict(
    pixels: np.ndarray, classifier: Classifier, top_k: int, threshold: float | None
) -> list[list[Prediction]]:
    scores = classifier.network(pixels)
    best = np.argsort(-scores, axis=-1, kind="stable")[:, :top_k]
    return [
        [
            Prediction(index, classifier.label(index), float(row[index]))
            for index in indices
            if threshold is None or row[index] >= threshold
        ]
        for row, indices in zip(scores, best.tolist(), strict=True)
    ]


def run(
    names: list[str],
    classifier: Classifier,
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
    out, err = Console(file=file or sys.stdout, highlight=False), Console(stderr=True, highlight=False)
    write = writer(layout, out, classifier.gives_probabilities)
    failures = 0
    # A bar and what is printed above it must go through one console, to stay out of each other's way.
    screen = out if out.is_terminal and err.is_terminal else err
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not err.is_terminal) as progress:
        total = None
        if not progress.disable and "-" not in names:
            total = sum(1 for _ in find(names))
        task = progress.add_task("", total=total, visible=total is None or total > batch_size)
        for result in classify(find(names), classifier, top_k, batch_size, threshold):
            if result.error is not None:
                failures += 1
                screen.print(Text(f"{clean(result.name)}: {clean(result.error)}", style="red"), soft_wrap=True)
            write(result)
            progress.advance(task)
    return failures
