"""TFLite files, float and quantized: batch norm is folded into the convolutions, and weights may be of 8 bits."""

from __future__ import annotations

import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobilenet.pickles import MAX_BYTES
from mobilenet.require import require
from mobilenet.tasks import SEGMENTATION

from .checkpoint import (
    Checkpoint,
    DetectionOracle,
    DetectionResults,
    NoOracleError,
    Options,
    Oracle,
    Origin,
    field_errors,
    first_line,
)
from .detectors import DetectorMatch, Outputs, match_detector
from .graph import (
    BYTES,
    NOTE,
    SAME,
    Act,
    ArgMax,
    Concat,
    Conv,
    Graph,
    Join,
    Match,
    Op,
    Other,
    Pad,
    Pool,
    Reader,
    Reshape,
    Resize,
    Scale,
    affine,
    match,
    of_two,
    to_checkpoint,
)
from .labels import beside
from .rename import ConversionError, task_of
from .segmenters import is_segmenter, match_segmenter


# Operators that change neither values nor form, as far as real numbers go.
_ALIASES = ("QUANTIZE", "DEQUANTIZE", "CAST", "TRANSPOSE")
_RESHAPES = ("RESHAPE", "SQUEEZE", "EXPAND_DIMS")
_ACTIVATIONS = {"LOGISTIC": "sigmoid", "HARD_SWISH": "hardswish"} | {
    name: name.lower()
    for name in ("RELU", "RELU6", "RELU_N1_TO_1", "RELU_0_TO_1", "TANH", "ELU", "LEAKY_RELU", "LOG_SOFTMAX", "PRELU")
}
_POOLS = {"AVERAGE_POOL_2D": "avg", "MAX_POOL_2D": "max", "MEAN": "avg", "REDUCE_MAX": "max"}
_FUSED = {0: None, 1: "relu", 2: "relu_n1_to_1", 3: "relu6", 4: "tanh", 5: "sign_bit"}
_CONSTANTS = ("float32", "float16", "int32", "int64", *BYTES)
_SAME = 0  # schema.Padding
_MAX_LABELS = 1 << 20  # bytes
# What computes the forms that RESHAPE takes, and how many numbers one may have.
_FORMS = ("SHAPE", "STRIDED_SLICE", "SLICE", "GATHER", "REDUCE_PROD", "PACK", "CONCATENATION", "CAST")
_MAX_FORM = 64
# The operator that ends a detector: it makes boxes of what is predicted for each anchor, and suppresses some.
POST_PROCESS = b"TFLite_Detection_PostProcess"
_MAX_ROWS = 65536  # that it writes
_MAX_OPTIONS = 64


def _post_process(model: Any) -> Any | None:
    """The operator of a model that ends a detector."""
    operators = model.subgraphs[0].operators
    last = operators[-1] if operators else None
    return last if last is not None and model.operatorCodes[last.opcodeIndex].customCode == POST_PROCESS else None


class File(Reader):
    """A TFLite file, of which `graph` is the network.

    Raises:
        ConversionError: The file is broken.
        ImportError: ai-edge-litert is not installed.
    """

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(path)
        require("ai_edge_litert", extra="tflite", purpose="a TFLite file")
        from ai_edge_litert import schema_py_generated as schema
        from ai_edge_litert.interpreter import Interpreter

        self.data = data
        try:
            self.check_custom(schema)
            Interpreter(model_content=data)  # checks every offset, which the schema's classes do not
            model = schema.ModelT.InitFromPackedBuf(data, 0)
        except ConversionError:
            raise
        except Exception as error:
            said = first_line(error)
            # The runtime reads a file whole before it looks for kernels of its operators.
            lacks = "Didn't find op" in said or "custom op" in said
            what = "is intact, but LiteRT does not run it" if lacks else "truncated or corrupt, or no TFLite file"
            raise ConversionError(f"{path}: {what}: {said}") from error
        if len(model.subgraphs) != 1:
            raise ConversionError(f"{path}: must hold one graph, got {len(model.subgraphs)}.")
        graph = model.subgraphs[0]
        self.post_process = _post_process(model)
        if len(graph.inputs) != 1 or (len(graph.outputs) != 1 and self.post_process is None):
            counts = f"{len(graph.inputs)} and {len(graph.outputs)}"
            raise ConversionError(
                f"{path}: must have one input and one output, or end in {POST_PROCESS.decode()}, got {counts}."
            )
        self.model, self.values, self.buffers = model, graph.tensors, model.buffers
        self.types = {n: name.lower() for name, n in vars(schema.TensorType).items() if isinstance(n, int)}
        self.input, self.output = int(graph.inputs[0]), int(graph.outputs[0])
        self.outputs = [self.output]
        if self.post_process is not None:
            self.outputs = [int(number) for number in self.post_process.inputs[:2]]
            self.output = self.outputs[0]
        last = model.operatorCodes[graph.operators[-1].opcodeIndex] if graph.operators else None
        is_label = last and max(last.builtinCode, last.deprecatedBuiltinCode) == schema.BuiltinOperator.ARG_MAX
        for number, others in ((self.input, ()), (self.output, ("int32", "int64") if is_label else ())):
            if self.type(number) not in ("float32", *BYTES, *others):
                raise ConversionError(
                    f"{path}: input and output must be float32, uint8 or int8, got {self.type(number)}."
                )
        self.layouts: dict[int, str] = {}
        self.forms: dict[int, int] = {}  # values that only RESHAPE takes, and how many numbers they have at most
        self.made: dict[int, str] = {}  # what makes a value
        operators = {n: name for name, n in vars(schema.BuiltinOperator).items() if isinstance(n, int)}
        for index, operator in enumerate(graph.operators):
            if operator is self.post_process:
                continue
            code = model.operatorCodes[operator.opcodeIndex]
            kind = operators[max(code.builtinCode, code.deprecatedBuiltinCode)]
            self.add(f"{kind} {index}", kind, operator.builtinOptions, [int(n) for n in operator.inputs], operator)
        self.graph = self.read()

    def check_custom(self, schema: Any) -> None:
        """Raise ConversionError for operators that are not built in, but for one whose options are in order.

        LiteRT reads such options as soon as it has the file, and trusts the offsets in them.
        """
        model = schema.Model.GetRootAs(self.data, 0)
        if model.SubgraphsLength() != 1:
            raise ConversionError(f"{self.path}: must hold one graph, got {model.SubgraphsLength()}.")
        graph = model.Subgraphs(0)
        for operator in map(graph.Operators, range(graph.OperatorsLength())):
            code = model.OperatorCodes(operator.OpcodeIndex()).CustomCode()
            if code and code != POST_PROCESS:
                name = code.decode(errors="replace")
                raise ConversionError(f"{self.path}: holds the operator {name}, which no MobileNet has.")
            if code:
                with field_errors(self.path):
                    read_numbers(bytes(operator.CustomOptionsAsNumpy()))  # 0, where there are none

    def check_operators(self) -> None:
        """Raise ConversionError for operators of which the network has no use: LiteRT would run them all the same."""
        makers = {op.output: op for op in self.ops}
        used: set[Any] = set()
        stack = [self.source(number) for number in self.outputs]
        while stack:
            value = stack.pop()
            if value in makers and value not in used:
                used.add(value)
                stack += makers[value].inputs
            elif value not in makers and value != self.input:
                raise ConversionError(f"{self.path}: takes a value that is neither its input nor a dense constant.")
        unpacked = copies = 0
        for number, name in self.made.items():
            source = self.source(number)
            if self.is_constant(source):
                unpacked += 4 * math.prod(self.shape(source))
            elif source in used or source == self.input:
                copies += source != number
            elif self.forms.get(source, math.inf) > _MAX_FORM:
                raise ConversionError(
                    f"{self.path}: is no MobileNet that can be converted: {name} makes what the network does not use."
                )
        if unpacked > MAX_BYTES:
            raise ConversionError(f"{self.path}: unpacks to more than {MAX_BYTES} bytes.")
        if copies > len(used):
            raise ConversionError(f"{self.path}: has {copies} operators that change no number, of {len(self.made)}.")

    def read(self) -> Graph:
        """The network."""
        shape, layout = self.shape(self.input), self.layouts.get(self.input, "NHWC")
        sizes = dict(zip(layout, shape, strict=len(shape) == 4)) if len(shape) == 4 else {}
        if not sizes or sizes["H"] != sizes["W"] or sizes["H"] > 65536:
            raise ConversionError(
                f"{self.path}: is no MobileNet that can be converted: the input must be square, of shape "
                f"(1, size, size, channels), with a size of at most 65536, got {shape}."
            )
        return Graph(
            ops=self.ops,
            input=self.input,
            output=self.source(self.output),
            channels=sizes["C"],
            size=sizes["H"],
            scales={n: scale for n in range(len(self.values)) if (scale := self.scale(n)) and self.type(n) in BYTES},
        )

    def add(self, name: str, kind: str, options: Any, inputs: list[int], operator: Any) -> None:
        """Translate an operator."""
        output = int(operator.outputs[0])
        label = self.values[output].name
        name = f"{name} ({label.decode(errors='replace')})" if label else name
        if output == self.input or output in self.made or self.is_constant(output):
            raise ConversionError(f"{self.path}: {name} overwrites a value.")
        self.made[output] = name
        counts = [self.count(number) for number in inputs if number >= 0]
        if kind == "SHAPE":
            self.forms[output] = 8
        elif kind in _FORMS and None not in counts:
            self.forms[output] = math.prod(counts) if kind == "GATHER" else sum(counts)
        first = inputs[0]
        constants = [number for number in inputs if number >= 0 and self.is_constant(number)]
        data = tuple(self.source(number) for number in inputs if number >= 0 and number not in constants)
        common = {"name": name, "inputs": data[:1], "output": output}
        if not data:
            if kind in _ALIASES:
                self.aliases[output] = first
            return
        layout = self.layouts.get(first, "NHWC")
        if kind in _ALIASES and (kind != "CAST" or self.type(output) == "float32"):
            if kind == "TRANSPOSE":
                order = self.constant(inputs[1]).tolist()
                if order == [0, 2, 3, 1] and data == (self.input,):
                    self.layouts[first] = layout = "NCHW"
                layout = "".join(layout[axis] for axis in order)
            self.aliases[output], self.layouts[output] = first, layout
        elif kind in _RESHAPES:
            self.ops.append(Reshape(**common))
        elif layout != "NHWC" and kind not in _POOLS:
            self.ops.append(Other(**common, what=f"{kind} of channels that come first"))
        elif kind in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED") and len(data) == 1:
            self.add_conv(kind, options, inputs, common)
        elif kind in ("PAD", "PADV2") and not (kind == "PADV2" and self.real(inputs[2]).any()):
            pads = self.constant(inputs[1]).tolist()
            outside = len(pads) != 4 or any(pads[0]) or any(pads[3])
            op = Other(**common, what=f"padding of {pads}") if outside else Pad(**common, pads=_pads(pads[1:3]))
            self.ops.append(op)
        elif kind in ("ADD", "SUB", "MUL", "DIV"):
            self.add_arithmetic(kind, options, inputs, data, common)
        elif kind in _POOLS:
            self.add_pool(kind, options, inputs, layout, common)
        elif kind in _ACTIVATIONS:
            self.ops.append(Act(**common, function=_ACTIVATIONS[kind]))
        elif kind == "SOFTMAX":
            self.ops.append(Act(**common, function="softmax" if options.beta == 1 else f"softmax of {options.beta}"))
        elif kind == "GELU":
            self.ops.append(Act(**common, function="approximate gelu" if options.approximate else "gelu"))
        elif kind == "RESIZE_BILINEAR":
            size = self.constant(inputs[1]).reshape(-1).tolist()
            if max(size, default=0) > max(self.shape(self.input), default=0):
                raise ConversionError(f"{self.path}: {name} resizes to {size}, which is more than the image has.")
            self.ops.append(Resize(**common, align_corners=options.alignCorners and not options.halfPixelCenters))
        elif kind == "CONCATENATION" and options.axis in (3, -1) and not constants:
            self.ops.append(Concat(**(common | {"inputs": data})))
        elif kind == "CONCATENATION" and options.axis in (1, -2) and not constants:
            self.ops.append(Join(**(common | {"inputs": data})))
        elif kind == "ARG_MAX" and self.constant(inputs[1]).reshape(-1).tolist() in ([3], [-1]):
            self.ops.append(ArgMax(**common))
        else:
            self.ops.append(Other(**(common | {"inputs": data}), what=f"the operator {kind}"))

    def add_conv(self, kind: str, options: Any, inputs: list[int], common: dict[str, Any]) -> None:
        """Translate a convolution or a fully connected layer."""
        weight, groups = self.real(inputs[1]), 1
        if weight.ndim == 2:
            weight = weight[:, :, None, None]
        elif weight.ndim != 4:
            name = common["name"]
            raise ConversionError(f"{self.path}: {name} must have weights of 4 axes, got {list(weight.shape)}.")
        elif kind == "DEPTHWISE_CONV_2D":
            weight = weight.permute(3, 0, 1, 2)
            # Files of 2019 and before may leave the shapes of activations to the runtime.
            groups = (self.shape(inputs[0]) or [len(weight) // max(options.depthMultiplier, 1)])[-1]
        else:
            weight = weight.permute(0, 3, 1, 2)
        bias = self.real(inputs[2]) if len(inputs) > 2 and inputs[2] >= 0 else None
        fields: dict[str, Any] = {}
        if kind != "FULLY_CONNECTED":
            fields = {
                "stride": (options.strideH, options.strideW),
                "dilation": (options.dilationHFactor, options.dilationWFactor),
                "pads": SAME if options.padding == _SAME else ((0, 0), (0, 0)),
            }
        self.activated(
            Conv(
                **common,
                **fields,
                weight=weight.contiguous(),
                bias=bias,
                groups=groups,
                implied=self.implied(common["output"]),
                scale=self.scale(self.source(inputs[1])),
            ),
            options,
        )

    def add_arithmetic(
        self, kind: str, options: Any, inputs: list[int], data: tuple[int, ...], common: dict[str, Any]
    ) -> None:
        """Translate arithmetic: a sum of two values, or of a value and a constant, and so on."""
        common |= {"inputs": data}
        if len(data) == 2:
            op: Op = of_two(kind, common)
        else:
            value = self.real(next(number for number in inputs if self.is_constant(number)))
            op = affine(kind, value, self.is_constant(inputs[0]), common)
        self.activated(op, options)

    def activated(self, op: Op, options: Any) -> None:
        """Add an operation and the activation that is fused with it."""
        fused = _FUSED.get(options.fusedActivationFunction, "unknown")
        if fused:
            linear = replace(op, output=("linear", op.output))
            self.ops += [linear, Act(name=op.name, inputs=(linear.output,), output=op.output, function=fused)]
        else:
            self.ops.append(op)

    def add_pool(self, kind: str, options: Any, inputs: list[int], layout: str, common: dict[str, Any]) -> None:
        """Translate a pooling over the whole image; or over windows of which there is one."""
        if kind in ("MEAN", "REDUCE_MAX"):
            axes = {layout[axis] for axis in self.constant(inputs[1]).reshape(-1).tolist()}
            window, whole = None, axes == {"H", "W"}
        else:
            window = options.filterHeight, options.filterWidth
            shape = self.shape(common["output"])
            # Without a shape, the window must turn out to be the whole image.
            whole = layout == "NHWC" and (shape[1:3] == [1, 1] if shape else options.padding != _SAME)
        op = (
            Pool(**common, kind=_POOLS[kind], window=window) if whole else Other(**common, what="no pooling of it all")
        )
        self.ops.append(op)

    def shape(self, number: int) -> list[int]:
        """The shape of a tensor."""
        shape = self.values[number].shape
        return [] if shape is None else [int(size) for size in shape]

    def type(self, number: int) -> str:
        """The type of a tensor, such as "float32"."""
        return self.types[self.values[number].type]

    def is_constant(self, number: int) -> bool:
        """Whether a file holds the values of a tensor."""
        source = self.source(number)
        return (
            isinstance(source, int)
            and source != self.input
            and self.buffers[self.values[source].buffer].data is not None
        )

    def count(self, number: int) -> int | None:
        """How many numbers a constant or a form has at most; None of another value."""
        return math.prod(self.shape(number)) if self.is_constant(number) else self.forms.get(number)

    def constant(self, number: int) -> np.ndarray:
        """The values of a constant as they are stored."""
        value = self.values[self.source(number)]
        data = self.buffers[value.buffer].data
        kind = self.types[value.type]
        if data is None or value.sparsity is not None or kind not in _CONSTANTS:
            raise ConversionError(f"{self.path}: {value.name.decode()} must be a dense constant of a common type.")
        return np.frombuffer(bytes(data), kind).reshape(self.shape(self.source(number)))

    def real(self, number: int) -> Tensor:
        """The values of a constant as real numbers."""
        number = self.source(number)
        values, scale = self.constant(number), self.scale(number)
        axis = self.values[number].quantization.quantizedDimension if scale and len(scale.scale) > 1 else 0
        return torch.from_numpy(scale.real(values, int(axis)) if scale else np.array(values, np.float32))

    def scale(self, number: int) -> Scale | None:
        """Scale and zero point of a quantized tensor, one or one for each channel."""
        given = self.values[number].quantization
        if given is None or given.scale is None or not len(given.scale):
            return None
        return Scale.of(self.type(number), given.scale, 0 if given.zeroPoint is None else given.zeroPoint)

    def implied(self, number: int) -> str | None:
        """The activation that a quantized convolution leaves to the range of its output."""
        scale = self.scale(number)
        if scale is None or scale.dtype not in BYTES or scale.zero_point[0] != BYTES[scale.dtype][0]:
            return None
        return "relu6" if scale.bounds[1] < 6.1 else None

    def normalization(self) -> tuple[list[float], list[float]] | None:
        """Mean and deviation, of values in 0 to 1, that the file records; None where it does not."""
        scale = self.scale(self.input)
        if scale is not None and scale.dtype in BYTES:
            low = BYTES[scale.dtype][0]
            return [(scale.zero_point[0] - low) / 255], [1 / (255 * scale.scale[0])]
        try:
            return self.metadata()
        except (struct.error, IndexError, TypeError, ValueError, OverflowError):
            return None

    def metadata(self) -> tuple[list[float], list[float]] | None:
        """What the file's metadata says of its input.

        Source: lite-support/metadata/metadata_schema.fbs: ModelMetadata, SubGraphMetadata, TensorMetadata,
        ProcessUnit and NormalizationOptions, whose fields are numbered as they stand there.
        """
        from flatbuffers import encode, number_types
        from flatbuffers.table import Table as Fields

        entry = next((e for e in self.model.metadata or [] if e.name == b"TFLITE_METADATA"), None)
        data = entry and self.buffers[entry.buffer].data
        if data is None:
            return None
        buffer = bytearray(bytes(data))

        def at(fields: Fields, index: int) -> int:
            offset = fields.Offset(4 + 2 * index)
            return offset + fields.Pos if offset else 0

        def child(fields: Fields, index: int) -> Fields | None:
            place = at(fields, index)
            return Fields(buffer, fields.Indirect(place)) if place else None

        def first(fields: Fields | None, index: int) -> list[Fields]:
            place = fields and at(fields, index)
            if not place:
                return []
            start = fields.Vector(place - fields.Pos)
            count = min(fields.VectorLen(place - fields.Pos), 64)
            return [Fields(buffer, fields.Indirect(start + 4 * i)) for i in range(count)]

        def floats(fields: Fields, index: int) -> list[float]:
            place = at(fields, index)
            if not place:
                return []
            start, count = fields.Vector(place - fields.Pos), min(fields.VectorLen(place - fields.Pos), 4)
            return [float(fields.Get(number_types.Float32Flags, start + 4 * i)) for i in range(count)]

        root = Fields(buffer, encode.Get(number_types.UOffsetTFlags.packer_type, buffer, 0))
        for graph in first(root, 3)[:1]:
            for tensor in first(graph, 2)[:1]:
                for unit in first(tensor, 4):
                    kind = at(unit, 0)
                    options = child(unit, 1)
                    if kind and unit.Get(number_types.Uint8Flags, kind) == 1 and options:
                        mean, std = floats(options, 0), floats(options, 1)
                        if mean and std and all(value > 0 for value in std):
                            return [value / 255 for value in mean], [value / 255 for value in std]
        return None


def _pads(pads: Sequence[Sequence[int]]) -> tuple[tuple[int, int], tuple[int, int]]:
    rows, columns = (tuple(map(int, pair)) for pair in pads)
    return rows, columns


def detect(origin: Origin) -> bool:
    """Whether a path is a file of TFLite."""
    return origin.path.suffix == ".tflite" or origin.starts_with(b"TFL3", at=4)


def read(origin: Origin, options: Options) -> Checkpoint:
    """Read a TFLite file.

    Raises:
        ConversionError: The file is broken, or holds another network.
        ImportError: ai-edge-litert is not installed.
    """
    with field_errors(origin.path):
        file = File(origin.path.read_bytes(), origin.path)
        if file.post_process is not None:
            return read_detector(file, options)
        if is_segmenter(file.graph):
            found = match_segmenter(file.graph, str(origin.path))
        else:
            found = match(file.graph, str(origin.path), file.graph.size)
        file.check_operators()
        recorded = file.normalization()
    kind = f"a {'quantized' if found.quantization else 'float'} TFLite file"
    labels = _labels(origin.path, found.config["num_labels"])
    recipe = "deeplab" if task_of(found.config) is SEGMENTATION else "google"
    return to_checkpoint(kind, file, found, options, recipe, interpreter, labels=labels, recorded=recorded)


def twin(data: bytes, path: Path, name: str, image_size: int) -> Oracle:
    """Run a TFLite file that comes with another checkpoint."""
    with field_errors(path):
        file = File(data, path)
        found = match(file.graph, str(path), file.graph.size)
        file.check_operators()
    return interpreter(file, found, image_size, name)


def read_detector(file: File, options: Options) -> Checkpoint:
    """Read a file that ends in the operator of detectors: its options and anchors are read too.

    Source: tensorflow/lite/kernels/detection_postprocess.cc

    Raises:
        ConversionError: It holds another network, or anchors of another kind.
    """
    operator, path = file.post_process, file.path
    said = read_numbers(bytes(operator.customOptions))

    def number(name: str) -> float:
        if name not in said:
            raise ConversionError(f"{path}: {name} of {POST_PROCESS.decode()} must be a number.")
        return said[name]

    rows = int(number("max_detections")), int(number("max_classes_per_detection"))
    if min(rows) < 1 or math.prod(rows) > _MAX_ROWS:
        raise ConversionError(
            f"{path}: max_detections and max_classes_per_detection must be above 0 and their product at most "
            f"{_MAX_ROWS}, got {rows[0]} and {rows[1]}."
        )
    codes, scores, anchors = (int(number) for number in operator.inputs)
    found = match_detector(
        file.graph,
        str(path),
        Outputs(
            codes=file.source(codes),
            scores=file.source(scores),
            anchors=file.real(anchors)[:, [1, 0, 3, 2]],
            step=max(scale.scale) if (scale := file.scale(anchors)) else 0.0,
            classes=int(number("num_classes")),
            box_scales=tuple(float(number(f"{axis}_scale")) for axis in "xywh"),
        ),
    )
    file.check_operators()
    suppression = {
        "score_threshold": max(0.0, float(number("nms_score_threshold"))),
        "nms_iou_threshold": float(number("nms_iou_threshold")),
        "max_detections": rows[0],
        "max_detections_per_class": int(said.get("detections_per_class", 100)),
        "clip_boxes": False,
    }
    if not said.get("use_regular_nms", False):
        suppression["max_classes_per_box"] = rows[1]
    recorded, size, count = file.normalization(), file.graph.size, found.config["num_labels"]
    values = dict(zip(("image_mean", "image_std"), recorded, strict=True)) if recorded and not options.recipe else {}
    labels, _ = beside(path, count)
    return Checkpoint(
        kind=f"a {'quantized' if found.quantization else 'float'} TFLite file",
        tensors=found.tensors,
        table=found.table,
        config=found.config | {"image_size": options.size(size)},
        processor=options.processor("ssd", size, **values, **suppression),
        files=[path],
        oracle=lambda: detection_interpreter(
            file, found, options.size(size), suppression.get("max_classes_per_box", 1)
        ),
        labels=_labels(path, count) or labels,
        license=None,
        quantization=found.quantization,
        notes=[NOTE] if found.quantization else [],
    )


def read_numbers(data: bytes) -> dict[str, float]:
    """The numbers of a FlexBuffers map by their keys, and no other values.

    Every place that leads to them must lie within: LiteRT does not look.

    Args:
        data: The map, as it is stored.

    Raises:
        ValueError: It is broken.

    Source: flatbuffers/flexbuffers.h
    """

    def get(place: int, width: int, kind: str = "BHIQ") -> Any:
        if not 0 <= place <= len(data) - width:
            raise ValueError("options must lie within their bytes")
        return struct.unpack_from(f"<{kind[width.bit_length() - 1]}", data, place)[0]

    width, kind = (*data[:-3:-1], 0, 0)[:2]
    if width not in (1, 2, 4, 8) or kind >> 2 != _MAP:
        raise ValueError("options must be a map")
    place = len(data) - 2 - width
    start, width = place - get(place, width), 1 << (kind & 3)
    count = get(start - width, width)
    keys, key_width = start - 3 * width - get(start - 3 * width, width), get(start - 2 * width, width)
    if count > _MAX_OPTIONS or key_width not in (1, 2, 4, 8) or get(keys - key_width, key_width) != count:
        raise ValueError(f"options must be at most {_MAX_OPTIONS}, each with its key")
    names, numbers = [], {}
    for index in range(count):
        place = keys + index * key_width
        place -= get(place, key_width)
        if (end := data.find(0, max(place, 0), max(place, 0) + _MAX_OPTIONS)) < 0 or place < 0:
            raise ValueError(f"keys of options must have fewer than {_MAX_OPTIONS} bytes")
        names.append(data[place:end])
        kind = get(start + count * width + index, 1)
        place, size = start + index * width, width
        if kind >> 2 in _INDIRECT:
            place, size = place - get(place, width), 1 << (kind & 3)
        form = _NUMBERS.get(kind >> 2, "    ")
        if form[size.bit_length() - 1] != " ":
            numbers[names[-1].decode(errors="replace")] = get(place, size, form)
        elif kind >> 2 and not names[-1].startswith(b"_"):  # null is nothing; converters add options of their own
            raise ValueError(f"{names[-1].decode(errors='replace')} must be a number")
    if names != sorted(set(names)):
        raise ValueError("options must be sorted by their keys")
    return numbers


# Types of FlexBuffers: how each is stored in 1, 2, 4 and 8 bytes; and which of them stand elsewhere than in the map.
_NUMBERS = {1: "bhiq", 6: "bhiq", 2: "BHIQ", 7: "BHIQ", 26: "BHIQ", 3: "  fd", 8: "  fd"}
_INDIRECT = (6, 7, 8)
_MAP = 9


def detection_interpreter(file: File, found: DetectorMatch, image_size: int, classes_per_box: int) -> DetectionOracle:
    """Run a TFLite file that ends in the operator of detectors on images of a size.

    Args:
        file: The file.
        found: The detector.
        image_size: Side of the images.
        classes_per_box: How many rows the operator writes for each box that it counts.

    Raises:
        NoOracleError: The file takes images of another size.
    """
    runtime, details, version = _runtime(file, image_size)
    operator = file.post_process
    given = details[file.input]
    codes, scores, anchors = (details[int(number)] for number in operator.inputs)
    boxes, classes, values, count = (details[int(number)] for number in operator.outputs)
    of_y, of_x, of_h, of_w = found.box_scales

    def get(tensor: dict[str, Any]) -> np.ndarray:
        return _real(runtime.get_tensor(tensor["index"]), tensor)

    def run(pixel_values: Tensor) -> DetectionResults:
        results = []
        cy, cx, ah, aw = get(anchors).T
        for image in pixel_values.permute(0, 2, 3, 1).numpy():
            _run(runtime, given, image, file.path)
            y, x, h, w = get(codes)[0].T
            all_boxes = np.stack(
                (x / of_x * aw + cx, y / of_y * ah + cy, np.exp(w / of_w) * aw, np.exp(h / of_h) * ah), -1
            )
            number = int(get(count)[0]) * classes_per_box
            edges = get(boxes)[0][:number][:, [1, 0, 3, 2]]
            results.append(
                (
                    torch.from_numpy(get(scores)[0][:, -found.config["num_labels"] :].copy()),
                    torch.from_numpy(all_boxes),
                    {
                        "scores": torch.from_numpy(get(values)[0][:number].copy()),
                        "labels": torch.from_numpy(get(classes)[0][:number].astype(np.int64)),
                        "boxes": torch.from_numpy(edges),
                    },
                )
            )
        all_scores, all_boxes, detections = zip(*results, strict=True)
        return DetectionResults(torch.stack(all_scores), torch.stack(all_boxes), list(detections))

    return DetectionOracle("LiteRT", version, run)


def _labels(path: Path, count: int) -> list[str] | None:
    """Labels that are attached to a file as an archive; None where there are none, or not as many as classes."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.filename.endswith(".txt") and member.file_size < _MAX_LABELS:
                    labels = archive.read(member).decode("utf-8").splitlines()
                    if len(labels) == count:
                        return labels
    # RuntimeError is of members that are encrypted, or packed in a way that Python does not know.
    except (EOFError, OSError, RuntimeError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error):
        pass
    return None


def interpreter(file: File, found: Match, image_size: int, name: str = "LiteRT") -> Oracle:
    """Run a TFLite file on images of a size.

    Raises:
        NoOracleError: The file takes images of another size.
    """
    runtime, details, version = _runtime(file, image_size)
    given = details[file.input]
    first = file.layouts.get(file.input, "NHWC") == "NCHW"
    segments = task_of(found.config) is SEGMENTATION

    def results(number: int, pixel_values: Tensor) -> Iterator[np.ndarray]:
        for image in (pixel_values if first else pixel_values.permute(0, 2, 3, 1)).numpy():
            _run(runtime, given, image, file.path)
            yield _real(runtime.get_tensor(details[number]["index"]), details[number])

    def run(number: int, pixel_values: Tensor) -> Tensor:
        rows = []
        for values in results(number, pixel_values):
            if values.ndim == 4 and not found.config["num_labels"]:  # features that the file does not pool
                values = values.max((1, 2)) if found.config.get("pooling") == "max" else values.mean((1, 2))
            rows.append(np.moveaxis(values[0], -1, 0) if segments else values.reshape(-1))
        return torch.from_numpy(np.stack(rows))

    def predictions(pixel_values: Tensor) -> Tensor:
        if not segments:
            return run(file.output, pixel_values)
        # Logits as large as the image, or the label of each pixel.
        maps = (v[0].argmax(-1) if v.ndim == 4 else v[0] for v in results(file.output, pixel_values))
        return torch.from_numpy(np.stack(list(maps))).long()

    return Oracle(
        name,
        version,
        lambda pixel_values: run(found.logits, pixel_values),
        predictions if found.prediction else None,
    )


def _runtime(file: File, image_size: int) -> tuple[Any, dict[int, dict[str, Any]], str]:
    """An interpreter that keeps every tensor, its tensors by their numbers, and its version."""
    if image_size != file.graph.size:
        raise NoOracleError(f"the TFLite file takes images of {file.graph.size} pixels, not of {image_size}")
    if (count := file.shape(file.input)[0]) != 1:
        raise NoOracleError(f"the TFLite file takes {count} images at a time")
    from importlib.metadata import version

    from ai_edge_litert.interpreter import Interpreter

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # keeping every tensor takes memory; the logits need it
            runtime = Interpreter(model_content=file.data, experimental_preserve_all_tensors=True)
        runtime.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise ConversionError(f"{file.path}: LiteRT does not run it: {first_line(error)}") from error
    return runtime, {tensor["index"]: tensor for tensor in runtime.get_tensor_details()}, version("ai-edge-litert")


def _run(runtime: Any, given: dict[str, Any], image: np.ndarray, path: Path) -> None:
    """Run a file on an image.

    Raises:
        ConversionError: The runtime fails.
    """
    try:
        runtime.set_tensor(given["index"], _quantized(image[None], given))
        runtime.invoke()
    except (RuntimeError, ValueError) as error:
        raise ConversionError(f"{path}: LiteRT does not run it: {first_line(error)}") from error


def _quantized(values: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    scale, zero_point = details["quantization"]
    if not scale:
        return values.astype(details["dtype"])
    limits = np.iinfo(details["dtype"])
    return np.clip(np.rint(values / scale + zero_point), limits.min, limits.max).astype(details["dtype"])


def _real(values: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    scale, zero_point = details["quantization"]
    return (values.astype(np.float32) - zero_point) * np.float32(scale) if scale else values.astype(np.float32)
