"""Segmentation: a class for each pixel, by DeepLab V3 and LR-ASPP."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex

from mobilenet.cards import Measured
from mobilenet.configuration_mobilenet import MobileNetConfig
from mobilenet.heads_mobilenet import SEGMENTATION_HEADS
from mobilenet.image_processing_mobilenet import MobileNetImageProcessor
from mobilenet.modeling_mobilenet import MobileNetForSemanticSegmentation
from mobilenet.progress import progress_bar
from mobilenet.tasks import SEGMENTATION

from .augment import AugmentMasks
from .data import IMAGE, LABEL, name_row, tell
from .masks import IGNORED, Masks
from .options import Options
from .report import plot_matrix
from .task import Scores, Split, TrainingTask, device_of, labels_by_index, load_start, stretch
from .trainer import ImageTrainer


_COUNTED = 1 << 22  # pixels at a time
IMAGE_SIZE = 513  # DeepLab V3, Section 4.1 (arXiv:1706.05587)


def default_head(architecture: str) -> str:
    """What segments on an architecture, as its paper has it: MobileNetV3, Section 6.4; MobileNetV2, Section 6.3."""
    return "lraspp" if architecture.startswith("mobilenet_v3") else "deeplab_v3_light"


class MeanIou:
    """Intersection over union by class over the pixels of many images, by torchmetrics.

    Args:
        names: Of the classes.
        device: Where the maps are.
        ignored: Label of the pixels that do not count.
    """

    def __init__(self, names: list[str], device: str | torch.device = "cpu", ignored: int = IGNORED) -> None:
        given = {"num_classes": len(names), "ignore_index": ignored, "validate_args": False}
        given["sync_on_compute"] = False  # every process has all maps, or is the only one that measures
        self.metrics = MetricCollection(
            {
                "iou": MulticlassJaccardIndex(average="none", **given),
                "accuracy": MulticlassAccuracy(average="micro", **given),
                "confusion": MulticlassConfusionMatrix(**given),
            }
        ).to(device)

    def update(self, maps: Tensor, labels: Tensor) -> None:
        """Add predicted and true classes of pixels: (..., H, W)."""
        # In bands, as the metrics make many integers of 64 bits of each pixel.
        rows = max(1, _COUNTED // maps[..., 0, :].numel())
        for part, expected in zip(maps.split(rows, -2), labels.split(rows, -2), strict=True):
            self.metrics.update(part.long(), expected.long())

    def compute(self) -> tuple[dict[str, float], list[float | None], np.ndarray]:
        """What all images score.

        Returns:
            Mean IoU of the classes that there are, predicted or labeled, and the share of right pixels; IoU by class,
            None where there is none; shares of labels by prediction, of shape (labels, predictions).
        """
        result = {name: value.cpu() for name, value in self.metrics.compute().items()}
        counts = result["confusion"].double()
        known = counts.sum(0) + counts.sum(1) > 0
        by_class = [float(iou) if there else None for iou, there in zip(result["iou"], known, strict=True)]
        metrics = {
            "mean_iou": float(result["iou"][known].mean()) if known.any() else 0.0,
            "pixel_accuracy": float(result["accuracy"]),
        }
        return metrics, by_class, (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float]:
        """What the Trainer calls for each batch."""
        self.metrics.to(prediction.predictions.device)
        self.update(prediction.predictions, prediction.label_ids)
        if not compute_result:
            return {}
        metrics, *_ = self.compute()
        self.metrics.reset()
        return metrics


class SegmenterTrainer(ImageTrainer):
    """Trains a segmenter on images and their masks: see ImageTrainer.

    Args:
        processor: Makes label maps of what the network gives.
    """

    metric = "mean_iou"
    measures_batches = True

    def __init__(self, *args: Any, processor: MobileNetImageProcessor, **kwargs: Any) -> None:
        self.processor = processor
        super().__init__(*args, **kwargs)

    def vary(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Vary images and masks alike."""
        return self.augment(pixels, labels, self._size())

    def loss(self, model: nn.Module, pixel_values: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy over pixels; in evaluation with label maps of the network's input size."""
        outputs = model(pixel_values=pixel_values, labels=labels.long())
        if model.training:
            return outputs.loss, {}
        sizes = [tuple(labels.shape[-2:])] * len(labels)
        maps = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        return outputs.loss, {"maps": torch.stack(maps)}


class Segmentation(TrainingTask):
    """A mask of classes an image."""

    trainer = SegmenterTrainer

    def __init__(self) -> None:
        self.labels = Masks()

    def build(
        self, options: Options, names: list[str]
    ) -> tuple[MobileNetForSemanticSegmentation, MobileNetImageProcessor]:
        """From scratch, from a classifier's backbone, or from a segmenter."""
        if options.model is None:
            config = MobileNetConfig(
                architecture=options.architecture or "mobilenet_v2",
                width_multiplier=options.width,
                output_stride=options.output_stride or 16,
                image_size=options.image_size or IMAGE_SIZE,
                segmentation_head=options.segmentation_head or default_head(options.architecture or "mobilenet_v2"),
                **labels_by_index(names),
            )
            model, processor, is_new = MobileNetForSemanticSegmentation(config), MobileNetImageProcessor(), True
        else:
            model, processor, is_new = load_start(
                options, names, SEGMENTATION, "segmentation_head", SEGMENTATION_HEADS, default_head, output_stride=16
            )
        if options.images_per_batch < 2 and model.config.segmentation.kind == "atrous pyramid":
            raise ValueError(
                f"batch_size must be at least 2 for {model.config.segmentation_head}, whose pooled features are "
                f"normalized over the batch, got {options.images_per_batch}."
            )
        processor.align_corners = SEGMENTATION_HEADS[model.config.segmentation_head].align_corners
        model.config.semantic_loss_ignore_index = IGNORED
        model.config.image_size = options.image_size or (IMAGE_SIZE if is_new else model.config.image_size)
        stretch(processor, model.config.image_size)
        return model, processor

    def augment(self, options: Options, size: tuple[int, int]) -> nn.Module:
        return AugmentMasks(size, options.crop_scale, options.flip, options.trivial_augment)

    def trainer_options(self, processor: MobileNetImageProcessor, names: list[str]) -> dict[str, Any]:
        return {"processor": processor, "compute_metrics": MeanIou(names)}

    @torch.no_grad()
    def measure(
        self,
        network: MobileNetForSemanticSegmentation,
        processor: MobileNetImageProcessor,
        split: Split,
        batch_size: int,
    ) -> Scores:
        """Mean IoU over the pixels of the images as they come, whatever their sizes."""
        device = device_of()
        names = [*network.config.id2label.values()]
        network, scores, count = network.to(device).eval(), MeanIou(names, device, -1), 0
        classes = np.arange(256)
        if split.classes is not None:
            known = split.classes[:IGNORED]  # a mask has no others
            classes[: len(known)] = known
        classes[IGNORED] = -1  # 255 may be a class of the network
        with progress_bar("measuring") as bar:
            task = bar.add_task("", total=len(split.rows))
            for images, masks in self._whole(split, processor, batch_size):
                for pixel_values, masks_of_size in _by_size(images, masks):
                    outputs = network(pixel_values.to(device))
                    sizes = [mask.shape for mask in masks_of_size]
                    maps = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
                    for predicted, mask in zip(maps, masks_of_size, strict=True):
                        scores.update(predicted[None], torch.from_numpy(classes[mask])[None].to(device))
                count += len(images)
                bar.update(task, completed=count)
        if not count:
            raise ValueError("there must be at least one readable image to measure on, got none.")
        metrics, by_class, shares = scores.compute()
        return Scores(Measured(count, metrics, by_class), partial(plot_matrix, shares, names))

    def _whole(
        self, split: Split, processor: MobileNetImageProcessor, batch_size: int
    ) -> Iterator[tuple[list[Tensor], list[np.ndarray]]]:
        """What the network sees of images, with masks of the images' own sizes.

        Raises:
            ValueError: One cannot be read, and is not to be left out.
        """
        reader = split.reader

        def read(row: Any, label: Any) -> tuple[Tensor, np.ndarray] | str:
            try:
                image: Image.Image = reader.image(row)
                mask = self.labels.decode_whole(label, image, reader.source)
                return processor(image, return_tensors="pt")["pixel_values"][0], mask
            except ValueError as error:
                return name_row(row, error)

        with ThreadPoolExecutor() as pool:
            for rows in split.rows.iter(batch_size):
                found = [*pool.map(read, rows[IMAGE], rows[LABEL])]
                for broken in (one for one in found if isinstance(one, str)):
                    if not split.skip_unreadable:
                        raise ValueError(f"{broken}. Set skip_unreadable to leave it out.")
                    if not split.is_known:
                        tell(f"left out {broken}")
                whole = [one for one in found if not isinstance(one, str)]
                if whole:
                    yield tuple(map(list, zip(*whole, strict=True)))


def _by_size(images: list[Tensor], masks: list[np.ndarray]) -> Iterator[tuple[Tensor, list[np.ndarray]]]:
    """Batches of one size each: processors may keep the shapes of images."""
    for size in dict.fromkeys(image.shape for image in images):
        chosen = [index for index, image in enumerate(images) if image.shape == size]
        yield torch.stack([images[index] for index in chosen]), [masks[index] for index in chosen]
