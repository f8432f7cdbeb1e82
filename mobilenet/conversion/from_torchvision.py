"""torchvision's MobileNet V2 and V3, its detector and its segmenters on V3: weights by name, and state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobilenet.configuration_mobilenet import PRESETS
from mobilenet.heads_mobilenet import DETECTORS
from mobilenet.repository import sha256

from .checkpoint import Checkpoint, DetectionOracle, DetectionResults, NoOracleError, Options, Oracle, Origin
from .rename import TORCH, ConversionError, Row, Table, infer_config


_V2 = Table(
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


def _v3(size: str, head: int, first: dict[str, Row]) -> Table:
    """Layers of a block are counted, so that squeeze-and-excite moves what follows it."""
    rows = {
        "stem": Row("features.0.0", "features.0.1"),
        **first,
        "block.expand": Row("features.{from_1}.block.0.0", "features.{from_1}.block.0.1"),
        "block.depthwise": Row("features.{from_1}.block.1.0", "features.{from_1}.block.1.1"),
        "block.squeeze.reduce": Row("features.{from_1}.block.2.fc1"),
        "block.squeeze.expand": Row("features.{from_1}.block.2.fc2"),
        "squeezed.project": Row("features.{from_1}.block.3.0", "features.{from_1}.block.3.1"),
        "block.project": Row("features.{from_1}.block.2.0", "features.{from_1}.block.2.1"),
        "head": Row(f"features.{head}.0", f"features.{head}.1"),
        "pre_logits": Row("classifier.0", layout="OI"),
        "classifier": Row("classifier.3"),
    }
    return Table({"architecture": f"mobilenet_v3_{size}", "padding": "symmetric", "batch_norm_eps": 1e-3}, rows, TORCH)


TABLES = (
    _V2,
    _v3(
        "large",
        16,
        {
            "first.depthwise": Row("features.1.block.0.0", "features.1.block.0.1"),
            "first.project": Row("features.1.block.1.0", "features.1.block.1.1"),
        },
    ),
    _v3(
        "small",
        12,
        {
            "first.depthwise": Row("features.1.block.0.0", "features.1.block.0.1"),
            "first.squeeze.reduce": Row("features.1.block.1.fc1"),
            "first.squeeze.expand": Row("features.1.block.1.fc2"),
            "first.project": Row("features.1.block.2.0", "features.1.block.2.1"),
        },
    ),
)

_SEGMENTER = {"output_stride": 16, "dilates_strided": True, "padding": "symmetric", "batch_norm_eps": 1e-3}


def _segmenter(head: str, rows: dict[str, Row]) -> Table:
    """What lies behind features[16] of a V3 large, whose last stage is dilated; without the auxiliary classifier."""
    large = next(table for table in TABLES if table.config["architecture"] == "mobilenet_v3_large")
    features = {
        ours: row._replace(
            conv=row.conv.replace("features.", "backbone."),
            norm=row.norm and row.norm.replace("features.", "backbone."),
        )
        for ours, row in large.rows.items()
        if ours not in ("pre_logits", "classifier")
    }
    rows = features | {f"segmentation_head.{ours}": row for ours, row in rows.items()}
    config = {"architecture": "mobilenet_v3_large", **_SEGMENTER, "segmentation_head": head}
    return Table(config, rows, TORCH, dropped=(r"aux_classifier\..+",))


_SEGMENTERS = (
    _segmenter(
        "deeplab_v3",
        {
            **{
                f"branches.{index}": Row(f"classifier.0.convs.{index}.0", f"classifier.0.convs.{index}.1")
                for index in range(4)
            },
            "branches.4": Row("classifier.0.convs.4.1", "classifier.0.convs.4.2"),
            "project": Row("classifier.0.project.0", "classifier.0.project.1"),
            "refine": Row("classifier.1", "classifier.2"),
            "classifier": Row("classifier.4"),
        },
    ),
    _segmenter(
        "lraspp",
        {
            "project": Row("classifier.cbr.0", "classifier.cbr.1"),
            "gate": Row("classifier.scale.1"),
            "low_classifier": Row("classifier.low_classifier"),
            "classifier": Row("classifier.high_classifier"),
        },
    ),
)
# Its function of each head.
_FUNCTIONS = {"deeplab_v3": "deeplabv3_mobilenet_v3_large", "lraspp": "lraspp_mobilenet_v3_large"}


def _ssdlite(size: str, detector: str, blocks: int) -> Table:
    """Names of models/detection/ssdlite.py: the backbone is cut in two within the first block of the last stage.

    Args:
        size: Of the network.
        detector: A key of DETECTORS.
        blocks: How many there are before that block.
    """
    plain = next(table for table in TABLES if table.config["architecture"] == f"mobilenet_v3_{size}").rows
    first, second = "backbone.features.0", "backbone.features.1"

    def named(row: Row, old: str, new: str) -> Row:
        return row._replace(conv=row.conv.replace(old, new), norm=row.norm and row.norm.replace(old, new))

    rows = {key: named(row, "features", first) for key, row in plain.items() if "classifier" not in row.conv}
    of_blocks = {key.partition(".")[2]: row for key, row in plain.items() if key.startswith(("block.", "squeezed."))}
    # Every block of the last stage has squeeze-and-excite, which moves what follows it.
    of_blocks["project"] = plain["squeezed.project"]
    for index, number in ((blocks, 0), (blocks + 1, 1), (blocks + 2, 2)):
        old = "features.{from_1}" if number else "features.{from_1}.block"
        for role, row in of_blocks.items():
            rows[f"block_{index}.{role}"] = named(row, old, f"{second}.{number}")
    rows[f"block_{blocks}.expand"] = Row(f"{first}.{blocks + 1}.0", f"{first}.{blocks + 1}.1")
    rows["head"] = Row(f"{second}.3.0", f"{second}.3.1")
    for index in range(4):
        for part, role in enumerate(("reduce", "depthwise", "expand")):
            name = f"backbone.extra.{index}.{part}"
            rows[f"extras.{index}.{role}"] = Row(f"{name}.0", f"{name}.1")
    for kind, ours in (("classification", "class"), ("regression", "box")):
        for index in range(6):
            name = f"head.{kind}_head.module_list.{index}"
            rows[f"{ours}_predictors.{index}.depthwise"] = Row(f"{name}.0.0", f"{name}.0.1")
            rows[f"{ours}_predictors.{index}"] = Row(f"{name}.1")
    return Table(PRESETS[detector] | {"batch_norm_eps": 1e-3}, rows, TORCH)


TABLES += (_ssdlite("large", "ssdlite320_mobilenet_v3_large", 12), *_SEGMENTERS)

# Names as torchvision.models.get_weight takes them. The end of a file's name begins its SHA-256.
PUBLISHED = {
    "MobileNet_V2_Weights.IMAGENET1K_V1": "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth",
    "MobileNet_V2_Weights.IMAGENET1K_V2": "https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth",
    "MobileNet_V3_Large_Weights.IMAGENET1K_V1": "https://download.pytorch.org/models/mobilenet_v3_large-8738ca79.pth",
    "MobileNet_V3_Large_Weights.IMAGENET1K_V2": "https://download.pytorch.org/models/mobilenet_v3_large-5c1a4163.pth",
    "MobileNet_V3_Small_Weights.IMAGENET1K_V1": "https://download.pytorch.org/models/mobilenet_v3_small-047dcff4.pth",
    "SSDLite320_MobileNet_V3_Large_Weights.COCO_V1": (
        "https://download.pytorch.org/models/ssdlite320_mobilenet_v3_large_coco-a79551df.pth"
    ),
    **{
        f"{name}_Weights.COCO_WITH_VOC_LABELS_V1": f"https://download.pytorch.org/models/{file}.pth"
        for name, file in (
            ("LRASPP_MobileNet_V3_Large", "lraspp_mobilenet_v3_large-d234d4ea"),
            ("DeepLabV3_MobileNet_V3_Large", "deeplabv3_mobilenet_v3_large-fc3c493d"),
        )
    },
}
# What its functions are called, for the weights that each has.
PUBLISHED |= {
    function: next(url for url in PUBLISHED.values() if f"/{function}-" in url) for function in _FUNCTIONS.values()
}
PUBLISHED["ssdlite320_mobilenet_v3_large"] = PUBLISHED["SSDLite320_MobileNet_V3_Large_Weights.COCO_V1"]
# The second weights of a network were trained, and are evaluated, by another recipe than the first.
_SECOND = ("7ebf99e0", "5c1a4163")


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
    config = infer_config(tensors, table)
    if detector := DETECTORS.get(config.get("detector")):
        size = config["image_size"]
        return Checkpoint(
            kind="torchvision",
            tensors=dict(tensors),
            table=table,
            config=config | {"image_size": options.size(size)},
            processor=options.processor("ssd", size, **detector.suppression._asdict()),
            files=[path],
            oracle=lambda: _detection_oracle(config, tensors),
            license="bsd-3-clause",
        )
    if head := config.get("segmentation_head"):
        return Checkpoint(
            kind=f"torchvision's {_FUNCTIONS[head]}",
            tensors=dict(tensors),
            table=table,
            config=config | {"image_size": options.size(520)},
            processor=options.processor("torchvision_segmentation", 520),
            files=[path],
            oracle=lambda: _segmentation_oracle(config, tensors),
            license="bsd-3-clause",
        )
    recipe = "torchvision_v2" if sha256(path).startswith(_SECOND) else "torchvision"
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


def _segmentation_oracle(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Oracle:
    import torchvision

    name = _FUNCTIONS[config["segmentation_head"]]
    function = getattr(torchvision.models.segmentation, name)
    has_auxiliary = any(tensor.startswith("aux_classifier.") for tensor in tensors)
    model = function(
        weights_backbone=None, num_classes=config["num_labels"], **{"aux_loss": True} if has_auxiliary else {}
    )
    model.load_state_dict(tensors)
    model.eval()

    def logits(pixel_values: Tensor) -> Tensor:
        features = model.backbone(pixel_values)
        return model.classifier(features if config["segmentation_head"] == "lraspp" else features["out"])

    def predictions(pixel_values: Tensor) -> Tensor:
        return model(pixel_values)["out"].argmax(1)

    return Oracle(f"torchvision's {name}", torchvision.__version__, logits, predictions)


def _detection_oracle(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> DetectionOracle:
    import torchvision
    from torchvision.models.detection.image_list import ImageList

    if config["num_channels"] != 3:
        raise NoOracleError("torchvision's SSDLite takes three channels")
    name = config["detector"]
    build = getattr(torchvision.models.detection, name)
    model = build(weights=None, weights_backbone=None, num_classes=config["num_labels"] + 1).eval()
    model.load_state_dict(tensors)

    @torch.no_grad()
    def run(pixel_values: Tensor) -> DetectionResults:
        features = list(model.backbone(pixel_values).values())
        found = model.head(features)
        height, width = pixel_values.shape[-2:]
        images = ImageList(pixel_values, [(height, width)] * len(pixel_values))
        anchors = model.anchor_generator(images, features)
        sides = torch.tensor([width, height, width, height])
        edges = torch.stack(
            [model.box_coder.decode_single(*each) for each in zip(found["bbox_regression"], anchors, strict=True)]
        )
        low, high = (edges / sides).split(2, -1)
        boxes = torch.cat(((low + high) / 2, high - low), -1)
        scores = found["cls_logits"].softmax(-1)[..., 1:]
        detections = [
            {"scores": each["scores"], "labels": each["labels"] - 1, "boxes": each["boxes"] / sides}
            for each in model.postprocess_detections(found, anchors, images.image_sizes)
        ]
        return DetectionResults(scores, boxes, detections)

    return DetectionOracle(f"torchvision's {name}", torchvision.__version__, run)


def _oracle(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Oracle:
    import torchvision

    name, width = config["architecture"], config.get("width_multiplier", 1.0)
    if config["num_channels"] != 3:
        raise NoOracleError(f"torchvision's {name} takes three channels")
    width = {"width_mult": width} if name == "mobilenet_v2" else {"_width_mult": width}
    model = getattr(torchvision.models, name)(num_classes=config["num_labels"], **width)
    model.load_state_dict(tensors)
    return Oracle(f"torchvision's {name}", torchvision.__version__, model.eval())
