"""Training from the command: what it learns, what it leaves, what it survives, what it refuses."""

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from oracles import randomize_norms
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import pipeline
from typer import Typer
from typer.testing import CliRunner

from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor
from mobilenet.cards import Start, write_card
from mobilenet.cli import app
from mobilenet.cli.evaluate import evaluate
from mobilenet.cli.train import train
from mobilenet.repository import claimed
from mobilenet.training import run as training
from mobilenet.training.augment import Augment, Normalize, mix
from mobilenet.training.data import (
    IMAGE,
    LABEL,
    Images,
    Order,
    Storage,
    check_classes,
    decode,
    folders_of,
    hold_out,
    load_splits,
)
from mobilenet.training.evaluate import evaluate_checkpoint
from mobilenet.training.options import Options
from mobilenet.training.report import class_accuracies, metrics
from mobilenet.training.run import run, start_classifier
from mobilenet.training.trainer import (
    ClassifierTrainer,
    checkpoints,
    freeze,
    make_optimizer,
    parameter_groups,
    whole_batches,
)


ROOT = Path(__file__).parents[2]
COLORS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 50, 40)}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let datasets keep its files where the test does."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def paint(folder: Path, count: int, seed: int = 0) -> Path:
    """Noisy images of 24x20 pixels, a folder for each of three colors."""
    generator = np.random.default_rng(seed)
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.normal(color, 30, (20, 24, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:03}.png")
    return folder


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    """A folder with images to train on and images to test on."""
    paint(tmp_path / "colors" / "train", 22)
    paint(tmp_path / "colors" / "test", 5, seed=1)
    return tmp_path / "colors"


def options(dataset: Path, output: Path, **kwargs: object) -> Options:
    """A small network and few steps."""
    from_scratch = {} if "model" in kwargs else {"width": 0.1, "crop_fraction": 1.0}
    return Options(
        dataset=str(dataset),
        output=str(output),
        **{
            **from_scratch,
            "image_size": 64,
            "epochs": 3,
            "batch_size": 12,
            "learning_rate": 0.3,
            "precision": "float32",
            **kwargs,
        },
    )


def weights(repository: Path) -> dict[str, torch.Tensor]:
    return load_file(repository / "model.safetensors")


# What a run leaves


def test_a_run_leaves_a_complete_repository_that_has_learned(tmp_path: Path) -> None:
    """Weights, code, processor, labels, card, log and images; the card's figure is what the files score."""
    colors, output = tmp_path / "colors", tmp_path / "out"
    paint(colors / "train", 60)
    paint(colors / "test", 5, seed=1)
    assert run(options(colors, output, epochs=6, batch_size=16, erasing=0.2))
    assert not (tmp_path / "out.training").exists()

    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "training.json"):
        assert (output / name).stat().st_size > 0
    for part in ("architectures", "configuration", "cpu", "image_processing", "layers", "modeling"):
        name = f"{part}_mobilenet.py"
        assert (output / name).read_bytes() == (ROOT / name).read_bytes()
    for name in ("curves.png", "confusion_matrix.png"):
        with Image.open(output / name) as image:
            assert image.width > 300
            assert np.asarray(image.convert("L")).std() > 5
    assert list((output / "runs").glob("events.out.tfevents.*"))
    with (output / "log.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert [row["epoch"] for row in rows if row["eval_accuracy"]] == [f"{epoch}.0" for epoch in range(1, 7)]
    assert losses[-1] < 0.8 * losses[0]

    # By a way of its own: the pipeline, on files.
    classify = pipeline("image-classification", model=str(output), trust_remote_code=False)
    files = sorted((colors / "test").glob("*/*.png"))
    right = sum(classify(str(file))[0]["label"] == file.parent.name for file in files)
    assert right >= 0.8 * len(files)

    measured = evaluate_checkpoint(str(output), str(colors))
    assert (measured.split, measured.images) == ("test", 15)
    assert measured.metrics["accuracy"] == pytest.approx(right / len(files))
    assert measured.on_card == pytest.approx(right / len(files), abs=1e-6)
    assert np.mean(list(measured.by_class.values())) == pytest.approx(measured.metrics["balanced_accuracy"])
    results = ModelCard.load(output / "README.md").data.eval_results
    assert {(r.dataset_split, r.metric_name) for r in results} >= {("test", "accuracy"), ("held out", "accuracy")}


@pytest.mark.parametrize("architecture", ["mobilenet_v2", "mobilenet_v3_small", "mobilenet_v4_conv_small"])
def test_every_generation_learns_from_scratch_and_goes_on(architecture: str, tmp_path: Path) -> None:
    colors = paint(tmp_path / "colors" / "train", 40).parent
    paint(colors / "test", 10, seed=1)
    given = {"validation": 0.0, "batch_size": 20, "crop_scale": 1.0, "log_steps": 1}
    assert run(
        options(colors, tmp_path / "out", architecture=architecture, width=0.25, epochs=8, learning_rate=0.1, **given)
    )
    learned = evaluate_checkpoint(str(tmp_path / "out"), str(colors)).metrics["accuracy"]
    assert learned >= 0.6  # of three colors
    tuned = {"model": str(tmp_path / "out"), "epochs": 2, "learning_rate": 0.003, **given}
    assert run(options(colors, tmp_path / "tuned", **tuned))
    assert MobileNetConfig.from_pretrained(tmp_path / "tuned").architecture == architecture
    assert evaluate_checkpoint(str(tmp_path / "tuned"), str(colors)).metrics["accuracy"] >= learned - 0.1


def test_the_record_repeats_the_run(colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration beside the weights gives the same options, and its command too; both can be overridden."""
    given = options(colors, tmp_path / "out", epochs=1, flip=False, balance="sampling", overwrite=True)
    run(given)
    record = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    assert record["versions"]["torch"] == torch.__version__

    seen = []
    monkeypatch.setattr(training, "run", lambda options: seen.append(options) or True)
    app = Typer()
    app.command("train")(train)
    app.command("evaluate")(evaluate)
    config = ["--config", str(tmp_path / "out" / "training.json")]
    for arguments in (
        ["train", *config],
        ["train", *config, "--epochs", "9", "--flip"],
        record["command"].removeprefix("mobilenet ").split(),
    ):
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    again, changed, by_command = seen
    given.overwrite = False  # what concerns one run alone is not repeated
    assert again == given
    assert (changed.epochs, changed.flip, changed.balance) == (9, True, "sampling")
    given.overwrite = True
    assert by_command == given


# What it survives

SCRIPT = """
import sys, datasets, torch
torch.set_num_threads(1)
datasets.config.HF_DATASETS_CACHE = sys.argv[1]
from mobilenet.training.options import Options
from mobilenet.training.run import run
run(Options(dataset=sys.argv[2], output=sys.argv[3], **eval(sys.argv[4])))
"""


def start(dataset: Path, output: Path, given: dict, *launcher: str) -> subprocess.Popen:
    """A run in a process of its own."""
    script = output.with_suffix(".py")
    script.write_text(SCRIPT, encoding="utf-8")
    arguments = [*launcher, str(script), str(output.with_suffix(".cache")), str(dataset), str(output), repr(given)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_in_mid_epoch_it_goes_on_to_the_same_weights(colors: Path, tmp_path: Path) -> None:
    """SIGKILL leaves a complete checkpoint, and the same command ends bit for bit where no one had killed it."""
    given = vars(options(colors, tmp_path, epochs=24, save_steps=3, erasing=0.3, mixup=0.2, first_size=16))
    given = {name: given[name] for name in given if name not in ("dataset", "output")}
    work = tmp_path / "killed.training"
    process = start(colors, tmp_path / "killed", given)
    deadline = time.monotonic() + 240
    # An epoch has 4 steps: a checkpoint at step 9 lies within one.
    while not (work / "checkpoint-9").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = checkpoints(work)
    assert found
    # The newest is what the command goes on from; an older one may have been on its way out.
    for name in ("model.safetensors", "average.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert (found[-1] / name).exists()
    step = int(found[-1].name.split("-")[1])
    assert step < 96, "killed too late to prove anything"

    run(Options(dataset=str(colors), output=str(tmp_path / "killed"), **given))
    run(Options(dataset=str(colors), output=str(tmp_path / "undisturbed"), **given))
    resumed, undisturbed = weights(tmp_path / "killed"), weights(tmp_path / "undisturbed")
    assert resumed.keys() == undisturbed.keys()
    for name in resumed:
        assert torch.equal(resumed[name], undisturbed[name]), name


def test_what_another_run_decoded_is_not_trained_on(colors: Path, tmp_path: Path) -> None:
    """A run that was killed while it decoded left images that a run with other options has no use for."""
    given = {"epochs": 1, "validation": 0.0}
    work = tmp_path / "out.training"
    work.mkdir()
    other = training._record(options(colors, tmp_path / "out", seed=1, **given), 1)
    (work / "training.json").write_text(json.dumps(other), encoding="utf-8")
    np.save(work / "train.npy", np.zeros((3, 3, 8, 8), np.uint8))
    np.save(work / "train.labels.npy", np.arange(3))
    with pytest.raises(ValueError, match=r"other options: seed \(was 1\)"):
        run(options(colors, tmp_path / "out", **given))
    assert run(options(colors, tmp_path / "out", restart=True, **given))
    assert run(options(colors, tmp_path / "whole", **given))
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "out")[name]), name


def test_a_folder_of_another_kind_is_not_taken_for_an_unfinished_run(colors: Path, tmp_path: Path) -> None:
    shutil.copytree(colors, tmp_path / "out.training")
    for restart in (False, True):
        with pytest.raises(
            ValueError, match=r"out\.training must be free for the unfinished run, but holds something"
        ):
            run(options(tmp_path / "out.training", tmp_path / "out", restart=restart))
    assert (tmp_path / "out.training" / "train" / "red" / "000.png").exists()


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


def test_a_time_limit_stops_with_a_checkpoint(colors: Path, tmp_path: Path) -> None:
    """The same command goes on to the weights of an unlimited run; other options are refused, or start anew."""
    given = {"epochs": 2, "erasing": 0.3}
    assert not run(options(colors, tmp_path / "limited", time_limit=1e-9, **given))
    work = tmp_path / "limited.training"
    assert [path.name for path in checkpoints(work)] == ["checkpoint-1"]
    assert not (tmp_path / "limited").exists()
    with pytest.raises(ValueError, match=r"other options: epochs \(was 2\)"):
        run(options(colors, tmp_path / "limited", **{**given, "epochs": 3}))
    assert run(options(colors, tmp_path / "limited", keep_checkpoints=True, **given))
    assert [path.name for path in checkpoints(work)] == ["checkpoint-4", "checkpoint-8"]
    assert run(options(colors, tmp_path / "whole", **given))
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "limited")[name]), name


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(colors: Path, tmp_path: Path) -> None:
    """torchrun with two processes (gloo) gives the weights and metrics of one process with twice the batch.

    With norms in eval mode and nothing random, they are equal but for rounding; norms that train see half the batch.
    """
    source = tmp_path / "source"
    model = MobileNetForImageClassification(
        MobileNetConfig(width_multiplier=0.1, image_size=64, num_labels=3, classifier_dropout=0.0)
    )
    model.save_pretrained(source)
    MobileNetImageProcessor(size=64, crop_size=64).save_pretrained(source)
    given = {
        "model": str(source),
        "last_stages": 0,
        "epochs": 2,
        "learning_rate": 0.5,
        "crop_scale": 1.0,
        "flip": False,
        "precision": "float32",
        "ema": 0.9,
    }
    one = start(colors, tmp_path / "one", {**given, "batch_size": 16})
    two = start(
        colors, tmp_path / "two", {**given, "batch_size": 8}, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--standalone",
    )  # fmt: skip
    for process in (one, two):
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    logs = []
    for name in ("one", "two"):
        with (tmp_path / name / "log.csv").open(encoding="utf-8") as file:
            logs.append(list(csv.DictReader(file)))
    for one, two in zip(*logs, strict=True):
        assert (one["step"], one["eval_accuracy"]) == (two["step"], two["eval_accuracy"])
        # In eval_loss, the Trainer counts images twice that fill up the last batch of a process.
        for key, tolerance in (("loss", 1e-4), ("learning_rate", 1e-9), ("eval_loss", 0.2)):
            assert bool(one[key]) == bool(two[key])
            if one[key]:
                assert float(one[key]) == pytest.approx(float(two[key]), rel=tolerance)
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert not torch.equal(ours["classifier.weight"], model.classifier.weight)
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-4, atol=1e-6)


# What it starts from


def test_a_classifier_starts_from_the_classes_that_its_labels_cover(tmp_path: Path) -> None:
    model = MobileNetForImageClassification(MobileNetConfig(width_multiplier=0.35, id2label={0: "cat", 1: "dog"}))
    source = nn.Linear(model.classifier.in_features, 5)
    file = tmp_path / "kinds.json"
    file.write_text('{"dog": [4], "cat": [0, 3]}')
    start_classifier(model, source, file)
    expected = torch.stack([(source.weight[0] + source.weight[3]) / 2, source.weight[4]])
    torch.testing.assert_close(model.classifier.weight, expected)
    torch.testing.assert_close(model.classifier.bias[1], source.bias[4])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "start_labels must be a JSON file"),
        ('{"cat": [0]}', "start_labels must name each of the labels cat, dog and no other"),
        ('{"cat": [0], "dog": [5]}', r"start_labels must give dog a list of classes from 0 to 4, got \[5\]"),
        ('{"cat": [], "dog": [1]}', r"start_labels must give cat a list of classes from 0 to 4, got \[\]"),
    ],
)
def test_start_labels_that_do_not_fit_are_named(content: str, message: str, tmp_path: Path) -> None:
    model = MobileNetForImageClassification(MobileNetConfig(width_multiplier=0.35, id2label={0: "cat", 1: "dog"}))
    (tmp_path / "kinds.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        start_classifier(model, nn.Linear(model.classifier.in_features, 5), tmp_path / "kinds.json")


def test_optimizer_and_rate_by_default() -> None:
    """SGD from scratch, AdamW from a checkpoint, each at its own rate; what is given goes first."""
    given = {"dataset": "", "output": ""}
    scratch, checkpoint = Options(**given), Options(**given, model="m")
    assert (scratch.chosen_optimizer, scratch.peak_learning_rate) == ("sgd", 0.1)
    assert (checkpoint.chosen_optimizer, checkpoint.peak_learning_rate) == ("adamw", 0.003)
    assert Options(**given, model="m", optimizer="sgd").peak_learning_rate == 0.02
    assert Options(**given, model="m", learning_rate=0.5).peak_learning_rate == 0.5


def test_a_checkpoint_s_preprocessing_can_be_changed(tmp_path: Path) -> None:
    MobileNetForImageClassification(MobileNetConfig(width_multiplier=0.35, num_labels=2)).save_pretrained(tmp_path)
    MobileNetImageProcessor().save_pretrained(tmp_path)  # 256, cropped to 224
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: someone/else\n---\n")

    def built(**kwargs: object) -> tuple[int, int, int | None, int]:
        model, processor = training._build(Options(dataset="", output="", model=str(tmp_path), **kwargs), ["a", "b"])
        size = processor.size["shortest_edge"], processor.crop_size["height"]
        return *size, processor.detail_size, model.config.image_size

    assert built() == (256, 224, None, 224)
    assert built(image_size=112) == (128, 112, None, 112)
    assert built(image_size=64, crop_fraction=1.0, detail_size=32) == (64, 64, 32, 64)
    start = Start.of(str(tmp_path))
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert start == (tmp_path.name, digest, "mit", "someone/else")


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


@pytest.mark.slow
def test_a_run_aligns_a_checkpoint_once(colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from scratch, not when it is resumed, and not where it is told not to."""
    counts = []
    align = ClassifierTrainer.align_batch_norm
    monkeypatch.setattr(ClassifierTrainer, "align_batch_norm", lambda self: counts.append(align(self)))
    given = {"model": str(tmp_path / "scratch"), "epochs": 1, "learning_rate": 0.01}

    def aligned(name: str, **kwargs: object) -> int:
        counts.clear()
        run(options(colors, tmp_path / name, **{**given, **kwargs}))
        return len(counts)

    run(options(colors, tmp_path / "scratch", epochs=1))
    assert not counts
    assert aligned("whole") == 1
    assert aligned("limited", time_limit=1e-9) == 1
    assert aligned("limited") == 0
    assert aligned("plain", align_norms=False) == 0
    whole, limited, plain = (weights(tmp_path / name) for name in ("whole", "limited", "plain"))
    for name, tensor in whole.items():
        assert torch.equal(limited[name], tensor), name
    assert not torch.equal(plain["backbone.stem.norm.weight"], whole["backbone.stem.norm.weight"])


# What trains and what does not


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


def trainer_of(tmp_path: Path, labels: list[int], **kwargs: object) -> ClassifierTrainer:
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
    return ClassifierTrainer(model, arguments, given, images, None, augment, Normalize(processor))


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


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    epoch = 0
    order = Order(10, 8, 7, lambda: epoch)
    first = list(order)
    assert first == list(order)
    assert len(first) == len(set(first)) == len(order) == 8
    epoch = 1
    assert list(order) != first
    assert list(Order(10, 8, 8, lambda: 0)) != first


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


# Images


def test_training_and_evaluation_see_what_the_processor_gives(colors: Path, tmp_path: Path) -> None:
    """Decoded bytes, normalized, are the processor's own pixel_values; training keeps the center square."""
    processor = MobileNetImageProcessor.from_recipe("torchvision", 16)
    rows = load_splits(str(colors))["test"]
    images = decode(rows, processor, Storage(tmp_path), "test")
    files = sorted((colors / "test").glob("*/*.png"))
    expected = processor(files, return_tensors="pt")["pixel_values"]
    actual = Normalize(processor)(torch.from_numpy(images.pixels))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert images.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert rows.features[LABEL].names == ["blue", "green", "red"]

    square = decode(rows, processor, Storage(tmp_path), "train", square=20)
    crop = np.asarray(Image.open(files[0]))[:, 2:22]
    assert np.array_equal(square.pixels[0], np.moveaxis(crop, -1, 0))


def test_images_that_outgrow_memory_lie_in_a_file(colors: Path, tmp_path: Path) -> None:
    """The file serves other processes and a resumed run, and an incomplete one does not."""
    processor = MobileNetImageProcessor(size=16, crop_size=16)
    rows = load_splits(str(colors))["test"]
    storage = Storage(tmp_path / "work", shared=True)
    assert storage.find("test") is None
    images = decode(rows, processor, storage, "test")
    assert isinstance(images.pixels, np.memmap)
    in_memory = decode(rows, processor, Storage(tmp_path), "test")
    found = storage.find("test")
    for one in (images, found):
        assert np.array_equal(one.pixels, in_memory.pixels)
        assert np.array_equal(one.labels, in_memory.labels)
    assert torch.equal(found.batch([3, 1])["pixels"], torch.from_numpy(in_memory.pixels[[3, 1]]))
    (tmp_path / "work" / "test.labels.npy").unlink()
    assert storage.find("test") is None


def test_variation() -> None:
    """Without options nothing varies; with them, sizes and ranges hold and images differ."""
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(Augment((32, 32), 1.0, False, False, 0.0)(pixels), pixels.float(), rtol=0, atol=1e-4)
    mirrored = Augment((32, 32), 1.0, True, False, 0.0)(pixels)
    kept = [torch.allclose(a, b.float(), atol=1e-3) for a, b in zip(mirrored, pixels, strict=True)]
    turned = [torch.allclose(a, b.float().flip(-1), atol=1e-3) for a, b in zip(mirrored, pixels, strict=True)]
    assert [a != b for a, b in zip(kept, turned, strict=True)] == [True] * 16
    assert 0 < sum(kept) < 16
    varied = Augment((24, 28), 0.3, True, True, 0.5)(pixels)
    assert varied.shape == (16, 3, 24, 28)
    assert 0 <= varied.min() < varied.max() <= 255
    constant = torch.full((8, 3, 32, 32), 77, dtype=torch.uint8)
    torch.testing.assert_close(Augment((16, 16), 0.3, True, False, 0.0)(constant), torch.full((8, 3, 16, 16), 77.0))


def test_crops_are_boxes_of_the_image() -> None:
    """Pixels that hold their own place tell which box a crop shows: its area, its shape, and that it is straight."""
    place = torch.arange(64.0) + 0.5
    pixels = torch.stack([place.expand(64, 64), place[:, None].expand(64, 64)]).expand(400, 2, 64, 64)
    crops = Augment((32, 48), 0.3, True, False, 0.0)(pixels)
    across, down = crops[:, 0], crops[:, 1]
    torch.testing.assert_close(across, across[:, :1].expand_as(across), rtol=0, atol=1e-3)
    torch.testing.assert_close(down, down[:, :, :1].expand_as(down), rtol=0, atol=1e-3)
    # Between the middles of two pixels; those at the border repeat.
    width = (across[:, 0, 30] - across[:, 0, 17]) / 13 * 48
    height = (down[:, 20, 0] - down[:, 11, 0]) / 9 * 32
    assert 0.4 < (width < 0).float().mean() < 0.6  # mirrored
    area, ratio = width.abs() * height / 64**2, width.abs() / height
    assert 0.2 < area.min() < 0.35
    assert 0.95 < area.max() <= 1.001
    assert 0.74 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.34
    middle = across[:, 0, 23:25].mean(-1)
    assert middle.min() < 26
    assert middle.max() > 38


def test_small_sizes_are_averaged_not_sampled() -> None:
    stripes = (torch.arange(64) % 2 * 255.0).expand(4, 3, 64, 64)
    small = Augment((64, 64), 1.0, False, False, 0.0)(stripes, (16, 16))
    assert small.shape == (4, 3, 16, 16)
    assert (small - 127.5).abs().max() < 40


def test_mixup_blends_images_and_targets_alike() -> None:
    pixels = torch.arange(6.0).view(6, 1, 1, 1)
    mixed, targets = mix(pixels, torch.eye(6), 1.0)
    torch.testing.assert_close(targets.sum(-1), torch.ones(6))
    torch.testing.assert_close((targets * torch.arange(6.0)).sum(-1), mixed.flatten())
    assert not torch.equal(mixed, pixels)


def test_hold_out_takes_the_same_share_of_every_class() -> None:
    rows = datasets.Dataset.from_dict(
        {IMAGE: list(range(100)), LABEL: [0] * 60 + [1] * 30 + [2] * 10},
        datasets.Features({IMAGE: datasets.Value("int64"), LABEL: datasets.ClassLabel(names=["a", "b", "c"])}),
    )
    kept, held = hold_out(rows, 0.2, seed=0)
    assert np.bincount(held[LABEL][:]).tolist() == [12, 6, 2]
    assert sorted(kept[IMAGE][:] + held[IMAGE][:]) == list(range(100))
    assert held[IMAGE][:] == hold_out(rows, 0.2, seed=0)[1][IMAGE][:]


def parquet(path: Path, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return path


def png(color: tuple[int, int, int] = (9, 9, 9)) -> dict:
    import io

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def images(*images: dict) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"img": list(images)}).cast_column("img", datasets.Image(decode=False))


def test_datasets_of_other_forms(tmp_path: Path) -> None:
    """A parquet file; a folder of them by split; names or integers as labels; columns of other names."""
    table = images(png(), png(), png()).add_column("fine_label", ["b", "a", "b"]).add_column("id", [1, 2, 3])
    table.to_parquet(tmp_path / "one.parquet")
    splits = load_splits(str(tmp_path / "one.parquet"))
    assert splits["train"].column_names == [IMAGE, LABEL]
    assert splits["train"].features[LABEL].names == ["a", "b"]
    assert splits["train"][LABEL][:] == [1, 0, 1]

    numbered = images(png(), png()).add_column("label", [0, 2])
    (tmp_path / "many").mkdir()
    numbered.to_parquet(tmp_path / "many" / "train.parquet")
    numbered.to_parquet(tmp_path / "many" / "test.parquet")
    splits = load_splits(str(tmp_path / "many"))
    assert sorted(splits) == ["test", "train"]
    assert splits["train"].features[LABEL].names == ["0", "1", "2"]
    with pytest.raises(ValueError, match="there are none of 1"):
        check_classes(splits["train"][LABEL][:], ["0", "1", "2"])

    with pytest.raises(ValueError, match="label_column must be one of img, fine_label, id, got 'nothing'"):
        load_splits(str(tmp_path / "one.parquet"), label_column="nothing")
    images(png(), png()).add_column("label", [[0], [0, 1]]).to_parquet(tmp_path / "several.parquet")
    with pytest.raises(ValueError, match="every image must have one label, a name or an integer, got List"):
        load_splits(str(tmp_path / "several.parquet"))
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "one.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut\.parquet' cannot be read: "):
        load_splits(str(tmp_path / "cut.parquet"))
    images(png()).add_column("id", [1]).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="label_column must name one of the columns img, id"):
        load_splits(str(tmp_path / "none.parquet"))


# What it refuses


def test_one_class_is_refused(tmp_path: Path) -> None:
    paint(tmp_path / "colors", 3)
    for name in ("green", "red"):
        for file in (tmp_path / "colors" / name).iterdir():
            file.unlink()
        (tmp_path / "colors" / name).rmdir()
    with pytest.raises(ValueError, match="at least two classes, got blue"):
        run(options(tmp_path / "colors", tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "colors"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder of images for each class"):
        run(options(tmp_path / "empty", tmp_path / "out"))


def test_folders_that_are_neither_splits_nor_classes(colors: Path, tmp_path: Path) -> None:
    """What lies beside the splits is never trained on, and a class may have a split's name."""
    counts = {name: len(split) for name, split in load_splits(str(colors)).items()}
    (colors / "__MACOSX").mkdir()
    (colors / "__MACOSX" / "red.png").write_bytes(png()["bytes"])
    assert {name: len(split) for name, split in load_splits(str(colors)).items()} == counts

    (colors / "extras").mkdir()
    with pytest.raises(ValueError, match="either splits or classes, but beside test, train it has extras"):
        load_splits(str(colors))
    (colors / "extras").rename(colors / "training")
    with pytest.raises(ValueError, match="must hold each split once, got test, train, training"):
        load_splits(str(colors))
    (colors / "training").rmdir()
    (colors / "train" / "stray.png").write_bytes(png()["bytes"])
    with pytest.raises(ValueError, match=r"the folders of their classes alone, got stray\.png"):
        load_splits(str(colors))

    (colors / "train" / "stray.png").unlink()
    (colors / "train" / "red" / "dark").mkdir()
    with pytest.raises(ValueError, match="the folders of their classes alone, got red/dark"):
        load_splits(str(colors))
    (colors / "train" / "red" / "dark").rmdir()
    (colors / "overview.png").write_bytes(png()["bytes"])
    (colors / "train" / "about.pdf").touch()
    assert {name: len(split) for name, split in load_splits(str(colors)).items()} == counts
    (colors / "train").rename(colors / "Val")
    assert sorted(load_splits(str(colors))) == ["test", "validation"]

    vehicles = tmp_path / "vehicles [2024]"
    for name in ("bus", "train"):
        (vehicles / name).mkdir(parents=True)
        (vehicles / name / "1.png").write_bytes(png()["bytes"])
    splits = load_splits(str(vehicles))
    assert list(splits) == ["train"]
    assert splits["train"].features[LABEL].names == ["bus", "train"]


def test_unreadable_images_are_listed_or_left_out(colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (colors / "train" / "red" / "000.png").write_bytes(b"no image")
    whole = (colors / "train" / "blue" / "001.png").read_bytes()
    (colors / "train" / "blue" / "001.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="2 of 66 images of train cannot be read") as error:
        run(options(colors, tmp_path / "out", validation=0.0))
    assert "red/000.png" in str(error.value)
    assert "blue/001.png" in str(error.value)
    assert not (tmp_path / "out.training").exists()
    assert run(options(colors, tmp_path / "out", validation=0.0, epochs=1, skip_unreadable=True))
    assert "red/000.png" in capsys.readouterr().out
    for file in (colors / "train" / "red").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match="every class needs images to train on; there are none of red"):
        run(options(colors, tmp_path / "again", validation=0.0, skip_unreadable=True))


def test_images_with_values_that_are_no_colors_are_named(colors: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), -5, np.int32)).save(colors / "train" / "red" / "000.png", "TIFF")
    splits = load_splits(str(colors))
    processor = MobileNetImageProcessor(size=16, crop_size=16)
    with pytest.raises(ValueError, match=r"1 of 66 images .*red/000\.png: an image of mode I must have values from 0"):
        decode(splits["train"], processor, Storage(tmp_path), "train")
    assert len(decode(splits["train"], processor, Storage(tmp_path), "train", skip_unreadable=True)) == 65


@pytest.mark.parametrize("place", ["inside", "outside", "climbing", "relative", "url"])
def test_rows_name_files_of_their_dataset_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[[Path], str], place: str
) -> None:
    (tmp_path / "set").mkdir()
    for folder in (tmp_path, tmp_path / "set"):
        (folder / "image.png").write_bytes(png()["bytes"])
    monkeypatch.chdir(tmp_path)
    name = {
        "inside": str(tmp_path / "set" / "image.png"),
        "outside": str(tmp_path / "image.png"),
        "climbing": str(tmp_path / "set" / ".." / "image.png"),
        "relative": "image.png",
        "url": f"{serve(tmp_path)}/image.png",
    }[place]
    path = tmp_path / "set" / "rows.parquet"
    table = images(png(), {"bytes": None, "path": name}).add_column("label", ["a", "b"]).data.table
    pyarrow.parquet.write_table(table, path)  # to_parquet would read the file itself
    rows = load_splits(str(path))["train"]
    processor = MobileNetImageProcessor(size=16, crop_size=16)
    if place == "inside":
        assert len(decode(rows, processor, Storage(tmp_path), "train", folders=folders_of(str(path)))) == 2
    else:
        with pytest.raises(
            ValueError, match=f"{re.escape(name)}: lies outside of the dataset; external_images allows"
        ):
            run(options(path, tmp_path / "out", validation=0.0))
    assert len(decode(rows, processor, Storage(tmp_path), "train")) == 2


def test_splits_with_other_labels_are_refused(colors: Path, tmp_path: Path) -> None:
    (colors / "test" / "red").rename(colors / "test" / "scarlet")
    with pytest.raises(ValueError, match="none of scarlet"):
        run(options(colors, tmp_path / "out"))


def test_a_checkpoint_with_other_labels_is_refused(colors: Path, tmp_path: Path) -> None:
    config = MobileNetConfig(width_multiplier=0.1, id2label={0: "blue", 1: "green", 2: "yellow"})
    MobileNetForImageClassification(config).save_pretrained(tmp_path / "model")
    MobileNetImageProcessor(size=32, crop_size=32).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="labels that the checkpoint has, blue, green, yellow; it has red"):
        evaluate_checkpoint(str(tmp_path / "model"), str(colors))


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config.json", {"width_multiplier": 0.2}, "it lacks weights of the right shape for backbone."),
        ("config.json", {"dtype": "relu"}, "cannot be loaded: "),
        ("config.json", {"model_type": "mobilenet_v2"}, "must be mobilenet, got mobilenet_v2. Convert it first."),
        ("preprocessor_config.json", {"size": 0}, "size must be made of integers from 1 to 65536, got 0"),
        ("model.safetensors", None, "cannot be loaded: "),
    ],
)
def test_a_broken_model_is_one_error(
    colors: Path, tmp_path: Path, file: str, fields: dict | None, message: str
) -> None:
    """Above all, weights that do not fit must not be replaced by random ones in silence."""
    model = tmp_path / "model"
    labels = {"id2label": dict(enumerate(COLORS)), "label2id": {name: index for index, name in enumerate(COLORS)}}
    MobileNetForImageClassification(MobileNetConfig("mobilenet_v1", 0.05, **labels)).save_pretrained(model)
    MobileNetImageProcessor.from_recipe("google", 32).save_pretrained(model)
    path = model / file
    if fields is None:
        path.write_bytes(path.read_bytes()[:999])
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        run(options(colors, tmp_path / "out", model=str(model)))
    with pytest.raises(ValueError, match=message):
        evaluate_checkpoint(str(model), str(colors))
    assert not (tmp_path / "out").exists()


def test_classes_without_images_count_for_nothing() -> None:
    logits, labels = torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 1])
    assert class_accuracies(logits, labels) == [1.0, 0.5, None]
    assert metrics(logits, labels) == {"accuracy": 0.75, "balanced_accuracy": 0.75}


def test_labels_count_by_name(colors: Path, tmp_path: Path) -> None:
    """A checkpoint whose labels stand in another order is measured by their names."""
    config = MobileNetConfig(
        width_multiplier=0.1, image_size=32, id2label={0: "red", 1: "other", 2: "green", 3: "blue"}
    )
    model = MobileNetForImageClassification(config)
    nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([0.0, 0.0, 0.0, 9.0])  # always blue
    model.save_pretrained(tmp_path / "model")
    MobileNetImageProcessor(size=32, crop_size=32).save_pretrained(tmp_path / "model")
    measured = evaluate_checkpoint(str(tmp_path / "model"), str(colors))
    assert measured.by_class == {"blue": 1.0, "green": 0.0, "red": 0.0}
    assert measured.metrics["accuracy"] == pytest.approx(1 / 3)
    assert measured.on_card is None


def test_too_few_images_for_a_validation_split(tmp_path: Path) -> None:
    paint(tmp_path / "colors", 3)
    with pytest.raises(ValueError, match=r"0\.1 of 9 images is too few for 3 classes"):
        run(options(tmp_path / "colors", tmp_path / "out"))
    for file in list((tmp_path / "colors" / "green").iterdir())[1:]:
        file.unlink()
    with pytest.raises(ValueError, match=r"at least 2 images of each class, got green \(1\)"):
        run(options(tmp_path / "colors", tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimizer", "adam", "optimizer must be one of sgd, rmsprop, adamw, got 'adam'"),
        ("validation", 1.0, "validation must be from 0 to below 1, got 1.0"),
        ("crop_scale", 0.0, "crop_scale must be above 0 and at most 1, got 0.0"),
        ("epochs", 0, "epochs must be at least 1, got 0"),
        ("ema", 1.0, "ema must be from 0 to below 1, got 1.0"),
        ("balance", "yes", "balance must be one of none, weights, sampling, got 'yes'"),
        ("test_split", "exam", "test_split must be one of (train, test|test, train), got 'exam'"),
        ("architecture", "v2", "architecture must be mobilenet_v1, mobilenet_v1_head, mobilenet_v2, .+, got 'v2'"),
    ],
)
def test_options_are_checked(colors: Path, tmp_path: Path, name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(options(colors, tmp_path / "out", **{name: value}))
    assert not (tmp_path / "out.training").exists()


def test_an_existing_folder_stays(colors: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(ValueError, match="exists; --overwrite replaces it"):
        run(options(colors, tmp_path / "out"))
    with pytest.raises(ValueError, match="is no model repository, and is not replaced"):
        run(options(colors, tmp_path / "out", overwrite=True))
    assert (tmp_path / "out" / "precious").exists()
    (tmp_path / "out" / "config.json").write_text('{"model_type": "mobilenet"}')
    assert run(options(colors, tmp_path / "out", epochs=1, overwrite=True))
    assert not (tmp_path / "out" / "precious").exists()


def test_a_second_run_to_one_output_is_refused(colors: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with claimed(output, False), pytest.raises(ValueError, match="out is being written by another run"):
        run(options(colors, output))
    assert not output.with_name("out.training").exists()


def test_a_folder_that_came_meanwhile_stays(colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained network stays too: once the folder is out of the way, the same command goes on to its end."""
    output = tmp_path / "out"
    given = options(colors, output, epochs=1)

    def make(*args: object) -> None:
        output.mkdir(exist_ok=True)
        (output / "precious").touch()
        write_card(*args)

    with monkeypatch.context() as patch:
        patch.setattr("mobilenet.training.run.write_card", make)
        with pytest.raises(ValueError, match="out was made meanwhile, and is not replaced"):
            run(given)
    assert [path.name for path in output.iterdir()] == ["precious"]
    output.rename(tmp_path / "mine")
    assert run(given)
    assert (output / "model.safetensors").exists()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "kornia" else name)
    result = CliRunner().invoke(app, ["train", "a", "--output", "b"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: training needs kornia: in a clone of this project, pip install")
