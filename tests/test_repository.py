"""Repositories on disk are written whole, by one run at a time, and replace nothing that nobody looked at."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mobilenet.repository import RepositoryError, claimed, staged


pytestmark = pytest.mark.any_version


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "somewhere" / "out"


@pytest.fixture
def repository(output: Path) -> Path:
    output.mkdir(parents=True)
    (output / "config.json").write_text('{"model_type": "mobilenet"}')
    return output


def write(output: Path, content: str = "new", overwrite: bool = False, meanwhile: Callable[[], object] = list) -> None:
    with staged(output, overwrite) as folder:
        (folder / "config.json").write_text(content)
        meanwhile()


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_was_made_meanwhile_is_not_replaced(output: Path) -> None:
    def interfere() -> None:
        output.mkdir()
        (output / "precious").write_text("mine")

    with pytest.raises(RepositoryError, match="out was made meanwhile, and is not replaced"):
        write(output, meanwhile=interfere)
    assert files(output.parent) == {"out/precious": "mine"}


@pytest.mark.parametrize("name", ["precious", "config.json", "folder/precious"])
def test_what_has_changed_meanwhile_is_not_replaced(repository: Path, name: str) -> None:
    def interfere() -> None:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("mine")

    with pytest.raises(RepositoryError, match="out has changed meanwhile, and is not replaced"):
        write(repository, overwrite=True, meanwhile=interfere)
    assert files(repository)[name] == "mine"
    assert [path.name for path in repository.parent.iterdir()] == ["out"]


def test_what_has_not_changed_is_replaced(repository: Path) -> None:
    write(repository, overwrite=True)
    assert files(repository.parent) == {"out/config.json": "new"}


def test_a_second_run_is_refused_at_its_start(output: Path) -> None:
    with staged(output, False) as folder:
        (folder / "config.json").write_text("first")
        with pytest.raises(RepositoryError, match="out is being written by another run"):
            write(output, "second")
    assert files(output.parent) == {"out/config.json": "first"}


KILLED = """
import os, signal, sys
from pathlib import Path
import mobilenet.repository as repository

def strike(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

with repository.staged(Path(sys.argv[1]), True) as folder:
    (folder / "config.json").write_text("killed")
    if sys.argv[2] == "building":
        strike()
    if sys.argv[2] == "replacing":
        repository._listing = strike
    else:
        repository.shutil.rmtree = strike
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("stage", ["building", "replacing", "removing"])
def test_the_next_run_removes_what_a_killed_one_left(repository: Path, stage: str) -> None:
    """Where the killed one had taken the old repository away, that comes back."""
    (repository / "weights").write_text("old")
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.run([sys.executable, "-c", KILLED, repository, stage], env=environment, check=False)
    assert killed.returncode == -9
    assert {path.name for path in repository.parent.iterdir()} - {"out"} == {".out.mobilenet"}
    with pytest.raises(RepositoryError, match="out exists"):
        write(repository)
    assert [path.name for path in repository.parent.iterdir()] == ["out"]
    assert files(repository) == (
        {"config.json": "killed"}
        if stage == "removing"
        else {"config.json": '{"model_type": "mobilenet"}', "weights": "old"}
    )


def test_nothing_is_made_for_a_run_that_fails(output: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyError), staged(output, False):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_folder_of_somebody_else_is_not_taken_over(output: Path) -> None:
    hidden = output.parent / ".out.mobilenet"
    hidden.mkdir(parents=True)
    (hidden / "precious").write_text("mine")
    with pytest.raises(RepositoryError, match="must be free to build in, but holds something else"):
        write(output)
    assert files(output.parent) == {".out.mobilenet/precious": "mine"}


def test_two_outputs_of_one_folder_do_not_meet(output: Path) -> None:
    with claimed(output, False), claimed(output.with_name("other"), False):
        assert len(list(output.parent.iterdir())) == 2
