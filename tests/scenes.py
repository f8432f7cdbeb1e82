"""Images for what detects and segments."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def coarse_images(folder: Path, sizes: Mapping[str, tuple[int, int]]) -> Path:
    """Write images of coarse colors into a folder, by their names and sizes."""
    random = np.random.default_rng(0)
    for name, size in sizes.items():
        (folder / name).parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8))
        coarse.resize(size, Image.Resampling.NEAREST).save(folder / name, quality=95)
    return folder
