"""Conversions of torchvision's networks, against torchvision's own code."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision_models
from conversions import read
from safetensors.torch import load_file
from torchvision_models import CLASSIFIERS, DETECTOR, SEGMENTERS, SIZES

from mobilenet.conversion.convert import build


pytestmark = [pytest.mark.any_version, pytest.mark.slow]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights and of what torchvision makes of images with them."""
    folder = tmp_path_factory.mktemp("torchvision")
    command = [sys.executable, torchvision_models.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named 'torchvision'" in done.stderr:
        pytest.skip("no torchvision where MOBILENET_TORCHVISION says; see docs/compatibility.md")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", [*CLASSIFIERS, *SEGMENTERS])
def test_logits_equal(name: str, written: Path) -> None:
    model, tensors = build(read(written / f"{name}.pth"), "").double(), load_file(written / f"{name}.safetensors")
    for index, size in enumerate(SIZES):
        logits, expected = model(tensors[f"images{index}"]).logits, tensors[f"logits{index}"]
        if name in SEGMENTERS:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, atol=1e-8 * expected.abs().max().item(), rtol=0)


def test_detections_equal(written: Path) -> None:
    checkpoint = read(written / f"{DETECTOR}.pth")
    model, tensors = build(checkpoint, "").double(), load_file(written / f"{DETECTOR}.safetensors")
    sizes = [(320, 320)] * len(tensors["images"])
    outputs = model((tensors["images"] - 0.5) / 0.5)
    found = checkpoint.processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    for index, detections in enumerate(found):
        torch.testing.assert_close(detections["scores"].double(), tensors[f"scores{index}"], atol=1e-4, rtol=0)
        same = detections["labels"] == tensors[f"labels{index}"] - 1  # theirs count the background
        assert same.float().mean() > 0.98  # scores that are nearly equal may change places
        torch.testing.assert_close(
            detections["boxes"][same].double(), tensors[f"boxes{index}"][same], atol=0.05, rtol=0
        )
