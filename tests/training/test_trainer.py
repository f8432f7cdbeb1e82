"""The training loop: what trains and what decays, averages, balance, checkpoints."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from colors import options, weights
from oracles import randomize_norms
from torch import nn

from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor
from mobilenet.training import run as training
from mobilenet.training.augment import Augment, Normalize
from mobilenet.training.data import (
    Images,
)
from mobilenet.training.options import Options
from mobilenet.training.run import run
from mobilenet.training.trainer import (
    ClassifierTrainer,
    freeze,
    make_optimizer,
    parameter_groups,
    whole_batches,
)


def test_a_checkpoint_is_complete_or_absent(colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies while it writes a checkpoint leaves none by that name."""

    def die(self: ClassifierTrainer, folder: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(ClassifierTrainer, "_save_rng_state", die)
        with pytest.raises(KeyboardInterrupt):
            run(options(colors, tmp_path / "out", epochs=1))
    assert not (tmp_path / "out.training").exists()  # nothing to go on from, so nothing stays
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("last_stages", [0, 2])
def test_what_is_frozen_does_not_move(colors: Path, tmp_path: Path, last_stages: int) -> None:
    """Neither weights nor statistics of frozen parts change, by a bit; all the others do."""
    source, output = tmp_path / "source", tmp_path / "out"
    model = MobileNetForImageClassification(MobileNetConfig(width_multiplier=0.1, image_size=64, num_labels=5))
    model.save_pretrained(source)
    MobileNetImageProcessor(size=64, crop_size=64).save_pretrained(source)
    run(
        options(
            colors, output, model=str(source), last_stages=last_stages, epochs=1, learning_rate=1.0, image_size=None
        )
    )
    before, after = weights(source), weights(output)
    assert after["classifier.weight"].shape[0] == 3  # the old classifier had other labels, and was replaced
    learns = (
        ["classifier."]
        if last_stages == 0
        else ["classifier.", "backbone.head.", "backbone.stages.3", "backbone.stages.4"]
    )
    for name in before.keys() - {"classifier.weight", "classifier.bias"}:
        moved = not torch.equal(before[name], after[name])
        assert moved == name.startswith(tuple(learns)), name


def test_last_stages_must_exist() -> None:
    model = MobileNetForImageClassification(MobileNetConfig(width_multiplier=0.1))
    with pytest.raises(ValueError, match="last_stages must be an integer from 0 to 5, got 6"):
        freeze(model, 6)


def test_what_decays() -> None:
    """Convolutions but no depthwise ones, and the classifier: counted by hand for V2's 17 blocks."""
    model = MobileNetForImageClassification(MobileNetConfig(num_labels=10))
    decaying, others = parameter_groups(model, 4e-5)
    assert (decaying["weight_decay"], others["weight_decay"]) == (4e-5, 0)
    # stem, 16 expansions, 17 projections, head, classifier
    assert len(decaying["params"]) == 1 + 16 + 17 + 1 + 1
    # 17 depthwise kernels, weight and bias of 52 norms, bias of the classifier
    assert len(others["params"]) == 17 + 2 * 52 + 1
    assert sum(p.numel() for g in (decaying, others) for p in g["params"]) == sum(
        p.numel() for p in model.parameters()
    )


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adamw"])
def test_optimizers_decay_what_shall_decay(name: str, tmp_path: Path) -> None:
    """A step without gradients shrinks weights that decay, and leaves the others alone."""
    model = MobileNetForImageClassification(MobileNetConfig(width_multiplier=0.1, num_labels=3))
    before = {key: value.clone() for key, value in model.named_parameters()}
    given = Options(dataset="", output="", optimizer=name)
    optimizer = make_optimizer(parameter_groups(model, 0.1), given, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, value in model.named_parameters():
        decays = key == "classifier.weight" or (key.endswith("conv.weight") and "depthwise" not in key)
        assert torch.equal(value, before[key]) != decays, key


def trainer_of(
    tmp_path: Path, labels: list[int], teacher: nn.Module | None = None, **kwargs: object
) -> ClassifierTrainer:
    """A trainer on random pixels."""
    model = MobileNetForImageClassification(
        MobileNetConfig(width_multiplier=0.1, num_labels=3, classifier_dropout=0.0)
    )
    given = options(tmp_path, tmp_path / "out", batch_size=4, **kwargs)
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 3, 32, 32), np.uint8)
    images = Images(pixels, np.array(labels))
    arguments = training.training_arguments(given, len(labels), 1, False)
    processor = MobileNetImageProcessor()
    augment = Augment((32, 32), given.crop_scale, given.flip, given.trivial_augment, given.erasing)
    return ClassifierTrainer(model, arguments, given, images, None, augment, Normalize(processor), teacher=teacher)


def test_balancing(tmp_path: Path) -> None:
    """Weights make classes count alike in the loss; sampling draws them alike often."""
    labels = [0] * 60 + [1] * 30 + [2] * 10
    trainer = trainer_of(tmp_path, labels, balance="weights", label_smoothing=0.0, crop_scale=1.0, flip=False)
    torch.testing.assert_close(trainer.class_weights, torch.tensor([100 / 180, 100 / 90, 100 / 30]))
    batch = trainer.train_dataset.__getitems__([0, 65, 95])
    model = trainer.model.train()
    with torch.no_grad():
        loss = trainer.compute_loss(model, batch)
        logits = model(pixel_values=trainer.normalize(batch["pixels"])).logits
        each = F.cross_entropy(logits, batch["labels"], reduction="none")
    torch.testing.assert_close(loss, (each * trainer.class_weights).mean())

    trainer = trainer_of(tmp_path, labels, balance="sampling")
    drawn = torch.tensor([labels[index] for _ in range(30) for index in trainer._get_train_sampler()])
    shares = torch.bincount(drawn) / len(drawn)
    # 100 draws, the same each epoch: a standard deviation is 0.047.
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), rtol=0, atol=0.15)


def test_whole_batches() -> None:
    assert [whole_batches(count, 16) for count in (5, 16, 31, 32)] == [5, 16, 16, 32]


def test_the_average_is_the_moving_average(tmp_path: Path) -> None:
    """After three steps, by hand: decays 2/11, 3/12 and so on, and never above the one that is set."""
    trainer = trainer_of(tmp_path, [0, 1, 2, 0], ema=0.26)
    parameter, average = trainer.model.classifier.bias, trainer.average.module.classifier.bias
    values = [torch.randn(3) for _ in range(4)]
    for step, value in enumerate(values):
        parameter.data.copy_(value)
        trainer.state.global_step = step + 1
        trainer.average.update_parameters(trainer.model)
    expected = values[0]
    for decay, value in zip((3 / 12, 0.26, 0.26), values[1:], strict=True):
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average.data, expected)
    with trainer.averaged_weights():
        torch.testing.assert_close(parameter.data, expected)
    assert torch.equal(parameter.data, values[-1])


def test_images_grow(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [0, 1, 2, 0], first_size=8, epochs=12)
    sides = []
    for epoch in range(12):
        trainer.state.epoch = float(epoch)
        sides.append(trainer._size()[0])
    # 24 pixels in 9 epochs, 8 at a time
    assert sides == [8, 8, 8, 16, 16, 16, 24, 24, 24, 32, 32, 32]


@pytest.mark.slow
def test_what_the_checkpoint_knows_is_retained(colors: Path, tmp_path: Path) -> None:
    """Its own classifier, on the trained features, predicts more as before; nothing else is saved."""
    source = tmp_path / "source"
    torch.manual_seed(3)  # of random networks, one that forgets much
    start = randomize_norms(
        MobileNetForImageClassification(MobileNetConfig(width_multiplier=0.1, image_size=64, num_labels=40))
    )
    torch.nn.init.normal_(start.classifier.weight)
    start.save_pretrained(source)
    processor = MobileNetImageProcessor(size=64, crop_size=64)
    processor.save_pretrained(source)
    images = processor([*map(str, sorted((colors / "test").rglob("*.png")))], return_tensors="pt")["pixel_values"]
    changes = []
    for retain in (0.0, 30.0):
        output = tmp_path / f"retain-{retain}"
        given = {"epochs": 8, "image_size": None, "learning_rate": 0.01, "precision": "float32"}
        run(options(colors, output, model=str(source), retain=retain, **given))
        assert weights(output).keys() == weights(source).keys()
        model = MobileNetForImageClassification.from_pretrained(output).eval()
        with torch.no_grad():
            expected = start.eval()(images).logits.softmax(1)
            found = start.classifier(model.backbone(images).pooler_output).softmax(1)
        changes.append((found - expected).abs().sum(1).mean().item())
    assert changes[1] < 0.5 * changes[0]


def test_what_is_forgotten_by_hand(tmp_path: Path) -> None:
    """T^2 * sum p * log(p / q) of probabilities at temperature T = 2, of the teacher and of its classifier."""
    options = {"width_multiplier": 0.1, "num_labels": 7, "classifier_dropout": 0.5}
    teacher = randomize_norms(MobileNetForImageClassification(MobileNetConfig(**options))).eval()
    torch.nn.init.normal_(teacher.classifier.weight)
    trainer = trainer_of(tmp_path, [0, 1, 2, 0], teacher=deepcopy(teacher))
    pixels = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        p = (teacher(pixels).logits / 2).softmax(1)
        model = randomize_norms(trainer.model).eval()
        q = (teacher.classifier(model.backbone(pixels).pooler_output) / 2).softmax(1)
        model(pixels)
        expected = 4 * (p * (p / q).log()).sum(1).mean()
        torch.testing.assert_close(trainer._forgotten(pixels), expected, rtol=1e-3, atol=1e-5)
        model.load_state_dict({k: v for k, v in teacher.state_dict().items() if "classifier" not in k}, strict=False)
        model(pixels)
        assert trainer._forgotten(pixels) < 1e-5


def test_what_is_forgotten_in_mixed_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs beside the network has the network's types: a step gives a loss like that of single precision."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # transformers before 5 sets it for all that comes later
    losses = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        teacher = randomize_norms(MobileNetForImageClassification(MobileNetConfig(width_multiplier=0.1, num_labels=7)))
        torch.nn.init.normal_(teacher.classifier.weight, std=0.2)
        given = {"retain": 1.0, "precision": precision, "epochs": 1, "log_steps": 1}
        trainer = trainer_of(tmp_path, [0, 1, 2, 0], teacher=teacher, model=str(tmp_path), **given)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] > 2  # 1.1 is cross entropy
    assert losses[1] == pytest.approx(losses[0], rel=0.4)  # the last norms see four numbers for each channel
    assert losses[1] != losses[0]


@pytest.mark.parametrize("first_size", [None, 16])
def test_training_starts_from_what_the_checkpoint_predicts(tmp_path: Path, first_size: int | None) -> None:
    """Once aligned, the loss in training is the loss in evaluation; no random number is used up."""
    trainer = trainer_of(
        tmp_path, [0, 1, 2, 0, 2, 1, 0], crop_scale=1.0, flip=False, label_smoothing=0.0, first_size=first_size
    )
    model = randomize_norms(trainer.model)
    images = trainer.train_dataset.images.batch(range(7))
    size = (32, 32) if first_size is None else (first_size, first_size)
    resized = F.interpolate(images["pixels"].float(), size, mode="bilinear")
    with torch.no_grad():
        expected = model.eval()(trainer.normalize(resized)).logits
        expected = F.cross_entropy(expected, images["labels"]).item()
        copy = deepcopy(model).train()
        assert trainer.compute_loss(copy, images).item() != pytest.approx(expected, rel=1e-2)
        state = torch.get_rng_state()
        trainer.align_batch_norm()
        assert torch.equal(torch.get_rng_state(), state)
        assert trainer.compute_loss(model.train(), images).item() == pytest.approx(expected, rel=1e-4)
