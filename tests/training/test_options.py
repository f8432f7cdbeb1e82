"""The options of a training run: what they default to, and what they allow."""

from pathlib import Path

import pytest
from colors import options

from mobilenet.training.options import MEANT_FOR, TASKS, Options
from mobilenet.training.run import run


pytestmark = pytest.mark.any_version


def test_optimizer_and_rate_by_default() -> None:
    """SGD from scratch, AdamW from a checkpoint, each at its own rate; what is given goes first."""
    given = {"dataset": "", "output": ""}
    scratch, checkpoint = Options(**given), Options(**given, model="m")
    assert (scratch.chosen_optimizer, scratch.peak_learning_rate) == ("sgd", 0.1)
    assert (checkpoint.chosen_optimizer, checkpoint.peak_learning_rate) == ("adamw", 0.003)
    assert Options(**given, model="m", optimizer="sgd").peak_learning_rate == 0.02
    assert Options(**given, model="m", learning_rate=0.5).peak_learning_rate == 0.5


def test_detectors_and_segmenters_have_smaller_batches() -> None:
    given = {"dataset": "", "output": ""}
    sizes = {task: Options(**given, task=task).images_per_batch for task in TASKS}
    assert sizes == {"classification": 128, "detection": 32, "segmentation": 16}
    assert Options(**given, task="detection", batch_size=5).images_per_batch == 5
    for name, tasks in MEANT_FOR.items():
        for task in set(TASKS) - set(tasks):
            with pytest.raises(ValueError, match=f"{name} must be left out for {task}: it is for"):
                Options(**given, task=task, **{name: "none" if name != "balance" else "weights"}).check()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("task", "pose", "task must be one of classification, detection, segmentation, got 'pose'"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
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
