"""What a converted network is for, by the fields of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mobilenet import modeling_mobilenet
from mobilenet.tasks import CLASSIFICATION, DETECTION, SEGMENTATION, Task


def task_of(fields: Mapping[str, Any]) -> Task:
    """The task of a network."""
    if fields.get("detector"):
        return DETECTION
    return SEGMENTATION if fields.get("segmentation_head") else CLASSIFICATION


def network_class(fields: Mapping[str, Any]) -> type[modeling_mobilenet.MobileNetPreTrainedModel]:
    """The class of a network."""
    return getattr(modeling_mobilenet, task_of(fields).architecture)
