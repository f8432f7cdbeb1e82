"""A run that ends in the middle leaves nothing half-written, and the same command then succeeds.

Commands run as they are typed, in processes of their own: a server imports everything once, and forks for each run. A
fault strikes where a run calls a function by a name; so every stage of a command has its turn.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hostile import described_files
from PIL import Image
from released import CONVERTED
from transformers.utils import is_accelerate_available

from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor


pytestmark = pytest.mark.any_version


if not hasattr(os, "fork"):
    pytest.skip("signals and processes of POSIX", allow_module_level=True)

SERVER = """
import importlib, json, os, resource, signal, sys
import torch
torch.set_num_threads(1)
from mobilenet.cli import app
for module in json.loads(sys.argv[1]):
    try:
        importlib.import_module(module)
    except ImportError:
        pass  # an extra, or of a newer transformers

def arm(stage, fault):
    path, _, name = stage.rpartition(".")
    try:
        owner = importlib.import_module(path)
    except ImportError:
        module, _, owner = path.rpartition(".")
        owner = getattr(importlib.import_module(module), owner)
    original = getattr(owner, name)

    def strike(*args, **kwargs):
        setattr(owner, name, original)
        if fault == "full disk":  # a file of more bytes fails to be written
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        elif fault == "read-only":
            raise PermissionError(30, "Read-only file system")
        else:
            os.kill(os.getpid(), getattr(signal, fault))
        return original(*args, **kwargs)

    setattr(owner, name, strike)

for line in sys.stdin:
    arguments, stage, fault, errors = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        if stage:
            arm(stage, fault)
        app(arguments, prog_name="mobilenet")
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
# What takes its time to import.
MODULES = [f"mobilenet.{name}" for name in ("conversion.convert", "export.export", "training.run")]
MODULES += ["datasets", "kornia.augmentation", "matplotlib.pyplot", "onnxscript", "torch.utils.tensorboard"]
MODULES += ["torchmetrics.classification", "transformers.exporters", "transformers.models.auto.modeling_auto"]
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run a command, with a fault at a stage; gives the exit code and what was printed."""
    folder = tmp_path_factory.mktemp("server")
    environment = {
        **os.environ,
        **{"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        **{"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "TMPDIR": str(folder)},
    }
    command = [sys.executable, "-c", SERVER, json.dumps(MODULES)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as server:

        def run(*arguments: object, stage: str = "", fault: str = "") -> tuple[int, str]:
            errors = folder / "errors"
            server.stdin.write(json.dumps([list(map(str, arguments)), stage, fault, str(errors)]) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline()), errors.read_text()

        yield run
        server.stdin.close()


def checksums(folder: Path) -> dict[str, str]:
    """Of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_ended(fault: str, code: int, printed: str) -> None:
    """A run ended as its fault asks for: an exit code, and one line at most."""
    expected = {"SIGINT": -signal.SIGINT, "SIGTERM": 143, "SIGKILL": -signal.SIGKILL}.get(fault, 1)
    assert code == expected, printed
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("Error: ")]
    assert len(lines) == (fault in ("full disk", "read-only")), printed


SIGNALS = ("SIGINT", "SIGTERM", "SIGKILL")


def everywhere(stages: list[str], faults: tuple[str, ...]) -> list[tuple[str, str]]:
    """Each stage with one of the faults, which take turns."""
    return [(stage, faults[index % len(faults)]) for index, stage in enumerate(stages)]


# convert

CONVERT = "mobilenet.conversion.convert."
CONVERT_STAGES = [CONVERT + name for name in ("read_source", "choose_labels", "build", "write", "conversion_card")]
CONVERT_STAGES += ["mobilenet.conversion.checkpoint.load_file", "mobilenet.conversion.parity.load_back", "os.replace"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name, content in described_files("google").items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "fault"),
    [*everywhere(CONVERT_STAGES, SIGNALS), *((CONVERT + "build", fault) for fault in ("SIGINT", "SIGTERM"))],
)
def test_convert_survives_signals(run: Run, source: Path, tmp_path: Path, stage: str, fault: str) -> None:
    before = checksums(source)
    compares = ["--compare" if stage.endswith(".load_back") else "--no-compare"]
    assert_ended(fault, *run("convert", source, tmp_path / "out", *compares, stage=stage, fault=fault))
    assert not (tmp_path / "out").exists()
    assert checksums(source) == before
    if fault != "SIGKILL":  # after which nobody can tidy up
        assert names(tmp_path) == {"source"}
    code, printed = run("convert", source, tmp_path / "out", "--no-compare")
    assert code == 0, printed
    assert names(tmp_path / "out") == CONVERTED
    assert names(tmp_path) == {"source", "out"}  # nothing is left of a run that was killed


@pytest.mark.parametrize(
    ("stage", "fault"), [("write", "full disk"), ("write", "read-only"), ("conversion_card", "read-only")]
)
def test_convert_says_where_it_cannot_write(run: Run, source: Path, tmp_path: Path, stage: str, fault: str) -> None:
    code, printed = run("convert", source, tmp_path / "out", "--no-compare", stage=CONVERT + stage, fault=fault)
    assert_ended(fault, code, printed)
    assert printed.startswith("Error: out cannot be written: ")
    assert names(tmp_path) == {"source"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["SIGINT", "read-only"])
def test_an_interrupted_overwrite_keeps_what_was_there(run: Run, source: Path, tmp_path: Path, fault: str) -> None:
    assert run("convert", source, tmp_path / "out", "--no-compare")[0] == 0
    (tmp_path / "out" / "mine.txt").touch()
    arguments = ("convert", source, tmp_path / "out", "--no-compare", "--overwrite")
    for stage in ("mobilenet.conversion.convert.conversion_card", "os.replace"):
        assert_ended(fault, *run(*arguments, stage=stage, fault=fault))
        assert names(tmp_path / "out") == {*CONVERTED, "mine.txt"}
        assert names(tmp_path) == {"source", "out"}
    assert run(*arguments)[0] == 0
    assert names(tmp_path / "out") == CONVERTED


# export

EXPORT = "mobilenet.export.export."
EXPORT_STAGES = [EXPORT + name for name in ("load_network", "write", "export_card")]
EXPORT_STAGES += ["os.replace"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    MobileNetForImageClassification(MobileNetConfig("mobilenet_v1", 0.01, image_size=32)).save_pretrained(folder)
    MobileNetImageProcessor.from_recipe("google", 32).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "fault"),
    [*everywhere(EXPORT_STAGES, ("SIGINT", "SIGKILL", "SIGTERM")), (EXPORT + "write", "full disk")],
)
def test_export_survives(run: Run, model: Path, tmp_path: Path, stage: str, fault: str) -> None:
    pytest.importorskip("transformers.exporters", reason="transformers is too old to export: 5.23 has exporters")
    before = checksums(model)
    assert_ended(fault, *run("export", model, tmp_path / "out", stage=stage, fault=fault))
    assert not (tmp_path / "out").exists()
    assert checksums(model) == before
    if fault != "SIGKILL":
        assert names(tmp_path) == {"model"}
    if fault == "SIGKILL":
        code, printed = run("export", model, tmp_path / "out")
        assert code == 0, printed
        assert {"model.onnx", "README.md"} <= names(tmp_path / "out")
        assert names(tmp_path) == {"model", "out"}


# train

TRAIN_STAGES = [
    "mobilenet.training.run.load_splits",
    "mobilenet.training.run.decode",
    "mobilenet.training.trainer.ClassifierTrainer.compute_loss",
    "mobilenet.training.trainer.ClassifierTrainer._save_checkpoint",
    "mobilenet.training.trainer.ClassifierTrainer.evaluate",
    "mobilenet.training.run._finish",
    "mobilenet.training.run.write_card",
]


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    """Images of two classes."""
    random = np.random.default_rng(0)
    for name, color in {"blue": (40, 60, 200), "red": (200, 50, 40)}.items():
        (tmp_path / "colors" / name).mkdir(parents=True)
        for index in range(12):
            pixels = random.normal(color, 30, (20, 24, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "colors" / name / f"{index:02}.png")
    return tmp_path / "colors"


def training(colors: Path, output: Path) -> list[object]:
    options = "--width 0.05 --image-size 32 --epochs 1 --batch-size 8 --validation 0.2 --precision float32"
    return ["train", colors, "--output", output, *options.split()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        *everywhere(TRAIN_STAGES, SIGNALS),
        ("mobilenet.training.trainer.ClassifierTrainer._save_checkpoint", "full disk"),
        ("mobilenet.training.run._finish", "full disk"),
        ("mobilenet.training.run._prepare_work", "read-only"),
    ],
)
@pytest.mark.skipif(not is_accelerate_available(), reason="accelerate is not installed")
def test_train_survives(run: Run, colors: Path, tmp_path: Path, stage: str, fault: str) -> None:
    before = checksums(colors)
    code, printed = run(*training(colors, tmp_path / "out"), stage=stage, fault=fault)
    assert_ended(fault, code, printed)
    assert not (tmp_path / "out").exists()
    assert checksums(colors) == before
    work = tmp_path / "out.training"
    begun = work.exists() and any(work.glob("checkpoint-*"))
    assert begun or fault == "SIGKILL" or not work.exists()
    for checkpoint in work.glob("checkpoint-*"):
        assert {"model.safetensors", "optimizer.pt", "average.safetensors", "trainer_state.json"} <= names(checkpoint)
    code, printed = run(*training(colors, tmp_path / "out"))
    assert code == 0, printed
    assert ("resuming from" in printed) == begun
    assert names(tmp_path / "out") >= CONVERTED
    assert names(tmp_path) == {"colors", "out"}
