"""What is shared and what is repeated: threads that get the same bits, and loads that leave nothing behind.

MOBILENET_TEST_SOAK sets how many seconds the threads work; 2 by default.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import randomize_norms
from PIL import Image

from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor
from mobilenet.loading import load


pytestmark = pytest.mark.any_version


SECONDS = float(os.environ.get("MOBILENET_TEST_SOAK", "2"))
THREADS = 8
SIZES = ((90, 70), (64, 64), (33, 200), (641, 480), (130, 97), (7, 5), (300, 300))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which every layer matters."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("soak")
    model = randomize_norms(MobileNetForImageClassification(MobileNetConfig(width_multiplier=0.35, num_labels=9)))
    torch.nn.init.normal_(model.classifier.weight, std=0.01)
    model.save_pretrained(folder)
    MobileNetImageProcessor.from_recipe("google", 96).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """Images of several sizes and formats, as the bytes of files."""
    random = np.random.default_rng(0)
    result = []
    for size, name in zip(SIZES, cycle(("JPEG", "PNG", "WEBP")), strict=False):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(buffer, name)
        result.append(buffer.getvalue())
    return result


@pytest.mark.parametrize("kind", ["network", "fused"])
def test_threads_that_share_a_model_get_the_bits_that_one_thread_gets(
    folder: Path, images: list[bytes], kind: str
) -> None:
    if kind == "fused":
        classifier = load(str(folder))
        read, network = classifier.read, classifier.network
    else:
        model = MobileNetForImageClassification.from_pretrained(folder).eval()
        processor = MobileNetImageProcessor.from_pretrained(folder)

        def read(image: bytes) -> np.ndarray:
            return processor(image, return_tensors="np").pixel_values

        def network(pixels: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return model(torch.from_numpy(pixels)).logits.numpy()

    expected = [(pixels := read(image), network(pixels)) for image in images]
    assert len({answer.tolist()[0][0] for _, answer in expected}) == len(images)  # or all would pass
    deadline = time.monotonic() + SECONDS / 2

    def work(thread: int) -> int:
        answers = 0
        while time.monotonic() < deadline or answers < len(images):
            index = (thread + answers) % len(images)
            pixels = read(images[index])
            assert np.array_equal(pixels, expected[index][0])
            assert np.array_equal(network(pixels), expected[index][1])
            answers += 1
        return answers

    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        answers = list(threads.map(work, range(THREADS)))
    assert min(answers) >= len(images)
    print(f"\n{kind}: {sum(answers)} answers of {THREADS} threads, all equal bit for bit")


LOAD = """
import gc, os, sys
import numpy as np
import torch
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from mobilenet.loading import load
torch.set_num_threads(1)
folder, kind = sys.argv[1:]

def resident():
    gc.collect()
    return os.sysconf("SC_PAGE_SIZE") * int(open("/proc/self/statm").read().split()[1])

def once():
    if kind == "classify":
        classifier = load(folder)
        classifier.network(np.zeros((1, 3, 96, 96), np.float32))
    else:
        AutoImageProcessor.from_pretrained(folder)
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        with torch.inference_mode():
            model(torch.zeros(1, 3, 96, 96))

for _ in range(8):
    once()
before = resident()
for _ in range(24):
    once()
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="this system does not tell resident memory")
@pytest.mark.parametrize("kind", ["from_pretrained", "classify"])
def test_repeated_loads_leak_nothing(folder: Path, kind: str) -> None:
    """24 loads, after some to warm up, take less than the weights of four."""
    environment = {
        **os.environ,
        **{"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        "MALLOC_ARENA_MAX": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), kind], env=environment, capture_output=True, text=True, check=True
    )
    grown = int(done.stdout.splitlines()[-1])
    print(f"\n{kind}: {grown} bytes in 24 loads")
    assert grown < 4 * (folder / "model.safetensors").stat().st_size
