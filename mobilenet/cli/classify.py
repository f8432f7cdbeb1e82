"""The options of `mobilenet classify`."""

from __future__ import annotations

import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from mobilenet.classify import run
from mobilenet.loading import Engine, Precision, default_model, load
from mobilenet.output import Layout, new_file


# Chelsea, by Stéfan van der Walt, who put the photograph into the public domain (CC0); scikit-image has it too.
EXAMPLE = Path(__file__).parents[1] / "example.jpg"


def classify(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders (with all below them), quoted patterns such as 'trips/**/*.jpg', URLs, or - for "
            "stdin, which holds such names, one a line, or an image.",
            show_default=False,
        ),
    ] = None,
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
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Labels for each image.")] = 5,
    threshold: Annotated[
        float | None, typer.Option(help="Probability below which a label is left out.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines, one for each image.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a row for each label of an image.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write results to.", show_default="stdout")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    engine: Annotated[
        Engine, typer.Option(help="What runs the network: what the model was exported for, or torch.")
    ] = Engine.AUTO,
    device: Annotated[str, typer.Option(help="Where torch computes, such as cuda, cuda:1 or mps.")] = "cpu",
    dtype: Annotated[Precision, typer.Option(help="What torch computes in.")] = Precision.FLOAT32,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that the network sees at once.")] = 8,
    fast_decode: Annotated[
        bool,
        typer.Option("--fast-decode", help="Decode large JPEGs at a reduced size: several times as fast, not exact."),
    ] = False,
) -> None:
    """Name what images show. No code that comes with a model is run.

    An image that cannot be read is reported on stderr, and the rest goes on; the exit code is then 1.

    --json prints an object a line, with file, and predictions (of label, index and score) or error. --csv prints the
    columns file, rank, index, label and score.
    """
    images = [*(images or []), *([str(EXAMPLE)] if example else [])]
    if not images:
        raise typer.BadParameter("name images, or take --example.", param_hint="IMAGES")
    if as_json and as_csv:
        raise typer.BadParameter("--json and --csv exclude each other.")
    model = model or default_model()
    if model is None:
        message = "name a folder or a Hub id: the default weights come with a clone, not with the installed package."
        raise typer.BadParameter(message, param_hint="--model")
    layout = Layout.JSON if as_json else Layout.CSV if as_csv else Layout.TABLE
    if output is not None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is half-written is removed on the way out
    with nullcontext() if output is None else new_file(output, overwrite) as file:
        classifier = load(model, revision, engine, fast_decode, device, dtype)
        typer.echo(f"Engine: {classifier.engine}", err=True)
        failures = run(images, classifier, layout, top_k, batch_size, threshold, file)
    if failures:
        raise typer.Exit(1)
