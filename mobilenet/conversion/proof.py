"""The proof that a converted network is the same: its logits against those of the source's own runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mobilenet.find_images import EXTENSIONS
from mobilenet.progress import status, track

from .checkpoint import Checkpoint, NoOracleError, Oracle
from .names import ConversionError


BATCH = 16


class Comparison(NamedTuple):
    """How two runtimes agree on the same pictures."""

    against: str
    pictures: int
    largest: float  # difference of two logits
    mean: float
    agreement: float  # share of pictures with the same top-1
    limits: dict[str, float]  # on `largest` or `mean`

    COLUMNS = ("compared with", "pictures", "largest difference", "mean difference", "limit", "same top-1")

    @classmethod
    def of(cls, against: str, ours: Tensor, theirs: Tensor, **limits: float) -> Comparison:
        """Compare logits of shape (B, num_labels).

        Raises:
            ConversionError: They differ by more than the limits, or in shape.
        """
        if ours.shape != theirs.shape:
            raise ConversionError(
                f"{against} gives logits of shape {tuple(theirs.shape)}, the converted network {tuple(ours.shape)}."
            )
        difference = (ours - theirs).abs()
        same = (ours.argmax(-1) == theirs.argmax(-1)).float()
        result = cls(against, len(ours), difference.max().item(), difference.mean().item(), same.mean().item(), limits)
        for name, limit in limits.items():
            value = getattr(result, name)
            if not value <= limit:  # true for NaN too
                raise ConversionError(
                    f"the converted network is another than {against}: the {name} difference of logits is "
                    f"{value:.3g}, {limit:.3g} is allowed; nothing was written."
                )
        return result

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of the table that is printed and written into the model card."""
        limits = ", ".join(f"{name} {limit:.2g}" for name, limit in self.limits.items())
        return (
            self.against,
            str(self.pictures),
            f"{self.largest:.2g}",
            f"{self.mean:.2g}",
            limits or "none",
            f"{100 * self.agreement:.4g} %",
        )


def limit(logits: Tensor) -> float:
    """How much two runtimes may differ: 1e-4, or 5e-6 of the largest logit where that is more, which float32 gives."""
    return max(1e-4, 5e-6 * logits.abs().max().item())


@contextmanager
def rounded(model: nn.Module, activations: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Let a network round the output of each layer as a quantized file does, while the context lasts."""

    def rounding(name: str) -> Callable[..., Tensor]:
        scale, zero_point = activations[name]["scale"], activations[name]["zero_point"]
        low, high = {"uint8": (0, 255), "int8": (-128, 127)}[activations[name]["dtype"]]
        return lambda _, inputs, output: ((output / scale + zero_point).round().clamp(low, high) - zero_point) * scale

    modules = {name: module for name, module in model.named_modules() if name in activations}
    if "backbone.pooler_output" in activations:
        modules["backbone.pooler_output"] = model.dropout  # what sees it next
    hooks = [module.register_forward_hook(rounding(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
        ConversionError: A difference is beyond its limit.
    """
    oracle: Oracle | None = None
    caveats = []
    try:
        oracle = checkpoint.oracle()
    except (ImportError, NoOracleError) as error:
        caveats.append(f"Not compared with the source's own runtime: {error}.")
    quantized = checkpoint.quantization is not None
    activations = checkpoint.quantization["activations"] if quantized else {}
    batches: dict[str, list[Tensor]] = {"ours": [], "theirs": [], "ours rounded": []}
    for start in track(range(0, len(pictures), BATCH), "comparing"):
        batch = checkpoint.processor(pictures[start : start + BATCH], return_tensors="pt").pixel_values
        with torch.no_grad():
            batches["ours"].append(model(batch).logits)
            if oracle:
                batches["theirs"].append(oracle.logits(batch)[:, classes])
            if oracle and activations:
                with rounded(model, activations):
                    batches["ours rounded"].append(model(batch).logits)
    logits = {name: torch.cat(rows) for name, rows in batches.items() if rows}
    ours, theirs = logits["ours"], logits.get("theirs")
    comparisons = []
    if oracle:
        name = f"{oracle.name} {oracle.version}"
        if activations:
            # A step is one level of the file's logits. Integer kernels round between layers in ways of their own.
            step = activations["classifier"]["scale"]
            comparisons.append(Comparison.of(f"{name}, rounding alike", logits["ours rounded"], theirs, mean=4 * step))
            comparisons.append(Comparison.of(f"{name}, not rounding", ours, theirs))
        elif quantized:
            # Only weights are of 8 bits, and they are the same here; the runtime rounds activations as they come.
            comparisons.append(Comparison.of(name, ours, theirs, mean=0.1 * theirs.std().item()))
        else:
            comparisons.append(Comparison.of(name, ours, theirs, largest=limit(theirs)))
    loaded = load_back(folder, pictures)
    comparisons.append(Comparison.of("the repository, loaded anew", ours, loaded, largest=limit(ours)))
    return comparisons, caveats


# What a user would type. This package is not imported, so the code that runs is the repository's own.
_LOAD_BACK = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

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
        command = [sys.executable, "-c", _LOAD_BACK, str(folder), str(listing), str(result), str(BATCH)]
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
    found = sorted(str(path.absolute()) for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not found:
        raise ConversionError(f"--verify-on must be a folder of pictures, got {folder}, which holds none.")
    return found
