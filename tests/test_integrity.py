"""mobilenet verify: what is as released, and everything that is not."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hub import Hub
from huggingface_hub import HfApi, snapshot_download
from released import CODE
from typer.testing import CliRunner

from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor, integrity
from mobilenet.cli import app


FILES = (*CODE, "config.json", "preprocessor_config.json", "model.safetensors")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    MobileNetForImageClassification(MobileNetConfig(width_multiplier=0.35)).save_pretrained(folder)
    MobileNetImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(released: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(released, tmp_path / "repository"))


@pytest.fixture
def hub(released: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process asks, with the release at the tag v1."""
    with Hub(lfs=True) as hub:
        monkeypatch.setattr(integrity, "HfApi", partial(HfApi, endpoint=hub.url))
        hub.publish("someone/released", released)
        hub.tag("someone/released", "v1")
        yield hub


def run(*arguments: object) -> tuple[int, dict[str, dict]]:
    """Exit code and findings, by file."""
    result = CliRunner().invoke(app, ["verify", *map(str, arguments), "--json"])
    findings = map(json.loads, result.stdout.splitlines())
    return result.exit_code, {finding["file"]: finding for finding in findings}


def test_what_was_saved_here_is_as_released(folder: Path) -> None:
    status, findings = run(folder)
    assert status == 0
    assert tuple(findings) == FILES
    for name, finding in findings.items():
        assert finding["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert ("as in " in finding["verdict"]) == (name in CODE)
        assert finding["verdict"] == "not compared" or name in CODE


def test_the_table_says_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (folder / "\x1b[2J.bin").write_bytes(b"")
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code == 1
    assert "\x1b[2J" not in result.stdout
    for text in (*FILES, "�[2J.bin", hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(), "a pickle"):
        assert text in result.stdout
    hashes = [line.strip() for line in result.stdout.splitlines() if line.startswith(" ")]  # which can be copied
    assert hashes == [finding["sha256"] for finding in run(folder)[1].values() if finding["sha256"]]


def test_against_a_repository_on_the_hub(hub: Hub, folder: Path) -> None:
    status, findings = run(folder, "--against", "someone/released", "--revision", "v1")
    assert status == 0
    assert {finding["verdict"] for finding in findings.values()} == {
        f"as in someone/released at {hub.repositories['someone/released'].refs['v1']}"
    }
    assert not [request for request in hub.log if "/resolve/" in request]  # nothing was downloaded


@pytest.mark.parametrize("name", FILES)
def test_one_byte_more_differs(hub: Hub, folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.write(b"\n")
    for options in ((), ("--against", "someone/released")):
        status, findings = run(folder, *options)
        differs = bool(options) or name in CODE
        assert status == differs
        assert findings[name]["is_problem"] == differs
        assert ("not as in " in findings[name]["verdict"]) == differs
        assert not any(finding["is_problem"] for file, finding in findings.items() if file != name)


def test_a_file_too_many_differs(hub: Hub, folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    assert run(folder)[0] == 0
    status, findings = run(folder, "--against", "someone/released")
    assert status == 1
    assert "not in someone/released" in findings["model-00001-of-00002.safetensors"]["verdict"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--against", "someone/nothing"), "someone/nothing: the Hub has no such repository, or no revision main."),
        (("--against", "someone/released", "--revision", "v9"), "no revision v9."),
        (("--against", "not an id"), "not an id: the Hub has no such repository"),
    ],
)
def test_nothing_to_compare_with(hub: Hub, folder: Path, arguments: tuple, message: str) -> None:
    result = CliRunner().invoke(app, ["verify", str(folder), *arguments])
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_hub_that_does_not_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:1"))
    result = CliRunner().invoke(app, ["verify", str(folder), "--against", "someone/released"])
    assert result.exit_code == 1
    assert "someone/released: the Hub does not answer" in result.stderr


def test_no_repository(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 1
    assert "must be a folder that holds a config.json." in result.stderr


ELSEWHERE = {
    "another repository": {"auto_map": {"AutoModel": "evil/code--modeling_mobilenet.MobileNetModel"}},
    "another file": {"auto_map": {"AutoModel": "payload.Model"}},
    "a file outside": {"auto_map": {"AutoModel": "../payload.Model"}},
    "another class": {"auto_map": {"AutoTokenizer": "modeling_mobilenet.MobileNetModel"}},
    "an old form": {"auto_map": "payload.Model"},
    "a list": {"auto_map": {"AutoTokenizer": ["payload.Slow", "payload.Fast"]}},
    "a pipeline": {"custom_pipelines": {"image-classification": {"impl": "payload.Pipeline"}}},
    "an inner configuration": {"image_processor": {"auto_map": {"AutoImageProcessor": "payload.Processor"}}},
    "a kernel": {"_attn_implementation_internal": "evil/kernel"},
}


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("fields", ELSEWHERE.values(), ids=ELSEWHERE)
def test_configurations_that_run_other_code(folder: Path, name: str, fields: dict) -> None:
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))
    status, findings = run(folder)
    assert status == 1
    assert findings[name]["is_problem"]
    assert "runs other code: " in findings[name]["verdict"]


def test_an_adapter_of_another_repository(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/code"}))
    status, findings = run(folder)
    assert status == 1
    assert "loads another repository: " in findings["adapter_config.json"]["verdict"]


@pytest.mark.parametrize("content", ["{", "[1, 2]", "[" * 100_000, "[" * 900 + "]" * 900])
def test_configurations_that_are_none(folder: Path, content: str) -> None:
    (folder / "processor_config.json").write_text(content)
    status, findings = run(folder)
    assert status == (not content.endswith("]"))
    assert ("no JSON" in findings["processor_config.json"]["verdict"]) == bool(status)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "openvino_x.bin", "training_args.bin", "checkpoint-5/rng_state.PTH"]
)
def test_pickles(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps({}))
    status, findings = run(folder)
    assert status == 1
    assert "a pickle, which can run code" in findings[name]["verdict"]


@pytest.mark.parametrize("index", ["pytorch_model.bin.index.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("name", "file", "verdict"),
    [
        ("w.dat", "w.dat", "a pickle, which can run code"),
        ("part/w.SAFETENSORS", "part/w.SAFETENSORS", "a pickle, which can run code"),
        ("../w.safetensors", None, "loads weights from elsewhere: ../w.safetensors"),
        ("/tmp/w.safetensors", None, "loads weights from elsewhere: /tmp/w.safetensors"),
        ("none.safetensors", None, "names weights that are not there: none.safetensors"),
        (3, None, "loads weights from elsewhere: 3"),
    ],
)
def test_weights_that_an_index_names(folder: Path, index: str, name: object, file: str | None, verdict: str) -> None:
    (folder / "part").mkdir()
    for path in ("w.dat", "part/w.SAFETENSORS"):
        (folder / path).write_bytes(b"weights")
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": {"stem.weight": name}}))
    code, findings = run(folder)
    assert code == 1
    assert verdict in findings[file or index]["verdict"]
    assert findings[file or index]["is_problem"]


def test_exports_are_weights(folder: Path) -> None:
    names = ("model.onnx", "model.pte", "model.tflite", "openvino_model.bin", "openvino_model.xml")
    for name in names:
        (folder / name).write_bytes(b"weights")
    status, findings = run(folder)
    assert status == 0
    assert set(names) < set(findings)


def test_what_git_lfs_puts_in_place_of_weights(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "model.safetensors").write_text(pointer)
    status, findings = run(folder)
    assert status == 1
    assert "run git lfs pull" in findings["model.safetensors"]["verdict"]


@pytest.mark.parametrize("target", ["/etc/hostname", "../secret.safetensors", "/nowhere", "."])
def test_links_out_of_the_folder_are_not_followed(folder: Path, target: str) -> None:
    (folder.parent / "secret.safetensors").write_bytes(b"secret")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(target)
    status, findings = run(folder)
    assert status == 1
    assert "a link" in findings["model.safetensors"]["verdict"]
    assert findings["model.safetensors"]["sha256"] == ""


def test_what_the_cache_holds_is_what_the_hub_announced(hub: Hub, tmp_path: Path) -> None:
    snapshot = Path(
        snapshot_download("someone/released", endpoint=hub.url, cache_dir=tmp_path / "cache", revision="v1")
    )
    assert (snapshot / "model.safetensors").is_symlink()
    assert run(snapshot)[0] == 0
    for name in ("config.json", "model.safetensors"):
        with (snapshot / name).resolve().open("ab") as file:
            file.write(b" ")
        status, findings = run(snapshot)
        assert status == 1
        assert "not what the Hub announced" in findings[name]["verdict"]


def test_a_folder_at_the_root_of_a_disk_may_hold_links() -> None:
    assert integrity._leads_away(Path("/repository"), Path(__file__)).startswith("a link out of the folder, to ")
