"""Segmenting images: label maps of the whole image, areas, masks and overlays, and what becomes of broken images."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import coarse_images
from typer.testing import CliRunner, Result

import mobilenet
from mobilenet import MobileNetConfig, MobileNetForSemanticSegmentation, MobileNetImageProcessor
from mobilenet.cli import app
from mobilenet.drawings import Drawings
from mobilenet.segment import draws_to
from mobilenet.segmentation_labels import VOC, palette
from mobilenet.visualize import draw_segments, encode, to_mask


pytestmark = pytest.mark.any_version


needs_links = pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")

LABELS = {0: "background", 1: "[red]sky[/]", 2: "sea\x1b[2J", 3: "sand", 4: "=rock"}


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, ["segment", *map(str, arguments)], input=stdin)


def make_segmenter(folder: Path, labels: dict[int, str] = LABELS, **options: object) -> None:
    """Save a small segmenter whose classes depend on the image."""
    torch.manual_seed(0)
    config = MobileNetConfig(
        **{
            "architecture": "mobilenet_v2",
            "width_multiplier": 0.1,
            "segmentation_head": "deeplab_v3_light",
            "output_stride": 16,
            "id2label": labels,
            **options,
        }
    )
    model = MobileNetForSemanticSegmentation(config).eval()
    classifier = model.segmentation_head.classifier
    with torch.no_grad():
        classifier.weight.normal_()
        logits = model(torch.randn(8, 3, 4, 4).clamp(-1, 1).repeat_interleave(24, 2).repeat_interleave(24, 3)).logits
        classifier.weight.div_(logits.std())
        classifier.bias.copy_(-logits.mean((0, 2, 3)) / logits.std())
    model.save_pretrained(folder)
    MobileNetImageProcessor(
        size={"height": 96, "width": 96}, do_center_crop=False, align_corners=config.segmentation.align_corners
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmenter")
    make_segmenter(folder)
    return folder


SIZES = {"a.jpg": (120, 80), "b.png": (33, 150), "sub/a.jpg": (1, 1), "sub/c.webp": (64, 64)}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of coarse colors."""
    return coarse_images(tmp_path_factory.mktemp("scenes"), SIZES)


def expected_map(folder: Path, image: Path) -> np.ndarray:
    """What the pipeline's parts say."""
    model = MobileNetForSemanticSegmentation.from_pretrained(folder).eval()
    processor = MobileNetImageProcessor.from_pretrained(folder)
    with Image.open(image) as upright, torch.no_grad():
        size = upright.size[::-1]
        outputs = model(**processor(images=upright, return_tensors="pt"))
    (found,) = processor.post_process_semantic_segmentation(outputs, [size])
    return found.numpy()


def share_of_same(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return (a == b).mean()


def test_maps_are_the_networks(segmenter, scenes):
    results = list(mobilenet.segment_images(scenes, segmenter, batch_size=3))
    assert [os.path.relpath(result.name, scenes) for result in results] == list(SIZES)
    assert len({p.index for result in results for p in result.predictions}) > 2  # or all would be one class
    for result in results:
        expected = expected_map(segmenter, result.name)
        assert result.size == expected.shape[::-1] == SIZES[os.path.relpath(result.name, scenes)]
        assert result.label_map.dtype == np.uint8
        assert share_of_same(result.label_map, expected) >= 0.999  # folded, and in a batch
        counts = np.bincount(result.label_map.reshape(-1), minlength=5)
        found = {p.index: p.pixels for p in result.predictions}
        assert found == {index: count for index, count in enumerate(counts) if count}
        assert [p.pixels for p in result.predictions] == sorted(found.values(), reverse=True)
        assert sum(p.area for p in result.predictions) == pytest.approx(1)
        assert all(p.label == LABELS[p.index] for p in result.predictions)


def test_layouts_say_the_same(segmenter, scenes):
    expected = {result.name: result for result in mobilenet.segment_images(scenes, segmenter)}
    result = run(scenes, "--model", segmenter, "--json")
    assert (result.exit_code, result.stderr) == (0, "Engine: torch\n")
    for line in map(json.loads, result.stdout.splitlines()):
        theirs = expected[line["file"]]
        assert (line["width"], line["height"]) == theirs.size
        assert [(p["index"], p["label"], p["area"], p["pixels"]) for p in line["predictions"]] == [
            (p.index, p.label, round(p.area, 6), p.pixels) for p in theirs.predictions
        ]
    rows = list(csv.DictReader(io.StringIO(run(scenes, "--model", segmenter, "--csv").stdout)))
    assert list(rows[0]) == ["file", "rank", "index", "label", "area", "pixels"]
    assert len(rows) == sum(len(result.predictions) for result in expected.values())
    assert {row["label"] for row in rows} <= {"background", "[red]sky[/]", "sea�[2J", "sand", "'=rock"}
    name, first, *_ = run(scenes / "a.jpg", "--model", segmenter).stdout.splitlines()
    best = expected[name].predictions[0]
    assert first.split()[:3] == ["1", f"{100 * best.area:.1f}", "%"]


def test_masks_and_overlays(segmenter, scenes, tmp_path):
    out = tmp_path / "out"
    arguments = (scenes, "--model", segmenter, "--json", "--draw", out)
    lines = [json.loads(line) for line in run(*arguments).stdout.splitlines()]
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert found == [
        *("masks/a.png", "masks/b.png", "masks/sub/a.png", "masks/sub/c.png"),
        *("overlays/a.jpg", "overlays/b.png", "overlays/sub/a.jpg", "overlays/sub/c.png"),
    ]
    assert [path for line in lines for path in line["drawn"]] == [
        str(out / path) for pair in zip(found[:4], found[4:], strict=True) for path in pair
    ]
    for result, line in zip(mobilenet.segment_images(scenes, segmenter), lines, strict=True):
        with Image.open(line["drawn"][0]) as mask, Image.open(line["drawn"][1]) as overlay:
            scale = -(-480 // max(result.size))  # small ones are enlarged, so that labels are legible
            assert (mask.mode, mask.size) == ("P", result.size)
            assert overlay.size == tuple(scale * side for side in result.size)
            assert mask.getpalette()[: 3 * 256] == palette()
            np.testing.assert_array_equal(np.asarray(mask), result.label_map)
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.count("exists; --overwrite replaces it") == 4
    assert run(*arguments, "--overwrite").exit_code == 0
    assert not list(out.glob(".*"))


def test_many_classes_have_masks_of_16_bits(tmp_path, scenes):
    make_segmenter(tmp_path / "model", {index: str(index) for index in range(300)})
    (result,) = mobilenet.segment_images(scenes / "b.png", tmp_path / "model")
    assert max(p.index for p in result.predictions) > 255
    assert share_of_same(result.label_map, expected_map(tmp_path / "model", scenes / "b.png")) >= 0.999
    assert run(scenes / "b.png", "--model", tmp_path / "model", "--draw", tmp_path / "out").exit_code == 0
    with Image.open(tmp_path / "out/masks/b.png") as mask:
        np.testing.assert_array_equal(np.asarray(mask), result.label_map)


def test_a_network_of_any_size_and_orientation(tmp_path, scenes):
    """Images that keep their shape, and one that lies on its side as its EXIF data say."""
    make_segmenter(tmp_path, segmentation_head="lraspp", architecture="mobilenet_v3_small", width_multiplier=0.35)
    MobileNetImageProcessor(size=64, do_center_crop=False).save_pretrained(tmp_path)
    with Image.open(scenes / "a.jpg") as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
        image.rotate(-90, expand=True).save(tmp_path / "upright.png")
    turned, upright = mobilenet.segment_images([tmp_path / "turned.jpg", tmp_path / "upright.png"], tmp_path)
    assert turned.size == upright.size == (80, 120)
    assert share_of_same(turned.label_map, upright.label_map) > 0.9  # JPEG blurs the colors
    assert share_of_same(upright.label_map, expected_map(tmp_path, tmp_path / "upright.png")) >= 0.999


def test_a_broken_image_is_reported_and_the_rest_goes_on(segmenter, scenes, tmp_path):
    (tmp_path / "broken.png").write_bytes((scenes / "b.png").read_bytes()[:90])
    result = run(
        *(scenes / "b.png", tmp_path / "broken.png", "none.jpg", scenes / "a.jpg", "--model", segmenter),
        *("--json", "--draw", tmp_path / "out"),
    )
    assert result.exit_code == 1
    assert ["error" in json.loads(line) for line in result.stdout.splitlines()] == [False, True, True, False]
    assert len(result.stderr.splitlines()) == 1 + 2
    assert "none.jpg: no such file" in result.stderr


def test_an_image_from_stdin(segmenter, scenes, tmp_path):
    result = run(
        *("-", "--model", segmenter, "--json", "--draw", tmp_path / "out"), stdin=(scenes / "b.png").read_bytes()
    )
    assert result.exit_code == 0
    assert json.loads(result.stdout)["drawn"] == [
        str(tmp_path / f"out/{kind}/stdin.png") for kind in ("masks", "overlays")
    ]


def test_networks_of_another_task_are_one_error(segmenter, scenes, tmp_path):
    model = mobilenet.MobileNetForImageClassification(MobileNetConfig(width_multiplier=0.1, num_labels=3))
    model.save_pretrained(tmp_path)
    MobileNetImageProcessor().save_pretrained(tmp_path)
    expected = "it must be a segmenter, got a classifier: `mobilenet classify` takes it."
    assert run(scenes, "--model", tmp_path).stderr == f"Error: {tmp_path} cannot be loaded: {expected}\n"
    result = CliRunner().invoke(app, ["classify", str(scenes), "--model", str(segmenter)])
    assert result.exit_code == 1
    assert result.stderr.endswith("it must be a classifier, got a segmenter: `mobilenet segment` takes it.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "m"), "name images"),
        (("x.jpg",), "name a folder or a Hub id of a segmenter"),
        (("x.jpg", "--model", "m", "--json", "--csv"), "--json and --csv exclude each other"),
    ],
)
def test_usage_errors(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


# where images are drawn to


def drawn_to(names: list[str], folder: Path, overwrite: bool = False) -> list[tuple[str, ...] | str]:
    drawings = Drawings(folder, names, lambda path, suffix: [path + suffix], overwrite)
    return [image.error or image.targets[0] for image in drawings.find()]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tree"
    for name in ("street.jpg", "holiday/a.jpg", "holiday/a.png", "holiday/a.gif", "holiday/deep/a.JPEG", "b/a.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["street.jpg"], ["street.jpg"]),
        (["street.jpg", "street.jpg"], ["street.jpg", "street-2.jpg"]),
        (["holiday"], ["a.png", "a.jpg", "a-2.png", "deep/a.jpg"]),  # a.gif becomes a PNG file
        (
            ["street.jpg", "holiday/"],
            ["street.jpg", *(f"holiday/{n}" for n in ("a.png", "a.jpg", "a-2.png", "deep/a.jpg"))],
        ),
        (["holiday/deep", "b"], ["holiday/deep/a.jpg", "b/a.jpg"]),
        (["./holiday/../b/a.jpg"], ["a.jpg"]),
        (["*/a.jpg"], ["b/a.jpg", "holiday/a.jpg"]),
        (["https://host.org/x/../y%20z/photo.jpeg?size=1", "b"], ["host.org/x/y_z/photo.jpg", "a.jpg"]),
        (["https://host.org"], ["host.png"]),
    ],
)
def test_drawings_are_named_like_their_sources(tree, names, expected):
    assert drawn_to(names, tree / "out") == expected


def test_absolute_names_are_the_same(tree):
    assert drawn_to([str(tree / "street.jpg"), "holiday/deep"], tree / "out") == ["street.jpg", "holiday/deep/a.jpg"]


def test_what_was_drawn_is_not_found_again(tree):
    names = drawn_to(["."], tree / "out")
    for name in names:
        (tree / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tree / "out" / name)
    assert drawn_to(["."], tree / "out", overwrite=True) == names
    assert [name for name in drawn_to(["."], tree / "out") if "exists; --overwrite replaces it" not in name] == []


@pytest.mark.parametrize(
    ("names", "out"), [(["street.jpg"], "."), (["holiday"], "holiday"), (["holiday/deep"], "holiday")]
)
def test_nothing_is_drawn_over_its_source(tree, names, out):
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"^draw must be a folder that holds no images, got "):
            drawn_to(names, Path(out), overwrite)


@needs_links
def test_nothing_is_drawn_through_a_link(tree):
    """Neither over its source nor elsewhere."""
    (tree / "out").mkdir()
    (tree / "out/holiday").symlink_to(tree / "holiday")
    os.link(tree / "street.jpg", tree / "out/street.jpg")
    street, *others = drawn_to(["street.jpg", "holiday"], Path("out"), overwrite=True)
    assert street == "out/street.jpg is the image itself"
    assert len(others) == 4
    assert {error.split(" leads out of ")[1] for error in others} == {"out"}


@needs_links
def test_a_folder_is_the_same_in_other_letters(tree, monkeypatch):
    """Where a file system ignores case, a path that is resolved keeps the letters that it had."""
    monkeypatch.setattr(os.path, "realpath", os.path.abspath)
    if not (tree / "HOLIDAY").exists():
        (tree / "HOLIDAY").symlink_to("holiday")
    with pytest.raises(ValueError, match=r"^draw must be a folder that holds no images, got HOLIDAY"):
        drawn_to(["holiday/deep"], Path("HOLIDAY"))


def test_names_that_files_cannot_have_are_errors_of_their_images(tree):
    """Long ones are cut, and those that Windows has for devices get a character more."""
    cats = 76 * "\u732b"
    names = [f"{cats}{cats}.png", f"{cats}{cats}.gif", "con.png", "a./b.png", "/".join("a" * 2000)]
    urls = [f"https://host.org/{name}" for name in names]
    (tree / ("x" * 251 + ".jpg")).touch()
    broken, null, *whole = drawn_to(["http://[::1/a.png", "a\0b", *urls, "x" * 251 + ".jpg"], tree / "out")
    assert broken.startswith("no file can have its name: ")
    assert null.startswith("no file can have its name: ")
    first, second, *whole, deep, long = whole
    assert (first, second) == (f"host.org/{cats}.png", f"host.org/{cats}-2.png")
    assert whole == ["host.org/_con.png", "host.org/a/b.png"]
    assert deep == "/".join("a" * 30) + ".png"
    assert long == "x" * 230 + ".jpg"


def test_images_of_one_name_are_numbered_in_one_go(tree):
    names = []

    def targets(path: str, suffix: str) -> list[str]:
        names.append(path + suffix)
        return names[-1:]

    urls = [f"https://host.org/a.png?id={number}" for number in range(100)]
    list(Drawings(tree / "out", urls, targets, False).find())
    assert names[:2] == ["host.org/a.png", "host.org/a-2.png"]
    assert len(names) == len(set(names)) == 100


def test_what_is_wrong_with_one_file_ends_nothing_else(tree, monkeypatch):
    """A full disk does."""
    drawings = Drawings(tree / "out", ["b", "street.jpg"], lambda path, suffix: [path + suffix], True)
    with drawings:
        first, second = drawings.find()
        (tree / "out/b/a.jpg").mkdir(parents=True)
        with pytest.raises(ValueError, match=r"a\.jpg is no regular file"):
            drawings.draw(first, (8, 8), lambda upright: upright)
        for code, kind in ((errno.EXDEV, ValueError), (errno.ENAMETOOLONG, ValueError), (errno.ENOSPC, OSError)):

            def fail(*_: object, code: int = code) -> None:
                raise OSError(code, os.strerror(code))

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", fail)
                with pytest.raises(kind, match=os.strerror(code)):
                    drawings.draw(second, (8, 8), lambda upright: upright)
        assert drawings.draw(second, (8, 8), lambda upright: upright) == (str(tree / "out/street.jpg"),)
    assert {path.name for path in (tree / "out").iterdir()} == {"b", "street.jpg"}
    with pytest.raises(ValueError, match="65501x1 is over 65500 pixels a side, which JPEG holds"):
        encode(Image.new("L", (65_501, 1)), ".jpg")


def test_what_a_killed_run_has_left_is_removed(tree):
    """Unless somebody has put something into it."""
    for name in (".mobilenet-01234567/0123456789abcdef", ".mobilenet-89abcdef/precious"):
        (tree / "out" / name).parent.mkdir(parents=True)
        (tree / "out" / name).touch()
    with Drawings(tree / "out", ["b"], lambda path, suffix: [path + suffix], False):
        left = {path.name for path in (tree / "out").iterdir()}
        assert len(left) == 2
        assert ".mobilenet-89abcdef" in left
    assert [path.name for path in (tree / "out").rglob("*")] == [".mobilenet-89abcdef", "precious"]


def test_borders_are_thin_on_narrow_images():
    label_map = np.zeros((2, 20_000), np.uint8)
    label_map[:, 10_000:] = 1
    drawn = np.asarray(draw_segments(Image.new("RGB", (20_000, 2)), label_map, []))
    assert (drawn == 255).all(-1).sum(1).tolist() == [1, 1]


def test_masks_have_no_more_classes_than_16_bits_hold():
    assert np.asarray(to_mask(np.int32([[65_535]]))) == 65_535
    with pytest.raises(ValueError, match="a mask must have classes from 0 to 65535, got 65536"):
        to_mask(np.int32([[65_536]]))


def test_a_file_is_no_folder_to_draw_into(segmenter, tree):
    result = run("holiday", "--model", segmenter, "--draw", "street.jpg")
    assert result.exit_code == 1
    assert result.stderr == "Error: --draw must be a folder, got street.jpg.\n"


def test_files_that_stand_in_the_way_are_kept(segmenter, tree):
    (tree / "out").mkdir()
    (tree / "out/masks").write_text("precious")
    result = run("b", "--model", segmenter, "--draw", "out")
    assert result.exit_code == 1
    assert "a file stands where a folder must be" in result.stderr
    assert (tree / "out/masks").read_text() == "precious"
    assert [path.name for path in (tree / "out").iterdir()] == ["masks"]


def test_masks_go_with_overlays():
    assert draws_to("a/b", ".jpg") == [os.path.join("masks", "a/b.png"), os.path.join("overlays", "a/b.jpg")]
    assert VOC[0] == "background"
