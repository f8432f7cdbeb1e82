"""Progress of long steps: on stderr, and only where a person looks on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mobilenet.text import clean


_console = Console(stderr=True)


def track(steps: Sequence[Any], description: str) -> Any:
    """Iterate under a progress bar."""
    return rich.progress.track(steps, description, console=_console, transient=True, disable=not _console.is_terminal)


def open_file(path: Path) -> AbstractContextManager[BinaryIO]:
    """Open a binary file for reading, under a progress bar."""
    return rich.progress.open(
        path, "rb", description=path.name, console=_console, transient=True, disable=not _console.is_terminal
    )


def status(description: str) -> AbstractContextManager[Any]:
    """Say what takes its time."""
    return _console.status(description)


def progress_bar(text: str, quiet: bool = False) -> Progress:
    """A progress bar that leaves no trace, and none at all where no one would see it."""
    console = Console()
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)


def warn(text: str) -> None:
    """Say on the console what a person must know of a result."""
    _console.print(f"Warning: {clean(text)}", highlight=False, markup=False, soft_wrap=True)
