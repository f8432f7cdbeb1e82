"""Import timm without torchvision, and torchvision without its compiled operators."""

import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Torchvision:
    """Stands in for torchvision while timm is imported: timm names it, and its MobileNets do not use it.

    The real one refuses to be imported beside a build of torch that it was not made with.
    """

    class Anything(type):
        def __getattr__(cls, name: str) -> str:
            if name.startswith("__"):
                raise AttributeError(name)
            return name

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, cls, is_package=True) if name.partition(".")[0] == "torchvision" else None

    @classmethod
    def create_module(cls, spec: ModuleSpec) -> ModuleType:
        def __getattr__(name: str) -> type:  # noqa: N807
            if name.startswith("__"):
                raise AttributeError(name)
            return cls.Anything(name, (), {})

        module = ModuleType(spec.name)
        module.__getattr__ = __getattr__
        return module

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        pass


def import_timm() -> ModuleType:
    """Import timm, which needs no torchvision for its MobileNets.

    Raises:
        ImportError: timm is not installed: pip install --no-deps timm.
    """
    if "timm" in sys.modules:
        return sys.modules["timm"]
    sys.meta_path.insert(0, _Torchvision)
    try:
        import timm
    finally:
        sys.meta_path.remove(_Torchvision)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    return timm


def import_torchvision() -> ModuleType:
    """Import torchvision beside any build of torch, from the folder that MOBILENET_TORCHVISION names, if it names one.

    Its compiled operators refuse a build of torch that they were not made with. Of these, its detectors of MobileNets
    use one, non-maximum suppression, which is written here in torch alone.

    Raises:
        ImportError: It is not installed: pip install --no-deps --target FOLDER torchvision.
    """
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"]
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

    def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        order, kept = scores.argsort(descending=True, stable=True), []
        while len(order):
            best, order = order[0], order[1:]
            kept.append(best)
            low = torch.maximum(boxes[order, :2], boxes[best, :2])
            high = torch.minimum(boxes[order, 2:], boxes[best, 2:])
            shared = (high - low).clamp(min=0).prod(1)
            # Where neither box has an area, this is no number, and suppresses nothing.
            order = order[~(shared / (areas[order] + areas[best] - shared) > iou_threshold)]
        return torch.stack(kept) if kept else order

    library.impl("nms", nms, "CPU")
    folder = os.environ.get("MOBILENET_TORCHVISION", "")
    sys.path.append(folder)
    try:
        import torchvision
        from torchvision import extension

        extension._has_ops = lambda: True  # what it asks before it calls nms
    finally:
        sys.path.remove(folder)
    torchvision.operators = library  # they live as long as it does
    return torchvision
