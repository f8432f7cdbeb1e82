"""MobileNets among the Auto classes of transformers: importing this module registers them."""

from typing import Any, ClassVar, NoReturn

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoTokenizer,
)
from transformers.models.auto import modeling_auto

# What transformers offers by these names at its top needs torchvision, the first in 5.10, the second everywhere.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from .architectures_mobilenet import ARCHITECTURES
from .configuration_mobilenet import PRESETS, MobileNetConfig
from .heads_mobilenet import SEGMENTATION_HEADS
from .image_processing_mobilenet import RECIPES, MobileNetImageProcessor
from .modeling_mobilenet import (
    MobileNetBackbone,
    MobileNetForImageClassification,
    MobileNetForObjectDetection,
    MobileNetForSemanticSegmentation,
    MobileNetModel,
    MobileNetPreTrainedModel,
)


class Absent:
    """What takes the place of something that no MobileNet has.

    Pipelines look for it in every repository, and ask whether to run the repository's code for it, unless there is one
    here. They go on without.
    """

    noun: ClassVar[str]

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: MobileNets take images.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{name} has no {cls.noun}: MobileNets take images.")


class NoVideoProcessor(Absent):
    """For all pipelines of transformers 5.23, which derive its name from the image processor's in `auto_map`."""

    noun = "video processor"


class NoTokenizer(Absent):
    """For pipelines of detection and segmentation, which find one in tokenizer_config.json, whatever that names."""

    noun = "tokenizer"


AutoConfig.register(MobileNetConfig.model_type, MobileNetConfig, exist_ok=True)
for auto_class, model_class, names in (
    (AutoModel, MobileNetModel, modeling_auto.MODEL_MAPPING_NAMES),
    (
        AutoModelForImageClassification,
        MobileNetForImageClassification,
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ),
    (
        AutoModelForObjectDetection,
        MobileNetForObjectDetection,
        modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    ),
    (
        AutoModelForSemanticSegmentation,
        MobileNetForSemanticSegmentation,
        modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    ),
    (AutoBackbone, MobileNetBackbone, modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES),
):
    auto_class.register(MobileNetConfig, model_class, exist_ok=True)
    # Pipelines, model cards and transformers' own tests go by the names of classes.
    names[MobileNetConfig.model_type] = model_class.__name__
AutoImageProcessor.register(MobileNetConfig, slow_image_processor_class=MobileNetImageProcessor, exist_ok=True)
AutoVideoProcessor.register(MobileNetConfig, NoVideoProcessor, exist_ok=True)
AutoTokenizer.register(MobileNetConfig, slow_tokenizer_class=NoTokenizer, exist_ok=True)

__all__ = [
    "ARCHITECTURES",
    "PRESETS",
    "RECIPES",
    "SEGMENTATION_HEADS",
    "MobileNetBackbone",
    "MobileNetConfig",
    "MobileNetForImageClassification",
    "MobileNetForObjectDetection",
    "MobileNetForSemanticSegmentation",
    "MobileNetImageProcessor",
    "MobileNetModel",
    "MobileNetPreTrainedModel",
]
