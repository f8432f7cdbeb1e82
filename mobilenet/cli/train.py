"""The options of `mobilenet train`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from mobilenet.preprocessing_mobilenet import regular
from mobilenet.require import require
from mobilenet.training.options import FREE_TO_CHANGE, RECORD, Options


PACKAGES = ("accelerate", "datasets", "kornia", "matplotlib", "psutil", "tensorboard", "torchmetrics")


def _is_option(value: Any) -> bool:
    """Whether a value is one that the command line can give, or that says nothing."""
    return value is None or isinstance(value, str) or (isinstance(value, (int, float)) and abs(value) < 1e18)


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take defaults from a file that a run left; what the command line says goes first."""
    if path is not None:
        try:
            record = json.loads(Path(regular(path)).read_text(encoding="utf-8"))
            recorded, processes = record["options"], record["processes"]
            if not (
                isinstance(processes, int) and isinstance(recorded, dict) and all(map(_is_option, recorded.values()))
            ):
                raise ValueError("its options must be texts and numbers.")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise typer.BadParameter(f"{path} must be the {RECORD} of a run: {error}") from error
        context.default_map = {
            name: value for name, value in recorded.items() if value is not None and name not in FREE_TO_CHANGE
        }
        if processes != (here := int(os.environ.get("WORLD_SIZE", "1"))):
            typer.echo(
                f"Note: that run had {processes} processes, each with its batch; this one has {here}.", err=True
            )
    return path


def train(config: Path | None = None, **given: Any) -> None:
    """Train a classifier, detector or segmenter on labeled images and write a complete repository.

    The same command goes on where an interrupted run stopped, to the same weights. Several GPUs or machines (which
    must share the output folder): start it with torchrun or accelerate launch.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is of no use is removed on the way out
    options = Options(**given)
    options.check()
    require(*PACKAGES, extra="train", purpose="training")
    if not import_module("mobilenet.training.run").run(options):
        raise typer.Exit(3)


def _signature() -> inspect.Signature:
    """The options as parameters of the command."""
    config = Annotated[
        Path | None,
        typer.Option(
            "--config", callback=_read_config, is_eager=True, help=f"{RECORD} of a run to repeat; options override it."
        ),
    ]
    hints = get_type_hints(Options, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(Options)
    ]
    return inspect.Signature(
        [*parameters, inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=config)]
    )


train.__signature__ = _signature()
train.__annotations__ = {name: p.annotation for name, p in train.__signature__.parameters.items()}
