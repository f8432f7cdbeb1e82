"""The depthwise separable network as courses teach it: convolutions with biases, ReLU, no batch norm."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilenet.configuration_mobilenet import PRESETS

from .checkpoint import Checkpoint, Options, Oracle
from .rename import TORCH, Row, Table, infer_config


TABLE = Table(
    PRESETS["depthwise_separable_plain"],
    {
        "stem": Row("conv1"),
        "block.depthwise": Row("dw_conv{from_2}.depthwise"),
        "block.pointwise": Row("dw_conv{from_2}.pointwise"),
        "classifier": Row("fc"),
    },
    TORCH,
)


def from_tensors(tensors: Mapping[str, Tensor], table: Table, options: Options, path: Path) -> Checkpoint:
    """Describe a state dict of the plain network."""
    return Checkpoint(
        kind="the plain depthwise separable network",
        tensors=dict(tensors),
        table=table,
        config=infer_config(tensors, table) | {"image_size": options.size(None)},
        processor=options.processor("torchvision", None),
        files=[path],
        oracle=lambda: Oracle("the network written out in torch", torch.__version__, partial(_run, tensors)),
        license=None,
    )


def _run(tensors: Mapping[str, Tensor], pixel_values: Tensor) -> Tensor:
    """The network itself, which has no other runtime than PyTorch: logits of images (B, C, H, W)."""

    def conv(x: Tensor, name: str, **kwargs: int) -> Tensor:
        return F.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], **kwargs)

    x = F.relu(conv(pixel_values, "conv1", stride=2, padding=1))
    for number, stride in enumerate((1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1), start=2):
        x = conv(x, f"dw_conv{number}.depthwise", stride=stride, padding=1, groups=x.shape[1])
        x = F.relu(conv(x, f"dw_conv{number}.pointwise"))
    return F.linear(x.mean((-2, -1)), tensors["fc.weight"], tensors["fc.bias"])
