"""MobileNet configuration: the papers' tables, the published variants, and the fields that a checkpoint may set."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar, NamedTuple

from transformers import PretrainedConfig


try:
    from transformers.backbone_utils import BackboneConfigMixin
except ImportError:  # transformers before 5.2
    from transformers.utils.backbone_utils import BackboneConfigMixin


class SeparableRow(NamedTuple):
    """Depthwise separable convolutions: a 3x3 depthwise one, then a 1x1 one."""

    channels: int  # of the 1x1 convolution, before the width multiplier
    repeats: int
    stride: int  # of the first block; the others have stride 1


class InvertedResidualRow(NamedTuple):
    """Inverted residuals with linear bottlenecks; columns keep the paper's letters."""

    expansion: int  # t: hidden channels = t * input channels
    channels: int  # c: output channels, before the width multiplier
    repeats: int  # n: blocks in the row
    stride: int  # s: of the first block; the others have stride 1


Row = SeparableRow | InvertedResidualRow


class Architecture(NamedTuple):
    """A network as its paper prints it, with what its reference implementation adds."""

    stem: int  # channels of the 3x3 convolution with stride 2 that comes first
    rows: tuple[Row, ...]
    head: int | None  # channels of the 1x1 convolution that comes last
    channel_divisor: int
    classifier_dropout: float


ARCHITECTURES = {
    # MobileNetV1, Table 1 (arXiv:1704.04861), a row for each pair of "Conv dw" and "Conv 1x1". The paper prints
    # stride 2 for the last depthwise convolution; its output size and slim/nets/mobilenet_v1.py say 1.
    # Dropout and divisor: slim/nets/mobilenet_v1.py, which keeps 0.999 and truncates scaled channels.
    "mobilenet_v1": Architecture(
        stem=32,
        rows=(
            #              c  n  s
            SeparableRow(64, 1, 1),
            SeparableRow(128, 1, 2),
            SeparableRow(128, 1, 1),
            SeparableRow(256, 1, 2),
            SeparableRow(256, 1, 1),
            SeparableRow(512, 1, 2),
            SeparableRow(512, 5, 1),
            SeparableRow(1024, 1, 2),
            SeparableRow(1024, 1, 1),
        ),
        head=None,
        channel_divisor=1,
        classifier_dropout=0.001,
    ),
    # MobileNetV2, Table 2 (arXiv:1801.04381). Dropout and divisor: slim/nets/mobilenet/mobilenet.py keeps 0.8.
    "mobilenet_v2": Architecture(
        stem=32,
        rows=(
            #                  t    c  n  s
            InvertedResidualRow(1, 16, 1, 1),
            InvertedResidualRow(6, 24, 2, 2),
            InvertedResidualRow(6, 32, 3, 2),
            InvertedResidualRow(6, 64, 4, 2),
            InvertedResidualRow(6, 96, 3, 1),
            InvertedResidualRow(6, 160, 3, 2),
            InvertedResidualRow(6, 320, 1, 1),
        ),
        head=1280,
        channel_divisor=8,
        classifier_dropout=0.2,
    ),
}

# The variants that Google published: width multipliers, and the resolutions of each.
# Sources: slim/nets/mobilenet_v1.md and slim/nets/mobilenet/README.md.
PUBLISHED = {
    "mobilenet_v1": dict.fromkeys((1.0, 0.75, 0.5, 0.25), (224, 192, 160, 128)),
    "mobilenet_v2": {1.4: (224,), 1.3: (224,)} | dict.fromkeys((1.0, 0.75, 0.5, 0.35), (224, 192, 160, 128, 96)),
}

PRESETS: dict[str, dict[str, Any]] = {
    f"{architecture}_{width}_{size}": {
        "architecture": architecture,
        "width_multiplier": width,
        "image_size": size,
    }
    for architecture, widths in PUBLISHED.items()
    for width, sizes in widths.items()
    for size in sizes
} | {
    # The depthwise separable network that courses teach: Table 1 of MobileNetV1 without batch norm, with a bias in
    # every convolution, and no activation between the two convolutions of a block.
    "depthwise_separable_plain": {
        "architecture": "mobilenet_v1",
        "hidden_act": "relu",
        "padding": "symmetric",
        "use_batch_norm": False,
        "depthwise_activation": False,
        "classifier_dropout": 0.0,
        "num_labels": 1000,
    },
}

PADDINGS = ("same", "symmetric")
ACTIVATIONS = ("relu", "relu6", "hardswish", "silu", "gelu")
OUTPUT_STRIDES = (8, 16, 32)
MAX_LABELS = 1 << 20


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(holds, value))


def _one_of(*allowed: Any) -> tuple[str, Callable[[Any], bool]]:
    *first, last = map(str, allowed)
    return f"{', '.join(first)} or {last}", lambda value: any(value == a and type(value) is type(a) for a in allowed)


_FLAG = ("true or false", lambda value: isinstance(value, bool))

# What each field allows, in words and as a test. The upper bounds keep an absurd config.json from taking all memory.
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "architecture": _one_of(*ARCHITECTURES),
    "width_multiplier": ("a number above 0 and at most 8", lambda v: _is_number(v) and 0 < v <= 8),
    "num_channels": ("an integer from 1 to 4096", lambda v: _is_integer(v) and 1 <= v <= 4096),
    "image_size": ("an integer from 1 to 65536", lambda v: _is_integer(v) and 1 <= v <= 65536),
    "output_stride": _one_of(*OUTPUT_STRIDES),
    "hidden_act": _one_of(*ACTIVATIONS),
    "depthwise_activation": _FLAG,
    "padding": _one_of(*PADDINGS),
    "use_batch_norm": _FLAG,
    "fused": _FLAG,
    "batch_norm_eps": ("a number above 0", lambda v: _is_number(v) and v > 0),
    "batch_norm_momentum": ("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1),
    "classifier_dropout": ("a drop probability from 0 to below 1", lambda v: _is_number(v) and 0 <= v < 1),
    "channel_divisor": ("an integer from 1 to 1024", lambda v: _is_integer(v) and 1 <= v <= 1024),
    "shrink_head": _FLAG,
    "num_labels": (f"an integer from 0 to {MAX_LABELS}", lambda v: _is_integer(v) and 0 <= v <= MAX_LABELS),
    "out_features": ("a list of stages", lambda v: v is None or _is_list_of(v, lambda name: isinstance(name, str))),
    "out_indices": ("a list of integers", lambda v: v is None or _is_list_of(v, _is_integer)),
    # transformers before 5.3 runs code from the repository that this names, trusted or not (CVE-2026-4372).
    "_attn_implementation_internal": ("a name, not a repository", lambda v: "/" not in str(v)),
}


def _check(name: str, value: Any) -> None:
    """Raise ValueError if a field has a value that is not allowed."""
    if name in _ALLOWED:
        allowed, holds = _ALLOWED[name]
        if not holds(value):
            raise ValueError(f"{name} must be {allowed}, got {value!r}.")


def _is_fixed(cls: type, name: str) -> bool:
    """Whether a name is that of a method or of a value that follows from fields, which no field may hide."""
    found = inspect.getattr_static(cls, name, None)
    return (
        name.startswith("__")
        or isinstance(found, (FunctionType, classmethod, staticmethod))
        or (isinstance(found, property) and found.fset is None)
    )


def make_divisible(channels: float, divisor: int) -> int:
    """Round channels to the nearest multiple of a divisor, at least 8 and never more than 10 % down.

    With divisor 1 the whole part is kept, as MobileNetV1 does.

    Source: _make_divisible of slim/nets/mobilenet/conv_blocks.py; depth of slim/nets/mobilenet_v1.py.
    """
    minimum = max(divisor, 8)
    if divisor == 1:
        return max(minimum, int(channels))
    rounded = max(minimum, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def _scale(config: MobileNetConfig, channels: int) -> int:
    """Channels under the width multiplier."""
    return make_divisible(channels * config.width_multiplier, config.channel_divisor)


class Block(NamedTuple):
    """One block of a configured network: its row of the table, and what the configuration makes of it."""

    row: Row
    in_channels: int
    out_channels: int
    stride: int
    dilation: int


class MobileNetConfig(BackboneConfigMixin, PretrainedConfig):
    """Configuration of a MobileNet.

    Args:
        architecture: Table that the network is built from, "mobilenet_v1" or "mobilenet_v2".
        width_multiplier: Factor on the channels of every layer (alpha in the papers). Also reachable as
            `depth_multiplier`, its name in Google's configurations.
        num_channels: Channels of the input picture; 3 for RGB, 1 for grayscale.
        image_size: Side in pixels of the pictures that the checkpoint was trained on. The network takes any size.
        output_stride: Input size over the size of the last feature map: 32, 16 or 8. Below 32, the later strides
            turn into dilation, as DeepLab does.
        hidden_act: Activation: "relu", "relu6", "hardswish", "silu" or "gelu".
        depthwise_activation: Whether the depthwise convolution of a depthwise separable block has an activation.
        padding: "same" pads as TensorFlow does, by the size of the input; "symmetric" as PyTorch does.
        use_batch_norm: Whether batch norm follows each convolution. Without it, every convolution has a bias.
        fused: Whether the weights come from a network whose batch norms were folded into its convolutions, as
            `MobileNetPreTrainedModel.fuse` does; `use_batch_norm` is false then, and training warns.
        batch_norm_eps: Added to the variance.
        batch_norm_momentum: Share of a new batch in the running statistics, which is PyTorch's convention: one
            minus TensorFlow's decay. Google trained V1 with 0.0003 and V2 with 0.003 over millions of steps; the
            default is PyTorch's own, with which the statistics follow within tens of steps.
        classifier_dropout: Probability of dropping a feature before the classifier. Default: 0.001 for V1, 0.2 for
            V2, as their reference implementations train.
        channel_divisor: Scaled channels are rounded to a multiple of this. Default: 1 for V1, 8 for V2.
        shrink_head: Whether a width multiplier below 1 shrinks the last 1x1 convolution of V2 too; in no published
            checkpoint it does.
        out_features: Stages whose feature maps MobileNetBackbone returns, of "stem" and "stage1" to "stage5".
        out_indices: The same, as indices into `stage_names`; where both are given, they must agree.
        **kwargs: Common fields of a transformers configuration, such as num_labels and id2label.

    A subclass without `__init__` takes the same arguments; what it annotates and sets, as in
    `architecture: str = "mobilenet_v1"`, are defaults of its own.

    Raises:
        ValueError: A field is not what it allows; the message names field, allowed values and value.

    Source: MobileNetV1 (arXiv:1704.04861), MobileNetV2 (arXiv:1801.04381).
    """

    model_type: ClassVar[str] = "mobilenet"
    attribute_map: ClassVar[dict[str, str]] = {"depth_multiplier": "width_multiplier"}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Hand this class's `__init__` on: transformers 5 would make a dataclass, which never calls it."""
        if "__init__" not in vars(cls):
            annotations = inspect.get_annotations(cls).items()
            names = [name for name, kind in annotations if name in vars(cls) and "ClassVar" not in str(kind)]
            defaults = {name: vars(cls)[name] for name in names}

            def init(self: MobileNetConfig, *args: Any, **fields: Any) -> None:
                super(cls, self).__init__(*args, **{**defaults, **fields})

            cls.__init__ = init
        super().__init_subclass__(**kwargs)

    def __init__(
        self,
        architecture: str = "mobilenet_v2",
        width_multiplier: float = 1.0,
        num_channels: int = 3,
        image_size: int = 224,
        output_stride: int = 32,
        hidden_act: str = "relu6",
        depthwise_activation: bool = True,
        padding: str = "same",
        use_batch_norm: bool = True,
        fused: bool = False,
        batch_norm_eps: float = 1e-3,
        batch_norm_momentum: float = 0.1,
        classifier_dropout: float | None = None,
        channel_divisor: int | None = None,
        shrink_head: bool = False,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("num_labels") is not None:
            _check("num_labels", kwargs["num_labels"])  # before 5, transformers would name as many first
        super().__init__(**kwargs)
        self.architecture = architecture
        self.width_multiplier = kwargs.get("depth_multiplier", width_multiplier)
        self.num_channels = num_channels
        self.image_size = image_size
        self.output_stride = output_stride
        self.hidden_act = hidden_act
        self.depthwise_activation = depthwise_activation
        self.padding = padding
        self.use_batch_norm = use_batch_norm
        self.fused = fused
        self.batch_norm_eps = batch_norm_eps
        self.batch_norm_momentum = batch_norm_momentum
        table = ARCHITECTURES[architecture]
        self.classifier_dropout = table.classifier_dropout if classifier_dropout is None else classifier_dropout
        self.channel_divisor = table.channel_divisor if channel_divisor is None else channel_divisor
        self.shrink_head = shrink_head
        # transformers takes no tuples.
        out_features, out_indices = (list(v) if isinstance(v, tuple) else v for v in (out_features, out_indices))
        self.out_features = out_features
        if out_indices is not None:
            self.out_indices = out_indices
            if out_features is not None and self.out_features != out_features:
                expected = f"{self.out_features}, which out_indices mean"
                raise ValueError(f"out_features must be {expected}, got {out_features!r}.")

    @classmethod
    def from_preset(cls, name: str, **kwargs: Any) -> MobileNetConfig:
        """Configure a published variant, such as "mobilenet_v2_1.4_224"; further fields override its own.

        Raises:
            ValueError: No variant has that name; the message lists those that exist.
        """
        if name not in PRESETS:
            raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}.")
        return cls(**{**PRESETS[name], **kwargs})

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field if its value is allowed: in __init__, by an argument of from_pretrained, or later."""
        name = self.attribute_map.get(name, name)
        _check(name, value)
        if _is_fixed(type(self), name):
            raise ValueError(f"{name} must be left as {type(self).__name__} defines it, got {value!r}.")
        super().__setattr__(name, value)

    @property
    def stem_channels(self) -> int:
        """Channels of the first convolution."""
        return _scale(self, ARCHITECTURES[self.architecture].stem)

    @property
    def head_channels(self) -> int | None:
        """Channels of the last 1x1 convolution; None for V1, which has none."""
        head = ARCHITECTURES[self.architecture].head
        if head is None or (self.width_multiplier < 1 and not self.shrink_head):
            return head
        return _scale(self, head)

    @property
    def stages(self) -> list[list[Block]]:
        """Blocks by stage: a stage is a run of blocks that shares a resolution when the output stride is 32."""
        stages: list[list[Block]] = []
        channels = self.stem_channels
        current_stride, dilation = 2, 1
        for row in ARCHITECTURES[self.architecture].rows:
            if row.stride > 1 or not stages:
                stages.append([])
            out_channels = _scale(self, row.channels)
            for index in range(row.repeats):
                wanted = row.stride if index == 0 else 1
                # Past the output stride a stride becomes dilation, which starts in the next block: the convolution
                # that would have strided still looks at its neighbours.
                strides = current_stride < self.output_stride
                stages[-1].append(
                    Block(row, channels, out_channels, wanted if strides else 1, 1 if strides else dilation)
                )
                if strides:
                    current_stride *= wanted
                else:
                    dilation *= wanted
                channels = out_channels
        return stages

    @property
    def depths(self) -> list[int]:
        """Number of blocks in each stage."""
        return [len(stage) for stage in self.stages]

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks; hidden_states holds one feature map more, which is the stem's."""
        return sum(self.depths)

    @property
    def feature_channels(self) -> int:
        """Channels of the pooled features that the classifier sees."""
        return self.head_channels or self.stages[-1][-1].out_channels

    @property
    def stage_names(self) -> list[str]:
        """Names of the feature maps that MobileNetBackbone can return, by growing stride."""
        return ["stem", *(f"stage{i}" for i in range(1, len(self.stages) + 1))]

    def to_dict(self) -> dict[str, Any]:
        """Serialise; auto_map names the classes beside the file, so that what is saved loads wherever it goes."""
        return super().to_dict() | {"auto_map": dict(AUTO_MAP)}


# Written whole: saving a model alone would register that model's class and no other.
AUTO_MAP = {
    "AutoConfig": "configuration_mobilenet.MobileNetConfig",
    "AutoModel": "modeling_mobilenet.MobileNetModel",
    "AutoModelForImageClassification": "modeling_mobilenet.MobileNetForImageClassification",
    "AutoBackbone": "modeling_mobilenet.MobileNetBackbone",
}

MobileNetConfig.register_for_auto_class()

__all__ = ["ARCHITECTURES", "PRESETS", "MobileNetConfig"]
