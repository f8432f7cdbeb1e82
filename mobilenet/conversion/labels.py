"""Names of classes: from a file, of ImageNet, of COCO, or of PASCAL VOC."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mobilenet.preprocessing_mobilenet import regular
from mobilenet.segmentation_labels import VOC
from mobilenet.tasks import CLASSIFICATION, DETECTION, SEGMENTATION, Task

from .rename import ConversionError


# A file of labels, or of a configuration, that has more bytes is not read.
MAX_BYTES = 64 << 20
# Classes of ImageNet (ILSVRC 2012), and the one that Google's checkpoints put before them.
IMAGENET, GOOGLE = "imagenet", "imagenet-background"
_SETS = {1000: IMAGENET, 1001: GOOGLE}
# Whose labels the networks of a task usually have, where their number is that of its classes.
DATASETS = {CLASSIFICATION.name: "ImageNet", DETECTION.name: "COCO", SEGMENTATION.name: "PASCAL VOC"}


def imagenet() -> list[str]:
    """ImageNet's 1000 labels, such as "tench, Tinca tinca".

    Source: the words of WordNet 3.0 (wordnet.princeton.edu) for the 1000 synsets of ILSVRC 2012, as image-net.org has
    them.
    """
    return Path(__file__).with_name("imagenet_labels.txt").read_text(encoding="utf-8").splitlines()


def coco() -> list[str]:
    """COCO's 90 labels in the order of its category ids from 1 on; "N/A" for the ten ids that its boxes do not have.

    Source: the categories of instances_train2017.json (cocodataset.org); object_detection/data/mscoco_label_map.pbtxt
    """
    return Path(__file__).with_name("coco_labels.txt").read_text(encoding="utf-8").splitlines()


def known(count: int, task: Task = CLASSIFICATION) -> list[str] | None:
    """The labels that a network of so many classes usually has.

    Those of a classifier are ImageNet's, with or without background; of a detector COCO's; of a segmenter VOC's.
    """
    if task is DETECTION:
        return coco() if count == len(coco()) else None
    if task is SEGMENTATION:
        return list(VOC) if count == len(VOC) else None
    return ["background"] * (count - 1000) + imagenet() if count in _SETS else None


def beside(path: Path, count: int) -> tuple[list[str] | None, bool]:
    """Labels in a labels.txt beside a file, and whether each has its number, as Teachable Machine writes them.

    Labels that are not as many as classes are none.
    """
    try:
        labels = _read_file(path.with_name("labels.txt"))
    except ConversionError:
        return None, False
    numbers = [label.partition(" ") for label in labels]
    numbered = all(number == str(index) and name for index, (number, _, name) in enumerate(numbers))
    if len(labels) != count or count == 0:
        return None, False
    return [name for _, _, name in numbers] if numbered else labels, numbered


def read_labels(source: str, count: int, drops_background: bool = False) -> list[str]:
    """Labels by the name of a set, or from a file: one a line, or a JSON list or an object by index.

    Args:
        source: "imagenet", "imagenet-background", or a file.
        count: How many classes there are.
        drops_background: Whether class 0 goes, so that a label for it may be missing.

    Raises:
        ConversionError: There is no such file, it holds no labels, or another number of them than of classes.
    """
    named = source in _SETS.values()
    labels = known(1000 + (source == GOOGLE)) if named else _read_file(Path(source).expanduser())
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
        path = Path(regular(path))
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8-sig")
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
