"""Models for use: a folder or a Hub id becomes a network on one of the engines. No code that comes with it runs.

torch and transformers are imported where a network needs them: an exported one does not.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import cache
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from .architectures_mobilenet import ARCHITECTURES
from .hub import NoAnswerError, fetch
from .preprocessing_mobilenet import OPTIONS, preprocess, read_options
from .require import require
from .tasks import CLASSIFICATION, DETECTION, SEGMENTATION, Task, check_task


class Engine(str, Enum):
    """What runs the network. All but torch run what `mobilenet export` writes."""

    AUTO = "auto"  # what the model was exported for, or else torch
    TORCH = "torch"
    ONNX = "onnx"
    OPENVINO = "openvino"


class Precision(str, Enum):
    """What torch computes in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


# From pixels of shape (B, C, H, W) to the outputs that the task names.
Network = Callable[[np.ndarray], Sequence[np.ndarray]]


class Model(NamedTuple):
    """A model with what it takes to use it."""

    engine: str  # in words
    read: Callable[[Any], np.ndarray]  # from a path, a URL, a file's bytes or an image to pixels of shape (1, C, H, W)
    network: Callable[[np.ndarray], Any]  # from pixels to what the task's function in _ANSWERS makes of the outputs
    label: Callable[[int], str]
    gives_probabilities: bool
    labels: Mapping[int, str]
    options: Mapping[str, Any]  # of the image processor


# A configuration of more bytes is refused; those of 20,000 labels have one.
MAX_JSON = 64 << 20


class Files:
    """The files of a model, by name: in a folder, or on the Hub, which brings them into its cache.

    Args:
        model: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        ValueError: The model is neither.
    """

    def __init__(self, model: str, revision: str | None = None) -> None:
        self.folder = Path(model) if os.path.isdir(model) else None
        self.model, self.revision = model, revision or "main"
        if self.folder is None:
            try:
                validate_repo_id(model)
            except HFValidationError:
                is_id = False
            else:
                is_id = not os.path.exists(model)
            if not is_id:
                raise ValueError(f"model must be a folder or a Hub id, got {model!r}.")

    def find(self, name: str) -> Path | None:
        """A file; None where the model has none of that name."""
        if self.folder is not None:
            path = self.folder / name
            return path if path.is_file() else None
        try:
            return fetch(self.model, name, self.revision)
        except (LocalEntryNotFoundError, NoAnswerError):  # no answer, and nothing in the cache
            if name == "config.json":
                raise
            return None
        except EntryNotFoundError:
            return None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON object; None where there is no such file."""
        if (path := self.find(name)) is None:
            return None
        if (size := path.stat().st_size) > MAX_JSON:
            raise ValueError(f"{name} must have at most {MAX_JSON} bytes, got {size}.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{name} is not a valid JSON file: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{name} must hold a JSON object, got {type(content).__name__}.")
        return content


def default_model() -> str | None:
    """The folder of the code, in a clone that holds weights too."""
    root = Path(__file__).resolve().parents[1]
    return str(root) if (root / "model.safetensors").exists() else None


# What transformers, torch and the Hub raise on configurations and weights that are missing or broken.
_LOADING_ERRORS = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, RecursionError, RuntimeError),
    *(TypeError, ValueError, SafetensorError, StrictDataclassError, UnpicklingError),
)


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Let whatever goes wrong with a model be one error that names it."""
    try:
        yield
    except _LOADING_ERRORS as error:
        raise ValueError(f"{model} cannot be loaded: {str(error) or type(error).__name__}") from error


def read_config(files: Files) -> dict[str, Any]:
    """The configuration of a MobileNet, as the file has it.

    Raises:
        ValueError: There is none, or it is of another model.
    """
    config = files.read_json("config.json")
    if config is None:
        raise FileNotFoundError("it holds no config.json.")
    if (kind := config.get("model_type")) != "mobilenet":
        hint = " Convert it first." if kind in ARCHITECTURES else ""
        raise ValueError(f"model_type must be mobilenet, got {kind}.{hint}")
    return config


def load(
    model: str,
    revision: str | None = None,
    engine: str = Engine.AUTO,
    fast_decode: bool = False,
    device: str = "cpu",
    dtype: str = Precision.FLOAT32,
    task: Task = CLASSIFICATION,
) -> Model:
    """Load a model and its preprocessing from a folder or a Hub id. Code that comes with them does not run.

    Args:
        model: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
        engine: What runs the network, an Engine.
        fast_decode: Whether to decode large JPEGs at a reduced size; otherwise, as the image processor is set.
        device: Where torch computes, such as "cuda:1".
        dtype: What torch computes in, a Precision.
        task: What the network shall be for.

    Raises:
        ImportError: The engine is not installed.
        ValueError: There is no such model, it is broken, it is no MobileNet, it is for another task, its weights do
            not fit its configuration, or it was not exported for the engine; an option is not what it allows.
    """
    engine, dtype = _member(Engine, "engine", engine), _member(Precision, "dtype", dtype)
    files = Files(model, revision)
    with loading(model):
        config = read_config(files)
        check_task(config, task)
        options = _preprocessing(files)
        options["fast_decode"] = fast_decode or options["fast_decode"]
        labels = _labels(config)
        answer = _ANSWERS[task.name](config, labels)
        engine, manifest = _choose_engine(files, engine)
    if engine is Engine.TORCH:
        device = import_module(".networks", __package__).find_device(device)
    elif (device, dtype) != ("cpu", Precision.FLOAT32):
        expected = f"cpu and dtype float32 with engine {engine.value}"
        raise ValueError(f"device must be {expected}, got {device} and {dtype.value}.")
    with loading(model):
        if engine is Engine.TORCH:
            words, network = _torch(files, config, device, dtype, task)
        else:
            words, network = _exported(files, engine, manifest, task)
    channels = config.get("num_channels", 3)

    def read(source: Any) -> np.ndarray:
        pixels = np.moveaxis(preprocess(source, options), -1, 0)[None]
        if pixels.shape[1] != channels:
            raise ValueError(f"the network takes {channels} channels, got {pixels.shape[1]}")
        return pixels

    def run(pixels: np.ndarray) -> Any:
        try:
            outputs = network(pixels)
        except Exception as error:  # ONNX Runtime has classes of its own
            raise ValueError(f"{model} cannot be run: {error}") from error
        try:
            if not all(isinstance(output, np.ndarray) and output.dtype.kind == "f" for output in outputs):
                raise ValueError("arrays of floats.")
            return answer(pixels.shape, *outputs)
        except ValueError as error:
            raise ValueError(f"{model} must answer with {error}") from error

    return Model(
        engine=words,
        read=read,
        network=run,
        label=lambda index: labels.get(index, f"LABEL_{index}"),
        gives_probabilities=config.get("problem_type") != "regression",
        labels=labels,
        options=options,
    )


def _preprocessing(files: Files) -> dict[str, Any]:
    """Every option of the image processor."""
    given = files.read_json("preprocessor_config.json")
    if given is None:
        raise FileNotFoundError("it holds no image processor: preprocessor_config.json is missing.")
    if (kind := given.get("image_processor_type")) != "MobileNetImageProcessor":
        raise ValueError(f"image_processor_type must be MobileNetImageProcessor, got {kind}.")
    return read_options({name: value for name, value in given.items() if name in OPTIONS})


def _labels(config: Mapping[str, Any]) -> dict[int, str]:
    """Labels by index; none where the configuration has none."""
    labels = config.get("id2label") or {}
    return {int(index): str(label) for index, label in labels.items()}


def _check_answer(labels: Mapping[int, str], count: int, *outputs: np.ndarray) -> None:
    """Raise ValueError, with the end of a sentence, where a network's answer cannot be right."""
    if count != len(labels) if labels else not count:
        raise ValueError(f"{len(labels) or 'some'} scores, got {count}.")
    if not all(np.isfinite(output).all() for output in outputs):
        raise ValueError("finite scores, got NaN or infinity: its weights are broken.")


# Scores of lower precision may be off by so much.
_ROUNDING = 1e-3
# Of an image, anchors times labels: in 250 MB.
MAX_SCORES = 1 << 26
# Of an object: integers up to here are floats.
MAX_LABEL = 1 << 24


def _check_range(name: str, values: np.ndarray, most: float, tolerance: float = 0.0) -> None:
    """Raise ValueError, with the end of a sentence, where values are not from 0 to the most that they may be."""
    low, high = values.min(initial=0), values.max(initial=0)
    if low < -tolerance or high > most + tolerance:
        raise ValueError(f"{name} from 0 to {most}, got {low:g} to {high:g}.")


def _scores(config: Mapping[str, Any], labels: Mapping[int, str]) -> Callable[..., np.ndarray]:
    """From the shape of pixels and a classifier's logits for them to scores, of shape (B, labels)."""
    score = _score_function(config)

    def answer(seen: tuple[int, ...], logits: np.ndarray) -> np.ndarray:
        if logits.ndim != 2 or len(logits) != seen[0]:
            raise ValueError(f"scores of shape ({seen[0]}, labels), got {logits.shape}.")
        _check_answer(labels, logits.shape[1], logits)
        return score(logits)

    return answer


def _boxes(config: Mapping[str, Any], labels: Mapping[int, str]) -> Callable[..., tuple[np.ndarray, ...]]:
    """From the shape of pixels and a detector's outputs for them to what can be right among these.

    Scores of shape (B, anchors, labels), and boxes of shape (B, anchors, 4). Or objects, of shape (objects, 7): place
    in the batch, label, score, and x0, y0, x1, y1 relative to the image.
    """

    def answer(seen: tuple[int, ...], scores: np.ndarray, boxes: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        if boxes is None:
            if scores.ndim != 2 or scores.shape[1] != 7:
                raise ValueError(f"objects of 7 numbers, got {scores.shape}.")
            _check_answer({}, 7, scores)
            _check_range("labels", scores[:, 1], MAX_LABEL)
            _check_range("scores", scores[:, 2], 1, _ROUNDING)
            return (scores,)
        if scores.ndim != 3 or boxes.shape != (*scores.shape[:2], 4):
            raise ValueError(f"scores and a box for each anchor, got {scores.shape} and {boxes.shape}.")
        if len(scores) != seen[0]:
            raise ValueError(f"scores of {seen[0]} images, got {len(scores)}.")
        if (size := scores.shape[1] * scores.shape[2]) > MAX_SCORES:
            raise ValueError(f"at most {MAX_SCORES} scores of an image, got {size}.")
        _check_answer(labels, scores.shape[2], scores, boxes)
        _check_range("scores", scores, 1, _ROUNDING)
        return scores, boxes

    return answer


def _maps(config: Mapping[str, Any], labels: Mapping[int, str]) -> Callable[..., np.ndarray]:
    """From the shape of pixels to a segmenter's logits for them, of shape (B, labels, h, w)."""

    def answer(seen: tuple[int, ...], logits: np.ndarray) -> np.ndarray:
        batch, _, *sides = seen
        fits = logits.ndim == 4 and all(0 < n <= most for n, most in zip(logits.shape[2:], sides, strict=True))
        if not fits or len(logits) != batch:
            raise ValueError(f"maps of logits for {batch} images of {sides[0]}x{sides[1]}, got {logits.shape}.")
        _check_answer(labels, logits.shape[1], logits)
        return logits

    return answer


_ANSWERS = {CLASSIFICATION.name: _scores, DETECTION.name: _boxes, SEGMENTATION.name: _maps}


def _score_function(config: Mapping[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    """From logits to scores, as transformers' image-classification pipeline decides."""

    def sigmoid(logits: np.ndarray) -> np.ndarray:
        return 0.5 * (np.tanh(0.5 * logits) + 1)

    def softmax(logits: np.ndarray) -> np.ndarray:
        if logits.shape[-1] == 1:
            return sigmoid(logits)
        with np.errstate(over="ignore"):  # of what is far below, which counts as 0 anyway
            powers = np.exp(logits - logits.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    problem = config.get("problem_type")
    return {"regression": lambda logits: logits, "multi_label_classification": sigmoid}.get(problem, softmax)


def _member(kind: type[Enum], name: str, value: str) -> Any:
    try:
        return kind(value)
    except ValueError as error:
        allowed = ", ".join(member.value for member in kind)
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}.") from error


def _choose_engine(files: Files, engine: Engine) -> tuple[Engine, dict[str, Any] | None]:
    """What runs the network, and what its exporter wrote about it."""
    manifest = files.read_json("export.json")
    exported_for = None if manifest is None else manifest["export_format"]
    if exported_for not in (None, *_EXPORTS):
        raise ValueError(f"it must be exported for onnx or openvino, got {exported_for}.")
    if manifest is not None and (schema := manifest.get("schema_version", 1)) != 1:
        raise ValueError(f"export.json must have the schema_version 1, got {schema!r}.")
    if engine is Engine.AUTO:
        engine = Engine(exported_for or Engine.TORCH)
    if engine not in (Engine.TORCH, exported_for):
        raise ValueError(f"it was exported for {exported_for or 'no engine'}, not for {engine.value}.")
    return engine, manifest


def _exported(files: Files, engine: Engine, manifest: dict[str, Any], task: Task) -> tuple[str, Network]:
    """An exported network, and in words what runs it."""
    runtime, suffixes, open_network = _EXPORTS[engine.value]
    require(runtime, extra=engine.value, purpose=f"engine {engine.value}")
    name = manifest["components"]["model"]["file"]
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"export.json must name a file beside it, got {name!r}.")
    path, *_ = [files.find(Path(name).stem + suffix) for suffix in (Path(name).suffix, *suffixes)]
    if path is None:
        raise FileNotFoundError(f"it holds no {name}.")
    try:
        return open_network(path, _exported_outputs(manifest, task))
    except Exception as error:  # of protobuf, ONNX Runtime, OpenVINO
        raise ValueError(f"its network for {engine.value} is broken: {error}") from error


def _exported_outputs(manifest: Mapping[str, Any], task: Task) -> Sequence[str]:
    """Those of a graph's outputs that are used: the task's, or objects, where a detector's graph suppresses boxes."""
    return ("detections",) if task is DETECTION and manifest.get("outputs") == ["detections"] else task.outputs


def _torch(files: Files, config: dict[str, Any], device: Any, dtype: Precision, task: Task) -> tuple[str, Network]:
    """A network of torch, and where and in what it computes."""
    networks = import_module(".networks", __package__)
    where = device, networks.torch_type(dtype.value)
    weights = files.find("model.safetensors")
    if weights is None or "quantization_config" in config:  # in parts, or in another format
        load_function = import_module(".pretrained", __package__).load_function
        network = load_function(files.model, files.revision, *where, task)
    else:
        network = networks.as_function(networks.load_bare(config, weights, task).to(*where), *where)
    words = "torch" if device.type == "cpu" else f"torch on {device}"
    return words if dtype is Precision.FLOAT32 else f"{words}, computing in {dtype.value}", network


# A graph of OpenVINO with a value of more bytes is refused.
MAX_VALUE = 2 << 30
# ONNX Runtime takes no more memory than this for all that it computes, a batch on each processor at a time.
MAX_ONNX_BYTES = (2 << 30) + (os.cpu_count() or 1) * (512 << 20)


@cache
def _bound_onnx() -> None:
    """Give ONNX Runtime one allocator for all sessions that ask for it: a graph may compute values of any size."""
    from onnxruntime import (
        OrtAllocatorType,
        OrtArenaCfg,
        OrtMemoryInfo,
        OrtMemType,
        create_and_register_allocator,
    )

    memory = OrtMemoryInfo("Cpu", OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, OrtMemType.DEFAULT)
    create_and_register_allocator(memory, OrtArenaCfg({"max_mem": MAX_ONNX_BYTES}))


def onnx_session(graph: Path | bytes, threads: int) -> Any:
    """A session of ONNX Runtime that computes alike on every CPU, in bounded memory.

    Where an x86 processor lacks VNNI, a sum of two 8-bit products saturates at 16 bits unless the session asks for
    precision, for which some operators on integers have no kernel.

    Args:
        graph: A file or its content.
        threads: That share an operator.

    Raises:
        Exception: Of ONNX Runtime's many, as it does not run the graph.
    """
    import onnxruntime

    _bound_onnx()

    def load(precise: bool) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors are raised
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.x64quantprecision", str(int(precise)))
        # What is folded at loading comes from another allocator, which takes whatever it is asked for; exports have
        # nothing to fold.
        return onnxruntime.InferenceSession(
            graph, options, ["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
        )

    try:
        return load(precise=True)
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:
        return load(precise=False)


def _places(wanted: Sequence[str], found: Sequence[Collection[str]]) -> list[int]:
    """Where among a graph's outputs those are that a task uses; one alone is the first, whatever its name.

    Raises:
        ValueError: One is missing.
    """
    if len(wanted) == 1:
        return [0]
    places = [next((place for place, names in enumerate(found) if name in names), None) for name in wanted]
    if None in places:
        raise ValueError(f"it has no output {wanted[places.index(None)]}")
    return places


def _onnx(path: Path, outputs: Sequence[str]) -> tuple[str, Network]:
    session = onnx_session(path, threads=1)
    (pixels,) = session.get_inputs()
    found = [output.name for output in session.get_outputs()]
    names = [found[place] for place in _places(outputs, [{name} for name in found])]

    def infer(batch: np.ndarray) -> list[np.ndarray]:
        try:
            return session.run(names, {pixels.name: batch})
        except Exception as error:  # of a class of its own
            if "Available memory" not in str(error):
                raise
            raise ValueError(
                f"it may take no more than {MAX_ONNX_BYTES >> 20} MiB in all; smaller batches take less"
            ) from error

    return "onnx", infer


def _openvino(path: Path, outputs: Sequence[str]) -> tuple[str, Network]:
    from openvino import Core

    core = Core()
    graph = core.read_model(path)
    for node in graph.get_ops():  # OpenVINO computes what is constant while it compiles
        for output in node.outputs():
            sides = [max(side.get_min_length(), 1) for side in output.get_partial_shape()]
            if math.prod(sides) * output.get_element_type().size > MAX_VALUE:
                raise ValueError(f"{node.get_friendly_name()} has more than {MAX_VALUE} bytes")
    network = core.compile_model(graph, "CPU")
    lock = Lock()  # it has one request to run, which spreads over all processors
    places = _places(outputs, [output.get_names() for output in network.outputs])

    def infer(batch: np.ndarray) -> list[np.ndarray]:
        with lock:
            results = network(batch)
            return [results[place].copy() for place in places]

    # OpenVINO chooses it by the processor.
    precision = network.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return f"openvino, computing in {precision}", infer


# Of each export: its runtime, the suffixes of what lies beside the graph, and what opens it.
_EXPORTS: dict[str, tuple[str, tuple[str, ...], Callable[[Path, Sequence[str]], tuple[str, Network]]]] = {
    "onnx": ("onnxruntime", (".onnx.data",), _onnx),
    "openvino": ("openvino", (".bin",), _openvino),
}
