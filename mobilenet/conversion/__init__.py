"""The parts of a conversion: a module for each source, and what they share."""

from __future__ import annotations

import re
from pathlib import Path

from mobilenet.preprocessing_mobilenet import regular

from . import from_google, from_keras, from_onnx, from_slim, from_state_dict, from_tflite, from_timm, from_torchvision
from .checkpoint import Checkpoint, Options, Origin, download
from .rename import ConversionError


_SOURCES = (from_onnx, from_google, from_timm, from_slim, from_keras, from_tflite, from_state_dict)


def read_source(given: str, revision: str | None = None, options: Options | None = None) -> tuple[Origin, Checkpoint]:
    """Find out what kind of source a path or a name is, and read it.

    Args:
        given: A path, a Hub id, or the name of published weights.
        revision: Branch, tag or commit of a Hub id.
        options: What the source does not tell.

    Raises:
        ConversionError: There is no such source, it cannot be read, or an option is not what it allows.
        ImportError: Its reader is not installed.
        IrregularFileError: It is a pipe or a device.
    """
    options.check()
    path = Path(given).expanduser()
    origin = Origin(given, path)
    if path.exists() or from_slim.detect(origin):
        if path.exists() and not path.is_dir():
            regular(path)
        if revision is not None:
            raise ConversionError(f"a revision is for Hub ids, got the path {given}.")
    elif given in from_torchvision.PUBLISHED:
        origin = from_torchvision.download(given)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        origin = download(given, revision)
    else:
        raise ConversionError(f"{given}: no such file or folder.")
    for source in _SOURCES:
        if source.detect(origin):
            try:
                return origin, source.read(origin, options or Options())
            except ConversionError:
                raise
            except ValueError as error:  # of a configuration or a processor that the source describes
                raise ConversionError(f"{given}: {error}") from error
    raise ConversionError(f"{given}: no known source of a MobileNet: {_describe(origin)}")


# The first bytes of files that are something else.
_SIGNATURES = {
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"%PDF": "a document",
    b"<": "text such as HTML, as a failed download leaves it",
    b"version https://git-lfs": "a pointer of Git LFS; `git lfs pull` fetches the file that it stands for",
}
_KNOWN = (
    "a repository of transformers or timm, a state dict (.safetensors, .pth, .bin), slim's checkpoint or archive, "
    "Keras' .h5 or .keras, .tflite or .onnx"
)


def _describe(origin: Origin) -> str:
    """What a path holds, and what was expected."""
    if origin.path.is_dir():
        names = sorted(path.name for path in origin.path.iterdir())
        saved = "saved_model.pb" in names
        held = (
            "TensorFlow's SavedModel: load it with Keras or tf.lite and save it as .keras or .tflite"
            if saved
            else (f"a folder of {', '.join(names[:5])}" if names else "an empty folder")
        )
    else:
        held = next(
            (what for start, what in _SIGNATURES.items() if origin.starts_with(start)), "a file of no known kind"
        )
    return f"it is {held}. Known are {_KNOWN}."


__all__ = ["Checkpoint", "ConversionError", "Options", "Origin", "read_source"]
