"""Classification: one class an image."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobilenet.cards import Measured
from mobilenet.configuration_mobilenet import MobileNetConfig
from mobilenet.image_processing_mobilenet import MobileNetImageProcessor
from mobilenet.modeling_mobilenet import MobileNetForImageClassification
from mobilenet.preprocessing_mobilenet import regular
from mobilenet.pretrained import load_network
from mobilenet.progress import progress_bar

from .augment import Augment, Normalize
from .data import CLASSES, Images
from .options import Options
from .report import class_accuracies, evaluate_logits, metrics, plot_confusion
from .task import Scores, Split, TrainingTask, device_of, input_size
from .trainer import ClassifierTrainer


class Classification(TrainingTask):
    """One class an image."""

    labels = CLASSES
    trainer = ClassifierTrainer
    teacher: MobileNetForImageClassification | None = None

    def build(
        self, options: Options, names: list[str]
    ) -> tuple[MobileNetForImageClassification, MobileNetImageProcessor]:
        """From scratch, or from a classifier whose last layer starts anew with more or fewer labels."""
        if options.model is None:
            size = options.image_size or 224
            processor = MobileNetImageProcessor(
                size={"shortest_edge": round(size / (options.crop_fraction or 0.875))},
                crop_size=size,
                detail_size=options.detail_size,
            )
            config = MobileNetConfig(
                architecture=options.architecture or "mobilenet_v2",
                width_multiplier=options.width,
                output_stride=options.output_stride or 32,
                image_size=size,
                num_labels=len(names),
                id2label=dict(enumerate(names)),
                label2id={name: index for index, name in enumerate(names)},
            )
            return MobileNetForImageClassification(config), processor
        model, processor = load_network(options.model, labels=names)
        if options.retain:
            self.teacher, _ = load_network(options.model)
        if options.start_labels is not None:
            start_classifier(model, load_network(options.model)[0].classifier, Path(options.start_labels))
        if options.detail_size:
            processor.detail_size = options.detail_size
        if options.image_size or options.crop_fraction:
            current = input_size(processor)[0]
            size = options.image_size or current
            square = {"height": size, "width": size}
            if options.crop_fraction or processor.do_center_crop:
                fraction = options.crop_fraction or current / processor.size.get("shortest_edge", current)
                processor.size = {"shortest_edge": round(size / fraction)}
                processor.do_resize = processor.do_center_crop = True
            else:
                processor.size = square
            processor.crop_size = square
            model.config.image_size = size
        return model, processor

    def augment(self, options: Options, size: tuple[int, int]) -> nn.Module:
        return Augment(size, options.crop_scale, options.flip, options.trivial_augment, options.erasing)

    def training_side(self, processor: MobileNetImageProcessor) -> int:
        """The whole of the shortest edge, to crop from."""
        return processor.size.get("shortest_edge", max(input_size(processor)))

    def trainer_options(self, processor: MobileNetImageProcessor, names: list[str]) -> dict[str, Any]:
        return {"compute_metrics": evaluate_logits, "teacher": self.teacher}

    def measure(
        self,
        network: MobileNetForImageClassification,
        processor: MobileNetImageProcessor,
        split: Split,
        batch_size: int,
    ) -> Scores:
        images = split.images()
        logits = predict(network, processor, images, batch_size)
        labels = torch.from_numpy(images.labels)
        if split.classes is not None:
            labels = torch.tensor(split.classes)[labels]
        measured = Measured(len(labels), metrics(logits, labels), class_accuracies(logits, labels))
        return Scores(measured, partial(plot_confusion, logits, labels, [*network.config.id2label.values()]))


@torch.no_grad()
def predict(
    model: MobileNetForImageClassification,
    processor: MobileNetImageProcessor,
    images: Images,
    batch_size: int = 128,
) -> Tensor:
    """Logits of images that the processor has resized and cropped, computed in float32: (N, classes)."""
    device = device_of()
    model = model.to(device).eval()
    normalize = Normalize(processor).to(device)
    logits = []
    with progress_bar("measuring") as bar:
        for start in bar.track(range(0, len(images), batch_size)):
            pixels = torch.from_numpy(images.pixels[start : start + batch_size])
            logits.append(model(normalize(pixels.to(device))).logits.float().cpu())
    return torch.cat(logits)


@torch.no_grad()
def start_classifier(model: MobileNetForImageClassification, source: torch.nn.Linear, path: Path) -> None:
    """Give each label the mean weights of the classes of another classifier that it covers.

    Args:
        model: The network whose classifier starts.
        source: The other classifier, on the same features.
        path: JSON file: for each label of the network a list of indices of the other's classes.

    Raises:
        ValueError: The file does not name the network's labels, or no classes of the other one.
    """
    try:
        classes = json.loads(Path(regular(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"start_labels must be a JSON file, got {path}: {error}") from error
    labels = {label: index for index, label in model.config.id2label.items()}
    if not isinstance(classes, dict) or classes.keys() != labels.keys():
        raise ValueError(f"start_labels must name each of the labels {', '.join(labels)} and no other, got {path}.")
    for label, indices in classes.items():
        valid = isinstance(indices, list) and indices and all(type(index) is int for index in indices)
        if not valid or not 0 <= min(indices) <= max(indices) < source.out_features:
            allowed = f"a list of classes from 0 to {source.out_features - 1}"
            raise ValueError(f"start_labels must give {label} {allowed}, got {indices!r}.")
        model.classifier.weight[labels[label]] = source.weight[indices].mean(0)
        model.classifier.bias[labels[label]] = source.bias[indices].mean()
