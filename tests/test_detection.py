"""Detectors: anchors, boxes, the loss and suppression against formulas written out here; and how they are used."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mobilenet.detection_mobilenet import (
    check_labels,
    decode,
    detection_loss,
    encode,
    generate_anchors,
    hard_negatives,
    match_anchors,
    suppress,
)
from mobilenet.heads_mobilenet import DETECTORS, Focal, HardNegatives
from oracles import randomize_norms
from PIL import Image
from torch import Tensor
from transformers import AutoModelForObjectDetection

from mobilenet import (
    MobileNetConfig,
    MobileNetForImageClassification,
    MobileNetForObjectDetection,
    MobileNetImageProcessor,
    postprocessing_mobilenet,
)
from mobilenet.classify import classify_images


pytestmark = pytest.mark.any_version

SMALL = "ssdlite_mobilenet_v3_small"


def detector(name: str = SMALL, **fields: object) -> MobileNetForObjectDetection:
    config = MobileNetConfig.from_preset(name, **{"num_labels": 5, **fields})
    return randomize_norms(MobileNetForObjectDetection(config)).eval()


def label(*boxes: tuple[float, ...], classes: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    classes = classes or tuple(range(len(boxes)))
    return {"class_labels": torch.tensor(classes, dtype=torch.long), "boxes": torch.tensor(boxes).reshape(-1, 4)}


def iou(a: Tensor, b: Tensor) -> float:
    """Of two boxes (x0, y0, x1, y1), by hand."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


# The networks


@pytest.mark.parametrize(
    ("name", "parameters", "anchors"),
    [
        # The API's configurations of V3 print 3.22 M parameters, torchvision's documentation 3,440,060.
        ("ssd_mobilenet_v1", 6_819_839, 1917),
        ("ssd_mobilenet_v1_focal", 6_819_839, 1917),
        ("ssd_mobilenet_v2", None, 1917),
        ("ssdlite_mobilenet_v2", 4_500_543, 1917),
        ("ssdlite_mobilenet_v3_large", 3_248_255, 2034),
        ("ssdlite_mobilenet_v3_small", 1_785_743, 2034),
        ("ssdlite320_mobilenet_v3_large", 3_440_060, 3234),
    ],
)
def test_each_detector_has_its_size_and_anchors(name: str, parameters: int | None, anchors: int) -> None:
    assert name in DETECTORS
    config = MobileNetConfig.from_preset(name)
    with torch.device("meta"):
        model = MobileNetForObjectDetection(config).eval()
    assert parameters in (None, sum(parameter.numel() for parameter in model.parameters()))
    found = model(torch.zeros(1, 3, config.image_size, config.image_size, device="meta"))
    assert found.logits.shape == (1, anchors, 91)
    assert found.pred_boxes.shape == (1, anchors, 4)
    assert found.scores.shape == (1, anchors, 90)


def test_every_published_detector_is_tried() -> None:
    (sizes,) = (mark.args[1] for mark in test_each_detector_has_its_size_and_anchors.pytestmark[:1])
    assert [row[0] for row in sizes] == list(DETECTORS)
    with pytest.raises(TypeError):
        DETECTORS["other"] = DETECTORS[SMALL]
    assert all(hash(row) for row in DETECTORS.values())


def test_the_expansion_is_a_map_of_its_own() -> None:
    """The first map is what the last stage's first block expands to: 96 * 6 channels of V2 at stride 16."""
    model = detector("ssdlite_mobilenet_v2")
    seen = {}
    block = model.backbone.stages[-1][0]
    block.expand.register_forward_hook(lambda module, inputs, output: seen.update(map=output.clone()))
    model.class_predictors[0].register_forward_hook(lambda module, inputs, output: seen.update(given=inputs[0]))
    with torch.no_grad():
        model(torch.randn(1, 3, 96, 96))
    assert seen["map"].shape == (1, 576, 6, 6)
    torch.testing.assert_close(seen["given"], seen["map"])


@pytest.mark.parametrize("name", ["ssd_mobilenet_v1", "ssdlite_mobilenet_v2", "ssdlite320_mobilenet_v3_large"])
def test_fused_in_halves_and_in_other_layouts_it_computes_the_same(name: str) -> None:
    model, images = detector(name), torch.randn(2, 3, 128, 96)
    with torch.no_grad():
        expected = model(images)
        fused = copy.deepcopy(model).fuse()
        for found in (fused(images), model(images.contiguous(memory_format=torch.channels_last))):
            torch.testing.assert_close(found.logits, expected.logits, atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, atol=1e-4, rtol=1e-4)
        half = copy.deepcopy(model).to(torch.bfloat16)(images)
    assert half.logits.dtype == torch.bfloat16
    assert half.scores.dtype == half.pred_boxes.dtype == torch.float32
    assert (half.scores - expected.scores).abs().mean() < 0.02


def test_gradients_are_the_same_with_checkpointing() -> None:
    model = detector("ssdlite_mobilenet_v2", width_multiplier=0.35).train()
    images, labels = torch.randn(2, 3, 96, 96), [label((0.5, 0.5, 0.4, 0.4)), label((0.3, 0.4, 0.2, 0.6))]
    gradients = []
    for checkpoints in (False, True):
        trained = copy.deepcopy(model)
        if checkpoints:
            trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trained(images, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trained.named_parameters()})
    assert all(gradient is not None for gradient in gradients[1].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_a_graph_has_its_anchors_inside() -> None:
    model, images = detector(), torch.randn(2, 3, 128, 128)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(
        model, (), {"pixel_values": images}, dynamic_shapes={"pixel_values": {0: batch}}, strict=False
    )
    one = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(pixel_values=one)["scores"], model(one).scores)


def test_hidden_states_are_the_backbones() -> None:
    model, images = detector(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = model(images, output_hidden_states=True)
        expected = model.backbone(images, output_hidden_states=True).hidden_states
        as_tuple = model(images, return_dict=False)
    for ours, theirs in zip(found.hidden_states, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(as_tuple[0], found.logits)


def test_a_classifiers_checkpoint_becomes_a_detectors_backbone(tmp_path: Path) -> None:
    classifier = MobileNetForImageClassification(MobileNetConfig(width_multiplier=0.35, num_labels=3))
    classifier.save_pretrained(tmp_path)
    model, report = MobileNetForObjectDetection.from_pretrained(
        tmp_path, detector="ssdlite_mobilenet_v2", output_loading_info=True
    )
    torch.testing.assert_close(model.backbone.head.conv.weight, classifier.backbone.head.conv.weight)
    assert not report["unexpected_keys"]
    assert {key.split(".")[0] for key in report["missing_keys"]} == {"extras", "box_predictors", "class_predictors"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"architecture": "mobilenet_v2"}, "detector must be one of ssd_mobilenet_v1, .*, got None"),
        (
            {"architecture": "mobilenet_v1", "detector": "ssdlite_mobilenet_v2"},
            "detector must be ssd_mobilenet_v1 or ssd_mobilenet_v1_focal for mobilenet_v1, got 'ssdlite_mobilenet_v2'",
        ),
        ({"detector": "yolo"}, "detector must be ssd_mobilenet_v1, .*, or None, got 'yolo'"),
        ({"detector": SMALL, "num_labels": 0}, "num_labels must be at least 1 for a detector, got 0"),
        (
            {"detector": SMALL, "num_labels": 131072},
            "num_labels must give a detector's layers at most 268435456 weights",
        ),
    ],
)
def test_networks_that_cannot_be_are_refused(fields: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        MobileNetForObjectDetection(MobileNetConfig(**fields))


def test_ssdlite_stands_on_v4_too() -> None:
    config = MobileNetConfig("mobilenet_v4_conv_small", detector="ssdlite_mobilenet_v2", num_labels=3)
    with torch.no_grad():
        found = MobileNetForObjectDetection(config).eval()(torch.randn(1, 3, 96, 96))
    assert found.scores.shape == (1, 6 * 6 * 3 + (9 + 4 + 1 + 1 + 1) * 6, 3)


def test_initial_predictions_are_unsure() -> None:
    """With the focal loss, all classes begin at a probability of about 0.01 (arXiv:1708.02002, Section 4.1)."""
    torch.manual_seed(0)
    model = MobileNetForObjectDetection(MobileNetConfig.from_preset(SMALL)).eval()
    with torch.no_grad():
        found = model(torch.randn(2, 3, 320, 320))
    assert found.scores.mean().item() == pytest.approx(0.01, abs=0.002)
    assert found.scores.max() < 0.1


# Anchors and boxes


def test_decoding_undoes_encoding() -> None:
    row = DETECTORS["ssd_mobilenet_v1"]
    anchors = generate_anchors(row, ((3, 5), (2, 3), (1, 2), (1, 1), (1, 1), (1, 1)))
    boxes = torch.rand(len(anchors), 4) * 0.5 + 0.05
    codes = encode(boxes, anchors, row)
    torch.testing.assert_close(decode(codes, anchors, row), boxes)
    # By hand, for the first anchor: 0.1 wide and high, at the middle of the first of 3 rows and 5 columns.
    torch.testing.assert_close(anchors[0], torch.tensor([0.1, 1 / 6, 0.1, 0.1]))
    by_hand = (boxes[0, 0] - 0.1) / 0.1 * 10, 5 * math.log(boxes[0, 3] / 0.1)
    torch.testing.assert_close(codes[0, [0, 3]], torch.tensor(by_hand))


def test_anchors_are_multiples_of_a_step() -> None:
    sizes = ((4, 4), (2, 2), (1, 1), (1, 1), (1, 1), (1, 1))
    exact, rounded = (generate_anchors(DETECTORS["ssd_mobilenet_v1"], sizes, step) for step in (0.0, 1 / 128))
    assert ((rounded * 128) % 1 == 0).all()
    assert 0 < (exact - rounded).abs().max() <= 1 / 256


# Matching and losses


def test_an_anchor_stands_for_the_box_that_it_overlaps_most() -> None:
    anchors = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.31, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.9, 0.1, 0.1, 0.1]])
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.75, 0.7, 0.1, 0.1]])
    # The second box overlaps its best anchor by 0.25 only: the anchor stands for it all the same.
    assert match_anchors(boxes, anchors, 0.5).tolist() == [0, 0, 1, -1]
    assert match_anchors(boxes[:0], anchors, 0.5).tolist() == [-1] * 4
    # Two boxes that share their best anchor: it stands for the first.
    twins = torch.tensor([[0.7, 0.7, 0.1, 0.1], [0.7, 0.7, 0.1, 0.1]])
    assert match_anchors(twins, anchors, 0.5).tolist() == [-1, -1, 0, -1]


def test_the_hardest_negatives_count() -> None:
    loss = torch.tensor([[9.0, 1.0, 5.0, 3.0, 4.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    positive = torch.tensor([[True, False, False, False, False, False], [False] * 6])
    found = hard_negatives(loss, positive, HardNegatives(ratio=3, minimum=0))
    assert found.tolist() == [[False, False, True, True, True, False], [False] * 6]
    found = hard_negatives(loss, positive, HardNegatives(ratio=3, minimum=4))
    assert found.sum(1).tolist() == [4, 4]


def expected_loss(
    name: str, logits: Tensor, codes: Tensor, anchors: Tensor, labels: list[dict]
) -> tuple[float, float]:
    """The losses of a detector, anchor by anchor and class by class."""
    row = DETECTORS[name]
    classification = localization = matches = 0.0
    for scores, code, given in zip(logits.double(), codes.double(), labels, strict=True):
        matched = match_anchors(given["boxes"], anchors, 0.5).tolist()
        losses = []
        for anchor, box in enumerate(matched):
            target = given["class_labels"][box].item() + 1 if box >= 0 else 0
            if row.score == "softmax":
                losses.append(-scores[anchor].log_softmax(0)[target].item())
                continue
            total = 0.0
            for index, logit in enumerate(scores[anchor].tolist()):
                wants = index == target and (target > 0 or row.background == "one")
                p = 1 / (1 + math.exp(-logit))
                entropy = -math.log(p if wants else 1 - p)
                if isinstance(row.loss, Focal):
                    entropy *= (0.75 * (1 - p) ** 2) if wants else (0.25 * p**2)
                total += entropy
            losses.append(total)
        positives = [index for index, box in enumerate(matched) if box >= 0]
        matches += len(positives)
        if isinstance(row.loss, Focal):
            classification += sum(losses)
        else:
            negatives = sorted((losses[i] for i, box in enumerate(matched) if box < 0), reverse=True)
            count = max(3 * len(positives), row.loss.minimum)
            classification += sum(losses[i] for i in positives) + sum(negatives[:count])
        for index in positives:
            wanted = encode(given["boxes"][matched[index]][None], anchors[index][None], row)[0].double()
            smooth = [d**2 / 2 if d < 1 else d - 0.5 for d in (code[index] - wanted).abs().tolist()]
            localization += sum(smooth) / (4 if row.averages_code else 1)
    return classification / max(matches, 1), localization / max(matches, 1)


@pytest.mark.parametrize("name", DETECTORS)
def test_losses_are_those_of_the_sources(name: str) -> None:
    row = DETECTORS[name]
    anchors = generate_anchors(row, ((3, 3), (2, 2), (1, 1), (1, 1), (1, 1), (1, 1)))
    logits, codes = torch.randn(3, len(anchors), 6), torch.randn(3, len(anchors), 4)
    labels = [
        label((0.3, 0.3, 0.3, 0.3), (0.6, 0.6, 0.5, 0.3), classes=(4, 0)),
        label(),
        label((0.5, 0.5, 0.9, 0.9), classes=(2,)),
    ]
    found = detection_loss(row, logits, codes, anchors, labels)
    classification, localization = expected_loss(name, logits, codes, anchors, labels)
    assert found["loss_classification"].item() == pytest.approx(classification, rel=1e-4)
    assert found["loss_localization"].item() == pytest.approx(localization, rel=1e-4)


@pytest.mark.parametrize("name", DETECTORS)
def test_images_without_objects_have_a_loss(name: str) -> None:
    model = detector(name).train()
    images = torch.randn(2, 3, 96, 96)
    for labels in ([label(), label()], [{"class_labels": [], "boxes": []}] * 2):
        found = model(images, labels=labels)
        assert found.loss.isfinite()
        assert found.loss_dict["loss_localization"] == 0
        found.loss.backward()


def test_a_single_image_cannot_be_normalized() -> None:
    model, images, labels = detector().train(), torch.randn(1, 3, 96, 96), [label((0.5, 0.5, 0.4, 0.4))]
    with pytest.raises(ValueError, match=r"pixel_values must hold at least 2 images in training mode, .*, got 1"):
        model(images, labels=labels)
    assert model.eval()(images, labels=labels).loss.isfinite()
    assert model.fuse().train()(images, labels=labels).loss.isfinite()


def test_the_loss_falls() -> None:
    torch.manual_seed(0)
    model = MobileNetForObjectDetection(MobileNetConfig.from_preset(SMALL, num_labels=2))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    images = torch.randn(4, 3, 96, 96)
    labels = [label((0.3 + 0.1 * i, 0.5, 0.4, 0.3), classes=(i % 2,)) for i in range(4)]
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        found = model(images, labels=labels)
        found.loss.backward()
        optimizer.step()
        losses.append(found.loss.item())
    assert losses[-1] < 0.6 * losses[0]


NOT_WITHIN = r"labels\[0\] must have boxes \(cx, cy, w, h\) relative to the image, with an area and within the image"


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"boxes": []}, "labels must be a list of 1 dicts, one for each image, got dict"),
        ([], "labels must be a list of 1 dicts, one for each image, got 0 of them"),
        ([None], r"labels\[0\] must be a dict with class_labels and boxes, got NoneType"),
        ([{"labels": [1], "boxes": []}], r"labels\[0\] must be a dict with class_labels and boxes, got keys labels"),
        ([{"class_labels": ["cat"], "boxes": []}], r"labels\[0\] must hold tensors"),
        ([label((0.5, 0.5, 0.1, 0.1), classes=(0, 1))], r"got \(2,\) and \(1, 4\)"),
        ([{"class_labels": torch.tensor([1]), "boxes": torch.zeros(4)}], r"got \(1,\) and \(4,\)"),
        ([{"class_labels": [1.0], "boxes": [[0.5, 0.5, 0.1, 0.1]]}], "must have integers as class_labels"),
        ([label((0.5, 0.5, 0.1, 0.1), classes=(5,))], "must have class_labels from 0 to 4, got 5"),
        ([label((0.5, 0.5, 0.1, 0.1), classes=(-1,))], "must have class_labels from 0 to 4, got -1"),
        ([label((0.5, 0.5, 0.0, 0.1))], NOT_WITHIN),
        ([label((0.5, 0.5, 0.1, -0.1))], NOT_WITHIN),
        ([label((1.5, 0.5, 0.1, 0.1))], NOT_WITHIN),
        ([label((0.95, 0.5, 0.3, 0.1))], NOT_WITHIN),
        ([label((120.0, 80.0, 60.0, 40.0))], NOT_WITHIN),
        ([label((math.nan, 0.5, 0.1, 0.1))], NOT_WITHIN),
        ([label((0.5, 0.5, math.inf, 0.1))], NOT_WITHIN),
    ],
)
def test_bad_labels_are_refused(labels: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        detector()(torch.randn(1, 3, 64, 64), labels=labels)


def test_labels_may_touch_the_border() -> None:
    (found,) = check_labels([label((0.5, 0.5, 1.0, 1.005), classes=(3,))], 1, 5)
    assert found["class_labels"].tolist() == [3]
    (found,) = check_labels([{"class_labels": np.array([2]), "boxes": np.array([[0.5, 0.5, 0.2, 0.2]])}], 1, 5)
    assert found["boxes"].dtype == torch.float32


# Suppression


def batched_nms(edges: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> list[int]:
    """What torchvision.ops.batched_nms says: of each class, keep the best, drop what overlaps it, and so on."""
    order, kept = sorted(range(len(scores)), key=lambda i: -scores[i]), []
    for i in order:
        if not any(labels[i] == labels[j] and iou(edges[i], edges[j]) > threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_suppression_is_batched_nms(seed: int) -> None:
    torch.manual_seed(seed)
    scores = torch.rand(60, 4)
    boxes = torch.cat((torch.rand(60, 2), torch.rand(60, 2) * 0.5 + 0.05), 1)
    edges = torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), 1).clamp(0, 1)
    flat = scores.flatten()
    rows, classes = torch.arange(60).repeat_interleave(4), torch.arange(4).repeat(60)
    chosen = (flat > 0.3).nonzero()[:, 0]
    kept = batched_nms(edges[rows[chosen]].tolist(), flat[chosen].tolist(), classes[chosen].tolist(), 0.45)
    expected = chosen[kept]
    for limit in (1000, 17):
        found, labels, corners = suppress(
            scores, boxes, 0.3, nms_iou_threshold=0.45, max_detections=limit, max_detections_per_class=1000
        )
        torch.testing.assert_close(found, flat[expected][:limit])
        assert labels.tolist() == classes[expected][:limit].tolist()
        torch.testing.assert_close(corners, edges[rows[expected]][:limit])


def test_candidates_and_detections_of_a_class_are_limited() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.7], [0.6, 0.2], [0.5, 0.6]])
    boxes = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]])
    kept = {
        name: suppress(scores, boxes, **options)
        for name, options in {
            "all": {},
            "two candidates": {"max_candidates_per_class": 2},
            "one of a class": {"max_detections_per_class": 1},
            "surer": {"score_threshold": 0.55},
        }.items()
    }
    found = {name: [round(s, 1) for s in parts[0].tolist()] for name, parts in kept.items()}
    assert found == {
        "all": [0.9, 0.7, 0.6, 0.6, 0.5, 0.2],
        "two candidates": [0.9, 0.7, 0.6],
        "one of a class": [0.9, 0.7],
        "surer": [0.9, 0.7, 0.6, 0.6],
    }


def test_of_equal_scores_the_lower_label_and_the_earlier_anchor_come_first() -> None:
    scores = torch.full((6, 3), 0.5)
    boxes = torch.tensor([[0.1 + 0.15 * i, 0.5, 0.1, 0.1] for i in range(6)])
    boxes[3] = boxes[2]
    _, labels, corners = suppress(scores, boxes, 0.1)
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert [round(x, 2) for x in corners[:5, 0].tolist()] == [0.05, 0.2, 0.35, 0.65, 0.8]
    found, labels, _ = suppress(scores, boxes, 0.1, max_classes_per_box=2, max_detections=2)
    assert labels.tolist() == [0, 1, 0, 1]
    assert len(found) == 4


def test_suppression_is_the_same_for_some_classes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, boxes = torch.rand(30, 5), torch.rand(30, 4)
    whole = suppress(scores, boxes, 0.3)
    shapes, overlap = [], postprocessing_mobilenet.overlap

    def watched(first: Tensor, second: Tensor) -> Tensor:
        shapes.append(len(first))
        return overlap(first, second)

    monkeypatch.setattr(postprocessing_mobilenet, "MAX_PAIRS", 60)
    monkeypatch.setattr(postprocessing_mobilenet, "overlap", watched)
    assert all(map(torch.equal, suppress(scores, boxes, 0.3), whole))
    assert max(shapes) == 2


def test_nothing_is_found_in_nothing() -> None:
    for scores, boxes in (
        (torch.zeros(4, 3), torch.rand(4, 4)),
        (torch.zeros(0, 3), torch.zeros(0, 4)),
        (torch.full((2, 3), math.nan), torch.rand(2, 4)),
    ):
        for classes in (None, 1):
            found = suppress(scores, boxes, 0.5, max_classes_per_box=classes)
            assert [tuple(part.shape) for part in found] == [(0,), (0,), (0, 4)]


def test_boxes_without_area_do_not_suppress() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).repeat(3, 1)
    assert len(suppress(torch.tensor([[0.9], [0.8], [0.7]]), boxes, 0.5)[0]) == 3


# The image processor


def test_detections_are_in_pixels_of_each_image() -> None:
    processor = MobileNetImageProcessor.from_recipe("ssd", 320)
    found = SimpleNamespace(
        scores=torch.tensor([[[0.9, 0.0]], [[0.1, 0.7]]]),
        pred_boxes=torch.tensor([[[0.5, 0.5, 0.5, 0.2]], [[0.9, 0.5, 0.4, 0.4]]]),
    )
    first, second = processor.post_process_object_detection(found, 0.5, torch.tensor([[100, 200], [50, 40]]))
    torch.testing.assert_close(first["boxes"], torch.tensor([[50.0, 40.0, 150.0, 60.0]]))
    torch.testing.assert_close(second["boxes"], torch.tensor([[28.0, 15.0, 40.0, 35.0]]))
    assert (first["labels"].tolist(), second["labels"].tolist()) == ([0], [1])
    (same,) = processor.post_process_object_detection(
        SimpleNamespace(scores=found.scores[:1], pred_boxes=found.pred_boxes[:1]), np.float32(0.5), [(100, 200)]
    )
    assert torch.equal(same["boxes"], first["boxes"])
    (relative,) = processor.post_process_object_detection(
        SimpleNamespace(scores=found.scores[:1], pred_boxes=found.pred_boxes[:1])
    )
    torch.testing.assert_close(relative["boxes"], torch.tensor([[0.25, 0.4, 0.75, 0.6]]))
    with pytest.raises(ValueError, match="target_sizes must hold height and width of each of 2 images, got "):
        processor.post_process_object_detection(found, 0.5, [(100, 200)])
    one = SimpleNamespace(scores=found.scores[:1], pred_boxes=found.pred_boxes[:1])
    for sizes in ([(0, 0)], [(-1, 5)], [(math.nan, 5)], [(1,)], [(1, 2, 3)], [None], torch.zeros(1, 2), 5):
        with pytest.raises(ValueError, match="target_sizes must hold height and width of each of 1 images, got "):
            processor.post_process_object_detection(one, 0.5, sizes)
    with pytest.raises(ValueError, match="threshold must be a number, got 'high'"):
        processor.post_process_object_detection(found, "high")


def test_options_of_suppression_are_saved_where_they_say_something(tmp_path: Path) -> None:
    MobileNetImageProcessor().save_pretrained(tmp_path / "plain")
    plain = json.loads((tmp_path / "plain" / "preprocessor_config.json").read_text())
    assert not {"nms_iou_threshold", "max_detections", "clip_boxes"} & plain.keys()
    MobileNetImageProcessor(nms_iou_threshold=0.3, clip_boxes=False).save_pretrained(tmp_path / "own")
    again = MobileNetImageProcessor.from_pretrained(tmp_path / "own")
    assert (again.nms_iou_threshold, again.clip_boxes, again.max_detections) == (0.3, False, 100)
    with pytest.raises(ValueError, match=r"nms_iou_threshold must be a number from 0 to 1, got 1\.5"):
        MobileNetImageProcessor(nms_iou_threshold=1.5)
    with pytest.raises(ValueError, match="max_detections must be made of integers from 1"):
        MobileNetImageProcessor(max_detections=0)


@pytest.mark.parametrize("size", [(1, 1), (60_000, 1), (1, 60_000), (3000, 7)])
def test_images_of_any_shape_are_stretched(size: tuple[int, int]) -> None:
    processor, model = MobileNetImageProcessor.from_recipe("ssd", 64), detector()
    pixels = processor(Image.new("RGB", size, "red"), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 64, 64)
    with torch.no_grad():
        found = model(pixels)
    (detections,) = processor.post_process_object_detection(found, 0.0, [size[::-1]])
    assert detections["boxes"].isfinite().all()
    assert (detections["boxes"].amax(0) <= torch.tensor([*size, *size]) + 1e-3).all()


def test_images_of_one_pixel_and_none_at_all() -> None:
    model = detector()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 1, 1)).scores.shape == (1, 3 + 5 * 6, 5)
        assert model(torch.randn(0, 3, 64, 64)).scores.shape[0] == 0
    with pytest.raises(ValueError, match="pixel_values must be a tensor"):
        model()
    with pytest.raises(ValueError, match="images must hold at least one image"):
        MobileNetImageProcessor.from_recipe("ssd", 64)([])


# Use

PIPELINE = """
import sys
from transformers import AutoModelForObjectDetection, pipeline

repo, image, copied, trust = sys.argv[1:]
if trust == "package":
    import mobilenet
trust = trust == "trust"
detect = pipeline("object-detection", model=repo, trust_remote_code=trust)
(one,), (first, second) = detect(image, threshold=0.0)[:1], detect([image, image], threshold=0.0)
assert first == second and first[0] == one, (one, first, second)
print(sorted(one), sorted(one["box"]), one["label"])
if trust:
    model = AutoModelForObjectDetection.from_pretrained(repo, trust_remote_code=True)
    model.save_pretrained(copied)
    again = AutoModelForObjectDetection.from_pretrained(copied, trust_remote_code=True)
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
"""


@pytest.mark.parametrize("trust", ["trust", "package"])
def test_pipelines_detect_with_and_without_the_package(trust: str, tmp_path: Path) -> None:
    repo, image = tmp_path / "repo", tmp_path / "image.png"
    names = {0: "one", 1: "two", 2: "three"}
    detector(num_labels=3, id2label=names, label2id={name: index for index, name in names.items()}).save_pretrained(
        repo
    )
    MobileNetImageProcessor.from_recipe("ssd", 96, max_detections=3).save_pretrained(repo)
    Image.new("RGB", (150, 100), "green").save(image)
    path = str(Path(__file__).parents[1]) if trust == "package" else ""
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE, str(repo), str(image), str(tmp_path / "copied"), trust],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": path, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "['box', 'label', 'score'] ['xmax', 'xmin', 'ymax', 'ymin']" in done.stdout


def test_the_auto_class_saves_and_loads_fused(tmp_path: Path) -> None:
    model, images = detector().fuse(), torch.randn(1, 3, 64, 64)
    model.save_pretrained(tmp_path)
    again = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    assert type(again) is MobileNetForObjectDetection
    assert again.config.fused
    with torch.no_grad():
        torch.testing.assert_close(again(images).scores, model(images).scores)


def test_a_detector_does_not_classify(tmp_path: Path) -> None:
    detector().save_pretrained(tmp_path)
    MobileNetImageProcessor.from_recipe("ssd", 96).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a classifier, got a detector: `mobilenet detect` takes it"):
        list(classify_images([Image.new("RGB", (8, 8))], model=str(tmp_path)))
