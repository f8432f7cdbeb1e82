"""Segmenters in training: variation of masks, mean IoU, what a run starts from, what it leaves."""

import signal
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from colors import start, weights
from huggingface_hub import ModelCard
from PIL import Image
from shapes import SHAPES, draw, draw_scenes, options
from torchmetrics.functional.classification import multiclass_jaccard_index
from transformers import Trainer, TrainingArguments

from mobilenet import (
    MobileNetConfig,
    MobileNetForImageClassification,
    MobileNetForSemanticSegmentation,
    MobileNetImageProcessor,
)
from mobilenet.training.augment import AugmentMasks
from mobilenet.training.data import IMAGE, LABEL, Reader
from mobilenet.training.evaluate import evaluate_checkpoint
from mobilenet.training.options import Options
from mobilenet.training.run import run
from mobilenet.training.segmentation import MeanIou, Segmentation
from mobilenet.training.task import Split
from mobilenet.training.trainer import checkpoints


NAMES = ["ground", *SHAPES]


# How images are varied


def halves(count: int, side: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose pixels say which class they are of, and their masks."""
    random = np.random.default_rng(0)
    masks = np.zeros((count, side, side), np.uint8)
    for mask in masks:
        left, top = random.integers(8, side - 8, 2)
        mask[:, left:] += 1
        mask[top:] += 2
    masks = torch.from_numpy(masks)
    return (masks * 60)[:, None].expand(-1, 3, -1, -1).contiguous(), masks


def test_masks_move_with_their_images() -> None:
    pixels, masks = halves(100)
    varied, moved = AugmentMasks((72, 56), 0.25, True, False)(pixels, masks)
    assert varied.shape == (100, 3, 72, 56)
    assert moved.shape == (100, 72, 56)
    assert moved.dtype == torch.uint8
    ignored = moved == 255
    assert (moved[~ignored] <= 3).all()
    # On edges, the image blends, and the mask does not.
    fits = (varied[:, 0] - 60.0 * moved).abs() < 1
    assert fits[~ignored].float().mean() > 0.95
    assert ((varied[:, 0] - 127.5).abs() < 64)[ignored].all()
    share = ignored.float().mean((1, 2))
    assert 0.2 < (share > 0).float().mean() < 0.8  # half of the logarithms of scales are below 0
    assert 0.6 < share.max() < 0.76


def test_without_options_masks_stay() -> None:
    pixels, masks = halves(8)
    varied, moved = AugmentMasks((64, 64), 1.0, False, False)(pixels, masks)
    torch.testing.assert_close(varied, pixels.float(), rtol=0, atol=1e-3)
    assert torch.equal(moved, masks)
    varied, moved = AugmentMasks((64, 64), 1.0, True, False)(pixels, masks)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(moved, masks, strict=True)]
    assert 0 < sum(mirrored) < 8
    assert AugmentMasks((64, 64), 1.0, False, False)(pixels, masks, (32, 48))[1].shape == (8, 32, 48)
    torch.manual_seed(0)
    varied, moved = AugmentMasks((64, 64), 1.0, False, True)(pixels, masks)
    assert torch.equal(moved, masks)
    assert (varied - pixels).abs().amax((1, 2, 3)).gt(2).sum() >= 2


# How maps are measured


def test_mean_iou_by_hand_and_by_batches() -> None:
    """Pixels of 255 count for nothing, nor do classes that are neither labeled nor predicted."""
    labels = torch.tensor([[[0, 0, 1, 1], [0, 0, 255, 1]]])
    maps = torch.tensor([[[0, 0, 1, 0], [0, 2, 1, 1]]])
    scores = MeanIou(["a", "b", "c", "d"])
    scores.update(maps, labels)
    metrics, by_class, shares = scores.compute()
    assert by_class == [pytest.approx(3 / 5), pytest.approx(2 / 3), 0.0, None]
    assert metrics == {"mean_iou": pytest.approx((3 / 5 + 2 / 3) / 3), "pixel_accuracy": pytest.approx(5 / 7)}
    np.testing.assert_allclose(shares[0], [0.75, 0, 0.25, 0])

    torch.manual_seed(0)
    maps, labels = torch.randint(0, 4, (6, 9, 7)), torch.randint(0, 4, (6, 9, 7))
    labels[torch.rand(labels.shape) < 0.1] = 255
    expected = multiclass_jaccard_index(maps, labels, 4, ignore_index=255)
    scores = MeanIou(["a", "b", "c", "d"])
    for start_at in (0, 2):
        batch = SimpleNamespace(predictions=maps[start_at:][:2], label_ids=labels[start_at:][:2].byte())
        assert scores(batch, compute_result=False) == {}
    last = SimpleNamespace(predictions=maps[4:], label_ids=labels[4:].byte())
    assert scores(last, compute_result=True)["mean_iou"] == pytest.approx(float(expected))
    assert scores(last, compute_result=True)["mean_iou"] != pytest.approx(float(expected))  # it begins anew


def test_one_process_of_several_can_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics of torchmetrics wait for all processes by default, and add up what each of them has."""
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    scores = MeanIou(["a", "b"])
    scores.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 1]]]))
    assert scores.compute()[0]["mean_iou"] == 1


# What a run starts from


def built(names: tuple[str, ...] = ("a", "b"), **kwargs: object) -> tuple[MobileNetForSemanticSegmentation, object]:
    given = Options(dataset="", output="", task="segmentation", **kwargs)
    given.check()
    return Segmentation().build(given, list(names))


def test_segmenters_from_scratch() -> None:
    model, processor = built()
    config = model.config
    assert (config.segmentation_head, config.output_stride, config.image_size) == ("deeplab_v3_light", 16, 513)
    assert (processor.size, processor.do_center_crop) == ({"height": 513, "width": 513}, False)
    assert processor.align_corners
    model, processor = built(architecture="mobilenet_v3_small", image_size=96, output_stride=32)
    assert (model.config.segmentation_head, model.config.output_stride) == ("lraspp", 32)
    assert (processor.size["width"], processor.align_corners) == (96, False)
    with pytest.raises(ValueError, match=r"segmentation_head must be .*deeplab_v3_light.*, got 'unet'"):
        built(segmentation_head="unet")


def test_segmenters_from_checkpoints(tmp_path: Path) -> None:
    """The backbone's weights come along; with other labels, what classifies starts anew, and that alone."""
    classifier = tmp_path / "classifier"
    MobileNetForImageClassification(
        MobileNetConfig(width_multiplier=0.35, num_labels=5, classifier_dropout=0.3)
    ).save_pretrained(classifier)
    MobileNetImageProcessor.from_recipe("torchvision", 64).save_pretrained(classifier)
    model, processor = built(model=str(classifier))
    assert (model.config.segmentation_head, model.config.output_stride) == ("deeplab_v3_light", 16)
    assert model.config.classifier_dropout == 0.1  # the head's, not the classifier's
    before, after = weights(classifier), model.state_dict()
    backbone = [name for name in after if name.startswith("backbone.")]
    assert all(torch.equal(after[name], before[name]) for name in backbone)
    assert processor.image_mean == [0.485, 0.456, 0.406]
    assert built(model=str(classifier), output_stride=8, segmentation_head="lraspp")[0].config.output_stride == 8

    model.config.semantic_loss_ignore_index = 0
    model.save_pretrained(tmp_path / "segmenter")
    processor.save_pretrained(tmp_path / "segmenter")
    again, _ = built(model=str(tmp_path / "segmenter"))
    assert again.config.semantic_loss_ignore_index == 255  # as in masks, whatever the checkpoint has
    assert all(torch.equal(value, after[name]) for name, value in again.state_dict().items())
    other, _ = built(("a", "b", "c"), model=str(tmp_path / "segmenter"))
    changed = {
        name
        for name, value in other.state_dict().items()
        if value.shape != after[name].shape or not torch.equal(value, after[name])
    }
    assert changed == {"segmentation_head.classifier.weight", "segmentation_head.classifier.bias"}
    with pytest.raises(ValueError, match="output_stride must be left out where model is a segmenter"):
        built(model=str(tmp_path / "segmenter"), output_stride=8)


# What a run leaves

SHORT = {"image_size": 65, "width": 0.1, "learning_rate": 0.5}


def test_a_run_leaves_a_complete_repository(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With a card, curves, and figures that `mobilenet evaluate` gets from the files, whatever classes are called."""
    scenes = draw_scenes(tmp_path / "scenes", 10)
    (scenes / "classes.txt").write_text("ground\ncircle\nUS$ & CA$\n$\\foo$\n\x1b]0;x\x07\n")
    given = {**SHORT, "epochs": 2, "validation": 0.2, "first_size": 33, "trivial_augment": True}
    assert run(options("segmentation", scenes, tmp_path / "out", **given))
    out = capsys.readouterr().out
    assert "Note: there are no pixels to train on of \ufffd]0;x\ufffd." in out
    assert "\x1b" not in out
    for name in ("config.json", "model.safetensors", "segmentation_mobilenet.py", "training.json", "log.csv"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert "eval_mean_iou" in (tmp_path / "out" / "log.csv").read_text()
    for name in ("curves.png", "confusion_matrix.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.width > 300
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "image-segmentation"
    assert {result.metric_name for result in card.data.eval_results} == {"mean iou", "pixel accuracy"}
    assert "| class | IoU on held out |" in card.text


def save_segmenter(folder: Path, names: list[str]) -> None:
    config = MobileNetConfig(
        width_multiplier=0.1,
        segmentation_head="deeplab_v3_light",
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    MobileNetForSemanticSegmentation(config).save_pretrained(folder)


class Known(MobileNetForSemanticSegmentation):
    """A segmenter that knows nothing but where the image is bright."""

    def forward(self, pixel_values: torch.Tensor, **kwargs: object) -> SimpleNamespace:
        bright = (pixel_values.mean(1) > 0).long()
        classes = torch.tensor([self.config.label2id["ground"], self.config.label2id["lamp"]])[bright]
        return SimpleNamespace(
            logits=torch.nn.functional.one_hot(classes, self.config.num_labels).movedim(-1, 1).float()
        )


@pytest.mark.parametrize("fit", ["stretch", "corner", "whole"])
def test_evaluation_is_of_whole_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fit: str) -> None:
    """At the images' own sizes, whatever the processor does with them, and by the names of the classes."""
    from mobilenet.preprocessing_mobilenet import FITS

    scenes = tmp_path / "scenes"
    for part in ("images", "masks"):
        (scenes / part).mkdir(parents=True)
    for index, size in enumerate(((96, 64), (64, 128), (32, 32))):
        mask = np.zeros(size[::-1], np.uint8)
        mask[: size[1] // 2, : size[0] // 4] = 1
        Image.fromarray(np.where(mask[..., None], 255, 0).astype(np.uint8).repeat(3, -1)).save(
            scenes / "images" / f"{index}.png"
        )
        Image.fromarray(mask).save(scenes / "masks" / f"{index}.png")
    (scenes / "classes.txt").write_text("ground\nlamp")
    names = ["other", "lamp", "ground"]
    save_segmenter(tmp_path / "model", names)
    processor = MobileNetImageProcessor(**FITS[fit](64, 64))
    processor.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(MobileNetForSemanticSegmentation, "forward", Known.forward)
    measured = evaluate_checkpoint(str(tmp_path / "model"), str(scenes))
    assert (measured.images, measured.task) == (3, "segmentation")
    assert measured.metrics["pixel_accuracy"] > 0.97
    assert measured.by_class["lamp"] > 0.85
    assert list(measured.by_class) == ["ground", "lamp"]
    (scenes / "classes.txt").unlink()  # then the checkpoint's names count
    assert list(evaluate_checkpoint(str(tmp_path / "model"), str(scenes)).by_class) == names
    (scenes / "masks" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"masks/1\.png: not an image"):
        evaluate_checkpoint(str(tmp_path / "model"), str(scenes))
    assert evaluate_checkpoint(str(tmp_path / "model"), str(scenes), skip_unreadable=True).images == 2


def test_a_class_255_of_the_network_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In masks, 255 counts for nothing; a network may have more classes than they can hold."""
    scenes = tmp_path / "scenes"
    for part in ("images", "masks"):
        (scenes / part).mkdir(parents=True)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 1
    Image.fromarray(255 * mask).convert("RGB").save(scenes / "images" / "0.png")
    mask[48:] = 255
    Image.fromarray(mask).save(scenes / "masks" / "0.png")
    names = ["ground", *(f"other {index}" for index in range(254)), "lamp", *map(str, range(44))]
    save_segmenter(tmp_path / "model", names)
    size = {"height": 64, "width": 64}
    MobileNetImageProcessor(size=size, do_center_crop=False).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(MobileNetForSemanticSegmentation, "forward", Known.forward)
    assert len(evaluate_checkpoint(str(tmp_path / "model"), str(scenes)).by_class) == 300
    (scenes / "classes.txt").write_text("ground\nlamp")
    measured = evaluate_checkpoint(str(tmp_path / "model"), str(scenes))
    assert measured.by_class == {"ground": pytest.approx(1, abs=0.05), "lamp": pytest.approx(1, abs=0.05)}


def test_names_of_images_that_are_left_out_cannot_command_a_terminal(capsys: pytest.CaptureFixture) -> None:
    kind = datasets.Image(decode=False)
    rows = datasets.Dataset.from_dict(
        {IMAGE: [{"bytes": None, "path": "\x1b]0;x\x07.png"}], LABEL: [None]},
        datasets.Features({IMAGE: kind, LABEL: kind}),
    )
    processor = MobileNetImageProcessor()
    split = Split(rows, lambda: None, Reader(processor, []), skip_unreadable=True)
    assert not [*Segmentation()._whole(split, processor, 1)]
    assert "left out \ufffd]0;x\ufffd.png: lies outside" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.any_version
def test_drawn_scenes_are_learned(tmp_path: Path) -> None:
    scenes = draw_scenes(tmp_path / "scenes", 20, large=True)
    given = {"image_size": 97, "crop_scale": 1.0, "flip": False, "batch_size": 20, "ema": 0.9}
    given |= {"architecture": "mobilenet_v1", "width": 0.25, "output_stride": 8}
    given |= {"optimizer": "adamw", "learning_rate": 0.04, "epochs": 80, "log_steps": 80}
    assert run(options("segmentation", scenes, tmp_path / "out", **given))
    measured = evaluate_checkpoint(str(tmp_path / "out"), str(scenes))
    assert measured.metrics["mean_iou"] >= 0.95


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """SIGTERM at any moment, and the same command ends bit for bit where no one had stopped it."""
    scenes = draw_scenes(tmp_path / "scenes", 12)
    given = vars(options("segmentation", tmp_path, tmp_path, **SHORT, epochs=8, save_steps=3))
    given = {name: given[name] for name in given if name not in ("dataset", "output")}
    work = tmp_path / "killed.training"
    process = start(scenes, tmp_path / "killed", given)
    deadline = time.monotonic() + 240
    while not (work / "checkpoint-3").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert int(checkpoints(work)[-1].name.split("-")[1]) < 24, "killed too late to prove anything"
    run(Options(dataset=str(scenes), output=str(tmp_path / "killed"), **given))
    run(Options(dataset=str(scenes), output=str(tmp_path / "undisturbed"), **given))
    for name, tensor in weights(tmp_path / "undisturbed").items():
        assert torch.equal(tensor, weights(tmp_path / "killed")[name]), name


# The plain Trainer


def test_the_plain_trainer_trains_a_segmenter(tmp_path: Path) -> None:
    """With masks (B, H, W) as labels, in which 255 counts for nothing."""
    processor = MobileNetImageProcessor(size={"height": 65, "width": 65}, do_center_crop=False)
    rows = []
    for image, mask, _ in draw(8):
        labels = torch.from_numpy(np.array(mask.resize((65, 65), 0))).long()
        labels[:4] = 255
        rows.append({"pixel_values": processor(image, return_tensors="pt")["pixel_values"][0], "labels": labels})
    model = MobileNetForSemanticSegmentation(
        MobileNetConfig(
            width_multiplier=0.1, segmentation_head="deeplab_v3_light", output_stride=16, num_labels=4, image_size=65
        )
    )
    arguments = TrainingArguments(
        str(tmp_path / "run"), per_device_train_batch_size=4, num_train_epochs=10, learning_rate=1e-2, use_cpu=True,
        remove_unused_columns=False, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    predicted = trainer.predict(rows)
    assert predicted.predictions.shape[:2] == (8, 4)
    assert predicted.label_ids.shape == (8, 65, 65)
