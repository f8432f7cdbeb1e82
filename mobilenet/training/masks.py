"""Images with a mask of classes: parallel folders of both, and datasets with columns of both."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from mobilenet.preprocessing_mobilenet import UnreadableImageError, fetch, is_url, open_image

from .data import IMAGE, LABEL, SPLIT_FOLDERS, Labels, Reader, listed, read_text


IGNORED = 255  # a value of pixels that do not count
IMAGE_FOLDERS = ("images", "image", "img")
MASK_FOLDERS = ("masks", "mask", "annotations", "labels")
MASK_COLUMNS = ("label", "annotation", "mask", "labels", "annotations", "masks")
NAME_FILES = ("classes.txt", "labels.txt", "labels.json", "id2label.json")
MAX_NAMES_SIZE = 64 << 20  # bytes of such a file


class Masks(Labels):
    """A class for each pixel: a PNG file of mode P, or L of 8 bits, whose values are classes; 255 counts for nothing.

    Args:
        classes: Names of the classes; set by `find_names`, where they are not known from the start.
    """

    noun = "images with their masks"
    dense = True

    def __init__(self, classes: Sequence[str] = ()) -> None:
        self.classes = list(classes)

    def read_folder(self, path: Path) -> datasets.DatasetDict:
        features = datasets.Features({IMAGE: datasets.Image(decode=False), LABEL: datasets.Image(decode=False)})
        splits = {}
        for split, folders in _folders(path).items():
            pairs = _pairs(*folders)
            columns = zip(*pairs, strict=True)
            splits[split] = datasets.Dataset.from_dict(
                {name: [{"bytes": None, "path": str(file)} for file in files] for name, files in zip(
                    (IMAGE, LABEL), columns, strict=True)}, features
            )  # fmt: skip
        return datasets.DatasetDict(splits)

    def is_label(self, name: str, feature: Any) -> bool:
        return name in MASK_COLUMNS and isinstance(feature, datasets.Image)

    def unify(self, splits: datasets.DatasetDict) -> datasets.DatasetDict:
        for name, split in splits.items():
            if not isinstance(split.features[LABEL], datasets.Image):
                raise ValueError(f"label_column must hold masks, which are images; in {name}, it does not.")
        return splits.cast_column(LABEL, datasets.Image(decode=False))

    def find_names(
        self,
        splits: datasets.DatasetDict,
        path: str,
        file: str | None = None,
        folders: Sequence[Path] | None = None,
        default: Sequence[str] | None = None,
    ) -> None:
        """Name the classes: by a file, or else by the numbers that the masks hold.

        Args:
            splits: Whose masks are looked at, where there is no file.
            path: Of the dataset; a folder may hold classes.txt or labels.json.
            file: Another such file.
            folders: As Reader has it.
            default: Names that count where there is no file, instead of numbers.

        Raises:
            ValueError: The file is not what it should be, or no mask can be read.
        """
        found = [Path(path) / name for name in NAME_FILES] if Path(path).is_dir() else []
        files = [Path(file)] if file else [place for place in found if place.is_file()]
        if len(files) > 1:
            raise ValueError(f"{path} must name its classes once, got {', '.join(place.name for place in files)}.")
        if files:
            self.classes = read_names(files[0])
        else:
            self.classes = list(default or map(str, range(_largest(splits, folders) + 1)))

    def names(self, rows: datasets.Dataset) -> list[str]:
        return self.classes

    def check_rows(self, rows: datasets.Dataset) -> None:
        if len(self.classes) < 2:
            raise ValueError(f"there must be at least two classes, got {', '.join(self.classes) or 'none'}.")

    def check(self, labels: np.ndarray, names: Sequence[str]) -> str | None:
        present = np.zeros(256, bool)
        for mask in labels:
            present[np.unique(mask)] = True
        absent = [name for index, name in enumerate(names) if not present[index]]
        if len(absent) == len(names):
            raise ValueError(f"masks to train on must hold classes, but all their pixels have the value {IGNORED}.")
        return f"there are no pixels to train on of {listed(absent)}." if absent else None

    def decode(
        self, label: dict[str, Any] | None, image: Image.Image, size: tuple[int, int], read: Callable[[Any], Any]
    ) -> np.ndarray:
        """A mask of the decoded image's size: (H, W), uint8."""
        return np.asarray(self._open(label, image, read).resize(size[::-1], Image.Resampling.NEAREST))

    def decode_whole(self, label: dict[str, Any] | None, image: Image.Image, read: Callable[[Any], Any]) -> np.ndarray:
        """A mask of the image's own size: (H, W), uint8."""
        return np.asarray(self._open(label, image, read))

    def _open(self, label: dict[str, Any] | None, image: Image.Image, read: Callable[[Any], Any]) -> Image.Image:
        """The mask of an image, of mode L.

        Raises:
            ValueError: It cannot be read, has another size than the image or other values than classes.
        """
        mask = _open_mask(label, read)
        if mask.size != image.size:
            sizes = "{}x{}, but its image {}x{}".format(*mask.size, *image.size)
            raise ValueError(f"{_name(label)} has {sizes}")
        values = np.asarray(mask)
        wrong = np.unique(values[(values >= len(self.classes)) & (values != IGNORED)])
        if len(wrong):
            allowed = f"values from 0 to {len(self.classes) - 1}, or {IGNORED}"
            raise ValueError(f"{_name(label)} must have {allowed}, got {', '.join(map(str, wrong[:5]))}")
        return Image.fromarray(values)  # its palette says nothing of classes

    def stack(self, labels: list[np.ndarray]) -> np.ndarray:
        return np.stack(labels)


def _name(label: dict[str, Any]) -> str:
    return f"the mask {label['path']}" if label["path"] else "the mask"


def _open_mask(label: dict[str, Any] | None, read: Callable[[Any], Any]) -> Image.Image:
    """A mask of mode P or L, whose values are as they are stored.

    Raises:
        UnreadableImageError: It cannot be read, is no PNG file, or has another mode or a gray of less than 8 bits.
    """
    if label is None:
        raise UnreadableImageError("a row without a mask")
    source = read(label)
    if isinstance(source, str) and is_url(source):
        source = fetch(source)
    try:
        mask = open_image(source)
    except UnreadableImageError as error:
        if isinstance(source, bytes):
            raise UnreadableImageError(f"{_name(label)}: {str(error).removeprefix('bytes: ')}") from error
        raise
    if mask.format != "PNG":  # JPEG, above all, would make up classes where two of them meet
        raise UnreadableImageError(f"{_name(label)} must be a PNG file, got {mask.format}")
    if mask.mode not in ("P", "L"):
        raise UnreadableImageError(f"{_name(label)} must be of mode P or L, got {mask.mode}")
    if mask.mode == "L":
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as header:
            stored = header.tile[0][3]  # such as L;4
        if stored != "L":  # Pillow scales it, so that 15 becomes 255
            raise UnreadableImageError(
                f"{_name(label)} must be gray of 8 bits or have a palette, got {stored[2:]} bits"
            )
    return mask


def _largest(splits: datasets.DatasetDict, folders: Sequence[Path] | None) -> int:
    """The largest value of all masks but 255.

    Raises:
        ValueError: None can be read. Where others can, what is wrong with it is reported when it is decoded.
    """
    reader = Reader(None, folders)

    def largest(label: dict[str, Any] | None) -> int | UnreadableImageError:
        try:
            counts = _open_mask(label, reader.source).histogram()
        except UnreadableImageError as error:
            return error
        return max((value for value, count in enumerate(counts) if count and value != IGNORED), default=-1)

    with ThreadPoolExecutor() as pool:
        found = [value for rows in splits.values() for batch in rows.iter(256) for value in pool.map(
            largest, batch[LABEL])]  # fmt: skip
    values = [value for value in found if isinstance(value, int)]
    if found and not values:
        raise ValueError(f"masks must be readable, but none of {len(found)} is: {found[0]}.")
    return max(values, default=-1)


def read_names(path: Path) -> list[str]:
    """Names of classes in order: one a line, or as JSON a list of them or an object with a name for each index.

    Raises:
        ValueError: The file is none of these.
    """
    try:
        text = read_text(path, MAX_NAMES_SIZE, "utf-8-sig")
        content = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a file of names: {error}") from error
    if isinstance(content, dict):
        indices = [str(index) for index in range(len(content))]
        content = [content.get(index) for index in indices]
    names = [name.strip() if isinstance(name, str) else name for name in content] if isinstance(content, list) else []
    while names and not names[-1]:
        names.pop()
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError(f"{path} must name the classes 0, 1, 2 and so on, each in another way.")
    if len(names) > IGNORED:
        raise ValueError(f"{path} must name at most {IGNORED} classes, got {len(names)}.")
    return names


# Folders


def _below(path: Path, names: Sequence[str]) -> Path | None:
    return next((path / name for name in names if (path / name).is_dir()), None)


def _folders(path: Path) -> dict[str, tuple[Path, Path]]:
    """By split, the folders of images and masks: split by split, or each with folders of splits, or without splits.

    Raises:
        ValueError: There are none.
    """
    found: dict[str, tuple[Path, Path]] = {}

    def add(split: str, images: Path, masks: Path) -> None:
        if split in found:
            raise ValueError(f"{path} must hold each split once, but {split} comes twice.")
        found[split] = (images, masks)

    for folder in _splits(path):
        images, masks = _below(folder, IMAGE_FOLDERS), _below(folder, MASK_FOLDERS)
        if images and masks:
            add(SPLIT_FOLDERS[folder.name.lower()], images, masks)
    images, masks = _below(path, IMAGE_FOLDERS), _below(path, MASK_FOLDERS)
    if images and masks:
        for folder in _splits(images):
            if (masks / folder.name).is_dir():
                add(SPLIT_FOLDERS[folder.name.lower()], folder, masks / folder.name)
        if not found:
            add("train", images, masks)
    if not found:
        raise ValueError(
            f"{path} must hold a folder images and a folder masks, or train, validation and test with both in each."
        )
    return found


def _splits(path: Path) -> Iterator[Path]:
    return (entry for entry in sorted(path.iterdir()) if entry.is_dir() and entry.name.lower() in SPLIT_FOLDERS)


def _pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Images and their masks, which have the same names but for the endings.

    Raises:
        ValueError: Some have no other half, or two have the same name.
    """
    extensions = {extension for extension, name in Image.registered_extensions().items() if name in Image.OPEN}
    found: list[dict[str, Path]] = []
    for folder, allowed in ((images, extensions), (masks, {".png"})):
        files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in allowed and file.name[0] != "."]
        found.append({file.stem: file for file in files})
        if len(found[-1]) < len(files):
            twice = [file.name for file in files if file not in found[-1].values()]
            raise ValueError(f"{folder} must hold one file of each name, but it has others like {listed(twice)}.")
    if not found[0]:
        raise ValueError(f"{images} must hold images, got none.")
    for what, these, others, place in (("mask", *found, masks), ("image", *found[::-1], images)):
        if alone := [these[stem].name for stem in these if stem not in others]:
            raise ValueError(f"{place} must hold a {what} for each file of the other folder; it has none for "
                             f"{listed(alone)}.")  # fmt: skip
    return [(found[0][stem], found[1][stem]) for stem in found[0]]
