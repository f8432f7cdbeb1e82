"""A folder that images are drawn into: names follow those of the sources, and files are whole or not there."""

from __future__ import annotations

import errno
import glob
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from PIL import Image

from .find_images import FoundImage, find
from .preprocessing_mobilenet import is_url, open_image
from .repository import hidden, put_file
from .visualize import encode


# Sources that are drawn as what they are; all others become PNG.
_JPEG = (".jfif", ".jpe", ".jpeg", ".jpg")
# Bytes of a name, before a number and a suffix: file systems take 255.
_MAX_NAME = 230
_MAX_DEPTH = 30  # folders of a URL
# Names of URLs that Windows takes for devices, whatever follows the first dot.
_DEVICES = re.compile(r"^(?:aux|con|nul|prn|com\d|lpt\d)(?![^.])", re.IGNORECASE)
# Errors that the next drawing would meet too, which end the run; others are an image's own.
_COMMON_ERRORS = frozenset(
    getattr(errno, name) for name in ("EACCES", "EDQUOT", "EIO", "EMFILE", "ENFILE", "ENOSPC", "EPERM", "EROFS")
)


def drawn_suffix(name: str) -> str:
    """The suffix of what an image is drawn to."""
    path = urlsplit(name).path if is_url(name) else name
    return ".jpg" if os.path.splitext(path)[1].lower() in _JPEG else ".png"


class Drawings:
    """What images are drawn into: files below a folder, where sources lie in folders.

    Names are relative to the folder that all that is named has in common. Where two sources would be drawn to one
    file, the second gets a number.

    Args:
        folder: Where to; it need not exist.
        names: Of files, folders and so on, as `find` takes them.
        targets: From a path, relative to the folder and without suffix, and the suffix to draw with, to the files that
            an image is drawn to.
        overwrite: Whether to replace files that exist.

    Raises:
        ValueError: The folder is none, or holds what is named.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], targets: Callable[[str, str], list[str]], overwrite: bool
    ) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"draw must be a folder, got {folder}.")
        self.folder, self.names, self.targets, self.overwrite = folder, names, targets, overwrite
        self.real = os.path.realpath(folder)
        self.base = _common_folder(names)
        self.claimed: set[int] = set()
        self.numbers: dict[int, int] = {}  # from names to the numbers to try next
        self.stack = ExitStack()
        for name in names:
            if os.path.exists(name) and self._holds(name):
                raise ValueError(f"draw must be a folder that holds no images, got {folder}, which holds {name}.")

    def __enter__(self) -> Drawings:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parts = self.stack.enter_context(hidden(self.folder, ".mobilenet-", Path.mkdir, _remove_parts))
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _is_below(self, path: str) -> bool:
        return path == self.real or path.startswith(self.real.rstrip(os.sep) + os.sep)

    def _holds(self, name: str) -> bool:
        """Whether a file lies in the folder, whichever way it is named: some file systems ignore case."""
        path = os.path.realpath(name)
        if self._is_below(path):
            return True
        return any(_is_same(parent, self.folder) for parent in (path, *map(str, Path(path).parents)))

    def find(self) -> Iterator[FoundImage]:
        """Find images as `find` does, but for what lies in the folder itself, and say where each is drawn to."""
        self.claimed, self.numbers = set(), {}
        for image in find(self.names):
            try:
                claimed = self._claim(image)
            except ValueError as error:  # of what is no name: of a host without an end, or with a null
                claimed = image._replace(error=f"no file can have its name: {error}")
            if claimed is not None:
                yield claimed

    def _claim(self, image: FoundImage) -> FoundImage | None:
        """An image with where it is drawn to, or with an error; None for what lies in the folder."""
        if not is_url(image.name) and image.data is None and self._holds(image.name):
            return None
        if image.error is not None:
            return image
        path, suffix = self._relative(image), drawn_suffix(image.name)
        key = hash((os.path.normcase(path).casefold(), suffix))
        number = self.numbers.get(key, 1)
        while True:
            targets = self.targets(path if number == 1 else f"{path}-{number}", suffix)
            marks = {hash(os.path.normcase(target).casefold()) for target in targets}
            number += 1
            if not marks & self.claimed:
                break
        self.numbers[key] = number
        self.claimed |= marks
        for target in targets:
            if error := self._refuse(target, image):
                return image._replace(error=error)
        return image._replace(targets=tuple(targets))

    def _relative(self, image: FoundImage) -> str:
        """Where an image belongs, without suffix."""
        name = image.name
        if image.data is not None:
            return name
        if is_url(name):
            parts = urlsplit(name)
            words = [parts.hostname or "", *PurePosixPath(unquote(parts.path)).parts]
            words = [re.sub(r"[^\w.-]", "_", word)[:100].rstrip(".") for word in words]
            words = [_DEVICES.sub(r"_\g<0>", word) for word in words[-_MAX_DEPTH:]]
            path = os.path.join("", *(word for word in words if word.strip("._")))
        else:
            path = os.path.abspath(name)
            if path.startswith(os.path.join(self.base, "")):
                path = os.path.relpath(path, self.base)
            else:  # from stdin
                path = os.path.splitdrive(path)[1].lstrip(os.sep)
        return os.sep.join(map(_shorten, os.path.splitext(path)[0].split(os.sep)))

    def _refuse(self, target: str, image: FoundImage) -> str | None:
        """Why an image cannot be drawn to a file; None where it can."""
        path = self.folder / target
        if not self._is_below(os.path.realpath(path.parent)):
            return f"{path.parent} leads out of {self.folder}"
        if not os.path.lexists(path):
            return None
        if not self.overwrite:
            return f"{path} exists; --overwrite replaces it"
        if not path.is_file() or path.is_symlink():
            return f"{path} is no regular file"
        return f"{path} is the image itself" if image.data is None and _is_same(path, image.name) else None

    def draw(
        self,
        found: FoundImage,
        size: tuple[int, int],
        paint: Callable[[Image.Image], Image.Image],
        *others: bytes,
    ) -> tuple[str, ...]:
        """Draw an image, which is read once more: many of them would not fit into memory.

        Args:
            found: What `find` gave.
            size: Its width and height.
            paint: From the upright image to the drawn one.
            *others: Files that are written before it.

        Returns:
            The paths of the files.

        Raises:
            OSError: No files can be written.
            ValueError: The image cannot be read any more, a file exists, or this one cannot be written.
        """
        upright = open_image(found.name if found.data is None else found.data)
        if upright.size != size:
            raise ValueError("it has changed meanwhile")
        files = (*others, encode(paint(upright), os.path.splitext(found.targets[-1])[1]))
        return tuple(self._write(target, data, found) for target, data in zip(found.targets, files, strict=True))

    def _write(self, target: str, data: bytes, image: FoundImage) -> str:
        """Write a file, and give its path.

        Raises:
            OSError: No file can be written.
            ValueError: This one cannot, or has been made meanwhile.
        """
        path, part = self.folder / target, self.parts / secrets.token_hex(8)
        part.write_bytes(data)
        try:
            if error := self._refuse(target, image):
                raise ValueError(error)
            path.parent.mkdir(parents=True, exist_ok=True)
            put_file(part, path, self.overwrite)
        except (FileExistsError, NotADirectoryError) as error:
            blocked = f"{path} cannot be written: a file stands where a folder must be"
            raise ValueError(self._refuse(target, image) or blocked) from error
        except OSError as error:
            if error.errno in _COMMON_ERRORS:
                raise
            raise ValueError(f"{path} cannot be written: {error.strerror}") from error
        finally:
            part.unlink(missing_ok=True)
        return str(path)


def _is_same(one: str | Path, other: str | Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # there is none, as where a URL is asked for
        return False


def _remove_parts(folder: Path) -> None:
    """Remove a folder of half-written files, unless it holds something else."""
    with suppress(OSError):
        if all(re.fullmatch("[0-9a-f]{16}", path.name) for path in folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)


def _shorten(name: str) -> str:
    """A name of no more bytes than leave room for a number and a suffix."""
    name = name[:_MAX_NAME]
    while len(os.fsencode(name)) > _MAX_NAME:
        name = name[:-1]
    return name


def _common_folder(names: Iterable[str]) -> str:
    """The folder that all that is named lies in."""
    folders = set()
    for name in names:
        if name == "-":
            folders.add(os.getcwd())
        elif os.path.isdir(name):
            folders.add(os.path.abspath(name))
        elif not is_url(name):
            while not os.path.exists(name) and glob.has_magic(name):
                name = os.path.dirname(name)
                if os.path.isdir(name):
                    name = os.path.join(name, "")
            folders.add(os.path.abspath(os.path.dirname(name)))
    try:
        return os.path.commonpath(folders) if folders else os.getcwd()
    except ValueError:  # on several drives
        return os.getcwd()
