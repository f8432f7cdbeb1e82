"""Fixtures of the training tests."""

from pathlib import Path

import datasets
import pytest
from colors import paint


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let datasets keep its files where the test does."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    """A folder with images to train on and images to test on."""
    paint(tmp_path / "colors" / "train", 22)
    paint(tmp_path / "colors" / "test", 5, seed=1)
    return tmp_path / "colors"
