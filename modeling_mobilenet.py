"""MobileNet for PyTorch: V1 to V4, as features, as a classifier, as a detector, as a segmenter and as a backbone."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
    SemanticSegmenterOutput,
)
from transformers.utils import ModelOutput, can_return_tuple, logging

from .configuration_mobilenet import MobileNetConfig
from .cpu_mobilenet import channels_last
from .detection_mobilenet import (
    DetectionLayers,
    PredictionConv,
    check_labels,
    detection_loss,
    head_weights,
)
from .heads_mobilenet import DETECTORS
from .layers_mobilenet import LAYERS, Conv2d, ConvNormAct, Features, LayerScale, fuse, hidden_layers
from .postprocessing_mobilenet import corners  # noqa: F401 - as detection_mobilenet does: transformers 4.57 copies it
from .segmentation_mobilenet import Segments, segmentation_loss


try:
    from transformers import initialization as init
except ImportError:  # transformers before 5
    from torch.nn import init

try:
    from transformers.backbone_utils import BackboneMixin
except ImportError:  # transformers before 5.2
    from transformers.utils.backbone_utils import BackboneMixin

logger = logging.get_logger(__name__)

# A network of more weights is refused, and a classifier of more: no config.json takes more than 2 GB.
MAX_WEIGHTS = 1 << 28


# Blocks that gradient checkpointing computes twice. Pickles name their classes, which must be found by name.
CHECKPOINTED = {
    kind: type(f"Checkpointed{layer.__name__}", (GradientCheckpointingLayer, layer), {"__module__": __name__})
    for kind, layer in LAYERS.items()
    if isinstance(layer, type)
}
globals().update({layer.__name__: layer for layer in CHECKPOINTED.values()})


class MobileNetPreTrainedModel(PreTrainedModel):
    """What every MobileNet shares: configuration, initial weights, gradient checkpointing of the blocks."""

    config_class = MobileNetConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "stem"  # what PEFT and quantizers call the input embeddings
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over the batch; the Trainer divides by accumulation steps
    _no_split_modules: ClassVar[list[str]] = [layer.__name__ for layer in CHECKPOINTED.values()]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Keep the scale of activations from layer to layer, with and without batch norm.

        Source: He et al., Section 2.2 (arXiv:1502.01852), by the inputs of one filter: a depthwise filter has 9. Of
            what predicts boxes: the detectors' own.
        """
        if isinstance(module, PredictionConv):
            init.normal_(module.weight, std=0.03)
            init.constant_(module.bias, module.initial_bias)
        elif isinstance(module, Conv2d):
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
        elif isinstance(module, LayerScale):
            init.constant_(module.weight, module.initial)

    @torch.no_grad()
    def fuse(self) -> MobileNetPreTrainedModel:
        """Fold every batch norm into its convolution, in place: the same predictions, faster, from fewer tensors.

        Layer scales are folded too. The batch norm before an attention stays, as no convolution precedes it.

        For inference: the network is put in evaluation mode. It saves and loads as a fused checkpoint. A network that
        is fused already, or has no batch norm, stays as it is.

        Returns:
            The network itself.

        Raises:
            ValueError: Adapters of PEFT wrap layers.
        """
        self.eval()
        if not self.config.has_batch_norm:
            return self
        config = copy.deepcopy(self.config)  # other networks may share it
        config.fused = True
        fuse(self)
        for module in self.modules():
            if isinstance(module, MobileNetPreTrainedModel):
                module.config = config
        return self

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Save as PreTrainedModel does.

        Raises:
            ValueError: A part alone is fused, which no configuration says.
        """
        units = [m for m in self.modules() if isinstance(m, ConvNormAct) and m.normalizes]
        norms = {not isinstance(unit.norm, nn.Identity) for unit in units}
        if norms != {self.config.has_batch_norm}:
            raise ValueError("a network must be fused as a whole to be saved: call fuse() on all of it.")
        return super().save_pretrained(save_directory, *args, **kwargs)

    def train(self, mode: bool = True) -> MobileNetPreTrainedModel:
        """Set training mode, with a warning where batch norm was folded away."""
        if mode and self.config.fused:
            logger.warning_once(
                "Training a fused network: its batch norms are folded into its convolutions, so nothing normalizes "
                "activations by the batch any more; expect slower and less stable training. Train the checkpoint from "
                "before fuse(), and fuse the result."
            )
        return super().train(mode)

    def _prepare(self, pixel_values: Tensor | None, weight: Tensor) -> Tensor:
        """Check a batch of images, and lay it out as convolutions like it best: channels last."""
        if pixel_values is None:
            raise ValueError("pixel_values must be a tensor of shape (B, C, H, W), got None.")
        channels = self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            shape = tuple(pixel_values.shape)
            raise ValueError(f"pixel_values must have shape (B, {channels}, H, W), got {shape}.")
        return channels_last(pixel_values.to(weight.dtype))


class MobileNetModel(Features, MobileNetPreTrainedModel):
    """Features of a MobileNet: stem, stages of blocks, and a head that leads to pooled features.

    Args:
        config: Configuration.
        add_pooling_layer: Whether to run the head and pool; without, `pooler_output` is None.
        add_head: Whether to have the head where nothing pools, for another module to run.
    """

    layers = LAYERS | CHECKPOINTED

    def __init__(self, config: MobileNetConfig, add_pooling_layer: bool = True, add_head: bool = False) -> None:
        super().__init__(config)
        weights = sum(block.weights for stage in config.stages for block in stage)
        if weights > MAX_WEIGHTS:
            got = f"{weights} with {config.width_multiplier}"
            raise ValueError(f"width_multiplier must give at most {MAX_WEIGHTS} weights, got {got}.")
        self.pools = add_pooling_layer
        self.add_layers(config, add_pooling_layer or add_head, with_pre_logits=add_pooling_layer)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Compute the features of a batch of images.

        Args:
            pixel_values: Images as MobileNetImageProcessor gives them, of shape (B, num_channels, H, W).
            output_hidden_states: Whether to return every intermediate feature map.
            **kwargs: return_dict, whether to return an output class instead of a tuple; others are ignored.

        Returns:
            last_hidden_state: Feature map of the last block, of shape (B, C, H / 32, W / 32) at output stride 32.
            pooler_output: Pooled features, of shape (B, config.feature_channels).
            hidden_states: Feature maps of the stem and of every block; the last one is last_hidden_state.

        Raises:
            ValueError: pixel_values is missing or has another shape.
        """
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = [] if wanted else None
        x = self.features(self._prepare(pixel_values, self.stem.conv.weight), hidden_states)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=x,
            pooler_output=self.pool(x) if self.pools else None,
            hidden_states=tuple(hidden_states) if wanted else None,
        )


class MobileNetForImageClassification(MobileNetPreTrainedModel):
    """A MobileNet with dropout and a linear classifier on its pooled features."""

    def __init__(self, config: MobileNetConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        widths = [config.feature_channels, *config.classifier_hidden_sizes, config.num_labels]
        names = ["classifier_hidden_sizes"] * len(config.classifier_hidden_sizes) + ["num_labels"]
        for name, (before, after) in zip(names, pairwise(widths), strict=True):
            if before * after > MAX_WEIGHTS:
                raise ValueError(f"{name} must be at most {MAX_WEIGHTS // before} for {before} features, got {after}.")
        self.backbone = MobileNetModel(config)
        self.hidden = hidden_layers(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(*widths[-2:]) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutputWithNoAttention:
        """Classify a batch of images; arguments and errors are those of MobileNetModel, and one more.

        Args:
            labels: Targets. One label an image: integers of shape (B,). Many labels: floats of shape
                (B, num_labels), each 0 or 1. Regression (one label, or problem_type "regression"): floats of shape
                (B,) or (B, num_labels).

        Returns:
            loss: Mean over the batch, if labels are given: cross entropy, binary cross entropy or squared error.
            logits: Scores before softmax, of shape (B, num_labels).
            hidden_states: Feature maps of the stem and of every block.
        """
        features = self.backbone(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(self.dropout(self.hidden(features.pooler_output)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=features.hidden_states)


@dataclass
class MobileNetObjectDetectionOutput(ModelOutput):
    """What MobileNetForObjectDetection gives; its `forward` says what each field is."""

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    scores: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class MobileNetForObjectDetection(DetectionLayers, MobileNetPreTrainedModel):
    """A MobileNet with the layers of a single-shot detector, SSD or SSDLite: config.detector says which.

    What it gives is a box and scores for every anchor; MobileNetImageProcessor.post_process_object_detection makes
    detections of them.
    """

    # Of a classifier's checkpoint, the features alone are of use.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^(backbone\.(head|pre_logits)|hidden|classifier)\."]

    def __init__(self, config: MobileNetConfig) -> None:
        super().__init__(config)
        if config.detector is None:
            raise ValueError(f"detector must be one of {', '.join(DETECTORS)}, got None.")
        if config.num_labels < 1:
            raise ValueError(f"num_labels must be at least 1 for a detector, got {config.num_labels}.")
        if (weights := head_weights(config)) > MAX_WEIGHTS:
            got = f"{weights} with {config.num_labels} at width {config.width_multiplier}"
            raise ValueError(f"num_labels must give a detector's layers at most {MAX_WEIGHTS} weights, got {got}.")
        self.num_labels = config.num_labels
        self.backbone = MobileNetModel(
            config, add_pooling_layer=False, add_head="head" in DETECTORS[config.detector].endpoints
        )
        self.add_detection_layers(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Sequence[dict[str, Tensor]] | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MobileNetObjectDetectionOutput:
        """Detect objects in a batch of images; arguments and errors are those of MobileNetModel, and one more.

        Args:
            labels: What is in each image: dicts of class_labels, integers of shape (n,), and boxes, of shape (n, 4),
                as (cx, cy, w, h) relative to the image; n may be 0.

        Returns:
            loss: The sum of what loss_dict holds, if labels are given.
            loss_dict: loss_classification and loss_localization, each over the number of matched anchors.
            logits: Scores of every anchor before softmax or sigmoid, of shape (B, anchors, classes); the background
                comes first where the detector has such a class.
            pred_boxes: Boxes (cx, cy, w, h) relative to the image, float32 of shape (B, anchors, 4).
            scores: Probabilities without the background, float32 of shape (B, anchors, num_labels).
            hidden_states: Feature maps of the stem and of every block.

        Raises:
            ValueError: labels are not what they must be; the message says which, and why.
        """
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = [] if wanted else None
        x = self.backbone._prepare(pixel_values, self.backbone.stem.conv.weight)
        logits, codes, anchors = self.predict(self.endpoints(x, hidden_states))
        boxes, scores = self.boxes_and_scores(logits, codes, anchors)
        losses = None
        if labels is not None:
            labels = check_labels(labels, len(logits), self.config.num_labels, logits.device)
            losses = detection_loss(self.detector, logits, codes, anchors, labels)
        return MobileNetObjectDetectionOutput(
            loss=None if losses is None else sum(losses.values()),
            loss_dict=losses,
            logits=logits,
            pred_boxes=boxes,
            scores=scores,
            hidden_states=tuple(hidden_states) if wanted else None,
        )


class MobileNetForSemanticSegmentation(Segments, MobileNetPreTrainedModel):
    """A MobileNet that classifies pixels, with the head that `config.segmentation_head` names."""

    # A classifier's checkpoint has these, and a segmenter has no use for them.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        r"^((backbone\.)?(head|pre_logits)|hidden|classifier)\."
    ]

    def __init__(self, config: MobileNetConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = MobileNetModel(config, add_pooling_layer=False, add_head=config.segmentation.takes_head)
        self.add_segmentation_head(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SemanticSegmenterOutput:
        """Classify the pixels of a batch of images; arguments and errors are those of MobileNetModel, and one more.

        Args:
            labels: Class of each pixel, integers of shape (B, H, W); where they are
                config.semantic_loss_ignore_index, pixels do not count.

        Returns:
            loss: Mean cross entropy over pixels, with logits resized to the labels, if labels are given.
            logits: Scores before softmax, of shape (B, num_labels, h, w): of the size of the last feature map, or of
                the finer one that LR-ASPP looks at. `post_process_semantic_segmentation` of the image processor makes
                label maps of them.
            hidden_states: Feature maps of the stem and of every block.
        """
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        maps = self.backbone(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        logits = self.segment(maps)
        loss = None if labels is None else segmentation_loss(logits, labels, self.config)
        return SemanticSegmenterOutput(loss=loss, logits=logits, hidden_states=maps if wanted else None)


class MobileNetBackbone(BackboneMixin, MobileNetPreTrainedModel):
    """Feature maps of a MobileNet, for detectors and segmenters; loads from a classifier's checkpoint.

    `config.out_features` chooses among `config.stage_names`, whose strides double up to 32, or to
    `config.output_stride` where that is less: of V1, V2, V3 large and EdgeTPU, "stem" and "stage1" both have 2.
    """

    has_attentions = False
    # The head's weights come with a classifier's checkpoint, and a backbone has no use for them.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        r"^((backbone\.)?(head|pre_logits)|hidden|classifier|extras|(box|class)_predictors|segmentation_head)\."
    ]

    def __init__(self, config: MobileNetConfig) -> None:
        super().__init__(config)
        if hasattr(self, "_init_backbone"):  # transformers before 5
            self._init_backbone(config)
        self.num_features = [config.stem_block.out_channels, *(stage[-1].out_channels for stage in config.stages)]
        self.backbone = MobileNetModel(config, add_pooling_layer=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        """Compute the feature maps that the configuration asks for; arguments and errors are those of MobileNetModel.

        Args:
            output_attentions: Ignored: no attention weights are kept.

        Returns:
            feature_maps: One for each of config.out_features, of shape (B, C, ceil(H / stride), ceil(W / stride)).
            hidden_states: Feature maps of the stem and of every block.
        """
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = self.backbone(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        last = 0
        maps = {"stem": hidden_states[0]}
        for name, stage in zip(self.stage_names[1:], self.backbone.stages, strict=True):
            last += len(stage)
            maps[name] = hidden_states[last]
        feature_maps = tuple(maps[name] for name in self.out_features)
        return BackboneOutput(feature_maps=feature_maps, hidden_states=hidden_states if wanted else None)


MobileNetModel.register_for_auto_class("AutoModel")
MobileNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
MobileNetForObjectDetection.register_for_auto_class("AutoModelForObjectDetection")
MobileNetForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
MobileNetBackbone.register_for_auto_class("AutoBackbone")

__all__ = [
    "MobileNetBackbone",
    "MobileNetForImageClassification",
    "MobileNetForObjectDetection",
    "MobileNetForSemanticSegmentation",
    "MobileNetModel",
    "MobileNetPreTrainedModel",
]
