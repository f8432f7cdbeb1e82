"""The options of `mobilenet convert`."""

from mobilenet.convert_checkpoint import command as convert


__all__ = ["convert"]
