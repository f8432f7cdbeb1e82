"""How images are varied, and what the network sees of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mobilenet import MobileNetImageProcessor
from mobilenet.training.augment import Augment, Normalize, mix
from mobilenet.training.data import (
    LABEL,
    Storage,
    decode,
    load_splits,
)


pytestmark = pytest.mark.any_version


def test_training_and_evaluation_see_what_the_processor_gives(colors: Path, tmp_path: Path) -> None:
    """Decoded bytes, normalized, are the processor's own pixel_values; training keeps the center square."""
    processor = MobileNetImageProcessor.from_recipe("torchvision", 16)
    rows = load_splits(str(colors))["test"]
    images = decode(rows, processor, Storage(tmp_path), "test")
    files = sorted((colors / "test").glob("*/*.png"))
    expected = processor(files, return_tensors="pt")["pixel_values"]
    actual = Normalize(processor)(torch.from_numpy(images.pixels))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert images.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert rows.features[LABEL].names == ["blue", "green", "red"]

    square = decode(rows, processor, Storage(tmp_path), "train", square=20)
    crop = np.asarray(Image.open(files[0]))[:, 2:22]
    assert np.array_equal(square.pixels[0], np.moveaxis(crop, -1, 0))


def test_variation() -> None:
    """Without options nothing varies; with them, sizes and ranges hold and images differ."""
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(Augment((32, 32), 1.0, False, False, 0.0)(pixels), pixels.float(), rtol=0, atol=1e-4)
    mirrored = Augment((32, 32), 1.0, True, False, 0.0)(pixels)
    kept = [torch.allclose(a, b.float(), atol=1e-3) for a, b in zip(mirrored, pixels, strict=True)]
    turned = [torch.allclose(a, b.float().flip(-1), atol=1e-3) for a, b in zip(mirrored, pixels, strict=True)]
    assert [a != b for a, b in zip(kept, turned, strict=True)] == [True] * 16
    assert 0 < sum(kept) < 16
    varied = Augment((24, 28), 0.3, True, True, 0.5)(pixels)
    assert varied.shape == (16, 3, 24, 28)
    assert 0 <= varied.min() < varied.max() <= 255
    constant = torch.full((8, 3, 32, 32), 77, dtype=torch.uint8)
    torch.testing.assert_close(Augment((16, 16), 0.3, True, False, 0.0)(constant), torch.full((8, 3, 16, 16), 77.0))


def test_crops_are_boxes_of_the_image() -> None:
    """Pixels that hold their own place tell which box a crop shows: its area, its shape, and that it is straight."""
    place = torch.arange(64.0) + 0.5
    pixels = torch.stack([place.expand(64, 64), place[:, None].expand(64, 64)]).expand(400, 2, 64, 64)
    crops = Augment((32, 48), 0.3, True, False, 0.0)(pixels)
    across, down = crops[:, 0], crops[:, 1]
    torch.testing.assert_close(across, across[:, :1].expand_as(across), rtol=0, atol=1e-3)
    torch.testing.assert_close(down, down[:, :, :1].expand_as(down), rtol=0, atol=1e-3)
    # Between the middles of two pixels; those at the border repeat.
    width = (across[:, 0, 30] - across[:, 0, 17]) / 13 * 48
    height = (down[:, 20, 0] - down[:, 11, 0]) / 9 * 32
    assert 0.4 < (width < 0).float().mean() < 0.6  # mirrored
    area, ratio = width.abs() * height / 64**2, width.abs() / height
    assert 0.2 < area.min() < 0.35
    assert 0.95 < area.max() <= 1.001
    assert 0.74 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.34
    middle = across[:, 0, 23:25].mean(-1)
    assert middle.min() < 26
    assert middle.max() > 38


def test_small_sizes_are_averaged_not_sampled() -> None:
    stripes = (torch.arange(64) % 2 * 255.0).expand(4, 3, 64, 64)
    small = Augment((64, 64), 1.0, False, False, 0.0)(stripes, (16, 16))
    assert small.shape == (4, 3, 16, 16)
    assert (small - 127.5).abs().max() < 40


def test_mixup_blends_images_and_targets_alike() -> None:
    pixels = torch.arange(6.0).view(6, 1, 1, 1)
    mixed, targets = mix(pixels, torch.eye(6), 1.0)
    torch.testing.assert_close(targets.sum(-1), torch.ones(6))
    torch.testing.assert_close((targets * torch.arange(6.0)).sum(-1), mixed.flatten())
    assert not torch.equal(mixed, pixels)
