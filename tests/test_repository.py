"""Repositories on disk are written whole, by one run at a time, and replace nothing that nobody looked at."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from mobilenet.repository import RepositoryError, claimed, hidden, is_repository, put_file, staged


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


@pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")
def test_what_killed_runs_have_left_is_removed(tmp_path: Path) -> None:
    """But not what another run keeps, nor what is called otherwise."""

    def run() -> AbstractContextManager[Path]:
        return hidden(tmp_path, ".out.", Path.touch, Path.unlink)

    for name in (".out.01234567", ".out.0123456x", ".out.20261231.bak", "out.01234567"):
        (tmp_path / name).touch()
    with run() as first, run() as second:
        assert {first.name, second.name} < {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {".out.0123456x", ".out.20261231.bak", "out.01234567"}


@pytest.mark.parametrize("links", [True, False])
def test_a_file_replaces_none_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    part, path = tmp_path / "part", tmp_path / "path"
    for overwrite in (False, False, True):
        part.write_text("new")
        if path.exists() and not overwrite:
            path.write_text("precious")
            with pytest.raises(FileExistsError):
                put_file(part, path, overwrite)
            assert path.read_text() == "precious"
        else:
            put_file(part, path, overwrite)
            assert path.read_text() == "new"
            assert not part.exists()


def test_a_configuration_nested_without_end_makes_no_repository(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 200_000)
    assert not is_repository(tmp_path)


def test_two_outputs_of_one_folder_do_not_meet(output: Path) -> None:
    with claimed(output, False), claimed(output.with_name("other"), False):
        assert len(list(output.parent.iterdir())) == 2
