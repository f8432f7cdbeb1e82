"""Google's checkpoints on the Hub, and others of transformers' own MobileNetV1 and V2: classifiers and segmenters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from mobilenet.architectures_mobilenet import ARCHITECTURES
from mobilenet.configuration_mobilenet import MAX_LABELS
from mobilenet.image_processing_mobilenet import MobileNetImageProcessor
from mobilenet.tasks import CLASSIFICATION, SEGMENTATION

from .checkpoint import Checkpoint, Options, Oracle, Origin, field_errors, read_json, read_torch, weights_file
from .labels import check
from .rename import TORCH, ConversionError, Row, Table


def _unit(name: str) -> Row:
    return Row(f"{name}.convolution", f"{name}.normalization")


TABLES = {
    "mobilenet_v1": Table(
        {"architecture": "mobilenet_v1"},
        {
            "stem": _unit("mobilenet_v1.conv_stem"),
            "block.depthwise": _unit("mobilenet_v1.layer.{even}"),
            "block.pointwise": _unit("mobilenet_v1.layer.{odd}"),
            "classifier": Row("classifier"),
        },
        TORCH,
    ),
    "mobilenet_v2": Table(
        {"architecture": "mobilenet_v2"},
        {
            "stem": _unit("mobilenet_v2.conv_stem.first_conv"),
            "first.depthwise": _unit("mobilenet_v2.conv_stem.conv_3x3"),
            "first.project": _unit("mobilenet_v2.conv_stem.reduce_1x1"),
            "block.expand": _unit("mobilenet_v2.layer.{previous}.expand_1x1"),
            "block.depthwise": _unit("mobilenet_v2.layer.{previous}.conv_3x3"),
            "block.project": _unit("mobilenet_v2.layer.{previous}.reduce_1x1"),
            "head": _unit("mobilenet_v2.conv_1x1"),
            "classifier": Row("classifier"),
        },
        TORCH,
    ),
}

# Of transformers' own MobileNetV2ForSemanticSegmentation: what MobileNetV2 has before its head, and DeepLab's. It
# carries the head too, which nothing uses.
SEGMENTERS = {
    "mobilenet_v2": Table(
        {"architecture": "mobilenet_v2", "segmentation_head": "deeplab_v3_light"},
        {
            **TABLES["mobilenet_v2"].rows,
            "segmentation_head.branches.0": _unit("segmentation_head.conv_pool"),
            "segmentation_head.branches.1": _unit("segmentation_head.conv_aspp"),
            "segmentation_head.project": _unit("segmentation_head.conv_projection"),
            "segmentation_head.classifier": Row("segmentation_head.classifier.convolution"),
        },
        TORCH,
        dropped=(r"mobilenet_v2\.conv_1x1\..+",),
    ),
}
# By what the names of classes end in: their tables, the recipe of those that say no other, and the task.
KINDS = {
    "ForImageClassification": (TABLES, "google", CLASSIFICATION),
    "ForSemanticSegmentation": (SEGMENTERS, "deeplab", SEGMENTATION),
}
WHOLE = (
    "The source's image processor crops. This one shows images whole instead, in the top left corner of a gray "
    "square, as DeepLab's demo does, so that each of their pixels gets a label."
)

# Written into every configuration as the probability of dropping, but taken from where it was that of keeping.
_KEEP = {"mobilenet_v1": 0.999, "mobilenet_v2": 0.8}
# What the tables of the papers say; no published checkpoint says otherwise.
_FIXED = {"min_depth": 8, "expand_ratio": 6, "first_layer_is_expansion": True}


def _native(architecture: str, kind: str) -> Any:
    """A class of transformers' own, such as MobileNetV1Config."""
    return getattr(transformers, ARCHITECTURES[architecture].native + kind)


def detect(origin: Origin) -> bool:
    """Whether a folder is a repository of transformers' own MobileNets."""
    config = origin.path / "config.json"
    return config.is_file() and read_json(config).get("model_type") in list(TABLES)


def read(origin: Origin, options: Options) -> Checkpoint:
    """Read a repository of transformers' own MobileNets.

    Raises:
        ConversionError: A file is missing or broken, or the network is no classifier or of an unknown shape.
    """
    folder = origin.path
    given = read_json(folder / "config.json")
    model_type, count = given["model_type"], given.get("num_labels", 0)
    if count is not None and not (isinstance(count, int) and count <= MAX_LABELS):  # transformers would name them all
        raise ConversionError(f"{folder / 'config.json'}: num_labels must be at most {MAX_LABELS}, got {count!r}.")
    try:
        theirs = _native(model_type, "Config").from_pretrained(folder)
    except Exception as error:  # each version of transformers raises something else
        raise ConversionError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error
    files, notes = [folder / "config.json", weights_file(folder)], []
    with field_errors(files[0]):
        kind = _kind(model_type, theirs.architectures or [], origin)
        tables, recipe, task = KINDS[kind]
        for name, value in _FIXED.items():
            if getattr(theirs, name, value) != value:
                raise ConversionError(f"{files[0]}: {name} must be {value}, got {getattr(theirs, name)}.")
        if theirs.hidden_act is None:  # none at all, where ours would be that of the table
            raise ConversionError(f"{files[0]}: hidden_act must be the name of an activation, got None.")
        config = tables[model_type].config | _translate(theirs) | {"image_size": options.size(theirs.image_size)}
        processor = options.processor(recipe, theirs.image_size)
        labels = check([theirs.id2label[i] for i in range(theirs.num_labels)], theirs.num_labels, files[0])
    recorded: dict[str, Any] = {}
    if (folder / "preprocessor_config.json").is_file() and options == Options():
        files.append(folder / "preprocessor_config.json")
        recorded = read_json(files[-1])
    with field_errors(files[-1]):
        whole, processor = processor, recorded_processor(recorded, processor)
    if task is SEGMENTATION and recorded and processor.do_center_crop:
        processor, notes = whole, [WHOLE]
    return Checkpoint(
        kind=f"transformers' {_native(model_type, kind).__name__}",
        tensors=read_torch(files[1]),
        table=tables[model_type],
        config=config,
        processor=processor,
        files=files,
        oracle=lambda: native_oracle(model_type, folder, kind),
        labels=labels,
        notes=notes,
    )


def _kind(model_type: str, architectures: list[str], origin: Origin) -> str:
    """What the name of a checkpoint's class ends in, a key of KINDS; a classifier's, where it names none.

    Raises:
        ConversionError: It is of another class.
    """
    known = {_native(model_type, kind).__name__: kind for kind, (tables, *_) in KINDS.items() if model_type in tables}
    if found := [known[name] for name in architectures if name in known]:
        return found[0]
    if architectures:
        raise ConversionError(f"{origin.given}: must hold a {' or a '.join(known)}, got {', '.join(architectures)}.")
    return "ForImageClassification"


def _translate(theirs: Any) -> dict[str, Any]:
    dropout = theirs.classifier_dropout_prob
    is_segmenter = any(name.endswith("ForSemanticSegmentation") for name in theirs.architectures or [])
    fields = {
        "architecture": theirs.model_type,
        "width_multiplier": theirs.depth_multiplier,
        "num_channels": theirs.num_channels,
        "image_size": theirs.image_size,
        "hidden_act": theirs.hidden_act,
        "padding": "same" if theirs.tf_padding else "symmetric",
        "batch_norm_eps": theirs.layer_norm_eps,
        "classifier_dropout": _meant(dropout, theirs.model_type, is_segmenter),
        "num_labels": theirs.num_labels,
    }
    if theirs.problem_type:
        fields["problem_type"] = theirs.problem_type
    if theirs.model_type == "mobilenet_v2":
        fields |= {
            "output_stride": theirs.output_stride,
            "channel_divisor": theirs.depth_divisible_by,
            "shrink_head": not theirs.finegrained_output,
        }
    if is_segmenter:
        fields["semantic_loss_ignore_index"] = theirs.semantic_loss_ignore_index
    return fields


def _meant(dropout: float, model_type: str, is_segmenter: bool) -> float | None:
    """The probability of dropping that was meant; None where it is that of a segmenter's head."""
    if dropout != _KEEP[model_type]:
        return dropout
    return None if is_segmenter else round(1 - dropout, 6)


def recorded_processor(recorded: dict[str, Any], default: MobileNetImageProcessor) -> MobileNetImageProcessor:
    """Preprocessing as a preprocessor_config.json has it; what it does not say is as in a default."""
    known = default.to_dict()
    del known["image_processor_type"]  # the native class's, in what was recorded
    return MobileNetImageProcessor(
        **known | {name: value for name, value in recorded.items() if name in known and value is not None}
    )


def native_oracle(model_type: str, folder: Path, kind: str = "ForImageClassification") -> Oracle:
    """Load a checkpoint with transformers' own class, whose name ends in a key of KINDS."""
    model = _native(model_type, kind).from_pretrained(folder, dtype=torch.float32).eval()

    def logits(pixel_values: Tensor) -> Tensor:
        return model(pixel_values).logits

    return Oracle(
        f"transformers' {type(model).__name__.removesuffix(kind)}",
        transformers.__version__,
        logits,
    )
