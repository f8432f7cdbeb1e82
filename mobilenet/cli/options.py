"""Options that the commands on images share, and what they do with them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TextIO

import typer

from mobilenet.loading import Engine, Precision
from mobilenet.output import Layout, new_file


Images = Annotated[
    list[str] | None,
    typer.Argument(
        help="Files, folders (with all below them), quoted patterns such as 'trips/**/*.jpg', URLs, or - for "
        "stdin, which holds such names, one a line, or an image.",
        show_default=False,
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines, one for each image.")]
Draw = Annotated[
    Path | None, typer.Option(help="Folder to draw into, in files named like the images.", show_default=False)
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="File to write results to.", show_default="stdout")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")]
OverwriteDrawn = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
EngineOption = Annotated[
    Engine, typer.Option("--engine", help="What runs the network: what the model was exported for, or torch.")
]
Device = Annotated[str, typer.Option(help="Where torch computes, such as cuda, cuda:1 or mps.")]
Dtype = Annotated[Precision, typer.Option(help="What torch computes in.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images that the network sees at once.")]
FastDecode = Annotated[
    bool,
    typer.Option("--fast-decode", help="Decode large JPEGs at a reduced size: several times as fast, not exact."),
]


def choose_layout(**wanted: bool) -> Layout:
    """The layout that one of the options asks for; a table where none does.

    Args:
        **wanted: Whether a layout is asked for, by its name.

    Raises:
        typer.BadParameter: Several are.
    """
    chosen = [name for name, is_wanted in wanted.items() if is_wanted]
    if len(chosen) > 1:
        raise typer.BadParameter(f"{' and '.join(f'--{name}' for name in chosen)} exclude each other.")
    return Layout(chosen[0]) if chosen else Layout.TABLE


@contextmanager
def results_file(output: Path | None, overwrite: bool) -> Iterator[TextIO | None]:
    """The file that results go to, which is there when all is written; None for stdout."""
    if output is None:
        yield None
        return
    end_tidily()
    with new_file(output, overwrite) as file:
        yield file


def end_tidily() -> None:
    """Let what is half-written be removed on the way out when the process is told to end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
