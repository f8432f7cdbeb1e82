"""What a source gives to a conversion, and the readers that several sources share."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
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

from mobilenet.image_processing_mobilenet import MobileNetImageProcessor

from .names import ConversionError, Table


class Origin(NamedTuple):
    """Where a source comes from."""

    given: str  # as it was typed
    path: Path  # the file, or the folder
    revision: str | None = None  # the commit on the Hub
    url: str | None = None


class Oracle(NamedTuple):
    """The source's own runtime."""

    name: str
    version: str
    logits: Callable[[Tensor], Tensor]  # of pixel values of shape (B, C, H, W)


@dataclass
class Checkpoint:
    """What a reader takes from a source."""

    kind: str  # the source in a few words
    tensors: dict[str, Tensor]  # by the source's names
    table: Table
    config: dict[str, Any]  # fields of MobileNetConfig
    processor: MobileNetImageProcessor
    files: list[Path]  # what was read
    oracle: Callable[[], Oracle]  # raises ImportError where the runtime is not installed
    labels: list[str] | None = None
    license: str = "apache-2.0"
    notes: list[str] = field(default_factory=list)  # for the model card
    extra_files: dict[str, str] = field(default_factory=dict)  # text of further files, by name


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConversionError: The file is missing, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path}: no such file.") from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: must hold a JSON object, got {type(content).__name__}.")
    return content


def read_torch(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors, or from a pickle of tensors alone, which runs no code.

    Raises:
        ConversionError: The file is broken, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConversionError(f"{path}: no such file.") from error
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path}: holds more than tensors, or is broken; it is not read, since it could run code."
        ) from error
    except Exception as error:  # neither safetensors nor torch says what a broken file raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConversionError(f"{path}: truncated or corrupt: {reason[0]}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # a training checkpoint
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise ConversionError(f"{path}: must hold a dictionary of tensors.")
    return dict(content)


def weights_file(folder: Path) -> Path:
    """The weights in a folder: safetensors first.

    Raises:
        ConversionError: There are none.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise ConversionError(f"{folder}: holds neither {' nor '.join(WEIGHTS)}.")


WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def download(repo: str, revision: str | None = None) -> Origin:
    """Fetch configuration and weights of a Hub repository into the Hub's cache.

    Raises:
        ConversionError: The Hub does not answer, refuses, or has no such repository, revision or file.
    """

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(repo, name, revision=revision))

    try:
        config = fetch("config.json")
        try:
            fetch("preprocessor_config.json")
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            pass  # a recipe will do
        try:
            fetch(WEIGHTS[0])
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            fetch(WEIGHTS[1])
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
        raise ConversionError(f"{repo}: no such file or folder, and the Hub does not answer.") from error
    except EntryNotFoundError as error:
        raise ConversionError(f"{repo}: its repository lacks config.json, or both {' and '.join(WEIGHTS)}.") from error
    except HfHubHTTPError as error:
        raise ConversionError(f"{repo}: the Hub answers with an error: {str(error).splitlines()[0]}") from error
    # A snapshot's folder carries the commit's name.
    return Origin(repo, config.parent, config.parent.name, f"https://huggingface.co/{repo}")
