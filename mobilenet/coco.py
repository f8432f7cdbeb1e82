"""The numbers of COCO's categories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def categories_of(labels: Mapping[int, str]) -> dict[int, int]:
    """Categories of labels by their indices: from 1 on, or where most labels are COCO's, its own and others beyond."""
    # Its lines are numbered as COCO's categories are (arXiv:1405.0312), 10 of which have no boxes.
    names = (Path(__file__).parent / "conversion" / "coco_labels.txt").read_text(encoding="utf-8").splitlines()
    numbers = {name: number for number, name in enumerate(names, 1) if name != "N/A"}
    known = {index: numbers[label] for index, label in labels.items() if label in numbers}
    if 2 * len(known) <= len(labels):
        return {index: index + 1 for index in labels}
    others = (index for index in sorted(labels) if index not in known)
    return known | {index: number for number, index in enumerate(others, len(names) + 1)}
