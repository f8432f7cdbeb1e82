import subprocess
import sys
from pathlib import Path

import pytest
from mobilenet.architectures_mobilenet import Block, Width, make_divisible

from mobilenet import ARCHITECTURES, MobileNetConfig


@pytest.mark.parametrize(
    ("channels", "divisor", "expected"),
    [
        # By hand from slim's rule: nearest multiple, ties up, at least 8, at most 10 % down.
        (32 * 0.35, 8, 16),  # 11.2 -> 8 would lose 29 %
        (24 * 0.35, 8, 8),
        (96 * 0.35, 8, 32),  # 33.6
        (160 * 1.3, 8, 208),
        (24 * 1.3, 8, 32),
        (1280 * 1.4, 8, 1792),
        (12, 8, 16),
        (3, 8, 8),
        (3, 16, 16),
        # V1 keeps the whole part.
        (1024 * 0.3, 1, 307),
        (3.2, 1, 8),
    ],
)
def test_make_divisible(channels, divisor, expected):
    assert make_divisible(channels, divisor) == expected


def blocks(architecture, **config):
    return [block for stage in MobileNetConfig(architecture, **config).stages for block in stage]


def test_tables_are_the_papers():
    # Table 1 of arXiv:1704.04861: strides of the depthwise convolutions and filters of the 1x1 convolutions.
    v1 = ARCHITECTURES["mobilenet_v1"]
    assert [block.stride for block in blocks("mobilenet_v1")] == [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    assert [block.out_channels for block in blocks("mobilenet_v1")] == [64, 128, 128, 256, 256] + 6 * [512] + 2 * [
        1024
    ]
    assert (v1.stem, v1.head) == ((3, 32, 2), None)
    # Table 2 of arXiv:1801.04381.
    v2 = ARCHITECTURES["mobilenet_v2"]
    assert [tuple(row) for row in v2.rows] == [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    assert (v2.stem, v2.head) == ((3, 32, 2), (1, 1280, 1))


def test_tables_cannot_be_changed():
    with pytest.raises(TypeError):
        ARCHITECTURES["mobilenet_v1"] = ARCHITECTURES["mobilenet_v2"]
    with pytest.raises(AttributeError):
        ARCHITECTURES["mobilenet_v1"].hidden_act = "relu"
    assert all(hash(architecture) for architecture in ARCHITECTURES.values())  # nothing inside can be changed either


def test_rows_by_hand():
    # The first two rows of V2, at width 0.5: 32, 16 and 24 channels become 16, 8 and 16.
    width = Width(0.5, 8)
    first, second = ARCHITECTURES["mobilenet_v2"].rows[:2]
    assert list(first.blocks(16, width, "relu6")) == [Block("inverted", 16, 16, 8, "relu6", 3, 1, 1)]
    assert list(second.blocks(8, width, "relu6")) == [
        Block("inverted", 8, 48, 16, "relu6", 3, 2, 1),
        Block("inverted", 16, 96, 16, "relu6", 3, 1, 1),
    ]
    # The second row of V1.
    row = ARCHITECTURES["mobilenet_v1"].rows[1]
    assert list(row.blocks(64, Width(), "relu")) == [Block("separable", 64, 64, 128, "relu", 3, 2, 1)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_chain(architecture):
    channels = MobileNetConfig(architecture, width_multiplier=0.75).stem_channels
    for block in blocks(architecture, width_multiplier=0.75):
        assert block.in_channels == channels
        channels = block.out_channels


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_feature_maps_are_named_by_growing_stride(architecture):
    assert ARCHITECTURES[architecture].strides == {
        "stem": 2,
        "stage1": 2,
        "stage2": 4,
        "stage3": 8,
        "stage4": 16,
        "stage5": 32,
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("output_stride", "strides", "dilations"),
    [
        (32, [1, 2, 2, 2, 2], [[1], [1], [1], [1], [1]]),
        (16, [1, 2, 2, 2, 1], [[1], [1], [1], [1], [1, 2]]),
        (8, [1, 2, 2, 1, 1], [[1], [1], [1], [1, 2], [2, 4]]),
    ],
)
def test_output_stride_turns_strides_into_dilation(architecture, output_stride, strides, dilations):
    stages = MobileNetConfig(architecture=architecture, output_stride=output_stride).stages
    assert [stage[0].stride for stage in stages] == strides
    assert [sorted({block.dilation for block in stage}) for stage in stages] == dilations


@pytest.mark.any_version
def test_the_tables_need_the_standard_library_alone():
    command = "import sys, runpy; runpy.run_path(sys.argv[1]); print(sys.modules.keys() & {'torch', 'transformers'})"
    file = Path(__file__).parents[1] / "architectures_mobilenet.py"
    done = subprocess.run([sys.executable, "-c", command, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
