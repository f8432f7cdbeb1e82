"""Conversions of slim's checkpoints, written with slim's names from the weights of other layouts."""

import io
import re
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conversions import assert_fails_without_a_trace, assert_wrong_tables_are_noticed, read
from oracles import as_trained, logits, timm_model
from torch import Tensor, nn

from mobilenet.conversion import from_slim, from_tflite
from mobilenet.conversion.convert import build, convert
from mobilenet.conversion.graph import Conv


pytestmark = pytest.mark.any_version


# slim's names of what transformers' layout calls otherwise.
LAYERS = {
    r"mobilenet_v2\.conv_stem\.first_conv": "MobilenetV2/Conv",
    r"mobilenet_v2\.conv_stem\.conv_3x3": "MobilenetV2/expanded_conv/depthwise",
    r"mobilenet_v2\.conv_stem\.reduce_1x1": "MobilenetV2/expanded_conv/project",
    r"mobilenet_v2\.layer\.(\d+)\.expand_1x1": "MobilenetV2/expanded_conv_{}/expand",
    r"mobilenet_v2\.layer\.(\d+)\.conv_3x3": "MobilenetV2/expanded_conv_{}/depthwise",
    r"mobilenet_v2\.layer\.(\d+)\.reduce_1x1": "MobilenetV2/expanded_conv_{}/project",
    r"mobilenet_v2\.conv_1x1": "MobilenetV2/Conv_1",
    r"classifier": "MobilenetV2/Logits/Conv2d_1c_1x1",
}
PARTS = {
    "normalization.weight": "BatchNorm/gamma",
    "normalization.bias": "BatchNorm/beta",
    "normalization.running_mean": "BatchNorm/moving_mean",
    "normalization.running_var": "BatchNorm/moving_variance",
    "bias": "biases",
}


def slim_v2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of transformers' MobileNetV2, as slim stores them."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue
        layer, part = re.fullmatch(r"(.+?)\.(convolution\.weight|normalization\.\w+|weight|bias)", name).groups()
        pattern, found = next((p, m) for p in LAYERS if (m := re.fullmatch(p, layer)))
        slim = LAYERS[pattern].format(*(int(number) + 1 for number in found.groups()))
        if part in PARTS:
            result[f"{slim}/{PARTS[part]}"] = tensor
        elif slim.endswith("/depthwise"):
            result[f"{slim}/depthwise_weights"] = tensor.permute(2, 3, 0, 1)
        elif part == "weight":
            result[f"{slim}/weights"] = tensor.T[None, None]
        elif part == "convolution.weight":
            result[f"{slim}/weights"] = tensor.permute(2, 3, 1, 0)
    return result


def slim_v1(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The folded tensors of a TFLite file of MobileNetV1, as slim stores them: under norms that do nothing."""
    layers = [f"MobilenetV1/Conv2d_{n}_{kind}" for n in range(1, 14) for kind in ("depthwise", "pointwise")]
    layers = ["MobilenetV1/Conv2d_0", *layers, "MobilenetV1/Logits/Conv2d_1c_1x1"]
    weights, biases = ([t for name, t in tensors.items() if name.endswith(part)] for part in (".weight", ".bias"))
    result = {}
    for layer, filters, bias in zip(layers, weights, biases, strict=True):
        depthwise = layer.endswith("_depthwise")
        filters = filters[:, :, None, None] if filters.ndim == 2 else filters
        order = (2, 3, 0, 1) if depthwise else (2, 3, 1, 0)
        result[f"{layer}/{'depthwise_' if depthwise else ''}weights"] = filters.permute(*order)
        if layer.endswith("1x1"):
            result[f"{layer}/biases"] = bias
        else:
            result[f"{layer}/BatchNorm/beta"] = bias
            result[f"{layer}/BatchNorm/gamma"] = torch.full_like(bias, 1.001**0.5)  # epsilon is 0.001
            result[f"{layer}/BatchNorm/moving_mean"] = torch.zeros_like(bias)
            result[f"{layer}/BatchNorm/moving_variance"] = torch.ones_like(bias)
    return result


def slim_unit(name: str, conv: nn.Module, norm: nn.Module | None = None) -> dict[str, Tensor]:
    """A layer of PyTorch as slim stores it; a fully connected one is a convolution there."""
    weight = conv.weight.detach()
    weight = weight[:, :, None, None] if weight.ndim == 2 else weight
    depthwise = getattr(conv, "groups", 1) > 1
    kind, order = ("depthwise_weights", (2, 3, 0, 1)) if depthwise else ("weights", (2, 3, 1, 0))
    result = {f"{name}/{kind}": weight.permute(*order)}
    if norm is not None:
        tensors = norm.state_dict(prefix="normalization.")
        return result | {f"{name}/{PARTS[key]}": tensor for key, tensor in tensors.items() if key in PARTS}
    return result | {f"{name}/biases": conv.bias.detach()}


def slim_v3(theirs: nn.Module) -> dict[str, Tensor]:
    """The tensors of timm's MobileNetV3, as slim stores them."""
    result = slim_unit("MobilenetV3/Conv", theirs.conv_stem, theirs.bn1)
    *blocks, last = [block for stage in theirs.blocks for block in stage]
    for index, block in enumerate(blocks):
        scope = f"MobilenetV3/expanded_conv_{index}" if index else "MobilenetV3/expanded_conv"
        if index:
            result |= slim_unit(f"{scope}/expand", block.conv_pw, block.bn1)
            result |= slim_unit(f"{scope}/depthwise", block.conv_dw, block.bn2)
            result |= slim_unit(f"{scope}/project", block.conv_pwl, block.bn3)
        else:
            result |= slim_unit(f"{scope}/depthwise", block.conv_dw, block.bn1)
            result |= slim_unit(f"{scope}/project", block.conv_pw, block.bn2)
        if not isinstance(block.se, nn.Identity):
            result |= slim_unit(f"{scope}/squeeze_excite/Conv", block.se.conv_reduce)
            result |= slim_unit(f"{scope}/squeeze_excite/Conv_1", block.se.conv_expand)
    result |= slim_unit("MobilenetV3/Conv_1", last.conv, last.bn1)
    result |= slim_unit("MobilenetV3/Conv_2", theirs.conv_head)
    return result | slim_unit("MobilenetV3/Logits/Conv2d_1c_1x1", theirs.classifier)


def write(tensors: dict[str, Tensor], prefix: Path) -> Path:
    """Write a checkpoint with TensorFlow."""
    tensorflow = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    arrays = [tensorflow.constant(tensor.contiguous().numpy()) for tensor in tensors.values()]
    tensorflow.raw_ops.SaveV2(
        prefix=str(prefix), tensor_names=list(tensors), shape_and_slices=[""] * len(arrays), tensors=arrays
    )
    assert {path.name for path in prefix.parent.glob(f"{prefix.name}.*")} == {
        f"{prefix.name}.index",
        f"{prefix.name}.data-00000-of-00001",
    }
    return prefix


def trained(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint as training leaves it: weights of the last step, their averages, and what the optimizer keeps."""
    result = {"global_step": torch.tensor(5_000_000)}
    for name, tensor in tensors.items():
        if "moving_" in name:  # which is an average already
            result[name] = tensor
        else:
            result[name] = torch.randn_like(tensor.contiguous())
            result[f"{name}/ExponentialMovingAverage"] = tensor
            result[f"{name}/RMSProp"] = result[f"{name}/RMSProp_1"] = torch.ones_like(tensor.contiguous())
    return result


def pack(archive: Path, *files: Path) -> Path:
    """An archive as slim published them: paths begin with "./"."""
    with tarfile.open(archive, "w:gz") as members:
        for file in files:
            members.add(file, f"./{file.name}")
    return archive


@pytest.fixture
def read_as_is(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Tensors that stand for what TensorFlow would read from any checkpoint."""
    tensors: dict[str, Tensor] = {}
    monkeypatch.setattr(from_slim, "read_variables", lambda prefix, origin: tensors)
    return tensors


@pytest.fixture(scope="module")
def hub_layout(data: Path) -> Path:
    return data / "checkpoints" / "google_mobilenet_v2_1.0_224"


def test_real_weights_give_the_logits_of_the_hub_layout(
    hub_layout: Path, read_as_is: dict, photographs: list[Path], tmp_path: Path
) -> None:
    hub = read(hub_layout)
    read_as_is.update(slim_v2(hub.tensors))
    (tmp_path / "mobilenet_v2_1.0_224.ckpt.index").touch()
    checkpoint = read(tmp_path / "mobilenet_v2_1.0_224.ckpt")
    images = checkpoint.processor(photographs[::30], return_tensors="pt").pixel_values
    assert images.equal(hub.processor(photographs[::30], return_tensors="pt").pixel_values)
    assert logits(build(checkpoint, ""), images).equal(logits(build(hub, ""), images))
    assert_wrong_tables_are_noticed(checkpoint)


def test_every_wrong_row_of_v1_is_noticed(data: Path, read_as_is: dict, tmp_path: Path) -> None:
    tflite = read(data / "tflite" / "mobilenet_v1_0.25_224_1_default_1.tflite")
    read_as_is.update(slim_v1(tflite.tensors))
    (tmp_path / "mobilenet_v1_0.25_224.ckpt.index").touch()
    checkpoint = read(tmp_path / "mobilenet_v1_0.25_224.ckpt")
    assert (checkpoint.config["image_size"], checkpoint.config["width_multiplier"]) == (224, 0.25)
    images = torch.rand(1, 3, 224, 224) * 2 - 1
    torch.testing.assert_close(logits(build(checkpoint, ""), images), logits(build(tflite, ""), images))
    # All its norms do the same, so let each have something of its own.
    for name, tensor in read_as_is.items():
        if "BatchNorm" in name:
            read_as_is[name] = tensor + torch.rand_like(tensor)
    assert_wrong_tables_are_noticed(read(tmp_path / "mobilenet_v1_0.25_224.ckpt"))


@pytest.mark.parametrize(
    ("name", "architecture", "width"),
    [
        ("tf_mobilenetv3_large_075", "mobilenet_v3_large", 0.75),
        ("tf_mobilenetv3_small_100", "mobilenet_v3_small", 1.0),
        ("tf_mobilenetv3_large_minimal_100", "mobilenet_v3_large_minimalistic", 1.0),
        ("tf_mobilenetv3_small_minimal_100", "mobilenet_v3_small_minimalistic", 1.0),
    ],
)
def test_v3_gives_the_logits_of_timm(
    name: str, architecture: str, width: float, read_as_is: dict, tmp_path: Path
) -> None:
    images = torch.randn(1, 3, 97, 130)
    theirs = as_trained(timm_model(name, num_classes=11), images)
    read_as_is.update(slim_v3(theirs))
    (tmp_path / "model-540000.index").touch()
    checkpoint = read(tmp_path / "model-540000")
    assert (checkpoint.config["architecture"], checkpoint.config["width_multiplier"]) == (architecture, width)
    torch.testing.assert_close(logits(build(checkpoint, ""), images), logits(theirs, images), atol=1e-4, rtol=0)
    read_as_is.pop("MobilenetV3/Conv_2/biases")
    assert_fails_without_a_trace(
        tmp_path / "model-540000", tmp_path / "output", "1 missing: MobilenetV3/Conv_2/biases."
    )


def test_every_wrong_row_of_v3_is_noticed(read_as_is: dict, tmp_path: Path) -> None:
    read_as_is.update(slim_v3(timm_model("tf_mobilenetv3_small_075", num_classes=3)))
    (tmp_path / "model-540000.index").touch()
    assert_wrong_tables_are_noticed(read(tmp_path / "model-540000"))


def test_edgetpu_has_the_names_that_its_tflite_file_tells(data: Path, read_as_is: dict, tmp_path: Path) -> None:
    path = data / "tflite" / "mobilenet_edgetpu_224_1.0_uint8.tflite"
    for op in from_tflite.File(path.read_bytes(), path).graph.ops:
        scope = re.search(r"\((MobilenetEdgeTPU/.+?)/(Relu|add_fold|BiasAdd)", op.name)
        if not isinstance(op, Conv):
            continue
        (read_as_is[f"{scope[1]}/weights"], read_as_is[f"{scope[1]}/biases"]) = op.weight.permute(2, 3, 1, 0), op.bias
        if op.groups > 1:
            read_as_is[f"{scope[1]}/depthwise_weights"] = read_as_is.pop(f"{scope[1]}/weights").permute(0, 1, 3, 2)
        if not scope[1].endswith("1x1"):
            bias = read_as_is.pop(f"{scope[1]}/biases")
            values = bias, torch.full_like(bias, 1.001**0.5), torch.zeros_like(bias), torch.ones_like(bias)
            parts = ("beta", "gamma", "moving_mean", "moving_variance")
            read_as_is |= {f"{scope[1]}/BatchNorm/{part}": v for part, v in zip(parts, values, strict=True)}
    (tmp_path / "model.ckpt.index").touch()
    images = torch.rand(1, 3, 96, 96) * 2 - 1
    ours = logits(build(read(tmp_path / "model.ckpt"), ""), images)
    torch.testing.assert_close(ours, logits(build(read(path), ""), images), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("suffix", ["", ".index", ".data-00000-of-00001"])
def test_a_written_checkpoint_is_read(hub_layout: Path, suffix: str, tmp_path: Path) -> None:
    hub = read(hub_layout)
    write(trained(slim_v2(hub.tensors)), tmp_path / "model.ckpt-5000000")
    checkpoint = read(tmp_path / f"model.ckpt-5000000{suffix}")
    ours, expected = build(checkpoint, "").state_dict(), build(hub, "").state_dict()
    assert all(ours[name].equal(expected[name]) for name in expected if not name.endswith("num_batches_tracked"))
    assert [path.name for path in checkpoint.files] == [
        "model.ckpt-5000000.index",
        "model.ckpt-5000000.data-00000-of-00001",
    ]


def test_an_archive_is_compared_with_its_tflite_file(data: Path, tmp_path: Path) -> None:
    tflite = data / "tflite" / "mobilenet_v1_0.25_224_1_default_1.tflite"
    prefix = write(slim_v1(read(tflite).tensors), tmp_path / "mobilenet_v1_0.25_224.ckpt")
    files = [prefix.with_name(f"{prefix.name}.{suffix}") for suffix in ("index", "data-00000-of-00001")]
    archive = pack(tmp_path / "mobilenet_v1_0.25_224.tgz", *files, tflite)
    for file in files:
        file.unlink()
    theirs, _ = convert(str(archive), tmp_path / "output", drop_background=True)
    assert theirs.against.startswith("the archive's TFLite file in LiteRT ")
    assert theirs.largest < 1e-4
    assert theirs.agreement == 1


def test_of_an_archive_of_v3_the_averages_are_read(tmp_path: Path) -> None:
    """The published v3-large_224_1.0_float.tgz has the folders ema and pristine."""
    theirs = timm_model("tf_mobilenetv3_small_minimal_100", num_classes=3)
    root = tmp_path / "v3-small-minimalistic_224_1.0_float"
    (root / "ema").mkdir(parents=True)
    (root / "pristine").mkdir()
    averages = slim_v3(theirs)
    write(averages, root / "ema" / "model-498000")
    write({name: tensor + 1 for name, tensor in averages.items()}, root / "pristine" / "model.ckpt-498000")
    with tarfile.open(tmp_path / f"{root.name}.tgz", "w:gz") as members:
        members.add(root, root.name)
    tensors = read(tmp_path / f"{root.name}.tgz").tensors
    assert tensors.keys() == averages.keys()
    assert all(tensors[name].equal(averages[name]) for name in averages)


def test_broken_checkpoints_are_refused(tmp_path: Path) -> None:
    write({"MobilenetV1/Conv2d_0/weights": torch.ones(3, 3, 3, 8)}, tmp_path / "model.ckpt")
    assert_fails_without_a_trace(
        tmp_path / "model.ckpt", tmp_path / "output", "model.ckpt: holds no MobileNet of slim"
    )
    data = tmp_path / "model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:100])
    assert_fails_without_a_trace(tmp_path / "model.ckpt", tmp_path / "output", "model.ckpt: truncated or corrupt")
    (tmp_path / "model.ckpt.index").write_bytes(b"no index")
    assert_fails_without_a_trace(tmp_path / "model.ckpt", tmp_path / "output", "model.ckpt: truncated or corrupt")


def test_a_checkpoint_trained_for_8_bits_is_refused(read_as_is: dict, tmp_path: Path) -> None:
    read_as_is["MobilenetV1/MobilenetV1/Conv2d_0/act_quant/MobilenetV1/MobilenetV1/Conv2d_0/min"] = torch.zeros(())
    (tmp_path / "model.ckpt.index").touch()
    assert_fails_without_a_trace(tmp_path / "model.ckpt", tmp_path / "output", "convert the .tflite file")


def test_archives_that_climb_out_are_refused(tmp_path: Path) -> None:
    for name in ("../outside.index", "/tmp/outside.index", "a/../../outside.index"):
        with tarfile.open(tmp_path / "model.tgz", "w:gz") as members:
            members.addfile(tarfile.TarInfo(name), io.BytesIO())
        assert_fails_without_a_trace(
            tmp_path / "model.tgz", tmp_path / "output", "model.tgz: holds a path that leaves its folder", name
        )
    with tarfile.open(tmp_path / "model.tgz", "w:gz") as members:
        link = tarfile.TarInfo("model.ckpt.index")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        members.addfile(link)
    assert_fails_without_a_trace(tmp_path / "model.tgz", tmp_path / "output", "leaves its folder: model.ckpt.index")


def test_archives_of_absurd_size_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "model.tgz", "w:gz") as members:
        huge = tarfile.TarInfo("model.ckpt.index")
        huge.size = 1 << 42
        members.fileobj.write(huge.tobuf())
    assert_fails_without_a_trace(tmp_path / "model.tgz", tmp_path / "output", "unpacks to more than 2147483648 bytes")


def test_broken_archives_are_refused(tmp_path: Path) -> None:
    (tmp_path / "some.data-00000-of-00001").write_bytes(torch.randn(10_000).numpy().tobytes())
    whole = pack(tmp_path / "model.tgz", tmp_path / "some.data-00000-of-00001").read_bytes()
    for part in (whole[: len(whole) // 2], b"no archive", b""):
        (tmp_path / "model.tgz").write_bytes(part)
        assert_fails_without_a_trace(tmp_path / "model.tgz", tmp_path / "output", "model.tgz: truncated or corrupt")
    (tmp_path / "model.tgz").write_bytes(whole)
    assert_fails_without_a_trace(
        tmp_path / "model.tgz", tmp_path / "output", "must hold one checkpoint (.index), got 0"
    )


def test_without_tensorflow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow.train", None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    (tmp_path / "model.ckpt.index").touch()
    with pytest.raises(ImportError, match=r'clone of this project, pip install -c constraints\.txt -e "\.\[slim\]"$'):
        convert(str(tmp_path / "model.ckpt"), tmp_path / "output")
