"""Training from the command: what it learns, what it leaves, what it survives, what it refuses."""

import csv
import hashlib
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from colors import options, paint, start, weights
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn
from transformers import pipeline
from typer import BadParameter, Typer
from typer.testing import CliRunner

from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor
from mobilenet.cards import Start, write_card
from mobilenet.cli import app
from mobilenet.cli.evaluate import evaluate
from mobilenet.cli.train import _read_config, train
from mobilenet.repository import claimed
from mobilenet.training import run as training
from mobilenet.training.classification import Classification, start_classifier
from mobilenet.training.evaluate import evaluate_checkpoint
from mobilenet.training.options import Options
from mobilenet.training.run import run
from mobilenet.training.trainer import (
    ClassifierTrainer,
    checkpoints,
)


ROOT = Path(__file__).parents[2]


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


@pytest.mark.slow
@pytest.mark.any_version
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


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[]",
        '{"options": [], "processes": 1}',
        '{"options": {}, "processes": "1"}',
        '{"options": {"epochs": [1]}, "processes": 1}',
        '{"options": {"epochs": 1e999}, "processes": 1}',
        '{"options": {"learning_rate": 1' + "0" * 400 + '}, "processes": 1}',
    ],
)
def test_files_that_record_no_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(BadParameter, match=r"training\.json must be the training\.json of a run: "):
        _read_config(None, tmp_path / "training.json")


# What it survives


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


def test_a_run_that_diverges_ends_with_an_error(colors: Path, tmp_path: Path) -> None:
    """Nothing is written of a network whose weights are no numbers."""
    given = {"epochs": 2, "learning_rate": 1e30, "warmup": 0.0}
    with pytest.raises(ValueError, match=r"learning_rate must be less: at 1e\+30, training has diverged"):
        run(options(colors, tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_with_the_same_images_alone(colors: Path, tmp_path: Path) -> None:
    output, work = tmp_path / "out", tmp_path / "out.training"
    assert not run(options(colors, output, epochs=2, time_limit=1e-9))
    shutil.copy(colors / "train" / "red" / "000.png", colors / "train" / "red" / "more.png")
    with pytest.raises(ValueError, match=r"out\.training holds an unfinished run on another number of images: "):
        run(options(colors, output, epochs=2))
    for content in ("{}", "[]", "{"):
        (work / "training.json").write_text(content)
        with pytest.raises(ValueError, match=r"training\.json must be the record of a run, but cannot be read: "):
            run(options(colors, output, epochs=2))
    assert run(options(colors, output, epochs=1, restart=True))


def test_what_another_run_decoded_is_not_trained_on(colors: Path, tmp_path: Path) -> None:
    """A run that was killed while it decoded left images that a run with other options has no use for."""
    given = {"epochs": 1, "validation": 0.0}
    work = tmp_path / "out.training"
    work.mkdir()
    other = training._record(options(colors, tmp_path / "out", seed=1, **given), 1, {})
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


@pytest.mark.slow
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


def test_a_checkpoint_s_preprocessing_can_be_changed(tmp_path: Path) -> None:
    MobileNetForImageClassification(MobileNetConfig(width_multiplier=0.35, num_labels=2)).save_pretrained(tmp_path)
    MobileNetImageProcessor().save_pretrained(tmp_path)  # 256, cropped to 224
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: someone/else\n---\n")

    def built(**kwargs: object) -> tuple[int, int, int | None, int]:
        given = Options(dataset="", output="", model=str(tmp_path), **kwargs)
        model, processor = Classification().build(given, ["a", "b"])
        size = processor.size["shortest_edge"], processor.crop_size["height"]
        return *size, processor.detail_size, model.config.image_size

    assert built() == (256, 224, None, 224)
    assert built(image_size=112) == (128, 112, None, 112)
    assert built(image_size=64, crop_fraction=1.0, detail_size=32) == (64, 64, 32, 64)
    start = Start.of(str(tmp_path))
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert start == (tmp_path.name, digest, "mit", "someone/else")


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
