"""The options of `mobilenet classify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mobilenet.classify import run
from mobilenet.cli import options
from mobilenet.loading import Engine, Precision, default_model, load


# Chelsea, by Stéfan van der Walt, who put the photograph into the public domain (CC0); scikit-image has it too.
EXAMPLE = Path(__file__).parents[1] / "example.jpg"


def classify(
    images: options.Images = None,
    example: Annotated[
        bool, typer.Option("--example", help="Classify the photograph of a cat that comes with the package.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Folder or Hub id of a MobileNet; in a clone, by default its own.",
            show_default=False,
        ),
    ] = None,
    revision: options.Revision = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Labels for each image.")] = 5,
    threshold: Annotated[
        float | None, typer.Option(help="Probability below which a label is left out.", show_default=False)
    ] = None,
    as_json: options.AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a row for each label of an image.")] = False,
    output: options.Output = None,
    overwrite: options.Overwrite = False,
    engine: options.EngineOption = Engine.AUTO,
    device: options.Device = "cpu",
    dtype: options.Dtype = Precision.FLOAT32,
    batch_size: options.BatchSize = 8,
    fast_decode: options.FastDecode = False,
) -> None:
    """Name what images show. No code that comes with a model is run.

    An image that cannot be read is reported on stderr, and the rest goes on; the exit code is then 1.

    --json prints an object a line, with file, and predictions (of label, index and score) or error. --csv prints the
    columns file, rank, index, label and score.
    """
    images = [*(images or []), *([str(EXAMPLE)] if example else [])]
    if not images:
        raise typer.BadParameter("name images, or take --example.", param_hint="IMAGES")
    layout = options.choose_layout(json=as_json, csv=as_csv)
    model = model or default_model()
    if model is None:
        message = "name a folder or a Hub id: the default weights come with a clone, not with the installed package."
        raise typer.BadParameter(message, param_hint="--model")
    with options.results_file(output, overwrite) as file:
        classifier = load(model, revision, engine, fast_decode, device, dtype)
        typer.echo(f"Engine: {classifier.engine}", err=True)
        failures = run(images, classifier, layout, top_k, batch_size, threshold, file)
    if failures:
        raise typer.Exit(1)
