"""Parity of a converted network with its source: its logits against those of the source's own runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mobilenet.find_images import EXTENSIONS
from mobilenet.progress import status, track

from .checkpoint import Checkpoint, NoOracleError, Oracle
from .graph import PREDICTIONS
from .rename import ConversionError


BATCH = 16


class Comparison(NamedTuple):
    """How two runtimes agree on the same images."""

    against: str
    images: int
    largest: float  # difference of two logits, or probabilities
    mean: float
    agreement: float  # share of images with the same top-1; of several labels each, share of the same yes and no
    limits: dict[str, float]  # on `largest` or `mean`

    COLUMNS = ("compared with", "images", "largest difference", "mean difference", "limit", "same top-1")

    @classmethod
    def of(
        cls, against: str, ours: Tensor, theirs: Tensor, threshold: float | None = None, **limits: float
    ) -> Comparison:
        """Compare logits, or probabilities, of shape (B, num_labels).

        Args:
            against: What ours is compared with.
            ours: Of the converted network.
            theirs: Of the source.
            threshold: Where a label is given to an image; by default, the label of the largest value is.
            **limits: On `largest` or `mean`.

        Raises:
            ConversionError: They differ by more than the limits, or in shape.
        """
        if ours.shape != theirs.shape:
            raise ConversionError(
                f"{against} gives logits of shape {tuple(theirs.shape)}, the converted network {tuple(ours.shape)}."
            )
        difference = (ours - theirs).abs()
        if threshold is None:
            same = (ours.argmax(-1) == theirs.argmax(-1)).float()
        else:
            same = ((ours > threshold) == (theirs > threshold)).float()
        result = cls(against, len(ours), difference.max().item(), difference.mean().item(), same.mean().item(), limits)
        for name, limit in limits.items():
            value = getattr(result, name)
            if not value <= limit:  # true for NaN too
                raise ConversionError(
                    f"the converted network is another than {against}: the {name} difference is "
                    f"{value:.3g}, {limit:.3g} is allowed; nothing was written."
                )
        return result

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of the table that is printed and written into the model card."""
        limits = ", ".join(f"{name} {limit:.2g}" for name, limit in self.limits.items())
        return (
            self.against,
            str(self.images),
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

    # What a hidden layer gives is rounded after its activation, which is a module of its own.
    after = {f"hidden.{index}": f"hidden.{index + 1}" for index in range(0, len(model.hidden), 2)}
    modules = dict(model.named_modules())
    hooks = [
        modules[after.get(name, name)].register_forward_hook(rounding(name))
        for name in activations
        if after.get(name, name) in modules
    ]
    # What no module gives is rounded before the module that sees it next.
    seen = {
        "pixel_values": model,
        "backbone.pooled": modules["backbone"].pre_logits,
        "backbone.pooler_output": model.hidden,
    }
    seen |= {name.replace(".reduce", ".pooled"): modules[name] for name in modules if name.endswith(".squeeze.reduce")}
    for name in seen.keys() & activations.keys():
        hook = partial(lambda rounds, module, inputs: rounds(module, inputs, *inputs), rounding(name))
        hooks.append(seen[name].register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_parity(
    folder: Path, model: nn.Module, checkpoint: Checkpoint, images: Sequence[str], classes: slice
) -> tuple[list[Comparison], list[str]]:
    """Compare a network with its source's runtime, and with the repository that was written, loaded back.

    Args:
        folder: The repository.
        model: The network in memory.
        checkpoint: The source.
        images: Paths of images.
        classes: Which of the source's classes the network has.

    Returns:
        The comparisons, and what could not be compared.

    Raises:
        ConversionError: A difference is beyond its limit.
    """
    ours, comparisons, caveats = compare_with_source(model, checkpoint, images, classes)
    loaded = load_back(folder, images)
    comparisons.append(Comparison.of("the repository, loaded anew", ours, loaded, largest=limit(ours)))
    return comparisons, caveats


def compare_with_source(
    model: nn.Module, checkpoint: Checkpoint, images: Sequence[str], classes: slice = slice(0, None)
) -> tuple[Tensor, list[Comparison], list[str]]:
    """Compare a network with its source's runtime, as `check_parity` does first.

    Returns:
        The network's logits of shape (B, num_labels), the comparisons, and what could not be compared.

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
    batches: dict[str, list[Tensor]] = {"ours": [], "theirs": [], "predictions": [], "ours rounded": []}
    for start in track(range(0, len(images), BATCH), "comparing"):
        paths = images[start : start + BATCH]
        batch = checkpoint.processor(paths, return_tensors="pt").pixel_values
        with torch.no_grad():
            batches["ours"].append(model(batch).logits)
            if oracle:
                given = checkpoint.feed(paths, return_tensors="pt").pixel_values if checkpoint.feed else batch
                batches["theirs"].append(oracle.logits(given)[:, classes])
                if oracle.predictions and classes == slice(0, None):
                    batches["predictions"].append(oracle.predictions(given))
            if oracle and activations:
                with rounded(model, activations):
                    batches["ours rounded"].append(model(batch).logits)
    logits = {name: torch.cat(rows) for name, rows in batches.items() if rows}
    ours, theirs = logits["ours"], logits.get("theirs")
    comparisons = []
    if oracle:
        comparisons += _compare(oracle, checkpoint.quantization, logits)
        if "predictions" in logits:
            predict = PREDICTIONS[checkpoint.prediction]
            sigmoid = checkpoint.prediction == "sigmoid"
            limits = {} if quantized else {"largest": 2e-3 if oracle.is_half else limit(theirs)}
            comparisons.append(
                Comparison.of(
                    f"{oracle.name}, {checkpoint.prediction.replace('_', ' of ')}",
                    predict(ours),
                    logits["predictions"],
                    0.5 if sigmoid else None,
                    **limits,
                )
            )
    return ours, comparisons, caveats


def _compare(oracle: Oracle, quantization: dict[str, Any] | None, logits: dict[str, Tensor]) -> list[Comparison]:
    """Compare logits with those of a runtime, as closely as its arithmetic allows."""
    name, ours, theirs = f"{oracle.name} {oracle.version}", logits["ours"], logits["theirs"]
    if quantization and "classifier" in quantization["activations"]:
        # A step is one level of the file's logits. Integer kernels round between layers in ways of their own.
        step = quantization["activations"]["classifier"]["scale"]
        allowed = max(4 * step, 0.1 * theirs.std().item())
        alike = Comparison.of(f"{name}, rounding alike", logits["ours rounded"], theirs, mean=allowed)
        return [alike, Comparison.of(f"{name}, not rounding", ours, theirs)]
    if quantization:
        # Weights of 8 bits are the same here; the runtime rounds activations as they come.
        return [Comparison.of(name, ours, theirs, mean=0.1 * theirs.std().item())]
    if oracle.is_half:
        return [Comparison.of(f"{name}, in 16 bits", ours, theirs, mean=0.01 * theirs.std().item())]
    return [Comparison.of(name, ours, theirs, largest=limit(theirs))]


# What a user would type. This package is not imported, so the code that runs is the repository's own.
LOAD_BACK = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

repo, images, result, batch = *sys.argv[1:4], int(sys.argv[4])
with open(images, encoding="utf-8") as file:
    images = json.load(file)
processor = AutoImageProcessor.from_pretrained(repo, trust_remote_code=True)
model = AutoModelForImageClassification.from_pretrained(repo, trust_remote_code=True).eval()
with torch.no_grad():
    logits = [
        model(**processor(images=images[i : i + batch], return_tensors="pt")).logits
        for i in range(0, len(images), batch)
    ]
save_file({"logits": torch.cat(logits)}, result)
"""


def load_back(folder: Path, images: Sequence[str]) -> Tensor:
    """Logits of a repository, loaded through the Auto classes by a process of its own.

    Raises:
        ConversionError: It does not load; the message holds the last line of the process.
    """
    with tempfile.TemporaryDirectory() as scratch:
        listing, result = Path(scratch, "images.json"), Path(scratch, "logits.safetensors")
        listing.write_text(json.dumps(list(images)), encoding="utf-8")
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch, "modules")), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", LOAD_BACK, str(folder), str(listing), str(result), str(BATCH)]
        with status("loading the result back"):
            run = subprocess.run(  # noqa: S603
                command, cwd=scratch, env=environment, capture_output=True, text=True, check=False
            )
        if run.returncode:
            last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
            raise ConversionError(f"the converted repository does not load: {last}")
        return load_file(result)["logits"]


def find_images(folder: Path) -> list[str]:
    """Every image below a folder, sorted.

    Raises:
        ConversionError: There is none.
    """
    found = sorted(str(path.absolute()) for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not found:
        raise ConversionError(f"--compare-on must be a folder of images, got {folder}, which holds none.")
    return found
