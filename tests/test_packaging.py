"""The ways to get the code: a clone, a wheel, an sdist, an editable install, and a repository's own folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor


ROOT = Path(__file__).parents[1]
CODE = (
    "architectures_mobilenet",
    "configuration_mobilenet",
    "convert_checkpoint",
    "cpu_mobilenet",
    "detection_mobilenet",
    "image_processing_mobilenet",
    "layers_mobilenet",
    "modeling_mobilenet",
    "postprocessing_mobilenet",
    "preprocessing_mobilenet",
    "segmentation_mobilenet",
)
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.onnx", "mobilenet/model.safetensors", "tests/model.bin")

# What `import mobilenet` gives: every Auto class knows the configuration.
USE = """
import mobilenet
import mobilenet.modeling_mobilenet as modeling
import transformers as t
from transformers.models.auto.image_processing_auto import AutoImageProcessor
config = t.AutoConfig.for_model("mobilenet", width_multiplier=0.25, out_features=["stem", "stage5"])
for auto in (t.AutoModel, t.AutoModelForImageClassification, t.AutoBackbone):
    assert type(auto.from_config(config)).__module__ == "mobilenet.modeling_mobilenet", auto
config.save_pretrained(".")
mobilenet.MobileNetImageProcessor().save_pretrained(".")
assert type(t.AutoConfig.from_pretrained(".")) is mobilenet.MobileNetConfig
assert type(AutoImageProcessor.from_pretrained(".")) is mobilenet.MobileNetImageProcessor
print(modeling.__file__)
"""


def run(*command: object, cwd: Path, **variables: str) -> str:
    """Run a command that sees this interpreter's packages but not this project; return its output."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "PIP_"))}
    environment = inherited | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "home")} | variables
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in a folder of another name, where somebody has put weights everywhere."""
    folder = tmp_path_factory.mktemp("clones") / "my own-mobile.net (copy)"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in (".md", ".py", ".toml", ".txt", "") and path.name != ".git":
            shutil.copy(path, folder)
    for package in ("mobilenet", "tests"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in WEIGHTS:
        (folder / name).write_bytes(b"weights")
    return folder


@pytest.fixture(scope="module")
def distributions(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the sdist, built from the clone."""
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=clone)
    return {path.suffix: path for path in folder.iterdir()}


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """The Python of a new virtual environment, which finds the packages of this one."""
    venv.create(tmp_path / "venv", symlinks=os.name != "nt")
    inside = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    packages = Path(sysconfig.get_path("purelib", "venv", inside))
    (packages / "outside.pth").write_text(sysconfig.get_path("purelib"))
    return Path(sysconfig.get_path("scripts", "venv", inside)) / Path(sys.executable).name


def install(environment: Path, *what: object) -> None:
    pytest.importorskip("pip", reason="pip is not installed")
    pip = (sys.executable, "-m", "pip", "--python", environment, "--isolated", "--quiet", "install")
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run(*pip, *options, *what, cwd=environment.parent)


def wheel_files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_code_inside_the_package_and_no_weights(clone: Path, distributions: dict) -> None:
    files = {name: data for name, data in wheel_files(distributions[".whl"]).items() if "dist-info" not in name}
    assert {name.partition("/")[0] for name in files} == {"mobilenet"}
    assert {path.relative_to(clone).as_posix() for path in (clone / "mobilenet").rglob("*.py")} < set(files)
    assert set(files).isdisjoint(WEIGHTS)
    for name in CODE:
        assert files[f"mobilenet/{name}.py"] == (ROOT / f"{name}.py").read_bytes()


def test_the_sdist_holds_no_weights_and_builds_the_same_wheel(distributions: dict, tmp_path: Path) -> None:
    with tarfile.open(distributions[".gz"]) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert {f"{source.name}/{name}" for name in WEIGHTS}.isdisjoint(names)
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist", cwd=source)
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel_files(wheel) == wheel_files(distributions[".whl"])


def test_the_wheel_registers_everything(environment: Path, distributions: dict, tmp_path: Path) -> None:
    install(environment, distributions[".whl"])
    assert str(tmp_path) in run(environment, "-c", USE, cwd=tmp_path)
    assert "Usage: mobilenet" in run(environment.parent / "mobilenet", "--help", cwd=tmp_path)


def test_an_editable_install_registers_everything(environment: Path, clone: Path, tmp_path: Path) -> None:
    pytest.importorskip("editables", reason="editables is not installed: pip install -e '.[test]'")
    install(environment, "--editable", clone)
    assert Path(run(environment, "-c", USE, cwd=tmp_path).strip()) == clone / "modeling_mobilenet.py"


def test_a_clone_registers_everything(clone: Path, tmp_path: Path) -> None:
    output = run(sys.executable, "-c", USE, cwd=tmp_path, PYTHONPATH=str(clone))
    assert Path(output.strip()) == clone / "modeling_mobilenet.py"


@pytest.mark.any_version
def test_the_converter_runs_as_a_script(clone: Path, tmp_path: Path) -> None:
    assert "Usage: " in run(sys.executable, clone / "convert_checkpoint.py", "--help", cwd=tmp_path)


@pytest.mark.any_version
def test_pytest_finds_the_package_from_a_clone(clone: Path) -> None:
    output = run(sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", "tests/test_packaging.py", cwd=clone)
    assert "test_pytest_finds_the_package_from_a_clone" in output


def test_a_clone_with_weights_is_a_repository(clone: Path, tmp_path: Path) -> None:
    """As on the Hub: code, configuration and weights in one folder, loaded by a process without the package."""
    repository = tmp_path / "clone-1.0 with weights"
    shutil.copytree(clone, repository)
    model = MobileNetForImageClassification(MobileNetConfig(width_multiplier=0.35, image_size=64)).eval()
    model.save_pretrained(tmp_path / "saved")
    processor = MobileNetImageProcessor.from_recipe("google", 64)
    processor.save_pretrained(tmp_path / "saved")
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copy(tmp_path / "saved" / name, repository)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 70, 3), np.uint8))
    image.save(tmp_path / "image.png")
    client = Path(__file__).parent / "client.py"
    output = run(sys.executable, "-I", client, repository, tmp_path / "image.png", "--trust", "true", cwd=tmp_path)
    result = json.loads(output.splitlines()[-1])
    with torch.no_grad():  # as the client does
        expected = model(**processor(image, return_tensors="pt")).logits
    assert result["logits"] == expected.tolist()
    assert all(name.startswith("transformers_modules.") for name in result["classes"])


def imported(file: str) -> set[str]:
    """The files beside it that a file imports by itself."""
    text = (ROOT / f"{file}.py").read_text(encoding="utf-8")
    return set(re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE))


@pytest.mark.parametrize("entry", ["configuration_mobilenet", "image_processing_mobilenet", "modeling_mobilenet"])
def test_files_that_are_loaded_import_all_that_they_need(entry: str) -> None:
    """Before version 5, transformers copies no others; with a model comes its configuration, which is loaded first."""
    given = {entry, *imported(entry)}
    if entry == "modeling_mobilenet":
        given |= {"configuration_mobilenet", *imported("configuration_mobilenet")}
    assert set().union(*map(imported, given)) <= given
