"""ONNX files: of PyTorch, the ONNX zoo, tf2onnx and transformers.js, in 32 and 16 bits and quantized in every way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobilenet.loading import onnx_session
from mobilenet.pickles import MAX_BYTES
from mobilenet.require import require

from .checkpoint import (
    ONNX_FILES,
    Checkpoint,
    NoOracleError,
    Options,
    Oracle,
    Origin,
    field_errors,
    first_line,
    read_json,
)
from .from_google import recorded_processor
from .graph import (
    BYTES,
    SAME,
    Act,
    Conv,
    Graph,
    Match,
    Norm,
    Op,
    Other,
    Pad,
    Pool,
    Reader,
    Reshape,
    Scale,
    affine,
    match,
    of_two,
    to_checkpoint,
)
from .labels import check
from .rename import ConversionError


_DOMAINS = ("", "ai.onnx", "com.microsoft")
_ALIASES = ("Identity", "Dropout", "Cast", "CastLike", "DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear")
_RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
_ACTIVATIONS = {
    **{"Relu": "relu", "HardSwish": "hardswish", "Sigmoid": "sigmoid", "QLinearSigmoid": "sigmoid"},
    **{name: name for name in ("Elu", "HardSigmoid", "LeakyRelu", "Mish", "PRelu", "Selu", "Softplus", "Tanh")},
}
_POOLS = {
    **{"GlobalAveragePool": "avg", "QLinearGlobalAveragePool": "avg", "AveragePool": "avg", "ReduceMean": "avg"},
    **{"GlobalMaxPool": "max", "MaxPool": "max", "ReduceMax": "max", "QLinearReduceMean": "avg"},
}
_ARITHMETIC = {"Add": "ADD", "Sub": "SUB", "Mul": "MUL", "Div": "DIV"}
_CONVS = ("Conv", "ConvInteger", "QLinearConv", "Gemm", "QGemm", "MatMul", "MatMulInteger", "QLinearMatMul")
# What computes constants from constants: forms of any size, and small numbers such as paddings.
_FORMS = ("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_SMALL = (
    *("Add", "Concat", "ConstantOfShape", "Div", "Gather", "Max", "Min", "Mod", "Mul", "Neg", "Shape", "Slice", "Sub"),
)
MAX_SMALL = 1 << 16  # elements
MAX_OPERATORS = 100_000  # with those of functions, which may call others many times


class File(Reader):
    """An ONNX file, of which `graph` is the network.

    Raises:
        ConversionError: The file is broken, or has more than one input or output.
        ImportError: onnx is not installed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.onnx = require("onnx", extra="onnx", purpose="an ONNX file")
        self.model = self.load()
        self.constants: dict[str, np.ndarray] = {}
        self.weight_scales: dict[str, Scale] = {}
        self.scales: dict[str, Scale] = {}
        self.layouts: dict[str, str] = {}
        self.flat: set[str] = set()  # values of shape (B, C)
        self.computed = 0  # bytes of the constants that are computed
        for tensor in self.model.graph.initializer:
            self.constants[tensor.name] = self.onnx.numpy_helper.to_array(tensor)
        kinds = {tensor.data_type for tensor in self.model.graph.initializer}
        self.is_half = bool(kinds & {self.onnx.TensorProto.FLOAT16, self.onnx.TensorProto.BFLOAT16})
        inputs = [value for value in self.model.graph.input if value.name not in self.constants]
        outputs = list(self.model.graph.output)
        if len(outputs) > 1:
            outputs = [value for value in outputs if value.name == "logits"] or outputs
        if len(inputs) != 1 or len(outputs) != 1:
            raise ConversionError(
                f"{path}: is no classifier, which has one input and one output: it has {len(inputs)} and "
                f"{len(self.model.graph.output)}."
            )
        self.input, self.output = inputs[0], outputs[0].name
        sizes = [d.dim_value for d in self.input.type.tensor_type.shape.dim]
        self.shapes: dict[str, list[int]] = {}  # of values, for one image
        if len(sizes) == 4 and all(sizes[1:]):
            self.shapes[self.input.name] = [1, *sizes[1:]]
        for node in self.model.graph.node:
            self.add(node)
        self.graph = self.read()

    def load(self) -> Any:
        """Parse the file, with tensors that lie in a file beside it."""
        onnx, path = self.onnx, self.path
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ConversionError(f"{path}: has more than {MAX_BYTES} bytes.")
            model = onnx.load(path, load_external_data=False)
            beside, size = set(), 0
            for tensor in model.graph.initializer:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    fields = {entry.key: entry.value for entry in tensor.external_data}
                    beside.add(fields["location"])
                    size += int(fields.get("length", 0))
            for name in beside:
                other = path.parent / name
                if Path(name).name != name or other.is_symlink() or not other.is_file():
                    raise ConversionError(f"{path}: needs {name!r}, which must be a file beside it.")
            if size > MAX_BYTES:
                raise ConversionError(f"{path}: its weights have more than {MAX_BYTES} bytes.")
            if beside:
                model = onnx.load(path)
            domains = {node.domain for node in model.graph.node} - set(_DOMAINS)
            if model.functions:
                if count_operators(model) > MAX_OPERATORS:
                    raise ConversionError(f"{path}: has more than {MAX_OPERATORS} operators.")
                model = onnx.inliner.inline_local_functions(model)
                domains = {node.domain for node in model.graph.node} - set(_DOMAINS)
        except ConversionError:
            raise
        except Exception as error:  # protobuf and onnx say for few causes what a broken file raises
            raise ConversionError(f"{path}: truncated or corrupt, or no ONNX file: {first_line(error)}") from error
        if domains:
            raise ConversionError(f"{path}: has operators of {', '.join(sorted(domains))}, which no runtime knows.")
        if not model.graph.node:
            raise ConversionError(f"{path}: truncated or corrupt, or no ONNX file: it holds no operators.")
        return model

    def keep_shape(self, op: Op) -> None:
        """Keep the shape of what an operation gives, where it is known: a graph may compute its padding from it."""
        shape = self.shapes.get(op.inputs[0]) if op.inputs else None
        if shape is None or isinstance(op, (Other, Pool, Reshape)) or op.output in self.flat:
            return
        batch, channels, *sides = shape
        if isinstance(op, Pad):
            sides = [side + sum(pads) for side, pads in zip(sides, op.pads, strict=True)]
        elif isinstance(op, Conv):
            channels = len(op.weight)
            pads = op.pads or ((0, 0), (0, 0))
            reach = [d * (k - 1) + 1 for k, d in zip(op.weight.shape[2:], op.dilation, strict=True)]
            sides = [
                -(-side // stride) if op.pads is SAME else (side + sum(pad) - far) // stride + 1
                for side, pad, far, stride in zip(sides, pads, reach, op.stride, strict=True)
            ]
        self.shapes[op.output] = [batch, channels, *sides]

    def read(self) -> Graph:
        """The network, once every operator is translated."""
        sizes = [d.dim_value or None for d in self.input.type.tensor_type.shape.dim]
        layout = self.layouts.get(self.input.name, "NCHW")
        by_axis = dict(zip(layout, sizes, strict=False))
        if len(sizes) != 4 or by_axis["H"] != by_axis["W"]:
            raise ConversionError(
                f"{self.path}: is no MobileNet that can be converted: the input must be square, of shape "
                f"(batch, channels, size, size), got {sizes}."
            )
        convs = [op for op in self.ops if isinstance(op, Conv)]
        # The range of a quantized output does what an activation did, which is then left out.
        floors = [s for op in convs if (s := self.scales.get(op.output)) and s.zero_point[0] == BYTES[s.dtype][0]]
        implied = "relu" if any(scale.bounds[1] > 6.1 for scale in floors) else "relu6"
        ops = [
            replace(op, implied=implied) if isinstance(op, Conv) and self.scales.get(op.output) in floors else op
            for op in self.ops
        ]
        return Graph(
            ops=ops,
            input=self.input.name,
            output=self.source(self.output),
            channels=convs[0].weight.shape[1] * convs[0].groups if convs else 0,
            size=by_axis["H"],
            padding="same" if any(conv.pads is SAME for conv in convs) else "symmetric",
            scales=self.scales,
        )

    def add(self, node: Any) -> None:
        """Translate an operator."""
        kind, names = node.op_type, list(node.input)
        fields = {entry.name: self.onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        if kind == "Constant":
            value = next(iter(fields.values()), 0)
            if isinstance(value, self.onnx.SparseTensorProto):
                raise ConversionError(f"{self.path}: {node.output[0]} must be a dense constant.")
            is_tensor = isinstance(value, self.onnx.TensorProto)
            self.constants[node.output[0]] = self.onnx.numpy_helper.to_array(value) if is_tensor else np.array(value)
            return
        if kind == "Shape" and self.source(names[0]) in self.shapes:
            self.constants[node.output[0]] = np.array(self.shapes[self.source(names[0])], np.int64)
            return
        if names and all(name in self.constants or not name for name in names):
            self.add_constant(node, kind, names)
            return
        data = tuple(self.source(name) for name in names if name and name not in self.constants)
        output = node.output[0]
        common = {"name": node.name or f"{kind} ({output})", "inputs": data[:1], "output": output}
        layout = self.layouts.get(names[0], "NCHW") if names else "NCHW"
        if data and data[0] in self.flat:
            self.flat.add(output)
        if node.domain not in _DOMAINS or not data:
            self.ops.append(Other(**{**common, "inputs": data}, what=f"the operator {kind}"))
        elif kind == "Transpose":
            order = list(fields.get("perm", ()))
            if order == [0, 3, 1, 2] and data == (self.input.name,):
                self.layouts[names[0]] = layout = "NHWC"
            self.layouts[output] = "".join(layout[axis] for axis in order)
            self.aliases[output] = names[0]
        elif kind in _ALIASES:
            self.add_alias(node, kind, names, layout)
        elif kind in _RESHAPES:
            self.flat.add(output)
            self.ops.append(Reshape(**common))
        elif layout != "NCHW" and not kind.startswith("Reduce"):
            self.ops.append(Other(**common, what=f"the operator {kind} on channels that come last"))
        elif kind in _CONVS:
            self.ops.append(self.conv(kind, fields, names, data, common))
        elif kind in _ARITHMETIC or kind in ("QLinearAdd", "QLinearMul"):
            self.ops.append(self.arithmetic(kind, names, data, common))
        elif kind == "BatchNormalization" and not fields.get("training_mode"):
            parts = dict(zip(("scale", "shift", "mean", "variance"), map(self.real, names[1:5]), strict=True))
            self.ops.append(Norm(**common, **parts, eps=float(fields.get("epsilon", 1e-5))))
        elif kind in _POOLS:
            self.ops.append(self.pool(kind, fields, names, layout, common))
        elif kind == "Pad":
            self.ops.append(self.pad(fields, names, common))
        else:
            function = self.activation(kind, fields, names)
            op = Act(**common, function=function) if function else Other(**common, what=f"the operator {kind}")
            self.ops.append(op if len(data) == 1 else Other(**{**common, "inputs": data}, what=f"the operator {kind}"))
        if self.ops and self.ops[-1].output == output:
            self.keep_shape(self.ops[-1])
        if kind.startswith("QLinear") and kind not in ("QLinearConv",) and len(names) > 4:
            self.record(output, names[-2:] if kind != "QLinearSigmoid" else names[3:5])

    def add_constant(self, node: Any, kind: str, names: list[str]) -> None:
        """Compute a constant from constants."""
        given = [self.constants[name] if name else np.zeros(0) for name in names]
        if kind == "DequantizeLinear":
            self.constants[node.output[0]] = self.dequantized(node, given)
            return
        small = sum(value.size for value in given) <= MAX_SMALL
        if kind == "ConstantOfShape":
            small = small and int(np.prod(given[0], dtype=np.float64)) <= MAX_SMALL
        elif small and kind in ("Add", "Div", "Gather", "Max", "Min", "Mod", "Mul", "Sub"):
            shapes = [value.shape for value in given]
            shape = sum(shapes, ()) if kind == "Gather" else np.broadcast_shapes(*shapes)
            small = int(np.prod(shape, dtype=np.float64)) <= MAX_SMALL
        if kind in _FORMS or (kind in _SMALL and small):
            from onnx.reference import ReferenceEvaluator

            feeds = {name: value for name, value in zip(names, given, strict=True) if name}
            self.constants[node.output[0]] = result = np.asarray(ReferenceEvaluator(node).run(None, feeds)[0])
            self.computed += result.nbytes
            if self.computed > MAX_BYTES:
                raise ConversionError(f"{self.path}: its constants have more than {MAX_BYTES} bytes.")
            for name in names[:1]:
                if kind in ("Identity", "Transpose") and name in self.weight_scales:
                    self.weight_scales[node.output[0]] = self.weight_scales[name]
        else:
            self.ops.append(
                Other(
                    name=node.name or kind, inputs=(), output=node.output[0], what=f"the operator {kind} on constants"
                )
            )

    def dequantized(self, node: Any, given: list[np.ndarray]) -> np.ndarray:
        """A constant of 8 or 32 bits as real numbers."""
        kind, zero_point = given[0].dtype.name, given[2] if len(given) > 2 and given[2].size else 0
        scale = Scale.of(kind, given[1], zero_point)
        if kind in BYTES:
            self.weight_scales[node.output[0]] = scale
        axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
        return scale.real(given[0], axis if len(scale.scale) > 1 else 0)

    def add_alias(self, node: Any, kind: str, names: list[str], layout: str) -> None:
        """Let a value be another's name."""
        output = node.output[0]
        to = next((entry.i for entry in node.attribute if entry.name == "to"), None)
        real = (self.onnx.TensorProto.FLOAT, self.onnx.TensorProto.FLOAT16, self.onnx.TensorProto.DOUBLE)
        if kind == "Cast" and to not in (*real, None):
            self.ops.append(
                Other(
                    name=node.name or kind, inputs=(self.source(names[0]),), output=output, what="a cast to integers"
                )
            )
            return
        self.aliases[output], self.layouts[output] = names[0], layout
        if kind == "QuantizeLinear":
            self.record(names[0], names[1:3])
        elif kind == "DynamicQuantizeLinear":
            # Bytes stand for the numbers that came, so the scale that they would be multiplied by again is 1.
            _, scale, zero_point = node.output
            self.constants[scale], self.constants[zero_point] = np.float32(1).reshape(()), np.uint8(0).reshape(())

    def record(self, value: str, names: list[str]) -> None:
        """Keep how an activation is quantized."""
        scale, zero_point = (self.constants.get(name) for name in (*names, "")[:2])
        if scale is not None and scale.size == 1:
            kind = "uint8" if zero_point is None else zero_point.dtype.name
            if kind in BYTES:
                zero_point = 0 if zero_point is None else zero_point
                self.scales.setdefault(self.source(value), Scale.of(kind, scale, zero_point))

    def real(self, name: str) -> Tensor:
        """A constant as real numbers."""
        if name not in self.constants:
            raise ValueError(f"{name} must be a constant")
        return torch.from_numpy(np.array(self.constants[name], np.float32))

    def conv(self, kind: str, fields: Mapping[str, Any], names: list[str], data: tuple[str, ...], common: dict) -> Op:
        """Translate a convolution, or a product with a matrix."""
        is_linear = kind.startswith("QLinear") or kind == "QGemm"
        at = 3 if is_linear else 1
        if len(data) != 1 or names[at] not in self.constants or ("Mat" in kind and data[0] not in self.flat):
            return Other(**{**common, "inputs": data}, what=f"the operator {kind} of two values")
        if is_linear or kind.endswith("Integer"):
            weight, scale = self.quantized(kind, names, at)
        else:
            weight, scale = self.real(names[at]), self.weight_scales.get(names[at])
        bias = self.bias(kind, names)
        if "Conv" not in kind:
            alpha, beta = float(fields.get("alpha", 1)), float(fields.get("beta", 1))
            weight = alpha * (weight if fields.get("transB") else weight.T)
            if fields.get("transA"):
                return Other(**common, what=f"the operator {kind} of a transposed value")
            self.flat.add(common["output"])
            bias = None if bias is None else beta * bias.expand(len(weight))
            op: Op = Conv(**common, weight=weight[:, :, None, None].contiguous(), bias=bias, scale=scale)
        else:
            padding = fields.get("auto_pad", b"NOTSET").decode()
            top, left, bottom, right = fields.get("pads", (0, 0, 0, 0))
            if padding == "SAME_LOWER":
                return Other(**common, what="a convolution that pads more at the start than at the end")
            op = Conv(
                **common,
                weight=weight,
                bias=bias,
                stride=tuple(fields.get("strides", (1, 1))),
                dilation=tuple(fields.get("dilations", (1, 1))),
                pads=SAME if padding == "SAME_UPPER" else ((top, bottom), (left, right)),
                groups=fields.get("group", 1),
                scale=scale,
            )
        if kind in ("QLinearConv", "QLinearMatMul"):
            self.record(common["output"], names[6:8])
        if kind == "QGemm" and len(names) > 8:
            self.record(common["output"], names[7:9])
        return op

    def quantized(self, kind: str, names: list[str], at: int) -> tuple[Tensor, Scale | None]:
        """A weight of integers, as real numbers; of an operator on integers, before it is scaled."""
        given = self.constants[names[at]]
        if kind.endswith("Integer"):
            zero = self.constants[names[3]] if len(names) > 3 and names[3] else np.zeros(())
            scale = np.ones(())
        else:
            scale, zero = self.constants[names[at + 1]], self.constants[names[at + 2]]
        # One for each output channel, which comes first in a convolution and last in a matrix.
        kept = Scale.of(given.dtype.name, np.broadcast_to(scale, np.broadcast_shapes(scale.shape, zero.shape)), zero)
        return torch.from_numpy(
            kept.real(given, 0 if "Conv" in kind or len(kept.scale) == 1 else given.ndim - 1)
        ), kept

    def bias(self, kind: str, names: list[str]) -> Tensor | None:
        """The bias of a convolution or of a fully connected layer."""
        at = {"QLinearConv": 8, "QGemm": 6}.get(kind, 2)
        if kind.endswith("Integer") or "MatMul" in kind or len(names) <= at or not names[at]:
            return None
        bias = self.real(names[at])
        if kind in ("QLinearConv", "QGemm"):
            bias = bias.double() * self.real(names[1]).double() * self.real(names[4]).double()
        return bias.float().reshape(-1)

    def arithmetic(self, kind: str, names: list[str], data: tuple[str, ...], common: dict[str, Any]) -> Op:
        """Translate arithmetic: of two values, or of one and a constant."""
        common = {**common, "inputs": data}
        if len(data) == 2:
            return of_two({"QLinearAdd": "ADD", "QLinearMul": "MUL"}.get(kind) or _ARITHMETIC[kind], common)
        if kind not in _ARITHMETIC or len(data) != 1:
            return Other(**common, what=f"the operator {kind}")
        value = torch.from_numpy(np.array(next(self.constants[n] for n in names if n in self.constants), np.float64))
        if value.numel() == 1:
            value = value.reshape(())
        elif data[0] not in self.flat:  # channels are the third axis from the end
            if value.ndim < 3 or value.shape[-2:] != (1, 1):
                return Other(**common, what=f"the operator {kind} with a constant of shape {list(value.shape)}")
            value = value[..., 0, 0]
        return affine(_ARITHMETIC[kind], value, names[0] in self.constants, common)

    def pool(self, kind: str, fields: Mapping[str, Any], names: list[str], layout: str, common: dict[str, Any]) -> Op:
        """Translate a pooling over the whole image, or over a window that must turn out to be it."""
        if "Reduce" in kind:
            axes = fields.get("axes")
            if axes is None and len(names) > 1 and names[1] in self.constants:
                axes = self.constants[names[1]].reshape(-1).tolist()
            if {layout[axis] for axis in axes or ()} != {"H", "W"}:
                return Other(**common, what=f"the operator {kind} over other axes than rows and columns")
            if not fields.get("keepdims", 1):
                self.flat.add(common["output"])
        if "Global" in kind or "Reduce" in kind:
            return Pool(**common, kind=_POOLS[kind])
        window = tuple(fields["kernel_shape"])
        if any(fields.get("pads", ())) or fields.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            return Other(**common, what=f"the operator {kind} with padding")
        return Pool(**common, kind=_POOLS[kind], window=window)

    def pad(self, fields: Mapping[str, Any], names: list[str], common: dict[str, Any]) -> Op:
        """Translate padding with zeros."""
        pads = fields.get("pads")
        if pads is None and len(names) > 1 and names[1] in self.constants:
            pads = self.constants[names[1]].reshape(-1).tolist()
        value = fields.get("value", 0)
        if len(names) > 2 and names[2]:
            value = self.constants[names[2]].any() if names[2] in self.constants else True
        mode = fields.get("mode", b"constant")
        if pads is None or len(pads) != 8 or value or mode != b"constant" or any(pads[i] for i in (0, 1, 4, 5)):
            return Other(**common, what="a padding with other than zeros around the image")
        return Pad(**common, pads=((int(pads[2]), int(pads[6])), (int(pads[3]), int(pads[7]))))

    def activation(self, kind: str, fields: Mapping[str, Any], names: list[str]) -> str | None:
        """Our name for an activation; None for another operator."""
        if kind == "Clip":
            bounds = [fields.get(name) for name in ("min", "max")]
            for index, name in enumerate(names[1:3]):
                if name:
                    bounds[index] = float(self.constants[name]) if name in self.constants else "a value"
            return {(0, 6): "relu6", (0, None): "relu"}.get(tuple(bounds), f"Clip from {bounds[0]} to {bounds[1]}")
        if kind == "HardSigmoid" and np.allclose([fields.get("alpha", 0.2), fields.get("beta", 0.5)], [1 / 6, 0.5]):
            return "hardsigmoid"
        if kind == "Gelu":
            return "gelu" if fields.get("approximate", b"none") == b"none" else "approximate gelu"
        if kind in ("Softmax", "LogSoftmax", "QLinearSoftmax"):
            name = "log_softmax" if kind == "LogSoftmax" else "softmax"
            return name if fields.get("axis", -1) in (-1, 1) else f"{name} over positions"
        return _ACTIVATIONS.get(kind)


def count_operators(model: Any) -> int:
    """How many operators a model has once each function is written out where it is called."""
    functions = {(each.domain, each.name, each.overload): each for each in model.functions}
    known: dict[tuple[str, str, str], int] = {}

    def count(nodes: Sequence[Any]) -> int:
        total = 0
        for node in nodes:
            key = node.domain, node.op_type, node.overload
            if key in functions and key not in known:
                known[key] = count(functions[key].node)
            inner = (graph for entry in node.attribute for graph in (entry.g, *entry.graphs))
            total += known.get(key, 1) + sum(count(graph.node) for graph in inner)
        return total

    return count(model.graph.node)


def detect(origin: Origin) -> bool:
    """Whether a path is an ONNX file, or a folder that has its weights in one."""
    return origin.path.suffix == ".onnx" or (origin.path.is_dir() and _file(origin.path) is not None)


def _file(folder: Path) -> Path | None:
    if any((folder / name).exists() for name in ("model.safetensors", "pytorch_model.bin")):
        return None
    return next((folder / name for name in ONNX_FILES if (folder / name).is_file()), None)


def _neighbors(path: Path, name: str) -> Iterator[Path]:
    """Files of a repository that say more of an ONNX file in it."""
    folders = (path.parent, path.parent.parent) if path.parent.name == "onnx" else (path.parent,)
    return (folder / name for folder in folders if (folder / name).is_file())


def read(origin: Origin, options: Options) -> Checkpoint:
    """Read an ONNX file, with the configuration and the preprocessing of its repository if there are any.

    Raises:
        ConversionError: The file is broken, or holds another network.
        ImportError: onnx is not installed.
    """
    path = _file(origin.path) if origin.path.is_dir() else origin.path
    with field_errors(path):
        file = File(path)
        found = match(file.graph, str(path), options.size(None))
    count, kind = found.config["num_labels"], f"{'a quantized' if found.quantization else 'an'} ONNX file"
    checkpoint = to_checkpoint(kind, file, found, options, "torchvision", _runtime)
    for config in _neighbors(path, "config.json"):
        checkpoint.files.append(config)
        with field_errors(config):
            names = read_json(config).get("id2label")
            if isinstance(names, dict) and len(names) == count:
                checkpoint.labels = check([names[str(index)] for index in range(count)], count, config)
        break
    for recorded in _neighbors(path, "preprocessor_config.json"):
        if options == Options() and found.scaling is None:
            checkpoint.files.append(recorded)
            with field_errors(recorded):
                checkpoint.processor = recorded_processor(read_json(recorded), checkpoint.processor)
            checkpoint.warnings = []
        break
    return checkpoint


def cut(model: Any, names: Sequence[str]) -> Any:
    """What some of a model's values depend on, with these as its outputs: a runtime computes all that it is given.

    Args:
        model: An ONNX model, which stays as it is.
        names: The values.
    """
    makers = {output: node for node in model.graph.node for output in node.output}
    needed, stack = set(), list(names)
    while stack:
        value = stack.pop()
        if value and value not in needed:
            needed.add(value)
            stack += makers[value].input if value in makers else ()
    result = type(model)()
    result.CopyFrom(model)
    for field in ("node", "output", "sparse_initializer"):  # no constant that is used is sparse
        result.graph.ClearField(field)
    result.graph.node.extend(node for node in model.graph.node if needed.intersection(node.output))
    result.graph.output.extend(value for value in model.graph.output if value.name in names)
    for name in set(names) - {value.name for value in model.graph.output}:
        result.graph.output.add(name=name)
    return result


def _runtime(file: File, found: Match, image_size: int) -> Oracle:
    """The file itself in ONNX Runtime.

    Raises:
        NoOracleError: It takes images of another size, or the runtime refuses it.
    """
    if file.graph.size not in (None, image_size):
        raise NoOracleError(f"the ONNX file takes images of {file.graph.size} pixels, not of {image_size}")
    import onnxruntime

    given = file.input
    names = [found.logits, file.output] if found.prediction else [file.output]
    model = cut(file.model, names)
    if any(entry.HasField("g") or entry.graphs for node in model.graph.node for entry in node.attribute):
        raise NoOracleError("the ONNX file has operators that run others")
    try:
        session = onnx_session(model.SerializeToString(), torch.get_num_threads())
    except Exception as error:  # the runtime has errors of its own for each cause
        said = first_line(error)
        raise NoOracleError(f"ONNX Runtime {onnxruntime.__version__} does not run the file: {said}") from error
    kind = file.onnx.helper.tensor_dtype_to_np_dtype(given.type.tensor_type.elem_type)
    last = file.layouts.get(given.name, "NCHW") == "NHWC"

    def run(name: str, pixel_values: Tensor) -> Tensor:
        rows = []
        for image in (pixel_values.permute(0, 2, 3, 1) if last else pixel_values).contiguous().numpy():
            try:
                (values,) = session.run([name], {given.name: image[None].astype(kind)})
            except Exception as error:  # of a class of its own
                raise ConversionError(f"{file.path}: ONNX Runtime does not run it: {first_line(error)}") from error
            values = np.asarray(values, np.float32)
            if values.ndim == 4 and values.shape[-2:] != (1, 1) and not found.config["num_labels"]:
                values = values.max((2, 3)) if found.config.get("pooling") == "max" else values.mean((2, 3))
            rows.append(values.reshape(-1))
        return torch.from_numpy(np.stack(rows))

    return Oracle(
        "the file in ONNX Runtime",
        onnxruntime.__version__,
        lambda x: run(names[0], x),
        (lambda x: run(names[1], x)) if found.prediction else None,
        file.is_half,
    )
