"""Conversions of timm's checkpoints, against timm."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from conversions import ODD_SIZES, assert_fails_without_a_trace, assert_wrong_tables_are_noticed, read
from oracles import as_trained, import_timm, logits, timm_model
from safetensors.torch import save_file
from torch import nn

from mobilenet import MobileNetForImageClassification, MobileNetImageProcessor
from mobilenet.conversion import from_timm
from mobilenet.conversion.convert import build, convert


pytestmark = pytest.mark.any_version


V1 = ("mobilenetv1_100", "mobilenetv1_125")
V2 = ("mobilenetv2_035", "mobilenetv2_050", "mobilenetv2_075", "mobilenetv2_100", "mobilenetv2_140")


def network(name: str, **kwargs: object) -> nn.Module:
    """A network of timm with random weights, whose logits are as large as a trained one's."""
    model = timm_model(name, **{"num_classes": 10, **kwargs})
    with torch.no_grad():
        model.classifier.weight *= 0.1
    return model


def save_for_hub(model: nn.Module, folder: Path) -> Path:
    """A repository, written by timm itself."""
    import_timm().models.save_for_hf(model, folder, safe_serialization=True)
    return folder


# Of these a state dict tells all.
OTHERS = (
    *("mobilenetv1_100h", "mobilenetv2_110d", "mobilenetv2_120d"),
    *(f"mobilenetv3_{name}" for name in ("large_075", "large_100", "small_050", "small_075", "small_100")),
    *(f"mobilenetv4_conv_{name}" for name in ("small_035", "small_050", "small", "medium", "large")),
    *(f"mobilenetv4_hybrid_{name}" for name in ("medium_075", "medium", "large_075", "large")),
)
# Of these the name too: they pad as TensorFlow does, or do not stride by convolutions.
NAMED = (
    *(f"tf_mobilenetv3_{name}" for name in ("large_075", "large_100", "small_075", "small_100")),
    *("tf_mobilenetv3_large_minimal_100", "tf_mobilenetv3_small_minimal_100"),
    *("mobilenetv4_conv_aa_medium", "mobilenetv4_conv_blur_medium", "mobilenetv4_conv_aa_large"),
)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", OTHERS + NAMED)
def test_logits_equal_those_of_timm_for_all_others(name: str, tmp_path: Path) -> None:
    """In double precision: with arbitrary statistics, deep networks magnify what float32 rounds."""
    images = [torch.randn(2, 3, *size) for size in ODD_SIZES]
    theirs = as_trained(timm_model(name, num_classes=10), images[0])
    file = tmp_path / (f"{name}.safetensors" if name in NAMED else "model.safetensors")
    save_file(theirs.state_dict(), file)
    checkpoint = read(file)
    ours = build(checkpoint, name).double()
    assert parameters(ours) == parameters(theirs)
    assert checkpoint.oracle().name == f"timm's {name}"
    theirs = theirs.double()
    expected = [logits(theirs, batch.double()) for batch in images]
    assert all(1 < scores.std() < 10 for scores in expected)
    for prepare in (nn.Module.eval, MobileNetForImageClassification.fuse):
        prepare(ours)
        for batch, scores in zip(images, expected, strict=True):
            torch.testing.assert_close(logits(ours, batch.double()), scores, atol=1e-8, rtol=0)


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("name", V1 + V2)
def test_logits_equal_those_of_timm(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    theirs = network(name)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = build(read(tmp_path / "model.safetensors"), name)
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(logits(ours, images), logits(theirs, images), atol=1e-4, rtol=0)
    assert round(100 * ours.config.width_multiplier) == int(name[-3:])


@pytest.mark.parametrize(
    "name", ["mobilenetv1_100", "mobilenetv2_035", "mobilenetv3_small_050", "mobilenetv4_conv_small"]
)
def test_every_wrong_row_is_noticed(name: str, tmp_path: Path) -> None:
    theirs = as_trained(timm_model(name, num_classes=10), torch.randn(1, 3, 64, 64))
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    assert_wrong_tables_are_noticed(read(tmp_path / "model.pth"))


def test_a_repository_converts_and_is_compared(tmp_path: Path) -> None:
    source = save_for_hub(network("mobilenetv2_035", num_classes=1000), tmp_path / "source")
    comparisons = convert(str(source), tmp_path / "output")
    assert [comparison.against for comparison in comparisons] == [
        f"timm's mobilenetv2_035 {import_timm().__version__}",
        "the repository, loaded anew",
    ]
    assert all(comparison.largest < 1e-4 and comparison.agreement == 1 for comparison in comparisons)
    model = MobileNetForImageClassification.from_pretrained(tmp_path / "output")
    assert model.config.id2label[281] == "tabby, tabby cat"
    processor = MobileNetImageProcessor.from_pretrained(tmp_path / "output")
    assert (processor.size, processor.crop_size["height"]) == ({"shortest_edge": 256}, 224)


@pytest.mark.parametrize(
    "tag",
    [
        "mobilenetv1_100.ra4_e3600_r224_in1k",
        "mobilenetv1_125.ra4_e3600_r224_in1k",
        "mobilenetv2_050.lamb_in1k",
        "mobilenetv2_100.ra_in1k",
        "mobilenetv2_140.ra_in1k",
    ],
)
def test_preprocessing_is_that_of_timm(tag: str, tmp_path: Path) -> None:
    name, _, _ = tag.partition(".")
    recorded = import_timm().get_pretrained_cfg(tag)
    torch.save(network(name, num_classes=3).state_dict(), tmp_path / "model.pth")
    by_recipe = read(tmp_path / "model.pth").processor
    by_record = read(save_for_hub(network(tag, num_classes=3), tmp_path / "hub")).processor
    for processor in (by_recipe, by_record):
        assert processor.crop_size == {"height": 224, "width": 224}
        assert processor.size == {"shortest_edge": int(224 / recorded.crop_pct)}
        assert (tuple(processor.image_mean), tuple(processor.image_std)) == (recorded.mean, recorded.std)
        assert (processor.resample, recorded.interpolation) == (3, "bicubic")


def test_recipes_are_those_of_every_published_checkpoint() -> None:
    """By its name, a file is preprocessed as timm preprocesses the checkpoint of that name."""
    timm = import_timm()
    published = [tag for tag in timm.list_pretrained("*mobilenetv*") if from_timm.network_of(tag.partition(".")[0])]
    assert len(published) == 45
    for tag in published:
        recorded = timm.get_pretrained_cfg(tag)
        recipe, size = from_timm.preprocessing(tag)
        processor = MobileNetImageProcessor.from_recipe(recipe, size)
        assert (tag, size) == (tag, recorded.input_size[-1])
        assert (tag, processor.size) == (tag, {"shortest_edge": int(size / recorded.crop_pct)})
        assert (tag, tuple(processor.image_mean), tuple(processor.image_std)) == (tag, recorded.mean, recorded.std)
        assert (tag, processor.resample) == (tag, {"bicubic": 3, "bilinear": 2}[recorded.interpolation])


@pytest.mark.parametrize("name", ["mobilenetv3_rw", "mobilenetv3_large_150d"])
def test_other_networks_of_timm_are_refused(name: str, tmp_path: Path) -> None:
    model = import_timm().create_model(name)
    source = save_for_hub(model, tmp_path / "source")
    assert_fails_without_a_trace(
        source, tmp_path / "output", "must be timm's mobilenetv1_<width>,", f"got {name}, which "
    )
    torch.save(model.state_dict(), tmp_path / "model.pth")
    assert_fails_without_a_trace(tmp_path / "model.pth", tmp_path / "output", "model.pth does not hold a mobilenet_v")


def test_a_training_checkpoint_gives_its_averaged_weights(tmp_path: Path) -> None:
    trained, averaged = network("mobilenetv2_035"), network("mobilenetv2_035")
    checkpoint = {
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1),
        "state_dict": trained.state_dict(),
        "state_dict_ema": {f"module.{name}": tensor for name, tensor in averaged.state_dict().items()},
    }
    torch.save(checkpoint, tmp_path / "last.pth.tar")
    ours = build(read(tmp_path / "last.pth.tar"), "")
    assert ours.classifier.weight.equal(averaged.classifier.weight)


def test_a_network_for_grayscale_is_compared_on_grayscale(tmp_path: Path) -> None:
    torch.save(network("mobilenetv2_035", in_chans=1).state_dict(), tmp_path / "gray.pth")
    theirs, reloaded = convert(str(tmp_path / "gray.pth"), tmp_path / "output")
    assert theirs.largest < 1e-4
    assert reloaded.largest < 1e-4


def test_a_width_that_timm_does_not_have_is_converted_without_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(network("mobilenetv2_035").state_dict(), tmp_path / "model.pth")
    monkeypatch.setattr(import_timm(), "is_model", lambda name: False)
    (reloaded,) = convert(str(tmp_path / "model.pth"), tmp_path / "output")
    assert reloaded.largest < 1e-4
    assert "timm has no mobilenetv2_035" in (tmp_path / "output" / "README.md").read_text(encoding="utf-8")


def test_labels_of_a_repository_are_kept(tmp_path: Path) -> None:
    source = save_for_hub(network("mobilenetv2_035", num_classes=2), tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"label_names": ["owl", "parrot"]}))
    assert build(read(source), "").config.id2label == {0: "owl", 1: "parrot"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tag", "image_size"),
    [
        ("mobilenetv4_conv_small.e2400_r224_in1k", 224),
        ("mobilenetv4_hybrid_medium.ix_e550_r384_in1k", 384),
        ("tf_mobilenetv3_small_minimal_100.in1k", 224),
    ],
)
def test_repositories_of_v3_and_v4_convert_and_are_compared(tag: str, image_size: int, tmp_path: Path) -> None:
    theirs = import_timm().create_model(tag, num_classes=10).eval()
    theirs = as_trained(theirs, torch.randn(2, 3, 96, 96))
    source = save_for_hub(theirs, tmp_path / "source")
    ours, reloaded = convert(str(source), tmp_path / "output")
    assert ours.against.startswith(f"timm's {tag.partition('.')[0]} ")
    assert ours.agreement == reloaded.agreement == 1
    config = MobileNetForImageClassification.from_pretrained(tmp_path / "output").config
    assert config.image_size == image_size
    recorded = import_timm().get_pretrained_cfg(tag)
    processor = MobileNetImageProcessor.from_pretrained(tmp_path / "output")
    assert processor.size == {"shortest_edge": int(image_size / recorded.crop_pct)}
    assert tuple(processor.image_mean) == recorded.mean
