"""What a training run leaves for people: metrics, pictures of its course, a model card."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor

from .text import clean, markdown
from .verify import sha256


HELD_OUT = "held out"  # the split of pictures that were taken out of those to train on


def metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, top-5 accuracy where there are more than five classes, and the mean accuracy of the classes.

    Args:
        logits: Of shape (N, classes).
        labels: Of shape (N,).
    """
    from torchmetrics.functional.classification import multiclass_accuracy

    classes = logits.shape[1]
    result = {"accuracy": multiclass_accuracy(logits, labels, classes, average="micro")}
    if classes > 5:
        result["top5_accuracy"] = multiclass_accuracy(logits, labels, classes, average="micro", top_k=5)
    result["balanced_accuracy"] = _class_accuracies(logits, labels).nanmean()
    return {name: float(value) for name, value in result.items()}


def _class_accuracies(logits: Tensor, labels: Tensor) -> Tensor:
    from torchmetrics.functional.classification import multiclass_accuracy

    classes = logits.shape[1]
    accuracies = multiclass_accuracy(logits, labels, classes, average="none")
    return accuracies.masked_fill(labels.bincount(minlength=classes) == 0, torch.nan)


def class_accuracies(logits: Tensor, labels: Tensor) -> list[float | None]:
    """The share of each class's pictures that is recognised; None where there are none."""
    return [None if value != value else value for value in _class_accuracies(logits, labels).tolist()]


def shown(share: float | None) -> str:
    """A share for people."""
    return "none" if share is None else f"{100 * share:.2f} %"


def evaluate_logits(prediction: Any) -> dict[str, float]:
    """`metrics`, as the Trainer calls it."""
    return metrics(torch.from_numpy(np.asarray(prediction.predictions)), torch.from_numpy(prediction.label_ids))


def plot_course(log: list[dict[str, float]], path: Path) -> None:
    """Draw loss, learning rate and validation accuracy over the epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["epoch"], float(entry[key])) for entry in log if key in entry]
        if points:
            losses.plot(*zip(*points, strict=True), label=label)
    losses.set(xlabel="epoch", ylabel="loss")
    losses.legend()
    points = [(entry["epoch"], 100 * entry["eval_accuracy"]) for entry in log if "eval_accuracy" in entry]
    if points:
        accuracies.plot(*zip(*points, strict=True), color="tab:green")
    accuracies.set(xlabel="epoch", ylabel="validation accuracy, %")
    rates = accuracies.twinx()
    points = [(entry["epoch"], float(entry["learning_rate"])) for entry in log if "learning_rate" in entry]
    if points:
        rates.plot(*zip(*points, strict=True), color="tab:gray", linewidth=0.8)
    rates.set_ylabel("learning rate", color="tab:gray")
    figure.savefig(path, dpi=120)


def plot_confusion(logits: Tensor, labels: Tensor, names: list[str], path: Path) -> None:
    """Draw what share of each class's pictures is taken for which class."""
    from matplotlib.figure import Figure
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    matrix = multiclass_confusion_matrix(logits, labels, len(names), normalize="true").numpy()
    side = min(4 + 0.35 * len(names), 30)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="answer", ylabel="truth")
    if len(names) <= 100:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= 25:
        for (row, column), share in np.ndenumerate(matrix):
            if share >= 0.005:
                color = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=color)
    figure.savefig(path, dpi=100)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, all of it or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def dataset_name(dataset: str) -> str:
    """What a card calls a dataset: its Hub id, or the name of its folder or file."""
    return Path(dataset).resolve().name if Path(dataset).exists() else dataset


def read_card(model: str) -> ModelCardData | None:
    """The metadata of the model card of a folder or Hub id; None where there is none that can be read."""
    path = Path(model) / "README.md"
    try:
        return ModelCard.load(path if Path(model).exists() else model).data
    except (FileNotFoundError, EntryNotFoundError, ValueError, yaml.YAMLError):
        return None


def accuracy_on_card(model: str, dataset: str, split: str, subset: str | None = None) -> float | None:
    """The accuracy on a split that the model card of a folder or Hub id gives; None where it gives none.

    A dataset may be at hand as a copy: what counts is its name without the owner's.
    """
    data = read_card(model)
    if data is None:
        return None
    wanted = (dataset_name(dataset).split("/")[-1], subset, split, "accuracy")
    for result in data.eval_results or []:
        if (
            result.dataset_name.split("/")[-1],
            result.dataset_config,
            result.dataset_split,
            result.metric_name,
        ) == wanted:
            return float(result.metric_value)
    return None


class Start(NamedTuple):
    """What a card says of the checkpoint that a run started from."""

    name: str
    sha256: str | None  # of its weights, where they are one file
    license: str | None
    base_model: str | None  # a Hub id

    @classmethod
    def of(cls, model: str) -> Start:
        """Look at a folder, or at what was loaded from the Hub."""
        folder = Path(model) if Path(model).exists() else None
        card = read_card(model)
        base = card.base_model if card and isinstance(card.base_model, str) else None
        files = (
            try_to_load_from_cache(model, name) if folder is None else folder / name
            for name in ("model.safetensors", "pytorch_model.bin")
        )
        digest = next(
            (sha256(Path(file)) for file in files if isinstance(file, (str, Path)) and Path(file).is_file()), None
        )
        name = model if folder is None else folder.resolve().name
        return cls(name, digest, card.license if card else None, base if folder else model)


def write_card(
    folder: Path,
    options: Any,
    model: Any,
    measured: dict[str, tuple[Tensor, Tensor]],
    splits: dict[str, str],
    command: str,
) -> None:
    """Write the model card, with the metrics that were measured on the files in the folder.

    Args:
        folder: Of the repository.
        options: Of the run.
        model: The network, for its configuration.
        measured: Logits and labels of validation and test, as far as there are such; the last one is what the card is
            headed by.
        splits: What the dataset calls them; what is not in it was held out of the pictures to train on.
        command: That ran this.
    """
    measured = {splits.get(role, HELD_OUT): pair for role, pair in measured.items()}
    figures = {split: metrics(*pair) for split, pair in measured.items()}
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset_name(options.dataset),
            dataset_name=dataset_name(options.dataset),
            dataset_split=split,
            dataset_config=options.subset,
            dataset_revision=options.revision,
            metric_type="accuracy",
            metric_name=name.replace("_", " "),
            metric_value=round(value, 6),
        )
        for split, values in figures.items()
        for name, value in values.items()
    ]
    start = Start.of(options.model) if options.model else None
    data = ModelCardData(
        license=start and start.license,
        model_name=folder.name if not options.output else Path(options.output).name,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["mobilenet", "vision"],
        datasets=None if Path(options.dataset).exists() else [options.dataset],
        base_model=start and start.base_model,
        metrics=["accuracy"] if results else None,
        eval_results=results or None,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(options, model, figures, measured, command, start)}")
    card.save(folder / "README.md")


def _text(
    options: Any,
    model: Any,
    figures: dict[str, dict[str, float]],
    measured: dict[str, Any],
    command: str,
    start: Start | None,
) -> str:
    config = model.config
    count = sum(parameter.numel() for parameter in model.parameters())
    name = clean(Path(options.output).name)
    lines = [
        f"# {markdown(name)}",
        "",
        f"{config.architecture} at width {config.width_multiplier:g} for pictures of {config.image_size} pixels, "
        f"with {config.num_labels} classes and {count:,} parameters, "
        + (f"fine-tuned from {markdown(start.name)}" if start else "trained from scratch")
        + f" on {markdown(dataset_name(options.dataset))}.",
        "",
    ]
    if figures:
        lines += ["| split | pictures | " + " | ".join(next(iter(figures.values()))).replace("_", " ") + " |"]
        lines += ["|---" * (2 + len(next(iter(figures.values())))) + "|"]
        for split, values in figures.items():
            cells = " | ".join(map(shown, values.values()))
            lines.append(f"| {markdown(split)} | {len(measured[split][1]):,} | {cells} |")
        split, (logits, labels) = list(measured.items())[-1]
        lines += [
            "",
            "Measured in float32 on the files of this repository"
            + (f"; again:\n\n```\n{_evaluate_command(name, options, split)}\n```" if split != HELD_OUT else "."),
            "",
            f"| class | accuracy on {markdown(split)} |",
            "|---|---|",
        ]
        for label, value in zip(config.id2label.values(), class_accuracies(logits, labels), strict=True):
            lines.append(f"| {markdown(label)} | {shown(value)} |")
        lines += ["", "![Confusion matrix](confusion_matrix.png)"]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        f'classify = pipeline("image-classification", model="{name}", trust_remote_code=True)',
        'print(classify("photo.jpg"))',
        "```",
        "",
        "## Training",
        "",
        "```",
        clean(command),
        "```",
        *(["", f"It started from weights with the SHA-256 `{start.sha256}`."] if start and start.sha256 else []),
        "",
        "All options and versions are in [training.json](training.json), the log in [log.csv](log.csv) and, for "
        "TensorBoard, in `runs`. To train it again: `mobilenet train --config training.json --output again`.",
        "",
        "![Course of the training](curves.png)",
        "",
    ]
    return "\n".join(lines)


def _evaluate_command(model: str, options: Any, split: str) -> str:
    words = ["mobilenet", "evaluate", model, options.dataset, "--split", split]
    for name in ("subset", "revision", "image_column", "label_column"):
        if getattr(options, name) is not None:
            words += ["--" + name.replace("_", "-"), getattr(options, name)]
    return clean(shlex.join(words + ["--skip-unreadable"] * options.skip_unreadable))
