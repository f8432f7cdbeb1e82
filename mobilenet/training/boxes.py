"""Images with boxes: COCO-format folders and datasets with a column of objects."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import datasets
import numpy as np
from PIL import Image

from mobilenet.configuration_mobilenet import MAX_LABELS

from .data import IMAGE, LABEL, SPLIT_FOLDERS, Labels, listed, read_text


ANNOTATIONS = "_annotations.coco.json"  # as Roboflow exports them, in the folder of a split's images
# What columns and their parts are called.
OBJECTS = ("objects", "annotations", "label")
BOX, CATEGORY, CROWD = "bbox", "category", "iscrowd"
PARTS = {
    BOX: ("bbox", "bboxes", "boxes"),
    CATEGORY: ("category", "categories", "category_id", "label", "labels"),
    CROWD: ("iscrowd", "is_crowd", "crowd"),
}
# An entry of a decoded label: class, whether it is a crowd, left, top, right and bottom as shares of the image.
ENTRY = 6
MAX_VALUE = 1e9  # in pixels, of what a box may say
MAX_BOXES = 4096  # of an image: all get the memory that the one with the most boxes takes
MAX_SIZE = 2 << 30  # bytes of a file of annotations
NO_BOX = -100.0  # fills an image's entries up; what the Trainer pads with, too


class Boxes(Labels):
    """Any number of boxes an image, each of one class.

    A row's label has lists: "bbox" of [x, y, width, height] in pixels, "category" of classes, "iscrowd" of booleans,
    and "size" with the width and height that the image should have, or nothing.
    """

    noun = "images with their boxes"

    def read_folder(self, path: Path) -> datasets.DatasetDict | dict[str, Any]:
        if any(path.rglob("metadata.jsonl")):  # of datasets' own imagefolder
            return {"path": "imagefolder", "data_dir": str(path)}
        return read_coco(path)

    def is_label(self, name: str, feature: Any) -> bool:
        return name in OBJECTS and _parts(feature) is not None

    def unify(self, splits: datasets.DatasetDict) -> datasets.DatasetDict:
        first = next(iter(splits.values()))
        if (_parts(first.features[LABEL]) or {}).keys() == _feature(()).keys():  # a COCO folder's
            return splits
        parts = {name: _objects(split.features[LABEL]) for name, split in splits.items()}
        objects = {name: _as_lists(split[LABEL][:], parts[name]) for name, split in splits.items()}
        names = _names_of(
            {name: _innermost(parts[name][CATEGORY][1]) for name in splits},
            {name: [value for label in labels for value in label[CATEGORY]] for name, labels in objects.items()},
        )
        index = {value: position for position, value in enumerate(names)}
        for labels in objects.values():
            for label in labels:
                label[CATEGORY] = [
                    value if isinstance(value, int) else index.get(value, -1) for value in label[CATEGORY]
                ]
        return datasets.DatasetDict(
            {
                name: split.select_columns([IMAGE]).add_column(LABEL, objects[name], feature=_feature(names))
                for name, split in splits.items()
            }
        )

    def names(self, rows: datasets.Dataset) -> list[str]:
        return _innermost(_parts(rows.features[LABEL])[CATEGORY]).names

    def check_rows(self, rows: datasets.Dataset) -> None:
        if not any(label and label[CATEGORY] for label in rows[LABEL][:]):
            raise ValueError("images to train or measure on must have boxes, but none has any.")

    def check_measured(self, rows: datasets.Dataset) -> None:
        self.check_rows(rows)
        if all(not label or all(label[CROWD]) for label in rows[LABEL][:]):
            raise ValueError("images to measure on must have boxes, but none has any that is not a crowd's.")

    def check(self, labels: np.ndarray, names: Sequence[str]) -> str | None:
        seen = labels[..., 0]
        absent = [name for index, name in enumerate(names) if not (seen == index).any()]
        if len(absent) == len(names):
            raise ValueError("images to train on must have boxes, but none has any.")
        return f"there are no boxes to train on of {listed(absent)}." if absent else None

    def decode(
        self, label: dict[str, Any] | None, image: Image.Image, size: tuple[int, int], read: Callable[[Any], Any]
    ) -> np.ndarray:
        """Entries of shape (n, 6). Boxes are clipped to the image."""
        if label is None:
            return np.empty((0, ENTRY), np.float32)
        if len(label[BOX]) > MAX_BOXES:
            raise ValueError(f"an image must have at most {MAX_BOXES} boxes, got {len(label[BOX])}")
        width, height = image.size
        if label["size"] and tuple(label["size"]) != (width, height):
            expected = "{}x{}".format(*label["size"])
            raise ValueError(f"the image has {width}x{height} pixels, but its annotations are for {expected}")
        entries = np.empty((len(label[BOX]), ENTRY), np.float64)
        for entry, box, category, crowd in zip(entries, label[BOX], label[CATEGORY], label[CROWD], strict=True):
            entry[:2] = category, crowd
            entry[2:] = _clip(box, width, height)
        return entries.astype(np.float32)

    def stack(self, labels: list[np.ndarray]) -> np.ndarray:
        """Entries of shape (N, most of an image, 6), filled up with NO_BOX."""
        result = np.full((len(labels), max(1, *map(len, labels)), ENTRY), NO_BOX, np.float32)
        for target, label in zip(result, labels, strict=True):
            target[: len(label)] = label
        return result


BOXES = Boxes()


def _clip(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom as shares of the image, of x, y, width and height in pixels.

    Raises:
        ValueError: The box has no area in the image.
    """
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)) or not all(map(math.isfinite, box)):
        raise ValueError(f"a box must be four numbers, x, y, width and height, got {box}")
    x, y, w, h = box
    shown = f"[{', '.join(f'{v:g}' for v in box)}]"
    if w <= 0 or h <= 0:
        raise ValueError(f"the box {shown} has no area")
    edges = max(x, 0) / width, max(y, 0) / height, min(x + w, width) / width, min(y + h, height) / height
    left, top, right, bottom = np.float32(edges)  # what entries hold
    if left >= right or top >= bottom:
        raise ValueError(f"the box {shown} lies outside of the image of {width}x{height} pixels")
    return edges


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a float holds; NaN is one here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not abs(value) > MAX_VALUE


def _feature(names: Sequence[str]) -> dict[str, Any]:
    """What a row's label is, for datasets."""
    many = datasets.List
    return {
        BOX: many(many(datasets.Value("float64"))),
        CATEGORY: many(datasets.ClassLabel(names=list(names))),
        CROWD: many(datasets.Value("bool")),
        "size": many(datasets.Value("int64")),
    }


# Columns of objects


def _innermost(feature: Any) -> Any:
    """What a list, or a list of lists, holds."""
    while hasattr(feature, "feature") or isinstance(feature, list):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return feature


def _parts(feature: Any) -> dict[str, Any] | None:
    """The parts of a column of objects: of a dictionary of lists, or of a list of dictionaries."""
    inner = feature if isinstance(feature, dict) else _innermost(feature)
    return inner if isinstance(inner, dict) else None


def _objects(feature: Any) -> dict[str, tuple[str, Any]]:
    """What the parts of a column of objects are called, and their features.

    Raises:
        ValueError: There are no boxes or no categories.
    """
    parts = _parts(feature) or {}
    found = {}
    for part, names in PARTS.items():
        name = next((name for name in names if name in parts), None)
        if name is not None:
            found[part] = (name, parts[name])
        elif part != CROWD:
            raise ValueError(
                f"objects must have {part}, as one of {', '.join(names)}, got {', '.join(parts) or feature}."
            )
    return found


def _is_numbers(box: Any) -> bool:
    """Whether a box is a list of numbers; some may lack."""
    return isinstance(box, list) and all(isinstance(value, (int, float, NoneType)) for value in box)


def _as_lists(column: list[Any], parts: dict[str, tuple[str, Any]]) -> list[dict[str, Any]]:
    """Labels in the form of Boxes, of rows that hold dictionaries of lists or lists of dictionaries."""
    labels = []
    for row in column:
        if isinstance(row, list):
            label = {part: [one.get(name) if isinstance(one, dict) else None for one in row] for part, (name, _) in (
                parts.items())}  # fmt: skip
        else:
            label = {part: [] if (row or {}).get(name) is None else row[name] for part, (name, _) in parts.items()}
        for part, values in label.items():
            if not isinstance(values, list):
                raise ValueError(f"row {len(labels)} must have a list of {part}, got {values!r:.80}.")
        for box in label[BOX]:
            if box is not None and not _is_numbers(box):
                raise ValueError(f"row {len(labels)} must have boxes of four numbers, got {box!r:.80}.")
        crowd = label.get(CROWD) or [False] * len(label[BOX])
        for part, values in ((CATEGORY, label[CATEGORY]), (CROWD, crowd)):
            if len(values) != len(label[BOX]):
                got = f"{len(values)} for {len(label[BOX])}"
                raise ValueError(f"row {len(labels)} must have a value of {part} for each box, got {got}.")
        labels.append({**label, CROWD: [bool(value) for value in crowd], "size": None})
    return labels


def _names_of(features: dict[str, Any], categories: dict[str, list[Any]]) -> list[str]:
    """Names of the classes, of the categories of all splits.

    Raises:
        ValueError: Categories are neither names nor integers from 0, or splits have others.
    """
    first, *others = features
    if isinstance(features[first], datasets.ClassLabel):
        for name in others:
            _check_same(name, getattr(features[name], "names", []), first, features[first].names)
        names = features[first].names
    else:
        values = [value for split in categories.values() for value in split]
        if not values:
            raise ValueError("images to train or measure on must have boxes, but none has any.")
        kinds = {type(value) for value in values}
        if kinds == {str}:
            return sorted(set(values))
        if kinds != {int}:
            raise ValueError(
                f"categories must all be names, or all integers, got {listed(sorted(k.__name__ for k in kinds))}."
            )
        if max(values) >= MAX_LABELS:
            raise ValueError(f"categories must be integers from 0 to {MAX_LABELS - 1}, got {max(values)}.")
        names = [str(index) for index in range(max(values) + 1)]
    wrong = {str(v) for split in categories.values() for v in split if type(v) is not int or not 0 <= v < len(names)}
    if wrong:
        raise ValueError(f"categories must be integers from 0 to {len(names) - 1}, got {listed(sorted(wrong))}.")
    return names


def _check_same(name: str, names: Sequence[str], first: str, expected: Sequence[str]) -> None:
    if list(names) != list(expected):
        missing, extra = set(expected) - set(names), set(names) - set(expected)
        raise ValueError(
            f"splits must have the same categories in the same order; {name} lacks {listed(sorted(missing)) or 'none'}"
            f" and has {listed(sorted(extra)) or 'none'} that {first} lacks."
        )


# COCO-format folders


def read_coco(path: Path) -> datasets.DatasetDict:
    """Read a folder of images with annotations in COCO's format.

    Either `annotations/instances_train2017.json` (likewise val and test) with images in `train2017`,
    `images/train2017` or `images`; or `_annotations.coco.json` among the images of each of `train`, `valid` and
    `test`, or of the folder itself.

    Raises:
        ValueError: There are no annotations, or they are broken.
    """
    places = [*_annotations(path)]
    found = dict(places)
    if len(found) < len(places):
        files = [str(file.relative_to(path)) for _, (file, _) in places]
        raise ValueError(f"{path} must hold the annotations of each split once, got {listed(files)}.")
    if not found:
        raise ValueError(
            f"{path} must hold annotations in COCO's format: annotations/instances_train.json, or {ANNOTATIONS} "
            "beside the images; it has neither."
        )
    contents = {split: _read_json(file) for split, (file, _) in found.items()}
    headings = set.intersection(*(_headings(content) for content in contents.values()))
    names: list[str] = []
    splits = {}
    for split, (file, folder) in found.items():
        indices, own = _categories(file, contents[split], headings)
        names = names or own
        _check_same(split, own, next(iter(found)), names)
        splits[split] = _rows(file, contents[split], folder, indices, names)
    return datasets.DatasetDict(splits)


def _annotations(path: Path) -> Iterator[tuple[str, tuple[Path, Path]]]:
    """Splits, each with the file of its annotations and the folder of its images."""
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        if folder.name.lower() in SPLIT_FOLDERS and (folder / ANNOTATIONS).exists():
            yield SPLIT_FOLDERS[folder.name.lower()], (folder / ANNOTATIONS, folder)
    if (path / ANNOTATIONS).exists():
        yield "train", (path / ANNOTATIONS, path)
    for file in sorted((path / "annotations").glob("*.json")):
        match = re.fullmatch(r"(?:instances_)?((train|val|valid|validation|test)[^/]*)", file.stem)
        if match:
            name, split = match.groups()
            places = (path / "images" / name, path / name, path / "images", path)
            yield SPLIT_FOLDERS[split], (file, next(place for place in places if place.is_dir()))


def _read_json(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Images, annotations and categories, with what is read of them.

    Raises:
        ValueError: The file is not in COCO's format.
    """
    try:
        content = json.loads(read_text(file, MAX_SIZE, "utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}.")
    for part, fields in (
        ("images", {"id": (int, str), "file_name": str}),
        ("annotations", {"image_id": (int, str), "category_id": (int, str), "bbox": list}),
        ("categories", {"id": (int, str), "name": str, "supercategory": (str, NoneType)}),
    ):
        entries = content.get(part)
        if not isinstance(entries, list):
            raise ValueError(f"{file} must hold a list of {part}, got {type(entries).__name__}.")
        for index, entry in enumerate(entries):
            for field, kind in fields.items():
                if not isinstance(entry, dict) or not isinstance(entry.get(field), kind):
                    got = repr(entry.get(field) if isinstance(entry, dict) else entry)[:80]
                    raise ValueError(f"{file} must give each of its {part} a {field}; number {index} has {got}.")
        if "id" in fields:
            _check_once(file, part, "id", [entry["id"] for entry in entries])
    _check_once(file, "categories", "name", [entry["name"] for entry in content["categories"]])
    return content


def _check_once(file: Path, part: str, field: str, values: list[Any]) -> None:
    if twice := [str(value) for value, count in Counter(values).items() if count > 1]:
        raise ValueError(f"{file} must give each of its {part} another {field}, but {listed(twice)} comes twice.")


def _headings(content: dict[str, list[dict[str, Any]]]) -> set[str]:
    """Categories without boxes that others belong to: Roboflow's exports have one for all of them."""
    used = {annotation["category_id"] for annotation in content["annotations"]}
    above = {category.get("supercategory") for category in content["categories"]}
    return {
        category["name"]
        for category in content["categories"]
        if category["id"] not in used and category["name"] in above
    }


def _categories(
    file: Path, content: dict[str, list[dict[str, Any]]], headings: set[str]
) -> tuple[dict[Any, int], list[str]]:
    """Class by category id, which may leave numbers out, and names of the classes."""
    categories = [category for category in content["categories"] if category["name"] not in headings]
    if not categories:
        raise ValueError(f"{file} must hold categories, got none.")
    categories.sort(key=lambda category: (str(type(category["id"])), category["id"]))
    return {category["id"]: index for index, category in enumerate(categories)}, [c["name"] for c in categories]


def _rows(
    file: Path, content: dict[str, list[dict[str, Any]]], folder: Path, indices: dict[Any, int], names: list[str]
) -> datasets.Dataset:
    """Every image with its boxes; those without stay."""
    labels = {image["id"]: {BOX: [], CATEGORY: [], CROWD: [], "size": _size(image)} for image in content["images"]}
    for annotation in content["annotations"]:
        label, category = labels.get(annotation["image_id"]), indices.get(annotation["category_id"])
        for what, found in (("image_id", label), ("category_id", category)):
            if found is None:
                raise ValueError(
                    f"{file} must describe what its annotations name, but {what} {annotation[what]!r:.80} of "
                    f"annotation {annotation.get('id')!r:.80} is not there."
                )
        if not all(map(_is_number, annotation["bbox"])):
            raise ValueError(f"{file} must give boxes as numbers, got {annotation['bbox']!r:.80}.")
        label[BOX].append([float(value) for value in annotation["bbox"]])
        label[CATEGORY].append(category)
        label[CROWD].append(bool(annotation.get("iscrowd", 0)))
    images = [{"bytes": None, "path": str(folder / image["file_name"])} for image in content["images"]]
    features = datasets.Features({IMAGE: datasets.Image(decode=False), LABEL: _feature(names)})
    if not images:
        raise ValueError(f"{file} must hold images, got none.")
    try:
        return datasets.Dataset.from_dict({IMAGE: images, LABEL: list(labels.values())}, features)
    except UnicodeEncodeError as error:
        raise ValueError(f"{file} must name files in whole characters: {error}.") from error


def _size(image: dict[str, Any]) -> list[int] | None:
    """Width and height, where an image has them."""
    size = [image.get("width"), image.get("height")]
    return size if all(type(value) is int and 0 < value < MAX_VALUE for value in size) else None
