"""Tables: whole at any width."""

import io

import pytest
from rich.console import Console

from mobilenet.export.compare import Comparison as Export
from mobilenet.tables import table


pytestmark = pytest.mark.any_version


@pytest.mark.parametrize("width", [80, 40])
def test_tables_cut_nothing(width):
    checksum, labels = "0123456789abcdef" * 4, ("[red]", "=1", "x\x1b[2J")
    file = io.StringIO()
    rows = [[checksum, *labels, "100 %"], ["", "", "", "", ""]]
    Console(file=file, width=width).print(table(["SHA-256 of weights", "a", "b", "c", "top-1"], rows))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "\x1b" not in file.getvalue()
    assert checksum in "".join(line.split(" ")[0] for line in lines)
    assert "[red]" in "".join(file.getvalue().split()) or width < 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in file.getvalue()


def test_names_of_engines_stay_in_one_line_at_80_columns():
    engine = "model_quantized.onnx, int8"
    file = io.StringIO()
    row = Export(engine, 150, 1.3, 1.0, 14.9, 45.2).cells
    Console(file=file, width=80).print(table(Export.COLUMNS, [row]))
    assert "model_quantized.onnx," in file.getvalue()
