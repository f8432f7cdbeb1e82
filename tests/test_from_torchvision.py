"""Conversions of torchvision's MobileNet V2, against its published layout written out."""

import hashlib
from pathlib import Path

import pytest
import torch
from conversions import ODD_SIZES, assert_fails_without_a_trace, assert_wrong_tables_are_noticed, read
from oracles import copy_in_order, logits, timm_model
from torch import Tensor, nn

from convert_checkpoint import build
from mobilenet.conversion import from_torchvision, read_source


pytestmark = pytest.mark.any_version


def unit(inputs: int, outputs: int, kernel_size: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        expand = [unit(inputs, hidden)] if expansion > 1 else []
        project = [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*expand, unit(hidden, hidden, 3, stride, hidden), *project)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    """The layout of torchvision/models/mobilenetv2.py at width 1."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        table = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        blocks, inputs = [], 32
        for expansion, outputs, repeats, stride in table:
            for index in range(repeats):
                blocks.append(InvertedResidual(inputs, outputs, 1 if index else stride, expansion))
                inputs = outputs
        self.features = nn.Sequential(unit(3, 32, 3, 2), *blocks, unit(320, 1280))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


@pytest.fixture
def published() -> nn.Module:
    """torchvision's network with the weights of timm's, which is the same under other names."""
    source = timm_model("mobilenetv2_100", num_classes=10)
    with torch.no_grad():
        source.classifier.weight *= 0.1
    model = copy_in_order(source, MobileNetV2(10))
    pictures = torch.randn(1, 3, 97, 130)
    torch.testing.assert_close(logits(model, pictures), logits(source, pictures), atol=1e-4, rtol=0)
    return model


@pytest.mark.parametrize("size", ODD_SIZES)
def test_logits_equal_those_of_the_published_layout(published: nn.Module, size: tuple, tmp_path: Path) -> None:
    torch.save(published.state_dict(), tmp_path / "model.pth")
    ours = build(read(tmp_path / "model.pth"), "")
    pictures = torch.randn(2, 3, *size)
    torch.testing.assert_close(logits(ours, pictures), logits(published, pictures), atol=1e-4, rtol=0)


def test_every_wrong_row_is_noticed(published: nn.Module, tmp_path: Path) -> None:
    torch.save(published.state_dict(), tmp_path / "model.pth")
    assert_wrong_tables_are_noticed(read(tmp_path / "model.pth"))


def test_published_weights_are_known_by_name(
    published: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(published.state_dict(), tmp_path / "weights")
    checksum = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()
    file = (tmp_path / "weights").rename(tmp_path / f"mobilenet_v2-{checksum[:8]}.pth")
    name = "MobileNet_V2_Weights.IMAGENET1K_V1"
    monkeypatch.setitem(from_torchvision.PUBLISHED, name, file.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    origin, checkpoint = read_source(name)
    assert (origin.given, checkpoint.kind, checkpoint.license) == (name, "torchvision", "bsd-3-clause")
    assert checkpoint.processor.size == {"shortest_edge": 256}
    assert checkpoint.processor.image_mean == [0.485, 0.456, 0.406]

    monkeypatch.setitem(from_torchvision.PUBLISHED, name, file.rename(tmp_path / "mobilenet_v2-00000000.pth").as_uri())
    assert_fails_without_a_trace(name, tmp_path / "output", "cannot be downloaded", "invalid hash value")
    monkeypatch.setitem(from_torchvision.PUBLISHED, name, (tmp_path / "gone-00000000.pth").as_uri())
    assert_fails_without_a_trace(name, tmp_path / "output", "gone-00000000.pth: cannot be downloaded")


def test_the_second_weights_have_another_recipe(
    published: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(published.state_dict(), tmp_path / "model.pth")
    monkeypatch.setattr(from_torchvision, "sha256", lambda path: "7ebf99e0" + 56 * "0")
    assert read(tmp_path / "model.pth").processor.size == {"shortest_edge": 232}
    assert read(tmp_path / "model.pth", recipe="timm", image_size=160).processor.size == {"shortest_edge": 182}
