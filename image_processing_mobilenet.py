"""MobileNet image processor: images of any kind to normalized tensors, as transformers' Auto classes load it."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from .postprocessing_mobilenet import label_map, resize_to_image, suppress
from .preprocessing_mobilenet import (
    FITS,
    LATER_OPTIONS,
    OPTIONS,
    RECIPES,
    SUPPRESSION,
    UnreadableImageError,
    flatten,
    on_image,
    open_image,
    place,
    preprocess,
    read_options,
)


def _image_sizes(sizes: Any, count: int, whole: bool = False) -> list[tuple[float, float]]:
    """Height and width of each image, as a sequence or a tensor holds them; whole numbers where pixels are counted.

    Raises:
        ValueError: They are not so many, or not two numbers above 0 each.
    """
    kind = int if whole else float
    try:
        read = [tuple(kind(side) for side in size) for size in sizes]
    except (OverflowError, TypeError, ValueError):
        read = []
    if len(read) != count or not all(len(size) == 2 and all(0 < side < math.inf for side in size) for size in read):
        raise ValueError(f"target_sizes must hold height and width of each of {count} images, got {sizes!r}.")
    return read


class MobileNetImageProcessor(BaseImageProcessor):
    """Resize, crop the center, rescale and normalize images.

    Every argument is also an argument of a call, for that call alone.

    Args:
        do_resize: Whether to resize.
        size: {"shortest_edge": pixels}, {"longest_edge": pixels}, {"height": pixels, "width": pixels}, or an integer
            for the shortest edge.
        resample: Filter, as a member of PIL.Image.Resampling; bilinear by default.
        do_center_crop: Whether to crop the center; a smaller image is padded with black.
        crop_size: {"height": pixels, "width": pixels}, or an integer for a square.
        do_rescale: Whether to multiply values of 0 to 255 by `rescale_factor`. Floats in 0 to 1 count as rescaled
            by 1 / 255 already.
        rescale_factor: 1 / 255 by default.
        do_normalize: Whether to subtract `image_mean` and divide by `image_std`.
        image_mean: A number for each channel; 0.5 by default.
        image_std: A number for each channel; 0.5 by default.
        do_convert_rgb: Whether to convert to three channels, on a white ground where the image is transparent.
            Without it, images keep their channels: grayscale stays one, and what has transparency stays four, for
            networks that take as many; each channel is then resized by itself.
        do_grayscale: Whether to convert to one channel in the end, for networks that take one.
        detail_size: Shortest edge in pixels to which a larger image is reduced before it is resized, so that it
            shows no more detail than the images that a checkpoint was trained on; 32 for those of CIFAR-10.
        pad_size: {"height": pixels, "width": pixels}, or an integer for a square, up to which the bottom and the right
            of a smaller image are padded with zeros once it is normalized; by default, nothing is.
        align_corners: Whether a segmenter's logits are resized with the centers of corner pixels in place, as its
            head's row of SEGMENTATION_HEADS says.
        fast_decode: Whether to decode JPEG files of more than twice `size` at a half, a quarter or an eighth of their
            size, as far as twice `size` remains: several times as fast for photographs of many megapixels, at the
            price of values that differ a little. It holds for paths, URLs and bytes.
        score_threshold: Of detections, which have a score above it, whatever `threshold` is asked for.
        clip_boxes: Whether boxes of detections are clipped to the image before overlaps are computed.
        max_candidates_per_class: How many boxes of each class compete; None for all.
        max_classes_per_box: None where boxes suppress each other class by class. With a number, boxes of different
            classes do, by their best scores, and each is detected for so many of its classes.
        nms_iou_threshold: A box is suppressed whose intersection over union with a better one is more.
        max_detections_per_class: How many detections of a class an image may have.
        max_detections: How many detections an image may have.

    Raises:
        ValueError: An option is not what it allows; the message names option, allowed values and value.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(self, **kwargs: Any) -> None:
        options = read_options({name: kwargs.pop(name) for name in OPTIONS if name in kwargs})
        super().__init__(**kwargs)
        for name, value in options.items():
            setattr(self, name, value)

    @classmethod
    def from_recipe(cls, name: str = "google", image_size: int = 224, **kwargs: Any) -> MobileNetImageProcessor:
        """Configure as a family of checkpoints was evaluated; further options override the recipe's.

        Raises:
            ValueError: No recipe has that name; the message lists those that exist.
        """
        if name not in RECIPES:
            raise ValueError(f"name must be one of {', '.join(RECIPES)}, got {name!r}.")
        recipe = RECIPES[name]
        options = {
            **FITS[recipe.fit](image_size, int(image_size / recipe.crop_fraction)),
            "resample": recipe.resample,
            "image_mean": recipe.mean,
            "image_std": recipe.std,
            "align_corners": recipe.align_corners,
        }
        return cls(**{**options, **kwargs})

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Preprocess one image or many: see `preprocess`."""
        return self.preprocess(images, *args, **kwargs)

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        data_format: str = "channels_first",
        input_data_format: str | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Turn images into the tensor that the network takes.

        Args:
            images: An image, or a list of them: Pillow images of any mode; numpy arrays or torch tensors of shape
                (H, W), (H, W, C) or (C, H, W), or batches of these, of integers in 0 to 255 or of floats in 0 to 255,
                or in 0 to 1 if none of the array is above 1; paths, URLs, or the bytes of a file.
            return_tensors: "pt" for one torch tensor, "np" for one numpy array, None for a list of arrays.
            data_format: "channels_first" for (B, C, H, W), "channels_last" for (B, H, W, C).
            input_data_format: The same for arrays that come; by default read off their shape.
            device: Where a torch tensor shall be.
            **kwargs: Options of the class, for this call.

        Returns:
            pixel_values: float32. As a torch tensor, in the channels-last memory format.

        Raises:
            TypeError: An unknown option, or something that is no image.
            ValueError: An option or an image's values are not allowed, or images end up in different sizes but
                shall make one tensor.
            UnreadableImageError: A path, URL or file that cannot be read; a ValueError.
        """
        options = read_options({name: self._option(name, kwargs) for name in OPTIONS})
        if kwargs:
            raise TypeError(f"unknown option {', '.join(kwargs)}; known are {', '.join(OPTIONS)}.")
        return_tensors = getattr(return_tensors, "value", return_tensors)
        data_format = getattr(data_format, "value", data_format) or "channels_first"
        input_data_format = getattr(input_data_format, "value", input_data_format)
        for name, value, allowed in (
            ("return_tensors", return_tensors, ("pt", "np", None)),
            ("data_format", data_format, ("channels_first", "channels_last")),
            ("input_data_format", input_data_format, ("channels_first", "channels_last", None)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        images = flatten(images)
        if not images:
            raise ValueError("images must hold at least one image, got an empty list.")

        def preprocess_one(image: Any) -> np.ndarray:
            return preprocess(image, options, input_data_format)

        # An image that comes twice is read once: Pillow opens files lazily, which two threads must not do at a time.
        different = {id(image): image for image in images}
        if len(different) > 1:
            # Pillow decodes and resizes without holding Python's lock.
            with ThreadPoolExecutor(min(len(different), os.cpu_count() or 1)) as threads:
                results = dict(zip(different, threads.map(preprocess_one, different.values()), strict=True))
        else:
            results = {key: preprocess_one(image) for key, image in different.items()}
        arrays = [results[id(image)] for image in images]
        if return_tensors is None:
            if data_format == "channels_first":
                arrays = [np.moveaxis(array, -1, 0) for array in arrays]
            return BatchFeature({"pixel_values": arrays})
        shapes = sorted({array.shape for array in arrays})
        if len(shapes) > 1:
            raise ValueError(
                f"images must end up in one shape to make one tensor, got {', '.join(map(str, shapes))}; set "
                "do_resize and do_center_crop, or return_tensors=None."
            )
        batch = np.stack(arrays) if len(arrays) > 1 else arrays[0][None]
        if data_format == "channels_first":
            # The bytes stay where they are: only the strides change, which is torch.channels_last.
            batch = np.moveaxis(batch, -1, 1)
        if return_tensors == "np":
            return BatchFeature({"pixel_values": batch})
        tensor = torch.from_numpy(batch)
        return BatchFeature({"pixel_values": tensor if device is None else tensor.to(device)})

    def post_process_object_detection(
        self, outputs: Any, threshold: float = 0.5, target_sizes: Any = None
    ) -> list[dict[str, torch.Tensor]]:
        """Make detections of what MobileNetForObjectDetection gives, without boxes that a better one covers.

        Args:
            outputs: `scores` of shape (B, anchors, num_labels) and `pred_boxes` of shape (B, anchors, 4).
            threshold: Detections have scores above this.
            target_sizes: Height and width of each image as it came, of shape (B, 2); by default, boxes are relative to
                what the network saw of it.

        Returns:
            For each image `scores` of shape (n,), falling; `labels` of shape (n,), keys of config.id2label; `boxes`
            of shape (n, 4), as (x0, y0, x1, y1), in pixels of the image, where sizes say which, and clipped to it.

        Raises:
            ValueError: There is not a size of two numbers above 0 for each image, or threshold is no number.
        """
        if not isinstance(threshold, Real) or isinstance(threshold, bool) or threshold != threshold:
            raise ValueError(f"threshold must be a number, got {threshold!r}.")
        if target_sizes is not None:
            target_sizes = _image_sizes(target_sizes, len(outputs.scores))
        options = read_options({name: getattr(self, name) for name in OPTIONS})
        suppression = {name: options[name] for name in SUPPRESSION}
        results = []
        for index, (scores, boxes) in enumerate(zip(outputs.scores, outputs.pred_boxes, strict=True)):
            found, labels, edges = suppress(scores, boxes, float(threshold), **suppression)
            if target_sizes is not None:
                height, width = target_sizes[index]
                edges = torch.from_numpy(on_image(edges.cpu().numpy(), place(width, height, options))).to(edges)
            results.append({"scores": found, "labels": labels, "boxes": edges})
        return results

    def _option(self, name: str, kwargs: dict[str, Any]) -> Any:
        value = kwargs.pop(name, None)
        return getattr(self, name) if value is None else value

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[Sequence[int]] | Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[Tensor] | list[BatchFeature]:
        """Turn a segmenter's outputs into label maps that lie over the images exactly.

        Padding is taken off; what a crop left out gets the class of the nearest pixel that it did not.

        Args:
            outputs: Of the network, with logits of shape (B, num_labels, h, w), for images that this processor
                prepared with the options that it has.
            target_sizes: Height and width of each image as it came.
            return_segmentation_scores: Whether to return the resized logits too.

        Returns:
            The class of each pixel, int64: of shape (height, width) for each image; without sizes, (h, w). With
            scores, an object for each image: `segmentation`, which is that, and `segmentation_scores`, the logits of
            each pixel, of shape (num_labels, height, width).

        Raises:
            ValueError: There is not a size for each image, or one is not two positive integers.
        """
        logits = outputs.logits
        if target_sizes is None:
            found, scores = list(logits.argmax(1)), list(logits)
            return _with_scores(found, scores) if return_segmentation_scores else found
        sizes = _image_sizes(target_sizes, len(logits), whole=True)
        options = read_options({name: getattr(self, name) for name in OPTIONS})
        axes = [place(width, height, options) for height, width in sizes]
        found = [label_map(each, axis, self.align_corners) for each, axis in zip(logits, axes, strict=True)]
        if not return_segmentation_scores:
            return found
        scores = [resize_to_image(each, axis, self.align_corners) for each, axis in zip(logits, axes, strict=True)]
        return _with_scores(found, scores)

    def to_dict(self) -> dict[str, Any]:
        """Serialize the options; those that are not every network's, where they say something."""
        options = {k: v for k, v in super().to_dict().items() if k in OPTIONS or not k.startswith("_")}
        return {k: v for k, v in options.items() if k not in LATER_OPTIONS or v != OPTIONS[k][0]}


def _with_scores(label_maps: list[Tensor], scores: list[Tensor]) -> list[BatchFeature]:
    pairs = zip(label_maps, scores, strict=True)
    return [BatchFeature({"segmentation": found, "segmentation_scores": each}) for found, each in pairs]


MobileNetImageProcessor.__signature__ = inspect.Signature(
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default) for name, (default, _) in OPTIONS.items()
)
MobileNetImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["RECIPES", "MobileNetImageProcessor", "UnreadableImageError", "open_image"]
