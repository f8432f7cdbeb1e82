"""A dataset of three colors, and short training runs on it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from mobilenet.training.options import Options


COLORS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 50, 40)}


def paint(folder: Path, count: int, seed: int = 0) -> Path:
    """Noisy images of 24x20 pixels, a folder for each of three colors."""
    generator = np.random.default_rng(seed)
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.normal(color, 30, (20, 24, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:03}.png")
    return folder


def options(dataset: Path, output: Path, **kwargs: object) -> Options:
    """A small network and few steps."""
    from_scratch = {} if "model" in kwargs else {"width": 0.1, "crop_fraction": 1.0}
    return Options(
        dataset=str(dataset),
        output=str(output),
        **{
            **from_scratch,
            "image_size": 64,
            "epochs": 3,
            "batch_size": 12,
            "learning_rate": 0.3,
            "precision": "float32",
            **kwargs,
        },
    )


def weights(repository: Path) -> dict[str, torch.Tensor]:
    return load_file(repository / "model.safetensors")
