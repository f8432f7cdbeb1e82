"""What makes the layers fast on a CPU: detours to what they compute anyway, up to rounding.

For each, whether it pays, and the detour. Best times of one thread:

                                                       batch 16         batch 1
  convolve_shifted, in a fused network             297 -> 176 ms    10.4 ->  9.9 ms
  folding for a call, in a network as it loads     445 -> 231 ms    12.6 -> 11.7 ms
  convolve_in_float32, in a training step of 32 under bfloat16 autocast: 750 -> 473 ms
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def channels_last(x: Tensor) -> Tensor:
    """Lay out (B, C, H, W) as convolutions like it best, where torch can: not under torch.func.vmap."""
    try:
        return x.contiguous(memory_format=torch.channels_last)
    except RuntimeError:  # it has more dimensions than it shows
        return x


def makes_graph() -> bool:
    """Whether torch records calls, to run or export them later."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_cheaper_to_shift(conv: nn.Conv2d) -> bool:
    """Whether to pad a SAME convolution without a copy of its input: where that is no smaller than the output.

    Gradients cost more than the copy: oneDNN's kernels for those of a depthwise convolution want no more padding than
    its kernel reaches.
    """
    # Without a branch on the size, one graph serves every size.
    return (
        not makes_graph()
        and not torch.is_grad_enabled()
        and conv.in_channels * conv.stride[0] ** 2 >= conv.out_channels
    )


def convolve_shifted(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, pads: list[int]) -> Tensor:
    """Convolve with SAME padding by padding alike on both sides, which torch does without a copy.

    A lopsided pad differs from a symmetric one by a shift of the sampling grid. Padding one stride more on both sides
    and leaving out the first output makes that shift on the small output.

    Args:
        conv: Convolution with a stride.
        x: Its input, of shape (B, in, H, W).
        weight: The weight to use.
        bias: The bias to use.
        pads: Rows and columns that SAME adds in all.
    """
    stride = conv.stride[0]
    skips = [pad % 2 for pad in pads]
    padding = [pad // 2 + skip * stride for pad, skip in zip(pads, skips, strict=True)]
    y = F.conv2d(x, weight, bias, stride, padding, conv.dilation, conv.groups)
    if not any(skips):
        return y
    height, width = (-(-size // stride) for size in x.shape[-2:])
    y = y[:, :, skips[0] : skips[0] + height, skips[1] : skips[1] + width]
    return channels_last(y)  # a view would slow down all that follows


def is_cheaper_to_fold(conv: nn.Conv2d, norm: nn.Module, x: Tensor, conv_class: type[nn.Conv2d]) -> bool:
    """Whether to fold the batch norm for this call alone: a pass over activations takes longer than one over weights.

    The layers must be called where anything but the result depends on them: gradients, statistics, hooks, exported
    graphs.
    """
    return (
        x.device.type == "cpu"
        and x.dtype.itemsize >= 4  # with fewer bits, a weight would be rounded twice
        and not makes_graph()
        and is_untouched(norm, nn.BatchNorm2d)
        and is_untouched(conv, conv_class)
        and type(conv.weight) is nn.Parameter
        and not (norm.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
    )


def is_untouched(module: nn.Module, cls: type) -> bool:
    """Whether a module is one of a class as it was written: no hook, wrapper or subclass has a say in its call."""
    everywhere = nn.modules.module
    return type(module) is cls and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or "forward" in vars(module)
    )


def trains_faster_in_float32(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether autocast on a CPU should let a convolution be.

    Where a depthwise kernel strides or a map has no more than 2x2 pixels, oneDNN has no fast bfloat16 gradients: on a
    processor with AVX512-BF16 they take six times as long as in float32, and a training step twice as long.
    """
    return (
        conv.groups > 1
        and (conv.stride[0] > 1 or x.shape[-1] <= 2)
        and x.device.type == "cpu"
        and conv.weight.dtype == torch.float32
        and torch.is_autocast_enabled("cpu")
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def convolve_in_float32(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve without autocast; the result has the type of the input."""
    with torch.autocast("cpu", enabled=False):
        return conv.convolve(x.float(), conv.weight, conv.bias).to(x.dtype)
