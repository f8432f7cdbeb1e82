"""torchao quantizes the fully connected layers of a network at loading.

Where torchao is installed, transformers imports it, slowly and aloud, in every command, so pytest does not collect
this by itself: CI and `nox -s torchao` install it last, and name this file.
"""

from pathlib import Path

import torch
from oracles import logits
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig

from mobilenet import MobileNetConfig, MobileNetForImageClassification


def test_torchao_quantizes_the_classifier_at_loading(tmp_path: Path) -> None:
    config = MobileNetConfig(width_multiplier=0.35, num_labels=5, classifier_hidden_sizes=[16])
    model = MobileNetForImageClassification(config).eval()
    images = torch.randn(2, 3, 64, 64)
    model.save_pretrained(tmp_path / "float")
    config = TorchAoConfig(Int8WeightOnlyConfig())
    quantized = MobileNetForImageClassification.from_pretrained(tmp_path / "float", quantization_config=config).eval()
    assert type(quantized.classifier.weight).__name__ == type(quantized.hidden[0].weight).__name__ == "Int8Tensor"
    assert quantized.classifier.weight.qdata.dtype == torch.int8
    assert torch.equal(quantized.backbone.stem.conv.weight, model.backbone.stem.conv.weight)
    expected, found = logits(model, images), logits(quantized, images)
    assert 0 < (found - expected).abs().max() < 0.02 * expected.abs().max()
    quantized.save_pretrained(tmp_path / "int8")
    again = MobileNetForImageClassification.from_pretrained(tmp_path / "int8").eval()
    assert torch.equal(logits(again, images), found)
