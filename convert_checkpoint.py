"""Convert a MobileNet of any public source into a repository for transformers, and prove that it is the same network.

python convert_checkpoint.py google/mobilenet_v2_1.0_224 my-mobilenet
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from mobilenet.configuration_mobilenet import MobileNetConfig
from mobilenet.image_processing_mobilenet import RECIPES, MobileNetImageProcessor
from mobilenet.modeling_mobilenet import MobileNetForImageClassification
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from transformers.utils import logging

from mobilenet.conversion import Checkpoint, ConversionError, Options, read_source
from mobilenet.conversion.accuracy import Measured, advise, find_labelled, measure_recipes
from mobilenet.conversion.card import write_card
from mobilenet.conversion.checkpoint import RANGES
from mobilenet.conversion.labels import known, read_labels
from mobilenet.conversion.names import rename
from mobilenet.conversion.progress import warn
from mobilenet.conversion.proof import BATCH, Comparison, draw_pictures, find_pictures, prove
from mobilenet.conversion.unfold import unfold_batch_norm
from mobilenet.text import clean


UNFOLDED = (
    "The source comes with its batch norms folded. They were put back, so that it can be fine-tuned; what the network "
    "computes is the same."
)
FUSED = "Batch norms are folded into the convolutions: for inference. To fine-tune, convert without `--fuse`."
# Statistics of unfolded batch norms settle with fewer pictures than this.
MAX_STATISTICS = 256


def convert(
    source: str,
    output: str | os.PathLike,
    *,
    revision: str | None = None,
    recipe: str | None = None,
    image_size: int | None = None,
    pixel_range: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    fit: str | None = None,
    labels: str | None = None,
    drop_background: bool = False,
    unfold: bool = False,
    fuse: bool = False,
    verify: bool = True,
    verify_on: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> list[Comparison]:
    """Convert a checkpoint into a repository for transformers.

    Args:
        source: Path, Hub id, or the name of published weights of torchvision.
        output: Folder to write. It appears complete or not at all.
        revision: Branch, tag or commit of a Hub id.
        recipe: Preprocessing, a key of RECIPES; by default, what the source records, or its publisher's recipe.
        image_size: Side of the pictures in pixels; by default, what the source records, or 224.
        pixel_range: What the network sees of pixels, a key of RANGES; by default, what the source records, or as the
            recipe says.
        mean: Mean of values in 0 to 1, one or one for each channel; with `std`, instead of a range.
        std: Deviation of values in 0 to 1.
        fit: How pictures become squares, a key of FITS; by default, as the recipe says.
        labels: File of labels, "imagenet" or "imagenet-background"; by default, the source's own, or those of
            ImageNet for 1000 and 1001 classes.
        drop_background: Whether to leave out class 0, "background", so that ImageNet's classes count from 0.
        unfold: Whether to put batch norms back into a network that comes folded, so that it can be fine-tuned.
        fuse: Whether to fold batch norms into the convolutions: for inference, from a third of the tensors.
        verify: Whether to load the result back and compare it with the source's own runtime.
        verify_on: Folder of pictures to compare on, and to take the statistics of unfolded batch norms from; by
            default, synthetic ones. Where it has a folder for each class, or a labels.csv with the columns "file" and
            "label", accuracy is measured under each plausible recipe.
        overwrite: Whether to replace a repository that exists.

    Returns:
        What was compared.

    Raises:
        ConversionError: The source cannot be read or converted, or the result is another network.
        ImportError: The reader of the source is not installed.
        ValueError: Both unfold and fuse are set.
    """
    if unfold and fuse:
        raise ValueError("unfold and fuse exclude each other.")
    with staged(Path(output), overwrite, source) as folder, tempfile.TemporaryDirectory() as scratch:
        pictures = find_pictures(Path(verify_on)) if verify_on else []
        options = Options(recipe, image_size, pixel_range, mean, std, fit)
        origin, checkpoint = read_source(source, revision, options)
        choose_labels(checkpoint, labels, drop_background)
        if checkpoint.config["num_channels"] == 1:
            for processor in filter(None, (checkpoint.processor, checkpoint.feed)):
                keep_gray(processor)
        if not pictures and (verify or unfold):
            pictures = draw_pictures(Path(scratch))
        model = build(checkpoint, origin.given)
        if unfold:
            starts = range(0, min(len(pictures), MAX_STATISTICS), BATCH)
            process = checkpoint.processor
            model = unfold_batch_norm(
                model, (process(pictures[i : i + BATCH], return_tensors="pt").pixel_values for i in starts)
            )
            checkpoint.notes.append(UNFOLDED)
        if drop_background:
            leave_out_background(model, checkpoint.quantization)
        if fuse:
            model.fuse()
            checkpoint.notes.append(FUSED)
        with writing(folder):
            write(folder, model, checkpoint)
        comparisons, caveats = [], ["Not verified: converted with `--no-verify`."]
        if verify:
            classes = slice(1 if drop_background else 0, None)
            comparisons, caveats = prove(folder, model, checkpoint, pictures, classes)
            checkpoint.warnings += caveats
        if verify_on and checkpoint.labels and model.config.num_labels > 1:
            names = [model.config.id2label[index] for index in range(model.config.num_labels)]
            labelled = find_labelled(Path(verify_on).expanduser(), names)
            if labelled:
                measured = measure_recipes(model, checkpoint, labelled)
                say_accuracy(measured, len(labelled))
                checkpoint.warnings += filter(None, [advise(measured, len(labelled))])
        for warning in checkpoint.warnings:
            warn(warning)
        with writing(folder):
            write_card(model.config, origin, checkpoint, comparisons, caveats).save(folder / "README.md")
    return comparisons


def say_accuracy(measured: Sequence[Measured], count: int) -> None:
    """Print accuracy by recipe on stderr, where the proof's table does not stand."""
    table = Table(*Measured.COLUMNS, title=f"top-1 on {count} labelled pictures")
    for each in measured:
        table.add_row(*each.cells)
    Console(stderr=True).print(table)


def write(folder: Path, model: MobileNetForImageClassification, checkpoint: Checkpoint) -> None:
    """Write everything but the card: code, configuration, weights, preprocessing, scales of a quantized source."""
    model.save_pretrained(folder)
    # safetensors lets nobody else read what it writes.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    checkpoint.processor.save_pretrained(folder)
    if checkpoint.quantization:
        (folder / "quantization.json").write_text(json.dumps(checkpoint.quantization), encoding="utf-8")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Tell a full or forbidden disk from other errors."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{folder.name} cannot be written: {error}") from error


def choose_labels(checkpoint: Checkpoint, labels: str | None, drop_background: bool) -> None:
    """Give a checkpoint the labels that a user wants; or its own; or, by their number, those it probably has."""
    count = checkpoint.config["num_labels"]
    if count == 0:
        if labels:
            raise ConversionError("labels are for classifiers: this network ends in features.")
        checkpoint.notes.append("The source has no classifier: what the network gives are features.")
    elif labels:
        checkpoint.labels = read_labels(labels, count, drop_background)
    elif not checkpoint.labels:
        checkpoint.labels = known(count)
        guess = (
            f"the labels are those of ImageNet, since there are {count}"
            if checkpoint.labels
            else "labels are numbers (--labels names them)"
        )
        checkpoint.notes.append(f"The source does not name its classes: {guess}.")


def keep_gray(processor: MobileNetImageProcessor) -> None:
    """Give the network one channel; mean and deviation become those of the three on average."""
    processor.do_grayscale = True
    processor.image_mean = [sum(processor.image_mean) / len(processor.image_mean)]
    processor.image_std = [sum(processor.image_std) / len(processor.image_std)]


def build(checkpoint: Checkpoint, origin: str) -> MobileNetForImageClassification:
    """Build the network that a checkpoint describes, with its weights and labels.

    Raises:
        ConversionError: The tensors are not those of such a network.
    """
    try:
        config = MobileNetConfig(**checkpoint.config)
        if checkpoint.labels:
            name_classes(config, checkpoint.labels)
        with torch.device("meta"):  # every weight comes from the checkpoint
            model = MobileNetForImageClassification(config).eval()
    except ValueError as error:
        raise ConversionError(f"{origin}: {error}") from error
    tensors = rename(checkpoint.tensors, checkpoint.table, model, origin)
    model.load_state_dict(tensors, assign=True)
    return model


def name_classes(config: MobileNetConfig, labels: list[str]) -> None:
    """Set both directions of a configuration's labels; of equal labels, the first keeps the name."""
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in reversed(config.id2label.items())}


@torch.no_grad()
def leave_out_background(model: MobileNetForImageClassification, quantization: dict[str, Any] | None) -> None:
    """Take class 0 out of the classifier, of the labels, and of what is kept of a quantized classifier.

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
    kept = quantization["weights"]["classifier.weight"] if quantization else {}
    for field, values in kept.items():
        if isinstance(values, list) and len(values) > 1:  # one for each class
            kept[field] = values[1:]


@contextlib.contextmanager
def staged(output: Path, overwrite: bool, source: str | os.PathLike = "") -> Iterator[Path]:
    """Give a folder to build in, which takes the output's place at the end; after an error, nothing of it is left.

    Raises:
        ConversionError: The output exists, and is not to be replaced.
    """
    output = output.expanduser().absolute()
    check_output(output, overwrite, source)
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


def check_output(output: Path, overwrite: bool, source: str | os.PathLike) -> None:
    """Raise ConversionError unless there is no such folder, or one that may be replaced: a typing error costs nothing.

    Args:
        output: The folder.
        overwrite: Whether to replace a repository that exists.
        source: What is read meanwhile: a path, or something else.
    """
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ConversionError(f"{output} exists; --overwrite replaces it.")
    if output.is_symlink() or not output.is_dir() or not (is_repository(output) or not any(output.iterdir())):
        raise ConversionError(f"{output} is no model repository, and is not replaced.")
    output = output.resolve()
    if Path.cwd().is_relative_to(output) or (output / ".git").exists():
        raise ConversionError(f"{output} is a clone or the folder you are in, and is not replaced.")
    if os.path.exists(source) and Path(source).resolve().is_relative_to(output):
        raise ConversionError(f"{output} holds the source, and is not replaced.")


def is_repository(folder: Path) -> bool:
    """Whether a folder holds a model."""
    try:
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _stop(*_: object) -> None:
    sys.exit(143)  # as a shell reports SIGTERM; temporary folders are removed on the way out


def _numbers(name: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name} must be numbers with commas between them, got {text!r}.") from error


def command(
    source: Annotated[
        str, typer.Argument(help="Hub id, folder, file, or name of published weights.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="File of labels (one a line, or JSON), imagenet (1000) or imagenet-background (1001, as Google "
            "counts). By default the source's own, or ImageNet's where the number of classes is one of these.",
            show_default=False,
        ),
    ] = None,
    drop_background: Annotated[
        bool, typer.Option("--drop-background", help="Leave out class 0 of Google's 1001 classes.")
    ] = False,
    unfold: Annotated[
        bool,
        typer.Option(
            "--unfold-batch-norm", help="Put batch norms back into a network that comes folded, to fine-tune it."
        ),
    ] = False,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Fold batch norms into the convolutions: faster, for inference only.")
    ] = False,
    pixel_range: Annotated[
        str | None,
        typer.Option(
            "--range",
            help=f"What the network sees of pixels: {', '.join(RANGES)}. By default as the source records it.",
            show_default=False,
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(help="Mean of values in 0 to 1, or one for each channel: 0.485,0.456,0.406.", show_default=False),
    ] = None,
    std: Annotated[str | None, typer.Option(help="Deviation, likewise.", show_default=False)] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            help="How pictures become squares: crop to the middle, stretch, or pad. By default as the recipe says.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help=f"Preprocessing: {', '.join(RECIPES)}. By default as the source records it, or its publisher's.",
            show_default=False,
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Side of the pictures; by default as the source records it, or 224.", show_default=False
        ),
    ] = None,
    verify_on: Annotated[
        Path | None,
        typer.Option(
            help="Folder of pictures to compare on; by default, synthetic ones. With a folder for each class, or a "
            "labels.csv, accuracy is measured under each plausible recipe.",
            show_default=False,
        ),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare with the source's runtime.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a repository that exists.")] = False,
) -> None:
    """Convert a MobileNet into a repository for transformers, and prove that it is the same network.

    \b
    SOURCE is one of
      google/mobilenet_v2_1.0_224         Hub id or folder of transformers' own
      timm/mobilenetv2_100.ra_in1k        Hub id, folder, .safetensors or .pth
      MobileNet_V2_Weights.IMAGENET1K_V2  torchvision's name, or its .pth
      network.pth                         the plain network of courses
      mobilenet_v1_1.0_224.tgz            slim: archive or .ckpt (tensorflow)
      mobilenet_1_0_224_tf.h5             Keras: .h5, .weights.h5, .keras (h5py)
      mobilenet_v2_1.0_224_quant.tflite   TFLite, any bits (ai-edge-litert)
      mobilenetv2-12.onnx                 ONNX, any bits, or a repository of it (onnx)
    """
    signal.signal(signal.SIGTERM, _stop)
    logging.disable_progress_bar()  # one bar is enough
    try:
        comparisons = convert(
            source,
            output,
            revision=revision,
            recipe=recipe,
            image_size=image_size,
            pixel_range=pixel_range,
            mean=_numbers("mean", mean),
            std=_numbers("std", std),
            fit=fit,
            labels=labels,
            drop_background=drop_background,
            unfold=unfold,
            fuse=fuse,
            verify=verify,
            verify_on=verify_on,
            overwrite=overwrite,
        )
    except (OSError, ValueError, ImportError) as error:
        typer.echo(f"Error: {clean(' '.join(str(error).split()))}", err=True)
        raise typer.Exit(1) from error
    console = Console()
    if comparisons:
        table = Table(*Comparison.COLUMNS)
        for comparison in comparisons:
            table.add_row(*comparison.cells)
        console.print(table)
    console.print(clean(f"{output} is written."), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(command)
