"""Batch norms for a network that came without: the same function, but one that can be fine-tuned."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mobilenet.configuration_mobilenet import MobileNetConfig
from mobilenet.modeling_mobilenet import ConvNormAct, MobileNetForImageClassification

from .names import ConversionError


class _Moments:
    """Mean and variance of each channel, over all that a convolution puts out."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def see(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        values = output.double()
        self.count += values.numel() // values.shape[1]
        self.total += values.sum((0, 2, 3))
        self.squares += values.square().sum((0, 2, 3))

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        return (self.squares / self.count - self.mean.square()).clamp(min=0)


@torch.no_grad()
def unfold_batch_norm(
    model: MobileNetForImageClassification, batches: Iterable[Tensor]
) -> MobileNetForImageClassification:
    """Put a batch norm behind every convolution, without changing what the network computes.

    The norms take their statistics from what the convolutions put out for some pictures, so that training starts
    where evaluation stands; weight and bias undo what the statistics do.

    Args:
        model: A network without batch norm.
        batches: Pictures, of shape (B, C, H, W).

    Raises:
        ConversionError: The network has batch norms.
    """
    if model.config.use_batch_norm:
        raise ConversionError("--unfold-batch-norm is for networks whose batch norms are folded; these are not.")
    config = MobileNetConfig(**{**model.config.to_dict(), "use_batch_norm": True})
    units = {name: module for name, module in model.named_modules() if isinstance(module, ConvNormAct)}
    moments = {name: _Moments() for name in units}
    hooks = [unit.conv.register_forward_hook(moments[name].see) for name, unit in units.items()]
    for pixel_values in batches:
        model(pixel_values)
    for hook in hooks:
        hook.remove()
    unfolded = MobileNetForImageClassification(config).eval()
    unfolded.classifier.load_state_dict(model.classifier.state_dict())
    for name, unit in units.items():
        target = unfolded.get_submodule(name)
        mean, variance = moments[name].mean, moments[name].variance
        target.conv.weight.copy_(unit.conv.weight)
        target.norm.running_mean.copy_(mean - unit.conv.bias)  # of the convolution without its bias
        target.norm.running_var.copy_(variance)
        target.norm.weight.copy_((variance + target.norm.eps).sqrt())
        target.norm.bias.copy_(mean)
    return unfolded
