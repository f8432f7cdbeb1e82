"""Conversions of the plain depthwise separable network, against the network written out as courses do."""

from pathlib import Path

import pytest
import torch
from conversions import ODD_SIZES, assert_wrong_tables_are_noticed, read
from oracles import logits
from torch import Tensor, nn

from mobilenet.conversion.convert import build, convert


pytestmark = pytest.mark.any_version


class DepthwiseSeparable(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.pointwise(self.depthwise(x)))


class MobileNet(nn.Module):
    def __init__(self, width: float = 1.0, num_classes: int = 1000) -> None:
        super().__init__()
        c = [int(width * channels) for channels in (32, 64, 128, 256, 512, 1024)]
        self.conv1 = nn.Conv2d(3, c[0], 3, 2, 1)
        self.dw_conv2 = DepthwiseSeparable(c[0], c[1], 1)
        self.dw_conv3 = DepthwiseSeparable(c[1], c[2], 2)
        self.dw_conv4 = DepthwiseSeparable(c[2], c[2], 1)
        self.dw_conv5 = DepthwiseSeparable(c[2], c[3], 2)
        self.dw_conv6 = DepthwiseSeparable(c[3], c[3], 1)
        self.dw_conv7 = DepthwiseSeparable(c[3], c[4], 2)
        self.dw_conv8 = DepthwiseSeparable(c[4], c[4], 1)
        self.dw_conv9 = DepthwiseSeparable(c[4], c[4], 1)
        self.dw_conv10 = DepthwiseSeparable(c[4], c[4], 1)
        self.dw_conv11 = DepthwiseSeparable(c[4], c[4], 1)
        self.dw_conv12 = DepthwiseSeparable(c[4], c[4], 1)
        self.dw_conv13 = DepthwiseSeparable(c[4], c[5], 2)
        self.dw_conv14 = DepthwiseSeparable(c[5], c[5], 1)
        self.fc = nn.Linear(c[5], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        for number in range(2, 15):
            x = getattr(self, f"dw_conv{number}")(x)
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def network(width: float = 1.0, num_classes: int = 1000) -> nn.Module:
    """Random weights that keep the scale of activations, and biases."""
    model = MobileNet(width, num_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("width", [1.0, 0.75, 0.5, 0.25])
def test_logits_equal_those_of_the_network_written_out(width: float, size: tuple[int, int], tmp_path: Path) -> None:
    theirs = network(width, 10)
    torch.save(theirs.state_dict(), tmp_path / "network.pth")
    ours = build(read(tmp_path / "network.pth"), "")
    assert ours.config.width_multiplier == width
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(logits(ours, images), logits(theirs, images), atol=1e-4, rtol=0)


def test_every_wrong_row_is_noticed(tmp_path: Path) -> None:
    torch.save(network(0.25, 10).state_dict(), tmp_path / "network.pth")
    checkpoint = read(tmp_path / "network.pth")
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(checkpoint.oracle().logits(images), logits(build(checkpoint, ""), images))
    assert_wrong_tables_are_noticed(checkpoint)


def test_it_converts_and_is_compared(tmp_path: Path) -> None:
    theirs = network()
    assert sum(p.numel() for p in theirs.parameters()) == 4_221_032
    torch.save(theirs.state_dict(), tmp_path / "network.pth")
    written_out, reloaded = convert(str(tmp_path / "network.pth"), tmp_path / "output")
    assert written_out.against.startswith("the network written out in torch")
    assert written_out.largest < 1e-4
    assert reloaded.largest == 0
    assert "license" not in (tmp_path / "output" / "README.md").read_text().split("---")[1]
