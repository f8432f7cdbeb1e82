"""Detect objects in images: what there is, and where."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from typing import Any, TextIO

import numpy as np

from .coco import categories_of
from .drawings import Drawings
from .find_images import FoundImage, find
from .inference import ReadImage, check_positive, choose_model, infer, read_with_size, reason, report
from .loading import Model, load
from .output import DETECTED, Detection, DetectionResult, Layout, writer
from .preprocessing_mobilenet import SUPPRESSION, on_image, place
from .tasks import DETECTION
from .visualize import draw_boxes


# From an image's width and height, and the network's outputs for it, to what is in it.
FindObjects = Callable[..., list[Detection]]


def detect_images(
    images: str | os.PathLike | Iterable[str | os.PathLike],
    model: str | os.PathLike,
    *,
    threshold: float = 0.5,
    batch_size: int = 8,
    **options: Any,
) -> Iterator[DetectionResult]:
    """Detect objects in a folder of images, or in any number of files, folders and so on, as `mobilenet detect` does.

    Args:
        images: One name or many. Folders are searched with all below them.
        model: Folder or Hub id of a detector. Code that comes with it does not run.
        threshold: Objects have scores above this.
        batch_size: Images that the network sees at once.
        **options: Of mobilenet.loading.load: revision, engine, fast_decode, device, dtype.

    Returns:
        For each image, in order, while later ones are read: its `name`, its `size` (width and height), and its
        `predictions` (of `index`, `label`, `score` and `box`, best first; a box is x0, y0, x1, y1 in pixels of the
        upright image), or the `error` that says why it could not be read.

    Raises:
        ImportError: The engine is not installed.
        ValueError: The model cannot be loaded, or an option is not what it allows.
    """
    check_positive(batch_size=batch_size)
    check_threshold(threshold)
    names = [images] if isinstance(images, (str, os.PathLike)) else images
    detector = load(choose_model(model), task=DETECTION, **options)
    return detect(find(map(os.fspath, names)), detector, threshold, batch_size)


def check_threshold(threshold: float) -> None:
    """Raise ValueError where no score can be asked for."""
    if not 0 <= threshold <= 1:  # true for NaN too
        raise ValueError(f"threshold must be from 0 to 1, got {threshold!r}.")


def detect(
    images: Iterable[FoundImage],
    detector: Model,
    threshold: float,
    batch_size: int,
    drawings: Drawings | None = None,
) -> Iterator[DetectionResult]:
    """Detect objects in images in batches; every image gives one result, in order.

    Args:
        images: What was found.
        detector: A model.
        threshold: Objects have scores above this.
        batch_size: Images that the network sees at once.
        drawings: Where images with boxes go.
    """
    find_objects = _suppression(detector, threshold)

    def predict(batch: list[ReadImage]) -> list[DetectionResult]:
        outputs = detector.network(np.concatenate([image.pixels for image in batch]))
        if len(outputs) == 1:  # objects of the whole batch
            (rows,) = outputs
            outputs = [[rows[rows[:, 0] == place] for place in range(len(batch))]]
        return [finish(*row) for row in zip(batch, *outputs, strict=True)]

    def finish(image: ReadImage, *outputs: np.ndarray) -> DetectionResult:
        detections = find_objects(image.size, *outputs)
        drawn = ()
        if drawings is not None:
            try:
                drawn = drawings.draw(image.found, image.size, lambda upright: draw_boxes(upright, detections))
            except ValueError as error:
                return fail(image.found.name, reason(image.found.name, error))
        return DetectionResult(image.found.name, detections, None, image.size, drawn)

    def fail(name: str, error: str) -> DetectionResult:
        return DetectionResult(name, [], error)

    read = partial(read_with_size, model=detector, keeps=drawings is not None)
    return infer(images, read, predict, fail, batch_size)


def _suppression(detector: Model, threshold: float) -> FindObjects:
    """What finds objects in the outputs of a network, whether boxes that overlap are suppressed in it or not."""
    options = {name: detector.options[name] for name in SUPPRESSION}

    def find_objects(size: tuple[int, int], first: np.ndarray, boxes: np.ndarray | None = None) -> list[Detection]:
        if boxes is None:
            rows = first[first[:, 2] > threshold][: options["max_detections"]]
            found = rows[:, 2], rows[:, 1].astype(int), rows[:, 3:]
        else:
            torch = import_module("torch")  # which an exported network may do without
            suppress = import_module(".postprocessing_mobilenet", __package__).suppress
            tensors = suppress(torch.from_numpy(first), torch.from_numpy(boxes), threshold, **options)
            found = [tensor.numpy() for tensor in tensors]
        scores, indices, corners = found[0], found[1], on_image(found[2], place(*size, detector.options))
        return [
            Detection(index, detector.label(index), score, tuple(box))
            for score, index, box in zip(scores.tolist(), indices.tolist(), corners.tolist(), strict=True)
        ]

    return find_objects


def draws_to(path: str, suffix: str) -> list[str]:
    """The file that boxes are drawn into."""
    return [path + suffix]


def run(
    names: list[str],
    detector: Model,
    layout: Layout = Layout.TABLE,
    threshold: float = 0.5,
    batch_size: int = 8,
    file: TextIO | None = None,
    drawings: Drawings | None = None,
) -> int:
    """Detect objects in what names stand for, print results and, on stderr, failures, and count the failures.

    Args:
        names: Of files, folders and so on, as `find` takes them.
        detector: A model.
        layout: How results are printed.
        threshold: Objects have scores above this.
        batch_size: Images that the network sees at once.
        file: Where results are printed; by default stdout.
        drawings: Where images with boxes go.
    """
    check_threshold(threshold)
    categories = categories_of(detector.labels) if layout is Layout.COCO else None
    return report(
        partial(find, names) if drawings is None else drawings.find,
        lambda images: detect(images, detector, threshold, batch_size, drawings),
        lambda out: writer(layout, out, form=DETECTED, categories=categories),
        file,
        batch_size,
        "-" not in names,
    )
