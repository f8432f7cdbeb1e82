"""A dataset of three colors, and short training runs on it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from mobilenet.training.options import Options


ROOT = Path(__file__).parents[1]
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


SCRIPT = """
import sys, datasets, torch
torch.set_num_threads(1)
datasets.config.HF_DATASETS_CACHE = sys.argv[1]
from mobilenet.training.options import Options
from mobilenet.training.run import run
run(Options(dataset=sys.argv[2], output=sys.argv[3], **eval(sys.argv[4])))
"""


def start(dataset: Path, output: Path, given: dict, *launcher: str) -> subprocess.Popen:
    """A run in a process of its own."""
    script = output.with_suffix(".py")
    script.write_text(SCRIPT, encoding="utf-8")
    arguments = [*launcher, str(script), str(output.with_suffix(".cache")), str(dataset), str(output), repr(given)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, text=True)
