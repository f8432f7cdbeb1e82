"""Fixtures that several test files share."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest


# Several processes run side by side, and threads of small networks would wait for each other. Torch reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from oracles import DATA


# What a shell starts in the background ignores Ctrl-C, and so would the commands that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real weights and photographs, which is no part of the project."""
    if not DATA.is_dir():
        pytest.skip(f"no test data at {DATA}: set MOBILENET_TEST_DATA")
    return DATA


@pytest.fixture(scope="session")
def photographs(data: Path) -> list[Path]:
    """300 photographs as they come, each of another ImageNet class."""
    return sorted((data / "imagenet_sample").glob("*.JPEG"))


@pytest.fixture
def cats(data: Path) -> Path:
    """The image of two cats that the Hub's examples use."""
    return data / "images" / "000000039769.png"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where every oracle should be at hand, a test that is skipped hides something."""
    if os.environ.get("CI") and terminalreporter.stats.get("skipped"):
        terminalreporter.section("skipped tests fail here: CI is set")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run in CI that skipped a test."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter and reporter.stats.get("skipped") and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def serve() -> Iterator[Callable[[Path], str]]:
    """A function that serves a folder on the loopback and gives its URL."""
    with ExitStack() as stack:

        def start(folder: Path) -> str:
            handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), handler))
            Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield start
