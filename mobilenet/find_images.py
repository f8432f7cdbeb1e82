"""The images that names stand for: files, folders, patterns, URLs, and names from stdin."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .preprocessing_mobilenet import is_url


# What a folder is searched for; a file that is named itself may have any name.
EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tga", ".tif", ".tiff", ".webp"),
)


class FoundImage(NamedTuple):
    """An image by its name, or why there is none."""

    name: str
    error: str | None = None


def find(names: Iterable[str]) -> Iterator[FoundImage]:
    """Find the images that names stand for: files, folders, patterns, URLs, and - for names from stdin.

    A file that exists is itself, whatever its name looks like. Folders are searched in alphabetical order, for files
    with the extension of an image; hidden ones are left out.
    """
    for name in names:
        if name == "-":
            lines = (os.fsdecode(line).rstrip("\r\n") for line in sys.stdin.buffer)
            yield from find(line for line in lines if line not in ("", "-"))
        elif os.path.isdir(name):
            yield from _search(name)
        elif os.path.exists(name) or is_url(name):
            yield FoundImage(name)
        elif "://" in name:
            yield FoundImage(name, error="a URL must begin with http:// or https://")
        elif not (matches := sorted(glob.glob(name, recursive=True))):
            yield FoundImage(name)
        else:
            for match in matches:
                if not os.path.isdir(match):
                    yield FoundImage(match)
                elif "**" not in name:  # which matches all below the folder, too
                    yield from _search(match)


def _search(folder: str) -> Iterator[FoundImage]:
    """Find the images in a folder and all below it."""
    errors: list[OSError] = []
    empty = True
    for path, folders, files in os.walk(folder, onerror=errors.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(files):
            if file.lower().endswith(EXTENSIONS) and not file.startswith("."):
                empty = False
                yield FoundImage(os.path.join(path, file))
    for error in errors:
        yield FoundImage(error.filename, error=f"cannot be searched: {error.strerror}")
    if empty and not errors:
        yield FoundImage(folder, error="no images in this folder")
