"""Pickles of weights: looked through before torch reads them, which takes whatever memory they ask for."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch


# A file of more bytes, once unpacked, is refused; the largest published checkpoint has some 100 million.
MAX_BYTES = 2 * 1024**3
# The same for the pickle in it, in which weights are mere names: each of its bytes may take some hundred of memory.
MAX_PICKLE = 4 * 1024**2
# What state dicts and trainers' checkpoints are made of. Calls of these take no more memory than the file has;
# bytearray, tensor classes and others would, which torch permits.
_REBUILD = ["_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state"]
_CALLED = {("torch._utils", name) for name in _REBUILD}
_CALLED |= {("argparse", "Namespace"), ("collections", "OrderedDict"), ("torch", "device")}
# Bytes of a number.
_STORAGES = {
    f"{kind}Storage": size
    for kinds, size in (
        ("ComplexDouble", 16),
        ("Double Long ComplexFloat", 8),
        ("Float Int", 4),
        ("Half BFloat16 Short", 2),
        ("Char Byte Bool", 1),
    )
    for kind in kinds.split()
}


class TooLargeError(ValueError):
    """Weights of more than MAX_BYTES, or a pickle of more than MAX_PICKLE: the message says which."""


class _Inert:
    """Stands for whatever a pickle makes, and does nothing."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def __hash__(self) -> int:
        return 0


class _Storage(str):
    """The name of a storage's class."""


class _Reader(pickle._Unpickler):
    """Goes through a pickle and makes nothing of it. The one in C would take the memory that the file announces."""

    dispatch: ClassVar[dict[int, Any]] = {
        key: read for key, read in pickle._Unpickler.dispatch.items() if key != pickle.BYTEARRAY8[0]
    }

    def __init__(self, file: Any, check_storage: Callable[[str, int], None]) -> None:
        super().__init__(file)
        self.check_storage = check_storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _Storage(name)
        if (module, name) in _CALLED:
            return _Inert
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return None
        raise pickle.UnpicklingError(f"it names {module}.{name}, which weights do not take")

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count, *_ = pid
        if not isinstance(kind, _Storage) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("it has a storage of no known type")
        self.check_storage(str(key), count * _STORAGES[kind])
        return _Inert()


def check_pickle(path: Path) -> None:
    """Make sure that torch can load a file of weights, and takes no more than MAX_BYTES to do so.

    Raises:
        pickle.UnpicklingError: It holds more than tensors and plain values, or is broken.
        TooLargeError: It would take more than MAX_BYTES.
    """
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\3\4"  # as torch tells them apart
        file.seek(0)
        if is_archive:
            with zipfile.ZipFile(file) as archive:
                _check_archive(archive)
        else:
            _check_legacy(io.BytesIO(file.read(MAX_PICKLE)), path.stat().st_size)


def _check_archive(archive: zipfile.ZipFile) -> None:
    sizes: dict[str, int] = {}
    for member in archive.infolist():
        if member.filename in sizes:
            raise pickle.UnpicklingError(f"it holds {member.filename} twice")
        sizes[member.filename] = member.file_size
    if archive.comment or min(member.header_offset for member in archive.infolist()):
        raise pickle.UnpicklingError("it holds more than an archive, which readers may read in two ways")
    if sum(sizes.values()) > MAX_BYTES:
        raise TooLargeError(f"unpacks to more than {MAX_BYTES} bytes")
    for name in (name for name in sizes if name.endswith(".pkl")):
        folder = name.rpartition("/")[0]

        def check_storage(key: str, size: int, folder: str = folder) -> None:
            if size > sizes.get(f"{folder}/data/{key}", -1):
                raise pickle.UnpicklingError(f"its storage {key} is larger than what the file holds of it")

        if sizes[name] > MAX_PICKLE:
            raise TooLargeError(f"its pickle has more than {MAX_PICKLE} bytes")
        _read(io.BytesIO(archive.read(name)), check_storage)


def _check_legacy(content: io.BytesIO, length: int) -> None:
    """Before torch 1.6: a number, a version, properties of the machine, the object, and the names of storages."""
    storages: dict[str, int] = {}

    def check_storage(key: str, size: int) -> None:
        storages[key] = max(size, storages.get(key, 0))
        if sum(storages.values()) > length:
            raise pickle.UnpicklingError("its storages are larger than the file")

    for _ in range(5):
        _read(content, check_storage)


def _read(file: Any, check_storage: Callable[[str, int], None]) -> None:
    try:
        _Reader(file, check_storage).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # an unpickler raises what it happens to stumble over
        raise pickle.UnpicklingError(str(error) or type(error).__name__) from error
