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
from typer.testing import CliRunner

from mobilenet import MobileNetForImageClassification, MobileNetImageProcessor
from mobilenet.cli import app
from mobilenet.conversion.convert import convert


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
    # Node looks for packages beside the script.
    script = shutil.copy(Path(__file__).with_suffix(".mjs"), os.environ["NODE_FOLDER"])
    output = subprocess.run(
        ["node", script, exports, "mobilenet", cats, tmp_path / "pixels"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    single, int8 = map(json.loads, output.splitlines())
    assert (single["dtype"], int8["dtype"]) == ("fp32", "q8")
    for found in (single, int8):
        labels = [answer["label"] for answer in found["answers"]]
        assert labels == ["tabby, tabby cat", "tiger cat", "Egyptian cat"]
    # transformers.js reduces images without a filter; sharp has Pillow's.
    assert single["answers"][0]["score"] == pytest.approx(0.785, abs=0.06)
    assert single["answers_when_resized"][0]["score"] == pytest.approx(0.785, abs=0.01)
    torch.testing.assert_close(torch.tensor(single["logits"]), expected, rtol=0, atol=1e-3)
    assert torch.corrcoef(torch.stack([torch.tensor(int8["logits"]), expected]))[0, 1] > 0.98
