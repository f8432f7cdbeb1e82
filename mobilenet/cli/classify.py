"""The options of `mobilenet classify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mobilenet.classify import run
from mobilenet.loading import Engine, default_model, load
from mobilenet.output import Layout


# Chelsea, by Stéfan van der Walt, who put the photograph into the public domain (CC0); scikit-image has it too.
EXAMPLE = Path(__file__).parents[1] / "example.jpg"


def classify(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders (with all below them), quoted patterns such as 'trips/**/*.jpg', URLs, or - to read "
            "such names from stdin, one a line.",
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines, one for each image.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a row for each label of an image.")] = False,
    engine: Annotated[
        Engine, typer.Option(help="What runs the network: what the model was exported for, or torch.")
    ] = Engine.AUTO,
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
    classifier = load(model, revision=revision, engine=engine, fast_decode=fast_decode)
    typer.echo(f"Engine: {classifier.engine}", err=True)
    if run(images, classifier, layout=layout, top_k=top_k, batch_size=batch_size):
        raise typer.Exit(1)
