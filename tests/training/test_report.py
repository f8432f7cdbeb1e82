"""Plots of a training run."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobilenet.training.report import plot_matrix, plot_precisions


@pytest.mark.parametrize("names", [["US$ & CA$", "$\\foo$"], ["\x1b]0;x\x07", "a" * 10_000], ["$" * 4, "a\nb"]])
@pytest.mark.filterwarnings("error")
def test_names_of_classes_are_drawn_and_not_obeyed(names: list[str], tmp_path: Path) -> None:
    """Between two dollars, matplotlib would look for a formula."""
    plot_matrix(np.eye(2), names, tmp_path / "matrix.png")
    plot_precisions(np.full((101, 2), 0.5), names, tmp_path / "precisions.png")
    for name in ("matrix.png", "precisions.png"):
        with Image.open(tmp_path / name) as image:
            assert np.asarray(image.convert("L")).std() > 5
