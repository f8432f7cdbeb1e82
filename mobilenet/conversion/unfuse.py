"""Batch norms for a network that came without: the same function, but one that can be fine-tuned."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mobilenet.batch_norm import align_batch_norm
from mobilenet.configuration_mobilenet import MobileNetConfig
from mobilenet.layers_mobilenet import ConvNormAct
from mobilenet.modeling_mobilenet import MobileNetForImageClassification

from .rename import ConversionError


@torch.no_grad()
def unfuse_batch_norm(
    model: MobileNetForImageClassification, batches: Iterable[Tensor]
) -> MobileNetForImageClassification:
    """Put a batch norm behind every convolution, without changing what the network computes.

    The norms take their statistics from what the convolutions put out for some images, so that training starts
    where evaluation stands.

    Args:
        model: A network without batch norm.
        batches: Images, of shape (B, C, H, W).

    Raises:
        ConversionError: The network has batch norms.
    """
    if model.config.has_batch_norm:
        raise ConversionError("--unfuse is for networks whose batch norms are folded; these are not.")
    config = MobileNetConfig(**{**model.config.to_dict(), "use_batch_norm": True, "fused": False})
    unfused = MobileNetForImageClassification(config).eval()
    unfused.classifier.load_state_dict(model.classifier.state_dict())
    for name, unit in model.named_modules():
        if isinstance(unit, ConvNormAct):
            target = unfused.get_submodule(name)
            target.conv.weight.copy_(unit.conv.weight)
            target.norm.weight.fill_((1 + target.norm.eps) ** 0.5)  # as the variance is 1
            target.norm.bias.copy_(unit.conv.bias)
    return align_batch_norm(unfused, batches)
