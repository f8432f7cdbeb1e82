"""TensorFlow slim's checkpoints: a prefix such as mobilenet_v1_1.0_224.ckpt, or the archive that it comes in.

So are those of TensorFlow's object detection API, whose networks are built with slim.
"""

from __future__ import annotations

import gzip
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mobilenet.configuration_mobilenet import PRESETS
from mobilenet.heads_mobilenet import DETECTORS
from mobilenet.pickles import MAX_BYTES
from mobilenet.progress import open_file, track
from mobilenet.require import require

from .checkpoint import Checkpoint, DetectionOracle, NoOracleError, Options, Oracle, Origin, first_line
from .from_tflite import twin
from .rename import Convention, ConversionError, Part, Row, Table, closest, infer_config


SLIM = Convention(
    conv={"weight": Part("/weights", "HWIO"), "bias": Part("/biases", "O")},
    depthwise={"weight": Part("/depthwise_weights", "HWOI")},
    norm={
        "weight": Part("/gamma", "O"),
        "bias": Part("/beta", "O"),
        "running_mean": Part("/moving_mean", "O"),
        "running_var": Part("/moving_variance", "O"),
    },
    # The classifier is a 1x1 convolution.
    linear={"weight": Part("/weights", "HWIO"), "bias": Part("/biases", "O")},
)

# What training leaves beside the network.
_DROPPED = (r"global_step", r".+/(RMSProp|RMSProp_1|Momentum|Adam|Adam_1)", r"beta[12]_power")
_AVERAGE = "/ExponentialMovingAverage"


def _unit(name: str) -> Row:
    return Row(name, f"{name}/BatchNorm")


def _bottlenecks(architecture: str, scope: str) -> Table:
    """Names of slim/nets/mobilenet: mobilenet_v2.py and mobilenet_v3.py."""
    block, squeeze = f"{scope}/expanded_conv_{{index}}", "squeeze_excite"
    rows = {
        "stem": _unit(f"{scope}/Conv"),
        "block.expand": _unit(f"{block}/expand"),
        "head": _unit(f"{scope}/Conv_1"),
        "pre_logits": Row(f"{scope}/Conv_2"),
        "classifier": Row(f"{scope}/Logits/Conv2d_1c_1x1"),
    }
    for owner, name in (("first", f"{scope}/expanded_conv"), ("block", block)):
        rows |= {f"{owner}.{role}": _unit(f"{name}/{role}") for role in ("depthwise", "project")}
        rows[f"{owner}.squeeze.reduce"] = Row(f"{name}/{squeeze}/Conv")
        rows[f"{owner}.squeeze.expand"] = Row(f"{name}/{squeeze}/Conv_1")
    return Table({"architecture": architecture}, rows, SLIM, _DROPPED)


# slim/nets/mobilenet_v1.py
TABLES = (
    Table(
        {"architecture": "mobilenet_v1"},
        {
            "stem": _unit("MobilenetV1/Conv2d_0"),
            "block.depthwise": _unit("MobilenetV1/Conv2d_{from_1}_depthwise"),
            "block.pointwise": _unit("MobilenetV1/Conv2d_{from_1}_pointwise"),
            "classifier": Row("MobilenetV1/Logits/Conv2d_1c_1x1"),
        },
        SLIM,
        _DROPPED,
    ),
    _bottlenecks("mobilenet_v2", "MobilenetV2"),
    *(
        _bottlenecks(f"mobilenet_v3_{size}{kind}", "MobilenetV3")
        for size in ("large", "small")
        for kind in ("", "_minimalistic")
    ),
    _bottlenecks("mobilenet_edgetpu", "MobilenetEdgeTPU"),
)


def _detector(name: str) -> Table:
    """Names of a detector of TensorFlow's object detection API, as `without_sizes` leaves them.

    Source: object_detection/models/feature_map_generators.py; object_detection/predictors/heads
    """
    detector = DETECTORS[name]
    architecture = detector.architecture.removesuffix("_reduced_tail")
    plain = next(table for table in TABLES if table.config["architecture"] == architecture).rows
    rows = {
        key: Row(*(each and f"FeatureExtractor/{each}" for each in row[:2]))
        for key, row in plain.items()
        if key not in ("pre_logits", "classifier")
    }
    scope, base = plain["stem"].conv.partition("/")[0], LAST_LAYERS[architecture]
    for index in range(len(detector.extra_channels)):
        layer = f"FeatureExtractor/{scope}/{base}"
        filters = f"{layer}_2_Conv2d_{index + 2}_3x3_s2"
        rows[f"extras.{index}.reduce"] = _unit(f"{layer}_1_Conv2d_{index + 2}_1x1")
        rows[f"extras.{index}.depthwise"] = _unit(f"{filters}_depthwise")
        rows[f"extras.{index}.expand"] = _unit(filters)
    for ours, theirs in (("box", "BoxEncodingPredictor"), ("class", "ClassPredictor")):
        for index in range(len(detector.endpoints) + len(detector.extra_channels)):
            predictor = f"BoxPredictor_{index}/{theirs}"
            rows[f"{ours}_predictors.{index}"] = Row(predictor)
            rows[f"{ours}_predictors.{index}.depthwise"] = _unit(f"{predictor}_depthwise")
    return Table(PRESETS[name], rows, SLIM, _DROPPED)


# What the extra layers of a detector are called after: the last layer of the backbone.
LAST_LAYERS = {
    "mobilenet_v1": "Conv2d_13_pointwise",
    "mobilenet_v2": "layer_19",
    "mobilenet_v3_large": "layer_17",
    "mobilenet_v3_small": "layer_13",
}
DETECTOR_TABLES = tuple(_detector(name) for name in DETECTORS if not name.startswith("ssdlite320_"))


def without_sizes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave channels out of the names of extra layers, and let boxes be predicted in our order: x, y, w, h."""
    result = {}
    for name, tensor in tensors.items():
        predicts = re.fullmatch(r"BoxPredictor_\d+/BoxEncodingPredictor/(weights|biases)", name)
        if predicts and tensor.ndim and tensor.shape[-1] % 4 == 0:
            tensor = tensor.unflatten(-1, (-1, 4))[..., [1, 0, 3, 2]].flatten(-2)
        result[re.sub(r"(_\d_Conv2d_\d_(1x1|3x3_s2))_\d+(_depthwise)?/", r"\1\3/", name)] = tensor
    return result


def detect(origin: Origin) -> bool:
    """Whether a path is an archive, or a checkpoint's prefix or one of its files."""
    return _is_archive(origin.path) or _index(_prefix(origin.path)).is_file()


def _is_archive(path: Path) -> bool:
    return path.name.endswith((".tgz", ".tar.gz"))


def _prefix(path: Path) -> Path:
    return path.with_name(re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", path.name))


def _index(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.index")


def read(origin: Origin, options: Options) -> Checkpoint:
    """Read a checkpoint of slim.

    Raises:
        ConversionError: The files are broken, or hold another network.
        ImportError: TensorFlow is not installed.
    """
    if _is_archive(origin.path):
        with unpacked(origin.path) as folder:
            prefixes = sorted(_prefix(path) for path in folder.rglob("*.index"))
            # V3's archives hold averages over training, in the folder ema, beside what they are averages of.
            prefixes = [prefix for prefix in prefixes if prefix.parent.name == "ema"] or prefixes
            if len(prefixes) != 1:
                raise ConversionError(f"{origin.path}: must hold one checkpoint (.index), got {len(prefixes)}.")
            tensors = read_variables(prefixes[0], origin.path)
            twins = [path.read_bytes() for path in folder.rglob("*.tflite")]
        name, files = origin.path.name, [origin.path]
    else:
        prefix = _prefix(origin.path)
        tensors, twins = read_variables(prefix, prefix), []
        name, files = prefix.name, [_index(prefix), *sorted(prefix.parent.glob(f"{prefix.name}.data-*"))]
    if any("/act_quant/" in tensor for tensor in tensors):
        raise ConversionError(f"{origin.path}: was trained for 8 bits: convert the .tflite file that comes with it.")
    if any(name.startswith("BoxPredictor_") for name in tensors):
        return _read_detector(without_sizes(tensors), files, options, origin)
    table, share = closest(tensors, TABLES)
    if share < 0.5:
        raise ConversionError(f"{origin.path}: holds no MobileNet of slim.")
    size = re.search(r"_(\d{2,3})(_\d+)?\.(?:ckpt|tgz|tar)", name)  # mobilenet_v2_1.0_224.tgz
    image_size = int(size[1]) if size else None

    def oracle() -> Oracle:
        if not twins:
            raise NoOracleError("slim runs on TensorFlow 1 alone, and there is no TFLite file beside the checkpoint")
        return twin(twins[0], origin.path, "the archive's TFLite file in LiteRT", options.size(image_size))

    return Checkpoint(
        kind="a TensorFlow slim checkpoint",
        tensors=tensors,
        table=table,
        config=infer_config(tensors, table) | {"image_size": options.size(image_size)},
        processor=options.processor("google", image_size),
        files=files,
        oracle=oracle,
    )


def _read_detector(tensors: dict[str, Tensor], files: list[Path], options: Options, origin: Origin) -> Checkpoint:
    table, share = closest(tensors, DETECTOR_TABLES)
    if share < 0.5:
        raise ConversionError(f"{origin.path}: holds no SSD of a MobileNet.")
    config = infer_config(tensors, table)

    def oracle() -> DetectionOracle:
        raise NoOracleError("TensorFlow's object detection API runs on TensorFlow 1 alone")

    return Checkpoint(
        kind="a checkpoint of TensorFlow's object detection API",
        tensors=tensors,
        table=table,
        config=config | {"image_size": options.size(config["image_size"])},
        processor=options.processor(
            "ssd", config["image_size"], **DETECTORS[config["detector"]].suppression._asdict()
        ),
        files=files,
        oracle=oracle,
    )


def read_variables(prefix: Path, origin: Path) -> dict[str, Tensor]:
    """Every variable of a checkpoint; its moving average, where training kept one."""
    load_checkpoint = require("tensorflow", extra="slim", purpose="a TensorFlow checkpoint").train.load_checkpoint
    try:
        reader = load_checkpoint(str(prefix))
        names = [name for name in reader.get_variable_to_shape_map() if not name.endswith(_AVERAGE)]
        averaged = reader.has_tensor
        return {
            name: torch.as_tensor(reader.get_tensor(name + _AVERAGE if averaged(name + _AVERAGE) else name))
            for name in track(sorted(names), f"reading {origin.name}")
        }
    except Exception as error:  # TensorFlow has a class for each cause, and raises some of Python's too
        raise ConversionError(f"{origin}: truncated or corrupt: {first_line(error)}") from error


class _Bounded:
    """A stream of no more than MAX_BYTES: what tarfile reads of long names, it holds in memory."""

    def __init__(self, stream: BinaryIO, archive: Path) -> None:
        self.stream, self.archive, self.left = stream, archive, MAX_BYTES

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ConversionError(f"{self.archive}: unpacks to more than {MAX_BYTES} bytes.")
        return data


@contextmanager
def unpacked(archive: Path) -> Iterator[Path]:
    """Unpack the checkpoint and the TFLite file of an archive into a temporary folder.

    Raises:
        ConversionError: The archive is broken, too large, or holds paths that leave its folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            with (
                open_file(archive) as file,
                gzip.GzipFile(fileobj=file) as stream,
                tarfile.open(fileobj=_Bounded(stream, archive), mode="r|") as members,
            ):
                left = MAX_BYTES
                for member in members:
                    path = Path(member.name)
                    if path.is_absolute() or ".." in path.parts or member.issym() or member.islnk():
                        raise ConversionError(f"{archive}: holds a path that leaves its folder: {member.name}")
                    left -= member.size
                    if left < 0:
                        raise ConversionError(f"{archive}: unpacks to more than {MAX_BYTES} bytes.")
                    if member.isfile() and re.search(r"\.(index|data-\d+-of-\d+|tflite)$", path.name):
                        unpacked_to = Path(folder, path)
                        unpacked_to.parent.mkdir(parents=True, exist_ok=True)
                        with unpacked_to.open("wb") as target:
                            shutil.copyfileobj(members.extractfile(member), target)
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise ConversionError(f"{archive}: truncated or corrupt: {error}") from error
        yield Path(folder)
