"""Drawn images, where no photographs are at hand."""

from pathlib import Path

import numpy as np
from PIL import Image


def draw_images(folder: Path, count: int = 8) -> list[str]:
    """Write synthetic images, always the same: coarse colors under fine noise, upright and lying."""
    random = np.random.default_rng(0)
    paths = []
    for index in range(count):
        size = (333, 250) if index % 2 else (240, 320)
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        fine = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), np.uint8))
        paths.append(str(folder / f"{index}.png"))
        Image.blend(coarse, fine, 0.1).save(paths[-1])
    return paths
