"""Images with boxes: COCO-format folders, columns of objects, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from shapes import SHAPES, SIZE, draw, draw_coco, write

from mobilenet import MobileNetImageProcessor
from mobilenet.training.boxes import BOXES, CROWD, NO_BOX, _clip
from mobilenet.training.data import IMAGE, LABEL, Images, Storage, decode, folders_of, load_splits


def read(folder: Path, split: str = "train", **kwargs: object) -> Images:
    """A split's images and entries, as a run decodes them."""
    rows = load_splits(str(folder), labels=BOXES)[split]
    processor = MobileNetImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    storage = Storage(folder.parent / "work")
    return decode(rows, processor, storage, split, folders=folders_of(str(folder)), labels=BOXES, **kwargs)


def expected(count: int, seed: int = 0) -> list[list[list[float]]]:
    """Entries of drawn images, by hand."""
    return [
        [[kind, 0, x / SIZE[0], y / SIZE[1], (x + w) / SIZE[0], (y + h) / SIZE[1]] for kind, (x, y, w, h) in objects]
        for _, _, objects in draw(count, seed)
    ]


def assert_entries(labels: np.ndarray, wanted: list[list[list[float]]]) -> None:
    """Every image has these entries, in this order, and no others."""
    assert len(labels) == len(wanted)
    for entries, objects in zip(labels, wanted, strict=True):
        kept = entries[entries[:, 0] >= 0]
        np.testing.assert_allclose(kept, np.reshape(objects, (-1, 6)), atol=1e-6)
        assert (entries[len(objects) :] == NO_BOX).all()


def test_coco_folders(tmp_path: Path) -> None:
    """Category ids leave numbers out; crowds are marked; images without boxes stay."""
    folder = tmp_path / "set"
    draw_coco(folder, 3, "val2017", seed=1)
    content = draw_coco(folder, 4, "train2017")
    content["annotations"][0]["iscrowd"] = 1
    Image.new("RGB", (50, 40)).save(folder / "images" / "train2017" / "empty.png")
    content["images"].append({"id": 3, "file_name": "empty.png"})
    write(folder, content, "train2017")
    splits = load_splits(str(folder), labels=BOXES)
    assert sorted(splits) == ["train", "validation"]
    assert BOXES.names(splits["train"]) == list(SHAPES)
    wanted = [*expected(4), []]
    wanted[0][0][1] = 1
    images = read(folder)
    assert_entries(images.labels, wanted)
    assert images.pixels.shape == (5, 3, 32, 32)
    assert_entries(read(folder, "validation").labels, expected(3, seed=1))

    (folder / "images").rename(folder / "elsewhere")  # images beside the annotations' folder
    (folder / "elsewhere" / "train2017").rename(folder / "train2017")
    (folder / "annotations" / "instances_val2017.json").unlink()
    assert_entries(read(folder).labels, wanted)


def test_roboflow_folders(tmp_path: Path) -> None:
    """Annotations beside the images of each split, with a heading among the categories that no box has."""
    for split, count, seed in (("train", 4, 0), ("valid", 2, 1), ("test", 2, 2)):
        content = draw_coco(tmp_path / split, count, split, seed)
        content["categories"].insert(0, {"id": 0, "name": "shape", "supercategory": "none"})
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / split / "images" / split).rename(tmp_path / "set" / split)
        (tmp_path / "set" / split / "_annotations.coco.json").write_text(json.dumps(content))
    splits = load_splits(str(tmp_path / "set"), labels=BOXES)
    assert sorted(splits) == ["test", "train", "validation"]
    assert BOXES.names(splits["train"]) == list(SHAPES)
    assert_entries(read(tmp_path / "set", "test").labels, expected(2, seed=2))


def parquet(path: Path, objects: Callable[[list], object], kind: object) -> Path:
    """A parquet file of three drawn images, with a column of objects."""
    rows = [*draw(3)]
    file = path / "image.png"
    images = []
    for image, _, _ in rows:
        image.save(file)
        images.append({"bytes": file.read_bytes(), "path": None})
    file.unlink()
    features = datasets.Features(image=datasets.Image(decode=False), objects=kind, id=datasets.Value("int64"))
    columns = {"image": images, "objects": [objects(boxes) for _, _, boxes in rows], "id": [1, 2, 3]}
    datasets.Dataset.from_dict(columns, features).to_parquet(path / "set.parquet")
    return path / "set.parquet"


NAMED = datasets.ClassLabel(names=list(SHAPES))
MANY, TEXT, NUMBER = datasets.List, datasets.Value("string"), datasets.Value("float32")


@pytest.mark.parametrize(
    ("objects", "kind", "names"),
    [
        (
            lambda boxes: {
                "id": [0] * len(boxes),
                "bbox": [box for _, box in boxes],
                "category": [k for k, _ in boxes],
            },
            {"id": MANY(datasets.Value("int64")), "bbox": MANY(MANY(NUMBER, length=4)), "category": MANY(NAMED)},
            list(SHAPES),
        ),
        (
            lambda boxes: [{"bbox": box, "category": kind} for kind, box in boxes],
            [{"bbox": MANY(NUMBER), "category": NAMED}],
            list(SHAPES),
        ),
        (
            lambda boxes: {"bbox": [box for _, box in boxes], "categories": [sorted(SHAPES)[k] for k, _ in boxes]},
            {"bbox": MANY(MANY(NUMBER)), "categories": MANY(TEXT)},
            sorted(SHAPES),
        ),
        (
            lambda boxes: {"bbox": [box for _, box in boxes], "label": [k for k, _ in boxes]},
            {"bbox": MANY(MANY(NUMBER)), "label": MANY(datasets.Value("int64"))},
            ["0", "1", "2"],
        ),
    ],
    ids=["lists", "dictionaries", "names", "numbers"],
)
def test_columns_of_objects(tmp_path: Path, objects: Callable, kind: object, names: list[str]) -> None:
    path = parquet(tmp_path, objects, kind)
    splits = load_splits(str(path), labels=BOXES)
    assert splits["train"].column_names == [IMAGE, LABEL]
    assert BOXES.names(splits["train"]) == names
    assert_entries(read(path).labels, expected(3))


def test_folders_with_metadata(tmp_path: Path) -> None:
    """As `imagefolder` of datasets has them: a line of JSON for each image."""
    lines = []
    for index, (image, _, objects) in enumerate(draw(3)):
        (tmp_path / "set" / "train").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "set" / "train" / f"{index}.png")
        boxes = {"bbox": [box for _, box in objects], "categories": [kind for kind, _ in objects]}
        lines.append(json.dumps({"file_name": f"{index}.png", "objects": boxes}))
    (tmp_path / "set" / "train" / "metadata.jsonl").write_text("\n".join(lines))
    assert_entries(read(tmp_path / "set").labels, expected(3))
    assert BOXES.names(load_splits(str(tmp_path / "set"), labels=BOXES)["train"]) == ["0", "1", "2"]


def test_objects_that_do_not_fit_together(tmp_path: Path) -> None:
    kind = {"bbox": MANY(MANY(NUMBER)), "category": MANY(NAMED), "iscrowd": MANY(datasets.Value("bool"))}
    for objects, message in (
        (lambda boxes: {"bbox": [[1, 2, 3, 4]], "category": [], "iscrowd": []}, "row 0 must have a value of category"),
        (lambda boxes: {"bbox": [[1, 2, 3, 4]], "category": [0], "iscrowd": [0, 1]}, "got 2 for 1"),
        (lambda boxes: {"bbox": [None], "category": [0], "iscrowd": [0]}, "a box must be four numbers, .* got None"),
        (lambda boxes: {"bbox": [[1, 2, 3, None]], "category": [0], "iscrowd": [0]}, "a box must be four numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            read(parquet(tmp_path, objects, kind))


def test_boxes_are_clipped_to_the_image(tmp_path: Path) -> None:
    content = draw_coco(tmp_path / "set", 1)
    content["annotations"] = [{**content["annotations"][0], "bbox": [-10.5, 60, 40, 30], "id": 1}]
    write(tmp_path / "set", content)
    (entry,) = read(tmp_path / "set").labels[0]
    np.testing.assert_allclose(entry[2:], [0, 60 / 80, 29.5 / 96, 1], atol=1e-6)


def broken(part: str, **fields: object) -> Callable[[dict], None]:
    """What changes the first entry of a part of the annotations."""
    return lambda content: content[part][0].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken("annotations", bbox=[5, 5, 0, 9]), r"000\.png: the box \[5, 5, 0, 9\] has no area"),
        (broken("annotations", bbox=[96, 5, 9, 9]), r"000\.png: the box .* lies outside of the image of 96x80"),
        (broken("annotations", bbox=[5, 5, 9]), r"000\.png: a box must be four numbers, .* got \[5\.0, 5\.0, 9\.0\]"),
        (broken("annotations", bbox=[5, 5, float("nan"), 9]), r"000\.png: a box must be four numbers"),
        (broken("annotations", bbox=["5", 5, 9, 9]), r"must give boxes as numbers, got \['5', 5, 9, 9\]"),
        (broken("annotations", bbox=[10**400, 5, 9, 9]), r"must give boxes as numbers, got \[1000"),
        (broken("annotations", bbox=None), "must give each of its annotations a bbox; number 0 has None"),
        (broken("annotations", category_id=8), "category_id 8 of annotation 0 is not there"),
        (broken("annotations", image_id=8), "image_id 8 of annotation 0 is not there"),
        (broken("images", file_name="no.png"), r"no\.png: no such file"),
        (broken("images", file_name="\ud800.png"), r"instances_train\.json must name files in whole characters"),
        (broken("images", file_name="../../../out.png"), "out.png: lies outside of the dataset"),
        (broken("images", file_name="/etc/passwd"), "/etc/passwd: lies outside of the dataset"),
        (broken("images", width=80, height=96), r"000\.png: the image has 96x80 pixels, but its annotations .* 80x96"),
        (broken("images", id=101), "must give each of its images another id, but 101 comes twice"),
        (broken("categories", name="square"), "must give each of its categories another name, but square comes twice"),
        (
            broken("categories", supercategory=["a"]),
            r"must give each of its categories a supercategory; .* has \['a'\]",
        ),
        (
            lambda content: content["annotations"].extend([{**content["annotations"][0], "id": None}] * 4096),
            r"000\.png: an image must have at most 4096 boxes, got \d",
        ),
        (lambda content: content.update(categories={}), "must hold a list of categories, got dict"),
        (lambda content: content.pop("images"), "must hold a list of images, got NoneType"),
        (lambda content: content.update(images=[], annotations=[]), "must hold images, got none"),
        (
            lambda content: content["annotations"].insert(0, 7),
            "must give each of its annotations a image_id; .* has 7",
        ),
    ],
)
def test_broken_annotations_are_one_error(tmp_path: Path, change: Callable[[dict], None], message: str) -> None:
    content = draw_coco(tmp_path / "set", 2)
    change(content)
    write(tmp_path / "set", content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "set")


@pytest.mark.parametrize("width", [True, None, 96.0, "96", 10**400])
def test_widths_that_are_no_integers_say_nothing(tmp_path: Path, width: object) -> None:
    content = draw_coco(tmp_path / "set", 1)
    content["images"][0]["width"] = width
    write(tmp_path / "set", content)
    assert_entries(read(tmp_path / "set").labels, expected(1))


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\xff"])
def test_files_that_are_no_annotations(tmp_path: Path, text: str) -> None:
    draw_coco(tmp_path / "set", 1)
    (tmp_path / "set" / "annotations" / "instances_train.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"instances_train\.json must (be a JSON file|hold a JSON object)"):
        read(tmp_path / "set")


@pytest.mark.parametrize(
    ("category", "message"),
    [
        (1 << 62, "categories must be integers from 0 to 131071, got 4611686018427387904"),
        ([0], "categories must all be names, or all integers, got list"),
        (0.5, "categories must all be names, or all integers, got float"),
    ],
)
def test_categories_that_are_no_classes(category: object, message: str) -> None:
    rows = datasets.Dataset.from_dict({IMAGE: ["a"], LABEL: [{"bbox": [[1, 2, 3, 4]], "category": [category]}]})
    with pytest.raises(ValueError, match=message):
        BOXES.unify(datasets.DatasetDict({"train": rows}))


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"bbox": 5.0, "category": 1}, r"row 0 must have a list of bbox, got 5\.0"),
        ({"bbox": [5.0], "category": [1]}, r"row 0 must have boxes of four numbers, got 5\.0"),
        ({"bbox": [["5"]], "category": [1]}, r"row 0 must have boxes of four numbers, got \['5'\]"),
        ([[{"bbox": [1, 2, 3, 4], "category": 1}]], "categories must all be names, or all integers, got NoneType"),
    ],
)
def test_objects_of_other_shapes(objects: object, message: str) -> None:
    rows = datasets.Dataset.from_dict({IMAGE: ["a"], LABEL: [objects]})
    with pytest.raises(ValueError, match=message):
        BOXES.unify(datasets.DatasetDict({"train": rows}))


def test_annotations_of_absurd_size_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_coco(tmp_path / "set", 1)
    monkeypatch.setattr("mobilenet.training.boxes.MAX_SIZE", 10)
    with pytest.raises(ValueError, match=r"instances_train\.json must be a JSON file: it has .* bytes, .* over 10"):
        load_splits(str(tmp_path / "set"), labels=BOXES)


def test_broken_images_are_listed_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    content = draw_coco(tmp_path / "set", 4)
    content["annotations"][0]["bbox"] = [5, 5, 0, 9]
    write(tmp_path / "set", content)
    (tmp_path / "set" / "images" / "train" / "002.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="2 of 4 images with their boxes of train cannot be read") as error:
        read(tmp_path / "set")
    assert re.search(r"000\.png: the box .* has no area; .*002\.png: not an image", str(error.value))
    wanted = expected(4)
    assert_entries(read(tmp_path / "set", skip_unreadable=True).labels, [wanted[1], wanted[3]])
    assert "000.png" in capsys.readouterr().out


def test_a_box_too_thin_for_single_precision_is_named() -> None:
    with pytest.raises(ValueError, match="lies outside of the image of 640x480 pixels"):
        _clip([639.99999, 10, 50, 50], 640, 480)
    assert _clip([639.9, 10, 50, 50], 640, 480)[2] == 1


def test_objects_may_have_sizes_of_their_own() -> None:
    objects = [{"bbox": [[1, 2, 3, 4]], "category": [0], "size": [[9, 9]]}]
    rows = datasets.Dataset.from_dict({IMAGE: [{"bytes": b"", "path": "a"}], LABEL: objects})
    splits = BOXES.unify(datasets.DatasetDict({"train": rows}))
    assert splits["train"][LABEL][0][CROWD] == [False]


def test_rows_without_any_box_are_refused() -> None:
    objects = [{"bbox": [], "category": []}]
    kind = {"bbox": datasets.List(datasets.List(datasets.Value("float64"))), "category": datasets.List(
        datasets.Value("int64"))}  # fmt: skip
    features = datasets.Features({IMAGE: datasets.Value("string"), LABEL: kind})
    rows = datasets.Dataset.from_dict({IMAGE: ["a"], LABEL: objects}, features)
    with pytest.raises(ValueError, match="images to train or measure on must have boxes, but none has any"):
        BOXES.unify(datasets.DatasetDict({"train": rows}))


def test_folders_without_annotations_and_splits_with_others(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must hold annotations in COCO's format"):
        load_splits(str(tmp_path / "empty"), labels=BOXES)
    draw_coco(tmp_path / "set", 2)
    content = draw_coco(tmp_path / "set", 2, "val")
    content["categories"][0]["name"] = "disk"
    write(tmp_path / "set", content, "val")
    with pytest.raises(ValueError, match="validation lacks circle and has disk that train lacks"):
        load_splits(str(tmp_path / "set"), labels=BOXES)
    write(tmp_path / "set", content, "train2014")
    with pytest.raises(ValueError, match=r"annotations of each split once, got .*instances_train2014\.json"):
        load_splits(str(tmp_path / "set"), labels=BOXES)
    shutil.rmtree(tmp_path / "set")
    content = draw_coco(tmp_path / "set", 2)
    write(tmp_path / "set", {**content, "annotations": []})
    with pytest.raises(ValueError, match="must have boxes, but none has any"):
        BOXES.check_rows(load_splits(str(tmp_path / "set"), labels=BOXES)["train"])
    crowds = [{**annotation, "iscrowd": 1} for annotation in content["annotations"]]
    write(tmp_path / "set", {**content, "annotations": crowds})
    with pytest.raises(ValueError, match="must have boxes, but none has any that is not a crowd's"):
        BOXES.check_measured(load_splits(str(tmp_path / "set"), labels=BOXES)["train"])


def test_columns_without_boxes_are_named(tmp_path: Path) -> None:
    kind = {"points": MANY(MANY(NUMBER)), "category": MANY(NAMED)}
    path = parquet(tmp_path, lambda boxes: {"points": [box for _, box in boxes], "category": [0] * len(boxes)}, kind)
    with pytest.raises(
        ValueError, match="objects must have bbox, as one of bbox, bboxes, boxes, got points, category"
    ):
        load_splits(str(path), labels=BOXES)
    with pytest.raises(ValueError, match="label_column must be one of image, objects, id, got 'boxes'"):
        load_splits(str(path), label_column="boxes", labels=BOXES)
