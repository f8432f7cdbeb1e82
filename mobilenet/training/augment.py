"""What images go through on the device on their way to the network in training: varied, mixed, normalized."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from kornia.augmentation import RandomErasing
from kornia.augmentation.auto import TrivialAugment
from torch import Tensor, nn

from mobilenet.image_processing_mobilenet import MobileNetImageProcessor
from mobilenet.postprocessing_mobilenet import overlap

from .boxes import NO_BOX
from .masks import IGNORED


class Normalize(nn.Module):
    """Bytes to what the network takes: the processor's rescaling and normalization.

    Shape: (B, C, H, W) in 0 to 255 -> (B, C, H, W)
    """

    def __init__(self, processor: MobileNetImageProcessor) -> None:
        super().__init__()
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0], [1.0])
        mean, std = (torch.tensor(term).view(-1, 1, 1) for term in (mean, std))
        self.register_buffer("scale", factor / std, persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.addcmul(self.shift, pixels.float(), self.scale)


# Of TrivialAugment's operations those that leave every pixel in its place, as kornia gives their strengths.
PHOTOMETRIC = (
    [("auto_contrast", 0, 1)],
    [("equalize", 0, 1)],
    [("posterize", 0.0, 4)],
    [("solarize", 0.0, 1.0)],
    [("contrast", 0.1, 1.9)],
    [("brightness", 0.1, 1.9)],
    [("sharpness", 0.1, 1.9)],
)
# TrivialAugment draws one operation for all that it is given, so a batch is given in so many parts.
PARTS = 8


class Crops(NamedTuple):
    """A window on each image of a batch, all of shape (B,): its size and center, and whether it is mirrored."""

    width: Tensor  # 1 for the whole image
    height: Tensor
    x: Tensor  # of the center, where the image reaches from -1 to 1
    y: Tensor
    mirror: Tensor  # 1 or -1

    def sample(self, x: Tensor, size: tuple[int, int], mode: str = "bilinear", padding: str = "border") -> Tensor:
        """What the windows show, mirrored and resized in one pass. kornia does it in several, over whole images."""
        zero = torch.zeros_like(self.width)
        rows = [self.width * self.mirror, zero, self.x, zero, self.height, self.y]
        grid = F.affine_grid(torch.stack(rows, -1).view(-1, 2, 3), [len(x), x.shape[1], *size], align_corners=False)
        return F.grid_sample(x, grid, mode, padding_mode=padding, align_corners=False)

    def move(self, boxes: Tensor) -> Tensor:
        """Boxes (B, K, 4), as left, top, right, bottom in shares of the image, in shares of the windows."""
        width, height, x, y, mirror = (term.view(-1, 1, 1) for term in self)
        center = torch.cat([x, y, x, y], -1)
        moved = (2 * boxes - 1 - center) / torch.cat([width, height, width, height], -1)
        left, top, right, bottom = moved.split(1, -1)
        mirrored = torch.cat([-right, top, -left, bottom], -1)
        return (torch.where(mirror < 0, mirrored, moved) + 1) / 2


def _draw(count: int, least: float, ratio: float, like: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Width and height of windows: at least so much of the area, and sides of at most this ratio."""
    area = torch.empty(count, **like).uniform_(least, 1)
    ratio = torch.empty(count, **like).uniform_(-math.log(ratio), math.log(ratio)).exp()
    if least == 1:
        ratio.fill_(1)
    return (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)


def _shift(length: Tensor) -> Tensor:
    """Where the window's center lies, anywhere in the image."""
    return torch.empty_like(length).uniform_(-1, 1) * (1 - length)


def _mirror(count: int, flip: bool, like: dict[str, Any]) -> Tensor:
    return 1 - 2.0 * torch.empty(count, **like).bernoulli_(0.5 if flip else 0)


def _reduce(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Floats; a crop looks at no more than four pixels for each of its own."""
    x = pixels.float()
    if x.shape[-1] > 2 * max(size):
        x = F.interpolate(x, (2 * max(size),) * 2, mode="bilinear", antialias=True)
    return x


def _recolor(x: Tensor, policy: nn.Module | None) -> Tensor:
    """Apply one operation of a policy to each part of a batch of bytes."""
    if policy is None:
        return x
    x = x / 255
    return torch.cat([policy(part) for part in x.chunk(PARTS)]).clamp(0, 1) * 255


class Augment(nn.Module):
    """Vary a batch of images, on the device where it is.

    Shape: (B, C, S, S) in 0 to 255 -> (B, C, *size) in 0 to 255

    Args:
        size: Height and width that the network trains on.
        crop_scale: Least share of the image's area that a crop keeps; 1 for no crops.
        flip: Whether to mirror half of the images.
        trivial_augment: Whether to apply one random operation of random strength.
        erasing: Probability of painting a random box over with the mean color.

    Source: random resized crops: Szegedy et al., Section 6 (arXiv:1409.4842); TrivialAugment: arXiv:2103.10158;
        random erasing: arXiv:1708.04896.
    """

    def __init__(
        self, size: tuple[int, int], crop_scale: float, flip: bool, trivial_augment: bool, erasing: float
    ) -> None:
        super().__init__()
        self.size, self.crop_scale, self.flip = size, crop_scale, flip
        self.policy = TrivialAugment() if trivial_augment else None
        self.erase = RandomErasing(p=erasing, value=0.5) if erasing else None

    @torch.no_grad()
    def forward(self, pixels: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Vary images; `size` is another height and width than the usual one."""
        size = size or self.size
        x = _reduce(pixels, size)
        x = self._crop(x, size)
        if self.policy is None and self.erase is None:
            return x
        x = x / 255
        if self.policy is not None:
            x = torch.cat([self.policy(part) for part in x.chunk(PARTS)])
        if self.erase is not None:
            x = self.erase(x)
        return x.clamp(0, 1) * 255

    def _crop(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        count, like = len(x), {"device": x.device, "dtype": x.dtype}
        width, height = _draw(count, self.crop_scale, 4 / 3, like)
        crops = Crops(width, height, _shift(width), _shift(height), _mirror(count, self.flip, like))
        return crops.sample(x, size)


class AugmentBoxes(nn.Module):
    """Vary a batch of images and their boxes, on the device where they are.

    Shape: (B, C, S, S) in 0 to 255, (B, K, 6) -> (B, C, *size) in 0 to 255, (B, K, 6)

    A crop is the whole image, or it overlaps one of the objects by at least an IoU that is drawn from a list, of those
    for which a window is found. Boxes whose centers lie outside are left out, the others clipped.

    Args:
        size: Height and width that the network trains on.
        crop_scale: Least share of the image's area that a crop keeps; 1 for no crops.
        flip: Whether to mirror half of the images.
        trivial_augment: Whether to apply one random operation of random strength that leaves pixels in their places.

    Source: SSD, Section 2.2, "Data augmentation" (arXiv:1512.02325).
    """

    OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
    TRIES = 50

    def __init__(self, size: tuple[int, int], crop_scale: float, flip: bool, trivial_augment: bool) -> None:
        super().__init__()
        self.size, self.crop_scale, self.flip = size, crop_scale, flip
        self.policy = TrivialAugment([*PHOTOMETRIC]) if trivial_augment else None

    @torch.no_grad()
    def forward(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = _reduce(pixels, self.size)
        labels, boxes = labels.clone(), labels[..., 2:].to(x.dtype)
        is_box = labels[..., 0] >= 0
        crops = self._choose(boxes, is_box & (labels[..., 1] == 0))
        moved = crops.move(boxes)
        center = (moved[..., :2] + moved[..., 2:]) / 2
        moved = moved.clamp(0, 1)
        kept = is_box & ((center > 0) & (center < 1)).all(-1) & (moved[..., 2:] > moved[..., :2]).all(-1)
        labels[..., 2:] = moved
        labels[~kept] = NO_BOX
        return _recolor(crops.sample(x, self.size), self.policy), labels

    def _choose(self, boxes: Tensor, counts: Tensor) -> Crops:
        """A window on each image: the first of many that fits, or the whole image.

        Args:
            boxes: Of shape (B, K, 4).
            counts: Which of them are objects, of shape (B, K).
        """
        batch, like = len(boxes), {"device": boxes.device, "dtype": boxes.dtype}
        drawn = _draw(batch * self.TRIES, self.crop_scale, 2.0, like)
        tries = [term.view(batch, -1) for term in (*drawn, *map(_shift, drawn))]
        width, height, x, y = tries
        windows = (torch.stack([x - width, y - height, x + width, y + height], -1) + 1) / 2
        overlaps = overlap(windows[:, :, None], boxes[:, None])
        center = ((boxes[..., :2] + boxes[..., 2:]) / 2)[:, None]
        inside = ((center > windows[:, :, None, :2]) & (center < windows[:, :, None, 2:])).all(-1) & counts[:, None]
        best = overlaps.masked_fill(~inside, -1).amax(-1)
        best = torch.where(counts.any(-1, keepdim=True), best, 1.0)  # where there are no objects, all windows fit
        fits = best[..., None] >= torch.tensor(self.OVERLAPS, **like)
        # As if overlaps were drawn until one has a window that fits; the whole image, which comes last, always does.
        drawn = F.pad(fits.any(1).float(), (0, 1), value=1.0).multinomial(1)
        is_crop = (drawn[:, 0] < len(self.OVERLAPS)) & (self.crop_scale < 1)
        fits = fits.gather(2, drawn.clamp(max=len(self.OVERLAPS) - 1)[:, None].expand(-1, self.TRIES, -1))[..., 0]
        first = fits.to(torch.uint8).argmax(-1, keepdim=True)
        whole = (1.0, 1.0, 0.0, 0.0)
        chosen = (torch.where(is_crop, t.gather(1, first)[:, 0], w) for t, w in zip(tries, whole, strict=True))
        return Crops(*chosen, _mirror(batch, self.flip, like))


class AugmentMasks(nn.Module):
    """Vary a batch of images and their masks alike, on the device where they are.

    Shape: (B, C, S, S) in 0 to 255, (B, S, S) -> (B, C, *size) in 0 to 255, (B, *size)

    An image is scaled and then cropped, or set on a gray ground that counts for nothing.

    Args:
        size: Height and width that the network trains on.
        crop_scale: Least share of the image's area that a crop keeps; 1 for no scaling and no crops.
        flip: Whether to mirror half of the images.
        trivial_augment: Whether to apply one random operation of random strength that leaves pixels in their places.

    Source: random scales from 0.5 on, crops and flips: DeepLab V3, Section 4.1 (arXiv:1706.05587).
    """

    LEAST_SCALE = 0.5

    def __init__(self, size: tuple[int, int], crop_scale: float, flip: bool, trivial_augment: bool) -> None:
        super().__init__()
        self.size, self.crop_scale, self.flip = size, crop_scale, flip
        self.policy = TrivialAugment([*PHOTOMETRIC]) if trivial_augment else None

    @torch.no_grad()
    def forward(self, pixels: Tensor, masks: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Vary images and masks; `size` is another height and width than the usual one."""
        size = size or self.size
        x = _reduce(pixels, size)
        count, like = len(x), {"device": x.device, "dtype": x.dtype}
        largest = -math.log(self.crop_scale) / 2
        least = math.log(self.LEAST_SCALE) if self.crop_scale < 1 else 0.0
        side = torch.empty(count, **like).uniform_(-largest, -least).exp()
        crops = Crops(side, side, _shift(side), _shift(side), _mirror(count, self.flip, like))
        gray = 127.5
        x = crops.sample(x - gray, size, padding="zeros") + gray
        # What lies outside is sampled as 0, and classes count from 1 meanwhile.
        moved = crops.sample(masks[:, None].to(x.dtype) + 1, size, "nearest", "zeros")[:, 0]
        moved = torch.where(moved == 0, IGNORED, moved - 1).to(masks.dtype)
        return _recolor(x, self.policy), moved


def mix(pixels: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Blend each image and its target with those of another one, all by one share drawn from Beta(alpha, alpha).

    Shape: (B, C, H, W), (B, classes) -> the same

    Source: mixup, Section 2 (arXiv:1710.09412).
    """
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    order = torch.randperm(len(pixels)).to(pixels.device)
    return torch.lerp(pixels[order], pixels, share), torch.lerp(targets[order], targets, share)
