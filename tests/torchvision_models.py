"""torchvision's own networks, with random weights: `python torchvision_models.py FOLDER` writes weights and outputs.

In a process of its own, as transformers acts otherwise where torchvision has been imported.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.peers import import_torchvision


CLASSIFIERS = ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")
SEGMENTERS = ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large")
DETECTOR = "ssdlite320_mobilenet_v3_large"
SIZES = ((97, 130), (161, 95))


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Random weights that keep the scale of activations, and statistics of its own for each norm."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@torch.no_grad()
def write(folder: Path) -> None:
    """Write NAME.pth and NAME.safetensors for each network: its weights, and what it makes of images."""
    import_torchvision()
    from torchvision.models import get_model

    torch.manual_seed(0)
    models = {name: get_model(name, weights=None, num_classes=11) for name in CLASSIFIERS}
    models |= {name: get_model(name, weights=None, weights_backbone=None) for name in SEGMENTERS}
    for name, model in models.items():
        torch.save(randomize(model).state_dict(), folder / f"{name}.pth")
        model.double()  # no difference can pass for rounding
        tensors = {}
        for index, size in enumerate(SIZES):
            images = torch.randn(2, 3, *size).double()
            output = model(images)
            logits = output["out"] if name in SEGMENTERS else output
            tensors |= {f"images{index}": images, f"logits{index}": logits.contiguous()}
        save_file(tensors, folder / f"{name}.safetensors")
    model = randomize(get_model(DETECTOR, weights=None, weights_backbone=None))
    for predict in (*model.head.classification_head.module_list, *model.head.regression_head.module_list):
        nn.init.normal_(predict[1].weight, std=0.03)
    torch.save(model.state_dict(), folder / f"{DETECTOR}.pth")
    model, images = model.double(), torch.rand(3, 3, 320, 320).double()
    found = {f"{key}{index}": value for index, one in enumerate(model(list(images))) for key, value in one.items()}
    save_file({"images": images, **found}, folder / f"{DETECTOR}.safetensors")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
