"""Import timm without torchvision."""

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
