"""timm's MobileNets: repositories of the Hub, and state dicts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL.Image import Resampling
from torch import Tensor

from mobilenet.image_processing_mobilenet import MobileNetImageProcessor

from .checkpoint import (
    Checkpoint,
    NoOracleError,
    Options,
    Oracle,
    Origin,
    read_json,
    read_torch,
    understanding,
    weights_file,
)
from .labels import check
from .names import TORCH, ConversionError, Row, Table, measure


_CONFIG = {"padding": "symmetric", "batch_norm_eps": 1e-5, "channel_divisor": 8}

TABLES = (
    Table(
        {"architecture": "mobilenet_v1", **_CONFIG},
        {
            "stem": Row("conv_stem", "bn1"),
            "block.depthwise": Row("blocks.{stage}.{block}.conv_dw", "blocks.{stage}.{block}.bn1"),
            "block.pointwise": Row("blocks.{stage}.{block}.conv_pw", "blocks.{stage}.{block}.bn2"),
            "classifier": Row("classifier"),
        },
        TORCH,
    ),
    Table(
        {"architecture": "mobilenet_v2", **_CONFIG},
        {
            "stem": Row("conv_stem", "bn1"),
            "first.depthwise": Row("blocks.0.0.conv_dw", "blocks.0.0.bn1"),
            "first.project": Row("blocks.0.0.conv_pw", "blocks.0.0.bn2"),
            "block.expand": Row("blocks.{row}.{repeat}.conv_pw", "blocks.{row}.{repeat}.bn1"),
            "block.depthwise": Row("blocks.{row}.{repeat}.conv_dw", "blocks.{row}.{repeat}.bn2"),
            "block.project": Row("blocks.{row}.{repeat}.conv_pwl", "blocks.{row}.{repeat}.bn3"),
            "head": Row("conv_head", "bn2"),
            "classifier": Row("classifier"),
        },
        TORCH,
    ),
)

# Others have more blocks than the papers' tables (110d, 120d), or a head that MobileNet V1 lacks (100h).
_PLAIN = re.compile(r"mobilenetv([12])_(\d{3})")


def detect(origin: Origin) -> bool:
    """Whether a folder is a repository of timm."""
    config = origin.path / "config.json"
    return config.is_file() and {"architecture", "num_classes"} <= read_json(config).keys()


def read(origin: Origin, options: Options) -> Checkpoint:
    """Read a repository of timm.

    Raises:
        ConversionError: A file is missing or broken, or the network is no plain MobileNet V1 or V2.
    """
    path = origin.path / "config.json"
    config = read_json(path)
    found = _PLAIN.fullmatch(str(config["architecture"]))
    if not found:
        raise ConversionError(
            f"{origin.given}: must be timm's mobilenetv1_<width> or mobilenetv2_<width> as the papers print them, got "
            f"{config['architecture']}."
        )
    weights = weights_file(origin.path)
    table = TABLES[int(found[1]) - 1]
    checkpoint = from_tensors(read_torch(weights), table, options, path, weights)
    with understanding(path):
        if config.get("label_names") is not None:
            checkpoint.labels = check(config["label_names"], checkpoint.config["num_labels"], path)
        recorded = config.get("pretrained_cfg", {})
        if recorded.get("license"):
            checkpoint.license = str(recorded["license"])
        if options == Options() and "mean" in recorded:
            checkpoint.processor = _processor(recorded)
            checkpoint.config["image_size"] = recorded["input_size"][-1]
    return checkpoint


def from_tensors(tensors: Mapping[str, Tensor], table: Table, options: Options, *files: Path) -> Checkpoint:
    """Describe a state dict of timm."""
    config = measure(tensors, table)
    width = config.get("width_multiplier", 1.0)
    version = config["architecture"][-1]
    # V1 was trained in 2024 by a recipe of its own; timm/models/efficientnet.py: default_cfgs.
    recipe = "timm" if version == "2" else "timm_ra4_125" if width == 1.25 else "timm_ra4"
    return Checkpoint(
        kind="timm",
        tensors=dict(tensors),
        table=table,
        config=config | {"image_size": options.size(None)},
        processor=options.processor(recipe, None),
        files=list(files),
        oracle=lambda: _oracle(f"mobilenetv{version}_{round(100 * width):03d}", config, tensors),
    )


def _processor(recorded: dict[str, Any]) -> MobileNetImageProcessor:
    size = recorded["input_size"][-1]
    return MobileNetImageProcessor(
        size=int(size / recorded.get("crop_pct", 0.875)),
        crop_size=size,
        resample=Resampling[recorded.get("interpolation", "bicubic").upper()],
        image_mean=recorded["mean"],
        image_std=recorded["std"],
    )


def _oracle(name: str, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Oracle:
    import timm

    if not timm.is_model(name):
        raise NoOracleError(f"timm has no {name}")
    model = timm.create_model(name, num_classes=config["num_labels"], in_chans=config["num_channels"]).eval()
    model.load_state_dict(tensors)
    return Oracle(f"timm's {name}", timm.__version__, model)
