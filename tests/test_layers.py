from functools import partial

import pytest
import torch
import torch.nn.functional as F
from mobilenet.layers_mobilenet import Conv2d, same_padding
from torch import nn


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "dilation", "expected"),
    # tf.nn's notes on padding, by hand.
    [(224, 3, 2, 1, 1), (225, 3, 2, 1, 2), (5, 3, 1, 1, 2), (5, 3, 1, 4, 8), (7, 1, 1, 1, 0), (1, 3, 2, 1, 2)],
)
def test_same_padding(size, kernel_size, stride, dilation, expected):
    assert same_padding(size, kernel_size, stride, dilation) == expected


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (6, 6), (6, 7), (7, 6), (7, 7)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(("channels", "groups"), [((4, 4), 4), ((3, 16), 1)])
def test_same_convolution_equals_padding_first(size, stride, dilation, channels, groups):
    conv = Conv2d(*channels, 3, stride, dilation=dilation, groups=groups, padding="same")
    x = torch.randn(2, channels[0], *size).to(memory_format=torch.channels_last)
    (top, bottom), (left, right) = (
        (total // 2, total - total // 2)
        for total in (max((-(-n // stride) - 1) * stride + 2 * dilation + 1 - n, 0) for n in size)
    )
    padded = F.pad(x, (left, right, top, bottom))
    expected = F.conv2d(padded, conv.weight, conv.bias, stride, dilation=dilation, groups=groups)
    assert expected.shape[-2:] == tuple(-(-n // stride) for n in size)
    result = conv(x)
    torch.testing.assert_close(result, expected)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_autocast_leaves_float32_where_it_is_faster():
    conv = Conv2d(8, 8, 3, 2, groups=8, padding="same")
    weight, convolve, seen = torch.randn(2, 8, 8, 8), conv.convolve, []
    results = []
    for module in (conv, partial(convolve, weight=conv.weight, bias=conv.bias)):
        conv.zero_grad()
        torch.manual_seed(0)
        x = torch.randn(2, 8, 16, 16).bfloat16().requires_grad_()
        conv.convolve = lambda x, *args: seen.append(x.dtype) or convolve(x, *args)
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
            assert y.dtype == torch.bfloat16
            with torch.no_grad():
                conv(x)
        (y.float() * weight).sum().backward()
        results.append((y.float(), x.grad.float(), conv.weight.grad))
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16]
    for ours, expected in zip(*results, strict=True):
        assert ours.abs().max() > 0.1
        # bfloat16 has 8 bits.
        torch.testing.assert_close(ours, expected, rtol=0, atol=expected.abs().max().item() / 64)


def test_a_convolution_is_made_by_torchs_arguments():
    """PEFT makes its layers so, of what it reads off a layer."""
    conv = Conv2d(3, 8, 3, 2, padding="same", bias=False)
    again = type(conv)(3, 8, conv.kernel_size, conv.stride, conv.padding, bias=False)
    again.load_state_dict(conv.state_dict())
    for size in ((6, 7), (7, 6)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(again(x), conv(x), rtol=0, atol=0)
    arguments = (4, 6, (3, 5), (2, 1), (1, 2), 1, 2, True, "reflect")
    ours, theirs = Conv2d(*arguments), nn.Conv2d(*arguments)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
