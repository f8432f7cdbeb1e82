"""Detecting objects: boxes in pixels of the whole image, how they are printed and drawn, and broken images."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from mobilenet.preprocessing_mobilenet import FITS
from PIL import Image
from rich.console import Console
from scenes import coarse_images
from test_classify import watch
from typer.testing import CliRunner, Result

import mobilenet
from mobilenet import (
    MobileNetConfig,
    MobileNetForObjectDetection,
    MobileNetForSemanticSegmentation,
    MobileNetImageProcessor,
)
from mobilenet.cli import app
from mobilenet.coco import categories_of
from mobilenet.find_images import FoundImage
from mobilenet.inference import read_with_size
from mobilenet.loading import load
from mobilenet.output import DETECTED, Detection, DetectionResult, Layout, writer
from mobilenet.tasks import DETECTION
from mobilenet.visualize import _Canvas, draw_boxes, label_color


ROOT = Path(__file__).parents[1]
LABELS = {0: "kite", 1: "[red]dog[/]", 2: "cat\x1b[2J", 3: "=tie"}
THRESHOLD = 0.8

needs_posix = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, ["detect", *map(str, arguments)], input=stdin)


def make_detector(folder: Path, detector: str = "ssd_mobilenet_v1", **options: object) -> None:
    """Save a small detector whose scores depend on the image, and spread from 0 to 1."""
    torch.manual_seed(0)
    config = MobileNetConfig.from_preset(detector, **{"width_multiplier": 0.1, "num_labels": 4, **options})
    config.id2label, config.label2id = LABELS, {label: index for index, label in LABELS.items()}
    model = MobileNetForObjectDetection(config).eval()
    with torch.no_grad():
        for predictor in model.class_predictors:
            predictor.conv.weight.normal_()
        pixels = torch.randn(4, 3, 4, 4).clamp(-1, 1).repeat_interleave(32, 2).repeat_interleave(32, 3)
        logits = model(pixels).logits
        for predictor in model.class_predictors:
            predictor.conv.weight.mul_(4 / logits.std())
            predictor.conv.bias.fill_(-2)
    model.save_pretrained(folder)
    MobileNetImageProcessor.from_recipe("ssd", 128, max_detections=20).save_pretrained(folder)


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    make_detector(folder)
    return folder


SIZES = {"a.jpg": (120, 80), "b.png": (33, 150), "sub/000000000139.jpg": (1, 1), "sub/c.webp": (640, 64)}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of coarse colors."""
    return coarse_images(tmp_path_factory.mktemp("scenes"), SIZES)


def expected_objects(folder: Path, image: Path, threshold: float = THRESHOLD) -> list[tuple]:
    """What the model and the image processor say."""
    model = MobileNetForObjectDetection.from_pretrained(folder).eval()
    processor = MobileNetImageProcessor.from_pretrained(folder)
    with Image.open(image) as upright, torch.no_grad():
        outputs = model(**processor(images=upright, return_tensors="pt"))
        sizes = torch.tensor([upright.size[::-1]])
        (found,) = processor.post_process_object_detection(outputs, threshold, sizes)
        width, height = upright.size
    limits = torch.tensor([width, height, width, height])
    boxes = torch.minimum(found["boxes"].clamp(min=0), limits)
    return list(zip(found["labels"].tolist(), found["scores"].tolist(), boxes.tolist(), strict=True))


def assert_same(predictions: list[Detection], expected: list[tuple], tolerance: float = 1e-4) -> None:
    assert [p.index for p in predictions] == [index for index, *_ in expected]
    for p, (_, score, box) in zip(predictions, expected, strict=True):
        assert p.score == pytest.approx(score, abs=tolerance)
        assert p.box == pytest.approx(box, abs=1000 * tolerance)


def test_objects_are_the_networks(detector, scenes):
    results = list(mobilenet.detect_images(scenes, detector, threshold=THRESHOLD, batch_size=3))
    assert [os.path.relpath(result.name, scenes) for result in results] == list(SIZES)
    assert len({p.index for result in results for p in result.predictions}) > 1
    for result in results:
        width, height = result.size
        assert result.size == SIZES[os.path.relpath(result.name, scenes)]
        assert_same(result.predictions, expected_objects(detector, result.name))
        for p in result.predictions:
            assert p.label == LABELS[p.index]
            assert 0 <= p.box[0] <= p.box[2] <= width
            assert 0 <= p.box[1] <= p.box[3] <= height
    scores = sorted(p.score for result in results for p in result.predictions)
    middle = (scores[len(scores) // 2 - 1] + scores[len(scores) // 2]) / 2
    fewer = list(mobilenet.detect_images(scenes, detector, threshold=middle))
    assert [p.score > middle for result in fewer for p in result.predictions] == [True] * (len(scores) // 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ssdlite_mobilenet_v2", {"width_multiplier": 0.35}),
        ("ssdlite_mobilenet_v3_large", {"width_multiplier": 0.35}),
    ],
)
def test_every_kind_of_detector_loads_without_transformers_models(tmp_path, scenes, name, options):
    make_detector(tmp_path, name, **options)
    program = f"""
import sys
sys.argv[0] = "mobilenet"
from mobilenet.detect import detect_images
(result,) = detect_images({str(scenes / "b.png")!r}, {str(tmp_path)!r}, threshold={THRESHOLD})
assert "mobilenet.modeling_mobilenet" not in sys.modules and "transformers.modeling_utils" not in sys.modules
print(len(result.predictions))
"""
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=True)
    (result,) = mobilenet.detect_images(scenes / "b.png", tmp_path, threshold=THRESHOLD)
    assert int(done.stdout) == len(result.predictions) > 0
    assert_same(result.predictions, expected_objects(tmp_path, scenes / "b.png"))


@pytest.mark.parametrize("fit", ["crop", "pad", "corner", "stretch"])
def test_boxes_lie_on_the_image_whatever_the_network_sees_of_it(detector, scenes, tmp_path, fit):
    shutil.copytree(detector, tmp_path / "fitted")
    MobileNetImageProcessor(**FITS[fit](128, 146), max_detections=20).save_pretrained(tmp_path / "fitted")
    results = list(mobilenet.detect_images(scenes, tmp_path / "fitted", threshold=THRESHOLD, batch_size=1))
    assert sum(len(result.predictions) for result in results) > 10
    for result in results:
        assert_same(result.predictions, expected_objects(tmp_path / "fitted", result.name))


@needs_posix
@pytest.mark.parametrize("command", ["detect", "segment"])
def test_in_a_terminal_drawings_have_their_sources_names(command, detector, scenes, tmp_path):
    """There, images are found twice: to count them, and to draw them."""
    import pty

    model = detector
    if command == "segment":
        model = tmp_path / "segmenter"
        config = MobileNetConfig(width_multiplier=0.1, num_labels=4, segmentation_head="lraspp")
        MobileNetForSemanticSegmentation(config).save_pretrained(model)
        MobileNetImageProcessor.from_recipe("deeplab", 64).save_pretrained(model)
    terminal, end = pty.openpty()
    names = [scenes, "--model", model, "--draw", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mobilenet.cli", command, *map(str, names)], stdout=subprocess.DEVNULL, stderr=end
    )
    os.close(end)
    with contextlib.suppress(OSError):  # the other end is closed
        while os.read(terminal, 10000):
            pass
    os.close(terminal)
    assert process.wait() == 0
    drawn = [path.stem for path in (tmp_path / "out").rglob("*.*")]
    assert {*drawn} == {Path(name).stem for name in SIZES}


def test_layouts_say_the_same(detector, scenes):
    options = (scenes, "--model", detector, "--threshold", THRESHOLD)
    expected = {r.name: r for r in mobilenet.detect_images(scenes, detector, threshold=THRESHOLD)}
    result = run(*options, "--json")
    assert (result.exit_code, result.stderr) == (0, "Engine: torch\n")
    for line in map(json.loads, result.stdout.splitlines()):
        theirs = expected[line["file"]]
        assert (line["width"], line["height"]) == theirs.size
        assert [(p["index"], p["label"], p["score"], tuple(p["box"].values())) for p in line["predictions"]] == [
            (p.index, p.label, round(p.score, 6), tuple(round(edge, 2) for edge in p.box)) for p in theirs.predictions
        ]
        assert all(list(p["box"]) == ["xmin", "ymin", "xmax", "ymax"] for p in line["predictions"])
    rows = list(csv.DictReader(io.StringIO(run(*options, "--csv").stdout)))
    assert list(rows[0]) == ["file", "rank", "index", "label", "score", "xmin", "ymin", "xmax", "ymax"]
    assert len(rows) == sum(len(result.predictions) for result in expected.values())
    assert {row["label"] for row in rows} <= {"kite", "[red]dog[/]", "cat�[2J", "'=tie"}
    name, first, *_ = run(scenes / "a.jpg", *options[1:]).stdout.splitlines()
    best = expected[name].predictions[0]
    assert first.split()[:3] == ["1", f"{100 * best.score:.1f}", "%"]
    assert first.endswith(", ".join(str(round(edge)) for edge in best.box))


def test_results_as_coco_has_them(detector, scenes):
    found = json.loads(run(scenes, "--model", detector, "--threshold", THRESHOLD, "--coco").stdout)
    expected = list(mobilenet.detect_images(scenes, detector, threshold=THRESHOLD))
    assert len(found) == sum(len(result.predictions) for result in expected)
    assert {line["image_id"] for line in found} == {
        139 if "139" in Path(result.name).name else result.name for result in expected if result.predictions
    }
    lines = iter(found)
    for result in expected:
        for p, line in zip(result.predictions, lines, strict=False):
            assert line["category_id"] == p.index + 1
            x0, y0, x1, y1 = p.box
            assert line["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.01)
    assert json.loads(run(scenes, "--model", detector, "--threshold", 1, "--coco").stdout) == []


def test_no_two_images_share_a_number_of_coco():
    """Nor is one too long to be read."""
    names = ["a/1.jpg", "b/1.jpg", "a/1.jpg", "0001.jpg", f"{10**18}.jpg", "1" * 5000 + ".jpg"]
    out = Console(file=io.StringIO())
    lines = writer(Layout.COCO, out, form=DETECTED)
    for name in names:
        lines.write(DetectionResult(name, [Detection(0, "kite", 0.5, (0, 0, 1, 1))], None, (1, 1)))
    lines.close()
    assert [line["image_id"] for line in json.loads(out.file.getvalue())] == [1, names[1], 1, *names[3:]]


def test_a_long_label_lengthens_its_own_row_alone():
    out = Console(file=io.StringIO())
    labels = ("kite", "x" * 9000)
    found = [Detection(index, label, 0.5, (0, 0, 1, 1)) for index, label in enumerate(labels)]
    writer(Layout.TABLE, out, form=DETECTED).write(DetectionResult("a.jpg", found, None, (1, 1)))
    _, short, long = out.file.getvalue().splitlines()
    assert len(short) < 100
    assert labels[1] in long


def test_no_two_labels_share_a_category():
    coco = [
        label for label in (ROOT / "mobilenet/conversion/coco_labels.txt").read_text().splitlines() if label != "N/A"
    ]
    categories = categories_of(dict(enumerate([*coco, "helmet", "drone"])))
    assert categories[0] == 1
    assert (categories[80], categories[81]) == (91, 92)
    assert len(set(categories.values())) == 82


def test_categories_are_cocos_where_labels_are():
    assert categories_of({0: "person", 1: "dining table", 2: "toothbrush"}) == {0: 1, 1: 67, 2: 90}
    assert categories_of({0: "person", 1: "kiln", 2: "lathe"}) == {0: 1, 1: 2, 2: 3}


def test_images_with_boxes(detector, scenes, tmp_path):
    out = tmp_path / "out"
    arguments = (scenes, "--model", detector, "--threshold", THRESHOLD, "--json", "--draw", out)
    lines = [json.loads(line) for line in run(*arguments).stdout.splitlines()]
    names = ["a.jpg", "b.png", "sub/000000000139.jpg", "sub/c.png"]
    assert [line["drawn"] for line in lines] == [[str(out / name)] for name in names]
    for line in lines:
        with Image.open(line["drawn"][0]) as drawn:
            scale = -(-480 // max(line["width"], line["height"]))
            assert drawn.size == (scale * line["width"], scale * line["height"])
    before = {name: (out / name).read_bytes() for name in names}
    (out / "a.jpg").write_bytes(b"precious")
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.count("exists; --overwrite replaces it") == 4
    assert (out / "a.jpg").read_bytes() == b"precious"
    assert run(*arguments, "--overwrite").exit_code == 0
    assert {name: (out / name).read_bytes() for name in names} == before
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == names


@pytest.mark.parametrize("size", [(640, 480), (3000, 2000), (40, 30), (60_000, 3), (3, 5000), (1, 1)])
def test_boxes_are_drawn_at_any_size(size):
    width, height = size
    ground = Image.new("RGB", size, (90, 90, 90))
    box = (0.25 * width, 0.5 * height, 0.75 * width, 0.9 * height)
    drawn = draw_boxes(ground, [Detection(3, "cup", 0.5, box), Detection(4, "a" * 500, 0.4, (0, 0, width, height))])
    scale = -(-480 // max(size))
    assert drawn.size == (scale * width, scale * height)
    if min(size) > 20:
        for x, y in ((box[0], box[1] + 0.35 * height), (box[0] + 0.3 * width, box[3] - 1 / scale)):
            assert drawn.getpixel((int(scale * x), int(scale * y))) == label_color(3)
    assert ground.getcolors() == [(width * height, (90, 90, 90))]


def test_colors_of_labels_differ():
    colors = np.array([label_color(index) for index in range(80)], int)
    apart = np.abs(colors[:, None] - colors[None]).sum(-1) + 999 * np.eye(80, dtype=int)
    assert apart.min() > 8
    assert apart[:10, :10].min() > 60


def test_labels_lie_side_by_side():
    """Of objects in a row, none hides the label of another."""
    ground = Image.new("RGB", (600, 400), (90, 90, 90))
    objects = [Detection(i, "person", 0.9, (200 + 20 * i, 200, 215 + 20 * i, 230)) for i in range(4)]
    drawn = np.asarray(draw_boxes(ground, objects))
    areas = [(drawn == label_color(i)).all(-1).sum() for i in range(4)]
    assert min(areas) > 0.8 * max(areas)


def test_the_best_of_very_many_boxes_have_labels(monkeypatch):
    """Finding places for all of them would take hours."""
    texts = []
    monkeypatch.setattr(_Canvas, "label", lambda canvas, text, *_: texts.append(text))
    box = (10, 10, 300, 300)
    drawn = draw_boxes(Image.new("RGB", (480, 480)), [Detection(i, str(i), 0.9, box) for i in range(301)])
    assert texts == [f"{i} 90 %" for i in reversed(range(300))]
    assert drawn.getpixel((10, 150)) == label_color(0)


def test_a_broken_image_is_reported_and_the_rest_goes_on(detector, scenes, tmp_path):
    (tmp_path / "broken.png").write_bytes((scenes / "b.png").read_bytes()[:90])
    (tmp_path / "text.jpg").write_text("no image")
    result = run(
        *(scenes / "b.png", tmp_path / "broken.png", "none.jpg", tmp_path / "text.jpg", scenes / "a.jpg"),
        *("--model", detector, "--json", "--batch-size", 2, "--draw", tmp_path / "out"),
    )
    assert result.exit_code == 1
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert ["error" in line for line in lines] == [False, True, True, True, False]
    _, *messages = result.stderr.splitlines()
    assert [message.split(": ", 1)[1] for message in messages] == [line["error"] for line in lines[1:4]]
    assert "none.jpg: no such file" in messages
    assert sum(path.is_file() for path in (tmp_path / "out").rglob("*")) == 2


def test_orientation_and_reduced_decoding(detector, tmp_path):
    """Boxes are in pixels of the upright image, of its full size."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    image = Image.fromarray(coarse).resize((1500, 1000), Image.Resampling.NEAREST)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image.rotate(-90, expand=True).save(tmp_path / "upright.png")
    names = [tmp_path / "turned.jpg", tmp_path / "upright.png"]
    turned, upright = mobilenet.detect_images(names, detector, threshold=THRESHOLD)
    (reduced,) = mobilenet.detect_images(names[0], detector, threshold=THRESHOLD, fast_decode=True)
    assert turned.size == upright.size == reduced.size == (1000, 1500)
    assert len(upright.predictions) > 2
    best = upright.predictions[0]
    for result in (turned, reduced):
        assert result.predictions[0].index == best.index
        assert result.predictions[0].box == pytest.approx(best.box, abs=15)


@pytest.mark.parametrize(("suffix", "orientation"), [("tiff", 6), ("jpg", 9), ("jpg", 6), ("png", 8)])
def test_sizes_with_reduced_decoding(detector, tmp_path, suffix, orientation):
    """A TIFF file's size is that of the upright image already; an orientation of 9 says nothing."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (60, 40), "red").save(tmp_path / f"a.{suffix}", exif=exif)
    sizes = []
    for fast_decode in (False, True):
        model = load(str(detector), fast_decode=fast_decode, task=DETECTION)
        sizes.append(read_with_size(FoundImage(str(tmp_path / f"a.{suffix}")), model).size)
    assert sizes == [(60, 40) if orientation == 9 else (40, 60)] * 2


def test_an_image_and_names_from_stdin(detector, scenes, tmp_path):
    data = (scenes / "b.png").read_bytes()
    here = json.loads(run(scenes / "b.png", "--model", detector, "--json").stdout)
    result = run("-", "--model", detector, "--json", "--draw", tmp_path / "out", stdin=data)
    assert json.loads(result.stdout) == {**here, "file": "stdin", "drawn": [str(tmp_path / "out" / "stdin.png")]}
    result = run("-", "--model", detector, "--json", stdin=f"{scenes}/sub\n{scenes}/b.png\n".encode())
    assert [json.loads(line)["file"] for line in result.stdout.splitlines()] == [
        str(scenes / name) for name in ("sub/000000000139.jpg", "sub/c.webp", "b.png")
    ]


def test_a_url_is_drawn_without_a_second_download(detector, scenes, tmp_path, serve):
    url = serve(scenes)
    result = run(f"{url}/sub/c.webp", f"{url}/none.png", "--model", detector, "--json", "--draw", tmp_path / "out")
    assert result.exit_code == 1
    there, missing = map(json.loads, result.stdout.splitlines())
    assert there["drawn"] == [str(tmp_path / "out" / "127.0.0.1" / "sub" / "c.png")]
    assert "404" in missing["error"]


def test_results_in_a_file(detector, scenes, tmp_path):
    arguments = (scenes, "--model", detector, "--coco")
    assert run(*arguments, "--output", tmp_path / "results.json").exit_code == 0
    assert (tmp_path / "results.json").read_text() == run(*arguments).stdout
    assert run(*arguments, "--output", tmp_path / "results.json").exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--model", "m"), 2, "name images"),
        (("x.jpg",), 2, "name a folder or a Hub id of a detector"),
        (("x.jpg", "--model", "m", "--json", "--coco"), 2, "--json and --coco exclude each other"),
        (("x.jpg", "--model", "m", "--threshold", "nan"), 1, "Error: --threshold must be from 0 to 1, got nan."),
    ],
)
def test_errors_of_usage(arguments, code, message):
    result = run(*arguments)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_networks_of_another_task_are_one_error(detector, scenes):
    for command, kind in (("classify", "classifier"), ("segment", "segmenter")):
        result = CliRunner().invoke(app, [command, str(scenes), "--model", str(detector)])
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.endswith(f"it must be a {kind}, got a detector: `mobilenet detect` takes it.\n")
    with pytest.raises(ValueError, match="got a detector"):
        mobilenet.classify_images(scenes, detector)


def test_a_configuration_without_a_detector_is_one_error(detector, scenes, tmp_path):
    for path in detector.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["detector"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run(scenes, "--model", tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "detector must be " in result.stderr


def test_other_loaders_say_the_same(detector, scenes, tmp_path):
    """Weights in parts, which transformers loads."""
    model = MobileNetForObjectDetection.from_pretrained(detector)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, max_shard_size="100KB")
    MobileNetImageProcessor.from_pretrained(detector).save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    (result,) = mobilenet.detect_images(scenes / "a.jpg", tmp_path, threshold=THRESHOLD)
    assert_same(result.predictions, expected_objects(detector, scenes / "a.jpg"))


def start(*arguments: object) -> subprocess.Popen:
    """The command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "mobilenet.cli", "detect", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, **pipes)


@pytest.fixture(scope="module")
def many(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 1,000 images, and ten of them in one below it."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "few").mkdir()
    with Image.open(scenes / "a.jpg") as image:
        image.resize((640, 480)).save(folder / "original", "JPEG")
    for number in range(1000):
        (folder / ("few" if number < 100 else ".") / f"{number:04}.jpg").hardlink_to(folder / "original")
    return folder


@pytest.mark.any_version
@needs_posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_whole_drawings(detector, many, tmp_path, number):
    process = start(many, "--model", detector, "--threshold", 0.99, "--json", "--draw", tmp_path / "out")
    process.stdout.readline()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (-number, 143)
    assert "Traceback" not in errors
    drawn = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert 0 < len(drawn) < 1000
    for path in drawn:
        with Image.open(path) as image:
            image.load()
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.slow
@pytest.mark.any_version
@needs_posix
def test_memory_does_not_grow_with_the_number_of_images(detector, many, tmp_path):
    peaks = []
    for name, part in (("few", many / "few"), ("all", many)):
        output = tmp_path / f"{name}.json"
        process = start(part, "--model", detector, "--threshold", 0.99, "-o", output, "--draw", tmp_path / name)
        peaks.append(watch(process))
        assert process.wait() == 0
        process.stdout.close()
        process.stderr.close()
    assert len(list((tmp_path / "all").rglob("*.jpg"))) == 1000
    assert peaks[1] <= 1.1 * peaks[0]
