"""Batch norms put back into networks of every generation that came folded."""

import pytest
import torch
from oracles import FAMILY, logits, randomize_norms
from torch import nn

from mobilenet import MobileNetConfig, MobileNetForImageClassification
from mobilenet.conversion.unfuse import unfuse_batch_norm


@pytest.mark.parametrize("architecture", [*FAMILY, "mobilenet_edgetpu"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "made without"])
def test_an_unfused_network_computes_the_same(architecture: str, fused: bool) -> None:
    """Squeeze-and-excite, the layer after the pooling, attention, layer scales and hidden layers included."""
    config = MobileNetConfig(
        architecture, 0.25, num_labels=7, classifier_hidden_sizes=(12,), use_batch_norm=fused, image_size=64
    )
    model = randomize_norms(MobileNetForImageClassification(config)).eval()
    layers = [type(module) for module in model.modules()]
    model.fuse()
    images = torch.randn(4, 3, 64, 64)
    expected = logits(model, images)
    unfused = unfuse_batch_norm(model, [images])
    assert unfused.config.has_batch_norm
    torch.testing.assert_close(logits(unfused, images), expected, rtol=1e-4, atol=1e-4)
    norms = [module for module in unfused.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.running_mean.abs().max() > 0 for norm in norms)
    if fused:
        assert [type(module) for module in unfused.modules()] == layers
