"""Detectors and segmenters as their sources have them: what stands on a network's features, a row for each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class AnchorShape(NamedTuple):
    """An anchor of every cell of a feature map."""

    scale: float | str  # over the image: a number; "own", the map's; "between", the geometric mean with the next map's
    ratio: float  # width over height


class HardNegatives(NamedTuple):
    """Which anchors without an object count in the loss: those of the largest classification loss."""

    ratio: int  # negatives for each positive
    minimum: int  # negatives of an image, at least


class Focal(NamedTuple):
    """The focal loss (arXiv:1708.02002), in which all anchors count."""

    alpha: float  # weight of positives; that of negatives is 1 - alpha
    gamma: float


class Suppression(NamedTuple):
    """How overlapping boxes are suppressed."""

    nms_iou_threshold: float  # a box is suppressed that overlaps a better one by more
    max_detections: int  # of an image
    max_detections_per_class: int = 100
    max_candidates_per_class: int | None = None  # before suppression; None for all
    max_classes_per_box: int | None = None  # None: each class is treated by itself
    score_threshold: float = 0.0
    clip_boxes: bool = True  # to the image, before overlaps are computed


class Detector(NamedTuple):
    """A single-shot detector as its source has it: SSD (arXiv:1512.02325), or SSDLite (arXiv:1801.04381, Section 6.2).

    Its maps are two of the backbone and what four extra layers make of the second, each half the size of the one
    before. From each map, convolutions predict the classes and the box of every anchor.
    """

    title: str
    source: str  # its pipeline configuration or code
    architecture: str  # a key of ARCHITECTURES
    image_size: int
    # Maps of the backbone: "previous" and "last" are those of the last blocks of the last two stages, "expansion" is
    # the expanded input within the first block of the last stage, "head" what comes before the pooling.
    endpoints: tuple[str, str]
    is_lite: bool  # whether what filters is depthwise
    kernel_size: int  # of what predicts
    loss: HardNegatives | Focal
    suppression: Suppression
    score: str = "sigmoid"  # or "softmax"
    background: str | None = "one"  # target of class 0 where there is no object: "one" or "zero"; None: no such class
    averages_code: bool = False  # whether the loss of a box is the mean over its four numbers, or their sum
    class_bias: float = 0.0  # initial logits
    extra_channels: tuple[int, ...] = (512, 256, 256, 128)  # before the width multiplier
    first_anchors: tuple[AnchorShape, ...] = ()  # of the first map
    anchors: tuple[AnchorShape, ...] = ()  # of the others
    scales: tuple[float, float] = (0.2, 0.95)  # of the first and the last map; those between are spaced evenly
    clips_anchors: bool = False  # whether no anchor is wider or higher than the image
    box_scales: tuple[float, float] = (10.0, 5.0)  # of centers and of sizes: one over the variances of SSD
    matched_iou: float = 0.5  # from which an anchor is matched with an object
    config: tuple[tuple[str, Any], ...] = ()  # other fields of MobileNetConfig


# SSD, Section 2.2 (arXiv:1512.02325), in the order of create_ssd_anchors in
# object_detection/anchor_generators/multiple_grid_anchor_generator.py; ratios as the pipeline configurations print.
_TF_FIRST = (AnchorShape(0.1, 1.0), AnchorShape("own", 2.0), AnchorShape("own", 0.5))
_TF_OTHERS = (*(AnchorShape("own", ratio) for ratio in (1.0, 2.0, 0.5, 3.0, 0.3333)), AnchorShape("between", 1.0))
# torchvision/models/detection/anchor_utils.py: DefaultBoxGenerator.
_TORCHVISION = (
    AnchorShape("own", 1.0),
    AnchorShape("between", 1.0),
    *(AnchorShape("own", ratio) for ratio in (2.0, 1 / 2, 3.0, 1 / 3)),
)

SSD_MOBILENET_V1 = Detector(
    title="SSD MobileNet V1",
    source="object_detection/samples/configs/ssd_mobilenet_v1_coco.config",
    architecture="mobilenet_v1",
    image_size=300,
    endpoints=("previous", "last"),
    is_lite=False,
    kernel_size=1,
    loss=HardNegatives(ratio=3, minimum=0),
    suppression=Suppression(nms_iou_threshold=0.6, max_detections=100, score_threshold=1e-8),
    first_anchors=_TF_FIRST,
    anchors=_TF_OTHERS,
)
SSDLITE_MOBILENET_V3_LARGE = SSD_MOBILENET_V1._replace(
    title="SSDLite MobileNet V3 large",
    source="object_detection/samples/configs/ssdlite_mobilenet_v3_large_320x320_coco.config",
    architecture="mobilenet_v3_large_reduced_tail",
    image_size=320,
    endpoints=("expansion", "head"),
    is_lite=True,
    kernel_size=3,
    loss=Focal(alpha=0.75, gamma=2.0),
    background="zero",
    averages_code=True,
    class_bias=-4.6,
)

# Of TensorFlow's object detection API, github.com/tensorflow/models/tree/master/research/object_detection, and of
# torchvision. The hard example miner of the API also drops anchors that overlap by 99 %, which is left out here.
DETECTORS: Mapping[str, Detector] = MappingProxyType(
    {
        "ssd_mobilenet_v1": SSD_MOBILENET_V1,
        # Also of width 0.75, and quantized.
        "ssd_mobilenet_v1_focal": SSD_MOBILENET_V1._replace(
            title="SSD MobileNet V1 with focal loss",
            source="object_detection/samples/configs/ssd_mobilenet_v1_300x300_coco14_sync.config",
            loss=Focal(alpha=0.75, gamma=2.0),
            background="zero",
            averages_code=True,
            class_bias=-4.6,
        ),
        # The published checkpoint has plain extra layers, though its configuration asks for depthwise ones.
        "ssd_mobilenet_v2": SSD_MOBILENET_V1._replace(
            title="SSD MobileNet V2",
            source="object_detection/samples/configs/ssd_mobilenet_v2_coco.config",
            architecture="mobilenet_v2",
            endpoints=("expansion", "head"),
            kernel_size=3,
            loss=HardNegatives(ratio=3, minimum=3),
        ),
        "ssdlite_mobilenet_v2": SSDLITE_MOBILENET_V3_LARGE._replace(
            title="SSDLite MobileNet V2",
            source="object_detection/samples/configs/ssdlite_mobilenet_v2_coco.config",
            architecture="mobilenet_v2",
            image_size=300,
            loss=HardNegatives(ratio=3, minimum=3),
            background="one",
            averages_code=False,
            class_bias=0.0,
        ),
        "ssdlite_mobilenet_v3_large": SSDLITE_MOBILENET_V3_LARGE,
        "ssdlite_mobilenet_v3_small": SSDLITE_MOBILENET_V3_LARGE._replace(
            title="SSDLite MobileNet V3 small",
            source="object_detection/samples/configs/ssdlite_mobilenet_v3_small_320x320_coco.config",
            architecture="mobilenet_v3_small_reduced_tail",
        ),
        "ssdlite320_mobilenet_v3_large": SSDLITE_MOBILENET_V3_LARGE._replace(
            title="torchvision's SSDLite MobileNet V3 large",
            source="torchvision/models/detection/ssdlite.py",
            loss=HardNegatives(ratio=3, minimum=0),
            suppression=Suppression(
                nms_iou_threshold=0.55,
                max_detections=300,
                max_detections_per_class=300,
                max_candidates_per_class=300,
                score_threshold=0.001,
            ),
            score="softmax",
            background="one",
            averages_code=False,
            class_bias=0.0,
            first_anchors=_TORCHVISION,
            anchors=_TORCHVISION,
            clips_anchors=True,
            config=(("padding", "symmetric"),),
        ),
    }
)


# What makes a segmenter of a backbone. Both kinds of rows say what they take, and how their maps are resized.


class AtrousPyramid(NamedTuple):
    """DeepLab V3: branches that see the same feature map at several scales, joined by a 1x1 convolution."""

    title: str
    paper: str  # on arXiv
    rates: tuple[int, ...]  # of the branches as they are joined: 0 pools the map, 1 is a 1x1, others are dilated 3x3
    refines: bool  # whether a 3x3 convolution comes before the classifier
    takes_head: bool  # whether the last 1x1 convolution of the backbone comes first
    align_corners: bool  # how maps are resized: whether the centers of their corner pixels stay in place, or the edges
    dropout: float  # behind the joined branches
    channels: int = 256  # of each branch, and of what joins them
    norm_eps: float = 1e-5

    kind = "atrous pyramid"


class LiteAtrousPyramid(NamedTuple):
    """LR-ASPP: a feature map weighed by channel, and one of a higher resolution: what classifies each is added up."""

    title: str
    paper: str  # on arXiv
    low_stride: int  # size of the image over size of the map of a higher resolution: the first that has it
    takes_head: bool
    align_corners: bool
    dropout: float
    channels: int = 128  # of the weighed map
    norm_eps: float = 1e-5

    kind = "lite atrous pyramid"


SEGMENTATION_HEADS: Mapping[str, AtrousPyramid | LiteAtrousPyramid] = MappingProxyType(
    {
        # deeplab/model.py of tensorflow/models, for deeplabv3_mnv2_* of deeplab/g3doc/model_zoo.md, which have neither
        # atrous branches nor a decoder: image_pooling, aspp0, and concat_projection, of which dropout keeps 0.9.
        "deeplab_v3_light": AtrousPyramid(
            title="DeepLab V3, image pooling and 1x1",
            paper="1706.05587",
            rates=(0, 1),
            refines=False,
            takes_head=False,
            align_corners=True,
            dropout=0.1,
        ),
        # torchvision/models/segmentation/deeplabv3.py: deeplabv3_mobilenet_v3_large, which keeps the rates that the
        # paper has for output stride 8 at output stride 16.
        "deeplab_v3": AtrousPyramid(
            title="DeepLab V3",
            paper="1706.05587",
            rates=(1, 12, 24, 36, 0),
            refines=True,
            takes_head=True,
            align_corners=False,
            dropout=0.5,
        ),
        # MobileNetV3, Section 6.4 and Figure 10, as torchvision/models/segmentation/lraspp.py has it: the means that
        # weigh channels are those of the whole map, where the paper's are of windows of 49x49.
        "lraspp": LiteAtrousPyramid(
            title="LR-ASPP",
            paper="1905.02244",
            low_stride=8,
            takes_head=True,
            align_corners=False,
            dropout=0.0,
        ),
    }
)

# Fields of MobileNetConfig for what was published, by names: deeplabv3_mnv2_pascal and deeplabv3_mnv2_dm05_pascal of
# deeplab/g3doc/model_zoo.md, torchvision's segmenters, and the detectors.
PUBLISHED: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        f"deeplab_v3_mobilenet_v2_{width}_513": {
            "architecture": "mobilenet_v2",
            "width_multiplier": width,
            "image_size": 513,
            "output_stride": stride,
            "channel_divisor": divisor,
            "segmentation_head": "deeplab_v3_light",
            "num_labels": 21,
        }
        for width, stride, divisor in ((1.0, 8, 8), (0.5, 16, 1))
    }
    | {
        f"{head}_mobilenet_v3_large_520": {
            "architecture": "mobilenet_v3_large",
            "image_size": 520,
            "output_stride": 16,
            "dilates_strided": True,
            "padding": "symmetric",
            "segmentation_head": head,
            "num_labels": 21,
        }
        for head in ("deeplab_v3", "lraspp")
    }
    | {
        name: {
            "architecture": detector.architecture,
            "image_size": detector.image_size,
            "detector": name,
            "num_labels": 90,  # of COCO, of which ten have no name
            **dict(detector.config),
        }
        for name, detector in DETECTORS.items()
    }
)
