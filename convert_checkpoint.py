"""Convert a MobileNet of any public source into a repository for transformers, and prove that it is the same network.

python convert_checkpoint.py google/mobilenet_v2_1.0_224 my-mobilenet
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from mobilenet.configuration_mobilenet import MobileNetConfig
from mobilenet.modeling_mobilenet import MobileNetForImageClassification
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from mobilenet.conversion import Checkpoint, ConversionError, read_source
from mobilenet.conversion.card import write_card
from mobilenet.conversion.names import rename
from mobilenet.conversion.proof import Comparison, draw_pictures, find_pictures, prove


def convert(
    source: str,
    output: str | os.PathLike,
    *,
    revision: str | None = None,
    drop_background: bool = False,
    verify: bool = True,
    verify_on: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> list[Comparison]:
    """Convert a checkpoint into a repository for transformers.

    Args:
        source: Path or Hub id.
        output: Folder to write. It appears complete or not at all.
        revision: Branch, tag or commit of a Hub id.
        drop_background: Whether to leave out class 0, "background", so that ImageNet's classes count from 0.
        verify: Whether to load the result back and compare it with the source's own runtime.
        verify_on: Folder of pictures to compare on; by default, synthetic ones.
        overwrite: Whether to replace a repository that exists.

    Returns:
        What was compared.

    Raises:
        ConversionError: The source cannot be read or converted, or the result is another network.
    """
    with staged(Path(output), overwrite) as folder:
        origin, checkpoint = read_source(source, revision)
        model = build(checkpoint, origin.given)
        if drop_background:
            leave_out_background(model)
        model.save_pretrained(folder)
        # safetensors lets nobody else read what it writes.
        shutil.copymode(folder / "config.json", folder / "model.safetensors")
        checkpoint.processor.save_pretrained(folder)
        for name, text in checkpoint.extra_files.items():
            (folder / name).write_text(text, encoding="utf-8")
        comparisons, caveats = [], ["Not verified: converted with `--no-verify`."]
        if verify:
            with tempfile.TemporaryDirectory() as scratch:
                pictures = find_pictures(Path(verify_on)) if verify_on else draw_pictures(Path(scratch))
                classes = slice(1 if drop_background else 0, None)
                comparisons, caveats = prove(folder, model, checkpoint, pictures, classes)
        write_card(model.config, origin, checkpoint, comparisons, caveats).save(folder / "README.md")
    return comparisons


def build(checkpoint: Checkpoint, origin: str) -> MobileNetForImageClassification:
    """Build the network that a checkpoint describes, with its weights and labels.

    Raises:
        ConversionError: The tensors are not those of such a network.
    """
    config = MobileNetConfig(**checkpoint.config)
    if checkpoint.labels:
        name_classes(config, checkpoint.labels)
    model = MobileNetForImageClassification(config).eval()
    tensors = rename(checkpoint.tensors, checkpoint.table, model, origin)
    model.load_state_dict(model.state_dict() | tensors)
    return model


def name_classes(config: MobileNetConfig, labels: list[str]) -> None:
    """Set both directions of a configuration's labels; of equal labels, the first keeps the name."""
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in reversed(config.id2label.items())}


@torch.no_grad()
def leave_out_background(model: MobileNetForImageClassification) -> None:
    """Take class 0 out of the classifier and of the labels.

    Raises:
        ConversionError: The network has not 1001 classes.
    """
    config, old = model.config, model.classifier
    if config.num_labels != 1001:
        raise ConversionError(f"--drop-background is for networks of 1001 classes, got {config.num_labels}.")
    name_classes(config, [config.id2label[index] for index in range(1, config.num_labels)])
    model.num_labels = config.num_labels
    model.classifier = torch.nn.Linear(old.in_features, config.num_labels)
    model.classifier.weight.copy_(old.weight[1:])
    model.classifier.bias.copy_(old.bias[1:])


@contextlib.contextmanager
def staged(output: Path, overwrite: bool) -> Iterator[Path]:
    """Give a folder to build in, which takes the output's place at the end; after an error, nothing of it is left.

    Raises:
        ConversionError: The output exists, and is not to be replaced.
    """
    output = output.expanduser().absolute()
    if os.path.lexists(output):
        if not overwrite:
            raise ConversionError(f"{output} exists; --overwrite replaces it.")
        # A typing error must not cost somebody's pictures.
        if output.is_symlink() or not output.is_dir() or not (is_repository(output) or not any(output.iterdir())):
            raise ConversionError(f"{output} is no model repository, and is not replaced.")
    existing = next(parent for parent in output.parents if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=existing) as scratch:
        folder, old = Path(scratch, output.name), Path(scratch, "old")
        folder.mkdir()
        yield folder
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            if output.exists():
                os.replace(output, old)
            os.replace(folder, output)
        except BaseException:
            if old.exists() and not output.exists():
                os.replace(old, output)
            raise


def is_repository(folder: Path) -> bool:
    """Whether a folder holds a model."""
    return (folder / "config.json").is_file()


def _stop(*_: object) -> None:
    sys.exit(143)  # as a shell reports SIGTERM; temporary folders are removed on the way out


def command(
    source: Annotated[str, typer.Argument(help="Hub id, folder or file.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)
    ] = None,
    drop_background: Annotated[
        bool, typer.Option("--drop-background", help="Leave out class 0 of Google's 1001 classes.")
    ] = False,
    verify_on: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures to compare on; by default, synthetic ones.", show_default=False),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare with the source's runtime.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a repository that exists.")] = False,
) -> None:
    """Convert a MobileNet into a repository for transformers, and prove that it is the same network."""
    signal.signal(signal.SIGTERM, _stop)
    logging.disable_progress_bar()  # one bar is enough
    try:
        comparisons = convert(
            source,
            output,
            revision=revision,
            drop_background=drop_background,
            verify=verify,
            verify_on=verify_on,
            overwrite=overwrite,
        )
    except (OSError, ValueError, ImportError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error
    console = Console()
    if comparisons:
        table = Table(*Comparison.COLUMNS)
        for comparison in comparisons:
            table.add_row(*comparison.cells)
        console.print(table)
    console.print(f"{output} is written.", highlight=False)


if __name__ == "__main__":
    typer.run(command)
