"""Repositories as the first version saved them: they load whole, predict as they did, and keep their fields."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import logits
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageClassification

from mobilenet import MobileNetForImageClassification, MobileNetImageProcessor


ROOT = Path(__file__).parents[1]

# config.json, word for word but for the versions.
COMMON = {
    "architectures": ["MobileNetForImageClassification"],
    "auto_map": {
        "AutoBackbone": "modeling_mobilenet.MobileNetBackbone",
        "AutoConfig": "configuration_mobilenet.MobileNetConfig",
        "AutoModel": "modeling_mobilenet.MobileNetModel",
        "AutoModelForImageClassification": "modeling_mobilenet.MobileNetForImageClassification",
    },
    "batch_norm_eps": 0.001,
    "batch_norm_momentum": 0.1,
    "depthwise_activation": True,
    "fused": False,
    "hidden_act": "relu6",
    "id2label": {"0": "owl", "1": "parrot", "2": "burger"},
    "image_size": 64,
    "label2id": {"owl": 0, "parrot": 1, "burger": 2},
    "model_type": "mobilenet",
    "num_channels": 3,
    "out_features": ["stage5"],
    "out_indices": [5],
    "output_stride": 32,
    "padding": "same",
    "shrink_head": False,
    "use_batch_norm": True,
}
V1 = {"architecture": "mobilenet_v1", "channel_divisor": 1, "classifier_dropout": 0.001, "width_multiplier": 0.25}
V2 = {"architecture": "mobilenet_v2", "channel_divisor": 8, "classifier_dropout": 0.2, "width_multiplier": 0.35}
CONFIGS = {
    "V1": COMMON | V1,
    "V2": COMMON | V2,
    "V2, output stride 8": COMMON | V2 | {"output_stride": 8, "padding": "symmetric"},
    "V1, fused": COMMON | V1 | {"use_batch_norm": False, "fused": True},
    "V2, fused": COMMON | V2 | {"use_batch_norm": False, "fused": True},
    "V1, plain": COMMON
    | V1
    | {
        "hidden_act": "relu",
        "padding": "symmetric",
        "use_batch_norm": False,
        "depthwise_activation": False,
        "classifier_dropout": 0.0,
    },
}
# What the first version predicts for `images()` with the weights of `tensors()`, in double precision.
LOGITS = {
    "V1": [[-4.15019456, -2.59778861, 0.13679872], [-3.90812489, -1.39173911, -0.26363403]],
    "V2": [[-2.8875649, 5.39556053, -2.81994842], [-3.84803242, 4.90948058, -3.15404226]],
    "V2, output stride 8": [[-3.85769913, 5.00723902, -2.60828365], [-4.14142809, 4.75224879, -2.80364884]],
    "V1, fused": [[-0.17438847, 0.32996521, 0.14879365], [-0.10587956, 0.29436354, 0.09421757]],
    "V2, fused": [[-3.9825554, -3.62523522, -0.13084447], [-4.2299362, -4.05825181, -0.35487002]],
    "V1, plain": [[-27.98389886, 81.44081021, -55.58805281], [-18.52791755, 79.68531409, -59.37553229]],
}

# Input and output channels of each block, and the hidden ones of V2, by stage; widths 0.25 and 0.35.
BLOCKS_V1 = (
    ((8, 16),),
    ((16, 32), (32, 32)),
    ((32, 64), (64, 64)),
    ((64, 128), *[(128, 128)] * 5),
    ((128, 256), (256, 256)),
)
BLOCKS_V2 = (
    ((16, 16, 8),),
    ((8, 48, 8), (8, 48, 8)),
    ((8, 48, 16), (16, 96, 16), (16, 96, 16)),
    ((16, 96, 24), *[(24, 144, 24)] * 3, (24, 144, 32), *[(32, 192, 32)] * 2),
    ((32, 192, 56), *[(56, 336, 56)] * 2, (56, 336, 112)),
)


def unit(name: str, shape: tuple[int, ...], has_norm: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a convolution, and of its batch norm or its bias."""
    of_norm = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), shape[:1])
    of_norm["num_batches_tracked"] = ()
    rest = (
        {f"{name}.norm.{part}": of for part, of in of_norm.items()} if has_norm else {f"{name}.conv.bias": shape[:1]}
    )
    return {f"{name}.conv.weight": shape, **rest}


def names(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a network."""
    has_norm = config["use_batch_norm"]
    is_v1 = config["architecture"] == "mobilenet_v1"
    result = unit("backbone.stem", (8 if is_v1 else 16, 3, 3, 3), has_norm)
    for stage, blocks in enumerate(BLOCKS_V1 if is_v1 else BLOCKS_V2):
        for number, channels in enumerate(blocks):
            name = f"backbone.stages.{stage}.{number}"
            start, hidden, end = (channels[0], *channels) if is_v1 else channels
            if hidden != start:
                result |= unit(f"{name}.expand", (hidden, start, 1, 1), has_norm)
            result |= unit(f"{name}.depthwise", (hidden, 1, 3, 3), has_norm)
            result |= unit(f"{name}.{'pointwise' if is_v1 else 'project'}", (end, hidden, 1, 1), has_norm)
    if not is_v1:
        result |= unit("backbone.head", (1280, 112, 1, 1), has_norm)
    return result | {"classifier.weight": (3, 256 if is_v1 else 1280), "classifier.bias": (3,)}


def tensors(config: dict) -> dict[str, Tensor]:
    """Weights of a sound scale, from numpy's legacy generator, whose stream never changes."""
    random = np.random.RandomState(0)
    result = {}
    for name, shape in names(config).items():
        values = random.standard_normal(shape)
        if name.endswith("num_batches_tracked"):
            result[name] = torch.tensor(7)
            continue
        if name.endswith("running_var") or name.endswith("norm.weight"):
            values = 0.5 + np.abs(values)
        elif len(shape) > 1:
            values *= np.sqrt(2 / np.prod(shape[1:]))
        else:
            values *= 0.2
        result[name] = torch.tensor(values, dtype=torch.float32)
    return result


def images() -> Tensor:
    """Two images of noise."""
    return torch.tensor(np.random.RandomState(1).standard_normal((2, 3, 65, 94)), dtype=torch.float32)


@pytest.fixture(params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A name, and the folder of a repository as it was saved."""
    config = CONFIGS[request.param]
    versions = {"dtype": "float32", "transformers_version": "5.23.0"}
    (tmp_path / "config.json").write_text(json.dumps(config | versions))
    save_file(tensors(config), tmp_path / "model.safetensors", {"format": "pt"})
    return request.param, tmp_path


def test_it_loads_whole_and_predicts_as_it_did(saved: tuple[str, Path]) -> None:
    name, folder = saved
    model, report = AutoModelForImageClassification.from_pretrained(
        folder, trust_remote_code=False, output_loading_info=True
    )
    assert not any(report.values())
    expected = tensors(CONFIGS[name])
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    found = logits(model.double(), images().double())
    torch.testing.assert_close(found, torch.tensor(LOGITS[name], dtype=torch.float64), rtol=0, atol=1e-7)


def test_saved_again_it_has_the_same_fields_and_bits(saved: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = saved
    model = MobileNetForImageClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    fields = json.loads((tmp_path / "again" / "config.json").read_text())
    versions, before = {"dtype", "torch_dtype", "transformers_version"}, dict(CONFIGS[name])
    assert before.pop("auto_map").items() <= fields.pop("auto_map").items()  # classes may come, and none goes
    assert {field: value for field, value in fields.items() if field not in versions} == before
    again = MobileNetForImageClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, images()), logits(model, images()))


@pytest.mark.parametrize("saved", ["V1", "V2, fused"], indirect=True)
def test_with_todays_code_beside_it_no_package_is_needed(saved: tuple[str, Path]) -> None:
    _, folder = saved
    for file in ROOT.glob("*_mobilenet.py"):
        shutil.copy(file, folder)
    processor = MobileNetImageProcessor.from_recipe("timm", 64)
    processor.save_pretrained(folder)
    image = Image.fromarray(np.random.RandomState(2).randint(0, 256, (90, 120, 3), np.uint8))
    image.save(folder / "image.png")
    client = [sys.executable, "-I", Path(__file__).parent / "client.py", folder, folder / "image.png"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run([*client, "--trust", "true"], env=environment, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert all(name.startswith("transformers_modules.") for name in result["classes"])
    model = MobileNetForImageClassification.from_pretrained(folder)
    assert result["logits"] == logits(model, processor(image, return_tensors="pt").pixel_values).tolist()
