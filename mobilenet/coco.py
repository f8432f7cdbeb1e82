"""The numbers of COCO's categories."""

from __future__ import annotations

from collections.abc import Mapping


# COCO (arXiv:1405.0312) numbers 91 categories, of which these have no boxes.
_WITHOUT_BOXES = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
_NAMES = [
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
]
CATEGORIES = dict(zip(_NAMES, (n for n in range(1, 91) if n not in _WITHOUT_BOXES), strict=True))


def categories_of(labels: Mapping[int, str]) -> dict[int, int]:
    """Categories of labels by their indices: COCO's own where most labels are COCO's, or else from 1 on."""
    known = {index: CATEGORIES[label] for index, label in labels.items() if label in CATEGORIES}
    if 2 * len(known) > len(labels):
        return known | {index: index + 1 for index in labels.keys() - known.keys()}
    return {index: index + 1 for index in labels}
