"""What a training run shows people: metrics, and plots of its curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from mobilenet.text import clean


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


# What stands between two dollars in the names of classes is no formula.
_plain = mpl.rc_context({"text.parse_math": False})


def _shown(names: list[str]) -> list[str]:
    """Names as a plot shows them: no longer than a line, and fit to be drawn."""
    return [clean(name[:40]) for name in names]


@_plain
def plot_precisions(precisions: np.ndarray, names: list[str], path: Path) -> None:
    """Draw each class's precision over recall.

    Args:
        precisions: Of shape (recalls, classes), for recalls that are spaced evenly from 0 to 1; below 0 where a class
            has no objects.
        names: Of the classes.
        path: Image to write.
    """
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    recalls = np.linspace(0, 1, len(precisions))
    drawn = [(name, values) for name, values in zip(_shown(names), precisions.T, strict=True) if (values >= 0).all()]
    for name, values in drawn:
        axes.plot(recalls, values, label=name)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    if 0 < len(drawn) <= 25:
        axes.legend(loc="lower left")
    figure.savefig(path, dpi=100)


def evaluate_logits(prediction: Any) -> dict[str, float]:
    """`metrics`, as the Trainer calls it."""
    return metrics(torch.from_numpy(np.asarray(prediction.predictions)), torch.from_numpy(prediction.label_ids))


def plot_curves(log: list[dict[str, float]], path: Path, metric: str = "accuracy") -> None:
    """Draw loss, learning rate and a metric of the validation images over the epochs."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    losses, metrics = figure.subplots(1, 2)
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["epoch"], float(entry[key])) for entry in log if key in entry]
        if points:
            losses.plot(*zip(*points, strict=True), label=label)
    losses.set(xlabel="epoch", ylabel="loss")
    losses.legend()
    points = [(entry["epoch"], 100 * entry[f"eval_{metric}"]) for entry in log if f"eval_{metric}" in entry]
    if points:
        metrics.plot(*zip(*points, strict=True), color="tab:green")
    metrics.set(xlabel="epoch", ylabel=f"validation {metric.replace('_', ' ')}, %")
    rates = metrics.twinx()
    points = [(entry["epoch"], float(entry["learning_rate"])) for entry in log if "learning_rate" in entry]
    if points:
        rates.plot(*zip(*points, strict=True), color="tab:gray", linewidth=0.8)
    rates.set_ylabel("learning rate", color="tab:gray")
    figure.savefig(path, dpi=120)


def plot_confusion(logits: Tensor, labels: Tensor, names: list[str], path: Path) -> None:
    """Draw what share of each class's images is taken for which class."""
    plot_matrix(multiclass_confusion_matrix(logits, labels, len(names), normalize="true").numpy(), names, path)


@_plain
def plot_matrix(matrix: np.ndarray, names: list[str], path: Path) -> None:
    """Draw shares of what is labeled as one class and predicted as another.

    Args:
        matrix: Of shape (labels, predictions), in 0 to 1.
        names: Of the classes.
        path: Image to write.
    """
    side = min(4 + 0.35 * len(names), 30)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="label")
    if len(names) <= 100:
        axes.set_xticks(range(len(names)), _shown(names), rotation=90)
        axes.set_yticks(range(len(names)), _shown(names))
    if len(names) <= 25:
        for (row, column), share in np.ndenumerate(matrix):
            if share >= 0.005:
                color = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=color)
    figure.savefig(path, dpi=100)
