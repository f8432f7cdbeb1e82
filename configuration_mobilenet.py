"""MobileNet configuration: the fields that a checkpoint may set, and the variants that were published."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, ClassVar

from transformers import PretrainedConfig

from .architectures_mobilenet import ARCHITECTURES, Architecture, Block, Width
from .heads_mobilenet import DETECTORS, PUBLISHED, SEGMENTATION_HEADS, AtrousPyramid, LiteAtrousPyramid


try:
    from transformers.backbone_utils import BackboneConfigMixin
except ImportError:  # transformers before 5.2
    from transformers.utils.backbone_utils import BackboneConfigMixin


PRESETS: dict[str, dict[str, Any]] = {
    "_".join(map(str, (architecture, *width, size))): {
        "architecture": architecture,
        "width_multiplier": width[0] if width else 1.0,
        "image_size": size,
    }
    for architecture, table in ARCHITECTURES.items()
    for widths, resolutions in table.published
    for width in ([(width,) for width in widths] or [()])
    for size in resolutions
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
PRESETS |= PUBLISHED

ACTIVATIONS = ("relu", "relu6", "hardswish", "silu", "gelu")
OUTPUT_STRIDES = (8, 16, 32)
MAX_LABELS = 1 << 17


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
    "repeat_multiplier": ("a number from 1 to 4", lambda v: _is_number(v) and 1 <= v <= 4),
    "hidden_act": (_one_of(*ACTIVATIONS)[0], lambda v: v is None or (isinstance(v, str) and v in ACTIVATIONS)),
    "anti_aliasing": _one_of("none", "average", "blur"),
    "depthwise_activation": _FLAG,
    "padding": _one_of("same", "symmetric"),
    "use_batch_norm": _FLAG,
    "fused": _FLAG,
    "batch_norm_eps": ("a number above 0 and at most 1", lambda v: _is_number(v) and 0 < v <= 1),
    "batch_norm_momentum": ("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1),
    "classifier_dropout": ("a drop probability from 0 to below 1", lambda v: _is_number(v) and 0 <= v < 1),
    "use_pre_logits": _FLAG,
    "pooling": _one_of("avg", "max"),
    "classifier_hidden_sizes": (
        "a list of at most 8 integers from 1 to 65536",
        lambda v: _is_list_of(v, lambda size: _is_integer(size) and 1 <= size <= 65536) and len(v) <= 8,
    ),
    "classifier_hidden_act": _one_of(*ACTIVATIONS),
    "channel_divisor": ("an integer from 1 to 1024", lambda v: _is_integer(v) and 1 <= v <= 1024),
    "dilates_strided": _FLAG,
    "segmentation_head": (
        f"{_one_of(*SEGMENTATION_HEADS)[0]}, or None",
        lambda v: v is None or (isinstance(v, str) and v in SEGMENTATION_HEADS),
    ),
    "semantic_loss_ignore_index": (
        "an integer of 64 bits",
        lambda v: _is_integer(v) and -(1 << 63) <= v < 1 << 63,
    ),
    "scale_stem": _FLAG,
    "shrink_head": _FLAG,
    "grow_head": _FLAG,
    "anchor_step": ("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1),
    "detector": (f"{_one_of(*DETECTORS)[0]}, or None", lambda v: v is None or (isinstance(v, str) and v in DETECTORS)),
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


def _is_registered(auto: str, place: Any) -> bool:
    """Whether a class that is loaded, "module.Class", is registered for an Auto class: saving copies its code."""
    module, _, name = str(place).partition(".")
    modules = (code for key, code in list(sys.modules.items()) if key.rpartition(".")[2] == module)
    return any(getattr(vars(code).get(name), "_auto_class", None) == auto for code in modules if code is not None)


class CheckedFields:
    """Fields that are what they may be, whenever they are set; for a configuration to inherit."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Hand this class's `__init__` on: transformers 5 would make a dataclass, which never calls it."""
        if "__init__" not in vars(cls):
            annotations = inspect.get_annotations(cls).items()
            names = [name for name, kind in annotations if name in vars(cls) and "ClassVar" not in str(kind)]
            defaults = {name: vars(cls)[name] for name in names}

            def init(self: CheckedFields, *args: Any, **fields: Any) -> None:
                super(cls, self).__init__(*args, **{**defaults, **fields})

            cls.__init__ = init
        super().__init_subclass__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field if its value is allowed: in __init__, by an argument of from_pretrained, or later."""
        name = self.attribute_map.get(name, name)
        _check(name, value)
        if name in ("classifier_hidden_sizes", "out_features", "out_indices") and isinstance(value, tuple):
            value = list(value)  # transformers takes no tuples
        if _is_fixed(type(self), name):
            raise ValueError(f"{name} must be left as {type(self).__name__} defines it, got {value!r}.")
        super().__setattr__(name, value)


class LoweredTable:
    """What the fields and the architecture's table come to; for a configuration to inherit."""

    @property
    def has_batch_norm(self) -> bool:
        """Whether a batch norm follows each convolution: the network is made with them, and they are not folded."""
        return self.use_batch_norm and not self.fused

    @property
    def table(self) -> Architecture:
        """The architecture's table, with as many blocks as the network has."""
        return ARCHITECTURES[self.architecture].deepen(self.repeat_multiplier)

    @property
    def _width(self) -> Width:
        return Width(self.width_multiplier, self.channel_divisor)

    @property
    def stem_block(self) -> Block:
        """The first convolution."""
        width = self._width if self.scale_stem else Width()
        (block,) = self.table.stem.blocks(self.num_channels, width, self.hidden_act)
        return block

    @property
    def stages(self) -> list[list[Block]]:
        """Blocks by stage: a stage is a run of blocks that shares a resolution when the output stride is 32."""
        return self.table.lower(
            self._width,
            self.stem_block.out_channels,
            self.hidden_act,
            self.output_stride,
            self.anti_aliasing,
            self.dilates_strided,
        )

    @property
    def head_block(self) -> Block | None:
        """The 1x1 convolution before the pooling; None for V1, which has none."""
        table, channels = self.table, self.stages[-1][-1].out_channels
        return table.head and next(
            table.head.blocks(channels, self._width if table.pre_logits else self._last_width, self.hidden_act)
        )

    @property
    def pre_logits_block(self) -> Block | None:
        """The 1x1 convolution between the pooling and the classifier; None for V1 and V2, which have none."""
        row = self.table.pre_logits if self.use_pre_logits else None
        return row and next(row.blocks(self.head_block.out_channels, self._last_width, self.hidden_act))

    @property
    def _last_width(self) -> Width:
        return self._width if (self.shrink_head if self.width_multiplier < 1 else self.grow_head) else Width()

    @property
    def segmentation(self) -> AtrousPyramid | LiteAtrousPyramid:
        """The row of SEGMENTATION_HEADS that makes a segmenter of the network.

        Raises:
            ValueError: The configuration names none.
        """
        if self.segmentation_head is None:
            allowed = _one_of(*SEGMENTATION_HEADS)[0]
            raise ValueError(f"segmentation_head must be {allowed} for a segmenter, got None.")
        return SEGMENTATION_HEADS[self.segmentation_head]

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
        return (self.pre_logits_block or self.head_block or self.stages[-1][-1]).out_channels

    @property
    def stage_names(self) -> list[str]:
        """Names of the feature maps that MobileNetBackbone can return, by growing stride."""
        return list(ARCHITECTURES[self.architecture].strides)


class MobileNetConfig(CheckedFields, LoweredTable, BackboneConfigMixin, PretrainedConfig):
    """Configuration of a MobileNet.

    Args:
        architecture: Table that the network is built from: a key of ARCHITECTURES.
        width_multiplier: Factor on the channels of every layer (alpha in the papers). Also reachable as
            `depth_multiplier`, its name in Google's configurations.
        repeat_multiplier: Factor on the number of blocks in each row of V1 and V2 but the first and the last, rounded
            up, as in timm's mobilenetv2_110d (where d is for depth).
        num_channels: Channels of the input image; 3 for RGB, 1 for grayscale.
        image_size: Side in pixels of the images that the checkpoint was trained on. The network takes any size.
        output_stride: Input size over the size of the last feature map: 32, 16 or 8. Below 32, the later strides
            turn into dilation, as DeepLab does.
        dilates_strided: Whether dilation starts in the convolution that would have strided, as in torchvision's
            segmenters, instead of in the one after it, as in DeepLab's.
        hidden_act: Activation: "relu", "relu6", "hardswish", "silu" or "gelu". Default: by the table; it stays None
            for V3, whose blocks differ.
        anti_aliasing: What strides in the blocks of V4: "none", the convolution; "average" or "blur", means of 2x2
            pixels or a 3x3 binomial filter after a convolution that does not, as in timm's mobilenetv4_conv_aa_medium
            and mobilenetv4_conv_blur_medium.
        depthwise_activation: Whether the depthwise convolution of a depthwise separable block has an activation.
        padding: "same" pads as TensorFlow does, by the size of the input; "symmetric" as PyTorch does.
        use_batch_norm: Whether the network is made with a batch norm after each convolution. Without it, every
            convolution has a bias.
        fused: Whether batch norms and layer scales have been folded into the convolutions, as
            `MobileNetPreTrainedModel.fuse` does; the norm before an attention, which no convolution precedes, stays.
        batch_norm_eps: Added to the variance.
        batch_norm_momentum: Share of a new batch in the running statistics: one minus TensorFlow's decay. Google
            trained V1 with 0.0003 and V2 with 0.003 over millions of steps; the default follows within tens of steps.
        classifier_dropout: Probability of dropping a feature before the classifier. Default: 0.001 for V1, 0.2 for
            the others, as their reference implementations train; of a segmenter, as its head's does.
        use_pre_logits: Whether V3 and V4 have their 1x1 convolution between the pooling and the classifier, which
            Keras leaves out with a network's top.
        pooling: What makes features of the last feature map: "avg", or "max" for its largest values.
        classifier_hidden_sizes: Widths of fully connected layers between the pooled features and the classifier; by
            default there are none.
        classifier_hidden_act: Activation after each of them.
        channel_divisor: Scaled channels are rounded to a multiple of this. Default: 1 for V1, 8 for the others.
        scale_stem: Whether the width multiplier scales the first convolution; in timm's networks of width 0.5 and
            less, and in mobilenetv2_120d, it does not.
        shrink_head: Whether a width below 1 shrinks the last 1x1 convolution too; in no published checkpoint it does.
        grow_head: Whether a width above 1 widens the last 1x1 convolution; in timm's mobilenetv2_110d it does not.
        detector: What makes the network a detector: a key of DETECTORS; None where it is none.
        anchor_step: What the anchors of a detector are multiples of, as in a file that is quantized; 0 for exact ones.
        segmentation_head: What makes a segmenter of the network, for MobileNetForSemanticSegmentation: a key of
            SEGMENTATION_HEADS.
        semantic_loss_ignore_index: Label of the pixels that do not count in a segmenter's loss.
        out_features: Stages whose feature maps MobileNetBackbone returns, of `stage_names`.
        out_indices: The same, as indices into `stage_names`; where both are given, they must agree.
        **kwargs: Common fields of a transformers configuration, such as num_labels and id2label.

    A subclass without `__init__` takes the same arguments; what it annotates and sets, as in
    `architecture: str = "mobilenet_v1"`, are defaults of its own.

    Raises:
        ValueError: A field is not what it allows; the message names field, allowed values and value.

    Source: MobileNetV1 (arXiv:1704.04861), MobileNetV2 (arXiv:1801.04381), MobileNetV3 (arXiv:1905.02244),
        MobileNetV4 (arXiv:2404.10518).
    """

    model_type: ClassVar[str] = "mobilenet"
    # As register_for_auto_class sets it, which first imports half a second's worth of transformers.
    _auto_class: ClassVar[str] = "AutoConfig"
    attribute_map: ClassVar[dict[str, str]] = {"depth_multiplier": "width_multiplier"}

    def __init__(
        self,
        architecture: str = "mobilenet_v2",
        width_multiplier: float = 1.0,
        num_channels: int = 3,
        image_size: int = 224,
        output_stride: int = 32,
        hidden_act: str | None = None,
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
        *,  # what follows, older configurations lack, and is saved where it says something
        use_pre_logits: bool = True,
        pooling: str = "avg",
        classifier_hidden_sizes: Sequence[int] = (),
        classifier_hidden_act: str = "relu",
        repeat_multiplier: float = 1.0,
        anti_aliasing: str = "none",
        scale_stem: bool = True,
        grow_head: bool = True,
        detector: str | None = None,
        anchor_step: float = 0.0,
        dilates_strided: bool = False,
        segmentation_head: str | None = None,
        semantic_loss_ignore_index: int = 255,
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
        table = ARCHITECTURES[architecture]
        self.hidden_act = table.hidden_act if hidden_act is None else hidden_act
        self.depthwise_activation = depthwise_activation
        self.padding = padding
        self.use_batch_norm = use_batch_norm
        self.fused = fused
        self.batch_norm_eps = batch_norm_eps
        self.batch_norm_momentum = batch_norm_momentum
        self.dilates_strided = dilates_strided
        self.segmentation_head = segmentation_head
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        if classifier_dropout is None:
            classifier_dropout = self.segmentation.dropout if segmentation_head else table.classifier_dropout
        self.classifier_dropout = classifier_dropout
        self.channel_divisor = table.channel_divisor if channel_divisor is None else channel_divisor
        self.scale_stem = scale_stem
        self.shrink_head = shrink_head
        self.grow_head = grow_head
        self.anti_aliasing = anti_aliasing
        self.repeat_multiplier = repeat_multiplier
        if repeat_multiplier != 1 and not table.repeats:
            expected = f"1 for {architecture}, which prints every block"
            raise ValueError(f"repeat_multiplier must be {expected}, got {repeat_multiplier!r}.")
        self.use_pre_logits = use_pre_logits
        self.pooling = pooling
        self.classifier_hidden_sizes = classifier_hidden_sizes
        self.classifier_hidden_act = classifier_hidden_act
        self.detector = detector
        self.anchor_step = anchor_step
        self.out_features = out_features
        if out_indices is not None:
            self.out_indices = out_indices
            if out_features is not None and self.out_features != list(out_features):
                allowed = f"{self.out_features}, which out_indices mean"
                raise ValueError(f"out_features must be {allowed}, got {list(out_features)!r}.")

    @classmethod
    def from_preset(cls, name: str, **kwargs: Any) -> MobileNetConfig:
        """Configure a published variant, such as "mobilenet_v2_1.4_224"; further fields override its own.

        Raises:
            ValueError: No variant has that name; the message lists those that exist.
        """
        if name not in PRESETS:
            raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}.")
        return cls(**{**PRESETS[name], **kwargs})

    def to_dict(self) -> dict[str, Any]:
        """Serialize; auto_map names the classes beside the file, so that what is saved loads wherever it goes."""
        fields = super().to_dict()
        for name, default in MobileNetConfig.__init__.__kwdefaults__.items():
            if fields.get(name) in (default, []):
                fields.pop(name, None)
        given = fields.get("auto_map")
        given = given.items() if isinstance(given, dict) else ()
        return fields | {"auto_map": AUTO_MAP | {auto: place for auto, place in given if _is_registered(auto, place)}}


# Written whole: saving a model alone would register that model's class and no other.
AUTO_MAP = {
    "AutoConfig": "configuration_mobilenet.MobileNetConfig",
    "AutoModel": "modeling_mobilenet.MobileNetModel",
    "AutoModelForImageClassification": "modeling_mobilenet.MobileNetForImageClassification",
    "AutoModelForObjectDetection": "modeling_mobilenet.MobileNetForObjectDetection",
    "AutoModelForSemanticSegmentation": "modeling_mobilenet.MobileNetForSemanticSegmentation",
    "AutoBackbone": "modeling_mobilenet.MobileNetBackbone",
}
