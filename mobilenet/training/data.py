"""Labeled images for training: read, check, split, decode once, and give them batch by batch."""

from __future__ import annotations

import glob
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import psutil
import torch
import yaml
from huggingface_hub import DatasetCard
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from PIL import Image
from torch import Tensor

from mobilenet.configuration_mobilenet import MAX_LABELS
from mobilenet.image_processing_mobilenet import MobileNetImageProcessor, UnreadableImageError
from mobilenet.preprocessing_mobilenet import OPTIONS, is_url, open_image, place, read_options, regular
from mobilenet.progress import progress_bar
from mobilenet.text import clean


# Folders of these names hold splits; folders of other names hold classes.
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
IMAGE, LABEL = "image", "label"
SHOWN = 20  # names that an error lists before it says how many more there are


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """Names for an error: the first ones, and how many more there are."""
    more = f"{separator}and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + more


def tell(text: str) -> None:
    """Print a line for people, of which a terminal obeys nothing."""
    print(clean(text), flush=True)


def read_text(path: Path, most: int, encoding: str = "utf-8") -> str:
    """The text of a file of a dataset.

    Args:
        path: Of the file.
        most: Bytes that it may have.
        encoding: Of the text.

    Raises:
        OSError: It cannot be read, or is no regular file.
        ValueError: It is too large, or not encoded so.
    """
    if (size := os.stat(regular(path)).st_size) > most:
        raise ValueError(f"it has {size:,} bytes, which is over {most:,}")
    return path.read_text(encoding=encoding)


class Labels(ABC):
    """What a task's labels are: how they are found, checked and decoded.

    A row has an image and a label; what the latter holds, the subclass says.
    """

    noun = "images"  # what a row is called in errors
    dense = False  # whether a label has a value for each pixel, and lies where images lie

    @abstractmethod
    def read_folder(self, path: Path) -> datasets.DatasetDict | dict[str, Any]:
        """Read a folder of images: splits by name, or arguments of datasets.load_dataset that give them.

        Raises:
            ValueError: It is not laid out as such a folder should be.
        """

    @abstractmethod
    def is_label(self, name: str, feature: Any) -> bool:
        """Whether a column of a dataset looks like one of labels."""

    @abstractmethod
    def unify(self, splits: datasets.DatasetDict) -> datasets.DatasetDict:
        """Bring the labels of all splits into one form.

        Raises:
            ValueError: They cannot be, or splits do not share their classes.
        """

    def find_names(  # noqa: B027
        self,
        splits: datasets.DatasetDict,
        path: str,
        file: str | None = None,
        folders: Sequence[Path] | None = None,
        default: Sequence[str] | None = None,
    ) -> None:
        """Find the names of the classes where rows do not say them; by default, they do."""

    @abstractmethod
    def names(self, rows: datasets.Dataset) -> list[str]:
        """Names of the classes."""

    @abstractmethod
    def check_rows(self, rows: datasets.Dataset) -> None:
        """Raise ValueError unless rows can be trained on, before they are decoded."""

    def check_measured(self, rows: datasets.Dataset) -> None:  # noqa: B027
        """Raise ValueError unless rows can be measured on, before they are decoded; by default, they can."""

    @abstractmethod
    def check(self, labels: np.ndarray, names: Sequence[str]) -> str | None:
        """Raise ValueError unless decoded labels can be trained on; say what is odd about them, if anything is."""

    @abstractmethod
    def decode(self, label: Any, image: Image.Image, size: tuple[int, int], read: Callable[[Any], Any]) -> Any:
        """The label of one image, as `stack` takes it.

        Args:
            label: What the row holds.
            image: As it comes, upright.
            size: Height and width of the decoded image.
            read: Gives the source that open_image takes, of an image of a row.

        Raises:
            ValueError: It is broken, or does not fit the image.
        """

    @abstractmethod
    def stack(self, labels: list[Any]) -> np.ndarray:
        """Labels of all images, of shape (N, ...)."""

    def hold_out(
        self, rows: datasets.Dataset, fraction: float, seed: int
    ) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Split images for validation off, at random.

        Raises:
            ValueError: There are too few of them.
        """
        held = round(fraction * len(rows))
        if not 0 < held < len(rows):
            raise ValueError(
                f"a validation split needs an image, and leaves one: {fraction:g} of {len(rows)} images is too few; "
                "set validation higher, or to 0."
            )
        parts = rows.train_test_split(test_size=held, seed=seed)
        return parts["train"], parts["test"]


class Classes(Labels):
    """One class an image."""

    columns = ("label", "labels", "fine_label", "class", "target")

    def read_folder(self, path: Path) -> dict[str, Any]:
        return {"path": "imagefolder", "data_files": _folders(path), "drop_labels": False}

    def is_label(self, name: str, feature: Any) -> bool:
        return isinstance(feature, datasets.ClassLabel) or name in self.columns

    def unify(self, splits: datasets.DatasetDict) -> datasets.DatasetDict:
        return _with_class_names(splits)

    def names(self, rows: datasets.Dataset) -> list[str]:
        return rows.features[LABEL].names

    def check_rows(self, rows: datasets.Dataset) -> None:
        check_classes(rows[LABEL][:], self.names(rows))

    def check(self, labels: np.ndarray, names: Sequence[str]) -> None:
        check_classes(labels, names)

    def decode(self, label: int, image: Image.Image, size: tuple[int, int], read: Callable[[Any], Any]) -> int:
        return label

    def stack(self, labels: list[int]) -> np.ndarray:
        return np.asarray(labels, np.int64)

    def hold_out(
        self, rows: datasets.Dataset, fraction: float, seed: int
    ) -> tuple[datasets.Dataset, datasets.Dataset]:
        return hold_out(rows, fraction, seed)


CLASSES = Classes()


def load_splits(
    dataset: str,
    subset: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    labels: Labels = CLASSES,
) -> datasets.DatasetDict:
    """Read a folder of images, a parquet file, a folder of parquet files or a dataset of the Hub.

    Returns:
        Splits by name, each with two columns: "image" (undecoded) and "label", as `labels` unifies them.

    Raises:
        FileNotFoundError: The path or Hub id does not exist.
        ValueError: The dataset cannot be read, names files elsewhere, has no column of images or labels, or its splits
            do not share their classes.
    """
    path = Path(dataset)
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"dataset must be a folder, a .parquet file or a Hub id, got {dataset!r}.")
    if path.is_file():
        source = {"path": "parquet", "data_files": {"train": glob.escape(str(path))}}
    elif path.is_dir() and any(path.rglob("*.parquet")):
        _check_card(path)
        source = {"path": str(path), "name": subset}
    elif path.is_dir():
        source = labels.read_folder(path)
    else:
        if path.is_absolute() or dataset.startswith(".") or len(path.parts) > 2:
            raise FileNotFoundError(f"dataset must be a folder, a .parquet file or a Hub id, got {dataset!r}.")
        source = {"path": dataset, "name": subset, "revision": revision}
    if isinstance(source, datasets.DatasetDict):
        return labels.unify(source)
    try:
        splits = datasets.load_dataset(**source)
    except FileNotFoundError:
        raise
    except (datasets.exceptions.DatasetsError, RuntimeError, ValueError) as error:
        raise ValueError(f"dataset {dataset!r} cannot be read: {error}") from error
    features = next(iter(splits.values())).features

    def is_label(name: str) -> bool:
        return labels.is_label(name, features[name])

    label = _column("label", label_column, features, is_label)
    image = _column(
        "image", image_column, features, lambda name: isinstance(features[name], datasets.Image) and name != label
    )
    if image == label:
        raise ValueError(f"image_column must be another column than the labels', got {image!r} for both.")
    splits = splits.select_columns([image, label])
    for old, new in ((image, IMAGE), (label, LABEL)):
        if old != new:
            splits = splits.rename_column(old, new)
    splits = splits.cast_column(IMAGE, datasets.Image(decode=False))
    return labels.unify(splits)


def folders_of(dataset: str) -> list[Path]:
    """The folders that hold the files of a dataset, as load_splits reads it."""
    path = Path(dataset)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        own = [Path(os.path.abspath(folder)), folder.resolve()]
    else:
        own = [Path(HF_HUB_CACHE, repo_folder_name(repo_id=dataset, repo_type="dataset"))]
    return [*own, Path(datasets.config.DOWNLOADED_DATASETS_PATH), Path(datasets.config.EXTRACTED_DATASETS_PATH)]


# What fsspec or the system takes for another place: an absolute path, a URL or a chain of them, a step up.
_OUTSIDE = re.compile(r"[/\\~]|[a-z][a-z0-9+.-]*:|.*(::|://)|(.*[/\\])?\.\.([/\\]|$)", re.DOTALL | re.IGNORECASE)


def _check_card(folder: Path) -> None:
    """Raise ValueError if README.md or .huggingface.yaml names files that lie elsewhere, which datasets would read."""
    for name in (datasets.config.REPOCARD_FILENAME, datasets.config.REPOYAML_FILENAME):
        path = folder / name
        if not path.exists():
            continue
        try:
            if path.suffix == ".md":
                content = DatasetCard.load(regular(path)).data.to_dict()
            else:
                content = yaml.safe_load(Path(regular(path)).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
            raise ValueError(f"{path} must be the card of a dataset: {error}") from error
        configs = content.get("configs") if isinstance(content, dict) else None
        configs = configs if isinstance(configs, list) else []
        for pattern in (named for config in configs for named in _patterns(config)):
            if not isinstance(pattern, str) or _OUTSIDE.match(pattern):
                raise ValueError(f"{path} must name files of its own folder, got {str(pattern)[:80]!r}.")


def _patterns(config: Any) -> Iterator[Any]:
    """The files and folders that a configuration in a dataset's card names."""
    if not isinstance(config, dict):
        return
    given = config.get("data_files")
    for entry in given if isinstance(given, list) else [given]:
        named = entry.get("path") if isinstance(entry, dict) else entry
        yield from named if isinstance(named, list) else [named] if named is not None else []
    if config.get("data_dir") is not None:
        yield config["data_dir"]


def _folders(path: Path) -> dict[str, str]:
    """Patterns of files by split: the folders below are splits if they have such names and hold folders themselves.

    Raises:
        ValueError: There are no folders, or something is neither a split nor a class nor an image of one.
    """
    folders = [folder.name for folder in _below(path)]
    splits = {name: SPLIT_FOLDERS[name.lower()] for name in folders if name.lower() in SPLIT_FOLDERS}
    holds_splits = any(_below(path / name) for name in splits)
    if not (holds_splits and ("train" in splits.values() or len(splits) == len(folders))):
        return {"train": _classes(path)}
    if others := [name for name in folders if name not in splits]:
        raise ValueError(
            f"{path} must hold either splits or classes, but beside {listed([*splits])} it has {listed(others)}."
        )
    if len(set(splits.values())) < len(splits):
        raise ValueError(f"{path} must hold each split once, got {listed([*splits])}.")
    return {split: _classes(path / name) for name, split in splits.items()}


def _below(path: Path) -> list[Path]:
    """The folders in a folder, but hidden ones and those of archivers."""
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))


def _classes(path: Path) -> str:
    """Pattern of the images in a folder of classes."""
    classes = _below(path)
    if not classes:
        raise ValueError(f"{path} must hold a folder of images for each class, but it has no folders.")
    extensions = {extension for extension, name in Image.registered_extensions().items() if name in Image.OPEN}
    stray = [entry.name for entry in sorted(path.iterdir()) if entry.is_file() and entry.suffix.lower() in extensions]
    stray += [f"{folder.parent.name}/{folder.name}" for name in classes for folder in _below(name)]
    if stray:
        raise ValueError(f"{path} must hold images in the folders of their classes alone, got {listed(stray)}.")
    empty = [
        folder.name
        for folder in classes
        if folder.is_symlink() or not any(entry.suffix.lower() in extensions for entry in folder.iterdir())
    ]
    if empty:
        raise ValueError(
            f"{path} must hold images that Pillow reads in the folder of each class, got none in {listed(empty)} "
            "(links to folders are not followed)."
        )
    return f"{glob.escape(str(path))}/*/*"


def _column(what: str, chosen: str | None, features: Any, fits: Any) -> str:
    if chosen is not None:
        if chosen not in features:
            raise ValueError(f"{what}_column must be one of {', '.join(features)}, got {chosen!r}.")
        return chosen
    candidates = [name for name in features if fits(name)]
    if len(candidates) != 1:
        found = f"has {', '.join(candidates)}" if candidates else "has none that looks like one"
        raise ValueError(f"{what}_column must name one of the columns {', '.join(features)}: the dataset {found}.")
    return candidates[0]


def _with_class_names(splits: datasets.DatasetDict) -> datasets.DatasetDict:
    """Make every label column one of classes, with the names that the first split has."""
    first, *others = splits
    kind = splits[first].features[LABEL]
    if not isinstance(kind, datasets.ClassLabel):
        if not isinstance(kind, datasets.Value):
            raise ValueError(f"every image must have one label, a name or an integer, got {kind}.")
        values = sorted({value for split in splits.values() for value in split[LABEL][:]}, key=str)
        if not all(isinstance(value, (str, int)) for value in values):
            raise ValueError(f"labels must be names or integers, got {listed([repr(v) for v in values])}.")
        if all(isinstance(value, int) for value in values) and values != list(range(len(values))):
            values.sort()
            if values[0] < 0:
                raise ValueError(f"labels must count from 0, got {listed([str(v) for v in values])}.")
            if values[-1] >= MAX_LABELS:
                raise ValueError(f"labels must be integers from 0 to {MAX_LABELS - 1}, got {values[-1]}.")
            values = list(range(values[-1] + 1))
        kind = datasets.ClassLabel(names=[str(value) for value in values])
    for name in others:
        theirs = splits[name].features[LABEL]
        if isinstance(theirs, datasets.ClassLabel) and theirs.names != kind.names:
            missing, extra = set(kind.names) - set(theirs.names), set(theirs.names) - set(kind.names)
            raise ValueError(
                f"splits must have the same labels; {name} lacks {listed(sorted(missing)) or 'none'} and has "
                f"{listed(sorted(extra)) or 'none'} that {first} lacks."
            )
    if splits[first].features[LABEL] != kind:
        splits = splits.cast_column(LABEL, kind)
    labeled = {}
    for name, split in splits.items():
        missing = sum(label is None or label < 0 for label in split[LABEL][:])
        if missing and name == first:
            raise ValueError(f"every image must have a label; in {name}, {missing} have none.")
        if not missing:  # the Hub's test splits often come without labels: nothing can be measured on them
            labeled[name] = split
    return datasets.DatasetDict(labeled)


def hold_out(rows: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split images for validation off, the same share of every class.

    Raises:
        ValueError: A class has too few images to give one away, or the share is less than one image a class.
    """
    counts = np.bincount(rows[LABEL][:], minlength=rows.features[LABEL].num_classes)
    names = rows.features[LABEL].names
    poor = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < 2]
    if poor:
        raise ValueError(
            f"a validation split needs at least 2 images of each class, got {listed(poor)}; add images or set "
            "validation to 0."
        )
    if min(fraction, 1 - fraction) * len(rows) < len(names):
        raise ValueError(
            f"a validation split needs an image of each class: {fraction:g} of {len(rows)} images is too few for "
            f"{len(names)} classes; set validation higher, or to 0."
        )
    parts = rows.train_test_split(test_size=fraction, stratify_by_column=LABEL, seed=seed)
    return parts["train"], parts["test"]


def check_classes(labels: Sequence[int], names: Sequence[str]) -> None:
    """Raise ValueError unless there are images of at least two classes, and of every class that has a name."""
    counts = np.bincount(labels, minlength=len(names))
    present = [name for name, count in zip(names, counts, strict=True) if count]
    if len(present) < 2:
        raise ValueError(f"a classifier needs images of at least two classes, got {listed(present) or 'none'}.")
    absent = [name for name, count in zip(names, counts, strict=True) if not count]
    if absent:
        raise ValueError(f"every class needs images to train on; there are none of {listed(absent)}.")


class Images(NamedTuple):
    """Images decoded to one size, with their labels: a dataset that gives whole batches."""

    pixels: np.ndarray  # (N, 3, H, W), RGB in 0 to 255, in memory or in a mapped file
    labels: np.ndarray  # (N, ...), as Labels.stack gives them: for one class an image (N,), int64

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[2], self.pixels.shape[3]

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Images and labels at these places."""
        return {"pixels": torch.from_numpy(self.pixels[indices]), "labels": torch.from_numpy(self.labels[indices])}


class Batches(torch.utils.data.Dataset):
    """Images as a DataLoader takes them: a batch is gathered at once."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.images.batch([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return self.images.batch(indices)


def identity_collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collate function of a dataset that gives whole batches."""
    return batch


class Storage(NamedTuple):
    """Where decoded images go: memory, as long as they take less than half of what is free, or else files.

    Files serve all processes of a machine, and the next one that resumes the run.
    """

    folder: Path
    shared: bool = False  # whether several processes of this machine want the same images

    def allocate(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """An array of bytes.

        Raises:
            OSError: Neither memory nor disk has the space.
        """
        size = int(np.prod(shape))
        if not self.shared and size < psutil.virtual_memory().available / 2:
            return np.empty(shape, np.uint8)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise OSError(f"the decoded images of {name} need {size:,} bytes, but {self.folder} has {free:,}.")
        return np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", np.uint8, shape)

    def keep(self, name: str, images: Images, dense: bool = False) -> None:
        """Say that a split's file is complete, if it has one; its labels come last and whole.

        Args:
            name: Of the split.
            images: With their labels.
            dense: Whether the labels were allocated too, as `{name}.masks`: their number comes last then.
        """
        if isinstance(images.pixels, np.memmap):
            if dense and not isinstance(images.labels, np.memmap):
                np.save(self.folder / f"{name}.masks.npy", images.labels)
            partial = self.folder / f"{name}.partial.npy"
            np.save(partial, np.arange(len(images)) if dense else images.labels)
            os.replace(partial, self.folder / f"{name}.labels.npy")

    def find(self, name: str, dense: bool = False) -> Images | None:
        """What `keep` kept."""
        labels = self.folder / f"{name}.labels.npy"
        if not labels.exists():
            return None
        labels = np.load(labels)
        if dense:
            labels = np.load(self.folder / f"{name}.masks.npy", mmap_mode="r")[: len(labels)]
        return Images(np.load(self.folder / f"{name}.npy", mmap_mode="r")[: len(labels)], labels)


class Reader(NamedTuple):
    """What reads the images of rows."""

    processor: MobileNetImageProcessor
    folders: Sequence[Path] | None = None  # where files may lie that rows name; by default anywhere, at URLs too
    square: int | None = None  # side in pixels of the center square to keep; by default what the processor gives

    def source(self, row: dict[str, Any] | None) -> str | bytes:
        """What open_image takes, of an image of a row.

        Raises:
            UnreadableImageError: There is none, or it lies where it must not.
        """
        if row is None:
            raise UnreadableImageError("a row without an image")
        if row["bytes"] is not None:
            return row["bytes"]
        return row["path"] if self.folders is None else _within(self.folders, row["path"])

    def image(self, row: dict[str, Any] | None) -> Image.Image:
        """The image of a row, upright.

        Raises:
            UnreadableImageError: It cannot be read.
        """
        return open_image(self.source(row))

    def pixels(self, image: Image.Image) -> np.ndarray:
        """What the network sees of an image, in bytes: (3, H, W).

        Raises:
            ValueError: Its values are no colors.
        """
        options = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
        if self.square is not None:
            square = {"size": self.square, "crop_size": self.square}
            options |= {"do_resize": True, "do_center_crop": True, **square}
        pixels = self.processor(image, **options)["pixel_values"][0].astype(np.uint8)
        if self.processor.pad_size is not None and self.square is None:
            self._fill(pixels, image)
        return pixels

    def _fill(self, pixels: np.ndarray, image: Image.Image) -> None:
        """Let what is padded be what normalization makes 0 of, up to rounding."""
        processor = self.processor
        down, across = place(*image.size, read_options({name: getattr(processor, name) for name in OPTIONS}))
        mean = np.array(processor.image_mean if processor.do_normalize else 0.0)
        color = np.rint(mean / (processor.rescale_factor if processor.do_rescale else 1)).reshape(-1, 1, 1)
        pixels[:, down.resized :] = color
        pixels[:, :, across.resized :] = color

    def read(self, row: dict[str, Any] | None, label: Any, labels: Labels) -> tuple[np.ndarray, Any] | str:
        """An image and its label decoded, or why they cannot be."""
        try:
            image = self.image(row)
            pixels = self.pixels(image)
            return pixels, labels.decode(label, image, pixels.shape[1:], self.source)
        except ValueError as error:
            return name_row(row, error)


def name_row(row: dict[str, Any] | None, error: ValueError) -> str:
    """What is wrong with a row, with the name of its image."""
    reason = str(error).removeprefix("bytes: ")
    if row is None or (row["bytes"] is None and isinstance(error, UnreadableImageError)):
        return reason  # which names it
    return f"{row['path'] or 'an image without a name'}: {reason}"


def decode(
    rows: datasets.Dataset,
    processor: MobileNetImageProcessor,
    storage: Storage,
    name: str,
    square: int | None = None,
    skip_unreadable: bool = False,
    quiet: bool = False,
    folders: Sequence[Path] | None = None,
    labels: Labels = CLASSES,
) -> Images:
    """Decode every image once, with the processor's own resizing.

    Args:
        rows: Images and labels, as load_splits gives them.
        processor: What resizes and crops.
        storage: Where the pixels go.
        name: Of the split, for messages and the file.
        square: Side in pixels of the center square to keep; by default what the processor gives.
        skip_unreadable: Whether to leave unreadable images out, and say so, instead of raising an error.
        quiet: Whether to say nothing.
        folders: Where files may lie that rows name instead of holding them; by default anywhere, at URLs too.
        labels: What the labels are.

    Raises:
        ValueError: Images are unreadable (all are listed), or none is left.
    """
    if found := storage.find(name, labels.dense):
        return found
    reader = Reader(processor, folders, square)
    pixels, masks, decoded, broken = None, None, [], []
    count = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress_bar(f"decoding {name}", quiet) as bar:
        task = bar.add_task("", total=len(rows))
        for batch in rows.iter(batch_size=256):
            for read in pool.map(reader.read, batch[IMAGE], batch[LABEL], [labels] * len(batch[IMAGE])):
                bar.advance(task)
                if isinstance(read, str):
                    broken.append(read)
                    continue
                image, label = read
                if pixels is None:
                    pixels = storage.allocate(name, (len(rows), *image.shape))
                    if labels.dense:
                        masks = storage.allocate(f"{name}.masks", (len(rows), *label.shape))
                if image.shape != pixels.shape[1:]:
                    raise ValueError(
                        f"the processor must give images of one size, got {image.shape} and {pixels.shape[1:]}; "
                        "set its do_center_crop."
                    )
                pixels[count] = image
                if masks is None:
                    decoded.append(label)
                else:
                    masks[count] = label
                count += 1
    if broken and not skip_unreadable:
        raise ValueError(
            f"{len(broken)} of {len(rows)} {labels.noun} of {name} cannot be read: {listed(broken, '; ')}. Set "
            "skip_unreadable to leave them out."
        )
    for reason in () if quiet else broken:
        tell(f"left out {reason}")
    if pixels is None:
        raise ValueError(f"{name} must hold at least one readable image, got none.")
    images = Images(pixels[:count], labels.stack(decoded) if masks is None else masks[:count])
    storage.keep(name, images, labels.dense)
    return images


def _within(folders: Sequence[Path], name: str | None) -> str:
    """The path of a file that a row of a dataset names.

    Raises:
        UnreadableImageError: It is a URL, or leads out of these folders.
    """
    if name is None:
        raise UnreadableImageError("a row without an image")
    path = os.path.abspath(name)
    if is_url(name) or not any(Path(path).is_relative_to(folder) for folder in folders):
        raise UnreadableImageError(f"{name}: lies outside of the dataset; external_images allows it")
    return path


class Order(torch.utils.data.Sampler[int]):
    """The order of an epoch's images: a function of seed and epoch alone, so that a resumed run sees the same.

    Args:
        count: Images that there are.
        drawn: Images in an epoch: a whole number of batches, lest a small last one spoil the norms' statistics.
        seed: Seed.
        epoch: Gives the number of the epoch that begins.
        weights: How often to draw each image, of shape (count,); by default none comes twice.
    """

    def __init__(
        self, count: int, drawn: int, seed: int, epoch: Callable[[], int], weights: Tensor | None = None
    ) -> None:
        self.count, self.drawn, self.seed, self.epoch, self.weights = count, drawn, seed, epoch, weights

    def __len__(self) -> int:
        return self.drawn

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        if self.weights is None:
            order = torch.randperm(self.count, generator=generator)[: self.drawn]
        else:
            order = torch.multinomial(self.weights, self.drawn, replacement=True, generator=generator)
        yield from order.tolist()
