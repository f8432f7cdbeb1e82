"""Batch norms aligned to images: the predictions of the loaded network, and training that starts from them."""

import csv
from pathlib import Path

import pytest
import torch
from oracles import randomize_norms
from PIL import Image
from torch import Tensor, nn

from mobilenet import (
    MobileNetBackbone,
    MobileNetConfig,
    MobileNetForImageClassification,
    MobileNetImageProcessor,
    MobileNetModel,
)
from mobilenet.batch_norm import align_batch_norm
from mobilenet.conversion.convert import convert


pytestmark = pytest.mark.any_version

CLASSES = (MobileNetModel, MobileNetForImageClassification, MobileNetBackbone)


def network(model_class: type = MobileNetForImageClassification, **config: object) -> nn.Module:
    """A network whose running statistics have nothing to do with any images."""
    options = {"width_multiplier": 0.35, "num_labels": 5, "classifier_dropout": 0.0, **config}
    return randomize_norms(model_class(MobileNetConfig(**options))).eval()


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@torch.no_grad()
def logits(model: nn.Module, images: Tensor, training: bool = False) -> Tensor:
    """All that a network returns; in training, its statistics stay."""
    momenta = [norm.momentum for norm in norms(model)]
    for norm in norms(model):
        norm.momentum = 0.0
    output = model.train(training)(images).to_tuple()
    for norm, momentum in zip(norms(model), momenta, strict=True):
        norm.momentum = momentum
    model.eval()
    tensors = [tensor for value in output for tensor in (value if isinstance(value, tuple) else (value,))]
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("architecture", ["mobilenet_v1", "mobilenet_v2"])
@pytest.mark.parametrize("model_class", CLASSES)
def test_predictions_stay_and_training_starts_from_them(architecture: str, model_class: type) -> None:
    model = network(model_class, architecture=architecture).double()
    images = torch.randn(24, 3, 65, 94, dtype=torch.float64)
    before, in_training = logits(model, images), logits(model, images, training=True)
    assert (in_training - before).abs().max() > 0.1 * before.abs().max()
    assert align_batch_norm(model, images) is model
    torch.testing.assert_close(logits(model, images), before, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logits(model, images, training=True), before, rtol=1e-4, atol=1e-4)


def test_statistics_are_those_of_all_batches() -> None:
    """Over several batches, one of them empty, they are the mean and variance of all activations together."""
    model = network()
    images = torch.randn(23, 3, 64, 64)
    seen = {}
    hooks = [
        norm.register_forward_pre_hook(lambda norm, inputs: seen.update({norm: inputs[0].double()}))
        for norm in norms(model)
    ]
    logits(model, images)
    for hook in hooks:
        hook.remove()
    align_batch_norm(model, [*images.split([7, 10, 6]), images[:0]])
    assert len(seen) == len(norms(model)) == 52
    for norm, values in seen.items():
        torch.testing.assert_close(norm.running_mean.double(), values.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            norm.running_var.double(), values.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5
        )
        assert not norm._forward_pre_hooks


def test_modes_and_frozen_norms_stay() -> None:
    model = network().train()
    model.backbone.stem.eval()
    model.backbone.stages[0].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    align_batch_norm(model, torch.randn(8, 3, 64, 64))
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, tensor in model.state_dict().items():
        changes = ".norm." in name and not name.startswith("backbone.stages.0.") and "num_batches" not in name
        assert torch.equal(tensor, before[name]) != changes, name


@pytest.mark.parametrize("spares_new", [True, False])
def test_norms_without_statistics_may_stay(spares_new: bool) -> None:
    old, new = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    old.running_mean.fill_(2)
    model = nn.Sequential(old, new).eval()
    model.forward = lambda pixel_values: new(old(pixel_values))
    align_batch_norm(model, torch.randn(4, 3, 5, 5), spares_new)
    assert not (old.weight == 1).any()
    assert (new.weight == 1).all() == spares_new
    assert (new.running_var == 1).all() == spares_new


def test_fused_networks_have_nothing_to_align() -> None:
    model = network().fuse()
    before = logits(model, torch.ones(1, 3, 64, 64))
    assert align_batch_norm(model, []) is model
    assert torch.equal(logits(model, torch.ones(1, 3, 64, 64)), before)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches must hold images, got none."),
        (torch.zeros(0, 3, 64, 64), "batches must hold images, got none."),
        ([torch.ones(2, 3, 64, 64), torch.full((2, 3, 64, 64), torch.nan)], "batches must give finite numbers"),
        ([torch.ones(2, 3, 64, 64), torch.ones(2, 1, 64, 64)], r"pixel_values must have shape \(B, 3, H, W\)"),
    ],
)
def test_bad_images_change_nothing(batches: object, message: str) -> None:
    model = network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        align_batch_norm(model, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(norm._forward_pre_hooks for norm in norms(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "evaluation", "training"),
    [("google_mobilenet_v1_0.25_128", 0.473, 0.420), ("google_mobilenet_v2_1.0_224", 0.860, 0.813)],
)
def test_google_s_weights_hold_in_training_mode(
    name: str, evaluation: float, training: float, data: Path, photographs: list[Path], tmp_path: Path
) -> None:
    """On photographs, the statistics of a batch serve nearly as well as the checkpoint's own."""
    convert(str(data / "checkpoints" / name), tmp_path / "model", compare=False)
    model = MobileNetForImageClassification.from_pretrained(tmp_path / "model")
    processor = MobileNetImageProcessor.from_pretrained(tmp_path / "model")
    with (photographs[0].parent / "labels.csv").open(encoding="utf-8") as file:
        labels = {row["file"]: int(row["index_1001"]) for row in csv.DictReader(file)}
    chosen = torch.randperm(len(photographs), generator=torch.Generator().manual_seed(0)).tolist()
    files = [photographs[index] for index in chosen[150:]]
    targets = torch.tensor([labels[file.name] for file in files])
    images = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt").pixel_values
    model.dropout.p = 0.0
    for mode, expected in ((False, evaluation), (True, training)):
        batches = [logits(model, batch, mode).view(len(batch), -1).argmax(-1) for batch in images.split(50)]
        accuracy = (torch.cat(batches) == targets).float().mean().item()
        assert accuracy == pytest.approx(expected, abs=0.0201 if mode else 0.007)  # three of 150; one
