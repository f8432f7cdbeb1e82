"""The tests on every version that is supported. `nox` runs them all; arguments after -- go to pytest."""

from __future__ import annotations

import json
from pathlib import Path

import nox


TRANSFORMERS = ("4.57.6", "5.0.0", "5.10.4", "5.23.0", "5.24.0")
BESIDE_TORCHVISION = ("4.57.6", "5.10.4", "5.24.0")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

nox.needs_version = ">=2024.10"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "torchvision", "exchange", "pythons"]
each_version = nox.parametrize("transformers", TRANSFORMERS, ids=TRANSFORMERS)


def install(session: nox.Session, transformers: str) -> None:
    """Install what the tests need: CI's versions, but for what a version of transformers is particular about."""
    particular = ("datasets=", "huggingface_hub=", "transformers=")
    lines = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = Path(session.create_tmp(), "constraints.txt")
    constraints.write_text("\n".join(line for line in lines if not line.startswith(particular)), encoding="utf-8")
    session.install("-c", str(constraints), f"transformers=={transformers}", "-e", ".[test]")
    session.install("-c", str(constraints), "--no-deps", "timm")


@nox.session
@each_version
def tests(session: nox.Session, transformers: str) -> None:
    """Run the tests: all on the newest transformers, those that transformers can change on the others."""
    install(session, transformers)
    marks = ["-m", "" if transformers == TRANSFORMERS[-1] else "not any_version"]
    session.run("python", "tests/transformers_suite.py")
    session.run("pytest", *marks, *session.posargs)


@nox.session
@nox.parametrize("transformers", BESIDE_TORCHVISION, ids=BESIDE_TORCHVISION)
def torchvision(session: nox.Session, transformers: str) -> None:
    """Run the tests of preprocessing and loading where torchvision is installed: it changes what transformers does."""
    install(session, transformers)
    if "real" in session.posargs:
        session.install("-c", "constraints.txt", "torchvision")
    else:
        stub_torchvision(session)
    session.run(
        "pytest",
        "tests/test_image_processing.py",
        "tests/test_hub.py",
        "tests/test_security.py",
        "tests/test_readme.py",
    )


def stub_torchvision(session: nox.Session) -> None:
    """Put into an environment what transformers imports of torchvision, where no build of it fits torch's."""
    where = session.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", silent=True)
    filters = "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS"
    for name, content in {
        "torchvision-0.28.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n",
        "torchvision/__init__.py": "__version__ = '0.28.0'\n",
        "torchvision/io.py": "ImageReadMode = decode_image = None\n",
        "torchvision/transforms/__init__.py": f"import enum\nInterpolationMode = enum.Enum('I', '{filters}')\n",
        "torchvision/transforms/functional.py": "pil_to_tensor = None\n",
        "torchvision/transforms/v2/__init__.py": "",
        "torchvision/transforms/v2/functional.py": "",
    }.items():
        path = Path(where.strip(), name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


# A small network that has never been trained, and an image of noise.
MAKE = """
import sys
import numpy as np
from PIL import Image
from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor
folder = sys.argv[1]
config = MobileNetConfig(width_multiplier=0.35, image_size=64, id2label={0: "owl", 1: "parrot", 2: "burger"})
MobileNetForImageClassification(config).save_pretrained(folder)
MobileNetImageProcessor.from_recipe("timm", 64).save_pretrained(folder)
noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
Image.fromarray(noise).save(folder + "/image.png")
"""


@nox.session(venv_backend="none")
def exchange(session: nox.Session) -> None:
    """Load with each version what each version trained and saved, in the environments of `tests`."""
    folder, root = Path(session.create_tmp()).resolve(), Path.cwd()
    start = folder / "start"

    def run(version: str, *arguments: object) -> str:
        python = session.cache_dir.parent / f"tests-{version.replace('.', '-')}" / "bin" / "python"
        if not python.exists():
            session.error("run nox -s tests first")
        environment = {"HF_HOME": str(folder / version), "HF_HUB_OFFLINE": "1"}
        return session.run(str(python), *map(str, arguments), external=True, silent=True, env=environment)

    def logits(version: str, source: Path, *options: object) -> list[float]:
        output = run(version, "-I", "tests/client.py", source, start / "image.png", *options)
        return json.loads(output.splitlines()[-1])["logits"][0]

    run(TRANSFORMERS[0], "-c", MAKE, start)
    rows = ["| saved by \\ loaded by | " + " | ".join(TRANSFORMERS) + " |", "|---" * (len(TRANSFORMERS) + 1) + "|"]
    for writer in TRANSFORMERS:
        saved = folder / f"by-{writer}"
        expected = logits(writer, start, "--package", root, "--train", "--save", saved)
        cells = []
        for reader in TRANSFORMERS:
            found = logits(reader, saved, "--trust", "true")
            difference = max(abs(a - b) for a, b in zip(found, expected, strict=True))
            if difference > 1e-6:
                session.error(f"{reader} loads what {writer} saved with logits that differ by {difference}")
            cells.append("equal" if difference == 0 else f"within {difference:.0e}")
        rows.append(f"| {writer} | " + " | ".join(cells) + " |")
    session.log("logits by version of transformers:\n" + "\n".join(rows))


# What needs transformers, but no torch: the tables and the configuration, as modules of a folder, as the Hub has them.
CONFIGURE = """
import sys
from types import ModuleType
sys.modules["repository"] = ModuleType("repository")
sys.modules["repository"].__path__ = ["."]
from repository.configuration_mobilenet import PRESETS, MobileNetConfig
for name in PRESETS:
    config = MobileNetConfig.from_preset(name)
    assert MobileNetConfig.from_dict(config.to_dict()).to_dict() == config.to_dict(), name
    assert config.stages and config.stage_names[-1] == f"stage{len(config.stages)}", name
try:
    MobileNetConfig(output_stride=7)
except ValueError as error:
    assert str(error) == "output_stride must be 8, 16 or 32, got 7.", error
"""


@nox.session(python=PYTHONS)
def pythons(session: nox.Session) -> None:
    """Compile every file with each version of Python, and run what needs no torch."""
    session.install("transformers>=4.57", "hatchling")
    session.run("python", "-m", "compileall", "-q", "-f", *map(str, Path().glob("*.py")), "mobilenet", "tests")
    session.run("python", "-W", "error::SyntaxWarning", "-c", CONFIGURE)
    session.run("python", "-m", "hatchling", "build", "-d", session.create_tmp())


@nox.session
def javascript(session: nox.Session) -> None:
    """Run an export in the real transformers.js, with Node."""
    install(session, TRANSFORMERS[-1])
    folder = session.create_tmp()
    session.run("npm", "install", "--prefix", folder, "--ignore-scripts", "@huggingface/transformers", external=True)
    session.run("pytest", "tests/transformers_js.py", env={"NODE_FOLDER": folder})


@nox.session
def torchao(session: nox.Session) -> None:
    """Quantize weights with torchao at loading."""
    install(session, TRANSFORMERS[-1])
    session.install("-c", "constraints.txt", "torchao")
    session.run("pytest", "-n0", "tests/torchao_weights.py")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Fuzz a target of tests/hostile.py: nox -s fuzz -- image -max_total_time=600."""
    install(session, TRANSFORMERS[-1])
    session.install("-c", "constraints.txt", "atheris")
    target, *options = session.posargs
    session.run("python", "tests/fuzz.py", target, str(Path(session.create_tmp(), target)), *options)


@nox.session
def newest(session: nox.Session) -> None:
    """Run the tests on the newest releases of everything."""
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", ".[test]")
    session.install("--upgrade", "--no-deps", "timm")
    session.run("python", "tests/transformers_suite.py")
    session.run("pytest", "-m", "", *session.posargs)
