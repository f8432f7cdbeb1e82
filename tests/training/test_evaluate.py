"""Checkpoints on labeled images."""

import json
from pathlib import Path

import pytest
import torch
from colors import COLORS, options
from torch import nn

from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor
from mobilenet.cards import metric_on_card
from mobilenet.training.evaluate import evaluate_checkpoint
from mobilenet.training.report import class_accuracies, metrics
from mobilenet.training.run import run


RESULT = """model-index:
- name: model
  results:
  - task: {{type: image-classification}}
    dataset: {{type: {id}, name: {name}, split: test}}
    metrics: [{{type: accuracy, name: accuracy, value: {value}}}]"""


def test_a_checkpoint_with_other_labels_is_refused(colors: Path, tmp_path: Path) -> None:
    config = MobileNetConfig(width_multiplier=0.1, id2label={0: "blue", 1: "green", 2: "yellow"})
    MobileNetForImageClassification(config).save_pretrained(tmp_path / "model")
    MobileNetImageProcessor(size=32, crop_size=32).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="labels that the checkpoint has, blue, green, yellow; it has red"):
        evaluate_checkpoint(str(tmp_path / "model"), str(colors))


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config.json", {"width_multiplier": 0.2}, "it lacks weights of the right shape for backbone."),
        ("config.json", {"dtype": "relu"}, "cannot be loaded: "),
        ("config.json", {"model_type": "mobilenet_v2"}, "must be mobilenet, got mobilenet_v2. Convert it first."),
        ("preprocessor_config.json", {"size": 0}, "size must be made of integers from 1 to 65536, got 0"),
        ("model.safetensors", None, "cannot be loaded: "),
    ],
)
def test_a_broken_model_is_one_error(
    colors: Path, tmp_path: Path, file: str, fields: dict | None, message: str
) -> None:
    """Above all, weights that do not fit must not be replaced by random ones in silence."""
    model = tmp_path / "model"
    labels = {"id2label": dict(enumerate(COLORS)), "label2id": {name: index for index, name in enumerate(COLORS)}}
    MobileNetForImageClassification(MobileNetConfig("mobilenet_v1", 0.05, **labels)).save_pretrained(model)
    MobileNetImageProcessor.from_recipe("google", 32).save_pretrained(model)
    path = model / file
    if fields is None:
        path.write_bytes(path.read_bytes()[:999])
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        run(options(colors, tmp_path / "out", model=str(model)))
    with pytest.raises(ValueError, match=message):
        evaluate_checkpoint(str(model), str(colors))
    assert not (tmp_path / "out").exists()


def test_of_several_splits_one_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody measures by accident on what the checkpoint was trained on."""
    monkeypatch.setattr("mobilenet.training.evaluate.load_splits", lambda *_: {"train": None, "extra": None})
    with pytest.raises(ValueError, match="split must be one of train, extra, got None"):
        evaluate_checkpoint(str(Path(__file__).parents[2]), "anything")


def test_classes_without_images_count_for_nothing() -> None:
    logits, labels = torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 1])
    assert class_accuracies(logits, labels) == [1.0, 0.5, None]
    assert metrics(logits, labels) == {"accuracy": 0.75, "balanced_accuracy": 0.75}


def test_labels_count_by_name(colors: Path, tmp_path: Path) -> None:
    """A checkpoint whose labels stand in another order is measured by their names."""
    config = MobileNetConfig(
        width_multiplier=0.1, image_size=32, id2label={0: "red", 1: "other", 2: "green", 3: "blue"}
    )
    model = MobileNetForImageClassification(config)
    nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([0.0, 0.0, 0.0, 9.0])  # always blue
    model.save_pretrained(tmp_path / "model")
    MobileNetImageProcessor(size=32, crop_size=32).save_pretrained(tmp_path / "model")
    measured = evaluate_checkpoint(str(tmp_path / "model"), str(colors))
    assert measured.by_class == {"blue": 1.0, "green": 0.0, "red": 0.0}
    assert measured.metrics["accuracy"] == pytest.approx(1 / 3)
    assert measured.on_card is None


@pytest.mark.parametrize(
    "metadata",
    [
        "[" * 10_000,
        "tags: 5",
        "1: a",
        "model-index: [{name: a, results: [{task: {type: b}, dataset: {type: c, name: set}, source: d}]}]",
        RESULT.format(id="set", name="A set", value="[0.5]"),
        RESULT.format(id="set", name="A set", value="20.0 and more"),
        RESULT.format(id="set", name="A set", value="1" + "0" * 400),
        RESULT.format(id="7", name="7", value="0.5"),
        RESULT.format(id="a/b", name="[set]", value="0.5"),
    ],
)
def test_cards_without_figures_that_can_be_read(tmp_path: Path, metadata: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
    assert metric_on_card(str(tmp_path), "owner/set", "test") is None


IDS_AND_NAMES = [("other/set", "A set"), ("other", "set"), ("other/set", "other/set")]


@pytest.mark.parametrize(("dataset_id", "name"), IDS_AND_NAMES)
def test_figures_on_cards(tmp_path: Path, dataset_id: str, name: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{RESULT.format(id=dataset_id, name=name, value='0.5')}\n---\n")
    assert metric_on_card(str(tmp_path), "owner/set", "test") == 0.5
