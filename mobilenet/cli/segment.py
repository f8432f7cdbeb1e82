"""The options of `mobilenet segment`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

import typer

from mobilenet.cli import options
from mobilenet.drawings import Drawings
from mobilenet.loading import Engine, Precision, load
from mobilenet.segment import draws_to, run
from mobilenet.tasks import SEGMENTATION


def segment(
    images: options.Images = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or Hub id of a segmenter.", show_default=False)
    ] = None,
    revision: options.Revision = None,
    as_json: options.AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a row for each class of an image.")] = False,
    draw: options.Draw = None,
    output: options.Output = None,
    overwrite: options.OverwriteDrawn = False,
    engine: options.EngineOption = Engine.AUTO,
    device: options.Device = "cpu",
    dtype: options.Dtype = Precision.FLOAT32,
    batch_size: options.BatchSize = 4,
    fast_decode: options.FastDecode = False,
) -> None:
    """Predict the class of every pixel of images. No code that comes with a model is run.

    An image that cannot be read is reported on stderr, and the rest goes on; the exit code is then 1.

    --json prints an object a line, with file, width, height, and predictions (of label, index, area from 0 to 1 and
    pixels) or error. --csv prints the columns file, rank, index, label, area and pixels. --draw writes masks, PNG
    files whose values are the classes of the pixels, and overlays.
    """
    if not images:
        raise typer.BadParameter("name images.", param_hint="IMAGES")
    if not model:
        raise typer.BadParameter("name a folder or a Hub id of a segmenter.", param_hint="--model")
    layout = options.choose_layout(json=as_json, csv=as_csv)
    drawings = None
    if draw is not None:
        options.end_tidily()
        drawings = Drawings(draw, images, draws_to, overwrite)
    with options.results_file(output, overwrite) as file:
        segmenter = load(model, revision, engine, fast_decode, device, dtype, SEGMENTATION)
        typer.echo(f"Engine: {segmenter.engine}", err=True)
        with drawings or nullcontext():
            failures = run(images, segmenter, layout, batch_size, file, drawings)
    if failures:
        raise typer.Exit(1)
