"""Images with what networks see in them: boxes with labels, overlays, masks with a palette. Pillow alone draws."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .output import Detection, Segment
from .preprocessing_mobilenet import to_rgb
from .segmentation_labels import palette
from .text import clean


Color = tuple[int, int, int]

# Labels are this share of the longer side high, but no more than one of the shorter, and no less than so many pixels.
_TEXT_SHARE, _MAX_TEXT_SHARE, _MIN_TEXT = 0.022, 0.2, 13
_MAX_LETTERS = 60
# A smaller image is enlarged, so that labels fit.
_MIN_SIDE = 480
_OPACITY = 0.5
_SMALLEST_LABELED = 0.005  # share of an image that a class must have to be labeled
_MOST_LABELED = 300  # boxes: finding places for labels takes time by the square of their number
_MAX_BORDER = 16  # pixels
_MAX_JPEG = 65_500  # pixels a side


def label_color(index: int) -> Color:
    """A color for a class in photographs: hues by the golden ratio lie far apart, however many there are."""
    hue = (0.02 + index * 0.6180339887) % 1
    saturation, value = ((0.85, 1.0), (0.6, 1.0), (1.0, 0.8))[index // 7 % 3]
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))


def _on(ground: Color) -> Color:
    """Black or white, whichever is legible on it: the luma of ITU-R BT.601 tells."""
    red, green, blue = ground
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


class _Box(NamedTuple):
    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def area(self) -> float:
        return (self.x1 - self.x0) * (self.y1 - self.y0)

    def shared(self, other: _Box) -> float:
        """The area that two have in common."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return max(0, width) * max(0, height)


class _Canvas:
    """An image that is drawn on, in sizes that fit it."""

    def __init__(self, image: Image.Image, captions: Sequence[str] = ()) -> None:
        self.image = image
        longest = max(image.size)
        self.draw = ImageDraw.Draw(image)
        self.line = max(2, round(longest / 320))
        self._set_size(max(_MIN_TEXT, round(min(_TEXT_SHARE * longest, _MAX_TEXT_SHARE * min(image.size)))))
        widest = max((self.measure(caption)[0] for caption in captions), default=0)
        if widest > image.width:
            self._set_size(max(_MIN_TEXT, int(self.size * image.width / widest)))

    def _set_size(self, size: int) -> None:
        self.size, self.font = size, _font(size)
        self.pad = max(2, round(self.font.size / 4)) if hasattr(self.font, "size") else 2

    def measure(self, text: str) -> tuple[float, float, float]:
        """Width and height of a label, and how far its text lies below its top."""
        left, _, right, bottom = self.draw.textbbox((0, 0), text, font=self.font)
        ascent, descent = self.font.getmetrics() if hasattr(self.font, "getmetrics") else (bottom, 0)
        return right - left + 2 * self.pad, ascent + descent + self.pad, -left

    def label(self, text: str, x: float, y: float, ground: Color) -> None:
        """Write a text on a ground, whose upper left corner is given."""
        width, height, shift = self.measure(text)
        self.draw.rectangle((x, y, x + width - 1, y + height - 1), fill=ground)
        self.draw.text((x + self.pad + shift, y + self.pad / 2), text, font=self.font, fill=_on(ground))

    def inside(self, width: float, height: float, x: float, y: float) -> _Box:
        """A rectangle, moved into the image as far as it fits."""
        x = max(0, min(x, self.image.width - width))
        y = max(0, min(y, self.image.height - height))
        return _Box(x, y, x + width, y + height)


def draw_boxes(image: Image.Image, detections: Sequence[Detection]) -> Image.Image:
    """An image with boxes, labels and scores; the best on top. Of more than 300 boxes, the best have labels.

    Args:
        image: Upright, of any mode. One whose sides are under 480 pixels is enlarged, so that labels are legible.
        detections: Best first, in pixels of the image.
    """
    image, scale = _enlarged(image)
    labeled = detections[:_MOST_LABELED]
    canvas = _Canvas(image, [*map(_caption, labeled)])
    boxes = [_Box(*(scale * edge for edge in detection.box)) for detection in detections]
    places = _place_labels(canvas, boxes[:_MOST_LABELED], labeled)
    for detection, box in reversed(list(zip(detections, boxes, strict=True))):
        x1, y1 = max(box.x0, box.x1 - 1), max(box.y0, box.y1 - 1)
        canvas.draw.rectangle((box.x0, box.y0, x1, y1), outline=label_color(detection.index), width=canvas.line)
    for detection, place in reversed(list(zip(labeled, places, strict=True))):
        canvas.label(_caption(detection), place.x0, place.y0, label_color(detection.index))
    return image


def _enlarged(image: Image.Image) -> tuple[Image.Image, int]:
    """An image in RGB to draw on, and how many times as large it is."""
    scale = -(-_MIN_SIDE // max(image.size))
    image = to_rgb(image)
    return (image.resize((scale * image.width, scale * image.height)) if scale > 1 else image.copy()), scale


def _caption(detection: Detection) -> str:
    return _label(detection.label, detection.score)


def _label(name: str, share: float) -> str:
    name = clean(name)
    shown = name if len(name) <= _MAX_LETTERS else f"{name[: _MAX_LETTERS - 1]}…"
    return f"{shown} {100 * share:.0f} %"


def _place_labels(canvas: _Canvas, boxes: Sequence[_Box], detections: Sequence[Detection]) -> list[_Box]:
    """Where labels go: above a box, below, beside or inside, wherever they hide least of labels and small boxes."""
    places: list[_Box] = []
    for box, detection in zip(boxes, detections, strict=True):
        width, height, _ = canvas.measure(_caption(detection))
        corners = (
            *((box.x0, box.y0 - height), (box.x0, box.y0), (box.x1 - width, box.y0 - height), (box.x0, box.y1)),
            *((box.x1, box.y0), (box.x0 - width, box.y0), (box.x1 - width, box.y1), (box.x0, box.y1 - height)),
        )
        choices = [canvas.inside(width, height, *corner) for corner in corners]
        small = [other for other in boxes if other.area < 4 * width * height]

        def hidden(choice: _Box, small: Sequence[_Box] = small) -> float:
            return 3 * sum(map(choice.shared, places)) + sum(map(choice.shared, small))

        places.append(min(choices, key=hidden))
    return places


def to_mask(label_map: np.ndarray) -> Image.Image:
    """A label map as an image: of mode P with the palette of PASCAL VOC, or of 16 bits beyond 256 classes.

    Args:
        label_map: Integers of shape (H, W).

    Raises:
        ValueError: A class is beyond what 16 bits hold.
    """
    if label_map.dtype != np.uint8:
        if label_map.max(initial=0) > 65535:
            raise ValueError(f"a mask must have classes from 0 to 65535, got {label_map.max()}.")
        return Image.fromarray(label_map.astype(np.uint16))
    mask = Image.fromarray(label_map).convert("L")
    mask.putpalette(palette())
    return mask


def encode(image: Image.Image, suffix: str) -> bytes:
    """An image as a file.

    Args:
        image: The image.
        suffix: ".jpg" or ".png".

    Raises:
        ValueError: It is too large for JPEG.
    """
    file = io.BytesIO()
    if suffix == ".jpg":
        if max(image.size) > _MAX_JPEG:
            raise ValueError(f"{image.width}x{image.height} is over {_MAX_JPEG} pixels a side, which JPEG holds")
        image.save(file, "JPEG", quality=90)
    else:
        image.save(file, "PNG", compress_level=6 if image.mode == "P" else 3)
    return file.getvalue()


def draw_segments(
    image: Image.Image, label_map: np.ndarray, segments: Iterable[Segment], background: int | None = None
) -> Image.Image:
    """An image under the colors of its classes, with their borders and names.

    Args:
        image: Upright, of any mode. One whose sides are under 480 pixels is enlarged, so that labels are legible.
        label_map: The class of each pixel, of shape (H, W), the image's.
        segments: Classes in it, largest first.
        background: A class that is left as it is.
    """
    image, scale = _enlarged(image)
    if scale > 1:
        label_map = label_map.repeat(scale, 0).repeat(scale, 1)
    colored = _colored(label_map)
    shown = Image.blend(image, colored, _OPACITY)
    if background is not None:
        shown.paste(image, mask=Image.fromarray(label_map == background))
    border = Image.fromarray(_border(label_map, max(1, min(_MAX_BORDER, round(min(image.size) / 400)))))
    shown.paste((255, 255, 255), mask=border)
    named = [each for each in segments if each.index != background and each.area >= _SMALLEST_LABELED]
    texts = [_label(segment.label, segment.area) for segment in named]
    canvas = _Canvas(shown, texts)
    small = _reduced(label_map)
    scale_x, scale_y = shown.width / small.width, shown.height / small.height
    values = np.asarray(small)
    places: list[_Box] = []
    for segment, text in zip(named, texts, strict=True):
        deepest = _deepest(values == segment.index)
        if deepest is None:
            continue
        width, height, _ = canvas.measure(text)
        x, y = (deepest[0] + 0.5) * scale_x - width / 2, (deepest[1] + 0.5) * scale_y - height / 2
        # Above or below, where another label is in the way.
        choices = [canvas.inside(width, height, x, y + step * height) for step in (0, -1, 1, -2, 2)]
        places.append(min(choices, key=lambda choice: sum(map(choice.shared, places))))
        canvas.label(text, places[-1].x0, places[-1].y0, label_color(segment.index))
    return shown


def _colored(label_map: np.ndarray) -> Image.Image:
    """A label map in colors that are lighter than those of a mask, and stand out from photographs."""
    colors = np.array([label_color(index) for index in range(int(label_map.max()) + 1)], np.uint8)
    if label_map.dtype != np.uint8:
        return Image.fromarray(colors[label_map])
    image = Image.fromarray(label_map).convert("L")
    image.putpalette(colors.tobytes())
    return image.convert("RGB")


def _border(label_map: np.ndarray, width: int) -> np.ndarray:
    """Whether a pixel of another class is near, to the right or below."""
    border = np.zeros(label_map.shape, bool)
    for step in range(1, width + 1):
        border[:, :-step] |= label_map[:, step:] != label_map[:, :-step]
        border[:-step] |= label_map[step:] != label_map[:-step]
    return border


_REDUCED = 128


def _reduced(label_map: np.ndarray) -> Image.Image:
    """A label map of at most 128 pixels a side."""
    image = Image.fromarray(label_map if label_map.dtype == np.uint8 else label_map.astype(np.int32))
    scale = min(1, _REDUCED / max(image.size))
    size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    return image.resize(size, Image.Resampling.NEAREST)


def _deepest(region: np.ndarray) -> tuple[int, int] | None:
    """Column and row of a pixel that lies furthest from a region's border; None for no pixel."""
    if not region.any():
        return None
    # A frame of one pixel, which the filter takes away first.
    left = Image.fromarray(np.pad(region, 1)).convert("L")
    while (less := left.filter(ImageFilter.MinFilter(3))).getbbox() is not None:
        left = less
    rows, columns = np.nonzero(np.asarray(left)[1:-1, 1:-1])
    middle = len(rows) // 2
    return int(columns[middle]), int(rows[middle])


def background_of(labels: Mapping[int, str]) -> int | None:
    """The class that stands for nothing; None where there is none."""
    return 0 if labels.get(0) == "background" else None
