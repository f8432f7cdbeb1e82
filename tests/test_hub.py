"""Repositories that travel: saved, pushed and fine-tuned, then loaded by fresh processes that lack the package."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import variants
from hub import Fault, Hub, ask
from oracles import randomize_norms
from packaging.version import Version
from PIL import Image
from released import CODE

from mobilenet import (
    MobileNetConfig,
    MobileNetForImageClassification,
    MobileNetForObjectDetection,
    MobileNetForSemanticSegmentation,
    MobileNetImageProcessor,
)
from mobilenet.conversion import ConversionError
from mobilenet.conversion.convert import convert


ROOT = Path(__file__).parents[1]
CLIENT = Path(__file__).parent / "client.py"
AUTO_MAP = {
    "AutoConfig": "configuration_mobilenet.MobileNetConfig",
    "AutoModel": "modeling_mobilenet.MobileNetModel",
    "AutoModelForImageClassification": "modeling_mobilenet.MobileNetForImageClassification",
    "AutoModelForObjectDetection": "modeling_mobilenet.MobileNetForObjectDetection",
    "AutoModelForSemanticSegmentation": "modeling_mobilenet.MobileNetForSemanticSegmentation",
    "AutoBackbone": "modeling_mobilenet.MobileNetBackbone",
}
TRUSTED = ("--trust", "true")
LABELS = ("owl", "parrot", "burger")

Client = Callable[..., dict[str, Any]]


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[Hub]:
    """An empty Hub, with LFS as on huggingface.co unless a test's parameter says otherwise."""
    with Hub(lfs=getattr(request, "param", True)) as hub:
        yield hub


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "noise.png"
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
def expected(original: Path, image: Path) -> list[list[float]]:
    """Logits of the small classifier."""
    inputs = MobileNetImageProcessor.from_pretrained(original)(Image.open(image), return_tensors="pt")
    with torch.no_grad():
        return MobileNetForImageClassification.from_pretrained(original)(**inputs).logits.tolist()


@pytest.fixture(scope="module")
def clients() -> Iterator[subprocess.Popen]:
    """A process that forks clients."""
    command = [sys.executable, "-I", str(CLIENT), "serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield server


@pytest.fixture
def client(clients: subprocess.Popen, image: Path, tmp_path_factory: pytest.TempPathFactory) -> Client:
    """Run client.py in a fresh process, with empty caches unless `home` names used ones; return what it prints."""

    def run(
        hub: Hub, source: object, *options: object, home: Path | None = None, fails: bool = False, **variables: str
    ) -> Any:
        home = home or tmp_path_factory.mktemp("home")
        order = {
            "arguments": list(map(str, (source, image, *options))),
            "environment": hub.environment(home, **variables),
            "folder": str(home),
        }
        print(json.dumps(order), file=clients.stdin, flush=True)
        if bool(int(clients.stdout.readline())) != fails:
            pytest.fail((home / "stderr").read_text())
        if fails:
            return (home / "stderr").read_text()
        output = (home / "stdout").read_text()
        assert "Do you wish to run the custom code?" not in output
        return json.loads(output.splitlines()[-1])

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
    check_all(client(hub, original, *TRUSTED, "--all"), expected)
    assert not hub.log  # a folder asks nobody


def test_saved_after_loading_with_trust(
    hub: Hub, client: Client, original: Path, expected: list, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    assert client(hub, original, *TRUSTED, "--save", copy)["logits"] == expected
    check_folder(copy)
    check_all(client(hub, copy, *TRUSTED, "--all"), expected)


@pytest.mark.parametrize(
    ("hub", "how"),
    [(False, TRUSTED), (True, ("--package", ROOT, "--trust", "false"))],
    ids=["with trust", "by the package through LFS"],
    indirect=["hub"],
)
def test_pushed(hub: Hub, client: Client, original: Path, expected: list, how: tuple) -> None:
    assert client(hub, original, *how, "--push", "someone/pushed")["logits"] == expected
    assert bool(hub.objects) == hub.lfs
    check_files(hub.files("someone/pushed"))
    check_all(client(hub, "someone/pushed", *TRUSTED, "--all"), expected)


def test_fine_tuned_keeps_its_code(hub: Hub, client: Client, original: Path, expected: list, tmp_path: Path) -> None:
    """Source: transformers issues 24737 and 29714, repositories that lost their .py files so."""
    hub.publish("someone/original", original)
    tuned = client(hub, "someone/original", *TRUSTED, "--train", "--save", tmp_path / "a", "--push", "someone/tuned")
    assert tuned["logits"] != expected
    check_folder(tmp_path / "a")
    check_files(hub.files("someone/tuned"))
    again = client(hub, "someone/tuned", *TRUSTED, "--save", tmp_path / "b", "--push", "someone/again")
    assert again["logits"] == tuned["logits"]
    check_folder(tmp_path / "b")
    check_files(hub.files("someone/again"))
    check_all(client(hub, "someone/again", *TRUSTED, "--all"), tuned["logits"])


OWN_CODE = """
import torch
from .configuration_mobilenet import MobileNetConfig
from .modeling_mobilenet import MobileNetForImageClassification

class Calibrated(MobileNetForImageClassification):
    def __init__(self, config):
        super().__init__(config)
        self.temperature = torch.nn.Parameter(torch.full((1,), 4.0))

class CalibratedConfig(MobileNetConfig):
    pass

Calibrated.config_class = CalibratedConfig
Calibrated.register_for_auto_class("AutoModelForImageClassification")
CalibratedConfig.register_for_auto_class()
"""


def test_a_class_of_ones_own_is_saved_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass in a file beside copies of these: what loads is that subclass; what nobody runs is not named."""
    package = tmp_path / "own_package"
    package.mkdir()
    for name in CODE:
        shutil.copy(ROOT / name, package)
    (package / "calibrated.py").write_text(OWN_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_package.calibrated")
    model = own.Calibrated(own.CalibratedConfig(width_multiplier=0.1, num_labels=3))
    torch.nn.init.constant_(model.temperature, 5.0)
    model.config.auto_map = {"AutoBackbone": "elsewhere.Backbone"}
    model.save_pretrained(tmp_path / "saved")
    auto_map = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    classes = {
        "AutoConfig": "calibrated.CalibratedConfig",
        "AutoModelForImageClassification": "calibrated.Calibrated",
    }
    assert auto_map == AUTO_MAP | classes
    if Version(transformers.__version__) < Version("5"):
        return  # it copies what a local file imports, but not what that imports in turn
    load = (
        "import sys; from transformers import AutoModelForImageClassification as Auto;"
        "model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True);"
        "print(type(model).__name__, type(model.config).__name__, model.temperature.item())"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    output = subprocess.run(
        [sys.executable, "-c", load, tmp_path / "saved"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == ["Calibrated", "CalibratedConfig", "5.0"]


@pytest.fixture
def versions(hub: Hub, original: Path, tmp_path: Path) -> dict[str, str]:
    """Two commits of a repository by their names; the first one has the tag v1."""
    first = hub.publish("someone/versions", original)
    hub.tag("someone/versions", "v1")
    model = MobileNetForImageClassification.from_pretrained(original)
    randomize_norms(model).save_pretrained(tmp_path)
    second = hub.publish("someone/versions", {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()})
    return {"first": first, "second": second}


def test_by_id_tag_and_commit(hub: Hub, client: Client, versions: dict[str, str], expected: list) -> None:
    def logits_at(revision: str) -> list:
        return client(hub, "someone/versions", *TRUSTED, "--revision", revision)["logits"]

    assert logits_at("v1") == expected
    assert logits_at(versions["first"]) == expected
    assert logits_at("main") == logits_at(versions["second"]) != expected


def asked_for_code(hub: Hub) -> bool:
    return any(request.endswith(".py") for request in hub.log)


@pytest.mark.parametrize("trust", ["false", "null"])
def test_without_trust_no_code_runs(hub: Hub, client: Client, original: Path, trust: str) -> None:
    hub.publish("someone/original", original)
    error = client(hub, "someone/original", "--trust", trust, fails=True)
    assert "trust_remote_code=True" in error.splitlines()[-1]
    assert not asked_for_code(hub)


@pytest.mark.parametrize(
    "trust",
    [
        "false",
        "null",
        pytest.param(
            "true",
            marks=pytest.mark.xfail(
                Version(transformers.__version__) < Version("5.10"),
                reason="transformers before 5.10 runs what is trusted even where it is not needed",
                strict=True,
            ),
        ),
    ],
)
def test_with_the_package_no_trust_is_needed(
    hub: Hub, client: Client, original: Path, expected: list, trust: str
) -> None:
    """By the Auto classes and by a pipeline: nobody is asked, and no code is downloaded."""
    hub.publish("someone/original", original)
    result = client(hub, "someone/original", "--package", ROOT, "--trust", trust, "--all")
    assert result["logits"] == expected
    assert all(name.startswith("mobilenet.") for name in result["classes"])
    assert not asked_for_code(hub)


def test_with_the_package_nobody_is_asked_for_code_elsewhere(
    hub: Hub, client: Client, original: Path, expected: list
) -> None:
    hub.publish("someone/original", original)
    fields = json.loads((original / "config.json").read_text())
    fields["auto_map"] = {auto: f"evil/code--{where}" for auto, where in fields["auto_map"].items()}
    evil = {auto: f"evil/code--image_processing_mobilenet.{auto}" for auto in ("AutoImageProcessor", "AutoProcessor")}
    processor = json.loads((original / "preprocessor_config.json").read_text()) | {"auto_map": evil}
    video = {"auto_map": {"AutoVideoProcessor": "evil/code--image_processing_mobilenet.MobileNetVideoProcessor"}}
    documents = {
        "config.json": fields,
        "preprocessor_config.json": processor,
        "video_preprocessor_config.json": video,
    }
    hub.publish("someone/original", {name: json.dumps(document).encode() for name, document in documents.items()})
    hub.publish("evil/code", dict.fromkeys(CODE, b"raise SystemExit('code from elsewhere ran')"))
    result = client(hub, "someone/original", "--package", ROOT, "--all")
    assert result["logits"] == expected
    assert not [request for request in hub.log if "evil" in request]


@pytest.mark.parametrize("task", ["object-detection", "image-segmentation"])
def test_pipelines_that_look_for_a_tokenizer_ask_for_no_code(
    hub: Hub, client: Client, task: str, tmp_path: Path
) -> None:
    """Whatever tokenizer_config.json and config.json name, nobody is asked for it, and none of it is downloaded."""
    if task == "object-detection":
        config = MobileNetConfig(width_multiplier=0.1, num_labels=3, detector="ssdlite_mobilenet_v2")
        MobileNetForObjectDetection(config).save_pretrained(tmp_path)
        MobileNetImageProcessor.from_recipe("ssd", 64).save_pretrained(tmp_path)
    else:
        config = MobileNetConfig(width_multiplier=0.1, num_labels=3, segmentation_head="lraspp")
        MobileNetForSemanticSegmentation(config).save_pretrained(tmp_path)
        MobileNetImageProcessor.from_recipe("deeplab", 64).save_pretrained(tmp_path)
    evil = {"AutoTokenizer": ["evil/code--tokenization_mobilenet.MobileNetTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": evil}))
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"auto_map": fields["auto_map"] | evil}))
    hub.publish("someone/other", tmp_path)
    hub.publish("evil/code", {"tokenization_mobilenet.py": b"raise SystemExit('code from elsewhere ran')"})
    client(hub, "someone/other", "--package", ROOT, "--pipeline", task)
    assert not [request for request in hub.log if "evil" in request]
    assert not asked_for_code(hub)


def test_many_checkpoints_share_one_repository_of_code(
    hub: Hub, client: Client, original: Path, expected: list, tmp_path: Path
) -> None:
    """Two checkpoints without code; one of them, saved, carries its code again."""
    hub.publish("someone/code", dict.fromkeys(CODE, b"raise RuntimeError('an earlier version')"))
    hub.tag("someone/code", "v0")
    hub.publish("someone/code", {name: (ROOT / name).read_bytes() for name in CODE})
    files = {path.name: path.read_bytes() for path in original.iterdir() if path.suffix != ".py"}
    for name in ("config.json", "preprocessor_config.json"):
        fields = json.loads(files[name])
        fields["auto_map"] = {auto: f"someone/code--{where}" for auto, where in fields["auto_map"].items()}
        files[name] = json.dumps(fields).encode()
    hub.publish("someone/one", files)
    hub.publish("someone/two", files)
    check_all(client(hub, "someone/one", *TRUSTED, "--all"), expected)
    assert client(hub, "someone/two", *TRUSTED, "--save", tmp_path / "saved")["logits"] == expected
    check_folder(tmp_path / "saved")
    assert "an earlier version" in client(hub, "someone/two", *TRUSTED, "--code-revision", "v0", fails=True)


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(
            "cache",
            marks=pytest.mark.xfail(
                Version("5.10") <= Version(transformers.__version__) < Version("5.13"),
                reason="transformers 5.10 to 5.12 follow the cache's links, and miss the files beside",
                strict=True,
            ),
        ),
        "folder",
    ],
)
def test_downloaded_whole(
    hub: Hub, client: Client, original: Path, expected: list, tmp_path: Path, folder: str
) -> None:
    hub.publish("someone/original", original)
    where = folder if folder == "cache" else tmp_path / folder
    check_all(client(hub, "someone/original", *TRUSTED, "--snapshot", where, "--all"), expected)


def test_offline_once_the_cache_is_warm(
    hub: Hub, client: Client, original: Path, expected: list, tmp_path: Path
) -> None:
    hub.publish("someone/original", original)
    check_all(client(hub, "someone/original", *TRUSTED, "--all", home=tmp_path), expected)
    hub.log.clear()
    check_all(client(hub, "someone/original", *TRUSTED, "--all", home=tmp_path, HF_HUB_OFFLINE="1"), expected)
    assert not hub.log


WEIGHTS = "GET /lfs/"


def test_a_cut_download_is_tried_again(
    hub: Hub, client: Client, original: Path, expected: list, tmp_path: Path
) -> None:
    hub.publish("someone/original", original)
    hub.faults.append(Fault(WEIGHTS, "cut", times=1))
    try:
        result = client(hub, "someone/original", *TRUSTED, home=tmp_path)
    except pytest.fail.Exception:  # huggingface_hub before 1 leaves it to the next call
        result = client(hub, "someone/original", *TRUSTED, home=tmp_path)
    assert result["logits"] == expected
    assert sum(request.startswith("GET /lfs/") for request in hub.log) == 2


def test_a_killed_download_starts_again(
    hub: Hub, client: Client, original: Path, expected: list, image: Path, tmp_path: Path
) -> None:
    hub.publish("someone/original", original)
    hub.faults.append(Fault(WEIGHTS, "stall", times=1))
    command = [sys.executable, "-I", str(CLIENT), "someone/original", str(image), *TRUSTED]
    with subprocess.Popen(command, env=hub.environment(tmp_path), cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        assert hub.stalled.wait(120)
        process.kill()
    assert client(hub, "someone/original", *TRUSTED, home=tmp_path)["logits"] == expected


@pytest.fixture
def google(hub: Hub, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Id of a checkpoint that this process asks the loopback Hub for, without pauses between attempts."""
    ask(hub.url, tmp_path / "cache", monkeypatch)
    hub.publish("google/mobilenet_v1_0.25_128", data / "checkpoints" / "google_mobilenet_v1_0.25_128")
    return "google/mobilenet_v1_0.25_128"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(".", 401), "401"),
        (Fault(".", 429), "429"),
        (Fault(".", 500), "500"),
        (Fault("GET .*/config.json", "cut"), "cannot be downloaded"),
        (Fault(WEIGHTS, 500), "500"),
        (Fault(WEIGHTS, "cut"), "cannot be downloaded"),
        (Fault("/config.json", "etag"), "config.json: is not what the Hub announced"),
    ],
    ids=lambda value: f"{value.kind} on {value.pattern}" if isinstance(value, Fault) else "",
)
def test_a_failing_hub_ends_a_conversion(hub: Hub, google: str, tmp_path: Path, fault: Fault, message: str) -> None:
    """Nothing is written; when the Hub is well again, what it already sent is good."""
    folder = tmp_path / "converted"
    folder.mkdir()
    hub.faults.append(fault)
    with pytest.raises(ConversionError, match=message):
        convert(google, folder / "mobilenet", compare=False)
    assert not list(folder.iterdir())
    hub.faults.clear()
    if fault.kind == "etag":
        shutil.rmtree(tmp_path / "cache")
    convert(google, folder / "mobilenet", compare=False)
    check_folder(folder / "mobilenet")
    (commit,) = hub.repositories[google].refs.values()
    assert commit in (folder / "mobilenet" / "README.md").read_text()


@pytest.mark.any_version  # huggingface_hub before 1, and so transformers before 5, asks six times, aloud
@pytest.mark.parametrize("command", ["classify --example --model", "convert"])
def test_a_dead_hub_is_one_error_at_once(hub: Hub, tmp_path: Path, command: str) -> None:
    environment = hub.environment(tmp_path, HF_ENDPOINT="http://127.0.0.1:1", PYTHONPATH=str(ROOT))
    arguments = [*command.split(), "someone/mobilenet", *(["out"] if command == "convert" else [])]
    done = subprocess.run(
        [sys.executable, "-m", "mobilenet.cli", *arguments],
        **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": False, "timeout": 25},
    )
    assert done.returncode == 1
    assert re.search("^Error: someone/mobilenet.* the Hub does not answer", done.stderr, re.MULTILINE)
    assert "Retrying" not in done.stderr


@pytest.mark.slow
def test_a_checkpoint_of_google_converts_and_classifies_by_id(
    hub: Hub, data: Path, cats: Path, tmp_path: Path
) -> None:
    """From one Hub id to another, with the commands alone."""

    def run(*command: object) -> str:
        environment = hub.environment(tmp_path / "home", PYTHONPATH=str(ROOT))
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    source = "google/mobilenet_v2_1.0_224"
    commit = hub.publish(source, data / "checkpoints" / source.replace("/", "_"))
    hub.tag(source, "v1")
    hub.publish(source, {"model.safetensors": b"a later version"})
    run(ROOT / "convert_checkpoint.py", source, "converted", "--revision", "v1")
    assert commit in (tmp_path / "converted" / "README.md").read_text()
    hub.publish("someone/converted", tmp_path / "converted")
    answer = run("-m", "mobilenet.cli", "classify", cats, "--model", "someone/converted", "--json", "--top-k", 1)
    (best,) = json.loads(answer)["predictions"]
    assert best["label"] == "tabby, tabby cat"
    assert best["score"] == pytest.approx(0.7847, abs=1e-3)
    assert not asked_for_code(hub)
    run("-m", "mobilenet.cli", "verify", "converted", "--against", "someone/converted")


def test_a_repository_of_transformers_js_converts_by_id(hub: Hub, tmp_path: Path) -> None:
    """Where a repository has no weights of torch, its ONNX file is fetched, and nothing else."""
    for module in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    path, _ = variants.write(variants.Variant(2, width=0.35, size=32, suffix=".onnx"), tmp_path)
    config = {"model_type": "mobilenet_v2", "id2label": {str(index): f"kind {index}" for index in range(5)}}
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "crop_size": {"height": 32, "width": 32}}
    files = {"config.json": config, "preprocessor_config.json": processor}
    files = {name: json.dumps(fields).encode() for name, fields in files.items()}
    hub.publish("onnx-community/small", {**files, "onnx/model.onnx": path.read_bytes(), "onnx/model_int8.onnx": b""})
    command = [sys.executable, "-m", "mobilenet.cli", "convert", "onnx-community/small", "output", "--no-compare"]
    environment = hub.environment(tmp_path / "home", PYTHONPATH=str(ROOT))
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    written = {path.name: path for path in (tmp_path / "output").iterdir()}
    assert json.loads(written["config.json"].read_text())["id2label"]["4"] == "kind 4"
    assert json.loads(written["preprocessor_config.json"].read_text())["image_mean"] == [0.1, 0.2, 0.3]
    assert hub.repositories["onnx-community/small"].refs["main"] in written["README.md"].read_text()
    assert not any("int8" in request for request in hub.log)
