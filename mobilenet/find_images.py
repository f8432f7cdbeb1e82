"""The images that names stand for: files, folders, patterns, URLs, and what comes from stdin."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from .preprocessing_mobilenet import MAX_BYTES, is_url


# What a folder is searched for; a file that is named itself may have any name.
EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tga", ".tif", ".tiff", ".webp"),
)


class FoundImage(NamedTuple):
    """An image by its name, or why there is none."""

    name: str
    error: str | None = None
    data: bytes | None = None  # of its file, where it came from stdin
    targets: tuple[str, ...] = ()  # files that it is drawn to


def find(names: Iterable[str]) -> Iterator[FoundImage]:
    """Find the images that names stand for: files, folders, patterns, URLs, and - for stdin.

    A file that exists is itself, whatever its name looks like. Folders are searched in alphabetical order, for files
    with the extension of an image; hidden ones are left out, and links to folders are not followed. stdin holds names,
    one a line, or the bytes of one image.
    """
    for name in names:
        if name == "-":
            yield from _read_stdin()
        elif os.path.isdir(name):
            yield from _search(name)
        elif os.path.exists(name) or is_url(name):
            yield FoundImage(name)
        elif "://" in name:
            yield FoundImage(name, error="a URL must begin with http:// or https://")
        elif "\0" in name or not (matches := sorted(set(_expand(name)))):
            yield FoundImage(name)
        else:
            for match in matches:
                if not os.path.isdir(match):
                    yield FoundImage(match)
                elif "**" not in name:  # which matches all below the folder, too
                    yield from _search(match)


def _read_stdin() -> Iterator[FoundImage]:
    """The images whose names stdin holds, or the one that it holds itself."""
    if sys.stdin is None:
        yield FoundImage("stdin", "it is closed")
        return
    stdin = sys.stdin.buffer
    start = stdin.read1(1 << 16)
    if b"\0" in start:  # which no name has, and the start of every image but a rare one
        data = start + stdin.read(MAX_BYTES + 1 - len(start))
        too_large = f"more than {MAX_BYTES} bytes" if len(data) > MAX_BYTES else None
        yield FoundImage("stdin", too_large, None if too_large else data)
        return
    if start and not start.endswith(b"\n"):
        start += stdin.readline()
    lines = (os.fsdecode(line).rstrip("\r\n") for line in chain(start.split(b"\n"), stdin))
    yield from find(line for line in lines if line not in ("", "-"))


def _expand(pattern: str) -> Iterator[str]:
    """What a pattern matches. Unlike glob's own, ** follows no links, which may lead in circles."""
    separator = f"[{re.escape(os.sep + (os.altsep or ''))}]"
    found = re.search(rf"(?:^|(?<={separator}))\*\*(?:{separator}+|$)", pattern)
    if found is None:
        yield from glob.iglob(pattern)
        return
    before, after = pattern[: found.start()], pattern[found.end() :] or "*"
    for top in glob.iglob(before) if before else [""]:
        for path, folders, _ in os.walk(top or os.curdir):
            folders[:] = [name for name in folders if not name.startswith(".")]
            folder = path if top else os.path.relpath(path)
            yield from _expand(os.path.join("" if folder == os.curdir else glob.escape(folder), after))


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
