"""Batch norms for a network that came without: the same function, but one that can be fine-tuned."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mobilenet.batch_norm import align_batch_norm
from mobilenet.configuration_mobilenet import MobileNetConfig
from mobilenet.layers_mobilenet import LayerScale
from mobilenet.modeling_mobilenet import MobileNetPreTrainedModel

from .rename import ConversionError


@torch.no_grad()
def unfuse_batch_norm(model: MobileNetPreTrainedModel, batches: Iterable[Tensor]) -> MobileNetPreTrainedModel:
    """Put back every batch norm and layer scale that folding took, without changing what the network computes.

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
    unfused = type(model)(config).eval()
    given, shared = model.state_dict(), unfused.state_dict()
    unfused.load_state_dict({name: tensor for name, tensor in given.items() if name in shared}, strict=False)
    for name, module in unfused.named_modules():
        if f"{name}.weight" in given:
            continue
        if isinstance(module, nn.BatchNorm2d):  # after a convolution, whose bias it takes; or before an attention
            module.weight.fill_((1 + module.eps) ** 0.5)  # as the variance is 1
            module.bias.copy_(given.get(name.removesuffix("norm") + "conv.bias", module.bias))
        elif isinstance(module, LayerScale):
            module.weight.fill_(1)
    return align_batch_norm(unfused, batches)
