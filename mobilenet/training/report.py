"""What a training run shows people: metrics, and plots of its curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix


def metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, top-5 accuracy where there are more than five classes, and the mean accuracy of the classes.

    Args:
        logits: Of shape (N, classes).
        labels: Of shape (N,).
    """
    classes = logits.shape[1]
    result = {"accuracy": multiclass_accuracy(logits, labels, classes, average="micro")}
    if classes > 5:
        result["top5_accuracy"] = multiclass_accuracy(logits, labels, classes, average="micro", top_k=5)
    result["balanced_accuracy"] = _class_accuracies(logits, labels).nanmean()
    return {name: float(value) for name, value in result.items()}


def _class_accuracies(logits: Tensor, labels: Tensor) -> Tensor:
    classes = logits.shape[1]
    accuracies = multiclass_accuracy(logits, labels, classes, average="none")
    return accuracies.masked_fill(labels.bincount(minlength=classes) == 0, torch.nan)


def class_accuracies(logits: Tensor, labels: Tensor) -> list[float | None]:
    """The share of each class's images that is recognized; None where there are none."""
    return [None if value != value else value for value in _class_accuracies(logits, labels).tolist()]


def evaluate_logits(prediction: Any) -> dict[str, float]:
    """`metrics`, as the Trainer calls it."""
    return metrics(torch.from_numpy(np.asarray(prediction.predictions)), torch.from_numpy(prediction.label_ids))


def plot_curves(log: list[dict[str, float]], path: Path) -> None:
    """Draw loss, learning rate and validation accuracy over the epochs."""
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
    """Draw what share of each class's images is taken for which class."""
    matrix = multiclass_confusion_matrix(logits, labels, len(names), normalize="true").numpy()
    side = min(4 + 0.35 * len(names), 30)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="label")
    if len(names) <= 100:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= 25:
        for (row, column), share in np.ndenumerate(matrix):
            if share >= 0.005:
                color = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=color)
    figure.savefig(path, dpi=100)
