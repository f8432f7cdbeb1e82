"""TFLite files, float and quantized: batch norm is folded into the convolutions, and weights may be of 8 bits."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mobilenet.layers_mobilenet import same_padding

from .checkpoint import Checkpoint, NoOracleError, Options, Oracle, Origin, first_line, understanding
from .names import Convention, ConversionError, Part, Row, Table, measure, skeleton


TFLITE = Convention(
    conv={"weight": Part("/filter", "OHWI"), "bias": Part("/bias", "O")},
    depthwise={"weight": Part("/filter", "IHWO"), "bias": Part("/bias", "O")},
    norm={},
    linear={"weight": Part("/filter", "OHWI"), "bias": Part("/bias", "O")},
)

# Names of tensors are for the eye alone and differ from file to file: what tells a layer is its operator, counted in
# the order in which the operators run.
_FOLDED = {"use_batch_norm": False}
TABLES = (
    Table(
        {"architecture": "mobilenet_v1", **_FOLDED},
        {
            "stem": Row("CONV_2D_0"),
            "block.depthwise": Row("DEPTHWISE_CONV_2D_{index}"),
            "block.pointwise": Row("CONV_2D_{from_1}"),
            "classifier": Row("CONV_2D_14"),
        },
        TFLITE,
    ),
    Table(
        {"architecture": "mobilenet_v2", **_FOLDED},
        {
            "stem": Row("CONV_2D_0"),
            "first.project": Row("CONV_2D_1"),
            "block.expand": Row("CONV_2D_{even}"),
            "block.depthwise": Row("DEPTHWISE_CONV_2D_{index}"),
            "block.project": Row("CONV_2D_{odd}"),
            "head": Row("CONV_2D_34"),
            "classifier": Row("CONV_2D_35"),
        },
        TFLITE,
    ),
)


# Operators that change the form of values, and nothing else.
_NEUTRAL = ("QUANTIZE", "DEQUANTIZE", "RESHAPE", "SQUEEZE", "PAD")
# Operators that compute a form; where they compute anything else, a layer does not follow the one before it.
_IGNORED = ("SHAPE", "STRIDED_SLICE", "PACK")
_ACTIVATIONS = {0: None, 1: "relu", 3: "relu6"}
_BYTES = {"UINT8": (0, 255), "INT8": (-128, 127)}
_CONSTANTS = ("FLOAT32", "FLOAT16", "INT32", "INT64", *_BYTES)
_SAME = 0  # schema.Padding
_MAX_LABELS = 1 << 20  # bytes


class Step(NamedTuple):
    """An operator that a network must have, in the order of execution."""

    operators: tuple[str, ...]
    name: str  # our layer whose output it makes
    conv: nn.Conv2d | None = None
    activated: bool = False


def expected(model: nn.Module) -> list[Step]:
    """The operators of a network."""
    steps = []

    def add(name: str, unit: nn.Module) -> None:
        operator = "DEPTHWISE_CONV_2D" if name.endswith(".depthwise") else "CONV_2D"
        steps.append(Step((operator,), name, unit.conv, unit.conv.activated))

    add("backbone.stem", model.backbone.stem)
    for stage, blocks in enumerate(model.backbone.stages):
        for index, block in enumerate(blocks):
            name = f"backbone.stages.{stage}.{index}"
            for role, unit in block.named_children():
                if hasattr(unit, "conv"):  # the first block's expansion is an identity
                    add(f"{name}.{role}", unit)
            if getattr(block, "has_shortcut", False):
                steps.append(Step(("ADD",), name))
    if model.config.head_channels:
        add("backbone.head", model.backbone.head)
    return [
        *steps,
        Step(("AVERAGE_POOL_2D", "MEAN"), "backbone.pooler_output"),
        Step(("CONV_2D", "FULLY_CONNECTED"), "classifier"),
    ]


class Node(NamedTuple):
    """An operator of a file; tensors are numbers."""

    operator: str
    options: Any
    inputs: list[int]
    output: int


class Graph:
    """The operators and constants of a TFLite file.

    Raises:
        ConversionError: The file is broken.
        ImportError: ai-edge-litert is not installed.
    """

    def __init__(self, data: bytes, path: Path) -> None:
        try:
            from ai_edge_litert import schema_py_generated as schema
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise ImportError("a TFLite file needs ai-edge-litert: pip install 'mobilenet[tflite]'") from error
        self.path, self.data = path, data
        try:
            Interpreter(model_content=data)  # checks every offset, which the schema's classes do not
            model = schema.ModelT.InitFromPackedBuf(data, 0)
        except Exception as error:
            raise ConversionError(f"{path}: truncated or corrupt: {first_line(error)}") from error
        if len(model.subgraphs) != 1:
            raise ConversionError(f"{path}: must hold one graph, got {len(model.subgraphs)}.")
        operators = _names(schema.BuiltinOperator)
        self.types = _names(schema.TensorType)
        self.buffers = model.buffers
        graph = model.subgraphs[0]
        self.values = graph.tensors
        self.input, self.output = int(graph.inputs[0]), int(graph.outputs[0])
        self.neutral: dict[int, Node] = {}
        self.nodes: list[Node] = []
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            node = Node(
                operators[max(code.builtinCode, code.deprecatedBuiltinCode)],
                operator.builtinOptions,
                [int(number) for number in operator.inputs],
                int(operator.outputs[0]),
            )
            if node.operator in _NEUTRAL:
                self.neutral[node.output] = node
            elif node.operator not in _IGNORED:
                self.nodes.append(node)
        for number in (self.input, self.output):
            if self.type(number) not in ("FLOAT32", *_BYTES):
                raise ConversionError(
                    f"{path}: input and output must be float32, uint8 or int8, got {self.type(number)}."
                )

    def type(self, number: int) -> str:
        """The type of a tensor, such as "FLOAT32"."""
        return self.types[self.values[number].type]

    def source(self, number: int) -> int:
        """The tensor that a tensor is another form of."""
        for _ in self.neutral:  # no chain is longer, though it may be a ring
            if number not in self.neutral:
                break
            number = self.neutral[number].inputs[0]
        return number

    def padding(self, number: int) -> np.ndarray | None:
        """What an explicit PAD adds before and after each axis (NHWC) of the tensor that it makes, if one does."""
        for _ in self.neutral:
            if number not in self.neutral:
                break
            node = self.neutral[number]
            if node.operator == "PAD":
                return self.constant(node.inputs[1])
            number = node.inputs[0]
        return None

    def constant(self, number: int) -> np.ndarray:
        """The values of a constant as they are stored."""
        value = self.values[self.source(number)]
        data = self.buffers[value.buffer].data
        name = self.types[value.type]
        if data is None or value.sparsity is not None or name not in _CONSTANTS:
            raise ConversionError(f"{self.path}: {value.name.decode()} must be a dense constant of a common type.")
        return np.frombuffer(bytes(data), name.lower()).reshape(value.shape)

    def real(self, number: int) -> Tensor:
        """The values of a constant as real numbers."""
        values = self.constant(number).astype(np.float64)
        scale, zero_point, axis = self.scale(self.source(number))
        if scale is not None:
            form = [1] * values.ndim
            form[axis if scale.size > 1 else 0] = scale.size
            values = (values - zero_point.reshape(form)) * scale.reshape(form)
        return torch.from_numpy(values.astype(np.float32))

    def scale(self, number: int) -> tuple[np.ndarray | None, np.ndarray | None, int]:
        """Scale and zero point of a quantized tensor, one or one for each channel of an axis."""
        quantization = self.values[number].quantization
        if quantization is None or quantization.scale is None or not len(quantization.scale):
            return None, None, 0
        scale = np.asarray(quantization.scale, np.float64)
        zero_point = quantization.zeroPoint
        zero_point = np.zeros(scale.size) if zero_point is None else np.asarray(zero_point, np.float64)
        return scale, zero_point, int(quantization.quantizedDimension)

    def tensors(self) -> dict[str, Tensor]:
        """Weights by operator, such as "CONV_2D_0/filter"; a fully connected layer is a 1x1 convolution."""
        result: dict[str, Tensor] = {}
        counts = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 0}
        for node in self.nodes:
            operator = "CONV_2D" if node.operator == "FULLY_CONNECTED" else node.operator
            if operator in counts:
                filters = self.real(node.inputs[1])
                name = f"{operator}_{counts[operator]}"
                counts[operator] += 1
                result[f"{name}/filter"] = filters[:, None, None] if filters.ndim == 2 else filters
                has_bias = len(node.inputs) > 2 and node.inputs[2] >= 0
                result[f"{name}/bias"] = self.real(node.inputs[2]) if has_bias else torch.zeros(len(filters))
        return result

    def agreement(self, steps: list[Step]) -> int:
        """How many operators, from the first on, are those of a network."""
        same = [node.operator in step.operators for node, step in zip(self.nodes, steps, strict=False)]
        return same.index(False) if False in same else len(same)

    def check(self, steps: list[Step]) -> dict[str, Any]:
        """Compare operators, their order and their options with those of a network.

        Returns:
            The fields of the configuration that the options decide.

        Raises:
            ConversionError: The file holds another network; the message names the first operator that differs.
        """
        agreed = self.agreement(steps)
        rest = [node.operator for node in self.nodes[agreed:]]
        if agreed < len(steps):
            got = rest[0] if rest else "the end"
            raise self.another(f"operator {agreed} must be {' or '.join(steps[agreed].operators)}", got)
        if rest not in ([], ["SOFTMAX"]):
            raise self.another("only SOFTMAX may follow the classifier", ", ".join(rest))
        current = entry = self.input  # what a layer, and what its block, starts from
        block = ""
        paddings, activations = {"same", "symmetric"}, set()
        for node, step in zip(self.nodes, steps, strict=False):
            if block != (block := ".".join(step.name.split(".")[:4])):
                entry = current
            adds = node.operator == "ADD"
            data = {self.source(number) for number in node.inputs[: 1 + adds]}
            if data != ({current, entry} if adds else {current}):
                raise self.another(f"{step.name} must follow the layer before it", node.operator)
            current = node.output
            if step.conv is None:
                continue
            options = node.options
            if (options.strideH, options.strideW) != step.conv.stride:
                raise self.another(f"{step.name} must have stride {step.conv.stride[0]}", options.strideH)
            if (options.dilationHFactor, options.dilationWFactor) != (1, 1):
                raise self.another(f"{step.name} must have no dilation", options.dilationHFactor)
            if step.conv.kernel_size[0] > 1:
                paddings &= self.paddings(node)
            if step.activated:
                activations.add(self.activation(node))
            elif options.fusedActivationFunction:
                raise self.another(f"{step.name} must be linear", _ACTIVATIONS.get(options.fusedActivationFunction))
        if not paddings:
            raise self.another("layers must all pad as SAME does, or all by 1 on each side", "other paddings")
        if len(activations) != 1 or None in activations:
            raise self.another("activations must all be RELU, or all RELU6", ", ".join(map(str, activations)))
        return {"padding": "same" if "same" in paddings else "symmetric", "hidden_act": activations.pop()}

    def another(self, rule: str, got: Any) -> ConversionError:
        """The error for a network that is not ours."""
        return ConversionError(f"{self.path}: is no MobileNet V1 or V2 classifier: {rule}, got {got}.")

    def paddings(self, node: Node) -> set[str]:
        """What our configuration calls the padding of a 3x3 convolution; it may have both names."""
        sizes = self.values[self.source(node.inputs[0])].shape[1:3]
        totals = [same_padding(int(size), 3, node.options.strideH, 1) for size in sizes]
        same = [[total // 2, total - total // 2] for total in totals]
        explicit = self.padding(node.inputs[0])
        if node.options.padding == _SAME:
            given = same if explicit is None else None
        else:
            given = [[0, 0], [0, 0]] if explicit is None else explicit[1:3].tolist()
        return {name for name, pads in (("same", same), ("symmetric", [[1, 1], [1, 1]])) if pads == given}

    def activation(self, node: Node) -> str | None:
        """The activation that a convolution ends in; a quantized one may leave it to the range of its output."""
        fused = _ACTIVATIONS.get(node.options.fusedActivationFunction)
        if fused is None and self.type(node.output) in _BYTES:
            scale, zero_point, _ = self.scale(node.output)
            low, high = _BYTES[self.type(node.output)]
            return "relu6" if zero_point[0] == low and (high - low) * scale[0] < 6.1 else None
        return fused

    @property
    def logits(self) -> int:
        """The tensor that softmax sees, or the output where there is no softmax."""
        return self.nodes[-1].inputs[0] if self.nodes[-1].operator == "SOFTMAX" else self.output

    @property
    def is_quantized(self) -> bool:
        """Whether weights are of 8 bits."""
        convolutions = [node for node in self.nodes if node.operator in ("CONV_2D", "DEPTHWISE_CONV_2D")]
        return any(self.type(node.inputs[1]) in _BYTES for node in convolutions)

    @property
    def image_size(self) -> int:
        """Side of the pictures that the network takes."""
        shape = [int(size) for size in self.values[self.input].shape]
        if len(shape) != 4 or shape[1] != shape[2]:
            raise self.another("the input must be square, of shape (1, size, size, channels)", shape)
        return shape[1]

    def normalization(self) -> tuple[float, float] | None:
        """Mean and deviation, of values in 0 to 1, that make bytes real as the file does; None for a float input."""
        if self.type(self.input) not in _BYTES:
            return None
        scale, zero_point, _ = self.scale(self.input)
        low = _BYTES[self.type(self.input)][0]
        return float(zero_point[0] - low) / 255, 1 / (255 * float(scale[0]))

    def quantization(self, steps: list[Step]) -> dict[str, Any]:
        """How the file quantizes: activations by the layer whose output they are, weights by our names."""
        outputs = {"pixel_values": self.input}
        outputs |= {step.name: node.output for node, step in zip(self.nodes, steps, strict=False)}
        activations, weights = {}, {}
        for name, number in outputs.items():
            if self.type(number) in _BYTES:
                scale, zero_point, _ = self.scale(number)
                low, high = ((edge - zero_point[0]) * scale[0] for edge in _BYTES[self.type(number)])
                activations[name] = {
                    "dtype": self.type(number).lower(),
                    "scale": float(scale[0]),
                    "zero_point": int(zero_point[0]),
                    "min": float(low),
                    "max": float(high),
                }
        for node, step in zip(self.nodes, steps, strict=False):
            if len(node.inputs) > 1 and step.operators[0].endswith("CONV_2D"):
                number = self.source(node.inputs[1])
                scale, zero_point, _ = self.scale(number)
                if scale is not None:
                    weights[f"{step.name}.weight" if step.conv is None else f"{step.name}.conv.weight"] = {
                        "dtype": self.type(number).lower(),
                        "scale": scale.tolist(),
                        "zero_point": zero_point.astype(int).tolist(),
                    }
        return {"activations": activations, "weights": weights}


def _names(enumeration: type) -> dict[int, str]:
    return {value: name for name, value in vars(enumeration).items() if isinstance(value, int)}


_NOTE = """The weights are those of 8 bits, as real numbers. How the source quantizes is kept in `quantization.json`:
`activations` has type, scale, zero point and range of each layer's output by the layer's name (`pixel_values` is the
input, `backbone.pooler_output` what the classifier sees, `backbone.stages.1.1` the sum that ends a block, `classifier`
the logits); `weights` has type, scale and zero point, one or one for each output channel. A real number is
scale * (byte - zero point)."""


def detect(origin: Origin) -> bool:
    """Whether a path is a file of TFLite."""
    return origin.path.suffix == ".tflite"


def read(origin: Origin, options: Options) -> Checkpoint:
    """Read a TFLite file.

    Raises:
        ConversionError: The file is broken, or holds another network.
        ImportError: ai-edge-litert is not installed.
    """
    with understanding(origin.path):
        graph = Graph(origin.path.read_bytes(), origin.path)
        table = max(TABLES, key=lambda table: graph.agreement(expected(skeleton(**table.config))))
        tensors = graph.tensors()
        config = measure(tensors, table)
        steps = expected(skeleton(**config))
        config |= graph.check(steps)
        normalization = graph.normalization()
        quantization = graph.quantization(steps) if graph.is_quantized else None
    processor = options.processor("google", graph.image_size)
    if normalization and options.recipe is None:
        # The network's own scale: the recipe's is off by up to half a level.
        processor.image_mean, processor.image_std = ([value] * config["num_channels"] for value in normalization)

    return Checkpoint(
        kind=f"a {'quantized' if graph.is_quantized else 'float'} TFLite file",
        tensors=tensors,
        table=table,
        config=config | {"image_size": options.size(graph.image_size)},
        processor=processor,
        files=[origin.path],
        oracle=lambda: interpreter(graph, "LiteRT", options.size(graph.image_size)),
        labels=_labels(origin.path, config["num_labels"]),
        quantization=quantization,
        notes=[_NOTE] if quantization else [],
    )


def _labels(path: Path, count: int) -> list[str] | None:
    """Labels that are attached to a file as an archive; None where there are none, or not as many as classes."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.filename.endswith(".txt") and member.file_size < _MAX_LABELS:
                    labels = archive.read(member).decode("utf-8").splitlines()
                    if len(labels) == count:
                        return labels
    except (zipfile.BadZipFile, UnicodeDecodeError):
        pass
    return None


def interpreter(graph: Graph, name: str, image_size: int) -> Oracle:
    """Run a TFLite file on pictures of a size.

    Raises:
        NoOracleError: The file takes pictures of another size.
    """
    if image_size != graph.image_size:
        raise NoOracleError(f"the TFLite file takes pictures of {graph.image_size} pixels, not of {image_size}")
    from importlib.metadata import version

    from ai_edge_litert.interpreter import Interpreter

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # keeping every tensor takes memory; the logits need it
            runtime = Interpreter(model_content=graph.data, experimental_preserve_all_tensors=True)
        runtime.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise ConversionError(f"{graph.path}: LiteRT does not run it: {first_line(error)}") from error
    details = {tensor["index"]: tensor for tensor in runtime.get_tensor_details()}
    given, result = details[graph.input], details[graph.logits]

    def logits(pixel_values: Tensor) -> Tensor:
        rows = []
        for picture in pixel_values.permute(0, 2, 3, 1).numpy():
            runtime.set_tensor(given["index"], _quantized(picture[None], given))
            runtime.invoke()
            rows.append(_real(runtime.get_tensor(result["index"]), result).reshape(-1))
        return torch.from_numpy(np.stack(rows))

    return Oracle(name, version("ai-edge-litert"), logits)


def _quantized(values: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    scale, zero_point = details["quantization"]
    if not scale:
        return values.astype(np.float32)
    limits = np.iinfo(details["dtype"])
    return np.clip(np.rint(values / scale + zero_point), limits.min, limits.max).astype(details["dtype"])


def _real(values: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    scale, zero_point = details["quantization"]
    return (values.astype(np.float32) - zero_point) * np.float32(scale) if scale else values.astype(np.float32)
