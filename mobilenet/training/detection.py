"""Detection: boxes of classes, by SSD and SSDLite."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from mobilenet.cards import Measured
from mobilenet.configuration_mobilenet import MobileNetConfig
from mobilenet.heads_mobilenet import DETECTORS
from mobilenet.image_processing_mobilenet import MobileNetImageProcessor
from mobilenet.modeling_mobilenet import MobileNetForObjectDetection
from mobilenet.progress import progress_bar
from mobilenet.tasks import DETECTION

from .augment import AugmentBoxes, Normalize
from .boxes import BOXES, ENTRY, NO_BOX
from .options import Options
from .report import plot_precisions
from .task import Scores, Split, TrainingTask, device_of, labels_by_index, load_start, stretch
from .trainer import ImageTrainer


# Detections of lower scores are not measured. Source: SSD, Section 3.7 (arXiv:1512.02325)
LEAST_SCORE = 0.01


def default_detector(architecture: str) -> str:
    """The first SSDLite for an architecture, or the first SSD, or else one that takes any."""
    stem = architecture.removesuffix("_reduced_tail")
    fits = [name for name, table in DETECTORS.items() if table.architecture.removesuffix("_reduced_tail") == stem]
    return min(fits, key=lambda name: not DETECTORS[name].is_lite, default="ssd_mobilenet_v1")


def targets(labels: Tensor) -> list[dict[str, Tensor]]:
    """What detectors take as labels, of entries (B, K, 6): crowds are left out."""
    result = []
    for entries in labels:
        entries = entries[(entries[:, 0] >= 0) & (entries[:, 1] == 0)]
        low, high = entries[:, 2:4], entries[:, 4:]
        boxes = torch.cat([(low + high) / 2, high - low], -1)
        result.append({"class_labels": entries[:, 0].long(), "boxes": boxes})
    return result


def entries_of(detections: list[dict[str, Tensor]]) -> Tensor:
    """Detections of images as entries: label, score and corners, filled up with NO_BOX: (B, D, 6)."""
    most = max(1, *(len(found["scores"]) for found in detections))
    result = detections[0]["boxes"].new_full((len(detections), most, ENTRY), NO_BOX)
    for entries, found in zip(result, detections, strict=True):
        parts = [found["labels"][:, None].to(result.dtype), found["scores"][:, None], found["boxes"]]
        entries[: len(found["scores"])] = torch.cat(parts, -1)
    return result


class AveragePrecision:
    """COCO's average precision over many batches of detections, by pycocotools.

    torchmetrics' own, which calls the same code, asks for torchvision. Boxes may be relative to the image: how much
    two of them overlap does not depend on the unit.

    Args:
        names: Of the classes.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self.images, self.expected, self.found = 0, [], []

    def update(self, detections: Tensor, labels: Tensor) -> None:
        """Add images: detections as entries_of gives them, (B, D, 6), and labels as Boxes.stack does, (B, K, 6)."""
        for into, entries, second in ((self.found, detections, "score"), (self.expected, labels, "iscrowd")):
            for image, kept in enumerate(entries.double().cpu().numpy(), self.images):
                for label, value, left, top, right, bottom in kept[kept[:, 0] >= 0].tolist():
                    width, height = right - left, bottom - top
                    into.append(
                        {
                            "id": len(into) + 1,  # 0 counts as no match
                            "image_id": image,
                            "category_id": int(label),
                            "bbox": [left, top, width, height],
                            "area": width * height,
                            "iscrowd": 0,
                            second: value if second == "score" else int(value),
                        }
                    )
        self.images += len(labels)

    def compute(self) -> tuple[dict[str, float], list[float | None], np.ndarray]:
        """What all images score.

        Returns:
            Mean average precision over IoU of 0.5 to 0.95, and at 0.5 and 0.75 alone; by class, None where there are
            no objects; precisions at IoU 0.5, of shape (recalls, classes).
        """
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self._coco(self.expected), self._coco(self.found), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        names = ("mean_average_precision", "mean_average_precision_50", "mean_average_precision_75")
        metrics = dict(zip(names, map(float, evaluation.stats[:3]), strict=True))
        # IoU, recall, class, area, number of detections: of all areas, and the largest number.
        precisions = evaluation.eval["precision"][..., 0, -1]
        by_class = [float(part.mean()) if (part >= 0).all() else None for part in np.moveaxis(precisions, 2, 0)]
        return metrics, by_class, precisions[0]

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float]:
        """What the Trainer calls for each batch."""
        self.update(prediction.predictions, prediction.label_ids)
        if not compute_result:
            return {}
        metrics, *_ = self.compute()
        self.reset()
        return metrics

    def _coco(self, annotations: list[dict[str, Any]]) -> COCO:
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image} for image in range(self.images)],
            "categories": [{"id": index, "name": name} for index, name in enumerate(self.names)],
            "annotations": annotations,
        }
        coco.createIndex()
        return coco


class DetectorTrainer(ImageTrainer):
    """Trains a detector on images and their boxes: see ImageTrainer.

    Args:
        processor: Makes detections of what the network gives.
    """

    metric = "mean_average_precision"
    measures_batches = True

    def __init__(self, *args: Any, processor: MobileNetImageProcessor, **kwargs: Any) -> None:
        self.processor = processor
        super().__init__(*args, **kwargs)

    def loss(self, model: nn.Module, pixel_values: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The detector's own; in evaluation with its detections."""
        outputs = model(pixel_values=pixel_values, labels=targets(labels))
        if model.training:
            return outputs.loss, {}
        found = self.processor.post_process_object_detection(outputs, threshold=LEAST_SCORE)
        return outputs.loss, {"detections": entries_of(found)}


class Detection(TrainingTask):
    """Any number of boxes an image."""

    labels = BOXES
    trainer = DetectorTrainer
    packages = ("pycocotools",)

    def build(self, options: Options, names: list[str]) -> tuple[MobileNetForObjectDetection, MobileNetImageProcessor]:
        """From scratch, from a classifier's backbone, or from a detector."""
        if options.model is None:
            name = options.detector or default_detector(options.architecture or "mobilenet_v2")
            table = _table(name)
            config = MobileNetConfig(
                architecture=options.architecture or table.architecture,
                width_multiplier=options.width,
                output_stride=options.output_stride or 32,
                image_size=options.image_size or table.image_size,
                detector=name,
                **labels_by_index(names),
                **dict(table.config),
            )
            model, processor, is_new = MobileNetForObjectDetection(config), MobileNetImageProcessor(), True
        else:
            model, processor, is_new = load_start(options, names, DETECTION, "detector", DETECTORS, default_detector)
        table = _table(model.config.detector)
        if is_new:
            for option, value in table.suppression._asdict().items():
                setattr(processor, option, value)
        model.config.image_size = options.image_size or (table.image_size if is_new else model.config.image_size)
        stretch(processor, model.config.image_size)
        reduced = model.config.output_stride * 2 ** (len(table.extra_channels) - 1)
        if options.images_per_batch < 2 and model.config.image_size <= 2 * reduced:
            raise ValueError(
                "batch_size must be at least 2 for a detector whose last map is one pixel, normalized over the batch, "
                f"got {options.images_per_batch}."
            )
        return model, processor

    def augment(self, options: Options, size: tuple[int, int]) -> nn.Module:
        return AugmentBoxes(size, options.crop_scale, options.flip, options.trivial_augment)

    def trainer_options(self, processor: MobileNetImageProcessor, names: list[str]) -> dict[str, Any]:
        return {"processor": processor, "compute_metrics": AveragePrecision(names)}

    @torch.no_grad()
    def measure(
        self, network: MobileNetForObjectDetection, processor: MobileNetImageProcessor, split: Split, batch_size: int
    ) -> Scores:
        """Average precision of what the processor makes of the network's outputs.

        Raises:
            ValueError: The processor does not show the network the whole of an image, stretched.
        """
        if processor.do_center_crop or processor.pad_size is not None or "height" not in processor.size:
            raise ValueError("fit must be stretch for a detector to be measured: boxes are relative to the image.")
        images, device = split.images(), device_of()
        names = [*network.config.id2label.values()]
        network, normalize, scores = (
            network.to(device).eval(),
            Normalize(processor).to(device),
            AveragePrecision(names),
        )
        with progress_bar("measuring") as bar:
            for start in bar.track(range(0, len(images), batch_size)):
                batch = images.batch(range(start, min(start + batch_size, len(images))))
                outputs = network(normalize(batch["pixels"].to(device)))
                found = processor.post_process_object_detection(outputs, threshold=LEAST_SCORE)
                scores.update(entries_of(found), _renumber(batch["labels"], split.classes))
        metrics, by_class, precisions = scores.compute()
        return Scores(Measured(len(images), metrics, by_class), partial(plot_precisions, precisions, names))


def _renumber(labels: Tensor, classes: Sequence[int] | None) -> Tensor:
    """Entries with the network's classes in place of the dataset's."""
    if classes is not None:
        own = labels[..., 0]
        labels[..., 0] = torch.where(own < 0, own, torch.tensor(classes)[own.long().clamp(min=0)].to(own.dtype))
    return labels


def _table(name: str) -> Any:
    if name not in DETECTORS:
        raise ValueError(f"detector must be one of {', '.join(DETECTORS)}, got {name!r}.")
    return DETECTORS[name]
