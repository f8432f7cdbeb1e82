"""Model cards: what is read from one, and what is written into one."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError

from .architectures_mobilenet import ARCHITECTURES
from .heads_mobilenet import DETECTORS
from .preprocessing_mobilenet import regular
from .repository import sha256
from .tasks import CLASSIFICATION, DETECTION, SEGMENTATION, Task
from .text import clean, markdown, percent


HELD_OUT = "held out"  # the split of images that were taken out of those to train on


def dataset_name(dataset: str) -> str:
    """What a card calls a dataset: its Hub id, or the name of its folder or file."""
    return Path(dataset).resolve().name if Path(dataset).exists() else dataset


def read_card(model: str) -> ModelCardData | None:
    """The metadata of the model card of a folder or Hub id; None where there is none that can be read."""
    path = Path(model) / "README.md"
    try:
        return ModelCard.load(regular(path) if Path(model).exists() else model).data
    except (FileNotFoundError, EntryNotFoundError, ValueError, yaml.YAMLError):
        return None
    except (AttributeError, RecursionError, TypeError):  # huggingface_hub takes the types of fields for granted
        return None


def metric_on_card(
    model: str, dataset: str, split: str, subset: str | None = None, metric: str = "accuracy"
) -> float | None:
    """A metric on a split that the model card of a folder or Hub id gives; None where it gives none.

    A dataset may be at hand as a copy: what counts is its id or its name, without the owner's.
    """
    data = read_card(model)
    if data is None:
        return None
    name, *wanted = dataset_name(dataset).split("/")[-1], subset, split, metric.replace("_", " ")
    for result in data.eval_results or []:
        names = {str(given).split("/")[-1] for given in (result.dataset_type, result.dataset_name)}
        if name in names and wanted == [result.dataset_config, result.dataset_split, result.metric_name]:
            try:
                return float(result.metric_value)
            except (OverflowError, TypeError, ValueError):
                return None
    return None


class Measured(NamedTuple):
    """What a network scores on a split."""

    images: int
    metrics: dict[str, float]
    by_class: list[float | None]


class Words(NamedTuple):
    """What a card says of a task."""

    task: Task
    metric_type: str  # of the Hub
    by_class: str  # what a class is measured by
    plot: str  # file
    plot_title: str


# By the values of the option `task`.
WORDS = {
    "classification": Words(CLASSIFICATION, "accuracy", "accuracy", "confusion_matrix.png", "Confusion matrix"),
    "detection": Words(
        DETECTION, "mAP", "average precision", "precision_recall.png", "Precision over recall at an IoU of 0.5"
    ),
    "segmentation": Words(SEGMENTATION, "mean_iou", "IoU", "confusion_matrix.png", "Confusion matrix of pixels"),
}


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
    measured: dict[str, Measured],
    command: str,
) -> None:
    """Write the model card, with the metrics that were measured on the files in the folder.

    Args:
        folder: Of the repository.
        options: Of the run.
        model: The network, for its configuration.
        measured: By the name of the split, or HELD_OUT; the last one is what the card is headed by.
        command: That ran this.
    """
    words = WORDS[options.task]
    results = [
        EvalResult(
            task_type=words.task.name,
            dataset_type=dataset_name(options.dataset),
            dataset_name=dataset_name(options.dataset),
            dataset_split=split,
            dataset_config=options.subset,
            dataset_revision=options.revision,
            metric_type="accuracy" if name.endswith("accuracy") else words.metric_type,
            metric_name=name.replace("_", " "),
            metric_value=round(value, 6),
        )
        for split, figures in measured.items()
        for name, value in figures.metrics.items()
    ]
    start = Start.of(options.model) if options.model else None
    data = ModelCardData(
        license=start and start.license,
        model_name=folder.name if not options.output else Path(options.output).name,
        library_name="transformers",
        pipeline_tag=words.task.name,
        tags=["mobilenet", "vision"],
        datasets=None if Path(options.dataset).exists() else [options.dataset],
        base_model=start and start.base_model,
        metrics=[words.metric_type] if results else None,
        eval_results=results or None,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(options, model, measured, command, start)}")
    card.save(folder / "README.md")


def _text(
    options: Any,
    model: Any,
    measured: dict[str, Measured],
    command: str,
    start: Start | None,
) -> str:
    config, words = model.config, WORDS[options.task]
    head = config.detector or config.segmentation_head
    count = sum(parameter.numel() for parameter in model.parameters())
    name = clean(Path(options.output).name)
    lines = [
        f"# {markdown(name)}",
        "",
        f"{config.architecture}{f' with {head}' if head else ''} at width {config.width_multiplier:g} "
        f"for images of {config.image_size} pixels, "
        f"with {config.num_labels} classes and {count:,} parameters, "
        + (f"fine-tuned from {markdown(start.name)}" if start else "trained from scratch")
        + f" on {markdown(dataset_name(options.dataset))}.",
        "",
    ]
    if measured:
        split, figures = list(measured.items())[-1]
        lines += ["| split | images | " + " | ".join(figures.metrics).replace("_", " ") + " |"]
        lines += ["|---" * (2 + len(figures.metrics)) + "|"]
        for name_of_split, values in measured.items():
            cells = " | ".join(map(percent, values.metrics.values()))
            lines.append(f"| {markdown(name_of_split)} | {values.images:,} | {cells} |")
        lines += [
            "",
            "Measured in float32 on the files of this repository"
            + (f"; again:\n\n```\n{_evaluate_command(name, options, split)}\n```" if split != HELD_OUT else "."),
            "",
            f"| class | {words.by_class} on {markdown(split)} |",
            "|---|---|",
        ]
        for label, value in zip(config.id2label.values(), figures.by_class, strict=True):
            lines.append(f"| {markdown(label)} | {percent(value)} |")
        lines += ["", f"![{words.plot_title}]({words.plot})"]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        f'{words.task.command} = pipeline("{words.task.name}", model="{name}", trust_remote_code=True)',
        f'print({words.task.command}("photo.jpg"))',
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
        "![Curves of the training](curves.png)",
        "",
    ]
    return "\n".join(lines)


def _evaluate_command(model: str, options: Any, split: str) -> str:
    words = ["mobilenet", "evaluate", model, options.dataset, "--split", split]
    for name in ("subset", "revision", "image_column", "label_column", "label_names"):
        if getattr(options, name) is not None:
            words += ["--" + name.replace("_", "-"), getattr(options, name)]
    return clean(shlex.join(words + ["--skip-unreadable"] * options.skip_unreadable))


def export_card(
    source: str,
    target: str,
    config: Any,
    size: tuple[int, int],
    columns: Sequence[str],
    comparisons: Sequence[Any],
    task: Task = CLASSIFICATION,
) -> ModelCard:
    """The card of an exported network.

    Args:
        source: Folder or Hub id that it was exported from.
        target: Where it runs.
        config: Its configuration.
        size: Height and width of the images.
        columns: Of the table of comparisons.
        comparisons: Its rows, which have cells.
        task: What it is for.
    """
    is_js = target == "transformers.js"
    data = ModelCardData(
        library_name="transformers.js" if is_js else "transformers",
        pipeline_tag=task.name,
        tags=["vision", "mobilenet", *([] if is_js else [target])],
        base_model=None if os.path.isdir(source) else source,
    )
    lines = [columns, ["---"] * len(columns), *(row.cells for row in comparisons)]
    height, width = size
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n"
        f"# {ARCHITECTURES[config.architecture].title} for {target}\n\n"
        f"Width {config.width_multiplier:g}, {config.num_labels} classes, batch norm folded, exported at "
        f"{height}x{width} pixels from {markdown(Path(source).name if os.path.isdir(source) else source)}.\n\n"
        + (_USE_JS if is_js else _USE.replace("TASK", task.name).replace("COMMAND", task.command))
        + f"\n\n## Beside torch\n\nThe largest difference of {' and '.join(task.outputs)}, and the median time of one "
        "image.\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    )


_USE = """```python
import mobilenet  # the installed package: knows the configuration and the image processor
from transformers import AutoImageProcessor, pipeline
from transformers.exporters import ExportedModel

folder = "path/to/this/repository"
model = ExportedModel.from_pretrained(folder)
COMMAND = pipeline(
    "TASK", model=model, image_processor=mobilenet.MobileNetImageProcessor.from_pretrained(folder)
)
COMMAND("photo.jpg")
```"""

_USE_JS = """```js
import { pipeline } from "@huggingface/transformers";

const classify = await pipeline("image-classification", "owner/this-repository", { dtype: "q8" });
await classify("photo.jpg");
```

`dtype: "q8"` is `onnx/model_quantized.onnx`, what browsers load by default; `dtype: "fp32"` is `onnx/model.onnx`."""


# Of conversions

SSD = "1512.02325"  # on arXiv


def conversion_card(
    config: Any,
    origin: Any,
    checkpoint: Any,
    columns: Sequence[str],
    comparisons: Sequence[Any],
    caveats: Sequence[str],
) -> ModelCard:
    """The card of a converted network.

    Args:
        config: Its configuration.
        origin: Where the source comes from.
        checkpoint: What was read from it.
        columns: Of the table of comparisons.
        comparisons: Its rows, which have cells.
        caveats: What was not compared.
    """
    architecture, task = ARCHITECTURES[config.architecture], checkpoint.task
    papers, title, metrics = [architecture.paper], architecture.title, ["accuracy"]
    if task is DETECTION:
        papers, title, metrics = [SSD, *papers], DETECTORS[config.detector].title, None
    elif task is SEGMENTATION:
        papers.append(config.segmentation.paper)
        title, metrics = f"{config.segmentation.title} on {title}", ["mean_iou"]
    papers = list(dict.fromkeys(papers))
    data = ModelCardData(
        license=checkpoint.license,
        library_name="transformers",
        pipeline_tag=task.name if config.num_labels else "image-feature-extraction",
        tags=["vision", "mobilenet", *(f"arxiv:{paper}" for paper in papers)],
        datasets=["imagenet-1k"] if task is CLASSIFICATION and config.num_labels in (1000, 1001) else None,
        metrics=metrics,
        base_model=origin.given if origin.revision else None,
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}, width {config.width_multiplier:g}, {config.image_size} pixels",
        f"Converted from {checkpoint.kind}. "
        + (f"{config.num_labels} classes. " if config.num_labels else "Features, without a classifier. ")
        + f"Paper{'s' * (len(papers) > 1)}: "
        + f"{', '.join(f'[arXiv:{paper}](https://arxiv.org/abs/{paper})' for paper in papers)}.",
        _USE_CONVERTED.format(task=task.name, verb=task.command),
        *([_FINE_TUNE.format(source=_TRAINED_BY[task.name])] if config.has_batch_norm else []),
        "## Source",
        _source(origin, checkpoint),
        "## Parity",
        *([_table(columns, [comparison.cells for comparison in comparisons])] if comparisons else []),
        *dict.fromkeys([*caveats, *checkpoint.warnings]),
        f"Made with {', '.join(_versions())}.",
        *(["## Notes", *checkpoint.notes] if checkpoint.notes else []),
    ]
    return ModelCard("\n\n".join(sections) + "\n")


_USE_CONVERTED = """## Use

```python
from transformers import pipeline

{verb} = pipeline("{task}", model="path/to/this/repository", trust_remote_code=True)
{verb}("photo.jpg")
```

`trust_remote_code` runs the files of this repository whose names end in `_mobilenet.py`. After `import mobilenet`, the
installed package, it is not needed."""

_FINE_TUNE = """## Fine-tune

`mobilenet train {source} --model path/to/this/repository --output fine-tuned`, or any training loop for PyTorch."""
_TRAINED_BY = {
    CLASSIFICATION.name: "images",
    DETECTION.name: "images --task detection",
    SEGMENTATION.name: "images --task segmentation",
}


def _source(origin: Any, checkpoint: Any) -> str:
    given = f"[{origin.given}]({origin.url})" if origin.url else markdown(Path(origin.given).name)
    where = f"{given} at revision `{origin.revision}`" if origin.revision else given
    return f"{where}\n\n" + _table(
        ("file", "SHA-256"), [(markdown(path.name), f"`{sha256(path)}`") for path in checkpoint.files]
    )


def _versions() -> list[str]:
    try:
        own = [f"mobilenet {version('mobilenet')}"]
    except PackageNotFoundError:  # a clone
        own = []
    return [
        *own,
        f"transformers {version('transformers')}",
        f"torch {version('torch')}",
        f"Python {platform.python_version()}",
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
