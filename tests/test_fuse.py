"""Fusing: batch norm folded into the convolutions, for inference."""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from mobilenet.layers_mobilenet import LayerScale, MultiQueryAttention
from oracles import FAMILY, randomize_norms
from torch import nn
from transformers import AutoModelForImageClassification

from mobilenet import MobileNetBackbone, MobileNetConfig, MobileNetForImageClassification, MobileNetModel


CLASSES = (MobileNetModel, MobileNetForImageClassification, MobileNetBackbone)


def network(model_class: type = MobileNetForImageClassification, **config: object) -> nn.Module:
    return randomize_norms(model_class(MobileNetConfig(num_labels=10, **config))).eval()


def features(model: nn.Module, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """Every tensor that a network returns; with gradients, so that batch norms run as they are."""
    output = model(pixel_values, output_hidden_states=True).to_tuple()
    return [tensor for value in output for tensor in (value if isinstance(value, tuple) else (value,))]


def norms_left(model: nn.Module) -> list[str]:
    """Batch norms of a fused network: those before attention, which no convolution precedes."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    attention = [name for name, module in model.named_modules() if isinstance(module, MultiQueryAttention)]
    assert names == [f"{name}.norm" for name in attention]
    return names


@pytest.mark.parametrize("architecture", FAMILY)
@pytest.mark.parametrize("model_class", CLASSES)
def test_predictions_stay(architecture: str, model_class: type) -> None:
    model = network(model_class, architecture=architecture, width_multiplier=0.5).double()
    images = torch.randn(2, 3, 65, 94, dtype=torch.float64)
    before = features(model, images)
    assert model.fuse() is model
    assert len(norms_left(model)) == (8 if "hybrid" in architecture else 0)
    assert not any(isinstance(module, LayerScale) for module in model.modules())
    after = features(model, images)
    assert len(after) == len(before) > 1
    for ours, expected in zip(after, before, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", FAMILY)
def test_predictions_stay_in_float32(architecture: str) -> None:
    model = network(architecture=architecture)
    images = torch.randn(2, 3, 224, 224)
    (before,) = model(images, return_dict=False)
    (after,) = model.fuse()(images, return_dict=False)
    assert before.std() > 1e-2
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * float(before.detach().abs().max()))


@pytest.mark.parametrize(
    "architecture", ["mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v4_conv_small"]
)
def test_inference_folds_for_the_call(architecture: str) -> None:
    """Without gradients, no batch norm runs; the predictions stay, and so do the weights."""
    model = network(architecture=architecture, width_multiplier=0.5).double()
    images = torch.randn(2, 3, 65, 94, dtype=torch.float64)
    expected = features(model, images)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with mock.patch.object(nn.BatchNorm2d, "forward", side_effect=AssertionError), torch.no_grad():
        folded = features(model, images)
    for ours, theirs in zip(folded, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():  # a change of a weight or a statistic is seen at once
        model.backbone.stem.norm.running_mean.add_(1)
        changed = features(model, images)
    assert not torch.allclose(changed[-1], folded[-1])


def _hook(model: nn.Module, seen: list[str]) -> None:
    model.backbone.stem.norm.register_forward_hook(lambda *_: seen.append("norm"))


def _pre_hook(model: nn.Module, seen: list[str]) -> None:
    model.backbone.stem.conv.register_forward_pre_hook(lambda *_: seen.append("conv"))


def _wrap(model: nn.Module, seen: list[str]) -> None:
    inner = model.backbone.stem.conv.forward
    model.backbone.stem.conv.forward = lambda x: seen.append("forward") or inner(x)


def _replace(model: nn.Module, seen: list[str]) -> None:
    class Norm(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append("subclass")
            return super().forward(x)

    norm = Norm(model.config.stem_block.out_channels).eval()
    model.backbone.stem.norm = norm


@pytest.fixture
def watch_everything() -> Iterator[list[nn.Module]]:
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    yield seen
    handle.remove()


def test_layers_are_called_where_all_are_watched(watch_everything: list[nn.Module]) -> None:
    model = network(width_multiplier=0.35)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert {*map(id, watch_everything)} >= {id(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}


@pytest.mark.parametrize("touch", [_hook, _pre_hook, _wrap, _replace])
def test_layers_that_someone_watches_are_called(touch: Callable[[nn.Module, list[str]], None]) -> None:
    model = network(width_multiplier=0.35)
    seen: list[str] = []
    touch(model, seen)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert len(seen) == 1


def test_norms_that_train_take_statistics_without_gradients() -> None:
    model = network(width_multiplier=0.35).train()
    before = model.backbone.stem.norm.running_mean.clone()
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert not torch.equal(model.backbone.stem.norm.running_mean, before)


def test_fold_by_hand() -> None:
    model = network()
    unit = model.backbone.stem
    weight, norm = unit.conv.weight.detach().double(), unit.norm
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = norm.bias.double() - norm.running_mean.double() * factor
    model.fuse()
    torch.testing.assert_close(unit.conv.weight, (weight * factor[:, None, None, None]).float(), rtol=0, atol=0)
    torch.testing.assert_close(unit.conv.bias, bias.float(), rtol=0, atol=0)
    assert unit.conv.bias.requires_grad


def test_twice_is_harmless() -> None:
    model = network().fuse()
    once = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.fuse() is model
    assert model.state_dict().keys() == once.keys()
    assert all(torch.equal(tensor, once[name]) for name, tensor in model.state_dict().items())


def test_a_part_alone_is_not_saved(tmp_path: Path) -> None:
    """No configuration says it, so its predictions would be lost."""
    model = network(width_multiplier=0.35)
    model.backbone.fuse()
    with pytest.raises(ValueError, match="a network must be fused as a whole to be saved"):
        model.save_pretrained(tmp_path)
    model.fuse().save_pretrained(tmp_path)


def test_network_without_batch_norm_stays() -> None:
    model = MobileNetForImageClassification(MobileNetConfig.from_preset("depthwise_separable_plain"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.fuse().state_dict().items())
    assert not model.config.fused


def test_other_networks_of_the_configuration_stay() -> None:
    config = MobileNetConfig()
    model, other = MobileNetForImageClassification(config).fuse(), MobileNetForImageClassification(config)
    assert (model.config.fused, model.config.has_batch_norm) == (True, False)
    assert model.backbone.config is model.config
    assert (other.config.fused, other.config.has_batch_norm) == (False, True)


@pytest.mark.parametrize("architecture", FAMILY)
def test_saves_and_loads(architecture: str, tmp_path: Path) -> None:
    model = network(architecture=architecture, width_multiplier=0.5)
    unfused = len(model.state_dict())
    model.fuse().save_pretrained(tmp_path)
    loaded, report = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    # Squeeze-and-excite has no norms.
    assert len(loaded.state_dict()) <= unfused / (1.5 if "v3" in architecture else 2)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert (loaded.config.fused, loaded.config.has_batch_norm) == (True, False)
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(loaded(images).logits, model(images).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    before = model(torch.randn(1, 3, 64, 64)).logits
    after = model.fuse()(torch.randn(1, 3, 64, 64)).logits
    assert {tensor.dtype for tensor in model.state_dict().values()} == {before.dtype} == {after.dtype} == {dtype}
    assert after.isfinite().all()


def test_frozen_weights_stay_frozen() -> None:
    model = network().requires_grad_(False).fuse()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_training_says_what_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    # It warns once a process.
    sys.modules[MobileNetModel.__module__].logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        network().train()
        model = network().fuse()
        assert not model.training
        assert not caplog.records
        model.train()
        model.eval().train()
    (record,) = caplog.records
    assert "batch norms are folded" in record.message
    assert model.training
    # It trains all the same.
    model(torch.randn(2, 3, 64, 64), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
