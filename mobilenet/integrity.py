"""Find out what a repository's folder would run and load, and whether it is what was released."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from .configuration_mobilenet import AUTO_MAP
from .repository import digest, sha256


CODE = (
    "architectures_mobilenet.py",
    "configuration_mobilenet.py",
    "cpu_mobilenet.py",
    "detection_mobilenet.py",
    "heads_mobilenet.py",
    "image_processing_mobilenet.py",
    "layers_mobilenet.py",
    "modeling_mobilenet.py",
    "postprocessing_mobilenet.py",
    "preprocessing_mobilenet.py",
    "segmentation_mobilenet.py",
)
CLASSES = AUTO_MAP | {"AutoImageProcessor": "image_processing_mobilenet.MobileNetImageProcessor"}
WEIGHTS = (".gguf", ".h5", ".onnx", ".pte", ".safetensors", ".tflite", ".xml")
PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class Finding(NamedTuple):
    """What there is to say about a file."""

    file: str
    sha256: str
    verdict: str
    is_problem: bool


class Release(NamedTuple):
    """Files to compare with, by their SHA-256, or by git's hash where the Hub tells no other."""

    name: str
    digests: dict[str, str]
    is_whole: bool  # whether a repository holds these files and no others


def git_hash(path: Path) -> str:
    """The name that git gives to the content of a file: a SHA-1, in hexadecimal."""
    result = hashlib.sha1(usedforsecurity=False)
    result.update(b"blob %d\0" % path.stat().st_size)
    return digest(result, path)


def matches(path: Path, expected: str) -> bool:
    """Whether a file has a SHA-256, or a git's hash, which is the shorter one."""
    return expected == (sha256(path) if len(expected) == 64 else git_hash(path))


def is_as_announced(path: Path) -> bool:
    """Whether a file in the Hub's cache holds what the Hub announced; true for files elsewhere.

    The cache names what it downloads by the ETag: the SHA-256 of a file under LFS, git's hash of another one.
    """
    blob = path.resolve()
    is_in_cache = blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name)
    return not is_in_cache or matches(blob, blob.name)


def installed() -> Release:
    """The code of this installation."""
    try:
        name = f"mobilenet {version('mobilenet')}"
    except PackageNotFoundError:
        name = "this clone of mobilenet"
    paths = {file: Path(find_spec(f"mobilenet.{file.removesuffix('.py')}").origin) for file in CODE}
    return Release(name, {file: sha256(path) for file, path in paths.items()}, is_whole=False)


def on_the_hub(repo_id: str, revision: str | None = None) -> Release:
    """What the Hub tells of the files of a repository. Nothing is downloaded.

    Raises:
        ValueError: There is no such repository or revision.
        OSError: The Hub does not answer.
    """
    api = HfApi()
    try:
        commit = api.model_info(repo_id, revision=revision).sha
        entries = list(api.list_repo_tree(repo_id, revision=commit, recursive=True))
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(f"{repo_id}: the Hub has no such repository, or no revision {revision or 'main'}.") from error
    except HfHubHTTPError as error:
        raise OSError(f"{repo_id}: the Hub answers with an error: {str(error).splitlines()[0]}") from error
    except Exception as error:  # of requests before huggingface_hub 1, of httpx since
        raise OSError(f"{repo_id}: the Hub does not answer: {error}") from error
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    digests = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}
    return Release(f"{repo_id} at {commit}", digests, is_whole=True)


def verify(folder: str | os.PathLike, against: str | None = None, revision: str | None = None) -> list[Finding]:
    """Judge what transformers may run or load from a folder: code, configurations, weights.

    Args:
        folder: A repository.
        against: Hub id of the repository that it should equal. By default, code is compared with this
            installation's, and weights with nothing.
        revision: Branch, tag or commit of it.

    Raises:
        ValueError: The folder is no repository, or there is none at `against`.
        OSError: A file cannot be read, or the Hub does not answer.
    """
    folder = Path(folder).resolve()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} must be a folder that holds a config.json.")
    release = on_the_hub(against, revision) if against else installed()
    shards = {folder / name for path in folder.glob("*.json") for name in _shards(folder, path)}
    return [_judge(folder, path, release, path in shards) for path in _find(folder, shards)]


def _find(folder: Path, shards: set[Path]) -> Iterator[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()]
    yield from (path for path in files if path.parent == folder and path.name in CODE)
    yield from (path for path in files if path.parent == folder and path.suffix == ".json")
    yield from (path for path in files if path.suffix.lower() in (*WEIGHTS, *PICKLES) or path in shards)


def _shards(folder: Path, path: Path) -> Iterator[str]:
    """The files within a folder that an index of weights names; transformers reads them, whatever they are called."""
    if _leads_away(folder, path):
        return
    with suppress(ValueError, RecursionError):  # which is reported where the file is judged
        for field, value in _fields(json.loads(path.read_text(encoding="utf-8"))):
            if field == "weight_map" and isinstance(value, dict):
                yield from (name for name in value.values() if _is_inside(name))


def _is_inside(name: Any) -> bool:
    """Whether a name is that of a file in the folder that names it, or below."""
    return (
        isinstance(name, str)
        and bool(PurePath(name).parts)
        and not (PurePath(name).is_absolute() or ".." in PurePath(name).parts or "\0" in name)
    )


def _judge(folder: Path, path: Path, release: Release, is_shard: bool) -> Finding:
    name = path.relative_to(folder).as_posix()
    if problem := _leads_away(folder, path):
        return Finding(name, "", problem, is_problem=True)
    problems = list(_problems(path, is_shard))
    expected = release.digests.get(name)
    if expected is None:
        verdict = f"not in {release.name}" if release.is_whole or name in CODE else "not compared"
    else:
        verdict = f"{'as' if matches(path, expected) else 'not as'} in {release.name}"
    if verdict.startswith(("not in", "not as")):
        problems.append(verdict)
    return Finding(name, sha256(path), "; ".join(problems) or verdict, bool(problems))


def _leads_away(folder: Path, path: Path) -> str | None:
    """Why a link is not followed. The Hub's cache has links, to blobs beside the snapshots."""
    target = path.resolve()
    if target.is_relative_to(folder) or target.parent == folder.parent.parent / "blobs":
        return None if target.is_file() else f"a link to {target}, which is no file"
    return f"a link out of the folder, to {target}"


def _problems(path: Path, is_shard: bool) -> Iterator[str]:
    if not is_as_announced(path):
        yield "not what the Hub announced"
    if path.suffix == ".json":
        yield from _code_and_weights_elsewhere(path)
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            yield "not the file, but what git-lfs puts in its place: run git lfs pull"
        elif (path.suffix.lower() in PICKLES and not _is_of_openvino(path)) or (
            is_shard and path.suffix != ".safetensors"
        ):
            yield "a pickle, which can run code: convert it to safetensors"


def _code_and_weights_elsewhere(path: Path) -> Iterator[str]:
    """Name what a configuration makes transformers run beside the classes of this project, and read elsewhere."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        yield f"no JSON: {error}"
        return
    for field, value in _fields(content):
        if field == "auto_map" and value:
            for auto, name in value.items() if isinstance(value, dict) else [("auto_map", value)]:
                if name != CLASSES.get(auto):
                    yield f"runs other code: {auto} is {name}"
        if field == "weight_map":
            names = value.values() if isinstance(value, dict) else [value]
            for name in sorted({str(name) for name in names if not _is_inside(name)}):
                yield f"loads weights from elsewhere: {name}"
            for name in sorted({name for name in names if _is_inside(name) and not (path.parent / name).is_file()}):
                yield f"names weights that are not there: {name}"
        # Before 5.3, transformers ran what these name even without trust (CVE-2026-4372).
        is_kernel = "_implementation" in field and "/" in str(value)
        if value and (is_kernel or field in ("custom_generate", "custom_pipelines")):
            yield f"runs other code: {field} is {value}"
        if path.name == "adapter_config.json" and field == "base_model_name_or_path":
            yield f"loads another repository: {field} is {value}"


def _fields(content: Any) -> Iterator[tuple[str, Any]]:
    """Every field of a configuration and of those within it, as a processor's holds its image processor's."""
    pending = [content]
    while pending:
        content = pending.pop()
        if isinstance(content, dict):
            yield from content.items()
            pending.extend(content.values())
        elif isinstance(content, list):
            pending.extend(content)


def _is_of_openvino(path: Path) -> bool:
    """Whether a .bin holds the bare numbers of the graph beside it."""
    return path.suffix == ".bin" and path.name.startswith("openvino_") and path.with_suffix(".xml").is_file()
