"""A folder that images are drawn into: names follow those of the sources, and files are whole or not there."""

from __future__ import annotations

import glob
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from PIL import Image

from .find_images import FoundImage, find
from .preprocessing_mobilenet import is_url, open_image
from .visualize import encode


# Sources that are drawn as what they are; all others become PNG.
_JPEG = (".jfif", ".jpe", ".jpeg", ".jpg")


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
        self.parts = folder / f".mobilenet-{secrets.token_hex(4)}"
        for name in names:
            if os.path.exists(name) and self._is_inside(name):
                raise ValueError(f"draw must be a folder that holds no images, got {folder}, which holds {name}.")

    def __enter__(self) -> Drawings:
        self.parts.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.parts, ignore_errors=True)

    def _is_inside(self, name: str) -> bool:
        path = os.path.realpath(name)
        return path == self.real or path.startswith(self.real.rstrip(os.sep) + os.sep)

    def find(self) -> Iterator[FoundImage]:
        """Find images as `find` does, but for what lies in the folder itself, and say where each is drawn to."""
        self.claimed = set()
        for image in find(self.names):
            if is_url(image.name) or image.data is not None or not self._is_inside(image.name):
                yield self._claim(image)

    def _claim(self, image: FoundImage) -> FoundImage:
        if image.error is not None:
            return image
        path, suffix = self._relative(image), drawn_suffix(image.name)
        number = 1
        while True:
            targets = self.targets(path if number == 1 else f"{path}-{number}", suffix)
            marks = {hash(os.path.normcase(target).casefold()) for target in targets}
            if not marks & self.claimed:
                break
            number += 1
        self.claimed |= marks
        for target in targets:
            if error := self._refuse(self.folder / target):
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
            words = [re.sub(r"[^\w.-]", "_", word)[:100] for word in words]
            return os.path.splitext(os.path.join("", *(word for word in words if word.strip("._"))))[0]
        path = os.path.abspath(name)
        if path.startswith(os.path.join(self.base, "")):
            path = os.path.relpath(path, self.base)
        else:  # from stdin
            path = os.path.splitdrive(path)[1].lstrip(os.sep)
        return os.path.splitext(path)[0]

    def _refuse(self, path: Path) -> str | None:
        """Why a file cannot be written; None where it can."""
        if not os.path.lexists(path):
            return None
        if not self.overwrite:
            return f"{path} exists; --overwrite replaces it"
        return None if path.is_file() and not path.is_symlink() else f"{path} is no regular file"

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
            OSError: A file cannot be written.
            ValueError: The image cannot be read any more, or a file exists.
        """
        upright = open_image(found.name if found.data is None else found.data)
        if upright.size != size:
            raise ValueError("it has changed meanwhile")
        files = (*others, encode(paint(upright), os.path.splitext(found.targets[-1])[1]))
        return tuple(map(self._write, found.targets, files))

    def _write(self, target: str, data: bytes) -> str:
        """Write a file, and give its path.

        Raises:
            OSError: It cannot be written.
            ValueError: It has been made meanwhile.
        """
        path, part = self.folder / target, self.parts / secrets.token_hex(8)
        part.write_bytes(data)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if error := self._refuse(path):
                raise ValueError(error)
            os.replace(part, path)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"{path} cannot be written: a file stands where a folder must be") from error
        return str(path)


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
