"""Repositories that travel: saved, pushed and fine-tuned, then loaded by fresh processes that lack the package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub import Hub
from oracles import randomize_norms
from PIL import Image

from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor


ROOT = Path(__file__).parents[1]
CLIENT = Path(__file__).parent / "client.py"
CODE = ("configuration_mobilenet.py", "image_processing_mobilenet.py", "modeling_mobilenet.py")
AUTO_MAP = {
    "AutoConfig": "configuration_mobilenet.MobileNetConfig",
    "AutoModel": "modeling_mobilenet.MobileNetModel",
    "AutoModelForImageClassification": "modeling_mobilenet.MobileNetForImageClassification",
    "AutoBackbone": "modeling_mobilenet.MobileNetBackbone",
}
LABELS = ("owl", "parrot", "burger")

Client = Callable[..., dict[str, Any]]


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[Hub]:
    """An empty Hub, with LFS as on huggingface.co unless a test's parameter says otherwise."""
    with Hub(lfs=getattr(request, "param", True)) as hub:
        yield hub


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier and its processor, made with the package and saved."""
    folder = tmp_path_factory.mktemp("original") / "mobilenet-small"
    torch.manual_seed(0)
    config = MobileNetConfig(width_multiplier=0.35, image_size=64, id2label=dict(enumerate(LABELS)))
    randomize_norms(MobileNetForImageClassification(config)).save_pretrained(folder)
    MobileNetImageProcessor.from_recipe("timm", 64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(original: Path, picture: Path) -> list[list[float]]:
    """Logits of the small classifier."""
    inputs = MobileNetImageProcessor.from_pretrained(original)(Image.open(picture), return_tensors="pt")
    with torch.no_grad():
        return MobileNetForImageClassification.from_pretrained(original)(**inputs).logits.tolist()


@pytest.fixture(scope="module")
def clients() -> Iterator[subprocess.Popen]:
    """A process that forks clients."""
    command = [sys.executable, "-I", str(CLIENT), "serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield server


@pytest.fixture
def client(clients: subprocess.Popen, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Client:
    """Run client.py in a fresh process, with empty caches unless `home` names used ones; return what it prints."""

    def run(hub: Hub, source: object, *options: object, home: Path | None = None, **variables: str) -> dict[str, Any]:
        home = home or tmp_path_factory.mktemp("home")
        order = {
            "arguments": list(map(str, (source, picture, *options))),
            "environment": hub.environment(home, **variables),
            "folder": str(home),
        }
        print(json.dumps(order), file=clients.stdin, flush=True)
        if int(clients.stdout.readline()):
            pytest.fail((home / "stderr").read_text())
        return json.loads((home / "stdout").read_text().splitlines()[-1])

    return run


def check_files(files: dict[str, bytes]) -> None:
    """A repository is whole: code as it is at the root, and a map from each Auto class to it."""
    for name in CODE:
        assert files[name] == (ROOT / name).read_bytes()
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP
    assert json.loads(files["preprocessor_config.json"])["auto_map"] == {
        "AutoImageProcessor": "image_processing_mobilenet.MobileNetImageProcessor"
    }


def check_folder(folder: Path) -> None:
    check_files({path.name: path.read_bytes() for path in folder.iterdir()})


def check_all(result: dict[str, Any], expected: list[list[float]]) -> None:
    """Everything that config.json names was loaded with the same weights, from the repository's own code."""
    assert result["logits"] == expected
    assert all(name.startswith("transformers_modules.") for name in result["classes"])
    assert torch.tensor(result["pooled"]).shape == (1, 1280)
    assert result["maps"] == [[1, 16, 32, 32], [1, 112, 2, 2]]
    assert result["last_map_is_last_hidden_state"]
    scores = torch.tensor(expected[0]).softmax(-1)
    assert {a["label"]: a["score"] for a in result["answers"]} == pytest.approx(
        dict(zip(LABELS, scores.tolist(), strict=True))
    )


def test_saved_by_the_package(hub: Hub, client: Client, original: Path, expected: list) -> None:
    check_folder(original)
    check_all(client(hub, original, "--trust", "true"), expected)


def test_saved_after_loading_with_trust(
    hub: Hub, client: Client, original: Path, expected: list, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    assert client(hub, original, "--trust", "true", "--save", copy)["logits"] == expected
    check_folder(copy)
    check_all(client(hub, copy, "--trust", "true"), expected)


@pytest.mark.parametrize(
    ("hub", "how"),
    [(False, ("--trust", "true")), (True, ("--package", ROOT, "--trust", "false"))],
    ids=["with trust", "by the package through LFS"],
    indirect=["hub"],
)
def test_pushed(hub: Hub, client: Client, original: Path, expected: list, how: tuple) -> None:
    assert client(hub, original, *how, "--push", "someone/pushed")["logits"] == expected
    assert bool(hub.objects) == hub.lfs
    check_files(hub.files("someone/pushed"))
    check_all(client(hub, "someone/pushed", "--trust", "true"), expected)


def test_fine_tuned_keeps_its_code(hub: Hub, client: Client, original: Path, expected: list, tmp_path: Path) -> None:
    """Source: transformers issues 24737 and 29714, repositories that lost their .py files so."""
    trusted = ("--trust", "true")
    hub.publish("someone/original", original)
    tuned = client(hub, "someone/original", *trusted, "--train", "--save", tmp_path / "a", "--push", "someone/tuned")
    assert tuned["logits"] != expected
    check_folder(tmp_path / "a")
    check_files(hub.files("someone/tuned"))
    again = client(hub, "someone/tuned", *trusted, "--save", tmp_path / "b", "--push", "someone/again")
    assert again["logits"] == tuned["logits"]
    check_folder(tmp_path / "b")
    check_files(hub.files("someone/again"))
    check_all(client(hub, "someone/again", *trusted), tuned["logits"])
