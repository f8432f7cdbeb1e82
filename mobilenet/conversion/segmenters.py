"""Segmenters as a source's own file draws them: DeepLab V3 in its light form, behind a network without its head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from mobilenet.configuration_mobilenet import MobileNetConfig

from .graph import (
    LABEL_MAP,
    ArgMax,
    Concat,
    Conv,
    Graph,
    Match,
    Matcher,
    Op,
    Pool,
    Resize,
    Unit,
    segmenter_units,
    words,
)


HEAD = "deeplab_v3_light"  # a key of SEGMENTATION_HEADS


def is_segmenter(graph: Graph) -> bool:
    """Whether a graph resizes maps, which no classifier does."""
    return any(isinstance(op, Resize) for op in graph.ops)


def match_segmenter(graph: Graph, source: str) -> Match:
    """Find the segmenter of ours that computes what a graph computes.

    Raises:
        ConversionError: There is none; the message names the first layer that has no place in it.
    """
    return SegmenterMatcher(graph, source, graph.size).match()


class SegmenterMatcher(Matcher):
    """Finds the segmenter of ours: its branches start from one value, where the graph is cut in two."""

    def candidates(self) -> Iterator[dict[str, Any]]:
        """Fields of the networks that a graph may be of, at width 1."""
        return ({**fields, "segmentation_head": HEAD} for fields in super().candidates())

    def match(self) -> Match:
        self.makers = {op.output: op for op in self.graph.ops}
        self.cut()
        self.graph = replace(self.graph, output=self.shared)
        return super().match()

    def cut(self) -> None:
        """Find where the head starts, where branches are joined, and what comes out: from the end to the start."""
        value, steps = self.graph.output, []
        for _ in self.makers:  # no chain is longer, though it may be a ring
            if not isinstance(op := self.makers.get(value), (ArgMax, Resize)):
                break
            steps.append(op)
            value = op.inputs[0]
        self.check_resized(steps)
        self.logits, self.ends_in_labels = value, bool(steps)
        if any(isinstance(op, ArgMax) for op in steps[1:]):
            raise self.refuse(steps[-1].name, "must not come before another step")
        self.joined = self.before(value, Concat, "the joined channels of its branches").output
        branches = self.makers[self.joined].inputs
        if len(branches) != 2:
            raise self.refuse(
                self.makers[self.joined].name,
                f"must join an image pooling and a 1x1 branch, got {len(branches)} branches",
            )
        pooled = self.makers.get(branches[0])
        if not isinstance(pooled, Resize):
            name = pooled.name if pooled else "the end of the network"
            raise self.refuse(name, "must be what resizes the pooled features, which come first")
        self.check_resized([pooled])
        self.branches = pooled.inputs[0], branches[1]
        self.shared = self.before(branches[1], Conv, "a 1x1 convolution").inputs[0]

    def before(self, value: Any, kind: type, words: str) -> Any:
        """The first operation of a kind, from a value back to the start."""
        op = self.makers.get(value)
        for _ in self.makers:
            if op is None or isinstance(op, kind):
                break
            op = self.makers.get(op.inputs[0]) if op.inputs else None
        if not isinstance(op, kind):
            raise self.refuse("the end of the network", f"must come after {words}")
        return op

    def check_resized(self, ops: list[Op]) -> None:
        for op in ops:
            if isinstance(op, Resize) and not op.align_corners:
                raise self.refuse(op.name, "must leave the centers of corner pixels in place (align_corners)")

    def between(self, start: Any, end: Any) -> list[Any]:
        """Units, and what lies between them, from one value to another."""
        part = Matcher(replace(self.graph, input=start, output=end), self.source, self.size)
        return part.parse(part.graph.chain())

    def head(
        self, items: list[Any], before: Unit, eps: float | None
    ) -> tuple[dict[str, Any], dict[str, Tensor], str | None, Any, list[tuple[str, Any]]]:
        """Image pooling, a 1x1 branch, what joins them, and the classifier."""
        if items:
            raise self.refuse(items[0].name, f"is {words(items[0])}, and must be the last feature map")
        pooled, pointwise = (self.between(self.shared, end) for end in self.branches)
        rest = self.between(self.joined, self.logits)
        kinds = [[type(item) for item in part] for part in (pooled, pointwise, rest)]
        if kinds != [[Pool, Unit], [Unit], [Unit, Unit]] or pooled[0].kind != "avg":
            found = "; ".join(", ".join(map(words, part)) for part in (pooled, pointwise, rest))
            raise self.refuse(
                self.makers[self.joined].name, f"must join an average pooling and a 1x1 branch, got {found}"
            )
        if pooled[0].window not in (None, (self.size_of_map,) * 2):
            raise self.refuse(
                pooled[0].name, f"pools over {pooled[0].window}, and must over {self.size_of_map} pixels"
            )
        config = MobileNetConfig(segmentation_head=HEAD)
        named = dict(zip(segmenter_units(config), (pooled[1], pointwise[0], rest[0]), strict=True))
        row, tensors = config.segmentation, {}
        for name, unit in named.items():
            if unit.activation != "relu" or unit.out_channels != row.channels:
                raise self.refuse(
                    unit.name,
                    f"must have {row.channels} channels and relu, got {unit.out_channels} and {unit.activation}",
                )
            if eps is not None and unit.norm is None:
                raise self.refuse(unit.name, "has no batch norm")
            tensors |= unit.tensors(f"segmentation_head.{name}", None if eps is None else row.norm_eps)
        classifier = rest[1]
        for unit in (*named.values(), classifier):
            if unit.conv.weight.shape[2:] != (1, 1) or unit.conv.groups != 1 or unit.conv.stride != (1, 1):
                raise self.refuse(unit.name, f"is {words(unit)}, and must be one of 1x1")
        if classifier.act is not None:
            raise self.refuse(classifier.name, f"has the activation {classifier.act}, and must be linear")
        weight, bias = classifier.folded()
        tensors |= {"segmentation_head.classifier.weight": weight, "segmentation_head.classifier.bias": bias}
        layers = [(f"segmentation_head.{name}", unit) for name, unit in (*named.items(), ("classifier", classifier))]
        layers += [("segmentation_head.pooled", pooled[0]), ("segmentation_head.joined", self.makers[self.joined])]
        fields = {"num_labels": classifier.out_channels}
        return fields, tensors, LABEL_MAP if self.ends_in_labels else None, self.logits, layers
