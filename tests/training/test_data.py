"""Datasets: forms, splits, labels, order, memory, and what is refused."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from colors import options, paint
from PIL import Image

from mobilenet import MobileNetImageProcessor
from mobilenet.training.data import (
    IMAGE,
    LABEL,
    Order,
    Reader,
    Storage,
    check_classes,
    decode,
    folders_of,
    hold_out,
    load_splits,
)
from mobilenet.training.run import run


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    epoch = 0
    order = Order(10, 8, 7, lambda: epoch)
    first = list(order)
    assert first == list(order)
    assert len(first) == len(set(first)) == len(order) == 8
    epoch = 1
    assert list(order) != first
    assert list(Order(10, 8, 8, lambda: 0)) != first


def test_images_that_outgrow_memory_lie_in_a_file(colors: Path, tmp_path: Path) -> None:
    """The file serves other processes and a resumed run, and an incomplete one does not."""
    processor = MobileNetImageProcessor(size=16, crop_size=16)
    rows = load_splits(str(colors))["test"]
    storage = Storage(tmp_path / "work", shared=True)
    assert storage.find("test") is None
    images = decode(rows, processor, storage, "test")
    assert isinstance(images.pixels, np.memmap)
    in_memory = decode(rows, processor, Storage(tmp_path), "test")
    found = storage.find("test")
    for one in (images, found):
        assert np.array_equal(one.pixels, in_memory.pixels)
        assert np.array_equal(one.labels, in_memory.labels)
    assert torch.equal(found.batch([3, 1])["pixels"], torch.from_numpy(in_memory.pixels[[3, 1]]))
    (tmp_path / "work" / "test.labels.npy").unlink()
    assert storage.find("test") is None


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (32, 32)])
def test_what_is_padded_is_measured_as_the_processor_pads(size: tuple[int, int]) -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor = MobileNetImageProcessor(
        size={"longest_edge": 32}, do_center_crop=False, pad_size=32, image_mean=mean, image_std=std
    )
    image = Image.new("RGB", size, (200, 10, 90))
    pixels = Reader(processor).pixels(image)
    seen = (pixels / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(seen, processor(image, return_tensors="np")["pixel_values"][0], atol=0.5 / 255 / 0.224)


def test_hold_out_takes_the_same_share_of_every_class() -> None:
    rows = datasets.Dataset.from_dict(
        {IMAGE: list(range(100)), LABEL: [0] * 60 + [1] * 30 + [2] * 10},
        datasets.Features({IMAGE: datasets.Value("int64"), LABEL: datasets.ClassLabel(names=["a", "b", "c"])}),
    )
    kept, held = hold_out(rows, 0.2, seed=0)
    assert np.bincount(held[LABEL][:]).tolist() == [12, 6, 2]
    assert sorted(kept[IMAGE][:] + held[IMAGE][:]) == list(range(100))
    assert held[IMAGE][:] == hold_out(rows, 0.2, seed=0)[1][IMAGE][:]


def parquet(path: Path, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return path


def png(color: tuple[int, int, int] = (9, 9, 9)) -> dict:
    import io

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def images(*images: dict) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"img": list(images)}).cast_column("img", datasets.Image(decode=False))


def test_datasets_of_other_forms(tmp_path: Path) -> None:
    """A parquet file; a folder of them by split; names or integers as labels; columns of other names."""
    table = images(png(), png(), png()).add_column("fine_label", ["b", "a", "b"]).add_column("id", [1, 2, 3])
    table.to_parquet(tmp_path / "one.parquet")
    splits = load_splits(str(tmp_path / "one.parquet"))
    assert splits["train"].column_names == [IMAGE, LABEL]
    assert splits["train"].features[LABEL].names == ["a", "b"]
    assert splits["train"][LABEL][:] == [1, 0, 1]

    numbered = images(png(), png()).add_column("label", [0, 2])
    (tmp_path / "many").mkdir()
    numbered.to_parquet(tmp_path / "many" / "train.parquet")
    numbered.to_parquet(tmp_path / "many" / "test.parquet")
    splits = load_splits(str(tmp_path / "many"))
    assert sorted(splits) == ["test", "train"]
    assert splits["train"].features[LABEL].names == ["0", "1", "2"]
    with pytest.raises(ValueError, match="there are none of 1"):
        check_classes(splits["train"][LABEL][:], ["0", "1", "2"])

    with pytest.raises(ValueError, match="label_column must be one of img, fine_label, id, got 'nothing'"):
        load_splits(str(tmp_path / "one.parquet"), label_column="nothing")
    images(png(), png()).add_column("label", [[0], [0, 1]]).to_parquet(tmp_path / "several.parquet")
    with pytest.raises(ValueError, match="every image must have one label, a name or an integer, got List"):
        load_splits(str(tmp_path / "several.parquet"))
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "one.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut\.parquet' cannot be read: "):
        load_splits(str(tmp_path / "cut.parquet"))
    images(png()).add_column("id", [1]).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="label_column must name one of the columns img, id"):
        load_splits(str(tmp_path / "none.parquet"))


def test_one_class_is_refused(tmp_path: Path) -> None:
    paint(tmp_path / "colors", 3)
    for name in ("green", "red"):
        for file in (tmp_path / "colors" / name).iterdir():
            file.unlink()
        (tmp_path / "colors" / name).rmdir()
    with pytest.raises(ValueError, match="at least two classes, got blue"):
        run(options(tmp_path / "colors", tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "colors"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder of images for each class"):
        run(options(tmp_path / "empty", tmp_path / "out"))


def test_folders_that_are_neither_splits_nor_classes(colors: Path, tmp_path: Path) -> None:
    """What lies beside the splits is never trained on, and a class may have a split's name."""
    counts = {name: len(split) for name, split in load_splits(str(colors)).items()}
    (colors / "__MACOSX").mkdir()
    (colors / "__MACOSX" / "red.png").write_bytes(png()["bytes"])
    assert {name: len(split) for name, split in load_splits(str(colors)).items()} == counts

    (colors / "extras").mkdir()
    with pytest.raises(ValueError, match="either splits or classes, but beside test, train it has extras"):
        load_splits(str(colors))
    (colors / "extras").rename(colors / "training")
    with pytest.raises(ValueError, match="must hold each split once, got test, train, training"):
        load_splits(str(colors))
    (colors / "training").rmdir()
    (colors / "train" / "stray.png").write_bytes(png()["bytes"])
    with pytest.raises(ValueError, match=r"the folders of their classes alone, got stray\.png"):
        load_splits(str(colors))

    (colors / "train" / "stray.png").unlink()
    (colors / "train" / "red" / "dark").mkdir()
    with pytest.raises(ValueError, match="the folders of their classes alone, got red/dark"):
        load_splits(str(colors))
    (colors / "train" / "red" / "dark").rmdir()
    (colors / "train" / "gray").mkdir()
    (colors / "train" / "gray" / "photo.heic").touch()
    (colors / "train" / "link").symlink_to(colors / "train" / "red")
    with pytest.raises(ValueError, match=r"in the folder of each class, got none in gray, link \(links to folders"):
        load_splits(str(colors))
    (colors / "train" / "link").unlink()
    shutil.rmtree(colors / "train" / "gray")
    (colors / "overview.png").write_bytes(png()["bytes"])
    (colors / "train" / "about.pdf").touch()
    assert {name: len(split) for name, split in load_splits(str(colors)).items()} == counts
    (colors / "train").rename(colors / "Val")
    assert sorted(load_splits(str(colors))) == ["test", "validation"]

    vehicles = tmp_path / "vehicles [2024]"
    for name in ("bus", "train"):
        (vehicles / name).mkdir(parents=True)
        (vehicles / name / "1.png").write_bytes(png()["bytes"])
    splits = load_splits(str(vehicles))
    assert list(splits) == ["train"]
    assert splits["train"].features[LABEL].names == ["bus", "train"]


def test_unreadable_images_are_listed_or_left_out(colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (colors / "train" / "red" / "000.png").write_bytes(b"no image")
    whole = (colors / "train" / "blue" / "001.png").read_bytes()
    (colors / "train" / "blue" / "001.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="2 of 66 images of train cannot be read") as error:
        run(options(colors, tmp_path / "out", validation=0.0))
    assert "red/000.png" in str(error.value)
    assert "blue/001.png" in str(error.value)
    assert not (tmp_path / "out.training").exists()
    assert run(options(colors, tmp_path / "out", validation=0.0, epochs=1, skip_unreadable=True))
    assert "red/000.png" in capsys.readouterr().out
    for file in (colors / "train" / "red").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match="every class needs images to train on; there are none of red"):
        run(options(colors, tmp_path / "again", validation=0.0, skip_unreadable=True))


def test_images_with_values_that_are_no_colors_are_named(colors: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), -5, np.int32)).save(colors / "train" / "red" / "000.png", "TIFF")
    splits = load_splits(str(colors))
    processor = MobileNetImageProcessor(size=16, crop_size=16)
    with pytest.raises(ValueError, match=r"1 of 66 images .*red/000\.png: an image of mode I must have values from 0"):
        decode(splits["train"], processor, Storage(tmp_path), "train")
    assert len(decode(splits["train"], processor, Storage(tmp_path), "train", skip_unreadable=True)) == 65


@pytest.mark.parametrize("place", ["inside", "outside", "climbing", "relative", "url"])
def test_rows_name_files_of_their_dataset_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[[Path], str], place: str
) -> None:
    (tmp_path / "set").mkdir()
    for folder in (tmp_path, tmp_path / "set"):
        (folder / "image.png").write_bytes(png()["bytes"])
    monkeypatch.chdir(tmp_path)
    name = {
        "inside": str(tmp_path / "set" / "image.png"),
        "outside": str(tmp_path / "image.png"),
        "climbing": str(tmp_path / "set" / ".." / "image.png"),
        "relative": "image.png",
        "url": f"{serve(tmp_path)}/image.png",
    }[place]
    path = tmp_path / "set" / "rows.parquet"
    table = images(png(), {"bytes": None, "path": name}).add_column("label", ["a", "b"]).data.table
    pyarrow.parquet.write_table(table, path)  # to_parquet would read the file itself
    rows = load_splits(str(path))["train"]
    processor = MobileNetImageProcessor(size=16, crop_size=16)
    if place == "inside":
        assert len(decode(rows, processor, Storage(tmp_path), "train", folders=folders_of(str(path)))) == 2
    else:
        with pytest.raises(
            ValueError, match=f"{re.escape(name)}: lies outside of the dataset; external_images allows"
        ):
            run(options(path, tmp_path / "out", validation=0.0))
    assert len(decode(rows, processor, Storage(tmp_path), "train")) == 2


def test_one_column_is_not_both(tmp_path: Path) -> None:
    path = parquet(tmp_path / "set.parquet", image=[png(), png()], label=["a", "b"])
    with pytest.raises(ValueError, match="image_column must be another column than the labels', got 'label' for both"):
        load_splits(str(path), image_column="label")


@pytest.mark.parametrize("name", ["./flowers", "/flowers", "a/b/flowers"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"a .parquet file or a Hub id, got '{name}'"):
        load_splits(name)


def test_splits_with_other_labels_are_refused(colors: Path, tmp_path: Path) -> None:
    (colors / "test" / "red").rename(colors / "test" / "scarlet")
    with pytest.raises(ValueError, match="none of scarlet"):
        run(options(colors, tmp_path / "out"))


def test_too_few_images_for_a_validation_split(tmp_path: Path) -> None:
    paint(tmp_path / "colors", 3)
    with pytest.raises(ValueError, match=r"0\.1 of 9 images is too few for 3 classes"):
        run(options(tmp_path / "colors", tmp_path / "out"))
    for file in list((tmp_path / "colors" / "green").iterdir())[1:]:
        file.unlink()
    with pytest.raises(ValueError, match=r"at least 2 images of each class, got green \(1\)"):
        run(options(tmp_path / "colors", tmp_path / "out"))


@pytest.mark.parametrize(
    "config",
    [
        "data_files: OUTSIDE",
        "data_files: [train.parquet, OUTSIDE]",
        "data_files: [{split: train, path: [OUTSIDE]}]",
        "data_files: ../outside.parquet",
        "data_files: 'file:OUTSIDE'",
        "data_files: http://127.0.0.1:9/outside.parquet",
        "data_files: 'zip://*.parquet::outside.zip'",
        "data_dir: data/../..",
        "data_files: [{split: train, path: [5]}]",
    ],
)
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_the_card_of_a_folder_names_its_own_files_alone(tmp_path: Path, config: str, card: str) -> None:
    outside = parquet(tmp_path / "outside.parquet", label=["a", "b"])
    parquet(tmp_path / "set" / "train.parquet", label=["c", "d"])
    text = f"configs:\n- config_name: default\n  {config.replace('OUTSIDE', str(outside))}\n"
    (tmp_path / "set" / card).write_text(f"---\n{text}---\n" if card == "README.md" else text)
    with pytest.raises(ValueError, match=f"{re.escape(card)} must name files of its own folder, got "):
        load_splits(str(tmp_path / "set"))


def test_the_card_of_a_folder_says_which_files_are_a_split(tmp_path: Path) -> None:
    for name, colors in (("a", 1), ("b", 2)):
        table = images(*[png()] * colors).add_column("label", [0] * colors)
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(tmp_path / "set" / "data" / f"{name}.parquet")
    text = "---\nconfigs:\n- config_name: one\n  data_files: [{split: train, path: data/b*}]\n---\n"
    (tmp_path / "set" / "README.md").write_text(text)
    splits = load_splits(str(tmp_path / "set"), "one")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 2}
    (tmp_path / "set" / "README.md").write_text("---\n[[\n---\n")
    with pytest.raises(ValueError, match=r"README\.md must be the card of a dataset: "):
        load_splits(str(tmp_path / "set"))


def test_labels_without_end_are_refused(tmp_path: Path) -> None:
    images(png(), png()).add_column("label", [0, 1 << 62]).to_parquet(tmp_path / "set.parquet")
    with pytest.raises(ValueError, match="labels must be integers from 0 to 131071, got 4611686018427387904"):
        load_splits(str(tmp_path / "set.parquet"))


def test_names_of_files_cannot_command_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = images(png(), {"bytes": b"no", "path": "\x1b]0;x\x07.png"}).rename_column("img", IMAGE)
    rows = rows.add_column(LABEL, [0, 1])
    decode(rows, MobileNetImageProcessor(size=16, crop_size=16), Storage(tmp_path), "train", skip_unreadable=True)
    assert "left out \ufffd]0;x\ufffd.png: not an image" in capsys.readouterr().out
