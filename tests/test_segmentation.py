"""Segmenters: the heads against transformers' own class and hand arithmetic, and label maps that lie over images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mobilenet.postprocessing_mobilenet import label_map
from mobilenet.preprocessing_mobilenet import FITS, WHOLE_FITS, place, read_options
from mobilenet.segmentation_mobilenet import resize, segmentation_loss
from oracles import FAMILY, native_segmenter, randomize_norms, segmenter_like
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForSemanticSegmentation, pipeline

from mobilenet import (
    SEGMENTATION_HEADS,
    MobileNetBackbone,
    MobileNetConfig,
    MobileNetForImageClassification,
    MobileNetForSemanticSegmentation,
    MobileNetImageProcessor,
    postprocessing_mobilenet,
)
from mobilenet.segmentation_labels import VOC, color, palette


ROOT = Path(__file__).parents[1]


def small(head: str = "deeplab_v3_light", **fields: object) -> MobileNetForSemanticSegmentation:
    """A small segmenter whose batch norms differ, ready for inference."""
    fields = {"width_multiplier": 0.35, "output_stride": 16, "num_labels": 5, "segmentation_head": head, **fields}
    return randomize_norms(MobileNetForSemanticSegmentation(MobileNetConfig(**fields))).eval()


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).logits


# Against transformers' own


@pytest.mark.any_version
@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize(("width", "padding"), [(1.0, "same"), (0.35, "symmetric")])
def test_logits_equal_transformers(output_stride: int, width: float, padding: str) -> None:
    config = MobileNetConfig(
        width_multiplier=width,
        output_stride=output_stride,
        padding=padding,
        segmentation_head="deeplab_v3_light",
        num_labels=21,
    )
    theirs = native_segmenter(config)
    ours = segmenter_like(theirs, config)
    for size in ((97, 130), (161, 95), (64, 33)):
        images = torch.randn(2, 3, *size)
        expected = logits(theirs, images)
        assert expected.std() > 0.5
        torch.testing.assert_close(logits(ours, images), expected, atol=1e-4, rtol=0)
    ours, theirs, images = ours.double(), theirs.double(), images.double()
    expected = logits(theirs, images)
    for network in (ours, ours.fuse()):  # no difference can pass for rounding
        torch.testing.assert_close(logits(network, images), expected, atol=1e-9, rtol=0)


@pytest.mark.any_version  # transformers 4 has no such formula
def test_the_loss_is_transformers_own_where_edges_stay_in_place() -> None:
    config = MobileNetConfig(segmentation_head="lraspp", num_labels=21)
    scores, labels = torch.randn(2, 21, 5, 7), torch.randint(0, 21, (2, 33, 50))
    labels[:, :10] = 255
    theirs = native_segmenter(
        MobileNetConfig(width_multiplier=0.35, num_labels=21, segmentation_head="deeplab_v3_light")
    )
    upsampled = F.interpolate(scores, size=(33, 50), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(upsampled, labels, ignore_index=theirs.config.semantic_loss_ignore_index)
    torch.testing.assert_close(segmentation_loss(scores, labels, config), expected)
    # And through a network: LR-ASPP's logits, by transformers' own formula.
    model = small("lraspp", num_labels=21)
    images = torch.randn(2, 3, 65, 70)
    labels = torch.randint(0, 21, (2, 65, 70))
    output = model(images, labels=labels)
    torch.testing.assert_close(output.loss, model.loss_function(output.logits, labels))


def test_the_loss_by_hand() -> None:
    """Two pixels in a row become three: with corners in place, the one between is their mean."""
    config = MobileNetConfig(segmentation_head="deeplab_v3_light", num_labels=2)
    scores = torch.tensor([[[[0.0, 4.0]], [[0.0, 0.0]]]])
    labels = torch.tensor([[[1, 0, 255]]])
    expected = (np.log(2) + np.log(1 + np.exp(-2.0))) / 2
    assert segmentation_loss(scores, labels, config).item() == pytest.approx(expected, rel=1e-6)
    assert segmentation_loss(scores, torch.full((1, 1, 3), 255), config).item() == 0
    config.semantic_loss_ignore_index = 1
    expected = np.log(1 + np.exp(-2.0))
    assert segmentation_loss(scores, torch.tensor([[[1, 0, 1]]]), config).item() == pytest.approx(expected, rel=1e-6)


# Every head on every kind of backbone


@pytest.mark.parametrize("head", SEGMENTATION_HEADS)
@pytest.mark.parametrize("architecture", FAMILY)
@pytest.mark.parametrize("output_stride", [8, 32])
def test_every_head_goes_with_every_backbone(head: str, architecture: str, output_stride: int) -> None:
    model = small(head, architecture=architecture, output_stride=output_stride, width_multiplier=0.5)
    stride = 8 if head == "lraspp" else output_stride
    images = torch.randn(2, 3, 97, 130)
    scores = logits(model, images)
    assert scores.shape == (2, 5, -(-97 // stride), -(-130 // stride))
    assert scores.isfinite().all()
    with torch.no_grad():
        states = model(images, output_hidden_states=True).hidden_states
        assert model(images).hidden_states is None
        assert len(model(images, return_dict=False)) == 1
    assert len(states) == model.config.num_hidden_layers + 1
    if architecture != "mobilenet_v4_hybrid_medium":  # whose layer scales start near 0
        fused = logits(model.fuse(), images)
        torch.testing.assert_close(fused, scores, atol=2e-5 * max(1, scores.abs().max().item()), rtol=0)


@pytest.mark.parametrize("head", SEGMENTATION_HEADS)
@pytest.mark.parametrize("use_batch_norm", [True, False])
def test_fresh_logits_have_a_sound_scale(head: str, use_batch_norm: bool) -> None:
    config = MobileNetConfig(segmentation_head=head, output_stride=16, num_labels=21, use_batch_norm=use_batch_norm)
    model = MobileNetForSemanticSegmentation(config).train()
    with torch.no_grad():
        scores = model(torch.randn(4, 3, 64, 64)).logits
    assert 0.1 < scores.std() < 5


@pytest.mark.parametrize("head", SEGMENTATION_HEADS)
def test_the_dropout_is_the_heads_unless_said(head: str) -> None:
    assert small(head).segmentation_head.dropout.p == SEGMENTATION_HEADS[head].dropout
    assert small(head, classifier_dropout=0.3).segmentation_head.dropout.p == 0.3
    assert MobileNetConfig().classifier_dropout == 0.2


def test_atrous_branches_by_hand() -> None:
    """A pixel alone reaches as far as the rates say."""
    config = MobileNetConfig(
        width_multiplier=0.35, segmentation_head="deeplab_v3", use_batch_norm=False, num_labels=2, output_stride=16
    )
    head = MobileNetForSemanticSegmentation(config).eval().segmentation_head
    x = torch.zeros(1, 1280, 80, 80)
    reached = []
    for branch in head.branches[1:4]:
        nn.init.ones_(branch.conv.weight)
        x[0, 0, 40, 40] = 1
        with torch.no_grad():
            places = branch(x)[0, 0].nonzero() - 40
        reached.append(sorted(set(places.flatten().tolist())))
    assert reached == [[-12, 0, 12], [-24, 0, 24], [-36, 0, 36]]
    assert head.refine.conv.kernel_size == (3, 3)


def test_a_stride_becomes_dilation_in_its_own_convolution_or_in_the_next() -> None:
    fields = {"architecture": "mobilenet_v3_large", "output_stride": 16}
    late = MobileNetConfig(**fields).stages[-1]
    early = MobileNetConfig(**fields, dilates_strided=True).stages[-1]
    assert [block.dilation for block in late] == [1, 2, 2]
    assert [block.dilation for block in early] == [2, 2, 2]  # torchvision/models/mobilenetv3.py
    early = MobileNetConfig(output_stride=8, dilates_strided=True).stages
    assert [[block.dilation for block in stage] for stage in early[3:]] == [[2] * 7, [4] * 4]
    assert {block.stride for stage in early[3:] for block in stage} == {1}


# What people do with networks


SLOW_HEADS = [pytest.param(head, marks=pytest.mark.slow) for head in ("deeplab_v3_light", "deeplab_v3")]


@pytest.mark.parametrize("head", ["lraspp", *SLOW_HEADS])
def test_exports_with_dynamic_batch_height_and_width(head: str) -> None:
    model = small(head)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    for shape in ((1, 3, 64, 64), (3, 3, 97, 130)):
        images = torch.randn(shape)
        torch.testing.assert_close(program.module()(images).logits, logits(model, images), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["lraspp"])
def test_compiles_whole(head: str) -> None:
    """Without a break in the graph, for images of any size and number, in inference and with a loss."""
    model = small(head)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for shape in ((2, 3, 64, 96), (3, 3, 97, 130)):
        images = torch.randn(shape)
        torch.testing.assert_close(logits(compiled, images), logits(model, images), atol=1e-4, rtol=0)
    labels = torch.randint(0, 5, (3, 97, 130))
    loss = compiled.train()(images, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert model.segmentation_head.classifier.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("head", SEGMENTATION_HEADS)
def test_half_precision_runs_and_agrees(head: str, tmp_path: Path) -> None:
    model = small(head)
    model.save_pretrained(tmp_path)
    half = MobileNetForSemanticSegmentation.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    images = torch.randn(2, 3, 64, 64)
    expected, scores = logits(model, images), logits(half, images)
    assert scores.dtype == torch.bfloat16
    assert (scores.float() - expected).abs().max() < 0.12 * expected.abs().max()
    labels = torch.randint(0, 5, (2, 64, 64))
    assert half(images, labels=labels).loss.dtype == torch.float32


@pytest.mark.parametrize("head", SEGMENTATION_HEADS)
def test_gradient_checkpointing_changes_no_gradient(head: str) -> None:
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64))
    gradients = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        model = small(head, classifier_dropout=0.0)
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(images, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_memory_format_of_the_input_does_not_matter() -> None:
    images = torch.randn(2, 3, 97, 64)
    for head in SEGMENTATION_HEADS:
        model = small(head)
        assert torch.equal(logits(model, images), logits(model, images.to(memory_format=torch.channels_last)))


@pytest.mark.any_version
@pytest.mark.parametrize("head", SEGMENTATION_HEADS)
def test_a_classifier_becomes_a_segmenter(head: str, tmp_path: Path) -> None:
    config = MobileNetConfig("mobilenet_v3_large", 0.75, num_labels=7)
    classifier = randomize_norms(MobileNetForImageClassification(config))
    classifier.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"segmentation_head must be .* for a segmenter, got None"):
        MobileNetForSemanticSegmentation.from_pretrained(tmp_path)
    segmenter = AutoModelForSemanticSegmentation.from_pretrained(
        tmp_path, segmentation_head=head, output_stride=16, num_labels=3
    )
    assert isinstance(segmenter, MobileNetForSemanticSegmentation)
    states = classifier.backbone.state_dict()
    ours = segmenter.backbone.state_dict()
    assert any(name.startswith("head.") for name in ours) == SEGMENTATION_HEADS[head].takes_head
    assert not any(name.startswith("pre_logits.") for name in ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, states[name]), name
    assert logits(segmenter.eval(), torch.randn(1, 3, 64, 64)).shape[1] == 3


def test_a_backbone_loads_from_a_segmenter(tmp_path: Path) -> None:
    model = small("lraspp")
    model.save_pretrained(tmp_path)
    backbone, report = MobileNetBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(backbone.state_dict()["backbone.stem.conv.weight"], model.backbone.stem.conv.weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segmentation_head": None}, "segmentation_head must be deeplab_v3_light, deeplab_v3 or lraspp for a"),
        ({"segmentation_head": "unet"}, "segmentation_head must be deeplab_v3_light, .*, or None, got 'unet'"),
        ({"segmentation_head": "lraspp", "num_labels": 0}, "num_labels must be at least 1 for a segmenter, got 0"),
        (
            {"semantic_loss_ignore_index": "none"},
            "semantic_loss_ignore_index must be an integer of 64 bits, got 'none'",
        ),
        ({"semantic_loss_ignore_index": 1 << 63}, "semantic_loss_ignore_index must be an integer of 64 bits, got 922"),
        ({"dilates_strided": 1}, "dilates_strided must be true or false, got 1"),
    ],
)
def test_configurations_that_make_no_segmenter_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MobileNetForSemanticSegmentation(MobileNetConfig(**{"width_multiplier": 0.35, **fields}))


def test_bad_batches_are_named() -> None:
    model = small()
    images = torch.randn(2, 3, 64, 64)
    with pytest.raises(ValueError, match=r"pixel_values must have shape \(B, 3, H, W\), got \(2, 1, 64, 64\)"):
        model(images[:, :1])
    with pytest.raises(ValueError, match=r"labels must have shape \(2, H, W\), got \(2, 1, 64, 64\)"):
        model(images, labels=torch.zeros(2, 1, 64, 64))
    with pytest.raises(ValueError, match="pixel_values must hold at least 2 images in training mode"):
        model.train()(images[:1])
    assert model(images).logits.shape == (2, 5, 4, 4)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.eval()
    assert model(images[:1]).logits.shape == (1, 5, 4, 4)
    assert logits(small("lraspp").train(), images[:1]).shape == (1, 5, 8, 8)
    with pytest.raises(ValueError, match="num_labels must be at least 2 for a loss, got 1"):
        small(num_labels=1)(images, labels=torch.zeros(2, 64, 64))


def test_later_fields_are_saved_where_they_say_something() -> None:
    later = {"segmentation_head", "semantic_loss_ignore_index", "dilates_strided"}
    assert not later & MobileNetConfig().to_dict().keys()
    config = MobileNetConfig.from_preset("lraspp_mobilenet_v3_large_520")
    assert {"segmentation_head": "lraspp", "dilates_strided": True}.items() <= config.to_dict().items()
    assert MobileNetConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


# Label maps


def test_a_label_map_of_a_stretched_image_is_the_resized_logits_largest() -> None:
    scores = torch.randn(21, 33, 33)
    for aligned in (False, True):
        options = read_options({**FITS["stretch"](257, 0), "align_corners": aligned})
        # As large as what the network saw, TensorFlow's and torch's resizing are the reference; smaller, torch's.
        for size in ((257, 257), *([] if aligned else [(100, 333)])):
            expected = resize(scores[None], size, aligned)[0]
            found = label_map(scores, place(*size[::-1], options), aligned)
            top = expected.topk(2, 0).values
            differs = found != expected.argmax(0)
            assert not (differs & (top[0] - top[1] > 1e-4)).any()
            assert differs.float().mean() < 1e-3


def test_a_label_map_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, options = torch.randn(7, 9, 12), read_options(FITS["corner"](97, 0))
    axes = place(130, 101, options)
    whole = label_map(scores, axes)
    assert (whole.dtype, whole.shape) == (torch.int64, (101, 130))
    for most in (70, 7 * 130 * 3):  # logits: of ten pixels of a row, and of three rows
        monkeypatch.setattr(postprocessing_mobilenet, "MAX_LOGITS", most)
        assert torch.equal(label_map(scores, axes), whole)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("width", "height"), [(200, 131), (90, 161), (640, 480)])
def test_label_maps_lie_over_the_image(fit: str, aligned: bool, width: int, height: int) -> None:
    """A network that sees no more than how far right and down a pixel is, at output stride 8, tells four quarters."""
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    image = np.zeros((height, width, 3), np.float32)
    image[..., 0], image[..., 1] = x, y[:, None]
    options = {**FITS[fit](257, 293), "align_corners": aligned}
    processor = MobileNetImageProcessor(**options)
    pixels = processor(image, return_tensors="pt").pixel_values
    side = [-(-size // 8) for size in pixels.shape[-2:]]
    right, down = F.interpolate(pixels, size=side, mode="bilinear", align_corners=aligned)[0, :2]
    right, down = right - (2 * 0.4 - 1), down - (2 * 0.62 - 1)
    scores = torch.stack([a * right + b * down for b in (-1, 1) for a in (-1, 1)])
    output = type("Output", (), {"logits": scores[None]})
    (found,) = processor.post_process_semantic_segmentation(output, target_sizes=[(height, width)])
    expected = torch.from_numpy((x > 0.4) + 2 * (y > 0.62)[:, None])
    # Where nothing is shifted, no more than a pixel of what the network saw can be wrong.
    reach = 0.5 + max(axis.image / axis.resized for axis in place(width, height, read_options(options)))
    clear = (np.abs(x - 0.4) * width > reach) & (np.abs(y - 0.62) * height > reach)[:, None]
    # The padding is next to the border, and what the network gives for it has a say there.
    inner = [
        np.minimum(part, 1 - part) * size > 8 * reach * ("pad" in fit or fit == "corner")
        for part, size in ((x, width), (y, height))
    ]
    clear &= inner[0] & inner[1][:, None]
    assert clear.mean() > 0.6
    assert torch.equal(found[clear], expected[clear])


def test_padding_is_taken_off_and_gets_no_say() -> None:
    """Where an image ends, its own last pixels count: the logits of the padding may be what they want."""
    processor = MobileNetImageProcessor(**FITS["corner"](64, 0), align_corners=False)
    scores = torch.zeros(1, 2, 64, 64)
    scores[:, 0, :32], scores[:, 1, 32:] = 1, 1
    output = type("Output", (), {"logits": scores})
    (found,) = processor.post_process_semantic_segmentation(output, [(50, 100)])
    assert not found.any()
    (found,) = processor.post_process_semantic_segmentation(output, torch.tensor([[100, 50]]))
    assert torch.equal(found, (torch.arange(100) >= 50).long()[:, None].expand(100, 50))


def test_what_a_crop_left_out_counts_as_its_nearest() -> None:
    processor = MobileNetImageProcessor(size={"shortest_edge": 64}, crop_size=64)
    scores = torch.zeros(1, 2, 64, 64)
    scores[:, 1, :, 0] = 1
    (found,) = processor.post_process_semantic_segmentation(type("Output", (), {"logits": scores}), [(64, 128)])
    assert torch.equal(found, (torch.arange(128) <= 32).long().expand(64, 128))


def test_sizes_must_be_as_many_as_images() -> None:
    processor = MobileNetImageProcessor()
    output = type("Output", (), {"logits": torch.randn(2, 3, 4, 5)})
    assert [each.shape for each in processor.post_process_semantic_segmentation(output)] == [(4, 5), (4, 5)]
    for sizes in ([(4, 5)], [(4, 5), (0, 1)], [(1, 2, 3), (1, 2)]):
        with pytest.raises(ValueError, match="target_sizes must hold height and width of each of 2 images"):
            processor.post_process_semantic_segmentation(output, sizes)


def test_images_are_padded_with_the_mean_at_the_bottom_and_on_the_right() -> None:
    processor = MobileNetImageProcessor.from_recipe("deeplab", 65)
    assert processor.align_corners
    pixels = processor(Image.new("RGB", (100, 50), "white"), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 65, 65)
    assert (pixels[:, :, :32] == 1).all()
    assert not pixels[:, :, 32:].any()
    with pytest.raises(ValueError, match=r"pad_size must be no smaller than the resized image, got 64x64 for"):
        processor(Image.new("RGB", (100, 50)), pad_size=64)
    saved = processor.to_dict()
    assert (saved["pad_size"], saved["align_corners"]) == ({"height": 65, "width": 65}, True)
    assert not {"pad_size", "align_corners"} & MobileNetImageProcessor().to_dict().keys()
    whole = MobileNetImageProcessor.from_recipe("torchvision_segmentation", 52)
    assert whole(Image.new("RGB", (100, 50)), return_tensors="pt").pixel_values.shape == (1, 3, 52, 104)


@pytest.mark.parametrize("fit", FITS)
def test_what_shows_all_of_an_image(fit: str) -> None:
    options = read_options(FITS[fit](64, 73))
    shows_all = all(
        axis.offset >= 0 and axis.offset + axis.resized <= axis.network for axis in place(333, 100, options)
    )
    assert shows_all == (fit in WHOLE_FITS)


# PASCAL VOC


def test_colors_are_those_of_pascal_voc() -> None:
    """The first, some in between, and the last of VOC2012's color map."""
    assert len(VOC) == 21
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    assert {label: color(label) for label in known} == known
    assert color(255) == (224, 224, 192)
    assert len({color(label) for label in range(256)}) == 256
    assert palette()[3 * 15 : 3 * 16] == [192, 128, 128]


# Saved, loaded and in pipelines


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter that tells bright from dark, saved with its processor and its code."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("segmenter")
    model = small("lraspp", id2label={0: "dark", 1: "bright"}, image_size=64)
    model.save_pretrained(folder)
    MobileNetImageProcessor.from_recipe("torchvision_segmentation", 64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 123, 3), np.uint8)).save(path)
    return path


def areas(repository: Path, photograph: Path) -> dict[str, int]:
    """How many pixels have each label, by model and processor alone."""
    model = MobileNetForSemanticSegmentation.from_pretrained(repository).eval()
    processor = MobileNetImageProcessor.from_pretrained(repository)
    with torch.no_grad():
        output = model(**processor(photograph, return_tensors="pt"))
    (found,) = processor.post_process_semantic_segmentation(output, [(90, 123)])
    return {model.config.id2label[label]: int((found == label).sum()) for label in found.unique().tolist()}


@pytest.mark.any_version
def test_pipeline_segments_with_the_package(repository: Path, photograph: Path) -> None:
    segment = pipeline("image-segmentation", model=str(repository), trust_remote_code=False)
    found = segment(str(photograph))
    assert {each["mask"].size for each in found} == {(123, 90)}
    counts = {each["label"]: int((np.asarray(each["mask"]) == 255).sum()) for each in found}
    assert counts == areas(repository, photograph)
    assert len(counts) == 2


STRANGER = """
import json, sys
import numpy as np
from transformers import AutoModelForSemanticSegmentation, pipeline

repository, photograph, saved = sys.argv[1:]
# First of all: transformers 4.57 copies no more code than the file of a class imports.
AutoModelForSemanticSegmentation.from_pretrained(repository, trust_remote_code=True)
segment = pipeline("image-segmentation", model=repository, trust_remote_code=True)
areas = lambda found: {each["label"]: int((np.asarray(each["mask"]) == 255).sum()) for each in found}
first = areas(segment(photograph))
segment.model.save_pretrained(saved)
segment.image_processor.save_pretrained(saved)
again = pipeline("image-segmentation", model=saved, trust_remote_code=True)
assert "mobilenet" not in sys.modules
model = AutoModelForSemanticSegmentation.from_pretrained(saved, trust_remote_code=True).fuse()
model.save_pretrained(saved + "/fused")
print(json.dumps([first, areas(again([photograph, photograph], batch_size=2)[1]), type(model).__name__]))
"""


@pytest.mark.any_version
def test_pipeline_segments_without_the_package_and_what_it_saves_does_too(
    repository: Path, photograph: Path, tmp_path: Path
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, str(repository), str(photograph), str(tmp_path / "saved")]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    first, again, name = json.loads(run.stdout.splitlines()[-1])
    assert first == again == areas(repository, photograph)
    assert name == "MobileNetForSemanticSegmentation"
    fused = MobileNetForSemanticSegmentation.from_pretrained(tmp_path / "saved" / "fused")
    assert fused.config.fused
    assert areas(tmp_path / "saved", photograph) == first
