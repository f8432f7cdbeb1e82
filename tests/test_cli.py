"""The command itself: its help, its version, and how errors end."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mobilenet.cli import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_help_names_every_command():
    result = run("--help")
    assert result.exit_code == 0
    assert {"classify", "convert"} <= set(result.stdout.split())


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert re.fullmatch(r"mobilenet (\d+\.\d+\.\d+\S*|\(not installed: .+\))\n", result.stdout)


def test_no_command_is_a_usage_error():
    result = run()
    assert result.exit_code == 2
    assert "Usage" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("size must be 1 or 2,\n  got 3."), "Error: size must be 1 or 2, got 3.\n"),
        (FileNotFoundError("x holds no config.json."), "Error: x holds no config.json.\n"),
        (ImportError("export needs onnx: pip install onnx"), "Error: export needs onnx: pip install onnx\n"),
        (ValueError("a set model.png allows no device; set it"), "Error: a set model.png allows no device; set it\n"),
        (ValueError("no set; set model to x"), "Error: no set; set --model to x\n"),
        (ValueError("\x1b[31mred"), "Error: \N{REPLACEMENT CHARACTER}[31mred\n"),
    ],
)
def test_an_expected_error_is_one_line_on_stderr(monkeypatch, error, line):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("mobilenet.cli.classify.load", fail)
    result = run("classify", "x.jpg", "--model", "m")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == line


def test_what_pillow_says_of_images_stays_off_the_screen(monkeypatch):
    def read(*args, **kwargs):
        for module in ("PIL.Image", "PIL.TiffImagePlugin"):
            warnings.warn_explicit("Corrupt EXIF data.", UserWarning, "x.py", 1, module)
        raise ValueError("read")

    monkeypatch.setattr("mobilenet.cli.classify.load", read)
    assert run("classify", "x.jpg", "--model", "m").stderr == "Error: read\n"


def test_a_fault_of_the_program_itself_keeps_its_traceback(monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("mobilenet.cli.classify.load", fail)
    assert isinstance(run("classify", "x.jpg", "--model", "m").exception, ZeroDivisionError)


def test_the_example_comes_with_the_package():
    result = run("classify", "--example", "--json")
    assert result.exit_code == 0, result.stderr
    (best, *_) = json.loads(result.stdout)["predictions"]
    assert best["label"] == "cat"
    assert best["score"] > 0.9


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("convert", "google/x", "out", "--mean", "a,b"),
            "--mean must be numbers with commas between them, got 'a,b'.",
        ),
        (("convert", "google/x", "out", "--image-size", "99999"), "--image-size must be an integer from 1 to 65536"),
        (
            ("convert", "google/x", "out", "--range", "0..2"),
            "--range must be one of 0..1, -1..1, 0..255, imagenet, got",
        ),
        (("convert", "google/x", "out", "--fuse", "--unfuse"), "--unfuse must be left out where fuse is set."),
        (("train", "x", "--output", "out", "--crop-fraction", "2"), "--crop-fraction must be "),
    ],
)
def test_errors_name_options(tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {line}")


def test_advice_names_options(tmp_path):
    for color in ("blue", "red"):
        (tmp_path / "images" / color).mkdir(parents=True)
        (tmp_path / "images" / color / "a.png").write_bytes(b"no image")
    result = run("train", str(tmp_path / "images"), "--output", str(tmp_path / "out"), "--validation", "0")
    assert result.exit_code == 1
    assert result.stderr.strip().endswith("Set --skip-unreadable to leave them out.")


def test_shells_complete_commands_and_options():
    def complete(*words: str) -> list[str]:
        environment = {
            "_MOBILENET_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(words),
            "COMP_CWORD": str(len(words) - 1),
        }
        return CliRunner().invoke(app, [], prog_name="mobilenet", env=environment).stdout.split()

    assert complete("mobilenet", "cl") == ["classify"]
    assert complete("mobilenet", "classify", "--th") == ["--threshold"]
    assert complete("mobilenet", "classify", "--dtype", "bf") == ["bfloat16"]


def test_other_libraries_keep_quiet(tmp_path):
    """TensorBoard does not import TensorFlow, and what libraries of Hugging Face would draw stays off a file."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    (tmp_path / "tensorflow.py").write_text("print('noise of TensorFlow')")
    program = """
import logging, sys
from mobilenet.cli import app
try:
    app(["verify", "nothing"], prog_name="mobilenet")
except SystemExit:
    pass
from tensorboard.compat import tf
tf.io
from huggingface_hub.utils import are_progress_bars_disabled
print(are_progress_bars_disabled(), logging.getLogger("torchao").isEnabledFor(logging.WARNING))
"""
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "True False\n"


def test_options_keep_their_former_names(tmp_path):
    """For a release, with a notice."""
    arguments = ["convert", str(tmp_path / "nothing"), str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--no-verify", f"--verify-on={tmp_path}"])
    assert result.exit_code == 1
    first, second, error = result.stderr.splitlines()
    assert first == "Notice: --no-verify is called --no-compare now."
    assert second == "Notice: --verify-on is called --compare-on now."
    assert error.startswith("Error: --compare-on must be a folder of ")
    help_ = " ".join(CliRunner().invoke(app, ["convert", "--help"]).stdout.split())
    assert "--compare-on" in help_
    assert "--verify" not in help_
