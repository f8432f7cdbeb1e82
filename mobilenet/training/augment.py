"""What images go through on the device on their way to the network in training: varied, mixed, normalized."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from kornia.augmentation import RandomErasing
from kornia.augmentation.auto import TrivialAugment
from torch import Tensor, nn

from mobilenet.image_processing_mobilenet import MobileNetImageProcessor


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

    # TrivialAugment draws one operation for all that it is given, so a batch is given in so many parts.
    PARTS = 8

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
        x = pixels.float()
        if x.shape[-1] > 2 * max(size):  # a crop looks at no more than four pixels for each of its own
            x = F.interpolate(x, (2 * max(size),) * 2, mode="bilinear", antialias=True)
        x = self._crop(x, size)
        if self.policy is None and self.erase is None:
            return x
        x = x / 255
        if self.policy is not None:
            x = torch.cat([self.policy(part) for part in x.chunk(self.PARTS)])
        if self.erase is not None:
            x = self.erase(x)
        return x.clamp(0, 1) * 255

    def _crop(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Crop, mirror and resize in one pass. kornia does it in several, each over whole images of full size."""
        count, like = len(x), {"device": x.device, "dtype": x.dtype}
        area = torch.empty(count, **like).uniform_(self.crop_scale, 1)
        ratio = torch.empty(count, **like).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
        if self.crop_scale == 1:
            ratio.fill_(1)
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        shift_x, shift_y = (torch.empty(count, **like).uniform_(-1, 1) * (1 - side) for side in (width, height))
        mirror = 1 - 2.0 * torch.empty(count, **like).bernoulli_(0.5 if self.flip else 0)
        zero = torch.zeros(count, **like)
        boxes = torch.stack([width * mirror, zero, shift_x, zero, height, shift_y], -1).view(-1, 2, 3)
        grid = F.affine_grid(boxes, [count, x.shape[1], *size], align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def mix(pixels: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Blend each image and its target with those of another one, all by one share drawn from Beta(alpha, alpha).

    Shape: (B, C, H, W), (B, classes) -> the same

    Source: mixup, Section 2 (arXiv:1710.09412).
    """
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    order = torch.randperm(len(pixels)).to(pixels.device)
    return torch.lerp(pixels[order], pixels, share), torch.lerp(targets[order], targets, share)
