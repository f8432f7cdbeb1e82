"""The options of `mobilenet evaluate`."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Annotated

import typer
from rich.console import Console

from mobilenet.require import require
from mobilenet.tables import table
from mobilenet.text import percent


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a MobileNet.")],
    dataset: Annotated[str, typer.Argument(help="As for mobilenet train.")],
    split: Annotated[
        str | None, typer.Option(help="Split; by default test, or else validation, or else the only one.")
    ] = None,
    subset: Annotated[
        str | None, typer.Option(help="Configuration of a dataset of the Hub, where it has several.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a dataset of the Hub.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the images, where there are several.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels, where there are several.")] = None,
    label_names: Annotated[
        str | None, typer.Option(help="For segmentation: file with the names of the dataset's classes.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images that the network sees at once; by default 128, 32 for detectors, 16 for segmenters.",
        ),
    ] = None,
    skip_unreadable: Annotated[bool, typer.Option(help="Leave out images that cannot be read.")] = False,
    external_images: Annotated[
        bool, typer.Option(help="Read images that rows name by a URL or by a path outside of the dataset.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Measure a classifier, detector or segmenter on labeled images, as its model card says it was measured."""
    require("datasets", "kornia", "psutil", "torchmetrics", extra="train", purpose="evaluation")
    result = import_module("mobilenet.training.evaluate").evaluate_checkpoint(
        model,
        dataset,
        split,
        subset,
        revision,
        image_column,
        label_column,
        batch_size,
        skip_unreadable,
        external_images,
        label_names,
    )
    words = import_module("mobilenet.cards").WORDS[result.task]
    if as_json:
        print(json.dumps({name: value for name, value in result._asdict().items() if name != "task"}))
        return
    rows = [(name.replace("_", " "), percent(value)) for name, value in result.metrics.items()]
    if result.on_card is not None:
        rows.append((f"{rows[0][0]} on the card", percent(result.on_card)))
    by_class = [(name, percent(value)) for name, value in result.by_class.items()]
    images = f"{result.split}, {result.images:,} images"
    Console().print(table(("", images), rows), table(("class", words.by_class), by_class))
