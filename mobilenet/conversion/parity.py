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
from mobilenet.image_processing_mobilenet import MobileNetImageProcessor
from mobilenet.preprocessing_mobilenet import OPTIONS, open_image, place, read_options
from mobilenet.progress import status, track
from mobilenet.segmentation_mobilenet import resize
from mobilenet.tasks import DETECTION, SEGMENTATION, Task

from .checkpoint import Checkpoint, DetectionOracle, NoOracleError, Oracle
from .graph import BYTES, PREDICTIONS
from .parity_detection import Detections, agreement, detect, joined, run
from .rename import ConversionError


BATCH = 16
# The least share of pixels that must have the same label: of a float network, and of one that rounds.
SAME_LABELS, SAME_LABELS_IN_BYTES = 0.999, 0.9


class Comparison(NamedTuple):
    """How two runtimes agree on the same images."""

    against: str
    images: int
    largest: float | None  # difference of two logits, probabilities or boxes; None where labels alone are compared
    mean: float | None
    # Share of images with the same top-1, of a segmenter's, of pixels; of several labels each, of the same yes and no.
    agreement: float
    limits: dict[str, float]  # on `largest` or `mean`, or the least `agreement`
    agrees_in: str = "same top-1"  # what `agreement` is the share of

    COLUMNS = ("compared with", "images", "largest difference", "mean difference", "limit")

    @classmethod
    def of(
        cls,
        against: str,
        ours: Tensor,
        theirs: Tensor,
        threshold: float | None = None,
        images: int | None = None,
        **limits: float,
    ) -> Comparison:
        """Compare logits, or probabilities, of shape (B, num_labels), or (pixels of all images, num_labels).

        Args:
            against: What ours is compared with.
            ours: Of the converted network.
            theirs: Of the source.
            threshold: Where a label is given to an image; by default, the label of the largest value is.
            images: How many there are, where there are several rows for each.
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
        count = len(ours) if images is None else images
        numbers = difference.max().item(), difference.mean().item(), same.mean().item()
        return cls(against, count, *numbers, limits).checked()

    def checked(self) -> Comparison:
        """The comparison itself, if it is within its limits.

        Raises:
            ConversionError: It is not.
        """
        for name, limit in self.limits.items():
            value = getattr(self, name)
            if not value <= limit:  # true for NaN too
                raise ConversionError(
                    f"the converted network is another than {self.against}: the {name} difference is "
                    f"{value:.3g}, {limit:.3g} is allowed; nothing was written."
                )
        return self

    @classmethod
    def of_labels(cls, against: str, ours: Tensor, theirs: Tensor, images: int, **limits: float) -> Comparison:
        """Compare the labels of pixels.

        Raises:
            ConversionError: Fewer are the same than `agreement` allows.
        """
        result = cls(against, images, None, None, (ours == theirs).float().mean().item(), limits)
        least = limits.get("agreement", 0.0)
        if not result.agreement >= least:
            raise ConversionError(
                f"the converted network is another than {against}: {100 * result.agreement:.4g} % of the pixels have "
                f"the same label, {100 * least:.4g} % must; nothing was written."
            )
        return result

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of the table that is printed and written into the model card."""
        limits = ", ".join(
            f"{100 * limit:g} %" if name == "agreement" else f"{name} {limit:.2g}"
            for name, limit in self.limits.items()
        )
        return (
            self.against,
            str(self.images),
            *("" if value is None else f"{value:.2g}" for value in (self.largest, self.mean)),
            limits or "none",
            f"{100 * self.agreement:.4g} %",
        )


def columns(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """The header of a table of comparisons."""
    return (*Comparison.COLUMNS, comparisons[0].agrees_in if comparisons else "")


def by_class(logits: Tensor) -> Tensor:
    """Logits of shape (B, num_labels), or (B, num_labels, h, w), with a row for each image or for each pixel."""
    return logits.movedim(1, -1).flatten(0, -2)


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
    hidden = getattr(model, "hidden", ())
    after = {f"hidden.{index}": f"hidden.{index + 1}" for index in range(0, len(hidden), 2)}
    modules = dict(model.named_modules())
    hooks = [
        modules[after.get(name, name)].register_forward_hook(rounding(name))
        for name in activations
        if after.get(name, name) in modules
    ]
    # What no module gives is rounded before the module that sees it next.
    seen = {
        "pixel_values": "",
        "backbone.pooled": "backbone.pre_logits",
        "backbone.pooler_output": "hidden",
        "segmentation_head.pooled": "segmentation_head.branches.0",
        "segmentation_head.joined": "segmentation_head.project",
    }
    seen = {name: modules[layer] for name, layer in seen.items() if layer in modules}
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
    anew, task = "the repository, loaded anew", checkpoint.task
    if task is DETECTION:
        scores, boxes, comparisons, caveats = compare_detections(model, checkpoint, images)
        loaded = load_back(folder, images, task)
        ours, theirs = ((s, b, detect(checkpoint.processor, s, b)) for s, b in ((scores, boxes), loaded.values()))
        comparisons += _compare_detections(anew, ours, theirs, {"largest": SCORE_LIMIT}, {"largest": BOX_LIMIT})
        return comparisons, caveats
    ours, comparisons, caveats = compare_with_source(model, checkpoint, images, classes)
    loaded = load_back(folder, images, task, batch_size(checkpoint.processor))["logits"]
    comparisons.append(Comparison.of(anew, ours, loaded, images=len(images), largest=limit(ours)))
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
        The network's logits of shape (B, num_labels), or a row for each pixel of a segmenter's; the comparisons; and
        what could not be compared.

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
    batches: dict[str, list[Tensor]] = {name: [] for name in ("ours", "theirs", "predictions", "ours rounded")}
    maps: dict[str, list[Tensor]] = {"ours": [], "theirs": [], "ours rounded": []}
    size = batch_size(checkpoint.processor)
    for start in track(range(0, len(images), size), "comparing"):
        paths = images[start : start + size]
        batch = checkpoint.processor(paths, return_tensors="pt").pixel_values
        with torch.no_grad():
            outputs = {"ours": model(batch).logits}
            if oracle:
                given = checkpoint.feed(paths, return_tensors="pt").pixel_values if checkpoint.feed else batch
                outputs["theirs"] = oracle.logits(given)[:, classes]
            if oracle and activations:
                with rounded(model, activations):
                    outputs["ours rounded"] = model(batch).logits
            if oracle and oracle.predictions and checkpoint.task is SEGMENTATION:
                found = {"theirs": oracle.predictions(given)}
                for name in outputs.keys() - {"theirs"}:
                    step = logits_step(activations) if name == "ours rounded" else None
                    aligned = checkpoint.processor.align_corners
                    found[name] = label_maps(outputs[name], found["theirs"].shape[-2:], aligned, step)
                for name, each in found.items():
                    maps[name] += without_padding(each, paths, checkpoint.processor)
            elif oracle and oracle.predictions and classes == slice(0, None):
                outputs["predictions"] = oracle.predictions(given)
        for name, output in outputs.items():
            batches[name].append(by_class(output))
    logits = {name: torch.cat(rows) for name, rows in batches.items() if rows}
    ours, theirs = logits["ours"], logits.get("theirs")
    comparisons = []
    if oracle:
        comparisons += _compare(oracle, checkpoint.quantization, logits, len(images))
        labels = {name: torch.cat(rows) for name, rows in maps.items() if rows}
        if labels:
            comparisons += _compare_labels(oracle, labels, len(images), quantized)
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


def logits_step(activations: dict[str, dict[str, Any]]) -> float | None:
    """One level of a quantized file's logits; None where it does not round them."""
    names = ("classifier", "segmentation_head.classifier")
    return next((activations[name]["scale"] for name in names if name in activations), None)


def batch_size(processor: MobileNetImageProcessor) -> int:
    """How many images to take at a time: one, where they keep their shape."""
    is_fixed = processor.do_center_crop or processor.pad_size or (processor.do_resize and "height" in processor.size)
    return BATCH if is_fixed else 1


def label_maps(logits: Tensor, size: Sequence[int], align_corners: bool, step: float | None = None) -> Tensor:
    """The class of each pixel that a segmenter saw, of shape (B, H, W).

    Args:
        logits: Of shape (B, num_labels, h, w).
        size: Height and width of what it saw.
        align_corners: How logits are resized.
        step: To multiples of which resized logits are rounded, as a quantized file rounds them.
    """
    logits = resize(logits, size, align_corners)
    return (logits if step is None else (logits / step).round()).argmax(1)


def without_padding(labels: Tensor, paths: Sequence[str], processor: MobileNetImageProcessor) -> list[Tensor]:
    """The labels of those pixels that show an image, in a row for each of label maps (B, H, W)."""
    options = read_options({name: getattr(processor, name) for name in OPTIONS})
    rows = []
    for each, path in zip(labels, paths, strict=True):
        height, width = (
            slice(max(0, axis.offset), axis.offset + axis.resized) for axis in place(*open_image(path).size, options)
        )
        rows.append(each[height, width].flatten())
    return rows


def _compare_labels(oracle: Oracle, labels: dict[str, Tensor], images: int, quantized: bool) -> list[Comparison]:
    """Compare the labels of pixels with those that a runtime itself gives to them."""
    name = f"{oracle.name} {oracle.version}, labels of pixels"
    ours, theirs = labels["ours"], labels["theirs"]
    if not quantized:
        return [Comparison.of_labels(name, ours, theirs, images, agreement=SAME_LABELS)]
    # Resized logits of 8 bits are often equal, and the first label gets the pixel.
    limits = {"agreement": SAME_LABELS_IN_BYTES}
    alike = [("ours rounded", "rounding alike", limits)] * ("ours rounded" in labels)
    return [
        Comparison.of_labels(f"{name}, {how}", labels[key], theirs, images, **limits)
        for key, how, limits in (*alike, ("ours", "not rounding", {}))
    ]


def _compare(
    oracle: Oracle, quantization: dict[str, Any] | None, logits: dict[str, Tensor], images: int
) -> list[Comparison]:
    """Compare logits with those of a runtime, as closely as its arithmetic allows."""
    name, ours, theirs = f"{oracle.name} {oracle.version}", logits["ours"], logits["theirs"]
    compare = partial(Comparison.of, images=images)
    step = logits_step(quantization["activations"]) if quantization else None
    if step:
        # A step is one level of the file's logits. Integer kernels round between layers in ways of their own.
        allowed = max(4 * step, 0.1 * theirs.std().item())
        alike = compare(f"{name}, rounding alike", logits["ours rounded"], theirs, mean=allowed)
        return [alike, compare(f"{name}, not rounding", ours, theirs)]
    if quantization:
        # Weights of 8 bits are the same here; the runtime rounds activations as they come.
        return [compare(name, ours, theirs, mean=0.1 * theirs.std().item())]
    if oracle.is_half:
        return [compare(f"{name}, in 16 bits", ours, theirs, mean=0.01 * theirs.std().item())]
    return [compare(name, ours, theirs, largest=limit(theirs))]


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
tensors = {name: [output[name] for output in outputs] for name in names}
if "logits" in tensors:  # by class, for images of any size
    tensors["logits"] = [logits.movedim(1, -1).flatten(0, -2) for logits in tensors["logits"]]
save_file({name: torch.cat(parts).contiguous() for name, parts in tensors.items()}, result)
"""


def load_back(folder: Path, images: Sequence[str], task: Task, batch: int = BATCH) -> dict[str, Tensor]:
    """Outputs of a repository by name, loaded through the Auto classes by a process of its own.

    Logits are as `by_class` gives them.

    Args:
        folder: The repository.
        images: Paths of images.
        task: What the network is for.
        batch: How many images it takes at a time.

    Raises:
        ConversionError: It does not load; the message holds the last line of the process.
    """
    with tempfile.TemporaryDirectory() as scratch:
        listing, result = Path(scratch, "images.json"), Path(scratch, "logits.safetensors")
        listing.write_text(json.dumps(list(images)), encoding="utf-8")
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch, "modules")), "HF_HUB_OFFLINE": "1"}
        arguments = [str(folder), str(listing), str(result), str(batch), task.auto_class, *task.outputs]
        command = [sys.executable, "-c", LOAD_BACK, *arguments]
        with status("loading the result back"):
            run = subprocess.run(  # noqa: S603
                command, cwd=scratch, env=environment, capture_output=True, text=True, check=False
            )
        if run.returncode:
            last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
            raise ConversionError(f"the converted repository does not load: {last}")
        tensors = load_file(result)
        return {name: tensors[name] for name in task.outputs}


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def find_images(folder: Path) -> list[str]:
    """Every image below a folder, sorted.

    Raises:
        ConversionError: There is none.
    """
    found = sorted(str(path.absolute()) for path in folder.rglob("*") if _is_image(path))
    if not found:
        raise ConversionError(f"--compare-on must be a folder of images, got {folder}, which holds none.")
    return found
