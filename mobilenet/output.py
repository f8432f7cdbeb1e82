"""Results of classification for people and programs: a table, JSON lines, CSV."""

from __future__ import annotations

import csv
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import NamedTuple, TextIO

from rich.console import Console
from rich.text import Text

from .text import clean


class Layout(str, Enum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


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


@contextmanager
def new_file(path: Path, overwrite: bool) -> Iterator[TextIO]:
    """Open a file for text, which is there when all is written, and not before.

    Raises:
        ValueError: It exists and shall not be replaced, or is no regular file.
    """

    def check() -> None:
        if path.exists() and not (overwrite and path.is_file()):
            allowed = "a regular file" if overwrite else "a file that does not exist, or go with --overwrite"
            raise ValueError(f"output must be {allowed}, got {path}.")

    check()
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(part, "x", encoding="utf-8", newline="") as file:
            yield file
        check()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def writer(layout: Layout, out: Console, gives_probabilities: bool) -> Callable[[Result], None]:
    """A function that prints a result; what could not be read is in JSON alone."""
    if layout is Layout.TABLE:
        return _table_writer(out, gives_probabilities)
    return {Layout.JSON: _json_writer, Layout.CSV: _csv_writer}[layout](out)


_BAR_WIDTH = 20


def _table_writer(out: Console, gives_probabilities: bool) -> Callable[[Result], None]:
    """A block for each image: its name, and its labels by rank."""

    # A Table of rich would take as long as the network.
    def write(result: Result) -> None:
        if result.error is not None:
            return
        text = Text(clean(result.name), style="bold")
        for rank, (_, label, score) in enumerate(result.predictions, 1):
            text.append(f"\n{rank:4}", style="not bold dim")
            if gives_probabilities:
                text.append(f"{100 * score:7.1f} %  ", style="not bold")
                text.append(f"{'━' * round(_BAR_WIDTH * score):{_BAR_WIDTH}}  ", style="not bold green")
            else:
                text.append(f"{score:12.6g}  ", style="not bold")
            text.append(clean(label), style="not bold")
        out.print(text, soft_wrap=True)

    return write


def _json_writer(out: Console) -> Callable[[Result], None]:
    """An object a line for each image, of ASCII characters alone."""

    def write(result: Result) -> None:
        if result.error is None:
            predictions = [
                {"label": label, "index": index, "score": round(score, 6)}
                for index, label, score in result.predictions
            ]
            line = {"file": result.name, "predictions": predictions}
        else:
            line = {"file": result.name, "error": result.error}
        out.out(json.dumps(line), highlight=False)

    return write


class _Lines:
    """What csv.writer writes to."""

    def __init__(self, out: Console) -> None:
        self.out = out

    def write(self, text: str) -> None:
        self.out.out(text, end="", highlight=False)


def _cell(text: str) -> str:
    """Text for a cell; a spreadsheet takes what begins like a formula for one, but for an apostrophe before it."""
    return f"'{clean(text)}" if text.startswith(("=", "+", "-", "@")) else clean(text)


def _csv_writer(out: Console) -> Callable[[Result], None]:
    """A header, then a row for each label of an image."""
    rows = csv.writer(_Lines(out), lineterminator="\n")
    rows.writerow(["file", "rank", "index", "label", "score"])

    def write(result: Result) -> None:
        for rank, (index, label, score) in enumerate(result.predictions, 1):
            rows.writerow([_cell(result.name), rank, index, _cell(label), round(score, 6)])

    return write
