"""Run networks on images by the thousand: names come in, and one result for each goes out, in order.

Every step is a generator, and threads run only a few batches ahead, so that memory does not grow with the number of
images.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import groupby, islice
from typing import Any, NamedTuple, TextIO

import numpy as np
from PIL import ExifTags, Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from .find_images import FoundImage
from .loading import Model, default_model
from .output import Writer
from .preprocessing_mobilenet import enough, fetch, is_url, open_image
from .text import clean


class ReadImage(NamedTuple):
    """An image that a network can see."""

    found: FoundImage
    pixels: np.ndarray  # of shape (1, C, H, W)
    size: tuple[int, int] | None = None  # width and height of the upright image, where they are asked for


def choose_model(model: str | os.PathLike | None) -> str:
    """A model by its name, or the one of a clone.

    Raises:
        ValueError: There is none.
    """
    model = default_model() if model is None else os.fspath(model)
    if model is None:
        raise ValueError("model must be a folder or a Hub id, got None: the default weights come with a clone alone.")
    return model


def check_positive(**options: Any) -> None:
    """Raise ValueError where an option is no integer from 1 on."""
    for name, value in options.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer from 1 on, got {value!r}.")


def reason(name: str, error: ValueError) -> str:
    """Why an image cannot be read, without its name."""
    return str(error).removeprefix(f"{name}: ").removeprefix("bytes: ")


def infer(
    images: Iterable[FoundImage],
    read: Callable[[FoundImage], ReadImage],
    predict: Callable[[list[ReadImage]], list[Any]],
    fail: Callable[[str, str], Any],
    batch_size: int,
) -> Iterator[Any]:
    """Run a network on images in batches; every image gives one result, in order.

    Each batch is read by one thread and run by another, beside others: so nothing waits for anything, and the
    network's own threads, which would spin while they wait for each other, are not needed.

    Args:
        images: What was found.
        read: Reads one of them; a ValueError says why it cannot be read.
        predict: From images of one shape to their results.
        fail: From a name and an error to the result of an image that cannot be read.
        batch_size: Images that the network sees at once.
    """

    def try_to_read(image: FoundImage) -> ReadImage | str:
        name, error, data, _ = image
        if error is not None:
            return error
        if data is None and os.path.exists(name) and not os.path.isfile(name):
            return "not a regular file"  # a pipe would keep its reader waiting
        try:
            return read(image)
        except ValueError as error:  # UnreadableImageError among them
            return reason(name, error)

    def compute(readable: list[ReadImage]) -> list[Any]:
        _compute_alone()
        alike = groupby(readable, key=lambda image: image.pixels.shape)
        return [result for _, group in alike for result in predict(list(group))]

    def run(batch: list[FoundImage]) -> list[Any]:
        _compute_alone()
        attempts = [try_to_read(image) for image in batch]
        readable = [attempt for attempt in attempts if isinstance(attempt, ReadImage)]
        results = iter(computing.submit(compute, readable).result())
        return [
            fail(image.name, attempt) if isinstance(attempt, str) else next(results)
            for image, attempt in zip(batch, attempts, strict=True)
        ]

    # More networks at once than processors, or in more threads, would take memory and no less time.
    computing = ThreadPoolExecutor(os.cpu_count() or 1)
    images = iter(images)
    batches = iter(lambda: list(islice(images, batch_size)), [])
    try:
        with closing(_map_in_threads(run, batches)) as results:
            for batch in results:
                yield from batch
    finally:
        computing.shutdown(wait=False, cancel_futures=True)


_thread = threading.local()


def _compute_alone() -> None:
    """Let torch compute in this thread alone, where it is in use: threads would wait for each other."""
    torch = sys.modules.get("torch")
    if torch is not None and not hasattr(_thread, "computes_alone"):
        torch.set_num_threads(1)
        _thread.computes_alone = True


def read_image(image: FoundImage, model: Model) -> ReadImage:
    """Read an image for a classifier."""
    return ReadImage(image, model.read(image.name if image.data is None else image.data))


def read_with_size(image: FoundImage, model: Model, keeps: bool = False) -> ReadImage:
    """Read an image for a network whose results are in pixels of it.

    Args:
        image: What was found.
        model: What reads it.
        keeps: Whether it will be read again: what a URL leads to is then kept, encoded.
    """
    is_reduced = model.options["fast_decode"]
    if (keeps or is_reduced) and is_url(image.name):
        image = image._replace(data=fetch(image.name))
    source = image.name if image.data is None else image.data
    upright = open_image(source, enough(model.options))
    size = upright.size
    if is_reduced:
        size = _size_of_jpeg(source) or size  # no other file is reduced
    return ReadImage(image, model.read(upright), size)


def _size_of_jpeg(source: str | bytes) -> tuple[int, int] | None:
    """Width and height of an upright image that is known to be sound, as its header has them; None for other files."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        if image.format not in ("JPEG", "MPO"):
            return None
        is_turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.height, image.width) if is_turned else image.size


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


def report(
    find: Callable[[], Iterable[FoundImage]],
    infer: Callable[[Iterable[FoundImage]], Iterator[Any]],
    write_to: Callable[[Console], Writer],
    file: TextIO | None,
    batch_size: int,
    is_countable: bool,
) -> int:
    """Print results and, on stderr, failures, and count the failures.

    Args:
        find: Finds the images.
        infer: From images to results.
        write_to: What prints a result to a console.
        file: Where results are printed; by default stdout.
        batch_size: Images that the network sees at once.
        is_countable: Whether images may be looked for twice, to know how many there are.
    """
    out, err = Console(file=file or sys.stdout, highlight=False), Console(stderr=True, highlight=False)
    writer = write_to(out)
    failures = 0
    # A bar and what is printed above it must go through one console, to stay out of each other's way.
    screen = out if out.is_terminal and err.is_terminal else err
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not err.is_terminal) as progress:
        total = None
        if not progress.disable and is_countable:
            total = sum(1 for _ in find())
        task = progress.add_task("", total=total, visible=total is None or total > batch_size)
        for result in infer(find()):
            if result.error is not None:
                failures += 1
                screen.print(Text(f"{clean(result.name)}: {clean(result.error)}", style="red"), soft_wrap=True)
            writer.write(result)
            progress.advance(task)
        writer.close()
    return failures
