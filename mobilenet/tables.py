"""Tables for terminals of any width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Column, Table
from rich.text import Text

from .text import clean


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], **options: Any) -> Table:
    """A table of texts that is whole at any width: what is too long goes on in the next line.

    Args:
        columns: Their names.
        rows: Texts, one for each column.
        **options: Of rich's Table.
    """
    wrapped = [Column(Text(clean(name)), overflow="fold") for name in columns]
    result = Table(*wrapped, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), **options)
    for row in rows:
        result.add_row(*(Text(clean(cell)) for cell in row))
    return result
