"""An exported network beside torch: the same logits, the same top-1, and how fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mobilenet.progress import track
from mobilenet.repository import RepositoryError


class ExportError(RepositoryError):
    """A network that cannot be exported, or an export that does not predict as the network does."""


# Largest difference of logits from torch's, over the largest logit, that float32 may show.
TOLERANCE = 1e-4


class Engine(NamedTuple):
    """An exported network, loaded back."""

    name: str
    run: Callable[[Tensor], Tensor]  # from pixel_values to logits
    is_exact: bool  # whether it computes in float32
    takes_any_size: bool


class Timed(NamedTuple):
    """Logits of images that came one by one."""

    logits: Tensor  # of shape (images, labels)
    milliseconds: float  # for one image, the median


class Comparison(NamedTuple):
    """How an exported network predicts, beside torch."""

    name: str
    images: int
    difference: float  # largest difference of logits
    agreement: float  # share of images with the same top-1
    milliseconds: float  # for one image, the median
    torch_milliseconds: float

    COLUMNS = ("engine", "images", "difference", "same top-1", "ms", "torch, ms", "speed")

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


def compare(
    engine: Engine,
    reference: Callable[[Tensor], Tensor],
    images: Sequence[Tensor],
    expected: Timed,
    min_agreement: float,
) -> Comparison:
    """Hold an export against torch: image by image, in a batch, and at another size.

    Raises:
        ExportError: They do not predict alike.
    """
    channels, height, width = images[0].shape[1:]
    shapes = [(3, channels, height, width)]
    if engine.takes_any_size:
        shapes.append((2, channels, height + 31, max(33, width - 32)))
    for shape in shapes:
        pixel_values = torch.randn(shape)
        _check(engine, engine.run(pixel_values), reference(pixel_values))
    measured = measure(engine.run, images, f"comparing {engine.name}")
    _check(engine, measured.logits, expected.logits)
    agreement = (measured.logits.argmax(-1) == expected.logits.argmax(-1)).double().mean().item()
    if not engine.is_exact and agreement < min_agreement:
        raise ExportError(
            f"{engine.name} gives torch's prediction on {100 * agreement:.3g} % of {len(images)} images, "
            f"{100 * min_agreement:.3g} % are asked for; nothing was written."
        )
    difference = (measured.logits - expected.logits).abs().max().item()
    times = measured.milliseconds, expected.milliseconds
    return Comparison(engine.name, len(images), difference, agreement, *times)


def _check(engine: Engine, logits: Tensor, expected: Tensor) -> None:
    if logits.shape != expected.shape or not logits.isfinite().all():
        raise ExportError(
            f"{engine.name} must give finite logits of shape {tuple(expected.shape)}, got {tuple(logits.shape)}; "
            "nothing was written."
        )
    allowed = TOLERANCE * max(1, expected.abs().max().item())
    difference = (logits - expected).abs().max().item()
    if engine.is_exact and difference > allowed:
        raise ExportError(
            f"{engine.name} predicts otherwise than torch: logits differ by {difference:.3g}, {allowed:.3g} is "
            "allowed; nothing was written."
        )


def measure(run: Callable[[Tensor], Tensor], images: Sequence[Tensor], description: str) -> Timed:
    """Run images of shape (1, C, H, W) one by one."""
    run(images[0])  # the first call allocates
    logits, seconds = [], []
    for pixel_values in track(images, description):
        start = time.perf_counter()
        logits.append(run(pixel_values))
        seconds.append(time.perf_counter() - start)
    return Timed(torch.cat(logits), 1000 * statistics.median(seconds))
