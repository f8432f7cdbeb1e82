"""What a source gives to a conversion, and the readers that several sources share."""

from __future__ import annotations

import argparse
import json
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file
from torch import Tensor

from mobilenet import hub
from mobilenet.image_processing_mobilenet import MobileNetImageProcessor
from mobilenet.integrity import is_as_announced
from mobilenet.pickles import TooLargeError, check_pickle
from mobilenet.preprocessing_mobilenet import FITS, RANGES, RECIPES
from mobilenet.tasks import Task

from .labels import MAX_BYTES
from .rename import ConversionError, Table, task_of


class Origin(NamedTuple):
    """Where a source comes from."""

    given: str  # as it was typed
    path: Path  # the file, or the folder
    revision: str | None = None  # the commit on the Hub
    url: str | None = None

    def starts_with(self, *signatures: bytes, at: int = 0) -> bool:
        """Whether it is a file with one of these bytes at an offset, whatever its name."""
        if not self.path.is_file():
            return False
        with self.path.open("rb") as file:
            head = file.read(at + 16)[at:]
        return any(head.startswith(signature) for signature in signatures)


class Oracle(NamedTuple):
    """The source's own runtime."""

    name: str
    version: str
    logits: Callable[[Tensor], Tensor]  # of pixel values of shape (B, C, H, W), as our network gives them
    # What the source makes of them by itself: a segmenter's is a label map of shape (B, H, W). None: logits.
    predictions: Callable[[Tensor], Tensor] | None = None
    is_half: bool = False  # whether it computes in 16 bits


class DetectionResults(NamedTuple):
    """What a detector makes of a batch of images."""

    scores: Tensor  # of every anchor, without background, of shape (B, anchors, num_labels)
    boxes: Tensor  # of every anchor, as (cx, cy, w, h) relative to the image, of shape (B, anchors, 4)
    detections: list[dict[str, Tensor]] | None  # of each image, as post_process_object_detection gives them


class DetectionOracle(NamedTuple):
    """The runtime of a source that detects."""

    name: str
    version: str
    results: Callable[[Tensor], DetectionResults]  # of pixel values of shape (B, C, H, W)


class NoOracleError(Exception):
    """A source that has no runtime to compare with: the message says why."""


class Options(NamedTuple):
    """What a user may say of a source that does not tell it."""

    recipe: str | None = None
    image_size: int | None = None
    pixel_range: str | None = None  # a key of RANGES
    mean: Sequence[float] | None = None  # of values in 0 to 1; with `std`, a range of another kind
    std: Sequence[float] | None = None
    fit: str | None = None  # a key of FITS

    def check(self) -> None:
        """Raise ConversionError where one is not what it allows, or they contradict each other."""
        for name, value, allowed in (
            ("recipe", self.recipe, RECIPES),
            ("pixel_range", self.pixel_range, RANGES),
            ("fit", self.fit, FITS),
        ):
            if value is not None and value not in allowed:
                raise ConversionError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
        if self.image_size is not None and not 1 <= self.image_size <= 65536:
            raise ConversionError(f"image_size must be an integer from 1 to 65536, got {self.image_size!r}.")
        if (self.mean is None) != (self.std is None) or (self.mean is not None and self.pixel_range is not None):
            raise ConversionError("mean must be given together with std, and without a range.")
        for name, values, low in (("mean", self.mean, -math.inf), ("std", self.std, 0)):
            if values is not None and not all(low < value < math.inf for value in values):
                allowed = "numbers above 0" if name == "std" else "finite numbers"
                raise ConversionError(f"{name} must be {allowed}, got {', '.join(map(str, values))}.")

    def values(self) -> tuple[list[float], list[float]] | None:
        """Mean and deviation that the user asks for."""
        given = (
            RANGES[self.pixel_range] if self.pixel_range else (self.mean, self.std) if self.mean is not None else None
        )
        return given and (list(given[0]), list(given[1]))

    def processor(self, recipe: str, image_size: int | None, **known: Any) -> MobileNetImageProcessor:
        """Preprocessing by a recipe for a size, unless the user wants something else.

        Args:
            recipe: A key of RECIPES.
            image_size: Side of the images, if it is recorded.
            **known: Options of the processor that the source records.

        Raises:
            ValueError: One of these is not what it allows.
        """
        side = self.size(image_size)
        if self.fit is not None:
            known |= FITS[self.fit](side, int(side / 0.875))
        if values := self.values():
            known |= {"image_mean": values[0], "image_std": values[1]}
        return MobileNetImageProcessor.from_recipe(self.recipe or recipe, side, **known)

    def size(self, recorded: int | None) -> int:
        """The size that images are cropped to; 224 where nobody knows."""
        return self.image_size or recorded or 224


@dataclass
class Checkpoint:
    """What a reader takes from a source."""

    kind: str  # the source in a few words
    tensors: dict[str, Tensor]  # by the source's names
    table: Table
    config: dict[str, Any]  # fields of MobileNetConfig
    processor: MobileNetImageProcessor
    files: list[Path]  # what was read
    oracle: Callable[
        [], Oracle | DetectionOracle
    ]  # raises ImportError where it is not installed, NoOracleError where there is none
    labels: list[str] | None = None
    license: str | None = "apache-2.0"  # None where it is not known
    notes: list[str] = field(default_factory=list)  # for the model card
    warnings: list[str] = field(default_factory=list)  # for the card and for the console
    prediction: str | None = None  # a key of graph.PREDICTIONS: what the source makes of its logits
    feed: MobileNetImageProcessor | None = None  # what the source itself takes, where it scales pixels in part
    quantization: dict[str, Any] | None = None  # scales of a quantized source

    @property
    def task(self) -> Task:
        """What the network is for."""
        return task_of(self.config)


def first_line(error: BaseException) -> str:
    """What went wrong, in one line of no great length."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConversionError: The file is missing, or holds something else.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConversionError(f"{path}: has more than {MAX_BYTES} bytes.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except ConversionError:
        raise
    except FileNotFoundError as error:
        raise ConversionError(f"{path}: no such file.") from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: must hold a JSON object, got {type(content).__name__}.")
    return content


@contextmanager
def field_errors(path: Path) -> Iterator[None]:
    """Read fields of a JSON file, of which any may be missing or of another type.

    Raises:
        ConversionError: They cannot be understood; the message names the file.
    """
    try:
        yield
    except ConversionError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be understood: {first_line(error)}") from error


def read_torch(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors, or from a pickle of tensors alone, which runs no code.

    Raises:
        ConversionError: The file is broken, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        check_pickle(path)
        # Trainers such as timm's store their arguments, which run no code either.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ConversionError:
        raise
    except FileNotFoundError as error:
        raise ConversionError(f"{path}: no such file.") from error
    except TooLargeError as error:
        raise ConversionError(f"{path}: {error}.") from error
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path}: holds more than tensors, or is broken; it is not read, since it could run code."
        ) from error
    except Exception as error:  # neither safetensors nor torch says what a broken file raises
        raise ConversionError(f"{path}: truncated or corrupt: {first_line(error)}") from error
    for nested in ("state_dict_ema", "state_dict"):  # a training checkpoint; averaged weights are what is evaluated
        if isinstance(content, dict) and isinstance(content.get(nested), dict):
            content = content[nested]
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise ConversionError(f"{path}: must hold a dictionary of tensors.")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}  # of DataParallel


def weights_file(folder: Path) -> Path:
    """The weights in a folder: safetensors first.

    Raises:
        ConversionError: There are none.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise ConversionError(f"{folder}: holds neither {' nor '.join(_WEIGHTS)}.")


_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ONNX_FILES = ("onnx/model.onnx", "model.onnx")  # of a repository of transformers.js, and of others


def download(repo: str, revision: str | None = None) -> Origin:
    """Fetch configuration and weights of a Hub repository into the Hub's cache.

    Raises:
        ConversionError: The Hub does not answer, refuses, or has no such repository, revision or file.
    """

    def fetch(name: str, commit: str | None) -> Path | None:
        try:
            path = hub.fetch(repo, name, commit)
        except LocalEntryNotFoundError:  # no answer, and nothing in the cache
            raise
        except EntryNotFoundError:
            return None
        if not is_as_announced(path):
            raise ConversionError(f"{path}: is not what the Hub announced: delete it, and try again.")
        return path

    try:
        config, weights = fetch("config.json", revision), None
        if config:
            commit = config.parent.name  # of the snapshot: somebody may push meanwhile
            fetch("preprocessor_config.json", commit)
            weights = next(filter(None, (fetch(name, commit) for name in (*_WEIGHTS, *ONNX_FILES))), None)
    except HFValidationError as error:
        raise ConversionError(f"{repo}: no such file or folder, and no Hub id either.") from error
    except GatedRepoError as error:
        raise ConversionError(f"{repo}: the Hub asks to accept its terms and to log in first.") from error
    except RepositoryNotFoundError as error:
        raise ConversionError(
            f"{repo}: no such file or folder, and the Hub has no such repository, or it is private and you are not "
            "logged in."
        ) from error
    except RevisionNotFoundError as error:
        raise ConversionError(f"{repo}: the Hub has no revision {revision!r} of it.") from error
    except LocalEntryNotFoundError as error:
        # Before huggingface_hub 1 the cause is an error of requests.
        if getattr(error.__cause__, "response", None) is not None:
            raise ConversionError(f"{repo}: the Hub answers: {first_line(error.__cause__)}") from error
        raise ConversionError(f"{repo}: no such file or folder, and the Hub does not answer.") from error
    except hub.NoAnswerError as error:
        raise ConversionError(f"{repo}: no such file or folder, and the Hub does not answer.") from error
    except HfHubHTTPError as error:
        raise ConversionError(f"{repo}: the Hub answers: {first_line(error)}") from error
    except ConversionError:
        raise
    except Exception as error:  # of requests before huggingface_hub 1, of httpx since
        raise ConversionError(f"{repo}: cannot be downloaded: {first_line(error)}") from error
    for found, name in ((config, "config.json"), (weights, " nor ".join((*_WEIGHTS, *ONNX_FILES)))):
        if found is None:
            raise ConversionError(f"{repo}: the Hub's repository does not hold {name}.")
    return Origin(repo, config.parent, config.parent.name, f"https://huggingface.co/{repo}")
