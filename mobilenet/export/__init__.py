"""Export to other engines: what there is to choose."""

from enum import Enum


class Target(str, Enum):
    """Where the network shall run."""

    ONNX = "onnx"
    OPENVINO = "openvino"
    EXECUTORCH = "executorch"
    TRANSFORMERS_JS = "transformers.js"


# Share of images on which an int8 or bfloat16 network must give torch's prediction.
MIN_AGREEMENT = 0.9
