"""Repositories on disk: written beside their place, complete or not at all; and the hashes of their files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from .preprocessing_mobilenet import regular


try:
    import fcntl
except ImportError:  # on Windows, where two runs to one output are not told apart
    fcntl = None


class RepositoryError(ValueError):
    """A repository that cannot be read, made or replaced."""


# What a run keeps beside its output: its lock, what it builds, what it took from there, and what it has replaced.
_LOCK, _NEW, _TAKEN, _REPLACED = "lock", "new", "taken", "replaced"


class Claim(NamedTuple):
    """An output that no other run can write meanwhile."""

    output: Path
    scratch: Path  # a hidden folder beside it, to build in
    found: dict[str, tuple[int, ...]] | None  # what was there; None for nothing

    def put(self, folder: Path) -> None:
        """Let a folder take the output's place, unless that has changed since it was claimed.

        Raises:
            RepositoryError: It has changed, and stays as it is.
        """
        taken, replaced = self.scratch / _TAKEN, self.scratch / _REPLACED
        try:
            if self.found is not None:
                os.replace(self.output, taken)
                if _listing(taken) != self.found:
                    raise RepositoryError(f"{self.output} has changed meanwhile, and is not replaced.")
            if os.path.lexists(self.output):
                raise RepositoryError(f"{self.output} was made meanwhile, and is not replaced.")
            os.replace(folder, self.output)  # fails where a folder that holds something came just now
            if self.found is not None:
                os.replace(taken, replaced)
        except BaseException:
            _restore(self.output, self.scratch)
            raise


@contextmanager
def claimed(output: Path, overwrite: bool, *sources: str | os.PathLike) -> Iterator[Claim]:
    """Keep other runs from an output until the end, and remove what runs that were killed have left of it.

    Args:
        output: Folder to write.
        overwrite: Whether to replace a repository that exists.
        *sources: What is read meanwhile: paths, or something else.

    Raises:
        RepositoryError: Another run writes it, or it exists and is not to be replaced.
    """
    output = output.expanduser().absolute()
    made = [parent for parent in output.parents if not parent.is_dir()]
    scratch = output.with_name(f".{output.name}.mobilenet")
    try:
        if not scratch.exists():
            check_output(output, overwrite, *sources)  # before anything is made
        output.parent.mkdir(parents=True, exist_ok=True)
        with _locked(scratch, output):
            try:
                _restore(output, scratch)
                for leftover in (_NEW, _REPLACED):
                    shutil.rmtree(scratch / leftover, ignore_errors=True)
                check_output(output, overwrite, *sources)
                yield Claim(output, scratch, _listing(output) if output.exists() else None)
            finally:
                if not (scratch / _TAKEN).exists():  # which could not be put back
                    shutil.rmtree(scratch, ignore_errors=True)
    finally:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()  # if it is empty


@contextmanager
def staged(output: Path, overwrite: bool, source: str | os.PathLike = "") -> Iterator[Path]:
    """Give a folder to build in, which takes the output's place at the end; after an error, nothing of it is left.

    Raises:
        RepositoryError: Another run writes the output, or it exists and is not to be replaced, or has changed.
    """
    with claimed(output, overwrite, source) as claim:
        folder = claim.scratch / _NEW / claim.output.name
        folder.mkdir(parents=True)
        yield folder
        claim.put(folder)


@contextmanager
def _locked(scratch: Path, output: Path) -> Iterator[None]:
    """Make a folder, or take it over from a run that was killed, whose lock went with it."""
    scratch.mkdir(exist_ok=True)
    if scratch.is_symlink() or not {path.name for path in scratch.iterdir()} <= {_LOCK, _NEW, _TAKEN, _REPLACED}:
        raise RepositoryError(f"{scratch} must be free to build in, but holds something else.")
    with (scratch / _LOCK).open("a") as lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(lock.fileno()), os.stat(scratch / _LOCK))
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        except OSError:  # a file system without locks
            is_ours = True
        if not is_ours:  # or it was another run's that has just ended
            raise RepositoryError(f"{output} is being written by another run.")
        yield


def _restore(output: Path, scratch: Path) -> None:
    """Put back what was taken from an output, where a run did not come to its end.

    Raises:
        RepositoryError: Something else has taken its place.
    """
    taken = scratch / _TAKEN
    if taken.exists():
        if os.path.lexists(output):
            raise RepositoryError(f"{output} is not what it was: that lies in {taken}. Keep one of them there.")
        os.replace(taken, output)


def _listing(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every entry below a folder, by its path, with what changes when it does."""
    listing = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        listing[path.relative_to(folder).as_posix()] = (status.st_ino, status.st_mode, status.st_mtime_ns) + (
            () if path.is_dir() else (status.st_size,)
        )
    return listing


def check_output(output: Path, overwrite: bool, *sources: str | os.PathLike) -> None:
    """Raise RepositoryError unless there is no such folder, or one that may be replaced: a typing error costs nothing.

    Args:
        output: The folder.
        overwrite: Whether to replace a repository that exists.
        *sources: What is read meanwhile: paths, or something else.
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
    for source in sources:
        if os.path.exists(source) and Path(source).resolve().is_relative_to(output):
            raise RepositoryError(f"{output} holds the source, and is not replaced.")


def is_repository(folder: Path) -> bool:
    """Whether a folder holds a model."""
    try:
        return "model_type" in json.loads(Path(regular(folder / "config.json")).read_text(encoding="utf-8"))
    except (OSError, RecursionError, TypeError, ValueError):
        return False


@contextmanager
def hidden(
    folder: Path, prefix: str, make: Callable[[Path], object], remove: Callable[[Path], object]
) -> Iterator[Path]:
    """Make something hidden in a folder, remove it in the end, and at the start what runs that were killed have left.

    Args:
        folder: Where.
        prefix: What its name begins with; eight hexadecimal digits follow.
        make: Makes it.
        remove: Removes it.
    """
    with suppress(OSError):  # of a folder that cannot be listed
        for path in folder.iterdir():
            if re.fullmatch(re.escape(prefix) + "[0-9a-f]{8}", path.name) and (lock := _lock(path)) is not None:
                with suppress(OSError):
                    remove(path)
                os.close(lock)
    while True:
        path = folder / (prefix + secrets.token_hex(4))
        make(path)
        lock = _lock(path, waits=True)
        if os.path.lexists(path):
            break
        if lock is not None:  # another run, which was tidying up, has just removed it
            os.close(lock)
    try:
        yield path
    finally:
        remove(path)
        if lock is not None:
            os.close(lock)


def _lock(path: Path, waits: bool = False) -> int | None:
    """Lock a file or folder until its descriptor is closed; None where another run has it, or there are no locks."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def put_file(part: Path, path: Path, overwrite: bool) -> None:
    """Move a file to its place, on the same file system.

    Args:
        part: The file.
        path: Its place.
        overwrite: Whether to replace a file that exists.

    Raises:
        FileExistsError: Something is there, and stays.
        OSError: It cannot be moved.
    """
    if overwrite:
        os.replace(part, path)
        return
    try:
        os.link(part, path)  # fails where something came just now
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(part, path)
    else:
        part.unlink()


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
