"""Images with masks: folders of both, columns of both, names of classes, and what is refused."""

import re
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from shapes import SHAPES, draw, draw_scenes, encode_png

from mobilenet import MobileNetImageProcessor
from mobilenet.training.data import IMAGE, LABEL, Images, Storage, decode, folders_of, load_splits
from mobilenet.training.masks import Masks, read_names


NAMES = ["ground", *SHAPES]


def read(folder: Path, split: str = "train", storage: Storage | None = None, **kwargs: object) -> tuple[Masks, Images]:
    """Names, and a split's images and masks as a run decodes them."""
    labels = Masks()
    splits = load_splits(str(folder), labels=labels)
    folders = folders_of(str(folder))
    labels.find_names(splits, str(folder), folders=folders)
    processor = MobileNetImageProcessor(size={"height": 48, "width": 60}, do_center_crop=False)
    storage = storage or Storage(folder.parent / "work")
    return labels, decode(splits[split], processor, storage, split, folders=folders, labels=labels, **kwargs)


def expected(count: int, seed: int = 0) -> np.ndarray:
    return np.stack([np.asarray(mask.resize((60, 48), 0)) for _, mask, _ in draw(count, seed)])


def test_folders(tmp_path: Path) -> None:
    """Without splits; with splits of both folders; with both folders in each split."""
    scenes = draw_scenes(tmp_path / "scenes", 3)
    labels, images = read(scenes)
    assert labels.classes == NAMES
    assert images.pixels.shape == (3, 3, 48, 60)
    assert np.array_equal(images.labels, expected(3))

    for layout in ("{part}/{split}", "{split}/{part}"):
        folder = tmp_path / layout[1:5]
        for split, seed in (("training", 0), ("validation", 1)):
            draw_scenes(tmp_path / f"{layout[1:5]}-{split}", 3, seed)
            for part, name in (("images", "images"), ("masks", "annotations")):
                place = folder / layout.format(part=name, split=split)
                place.parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / f"{layout[1:5]}-{split}" / part).rename(place)
        labels, images = read(folder, "validation")
        assert np.array_equal(images.labels, expected(3, 1))
        assert labels.classes == ["0", "1", "2", "3"]  # no file names them


def test_masks_that_outgrow_memory_lie_in_a_file(tmp_path: Path) -> None:
    scenes = draw_scenes(tmp_path / "scenes", 3)
    storage = Storage(tmp_path / "files", shared=True)
    _, images = read(scenes, storage=storage)
    assert isinstance(images.labels, np.memmap)
    found = storage.find("train", dense=True)
    assert np.array_equal(found.labels, expected(3))
    assert np.array_equal(found.pixels, images.pixels)
    batch = found.batch([2, 0])
    assert np.array_equal(batch["labels"].numpy(), expected(3)[[2, 0]])
    (tmp_path / "files" / "train.labels.npy").unlink()
    assert storage.find("train", dense=True) is None


def test_modes_and_ignored_pixels(tmp_path: Path) -> None:
    """Palettes say nothing of classes; 255 stays and is no class."""
    scenes = draw_scenes(tmp_path / "scenes", 2)
    (scenes / "classes.txt").unlink()
    path = scenes / "masks" / "000.png"
    values = np.array(Image.open(path))
    values[:9] = 255
    mask = Image.fromarray(values, "P")
    mask.putpalette([9, 8, 7] * 256)
    mask.save(path)
    labels, images = read(scenes)
    assert labels.classes == ["0", "1", "2", "3"]
    assert np.array_equal(images.labels[0], np.asarray(Image.fromarray(values).resize((60, 48), 0)))


def test_columns_of_masks(tmp_path: Path) -> None:
    files = draw_scenes(tmp_path / "scenes", 3)
    columns = {
        name: [{"bytes": file.read_bytes(), "path": None} for file in sorted((files / part).iterdir())]
        for name, part in (("annotation", "masks"), ("picture", "images"))
    }
    kind = datasets.Image(decode=False)
    table = datasets.Dataset.from_dict({**columns, "id": [1, 2, 3]}, datasets.Features(
        annotation=kind, picture=kind, id=datasets.Value("int64")))  # fmt: skip
    table.to_parquet(tmp_path / "set.parquet")
    labels, images = read(tmp_path / "set.parquet")
    assert labels.classes == ["0", "1", "2", "3"]
    assert np.array_equal(images.labels, expected(3))
    rows = load_splits(str(tmp_path / "set.parquet"), labels=Masks())["train"]
    assert rows.column_names == [IMAGE, LABEL]
    with pytest.raises(ValueError, match="label_column must hold masks, which are images; in train, it does not"):
        load_splits(str(tmp_path / "set.parquet"), image_column="picture", label_column="id", labels=Masks())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_of_few_bits_hold_classes(tmp_path: Path, bits: int) -> None:
    scenes = draw_scenes(tmp_path / "scenes", 1)
    values = np.random.default_rng(0).integers(0, min(1 << bits, 4), (80, 96), np.uint8)
    (scenes / "masks" / "000.png").write_bytes(encode_png(values, bits, palette=True))
    _, images = read(scenes)
    assert np.array_equal(images.labels[0], np.asarray(Image.fromarray(values).resize((60, 48), 0)))


@pytest.mark.parametrize("place", ["outside", "climbing", "url"])
def test_rows_name_masks_of_their_dataset_alone(tmp_path: Path, serve: Callable[[Path], str], place: str) -> None:
    """Neither to find the names of classes nor to train."""
    scenes = draw_scenes(tmp_path / "set", 2)
    Image.new("L", (96, 80), 200).save(tmp_path / "mask.png")
    name = {
        "outside": str(tmp_path / "mask.png"),
        "climbing": str(scenes / ".." / "mask.png"),
        "url": f"{serve(tmp_path)}/mask.png",
    }[place]
    own = {"bytes": None, "path": str(scenes / "masks" / "001.png")}
    kind = datasets.Image(decode=False)

    def rows(*masks: dict) -> datasets.DatasetDict:
        files = [{"bytes": None, "path": str(scenes / "images" / "001.png")}] * len(masks)
        table = datasets.Dataset.from_dict(
            {IMAGE: files, LABEL: list(masks)}, datasets.Features({IMAGE: kind, LABEL: kind})
        )
        return datasets.DatasetDict({"train": table})

    splits, folders, labels = rows({"bytes": None, "path": name}, own), folders_of(str(scenes)), Masks()
    labels.find_names(splits, "a Hub id", folders=folders)
    assert len(labels.classes) <= 4  # no file outside was looked at, which has 201
    processor = MobileNetImageProcessor(size=32, do_center_crop=False)
    given = {"processor": processor, "storage": Storage(tmp_path / "work"), "name": "train", "labels": labels}
    with pytest.raises(
        ValueError, match=f"1 of 2 images .*{re.escape(name)}: lies outside of the dataset; external_im"
    ):
        decode(splits["train"], folders=folders, **given)
    with pytest.raises(ValueError, match=f"none of 1 is: {re.escape(name)}: lies outside of the dataset"):
        labels.find_names(rows({"bytes": None, "path": name}), "a Hub id", folders=folders)
    labels.find_names(splits, "a Hub id")
    assert len(labels.classes) == 201
    assert (decode(splits["train"], **given).labels[0] == 200).all()


def repaint(change: Callable[[Image.Image], Image.Image]) -> Callable[[Path], None]:
    """What changes the first mask."""

    def apply(folder: Path) -> None:
        path = folder / "masks" / "000.png"
        with Image.open(path) as mask:
            mask.load()
        change(mask).save(path)

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (repaint(lambda mask: mask.convert("RGB")), r"masks/000\.png must be of mode P or L, got RGB"),
        (repaint(lambda mask: mask.resize((80, 96))), r"000\.png has 80x96, but its image 96x80"),
        (
            lambda folder: Image.new("L", (96, 80)).save(folder / "masks" / "000.png", "JPEG"),
            r"masks/000\.png must be a PNG file, got JPEG",
        ),
        (
            lambda folder: (folder / "masks" / "000.png").write_bytes(encode_png(np.full((80, 96), 3), 2)),
            r"masks/000\.png must be gray of 8 bits or have a palette, got 2 bits",
        ),
        (
            lambda folder: (folder / "masks" / "000.png").write_bytes(encode_png(np.full((80, 96), 15), 4)),
            r"masks/000\.png must be gray of 8 bits or have a palette, got 4 bits",
        ),
        (repaint(lambda mask: mask.point(lambda v: 7 * v)), r"must have values from 0 to 3, or 255, got \d"),
        (lambda folder: (folder / "masks" / "000.png").write_bytes(b"no"), r"masks/000\.png: not an image"),
        (
            lambda folder: (folder / "masks" / "000.png").unlink(),
            r"must hold a mask for each file .* none for 000\.png",
        ),
        (
            lambda folder: (folder / "images" / "001.png").unlink(),
            "must hold a image for each file .* none for 001.png",
        ),
        (
            lambda folder: (folder / "images").rename(folder / "pictures"),
            "must hold a folder images and a folder masks",
        ),
        (lambda folder: (folder / "classes.txt").write_text("a\na\n"), "must name the classes 0, 1, 2 and so on"),
        (
            lambda folder: (folder / "labels.json").write_text("[]"),
            r"name its classes once, got classes\.txt, labels\.js",
        ),
    ],
)
def test_broken_folders_are_one_error(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    scenes = draw_scenes(tmp_path / "scenes", 3)
    change(scenes)
    with pytest.raises(ValueError, match=message):
        read(scenes)


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("classes.txt", "ground\r\n red circle \n\n", ["ground", "red circle"]),
        ("classes.txt", "\ufeffground\ncircle", ["ground", "circle"]),
        ("labels.json", '["ground", "circle"]', ["ground", "circle"]),
        ("labels.json", '{"1": "circle", "0": "ground"}', ["ground", "circle"]),
        ("labels.json", '{"1": "circle", "2": "ground"}', None),
        ("labels.json", "3", None),
        ("labels.json", "[" * 100_000, None),
        ("classes.txt", "\n", None),
        ("classes.txt", "\n".join(map(str, range(256))), None),
    ],
)
def test_files_of_names(tmp_path: Path, name: str, text: str, names: list[str] | None) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    if names is None:
        with pytest.raises(ValueError, match=f"{name} must (be a file of names|name the classes|name at most 255)"):
            read_names(path)
    else:
        assert read_names(path) == names


def test_files_of_names_of_absurd_size_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "classes.txt").write_text("ground\ncircle\n")
    monkeypatch.setattr("mobilenet.training.masks.MAX_NAMES_SIZE", 10)
    with pytest.raises(ValueError, match=r"classes\.txt must be a file of names: it has 14 bytes, which is over 10"):
        read_names(tmp_path / "classes.txt")


def test_masks_of_one_class_are_refused(tmp_path: Path) -> None:
    scenes = draw_scenes(tmp_path / "scenes", 1)
    Image.new("L", (96, 80), 255).save(scenes / "masks" / "000.png")
    labels, images = read(scenes)
    with pytest.raises(ValueError, match="all their pixels have the value 255"):
        labels.check(images.labels, labels.classes)
    (scenes / "classes.txt").write_text("one")
    labels = read(scenes)[0]
    with pytest.raises(ValueError, match="at least two classes, got one"):
        labels.check_rows(None)
