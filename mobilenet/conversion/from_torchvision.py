"""torchvision's MobileNet V2: its published weights by name, and state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint, NoOracleError, Options, Oracle, Origin, sha256
from .names import TORCH, ConversionError, Row, Table, measure


TABLE = Table(
    {"architecture": "mobilenet_v2", "padding": "symmetric", "batch_norm_eps": 1e-5},
    {
        "stem": Row("features.0.0", "features.0.1"),
        "first.depthwise": Row("features.1.conv.0.0", "features.1.conv.0.1"),
        "first.project": Row("features.1.conv.1", "features.1.conv.2"),
        "block.expand": Row("features.{from_1}.conv.0.0", "features.{from_1}.conv.0.1"),
        "block.depthwise": Row("features.{from_1}.conv.1.0", "features.{from_1}.conv.1.1"),
        "block.project": Row("features.{from_1}.conv.2", "features.{from_1}.conv.3"),
        "head": Row("features.18.0", "features.18.1"),
        "classifier": Row("classifier.1"),
    },
    TORCH,
)

# Names as torchvision.models.get_weight takes them. The end of a file's name begins its SHA-256.
PUBLISHED = {
    "MobileNet_V2_Weights.IMAGENET1K_V1": "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth",
    "MobileNet_V2_Weights.IMAGENET1K_V2": "https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth",
}


def download(name: str) -> Origin:
    """Fetch published weights into PyTorch's cache.

    Raises:
        ConversionError: The server does not answer, or the file is another.
    """
    url = PUBLISHED[name]
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.split("-")[1])
        except (OSError, RuntimeError) as error:
            raise ConversionError(f"{url}: cannot be downloaded: {error}") from error
    return Origin(name, path, url=url)


def from_tensors(tensors: Mapping[str, Tensor], table: Table, options: Options, path: Path) -> Checkpoint:
    """Describe a state dict of torchvision."""
    config = measure(tensors, table)
    # The second weights were trained, and are evaluated, by another recipe than the first.
    recipe = "torchvision_v2" if sha256(path).startswith("7ebf99e0") else "torchvision"
    return Checkpoint(
        kind="torchvision",
        tensors=dict(tensors),
        table=table,
        config=config | {"image_size": options.size(None)},
        processor=options.processor(recipe, None),
        files=[path],
        oracle=lambda: _oracle(config, tensors),
        license="bsd-3-clause",
    )


def _oracle(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Oracle:
    import torchvision

    if config["num_channels"] != 3:
        raise NoOracleError("torchvision's mobilenet_v2 takes three channels")
    model = torchvision.models.mobilenet_v2(
        num_classes=config["num_labels"], width_mult=config.get("width_multiplier", 1.0)
    )
    model.load_state_dict(tensors)
    return Oracle("torchvision's mobilenet_v2", torchvision.__version__, model.eval())
