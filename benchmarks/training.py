"""Train ours, transformers' own MobileNetV2 and timm's side by side, and print the README's table.

Same pictures, recipe, seeds and steps for all; each network is as its library builds it, with its own defaults for
initial weights, batch norm and dropout. From scratch, and from Google's weights, which all three compute alike; ours
starts as `mobilenet train` does, with batch norms aligned to the pictures.

python benchmarks/training.py --cifar10 train.parquet --weights google/mobilenet_v2_1.0_224 --results runs.jsonl
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from peers import import_timm
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, set_seed
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).parents[1]))

from mobilenet.convert_checkpoint import convert

from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor
from mobilenet.pictures import Augment, Normalize, Pictures, Storage, decode, load_splits
from mobilenet.train import Options, training_arguments
from mobilenet.trainer import ClassifierTrainer


# The average of the weights is off: it would average batch norm's statistics too, and so hide what differs.
COMMON = {
    "dataset": "",
    "output": "",
    "ema": 0.0,
    "seed": 0,
    "batch_size": 64,
    "crop_scale": 0.6,
    "precision": "float32",
}
RECIPES = {
    "from scratch": Options(**COMMON, image_size=48, epochs=6, learning_rate=0.2),
    "from Google's weights": Options(**COMMON, model="", image_size=64, epochs=4, learning_rate=0.1),
    "from Google's weights, brief": Options(**COMMON, model="", image_size=64, epochs=2),  # at the default rate
}
CLASSES = 10


class OfTimm(nn.Module):
    """timm's network, called as transformers' networks are."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.network(pixel_values))


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Copy all but the classifier between networks that define the same layers in the same order."""
    theirs, ours = source.state_dict(), target.state_dict()
    for (_, value), name in zip(list(theirs.items())[:-2], list(ours)[:-2], strict=True):
        ours[name] = value
    target.load_state_dict(ours)


def ours(size: int, converted: Path | None, weights: str) -> nn.Module:
    """The network of this repository."""
    if converted is None:
        return MobileNetForImageClassification(MobileNetConfig(image_size=size, num_labels=CLASSES))
    return MobileNetForImageClassification.from_pretrained(
        converted, num_labels=CLASSES, ignore_mismatched_sizes=True, dtype=torch.float32
    )


def native(size: int, converted: Path | None, weights: str) -> nn.Module:
    """transformers' own network, as its defaults and Google's configuration leave it."""
    if converted is None:
        return MobileNetV2ForImageClassification(MobileNetV2Config(image_size=size, num_labels=CLASSES))
    return MobileNetV2ForImageClassification.from_pretrained(weights, num_labels=CLASSES, ignore_mismatched_sizes=True)


def timm(size: int, converted: Path | None, weights: str) -> nn.Module:
    """timm's network; to compute what Google's weights stand for, it needs TensorFlow's padding and epsilon."""
    create_model = import_timm().create_model
    if converted is None:
        return OfTimm(create_model("mobilenetv2_100", num_classes=CLASSES))
    network = create_model("mobilenetv2_100", num_classes=CLASSES, pad_type="same", bn_eps=1e-3)
    copy_in_order(ours(size, converted, weights), network)
    return OfTimm(network)


NETWORKS = {"ours": ours, "transformers' own": native, "timm": timm}


def train(network: nn.Module, options: Options, pictures: Pictures, validation: Pictures) -> dict[str, float]:
    """Train and evaluate."""
    processor = MobileNetImageProcessor()  # for its normalisation, which all three share
    size = (options.image_size, options.image_size)
    with tempfile.TemporaryDirectory() as folder:
        options.output = str(Path(folder) / "run")
        arguments = training_arguments(options, len(pictures), 1, validates=False)
        augment = Augment(size, options.crop_scale, options.flip, options.trivial_augment, options.erasing)
        trainer = ClassifierTrainer(
            network.to(memory_format=torch.channels_last),
            arguments,
            options,
            pictures,
            validation,
            augment,
            Normalize(processor),
            compute_metrics=accuracy,
        )
        trainer._save_checkpoint = lambda *_, **__: None
        if options.model is not None and options.align_norms and isinstance(network, MobileNetForImageClassification):
            trainer.align_batch_norm()
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        result = trainer.evaluate()
    return {"steps": trainer.state.global_step, "accuracy": result["eval_accuracy"], "loss": result["eval_loss"]}


def accuracy(prediction: object) -> dict[str, float]:
    """Share of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(
    cifar10: Annotated[str, typer.Option(help="Parquet file or Hub id of CIFAR-10; its training pictures are used.")],
    weights: Annotated[str, typer.Option(help="Folder or Hub id of google/mobilenet_v2_1.0_224.")],
    results: Annotated[Path, typer.Option(help="File that collects the runs; those in it are not repeated.")],
    pictures: Annotated[int, typer.Option(help="Pictures to train on.")] = 5000,
    held_out: Annotated[int, typer.Option(help="Pictures to validate on.")] = 2000,
    seeds: Annotated[int, typer.Option(help="Runs of each network.")] = 3,
    align_norms: Annotated[
        bool, typer.Option(help="Align our batch norms; without, take another results file.")
    ] = True,
) -> None:
    """Train what the results lack, and print a table of all."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a new classifier is no news here
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    rows = load_splits(cifar10)["train"]
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "converted"
        convert(weights, converted, verify=False)
        for start, options in RECIPES.items():
            size = options.image_size
            processor = MobileNetImageProcessor(size=size, crop_size=size)
            storage = Storage(Path(folder))
            training = decode(rows.select(range(pictures)), processor, storage, "train")
            validation = decode(rows.select(range(pictures, pictures + held_out)), processor, storage, "validation")
            for seed in range(seeds):
                for name, build in NETWORKS.items():
                    key = {"start": start, "network": name, "seed": seed}
                    if any(key.items() <= run.items() for run in done):
                        continue
                    options.seed, options.align_norms = seed, align_norms
                    set_seed(seed)
                    network = build(size, converted if options.model is not None else None, weights)
                    done.append({**key, **train(network, options, training, validation)})
                    print(done[-1], flush=True)
                    with results.open("a") as file:
                        file.write(json.dumps(done[-1]) + "\n")
    table = Table("", *RECIPES, title="validation accuracy, %: mean ± standard deviation (each seed)")
    lines = []
    for name in NETWORKS:
        cells = []
        for start in RECIPES:
            runs = [100 * run["accuracy"] for run in done if (run["start"], run["network"]) == (start, name)]
            spread = statistics.stdev(runs) if len(runs) > 1 else 0.0
            cells.append(f"{statistics.mean(runs):.1f} ± {spread:.1f} ({', '.join(f'{run:.1f}' for run in runs)})")
        table.add_row(name, *cells)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    Console().print(table)
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
