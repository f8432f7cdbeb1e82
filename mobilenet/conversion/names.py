"""Name tables: what a source calls each tensor, how it lays it out, and the strict renaming to our names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from mobilenet.configuration_mobilenet import ARCHITECTURES, MobileNetConfig


class ConversionError(ValueError):
    """A source that cannot be converted: the message names it and says why."""


class Part(NamedTuple):
    """A tensor of a layer, as a framework names and stores it."""

    name: str  # what follows the layer's name
    layout: str  # an axis a letter: output and input channels, height, width


class Convention(NamedTuple):
    """How a framework names the tensors of each kind of layer; keys are PyTorch's names."""

    conv: dict[str, Part]
    depthwise: dict[str, Part]
    norm: dict[str, Part]
    linear: dict[str, Part]


_TORCH_CONV = {"weight": Part(".weight", "OIHW"), "bias": Part(".bias", "O")}
_TORCH_NORM = {name: Part(f".{name}", "O") for name in ("weight", "bias", "running_mean", "running_var")} | {
    "num_batches_tracked": Part(".num_batches_tracked", "")
}
TORCH = Convention(
    conv=_TORCH_CONV,
    depthwise=_TORCH_CONV,
    norm=_TORCH_NORM,
    linear={"weight": Part(".weight", "OI"), "bias": Part(".bias", "O")},
)


class Row(NamedTuple):
    """A layer of ours, and the names of the source's layers that it is made of."""

    conv: str  # or the classifier
    norm: str | None = None


class Table(NamedTuple):
    """A source's names for one architecture.

    Keys of `rows` are our layers: "stem", "block.<role>", "first.<role>" where the first block is named apart, "head"
    and "classifier". Names may hold these numbers of a block, all from 0: {index} among all blocks, {stage} and
    {block} in our stages, {row} and {repeat} in the paper's table; and {number}, {before}, {twice} and {twice_more},
    which are index + 1, index - 1, 2 * index and 2 * index + 1.
    """

    rows: dict[str, Row]
    convention: Convention
    dropped: tuple[str, ...] = ()  # patterns of names that are no part of the network


class Place(NamedTuple):
    """Where a source's tensor goes."""

    name: str
    source_layout: str
    layout: str
    source_shape: tuple[int, ...]
    optional: bool


_OURS = {"conv": "OIHW", "linear": "OI", "vector": "O", "scalar": ""}


def _numbers(config: MobileNetConfig) -> dict[tuple[str, str], dict[str, int]]:
    """The numbers that names may hold, by our stage and block."""
    rows = ARCHITECTURES[config.architecture].rows
    repeats = [(row, repeat) for row, of in enumerate(rows) for repeat in range(of.repeats)]
    places = [(stage, block) for stage, blocks in enumerate(config.stages) for block in range(len(blocks))]
    return {
        (str(stage), str(block)): {
            "index": index,
            "number": index + 1,
            "before": index - 1,
            "twice": 2 * index,
            "twice_more": 2 * index + 1,
            "stage": stage,
            "block": block,
            "row": row,
            "repeat": repeat,
        }
        for index, ((stage, block), (row, repeat)) in enumerate(zip(places, repeats, strict=True))
    }


def _tensors(model: nn.Module, table: Table) -> Iterator[tuple[str, Part, Tensor]]:
    """Our name, the source's name and layout, and our tensor, for every tensor of a network."""
    numbers = _numbers(model.config)
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
            continue
        # backbone.stages.1.2.expand.conv, backbone.stem.norm, classifier
        found = re.fullmatch(r"(?:backbone\.)?(?:stages\.(\d+)\.(\d+)\.)?(\w+)(?:\.(?:conv|norm))?", path)
        stage, block, role = found.groups()
        values = numbers.get((stage, block), {})
        row = table.rows.get(f"first.{role}") if values.get("index") == 0 else None
        row = row or table.rows[f"block.{role}" if values else role]
        if isinstance(module, nn.BatchNorm2d):
            source, parts = row.norm, table.convention.norm
        elif isinstance(module, nn.Linear):
            source, parts = row.conv, table.convention.linear
        else:
            source = row.conv
            parts = table.convention.depthwise if role == "depthwise" else table.convention.conv
        for name, tensor in module.state_dict().items():
            if name in parts:  # a count of batches is PyTorch's alone
                part = parts[name]
                yield f"{path}.{name}", Part(source.format(**values) + part.name, part.layout), tensor


def places(model: nn.Module, table: Table) -> dict[str, Place]:
    """Expand a table over the blocks of a network: each of the source's names, and where its tensor goes."""
    result: dict[str, Place] = {}
    for name, part, tensor in _tensors(model, table):
        layout = {4: "OIHW", 2: "OI", 1: "O", 0: ""}[tensor.ndim]
        sizes = dict(zip(layout, tensor.shape, strict=True))
        shape = tuple(sizes.get(axis, 1) for axis in part.layout)
        if part.name in result:
            raise ConversionError(f"the name table gives {part.name} to both {result[part.name].name} and {name}.")
        result[part.name] = Place(name, part.layout, layout, shape, name.endswith("num_batches_tracked"))
    return result


def relay(tensor: Tensor, source: str, target: str) -> Tensor:
    """Reorder axes from one layout to another; axes that the target lacks have size 1 and go."""
    gone = [axis for axis, letter in enumerate(source) if letter not in target]
    kept = [letter for letter in source if letter in target]
    return tensor.squeeze(gone).permute([kept.index(letter) for letter in target]).contiguous()


def rename(tensors: Mapping[str, Tensor], table: Table, model: nn.Module, origin: str) -> dict[str, Tensor]:
    """Give a source's tensors our names and layouts, as float32.

    Args:
        tensors: By the source's names.
        table: The source's names for the network's architecture.
        model: The network that they are for.
        origin: What to call the source in errors.

    Raises:
        ConversionError: Names are missing, unexpected or misshapen, all listed; or values are not finite.
    """
    wanted = places(model, table)
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if not any(re.fullmatch(pattern, name) for pattern in table.dropped)
    }
    missing = [name for name, place in wanted.items() if name not in tensors and not place.optional]
    unexpected = [name for name in tensors if name not in wanted]
    misshapen = [
        f"{name} {list(tensors[name].shape)} instead of {list(place.source_shape)}"
        for name, place in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != place.source_shape
    ]
    faults = [
        f"{len(names)} {what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if faults:
        config = model.config
        network = f"a {config.architecture} of width {config.width_multiplier:g} with {config.num_labels} classes"
        raise ConversionError(f"{origin} does not hold {network}: {'; '.join(faults)}.")
    broken = [name for name in wanted if name in tensors and not tensors[name].isfinite().all()]
    if broken:
        raise ConversionError(f"{origin} holds values that are not finite, in {', '.join(broken)}.")
    return {
        place.name: relay(tensors[name], place.source_layout, place.layout).to(
            tensors[name].dtype if place.optional else model.dtype
        )
        for name, place in wanted.items()
        if name in tensors
    }
