"""A fused network on its way through the exporters of transformers, with the quantizer of each target."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from mobilenet.tasks import CLASSIFICATION, DETECTION, SEGMENTATION, Task

from . import Target


# ExecuTorch plans its memory for the largest batch.
EXECUTORCH_BATCH = 32


class Exporter:
    """A fused network on its way through the exporters of transformers."""

    def __init__(
        self,
        network: PreTrainedModel,
        processor: BaseImageProcessor,
        size: tuple[int, int],
        calibrate_on: Sequence[Tensor],
        task: Task,
    ) -> None:
        self.network = network
        self.config = network.config
        self.processor = processor
        self.size = size  # height and width of the images
        self.calibrate_on = calibrate_on
        self.task = task

    @torch.inference_mode()
    def run(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Outputs of torch that the task names."""
        outputs = self.network(pixel_values)
        return tuple(outputs[name] for name in self.task.outputs)

    def export(self, target: Target, int8: bool) -> Any:
        """An ExportedModel of the fused network."""
        from transformers import exporters

        quantizer = self._quantizer(target) if int8 else None
        is_bounded = target is Target.EXECUTORCH
        batch = torch.export.Dim("batch", max=EXECUTORCH_BATCH) if is_bounded else torch.export.Dim.DYNAMIC
        dynamic = {0: batch}
        if self.task is SEGMENTATION and target is Target.ONNX:  # whose layers resize to the size at hand
            dynamic |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
        options = {"dynamic_shapes": {"pixel_values": dynamic}, "quantizer": quantizer}
        sample = {"pixel_values": torch.randn(2, self.config.num_channels, *self.size)}
        network = copy.deepcopy(self.network)  # an exporter may change it
        if target is Target.OPENVINO:
            return exporters.OpenVINOExporter().export(network, sample, exporters.OpenVINOConfig(**options))
        if target is Target.EXECUTORCH:
            return exporters.ExecutorchExporter().export(network, sample, exporters.ExecutorchConfig(**options))
        exported = exporters.OnnxExporter().export(network, sample, exporters.OnnxConfig(**options))
        if self.task is CLASSIFICATION:
            _free_size(exported.program, self.config.padding == "same")
        elif self.task is SEGMENTATION:
            _pad_in_convolutions(exported.program)
        elif self.task is DETECTION:
            _name_batch(exported.program)
        return exported

    def _quantizer(self, target: Target) -> Any:
        """int8 with a scale for each channel of a weight and one for each activation, calibrated on the images."""
        calibration = [{"pixel_values": pixel_values} for pixel_values in self.calibrate_on]
        makers = {
            Target.ONNX: _onnx_quantizer,
            Target.OPENVINO: _openvino_quantizer,
            Target.EXECUTORCH: _pt2e_quantizer,
        }
        return makers[target](calibration, self.task)


# The stem and the first block see few channels, whose values lie far apart: in 8 bits they change more predictions
# than all that follows, and in float32 hardly any time. So do the last of a detector, which are transposed after.
_CONVOLUTIONS_IN_FLOAT = 3


def _onnx_quantizer(calibration: list[dict[str, Tensor]], task: Task) -> Any:
    from onnxruntime.quantization import QuantType
    from transformers.exporters import OnnxRuntimeQuantizer, OnnxRuntimeStaticConfig

    class Quantizer(OnnxRuntimeQuantizer):
        def quantize(self, model: Any, *args: Any) -> Any:
            convolutions = [node for node in model.graph if node.op_type == "Conv"]
            last = [
                node
                for node in convolutions
                if task is DETECTION and any(user.op_type == "Transpose" for user, _ in node.outputs[0].uses())
            ]
            in_float = {node.name for node in (*convolutions[:_CONVOLUTIONS_IN_FLOAT], *last)}
            self.config.nodes_to_exclude = sorted(in_float)
            return super().quantize(model, *args)

    # Unsigned activations with signed weights are what the instructions of x86 multiply.
    signs = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    return Quantizer(OnnxRuntimeStaticConfig(per_channel=True, **signs), calibration)


def _openvino_quantizer(calibration: list[dict[str, Tensor]], task: Task) -> Any:
    import nncf
    from transformers.exporters import NNCFOpenVINOQuantizer, NNCFQuantizationConfig

    class Quantizer(NNCFOpenVINOQuantizer):
        def quantize(self, model: Any, *args: Any) -> Any:
            kinds = ("Convolution", "GroupConvolution")
            operations = [op for op in model.get_ordered_ops() if op.get_type_name() in kinds]
            last = [
                operation
                for operation in operations
                if task is DETECTION
                and any(u.get_node().get_type_name() == "Transpose" for u in operation.output(0).get_target_inputs())
            ]
            in_float = {o.get_friendly_name() for o in (*operations[:_CONVOLUTIONS_IN_FLOAT], *last)}
            self.config.ignored_scope = nncf.IgnoredScope(names=sorted(in_float))
            return super().quantize(model, *args)

    # What an activation lets through is not symmetric about 0: "mixed" gives it a zero point of its own.
    preset = nncf.QuantizationPreset.MIXED
    return Quantizer(NNCFQuantizationConfig(preset=preset, subset_size=len(calibration)), calibration)


def _pt2e_quantizer(calibration: list[dict[str, Tensor]], task: Task) -> Any:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from torchao.quantization.pt2e import MinMaxObserver
    from transformers.exporters import PT2EQuantizer

    config = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True)
    # The histograms that it would collect take seconds an image.
    activations = dataclasses.replace(
        config.input_activation, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-12)
    )
    config = dataclasses.replace(config, input_activation=activations, output_activation=activations)
    return PT2EQuantizer(xnnpack_quantizer.XNNPACKQuantizer().set_global(config), calibration)


def _name_batch(graph_model: Any) -> None:
    """Call by its name what a graph that takes images of one size takes any number of."""
    from onnx_ir import Shape
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    for value in (*graph_model.graph.inputs, *graph_model.graph.outputs):
        value.shape = Shape(["batch", *value.shape[1:]])
    ClearMetadataAndDocStringPass()(graph_model)


def _pad_in_convolutions(graph_model: Any) -> None:
    """Let strided convolutions pad as TensorFlow does, which ONNX can, in place of operators that copy their inputs.

    Those of a graph that takes images of any size compute their padding; this leaves nothing to compute.
    """
    from onnx_ir import AttrString, Shape
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

    graph = graph_model.graph
    for node in graph:
        pad = node.inputs[0].producer() if node.op_type == "Conv" else None
        if pad is not None and pad.op_type == "Pad":
            node.replace_input_with(0, pad.inputs[0])
            node.attributes.pop("pads", None)
            node.attributes["auto_pad"] = AttrString("auto_pad", "SAME_UPPER")
        for value in node.outputs:
            value.shape = None
    (pixels,), (logits,) = graph.inputs, graph.outputs
    pixels.shape = Shape(["batch", pixels.shape[1], "height", "width"])
    logits.shape = Shape(["batch", "labels", "rows", "columns"])
    RemoveUnusedNodesPass()(graph_model)
    ClearMetadataAndDocStringPass()(graph_model)


def _free_size(graph_model: Any, pads_same: bool) -> None:
    """Let an ONNX graph, traced at one height and width, take any.

    ONNX has TensorFlow's SAME padding of its own, which runtimes compute from the image at hand. Traced sizes would
    need an operator that pads before each strided convolution, at the price of a copy of its input.
    """
    from onnx_ir import AttrString, Shape
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    graph = graph_model.graph
    for node in graph:
        if node.op_type == "Conv" and pads_same and max(node.attributes["strides"].as_ints()) > 1:
            del node.attributes["pads"]
            node.attributes["auto_pad"] = AttrString("auto_pad", "SAME_UPPER")
        for value in node.outputs:
            value.shape = None
    (pixels,), (logits,) = graph.inputs, graph.outputs
    channels = pixels.shape[1]
    pixels.shape = Shape(["batch", channels, "height", "width"])
    logits.shape = Shape(["batch", "labels"])
    ClearMetadataAndDocStringPass()(graph_model)  # paths of this machine, among others
