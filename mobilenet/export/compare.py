"""An exported network beside torch: the same outputs, the same predictions, and how fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mobilenet.postprocessing_mobilenet import overlap, suppress
from mobilenet.preprocessing_mobilenet import SUPPRESSION
from mobilenet.progress import track
from mobilenet.repository import RepositoryError
from mobilenet.tasks import CLASSIFICATION, DETECTION, SEGMENTATION, Task


class ExportError(RepositoryError):
    """A network that cannot be exported, or an export that does not predict as the network does."""


# Largest difference of outputs from torch's, over the largest of them, that float32 may show.
TOLERANCE = 1e-4

Outputs = tuple[Tensor, ...]  # those that the task names


class Engine(NamedTuple):
    """An exported network, loaded back."""

    name: str
    run: Callable[[Tensor], Outputs]  # from pixel_values
    is_exact: bool  # whether it computes in float32
    takes_any_size: bool
    suppresses: bool = False  # whether a detector gives objects in place of scores and boxes


class Timed(NamedTuple):
    """Outputs of images that came one by one."""

    outputs: list[Outputs]
    milliseconds: float  # for one image, the median


class Comparison(NamedTuple):
    """How an exported network predicts, beside torch."""

    name: str
    images: int
    difference: float  # largest difference of outputs
    agreement: float  # share of the same predictions, as the task has it
    milliseconds: float  # for one image, the median
    torch_milliseconds: float
    agrees_in: str = "same top-1"  # what the agreement is about

    COLUMNS = ("engine", "images", "difference", "same top-1", "ms", "torch, ms", "speed")

    @property
    def columns(self) -> tuple[str, ...]:
        """The head of the table that it is a row of."""
        return tuple(self.agrees_in if name == "same top-1" else name for name in self.COLUMNS)

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of the table that is printed and written into the model card."""
        return (
            self.name,
            str(self.images),
            f"{self.difference:.1e}",
            f"{100 * self.agreement:.4g} %",
            f"{self.milliseconds:.1f}",
            f"{self.torch_milliseconds:.1f}",
            f"{self.torch_milliseconds / self.milliseconds:.1f}x",
        )


class Agreement(NamedTuple):
    """What counts as the same prediction."""

    column: str
    verdict: str  # of an engine, between its name and the share
    share: Callable[[Outputs, Outputs, Mapping[str, Any]], tuple[float, float]]  # of one image: the same, and all


def _same_classes(found: Outputs, expected: Outputs, options: Mapping[str, Any]) -> tuple[float, float]:
    """Of logits of shape (1, labels, ...)."""
    same = found[0].argmax(1) == expected[0].argmax(1)
    return same.sum().item(), same.numel()


# Objects of a lower score are not looked at; and to be the same, boxes must overlap so far.
_MIN_SCORE, _MIN_IOU = 0.3, 0.7
# Of objects that a graph suppresses itself, a score may be rounded to the other side of the threshold.
_EXACT_SUPPRESSION = 0.99


def _same_objects(found: Outputs, expected: Outputs, options: Mapping[str, Any]) -> tuple[float, float]:
    """Of scores and boxes, or of rows that are suppressed already: those that the other has too, counted both ways."""
    ours, theirs = (objects(outputs, options) for outputs in (found, expected))
    same = 0
    pairs = ours[:, None, 3:], theirs[None, :, 3:]
    overlaps = overlap(*pairs).maximum((pairs[0] == pairs[1]).all(-1).float())  # boxes may have no area
    overlaps[ours[:, None, 1] != theirs[None, :, 1]] = 0
    for row in overlaps if len(theirs) else ():
        best = row.argmax()
        if row[best] >= _MIN_IOU:
            overlaps[:, best] = 0  # it stands for one object alone
            same += 1
    return 2.0 * same, float(len(ours) + len(theirs))


def objects(outputs: Outputs, options: Mapping[str, Any], threshold: float = _MIN_SCORE) -> Tensor:
    """Objects of one image, of shape (objects, 7): 0, class, score, and x0, y0, x1, y1 in 0 to 1."""
    if len(outputs) == 1:  # an exported network has suppressed
        rows = outputs[0]
        return rows[rows[:, 2] >= threshold][: options["max_detections"]]
    (scores,), (boxes,) = outputs
    scores, labels, boxes = suppress(scores, boxes, threshold, **{name: options[name] for name in SUPPRESSION})
    return torch.cat([torch.zeros(len(scores), 1), labels[:, None].float(), scores[:, None], boxes], 1)


AGREEMENTS = {
    CLASSIFICATION.name: Agreement("same top-1", "gives torch's prediction on", _same_classes),
    DETECTION.name: Agreement("same objects", "finds torch's objects, and no others, for", _same_objects),
    SEGMENTATION.name: Agreement("same class", "gives torch's class to the pixels of", _same_classes),
}


def compare(
    engine: Engine,
    reference: Callable[[Tensor], Outputs],
    images: Sequence[Tensor],
    expected: Timed,
    min_agreement: float,
    task: Task = CLASSIFICATION,
    options: Mapping[str, Any] | None = None,
) -> Comparison:
    """Hold an export against torch: image by image, in a batch, and at another size.

    Args:
        engine: The export.
        reference: Torch's network.
        images: Of shape (1, C, H, W).
        expected: What torch makes of them.
        min_agreement: Share of the same predictions that it must show where it computes in less than float32.
        task: What the network is for.
        options: Of the image processor.

    Raises:
        ExportError: They do not predict alike.
    """
    channels, height, width = images[0].shape[1:]
    check = (lambda *_: 0.0) if engine.suppresses else _check
    shapes = [(3, channels, height, width)]
    if engine.takes_any_size:
        shapes.append((2, channels, height + 31, max(33, width - 32)))
    for shape in shapes:
        pixel_values = torch.randn(shape)
        check(engine, engine.run(pixel_values), reference(pixel_values), task)
    measured = measure(engine.run, images, f"comparing {engine.name}")
    difference = max(
        check(engine, found, torchs, task) for found, torchs in zip(measured.outputs, expected.outputs, strict=True)
    )
    agrees = AGREEMENTS[task.name]
    shares = [
        agrees.share(found, torchs, options or {})
        for found, torchs in zip(measured.outputs, expected.outputs, strict=True)
    ]
    same, total = (sum(column) for column in zip(*shares, strict=True))
    agreement = same / total if total else 1.0
    if engine.is_exact:
        min_agreement = _EXACT_SUPPRESSION if engine.suppresses else 0.0
    if agreement < min_agreement:
        raise ExportError(
            f"{engine.name} {agrees.verdict} {100 * agreement:.3g} % of {len(images)} images, "
            f"{100 * min_agreement:.3g} % are asked for; nothing was written."
        )
    times = measured.milliseconds, expected.milliseconds
    return Comparison(engine.name, len(images), difference, agreement, *times, agrees.column)


def _check(engine: Engine, outputs: Outputs, expected: Outputs, task: Task) -> float:
    """The largest difference of outputs.

    Raises:
        ExportError: It is too large, or they are none.
    """
    largest = 0.0
    for name, found, torchs in zip(task.outputs, outputs, expected, strict=True):
        if found.shape != torchs.shape or not found.isfinite().all():
            raise ExportError(
                f"{engine.name} must give finite {name} of shape {tuple(torchs.shape)}, got {tuple(found.shape)}; "
                "nothing was written."
            )
        allowed = TOLERANCE * max(1, torchs.abs().max().item())
        difference = (found - torchs).abs().max().item()
        if engine.is_exact and difference > allowed:
            raise ExportError(
                f"{engine.name} predicts otherwise than torch: {name} differ by {difference:.3g}, {allowed:.3g} is "
                "allowed; nothing was written."
            )
        largest = max(largest, difference)
    return largest


def measure(run: Callable[[Tensor], Outputs], images: Sequence[Tensor], description: str) -> Timed:
    """Run images of shape (1, C, H, W) one by one."""
    run(images[0])  # the first call allocates
    outputs, seconds = [], []
    for pixel_values in track(images, description):
        start = time.perf_counter()
        outputs.append(run(pixel_values))
        seconds.append(time.perf_counter() - start)
    return Timed(outputs, 1000 * statistics.median(seconds))
