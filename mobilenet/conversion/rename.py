"""Name tables: what a source calls each tensor, how it lays it out, and the strict renaming to our names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mobilenet.architectures_mobilenet import ARCHITECTURES, Block, Width
from mobilenet.configuration_mobilenet import MobileNetConfig
from mobilenet.heads_mobilenet import DETECTORS
from mobilenet.layers_mobilenet import LayerScale
from mobilenet.modeling_mobilenet import (
    MobileNetForImageClassification,
    MobileNetForObjectDetection,
    MobileNetForSemanticSegmentation,
    MobileNetPreTrainedModel,
)
from mobilenet.repository import RepositoryError
from mobilenet.tasks import CLASSIFICATION, DETECTION, SEGMENTATION, Task


class ConversionError(RepositoryError):
    """A source that cannot be converted: the message names it and says why."""


class Part(NamedTuple):
    """A tensor of a layer, as a framework names and stores it."""

    suffix: str  # what follows the layer's name
    layout: str  # a letter for each axis: Output and Input channels, Height, Width


class Convention(NamedTuple):
    """How a framework names the tensors of each kind of layer; the keys are PyTorch's names."""

    conv: dict[str, Part]
    depthwise: dict[str, Part]
    norm: dict[str, Part]
    linear: dict[str, Part]
    scale: dict[str, Part] | None = None  # of layer scales, which timm alone has


_TORCH_CONV = {"weight": Part(".weight", "OIHW"), "bias": Part(".bias", "O")}
TORCH = Convention(
    conv=_TORCH_CONV,
    depthwise=_TORCH_CONV,
    norm={
        "weight": Part(".weight", "O"),
        "bias": Part(".bias", "O"),
        "running_mean": Part(".running_mean", "O"),
        "running_var": Part(".running_var", "O"),
        "num_batches_tracked": Part(".num_batches_tracked", ""),
    },
    linear={"weight": Part(".weight", "OI"), "bias": Part(".bias", "O")},
    scale={"weight": Part(".gamma", "O")},
)


class Row(NamedTuple):
    """What a source calls one of our layers: the convolution (or the classifier), and its batch norm."""

    conv: str
    norm: str | None = None
    layout: str | None = None  # of the weight, where it is not that of others


class Table(NamedTuple):
    """A source's names for one architecture.

    The keys of `rows` are our layers: "stem", "block.<role>", "head", "pre_logits" and "classifier". Instead of
    "block" there may be what a source names apart: "block_12", the block of that index; "first", the first block;
    "squeezed", those with squeeze-and-excite; or a kind of block, which alone stands for the convolution or the norm
    that is the block's own.
    Names of blocks hold numbers: {index} counts all blocks from 0, {from_1} and {from_2} from 1 and 2; {previous} is
    index - 1, {even} 2 * index, {odd} 2 * index + 1; {stage} and {block} count our stages and the blocks in one, {row}
    and {repeat} the runs of the paper's rows with equal channels, and the blocks in one.
    """

    config: dict[str, Any]  # the fields of MobileNetConfig that are the same for all of the source's networks
    rows: dict[str, Row]
    convention: Convention
    dropped: tuple[str, ...] = ()  # patterns of names that are no part of the network


class Place(NamedTuple):
    """Where a source's tensor goes."""

    name: str
    source_layout: str
    source_shape: tuple[int, ...]
    layout: str
    optional: bool


# Only PyTorch counts batches.
_COUNT = "num_batches_tracked"
_LAYOUTS = {4: "OIHW", 2: "OI", 1: "O", 0: ""}


def _numbers(config: MobileNetConfig) -> dict[tuple[str, str], tuple[Block, dict[str, int]]]:
    """Our blocks by stage and block, and what the numbers in names stand for."""
    blocks = [(stage, block) for stage, of_stage in enumerate(config.stages) for block in range(len(of_stage))]
    runs = [
        sum(len(list(row.blocks(8, Width(), "relu"))) for row in run)
        for _, run in groupby(config.table.rows, key=lambda row: row.channels)
    ]
    repeats = [(row, repeat) for row, length in enumerate(runs) for repeat in range(length)]
    return {
        (str(stage), str(block)): (
            config.stages[stage][block],
            {
                "index": index,
                "from_1": index + 1,
                "from_2": index + 2,
                "previous": index - 1,
                "even": 2 * index,
                "odd": 2 * index + 1,
                "stage": stage,
                "block": block,
                "row": row,
                "repeat": repeat,
            },
        )
        for index, ((stage, block), (row, repeat)) in enumerate(zip(blocks, repeats, strict=True))
    }


def _row(table: Table, role: str, block: Block | None, index: int | None) -> Row:
    """What a table says of a layer of a block, or of one that is in none."""
    if block is None:
        return table.rows[role]
    owners = [f"block_{index}", *["first"] * (index == 0), *["squeezed"] * (block.squeeze_channels > 0)]
    owners += [block.kind, "block"]
    keys = [f"{owner}.{role}".rstrip(".") for owner in owners]
    return next((table.rows[key] for key in keys if key in table.rows), None) or table.rows[keys[-1]]


def _layers(model: nn.Module, table: Table) -> Iterator[tuple[str, nn.Module, str, dict[str, Part]]]:
    """Every layer that has tensors: our name, the layer, the source's name, and the parts that it is stored in."""
    numbers = _numbers(model.config)
    for path, layer in model.named_modules():
        if not isinstance(layer, (nn.Conv2d, nn.BatchNorm2d, nn.Linear, LayerScale)):
            continue
        # Such as backbone.stages.1.2.expand.conv, backbone.stages.1.2.squeeze.reduce, backbone.stem.norm, classifier
        stage, number, role = re.fullmatch(r"(?:backbone\.)?(?:stages\.(\d+)\.(\d+)\.)?(.+)", path).groups()
        role = re.sub(r"(^|\.)(conv|norm)$", "", role)
        block, values = numbers.get((stage, number), (None, {}))
        row = _row(table, role, block, values.get("index"))
        if isinstance(layer, nn.BatchNorm2d):
            source, parts = row.norm, table.convention.norm
        elif isinstance(layer, nn.Linear):
            source, parts = row.conv, table.convention.linear
        elif isinstance(layer, LayerScale):
            source, parts = row.conv, table.convention.scale
        else:
            source = row.conv
            parts = table.convention.depthwise if layer.groups > 1 else table.convention.conv
            if row.layout:
                parts = parts | {"weight": parts["weight"]._replace(layout=row.layout)}
        if source is None:
            raise ValueError(f"the name table names no batch norm for {path}.")
        yield path, layer, source.format(**values), parts


def places(model: nn.Module, table: Table) -> dict[str, Place]:
    """Expand a table over the blocks of a network: each of the source's names, and where its tensor goes.

    Raises:
        ValueError: The table lacks a layer, or names two alike.
    """
    result: dict[str, Place] = {}
    for path, layer, source, parts in _layers(model, table):
        for name, tensor in layer.state_dict().items():
            if name not in parts:
                continue
            suffix, source_layout = parts[name]
            if source + suffix in result:
                raise ValueError(f"the name table gives {source + suffix} twice.")
            layout = _LAYOUTS[tensor.ndim]
            sizes = dict(zip(layout, tensor.shape, strict=True))
            shape = tuple(sizes.get(axis, 1) for axis in source_layout)
            optional = name == _COUNT
            result[source + suffix] = Place(f"{path}.{name}", source_layout, shape, layout, optional)
    return result


# Of fields of MobileNetConfig, what a network is for that has them.
_TASKS = {"detector": DETECTION, "segmentation_head": SEGMENTATION}
_CLASSES = {
    CLASSIFICATION.name: MobileNetForImageClassification,
    DETECTION.name: MobileNetForObjectDetection,
    SEGMENTATION.name: MobileNetForSemanticSegmentation,
}


def task_of(config: Mapping[str, Any]) -> Task:
    """What a network is for, by the fields of its configuration."""
    return next((task for field, task in _TASKS.items() if config.get(field)), CLASSIFICATION)


def network_class(config: Mapping[str, Any]) -> type[MobileNetPreTrainedModel]:
    """The class of a network, by the fields of its configuration."""
    return _CLASSES[task_of(config).name]


@cache
def skeleton(**config: Any) -> MobileNetPreTrainedModel:
    """A network without memory for its weights, for its names and shapes."""
    with torch.device("meta"):
        return network_class(config)(MobileNetConfig(**config))


def _dropped(name: str, table: Table) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in table.dropped)


def closest(names: Iterable[str], tables: Sequence[Table]) -> tuple[Table, float]:
    """The table that knows most of a source's names, and the share that fits: of its own or of the source's."""
    names = set(names)

    def share(table: Table) -> float:
        known = places(skeleton(**table.config), table)
        wanted = {name for name, place in known.items() if not place.optional}
        given = sum(not _dropped(name, table) for name in names - (known.keys() - wanted))
        return len(wanted & names) / max(len(wanted), given, 1)

    return max(((table, share(table)) for table in tables), key=lambda choice: choice[1])


# What the width does to the first and the last convolution: as a rule, in all networks but some of timm's.
_ENDS = (
    {"shrink_head": False},
    {"shrink_head": True},
    {"shrink_head": False, "scale_stem": False},
    {"shrink_head": False, "scale_stem": False, "grow_head": False},
)


def infer_config(tensors: Mapping[str, Tensor], table: Table, repeats: Sequence[float] = (1.0,)) -> dict[str, Any]:
    """Read width, classes and input channels off the shapes of a source's tensors.

    What a missing tensor would tell is left at its default: the strict renaming will name the tensor.

    Args:
        tensors: By the source's names.
        table: The source's names for the architecture.
        repeats: Repeat multipliers that the source has, where the architecture takes any.
    """
    config = dict(table.config)
    known = places(skeleton(**config), table)
    by_name = {place.name: (source, place) for source, place in known.items()}

    def size(name: str, axis: str) -> int | None:
        source, place = by_name[name]
        if source not in tensors or tensors[source].ndim != len(place.source_layout):
            return None
        return tensors[source].shape[place.source_layout.index(axis)]

    pattern = r"(segmentation_head\.)?classifier\.weight|class_predictors\.0\.conv\.weight"
    classifier = next(name for name in by_name if re.fullmatch(pattern, name))
    # A detector predicts every class, and the background, for several anchors.
    detector = DETECTORS.get(config.get("detector"))
    anchors, background = (len(detector.first_anchors), detector.background is not None) if detector else (1, False)
    for field, found in (
        ("num_labels", (size(classifier, "O") or 0) // anchors - background),
        ("num_channels", size("backbone.stem.conv.weight", "I") or 0),
    ):
        if found > 0:
            config[field] = found
    architecture = ARCHITECTURES[config["architecture"]]
    # The widest layer that every width scales tells most.
    last = [name for name in by_name if ".stages." in name and name.endswith(".conv.weight")][-1]
    base = architecture.rows[-1].channels
    if architecture.pre_logits and "backbone.head.conv.weight" in by_name:
        last, base = "backbone.head.conv.weight", architecture.head.channels
    channels = size(last, "O")
    if not channels:
        return config
    if architecture.repeats and len(repeats) > 1:
        # The first where none fits better.
        deep = [config | {"repeat_multiplier": multiplier} for multiplier in repeats]
        config = min(deep, key=lambda config: len(tensors.keys() ^ places(skeleton(**config), table).keys()))
    for candidate in candidates(channels / base):
        for ends in _ENDS:
            chosen = config | {"width_multiplier": candidate} | ends
            if not any(_misshapen(tensors, places(skeleton(**chosen), table))):
                return chosen
    return config | {"width_multiplier": round(channels / base, 2) or 0.01}


def candidates(ratio: float) -> list[float]:
    """Width multipliers that may have given a ratio of rounded channels: published ones, then short ones."""
    tables = ARCHITECTURES.values()
    published = {width for table in tables for widths, _ in table.published for width in widths}
    hundredths = {(round(100 * ratio) + step) / 100 for step in range(-4, 5)} - {0}
    near = sorted(hundredths, key=lambda width: (width not in published, abs(width - ratio)))
    return [width for width in (*near, ratio) if 0 < width <= 8]


def _misshapen(tensors: Mapping[str, Tensor], wanted: Mapping[str, Place]) -> Iterator[str]:
    for name, place in wanted.items():
        if name in tensors and tuple(tensors[name].shape) != place.source_shape:
            yield f"{name} {list(tensors[name].shape)} instead of {list(place.source_shape)}"


def permute_layout(tensor: Tensor, source: str, target: str) -> Tensor:
    """Reorder axes from one layout to another; axes that one lacks have size 1 in the other."""
    gone = [axis for axis, letter in enumerate(source) if letter not in target]
    kept = [letter for letter in source if letter in target]
    tensor = tensor.squeeze(gone).permute([kept.index(letter) for letter in target if letter in kept])
    for axis, letter in enumerate(target):
        tensor = tensor if letter in source else tensor.unsqueeze(axis)
    return tensor.contiguous()


# A file with more faults than this holds another network, and a few of them tell which.
MAX_LISTED = 40


def rename(tensors: Mapping[str, Tensor], table: Table, model: nn.Module, origin: str) -> dict[str, Tensor]:
    """Give a source's tensors our names, layouts and type.

    Args:
        tensors: By the source's names.
        table: The source's names for the network's architecture.
        model: The network that they are for.
        origin: What to call the source in errors.

    Raises:
        ConversionError: Names are missing, unexpected or misshapen, all listed; or values are not finite.
    """
    wanted = places(model, table)
    tensors = {name: tensor for name, tensor in tensors.items() if not _dropped(name, table)}
    faults = {
        "missing": [name for name, place in wanted.items() if name not in tensors and not place.optional],
        "unexpected": [name for name in tensors if name not in wanted],
        "misshapen": list(_misshapen(tensors, wanted)),
    }
    if any(faults.values()):
        config = model.config
        network = f"a {config.architecture} of width {config.width_multiplier:g} with {config.num_labels} classes"
        shown = 10 if sum(map(len, faults.values())) > MAX_LISTED else MAX_LISTED
        listed = [
            f"{len(names)} {fault}: {', '.join(names[:shown])}{' and so on' if len(names) > shown else ''}"
            for fault, names in faults.items()
            if names
        ]
        raise ConversionError(f"{origin} does not hold {network}: {'; '.join(listed)}.")
    broken = [name for name in wanted if name in tensors and not tensors[name].isfinite().all()]
    if broken:
        raise ConversionError(f"{origin} holds values that are not finite, in {', '.join(broken)}.")
    result = {name: torch.tensor(0) for name in model.state_dict() if name.endswith(_COUNT)}
    for name, place in wanted.items():
        if name in tensors:
            kind = torch.int64 if place.optional else model.dtype
            result[place.name] = permute_layout(tensors[name], place.source_layout, place.layout).to(kind)
    return result
