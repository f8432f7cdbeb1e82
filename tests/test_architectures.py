import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mobilenet.architectures_mobilenet import Block, Conv, Width, make_divisible
from mobilenet.layers_mobilenet import ConvNormAct, ResidualBlock
from torch import nn

from mobilenet import ARCHITECTURES, MobileNetConfig, MobileNetForImageClassification, MobileNetModel


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
    assert (v1.stem, v1.head, v1.pre_logits) == (Conv(3, 32, 2), None, None)
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
    assert (v2.stem, v2.head, v2.pre_logits) == (Conv(3, 32, 2), Conv(1, 1280, 1), None)


# Tables 1 and 2 of arXiv:1905.02244: kernel, exp size, #out, SE, NL, s.
V3_LARGE = """
3 16 16 - RE 1, 3 64 24 - RE 2, 3 72 24 - RE 1, 5 72 40 y RE 2, 5 120 40 y RE 1, 5 120 40 y RE 1, 3 240 80 - HS 2,
3 200 80 - HS 1, 3 184 80 - HS 1, 3 184 80 - HS 1, 3 480 112 y HS 1, 3 672 112 y HS 1, 5 672 160 y HS 2,
5 960 160 y HS 1, 5 960 160 y HS 1
"""
V3_SMALL = """
3 16 16 y RE 2, 3 72 24 - RE 2, 3 88 24 - RE 1, 5 96 40 y HS 2, 5 240 40 y HS 1, 5 240 40 y HS 1, 5 120 48 y HS 1,
5 144 48 y HS 1, 5 288 96 y HS 2, 5 576 96 y HS 1, 5 576 96 y HS 1
"""


@pytest.mark.parametrize(("size", "printed"), [("large", V3_LARGE), ("small", V3_SMALL)])
def test_tables_of_v3_are_the_papers(size, printed):
    acts = {"relu": "RE", "hardswish": "HS"}
    found = [
        f"{b.kernel_size} {b.hidden_channels} {b.out_channels} {'-y'[b.squeeze_channels > 0]} {acts[b.act]} {b.stride}"
        for b in blocks(f"mobilenet_v3_{size}")
    ]
    assert found == " ".join(printed.split()).split(", ")
    plain = blocks(f"mobilenet_v3_{size}_minimalistic")
    assert {(b.kernel_size, b.squeeze_channels, b.act) for b in plain} == {(3, 0, "relu")}
    assert [b.hidden_channels for b in plain] == [b.hidden_channels for b in blocks(f"mobilenet_v3_{size}")]
    # A quarter of the expanded channels, in multiples of 8: 72 / 4 = 18 gives 24, as 16 would lose more than 10 %.
    assert {b.squeeze_channels * 4 for b in blocks("mobilenet_v3_large")} == {0, 96, 128, 480, 672, 960}


# official/vision/modeling/backbones/mobilenet.py of tensorflow/models: depthwise kernels, channels and expansion.
V4_CONV_MEDIUM = """
0 3 48 4, 3 5 80 4, 3 3 80 2, 3 5 160 6, 3 3 160 4, 3 3 160 4, 3 5 160 4, 3 3 160 4, 3 0 160 4, 0 0 160 2, 3 0 160 4,
5 5 256 6, 5 5 256 4, 3 5 256 4, 3 5 256 4, 0 0 256 4, 3 0 256 4, 3 5 256 2, 5 5 256 4, 0 0 256 4, 0 0 256 4, 5 0 256 2
"""


def test_table_of_v4_is_that_of_the_reference():
    found = [
        f"{b.start_kernel_size} {b.kernel_size} {b.out_channels} {b.hidden_channels // b.in_channels}"
        for b in blocks("mobilenet_v4_conv_medium")
    ]
    assert found == " ".join(V4_CONV_MEDIUM.split()).split(", ")


def test_the_small_v4_convolves_where_the_paper_fuses():
    """The reference, and timm's weights, activate both convolutions of what the paper's table calls FusedIB."""
    first, second, third, fourth = blocks("mobilenet_v4_conv_small")[:4]
    assert {block.kind for block in (first, second, third, fourth)} == {"conv"}
    assert [block.kernel_size for block in (first, second, third, fourth)] == [3, 1, 3, 1]
    model = MobileNetModel(MobileNetConfig("mobilenet_v4_conv_small"))
    assert {type(model.stages[0][number].act) for number in (0, 1)} == {nn.ReLU}


def test_table_of_the_edgetpu_is_that_of_googles_weights(data):
    """Kernels, strides, activations and sums of the shared file, operator by operator."""
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    content = (data / "tflite" / "mobilenet_edgetpu_224_1.0_uint8.tflite").read_bytes()
    graph = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
    main, theirs = graph.subgraphs[0], []
    for operator in main.operators:
        code, options = graph.operatorCodes[operator.opcodeIndex], operator.builtinOptions
        code = max(code.builtinCode, code.deprecatedBuiltinCode)
        if code == schema.BuiltinOperator.ADD:
            theirs.append("add")
        elif code in (schema.BuiltinOperator.CONV_2D, schema.BuiltinOperator.DEPTHWISE_CONV_2D):
            out, height, _, inputs = main.tensors[operator.inputs[1]].shape
            shape = (inputs, 1) if code == schema.BuiltinOperator.DEPTHWISE_CONV_2D else (out, inputs)
            theirs.append((*map(int, shape), int(height), options.strideH, bool(options.fusedActivationFunction)))

    model = MobileNetForImageClassification(MobileNetConfig("mobilenet_edgetpu", num_labels=1001)).eval()
    ours = []

    def note(unit, *_):
        conv = unit.conv
        acts = not isinstance(unit.act, nn.Identity)
        ours.append((*conv.weight.shape[:2], conv.kernel_size[0], conv.stride[0], acts))

    for module in model.modules():
        if isinstance(module, ConvNormAct):
            module.register_forward_hook(note)
        if isinstance(module, ResidualBlock) and module.has_shortcut:
            module.register_forward_hook(lambda *_: ours.append("add"))
    model(torch.zeros(1, 3, 32, 32))
    assert ours == theirs[:-1]
    assert theirs[-1] == (1001, 1280, 1, 1, False)  # the classifier


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
    # The third and fourth of V3 small, at width 0.5: 24 and 40 channels become 16 and 24, 88 / 24 * 16 = 58.7 is 56.
    third, fourth = ARCHITECTURES["mobilenet_v3_small"].rows[2:4]
    assert list(third.blocks(16, width, None)) == [Block("inverted", 16, 56, 16, "relu")]
    expected = Block("inverted", 16, 64, 24, "hardswish", 5, 2, squeeze_channels=16)
    assert list(fourth.blocks(16, width, None)) == [expected]
    # Of V4: a universal inverted bottleneck, and attention, whose heads no width changes.
    row = ARCHITECTURES["mobilenet_v4_conv_medium"].rows[1]
    assert list(row.blocks(48, Width(1.0, 8), "relu")) == [
        Block("inverted", 48, 192, 80, "relu", 5, 2, start_kernel_size=3)
    ]
    row = ARCHITECTURES["mobilenet_v4_hybrid_medium"].rows[7]
    assert list(row.blocks(80, width, "relu")) == [
        Block("attention", 80, 256, 80, "relu", heads=4, key_stride=2, has_scale=True)
    ]


def test_repeats_are_multiplied_and_rounded_up_but_at_the_ends():
    # timm's mobilenetv2_120d, by hand: 1, 2, 3, 4, 3, 3 and 1 times 1.4.
    config = MobileNetConfig(repeat_multiplier=1.4)
    assert [row.repeats for row in config.table.rows] == [1, 3, 5, 6, 5, 5, 1]
    assert config.depths == [1, 3, 5, 11, 6]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_chain(architecture):
    channels = MobileNetConfig(architecture, width_multiplier=0.75).stem_block.out_channels
    for block in blocks(architecture, width_multiplier=0.75):
        assert block.in_channels == channels
        channels = block.out_channels


# The others begin with blocks at the stem's resolution.
FOUR_STAGES = [name for name in ARCHITECTURES if "v3_small" in name or "v4" in name]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_feature_maps_are_named_by_growing_stride(architecture):
    strides = (2, 4, 8, 16, 32) if architecture in FOUR_STAGES else (2, 2, 4, 8, 16, 32)
    names = ("stem", *(f"stage{number}" for number in range(1, len(strides))))
    assert ARCHITECTURES[architecture].strides == dict(zip(names, strides, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("output_stride", "strides", "dilations"),
    [
        (32, [2, 2, 2, 2], [[1], [1], [1], [1]]),
        (16, [2, 2, 2, 1], [[1], [1], [1], [1, 2]]),
        (8, [2, 2, 1, 1], [[1], [1], [1, 2], [2, 4]]),
    ],
)
def test_output_stride_turns_strides_into_dilation(architecture, output_stride, strides, dilations):
    stages = MobileNetConfig(architecture=architecture, output_stride=output_stride).stages
    first = [] if architecture in FOUR_STAGES else [1]
    assert [stage[0].stride for stage in stages] == first + strides
    assert [sorted({block.dilation for block in stage}) for stage in stages] == [first] * len(first) + dilations


def test_anti_aliasing_is_where_blocks_stride():
    found = [
        block.anti_aliasing for block in blocks("mobilenet_v4_conv_small", anti_aliasing="blur", output_stride=16)
    ]
    strides = [block.stride for block in blocks("mobilenet_v4_conv_small", output_stride=16)]
    assert found == ["blur" if stride > 1 else "none" for stride in strides]
    assert strides.count(2) == 3


@pytest.mark.any_version
def test_the_tables_need_the_standard_library_alone():
    command = "import sys, runpy; runpy.run_path(sys.argv[1]); print(sys.modules.keys() & {'torch', 'transformers'})"
    file = Path(__file__).parents[1] / "architectures_mobilenet.py"
    done = subprocess.run([sys.executable, "-c", command, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
