"""MobileNets for transformers: importing this package registers them with the Auto classes."""

import os

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
)
from transformers.models.auto import modeling_auto

# What transformers 5.10 offers by this name at its top needs torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor


# A wheel holds the root files inside this package; a clone and an editable install hold them one folder up.
if not os.path.exists(os.path.join(os.path.dirname(__file__), "modeling_mobilenet.py")):
    __path__.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from .architectures_mobilenet import ARCHITECTURES
from .configuration_mobilenet import PRESETS, MobileNetConfig
from .image_processing_mobilenet import RECIPES, MobileNetImageProcessor
from .modeling_mobilenet import (
    MobileNetBackbone,
    MobileNetForImageClassification,
    MobileNetModel,
    MobileNetPreTrainedModel,
)


AutoConfig.register(MobileNetConfig.model_type, MobileNetConfig, exist_ok=True)
AutoModel.register(MobileNetConfig, MobileNetModel, exist_ok=True)
AutoModelForImageClassification.register(MobileNetConfig, MobileNetForImageClassification, exist_ok=True)
AutoBackbone.register(MobileNetConfig, MobileNetBackbone, exist_ok=True)
# Pipelines, model cards and transformers' own tests go by the names of classes.
modeling_auto.MODEL_MAPPING_NAMES[MobileNetConfig.model_type] = MobileNetModel.__name__
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[MobileNetConfig.model_type] = (
    MobileNetForImageClassification.__name__
)
modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES[MobileNetConfig.model_type] = MobileNetBackbone.__name__
AutoImageProcessor.register(MobileNetConfig, slow_image_processor_class=MobileNetImageProcessor, exist_ok=True)

__all__ = [
    "ARCHITECTURES",
    "PRESETS",
    "RECIPES",
    "MobileNetBackbone",
    "MobileNetConfig",
    "MobileNetForImageClassification",
    "MobileNetImageProcessor",
    "MobileNetModel",
    "MobileNetPreTrainedModel",
]
