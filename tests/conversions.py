"""What the tests of all sources share."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from oracles import logits

from mobilenet.conversion import Checkpoint, Options, read_source
from mobilenet.conversion.convert import build, convert
from mobilenet.conversion.rename import Table, places
from mobilenet.repository import RepositoryError


ODD_SIZES = ((97, 130), (161, 95))


def read(path: Path | str, **options: object) -> Checkpoint:
    """What a reader takes from a source."""
    return read_source(str(path), options=Options(**options))[1]


def assert_fails_without_a_trace(source: Path | str, output: Path, *parts: str, **options: object) -> None:
    """A conversion ends in one clear error, and leaves neither an output nor temporary files."""
    before = {path: path.stat().st_mtime_ns for path in output.parent.rglob("*") if path.is_file()}
    with pytest.raises(RepositoryError) as error:
        convert(str(source), output, **options)
    for part in parts:
        assert part in str(error.value), error.value
    assert {path: path.stat().st_mtime_ns for path in output.parent.rglob("*") if path.is_file()} == before


def swapped(rows: dict, first: str, second: str) -> dict:
    """Two rows of a table, each in the place of the other."""
    return {**rows, first: rows[second], second: rows[first]}


def wrong_tables(table: Table) -> Iterator[tuple[str, Table]]:
    """A name table with two of its rows swapped, or their norms alone, or two parts of the norms."""
    for first, second in combinations(table.rows, 2):
        one, other = table.rows[first], table.rows[second]
        if ("{" in one.conv) == ("{" in other.conv):  # numbers of blocks make no sense elsewhere
            yield f"{first} and {second}", table._replace(rows=swapped(table.rows, first, second))
            if one.norm and other.norm:
                rows = {**table.rows, first: one._replace(norm=other.norm), second: other._replace(norm=one.norm)}
                yield f"norms of {first} and {second}", table._replace(rows=rows)
    for first, second in combinations(table.convention.norm if table.rows["stem"].norm else (), 2):
        convention = table.convention._replace(norm=swapped(table.convention.norm, first, second))
        yield f"{first} and {second}", table._replace(convention=convention)


def assert_wrong_tables_are_noticed(checkpoint: Checkpoint, size: int = 64) -> None:
    """Each wrong table either does not fit the checkpoint, or gives a network with other logits."""
    images = torch.randn(1, checkpoint.config.get("num_channels", 3), size, size)
    model = build(checkpoint, "right")
    right, names = logits(model, images), places(model, checkpoint.table)
    count = 0
    for name, table in wrong_tables(checkpoint.table):
        with suppress(ValueError):
            if places(model, table) == names:  # it is of rows that this network has no use for
                continue
        count += 1
        try:
            wrong = logits(build(replace(checkpoint, table=table), "wrong"), images)
        except ValueError:
            continue
        assert not (wrong - right).abs().max() < 1e-4, name  # what a comparison would let pass
    assert count > 1
