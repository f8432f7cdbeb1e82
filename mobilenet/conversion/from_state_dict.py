"""PyTorch files without a configuration: the names of their tensors tell whose network it is."""

from __future__ import annotations

from . import from_plain, from_timm, from_torchvision
from .checkpoint import Checkpoint, Options, Origin, read_torch
from .rename import ConversionError, closest


_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors", ".tar")
_SOURCES = (
    *((table, from_timm.from_tensors) for table in from_timm.TABLES),
    *((table, from_torchvision.from_tensors) for table in from_torchvision.TABLES),
    (from_plain.TABLE, from_plain.from_tensors),
)


def detect(origin: Origin) -> bool:
    """Whether a path is a file of PyTorch or safetensors."""
    return origin.path.is_file() and origin.path.suffix in _SUFFIXES


def read(origin: Origin, options: Options) -> Checkpoint:
    """Read a state dict of timm, torchvision or the plain network.

    Raises:
        ConversionError: The file is broken, or holds another network.
    """
    tensors = read_torch(origin.path)
    table, share = closest(tensors, [table for table, _ in _SOURCES])
    if share < 0.5:
        raise ConversionError(
            f"{origin.path}: holds no MobileNet of timm or torchvision, nor the plain depthwise separable "
            f"network; its tensors are called {', '.join(list(tensors)[:3])} and so on."
        )
    from_tensors = next(reader for known, reader in _SOURCES if known is table)
    return from_tensors(tensors, table, options, origin.path)
