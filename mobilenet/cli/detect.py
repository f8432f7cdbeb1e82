"""The options of `mobilenet detect`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

import typer

from mobilenet.cli import options
from mobilenet.detect import check_threshold, draws_to, run
from mobilenet.drawings import Drawings
from mobilenet.loading import Engine, Precision, load
from mobilenet.tasks import DETECTION


def detect(
    images: options.Images = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or Hub id of a detector.", show_default=False)
    ] = None,
    revision: options.Revision = None,
    threshold: Annotated[float, typer.Option(help="Objects have scores above this.")] = 0.5,
    as_json: options.AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a row for each object.")] = False,
    as_coco: Annotated[bool, typer.Option("--coco", help="Print a list of results as COCO has them.")] = False,
    draw: options.Draw = None,
    output: options.Output = None,
    overwrite: options.OverwriteDrawn = False,
    engine: options.EngineOption = Engine.AUTO,
    device: options.Device = "cpu",
    dtype: options.Dtype = Precision.FLOAT32,
    batch_size: options.BatchSize = 8,
    fast_decode: options.FastDecode = False,
) -> None:
    """Find objects in images: what they are, and where. No code that comes with a model is run.

    An image that cannot be read is reported on stderr, and the rest goes on; the exit code is then 1. Boxes are in
    pixels of the upright image.

    --json prints an object a line, with file, width, height, and predictions (of label, index, score and box) or
    error. --csv prints the columns file, rank, index, label, score, xmin, ymin, xmax and ymax. --draw writes images
    with boxes.
    """
    if not images:
        raise typer.BadParameter("name images.", param_hint="IMAGES")
    if not model:
        raise typer.BadParameter("name a folder or a Hub id of a detector.", param_hint="--model")
    layout = options.choose_layout(json=as_json, csv=as_csv, coco=as_coco)
    check_threshold(threshold)
    drawings = None
    if draw is not None:
        options.end_tidily()
        drawings = Drawings(draw, images, draws_to, overwrite)
    with options.results_file(output, overwrite) as file:
        detector = load(model, revision, engine, fast_decode, device, dtype, DETECTION)
        typer.echo(f"Engine: {detector.engine}", err=True)
        with drawings or nullcontext():
            failures = run(images, detector, layout, threshold, batch_size, file, drawings)
    if failures:
        raise typer.Exit(1)
