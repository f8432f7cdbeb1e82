"""The default checkpoint: the files at the root are a repository, and score what the card says."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from typer.testing import CliRunner

from mobilenet import MobileNetForImageClassification, MobileNetImageProcessor
from mobilenet.cards import metric_on_card
from mobilenet.cli import app
from mobilenet.training.evaluate import evaluate_checkpoint
from mobilenet.training.options import Options


ROOT = Path(__file__).parents[1]
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_it_loads_from_the_root() -> None:
    model = AutoModelForImageClassification.from_pretrained(ROOT, trust_remote_code=False)
    assert list(model.config.id2label.values()) == CLASSES
    assert (model.config.architecture, model.config.width_multiplier) == ("mobilenet_v2", 1.0)
    processor = AutoImageProcessor.from_pretrained(ROOT, trust_remote_code=False)
    side = model.config.image_size
    assert processor.crop_size == {"height": side, "width": side}


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("kind", "name"),
    [(MobileNetForImageClassification, "config.json"), (MobileNetImageProcessor, "preprocessor_config.json")],
)
def test_its_files_are_as_they_would_be_saved(kind: type, name: str, tmp_path: Path) -> None:
    kind.from_pretrained(ROOT).save_pretrained(tmp_path)
    there, saved = (json.loads((folder / name).read_text(encoding="utf-8")) for folder in (ROOT, tmp_path))
    for fields in (there, saved):
        fields.pop("transformers_version", None)
    assert there == saved


def test_its_file_is_small_and_in_float32() -> None:
    weights = ROOT / "model.safetensors"
    assert weights.stat().st_size < 10_000_000
    kinds = {tensor.dtype for name, tensor in load_file(weights).items() if "num_batches_tracked" not in name}
    assert kinds == {torch.float32}


def test_it_is_what_runs_by_default(data: Path) -> None:
    result = CliRunner().invoke(app, ["classify", str(data / "images" / "cat_1080p.jpg"), "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["predictions"][0]["label"] == "cat"


def on_card(row: str) -> list[str]:
    """Cells of the card's table: of each class, and of all."""
    text = ModelCard.load(ROOT / "README.md").text
    assert f"\n| | {' | '.join(CLASSES)} | all |\n" in text
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


# ImageNet's classes (of 1001) that the classifier started from. What stands for deer are antelopes.
KINDS = json.loads((ROOT / "training" / "imagenet_kinds.json").read_text(encoding="utf-8"))
del KINDS["deer"]


@pytest.mark.any_version
def test_it_recognizes_its_kinds_on_photographs(data: Path) -> None:
    """Photographs of ImageNet whose class is one of the ten kinds: the card's table."""
    kinds = {index: kind for kind, indices in KINDS.items() for index in indices}
    with (data / "imagenet_sample" / "labels.csv").open(encoding="utf-8", newline="") as file:
        truth = {row["file"]: kinds.get(int(row["index_1001"])) for row in csv.DictReader(file)}
    truth = {str(data / "imagenet_sample" / name): kind for name, kind in truth.items() if kind}
    result = CliRunner().invoke(app, ["classify", *truth, "--json"])
    assert result.exit_code == 0, result.stderr
    right: Counter[str] = Counter()
    for line in map(json.loads, result.stdout.splitlines()):
        right[truth[line["file"]]] += line["predictions"][0]["label"] == truth[line["file"]]
    total = Counter(truth.values())
    expected = [f"{right[kind]} of {total[kind]}" if total[kind] else "" for kind in CLASSES]
    assert on_card("photographs") == [*expected, f"**{right.total()} of {total.total()}**"]


def test_its_metadata_and_its_table_give_the_same_accuracy() -> None:
    accuracy = metric_on_card(str(ROOT), "uoft-cs/cifar10", "test")
    assert on_card("CIFAR-10")[-1] == f"**{100 * accuracy:.2f} %**"


@pytest.mark.slow
@pytest.mark.any_version
def test_it_scores_what_the_card_says(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 10,000 test images: the card's figure, and its table's for each class."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    measured = evaluate_checkpoint(str(ROOT), str(data / "cifar10"))
    assert (measured.split, measured.images) == ("test", 10_000)
    # Two images of ten thousand may be so close that another machine's rounding decides.
    assert measured.metrics["accuracy"] == pytest.approx(measured.on_card, abs=2e-4)
    *by_class, total = on_card("CIFAR-10")
    assert total == f"**{100 * measured.on_card:.2f} %**"
    shares = [float(cell.removesuffix(" %")) / 100 for cell in by_class]
    assert shares == pytest.approx([measured.by_class[name] for name in CLASSES], abs=2e-3)


def test_its_recipe_is_beside_it() -> None:
    recorded = json.loads((ROOT / "training" / "training.json").read_text(encoding="utf-8"))
    assert recorded["options"]["dataset"] == "uoft-cs/cifar10"
    assert recorded["command"] == Options(**recorded["options"]).command(recorded["processes"])
    assert f"\n{recorded['command']}\n" in (ROOT / "README.md").read_text(encoding="utf-8").replace(" \\\n  ", " ")
