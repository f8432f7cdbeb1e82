"""Classify pictures by the thousand: names come in, and one result for each goes out, in order.

Every step is a generator, and threads run only a few batches ahead, so that memory does not grow with the number of
pictures.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from enum import Enum
from itertools import groupby, islice
from pathlib import Path
from pickle import UnpicklingError
from threading import Lock
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import cached_file, logging

from .architectures_mobilenet import ARCHITECTURES
from .configuration_mobilenet import MobileNetConfig
from .image_processing_mobilenet import is_url
from .text import clean


# What a folder is searched for; a file that is named itself may have any name.
EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tga", ".tif", ".tiff", ".webp"),
)


class Layout(str, Enum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class Engine(str, Enum):
    """What runs the network. All but torch run what `mobilenet export` writes."""

    AUTO = "auto"  # what the model was exported for, or else torch
    TORCH = "torch"
    ONNX = "onnx"
    OPENVINO = "openvino"


class Picture(NamedTuple):
    """A picture on its way to the network: its name, then its pixels, or why it has none."""

    name: str
    pixels: Tensor | None = None  # of shape (1, C, H, W)
    error: str | None = None


class Prediction(NamedTuple):
    """One label of a picture."""

    index: int
    label: str
    score: float  # a probability; a plain value where the model was trained for regression


class Result(NamedTuple):
    """What a picture shows, best first, or why nobody knows."""

    name: str
    predictions: list[Prediction]
    error: str | None


class Classifier(NamedTuple):
    """A model with what it takes to use it."""

    engine: str  # in words
    read: Callable[[str], Tensor]  # from a path or URL to pixels of shape (1, C, H, W)
    network: Callable[[Tensor], Tensor]  # from pixels of shape (B, C, H, W) to scores of shape (B, labels)
    labels: list[str]
    gives_probabilities: bool


def default_model() -> str | None:
    """The folder of the code, in a clone that holds weights too."""
    root = Path(__file__).resolve().parents[1]
    return str(root) if (root / "model.safetensors").exists() else None


# What transformers and torch raise on configurations and weights that are missing or broken.
_LOADING_ERRORS = (
    *(AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(SafetensorError, StrictDataclassError, UnpicklingError),
)


def load(model: str, revision: str | None = None, engine: str = Engine.AUTO, fast_decode: bool = False) -> Classifier:
    """Load a model and its image processor from a folder or a Hub id. Code that comes with them does not run.

    Args:
        model: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
        engine: What runs the network, an Engine.
        fast_decode: Whether to decode large JPEGs at a reduced size; otherwise, as the image processor is set.

    Raises:
        ImportError: The engine is not installed.
        ValueError: There is no such model, it is broken, it is no MobileNet, its weights do not fit its
            configuration, or it was not exported for the engine.
    """
    with _loading(model):
        return _load(model, _options(revision), Engine(engine), fast_decode)


def load_network(
    model: str, revision: str | None = None, labels: list[str] | None = None
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a network for torch and its image processor, as `load` does.

    Args:
        model: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
        labels: Names for its classes; where there are more or fewer of them, the classifier starts anew.

    Raises:
        ValueError: There is no such model, it is broken, it is no MobileNet, or its weights do not fit its
            configuration.
    """
    with _loading(model):
        options = _options(revision)
        config = _load_config(model, options)
        if labels is not None:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: index for index, label in enumerate(labels)}
        network = _load_weights(model, config, options, anew=() if labels is None else _CLASSIFIER)
        return network, AutoImageProcessor.from_pretrained(model, **options)


def _options(revision: str | None) -> dict[str, Any]:
    return {"revision": revision or "main", "trust_remote_code": False}


@contextmanager
def _loading(model: str) -> Iterator[None]:
    if not os.path.isdir(model):
        _check_hub_id(model)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except _LOADING_ERRORS as error:
        raise ValueError(f"{model} cannot be loaded: {str(error) or type(error).__name__}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_hub_id(model: str) -> None:
    try:
        validate_repo_id(model)
    except HFValidationError:
        is_id = False
    else:
        is_id = not os.path.exists(model)
    if not is_id:
        raise ValueError(f"model must be a folder or a Hub id, got {model!r}.")


def _load_config(model: str, options: dict[str, Any]) -> MobileNetConfig:
    if os.path.isdir(model) and not os.path.isfile(os.path.join(model, "config.json")):
        raise FileNotFoundError("it holds no config.json.")  # transformers would guess by the folder's name
    config = AutoConfig.from_pretrained(model, **options)
    if config.model_type != MobileNetConfig.model_type:
        hint = " Convert it first." if config.model_type in ARCHITECTURES else ""
        raise ValueError(f"model_type must be {MobileNetConfig.model_type}, got {config.model_type}.{hint}")
    if config.num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, got {config.num_labels}.")
    config.return_dict = True  # it may ask for tuples
    return config


def _load(model: str, options: dict[str, Any], engine: Engine, fast_decode: bool) -> Classifier:
    config = _load_config(model, options)
    processor = AutoImageProcessor.from_pretrained(model, **options)
    processor.fast_decode = fast_decode or processor.fast_decode
    exported_for = _exported_for(model, options["revision"])
    if engine is Engine.AUTO:
        engine = Engine.TORCH if exported_for is None else exported_for
    words = engine.value
    if engine is Engine.TORCH:
        network = _load_weights(model, config, options).fuse()
    elif engine is exported_for:
        try:
            network, words = _load_export(model, engine, options)
        except ImportError:
            raise
        except Exception as error:  # of protobuf, ONNX Runtime, OpenVINO
            raise ValueError(f"its network for {engine.value} is broken: {error}") from error
    else:
        exports = "no engine" if exported_for is None else exported_for.value
        raise ValueError(f"it was exported for {exports}, not for {engine.value}.")
    score = _score_function(config)

    def read(name: str) -> Tensor:
        pixels = processor(images=name, return_tensors="pt")["pixel_values"]
        if pixels.shape[1] != config.num_channels:
            raise ValueError(f"{name}: the network takes {config.num_channels} channels, got {pixels.shape[1]}")
        return pixels

    @torch.inference_mode()
    def run_network(pixels: Tensor) -> Tensor:
        try:
            scores = score(network(pixel_values=pixels).logits)
        except Exception as error:  # ONNX Runtime has classes of its own
            raise ValueError(f"{model} cannot be run: {error}") from error
        if scores.shape[1] != config.num_labels:
            raise ValueError(f"{model} must answer with {config.num_labels} scores, got {scores.shape[1]}.")
        if not scores.isfinite().all():
            raise ValueError(f"{model} must answer with finite scores, got NaN or infinity: its weights are broken.")
        return scores

    return Classifier(
        engine=words,
        read=read,
        network=run_network,
        labels=[str(config.id2label.get(index, f"LABEL_{index}")) for index in range(config.num_labels)],
        gives_probabilities=config.problem_type != "regression",
    )


_CLASSIFIER = ("classifier.bias", "classifier.weight")


def _load_weights(
    model: str, config: MobileNetConfig, options: dict[str, Any], anew: tuple[str, ...] = ()
) -> PreTrainedModel:
    """Load a network, of whose weights none but those that may start anew are missing or of another shape."""
    network, report = AutoModelForImageClassification.from_pretrained(
        model,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    # transformers gives such tensors random values. Before version 5 it reports names alone, without shapes.
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    if wrong := sorted({*report["missing_keys"], *mismatched} - {*anew}):
        others = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"it lacks weights of the right shape for {', '.join(wrong[:3])}{others}.")
    return network


def _exported_for(model: str, revision: str) -> Engine | None:
    """The engine that a model was exported for; None if it was not."""
    manifest = cached_file(model, "export.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if manifest is None:
        return None
    name = json.loads(Path(manifest).read_text(encoding="utf-8"))["export_format"]
    if name not in (Engine.ONNX, Engine.OPENVINO):
        raise ValueError(f"it must be exported for onnx or openvino, got {name}.")
    return Engine(name)


def _load_export(model: str, engine: Engine, options: dict[str, Any]) -> tuple[Callable[..., Any], str]:
    try:
        from transformers.exporters import ExportedModel
    except ImportError as error:
        raise ImportError(
            f"engine {engine.value} needs transformers.exporters: pip install 'transformers>=5.23'"
        ) from error
    if engine is Engine.OPENVINO:
        network = ExportedModel.from_pretrained(model, device="cpu", **options)
        (runner,) = network.runners.values()
        # OpenVINO chooses it by the processor.
        precision = runner.compiled_model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        lock = Lock()  # it has one request to run, which spreads over all processors

        def infer(pixel_values: Tensor) -> Any:
            with lock:
                return network(pixel_values=pixel_values)

        return infer, f"openvino, computing in {precision}"
    try:
        from onnxruntime import SessionOptions
    except ImportError as error:
        raise ImportError("engine onnx needs onnxruntime: pip install onnxruntime") from error
    settings = SessionOptions()
    settings.intra_op_num_threads = 1
    return ExportedModel.from_pretrained(model, device="cpu", session_options=settings, **options), "onnx"


def _score_function(config: MobileNetConfig) -> Callable[[Tensor], Tensor]:
    """From logits to scores, as transformers' image-classification pipeline decides."""
    if config.problem_type == "regression":
        return lambda logits: logits
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return torch.sigmoid
    return lambda logits: logits.softmax(-1)


def find(names: Iterable[str]) -> Iterator[Picture]:
    """Find the pictures that names stand for: files, folders, patterns, URLs, and - for names from stdin.

    A file that exists is itself, whatever its name looks like. Folders are searched in alphabetical order, for files
    with the extension of a picture; hidden ones are left out.
    """
    for name in names:
        if name == "-":
            lines = (os.fsdecode(line).rstrip("\r\n") for line in sys.stdin.buffer)
            yield from find(line for line in lines if line not in ("", "-"))
        elif os.path.isdir(name):
            yield from _search(name)
        elif os.path.exists(name) or is_url(name):
            yield Picture(name)
        elif "://" in name:
            yield Picture(name, error="a URL must begin with http:// or https://")
        elif not (matches := sorted(glob.glob(name, recursive=True))):
            yield Picture(name)
        else:
            for match in matches:
                if not os.path.isdir(match):
                    yield Picture(match)
                elif "**" not in name:  # which matches all below the folder, too
                    yield from _search(match)


def _search(folder: str) -> Iterator[Picture]:
    """Find the pictures in a folder and all below it."""
    errors: list[OSError] = []
    empty = True
    for path, folders, files in os.walk(folder, onerror=errors.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(files):
            if file.lower().endswith(EXTENSIONS) and not file.startswith("."):
                empty = False
                yield Picture(os.path.join(path, file))
    for error in errors:
        yield Picture(error.filename, error=f"cannot be searched: {error.strerror}")
    if empty and not errors:
        yield Picture(folder, error="no pictures in this folder")


def classify(pictures: Iterable[Picture], classifier: Classifier, top_k: int, batch_size: int) -> Iterator[Result]:
    """Classify pictures in batches; every picture gives one result, in order.

    Each batch is read and run by one thread, beside others: so nothing waits for anything, and the network's own
    threads, which would spin while they wait for each other, are not needed.
    """

    def answer(batch: list[Picture]) -> list[Result]:
        batch = [picture if picture.error else _read(picture, classifier) for picture in batch]
        readable = [picture.pixels for picture in batch if picture.pixels is not None]
        predictions = iter(
            [
                row
                for _, alike in groupby(readable, key=lambda pixels: pixels.shape)
                for row in _predict(torch.cat(list(alike)), classifier, top_k)
            ]
        )
        return [Result(name, [] if pixels is None else next(predictions), error) for name, pixels, error in batch]

    pictures = iter(pictures)
    batches = iter(lambda: list(islice(pictures, batch_size)), [])
    with closing(_map_in_threads(answer, batches)) as answers:
        for results in answers:
            yield from results


def _read(picture: Picture, classifier: Classifier) -> Picture:
    name = picture.name
    if os.path.exists(name) and not os.path.isfile(name):
        return picture._replace(error="not a regular file")  # a pipe would keep its reader waiting
    try:
        return picture._replace(pixels=classifier.read(name))
    except ValueError as error:  # UnreadableImageError among them
        return picture._replace(error=str(error).removeprefix(f"{name}: "))


def _map_in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Map items in threads, only a few ahead of the consumer; results keep the order of the items."""
    # Two more than processors, so that these are busy while others wait for a disk or a server.
    workers = (os.cpu_count() or 1) + 2
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    pending: deque[Future] = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(threads)


def _predict(pixels: Tensor, classifier: Classifier, top_k: int) -> list[list[Prediction]]:
    scores, indices = classifier.network(pixels).topk(min(top_k, len(classifier.labels)))
    return [
        [Prediction(index, classifier.labels[index], score) for index, score in zip(*row, strict=True)]
        for row in zip(indices.tolist(), scores.tolist(), strict=True)
    ]


def run(
    names: list[str], classifier: Classifier, layout: Layout = Layout.TABLE, top_k: int = 5, batch_size: int = 8
) -> int:
    """Classify what names stand for, print results on stdout and failures on stderr, and count the failures."""
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    write = {Layout.TABLE: _table_writer, Layout.JSON: _json_writer, Layout.CSV: _csv_writer}[layout](out, classifier)
    failures = 0
    # A bar and what is printed above it must go through one console, to stay out of each other's way.
    screen = out if out.is_terminal and err.is_terminal else err
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("pictures"), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not err.is_terminal) as progress:
        total = None
        if not progress.disable and "-" not in names:
            total = sum(1 for _ in find(names))
        task = progress.add_task("", total=total, visible=total is None or total > batch_size)
        for result in classify(find(names), classifier, top_k, batch_size):
            if result.error is not None:
                failures += 1
                screen.print(Text(f"{clean(result.name)}: {clean(result.error)}", style="red"), soft_wrap=True)
            write(result)
            progress.advance(task)
    return failures


_BAR_WIDTH = 20


def _table_writer(out: Console, classifier: Classifier) -> Callable[[Result], None]:
    """A block for each picture: its name, and its labels by rank."""

    # A Table of rich would take as long as the network.
    def write(result: Result) -> None:
        if result.error is not None:
            return
        text = Text(clean(result.name), style="bold")
        for rank, (_, label, score) in enumerate(result.predictions, 1):
            text.append(f"\n{rank:4}", style="not bold dim")
            if classifier.gives_probabilities:
                text.append(f"{100 * score:7.1f} %  ", style="not bold")
                text.append(f"{'━' * round(_BAR_WIDTH * score):{_BAR_WIDTH}}  ", style="not bold green")
            else:
                text.append(f"{score:12.6g}  ", style="not bold")
            text.append(clean(label), style="not bold")
        out.print(text, soft_wrap=True)

    return write


def _json_writer(out: Console, classifier: Classifier) -> Callable[[Result], None]:
    """An object a line for each picture, of ASCII characters alone."""

    def write(result: Result) -> None:
        if result.error is None:
            predictions = [
                {"label": label, "index": index, "score": round(score, 6)}
                for index, label, score in result.predictions
            ]
            line = {"file": result.name, "predictions": predictions}
        else:
            line = {"file": result.name, "error": result.error}
        out.out(json.dumps(line), highlight=False)

    return write


class _Lines:
    """What csv.writer writes to."""

    def __init__(self, out: Console) -> None:
        self.out = out

    def write(self, text: str) -> None:
        self.out.out(text, end="", highlight=False)


def _csv_writer(out: Console, classifier: Classifier) -> Callable[[Result], None]:
    """A header, then a row for each label of a picture."""
    rows = csv.writer(_Lines(out), lineterminator="\n")
    rows.writerow(["file", "rank", "index", "label", "score"])

    def write(result: Result) -> None:
        for rank, (index, label, score) in enumerate(result.predictions, 1):
            rows.writerow([clean(result.name), rank, index, clean(label), round(score, 6)])

    return write
