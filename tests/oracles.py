"""Peers that the tests compare with, and the ground on which networks can be compared."""

import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from transformers import (
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileNetV2ForSemanticSegmentation,
)

from benchmarks import peers
from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetForSemanticSegmentation


# Real weights and photographs, which are no part of the project.
DATA = Path(os.environ.get("MOBILENET_TEST_DATA", Path(__file__).parents[2] / "shared")).resolve()

# Every kind of block, of head and of stages.
FAMILY = ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v4_hybrid_medium")


def randomize_norms(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics of its own: at their defaults all are alike, and two swapped ones pass.

    Layer scales too, at which attention would not count.
    """
    for name, parameter in model.named_parameters():
        if name.endswith((".scale.weight", ".layer_scale.gamma")):
            nn.init.uniform_(parameter, 0.2, 0.6)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def native(config: MobileNetConfig) -> nn.Module:
    """The classifier of transformers that a configuration describes, with random weights of a sound scale."""
    if config.architecture == "mobilenet_v1":
        model = MobileNetV1ForImageClassification(MobileNetV1Config(**_native_fields(config)))
    else:
        model = MobileNetV2ForImageClassification(_native_v2(config))
    return _sound(model)


@torch.no_grad()
def native_segmenter(config: MobileNetConfig) -> MobileNetV2ForSemanticSegmentation:
    """The segmenter of transformers that a configuration describes, with random weights of a sound scale.

    Every norm has statistics of its own that fit its inputs, and logits have a deviation of 1: in a random network of
    so many layers, what float32 rounds grows to some 2e-4 of it.
    """
    model = _sound(MobileNetV2ForSemanticSegmentation(_native_v2(config)))
    # One batch replaces the statistics of its norms; noise of one kind has next to no variance once it is pooled.
    kinds = torch.linspace(-1, 1, 8)[:, None, None, None]
    model.train()(torch.randn(8, config.num_channels, 97, 130) * (1 + kinds) + 2 * kinds)
    model.eval()
    classifier = model.segmentation_head.classifier.convolution
    classifier.bias.zero_()
    classifier.weight /= logits(model, torch.randn(2, config.num_channels, 97, 130)).std()
    return model


def _native_v2(config: MobileNetConfig) -> MobileNetV2Config:
    return MobileNetV2Config(**_native_fields(config), output_stride=config.output_stride)


def _native_fields(config: MobileNetConfig) -> dict[str, object]:
    return {
        "depth_multiplier": config.width_multiplier,
        "num_channels": config.num_channels,
        "num_labels": config.num_labels,
        "hidden_act": config.hidden_act,
        "tf_padding": config.padding == "same",
        "layer_norm_eps": config.batch_norm_eps,
    }


def _sound(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return randomize_norms(model).eval()


def copy_in_order(source: nn.Module, target: nn.Module, unused: str = "nothing") -> nn.Module:
    """Copy weights between two networks that define the same layers in the same order of execution.

    Independent of any name: a name table that swapped two layers would not agree with this.

    Args:
        source: Whose weights are copied.
        target: Gets them.
        unused: Part of the names of layers that the source has and never runs.
    """
    tensors = [tensor for name, tensor in source.state_dict().items() if unused not in name]
    names = list(target.state_dict())
    assert len(tensors) == len(names)
    target.load_state_dict(dict(zip(names, tensors, strict=True)))
    return target.eval()


def ours_like(source: nn.Module, config: MobileNetConfig) -> MobileNetForImageClassification:
    """Our network with another's weights."""
    return copy_in_order(source, MobileNetForImageClassification(config))


def segmenter_like(source: nn.Module, config: MobileNetConfig) -> MobileNetForSemanticSegmentation:
    """Our segmenter with the weights of transformers' own, which carries a last 1x1 convolution that nothing uses."""
    return copy_in_order(source, MobileNetForSemanticSegmentation(config), unused="mobilenet_v2.conv_1x1.")


def import_timm() -> ModuleType:
    """Import timm; skip where it is missing."""
    try:
        return peers.import_timm()
    except ImportError:
        pytest.skip("timm is not installed: pip install --no-deps timm")


def timm_model(name: str, **kwargs: object) -> nn.Module:
    """A network of timm with random weights."""
    return randomize_norms(import_timm().create_model(name, **kwargs)).eval()


@torch.no_grad()
def as_trained(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Make logits as large as those of trained networks, so that a difference of them means what it does there."""
    model.classifier.weight *= 3 / (logits(model, images) - model.classifier.bias).std()
    return model


@torch.no_grad()
def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits of a network of ours, of transformers or of timm."""
    output = model(images)
    return output if isinstance(output, torch.Tensor) else output.logits
