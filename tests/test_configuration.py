import json
import re
from typing import ClassVar

import pytest
from mobilenet.heads_mobilenet import DETECTORS
from transformers import AutoConfig

from mobilenet import ARCHITECTURES, PRESETS, MobileNetConfig


# slim/nets/mobilenet_v1.md and slim/nets/mobilenet/README.md list 16 checkpoints of V1, 22 of V2 and 6 of V3.
def test_presets_are_those_that_were_published():
    counts = {"mobilenet_v1": 16, "mobilenet_v2": 22, "mobilenet_v3": 6, "mobilenet_edgetpu": 1, "mobilenet_v4": 11}
    for family, count in counts.items():
        assert sum(name.startswith(family) for name in PRESETS) == count
    # Beside the network of courses, four segmenters and the detectors.
    assert len(PRESETS) == sum(counts.values()) + 1 + 4 + len(DETECTORS)
    assert {"mobilenet_v1_0.25_128", "mobilenet_v2_1.4_224", "mobilenet_v2_0.35_96"} <= PRESETS.keys()
    assert {"mobilenet_v3_large_1.0_224", "mobilenet_v3_small_0.75_224"} <= PRESETS.keys()
    assert {"mobilenet_v3_large_minimalistic_1.0_224", "mobilenet_edgetpu_1.0_224"} <= PRESETS.keys()
    assert {"mobilenet_v4_conv_small_224", "mobilenet_v4_hybrid_large_384"} <= PRESETS.keys()
    assert not {"mobilenet_v2_1.4_192", "mobilenet_v3_large_minimalistic_0.75_224"} & PRESETS.keys()
    for name in PRESETS:
        MobileNetConfig.from_preset(name)


def test_preset_fills_fields_and_yields_to_arguments():
    config = MobileNetConfig.from_preset("mobilenet_v1_0.75_192", num_labels=7, image_size=200)
    assert (config.architecture, config.width_multiplier) == ("mobilenet_v1", 0.75)
    assert (config.image_size, config.num_labels) == (200, 7)


def test_unknown_preset_lists_those_that_exist():
    with pytest.raises(ValueError, match=r"name must be one of mobilenet_v1_1\.0_224, .*, got 'mobilenet_v9'"):
        MobileNetConfig.from_preset("mobilenet_v9")


@pytest.mark.parametrize(
    ("architecture", "width", "shrink", "expected"),
    [
        ("mobilenet_v1", 0.5, False, 512),
        ("mobilenet_v2", 0.5, False, 1280),
        ("mobilenet_v2", 0.5, True, 640),
        ("mobilenet_v2", 1.4, False, 1792),
        ("mobilenet_v1_head", 0.5, False, 1024),
        ("mobilenet_v3_large", 0.75, False, 1280),
        ("mobilenet_v3_small", 0.5, True, 512),
        ("mobilenet_v4_conv_small", 0.5, False, 1280),
    ],
)
def test_head_shrinks_only_if_asked(architecture, width, shrink, expected):
    config = MobileNetConfig(architecture=architecture, width_multiplier=width, shrink_head=shrink)
    assert config.feature_channels == expected


def test_the_head_grows_and_the_stem_scales_unless_told_otherwise():
    assert MobileNetConfig(width_multiplier=1.2).feature_channels == 1536
    assert MobileNetConfig(width_multiplier=1.2, grow_head=False).feature_channels == 1280
    assert MobileNetConfig(width_multiplier=1.2).stem_block.out_channels == 40
    assert MobileNetConfig(width_multiplier=1.2, scale_stem=False).stem_block.out_channels == 32
    # Where a convolution follows the pooling, it alone is the last.
    config = MobileNetConfig("mobilenet_v3_large", 0.75)
    assert (config.head_block.out_channels, config.pre_logits_block.out_channels) == (720, 1280)


def test_dropout_defaults_to_the_papers_drop_probability():
    assert MobileNetConfig(architecture="mobilenet_v1").classifier_dropout == 0.001
    assert MobileNetConfig(architecture="mobilenet_v2").classifier_dropout == 0.2
    assert MobileNetConfig(classifier_dropout=0.0).classifier_dropout == 0


def test_the_activations_of_v3_are_by_the_rows_unless_one_is_given(tmp_path):
    def acts(config):
        ends = (config.stem_block, config.head_block, config.pre_logits_block)
        return {b.act for stage in config.stages for b in stage}, {b.act for b in ends}

    config = MobileNetConfig("mobilenet_v3_large")
    assert config.hidden_act is None
    assert acts(config) == ({"relu", "hardswish"}, {"hardswish"})
    config.save_pretrained(tmp_path)
    assert acts(MobileNetConfig.from_pretrained(tmp_path)) == acts(config)
    assert acts(MobileNetConfig("mobilenet_v3_large", hidden_act="silu")) == ({"silu"}, {"silu"})
    assert MobileNetConfig("mobilenet_v4_hybrid_large").hidden_act == "gelu"


@pytest.mark.parametrize("architecture", ["mobilenet_v1", "mobilenet_v2"])
def test_the_activation_is_by_the_table_unless_it_is_given(architecture, tmp_path):
    assert MobileNetConfig(architecture).hidden_act == "relu6"
    config = MobileNetConfig(architecture, hidden_act="relu")
    assert {block.act for stage in config.stages for block in stage} == {config.stem_block.act} == {"relu"}
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["hidden_act"] == "relu"
    (tmp_path / "config.json").write_text(json.dumps(fields | {"hidden_act": None}))
    loaded = MobileNetConfig.from_pretrained(tmp_path)
    assert loaded.hidden_act == loaded.to_dict()["hidden_act"] == "relu6"


@pytest.mark.parametrize(
    ("made_with", "fused", "has"),
    [
        (True, False, True),
        (True, True, False),
        (False, True, False),  # how fused networks were saved at first
        (False, False, False),
    ],
)
def test_fused_alone_says_that_batch_norms_are_gone(made_with, fused, has):
    config = MobileNetConfig(use_batch_norm=made_with, fused=fused)
    assert (config.use_batch_norm, config.fused, config.has_batch_norm) == (made_with, fused, has)


*_FIRST, _LAST = ARCHITECTURES
ARCHITECTURE_NAMES = f"{', '.join(_FIRST)} or {_LAST}"


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("architecture", "resnet", ARCHITECTURE_NAMES),
        ("architecture", ["mobilenet_v1"], ARCHITECTURE_NAMES),
        ("width_multiplier", 0, "a number above 0 and at most 8"),
        ("width_multiplier", float("nan"), "a number above 0 and at most 8"),
        ("width_multiplier", "1.0", "a number above 0 and at most 8"),
        ("width_multiplier", True, "a number above 0 and at most 8"),
        ("width_multiplier", 1e9, "a number above 0 and at most 8"),
        ("num_channels", 0, "an integer from 1 to 4096"),
        ("image_size", 224.5, "an integer from 1 to 65536"),
        ("output_stride", 7, "8, 16 or 32"),
        ("output_stride", 32.0, "8, 16 or 32"),
        ("hidden_act", "tanh", "relu, relu6, hardswish, silu or gelu"),
        ("depthwise_activation", 1, "true or false"),
        ("padding", "valid", "same or symmetric"),
        ("use_batch_norm", "no", "true or false"),
        ("batch_norm_eps", 0.0, "a number above 0 and at most 1"),
        ("batch_norm_eps", 10**300, "a number above 0 and at most 1"),
        ("batch_norm_momentum", 1.5, "a number from 0 to 1"),
        ("classifier_dropout", 1.0, "a drop probability from 0 to below 1"),
        ("channel_divisor", 0, "an integer from 1 to 1024"),
        ("shrink_head", None, "true or false"),
        ("grow_head", 1, "true or false"),
        ("scale_stem", "no", "true or false"),
        ("repeat_multiplier", 0.5, "a number from 1 to 4"),
        ("repeat_multiplier", float("inf"), "a number from 1 to 4"),
        ("anti_aliasing", None, "none, average or blur"),
    ],
)
def test_bad_fields_name_parameter_allowed_values_and_value(field, value, allowed):
    with pytest.raises(ValueError, match="must be") as error:
        MobileNetConfig(**{field: value})
    assert str(error.value) == f"{field} must be {allowed}, got {value!r}."


def test_rows_that_are_not_repeated_have_no_repeats_to_multiply():
    expected = "repeat_multiplier must be 1 for mobilenet_v3_large, which prints every block, got 1.2."
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        MobileNetConfig("mobilenet_v3_large", repeat_multiplier=1.2)


def test_depth_multiplier_is_the_width_multiplier():
    config = MobileNetConfig(depth_multiplier=0.5)
    assert config.width_multiplier == config.depth_multiplier == 0.5
    config.depth_multiplier = 0.75
    assert config.width_multiplier == 0.75
    assert "depth_multiplier" not in config.to_dict()


def test_output_features_and_indices_agree():
    assert MobileNetConfig().out_features == ["stage5"]
    assert MobileNetConfig(out_indices=(1, 3)).out_features == ["stage1", "stage3"]
    assert MobileNetConfig(out_features=["stem", "stage2"]).out_indices == [0, 2]
    with pytest.raises(ValueError, match="stage9"):
        MobileNetConfig(out_features=["stage9"])


def test_output_features_and_indices_must_not_contradict_each_other(tmp_path):
    assert MobileNetConfig(out_features=("stem", "stage5"), out_indices=(0, -1)).out_features == ["stem", "stage5"]
    expected = r"^out_features must be \['stem', 'stage2'\], which out_indices mean, got \['stage1', 'stage2'\]\.$"
    with pytest.raises(ValueError, match=expected):
        MobileNetConfig(out_features=["stage1", "stage2"], out_indices=[0, 2])
    with pytest.raises(ValueError, match="out_features must be a list of stages, got 'stem'"):
        MobileNetConfig(out_features="stem", out_indices=[0])
    # Files hold both; each alone, as an argument of loading, replaces both.
    MobileNetConfig(out_features=["stage1", "stage2"]).save_pretrained(tmp_path)
    assert MobileNetConfig.from_pretrained(tmp_path).out_indices == [1, 2]
    assert MobileNetConfig.from_pretrained(tmp_path, out_features=["stage3"]).out_indices == [3]
    assert MobileNetConfig.from_pretrained(tmp_path, out_indices=[4]).out_features == ["stage4"]


@pytest.mark.parametrize(
    "name",
    ["to_dict", "save_pretrained", "from_preset", "stages", "stage_names", "depths", "num_hidden_layers", "__class__"],
)
def test_no_key_hides_what_the_configuration_defines(name, tmp_path):
    message = f"^{name} must be left as MobileNetConfig defines it, got 3\\.$"
    with pytest.raises(ValueError, match=message):
        MobileNetConfig(**{name: 3})
    with pytest.raises(ValueError, match=message):
        setattr(MobileNetConfig(), name, 3)
    (tmp_path / "config.json").write_text(json.dumps(MobileNetConfig().to_dict() | {name: 3}))
    with pytest.raises(ValueError, match=message):
        MobileNetConfig.from_pretrained(tmp_path)


def test_keys_of_other_people_are_kept(tmp_path):
    config = MobileNetConfig(scale=0, my_note="kept")
    assert config.stages == MobileNetConfig().stages
    config.save_pretrained(tmp_path)
    loaded = MobileNetConfig.from_pretrained(tmp_path)
    assert (loaded.scale, loaded.my_note) == (0, "kept")


@pytest.mark.parametrize(
    ("architecture", "depths"),
    [
        ("mobilenet_v1", [1, 2, 2, 6, 2]),
        ("mobilenet_v2", [1, 2, 3, 7, 4]),
        ("mobilenet_v3_large", [1, 2, 3, 6, 3]),
        ("mobilenet_v3_small", [1, 2, 5, 3]),
        ("mobilenet_v4_conv_small", [2, 2, 6, 6]),
        ("mobilenet_v4_hybrid_medium", [1, 2, 12, 16]),
    ],
)
def test_depths_count_the_blocks_of_the_stages(architecture, depths):
    config = MobileNetConfig(architecture=architecture)
    assert config.depths == depths
    assert config.num_hidden_layers == sum(depths)
    assert "depths" not in config.to_dict()


class Plain(MobileNetConfig):
    """As short as a subclass can be."""


class Declared(MobileNetConfig):
    """Defaults of its own, one for a new field."""

    model_type: ClassVar[str] = "declared"
    architecture: str = "mobilenet_v1"
    note: str = "none"


class Deeper(Declared):
    width_multiplier: float = 0.5


def test_subclasses_without_init_keep_the_defaults(tmp_path):
    fields = set(MobileNetConfig().to_dict())
    assert Plain().to_dict() == MobileNetConfig().to_dict()
    assert Plain("mobilenet_v1", 0.5).stages == MobileNetConfig("mobilenet_v1", 0.5).stages
    assert Plain(num_labels=3, depth_multiplier=0.5).width_multiplier == 0.5
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 7"):
        Plain(output_stride=7)
    declared = Declared(image_size=96)
    assert (declared.architecture, declared.image_size, declared.note) == ("mobilenet_v1", 96, "none")
    assert set(declared.to_dict()) == fields | {"note"}
    deeper = Deeper(note="some")
    assert (deeper.architecture, deeper.width_multiplier, deeper.note) == ("mobilenet_v1", 0.5, "some")
    assert Deeper(architecture="mobilenet_v2").architecture == "mobilenet_v2"
    deeper.save_pretrained(tmp_path)
    assert Deeper.from_pretrained(tmp_path).to_dict() == deeper.to_dict()


def test_survives_saving(tmp_path):
    config = MobileNetConfig(
        architecture="mobilenet_v1",
        width_multiplier=0.5,
        num_channels=1,
        image_size=160,
        output_stride=16,
        hidden_act="relu",
        depthwise_activation=False,
        padding="symmetric",
        use_batch_norm=False,
        batch_norm_eps=1e-5,
        batch_norm_momentum=0.01,
        classifier_dropout=0.3,
        channel_divisor=4,
        shrink_head=True,
        grow_head=False,
        scale_stem=False,
        repeat_multiplier=1.5,
        anti_aliasing="average",
        out_indices=[1, 2],
        id2label={0: "cat", 1: "dog", 2: "owl"},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"].endswith("MobileNetModel")
    assert (tmp_path / "configuration_mobilenet.py").is_file()
    AutoConfig.from_pretrained(tmp_path, output_stride=8)


def test_arguments_of_loading_override_and_are_checked(tmp_path):
    MobileNetConfig().save_pretrained(tmp_path)
    config = MobileNetConfig.from_pretrained(tmp_path, output_stride=8, out_indices=[1, 2], num_labels=5)
    assert (config.output_stride, config.out_features, config.num_labels) == (8, ["stage1", "stage2"], 5)


def test_fields_are_checked_whenever_they_are_set():
    config = MobileNetConfig()
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 7"):
        config.output_stride = 7
    with pytest.raises(ValueError, match="width_multiplier must be a number above 0 and at most 8, got -1"):
        config.depth_multiplier = -1
    assert (config.output_stride, config.width_multiplier) == (32, 1.0)
