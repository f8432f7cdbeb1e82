"""The snippets of the README and of the pages in docs run as they stand."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from mobilenet.architectures_mobilenet import ARCHITECTURES
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from mobilenet import (
    MobileNetConfig,
    MobileNetForImageClassification,
    MobileNetForObjectDetection,
    MobileNetForSemanticSegmentation,
)
from mobilenet.conversion.convert import convert


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    pytest.param(snippet, id=f"{page.stem}-{index}")
    for page in PAGES
    for index, snippet in enumerate(
        re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    )
]

try:
    NAMES_PROCESSOR = callable(transformers.AutoImageProcessor.from_pretrained)
except ImportError:
    NAMES_PROCESSOR = False


# Models that snippets name beside the first, and what they are converted from.
SOURCES = {
    "my-detector": "coco_ssd_mobilenet_v1_1.0_quant_2018_06_29.tflite",
    "my-segmenter": "deeplabv3.tflite",
}


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader of the README stands: a converted model, and a photograph."""
    folder = tmp_path_factory.mktemp("readme")
    convert(str(data / "checkpoints" / "google_mobilenet_v2_1.0_224"), folder / "my-mobilenet", compare=False)
    with Image.open(data / "images" / "000000039769.png") as image:
        image.save(folder / "photo.jpg", quality=95)
        (folder / "photos").mkdir()
        image.save(folder / "photos" / "cats.jpg", quality=95)
    return folder


def test_there_are_snippets():
    assert len(SNIPPETS) >= 5


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # the Trainer's default, without a GPU
@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet, folder, data, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for name, source in SOURCES.items():
        if f'"{name}"' in snippet and not Path(name).exists():
            convert(str(data / "tflite" / source), folder / name, compare=False)
    with Image.open("photo.jpg") as image:
        names = {"dataset": [{"image": image.copy(), "label": label} for label in range(4)]}
    if "AutoImageProcessor" in snippet and not NAMES_PROCESSOR:
        pytest.skip("this transformers offers AutoImageProcessor at its top only beside torchvision")
    exec(compile(snippet, "snippet", "exec"), names)
    if "print(" in snippet:
        expected = "cat" if any(f'"{name}"' in snippet for name in SOURCES) else "tabby"
        assert re.search(rf"\b{expected}\b", capsys.readouterr().out)
    if "maps" in names:
        assert [tuple(m.shape[-2:]) for m in names["maps"]] == [(56, 56), (28, 28), (14, 14), (7, 7)]


TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SIZES = r"^\| `(\w+?_[\w.]+)` \| ([\d.]+) M \| ([\d,]+) M \| "
MODELS = re.findall(SIZES + r"([\d.]+) % \| `(\S+)` \|$", TEXT, re.MULTILINE)
DENSE = re.findall(SIZES + r"m(?:AP|IoU) [\w., ]+ \| `\S+` \|$", TEXT, re.MULTILINE)


def test_the_table_has_every_generation():
    assert len(DENSE) == 6
    architectures = {MobileNetConfig.from_preset(name).architecture for name, *_ in MODELS}
    assert set(ARCHITECTURES) - architectures == {
        "mobilenet_v1_head",
        "mobilenet_v3_large_reduced_tail",
        "mobilenet_v3_small_minimalistic",
        "mobilenet_v3_small_reduced_tail",
    }


def assert_is_as_large(model, parameters, multiply_adds):
    size = model.config.image_size
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, size, size, device="meta"))
    assert f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}" == parameters
    assert f"{counter.get_total_flops() / 2e6:,.0f}" == multiply_adds


@pytest.mark.any_version
@pytest.mark.parametrize(("preset", "parameters", "multiply_adds", "source"), [(*row[:3], row[4]) for row in MODELS])
def test_networks_are_as_large_as_the_table_says(preset, parameters, multiply_adds, source):
    config = MobileNetConfig.from_preset(preset, num_labels=1000 if "v4" in source else 1001)
    with torch.device("meta"):
        model = MobileNetForImageClassification(config)
    assert_is_as_large(model, parameters, multiply_adds)


@pytest.mark.any_version
@pytest.mark.parametrize(("preset", "parameters", "multiply_adds"), DENSE)
def test_detectors_and_segmenters_are_as_large_as_the_table_says(preset, parameters, multiply_adds):
    config = MobileNetConfig.from_preset(preset)
    kind = MobileNetForObjectDetection if config.detector else MobileNetForSemanticSegmentation
    with torch.device("meta"):
        model = kind(config)
    assert_is_as_large(model, parameters, multiply_adds)
