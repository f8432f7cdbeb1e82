"""MobileNet for PyTorch: V1 and V2, as features, as a classifier and as a backbone."""

from __future__ import annotations

import copy
import os
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils import logging

from .configuration_mobilenet import Block, MobileNetConfig


try:
    from transformers import initialization as init
except ImportError:  # transformers before 5
    from torch.nn import init

try:
    from transformers.backbone_utils import BackboneMixin
except ImportError:  # transformers before 5.2
    from transformers.utils.backbone_utils import BackboneMixin

logger = logging.get_logger(__name__)

# A classifier of more weights is refused, so that no config.json takes more than 2 GB: 1 for it, and 1 for the rest.
MAX_CLASSIFIER_WEIGHTS = 1 << 28


def same_padding(size: int, kernel_size: int, stride: int, dilation: int) -> int:
    """Rows (or columns) that TensorFlow's SAME adds in all, half of them rounded down at the start.

    The kernel must reach as far as the stride, or the result would be negative where TensorFlow's is 0; a maximum
    with 0 would make the symbolic sizes of an exported graph grow with every layer.

    Source: "Notes on padding" of tf.nn.
    """
    outputs = (size + stride - 1) // stride
    return (outputs - 1) * stride + (kernel_size - 1) * dilation + 1 - size


class Conv2d(nn.Conv2d):
    """Convolution with a square odd kernel, padded so that its output has ceil(input / stride) rows and columns.

    Shape: (B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))
    """

    def __init__(self, *args: Any, pads_same: bool, activated: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # SAME can only be lopsided where the kernel skips pixels.
        self.pads_same = pads_same and self.stride[0] > 1
        self.activated = activated  # what follows decides the scale of initial weights
        self.padding = (self.dilation[0] * (self.kernel_size[0] // 2),) * 2

    def forward(self, x: Tensor) -> Tensor:
        if self._learns_faster_in_float32(x):
            with torch.autocast("cpu", enabled=False):
                return self.convolve(x.float(), self.weight, self.bias).to(x.dtype)
        return self.convolve(x, self.weight, self.bias)

    def _learns_faster_in_float32(self, x: Tensor) -> bool:
        """Whether autocast on a CPU should let this layer be.

        Where a depthwise kernel strides or a map has no more than 2x2 pixels, oneDNN has no fast bfloat16 gradients:
        on a processor with AVX512-BF16 they take six times as long as in float32, and a training step twice as long.
        """
        return (
            self.groups > 1
            and (self.stride[0] > 1 or x.shape[-1] <= 2)
            and x.device.type == "cpu"
            and self.weight.dtype == torch.float32
            and torch.is_autocast_enabled("cpu")
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with other weights than its own."""
        kernel_size, stride, dilation = self.kernel_size[0], self.stride[0], self.dilation[0]
        if not self.pads_same:
            return F.conv2d(x, weight, bias, stride, self.padding, dilation, self.groups)
        pads = [same_padding(size, kernel_size, stride, dilation) for size in x.shape[-2:]]
        # Without a branch on the size, one graph serves every size.
        makes_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if makes_graph or self.in_channels * stride**2 < self.out_channels:  # the input is the smaller one to copy
            (top, bottom), (left, right) = ((pad // 2, pad - pad // 2) for pad in pads)
            return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride, 0, dilation, self.groups)
        # A lopsided pad differs from a symmetric one by a shift of the sampling grid. Padding one stride more on both
        # sides and leaving out the first output makes that shift on the small output, instead of copying the input.
        skips = [pad % 2 for pad in pads]
        padding = [pad // 2 + skip * stride for pad, skip in zip(pads, skips, strict=True)]
        y = F.conv2d(x, weight, bias, stride, padding, dilation, self.groups)
        if not any(skips):
            return y
        height, width = (-(-size // stride) for size in x.shape[-2:])
        y = y[:, :, skips[0] : skips[0] + height, skips[1] : skips[1] + width]
        return y.contiguous(memory_format=torch.channels_last)  # a view would slow down all that follows


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


class ReLU6(nn.ReLU6):
    """ReLU6, in place where nobody differentiates it: for that, torch's own copies what it overwrites."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x, inplace=not x.requires_grad)


ACTIVATIONS = {
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": ReLU6,
    "hardswish": lambda: nn.Hardswish(inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
}


def fold(
    weight: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does the work of a convolution and of the batch norm after it.

    Source: Jacob et al., Section 3.2 (arXiv:1712.05877).
    """
    scale = scale * torch.rsqrt(variance + eps)
    return weight * scale[:, None, None, None], torch.addcmul(shift, mean, scale, value=-1)


class ConvNormAct(nn.Module):
    """Convolution, batch norm, activation. Without batch norm the convolution has a bias.

    Shape: (B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))
    """

    def __init__(
        self,
        config: MobileNetConfig,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        activated: bool = True,
    ) -> None:
        super().__init__()
        self.conv = Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            dilation=dilation,
            groups=groups,
            bias=not config.use_batch_norm,
            pads_same=config.padding == "same",
            activated=activated,
        )
        if config.use_batch_norm:
            self.norm = nn.BatchNorm2d(out_channels, config.batch_norm_eps, config.batch_norm_momentum)
        else:
            self.norm = nn.Identity()
        self.act = ACTIVATIONS[config.hidden_act]() if activated else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self._can_fold(x):
            return self.act(self.conv.convolve(x, *fold(*self._terms(), self.norm.eps)))
        return self.act(self.norm(self.conv(x)))

    def _can_fold(self, x: Tensor) -> bool:
        """Whether to fold the batch norm for this call alone.

        On a CPU a pass over the activations takes longer than one over the weights. The layers must be called where
        anything but the result depends on them: gradients, statistics, hooks, exported graphs.
        """
        return (
            x.device.type == "cpu"
            and x.dtype.itemsize >= 4  # with fewer bits, a weight would be rounded twice
            and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
            and is_untouched(self.norm, nn.BatchNorm2d)
            and is_untouched(self.conv, Conv2d)
            and type(self.conv.weight) is nn.Parameter
            and not (self.norm.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        )

    def _terms(self) -> tuple[Tensor, ...]:
        norm = self.norm
        return self.conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var

    def fuse(self) -> None:
        """Fold the batch norm's running statistics into the convolution's weight and bias, in double precision."""
        if isinstance(self.norm, nn.Identity):
            return
        conv = self.conv
        # Not every device has double precision, the CPU does.
        weight, bias = fold(*(term.to("cpu", torch.float64) for term in self._terms()), self.norm.eps)
        conv.weight.copy_(weight)
        conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=conv.weight.requires_grad)
        self.norm = nn.Identity()


class DepthwiseSeparable(GradientCheckpointingLayer):
    """Filter each channel 3x3 (depthwise), then combine channels 1x1 (pointwise).

    Shape: (B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))
    Source: MobileNetV1, Section 3.1 and Figure 3 (arXiv:1704.04861)
    """

    def __init__(self, config: MobileNetConfig, block: Block) -> None:
        super().__init__()
        self.depthwise = ConvNormAct(
            config,
            block.in_channels,
            block.in_channels,
            3,
            block.stride,
            block.dilation,
            groups=block.in_channels,
            activated=config.depthwise_activation,
        )
        self.pointwise = ConvNormAct(config, block.in_channels, block.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class InvertedResidual(GradientCheckpointingLayer):
    """Expand 1x1, filter 3x3 depthwise, project 1x1 without activation (linear bottleneck).

    Shape: (B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))
    Source: MobileNetV2, Section 3.3 and Table 1 (arXiv:1801.04381)
    """

    def __init__(self, config: MobileNetConfig, block: Block) -> None:
        super().__init__()
        hidden = block.row.expansion * block.in_channels
        # The first block does not expand, and has no convolution for it either.
        expands = block.row.expansion > 1
        self.expand = ConvNormAct(config, block.in_channels, hidden) if expands else nn.Identity()
        self.depthwise = ConvNormAct(config, hidden, hidden, 3, block.stride, block.dilation, groups=hidden)
        self.project = ConvNormAct(config, hidden, block.out_channels, activated=False)
        self.has_shortcut = block.stride == 1 and block.in_channels == block.out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.has_shortcut else y


# By the name of the table's row: a class itself would not do, since transformers may import the configuration's file
# twice, and then there are two of it.
BLOCKS = {"SeparableRow": DepthwiseSeparable, "InvertedResidualRow": InvertedResidual}


class MobileNetPreTrainedModel(PreTrainedModel):
    """What every MobileNet shares: configuration, initial weights, gradient checkpointing of the blocks."""

    config_class = MobileNetConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over the batch; the Trainer divides by accumulation steps
    _no_split_modules: ClassVar[list[str]] = ["DepthwiseSeparable", "InvertedResidual"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Keep the scale of activations from layer to layer, with and without batch norm.

        Source: He et al., Section 2.2 (arXiv:1502.01852), by the inputs of one filter: a depthwise filter has 9.
        """
        if isinstance(module, Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu" if module.activated else "linear")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.01)
            init.zeros_(module.bias)

    @torch.no_grad()
    def fuse(self) -> MobileNetPreTrainedModel:
        """Fold every batch norm into its convolution, in place: the same answers, faster, from a third of the tensors.

        For inference: the network is put in evaluation mode. It saves and loads as a fused checkpoint. A network that
        is fused already, or has no batch norm, stays as it is.

        Returns:
            The network itself.
        """
        self.eval()
        if not self.config.use_batch_norm:
            return self
        config = copy.deepcopy(self.config)  # other networks may share it
        config.use_batch_norm = False
        config.fused = True
        for module in self.modules():
            if isinstance(module, ConvNormAct):
                module.fuse()
            elif isinstance(module, MobileNetPreTrainedModel):
                module.config = config
        return self

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Save as PreTrainedModel does.

        Raises:
            ValueError: A part alone is fused, which no configuration says.
        """
        norms = {not isinstance(m.norm, nn.Identity) for m in self.modules() if isinstance(m, ConvNormAct)}
        if norms != {self.config.use_batch_norm}:
            raise ValueError("a network must be fused as a whole to be saved: call fuse() on all of it.")
        return super().save_pretrained(save_directory, *args, **kwargs)

    def train(self, mode: bool = True) -> MobileNetPreTrainedModel:
        """Set training mode, with a warning where batch norm was folded away."""
        if mode and self.config.fused:
            logger.warning_once(
                "Training a fused network: its batch norms are folded into its convolutions, so nothing normalises "
                "activations by the batch any more; expect slower and less stable training. Train the checkpoint from "
                "before fuse(), and fuse the result."
            )
        return super().train(mode)

    def _prepare(self, pixel_values: Tensor | None, weight: Tensor) -> Tensor:
        """Check a batch of pictures, and lay it out as convolutions like it best: channels last."""
        if pixel_values is None:
            raise ValueError("pixel_values must be a tensor of shape (B, C, H, W), got None.")
        channels = self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            shape = tuple(pixel_values.shape)
            raise ValueError(f"pixel_values must have shape (B, {channels}, H, W), got {shape}.")
        return pixel_values.to(weight.dtype, memory_format=torch.channels_last)

    def _want(self, **given: bool | None) -> list[bool]:
        """Arguments of a call, or the configuration's value where they are None."""
        return [getattr(self.config, name) if value is None else value for name, value in given.items()]


class MobileNetModel(MobileNetPreTrainedModel):
    """Features of a MobileNet: stem, stages of blocks, and a head that leads to pooled features.

    Args:
        config: Configuration.
        add_pooling_layer: Whether to run the head and pool; without, `pooler_output` is None.
    """

    def __init__(self, config: MobileNetConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.stem = ConvNormAct(config, config.num_channels, config.stem_channels, 3, 2)
        self.stages = nn.ModuleList(
            nn.ModuleList(BLOCKS[type(block.row).__name__](config, block) for block in stage)
            for stage in config.stages
        )
        self.pools = add_pooling_layer
        if add_pooling_layer:
            last = config.stages[-1][-1].out_channels
            self.head = ConvNormAct(config, last, config.head_channels) if config.head_channels else nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple | BaseModelOutputWithPoolingAndNoAttention:
        """Compute the features of a batch of pictures.

        Args:
            pixel_values: Pictures as MobileNetImageProcessor gives them, of shape (B, num_channels, H, W).
            output_hidden_states: Whether to return every intermediate feature map.
            return_dict: Whether to return an output class instead of a tuple.

        Returns:
            last_hidden_state: Feature map of the last block, of shape (B, C, H / 32, W / 32) at output stride 32.
            pooler_output: Pooled features, of shape (B, config.feature_channels).
            hidden_states: Feature maps of the stem and of every block; the last one is last_hidden_state.

        Raises:
            ValueError: pixel_values is missing or has another shape.
        """
        output_hidden_states, return_dict = self._want(
            output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        x = self.stem(self._prepare(pixel_values, self.stem.conv.weight))
        hidden_states = [x]
        for stage in self.stages:
            for block in stage:
                x = block(x)
                if output_hidden_states:
                    hidden_states.append(x)
        pooled = self.head(x).mean((-2, -1)) if self.pools else None
        output = BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=x,
            pooler_output=pooled,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()


class MobileNetForImageClassification(MobileNetPreTrainedModel):
    """A MobileNet with dropout and a linear classifier on its pooled features."""

    def __init__(self, config: MobileNetConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        features = config.feature_channels
        if config.num_labels * features > MAX_CLASSIFIER_WEIGHTS:
            allowed = MAX_CLASSIFIER_WEIGHTS // features
            raise ValueError(f"num_labels must be at most {allowed} for {features} features, got {config.num_labels}.")
        self.backbone = MobileNetModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(features, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple | ImageClassifierOutputWithNoAttention:
        """Classify a batch of pictures.

        Args:
            pixel_values: Pictures as MobileNetImageProcessor gives them, of shape (B, num_channels, H, W).
            labels: Targets. One label a picture: integers of shape (B,). Many labels: floats of shape
                (B, num_labels), each 0 or 1. Regression (one label, or problem_type "regression"): floats of shape
                (B,) or (B, num_labels).
            output_hidden_states: Whether to return every intermediate feature map.
            return_dict: Whether to return an output class instead of a tuple.

        Returns:
            loss: Mean over the batch, if labels are given: cross entropy, binary cross entropy or squared error.
            logits: Scores before softmax, of shape (B, num_labels).
            hidden_states: Feature maps of the stem and of every block.

        Raises:
            ValueError: pixel_values is missing or has another shape.
        """
        (return_dict,) = self._want(return_dict=return_dict)
        features = self.backbone(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(self.dropout(features.pooler_output))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=features.hidden_states)
        return output if return_dict else output.to_tuple()


class MobileNetBackbone(BackboneMixin, MobileNetPreTrainedModel):
    """Feature maps of a MobileNet, for detectors and segmenters; loads from a classifier's checkpoint.

    `config.out_features` chooses among "stem" and "stage1" to "stage5", whose strides are 2, 2, 4, 8, 16 and 32 at
    output stride 32.
    """

    has_attentions = False
    # The head's weights come with a classifier's checkpoint, and a backbone has no use for them.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^(backbone\.)?head\.", r"^classifier\."]

    def __init__(self, config: MobileNetConfig) -> None:
        super().__init__(config)
        if hasattr(self, "_init_backbone"):  # transformers before 5
            self._init_backbone(config)
        self.num_features = [config.stem_channels, *(stage[-1].out_channels for stage in config.stages)]
        self.backbone = MobileNetModel(config, add_pooling_layer=False)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple | BackboneOutput:
        """Compute the feature maps that the configuration asks for.

        Args:
            pixel_values: Pictures as MobileNetImageProcessor gives them, of shape (B, num_channels, H, W).
            output_hidden_states: Whether to return the feature maps of all stages too.
            output_attentions: Ignored: there is no attention.
            return_dict: Whether to return an output class instead of a tuple.

        Returns:
            feature_maps: One for each of config.out_features, of shape (B, C, ceil(H / stride), ceil(W / stride)).
            hidden_states: Feature maps of the stem and of every block.

        Raises:
            ValueError: pixel_values is missing or has another shape.
        """
        output_hidden_states, return_dict = self._want(
            output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        hidden_states = self.backbone(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        last = 0
        maps = {"stem": hidden_states[0]}
        for name, stage in zip(self.stage_names[1:], self.backbone.stages, strict=True):
            last += len(stage)
            maps[name] = hidden_states[last]
        output = BackboneOutput(
            feature_maps=tuple(maps[name] for name in self.out_features),
            hidden_states=hidden_states if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()


MobileNetModel.register_for_auto_class("AutoModel")
MobileNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
MobileNetBackbone.register_for_auto_class("AutoBackbone")

__all__ = ["MobileNetBackbone", "MobileNetForImageClassification", "MobileNetModel", "MobileNetPreTrainedModel"]
