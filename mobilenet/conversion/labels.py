"""Names of classes: from a file, or of ImageNet as installed packages know them."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .names import ConversionError


# Classes of ImageNet (ILSVRC 2012), and the one that Google's checkpoints put before them.
IMAGENET, GOOGLE = "imagenet", "imagenet-background"
_SETS = {1000: IMAGENET, 1001: GOOGLE}


def imagenet() -> list[str] | None:
    """ImageNet's 1000 labels, such as "tench, Tinca tinca"; None where no installed package knows them."""
    timm = find_spec("timm")
    if timm and timm.submodule_search_locations:
        folder = Path(timm.submodule_search_locations[0], "data", "_info")
        lines = (folder / "imagenet_synset_to_lemma.txt").read_text(encoding="utf-8").splitlines()
        lemmas = dict(line.split("\t", 1) for line in lines)
        return [lemmas[synset] for synset in (folder / "imagenet_synsets.txt").read_text().split()]
    if find_spec("torchvision"):
        from torchvision.models import MobileNet_V2_Weights

        return list(MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"])
    return None


def known(count: int) -> list[str] | None:
    """The labels that a network of so many classes usually has: ImageNet's, with or without background."""
    labels = imagenet() if count in _SETS else None
    return ["background", *labels] if labels and count == 1001 else labels


def read_labels(source: str, count: int, drops_background: bool = False) -> list[str]:
    """Labels by the name of a set, or from a file: one a line, or a JSON list or an object by index.

    Args:
        source: "imagenet", "imagenet-background", or a file.
        count: How many classes there are.
        drops_background: Whether class 0 goes, so that a label for it may be missing.

    Raises:
        ConversionError: There is no such file, it holds no labels, or another number of them than of classes.
    """
    if source in _SETS.values():
        size = 1000 + (source == GOOGLE)
        labels = known(size)
        if labels is None:
            raise ConversionError(f"{source} labels come with timm or torchvision, and neither is installed.")
    else:
        labels = _read_file(Path(source).expanduser())
    if drops_background and isinstance(labels, list) and len(labels) == count - 1:
        labels = ["background", *labels]
    return check(labels, count, source)


def check(labels: Any, count: int, source: str | os.PathLike) -> list[str]:
    """Give labels back, if there is one text for each class.

    Raises:
        ConversionError: They are something else.
    """
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ConversionError(f"{source}: labels must be texts, a list of them or an object by index.")
    if len(labels) != count:
        raise ConversionError(f"{source}: must hold a label for each of {count} classes, got {len(labels)}.")
    return labels


def _read_file(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        content = json.loads(text)
        if isinstance(content, dict):
            return [content[str(index)] for index in range(len(content))]
        return content
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise ConversionError(
            f"{path}: no labels: must be {', '.join(_SETS.values())}, a file of one label a line, or JSON; {error}"
        ) from error
