"""Segment images: the class of every pixel."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from typing import Any, TextIO

import numpy as np
from PIL import Image

from .drawings import Drawings
from .find_images import FoundImage, find
from .inference import ReadImage, check_positive, choose_model, infer, read_with_size, reason, report
from .loading import Model, load
from .output import SEGMENTED, Layout, Segment, SegmentationResult, writer
from .preprocessing_mobilenet import place
from .tasks import SEGMENTATION
from .visualize import background_of, draw_segments, encode, to_mask


_COUNTED = 1 << 22  # pixels at a time


def segment_images(
    images: str | os.PathLike | Iterable[str | os.PathLike],
    model: str | os.PathLike,
    *,
    batch_size: int = 4,
    **options: Any,
) -> Iterator[SegmentationResult]:
    """Segment a folder of images, or any number of files, folders, patterns and URLs, as `mobilenet segment` does.

    Args:
        images: One name or many. Folders are searched with all below them.
        model: Folder or Hub id of a segmenter. Code that comes with it does not run.
        batch_size: Images that the network sees at once.
        **options: Of mobilenet.loading.load: revision, engine, fast_decode, device, dtype.

    Returns:
        For each image, in order, while later ones are read: its `name`, its `size` (width and height), its
        `predictions` (of `index`, `label`, `area` from 0 to 1 and `pixels`, largest first), its `label_map` (integers
        of shape (height, width)) and the same as a PNG file (`mask`); or the `error` that says why it could not be
        read.

    Raises:
        ImportError: The engine is not installed.
        ValueError: The model cannot be loaded, or an option is not what it allows.
    """
    check_positive(batch_size=batch_size)
    names = [images] if isinstance(images, (str, os.PathLike)) else images
    segmenter = load(choose_model(model), task=SEGMENTATION, **options)
    return segment(find(map(os.fspath, names)), segmenter, batch_size, keeps_masks=True)


def segment(
    images: Iterable[FoundImage],
    segmenter: Model,
    batch_size: int,
    drawings: Drawings | None = None,
    keeps_masks: bool = False,
) -> Iterator[SegmentationResult]:
    """Segment images in batches; every image gives one result, in order.

    Args:
        images: What was found.
        segmenter: A model.
        batch_size: Images that the network sees at once.
        drawings: Where masks and overlays go.
        keeps_masks: Whether results hold masks.
    """
    to_label_map = _upsampling(segmenter)
    background = background_of(segmenter.labels)

    def predict(batch: list[ReadImage]) -> list[SegmentationResult]:
        logits = segmenter.network(np.concatenate([image.pixels for image in batch]))
        return [finish(image, row) for image, row in zip(batch, logits, strict=True)]

    def finish(image: ReadImage, logits: np.ndarray) -> SegmentationResult:
        label_map = to_label_map(logits, image.size)
        # In bands, as integers of 64 bits are made of the pixels.
        bands = np.array_split(label_map.reshape(-1), 1 + label_map.size // _COUNTED)
        counts = sum(np.bincount(band, minlength=len(logits)) for band in bands)
        segments = [
            Segment(index, segmenter.label(index), float(counts[index] / label_map.size), int(counts[index]))
            for index in np.argsort(-counts, kind="stable").tolist()
            if counts[index]
        ]
        mask = encode(to_mask(label_map), ".png") if drawings is not None or keeps_masks else None
        drawn = ()
        if drawings is not None:

            def paint(upright: Image.Image) -> Image.Image:
                return draw_segments(upright, label_map, segments, background)

            try:
                drawn = drawings.draw(image.found, image.size, paint, mask)
            except ValueError as error:
                return fail(image.found.name, reason(image.found.name, error))
        kept = mask if keeps_masks else None
        return SegmentationResult(image.found.name, segments, None, image.size, drawn, kept)

    def fail(name: str, error: str) -> SegmentationResult:
        return SegmentationResult(name, [], error)

    read = partial(read_with_size, model=segmenter, keeps=drawings is not None)
    return infer(images, read, predict, fail, batch_size)


def _upsampling(segmenter: Model) -> Callable[[np.ndarray, tuple[int, int]], np.ndarray]:
    """From a network's logits, and an image's width and height, to the class of each pixel."""
    torch = import_module("torch")
    label_map = import_module(".postprocessing_mobilenet", __package__).label_map

    @torch.inference_mode()
    def to_label_map(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        kind = torch.uint8 if len(logits) <= 256 else torch.int32
        axes = place(*size, segmenter.options)
        return label_map(torch.from_numpy(logits), axes, segmenter.options["align_corners"], kind).numpy()

    return to_label_map


def draws_to(path: str, suffix: str) -> list[str]:
    """The files of a mask and of an overlay."""
    return [os.path.join("masks", f"{path}.png"), os.path.join("overlays", path + suffix)]


def run(
    names: list[str],
    segmenter: Model,
    layout: Layout = Layout.TABLE,
    batch_size: int = 4,
    file: TextIO | None = None,
    drawings: Drawings | None = None,
) -> int:
    """Segment what names stand for, print results and, on stderr, failures, and count the failures.

    Args:
        names: Of files, folders and so on, as `find` takes them.
        segmenter: A model.
        layout: How results are printed.
        batch_size: Images that the network sees at once.
        file: Where results are printed; by default stdout.
        drawings: Where masks and overlays go.
    """
    return report(
        partial(find, names) if drawings is None else drawings.find,
        lambda images: segment(images, segmenter, batch_size, drawings),
        lambda out: writer(layout, out, form=SEGMENTED),
        file,
        batch_size,
        "-" not in names,
    )
