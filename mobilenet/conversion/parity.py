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
from mobilenet.tasks import DETECTION, Task

from .checkpoint import Checkpoint, DetectionOracle, NoOracleError, Oracle
from .graph import BYTES, PREDICTIONS
from .parity_detection import Detections, agreement, detect, joined, run
from .rename import ConversionError


BATCH = 16


class Comparison(NamedTuple):
    """How two runtimes agree on the same images."""

    against: str
    images: int
    largest: float  # difference of two logits, or probabilities, or coordinates of boxes
    mean: float
    agreement: float  # share of images with the same top-1; of several labels each, share of the same yes and no
    limits: dict[str, float]  # on `largest` or `mean`
    agrees_in: str = "same top-1"  # what `agreement` is the share of

    COLUMNS = ("compared with", "images", "largest difference", "mean difference", "limit")

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
        return cls(
            against, len(ours), difference.max().item(), difference.mean().item(), same.mean().item(), limits
        ).checked()

    def checked(self) -> Comparison:
        """The comparison itself, if its differences are within their limits.

        Raises:
            ConversionError: They are not.
        """
        for name, limit in self.limits.items():
            value = getattr(self, name)
            if not value <= limit:  # true for NaN too
                raise ConversionError(
                    f"the converted network is another than {self.against}: the {name} difference is "
                    f"{value:.3g}, {limit:.3g} is allowed; nothing was written."
                )
        return self

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


def columns(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """The header of a table of comparisons."""
    return (*Comparison.COLUMNS, comparisons[0].agrees_in if comparisons else "")


def limit(logits: Tensor) -> float:
    """How much two runtimes may differ: 1e-4, or 5e-6 of the largest logit where that is more, which float32 gives."""
    return max(1e-4, 5e-6 * logits.abs().max().item())


@contextmanager
def rounded(model: nn.Module, activations: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Let a network round the output of each layer as a quantized file does, while the context lasts."""

    def rounding(name: str) -> Callable[..., Tensor]:
        scale, zero_point = activations[name]["scale"], activations[name]["zero_point"]
        low, high = BYTES[activations[name]["dtype"]]
        return lambda _, inputs, output: ((output / scale + zero_point).round().clamp(low, high) - zero_point) * scale

    # What a hidden layer gives is rounded after its activation, which is a module of its own.
    modules = dict(model.named_modules())
    after = {f"hidden.{index}": f"hidden.{index + 1}" for index in range(0, len(getattr(model, "hidden", ())), 2)}
    hooks = [
        modules[after.get(name, name)].register_forward_hook(rounding(name))
        for name in activations
        if after.get(name, name) in modules
    ]
    # What no module gives is rounded before the module that sees it next.
    seen = {
        "pixel_values": model,
        "backbone.pooled": modules.get("backbone.pre_logits"),
        "backbone.pooler_output": modules.get("hidden"),
    }
    seen |= {name.replace(".reduce", ".pooled"): modules[name] for name in modules if name.endswith(".squeeze.reduce")}
    for name in {name for name, module in seen.items() if module is not None} & activations.keys():
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
    anew, task = "the repository, loaded anew", checkpoint.task
    if task is DETECTION:
        scores, boxes, comparisons, caveats = compare_detections(model, checkpoint, images)
        loaded = load_back(folder, images, task)
        ours, theirs = ((s, b, detect(checkpoint.processor, s, b)) for s, b in ((scores, boxes), loaded.values()))
        comparisons += _compare_detections(anew, ours, theirs, {"largest": SCORE_LIMIT}, {"largest": BOX_LIMIT})
        return comparisons, caveats
    ours, comparisons, caveats = compare_with_source(model, checkpoint, images, classes)
    loaded = load_back(folder, images, task)["logits"]
    comparisons.append(Comparison.of(anew, ours, loaded, largest=limit(ours)))
    return comparisons, caveats


# How much scores and coordinates of boxes may differ: between floats, and on average from those of a quantized file.
SCORE_LIMIT, BOX_LIMIT = 1e-4, 1e-3
QUANTIZED_LIMIT = 0.01


def compare_detections(
    model: nn.Module, checkpoint: Checkpoint, images: Sequence[str]
) -> tuple[Tensor, Tensor, list[Comparison], list[str]]:
    """Compare a detector with its source's runtime, as `check_parity` does first.

    Returns:
        The network's scores and boxes of every anchor, the comparisons, and what could not be compared.

    Raises:
        ConversionError: A difference is beyond its limit.
    """
    oracle: DetectionOracle | None = None
    comparisons, caveats = [], []
    try:
        oracle = checkpoint.oracle()
    except (ImportError, NoOracleError) as error:
        caveats.append(f"Not compared with the source's own runtime: {error}.")
    activations = (checkpoint.quantization or {}).get("activations", {})
    ours, alike, theirs = [], [], []
    for start in track(range(0, len(images), BATCH), "comparing"):
        batch = checkpoint.processor(images[start : start + BATCH], return_tensors="pt").pixel_values
        with torch.no_grad():
            ours.append(run(model, batch))
            if oracle:
                theirs.append(oracle.results(batch))
            if oracle and activations:
                with rounded(model, activations):
                    alike.append(run(model, batch))
    scores, boxes = (torch.cat(parts) for parts in zip(*ours, strict=True))
    if oracle:
        name = f"{oracle.name} {oracle.version}"
        found = joined(checkpoint.processor, theirs)
        if alike:
            rows = [torch.cat(parts) for parts in zip(*alike, strict=True)]
            rounding = (*rows, detect(checkpoint.processor, *rows))
            comparisons += _compare_detections(f"{name}, rounding alike", rounding, found)
        limits = [{"largest": SCORE_LIMIT}, {"largest": BOX_LIMIT}]
        if checkpoint.quantization is not None:
            name, limits = f"{name}, not rounding", [{"mean": QUANTIZED_LIMIT}] * 2
        comparisons += _compare_detections(
            name, (scores, boxes, detect(checkpoint.processor, scores, boxes)), found, *limits
        )
    return scores, boxes, comparisons, caveats


def _compare_detections(
    against: str,
    ours: tuple[Tensor, Tensor, Detections],
    theirs: tuple[Tensor, Tensor, Detections],
    of_scores: dict[str, float] | None = None,
    of_boxes: dict[str, float] | None = None,
) -> list[Comparison]:
    """Compare scores, boxes and detections: a row for the scores, and one for the boxes."""
    share, rows = agreement(ours[2], theirs[2]), []
    for what, index, limits in (("scores", 0, of_scores), ("boxes", 1, of_boxes)):
        difference = (ours[index] - theirs[index]).abs()
        numbers = len(ours[index]), difference.max().item(), difference.mean().item(), share
        rows.append(Comparison(f"{against}: {what}", *numbers, limits or {}, "same detections").checked())
    return rows


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
import torch, transformers
from safetensors.torch import save_file
from transformers.models.auto.image_processing_auto import AutoImageProcessor

repo, images, result, batch, auto_class, names = *sys.argv[1:4], int(sys.argv[4]), sys.argv[5], sys.argv[6:]
with open(images, encoding="utf-8") as file:
    images = json.load(file)
processor = AutoImageProcessor.from_pretrained(repo, trust_remote_code=True)
model = getattr(transformers, auto_class).from_pretrained(repo, trust_remote_code=True).eval()
with torch.no_grad():
    outputs = [
        model(**processor(images=images[i : i + batch], return_tensors="pt"))
        for i in range(0, len(images), batch)
    ]
save_file({name: torch.cat([output[name] for output in outputs]).contiguous() for name in names}, result)
"""


def load_back(folder: Path, images: Sequence[str], task: Task) -> dict[str, Tensor]:
    """Outputs of a repository by name, loaded through the Auto classes by a process of its own.

    Raises:
        ConversionError: It does not load; the message holds the last line of the process.
    """
    with tempfile.TemporaryDirectory() as scratch:
        listing, result = Path(scratch, "images.json"), Path(scratch, "logits.safetensors")
        listing.write_text(json.dumps(list(images)), encoding="utf-8")
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch, "modules")), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", LOAD_BACK, str(folder), str(listing), str(result), str(BATCH)]
        command += [task.auto_class, *task.outputs]
        with status("loading the result back"):
            run = subprocess.run(  # noqa: S603
                command, cwd=scratch, env=environment, capture_output=True, text=True, check=False
            )
        if run.returncode:
            last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
            raise ConversionError(f"the converted repository does not load: {last}")
        tensors = load_file(result)
        return {name: tensors[name] for name in task.outputs}


def find_images(folder: Path) -> list[str]:
    """Every image below a folder, sorted.

    Raises:
        ConversionError: There is none.
    """
    found = sorted(str(path.absolute()) for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not found:
        raise ConversionError(f"--compare-on must be a folder of images, got {folder}, which holds none.")
    return found
