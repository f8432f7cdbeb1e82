"""The proof that a converted network is the same: its logits against the source's own runtime's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoint import Checkpoint, Oracle
from .names import ConversionError
from .progress import status, track


TOLERANCE = 1e-4
_BATCH = 16
_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Comparison(NamedTuple):
    """How two runtimes agree on the same pictures."""

    against: str
    pictures: int
    difference: float  # largest difference of logits
    agreement: float  # share of pictures with the same top-1
    tolerance: float

    COLUMNS = ("compared with", "pictures", "largest logit difference", "allowed", "same top-1")

    @classmethod
    def of(cls, against: str, ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> Comparison:
        """Compare logits of shape (B, num_labels).

        Raises:
            ConversionError: They differ by more than the tolerance, or in shape.
        """
        if ours.shape != theirs.shape:
            raise ConversionError(
                f"logits of {against} must have shape {tuple(ours.shape)}, got {tuple(theirs.shape)}."
            )
        same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
        result = cls(against, len(ours), (ours - theirs).abs().max().item(), same, tolerance)
        if not result.difference <= tolerance:  # true for NaN too
            raise ConversionError(
                f"the converted network is another than {against}: logits differ by {result.difference:.3g}, "
                f"{tolerance:g} is allowed; nothing was written."
            )
        return result

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of the table that is printed and written into the model card."""
        return (
            self.against,
            str(self.pictures),
            f"{self.difference:.1e}",
            f"{self.tolerance:.0e}",
            f"{100 * self.agreement:.4g} %",
        )


def prove(
    folder: Path, model: nn.Module, checkpoint: Checkpoint, pictures: Sequence[str], classes: slice
) -> tuple[list[Comparison], list[str]]:
    """Compare a network with its source's runtime, and with the repository that was written, loaded back.

    Args:
        folder: The repository.
        model: The network in memory.
        checkpoint: The source.
        pictures: Paths of pictures.
        classes: Which of the source's classes the network has.

    Returns:
        The comparisons, and what could not be compared.

    Raises:
        ConversionError: A difference is beyond its tolerance.
    """
    comparisons, caveats = [], []
    oracle: Oracle | None = None
    try:
        oracle = checkpoint.oracle()
    except ImportError as error:
        caveats.append(f"Not compared with the source's own runtime, which is not installed: {error}.")
    ours, theirs = [], []
    for start in track(range(0, len(pictures), _BATCH), "comparing"):
        batch = checkpoint.processor(pictures[start : start + _BATCH], return_tensors="pt").pixel_values
        with torch.no_grad():
            ours.append(model(batch).logits)
            if oracle:
                theirs.append(oracle.logits(batch)[:, classes])
    if oracle:
        comparisons.append(Comparison.of(f"{oracle.name} {oracle.version}", torch.cat(ours), torch.cat(theirs)))
    loaded = load_back(folder, pictures)
    comparisons.append(Comparison.of("this repository, loaded by a new process", torch.cat(ours), loaded))
    return comparisons, caveats


# What a user would type. This package is not imported, so the code that runs is the repository's own.
_LOAD_BACK = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

repo, pictures, result, batch = *sys.argv[1:4], int(sys.argv[4])
with open(pictures, encoding="utf-8") as file:
    pictures = json.load(file)
processor = AutoImageProcessor.from_pretrained(repo, trust_remote_code=True)
model = AutoModelForImageClassification.from_pretrained(repo, trust_remote_code=True).eval()
with torch.no_grad():
    logits = [
        model(**processor(images=pictures[i : i + batch], return_tensors="pt")).logits
        for i in range(0, len(pictures), batch)
    ]
save_file({"logits": torch.cat(logits)}, result)
"""


def load_back(folder: Path, pictures: Sequence[str]) -> Tensor:
    """Logits of a repository, loaded through the Auto classes by a process of its own.

    Raises:
        ConversionError: It does not load; the message holds the last line of the process.
    """
    with tempfile.TemporaryDirectory() as scratch:
        listing, result = Path(scratch, "pictures.json"), Path(scratch, "logits.safetensors")
        listing.write_text(json.dumps(list(pictures)), encoding="utf-8")
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch, "modules")), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", _LOAD_BACK, str(folder), str(listing), str(result), str(_BATCH)]
        with status("loading the result back"):
            run = subprocess.run(  # noqa: S603
                command, cwd=scratch, env=environment, capture_output=True, text=True, check=False
            )
        if run.returncode:
            last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
            raise ConversionError(f"the converted repository does not load: {last}")
        return load_file(result)["logits"]


def find_pictures(folder: Path) -> list[str]:
    """Every picture below a folder, sorted.

    Raises:
        ConversionError: There is none.
    """
    found = sorted(str(path.absolute()) for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise ConversionError(f"--verify-on must be a folder of pictures, got {folder}, which holds none.")
    return found


def draw_pictures(folder: Path, count: int = 8) -> list[str]:
    """Write synthetic pictures, always the same: coarse colours under fine noise, upright and lying."""
    random = np.random.default_rng(0)
    paths = []
    for index in range(count):
        size = (333, 250) if index % 2 else (240, 320)
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        fine = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), np.uint8))
        paths.append(str(folder / f"{index}.png"))
        Image.blend(coarse, fine, 0.1).save(paths[-1])
    return paths
