"""Classifying images: what is found, what is predicted, how it is printed, and what becomes of broken images."""

import contextlib
import csv
import glob
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import copy_in_order
from PIL import Image
from released import CODE
from transformers import AutoModelForImageClassification, MobileNetV2ForImageClassification, pipeline
from typer.testing import CliRunner, Result

import mobilenet
from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor
from mobilenet.classify import classify
from mobilenet.cli import app
from mobilenet.find_images import FoundImage, find
from mobilenet.loading import load
from mobilenet.output import new_file
from mobilenet.text import clean


LABELS = {
    0: "plain",
    1: "[bold red]markup[/]",
    2: "\x1b[31mescape\x1b]0;title\x07",
    3: "line\nbreak\r",
    4: "<script>alert('html')</script>",
    5: "right\N{RIGHT-TO-LEFT OVERRIDE}left",
}


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, ["classify", *map(str, arguments)], input=stdin)


def make_model(folder: Path, **options: object) -> MobileNetForImageClassification:
    """Save a small network whose predictions depend on the image."""
    torch.manual_seed(0)
    config = MobileNetConfig("mobilenet_v1", 0.25, image_size=64, **{"id2label": LABELS, **options})
    model = MobileNetForImageClassification(config).eval()
    # Predictions center on the mean of all images, or every image would get the same one.
    with torch.no_grad():
        features = model.backbone(torch.randn(16, 3, 1, 1).clamp(-1, 1).expand(-1, -1, 64, 64)).pooler_output
        model.classifier.weight.normal_().div_(features.std(0).norm())
        model.classifier.bias.copy_(-model.classifier.weight @ features.mean(0))
    model.save_pretrained(folder)
    MobileNetImageProcessor.from_recipe("google", 64).save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of any size and kind, two levels deep, among other files."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name in ("b.png", "a.JPG", "sub/c.webp", "sub/deeper/d.bmp", ".hidden.png", ".hidden/e.png", "a[1].png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colors = random.choice([0, 255], (1, 1, 3)) + random.integers(-9, 10, (3, 4, 3))
        colors = colors.clip(0, 255).astype(np.uint8)
        Image.fromarray(colors).resize(tuple(random.integers(50, 150, 2).tolist())).save(path)
    (folder / "notes.txt").write_text("no image")
    (folder / "sub" / "empty").mkdir()
    return folder


FOUND = ["a.JPG", "a[1].png", "b.png", "sub/c.webp", "sub/deeper/d.bmp"]


def found(*names: object, below: Path) -> list[str]:
    result = list(find(map(str, names)))
    assert all(image.error is None for image in result)
    return [os.path.relpath(image.name, below) for image in result]


def test_find_searches_folders(images):
    assert found(images, below=images) == FOUND


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.png", ["a[1].png", "b.png"]),
        ("*", ["a.JPG", "a[1].png", "b.png", "notes.txt", "sub/c.webp", "sub/deeper/d.bmp"]),
        ("**", [*FOUND[:3], "notes.txt", *FOUND[3:]]),
        ("**/*.bmp", ["sub/deeper/d.bmp"]),
        ("a[1].png", ["a[1].png"]),  # the name of a file
        ("[ab].*", ["a.JPG", "b.png"]),
    ],
)
def test_find_expands_patterns(images, pattern, expected):
    assert found(images / pattern, below=images) == expected


def test_find_keeps_names_that_are_nothing_here():
    names = ["https://example.org/a.jpg?size=*", "missing.jpg", "missing/*.jpg", "nul\0.jpg", "nul\0/*.jpg"]
    assert list(find(names)) == [FoundImage(name) for name in names]


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://example.org/a.jpg", "FILE://localhost/etc/hostname"])
def test_urls_of_other_protocols_are_refused(url):
    assert list(find([url])) == [FoundImage(url, error="a URL must begin with http:// or https://")]


def test_find_reads_stdin(monkeypatch, images):
    lines = f"{images}/b.png\r\n\n-\n{images}/sub\nhttp://x/\n".encode() + b"\xff.jpg"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    names = [image.name for image in find(["first", "-", "last"])]
    assert names == [
        "first",
        *(f"{images}/{name}" for name in ("b.png", "sub/c.webp", "sub/deeper/d.bmp")),
        *("http://x/", os.fsdecode(b"\xff.jpg"), "last"),
    ]


@pytest.mark.parametrize("pattern", ["**/*.png", "**", "b/**/*.png", "**/**/*.png"])
def test_find_follows_no_link_in_a_circle(tmp_path, pattern):
    """Nor does it find what glob does not, but for what lies behind a link."""
    for path in ("a.png", "b/c.png", "b/[d]/e.png", ".hidden/f.png", "b/.g.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    matches = set(glob.glob(f"{tmp_path}/{pattern}", recursive=True))
    expected = sorted(path for path in matches if os.path.isfile(path))
    for name in ("b/up", "b/[d]/up", "z"):
        (tmp_path / name).symlink_to(tmp_path, target_is_directory=True)
    assert [image.name for image in find([f"{tmp_path}/{pattern}"])] == expected
    assert len(expected) > 1


def test_find_reports_folders_that_hold_nothing_or_are_shut(monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "shut").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    shut = (str(tmp_path / "shut"), "cannot be searched: Permission denied")
    empty = (str(tmp_path / "empty"), "no images in this folder")
    assert [(p.name, p.error) for p in find([str(tmp_path / "shut")])] == [shut]
    assert [(p.name, p.error) for p in find([str(tmp_path / "empty")])] == [empty]
    assert [(p.name, p.error) for p in find([str(tmp_path)])] == [(str(tmp_path / "a.png"), None), shut]


@cache
def scores(model: Path, image: Path) -> dict[str, float]:
    """What the network says, without anything of the command's."""
    network = AutoModelForImageClassification.from_pretrained(model).eval()
    pixels = MobileNetImageProcessor.from_pretrained(model)(images=str(image), return_tensors="pt")
    with torch.no_grad():
        values = network(**pixels).logits.softmax(-1)[0].tolist()
    return dict(zip(LABELS.values(), values, strict=True))


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_json_gives_the_networks_predictions(model, images, batch_size):
    result = run(images, "--model", model, "--json", "--top-k", 3, "--batch-size", batch_size)
    assert (result.exit_code, result.stderr) == (0, "Engine: torch\n")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["file"] for line in lines] == [str(images / name) for name in FOUND]
    for line in lines:
        expected = sorted(scores(model, line["file"]).items(), key=lambda item: -item[1])[:3]
        assert [p["label"] for p in line["predictions"]] == [label for label, _ in expected]
        assert [LABELS[p["index"]] for p in line["predictions"]] == [label for label, _ in expected]
        np.testing.assert_allclose(
            [p["score"] for p in line["predictions"]], [score for _, score in expected], rtol=0, atol=1e-5
        )
    assert len({line["predictions"][0]["label"] for line in lines}) > 1  # or the images would not matter


def test_csv_says_the_same(model, images):
    result = run(images, "--model", model, "--csv", "-k", 6)
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert list(rows[0]) == ["file", "rank", "index", "label", "score"]
    assert len(rows) == len(FOUND) * len(LABELS)
    assert [int(row["rank"]) for row in rows[:6]] == [1, 2, 3, 4, 5, 6]
    expected = scores(model, images / FOUND[0])
    for row in rows[:6]:
        label = LABELS[int(row["index"])]
        assert row["label"] == clean(label)
        assert float(row["score"]) == pytest.approx(expected[label], abs=1e-5)


def test_csv_holds_no_formulas(tmp_path):
    """For spreadsheets, which compute what begins like one."""
    make_model(tmp_path / "model", id2label={0: "=1+1", 1: "+1", 2: "-1", 3: "@SUM(A1)", 4: "\uff1d1", 5: "1=1"})
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    result = run(tmp_path / "image.png", "--model", tmp_path / "model", "--csv", "-k", 6)
    labels = {row["label"] for row in csv.DictReader(io.StringIO(result.stdout))}
    assert labels == {"'=1+1", "'+1", "'-1", "'@SUM(A1)", "'\uff1d1", "1=1"}


def test_table_says_the_same_and_ranks(model, images):
    result = run(images / "b.png", "--model", model, "-k", 2)
    name, *rows = result.stdout.splitlines()
    assert name == str(images / "b.png")
    best = sorted(scores(model, images / "b.png").items(), key=lambda item: -item[1])[:2]
    assert len(rows) == 2
    for rank, (row, (label, score)) in enumerate(zip(rows, best, strict=True), 1):
        assert row.split()[:3] == [str(rank), f"{100 * score:.1f}", "%"]
        assert row.endswith(f"  {clean(label)}")


@pytest.mark.parametrize("layout", [(), ("--csv",)])
def test_labels_and_names_cannot_command_a_terminal(model, tmp_path, layout):
    Image.new("RGB", (64, 64)).save(tmp_path / "\x1b[2Jname.png")
    (tmp_path / "\x1b[2Jbroken.png").write_bytes(b"")
    result = run(tmp_path, "--model", model, "-k", 6, *layout)
    assert all(c.isprintable() or c == "\n" for c in result.output)
    for text in ("[bold red]markup[/]", "�[31mescape�]0;title�", "line�break�", "<script>", "�[2Jname.png"):
        assert text in result.stdout
    assert "�[2Jbroken.png: " in result.stderr


def test_json_is_ascii(model, tmp_path):
    Image.new("RGB", (64, 64)).save(os.fsencode(tmp_path) + b"/\xff\x1b.png")
    result = run(tmp_path, "--model", model, "--json", "-k", 6)
    assert result.stdout.isascii()
    assert "\x1b" not in result.stdout
    line = json.loads(result.stdout)
    assert os.fsencode(line["file"]).endswith(b"/\xff\x1b.png")
    assert {p["label"] for p in line["predictions"]} == set(LABELS.values())


def test_a_broken_image_is_reported_and_the_rest_goes_on(model, images, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes((images / "a.JPG").read_bytes()[:200])
    result = run(
        *(images / "b.png", broken, "missing.png", images / "notes.txt", images / "a.JPG"),
        *("--model", model, "--json", "--batch-size", 2),
    )
    assert result.exit_code == 1
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert ["error" in line for line in lines] == [False, True, True, True, False]
    engine, *messages = result.stderr.splitlines()
    assert engine == "Engine: torch"
    assert len(messages) == 3
    assert messages[0].startswith(f"{broken}: cannot be decoded: ")
    assert messages[1] == "missing.png: no such file"
    assert messages[2] == f"{images / 'notes.txt'}: not an image in a format that Pillow reads"
    assert [line["error"] for line in lines[1:4]] == [m.split(": ", 1)[1] for m in messages]


def test_only_broken_images(model, tmp_path):
    result = run(tmp_path / "a", tmp_path / "b", "--model", model)
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1 + 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_does_not_hang(model, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    result = run(tmp_path, "--model", model)
    assert result.exit_code == 1
    assert f"{tmp_path / 'pipe.jpg'}: not a regular file\n" in result.stderr


@pytest.fixture
def server(images):
    """A web server on the loopback that serves the images."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(images))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_urls(model, images, server):
    result = run(f"{server}/b.png", f"{server}/none.png", images / "b.png", "--model", model, "--json")
    assert result.exit_code == 1
    there, missing, here = map(json.loads, result.stdout.splitlines())
    assert there["predictions"] == here["predictions"]
    assert there["file"] == f"{server}/b.png"
    assert "404" in missing["error"]


def test_names_from_stdin(model, images):
    result = run("-", "--model", model, "--csv", "-k", 1, stdin=f"{images}/b.png\n{images}/sub\n")
    assert result.exit_code == 0
    names = [row["file"] for row in csv.DictReader(io.StringIO(result.stdout))]
    assert names == [f"{images}/{name}" for name in ("b.png", "sub/c.webp", "sub/deeper/d.bmp")]


def test_a_closed_stdin_is_named(model, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert [(image.name, image.error) for image in find(["-"])] == [("stdin", "it is closed")]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_stdout_of_any_encoding_takes_the_table(model, images, encoding, tmp_path):
    image = shutil.copy(images / "b.png", tmp_path / "\N{SNOWMAN}.png")
    command = [sys.executable, "-m", "mobilenet.cli", "classify", image, "--model", str(model)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(mobilenet.__file__).parents[1])}
    result = subprocess.run(command, env=environment, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert rb"\u2603.png" in result.stdout
    assert b" %  =" in result.stdout


def test_an_image_from_stdin(model, images):
    data = (images / "b.png").read_bytes()
    there, here = (
        json.loads(run(*a, "--model", model, "--json", stdin=data).stdout) for a in (("-",), (images / "b.png",))
    )
    assert there == {**here, "file": "stdin"}
    result = run("-", "--model", model, "--json", stdin=data[:200])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("stdin: cannot be decoded: ")


def test_a_threshold_leaves_out_labels(model, images):
    every, some = (
        [
            json.loads(line)["predictions"]
            for line in run(images, "--model", model, "--json", "-k", 6, *a).stdout.splitlines()
        ]
        for a in ((), ("--threshold", 0.2))
    )
    assert some == [[p for p in predictions if p["score"] >= 0.2] for predictions in every]
    assert 0 < sum(map(len, some)) < sum(map(len, every))
    for text in ("nan", "1.5", "-1"):
        result = run(images, "--model", model, "--threshold", text)
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1] == f"Error: --threshold must be from 0 to 1, got {float(text)}."


def test_device_and_precision(model, images, exported):
    exact, rounded = (
        [
            json.loads(line)["predictions"][0]
            for line in run(images, "--model", model, "--json", *a).stdout.splitlines()
        ]
        for a in (("--device", "cpu:0"), ("--dtype", "bfloat16"))
    )
    assert exact != rounded
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], abs=0.1)
    result = run(images / "b.png", "--model", model, "--dtype", "bfloat16")
    assert result.stderr == "Engine: torch, computing in bfloat16\n"
    for device in ("nowhere", "meta", "cuda:99"):
        result = run(images, "--model", model, "--device", device)
        assert (result.exit_code, result.stdout) == (1, "")
        expected = "Error: --device must be one that torch has here, such as cpu or cuda"
        assert result.stderr == f"{expected}, got '{device}'.\n"
    engine, folder = exported
    result = run(images, "--model", folder, "--dtype", "float16")
    expected = f"Error: --device must be cpu and dtype float32 with engine {engine}, got cpu and float16.\n"
    assert (result.exit_code, result.stderr) == (1, expected)


def test_results_in_a_file(model, images, tmp_path):
    output = tmp_path / "results.csv"
    arguments = (images, "--model", model, "--csv")
    expected = run(*arguments).stdout
    result = run(*arguments, "--output", output)
    assert (result.exit_code, result.stdout) == (0, "")
    assert output.read_text(encoding="utf-8") == expected
    output.write_text("precious")
    result = run(*arguments, "-o", output)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: --output must be a file that does not exist, or go with --overwrite, got ")
    assert output.read_text() == "precious"
    result = run(*arguments, "-o", output, "--overwrite", "--engine", "onnx")
    assert result.exit_code == 1
    assert output.read_text() == "precious"
    assert run(*arguments, "-o", output, "--overwrite").exit_code == 0
    assert output.read_text(encoding="utf-8") == expected
    assert run(*arguments, "-o", tmp_path, "--overwrite").stderr.startswith(
        "Error: --output must be a regular file, got "
    )
    assert list(tmp_path.iterdir()) == [output]


def test_a_file_that_came_meanwhile_stays(monkeypatch, tmp_path):
    output, link = tmp_path / "results.csv", os.link

    def come_first(source, target):
        output.write_text("precious")
        link(source, target)

    monkeypatch.setattr(os, "link", come_first)
    with (
        pytest.raises(ValueError, match=r"^output must be a file that does not exist"),
        new_file(output, False) as file,
    ):
        file.write("results")
    assert output.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.any_version
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_terminated_run_leaves_no_file(model, many, tmp_path):
    process = start(many[0], "--model", model, "--json", "-o", tmp_path / "results.jsonl")
    process.stderr.readline()
    (part,) = tmp_path.iterdir()
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert part.name.startswith(".results.jsonl.")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell")
def test_a_closed_stdout_is_one_error(model, images):
    process = start(images / "b.png", "--model", model, stdout=None, preexec_fn=lambda: os.close(1))
    assert process.communicate()[1] == "Error: stdout is closed: there is nowhere to print results.\n"
    assert process.returncode == 1


def test_the_same_in_python(model, images):
    """A folder by one call, which says what is wrong before it reads an image."""
    expected = [json.loads(line) for line in run(images, "--model", model, "--json", "-k", 2).stdout.splitlines()]
    results = list(mobilenet.classify_images(images, model, top_k=2))
    assert [result.name for result in results] == [line["file"] for line in expected]
    for result, line in zip(results, expected, strict=True):
        assert [(p.label, p.index, round(p.score, 6)) for p in result.predictions] == [
            (p["label"], p["index"], p["score"]) for p in line["predictions"]
        ]
    missing, here = mobilenet.classify_images([images / "none.png", str(images / "b.png")], model, threshold=1)
    assert (missing.error, here.error, here.predictions) == ("no such file", None, [])
    for option, value in (("top_k", 0), ("batch_size", 1.5), ("threshold", 2), ("dtype", "int8"), ("engine", "jax")):
        with pytest.raises(ValueError, match=f"^{option} must be "):
            mobilenet.classify_images(images, model, **{option: value})


def test_images_of_different_shapes_share_a_batch(tmp_path, images):
    make_model(tmp_path)
    MobileNetImageProcessor(size=64, do_center_crop=False).save_pretrained(tmp_path)
    result = run(images, "--model", tmp_path, "--json")
    assert result.exit_code == 0
    for line in map(json.loads, result.stdout.splitlines()):
        best = line["predictions"][0]
        assert best["score"] == pytest.approx(scores(tmp_path, line["file"])[best["label"]], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "score"),
    [
        ({"problem_type": "regression"}, lambda logits: logits),
        ({"problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"problem_type": None, "id2label": {0: "only"}}, torch.sigmoid),
    ],
)
def test_scores_are_those_of_the_pipeline(tmp_path, images, options, score):
    network = make_model(tmp_path, **options)
    name = str(images / "b.png")
    processor = MobileNetImageProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = score(network(**processor(images=name, return_tensors="pt")).logits)[0].sort(descending=True).values
    predictions = json.loads(run(name, "--model", tmp_path, "--json").stdout)["predictions"]
    np.testing.assert_allclose([p["score"] for p in predictions], expected[:5], atol=2e-6)
    if options["problem_type"] != "regression":  # where the pipeline of transformers 4.57 applies softmax
        peer = pipeline("image-classification", model=network, image_processor=processor, trust_remote_code=False)
        np.testing.assert_allclose([p["score"] for p in predictions], [p["score"] for p in peer(name)], atol=2e-6)
    table = run(name, "--model", tmp_path).stdout
    assert ("%" in table) == (options["problem_type"] != "regression")


def test_images_stream(model, images):
    taken = itertools.count()
    endless = (FoundImage(str(images / "b.png")) for _ in taken)
    results = classify(endless, load(str(model)), top_k=1, batch_size=4)
    first = list(itertools.islice(results, 10))
    assert all(result.predictions == first[0].predictions for result in first)
    batches_ahead = 2 * (os.cpu_count() + 2) + 1
    assert next(taken) <= (3 + batches_ahead) * 4
    results.close()


@pytest.fixture(scope="session", params=["onnx", "openvino"])
def exported(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The model as exported for an engine: name and folder."""
    exporters = pytest.importorskip("transformers.exporters", reason="transformers is too old to export")
    names = {"onnx": ("OnnxExporter", "OnnxConfig"), "openvino": ("OpenVINOExporter", "OpenVINOConfig")}
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    exporter, config = (getattr(exporters, name) for name in names[request.param])
    network = MobileNetForImageClassification.from_pretrained(model).eval().fuse()
    shapes = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    folder = tmp_path_factory.mktemp(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = exporter().export(
            network, {"pixel_values": torch.randn(2, 3, 64, 64)}, config(dynamic_shapes=shapes)
        )
    program.save_pretrained(folder)
    MobileNetImageProcessor.from_pretrained(model).save_pretrained(folder)
    return request.param, folder


@pytest.mark.parametrize("chosen", [True, False])
def test_exports_say_the_same(exported, chosen, model, images):
    engine, folder = exported
    result = run(images, "--model", folder, "--json", "--batch-size", 2, *(("--engine", engine) if chosen else ()))
    assert result.exit_code == 0
    assert re.fullmatch(r"Engine: (onnx|openvino, computing in \w+)\n", result.stderr)
    assert engine in result.stderr
    # OpenVINO computes with 8 bits of mantissa where that is faster.
    tolerance = 0.05 if "bf16" in result.stderr else 1e-4
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["file"] for line in lines] == [str(images / name) for name in FOUND]
    for line in lines:
        expected = scores(model, line["file"])
        assert {p["label"]: p["score"] for p in line["predictions"]} == pytest.approx(
            {p["label"]: expected[p["label"]] for p in line["predictions"]}, abs=tolerance
        )


def test_a_broken_export_is_one_error(exported, images, tmp_path):
    """A network that is cut off, and labels that are not as many as its logits."""
    engine, folder = exported
    less = shutil.copytree(folder, tmp_path / "less")
    edit_config(less, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    cut = shutil.copytree(folder, tmp_path / "cut")
    network = cut / {"onnx": "model.onnx", "openvino": "openvino_model.xml"}[engine]
    network.write_bytes(network.read_bytes()[:999])
    for broken, message in ((less, "must answer with 2 scores, got "), (cut, f"its network for {engine} is broken: ")):
        result = run(images, "--model", broken)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.splitlines()[-1].startswith("Error: ")
        assert message in result.stderr


def test_networks_of_one_channel(tmp_path, images):
    """They are given luma; and with a processor that makes three channels, each image has its error."""
    config = MobileNetConfig(width_multiplier=0.1, num_channels=1, id2label=dict(enumerate("abc")))
    MobileNetForImageClassification(config).save_pretrained(tmp_path)
    MobileNetImageProcessor(do_grayscale=True, image_mean=0.5, image_std=0.5).save_pretrained(tmp_path)
    assert run(images, "--model", tmp_path).exit_code == 0
    MobileNetImageProcessor().save_pretrained(tmp_path)
    result = run(images, "--model", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.count("the network takes 1 channels, got 3") == len(FOUND)


def test_exports_repeat_their_bits(exported, images):
    _, folder = exported
    first, second = load(str(folder)), load(str(folder))
    pixels = np.concatenate([first.read(str(images / name)) for name in FOUND])
    expected = first.network(pixels)
    assert expected.std() > 0
    assert all(np.array_equal(classifier.network(pixels), expected) for classifier in (first, second, first))


@pytest.mark.parametrize(
    ("engine", "manifest", "message"),
    [
        ("onnx", None, "it was exported for no engine, not for onnx."),
        ("onnx", {"export_format": "openvino"}, "it was exported for openvino, not for onnx."),
        ("auto", {"export_format": "executorch"}, "it must be exported for onnx or openvino, got executorch."),
        ("auto", {}, "cannot be loaded: 'export_format'"),
        (
            "auto",
            {"export_format": "onnx", "schema_version": 10**30},
            f"export.json must have the schema_version 1, got 1{30 * '0'}.",
        ),
        (
            "auto",
            {"export_format": "onnx"},
            "engine onnx needs onnxruntime: in a clone of this project, pip install",
        ),
    ],
)
def test_engines_that_cannot_run(monkeypatch, tmp_path, engine, manifest, message):
    make_model(tmp_path)
    if manifest is not None:
        (tmp_path / "export.json").write_text(json.dumps(manifest))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    result = run("x.jpg", "--model", tmp_path, "--engine", engine)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_torch_runs_weights_beside_an_export(tmp_path, images):
    make_model(tmp_path)
    (tmp_path / "export.json").write_text(json.dumps({"export_format": "onnx"}))
    result = run(images, "--model", tmp_path, "--engine", "torch")
    assert (result.exit_code, result.stderr) == (0, "Engine: torch\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name images, or take --example"),
        (("x.jpg", "--model", "m", "--json", "--csv"), "exclude each other"),
        (("x.jpg", "--model", "m", "--top-k", 0), "--top-k"),
        (("x.jpg", "--model", "m", "--batch-size", "many"), "--batch-size"),
        (("x.jpg",), "name a folder or a Hub id"),
    ],
)
def test_usage_errors(monkeypatch, arguments, message):
    monkeypatch.setattr("mobilenet.cli.classify.default_model", lambda: None)
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in " ".join(result.stderr.split())


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


BROKEN_MODELS = {
    "no folder": (lambda folder: folder.rename(f"{folder}-away"), "must be a folder or a Hub id"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
    "config of absurd size": (
        lambda folder: os.truncate(folder / "config.json", (64 << 20) + 1),
        "config.json must have at most 67108864 bytes, got 67108865.",
    ),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), ""),
    "another model": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "resnet"}'),
        "model_type must be mobilenet, got resnet.",
    ),
    "bad field": (lambda folder: edit_config(folder, width_multiplier="wide"), "width_multiplier must be a number"),
    "no labels": (lambda folder: edit_config(folder, id2label={}), "num_labels must be at least 1"),
    "other shapes": (
        lambda folder: edit_config(folder, width_multiplier=0.5),
        "lacks weights of the right shape for backbone.stages.0.0.depthwise.conv.weight, ",
    ),
    "more labels": (
        lambda folder: edit_config(folder, id2label=dict(enumerate("abcdefg"))),
        "lacks weights of the right shape for classifier.bias, classifier.weight.",
    ),
    "no weights": (lambda folder: weights(folder).unlink(), "model.safetensors"),
    "weights cut off": (lambda folder: weights(folder).write_bytes(weights(folder).read_bytes()[:9999]), "header"),
    "weights are noise": (lambda folder: weights(folder).write_bytes(bytes(range(256))), "header"),
    "pickle is empty": (
        lambda folder: weights(folder).rename(folder / "pytorch_model.bin").write_bytes(b""),
        "",
    ),
    "no processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "image processor"),
    "processor is a list": (lambda folder: (folder / "preprocessor_config.json").write_text("[]"), "cannot be loaded"),
}


@pytest.mark.parametrize("fault", BROKEN_MODELS)
def test_a_broken_model_is_one_error(tmp_path, images, fault):
    spoil, message = BROKEN_MODELS[fault]
    folder = tmp_path / "model"
    make_model(folder)
    spoil(folder)
    result = run(images, "--model", folder)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert str(folder) in line
    assert message in line


def test_weights_that_are_no_numbers_are_one_error(tmp_path, images):
    make_model(tmp_path)
    network = MobileNetForImageClassification.from_pretrained(tmp_path)
    network.classifier.bias.data.fill_(torch.nan)
    network.save_pretrained(tmp_path)
    result = run(images, "--model", tmp_path, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        "Engine: torch",
        f"Error: {tmp_path} must answer with finite scores, got NaN or infinity: its weights are broken.",
    ]


def test_a_models_own_code_does_not_run(tmp_path, images):
    make_model(tmp_path)
    code = list(tmp_path.glob("*.py"))
    assert {file.name for file in code} == set(CODE)
    for file in code:
        file.write_text("raise SystemExit('the code of a repository ran')")
    assert run(images, "--model", tmp_path).exit_code == 0


def test_the_cats_are_tabbies(data, cats, tmp_path):
    theirs = MobileNetV2ForImageClassification.from_pretrained(data / "checkpoints/google_mobilenet_v2_1.0_224")
    config = MobileNetConfig(id2label=theirs.config.id2label)
    copy_in_order(theirs, MobileNetForImageClassification(config)).save_pretrained(tmp_path)
    MobileNetImageProcessor.from_recipe().save_pretrained(tmp_path)
    result = run(cats, "--model", tmp_path, "--json")
    best, second, third, *_ = json.loads(result.stdout)["predictions"]
    assert (best["index"], best["label"]) == (282, "tabby, tabby cat")
    assert best["score"] == pytest.approx(0.7847, abs=1e-3)
    assert second["score"] == pytest.approx(0.1446, abs=1e-3)
    assert third["score"] == pytest.approx(0.0697, abs=1e-3)


needs_posix = pytest.mark.skipif(os.name != "posix", reason="signals, links and pipes of POSIX")
COMMAND = [sys.executable, "-m", "mobilenet.cli", "classify"]


def start(*arguments: object, **options: object) -> subprocess.Popen:
    """The command in a process of its own."""
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], env=environment, text=True, **pipes)


COLORS = list(itertools.product((0, 120, 255), repeat=3))
FOLDERS, GOOD_IN_FOLDER = 10, 297


def encoded(color: tuple[int, int, int], size: tuple[int, int], extension: str) -> bytes:
    buffer = io.BytesIO()
    shades = np.random.default_rng(0).integers(0, 60, (size[1], size[0], 3)) + color
    Image.fromarray(shades.clip(0, 255).astype(np.uint8)).save(buffer, Image.registered_extensions()[extension])
    return buffer.getvalue()


def break_in_ten_ways(folder: Path, number: int) -> dict[str, str]:
    """Write ten images that cannot be read, and say why."""
    jpeg, png = encoded((9, 99, 199), (80, 60), ".jpg"), encoded((9, 99, 199), (80, 60), ".png")
    where = png.index(b"IDAT") + 20
    broken = {
        "empty.jpg": (b"", "not an image"),
        "text.png": (b"no image", "not an image"),
        "noise.webp": (np.random.default_rng(number).bytes(5000), "not an image"),
        "header.gif": (b"GIF89a", "not an image"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut.png": (png[: len(png) // 2], "truncated"),
        "bits.png": (png[:where] + bytes(64) + png[where + 64 :], "cannot be decoded: "),
        "bomb.png": (
            png[:16] + struct.pack(">II", 60000, 60000) + png[24:29] + _checksum(png[:29], 60000) + png[33:],
            "60000|decompression bomb|pixels",
        ),
    }
    for name, (data, _) in broken.items():
        (folder / f"{number}-{name}").write_bytes(data)
    os.symlink("nowhere", folder / f"{number}-link.jpg")
    os.mkfifo(folder / f"{number}-pipe.jpg")
    causes = {name: cause for name, (_, cause) in broken.items()}
    causes |= {"link.jpg": "no such file", "pipe.jpg": "not a regular file"}
    return {str(folder / f"{number}-{name}"): cause for name, cause in causes.items()}


def _checksum(png: bytes, side: int) -> bytes:
    header = b"IHDR" + struct.pack(">II", side, side) + png[24:29]
    return struct.pack(">I", zlib.crc32(header))


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int], dict[str, str]]:
    """3,000 images: the folder, the color of each good one, and what ails each of the 30 broken ones."""
    folder = tmp_path_factory.mktemp("many")
    originals = []
    for index, color in enumerate(COLORS):
        path = folder / f"{index}.original"
        extension = (".jpg", ".png")[index % 2]
        path.write_bytes(encoded(color, (90 + index, 120 - index), extension))
        originals.append((path, extension))
    good = {}
    for number in range(FOLDERS):
        (folder / str(number)).mkdir()
        for index in range(GOOD_IN_FOLDER):
            original, extension = originals[index % len(COLORS)]
            path = folder / str(number) / f"{index:03}{extension}"
            os.link(original, path)
            good[str(path)] = index % len(COLORS)
    broken = {}
    for number in range(3):
        broken |= break_in_ten_ways(folder / str(number), number)
    return folder, good, broken


def watch(process: subprocess.Popen) -> int:
    """The most memory that a process held until its end, where the system tells. (Its getrusage counts ours too.)"""
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            peak = int(found[1]) if found else peak
        time.sleep(0.01)
    return peak


@pytest.mark.slow
@pytest.mark.any_version
@needs_posix
def test_three_thousand_images_of_which_thirty_are_broken(model, many, tmp_path):
    folder, good, broken = many
    peaks = {}
    for name, part in (("all", folder), ("a tenth", folder / "9")):
        with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
            process = start(part, "--model", model, "--json", "-k", 1, stdout=out, stderr=err)
            peaks[name] = watch(process)
        lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
        engine, *errors = (tmp_path / "err").read_text().splitlines()
        expected_good = {file: index for file, index in good.items() if file.startswith(f"{part}/")}
        expected_broken = {file: cause for file, cause in broken.items() if file.startswith(f"{part}/")}
        assert process.returncode == (1 if expected_broken else 0)
        assert engine == "Engine: torch"

        assert [line["file"] for line in lines] == sorted([*expected_good, *expected_broken])
        answers = {line["file"]: line["predictions"][0] for line in lines if "predictions" in line}
        assert answers.keys() == expected_good.keys()
        for index in range(len(COLORS)):
            first = str(folder / "9" / f"{index:03}{('.jpg', '.png')[index % 2]}")
            best, score = max(scores(model, first).items(), key=lambda item: item[1])
            same = [answers[file] for file, i in expected_good.items() if i == index]
            assert len(same) == GOOD_IN_FOLDER // len(COLORS) * (len(answers) // GOOD_IN_FOLDER)
            assert {answer["label"] for answer in same} == {best}
            assert all(answer["score"] == pytest.approx(score, abs=1e-5) for answer in same)

        reported = dict(line.split(": ", 1) for line in errors)
        assert len(errors) == len(reported)
        assert reported.keys() == expected_broken.keys()
        for file, cause in expected_broken.items():
            assert re.search(cause, reported[file]), (file, reported[file])
        assert reported == {line["file"]: line["error"] for line in lines if "error" in line}
    assert len({answer["label"] for answer in answers.values()}) > 2
    assert peaks["all"] <= 1.1 * peaks["a tenth"]


@needs_posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_it_at_once_with_whole_lines(model, many, number):
    process = start(many[0], "--model", model, "--json")
    first = process.stdout.readline()
    process.send_signal(number)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == -number
    lines = [json.loads(line) for line in [first, *rest.splitlines()]]
    assert 1 <= len(lines) < 3000
    assert "Traceback" not in errors


@needs_posix
def test_interrupt_does_not_wait_for_a_server(model):
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = start(f"http://127.0.0.1:{server.getsockname()[1]}/endless.jpg", "--model", model)
        connection, _ = server.accept()
        connection.recv(1000)
        connection.send(b"HTTP/1.0 200 OK\r\n\r\n")
        process.send_signal(signal.SIGINT)
        # A byte now and then keeps the download from timing out.
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                connection.send(b"\0")
            time.sleep(0.1)
        connection.close()
    assert process.returncode == -signal.SIGINT
    assert process.communicate() == ("", "Engine: torch\n")


@needs_posix
def test_a_closed_pipe_ends_quietly(model, many):
    process = start(many[0] / "9", "--model", model)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(60) == 1
    assert errors == "Engine: torch\n"
    process.stderr.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_one_error(model, many):
    with open("/dev/full", "w") as full:
        process = start(many[0] / "9" / "000.jpg", "--model", model, "--csv", stdout=full)
        _, errors = process.communicate()
    assert process.returncode == 1
    assert errors == "Engine: torch\nError: [Errno 28] No space left on device\n"


@needs_posix
def test_a_terminal_shows_a_bar_that_stays_out_of_the_results(model, many, tmp_path):
    import pty

    terminal, end = pty.openpty()
    with open(tmp_path / "out", "w") as out:
        process = start(many[0] / "2", "--model", model, "--json", "-k", 1, stdout=out, stderr=end)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while data := os.read(terminal, 10000):
            shown += data
    os.close(terminal)
    assert process.wait() == 1
    assert len([json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]) == GOOD_IN_FOLDER + 10
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown).decode()
    assert re.search(r"━.* \d+/307 images", text)
    assert sum("not an image" in line for line in text.splitlines()) == 4
    assert shown.endswith(b"\x1b[2K")  # the bar is gone


def test_no_bar_where_nobody_looks(model, images):
    result = run(images, "--model", model, "--batch-size", 1)
    assert result.stderr == "Engine: torch\n"
    assert "\x1b" not in result.stdout
