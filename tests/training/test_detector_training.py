"""Detectors in training: variation of boxes, average precision, what a run starts from, what it leaves."""

import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from colors import start, weights
from huggingface_hub import ModelCard
from PIL import Image
from shapes import SHAPES, draw, draw_coco, options
from transformers import Trainer, TrainingArguments, pipeline
from typer.testing import CliRunner

from mobilenet import (
    MobileNetConfig,
    MobileNetForImageClassification,
    MobileNetForObjectDetection,
    MobileNetImageProcessor,
)
from mobilenet.cli import app
from mobilenet.training.augment import AugmentBoxes
from mobilenet.training.boxes import NO_BOX
from mobilenet.training.detection import AveragePrecision, Detection, entries_of, targets
from mobilenet.training.evaluate import evaluate_checkpoint
from mobilenet.training.options import Options
from mobilenet.training.run import run
from mobilenet.training.trainer import checkpoints, freeze


# How images are varied


def white_boxes(count: int, side: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Black images with a white box each, and their labels, with room for another."""
    random = np.random.default_rng(0)
    pixels = np.zeros((count, 3, side, side), np.uint8)
    labels = np.full((count, 2, 6), NO_BOX, np.float32)
    for image, entries in zip(pixels, labels, strict=True):
        left, top = random.integers(0, side - 24, 2)
        right, bottom = left + random.integers(12, 24), top + random.integers(12, 24)
        image[:, top:bottom, left:right] = 255
        entries[1] = 2, 0, left / side, top / side, right / side, bottom / side
    return torch.from_numpy(pixels), torch.from_numpy(labels)


@pytest.mark.parametrize("crop_scale", [0.1, 1.0])
def test_boxes_move_with_their_images(crop_scale: float) -> None:
    """What is white in a varied image is its box, as far as it is seen; some boxes are left out."""
    pixels, labels = white_boxes(200)
    varied, moved = AugmentBoxes((80, 96), crop_scale, True, False)(pixels, labels)
    assert varied.shape == (200, 3, 80, 96)
    assert torch.equal(labels, white_boxes(200)[1])
    mirrored = kept = unchanged = 0
    for image, entries, before in zip(varied, moved, labels, strict=True):
        assert (entries[0] == NO_BOX).all()
        if entries[1, 0] < 0:
            continue
        kept += 1
        assert entries[1, :2].tolist() == [2, 0]
        white = (image[0] > 127).nonzero()
        (top, left), (bottom, right) = white.min(0).values.tolist(), (white.max(0).values + 1).tolist()
        expected = torch.tensor([left / 96, top / 80, right / 96, bottom / 80])
        assert (entries[1, 2:] - expected).abs().max() < 1.5 / 80
        unchanged += torch.allclose(entries[1], before[1], atol=1e-5)
        flipped = before[1].clone()
        flipped[[2, 4]] = 1 - before[1, [4, 2]]
        mirrored += torch.allclose(entries[1], flipped, atol=1e-5)
    if crop_scale == 1:
        assert kept == 200 <= mirrored + unchanged  # what lies in the middle may be both
        assert 70 < mirrored < 130
    else:
        assert kept > 150
        assert 30 < mirrored + unchanged < 110  # one in three or four: small objects overlap no window by much


def test_crops_overlap_an_object() -> None:
    """Windows lie in the image, and overlap the object by a tenth, but for one choice of several: any window."""
    pixels, labels = white_boxes(2000)
    augment = AugmentBoxes((64, 64), 0.1, False, False)
    is_box = labels[..., 0] >= 0
    crops = augment._choose(labels[..., 2:], is_box)
    windows = torch.stack(
        [crops.x - crops.width, crops.y - crops.height, crops.x + crops.width, crops.y + crops.height], -1
    )
    windows, boxes = (windows + 1) / 2, labels[:, 1, 2:]
    assert windows.min() >= -1e-6
    assert windows.max() <= 1 + 1e-6
    area = crops.width * crops.height
    assert (area >= 0.1 - 1e-6).all()
    sides = (torch.minimum(windows, boxes)[:, 2:] - torch.maximum(windows, boxes)[:, :2]).clamp(min=0)
    shared = sides.prod(-1)
    overlap = shared / (area + (boxes[:, 2:] - boxes[:, :2]).prod(-1) - shared)
    whole = area == 1
    assert 0.1 < whole.float().mean() < 0.6
    assert ((overlap >= 0.1) | whole).float().mean() > 1 - 1.5 / 7
    assert (overlap[~whole] > 0.3).float().mean() > 0.05
    assert AugmentBoxes((64, 64), 0.5, True, False)(pixels[:4], torch.full((4, 1, 6), NO_BOX))[1].max() == NO_BOX


def test_colors_change_and_boxes_stay() -> None:
    pixels, labels = white_boxes(32)
    pixels = pixels // 2 + 60
    varied, moved = AugmentBoxes((64, 64), 1.0, False, True)(pixels, labels)
    torch.testing.assert_close(moved, labels)
    assert 0 <= varied.min() < varied.max() <= 255
    assert (varied - pixels).abs().amax((1, 2, 3)).gt(2).sum() >= 16
    for image, entries in zip(varied, labels, strict=True):  # what is beside the box is of one color still
        left, top, right, bottom = (entries[1, 2:] * 64).round().int().tolist()
        ground = torch.ones(64, 64, dtype=torch.bool)
        ground[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2] = False
        assert image[0][ground].std() < 1


def test_targets_are_what_detectors_take() -> None:
    labels = torch.tensor([[[1, 0, 0.2, 0.1, 0.6, 0.5], [0, 1, 0, 0, 1, 1], [NO_BOX] * 6], [[NO_BOX] * 6] * 3])
    first, second = targets(labels)
    assert first["class_labels"].tolist() == [1]
    torch.testing.assert_close(first["boxes"], torch.tensor([[0.4, 0.3, 0.4, 0.4]]))
    assert second["class_labels"].shape == (0,)
    assert second["boxes"].shape == (0, 4)


# How detections are measured


def found(*detections: tuple[int, float, tuple[float, ...]]) -> torch.Tensor:
    """Entries of one image's detections."""
    labels, scores, boxes = zip(*detections, strict=True) if detections else ([], [], torch.empty(0, 4))
    one = {"labels": torch.tensor(labels), "scores": torch.tensor(scores), "boxes": torch.as_tensor(boxes)}
    return entries_of([one])


@pytest.mark.parametrize("unit", [1.0, 200.0])
def test_average_precision_by_hand(unit: float) -> None:
    """Overlaps of 0.62, which three of ten thresholds accept, and of 1; a crowd; a class without objects."""
    scores = AveragePrecision(["a", "b", "c"])
    a, b = (0.1, 0.1, 0.5, 0.6), (0.5, 0.5, 0.9, 0.9)
    scaled = lambda box: tuple(value * unit for value in box)  # noqa: E731
    close = (0.1, 0.1, 0.1 + 0.4 * 0.62, 0.6)
    labels = torch.tensor([[[0, 0, *scaled(a)], [1, 0, *scaled(b)], [1, 1, 0, 0, *scaled((0.4, 0.4))], [NO_BOX] * 6]])
    scores.update(found((0, 0.9, scaled(close)), (1, 0.8, scaled(b)), (1, 0.9, scaled((0, 0, 0.3, 0.4)))), labels)
    metrics, by_class, precisions = scores.compute()
    assert by_class == [pytest.approx(0.3), pytest.approx(1.0), None]
    assert list(metrics.values()) == pytest.approx([0.65, 1.0, 0.5])
    assert precisions.shape == (101, 3)
    # In a second image, what is found is nothing, and what is there is missed: half of the recall.
    scores.update(found(), labels[:, 1:2])
    assert scores.compute()[1][1] == pytest.approx(51 / 101)
    scores.reset()
    scores.update(found(), labels[:, :2])
    assert list(scores.compute()[0].values()) == [0, 0, 0]


# What a run starts from


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    folder = tmp_path / "classifier"
    MobileNetForImageClassification(MobileNetConfig(width_multiplier=0.35, num_labels=5)).save_pretrained(folder)
    MobileNetImageProcessor.from_recipe("torchvision", 64).save_pretrained(folder)
    return folder


def built(names: tuple[str, ...] = ("a", "b"), **kwargs: object) -> tuple[MobileNetForObjectDetection, object]:
    given = Options(dataset="", output="", task="detection", **kwargs)
    given.check()
    return Detection().build(given, list(names))


def test_detectors_from_scratch() -> None:
    model, processor = built()
    assert (model.config.detector, model.config.architecture) == ("ssdlite_mobilenet_v2", "mobilenet_v2")
    assert (model.config.image_size, processor.size) == (300, {"height": 300, "width": 300})
    assert not processor.do_center_crop
    assert model.config.id2label == {0: "a", 1: "b"}
    model, processor = built(detector="ssdlite320_mobilenet_v3_large", width=0.5, image_size=160)
    assert (model.config.architecture, model.config.padding) == ("mobilenet_v3_large_reduced_tail", "symmetric")
    assert (processor.size["height"], processor.nms_iou_threshold) == (160, 0.55)
    assert built(architecture="mobilenet_v1")[0].config.detector == "ssd_mobilenet_v1"
    assert built(architecture="mobilenet_v4_conv_small", width=0.5)[0].config.detector == "ssd_mobilenet_v1"
    with pytest.raises(ValueError, match=r"detector must be one of ssd_mobilenet_v1, .*, got 'yolo'"):
        built(detector="yolo")


def test_detectors_from_checkpoints(classifier: Path, tmp_path: Path) -> None:
    """The backbone's weights come along; with other labels, what predicts classes starts anew, and that alone."""
    model, processor = built(model=str(classifier))
    assert model.config.detector == "ssdlite_mobilenet_v2"
    before, after = weights(classifier), model.state_dict()
    shared = [name for name in after if name in before]
    assert [name for name in after if name.startswith("backbone.") and name not in before] == []
    assert all(torch.equal(after[name], before[name]) for name in shared)
    assert (processor.size, processor.do_center_crop) == ({"height": 300, "width": 300}, False)
    assert processor.image_mean == [0.485, 0.456, 0.406]

    model.save_pretrained(tmp_path / "detector")
    processor.save_pretrained(tmp_path / "detector")
    again, _ = built(model=str(tmp_path / "detector"), image_size=96)
    assert all(torch.equal(value, after[name]) for name, value in again.state_dict().items())
    assert again.config.image_size == 96
    other, _ = built(("a", "b", "c"), model=str(tmp_path / "detector"))
    changed = {name for name, value in other.state_dict().items() if not torch.equal(value, after[name]) if
               value.shape == after[name].shape} | {
        name for name, value in other.state_dict().items() if value.shape != after[name].shape}  # fmt: skip
    assert changed
    assert all(name.startswith("class_predictors.") and ".conv." in name for name in changed)
    with pytest.raises(ValueError, match="detector must be left out where model is a detector, as it has its own"):
        built(model=str(tmp_path / "detector"), detector="ssd_mobilenet_v1")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mixup": 0.2}, "mixup must be left out for detection: it is for classification"),
        ({"first_size": 32}, "first_size must be left out for detection: it is for classification and segmentation"),
        ({"segmentation_head": "lraspp"}, "segmentation_head must be left out for detection: it is for segmentation"),
        ({"task": "pose"}, "task must be one of classification, detection, segmentation, got 'pose'"),
        ({"validation": 0.01}, r"0\.01 of 20 images is too few"),
        ({"batch_size": 1}, "batch_size must be at least 2 for a detector whose last map is one pixel"),
        ({"detector": "yolo"}, "detector must be one of ssd_mobilenet_v1, "),
    ],
)
def test_options_that_are_not_for_detection(tmp_path: Path, given: dict, message: str) -> None:
    draw_coco(tmp_path / "set", 20)
    task = given.pop("task", "detection")
    with pytest.raises(ValueError, match=message):
        run(options(task, tmp_path / "set", tmp_path / "out", **given))
    assert not (tmp_path / "out.training").exists()


def test_the_backbone_can_be_frozen() -> None:
    """With no stages, all but the backbone trains; with some, these and the head's 1x1 convolution do too."""
    model, _ = built(width=0.1)
    freeze(model, 0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    model, _ = built(width=0.1)
    frozen = freeze(model, 2)
    assert not any(parameter.requires_grad for module in frozen for parameter in module.parameters())
    assert all(parameter.requires_grad for parameter in model.backbone.stages[-2:].parameters())
    assert all(parameter.requires_grad for parameter in model.backbone.head.parameters())


# What a run leaves

SHORT = {"image_size": 64, "width": 0.1, "learning_rate": 0.5}


def test_a_run_leaves_a_complete_repository(tmp_path: Path) -> None:
    """With a card, curves, and figures that `mobilenet evaluate` gets from the files."""
    draw_coco(tmp_path / "set", 8)
    draw_coco(tmp_path / "set", 4, "val", seed=1)
    given = {**SHORT, "epochs": 2, "trivial_augment": True}
    assert run(options("detection", tmp_path / "set", tmp_path / "out", **given))
    for name in ("config.json", "model.safetensors", "detection_mobilenet.py", "training.json", "log.csv"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    for name in ("curves.png", "precision_recall.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.width > 300
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "object-detection"
    assert {result.metric_name for result in card.data.eval_results} >= {"mean average precision"}
    assert "mobilenet_v2 with ssdlite_mobilenet_v2 at width 0.1" in card.text
    assert 'detect = pipeline("object-detection", model="out", trust_remote_code=True)' in card.text
    measured = evaluate_checkpoint(str(tmp_path / "out"), str(tmp_path / "set"))
    assert (measured.split, measured.images, measured.task) == ("validation", 4, "detection")
    assert measured.on_card == pytest.approx(measured.metrics["mean_average_precision"], abs=1e-6)
    assert list(measured.by_class) == list(SHAPES)
    shown = CliRunner().invoke(app, ["evaluate", str(tmp_path / "out"), str(tmp_path / "set")])
    assert re.search(r"mean average precision on the card +[\d.]+ %", shown.stdout)
    assert re.search(r"class +average precision\b.*triangle", shown.stdout, re.DOTALL)
    detect = pipeline("object-detection", model=str(tmp_path / "out"), trust_remote_code=False)
    assert isinstance(detect(str(tmp_path / "set" / "images" / "val" / "000.png")), list)


def test_what_has_no_boxes_cannot_be_measured(tmp_path: Path) -> None:
    """Its average precision would be -1."""
    draw_coco(tmp_path / "set", 4)
    file = next((tmp_path / "set").rglob("*.json"))
    content = json.loads(file.read_text())
    (file.parent / "instances_test.json").write_text(json.dumps(content | {"annotations": []}))
    with pytest.raises(ValueError, match="images to train or measure on must have boxes, but none has any"):
        run(options("detection", tmp_path / "set", tmp_path / "out"))
    assert not (tmp_path / "out.training").exists()


def test_a_detector_that_sees_a_part_cannot_be_measured(tmp_path: Path) -> None:
    draw_coco(tmp_path / "set", 4)
    names = dict(enumerate(sorted(SHAPES)))
    config = MobileNetConfig(width_multiplier=0.1, detector="ssdlite_mobilenet_v2", id2label=names)
    MobileNetForObjectDetection(config).save_pretrained(tmp_path / "model")
    MobileNetImageProcessor(size=64, crop_size=64).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="fit must be stretch for a detector to be measured"):
        evaluate_checkpoint(str(tmp_path / "model"), str(tmp_path / "set"))


def test_categories_count_by_name(tmp_path: Path) -> None:
    """A detector whose labels stand in another order is measured by their names; one that lacks some is refused."""
    draw_coco(tmp_path / "set", 4)
    config = MobileNetConfig(
        width_multiplier=0.1,
        detector="ssdlite_mobilenet_v2",
        id2label=dict(enumerate(("other", *sorted(SHAPES)[::-1]))),
    )
    model = MobileNetForObjectDetection(config)
    processor = MobileNetImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    truths = {}

    class Spy(AveragePrecision):
        def update(self, detections: torch.Tensor, labels: torch.Tensor) -> None:
            truths["classes"] = [self.names[int(v)] for v in labels[..., 0].flatten() if v >= 0]
            super().update(labels[..., [0, 1, 2, 3, 4, 5]], labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mobilenet.training.detection.AveragePrecision", Spy)
        measured = evaluate_checkpoint(str(tmp_path / "model"), str(tmp_path / "set"))
    assert truths["classes"] == [list(SHAPES)[kind] for _, _, objects in draw(4) for kind, _ in objects]
    assert set(measured.by_class) == set(SHAPES)
    config.id2label = {0: "circle", 1: "square"}
    MobileNetForObjectDetection(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="labels that the checkpoint has, circle, square; it has triangle"):
        evaluate_checkpoint(str(tmp_path / "model"), str(tmp_path / "set"))


@pytest.mark.slow
@pytest.mark.any_version
def test_drawn_shapes_are_learned(tmp_path: Path) -> None:
    draw_coco(tmp_path / "set", 20)
    given = {"image_size": 96, "crop_scale": 1.0, "flip": False, "batch_size": 20, "ema": 0.9}
    given |= {"optimizer": "adamw", "learning_rate": 0.04, "epochs": 100, "log_steps": 100}
    assert run(options("detection", tmp_path / "set", tmp_path / "out", **given))
    measured = evaluate_checkpoint(str(tmp_path / "out"), str(tmp_path / "set"))
    assert measured.metrics["mean_average_precision"] >= 0.95


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """SIGTERM at any moment, and the same command ends bit for bit where no one had stopped it."""
    draw_coco(tmp_path / "set", 12)
    given = vars(options("detection", tmp_path, tmp_path, **SHORT, epochs=8, save_steps=3))
    given = {name: given[name] for name in given if name not in ("dataset", "output")}
    work = tmp_path / "killed.training"
    process = start(tmp_path / "set", tmp_path / "killed", given)
    deadline = time.monotonic() + 240
    while not (work / "checkpoint-3").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert int(checkpoints(work)[-1].name.split("-")[1]) < 24, "killed too late to prove anything"
    run(Options(dataset=str(tmp_path / "set"), output=str(tmp_path / "killed"), **given))
    run(Options(dataset=str(tmp_path / "set"), output=str(tmp_path / "undisturbed"), **given))
    for name, tensor in weights(tmp_path / "undisturbed").items():
        assert torch.equal(tensor, weights(tmp_path / "killed")[name]), name


# The plain Trainer


def test_the_plain_trainer_trains_a_detector(tmp_path: Path) -> None:
    """With labels as transformers' detectors take them: the loss falls, and an evaluation gives all batches."""
    processor = MobileNetImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    rows = []
    for image, _, objects in draw(8):
        width, height = image.size
        corners = torch.tensor([box for _, box in objects], dtype=torch.float32)
        sizes = corners[:, 2:]
        boxes = torch.cat([corners[:, :2] + sizes / 2, sizes], -1) / torch.tensor([width, height] * 2)
        labels = {"class_labels": torch.tensor([kind for kind, _ in objects]), "boxes": boxes}
        rows.append({"pixel_values": processor(image, return_tensors="pt")["pixel_values"][0], "labels": labels})

    def collate(batch: list[dict]) -> dict:
        pixel_values = torch.stack([row["pixel_values"] for row in batch])
        return {"pixel_values": pixel_values, "labels": [row["labels"] for row in batch]}

    model = MobileNetForObjectDetection(
        MobileNetConfig(width_multiplier=0.1, detector="ssdlite_mobilenet_v2", num_labels=3, image_size=64)
    )
    arguments = TrainingArguments(
        str(tmp_path / "run"), per_device_train_batch_size=4, per_device_eval_batch_size=4, num_train_epochs=10,
        learning_rate=1e-2, use_cpu=True, remove_unused_columns=False, eval_do_concat_batches=False, report_to="none",
        disable_tqdm=True, save_strategy="no", logging_steps=1, dataloader_pin_memory=False, label_names=["labels"],
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    predicted = trainer.predict(rows)
    assert len(predicted.predictions) == len(predicted.label_ids) == 2
    assert np.isfinite(predicted.metrics["test_loss"])
