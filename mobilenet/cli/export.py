"""The options of `mobilenet export`."""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mobilenet.export import MIN_AGREEMENT, Target
from mobilenet.tables import table
from mobilenet.text import clean


def export(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a MobileNet.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    target: Annotated[Target, typer.Option("--target", "-t", help="Where the network shall run.")] = Target.ONNX,
    int8: Annotated[bool, typer.Option("--int8", help="Quantize weights and activations to 8 bits.")] = False,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images such as the network will see, to calibrate int8 on and to compare on.",
            show_default=False,
        ),
    ] = None,
    min_agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Share of images on which int8 and bfloat16 must predict as torch.")
    ] = MIN_AGREEMENT,
    nms: Annotated[
        bool, typer.Option("--nms", help="Suppress overlapping boxes of a detector inside the ONNX graph.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a repository that exists.")] = False,
) -> None:
    """Write a network for another engine, and compare it with torch. No code of the source is run."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # temporary folders are removed on the way out
    module = import_module("mobilenet.export.export")
    comparisons = module.export(
        source,
        output,
        target,
        int8=int8,
        images=images,
        min_agreement=min_agreement,
        nms=nms,
        revision=revision,
        overwrite=overwrite,
    )
    console = Console()
    rows = (comparison.cells for comparison in comparisons)
    legend = "difference: largest of outputs; ms: one image, the median\n"
    console.print(table(comparisons[0].columns, rows), legend)
    console.print(clean(f"{output} is written."), highlight=False, markup=False, soft_wrap=True)
