"""The common tests that transformers runs on every model of its own, taken from its source distribution.

python tests/transformers_suite.py

downloads them for the installed version into a folder of the user's cache; the variable TRANSFORMERS_TESTS names
another folder that holds them. They import parts that are not distributed, in whose place stand-ins are put here.
"""

from __future__ import annotations

import fnmatch
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import TestCase, TestLoader, TestResult, mock

import transformers


SERIES = "5.24."  # of transformers, whose tests these stand-ins fit
PACKAGE = "transformers_tests"
MODULES = ("test_backbone_common", "test_configuration_common", "test_image_processing_common", "test_modeling_common")

# Fields of any configuration, each with another value than its default.
COMMON_FIELDS = {
    "architectures": ["MobileNetModel"],
    "chunk_size_feed_forward": 2,
    "dtype": "float16",
    "id2label": {0: "owl", 1: "parrot", 2: "burger"},
    "label2id": {"owl": 0, "parrot": 1, "burger": 2},
    "output_hidden_states": True,
    "problem_type": "multi_label_classification",
    "return_dict": False,
}

STAND_INS: dict[str, dict[str, Any]] = {
    f"{PACKAGE}.exporters": {},
    f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    f"{PACKAGE}.generation": {},
    f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    f"{PACKAGE}.utils": {},
    f"{PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": COMMON_FIELDS},
    "fetch_hub_objects_for_ci": {"url_to_local_path": None},
}


def folder() -> Path:
    """Where the tests of the installed transformers lie, or would lie."""
    if given := os.environ.get("TRANSFORMERS_TESTS"):
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "mobilenet" / f"transformers-{transformers.__version__}-tests"


def unfit() -> str | None:
    """Why the tests cannot run with the installed transformers; None if they can."""
    if transformers.__version__.startswith(SERIES):
        return None
    return f"the common tests are those of transformers {SERIES}*, and {transformers.__version__} is installed"


def is_there() -> bool:
    """Whether the tests lie in their folder."""
    return all((folder() / f"{name}.py").is_file() for name in MODULES)


class _NoMarks:
    """In place of pytest.mark: transformers' marks are none that this project knows."""

    def __getattr__(self, name: str) -> Callable:
        return lambda *arguments: arguments[0] if callable(arguments[0]) else lambda test: test


def load() -> list[ModuleType]:
    """Import the tests, in the order of MODULES."""
    suite = ModuleType(PACKAGE)
    suite.__path__ = [str(folder())]
    sys.modules[PACKAGE] = suite
    for name, content in STAND_INS.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
    paths = list(sys.path)  # to which they add a folder that is not distributed
    try:
        with (
            mock.patch("pytest.mark", _NoMarks()),
            # They would read the package from the clone that they lie in.
            mock.patch("transformers.utils.direct_transformers_import", return_value=transformers),
            # What is left out for want of an accelerator shall be the same everywhere.
            mock.patch.dict(os.environ, TRANSFORMERS_TEST_DEVICE="cpu"),
        ):
            return [importlib.import_module(f"{PACKAGE}.{name}") for name in MODULES]
    finally:
        sys.path[:] = paths


def leave_out(reasons: dict[str, tuple[str, ...]]) -> Callable[[type[TestCase]], type[TestCase]]:
    """Leave tests out of a class, and let it prove that none of them would pass.

    Args:
        reasons: For each reason, names of tests, or patterns of names.

    Raises:
        ValueError: A pattern fits no test of the class.
    """

    def decorate(cls: type[TestCase]) -> type[TestCase]:
        names = TestLoader().getTestCaseNames(cls)
        left_out = {}
        for pattern in (pattern for patterns in reasons.values() for pattern in patterns):
            found = fnmatch.filter(names, pattern)
            if not found:
                raise ValueError(f"reasons must name tests of {cls.__name__}, got {pattern!r}.")
            left_out |= {name: getattr(cls, name) for name in found}
        whole = type(cls.__name__, (cls,), {"__module__": cls.__module__, **left_out})

        def test_what_is_left_out_would_not_pass(self: TestCase) -> None:
            for name in left_out:
                result = TestResult()
                whole(name).run(result)
                assert result.skipped or result.failures or result.errors, f"{name} passes: leave it out no longer"

        for name in left_out:
            setattr(cls, name, None)
        cls.test_what_is_left_out_would_not_pass = test_what_is_left_out_would_not_pass
        return cls

    return decorate


def download() -> None:
    """Put the tests of the installed transformers into their folder."""
    version, target = transformers.__version__, folder()
    with tempfile.TemporaryDirectory() as scratch:
        command = ["pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers", "--dest", scratch]
        subprocess.run([sys.executable, "-m", *command, f"transformers=={version}"], check=True)
        target.mkdir(parents=True, exist_ok=True)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            for name in MODULES:
                content = archive.extractfile(f"transformers-{version}/tests/{name}.py").read()
                (target / f"{name}.py").write_bytes(content)


if __name__ == "__main__":
    if reason := unfit():
        print(f"Nothing to download: {reason}.")
    elif not is_there():
        download()
