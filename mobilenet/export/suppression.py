"""Non-maximum suppression inside an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .compare import ExportError


# Objects of a lower score are not among what such a graph gives.
THRESHOLD = 0.05
OUTPUT = "detections"


def suppress_in_graph(exported: Any, options: Mapping[str, Any]) -> None:
    """Let a graph give objects in place of scores and boxes, as `suppress` of postprocessing_mobilenet.py does.

    All boxes compete, whatever max_candidates_per_class says.

    The graph's output `detections` has shape (objects, 7): for each object the image's place in the batch, the class,
    the score, and x0, y0, x1, y1 relative to the image, by falling score.

    Args:
        exported: An ExportedModel whose graph has the outputs `scores` and `pred_boxes`.
        options: Of the image processor, as read_options gives them.

    Raises:
        ExportError: The operator cannot do what the options ask for.
    """
    import onnx_ir
    import torch
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    by_class = options["max_classes_per_box"] is None
    if not by_class and options["max_classes_per_box"] != 1:
        allowed = "None or 1 for a graph that suppresses boxes"
        raise ExportError(f"max_classes_per_box must be {allowed}, got {options['max_classes_per_box']}.")
    graph = exported.program.graph
    named = {value.name: value for value in graph.outputs}

    def constant(name: str, value: Any, kind: Any) -> Any:
        result = onnx_ir.Value(name=f"suppression.{name}", const_value=onnx_ir.tensor(np.array(value, kind)))
        result.shape, result.type = result.const_value.shape, onnx_ir.TensorType(result.const_value.dtype)
        graph.register_initializer(result)
        return result

    def add(operator: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        node = onnx_ir.node(operator, list(inputs), attributes, num_outputs=outputs)
        graph.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    centers, sizes = add("Split", named["pred_boxes"], outputs=2, axis=2, num_outputs=2)
    half = add("Mul", sizes, constant("half", 0.5, np.float32))
    edges = add("Concat", add("Sub", centers, half), add("Add", centers, half), axis=2)
    if options["clip_boxes"]:
        edges = add("Clip", edges, constant("zero", 0, np.float32), constant("one", 1, np.float32))
    scores = add("Transpose", named["scores"], perm=[0, 2, 1])  # (B, labels, anchors)
    if by_class:
        ranked, most = scores, options["max_detections_per_class"]
    else:
        ranked = add("ReduceMax", scores, constant("classes", [1], np.int64), keepdims=1)
        most = options["max_detections"]
    # Rows of image, class and anchor.
    chosen = add(
        "NonMaxSuppression",
        edges,
        ranked,
        constant("most", [most], np.int64),
        constant("iou", [options["nms_iou_threshold"]], np.float32),
        constant("threshold", [max(THRESHOLD, options["score_threshold"])], np.float32),
    )
    image_and_anchor = add("Gather", chosen, constant("image_and_anchor", [0, 2], np.int64), axis=1)
    image, label = (add("Gather", chosen, constant(f"column{n}", [n], np.int64), axis=1) for n in (0, 1))
    if not by_class:
        best = add("ArgMax", scores, axis=1, keepdims=0)
        label = add("Unsqueeze", add("GatherND", best, image_and_anchor), constant("last", [1], np.int64))
    score = add("GatherND", ranked, chosen)
    columns = [add("Cast", column, to=onnx_ir.DataType.FLOAT) for column in (image, label)]
    columns += [add("Unsqueeze", score, constant("second", [1], np.int64)), add("GatherND", edges, image_and_anchor)]
    _, order = add("TopK", score, add("Shape", score), outputs=2)
    rows = add("Gather", add("Concat", *columns, axis=1), order, axis=0)
    rows.name, rows.type = OUTPUT, onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    rows.shape = onnx_ir.Shape(["objects", 7])
    graph.outputs[:] = [rows]
    RemoveUnusedNodesPass()(exported.program)
    metadata = exported.components["model"].metadata
    _, structure = torch.utils._pytree.tree_flatten({OUTPUT: 0})
    metadata.out_spec, metadata.out_constants = torch.utils._pytree.treespec_dumps(structure), []
