"""Fine-tune with and without aligning the batch norms first, and print a table: what it is worth, and where.

From two of Google's checkpoints, around one center (CIFAR-10 at 96 pixels, AdamW, the whole network, 2 epochs), one
thing changes at a time. Each row is the mean and the standard deviation over the seeds.

python benchmarks/aligning.py --cifar10 train.parquet --photographs imagenet_sample --results runs.jsonl \\
    --v1 google/mobilenet_v1_0.25_128 --v2 google/mobilenet_v2_1.0_224
"""

from __future__ import annotations

import csv
import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, NamedTuple

import datasets
import torch
import typer
from transformers import set_seed
from transformers.utils import logging

from mobilenet import MobileNetForImageClassification, MobileNetImageProcessor
from mobilenet.training.data import Images, Storage, decode, load_splits
from mobilenet.training.options import Options
from mobilenet.training.run import keep_memory
from training import convert, train


PHOTOGRAPHS = "photographs"
KINDS = {"dog": range(151, 269), "other animal": [*range(151), *range(269, 398)], "thing": range(398, 1000)}


class Row(NamedTuple):
    """What is fine-tuned, on what and how."""

    network: str = "v2"
    images: str = "CIFAR-10"
    size: int = 96
    optimizer: str = "adamw"
    last_stages: int | None = None
    epochs: int = 2


# One factor at a time, for each network; the learning rates are those of `mobilenet train`.
CHANGES = (
    {},
    {"size": 64},
    {"size": 128},
    {"epochs": 1},
    {"epochs": 10},
    {"optimizer": "sgd"},
    {"last_stages": 2},
    {"images": PHOTOGRAPHS, "size": 128, "epochs": 10},
)
ROWS = [Row(network, **change) for network in ("v2", "v1") for change in CHANGES]


def photographs(folder: Path) -> datasets.Dataset:
    """The photographs that a folder's labels.csv lists (file, index_1000), in three kinds, shuffled."""
    with open(folder / "labels.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kinds = [next(i for i, indices in enumerate(KINDS.values()) if int(row["index_1000"]) in indices) for row in rows]
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=list(KINDS)))
    columns = {"image": [str(folder / row["file"]) for row in rows], "label": kinds}
    return datasets.Dataset.from_dict(columns, features).shuffle(seed=0)


def main(
    cifar10: Annotated[str, typer.Option(help="Parquet file or Hub id of CIFAR-10; its training images are used.")],
    photographs_in: Annotated[Path, typer.Option("--photographs", help="Folder of photographs with a labels.csv.")],
    v1: Annotated[str, typer.Option(help="Folder or Hub id of google/mobilenet_v1_0.25_128.")],
    v2: Annotated[str, typer.Option(help="Folder or Hub id of google/mobilenet_v2_1.0_224.")],
    results: Annotated[Path, typer.Option(help="File that collects the runs; those in it are not repeated.")],
    images: Annotated[int, typer.Option(help="Images of CIFAR-10 to train on.")] = 2000,
    held_out: Annotated[int, typer.Option(help="Images of CIFAR-10 to validate on.")] = 1000,
    seeds: Annotated[int, typer.Option(help="Runs of each cell.")] = 3,
) -> None:
    """Train what the results lack, and print a table of all."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    keep_memory()
    lines = results.read_text().splitlines() if results.exists() else []
    known = {tuple(run): accuracy for *run, accuracy in map(json.loads, lines)}
    sources = {
        "CIFAR-10": (load_splits(cifar10)["train"], images, images + held_out),
        PHOTOGRAPHS: (photographs(photographs_in), 200, 300),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, weights in {"v1": v1, "v2": v2}.items():
            convert(weights, Path(folder) / name, compare=False)

        def decoded(row: Row) -> list[Images]:
            rows, first, last = sources[row.images]
            edge = round(row.size / 0.875) if row.images == PHOTOGRAPHS else row.size
            processor = MobileNetImageProcessor(size={"shortest_edge": edge}, crop_size=row.size)
            storage = Storage(Path(folder))
            parts = (("training", range(first)), ("validation", range(first, last)))
            return [decode(rows.select(part), processor, storage, name, quiet=True) for name, part in parts]

        def accuracy(row: Row, aligned: bool, seed: int, splits: list[Images]) -> float:
            run = (*row, aligned, seed)
            if run not in known:
                options = Options(
                    dataset="",
                    output="",
                    model="",
                    image_size=row.size,
                    optimizer=row.optimizer,
                    last_stages=row.last_stages,
                    epochs=row.epochs,
                    batch_size=64,
                    crop_scale=0.6,
                    ema=0.0,
                    align_norms=aligned,
                    seed=seed,
                )
                set_seed(seed)
                network = MobileNetForImageClassification.from_pretrained(
                    Path(folder) / row.network,
                    num_labels=len(sources[row.images][0].features["label"].names),
                    ignore_mismatched_sizes=True,
                    dtype=torch.float32,
                )
                known[run] = train(network, options, *splits)
                with results.open("a") as file:
                    file.write(json.dumps([*run, known[run]]) + "\n")
                print(*run, f"{known[run]:.3f}", flush=True)
            return 100 * known[run]

        print("| network | images | optimizer | trained | epochs | as it comes | aligned |")
        print("|---|---|---|---|---|---|---|")
        table = []
        for row in ROWS:
            splits = decoded(row)
            cells = []
            for aligned in (False, True):
                runs = [accuracy(row, aligned, seed, splits) for seed in range(seeds)]
                cells.append(f"{statistics.mean(runs):.1f} ± {statistics.stdev(runs):.1f}")
            part = "all" if row.last_stages is None else f"last {row.last_stages} stages"
            where = f"{row.images}, {row.size} pixels"
            table.append(f"| {' | '.join([row.network, where, row.optimizer, part, str(row.epochs), *cells])} |")
        print("\n".join(table))


if __name__ == "__main__":
    typer.run(main)
