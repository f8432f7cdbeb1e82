"""Repositories on disk: written beside their place, complete or not at all; and the hashes of their files."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .preprocessing_mobilenet import regular


class RepositoryError(ValueError):
    """A repository that cannot be read, made or replaced."""


@contextmanager
def staged(output: Path, overwrite: bool, source: str | os.PathLike = "") -> Iterator[Path]:
    """Give a folder to build in, which takes the output's place at the end; after an error, nothing of it is left.

    Raises:
        RepositoryError: The output exists, and is not to be replaced.
    """
    output = output.expanduser().absolute()
    check_output(output, overwrite, source)
    existing = next(parent for parent in output.parents if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=existing) as scratch:
        folder, old = Path(scratch, output.name), Path(scratch, "old")
        folder.mkdir()
        yield folder
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            if output.exists():
                os.replace(output, old)
            os.replace(folder, output)
        except BaseException:
            if old.exists() and not output.exists():
                os.replace(old, output)
            raise


def check_output(output: Path, overwrite: bool, source: str | os.PathLike) -> None:
    """Raise RepositoryError unless there is no such folder, or one that may be replaced: a typing error costs nothing.

    Args:
        output: The folder.
        overwrite: Whether to replace a repository that exists.
        source: What is read meanwhile: a path, or something else.
    """
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise RepositoryError(f"{output} exists; --overwrite replaces it.")
    if output.is_symlink() or not output.is_dir() or not (is_repository(output) or not any(output.iterdir())):
        raise RepositoryError(f"{output} is no model repository, and is not replaced.")
    output = output.resolve()
    if Path.cwd().is_relative_to(output) or (output / ".git").exists():
        raise RepositoryError(f"{output} is a clone or the folder you are in, and is not replaced.")
    if os.path.exists(source) and Path(source).resolve().is_relative_to(output):
        raise RepositoryError(f"{output} holds the source, and is not replaced.")


def is_repository(folder: Path) -> bool:
    """Whether a folder holds a model."""
    try:
        return "model_type" in json.loads(Path(regular(folder / "config.json")).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, all of it or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return digest(hashlib.sha256(), path)


def digest(result: Any, path: Path) -> str:
    """What a hash says of the content of a file, in hexadecimal."""
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            result.update(chunk)
    return result.hexdigest()
