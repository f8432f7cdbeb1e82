"""Results for people and programs: a table, JSON lines, CSV, COCO's results."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text

from .repository import hidden, put_file
from .text import clean


class Layout(str, Enum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    COCO = "coco"


class Prediction(NamedTuple):
    """One label of an image."""

    index: int
    label: str
    score: float  # a probability; a plain value where the model was trained for regression


class Result(NamedTuple):
    """What an image shows, best first, or why nobody knows."""

    name: str
    predictions: list[Prediction]
    error: str | None


class Detection(NamedTuple):
    """An object in an image."""

    index: int
    label: str
    score: float  # a probability
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the upright image


class DetectionResult(NamedTuple):
    """The objects in an image, best first, or why nobody knows."""

    name: str
    predictions: list[Detection]
    error: str | None
    size: tuple[int, int] | None = None  # width and height of the upright image
    drawn: tuple[str, ...] = ()  # files that show them


class Segment(NamedTuple):
    """What part of an image a class has."""

    index: int
    label: str
    area: float  # from 0 to 1
    pixels: int


class SegmentationResult(NamedTuple):
    """The classes in an image, largest first, or why nobody knows."""

    name: str
    predictions: list[Segment]
    error: str | None
    size: tuple[int, int] | None = None  # width and height of the upright image
    drawn: tuple[str, ...] = ()  # files that show them
    mask: bytes | None = None  # a PNG file, which takes a hundredth of the memory that the label map takes

    @property
    def label_map(self) -> np.ndarray | None:
        """The class of each pixel: integers of shape (H, W)."""
        if self.mask is None:
            return None
        with Image.open(io.BytesIO(self.mask)) as image:
            return np.asarray(image)


@contextmanager
def new_file(path: Path, overwrite: bool) -> Iterator[TextIO]:
    """Open a file for text, which is there when all is written, and not before.

    Raises:
        ValueError: It exists and shall not be replaced, or is no regular file.
    """
    allowed = "a regular file" if overwrite else "a file that does not exist, or go with --overwrite"
    refusal = ValueError(f"output must be {allowed}, got {path}.")

    def check() -> None:
        if os.path.lexists(path) and not (overwrite and path.is_file()):
            raise refusal

    check()
    make, remove = partial(Path.touch, exist_ok=False), partial(Path.unlink, missing_ok=True)
    with hidden(path.parent, f".{path.name}.mobilenet-", make, remove) as part:
        with open(part, "w", encoding="utf-8", newline="") as file:
            yield file
        check()
        try:
            put_file(part, path, overwrite)
        except FileExistsError as error:
            raise refusal from error


class Form(NamedTuple):
    """How a task's predictions are printed."""

    score: str = "score"  # what their third field is called
    columns: tuple[str, ...] = ()  # of CSV, after it
    cells: Callable[[Any], tuple[Any, ...]] = lambda prediction: ()
    fields: Callable[[Any], dict[str, Any]] = lambda prediction: {}  # of JSON
    words: Callable[[Any], str] = lambda prediction: ""  # of the table, after the label


_EDGES = ("xmin", "ymin", "xmax", "ymax")


def _edges(detection: Detection) -> tuple[float, ...]:
    return tuple(round(edge, 2) for edge in detection.box)


CLASSIFIED = Form()
DETECTED = Form(
    columns=_EDGES,
    cells=_edges,
    fields=lambda detection: {"box": dict(zip(_EDGES, _edges(detection), strict=True))},
    words=lambda detection: ", ".join(str(round(edge)) for edge in detection.box),
)
SEGMENTED = Form("area", ("pixels",), lambda segment: (segment.pixels,), lambda segment: {"pixels": segment.pixels})


class Writer(NamedTuple):
    """What prints results."""

    write: Callable[[Any], None]
    close: Callable[[], None] = lambda: None  # after the last one


def writer(
    layout: Layout,
    out: Console,
    gives_probabilities: bool = True,
    form: Form = CLASSIFIED,
    categories: Mapping[int, int] | None = None,
) -> Writer:
    """What prints results; of those that could not be read, JSON alone.

    Args:
        layout: How.
        out: Where.
        gives_probabilities: Whether scores are from 0 to 1.
        form: Of the task.
        categories: COCO's numbers of labels, by index.
    """
    if layout is Layout.TABLE:
        return Writer(_table_writer(out, gives_probabilities, form))
    if layout is Layout.COCO:
        return _coco_writer(out, categories or {})
    return Writer({Layout.JSON: _json_writer, Layout.CSV: _csv_writer}[layout](out, form))


_BAR_WIDTH = 20
_MAX_WIDTH = 40  # of a column of labels; longer ones reach out of it


def _table_writer(out: Console, gives_probabilities: bool, form: Form) -> Callable[[Any], None]:
    """A block for each image: its name, and its labels by rank."""

    bar = "━" if out.encoding.startswith("utf") else "="

    # A Table of rich would take as long as the network.
    def write(result: Any) -> None:
        if result.error is not None:
            return
        text = Text(clean(result.name), style="bold")
        words = [form.words(prediction) for prediction in result.predictions]
        width = max((len(p.label) for p in result.predictions), default=0) if any(words) else 0
        for rank, ((_, label, score, *_), rest) in enumerate(zip(result.predictions, words, strict=True), 1):
            text.append(f"\n{rank:4}", style="not bold dim")
            if gives_probabilities:
                text.append(f"{100 * score:7.1f} %  ", style="not bold")
                text.append(f"{bar * round(_BAR_WIDTH * score):{_BAR_WIDTH}}  ", style="not bold green")
            else:
                text.append(f"{score:12.6g}  ", style="not bold")
            text.append(clean(label).ljust(min(width, _MAX_WIDTH)), style="not bold")
            if rest:
                text.append(f"  {rest}", style="not bold dim")
        out.print(text, soft_wrap=True)

    return write


def _json_writer(out: Console, form: Form) -> Callable[[Any], None]:
    """An object a line for each image, of ASCII characters alone."""

    def write(result: Any) -> None:
        line = {"file": result.name}
        if result.error is None:
            if form is not CLASSIFIED:
                line["width"], line["height"] = result.size
                line |= {"drawn": result.drawn} if result.drawn else {}
            line["predictions"] = [
                {
                    "label": prediction.label,
                    "index": prediction.index,
                    form.score: round(prediction[2], 6),
                    **form.fields(prediction),
                }
                for prediction in result.predictions
            ]
        else:
            line["error"] = result.error
        out.out(json.dumps(line), highlight=False)

    return write


class _Lines:
    """What csv.writer writes to."""

    def __init__(self, out: Console) -> None:
        self.out = out

    def write(self, text: str) -> None:
        self.out.out(text, end="", highlight=False)


# What a formula begins with, and the same in full width, which some spreadsheets take for it.
_FORMULAS = (*"=+-@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def _cell(text: str) -> str:
    """Text for a cell; a spreadsheet takes what begins like a formula for one, but for an apostrophe before it."""
    return f"'{clean(text)}" if text.startswith(_FORMULAS) else clean(text)


def _csv_writer(out: Console, form: Form) -> Callable[[Any], None]:
    """A header, then a row for each label of an image."""
    rows = csv.writer(_Lines(out), lineterminator="\n")
    rows.writerow(["file", "rank", "index", "label", form.score, *form.columns])

    def write(result: Any) -> None:
        for rank, prediction in enumerate(result.predictions, 1):
            index, label, score, *_ = prediction
            cells = form.cells(prediction)
            rows.writerow([_cell(result.name), rank, index, _cell(label), round(score, 6), *cells])

    return write


_MAX_DIGITS = 18  # of a number of 64 bits


def _coco_writer(out: Console, categories: Mapping[int, int]) -> Writer:
    """COCO's results: a list with an object for each box, which has its corner, width and height.

    An image's number is the one that its file's name is, as in COCO; where that is none, or another image had it
    before, the name stands for it.
    """
    separator = "["
    numbered: dict[int, int] = {}  # hashes of names by their numbers

    def write(result: Any) -> None:
        nonlocal separator
        stem = Path(result.name).stem
        number = int(stem) if stem.isascii() and stem.isdigit() and len(stem) <= _MAX_DIGITS else None
        is_its_own = number is not None and numbered.setdefault(number, hash(result.name)) == hash(result.name)
        for index, _, score, (x0, y0, x1, y1) in result.predictions:
            line = {
                "image_id": number if is_its_own else result.name,
                "category_id": categories.get(index, index + 1),
                "bbox": [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)],
                "score": round(score, 6),
            }
            out.out(separator + json.dumps(line), end="", highlight=False)
            separator = ",\n"

    return Writer(write, lambda: out.out("[]" if separator == "[" else "]", highlight=False))
