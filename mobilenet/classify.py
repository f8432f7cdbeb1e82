"""Classify images by the thousand: names come in, and one result for each goes out, in order.

Every step is a generator, and threads run only a few batches ahead, so that memory does not grow with the number of
images.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import groupby, islice
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from .find_images import FoundImage, find
from .loading import Classifier
from .output import Layout, Prediction, Result, writer
from .text import clean


def classify(images: Iterable[FoundImage], classifier: Classifier, top_k: int, batch_size: int) -> Iterator[Result]:
    """Classify images in batches; every image gives one result, in order.

    Each batch is read and run by one thread, beside others: so nothing waits for anything, and the network's own
    threads, which would spin while they wait for each other, are not needed.
    """

    def predict(batch: list[FoundImage]) -> list[Result]:
        read = [image.error or _read(image.name, classifier) for image in batch]
        readable = [pixels for pixels in read if not isinstance(pixels, str)]
        predictions = iter(
            [
                row
                for _, alike in groupby(readable, key=lambda pixels: pixels.shape)
                for row in _predict(np.concatenate(list(alike)), classifier, top_k)
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


def _read(name: str, classifier: Classifier) -> np.ndarray | str:
    """The pixels of an image, or why it has none."""
    if os.path.exists(name) and not os.path.isfile(name):
        return "not a regular file"  # a pipe would keep its reader waiting
    try:
        return classifier.read(name)
    except ValueError as error:  # UnreadableImageError among them
        return str(error).removeprefix(f"{name}: ")


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


def _predict(pixels: np.ndarray, classifier: Classifier, top_k: int) -> list[list[Prediction]]:
    scores = classifier.network(pixels)
    best = np.argsort(-scores, axis=-1, kind="stable")[:, :top_k]
    return [
        [Prediction(index, classifier.label(index), float(row[index])) for index in indices]
        for row, indices in zip(scores, best.tolist(), strict=True)
    ]


def run(
    names: list[str], classifier: Classifier, layout: Layout = Layout.TABLE, top_k: int = 5, batch_size: int = 8
) -> int:
    """Classify what names stand for, print results on stdout and failures on stderr, and count the failures."""
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
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
        for result in classify(find(names), classifier, top_k, batch_size):
            if result.error is not None:
                failures += 1
                screen.print(Text(f"{clean(result.name)}: {clean(result.error)}", style="red"), soft_wrap=True)
            write(result)
            progress.advance(task)
    return failures
