"""The parts of a conversion: a module for each source, and what they share."""

from __future__ import annotations

import re
from pathlib import Path

from . import from_google
from .checkpoint import Checkpoint, Origin, download
from .names import ConversionError


SOURCES = (from_google,)


def read_source(given: str, revision: str | None = None) -> tuple[Origin, Checkpoint]:
    """Find out what kind of source a path or a Hub id is, and read it.

    Raises:
        ConversionError: There is no such source, or it cannot be read.
    """
    path = Path(given).expanduser()
    if path.exists():
        if revision is not None:
            raise ConversionError(f"--revision is for Hub ids, got the path {given}.")
        origin = Origin(given, path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        origin = download(given, revision)
    else:
        raise ConversionError(f"{given}: no such file or folder.")
    for source in SOURCES:
        if source.detect(origin.path):
            return origin, source.read(origin)
    raise ConversionError(f"{given}: no known source of a MobileNet.")


__all__ = ["Checkpoint", "ConversionError", "Origin", "read_source"]
