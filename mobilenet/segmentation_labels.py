"""The classes of PASCAL VOC, which published segmenters know, and the colors that its masks have."""

from __future__ import annotations


# VOC2012, Section 3 and "VOClabelcolormap" of the development kit, host.robots.ox.ac.uk/pascal/VOC/voc2012.
VOC = (
    "background",
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
IGNORED = 255  # the label of pixels that do not count: borders of objects, which its masks show in a pale color


def color(label: int) -> tuple[int, int, int]:
    """The color of a label, as the masks of PASCAL VOC have it: RGB in 0 to 255.

    Of every three bits of a label, from the lowest on, the first belongs to red, the second to green, the third to
    blue; what comes first counts most.

    Source: VOClabelcolormap of the development kit of VOC2012.
    """
    return tuple(sum(((label >> 3 * place + channel) & 1) << 7 - place for place in range(8)) for channel in range(3))


def palette() -> list[int]:
    """The colors of all 256 labels, one number after the other, as Pillow's putpalette takes them."""
    return [value for label in range(256) for value in color(label)]


__all__ = ["IGNORED", "VOC", "color", "palette"]
