"""Networks as a source's own file draws them: typed operations, and the one matcher from these to our tables.

A reader translates what it finds into operations, one to one, and decides nothing. The matcher decides everything:
which table the operations follow, what the configuration must say, and which of them has no place in our network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mobilenet.architectures_mobilenet import ARCHITECTURES
from mobilenet.configuration_mobilenet import ACTIVATIONS, OUTPUT_STRIDES, MobileNetConfig
from mobilenet.layers_mobilenet import fold, same_padding

from .checkpoint import Checkpoint, Options, Oracle
from .labels import beside
from .preprocessing import find, published
from .rename import TORCH, ConversionError, Row, Table, candidates, task_of


Pads = tuple[tuple[int, int], tuple[int, int]]  # rows before and after, columns before and after
BYTES = {"uint8": (0, 255), "int8": (-128, 127)}
SAME = None  # padding that depends on the size of the input, as TensorFlow's does
# What a network may end in, by the name of the activation: how its predictions follow from our logits.
PREDICTIONS = {
    "softmax": lambda logits: logits.softmax(-1),
    "log_softmax": lambda logits: logits.log_softmax(-1),
    "sigmoid": torch.sigmoid,
}
LABEL_MAP = "label map"  # what a segmenter may end in


class Scale(NamedTuple):
    """How a tensor of 8 bits stands for real numbers: scale * (byte - zero_point)."""

    dtype: str  # "uint8" or "int8"
    scale: tuple[float, ...]  # one, or one for each output channel
    zero_point: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """As quantization.json has the scale of a weight."""
        return {"dtype": self.dtype, "scale": list(self.scale), "zero_point": list(self.zero_point)}

    @classmethod
    def of(cls, dtype: str, scale: Any, zero_point: Any = 0) -> Scale:
        """From arrays, of which the zero point may stand for all channels."""
        scale = np.asarray(scale, np.float64).reshape(-1)
        zero_point = np.broadcast_to(np.asarray(zero_point, int).reshape(-1), scale.shape)
        return cls(dtype, tuple(scale.tolist()), tuple(zero_point.tolist()))

    def real(self, values: np.ndarray, axis: int) -> np.ndarray:
        """What bytes stand for, in float32; where there is a scale for each channel, channels are at an axis."""
        form = [1] * values.ndim
        form[axis : axis + 1] = [len(self.scale)] * min(values.ndim, 1)
        zero_point, scale = (np.asarray(value, np.float64).reshape(form) for value in (self.zero_point, self.scale))
        return np.asarray((values.astype(np.float64) - zero_point) * scale, np.float32)  # of no axes, a number

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest number of an activation."""
        low, high = ((edge - self.zero_point[0]) * self.scale[0] for edge in BYTES[self.dtype])
        return low, high


@dataclass(frozen=True, kw_only=True, eq=False)
class Op:
    """An operation: values go in and one comes out. Values are numbers or names, as the source has them."""

    name: str  # what the source calls it, for errors
    inputs: tuple[Any, ...]
    output: Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Conv(Op):
    """A convolution; a fully connected layer is one of kernel size 1."""

    weight: Tensor  # (out, in / groups, height, width)
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: Pads | None = ((0, 0), (0, 0))
    groups: int = 1
    implied: str | None = None  # the activation that the range of a quantized output stands for
    scale: Scale | None = None  # of the weight


@dataclass(frozen=True, kw_only=True, eq=False)
class Norm(Op):
    """A batch norm; tensors of shape (C,)."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    variance: Tensor
    eps: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Affine(Op):
    """factor * x + offset; tensors of shape () or (C,)."""

    factor: Tensor
    offset: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Act(Op):
    """An activation, by the name that our configuration, PREDICTIONS or else the source has for it."""

    function: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Add(Op):
    """The sum of two values."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Mul(Op):
    """The product of two values."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Squeeze(Op):
    """Squeeze-and-excite, which a file draws as a branch: pool, reduce, relu, expand, hard sigmoid, multiply."""

    reduce: Conv
    expand: Conv
    # Values of the branch: pooled, reduced, and expanded plus 3 between 0 and 6; None where there is no such value.
    values: tuple[Any, Any, Any]
    window: tuple[int, int] | None = None  # of its pooling

    @property
    def in_channels(self) -> int:
        return self.expand.weight.shape[0]

    @property
    def out_channels(self) -> int:
        """The channels between the two convolutions, as those of its step."""
        return self.reduce.weight.shape[0]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """By our names."""
        parts = {"reduce": self.reduce, "expand": self.expand}
        weights = {f"{name}.{part}.weight": conv.weight for part, conv in parts.items()}
        return weights | {f"{name}.{part}.bias": _bias(conv) for part, conv in parts.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Pad(Op):
    """Zeros around an image."""

    pads: Pads


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool(Op):
    """A mean or maximum over the whole image, or over windows of it."""

    kind: str  # "avg" or "max"
    window: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Reshape(Op):
    """The same values in another form."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Other(Op):
    """An operation that no MobileNet has."""

    what: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Resize(Other):
    """A map resized bilinearly, which segmenters do."""

    align_corners: bool  # as TensorFlow calls it; otherwise, edges stay in place
    what: str = "a resizing"


@dataclass(frozen=True, kw_only=True, eq=False)
class Concat(Other):
    """The channels of several maps together, as segmenters have them."""

    what: str = "a concatenation"


@dataclass(frozen=True, kw_only=True, eq=False)
class Join(Other):
    """What detectors predict from several maps, one after another."""

    what: str = "a concatenation"


@dataclass(frozen=True, kw_only=True, eq=False)
class ArgMax(Other):
    """The class of each pixel, which segmenters may end in."""

    what: str = "the largest of the channels"


class Reader:
    """What the readers of all sources share: the operations so far, and which values are forms of others."""

    graph: Graph

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ops: list[Op] = []
        self.aliases: dict[Any, Any] = {}

    def source(self, value: Any) -> Any:
        """The value that a value is another form of."""
        for _ in range(len(self.aliases) + 1):  # no chain is longer, though it may be a ring
            if value not in self.aliases:
                break
            value = self.aliases[value]
        return value


def of_two(kind: str, common: dict[str, Any]) -> Op:
    """Arithmetic of two values, by its kind."""
    kinds = {"ADD": Add, "MUL": Mul}
    if kind in kinds:
        return kinds[kind](**common)
    return Other(**common, what=f"the operator {kind} of {len(common['inputs'])} values")


def affine(kind: str, value: Tensor, is_first: bool, common: dict[str, Any]) -> Op:
    """Arithmetic of a value with a constant, which may stand first, by its kind: ADD, SUB, MUL or DIV."""
    if value.numel() != max(value.shape, default=1) or (value.ndim and value.numel() > 1 and value.shape[-1] == 1):
        return Other(**common, what=f"the operator {kind} with a constant of shape {list(value.shape)}")
    value = value.reshape(-1) if value.numel() > 1 else value.reshape(())
    one, zero = torch.ones(()), torch.zeros(())
    if kind == "DIV" and is_first:
        return Other(**common, what="a division by it")
    factor, offset = {
        "ADD": (one, value),
        "SUB": (-one, value) if is_first else (one, -value),
        "MUL": (value, zero),
        "DIV": (1 / value.double(), zero),
    }[kind]
    return Affine(**common, factor=factor, offset=offset)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A network as its file draws it."""

    ops: list[Op]
    input: Any
    output: Any
    channels: int
    size: int | None = None  # side of the images that the file takes; None where it takes any
    padding: str = "same"  # what to call padding that has both names at this size
    scales: Mapping[Any, Scale] = field(default_factory=dict)  # of activations

    def chain(self) -> list[Op]:
        """The operations that the output depends on, in an order in which they can run, products recognized."""
        ops = self._chain(self.ops)
        makers = {op.output: op for op in ops}
        return self._chain([_recognized(op, makers) if isinstance(op, (Mul, Affine)) else op for op in ops])

    def _chain(self, ops: list[Op]) -> list[Op]:
        makers = {op.output: op for op in ops}
        ordered: dict[int, Op] = {}
        stack: list[tuple[Any, bool]] = [(self.output, False)]
        entered: set[Any] = set()
        while stack:
            value, done = stack.pop()
            op = None if value == self.input else makers.get(value)
            if op is None or id(op) in ordered:
                continue
            if done:
                ordered[id(op)] = op
            elif value in entered:
                raise ConversionError(f"{op.name} depends on itself")
            else:
                entered.add(value)
                stack.append((value, True))
                stack += [(each, False) for each in reversed(op.inputs)]
        return list(ordered.values())


def _bias(conv: Conv) -> Tensor:
    return torch.zeros(conv.weight.shape[0]) if conv.bias is None else conv.bias


def _recognized(op: Op, makers: Mapping[Any, Op]) -> Op:
    """The one operation of ours that a product ends: hard swish, SiLU or squeeze-and-excite; else the product.

    Args:
        op: The last of the operations that may be one.
        makers: All operations by the value that they make.
    """
    common = {"name": op.name, "output": op.output}
    if isinstance(op, Affine):  # x * relu6(x + 3) first, and a sixth of that
        product = makers.get(op.inputs[0])
        if isinstance(product, Mul) and _is_constant(op, 1 / 6, 0):
            for x, other in (product.inputs, product.inputs[::-1]):
                if _shifted(makers.get(other), makers) == (x, 3):
                    return Act(**common, inputs=(x,), function="hardswish")
        return op
    for x, other in (op.inputs, op.inputs[::-1]):
        gate = makers.get(other)
        if isinstance(gate, Act) and gate.function == "sigmoid" and gate.inputs == (x,):
            return Act(**common, inputs=(x,), function="silu")
        if isinstance(gate, Act) and gate.function == "hardsigmoid":
            before, shift = gate.inputs[0], 3.0
        elif isinstance(gate, Affine) and _is_constant(gate, 1 / 6, 0):
            before, shift = _shifted(makers.get(gate.inputs[0]), makers)
        else:
            continue
        if (before, shift) == (x, 3):
            return Act(**common, inputs=(x,), function="hardswish")
        branch: list[Any] = []
        while before != x and isinstance(found := makers.get(before), (Conv, Act, Pool, Reshape)) and len(branch) < 4:
            branch += [found] * (not isinstance(found, Reshape))
            before = found.inputs[0]
        if before == x and [type(each) for each in branch] in ([Conv, Act, Conv, Pool], [Conv, Act, Conv]):
            # TensorFlow's converter leaves out the pooling of a single pixel.
            expand, act, reduce, pool = (*branch, Pool(**common, inputs=(x,), kind="avg", window=(1, 1)))[:4]
            # TensorFlow's converter adds the 3 of the hard sigmoid to the bias.
            expand = replace(expand, bias=_bias(expand) + (shift - 3))
            pointwise = all(conv.weight.shape[2:] == (1, 1) and conv.groups == 1 for conv in (reduce, expand))
            values = reduce.inputs[0], act.output, gate.inputs[0] if isinstance(gate, Affine) else None
            if pointwise and act.function == "relu" and pool.kind == "avg":
                return Squeeze(**common, inputs=(x,), reduce=reduce, expand=expand, values=values, window=pool.window)
    return op


def _is_constant(op: Any, factor: float, offset: float) -> bool:
    """Whether an operation scales and shifts all channels by given numbers."""
    close = {"rtol": 1e-4, "atol": 1e-6}  # a file may hold 0.16667
    return isinstance(op, Affine) and all(
        torch.allclose(found.double(), torch.full_like(found, value, dtype=torch.double), **close)
        for found, value in ((op.factor, factor), (op.offset, offset))
    )


def _shifted(op: Op | None, makers: Mapping[Any, Op]) -> tuple[Any, float]:
    """The value x and the number c of relu6(x + c); None of another operation."""
    if not (isinstance(op, Act) and op.function == "relu6"):
        return None, 0.0
    before = makers.get(op.inputs[0])
    return (before.inputs[0], 3.0) if _is_constant(before, 1, 3) else (op.inputs[0], 0.0)


@dataclass
class Unit:
    """A convolution with what follows it: batch norm, activation."""

    conv: Conv
    pads: Pads | None
    norm: Norm | None = None
    act: str | None = None
    output: Any = None
    linear: Any = None  # the value that the activation sees

    @property
    def name(self) -> str:
        return self.conv.name

    @property
    def in_channels(self) -> int:
        return self.conv.weight.shape[1] * self.conv.groups

    @property
    def out_channels(self) -> int:
        return self.conv.weight.shape[0]

    @property
    def activation(self) -> str | None:
        return self.act or self.conv.implied

    def scaled(self, factor: Tensor, offset: Tensor) -> None:
        """Let an affine operation be part of what comes before it."""
        factor, offset = (value.double().expand(self.out_channels) for value in (factor, offset))
        if self.norm is not None:
            norm = self.norm
            self.norm = replace(norm, scale=norm.scale.double() * factor, shift=norm.shift.double() * factor + offset)
        else:
            bias = offset if self.conv.bias is None else self.conv.bias.double() * factor + offset
            weight = self.conv.weight.double() * factor[:, None, None, None]
            self.conv = replace(self.conv, weight=weight, bias=bias)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias that do the work of the batch norm too."""
        weight = self.conv.weight.double()
        bias = torch.zeros(self.out_channels) if self.conv.bias is None else self.conv.bias
        if self.norm is None:
            return weight, bias.double()
        norm = self.norm
        mean = norm.mean.double() - bias.double()
        return fold(weight, norm.scale.double(), norm.shift.double(), mean, norm.variance.double(), norm.eps)

    def tensors(self, name: str, eps: float | None) -> dict[str, Tensor]:
        """By our names, with a batch norm of an epsilon; or folded, where there is none."""
        if eps is None:
            weight, bias = self.folded()
            return {f"{name}.conv.weight": weight, f"{name}.conv.bias": bias}
        norm = self.norm
        mean = norm.mean if self.conv.bias is None else norm.mean.double() - self.conv.bias.double()
        scale = norm.scale
        if norm.eps != eps:
            scale = scale.double() * ((norm.variance.double() + eps) / (norm.variance.double() + norm.eps)).sqrt()
        parts = {"weight": scale, "bias": norm.shift, "running_mean": mean, "running_var": norm.variance}
        return {f"{name}.conv.weight": self.conv.weight} | {f"{name}.norm.{key}": t for key, t in parts.items()}


class Step(NamedTuple):
    """What a configured network does next: a convolution, or the sum that ends a block."""

    name: str  # our layer whose output it makes
    kind: str  # "conv", "squeeze" or "add"; another where no file is read so far
    in_channels: int = 0
    out_channels: int = 0
    kernel_size: int = 1
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    act: str | None = None

    @property
    def words(self) -> str:
        """What it is, without its channels."""
        if self.kind != "conv":
            return {"add": "a sum", "squeeze": "squeeze-and-excite"}.get(self.kind, self.kind)
        return _conv_words(self.groups, (self.kernel_size,) * 2, self.stride, self.dilation)

    @property
    def form(self) -> tuple:
        """What tells it from other steps, whatever the width."""
        return self.kind, self.kernel_size, self.stride, self.dilation, self.groups > 1


def expected(config: MobileNetConfig) -> list[Step]:
    """The steps of a network up to its pooling, or to what makes a segmenter of it."""

    def steps() -> Iterator[Step]:
        stem = config.stem_block
        yield conv("backbone.stem", stem.in_channels, stem.out_channels, stem, act=stem.act)
        for stage, blocks in enumerate(config.stages):
            for index, block in enumerate(blocks):
                yield from of_block(f"backbone.stages.{stage}.{index}", block)
        head = config.head_block
        if head and (config.segmentation_head is None or config.segmentation.takes_head):
            yield conv("backbone.head", head.in_channels, head.out_channels, head, act=head.act)

    def conv(name: str, before: int, after: int, block: Any = None, groups: int = 1, act: str | None = None) -> Step:
        kernel = (block.kernel_size, block.stride, block.dilation) if block else (1, 1, 1)
        return Step(name, "conv", before, after, *kernel, groups, act)

    def add(name: str, block: Any) -> Iterator[Step]:
        if block.is_residual and block.stride == 1 and block.in_channels == block.out_channels:
            yield Step(name, "add")

    def of_block(name: str, block: Any) -> Iterator[Step]:
        before, hidden, after = block.in_channels, block.hidden_channels, block.out_channels
        if block.kind == "separable":
            yield conv(f"{name}.depthwise", hidden, hidden, block, hidden, block.act)
            yield conv(f"{name}.pointwise", hidden, after, act=block.act)
        elif block.kind == "inverted":
            if block.start_kernel_size:
                start = block._replace(kernel_size=block.start_kernel_size)
                start = start._replace(stride=1) if block.kernel_size else start
                yield conv(f"{name}.start_depthwise", before, before, start, before)
            if hidden != before:
                yield conv(f"{name}.expand", before, hidden, act=block.act)
            if block.kernel_size:
                yield conv(f"{name}.depthwise", hidden, hidden, block, hidden, block.act)
            if block.squeeze_channels:
                yield Step(f"{name}.squeeze", "squeeze", hidden, block.squeeze_channels)
            yield conv(f"{name}.project", hidden, after)
            yield from add(name, block)
        elif block.kind == "fused":
            if hidden != before:
                yield conv(f"{name}.expand", before, hidden, block, act=block.act)
            yield conv(f"{name}.project", hidden, after)
            yield from add(name, block)
        elif block.kind == "conv":
            yield conv(name, before, after, block, act=block.act)
        else:
            yield Step(name, f"a block of kind {block.kind}")

    return list(steps())


def feature_rows(steps: Sequence[Step], has_batch_norm: bool) -> dict[str, Row]:
    """Our own names of the layers that take steps."""
    rows = {}
    for step in steps:
        name = re.sub(r"stages\.\d+\.\d+", "stages.{stage}.{block}", step.name)
        # A convolution that is a block has no role in it.
        key = name.removeprefix("backbone.").replace("stages.{stage}.{block}.", "block.")
        key = key.replace("stages.{stage}.{block}", "conv")
        if step.kind == "conv":
            rows[key] = Row(f"{name}.conv", f"{name}.norm" if has_batch_norm else None)
        elif step.kind == "squeeze":
            rows |= {f"{key}.{part}": Row(f"{name}.{part}") for part in ("reduce", "expand")}
    return rows


def table(config: Mapping[str, Any]) -> Table:
    """The names that `match` gives to tensors: our own."""
    model = MobileNetConfig(**config)
    rows = feature_rows(expected(model), model.has_batch_norm)
    last = model.pre_logits_block
    if last:
        norm = "backbone.pre_logits.norm" if last.has_norm and model.has_batch_norm else None
        rows["pre_logits"] = Row("backbone.pre_logits.conv", norm)
    if model.segmentation_head:
        names = [f"segmentation_head.{name}" for name in segmenter_units(model)]
        rows |= {name: Row(f"{name}.conv", f"{name}.norm" if model.has_batch_norm else None) for name in names}
        return Table(dict(config), rows | {name: Row(name) for name in ["segmentation_head.classifier"]}, TORCH)
    hidden = [f"hidden.{2 * index}" for index in range(len(model.classifier_hidden_sizes))]
    return Table(dict(config), rows | {name: Row(name) for name in (*hidden, "classifier")}, TORCH)


def segmenter_units(model: MobileNetConfig) -> list[str]:
    """What a segmenter's head calls its convolutions that batch norms follow, in the order in which they run."""
    return [*(f"branches.{index}" for index in range(len(model.segmentation.rates))), "project"]


class Match(NamedTuple):
    """A network of ours that does what a graph does."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]  # by our names
    prediction: str | None  # a key of PREDICTIONS, or LABEL_MAP: what the graph ends in
    logits: Any  # the value that goes into it
    scaling: tuple[Tensor, Tensor] | None  # what the graph does to its input first: factor and offset
    quantization: dict[str, Any] | None  # as quantization.json has it


def match(graph: Graph, source: str, image_size: int) -> Match:
    """Find the network of ours that computes what a graph computes.

    Args:
        graph: The graph.
        source: What to call it in errors.
        image_size: Side of the images, for a graph that takes any.

    Raises:
        ConversionError: There is none; the message names the first layer that has no place in it.
    """
    return Matcher(graph, source, graph.size or image_size).match()


def to_checkpoint(
    kind: str,
    file: Reader,
    found: Match,
    options: Options,
    recipe: str,
    runtime: Callable[[Any, Match, int], Oracle],
    *,
    labels: list[str] | None = None,
    recorded: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Checkpoint:
    """What a file gives to a conversion.

    Args:
        kind: The file in a few words, with its article.
        file: The file.
        found: The network.
        options: What the user says.
        recipe: Preprocessing to assume where nobody says anything.
        runtime: Gives the file in its own runtime, for images of a size.
        labels: What the file itself calls the classes; by default, labels lie beside it.
        recorded: Mean and deviation that the file records, of values in 0 to 1.
    """
    count, size = found.config["num_labels"], file.graph.size
    near, numbered = beside(file.path, count)
    publisher = published(file.path.name, count, numbered, task_of(found.config))
    processor, feed, said = find(options, recipe, size, publisher=publisher, recorded=recorded, scaling=found.scaling)
    return Checkpoint(
        kind=kind,
        tensors=found.tensors,
        table=table(found.config),
        config=found.config | {"image_size": options.size(size)},
        processor=processor,
        feed=feed,
        files=[file.path],
        oracle=lambda: runtime(file, found, options.size(size)),
        labels=labels or near,
        license="apache-2.0" if publisher or count in (1000, 1001) else None,
        quantization=found.quantization,
        prediction=found.prediction,
        notes=[NOTE] if found.quantization else [],
        warnings=said,
    )


NOTE = """The weights are those of 8 bits, as real numbers. How the source quantizes is kept in `quantization.json`:
`activations` has type, scale, zero point and range of each layer's output by the layer's name (`pixel_values` is the
input, `backbone.pooler_output` what the classifier sees, `backbone.stages.1.1` the sum that ends a block, `classifier`
the logits; in MobileNet V3, `backbone.pooled` is what `backbone.pre_logits` sees, names that end in `conv` are values
before their activation, and `pooled`, `reduce` and `expand` those within squeeze-and-excite); `weights` has type,
scale and zero point, one or one for each output channel. A real number is scale * (byte - zero_point)."""


class Matcher:
    """Finds the network of ours that computes what a graph computes."""

    scaled = "backbone.stages."  # what the names of layers begin with of which the last tells the width multiplier

    def __init__(self, graph: Graph, source: str, size: int) -> None:
        self.graph, self.source, self.size = graph, source, size

    def steps(self, fields: Mapping[str, Any]) -> list[Step]:
        """What a network does of which a graph must do the same."""
        return expected(MobileNetConfig(**fields))

    def candidates(self) -> Iterator[dict[str, Any]]:
        """Fields of the networks that a graph may be of, at width 1."""
        for architecture in ARCHITECTURES:
            for output_stride in OUTPUT_STRIDES[::-1]:
                yield {"architecture": architecture, "output_stride": output_stride}

    def refuse(self, layer: str, rule: str) -> ConversionError:
        """The error for a layer that has no place in our network."""
        return ConversionError(f"{self.source}: is no MobileNet that can be converted: {layer} {rule}.")

    def match(self) -> Match:
        try:
            ops = self.graph.chain()
        except ConversionError as error:
            raise ConversionError(f"{self.source}: {error}.") from error
        items = self.parse(ops)
        scaling = self.scaling(items)
        config, steps = self.closest(items)
        body, rest = items[: len(steps)], items[len(steps) :]
        fields, tensors, pairs, eps = self.take_steps(config, steps, body)
        units = [(step, item) for step, item in pairs if step.kind == "conv"]
        self.pre_logits = MobileNetConfig(**fields).pre_logits_block
        head, head_tensors, prediction, logits, layers = self.head(rest, units[-1][1], eps)
        fields |= head
        named = [*((step.name, item) for step, item in pairs), *layers]
        return Match(
            fields,
            {name: tensor.float() for name, tensor in (tensors | head_tensors).items()},
            prediction,
            logits,
            scaling,
            self.quantization(named),
        )

    def take_steps(
        self, config: dict[str, Any], steps: list[Step], body: list[Any]
    ) -> tuple[dict[str, Any], dict[str, Tensor], list[tuple[Step, Any]], float | None]:
        """What the layers say that take steps: fields, tensors, what takes each step, and the epsilon of the norms."""
        pairs = list(zip(steps, body, strict=True))
        units = [(step, item) for step, item in pairs if step.kind == "conv"]
        self.check_sums(steps, body)
        fields = config | self.activations(units, config["architecture"]) | {"padding": self.padding(pairs)}
        has_norm = all(unit.norm is not None for _, unit in units)
        eps = units[0][1].norm.eps if has_norm else None
        fields |= {"batch_norm_eps": eps} if has_norm else {"use_batch_norm": False}
        tensors: dict[str, Tensor] = {}
        for step, item in pairs:
            if isinstance(item, (Unit, Squeeze)):
                tensors |= item.tensors(step.name, eps) if isinstance(item, Unit) else item.tensors(step.name)
        return fields, tensors, pairs, eps

    def parse(self, ops: list[Op]) -> list[Any]:
        """Operations as units and what lies between them; each must follow the one before it."""
        items: list[Any] = []
        current, pads = self.graph.input, None
        self.outputs = {current: -1}  # the item after which a value stands
        for op in ops:
            last = items[-1] if items else None
            if not isinstance(op, Other) and (
                current not in op.inputs or (len(op.inputs) > 1 and not isinstance(op, (Add, Mul)))
            ):
                what = "on a branch, which does not take what the layer before it gives"
                op = Other(name=op.name, inputs=op.inputs, output=op.output, what=what)
            if isinstance(op, Other):
                return [*items, op]  # nothing after it has a place either
            if pads and not isinstance(op, (Conv, Pad)):
                raise self.refuse(op.name, "comes after padding, which only convolutions do")
            unit = last if isinstance(last, Unit) and last.act is None else None
            if isinstance(op, Pad):
                pads = _sum(pads, op.pads)
            elif isinstance(op, Conv):
                if pads and op.pads is SAME:
                    raise self.refuse(op.name, "pads twice")
                items.append(Unit(op, _sum(pads, op.pads) if pads else op.pads))
                pads = None
            elif isinstance(op, Norm) and unit:
                if unit.norm is None:
                    unit.norm = op
                else:
                    unit.scaled(*_affine(op))
            elif isinstance(op, Affine) and unit:
                unit.scaled(op.factor, op.offset)
            elif isinstance(op, Act) and unit:
                unit.act = op.function
            else:
                items.append(op)
            current = op.output
            if items:
                self.outputs[current] = len(items) - 1
            if items and isinstance(items[-1], Unit):
                items[-1].output = current
                if not isinstance(op, Act):
                    items[-1].linear = current
        return items

    def scaling(self, items: list[Any]) -> tuple[Tensor, Tensor] | None:
        """Take what a graph does to its input off the start."""
        factor, offset, found = torch.ones(()), torch.zeros(()), 0
        for item in items:
            if not isinstance(item, (Affine, Norm)):
                break
            found += 1
            f, o = _affine(item)
            factor, offset = factor.double() * f, offset.double() * f + o
            if not (factor > 0).all():
                raise self.refuse(item.name, "scales its input by a factor that is not above 0")
        self.scaled_input = items[found - 1].output if found else self.graph.input
        del items[:found]
        self.skipped = found
        return (factor, offset) if found else None

    def closest(self, items: list[Any]) -> tuple[dict[str, Any], list[Step]]:
        """The configuration whose steps a graph follows for longest, which must be to the end.

        Raises:
            ConversionError: The graph follows none to its end.
        """
        # Which blocks end in a sum depends on the width.
        convs = [item for item in items if not isinstance(item, Add)]
        best: tuple[int, dict[str, Any], list[Step]] = (-1, {}, [])
        for fields in self.candidates():
            steps = [step for step in self.steps(fields) if step.kind != "add"]
            same = _agreement(convs, steps)
            if same > best[0]:
                best = same, fields, steps
        same, fields, steps = best
        title = ARCHITECTURES[fields["architecture"]].title
        if same < len(steps):  # dilation, which is rare, would only confuse
            steps = [step for step in self.steps(fields | {"output_stride": 32}) if step.kind != "add"]
            self.require(convs, steps, _agreement(convs, steps), title)
        fields, steps = self.width(fields | {"num_channels": self.graph.channels}, convs, title)
        self.require(items, steps, _agreement(items, steps), title)
        return fields, steps

    def require(self, items: list[Any], steps: list[Step], same: int, title: str) -> None:
        """Raise ConversionError unless as many items as there are steps are the same."""
        if same == len(steps):
            return
        step = steps[same]
        if same >= len(items):
            raise self.refuse("the end of the network", f"comes where {title} has {step.words}")
        name = step.name.removeprefix("backbone.")
        raise self.refuse(items[same].name, f"is {words(items[same])}: {title} has {step.words} there ({name})")

    def width(self, fields: dict[str, Any], convs: list[Any], title: str) -> tuple[dict[str, Any], list[Step]]:
        """Add the width multiplier that gives a network its channels.

        Raises:
            ConversionError: No multiplier does.
        """
        steps = [step for step in self.steps(fields) if step.kind != "add"]
        last = max(index for index, step in enumerate(steps) if step.name.startswith(self.scaled))
        ratio = convs[last].out_channels / steps[last].out_channels
        nearest: tuple[int, Any] = (-1, None)
        for multiplier in candidates(ratio):
            for extra in ({}, {"shrink_head": True}, {"channel_divisor": 1}, {"channel_divisor": 8}):
                chosen = fields | {"width_multiplier": multiplier} | extra
                steps = self.steps(chosen)
                pairs = list(zip(convs, (step for step in steps if step.kind != "add"), strict=False))
                fits = [(i.in_channels, i.out_channels) == (step.in_channels, step.out_channels) for i, step in pairs]
                if all(fits):
                    return chosen, steps
                if fits.index(False) > nearest[0]:
                    nearest = fits.index(False), (multiplier, pairs[fits.index(False)])
        multiplier, (item, step) = nearest[1]
        raise self.refuse(
            item.name,
            f"has {item.in_channels} channels in and {item.out_channels} out, which no width multiplier of {title} "
            f"gives: the closest, {multiplier:.4g}, has {step.in_channels} and {step.out_channels}",
        )

    def check_sums(self, steps: list[Step], body: list[Any]) -> None:
        """Raise ConversionError unless each sum adds what its block started from."""
        for index, (step, item) in enumerate(zip(steps, body, strict=True)):
            if step.kind == "add":
                start = next(i for i, other in enumerate(steps) if other.name.startswith(f"{step.name}."))
                others = {self.outputs.get(value, -2) - self.skipped for value in item.inputs}
                if others != {start - 1, index - 1}:
                    raise self.refuse(item.name, "does not add what its block started from")

    def activations(self, units: list[tuple[Step, Unit]], architecture: str) -> dict[str, Any]:
        """The activation of all units that have one; nothing, where they must have those of a table.

        Raises:
            ConversionError: A unit has another, or one that our network does not have.
        """
        depthwise = [unit.activation for step, unit in units if step.name.endswith(".depthwise")]
        separable = all(not step.name.endswith(".expand") for step, _ in units)
        plain = separable and not any(depthwise)
        by_table = ARCHITECTURES[architecture].hidden_act is None
        known: str | None = None
        for step, unit in units:
            found = unit.act if step.act is None else unit.activation
            wants = step.act is not None and not (plain and step.name.endswith(".depthwise"))
            if not wants:
                if found is not None:
                    raise self.refuse(unit.name, f"has the activation {found}, and must be linear")
                continue
            if found is None:
                raise self.refuse(unit.name, "has no activation")
            if found not in ACTIVATIONS:
                raise self.refuse(
                    unit.name, f"has the activation {found}, and must have one of {', '.join(ACTIVATIONS)}"
                )
            if by_table and found != step.act:
                title = ARCHITECTURES[architecture].title
                raise self.refuse(unit.name, f"has the activation {found} where {title} has {step.act}")
            if known is None or by_table:
                known = found
            if found != known:
                raise self.refuse(unit.name, f"has the activation {found} where others have {known}")
        if by_table:
            return {}
        return {"hidden_act": known} | ({"depthwise_activation": False} if plain else {})

    def padding(self, pairs: list[tuple[Step, Any]]) -> str:
        """What our configuration calls the padding of all convolutions.

        Raises:
            ConversionError: A convolution pads in another way than those before it.
        """
        names = {"same", "symmetric"}
        size = self.size
        for step, unit in pairs:
            if isinstance(unit, Squeeze) and unit.window not in (None, (size, size)):
                raise self.refuse(unit.name, f"pools over {unit.window}, and must over {size} pixels")
            if not isinstance(unit, Unit):
                continue
            reach = step.dilation * (step.kernel_size // 2)
            total = max(0, same_padding(size, step.kernel_size, step.stride, step.dilation))
            same = ((total // 2, total - total // 2),) * 2
            given = same if unit.pads is SAME else unit.pads
            fits = {name for name, pads in (("same", same), ("symmetric", ((reach, reach),) * 2)) if pads == given}
            if not names & fits:
                (top, bottom), (left, right) = given
                keras = given == ((0, 1), (0, 1)) and self.size % 32 not in (0, 31)
                hint = f" (as Keras does for an image_size that is a multiple of 32, or one less, got {self.size})"
                hint = hint if keras else ""
                raise self.refuse(
                    unit.name,
                    f"pads {size}x{size} pixels by {top} and {bottom} rows, {left} and {right} columns: all must pad "
                    f"as TensorFlow's SAME does, or all alike on both sides{hint}",
                )
            names &= fits
            size = -(-size // step.stride)
        self.size_of_map = size
        return self.graph.padding if self.graph.padding in names else names.pop()

    def head(
        self, items: list[Any], before: Unit, eps: float | None
    ) -> tuple[dict[str, Any], dict[str, Tensor], str | None, Any, list[tuple[str, Any]]]:
        """What follows the last convolution: pooling, and layers on pooled features."""
        fields: dict[str, Any] = {}
        named: list[tuple[str, Any]] = []
        pooled = self.size_of_map == 1
        layers: list[list[Any]] = []  # weight, bias, activation, unit
        logits, pending, width = before.output, None, before.out_channels
        for item in items:
            last = layers[-1] if layers else None
            if last and last[2] in PREDICTIONS and not isinstance(item, Reshape):
                raise self.refuse(item.name, f"comes after {last[2]}")
            if isinstance(item, Pool):
                if "pooling" in fields or layers or pending:
                    raise self.refuse(item.name, "pools a second time, or after a classifier")
                if item.window not in (None, (self.size_of_map,) * 2):
                    raise self.refuse(item.name, f"pools over {item.window}, and must over {self.size_of_map} pixels")
                pooled, fields["pooling"] = True, item.kind
                named.append(("backbone.pooler_output", item))
                logits = item.output
            elif isinstance(item, Reshape) and pooled:
                logits = item.output if not (last and last[2] in PREDICTIONS) else logits
            elif not pooled:
                raise self.refuse(item.name, f"must be a pooling over {self.size_of_map}x{self.size_of_map} pixels")
            elif isinstance(item, Unit):
                conv = item.conv
                if conv.weight.shape[2:] != (1, 1) or conv.groups != 1 or conv.stride != (1, 1):
                    raise self.refuse(item.name, "must be fully connected")
                if item.in_channels != width:
                    raise self.refuse(item.name, f"takes {item.in_channels} features, and must take {width}")
                weight, bias = (tensor.flatten(1) if tensor.ndim > 1 else tensor for tensor in item.folded())
                if pending:
                    factor, offset = (value.expand(width) for value in pending)
                    bias, weight, pending = bias + weight @ offset, weight * factor, None
                if last and last[2] is None:
                    weight, bias = weight @ last[0], bias + weight @ last[1]
                    layers.pop()
                layers.append([weight, bias, item.act, item])
                width = item.out_channels
                logits = item.linear if item.act in PREDICTIONS else item.output
            elif isinstance(item, (Norm, Affine)):
                factor, offset = _affine(item)
                pending = (factor * pending[0], factor * pending[1] + offset) if pending else (factor, offset)
                pending_at = item.name
            elif isinstance(item, Act) and last and last[2] is None:
                last[2] = item.function
                logits = item.inputs[0] if item.function in PREDICTIONS else item.output
            else:
                raise self.refuse(item.name, f"is {words(item)}, and must be the classifier or its softmax")
        if pending:
            raise self.refuse(pending_at, "scales features that no classifier takes")
        tensors = self.take_pre_logits(layers, named, eps) if self.pre_logits else {}
        if self.pre_logits and not tensors:
            fields["use_pre_logits"] = False
        fields, others, *found = self.classifier(fields, layers, logits, named)
        return fields, tensors | others, *found

    def take_pre_logits(
        self, layers: list[list[Any]], named: list[tuple[str, Any]], eps: float | None
    ) -> dict[str, Tensor]:
        """Take the first layer after the pooling off the others, if it is the network's own."""
        block, name = self.pre_logits, "backbone.pre_logits"
        if not layers or (len(layers[0][0]), layers[0][2]) != (block.out_channels, block.act):
            return {}
        weight, bias, _, unit = layers.pop(0)
        named[:] = [("backbone.pooled" if key == "backbone.pooler_output" else key, item) for key, item in named]
        named.append((name, unit))
        if block.has_norm and eps is not None:
            if unit.norm is None:
                raise self.refuse(unit.name, "has no batch norm")
            return unit.tensors(name, eps)
        return {f"{name}.conv.weight": weight[:, :, None, None], f"{name}.conv.bias": bias}

    def classifier(
        self, fields: dict[str, Any], layers: list[list[Any]], logits: Any, named: list[tuple[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Tensor], str | None, Any, list[tuple[str, Any]]]:
        """Classifier and hidden layers by our names."""
        prediction = layers[-1][2] if layers and layers[-1][2] in PREDICTIONS else None
        # A hidden layer that ends the network leaves no classifier: its features are what the network gives.
        *hidden, last = layers if layers and layers[-1][2] in (None, *PREDICTIONS) else [*layers, None]
        for _, _, act, unit in hidden:
            if act not in ACTIVATIONS or act != hidden[0][2]:
                raise self.refuse(
                    unit.name,
                    f"has the activation {act}: layers before the classifier must all have the same of "
                    f"{', '.join(ACTIVATIONS)}",
                )
        if hidden:
            fields["classifier_hidden_sizes"] = tuple(len(layer[0]) for layer in hidden)
            fields["classifier_hidden_act"] = hidden[0][2]
        fields["num_labels"] = len(last[0]) if last else 0
        if prediction == "sigmoid":
            fields["problem_type"] = "multi_label_classification"
        names = [f"hidden.{2 * index}" for index in range(len(hidden))] + ["classifier"] * (last is not None)
        tensors = {}
        for name, (weight, bias, _, unit) in zip(names, layers, strict=True):
            tensors |= {f"{name}.weight": weight, f"{name}.bias": bias}
            named.append((name, unit))
        return fields, tensors, prediction, logits, named

    def quantization(self, named: list[tuple[str, Any]]) -> dict[str, Any] | None:
        """How a graph quantizes: activations by the layer whose output they are, weights by our names."""
        outputs = {"pixel_values": self.scaled_input} | {name: item.output for name, item in named}
        for name, item in named:
            if isinstance(item, Squeeze):
                outputs |= zip((f"{name}.{part}" for part in ("pooled", "reduce", "expand")), item.values, strict=True)
            elif isinstance(item, Unit) and item.act in PREDICTIONS:
                outputs[name] = item.linear
            elif isinstance(item, Unit) and not _is_linear(name):
                outputs[f"{name}.conv"] = item.linear if item.linear != item.output else None
        activations, weights = {}, {}
        for name, value in outputs.items():
            scale = self.graph.scales.get(value)
            if scale and name.endswith(".squeeze.expand"):  # the value has 3 more
                scale = scale._replace(zero_point=(scale.zero_point[0] + 3 / scale.scale[0],))
            if scale:
                low, high = scale.bounds
                activations[name] = {
                    "dtype": scale.dtype,
                    "scale": scale.scale[0],
                    "zero_point": scale.zero_point[0],
                    "min": low,
                    "max": high,
                }
        for name, item in named:
            convs = {name if _is_linear(name) else f"{name}.conv": getattr(item, "conv", None)}
            if isinstance(item, Squeeze):
                convs = {f"{name}.reduce": item.reduce, f"{name}.expand": item.expand}
            weights |= {f"{key}.weight": conv.scale.to_dict() for key, conv in convs.items() if conv and conv.scale}
        return {"activations": activations, "weights": weights} if weights else None


def _is_linear(name: str) -> bool:
    """Whether a layer of ours is a classifier or fully connected: no batch norm follows it."""
    return name.split(".")[-1] == "classifier" or name.startswith("hidden.")


def _sum(first: Pads | None, second: Pads) -> Pads:
    first = first or ((0, 0), (0, 0))
    return tuple((a + c, b + d) for (a, b), (c, d) in zip(first, second, strict=True))


def _affine(op: Norm | Affine) -> tuple[Tensor, Tensor]:
    """Factor and offset of an operation, in double precision."""
    if isinstance(op, Affine):
        return op.factor.double(), op.offset.double()
    factor = op.scale.double() * torch.rsqrt(op.variance.double() + op.eps)
    return factor, op.shift.double() - op.mean.double() * factor


def _agreement(items: list[Any], steps: list[Step]) -> int:
    """How many items, from the first on, have the form of a network's steps."""
    return next((index for index, step in enumerate(steps) if _form(items, index) != step.form), len(steps))


def _form(items: list[Any], index: int) -> tuple | None:
    """The form of a step, as an item of a graph has it."""
    item = items[index] if index < len(items) else None
    if isinstance(item, (Add, Squeeze)):
        return Step("", "add" if isinstance(item, Add) else "squeeze").form
    if not isinstance(item, Unit):
        return None
    (height, width), (stride, other), (dilation, third) = (
        item.conv.weight.shape[2:],
        item.conv.stride,
        item.conv.dilation,
    )
    depthwise = item.conv.groups > 1
    if (height, stride, dilation) != (width, other, third) or (depthwise and item.conv.weight.shape[1] > 1):
        return None
    if depthwise and item.in_channels != item.out_channels:
        return None
    return "conv", height, stride, dilation if height > 1 else 1, depthwise


def _conv_words(groups: int, kernel: Sequence[int], stride: int, dilation: int) -> str:
    """What a convolution is, without its channels."""
    kind = "a depthwise convolution" if groups > 1 else "a convolution"
    more = [f"{name} {value}" for name, value in (("stride", stride), ("dilation", dilation)) if value > 1]
    return f"{kind} of {kernel[0]}x{kernel[1]}" + " with " * bool(more) + " and ".join(more)


def words(item: Any) -> str:
    """What an item is."""
    if isinstance(item, Unit):
        conv = item.conv
        return _conv_words(conv.groups, conv.weight.shape[2:], max(conv.stride), max(conv.dilation))
    if isinstance(item, Act):
        return f"the activation {item.function}"
    if isinstance(item, Other):
        return item.what
    return {
        Add: "a sum",
        Mul: "a product of two values",
        Squeeze: "squeeze-and-excite",
        Pool: "a pooling",
        Norm: "a batch norm",
        Affine: "a scaling",
        Reshape: "a reshaping",
    }[type(item)]
