"""The statistics of batch norms, moved from the images that a checkpoint was trained on to others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Moments:
    """Mean and variance of each channel, over all batches of activations (B, C, H, W) that were added.

    Source: Chan et al., Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (1979).
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.variance = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        variance, mean = (term.to("cpu", torch.float64) for term in torch.var_mean(x.float(), (0, 2, 3), correction=0))
        added = x.numel() // x.shape[1]
        self.count += added
        share = added / self.count
        delta = mean - self.mean
        self.mean = self.mean + share * delta
        self.variance = torch.lerp(self.variance, variance, share) + share * (1 - share) * delta**2


def _is_new(norm: nn.BatchNorm2d) -> bool:
    """Whether a batch norm has its first statistics, which are no images'."""
    return bool((norm.running_mean == 0).all() and (norm.running_var == 1).all())


@torch.no_grad()
def align_batch_norm(model: nn.Module, batches: Tensor | Iterable[Tensor], spares_new: bool = False) -> nn.Module:
    """Give every batch norm the statistics of these images, in place, while weight and bias keep what it computes.

    A batch norm normalizes by its running statistics in evaluation, and by those of the batch in training. Where the
    images to train on look unlike those of the checkpoint, as small ones that were enlarged do, training mode
    therefore computes something else than the checkpoint; once aligned, it starts from what was learned.

    Args:
        model: A network that is called with `pixel_values`.
        batches: `pixel_values` of shape (B, C, H, W), or several of them; a thousand or so of the images to train
            on, as they are varied then. Of too few, the statistics are worse than the checkpoint's own.
        spares_new: Whether norms that have seen no images yet stay as they are, too.

    Returns:
        The network itself. Norms whose weight does not require gradients stay as they are.

    Raises:
        ValueError: There are no images, or they give numbers that are not finite. The network stays as it was.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d) and module.weight.requires_grad and not (spares_new and _is_new(module))
    ]
    if not norms:
        return model
    device = norms[0].weight.device
    moments: dict[nn.BatchNorm2d, Moments] = {}

    def see(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        moments.setdefault(norm, Moments()).add(inputs[0])

    hooks = [norm.register_forward_pre_hook(see) for norm in norms]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for pixel_values in [batches] if isinstance(batches, Tensor) else batches:
            if len(pixel_values):
                model(pixel_values.to(device))
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    if not moments:
        raise ValueError("batches must hold images, got none.")
    if not all(seen.mean.isfinite().all() and seen.variance.isfinite().all() for seen in moments.values()):
        raise ValueError("batches must give finite numbers in every layer, got others.")
    for norm, seen in moments.items():
        weight, bias, mean, variance = (
            term.to("cpu", torch.float64) for term in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
        scale = weight * torch.rsqrt(variance + norm.eps)
        norm.weight.copy_(scale * torch.sqrt(seen.variance + norm.eps))
        norm.bias.copy_(bias + scale * (seen.mean - mean))
        norm.running_mean.copy_(seen.mean)
        norm.running_var.copy_(seen.variance)
    return model
