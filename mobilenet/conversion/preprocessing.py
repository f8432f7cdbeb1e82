"""What a file's images must look like: said by the user, by the file or by its publisher; else assumed, aloud."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mobilenet.image_processing_mobilenet import RECIPES, MobileNetImageProcessor
from mobilenet.segmentation_labels import VOC
from mobilenet.tasks import CLASSIFICATION, SEGMENTATION, Task

from .checkpoint import RANGES, Options


# Files that their publishers gave away, by name and number of classes: all of ImageNet.
PUBLISHED = {
    r"(tf2_|tfhub_tf2_)?mobilenet_v[12]_\d\.\d+_\d+\w*\.tflite": "google",
    r"(mobilenet_edgetpu|v3-(large|small)(-minimalistic)?)_\d+_\d\.\d+\w*\.tflite": "google",
    r"mobilenet_\d_\d_\d+_tf\.h5|mobilenet_v2_weights_tf_\w+_\d\.\d+_\d+\.h5": "keras",
    r"mobilenetv2-(7|10|12)(-int8|-qdq)?\.onnx": "torchvision",
}
# Likewise segmenters of PASCAL VOC.
SEGMENTERS = {r"deeplabv3(_257_mv_gpu|_1_default_1|_mnv2_(dm05_)?pascal\w*)?\.tflite": "deeplab"}
# How images are fitted where nobody says it, in words.
FITTED = {"crop": "cropped to the middle 87.5 %", "corner": "shown whole, in the top left corner"}
# With the labels that it writes beside them.
TEACHABLE_MACHINE = r"(keras_model|converted_keras)\.h5|model(_unquant|_quant)?\.tflite|model_edgetpu\.tflite"


class Preprocessing(NamedTuple):
    """How images are prepared for a network, and for the file that it comes from."""

    processor: MobileNetImageProcessor
    feed: MobileNetImageProcessor | None  # of the file, where it scales pixels in part by itself
    warnings: list[str]


def published(name: str, count: int, numbered_labels: bool = False, task: Task = CLASSIFICATION) -> str | None:
    """The recipe of a published file by its name; None of others."""
    if task is SEGMENTATION:
        found = (recipe for pattern, recipe in SEGMENTERS.items() if re.fullmatch(pattern, name))
        return next(found, None) if count == len(VOC) else None
    if numbered_labels and re.fullmatch(TEACHABLE_MACHINE, name):
        return "teachable_machine"
    found = (recipe for pattern, recipe in PUBLISHED.items() if re.fullmatch(pattern, name))
    return next(found, None) if count in (1000, 1001) else None


def find(
    options: Options,
    default: str,
    image_size: int | None,
    *,
    publisher: str | None = None,
    recorded: tuple[Sequence[float], Sequence[float]] | None = None,
    scaling: tuple[Tensor, Tensor] | None = None,
) -> Preprocessing:
    """Decide on preprocessing.

    Args:
        options: What the user says, which counts most.
        default: Recipe to assume where nobody says anything.
        image_size: Side of the images, if it is recorded.
        publisher: Recipe of the file's publisher.
        recorded: Mean and deviation that the file records, of values in 0 to 1.
        scaling: Factor and offset that the network itself applies to its input, of shape () or (C,).
    """
    says_range = options.values() or recorded or options.recipe or publisher
    takes_bytes = scaling is not None and not says_range and _is_for_bytes(*scaling)
    if takes_bytes:
        says_range = recorded = RANGES["0..255"]
    known = {"image_mean": recorded[0], "image_std": recorded[1]} if recorded and not options.recipe else {}
    processor = options.processor(publisher or default, image_size, **known)
    assumed = []
    if not says_range:
        spoken = next(
            (name for name, values in RANGES.items() if set(values[0]) == set(processor.image_mean)),
            "as the recipe says",
        )
        assumed.append(f"that the network takes pixels scaled to {spoken} (--range, --mean and --std say otherwise)")
    if not (options.fit or options.recipe or publisher):
        assumed.append(f"that images are {FITTED[RECIPES[default].fit]} (--fit says otherwise)")
    warnings = [f"The file does not say how to prepare images. Assumed: {', and '.join(assumed)}."] if assumed else []
    if scaling is None:
        return Preprocessing(processor, None, warnings)
    factor, offset = (value.expand(max(value.numel() for value in scaling)).tolist() for value in scaling)
    feed = MobileNetImageProcessor(**_options(processor))
    channels = max(len(factor), len(feed.image_mean))
    mean, std, factor, offset = (
        values * (channels if len(values) == 1 else 1) for values in (feed.image_mean, feed.image_std, factor, offset)
    )
    processor.image_mean = [m - o * s / f for m, s, f, o in zip(mean, std, factor, offset, strict=True)]
    processor.image_std = [s / f for s, f in zip(std, factor, strict=True)]
    return Preprocessing(processor, feed, warnings)


def _is_for_bytes(factor: Tensor, offset: Tensor) -> bool:
    """Whether a scaling makes sense of values from 0 to 255 alone: it makes them small, or centers them.

    TensorFlow's converter may move the factor into the first convolution, and leave the offset.
    """
    return 255 * float(factor.max()) < 32 or float((-offset / factor).max()) > 1.5


def _options(processor: MobileNetImageProcessor) -> dict:
    known = processor.to_dict()
    del known["image_processor_type"]
    return known
