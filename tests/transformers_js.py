"""The real transformers.js runs what `mobilenet export --target transformers.js` writes.

It needs Node and npm, so pytest does not collect it by itself: `nox -s javascript` installs the package and runs it.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from oracles import as_trained, logits, randomize_norms
from typer.testing import CliRunner

from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor
from mobilenet.cli import app
from mobilenet.conversion.convert import convert
from mobilenet.export.export import export


def run_node(exports: Path, image: Path, pixels: Path) -> list[dict]:
    """What transformers.js makes of an image and of pixels, in float32 and in int8."""
    # Node looks for packages beside the script.
    script = shutil.copy(Path(__file__).with_suffix(".mjs"), os.environ["NODE_FOLDER"])
    command = ["node", script, exports, "mobilenet", image, pixels]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("preset", ["mobilenet_v3_small_1.0_224", "mobilenet_v4_conv_small_224"])
def test_transformers_js_has_v3_and_v4(preset: str, data: Path, cats: Path, tmp_path: Path) -> None:
    """No weights are at hand, so these are random, and all that counts is that they compute as torch does."""
    exports = tmp_path / "exports"
    processor = MobileNetImageProcessor.from_recipe("google", 224)
    pixel_values = processor(cats, return_tensors="pt").pixel_values
    network = randomize_norms(MobileNetForImageClassification(MobileNetConfig.from_preset(preset, num_labels=10)))
    as_trained(network.eval(), pixel_values)
    network.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    export(str(tmp_path / "model"), exports / "mobilenet", "transformers.js", images=cats.parent, min_agreement=0)
    (tmp_path / "pixels").write_bytes(pixel_values.contiguous().numpy().tobytes())
    single, int8 = run_node(exports, cats, tmp_path / "pixels")
    torch.testing.assert_close(torch.tensor(single["logits"]), logits(network, pixel_values)[0], rtol=0, atol=1e-3)
    assert (single["dtype"], int8["dtype"]) == ("fp32", "q8")
    assert [len(found["answers"]) for found in (single, int8)] == [3, 3]


def test_transformers_js_answers_as_torch(data: Path, cats: Path, tmp_path: Path) -> None:
    """Its logits are torch's; its own image processor, which resizes otherwise, leads to the same labels."""
    model, exports = tmp_path / "model", tmp_path / "exports"
    convert(str(data / "checkpoints" / "google_mobilenet_v2_1.0_224"), model, compare=False)
    images = shutil.copytree(data / "imagenet_sample", tmp_path / "images", ignore=lambda _, names: sorted(names)[60:])
    arguments = (model, exports / "mobilenet", "--target", "transformers.js", "--images", images)
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    pixel_values = MobileNetImageProcessor.from_pretrained(model)(cats, return_tensors="pt").pixel_values
    (tmp_path / "pixels").write_bytes(pixel_values.contiguous().numpy().tobytes())
    with torch.no_grad():
        expected = MobileNetForImageClassification.from_pretrained(model)(pixel_values).logits[0]
    single, int8 = run_node(exports, cats, tmp_path / "pixels")
    assert (single["dtype"], int8["dtype"]) == ("fp32", "q8")
    for found in (single, int8):
        labels = [answer["label"] for answer in found["answers"]]
        assert labels == ["tabby, tabby cat", "tiger cat", "Egyptian cat"]
    # transformers.js reduces images without a filter; sharp has Pillow's.
    assert single["answers"][0]["score"] == pytest.approx(0.785, abs=0.06)
    assert single["answers_when_resized"][0]["score"] == pytest.approx(0.785, abs=0.01)
    torch.testing.assert_close(torch.tensor(single["logits"]), expected, rtol=0, atol=1e-3)
    assert torch.corrcoef(torch.stack([torch.tensor(int8["logits"]), expected]))[0, 1] > 0.98
