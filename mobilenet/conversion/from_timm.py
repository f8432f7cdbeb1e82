"""timm's MobileNets: repositories of the Hub, and state dicts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL.Image import Resampling
from torch import Tensor

from mobilenet.image_processing_mobilenet import MobileNetImageProcessor

from .checkpoint import (
    Checkpoint,
    NoOracleError,
    Options,
    Oracle,
    Origin,
    field_errors,
    read_json,
    read_torch,
    weights_file,
)
from .labels import check
from .rename import TORCH, ConversionError, Row, Table, infer_config


_CONFIG = {"padding": "symmetric", "batch_norm_eps": 1e-5, "channel_divisor": 8}

_V1 = {
    "stem": Row("conv_stem", "bn1"),
    "block.depthwise": Row("blocks.{stage}.{block}.conv_dw", "blocks.{stage}.{block}.bn1"),
    "block.pointwise": Row("blocks.{stage}.{block}.conv_pw", "blocks.{stage}.{block}.bn2"),
    "classifier": Row("classifier"),
}
_V2 = {
    "stem": Row("conv_stem", "bn1"),
    "first.depthwise": Row("blocks.0.0.conv_dw", "blocks.0.0.bn1"),
    "first.project": Row("blocks.0.0.conv_pw", "blocks.0.0.bn2"),
    "block.expand": Row("blocks.{row}.{repeat}.conv_pw", "blocks.{row}.{repeat}.bn1"),
    "block.depthwise": Row("blocks.{row}.{repeat}.conv_dw", "blocks.{row}.{repeat}.bn2"),
    "block.project": Row("blocks.{row}.{repeat}.conv_pwl", "blocks.{row}.{repeat}.bn3"),
    "head": Row("conv_head", "bn2"),
    "classifier": Row("classifier"),
}
_V3 = _V2 | {
    "block.squeeze.reduce": Row("blocks.{row}.{repeat}.se.conv_reduce"),
    "block.squeeze.expand": Row("blocks.{row}.{repeat}.se.conv_expand"),
    "pre_logits": Row("conv_head"),
}
_V4 = {
    "stem": Row("conv_stem", "bn1"),
    "conv": Row("blocks.{stage}.{block}.conv", "blocks.{stage}.{block}.bn1"),
    "fused.expand": Row("blocks.{stage}.{block}.conv_exp", "blocks.{stage}.{block}.bn1"),
    "fused.project": Row("blocks.{stage}.{block}.conv_pwl", "blocks.{stage}.{block}.bn2"),
    "inverted.start_depthwise": Row("blocks.{stage}.{block}.dw_start.conv", "blocks.{stage}.{block}.dw_start.bn"),
    "inverted.expand": Row("blocks.{stage}.{block}.pw_exp.conv", "blocks.{stage}.{block}.pw_exp.bn"),
    "inverted.depthwise": Row("blocks.{stage}.{block}.dw_mid.conv", "blocks.{stage}.{block}.dw_mid.bn"),
    "inverted.project": Row("blocks.{stage}.{block}.pw_proj.conv", "blocks.{stage}.{block}.pw_proj.bn"),
    "block.scale": Row("blocks.{stage}.{block}.layer_scale"),
    "attention": Row("blocks.{stage}.{block}", "blocks.{stage}.{block}.norm"),
    "attention.query": Row("blocks.{stage}.{block}.attn.query.proj"),
    "attention.key_reduction": Row(
        "blocks.{stage}.{block}.attn.key.down_conv", "blocks.{stage}.{block}.attn.key.norm"
    ),
    "attention.key": Row("blocks.{stage}.{block}.attn.key.proj"),
    "attention.value_reduction": Row(
        "blocks.{stage}.{block}.attn.value.down_conv", "blocks.{stage}.{block}.attn.value.norm"
    ),
    "attention.value": Row("blocks.{stage}.{block}.attn.value.proj"),
    "attention.output": Row("blocks.{stage}.{block}.attn.output.proj"),
    "head": Row("blocks.4.0.conv", "blocks.4.0.bn1"),
    "pre_logits": Row("conv_head", "norm_head"),
    "classifier": Row("classifier"),
}
_V3_LARGE = _V3 | {"head": Row("blocks.6.0.conv", "blocks.6.0.bn1")}
_V3_SMALL = _V3 | {"head": Row("blocks.5.0.conv", "blocks.5.0.bn1")}

TABLES = tuple(
    Table({"architecture": architecture, **_CONFIG}, rows, TORCH)
    for architecture, rows in (
        ("mobilenet_v1", _V1),
        ("mobilenet_v1_head", _V1 | {"head": Row("conv_head", "bn2")}),
        ("mobilenet_v2", _V2),
        ("mobilenet_v3_large", _V3_LARGE),
        ("mobilenet_v3_small", _V3_SMALL),
        ("mobilenet_v3_large_minimalistic", _V3_LARGE),
        ("mobilenet_v3_small_minimalistic", _V3_SMALL),
        ("mobilenet_v4_conv_small", _V4),
        ("mobilenet_v4_conv_medium", _V4),
        ("mobilenet_v4_conv_large", _V4),
        ("mobilenet_v4_hybrid_medium", _V4),
        ("mobilenet_v4_hybrid_large", _V4),
    )
)


class Network(NamedTuple):
    """A family of timm's networks."""

    name: str  # a pattern
    architecture: str
    variant: dict[str, Any]  # fields of MobileNetConfig that no tensor tells
    recipe: str  # of most of its checkpoints
    image_size: int


_TF = {"padding": "same", "batch_norm_eps": 1e-3}
_AVERAGE, _BLUR = {"anti_aliasing": "average"}, {"anti_aliasing": "blur"}

# Where a name is not known, the first of an architecture is taken.
NETWORKS = (
    Network(r"mobilenetv1_125", "mobilenet_v1", {}, "timm_ra4_125", 224),
    Network(r"mobilenetv1_\d{3}", "mobilenet_v1", {}, "timm_ra4", 224),
    Network(r"mobilenetv1_\d{3}h", "mobilenet_v1_head", {}, "timm_ra4", 224),
    Network(r"mobilenetv2_\d{3}d?", "mobilenet_v2", {}, "timm", 224),
    Network(r"mobilenetv3_large_\d{3}", "mobilenet_v3_large", {}, "timm", 224),
    Network(r"mobilenetv3_small_\d{3}", "mobilenet_v3_small", {}, "timm", 224),
    Network(r"tf_mobilenetv3_large_\d{3}", "mobilenet_v3_large", _TF, "google", 224),
    Network(r"tf_mobilenetv3_small_\d{3}", "mobilenet_v3_small", _TF, "google", 224),
    Network(r"tf_mobilenetv3_large_minimal_\d{3}", "mobilenet_v3_large_minimalistic", _TF, "google", 224),
    Network(r"tf_mobilenetv3_small_minimal_\d{3}", "mobilenet_v3_small_minimalistic", _TF, "google", 224),
    Network(r"mobilenetv4_conv_small(_\d{3})?", "mobilenet_v4_conv_small", {}, "timm", 224),
    Network(r"mobilenetv4_conv_medium", "mobilenet_v4_conv_medium", {}, "timm_95", 256),
    Network(r"mobilenetv4_conv_aa_medium", "mobilenet_v4_conv_medium", _AVERAGE, "timm_95", 256),
    Network(r"mobilenetv4_conv_blur_medium", "mobilenet_v4_conv_medium", _BLUR, "timm_95", 224),
    Network(r"mobilenetv4_conv_large", "mobilenet_v4_conv_large", {}, "timm_95", 384),
    Network(r"mobilenetv4_conv_aa_large", "mobilenet_v4_conv_large", _AVERAGE, "timm_95", 384),
    Network(r"mobilenetv4_hybrid_medium(_\d{3})?", "mobilenet_v4_hybrid_medium", {}, "timm_95", 256),
    Network(r"mobilenetv4_hybrid_large(_\d{3})?", "mobilenet_v4_hybrid_large", {}, "timm_95", 384),
)

# Other networks than the papers', and why they have no table here.
OTHERS = {
    "mobilenetv3_large_150d": "which has its last 1x1 convolution twice",
    "mobilenetv3_rw": "which squeezes to other channels than MobileNetV3",
}

# Published checkpoints with a recipe or a size of their own: default_cfgs of timm/models/mobilenetv3.py.
PUBLISHED = {
    "mobilenetv3_large_100.ra4_e3600_r224_in1k": ("timm_ra4_95", 224),
    "mobilenetv3_large_100.miil_in21k_ft_in1k": ("timm_miil", 224),
    "mobilenetv3_large_100.miil_in21k": ("timm_miil", 224),
    "mobilenetv4_conv_small_050.e3000_r224_in1k": ("timm_ra4", 224),
    "mobilenetv4_conv_small.e3600_r256_in1k": ("timm_ra4_95", 256),
    "mobilenetv4_conv_medium.e500_r224_in1k": ("timm_95", 224),
    "mobilenetv4_conv_medium.e250_r384_in12k_ft_in1k": ("timm_95", 384),
    "mobilenetv4_conv_medium.e180_r384_in12k": ("timm_100", 384),
    "mobilenetv4_conv_medium.e180_ad_r384_in12k": ("timm_100", 384),
    "mobilenetv4_conv_medium.e250_r384_in12k": ("timm_100", 384),
    "mobilenetv4_conv_large.e500_r256_in1k": ("timm_95", 256),
    "mobilenetv4_conv_aa_large.e230_r448_in12k_ft_in1k": ("timm_95", 448),
    "mobilenetv4_hybrid_medium.ix_e550_r384_in1k": ("timm_95", 384),
    "mobilenetv4_hybrid_medium.e500_r224_in1k": ("timm_95", 224),
}


def detect(origin: Origin) -> bool:
    """Whether a folder is a repository of timm."""
    config = origin.path / "config.json"
    return config.is_file() and {"architecture", "num_classes"} <= read_json(config).keys()


def network_of(name: str) -> Network | None:
    """The family of a network, by timm's name of it."""
    return next((network for network in NETWORKS if re.fullmatch(network.name, name)), None)


def preprocessing(tag: str) -> tuple[str, int] | None:
    """Recipe and image size of a published checkpoint, such as "mobilenetv4_conv_small.e2400_r224_in1k"."""
    network = network_of(tag.partition(".")[0])
    return PUBLISHED.get(tag, (network.recipe, network.image_size)) if network else None


def read(origin: Origin, options: Options) -> Checkpoint:
    """Read a repository of timm.

    Raises:
        ConversionError: A file is missing or broken, or the network has no table here.
    """
    path = origin.path / "config.json"
    config = read_json(path)
    name = str(config["architecture"])
    network = network_of(name)
    if not network:
        raise ConversionError(
            f"{origin.given}: must be timm's mobilenetv1_<width>, mobilenetv2_<width>, mobilenetv3_<size>_<width>, "
            f"mobilenetv4_conv_<size>, mobilenetv4_hybrid_<size> or a variant of these that has a table, got "
            f"{', '.join(filter(None, (name, OTHERS.get(name))))}."
        )
    weights = weights_file(origin.path)
    checkpoint = _describe(read_torch(weights), network, name, options, path, weights)
    with field_errors(path):
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
    """Describe a state dict of timm; what no tensor tells is taken from the file's name, if that is timm's."""
    architecture = table.config["architecture"]
    name = re.split(r"[.-]", files[0].name)[0]
    network = network_of(name)
    if not network or network.architecture != architecture:
        # The first is of one width alone.
        name, network = None, next(network for network in NETWORKS[1:] if network.architecture == architecture)
    return _describe(tensors, network, name, options, *files)


def _describe(
    tensors: Mapping[str, Tensor], network: Network, name: str | None, options: Options, *files: Path
) -> Checkpoint:
    table = next(table for table in TABLES if table.config["architecture"] == network.architecture)
    table = table._replace(config=table.config | network.variant)
    config = infer_config(tensors, table, repeats=(1.0, 1.2, 1.4))
    name = name or _name(config)
    network = network_of(name) or network  # the width tells one of V1's recipes
    recipe, size = preprocessing(files[0].stem) or (network.recipe, network.image_size)
    size = options.size(size)
    return Checkpoint(
        kind="timm",
        tensors=dict(tensors),
        table=table,
        config=config | {"image_size": size},
        processor=options.processor(recipe, size),
        files=list(files),
        oracle=lambda: _oracle(name, config, tensors),
    )


def _name(config: dict[str, Any]) -> str:
    """What timm calls a network."""
    version, *parts = config["architecture"].removeprefix("mobilenet_").split("_")
    width = f"{round(100 * config.get('width_multiplier', 1.0)):03d}"
    if version in ("v1", "v2"):
        depth = "d" if config.get("repeat_multiplier", 1.0) > 1 else ""
        return f"mobilenet{version}_{width}{'h' if parts else ''}{depth}"
    name = "_".join((f"mobilenet{version}", *parts)).replace("minimalistic", "minimal")
    if "minimal" in name:
        name = f"tf_{name}"
    return name if version == "v4" and width == "100" else f"{name}_{width}"


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
