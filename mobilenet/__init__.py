"""MobileNets for transformers: importing this package registers them with the Auto classes."""

import os
import sys
from importlib import import_module
from typing import Any


# A wheel holds the root files inside this package; a clone and an editable install hold them one folder up.
if not os.path.exists(os.path.join(os.path.dirname(__file__), "modeling_mobilenet.py")):
    __path__.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

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
    "classify_images",
    "detect_images",
    "segment_images",
]


# Functions for images, each in a module that is imported when it is asked for.
_FUNCTIONS = {"classify_images": ".classify", "detect_images": ".detect", "segment_images": ".segment"}


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name], __name__), name)
    if name in __all__:
        return getattr(import_module(".registration", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# The `mobilenet` command registers when it needs to: transformers takes seconds to import, which its help and exported
# networks do without. `python -m mobilenet.cli` is that command too, and says -m until it has found the module.
if os.path.basename(sys.argv[0]) not in ("mobilenet", "mobilenet.exe", "-m"):
    globals().update({name: __getattr__(name) for name in __all__ if name not in _FUNCTIONS})
