"""Networks as bare layers for torch: without what transformers adds, they load in a fraction of the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from .configuration_mobilenet import MobileNetConfig
from .detection_mobilenet import DetectionLayers
from .heads_mobilenet import DETECTORS
from .layers_mobilenet import Features, fuse, hidden_layers
from .segmentation_mobilenet import Segments
from .tasks import CLASSIFICATION, DETECTION, SEGMENTATION, Task


class BareFeatures(Features, nn.Module):
    """The layers of MobileNetModel."""

    def __init__(self, config: MobileNetConfig, with_head: bool = True, with_pre_logits: bool = True) -> None:
        super().__init__()
        self.add_layers(config, with_head, with_pre_logits)


class BareClassifier(nn.Module):
    """The layers of MobileNetForImageClassification, for inference.

    Shape: (B, num_channels, H, W) -> (B, num_labels)
    """

    def __init__(self, config: MobileNetConfig) -> None:
        super().__init__()
        self.backbone = BareFeatures(config)
        self.hidden = hidden_layers(config)
        features = [config.feature_channels, *config.classifier_hidden_sizes][-1]
        self.classifier = nn.Linear(features, config.num_labels)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        return (self.classifier(self.hidden(self.backbone.pool(self.backbone.features(pixel_values)))),)


class BareSegmenter(Segments, nn.Module):
    """The layers of MobileNetForSemanticSegmentation, for inference.

    Shape: (B, num_channels, H, W) -> (B, num_labels, h, w)
    """

    def __init__(self, config: MobileNetConfig) -> None:
        super().__init__()
        self.backbone = BareFeatures(config, config.segmentation.takes_head, with_pre_logits=False)
        self.add_segmentation_head(config)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        maps = []
        self.backbone.features(pixel_values, maps)
        return (self.segment(maps),)


class BareDetector(DetectionLayers, nn.Module):
    """The layers of MobileNetForObjectDetection, for inference.

    Shape: (B, num_channels, H, W) -> (B, anchors, num_labels), (B, anchors, 4)
    """

    def __init__(self, config: MobileNetConfig) -> None:
        super().__init__()
        if config.detector is None:
            raise ValueError(f"detector must be one of {', '.join(DETECTORS)} for a detector, got None.")
        with_head = "head" in DETECTORS[config.detector].endpoints
        self.backbone = BareFeatures(config, with_head, with_pre_logits=False)
        self.add_detection_layers(config)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores = self.boxes_and_scores(*self.predict(self.endpoints(pixel_values)))
        return scores, boxes


BARE: dict[str, type[nn.Module]] = {
    CLASSIFICATION.name: BareClassifier,
    DETECTION.name: BareDetector,
    SEGMENTATION.name: BareSegmenter,
}


def check_weights(wrong: list[str]) -> None:
    """Raise ValueError where weights are missing or of another shape."""
    if wrong:
        others = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"it lacks weights of the right shape for {', '.join(wrong[:3])}{others}.")


def configure(content: dict[str, Any]) -> MobileNetConfig:
    """The configuration of a network that has labels, from what its file holds.

    Raises:
        ValueError: A field is not what it allows, or there are no labels.
    """
    config = MobileNetConfig.from_dict(content)
    if config.num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, got {config.num_labels}.")
    config.return_dict = True  # it may ask for tuples
    return config


@torch.no_grad()
def load_bare(content: dict[str, Any], weights: Path, task: Task = CLASSIFICATION) -> nn.Module:
    """A fused network in float32.

    Args:
        content: Of its configuration's file.
        weights: Safetensors file.
        task: What the network is for.

    Raises:
        ValueError: A field is not what it allows; weights are missing or have another shape.
    """
    config = configure(content)
    with torch.device("meta"):  # every weight comes from the file
        network = BARE[task.name](config).eval()
    tensors = {}
    with safe_open(weights, "pt") as file:
        names = set(file.keys())
        for name, tensor in network.state_dict().items():
            if name.endswith(".num_batches_tracked"):
                tensors[name] = torch.zeros((), dtype=torch.int64)
            elif name in names and tuple(file.get_slice(name).get_shape()) == tuple(tensor.shape):
                tensors[name] = file.get_tensor(name).float()
    check_weights(sorted(network.state_dict().keys() - tensors.keys()))
    network.load_state_dict(tensors, assign=True)
    fuse(network)
    return network.to(memory_format=torch.channels_last)


def torch_type(name: str) -> torch.dtype:
    """A type of torch by its name, such as "bfloat16"."""
    return getattr(torch, name)


def find_device(name: str) -> torch.device:
    """A device that torch has here.

    Raises:
        ValueError: It has none of that name.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (AssertionError, RuntimeError) as error:  # an assertion of torch's, where it is built without
        raise ValueError(f"device must be one that torch has here, such as cpu or cuda, got {name!r}.") from error
    return device


def as_function(
    network: Callable[[Tensor], Sequence[Tensor]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Callable[[np.ndarray], list[np.ndarray]]:
    """A network for arrays, for many threads to call.

    Args:
        network: From images of shape (B, C, H, W) to its outputs.
        device: Where the network is.
        dtype: In what it computes.
    """

    @torch.inference_mode()
    def run(pixels: np.ndarray) -> list[np.ndarray]:
        outputs = network(torch.from_numpy(pixels).to(device, dtype))
        return [output.float().cpu().numpy() for output in outputs]

    return run
