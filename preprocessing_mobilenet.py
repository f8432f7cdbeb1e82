"""Images of any kind to what a network takes: read, resize, crop, normalize, on Pillow and numpy alone."""

from __future__ import annotations

import http.client
import io
import ipaddress
import math
import os
import socket
import ssl
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.Image import Resampling


class Recipe(NamedTuple):
    """How a family of checkpoints was evaluated: resize, crop the center, normalize."""

    resample: int
    crop_fraction: float  # crop size over shortest edge
    mean: tuple[float, float, float]  # of RGB in 0 to 1
    std: tuple[float, float, float]
    fit: str = "crop"  # a key of FITS
    align_corners: bool = False  # of a segmenter: as its head has it


# How an image of any shape becomes a square: options for a side in pixels, and for the shortest edge to crop from.
# "whole" keeps its shape.
FITS = {
    "crop": lambda side, edge: _fit({"shortest_edge": edge}, side),
    "stretch": lambda side, edge: _fit({"height": side, "width": side}, side, do_center_crop=False),
    "pad": lambda side, edge: _fit({"longest_edge": side}, side),
    "corner": lambda side, edge: _fit({"longest_edge": side}, side, do_center_crop=False, pad_size=side),
    "whole": lambda side, edge: _fit({"shortest_edge": side}, side, do_center_crop=False),
}


def _fit(size: dict[str, int], side: int, **options: Any) -> dict[str, Any]:
    return {"size": size, "crop_size": side, "do_center_crop": True, "pad_size": None, **options}


SQUARE_FITS = ("crop", "stretch", "pad")  # of classifiers
WHOLE_FITS = ("stretch", "pad", "corner", "whole")  # that show all of an image, as segmenters shall see it


_HALF = (0.5, 0.5, 0.5)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

RECIPES = {
    # slim/preprocessing/inception_preprocessing.py; the preprocessor_config.json of google/mobilenet_*
    "google": Recipe(Resampling.BILINEAR, 0.875, _HALF, _HALF),
    # keras/applications/imagenet_utils.py, mode "tf"; its accuracies are those of slim's weights
    "keras": Recipe(Resampling.BILINEAR, 0.875, _HALF, _HALF),
    # torchvision/models/mobilenetv2.py and mobilenetv3.py: the weights IMAGENET1K_V1 and IMAGENET1K_V2
    "torchvision": Recipe(Resampling.BILINEAR, 224 / 256, _IMAGENET_MEAN, _IMAGENET_STD),
    "torchvision_v2": Recipe(Resampling.BILINEAR, 224 / 232, _IMAGENET_MEAN, _IMAGENET_STD),
    # timm/models/efficientnet.py: _cfg, as mobilenetv2_*.ra_in1k use it
    "timm": Recipe(Resampling.BICUBIC, 0.875, _IMAGENET_MEAN, _IMAGENET_STD),
    # the same file: mobilenetv1_100.ra4_e3600_r224_in1k, and mobilenetv1_125.ra4_e3600_r224_in1k
    "timm_ra4": Recipe(Resampling.BICUBIC, 0.875, _HALF, _HALF),
    "timm_ra4_125": Recipe(Resampling.BICUBIC, 0.9, _HALF, _HALF),
    # The snippet that comes with an exported model: ImageOps.fit, which crops nothing but the longer edge; likewise
    # cropTo in teachablemachine-community/libraries/image/src/utils/canvas.ts
    "teachable_machine": Recipe(Resampling.LANCZOS, 1.0, _HALF, _HALF),
    # tensorflow/lite-support: ImageClassifier of the TFLite Task Library
    "task_library": Recipe(Resampling.BILINEAR, 1.0, _HALF, _HALF, "stretch"),
    # research/object_detection of tensorflow/models: fixed_shape_resizer, and preprocess of its MobileNets; likewise
    # torchvision/models/detection/ssdlite.py
    "ssd": Recipe(Resampling.BILINEAR, 1.0, _HALF, _HALF, "stretch"),
    # timm/models/mobilenetv3.py: most mobilenetv4_*; some, evaluated at a larger size than they were trained at;
    # mobilenetv4_conv_small.e3600_r256_in1k; mobilenetv3_large_100.miil_in21k
    "timm_95": Recipe(Resampling.BICUBIC, 0.95, _IMAGENET_MEAN, _IMAGENET_STD),
    "timm_100": Recipe(Resampling.BICUBIC, 1.0, _IMAGENET_MEAN, _IMAGENET_STD),
    "timm_ra4_95": Recipe(Resampling.BICUBIC, 0.95, _HALF, _HALF),
    "timm_miil": Recipe(Resampling.BILINEAR, 0.875, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    # deeplab_demo.ipynb and input_preprocess.py of tensorflow/models: the image in the top left corner, on gray
    "deeplab": Recipe(Resampling.BILINEAR, 1.0, _HALF, _HALF, "corner", align_corners=True),
    # torchvision/transforms/_presets.py: SemanticSegmentation
    "torchvision_segmentation": Recipe(Resampling.BILINEAR, 1.0, _IMAGENET_MEAN, _IMAGENET_STD, "whole"),
}

# What a network sees of pixels, as people say it: mean and deviation of values in 0 to 1.
RANGES: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "0..1": ((0.0,), (1.0,)),
    "-1..1": ((0.5,), (0.5,)),
    "0..255": ((0.0,), (1 / 255,)),
    "imagenet": (_IMAGENET_MEAN, _IMAGENET_STD),
}


class UnreadableImageError(ValueError):
    """An image that cannot be read: the message names it and says why."""


# An image of more pixels is refused, and none is made: in all, one takes up to 24 bytes a pixel, 4 GB then.
MAX_PIXELS = 178_956_970
# So is one of a longer side: what is computed for each row or column takes many times the memory of a pixel.
MAX_SIDE = 1_000_000
# Formats that are not read. Ghostscript runs an EPS file, Windows a WMF file; and IPTC would lead Pillow to both.
_REFUSED = {
    "EPS": "it is a program that draws an image",
    "WMF": "it is a program that draws an image",
    "IPTC": "it may hold a file of any format",
}
# An image that is read more often is refused, but for one more time a pixel: photographs take some hundred reads, a
# header of blanks one for each byte, and a file of empty chunks several for each of them.
MAX_READS = 100_000
MAX_COMMENTS = 1000
# A download of more bytes is refused, and one that takes longer, in seconds.
MAX_BYTES = 256 * 1024 * 1024
MAX_SECONDS = 300.0
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses in the last 32 bits


def _is_public(address: str) -> bool:
    """Whether the internet reaches an address, which this machine and the networks around it have not."""
    address = ipaddress.ip_address(address.partition("%")[0])
    return (ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else address).is_global


class _Exchange:
    """A download with all its redirects: when it must end, and where it leads.

    Once on public ground, it must not come to this machine or the networks around it. What counts is the address that
    is connected to: no name is looked up twice, nor any escape read in two ways.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout, self.end = timeout, time.monotonic() + MAX_SECONDS
        self.is_public = False

    def time_left(self) -> float:
        """How long to wait for the next byte, in seconds.

        Raises:
            TimeoutError: The exchange has taken its time.
        """
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no end after {MAX_SECONDS:g} seconds")
        return min(self.timeout, left)

    def connect(self, address: tuple[str, int], *_: Any) -> socket.socket:
        """Connect to a host and port, in place of socket.create_connection."""
        error = OSError(f"{address[0]} has no address")
        for family, kind, protocol, _, found in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            is_public = _is_public(found[0])
            if self.is_public and not is_public:
                raise OSError(f"{address[0]} is redirected to from a public address, and is a private one")
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(self.time_left())
                connection.connect(found)
            except OSError as this:
                connection.close()
                error = this
            else:
                self.is_public = is_public
                return connection
        raise error

    def respond(self, connection: socket.socket, *args: Any, **kwargs: Any) -> http.client.HTTPResponse:
        """Read a response against the clock, in place of http.client.HTTPResponse."""
        response = http.client.HTTPResponse(connection, *args, **kwargs)
        response.fp = io.BufferedReader(_Timed(response.fp.detach(), connection, self.time_left))
        return response

    def through(self, kind: type[http.client.HTTPConnection]) -> Callable[..., http.client.HTTPConnection]:
        """What opens connections that are checked before anything is sent."""

        def open_connection(*args: Any, **kwargs: Any) -> http.client.HTTPConnection:
            connection = kind(*args, **kwargs)
            connection._create_connection, connection.response_class = self.connect, self.respond
            return connection

        return open_connection


class _Timed(io.RawIOBase):
    """What a connection receives, for as long as there is time: a server may send byte after byte, and never end."""

    def __init__(self, stream: io.RawIOBase, connection: socket.socket, time_left: Callable[[], float]) -> None:
        self.stream, self.connection, self.time_left = stream, connection, time_left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self.connection.settimeout(self.time_left())
        try:
            return self.stream.readinto(buffer)
        except TimeoutError:
            self.time_left()  # tells which of the two limits it was
            raise

    def close(self) -> None:
        self.stream.close()
        super().close()


class _Http(urllib.request.HTTPHandler):
    def __init__(self, exchange: _Exchange) -> None:
        super().__init__()
        self.open_connection = exchange.through(http.client.HTTPConnection)

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self.open_connection, request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, exchange: _Exchange) -> None:
        super().__init__()
        self.open_connection = exchange.through(http.client.HTTPSConnection)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self.open_connection, request, context=ssl.create_default_context())


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow a server to HTTP and HTTPS alone."""

    def redirect_request(self, request: urllib.request.Request, *args: Any) -> urllib.request.Request | None:
        response, *_, url = args
        response.close()  # or its body, of whatever length, would be read
        if not is_url(url):
            raise urllib.error.URLError(f"redirects to {url}")
        return super().redirect_request(request, *args)


def is_url(name: str) -> bool:
    """Whether a name is a URL that is fetched: of HTTP or HTTPS."""
    return name.lower().startswith(("http://", "https://"))


def fetch(url: str, timeout: float = 30.0) -> bytes:
    """Download an image over HTTP or HTTPS.

    Raises:
        UnreadableImageError: The server does not answer, answers with an error, sends more than MAX_BYTES, takes more
            than MAX_SECONDS, or redirects to another protocol or from a public address to a private one.
    """
    data, exchange = bytearray(), _Exchange(timeout)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "mobilenet"})
        opener = urllib.request.build_opener(_Redirects, _Http(exchange), _Https(exchange))
        with opener.open(request, timeout=timeout) as response:
            while len(data) <= MAX_BYTES and (chunk := response.read1(1 << 16)):
                data += chunk
            if response.length:  # of a body that has no end of its own
                raise http.client.IncompleteRead(bytes(data), response.length)
    except (http.client.HTTPException, OSError, ValueError) as error:
        raise UnreadableImageError(f"{url}: cannot be downloaded: {error}") from error
    if len(data) > MAX_BYTES:
        raise UnreadableImageError(f"{url}: more than {MAX_BYTES} bytes")
    return bytes(data)


class IrregularFileError(OSError):
    """A path of something else than a file: the message names it."""


def regular(path: str | os.PathLike) -> str | os.PathLike:
    """Give a path back if it is that of a regular file: a pipe or a device may keep its reader waiting for ever.

    Raises:
        IrregularFileError: It is a pipe, a device, a socket or a folder.
        OSError: There is no such file, or it cannot be asked for.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise IrregularFileError(f"{os.fspath(path)}: not a regular file")
    return path


class _CountedReader(io.BufferedReader):
    """A file that is read so many times, and no more."""

    reads_left = MAX_READS

    def read(self, size: int | None = -1) -> bytes:
        self._count()
        return super().read(size)

    def readline(self, size: int | None = -1) -> bytes:
        self._count()
        return super().readline(size)

    def _count(self) -> None:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise OSError(f"it takes more than {MAX_READS} reads")


def _open(source: str | os.PathLike | bytes) -> _CountedReader:
    file = _CountedReader(io.BytesIO(source) if isinstance(source, bytes) else io.FileIO(regular(source)))
    # Of plain PNM, which is text, Pillow copies up to a megabyte for each comment.
    if file.peek(2)[:2] in (b"P1", b"P2", b"P3"):
        chunks = iter(lambda: io.BufferedReader.read(file, 1 << 20), b"")
        if sum(chunk.count(b"#") for chunk in chunks) > MAX_COMMENTS:
            file.close()
            raise OSError(f"it has more than {MAX_COMMENTS} comments")
        file.seek(0)
    return file


def open_image(source: str | os.PathLike | bytes, at_least: tuple[int, int] = (0, 0)) -> Image.Image:
    """Read an image from a path, a URL or bytes, and turn it upright as its EXIF orientation says.

    Args:
        source: Path, URL, or the bytes of a file.
        at_least: Width and height that are enough, for either orientation: a JPEG is decoded at a half, a quarter or
            an eighth of its size if no less remains, in a fraction of the time. By default, at its whole size.

    Raises:
        UnreadableImageError: There is no such file, it is no image, it is cut off, or it is too large.
    """
    name = "bytes" if isinstance(source, bytes) else os.fspath(source)
    if isinstance(source, str) and is_url(source):
        source = fetch(source)
    try:
        with _open(source) as file, Image.open(file) as image:
            file.reads_left = MAX_READS + image.width * image.height
            if image.format in _REFUSED:
                raise UnreadableImageError(f"{name}: {image.format} is not read: {_REFUSED[image.format]}")
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImageError(f"{name}: {image.width}x{image.height} is over {MAX_PIXELS} pixels")
            if max(image.size) > MAX_SIDE:
                raise UnreadableImageError(f"{name}: {image.width}x{image.height} is over {MAX_SIDE} pixels a side")
            if all(at_least):
                image.draft(None, at_least)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"{name}: not an image in a format that Pillow reads") from error
    except FileNotFoundError as error:
        raise UnreadableImageError(f"{name}: no such file") from error
    except IrregularFileError as error:
        raise UnreadableImageError(str(error)) from error
    except Exception as error:  # Pillow's decoders and EXIF parser raise what they happen to stumble over
        raise UnreadableImageError(f"{name}: cannot be decoded: {error}") from error


def _is_deep(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits a value."""
    return image.mode.startswith("I") or image.mode == "F"


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _to_rgba(image: Image.Image) -> Image.Image:
    """Convert an image that has transparency; of mode La, Pillow does so by way of LA alone."""
    if _is_deep(image):
        transparent = image.info["transparency"]
        opaque = np.asarray(image) != (transparent if isinstance(transparent, int) else -1)
        image = _to_eight_bits(image).convert("LA")
        image.putalpha(Image.fromarray(255 * opaque.astype(np.uint8)))
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; what is transparent shows a white ground.

    Raises:
        ValueError: The mode has no conversion to RGB, or values are out of range.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if _has_alpha(image):
        image = _to_rgba(image)
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    if _is_deep(image):
        return _to_eight_bits(image).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"an image of mode {image.mode} has no conversion to RGB") from error


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits (modes I;16 and I) or floats (mode F) down to mode L."""
    values = np.asarray(image)
    if image.mode == "F":
        return Image.fromarray(np.rint(_as_byte_range(values, "image of mode F")).astype(np.uint8))
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"an image of mode {image.mode} must have values from 0 to 65535, got {low} to {high}.")
    # Mode I may hold eight bits; the other modes say themselves that they hold 16.
    if image.mode != "I" or high > 255:
        values = (values.astype(np.uint32) + 128) // 257  # rounds, and no value lies halfway
    return Image.fromarray(values.astype(np.uint8))


def _as_byte_range(values: np.ndarray, name: str, scale: float | None = None) -> np.ndarray:
    """Floats in 0 to 1 or in 0 to 255, by their own range unless the scale says which, as float32 in 0 to 255."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):  # false for NaN too
        raise ValueError(f"{name} must have values from 0 to 1 or from 0 to 255, got {low} to {high}.")
    return values.astype(np.float32) * (255 / (scale or (1 if high <= 1 else 255)))


class Bytes(NamedTuple):
    """An image of floats in 0 to 255, however low its own are."""

    values: np.ndarray


class _Planes(NamedTuple):
    """An image in a form that Pillow resizes: one image of 8 bits, or one of mode L or F for each channel."""

    images: tuple[Image.Image, ...]
    scale: float  # what 255 stands for in the values that came: 255, or 1 for floats in 0 to 1

    @property
    def size(self) -> tuple[int, int]:
        return self.images[0].size


def _is_encoded(image: Any) -> bool:
    return isinstance(image, (str, os.PathLike, bytes))


def _as_array(image: Any) -> Any:
    """A torch tensor as an array, and anything else as it comes: torch need not be imported for it."""
    if not (hasattr(image, "detach") and hasattr(image, "dtype")):  # streams can be detached, too
        return image
    image = image.detach().cpu()
    return (image.float() if str(image.dtype) == "torch.bfloat16" else image).numpy()


def _channels_last(array: np.ndarray, input_data_format: str | None) -> np.ndarray:
    """An image of shape (H, W), (H, W, C) or (C, H, W) as (H, W, C)."""
    if array.ndim == 2:
        return array[..., None]
    first, last = array.shape[0] in (1, 3, 4), array.shape[-1] in (1, 3, 4)
    if input_data_format is None:
        # An image of 3 rows is unlikelier than one of channels: where both ends could be channels, the first is,
        # as in transformers.
        input_data_format = "channels_first" if first else "channels_last"
    if not (first if input_data_format == "channels_first" else last):
        raise ValueError(f"an array must have 1, 3 or 4 channels, got shape {array.shape} as {input_data_format}.")
    return np.moveaxis(array, 0, -1) if input_data_format == "channels_first" else array


def _split_alpha(image: Image.Image) -> tuple[Image.Image, ...]:
    """Four channels one by one: as mode RGBA, Pillow would resize the colors weighted by the fourth."""
    return image.split() if image.mode == "RGBA" else (image,)


def _from_array(array: np.ndarray, input_data_format: str | None, as_rgb: bool, scale: float | None = None) -> _Planes:
    array = _channels_last(array, input_data_format)
    if array.size == 0:
        raise ValueError(f"an array must not be empty, got shape {array.shape}.")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.integer) and array.dtype != np.uint8:
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > 255:
            raise ValueError(f"an array of {array.dtype} must have values from 0 to 255, got {low} to {high}.")
        array = array.astype(np.uint8)
    if array.dtype == np.uint8:
        array = np.ascontiguousarray(array if array.shape[-1] > 1 else array[..., 0])
        image = Image.fromarray(array)
        return _Planes((to_rgb(image),) if as_rgb else _split_alpha(image), 255)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"an array must be of integers or floats, got {array.dtype}.")
    scale = scale or (255 if float(array.max()) > 1 else 1)
    array = _as_byte_range(array, f"an array of {array.dtype}", scale)
    if array.shape[-1] == 4 and as_rgb:
        alpha = array[..., 3:] / 255
        array = array[..., :3] * alpha + 255 * (1 - alpha)
    channels = [Image.fromarray(np.ascontiguousarray(array[..., c])) for c in range(array.shape[-1])]
    if as_rgb and len(channels) == 1:
        channels *= 3
    return _Planes(tuple(channels), scale)


def _to_planes(image: Any, input_data_format: str | None, as_rgb: bool) -> _Planes:
    if isinstance(image, Image.Image):
        if not image.width or not image.height:
            raise ValueError(f"an image must not be empty, got {image.width}x{image.height}.")
        if as_rgb:
            return _Planes((to_rgb(image),), 255)
        if _has_alpha(image):
            return _Planes(_split_alpha(_to_rgba(image)), 255)
        if _is_deep(image):
            return _Planes((_to_eight_bits(image),), 255)
        return _Planes((image.convert("L") if image.mode in ("1", "L") else to_rgb(image),), 255)
    if isinstance(image, Bytes):
        return _from_array(image.values, input_data_format, as_rgb, 255)
    if isinstance(image, np.ndarray):
        return _from_array(image, input_data_format, as_rgb)
    raise TypeError(f"images must be Pillow images, arrays, tensors, paths or URLs, got {type(image).__name__}.")


def _to_gray(planes: _Planes) -> _Planes:
    """Luma of RGB by ITU-R BT.601, as Pillow has it; grays stay as they are."""
    if planes.images[0].mode == "RGB":
        return planes._replace(images=(planes.images[0].convert("L"),))
    red, green, blue = (np.asarray(image) for image in planes.images)
    return planes._replace(images=(Image.fromarray(0.299 * red + 0.587 * green + 0.114 * blue),))


def flatten(images: Any) -> list[Any]:
    """One image, a batch of them, or lists of both, as a flat list of single images; tensors become arrays."""
    if isinstance(images, (list, tuple)):
        return [single for image in images for single in flatten(image)]
    images = _as_array(images)
    if isinstance(images, np.ndarray):
        if images.ndim == 4:
            # Floats have one range, of the whole batch: a dark image of it has none of its own.
            whole = images.size and np.issubdtype(images.dtype, np.floating) and images.max() > 1
            return [Bytes(image) for image in images] if whole else list(images)
        if images.ndim not in (2, 3):
            shape = tuple(images.shape)
            raise ValueError(f"images must be arrays of 2 or 3 dimensions, or batches of 4, got shape {shape}.")
    return [images]


def _positive(name: str, *values: Any) -> None:
    if not all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) and 0 < v <= 65536 for v in values):
        raise ValueError(f"{name} must be made of integers from 1 to 65536, got {', '.join(map(repr, values))}.")


def _read_size(name: str, size: Any, square: bool) -> dict[str, int]:
    """A size as users write it: an integer, (height, width), or a dictionary.

    An integer is the side of a square, or the shortest edge.
    """
    if isinstance(size, (int, np.integer)) and not isinstance(size, bool):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    elif isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    # transformers has a class for sizes, which is no Mapping but can be made one.
    elif not isinstance(size, Mapping) and isinstance(size, Iterable) and not isinstance(size, (str, Sequence)):
        size = dict(size)
    size = {key: value for key, value in size.items() if value is not None} if isinstance(size, Mapping) else None
    if size is None or set(size) not in (
        [{"height", "width"}] if square else [{"height", "width"}, {"shortest_edge"}, {"longest_edge"}]
    ):
        edges = "" if square else ', {"shortest_edge"}, {"longest_edge"}'
        allowed = f'an integer, (height, width){edges} or {{"height", "width"}}'
        raise ValueError(f"{name} must be {allowed}, got {size!r}.")
    _positive(name, *size.values())
    return {key: int(value) for key, value in size.items()}


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that float32 holds."""
    return (
        isinstance(value, (int, float, np.integer, np.floating))
        and not isinstance(value, bool)
        and abs(value) <= float(np.finfo(np.float32).max)
    )


def _read_count(name: str, value: Any) -> int:
    _positive(name, value)
    return int(value)


def _read_optional_count(name: str, value: Any) -> int | None:
    return None if value is None else _read_count(name, value)


def _read_pad_size(name: str, value: Any) -> dict[str, int] | None:
    return None if value is None else _read_size(name, value, square=True)


def _read_channel_values(name: str, values: Any) -> list[float]:
    values = list(values) if isinstance(values, (Sequence, np.ndarray)) and not isinstance(values, str) else [values]
    if not values or not all(_is_finite(v) for v in values):
        raise ValueError(f"{name} must be a number, or one for each channel, got {values!r}.")
    if name == "image_std" and not all(v > 0 for v in values):
        raise ValueError(f"image_std must be above 0, got {values!r}.")
    return [float(v) for v in values]


def _read_flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be true or false, got {value!r}.")
    return bool(value)


def _read_resample(name: str, value: Any) -> int:
    try:
        return int(Resampling(value))
    except ValueError:
        allowed = ", ".join(f"{r.value} ({r.name.lower()})" for r in Resampling)
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}.") from None


def _read_share(name: str, value: Any) -> float:
    if not _is_finite(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}.")
    return float(value)


def _read_factor(name: str, value: Any) -> float:
    if not _is_finite(value) or value <= 0:
        raise ValueError(f"{name} must be a number above 0, got {value!r}.")
    return float(value)


# Each option with its default and how it is read, in the order in which they apply to an image.
OPTIONS: dict[str, tuple[Any, Callable[[str, Any], Any]]] = {
    "fast_decode": (False, _read_flag),
    "do_convert_rgb": (True, _read_flag),
    "do_grayscale": (False, _read_flag),
    "detail_size": (None, _read_optional_count),
    "do_resize": (True, _read_flag),
    "size": (256, lambda name, value: _read_size(name, value, square=False)),
    "resample": (Resampling.BILINEAR, _read_resample),
    "do_center_crop": (True, _read_flag),
    "crop_size": (224, lambda name, value: _read_size(name, value, square=True)),
    "do_rescale": (True, _read_flag),
    "rescale_factor": (1 / 255, _read_factor),
    "do_normalize": (True, _read_flag),
    "image_mean": (_HALF, _read_channel_values),
    "image_std": (_HALF, _read_channel_values),
    # Of detections, after the network.
    "score_threshold": (0.0, _read_share),
    "clip_boxes": (True, _read_flag),
    "max_candidates_per_class": (None, _read_optional_count),
    "max_classes_per_box": (None, _read_optional_count),
    "nms_iou_threshold": (0.6, _read_share),
    "max_detections_per_class": (100, _read_count),
    "max_detections": (100, _read_count),
    "pad_size": (None, _read_pad_size),
    "align_corners": (False, _read_flag),
}

# What suppress of postprocessing_mobilenet.py takes.
SUPPRESSION = (
    "score_threshold",
    "clip_boxes",
    "max_candidates_per_class",
    "max_classes_per_box",
    "nms_iou_threshold",
    "max_detections_per_class",
    "max_detections",
)
# Saved where they say something: classifiers have no use for them.
LATER_OPTIONS = ("pad_size", "align_corners", *SUPPRESSION)


def read_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option, as it is given or else by default.

    Raises:
        ValueError: An option is not what it allows; the message names option, allowed values and value.
    """
    return {name: read(name, given.get(name, default)) for name, (default, read) in OPTIONS.items()}


def preprocess(image: Any, options: Mapping[str, Any], input_data_format: str | None = None) -> np.ndarray:
    """Preprocess one image.

    Args:
        image: Pillow image of any mode; array of shape (H, W), (H, W, C) or (C, H, W); path, URL, or bytes of a file.
        options: Every option, as read_options gives them.
        input_data_format: "channels_first" or "channels_last"; by default read off the shape of an array.

    Returns:
        float32 of shape (H, W, C).

    Raises:
        TypeError: It is no image.
        ValueError: Its values are not allowed.
        UnreadableImageError: A path, URL or file that cannot be read; a ValueError.
    """
    as_rgb = options["do_convert_rgb"] or options["do_grayscale"]
    if _is_encoded(image):
        try:
            planes = _to_planes(open_image(image, enough(options)), input_data_format, as_rgb)
        except UnreadableImageError:
            raise
        except ValueError as error:  # of values that have no colors
            name = "bytes" if isinstance(image, bytes) else os.fspath(image)
            raise UnreadableImageError(f"{name}: {error}") from error
    else:
        planes = _to_planes(image, input_data_format, as_rgb)
    if options["do_grayscale"]:
        planes = _to_gray(planes)
    return _pad(_preprocess(planes, options), options["pad_size"])


def _preprocess(planes: _Planes, options: Mapping[str, Any]) -> np.ndarray:
    arrays = [np.asarray(_resize_and_crop(plane, options)) for plane in planes.images]
    if planes.images[0].mode != "F":
        array = arrays[0] if arrays[0].ndim == 3 else np.stack(arrays, axis=-1)
        # 8 bits have 256 values: what becomes of each is computed once, exactly as transformers does.
        values = _to_floats(np.arange(256).repeat(array.shape[-1]).reshape(256, -1), 255, options)
        return _look_up(np.ascontiguousarray(values.T), array)
    return _to_floats(np.stack(arrays, axis=-1), planes.scale, options)


def _pad(array: np.ndarray, size: Mapping[str, int] | None) -> np.ndarray:
    """Add zeros, which are the mean of normalized values, at the bottom and on the right of an array (H, W, C)."""
    if size is None:
        return array
    rows, columns = size["height"] - array.shape[0], size["width"] - array.shape[1]
    if rows < 0 or columns < 0:
        got = f"{size['height']}x{size['width']} for {array.shape[0]}x{array.shape[1]} pixels"
        raise ValueError(f"pad_size must be no smaller than the resized image, got {got}.")
    if size["height"] * size["width"] > MAX_PIXELS:
        raise ValueError(f"pad_size must be at most {MAX_PIXELS} pixels, got {size['height']}x{size['width']}.")
    return np.pad(array, ((0, rows), (0, columns), (0, 0)))


class Axis(NamedTuple):
    """Where pixels of an image are among those that the network sees, along its height or its width."""

    image: int  # pixels of the image
    resized: int  # pixels of the resized image
    offset: int  # where the first of these is among what the network sees; below 0 where it is cropped away
    network: int  # pixels that the network sees


def place(width: int, height: int, options: Mapping[str, Any]) -> tuple[Axis, Axis]:
    """Where an image is in what the network sees of it, along height and width.

    Args:
        width: Of the image.
        height: Of the image.
        options: How it is preprocessed, as read_options gives them.
    """
    sizes = _target_size(width, height, options["size"]) if options["do_resize"] else (width, height)
    axes = []
    for name, image, resized in (("height", height, sizes[1]), ("width", width, sizes[0])):
        network = options["crop_size"][name] if options["do_center_crop"] else resized
        offset = -((resized - network) // 2)
        axes.append(Axis(image, resized, offset, (options["pad_size"] or {name: network})[name]))
    return tuple(axes)


def on_image(edges: np.ndarray, axes: tuple[Axis, Axis]) -> np.ndarray:
    """Boxes in pixels of an image, clipped to it.

    Args:
        edges: x0, y0, x1, y1 relative to what the network sees, of shape (n, 4).
        axes: Where the image is in that, as `place` gives it.
    """
    result = edges.astype(np.float64)
    down, across = axes
    for axis, along in ((across, result[:, 0::2]), (down, result[:, 1::2])):
        along[:] = np.clip((along * axis.network - axis.offset) * (axis.image / axis.resized), 0, axis.image)
    return result


def enough(options: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height from which an image can be reduced nearly as well as from its own: twice what is asked for."""
    if not (options["fast_decode"] and options["do_resize"]):
        return 0, 0
    edge = max(options["size"].values())
    return 2 * edge, 2 * edge


def _target_size(width: int, height: int, size: dict[str, int]) -> tuple[int, int]:
    """Width and height to resize to; the other edge is rounded down, as transformers and torchvision do."""
    if "height" in size:
        return size["width"], size["height"]
    ((name, edge),) = size.items()
    given = (min if name == "shortest_edge" else max)(width, height)
    return max(1, int(edge * width / given)), max(1, int(edge * height / given))


def _resize_and_crop(image: Image.Image, options: dict[str, Any]) -> Image.Image:
    """Resize and crop in one step: only the pixels that remain are computed."""
    if options["detail_size"] and options["do_resize"] and min(image.size) > options["detail_size"]:
        size = _target_size(*image.size, {"shortest_edge": options["detail_size"]})
        image = _resize(image, size, options["resample"])
    size = _target_size(*image.size, options["size"]) if options["do_resize"] else image.size
    if not options["do_center_crop"]:
        return _resize(image, size, options["resample"])
    width, height = options["crop_size"]["width"], options["crop_size"]["height"]
    _check_pixels("cropped", image, (width, height))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    box = (left, top, left + width, top + height)
    if size == image.size:
        return image.crop(box)
    if left < 0 or top < 0 or "height" in options["size"]:
        return _resize(image, size, options["resample"]).crop(box)
    return _resize_box(image, size, box, options["resample"])


def _check_pixels(verb: str, image: Image.Image, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(
            f"an image of {image.width}x{image.height} would be {verb} to {size[0]}x{size[1]}, which is over "
            f"{MAX_PIXELS} pixels."
        )


def _resize(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    _check_pixels("resized", image, size)
    return image.resize(size, resample)


def _resize_box(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], resample: int
) -> Image.Image:
    """Resize an image to a size of the same shape, and compute of it no more than a box.

    The result equals the resized image's, but for rare values next to a rounding boundary, which differ by one.
    """
    x, y = (_span(image.size[axis], size[axis], box[axis], box[axis + 2]) for axis in (0, 1))
    # Pillow resizes along one axis, rounds to 8 bits, and then resizes along the other. An image that keeps its shape
    # goes across first; a box may not since Pillow 13, which would change a quarter of the values by one.
    part = image.crop((x.first, y.first, x.last, y.last))
    part = part.resize((x.stop - x.start, part.height), resample, box=(x.begin, 0, x.end, part.height))
    part = part.resize((part.width, y.stop - y.start), resample, box=(0, y.begin, part.width, y.end))
    return part.crop((box[0] - x.start, box[1] - y.start, box[2] - x.start, box[3] - y.start))


class _Span(NamedTuple):
    """Pixels of a resized row, and where they come from."""

    start: int  # among the pixels of the resized row
    stop: int
    first: int  # among the pixels of the source
    last: int
    begin: float  # the same edges as start and stop, in the source from `first` on
    end: float


@lru_cache(maxsize=1024)  # photographs come in few sizes
def _span(length: int, resized: int, start: int, stop: int) -> _Span:
    """The pixels from start to stop of a resized row, and up to 32 more on either side.

    Pillow takes the edges of a box as floats of 32 bits. Where an edge is no such float, every pixel shifts a little,
    so the edges are moved out to where that error is least, which often is to none.
    """

    def edge(pixel: int) -> float:
        return pixel * length / resized

    def error(pixel: int) -> float:
        return abs(float(np.float32(edge(pixel))) - edge(pixel))

    start = min(range(start, max(start - 33, -1), -1), key=error)
    stop = min(range(stop, min(stop + 32, resized) + 1), key=error)
    margin = math.ceil(3 * max(length / resized, 1)) + 1  # no filter reaches further than 3 of the coarser pixels
    first, last = max(0, int(edge(start)) - margin), min(length, int(edge(stop)) + margin)
    return _Span(start, stop, first, last, edge(start) - first, edge(stop) - first)


def _to_floats(values: np.ndarray, scale: float, options: dict[str, Any]) -> np.ndarray:
    """Rescale and normalize values of 0 to 255, in the steps and precisions of transformers' own processor.

    Args:
        values: Of shape (..., C).
        scale: What 255 stood for in the image that came.
    """
    channels = values.shape[-1]
    factor = options["rescale_factor"] if options["do_rescale"] else scale / 255
    values = (values.astype(np.float64) * factor).astype(np.float32)
    if options["do_normalize"]:
        mean, std = (_for_channels(name, options[name], channels) for name in ("image_mean", "image_std"))
        values = (values - mean) / std
    return values


def _for_channels(name: str, values: list[float], channels: int) -> np.ndarray:
    if len(set(values)) == 1:  # one for all, however often it is written
        values = values[:1] * channels
    if len(values) != channels:
        raise ValueError(f"{name} must have one number, or one for each of {channels} channels, got {values}.")
    return np.array(values, np.float32)


def _look_up(table: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Replace each value of an image (H, W, C) of 8 bits by its entry in a table (C, 256)."""
    result = np.empty(image.shape, np.float32)
    if (table == table[0]).all():
        return table[0].take(image, out=result, mode="clip")
    offsets = np.arange(0, table.size, 256, dtype=np.uint16)
    return table.reshape(-1).take(image + offsets, out=result, mode="clip")


__all__ = [
    "FITS",
    "LATER_OPTIONS",
    "OPTIONS",
    "RANGES",
    "RECIPES",
    "SQUARE_FITS",
    "SUPPRESSION",
    "WHOLE_FITS",
    "Axis",
    "Recipe",
    "UnreadableImageError",
    "flatten",
    "is_url",
    "open_image",
    "place",
    "preprocess",
    "read_options",
    "regular",
]
