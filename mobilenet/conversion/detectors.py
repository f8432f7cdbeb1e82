"""Detectors as a source's own file draws them: from typed operations to a row of DETECTORS."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mobilenet.configuration_mobilenet import MobileNetConfig
from mobilenet.detection_mobilenet import ACT, anchor_shapes, extra_channels, generate_anchors, map_channels
from mobilenet.heads_mobilenet import DETECTORS, Detector, Focal

from .graph import Act, Conv, Graph, Join, Matcher, Op, Reshape, Step, Unit, expected, feature_rows
from .rename import TORCH, Row, Table


# How far an anchor may be from ours, which are not printed with all their digits.
ANCHOR_TOLERANCE = 1e-3
# From the order y, x, h, w of TensorFlow's codes to ours.
TO_XYWH = (1, 0, 3, 2)


class Outputs(NamedTuple):
    """What a graph predicts, and what its last operator says of that."""

    codes: Any  # the value of the codes of boxes
    scores: Any  # the value of the scores
    anchors: Tensor  # of shape (anchors, 4)
    step: float  # of the anchors, where they are quantized
    classes: int  # without background
    box_scales: tuple[float, ...]  # of x, y, w, h


class DetectorMatch(NamedTuple):
    """A detector of ours that does what a graph does."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]  # by our names
    table: Table
    quantization: dict[str, Any] | None  # as quantization.json has it
    box_scales: tuple[float, float, float, float]  # of y, x, h, w


class Branch(NamedTuple):
    """What a graph predicts from a map."""

    map: Any  # the value that it starts from
    ops: list[Op]


def match_detector(graph: Graph, source: str, outputs: Outputs) -> DetectorMatch:
    """Find the detector of ours that computes what a graph computes.

    Raises:
        ConversionError: There is none; the message names the first layer that has no place in it.
    """
    return DetectorMatcher(graph, source, outputs).match()


def detection_steps(config: MobileNetConfig) -> list[Step]:
    """The steps of a detector up to its last map."""
    steps = expected(config)
    if DETECTORS[config.detector].endpoints[-1] != "head":
        steps = [step for step in steps if step.name != "backbone.head"]
    for index, (channels, reduced, wide) in enumerate(extra_channels(config)):
        name = f"extras.{index}"
        steps.append(Step(f"{name}.reduce", "conv", channels, reduced, act=ACT))
        if DETECTORS[config.detector].is_lite:
            steps.append(Step(f"{name}.depthwise", "conv", reduced, reduced, 3, 2, groups=reduced, act=ACT))
            steps.append(Step(f"{name}.expand", "conv", reduced, wide, act=ACT))
        else:
            steps.append(Step(f"{name}.expand", "conv", reduced, wide, 3, 2, act=ACT))
    return steps


def map_ends(config: MobileNetConfig, steps: list[Step]) -> list[int]:
    """Which steps give the maps of a detector."""
    last = len(config.stages) - 1
    blocks = [f"backbone.stages.{stage}.{len(config.stages[stage]) - 1}" for stage in (last - 1, last)]
    names = {
        "previous": blocks[0],
        "last": blocks[1],
        "expansion": f"backbone.stages.{last}.0.expand",
        "head": "backbone.head" if config.head_block else blocks[1],
    }
    detector = DETECTORS[config.detector]
    extras = [f"extras.{index}" for index in range(len(detector.extra_channels))]
    found = [*(names[name] for name in detector.endpoints), *extras]
    return [max(i for i, step in enumerate(steps) if f"{step.name}.".startswith(f"{name}.")) for name in found]


def detection_table(fields: Mapping[str, Any]) -> Table:
    """Our own names of the tensors of a detector."""
    config = MobileNetConfig(**fields)
    rows = feature_rows(detection_steps(config), config.has_batch_norm)
    for index in range(len(map_channels(config))):
        for kind in ("box", "class"):
            name = f"{kind}_predictors.{index}"
            rows[name] = Row(f"{name}.conv")
            norm = f"{name}.depthwise.norm" if config.has_batch_norm else None
            rows[f"{name}.depthwise"] = Row(f"{name}.depthwise.conv", norm)
    return Table(dict(fields), rows, TORCH)


class DetectorMatcher(Matcher):
    """Finds the detector of ours that computes what a graph computes."""

    scaled = "extras.0."  # whose channels no divisor rounds

    def __init__(self, graph: Graph, source: str, outputs: Outputs) -> None:
        super().__init__(graph, source, graph.size)
        self.given = outputs
        self.makers = {op.output: op for op in graph.ops}
        self.is_lite = False
        self.kernel_size = 1

    def steps(self, fields: Mapping[str, Any]) -> list[Step]:
        return detection_steps(MobileNetConfig(**fields))

    def candidates(self) -> Iterator[dict[str, Any]]:
        """Fields of the detectors whose predictions are made alike; of equal ones, as they are mostly trained."""
        is_quantized = bool(self.graph.scales)
        alike = [
            (name, detector)
            for name, detector in DETECTORS.items()
            if (detector.is_lite, detector.kernel_size, detector.score) == (self.is_lite, self.kernel_size, "sigmoid")
        ]
        if not alike:
            kind = "depthwise" if self.is_lite else "plain"
            raise self.refuse("what predicts", f"has {kind} kernels of {self.kernel_size}, as no detector has")
        for name, detector in sorted(alike, key=lambda pair: isinstance(pair[1].loss, Focal) != is_quantized):
            yield {"architecture": detector.architecture, "detector": name}

    def match(self) -> DetectorMatch:
        boxes, classes = (self.branches(value) for value in (self.given.codes, self.given.scores))
        maps = [branch.map for branch in boxes]
        if maps != [branch.map for branch in classes]:
            raise self.refuse("what predicts classes", "takes other maps than what predicts boxes")
        self.graph = replace(self.graph, output=maps[-1])
        items = self.parse(self.graph.chain())
        if self.scaling(items):
            raise self.refuse(self.graph.ops[0].name, "scales pixels, which a detector here does not")
        config, steps = self.closest(items)
        if len(items) > len(steps):
            raise self.refuse(items[len(steps)].name, "comes after the last map")
        outputs = {value: index for value, index in self.outputs.items() if value != self.graph.input}
        fields, tensors, pairs, eps = self.take_steps(config, steps, items)
        named = [(step.name, item) for step, item in pairs]
        model = MobileNetConfig(**fields)
        detector = DETECTORS[model.detector]
        if [outputs.get(value) for value in maps] != map_ends(model, steps):
            raise self.refuse("what predicts", f"takes other maps than {detector.title} does")
        for kind, branches in (("box", boxes), ("class", classes)):
            for index, branch in enumerate(branches):
                name = f"{kind}_predictors.{index}"
                found = self.predictor(name, branch, detector)
                named += found
                for layer, unit in found:
                    tensors |= unit.tensors(layer, eps if layer.endswith(".depthwise") else None)
        fields["num_labels"] = self.labels(classes, detector)
        fields |= {"anchor_step": self.given.step} if self.given.step else {}
        self.check_boxes(model, steps)
        quantization = self.quantization(named)
        _reorder_boxes(tensors, quantization)
        x, y, w, h = self.given.box_scales
        return DetectorMatch(
            fields,
            {name: tensor.float().contiguous() for name, tensor in tensors.items()},
            detection_table(fields),
            quantization,
            (y, x, h, w),
        )

    def back(self, value: Any) -> Op:
        """What makes a value, but for its form.

        Raises:
            ConversionError: It is no result of an operation.
        """
        op = self.makers.get(value)
        for _ in self.makers:  # no chain is longer, though it may be a ring
            if not isinstance(op, Reshape):
                break
            op = self.makers.get(op.inputs[0])
        if op is None:
            raise self.refuse("what predicts", "does not depend on the image")
        return op

    def branches(self, value: Any) -> list[Branch]:
        """What predicts, map by map, and joins its predictions to a value."""
        join = self.back(value)
        if isinstance(join, Act) and join.function == "sigmoid":
            join = self.back(join.inputs[0])
        if not isinstance(join, Join):
            raise self.refuse(join.name, "must join what is predicted from several maps")
        return [self.branch(self.back(each)) for each in join.inputs]

    def branch(self, last: Op) -> Branch:
        """The convolutions that end in an operation: one, or a depthwise one before."""
        if not isinstance(last, Conv):
            raise self.refuse(last.name, "must be the convolution that predicts")
        self.is_lite, self.kernel_size = False, last.weight.shape[-1]
        act = self.makers.get(last.inputs[0])
        first = self.makers.get(act.inputs[0]) if isinstance(act, Act) else act
        if isinstance(first, Conv) and first.groups > 1 and first.stride == (1, 1) and self.kernel_size == 1:
            self.is_lite, self.kernel_size = True, first.weight.shape[-1]
            return Branch(first.inputs[0], [first, *[act] * isinstance(act, Act), last])
        return Branch(last.inputs[0], [last])

    def predictor(self, name: str, branch: Branch, detector: Detector) -> list[tuple[str, Unit]]:
        """The units of a predictor by our names.

        Raises:
            ConversionError: They are others.
        """
        inner = Matcher(replace(self.graph, input=branch.map), self.source, self.size)
        units = inner.parse(branch.ops)
        names = [f"{name}.depthwise", name] if detector.is_lite else [name]
        if len(units) != len(names) or not all(isinstance(unit, Unit) for unit in units):
            raise self.refuse(branch.ops[0].name, f"is no predictor of {detector.title}")
        for unit, is_last in zip(units[::-1], (True, False), strict=False):
            wanted = None if is_last else ACT
            if (found := unit.act if is_last else unit.activation) != wanted:
                raise self.refuse(unit.name, f"has the activation {found}, and must have {wanted}")
        if name.startswith("box_") and units[-1].out_channels % 4:
            channels = units[-1].out_channels
            raise self.refuse(units[-1].name, f"must predict 4 numbers for each box, has {channels} channels")
        return list(zip(names, units, strict=True))

    def labels(self, classes: list[Branch], detector: Detector) -> int:
        """How many classes there are without background.

        Raises:
            ConversionError: The file has another number of outputs.
        """
        for branch, shapes in zip(classes, anchor_shapes(detector), strict=True):
            conv = branch.ops[-1]
            if len(conv.weight) != len(shapes) * (self.given.classes + 1):
                raise self.refuse(
                    conv.name,
                    f"must predict {self.given.classes} classes and the background for {len(shapes)} anchors, has "
                    f"{len(conv.weight)} channels",
                )
        return self.given.classes

    def check_boxes(self, config: MobileNetConfig, steps: list[Step]) -> None:
        """Raise ConversionError unless boxes mean what ours do: by their anchors, and relative to these."""
        detector = DETECTORS[config.detector]
        of_centers, of_sizes = detector.box_scales
        if self.given.box_scales != (of_centers, of_centers, of_sizes, of_sizes):
            scales = ", ".join(f"{scale:g}" for scale in self.given.box_scales)
            raise self.refuse("the last operator", f"scales boxes by {scales}, and must by {of_centers}, {of_sizes}")
        sizes, size = [], self.size
        ends = map_ends(config, steps)
        for index, step in enumerate(steps):
            size = -(-size // step.stride)
            sizes += [(size, size)] * (index in ends)
        theirs, tolerance = self.given.anchors, ANCHOR_TOLERANCE + self.given.step
        # Sizes are what the file says: ours are not made before there are as many of them.
        count = sum(h * w * len(shapes) for (h, w), shapes in zip(sizes, anchor_shapes(detector), strict=True))
        got = f"{len(theirs)} of them"
        if theirs.shape == (count, 4):
            far = (generate_anchors(detector, sizes, self.given.step) - theirs).abs().max().item()
            if far <= tolerance:
                return
            got = f"some that differ by {far:.3g}"
        raise self.refuse("the last operator", f"must have the {count} anchors of {detector.title}, got {got}")


def _reorder_boxes(tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> None:
    """Let a detector predict x, y, w, h where its source predicts y, x, h, w: tensors, and scales of each channel."""
    ends = [name for name in tensors if re.fullmatch(r"box_predictors\.\d+\.conv\.(weight|bias)", name)]
    for name in ends:
        tensors[name] = _reordered(tensors[name])
        scale = quantization["weights"].get(name) if quantization else None
        if scale and len(scale["scale"]) > 1:
            for key, kind in (("scale", torch.double), ("zero_point", torch.long)):
                scale[key] = _reordered(torch.tensor(scale[key], dtype=kind)).tolist()


def _reordered(tensor: Tensor) -> Tensor:
    """Outputs for boxes in our order, anchor by anchor."""
    return tensor.reshape(-1, 4, *tensor.shape[1:])[:, list(TO_XYWH)].reshape(tensor.shape)
