"""Detectors and segmenters for other engines: the same objects and the same classes, wherever they are computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mobilenet.detection_mobilenet import suppress
from mobilenet.preprocessing_mobilenet import read_options
from PIL import Image
from test_detect import LABELS, make_detector
from test_segment import make_segmenter
from transformers import pipeline
from typer.testing import CliRunner

import mobilenet
from mobilenet import MobileNetForSemanticSegmentation, MobileNetImageProcessor, loading
from mobilenet.cli import app
from mobilenet.export import export
from mobilenet.export.compare import Comparison, Engine, ExportError, Timed, compare, objects
from mobilenet.tasks import DETECTION, SEGMENTATION


pytestmark = pytest.mark.any_version


def random_boxes(batch: int, anchors: int, labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and boxes that overlap and leave the image."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(batch, anchors, labels, generator=generator) ** 4
    centers, sizes = torch.rand(batch, anchors, 4, generator=generator).split(2, -1)
    return scores, torch.cat((1.2 * centers - 0.1, 0.4 * sizes + 0.02), -1)


@pytest.mark.parametrize("one_class", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_graphs_suppress_as_torch_does(one_class, clip):
    onnx_ir, runtime = pytest.importorskip("onnx_ir"), pytest.importorskip("onnxruntime")
    pytest.importorskip("transformers.exporters", reason="transformers is too old to export: 5.23 has exporters")
    from mobilenet.export.suppression import THRESHOLD, suppress_in_graph

    scores, boxes = random_boxes(3, 200, 4)
    kind = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    inputs, outputs = (
        [onnx_ir.Value(name=n, shape=onnx_ir.Shape(["batch", 200, last]), type=kind) for n, last in names]
        for names in ((("a", 4), ("b", 4)), (("scores", 4), ("pred_boxes", 4)))
    )
    nodes = [onnx_ir.node("Identity", [i], outputs=[o]) for i, o in zip(inputs, outputs, strict=True)]
    graph = onnx_ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 20}, name="detector")
    metadata = SimpleNamespace(out_spec=None, out_constants=None)
    program = onnx_ir.Model(graph, ir_version=10)
    exported = SimpleNamespace(program=program, components={"model": SimpleNamespace(metadata=metadata)})
    options = read_options(
        {"max_classes_per_box": 1 if one_class else None, "clip_boxes": clip, "max_detections": 10_000}
        | {"max_detections_per_class": 10_000, "nms_iou_threshold": 0.5}
    )
    suppress_in_graph(exported, options)
    session = runtime.InferenceSession(onnx_ir.to_proto(program).SerializeToString())
    (rows,) = session.run(None, {"a": scores.numpy(), "b": boxes.numpy()})
    assert [output.name for output in session.get_outputs()] == ["detections"]
    assert np.all(np.diff(rows[:, 2]) <= 0)
    names = ("max_classes_per_box", "clip_boxes", "nms_iou_threshold", "max_detections", "max_detections_per_class")
    for place in range(3):
        found = rows[rows[:, 0] == place]
        expected = suppress(scores[place], boxes[place], THRESHOLD, **{name: options[name] for name in names})
        assert 10 < len(found) == len(expected[0]) < 200 * 4
        np.testing.assert_allclose(found[:, 2], expected[0], atol=1e-6)
        np.testing.assert_array_equal(found[:, 1], expected[1])
        np.testing.assert_allclose(found[:, 3:], expected[2], atol=1e-6)


def test_objects_agree_where_class_and_place_do():
    options = read_options({})
    scores, boxes = random_boxes(1, 50, 4)
    rows = objects((scores, boxes), options)
    assert len(rows) > 5

    def agreement(outputs: tuple[torch.Tensor, ...], wanted: float = 0.0) -> Comparison:
        engine = Engine("x", lambda pixels: tuple(o.expand(len(pixels), -1, -1) for o in outputs), False, False)
        expected = Timed([(scores, boxes)], 1.0)
        return compare(engine, engine.run, [torch.zeros(1, 3, 8, 8)], expected, wanted, DETECTION, options)

    assert agreement((scores, boxes)).agreement == 1
    assert agreement((scores.flip(-1), boxes)).agreement < 0.5
    assert agreement((scores, boxes + 0.3)).agreement < 0.5
    assert agreement((scores * 0, boxes)).agreement == 0
    assert agreement((scores, boxes)).columns[3] == "same objects"
    with pytest.raises(ExportError, match=r"x finds torch's objects, and no others, for 0 % of 1 images, 50 % are"):
        agreement((scores * 0, boxes), 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "transformers.js", "images": "."}, "target must be onnx, openvino or executorch for a detector"),
        ({"target": "openvino", "nms": True}, "nms must be left out for openvino: ONNX alone has the operator"),
    ],
)
def test_what_a_detector_cannot_be_exported_to(monkeypatch, tmp_path, options, message):
    monkeypatch.setattr(export, "check_installed", lambda *_: None)
    make_detector(tmp_path / "model")
    with pytest.raises(ExportError, match=message):
        export.export(str(tmp_path / "model"), tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_segmenter_suppresses_no_boxes(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "check_installed", lambda *_: None)
    make_segmenter(tmp_path / "model")
    with pytest.raises(ExportError, match="nms must be left out for a segmenter"):
        export.export(str(tmp_path / "model"), tmp_path / "out", nms=True)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8))
    coarse.resize((150, 90), Image.Resampling.NEAREST).save(path)
    return path


def write_graph(folder: Path, make: Callable[[Path], None] = make_detector, **outputs: np.ndarray) -> None:
    """Put an ONNX graph of constant outputs beside a model's configuration, as if it were its export."""
    onnx = pytest.importorskip("onnx")
    make(folder)
    nodes, values = [], []
    for name, value in outputs.items():
        tensor = onnx.numpy_helper.from_array(value.astype(np.float32) if value.dtype == float else value, name)
        nodes.append(onnx.helper.make_node("Constant", [], [name], value=tensor))
        values.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, None))
    pixels = onnx.helper.make_tensor_value_info(
        "pixel_values", onnx.TensorProto.FLOAT, ["batch", 3, "height", "width"]
    )
    graph = onnx.helper.make_graph(nodes, "detector", [pixels], values)
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
    onnx.save(model, folder / "model.onnx")
    manifest = {"export_format": "onnx", "components": {"model": {"file": "model.onnx"}}, "outputs": list(outputs)}
    (folder / "export.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"scores": np.zeros((1, 9, 4))}, "it has no output pred_boxes"),
        ({"scores": np.zeros((1, 9, 3)), "pred_boxes": np.zeros((1, 9, 4))}, "must answer with 4 scores, got 3."),
        (
            {"scores": np.zeros((1, 9, 4)), "pred_boxes": np.zeros((1, 8, 4))},
            "and a box for each anchor, got (1, 9, 4)",
        ),
        ({"scores": np.zeros((1, 9, 4)), "pred_boxes": np.full((1, 9, 4), np.nan)}, "got NaN or infinity"),
        ({"detections": np.zeros((5, 6))}, "must answer with objects of 7 numbers, got (5, 6)."),
        ({"detections": np.full((5, 7), np.inf)}, "got NaN or infinity"),
        (
            {"scores": np.full((1, 9, 4), 1e9), "pred_boxes": np.zeros((1, 9, 4))},
            "scores from 0 to 1, got 0 to 1e+09.",
        ),
        ({"detections": np.float64([[0, 0, -1, 0, 0, 1, 1]])}, "must answer with scores from 0 to 1, got -1 to 0."),
        ({"detections": np.float64([[0, 1e30, 1, 0, 0, 1, 1]])}, "labels from 0 to 16777216, got 0 to 1e+30."),
        (
            {"scores": np.zeros((2, 9, 4)), "pred_boxes": np.zeros((2, 9, 4))},
            "must answer with scores of 1 images, got",
        ),
        (
            {"scores": np.zeros((1, 9, 4)), "pred_boxes": np.zeros((1, 9, 4), np.int32)},
            "answer with arrays of floats.",
        ),
        (
            {"scores": np.zeros((1, 10, 4)), "pred_boxes": np.zeros((1, 10, 4))},
            "at most 36 scores of an image, got 40.",
        ),
    ],
)
def test_graphs_that_cannot_be_right_are_one_error(monkeypatch, tmp_path, scene, outputs, message):
    monkeypatch.setattr(loading, "MAX_SCORES", 36)
    write_graph(tmp_path, **outputs)
    result = CliRunner().invoke(app, ["detect", str(scene), "--model", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert message in result.stderr


@pytest.mark.parametrize("shape", [(1, 5, 0, 0), (2, 5, 6, 6), (1, 5, 97, 6), (1, 5, 6), (1, 4, 6, 6)])
def test_maps_that_cannot_be_right_are_one_error(tmp_path, scene, shape):
    write_graph(tmp_path, make_segmenter, logits=np.zeros(shape))
    result = CliRunner().invoke(app, ["segment", str(scene), "--model", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (1, "")
    expected = "5 scores, got 4." if shape[1] == 4 else f"maps of logits for 1 images of 96x96, got {shape}."
    assert result.stderr.splitlines()[-1] == f"Error: {tmp_path} must answer with {expected}"


def test_objects_of_a_graph_are_those_of_their_images(tmp_path, scene):
    """Whatever label a graph names, and wherever it puts a box."""
    rows = [
        [1, 3, 0.9, -1, 0, 2, 0.5],
        [0, 99, 0.8, 0.2, 0.2, 0.4, 0.4],
        [0, 1, 0.3, 0, 0, 1, 1],
        [7, 1, 0.9, 0, 0, 1, 1],
    ]
    write_graph(tmp_path, detections=np.array(rows))
    first, second = mobilenet.detect_images([scene, scene], tmp_path, threshold=0.5, batch_size=2)
    assert [(p.label, p.box) for p in second.predictions] == [("=tie", (0, 0, 150, 45))]
    assert [p.label for p in first.predictions] == ["LABEL_99"]
    assert first.predictions[0].box == pytest.approx((30, 18, 60, 36), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "nms"), [("onnx", False), ("onnx", True), ("openvino", False)])
def test_exported_detectors_find_the_same(tmp_path, scene, target, nms):
    pytest.importorskip("transformers.exporters", reason="transformers is too old to export: 5.23 has exporters")
    make_detector(tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), str(tmp_path / "fast"), "--target", target]
    result = CliRunner().invoke(app, [*arguments, *(["--nms"] if nms else [])])
    assert result.exit_code == 0, result.stderr
    assert "same" in result.stdout
    assert "objects" in result.stdout
    manifest = json.loads((tmp_path / "fast" / "export.json").read_text())
    assert manifest["task"] == "object-detection"
    assert manifest["outputs"] == (["detections"] if nms else ["scores", "pred_boxes"])
    assert str(Path(__file__).parents[2]).encode() not in next((tmp_path / "fast").glob("*model.[ox]*")).read_bytes()
    (expected,) = mobilenet.detect_images(scene, tmp_path / "model", threshold=0.7)
    images = [scene] * 3
    for result in mobilenet.detect_images(images, tmp_path / "fast", threshold=0.7, batch_size=2):
        if target == "onnx":  # OpenVINO computes in bfloat16 where that is faster
            assert [p.index for p in result.predictions] == [p.index for p in expected.predictions]
        for p, q in zip(result.predictions, expected.predictions, strict=target == "onnx"):
            if target == "onnx":
                assert p.score == pytest.approx(q.score, abs=1e-4)
                assert p.box == pytest.approx(q.box, abs=0.05)
    assert len(expected.predictions) > 3
    error = CliRunner().invoke(app, ["classify", str(scene), "--model", str(tmp_path / "fast")]).stderr
    assert error.endswith("it must be a classifier, got a detector: `mobilenet detect` takes it.\n")


@pytest.mark.slow
def test_pipelines_take_exported_detectors(tmp_path, scene):
    exporters = pytest.importorskip("transformers.exporters", reason="transformers is too old to export")
    make_detector(tmp_path / "model")
    export.export(str(tmp_path / "model"), tmp_path / "fast")
    processor = MobileNetImageProcessor.from_pretrained(tmp_path / "fast")
    model = exporters.ExportedModel.from_pretrained(tmp_path / "fast", device="cpu")
    detect = pipeline("object-detection", model=model, image_processor=processor)
    (expected,) = mobilenet.detect_images(scene, tmp_path / "model", threshold=0.7)
    found = detect(str(scene), threshold=0.7)
    assert [line["label"] for line in found] == [p.label for p in expected.predictions]
    assert {line["label"] for line in found} <= set(LABELS.values())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino"])
@pytest.mark.parametrize(
    "options",
    [{}, {"segmentation_head": "lraspp", "architecture": "mobilenet_v3_small", "width_multiplier": 0.35}],
)
def test_exported_segmenters_give_the_same_classes(tmp_path, scene, target, options):
    exporters = pytest.importorskip("transformers.exporters", reason="transformers is too old to export")
    make_segmenter(tmp_path / "model", **options)
    (comparison, *_) = export.export(str(tmp_path / "model"), tmp_path / "fast", target)
    assert comparison.columns[3] == "same class"
    assert comparison.agreement > 0.999
    (expected,) = mobilenet.segment_images(scene, tmp_path / "model")
    (result,) = mobilenet.segment_images(scene, tmp_path / "fast")
    assert (result.label_map == expected.label_map).mean() > (0.999 if target == "onnx" else 0.9)
    assert json.loads((tmp_path / "fast" / "export.json").read_text())["task"] == SEGMENTATION.name
    if target == "onnx":  # images of any size
        model = MobileNetForSemanticSegmentation.from_pretrained(tmp_path / "model").eval()
        theirs = exporters.ExportedModel.from_pretrained(tmp_path / "fast", device="cpu")
        for shape in ((1, 3, 97, 130), (2, 3, 33, 224), (3, 3, 64, 64)):
            pixels = torch.randn(shape)
            with torch.no_grad():
                torch.testing.assert_close(
                    theirs(pixel_values=pixels).logits, model(pixels).logits, rtol=1e-3, atol=1e-3, msg=str(shape)
                )
        operators = [node.op_type for node in theirs.program.graph]
        assert "Pad" not in operators
