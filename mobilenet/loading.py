"""Models for use: a folder or a Hub id becomes a classifier on one of the engines. No code that comes with it runs.

torch and transformers are imported where a network needs them: an exported one does not.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
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


Network = Callable[[np.ndarray], np.ndarray]  # from pixels of shape (B, C, H, W) to logits of shape (B, labels)


class Classifier(NamedTuple):
    """A model with what it takes to use it."""

    engine: str  # in words
    read: Callable[[str | bytes], np.ndarray]  # from a path, a URL or a file's bytes to pixels of shape (1, C, H, W)
    network: Network  # its results are scores
    label: Callable[[int], str]
    gives_probabilities: bool


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
    *(AttributeError, EOFError, LookupError, OSError, RecursionError, RuntimeError, TypeError, ValueError),
    *(SafetensorError, StrictDataclassError, UnpicklingError),
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
) -> Classifier:
    """Load a model and its preprocessing from a folder or a Hub id. Code that comes with them does not run.

    Args:
        model: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
        engine: What runs the network, an Engine.
        fast_decode: Whether to decode large JPEGs at a reduced size; otherwise, as the image processor is set.
        device: Where torch computes, such as "cuda:1".
        dtype: What torch computes in, a Precision.

    Raises:
        ImportError: The engine is not installed.
        ValueError: There is no such model, it is broken, it is no MobileNet, its weights do not fit its
            configuration, or it was not exported for the engine; an option is not what it allows.
    """
    engine, dtype = _member(Engine, "engine", engine), _member(Precision, "dtype", dtype)
    files = Files(model, revision)
    with loading(model):
        config = read_config(files)
        options = _preprocessing(files)
        options["fast_decode"] = fast_decode or options["fast_decode"]
        labels, score = _labels(config), _score_function(config)
        engine, manifest = _choose_engine(files, engine)
    if engine is Engine.TORCH:
        device = import_module(".networks", __package__).find_device(device)
    elif (device, dtype) != ("cpu", Precision.FLOAT32):
        expected = f"cpu and dtype float32 with engine {engine.value}"
        raise ValueError(f"device must be {expected}, got {device} and {dtype.value}.")
    with loading(model):
        if engine is Engine.TORCH:
            words, network = _torch(files, config, device, dtype)
        else:
            words, network = _exported(files, engine, manifest)
    channels = config.get("num_channels", 3)

    def read(source: str | bytes) -> np.ndarray:
        pixels = np.moveaxis(preprocess(source, options), -1, 0)[None]
        if pixels.shape[1] != channels:
            raise ValueError(f"the network takes {channels} channels, got {pixels.shape[1]}")
        return pixels

    def run(pixels: np.ndarray) -> np.ndarray:
        try:
            scores = score(network(pixels))
        except Exception as error:  # ONNX Runtime has classes of its own
            raise ValueError(f"{model} cannot be run: {error}") from error
        if labels and scores.shape[1] != len(labels):
            raise ValueError(f"{model} must answer with {len(labels)} scores, got {scores.shape[1]}.")
        if not np.isfinite(scores).all():
            raise ValueError(f"{model} must answer with finite scores, got NaN or infinity: its weights are broken.")
        return scores

    return Classifier(
        engine=words,
        read=read,
        network=run,
        label=lambda index: labels.get(index, f"LABEL_{index}"),
        gives_probabilities=config.get("problem_type") != "regression",
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


def _score_function(config: Mapping[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    """From logits to scores, as transformers' image-classification pipeline decides."""

    def sigmoid(logits: np.ndarray) -> np.ndarray:
        return 0.5 * (np.tanh(0.5 * logits) + 1)

    def softmax(logits: np.ndarray) -> np.ndarray:
        if logits.shape[-1] == 1:
            return sigmoid(logits)
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


def _exported(files: Files, engine: Engine, manifest: dict[str, Any]) -> tuple[str, Network]:
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
        return open_network(path)
    except Exception as error:  # of protobuf, ONNX Runtime, OpenVINO
        raise ValueError(f"its network for {engine.value} is broken: {error}") from error


def _torch(files: Files, config: dict[str, Any], device: Any, dtype: Precision) -> tuple[str, Network]:
    """A network of torch, and where and in what it computes."""
    networks = import_module(".networks", __package__)
    where = device, networks.torch_type(dtype.value)
    weights = files.find("model.safetensors")
    if weights is None or "quantization_config" in config:  # in parts, or in another format
        network = import_module(".pretrained", __package__).load_classifier(files.model, files.revision, *where)
    else:
        network = networks.as_function(networks.load_bare(config, weights).to(*where), *where)
    words = "torch" if device.type == "cpu" else f"torch on {device}"
    return words if dtype is Precision.FLOAT32 else f"{words}, computing in {dtype.value}", network


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


def _onnx(path: Path) -> tuple[str, Network]:
    from onnxruntime import InferenceSession, SessionOptions

    _bound_onnx()
    settings = SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 4  # errors are raised
    settings.add_session_config_entry("session.use_env_allocators", "1")
    # What is folded at loading comes from another allocator; exports have nothing to fold.
    session = InferenceSession(
        path, settings, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )
    (pixels,) = session.get_inputs()

    def infer(batch: np.ndarray) -> np.ndarray:
        try:
            return session.run(None, {pixels.name: batch})[0]
        except Exception as error:  # of a class of its own
            if "Available memory" not in str(error):
                raise
            raise ValueError(
                f"it may take no more than {MAX_ONNX_BYTES >> 20} MiB in all; smaller batches take less"
            ) from error

    return "onnx", infer


def _openvino(path: Path) -> tuple[str, Network]:
    from openvino import Core

    network = Core().compile_model(path, "CPU")
    lock = Lock()  # it has one request to run, which spreads over all processors

    def infer(batch: np.ndarray) -> np.ndarray:
        with lock:
            return network(batch)[0].copy()

    # OpenVINO chooses it by the processor.
    precision = network.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return f"openvino, computing in {precision}", infer


# Of each export: its runtime, the suffixes of what lies beside the graph, and what opens it.
_EXPORTS: dict[str, tuple[str, tuple[str, ...], Callable[[Path], tuple[str, Network]]]] = {
    "onnx": ("onnxruntime", (".onnx.data",), _onnx),
    "openvino": ("openvino", (".bin",), _openvino),
}
