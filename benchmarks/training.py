"""Train ours, transformers' own MobileNetV2 and timm's side by side, and print a table for docs/train.md.

Same images, recipe, seeds and steps for all; each network is as its library builds it, with its own defaults for
initial weights, classifier, batch norm and dropout. From scratch, and from Google's weights, which all three compute
alike; ours starts as `mobilenet train` does. Each network has, in each column, the learning rate of four with which it
does best on other images than those of the table.

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
from typing import Annotated, NamedTuple

import torch
import typer
from peers import import_timm
from torch import nn
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, set_seed
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).parents[1]))

from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor
from mobilenet.conversion.convert import convert
from mobilenet.training.augment import Augment, Normalize
from mobilenet.training.data import Images, Storage, decode, load_splits
from mobilenet.training.options import Options
from mobilenet.training.run import keep_memory, training_arguments
from mobilenet.training.trainer import ClassifierTrainer, freeze


# The average of the weights is off: it would average batch norm's statistics too, and so hide what differs.
COMMON = {
    "dataset": "",
    "output": "",
    "ema": 0.0,
    "batch_size": 64,
    "crop_scale": 0.6,
    "precision": "float32",
}
# The optimizer of each start is that of `mobilenet train`, whose own learning rate is among the four.
STARTS = {
    "from scratch": ({"image_size": 48}, (0.05, 0.1, 0.2, 0.4)),
    "from Google's weights": ({"model": "", "image_size": 64}, (3e-4, 1e-3, 3e-3, 1e-2)),
}
EPOCHS = (2, 6)
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


def train(network: nn.Module, options: Options, images: Images, validation: Images) -> float:
    """Train, and give the validation accuracy."""
    processor = MobileNetImageProcessor()  # for its normalization, which all three share
    size = (options.image_size, options.image_size)
    with tempfile.TemporaryDirectory() as folder:
        options.output = str(Path(folder) / "run")
        arguments = training_arguments(options, len(images), 1, validates=False)
        augment = Augment(size, options.crop_scale, options.flip, options.trivial_augment, options.erasing)
        trainer = ClassifierTrainer(
            network.to(memory_format=torch.channels_last),
            arguments,
            options,
            images,
            validation,
            augment,
            Normalize(processor),
            frozen=[] if options.last_stages is None else freeze(network, options.last_stages),
            compute_metrics=accuracy,
        )
        trainer._save_checkpoint = lambda *_, **__: None
        if options.model is not None and options.align_norms and isinstance(network, MobileNetForImageClassification):
            trainer.align_batch_norm()
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
            result = trainer.evaluate()
    return result["eval_accuracy"]


def accuracy(prediction: object) -> dict[str, float]:
    """Share of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class Run(NamedTuple):
    """One training, without its outcome."""

    start: str
    epochs: int
    network: str
    learning_rate: float
    part: str  # "table", or "choice" of the learning rate
    seed: int


class Results:
    """The runs in a file of JSON lines, and how to make those that it lacks."""

    def __init__(self, file: Path, cifar10: str, weights: str, images: int, held_out: int, folder: Path) -> None:
        self.file, self.weights, self.folder = file, weights, folder
        self.rows = load_splits(cifar10)["train"]
        self.counts = {"training": images, "validation": held_out}
        lines = file.read_text().splitlines() if file.exists() else []
        self.accuracies = {Run(*run): accuracy for *run, accuracy in map(json.loads, lines)}
        self.decoded: dict[tuple[str, int], list[Images]] = {}
        self.converted = folder / "converted"
        convert(weights, self.converted, compare=False)

    def images(self, part: str, size: int) -> list[Images]:
        """Images to train on and to validate on: those of the table come first in the dataset, then the others."""
        if (part, size) not in self.decoded:
            processor = MobileNetImageProcessor(size=size, crop_size=size)
            first = sum(self.counts.values()) * (part == "choice")
            self.decoded[part, size] = []
            for name, count in self.counts.items():
                rows = self.rows.select(range(first, first + count))
                self.decoded[part, size].append(decode(rows, processor, Storage(self.folder), name, quiet=True))
                first += count
        return self.decoded[part, size]

    def accuracy(self, run: Run) -> float:
        """Validation accuracy of a run, which is trained where the file lacks it."""
        if run not in self.accuracies:
            options, _ = STARTS[run.start]
            options = Options(**COMMON, **options, epochs=run.epochs, learning_rate=run.learning_rate, seed=run.seed)
            set_seed(run.seed)
            converted = self.converted if options.model is not None else None
            network = NETWORKS[run.network](options.image_size, converted, self.weights)
            self.accuracies[run] = train(network, options, *self.images(run.part, options.image_size))
            with self.file.open("a") as file:
                file.write(json.dumps([*run, self.accuracies[run]]) + "\n")
            print(*run, f"{self.accuracies[run]:.3f}", flush=True)
        return self.accuracies[run]

    def cell(self, start: str, epochs: int, network: str, seeds: int) -> str:
        """Mean and spread over the seeds, and the learning rate that was chosen."""
        _, rates = STARTS[start]
        rate = max(rates, key=lambda rate: self.accuracy(Run(start, epochs, network, rate, "choice", 0)))
        runs = [100 * self.accuracy(Run(start, epochs, network, rate, "table", seed)) for seed in range(seeds)]
        spread = statistics.stdev(runs) if len(runs) > 1 else 0.0
        return f"{statistics.mean(runs):.1f} ± {spread:.1f} ({rate:g})"


def main(
    cifar10: Annotated[str, typer.Option(help="Parquet file or Hub id of CIFAR-10; its training images are used.")],
    weights: Annotated[str, typer.Option(help="Folder or Hub id of google/mobilenet_v2_1.0_224.")],
    results: Annotated[Path, typer.Option(help="File that collects the runs; those in it are not repeated.")],
    images: Annotated[int, typer.Option(help="Images to train on.")] = 2000,
    held_out: Annotated[int, typer.Option(help="Images to validate on.")] = 1000,
    seeds: Annotated[int, typer.Option(help="Runs of each cell.")] = 3,
    networks: Annotated[list[str] | None, typer.Option(help="Networks to train; by default all.")] = None,
) -> None:
    """Train what the results lack, and print a table of all."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a new classifier is no news here
    keep_memory()
    columns = [(start, epochs) for start in STARTS for epochs in EPOCHS]
    with tempfile.TemporaryDirectory() as folder:
        runs = Results(results, cifar10, weights, images, held_out, Path(folder))
        rows = [[name, *(runs.cell(*column, name, seeds) for column in columns)] for name in networks or NETWORKS]
    header = ["", *(f"{start}, {epochs} epochs" for start, epochs in columns)]
    for row in [header, ["---"] * len(header), *rows]:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    typer.run(main)
