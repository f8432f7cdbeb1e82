"""What a hostile repository tries: SECURITY.md says what comes of it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from typer import BadParameter

from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor
from mobilenet.cards import Measured, export_card, read_card, write_card
from mobilenet.cli.train import _read_config
from mobilenet.conversion import ConversionError, read_source
from mobilenet.conversion.convert import convert
from mobilenet.conversion.labels import read_labels
from mobilenet.export.compare import Comparison
from mobilenet.loading import load
from mobilenet.pretrained import load_network
from mobilenet.repository import check_output


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What is there once hostile code has run."""
    return tmp_path / "mark"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    MobileNetForImageClassification(MobileNetConfig(width_multiplier=0.35)).save_pretrained(folder)
    MobileNetImageProcessor().save_pretrained(folder)
    return folder


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
@pytest.mark.parametrize(
    "read",
    [
        read_source,
        lambda path: read_labels(path, 2),
        lambda path: _read_config(SimpleNamespace(), Path(path)),
        lambda path: check_output(Path(path).parent, True, ""),
        lambda path: read_card(str(Path(path).parent)),
    ],
    ids=["source", "labels", "config", "config.json of the output", "card"],
)
def test_nobody_waits_for_pipes(tmp_path: Path, read: Callable[[str], object]) -> None:
    for name in ("model.pth", "README.md", "config.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises((OSError, ValueError, BadParameter), match=r"not a regular file|is no model repository"):
        read(str(tmp_path / "model.pth"))


def load_model(folder: Path) -> object:
    return AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False)


def convert_beside(folder: Path) -> object:
    return convert(str(folder), folder.with_name("converted"), compare=False)


def write_pickle(folder: Path, content: object) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(content, file, protocol=2)


def write_torch(folder: Path, content: object) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, folder / "pytorch_model.bin")


@pytest.mark.parametrize("write", [write_pickle, write_torch])
@pytest.mark.parametrize("use", [load_model, load])
def test_a_pickle_in_a_repository_runs_nothing(
    repository: Path, mark: Path, write: Callable[[Path, object], None], use: Callable[[Path], object]
) -> None:
    tensors = load_file(repository / "model.safetensors")
    write(repository, {**tensors, "payload": Payload(mark)})
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError)):
        use(str(repository))
    assert not mark.exists()


def test_an_adapter_does_not_lead_to_another_network(repository: Path) -> None:
    """With PEFT, transformers would load the one that the adapter's file names."""
    (repository / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/weights"}))
    with pytest.raises(ValueError, match="it holds an adapter, which must be merged first"):
        load_network(str(repository))


@pytest.mark.parametrize("write", [write_pickle, write_torch])
def test_a_pickle_in_a_source_runs_nothing(
    data: Path, tmp_path: Path, mark: Path, write: Callable[[Path, object], None]
) -> None:
    source = Path(shutil.copytree(data / "checkpoints" / "google_mobilenet_v1_0.25_128", tmp_path / "source"))
    write(source, {"payload": Payload(mark)})
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin: "):
        convert_beside(source)
    assert not mark.exists()


ELSEWHERE = {
    "another repository": {"auto_map": {"AutoModelForImageClassification": "evil/code--payload.Model"}},
    "another file": {"auto_map": {"AutoConfig": "payload.Config"}},
    "a file outside": {"auto_map": {"AutoConfig": "../payload.Config"}},
    "trust in itself": {"trust_remote_code": True, "auto_map": {"AutoConfig": "payload.Config"}},
    "a pipeline": {"custom_pipelines": {"image-classification": {"impl": "payload.Pipeline"}}},
}


@pytest.mark.parametrize("trust", [False, None])
@pytest.mark.parametrize("fields", ELSEWHERE.values(), ids=ELSEWHERE)
def test_configurations_that_name_code_elsewhere_run_none(
    repository: Path, mark: Path, fields: dict, trust: bool | None
) -> None:
    """With the package imported, it is the package's code that runs."""
    for folder in (repository, repository.parent):
        (folder / "payload.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    for name in ("config.json", "preprocessor_config.json"):
        path = repository / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert type(AutoConfig.from_pretrained(repository, trust_remote_code=trust)) is MobileNetConfig
    assert type(AutoImageProcessor.from_pretrained(repository, trust_remote_code=trust)) is MobileNetImageProcessor
    model = AutoModelForImageClassification.from_pretrained(repository, trust_remote_code=trust)
    assert type(model) is MobileNetForImageClassification
    label = load(str(repository)).label
    assert [label(0), label(1)] == ["LABEL_0", "LABEL_1"]
    assert not mark.exists()
    model.save_pretrained(repository.with_name("saved"))
    saved = json.loads(repository.with_name("saved").joinpath("config.json").read_text())
    assert saved["auto_map"] == MobileNetConfig().to_dict()["auto_map"]


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_configurations_cannot_fetch_kernels(repository: Path, field: str) -> None:
    """Source: CVE-2026-4372, in transformers before 5.3: such a repository's code ran, trusted or not."""
    path = repository / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: "evil/kernel"}))
    try:
        implementation = AutoConfig.from_pretrained(repository, trust_remote_code=False)._attn_implementation
    except ValueError:
        implementation = None
    assert implementation is None
    with pytest.raises(ValueError, match="must be a name, not a repository, got 'evil/kernel'"):
        MobileNetConfig(_attn_implementation="evil/kernel")


HOSTILE = "a`\n---\nlicense: mit\n---\n| <img src=x onerror=alert(1)> [x](javascript:y) \x1b[31m"


def check_card(path: Path) -> ModelCard:
    assert "\x1b" not in path.read_text()
    assert "\n---\nlicense: mit" not in path.read_text()
    card = ModelCard.load(path)
    page = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.text)
    tokens = [token for block in page for token in (block, *(block.children or []))]
    assert "table_open" in {token.type for token in tokens}
    assert not [token.content for token in tokens if token.type.startswith("html")]
    assert not [token.attrs for token in tokens if "javascript:" in str(token.attrs.get("href"))]
    return card


def test_names_cannot_write_into_the_card_of_a_conversion(data: Path, tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "")
    source = shutil.copytree(data / "checkpoints" / "google_mobilenet_v1_0.25_128", tmp_path / name)
    fields = json.loads(Path(source, "config.json").read_text())
    fields["id2label"] = {str(index): f"{HOSTILE}{index}" for index in range(1001)}
    Path(source, "config.json").write_text(json.dumps(fields))
    convert_beside(Path(source))
    assert check_card(tmp_path / "converted" / "README.md").data.license == "apache-2.0"


def test_labels_cannot_write_into_the_card_of_a_training(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed: pip install -e '.[train]'")
    options = SimpleNamespace(
        task="classification",
        dataset=HOSTILE,
        output=HOSTILE,
        model=None,
        subset=None,
        revision=None,
        image_column=HOSTILE,
        label_column=None,
        label_names=None,
        skip_unreadable=False,
    )
    config = MobileNetConfig(width_multiplier=0.35, id2label={0: HOSTILE, 1: "cat"})
    measured = {HOSTILE: Measured(2, {"accuracy": 1.0}, [1.0, 1.0])}
    write_card(tmp_path, options, MobileNetForImageClassification(config), measured, f"mobilenet train {HOSTILE}")
    assert "license" not in check_card(tmp_path / "README.md").data.to_dict()


def test_names_cannot_write_into_the_card_of_an_export(tmp_path: Path) -> None:
    source = tmp_path / HOSTILE.replace("/", "")
    source.mkdir()
    rows = [Comparison("ONNX", 8, 0.0, 1.0, 1.0, 1.0)]
    for target in ("onnx", "transformers.js"):
        card = export_card(str(source), target, MobileNetConfig(), (224, 224), Comparison.COLUMNS, rows)
        card.save(tmp_path / "README.md")
        assert "license" not in check_card(tmp_path / "README.md").data.to_dict()
