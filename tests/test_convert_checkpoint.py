"""Conversions, against the runtime of each source."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from oracles import logits
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    MobileNetV1ForImageClassification,
    MobileNetV2ForImageClassification,
    pipeline,
)

import convert_checkpoint
from convert_checkpoint import build, convert
from mobilenet import MobileNetForImageClassification
from mobilenet.conversion import ConversionError, from_google, read_source


GOOGLE = {
    "google_mobilenet_v2_1.0_224": MobileNetV2ForImageClassification,
    "google_mobilenet_v1_0.75_192": MobileNetV1ForImageClassification,
    "google_mobilenet_v1_0.25_128": MobileNetV1ForImageClassification,
}


@pytest.fixture(scope="module")
def converted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real V2 1.0_224, converted and verified."""
    output = tmp_path_factory.mktemp("converted") / "mobilenet_v2_1.0_224"
    convert(str(data / "checkpoints" / "google_mobilenet_v2_1.0_224"), output)
    return output


@pytest.mark.parametrize("name", GOOGLE)
def test_google_logits_equal_those_of_the_native_class(name: str, data: Path, photographs: list[Path]) -> None:
    folder = data / "checkpoints" / name
    checkpoint = read_source(str(folder))[1]
    ours = build(checkpoint, name)
    theirs = GOOGLE[name].from_pretrained(folder).eval()
    assert len(photographs) == 300
    for start in range(0, 300, 20):
        pictures = checkpoint.processor(photographs[start : start + 20], return_tensors="pt").pixel_values
        ours_logits, their_logits = logits(ours, pictures), logits(theirs, pictures)
        torch.testing.assert_close(ours_logits, their_logits, atol=1e-4, rtol=0)
        assert ours_logits.argmax(-1).equal(their_logits.argmax(-1))


def test_snippet_names_the_cats(converted: Path, cats: Path) -> None:
    # As users type it; since this package is imported, its classes are those that load.
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    processor = AutoImageProcessor.from_pretrained(converted, trust_remote_code=True)
    model = AutoModelForImageClassification.from_pretrained(converted, trust_remote_code=True)
    scores = model(**processor(images=Image.open(cats), return_tensors="pt")).logits.softmax(-1)[0]
    assert model.config.id2label[scores.argmax().item()] == "tabby, tabby cat"
    assert scores.max().item() == pytest.approx(0.7847, abs=1e-3)


def test_pipeline_names_the_cats(converted: Path, cats: Path) -> None:
    classify = pipeline("image-classification", model=str(converted), trust_remote_code=True)
    first, second, third = classify(str(cats))[:3]
    assert first == {"label": "tabby, tabby cat", "score": pytest.approx(0.7847, abs=1e-3)}
    assert second == {"label": "tiger cat", "score": pytest.approx(0.1446, abs=1e-3)}
    assert third == {"label": "Egyptian cat", "score": pytest.approx(0.0697, abs=1e-3)}


def test_repository_is_complete(converted: Path) -> None:
    assert {path.name for path in converted.iterdir()} == {
        "README.md",
        "config.json",
        "configuration_mobilenet.py",
        "image_processing_mobilenet.py",
        "model.safetensors",
        "modeling_mobilenet.py",
        "preprocessor_config.json",
    }
    for name in ("configuration", "image_processing", "modeling"):
        source = Path(convert_checkpoint.__file__).with_name(f"{name}_mobilenet.py")
        assert (converted / source.name).read_bytes() == source.read_bytes()
    config = json.loads((converted / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageClassification"].startswith("modeling_mobilenet.")
    assert config["classifier_dropout"] == 0.2  # 0.8 was kept
    processor = json.loads((converted / "preprocessor_config.json").read_text())
    assert processor["auto_map"] == {"AutoImageProcessor": "image_processing_mobilenet.MobileNetImageProcessor"}
    assert (converted / "model.safetensors").stat().st_mode == (converted / "config.json").stat().st_mode


def test_card_tells_the_source_and_the_proof(converted: Path, data: Path) -> None:
    card = ModelCard.load(converted / "README.md")
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["vision", "mobilenet", "arxiv:1801.04381"],
        "datasets": ["imagenet-1k"],
        "metrics": ["accuracy"],
    }
    assert "1f925d55d6757acb34c763323d008355827a119919b66fedb0422755079798f1" in card.text  # model.safetensors
    assert "| transformers' MobileNetV2ForImageClassification " in card.text
    assert "| this repository, loaded by a new process | 8 | " in card.text
    assert str(data) not in card.text


def test_dropout_is_taken_for_what_it_meant(data: Path) -> None:
    checkpoint = read_source(str(data / "checkpoints" / "google_mobilenet_v1_0.25_128"))[1]
    assert checkpoint.config["classifier_dropout"] == 0.001


@pytest.fixture
def small(data: Path, tmp_path: Path) -> Path:
    """A copy of the real V1 0.25_128 that a test may break."""
    return Path(shutil.copytree(data / "checkpoints" / "google_mobilenet_v1_0.25_128", tmp_path / "small"))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite a repository's weights as safetensors, with tensors replaced or, where None, left out."""
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


def assert_fails_without_a_trace(source: Path | str, output: Path, *parts: str, **options: object) -> None:
    """A conversion ends in one clear error, and leaves neither an output nor temporary files."""
    before = set(output.parent.iterdir())
    with pytest.raises(ConversionError) as error:
        convert(str(source), output, **options)
    for part in parts:
        assert part in str(error.value)
    assert set(output.parent.iterdir()) == before


def test_missing_unexpected_and_misshapen_names_are_listed_at_once(small: Path, tmp_path: Path) -> None:
    edit_weights(
        small,
        **{
            "mobilenet_v1.layer.3.normalization.running_var": None,
            "mobilenet_v1.layer.4.normalization.bias": torch.zeros(7),
            "mobilenet_v1.layer.26.convolution.weight": torch.zeros(1),
        },
    )
    assert_fails_without_a_trace(
        small,
        tmp_path / "output",
        f"{small} does not hold a mobilenet_v1 of width 0.25 with 1001 classes: ",
        "1 missing: mobilenet_v1.layer.3.normalization.running_var; ",
        "1 unexpected: mobilenet_v1.layer.26.convolution.weight; ",
        "1 misshapen: mobilenet_v1.layer.4.normalization.bias [7] instead of [32].",
    )


def test_values_that_are_not_finite_are_refused(small: Path, tmp_path: Path) -> None:
    edit_weights(small, **{"classifier.bias": torch.full((1001,), torch.nan)})
    assert_fails_without_a_trace(small, tmp_path / "output", str(small), "not finite, in classifier.bias")


def swapped(rows: dict, first: str, second: str) -> dict:
    """Two rows of a name table, each in the place of the other."""
    return {**rows, first: rows[second], second: rows[first]}


def test_swapped_rows_do_not_fit(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = from_google.TABLES["mobilenet_v1"]
    rows = swapped(table.rows, "block.depthwise", "block.pointwise")
    monkeypatch.setitem(from_google.TABLES, "mobilenet_v1", table._replace(rows=rows))
    assert_fails_without_a_trace(small, tmp_path / "output")


@pytest.mark.parametrize("pair", [("weight", "running_var"), ("bias", "running_mean")])
def test_swapped_parts_that_fit_give_another_network(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: tuple
) -> None:
    table = from_google.TABLES["mobilenet_v1"]
    convention = table.convention._replace(norm=swapped(table.convention.norm, *pair))
    monkeypatch.setitem(from_google.TABLES, "mobilenet_v1", table._replace(convention=convention))
    assert_fails_without_a_trace(
        small, tmp_path / "output", "is another than transformers' MobileNetV1", "0.0001 is allowed"
    )


def test_output_is_never_overwritten_unasked(converted: Path, small: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(converted, tmp_path / "output"))
    assert_fails_without_a_trace(small, output, f"{output} exists; --overwrite replaces it.")
    convert(str(small), output, overwrite=True, verify=False)
    assert json.loads((output / "config.json").read_text())["width_multiplier"] == 0.25
    assert "Not verified" in (output / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"output", "small"}


def test_overwriting_replaces_repositories_only(small: Path, tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "beach.jpg").touch()
    assert_fails_without_a_trace(small, tmp_path / "holiday", "is no model repository", overwrite=True)
    assert (tmp_path / "holiday" / "beach.jpg").exists()


def test_dropping_the_background_keeps_the_other_logits(data: Path, tmp_path: Path, cats: Path) -> None:
    source = data / "checkpoints" / "google_mobilenet_v1_0.25_128"
    convert(str(source), tmp_path / "output", drop_background=True, verify=False)
    kept = build(read_source(str(source))[1], "").classifier
    without = MobileNetForImageClassification.from_pretrained(tmp_path / "output").eval()
    assert without.classifier.weight.equal(kept.weight[1:])
    assert without.classifier.bias.equal(kept.bias[1:])
    assert without.config.num_labels == 1000
    assert without.config.id2label[281] == "tabby, tabby cat"
    assert without.config.label2id["tench, Tinca tinca"] == 0
