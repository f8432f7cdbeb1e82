"""Conversions of torchvision's MobileNets, against their published layouts written out."""

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conversions import ODD_SIZES, assert_fails_without_a_trace, assert_wrong_tables_are_noticed, read
from oracles import copy_in_order, logits, randomize_norms, timm_model
from torch import Tensor, nn

from mobilenet import MobileNetConfig
from mobilenet.conversion import from_torchvision, read_source
from mobilenet.conversion.convert import build
from mobilenet.conversion.labels import known


pytestmark = pytest.mark.any_version


def unit(inputs: int, outputs: int, kernel_size: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        expand = [unit(inputs, hidden)] if expansion > 1 else []
        project = [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*expand, unit(hidden, hidden, 3, stride, hidden), *project)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    """The layout of torchvision/models/mobilenetv2.py at width 1."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        table = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        blocks, inputs = [], 32
        for expansion, outputs, repeats, stride in table:
            for index in range(repeats):
                blocks.append(InvertedResidual(inputs, outputs, 1 if index else stride, expansion))
                inputs = outputs
        self.features = nn.Sequential(unit(3, 32, 3, 2), *blocks, unit(320, 1280))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * nn.functional.hardsigmoid(self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()))


class BneckV3(nn.Module):
    def __init__(
        self,
        inputs: int,
        kernel: int,
        hidden: int,
        outputs: int,
        squeezed: int,
        act: type,
        stride: int,
        dilation: int = 1,
    ) -> None:
        super().__init__()

        def unit(inputs: int, outputs: int, act: type, *args: int, **kwargs: int) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, *args, bias=False, **kwargs)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs, 1e-3), act())

        padding = dilation * (kernel // 2)
        depthwise = unit(
            hidden, hidden, act, kernel, 1 if dilation > 1 else stride, padding, groups=hidden, dilation=dilation
        )
        expand = [] if hidden == inputs else [unit(inputs, hidden, act, 1)]
        squeeze = [SqueezeExcitation(hidden, squeezed)] if squeezed else []
        self.block = nn.Sequential(*expand, depthwise, *squeeze, unit(hidden, outputs, nn.Identity, 1))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.adds else self.block(x)


# Tables 1 and 2 of arXiv:1905.02244: kernel, exp size, #out, squeezed channels, NL, s.
RE, HS = nn.ReLU, nn.Hardswish
LARGE = (
    *((3, 16, 16, 0, RE, 1), (3, 64, 24, 0, RE, 2), (3, 72, 24, 0, RE, 1)),
    *((5, 72, 40, 24, RE, 2), (5, 120, 40, 32, RE, 1), (5, 120, 40, 32, RE, 1)),
    *((3, 240, 80, 0, HS, 2), (3, 200, 80, 0, HS, 1), (3, 184, 80, 0, HS, 1), (3, 184, 80, 0, HS, 1)),
    *((3, 480, 112, 120, HS, 1), (3, 672, 112, 168, HS, 1)),
    *((5, 672, 160, 168, HS, 2), (5, 960, 160, 240, HS, 1), (5, 960, 160, 240, HS, 1)),
)
SMALL = (
    *((3, 16, 16, 8, RE, 2), (3, 72, 24, 0, RE, 2), (3, 88, 24, 0, RE, 1)),
    *((5, 96, 40, 24, HS, 2), (5, 240, 40, 64, HS, 1), (5, 240, 40, 64, HS, 1)),
    *((5, 120, 48, 32, HS, 1), (5, 144, 48, 40, HS, 1)),
    *((5, 288, 96, 72, HS, 2), (5, 576, 96, 144, HS, 1), (5, 576, 96, 144, HS, 1)),
)


class MobileNetV3(nn.Module):
    """The layout of torchvision/models/mobilenetv3.py."""

    def __init__(self, rows: tuple, head: int, features: int, num_classes: int) -> None:
        super().__init__()

        def unit(inputs: int, outputs: int, *args: int) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, *args, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs, 1e-3), nn.Hardswish())

        inputs = (16, *(row[2] for row in rows))
        blocks = (BneckV3(before, *row) for before, row in zip(inputs, rows, strict=False))
        self.features = nn.Sequential(unit(3, 16, 3, 2, 1), *blocks, unit(inputs[-1], head, 1))
        last = nn.Linear(features, num_classes)
        self.classifier = nn.Sequential(nn.Linear(head, features), nn.Hardswish(), nn.Dropout(0.2), last)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def published_v3(size: str) -> nn.Module:
    """torchvision's layout with arbitrary weights, whose logits are as large as a trained network's."""
    model = MobileNetV3(*{"large": (LARGE, 960, 1280), "small": (SMALL, 576, 1024)}[size], 10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    model = randomize_norms(model).eval()
    with torch.no_grad():
        scores = logits(model, torch.randn(2, 3, 97, 130))
        model.classifier[3].weight *= 3 / (scores - model.classifier[3].bias).std()
    return model


@pytest.mark.parametrize(
    ("size", "expected"),
    [("large", 5_483_032), ("small", 2_542_856)],  # num_params of torchvision's weights, with 1000 classes
)
def test_logits_equal_those_of_the_published_layout_of_v3(size: str, expected: int, tmp_path: Path) -> None:
    theirs = published_v3(size)
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    ours = build(read(tmp_path / "model.pth"), "")
    assert ours.config.architecture == f"mobilenet_v3_{size}"
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count + 990 * (ours.config.feature_channels + 1) == expected
    ours, theirs = ours.double(), theirs.double()  # no difference can pass for rounding
    for height, width in ODD_SIZES:
        images = torch.randn(2, 3, height, width).double()
        scores = logits(theirs, images)
        assert scores.std() > 1
        torch.testing.assert_close(logits(ours, images), scores, atol=1e-8, rtol=0)


@pytest.mark.parametrize("size", ["large", "small"])
def test_every_wrong_row_of_v3_is_noticed(size: str, tmp_path: Path) -> None:
    torch.save(published_v3(size).state_dict(), tmp_path / "model.pth")
    assert_wrong_tables_are_noticed(read(tmp_path / "model.pth"))


@pytest.fixture
def published() -> nn.Module:
    """torchvision's network with the weights of timm's, which is the same under other names."""
    source = timm_model("mobilenetv2_100", num_classes=10)
    with torch.no_grad():
        source.classifier.weight *= 0.1
    model = copy_in_order(source, MobileNetV2(10))
    images = torch.randn(1, 3, 97, 130)
    torch.testing.assert_close(logits(model, images), logits(source, images), atol=1e-4, rtol=0)
    return model


@pytest.mark.parametrize("size", ODD_SIZES)
def test_logits_equal_those_of_the_published_layout(published: nn.Module, size: tuple, tmp_path: Path) -> None:
    torch.save(published.state_dict(), tmp_path / "model.pth")
    ours = build(read(tmp_path / "model.pth"), "")
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(logits(ours, images), logits(published, images), atol=1e-4, rtol=0)


def test_every_wrong_row_is_noticed(published: nn.Module, tmp_path: Path) -> None:
    torch.save(published.state_dict(), tmp_path / "model.pth")
    assert_wrong_tables_are_noticed(read(tmp_path / "model.pth"))


def test_published_weights_are_known_by_name(
    published: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(published.state_dict(), tmp_path / "weights")
    checksum = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()
    file = (tmp_path / "weights").rename(tmp_path / f"mobilenet_v2-{checksum[:8]}.pth")
    name = "MobileNet_V2_Weights.IMAGENET1K_V1"
    monkeypatch.setitem(from_torchvision.PUBLISHED, name, file.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    origin, checkpoint = read_source(name)
    assert (origin.given, checkpoint.kind, checkpoint.license) == (name, "torchvision", "bsd-3-clause")
    assert checkpoint.processor.size == {"shortest_edge": 256}
    assert checkpoint.processor.image_mean == [0.485, 0.456, 0.406]

    monkeypatch.setitem(from_torchvision.PUBLISHED, name, file.rename(tmp_path / "mobilenet_v2-00000000.pth").as_uri())
    assert_fails_without_a_trace(name, tmp_path / "output", "cannot be downloaded", "invalid hash value")
    monkeypatch.setitem(from_torchvision.PUBLISHED, name, (tmp_path / "gone-00000000.pth").as_uri())
    assert_fails_without_a_trace(name, tmp_path / "output", "gone-00000000.pth: cannot be downloaded")


def test_the_second_weights_have_another_recipe(
    published: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(published.state_dict(), tmp_path / "model.pth")
    monkeypatch.setattr(from_torchvision, "sha256", lambda path: "7ebf99e0" + 56 * "0")
    assert read(tmp_path / "model.pth").processor.size == {"shortest_edge": 232}
    assert read(tmp_path / "model.pth", recipe="timm", image_size=160).processor.size == {"shortest_edge": 182}


# Segmenters


class Pooling(nn.Sequential):
    """ASPPPooling."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(super().forward(x), size=x.shape[-2:], mode="bilinear", align_corners=False)


class Aspp(nn.Module):
    """ASPP, of convs and project."""

    def __init__(self) -> None:
        super().__init__()

        def branch(*args: int, **kwargs: int) -> list[nn.Module]:
            return [nn.Conv2d(960, 256, *args, bias=False, **kwargs), nn.BatchNorm2d(256), nn.ReLU()]

        atrous = (nn.Sequential(*branch(3, padding=rate, dilation=rate)) for rate in (12, 24, 36))
        pooling = Pooling(nn.AdaptiveAvgPool2d(1), *branch(1))
        self.convs = nn.ModuleList([nn.Sequential(*branch(1)), *atrous, pooling])
        project = nn.Conv2d(1280, 256, 1, bias=False)
        self.project = nn.Sequential(project, nn.BatchNorm2d(256), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([conv(x) for conv in self.convs], 1))


class Lraspp(nn.Module):
    """LRASPPHead, whose two classifiers follow on the resizing."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.cbr = nn.Sequential(nn.Conv2d(960, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
        self.scale = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(960, 128, 1, bias=False), nn.Sigmoid())
        self.low_classifier, self.high_classifier = nn.Conv2d(40, num_classes, 1), nn.Conv2d(128, num_classes, 1)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        x = self.cbr(high) * self.scale(high)
        x = F.interpolate(x, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return self.low_classifier(low) + self.high_classifier(x)


class Segmenter(nn.Module):
    """The layouts of torchvision/models/segmentation/lraspp.py and deeplabv3.py, on a dilated V3 large."""

    def __init__(self, head: str, num_classes: int) -> None:
        super().__init__()
        network = MobileNetV3(LARGE[:12], 960, 1280, 1)
        blocks = [BneckV3(before, *row, dilation=2) for before, row in zip((112, 160, 160), LARGE[12:], strict=True)]
        last = nn.Sequential(nn.Conv2d(160, 960, 1, bias=False), nn.BatchNorm2d(960, 1e-3), nn.Hardswish())
        # Of IntermediateLayerGetter, which keeps the numbers.
        layers = [*network.features[:13], *blocks, last]
        self.backbone = nn.ModuleDict({str(index): layer for index, layer in enumerate(layers)})
        self.head = head
        if head == "lraspp":
            self.classifier = Lraspp(num_classes)
        else:
            refine = nn.Conv2d(256, 256, 3, padding=1, bias=False)
            classifier = nn.Conv2d(256, num_classes, 1)
            self.classifier = nn.Sequential(Aspp(), refine, nn.BatchNorm2d(256), nn.ReLU(), classifier)
            auxiliary = nn.Conv2d(40, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU(), nn.Dropout(0.1)
            self.aux_classifier = nn.Sequential(*auxiliary, nn.Conv2d(10, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits before they are resized to the image."""
        for index, layer in self.backbone.items():
            x = layer(x)
            if index == "4":
                low = x
        return self.classifier(low, x) if self.head == "lraspp" else self.classifier(x)


def published_segmenter(head: str) -> nn.Module:
    """torchvision's layout with arbitrary weights, whose logits are as large as a trained network's."""
    model = Segmenter(head, 21)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    model = randomize_norms(model).eval()
    with torch.no_grad():
        scale = 3 / model(torch.randn(2, 3, 97, 130)).std()
        for name, parameter in model.classifier.named_parameters():
            if name.startswith(("4.", "low_classifier", "high_classifier")):
                parameter *= scale
    return model


HEADS = {"deeplab_v3": 11_029_328, "lraspp": 3_221_538}  # num_params of torchvision's weights


@pytest.mark.parametrize("head", HEADS)
def test_logits_equal_those_of_the_published_layout_of_a_segmenter(head: str, tmp_path: Path) -> None:
    theirs = published_segmenter(head)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == HEADS[head]
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    checkpoint = read(tmp_path / "model.pth")
    assert checkpoint.task.name == "image-segmentation"
    assert (checkpoint.processor.size, checkpoint.processor.do_center_crop) == ({"shortest_edge": 520}, False)
    assert not checkpoint.processor.align_corners
    ours = build(checkpoint, "")
    preset = MobileNetConfig.from_preset(f"{head}_mobilenet_v3_large_520")
    given = ours.config.to_dict()
    assert {name: value for name, value in preset.to_dict().items() if given.get(name) != value} == {}
    ours, theirs = ours.double(), theirs.double()  # no difference can pass for rounding
    for height, width in ODD_SIZES:
        images = torch.randn(2, 3, height, width).double()
        scores = logits(theirs, images)
        assert scores.std() > 1
        torch.testing.assert_close(logits(ours, images), scores, atol=1e-8, rtol=0)


@pytest.mark.parametrize("head", [pytest.param("deeplab_v3", marks=pytest.mark.slow), "lraspp"])
def test_every_wrong_row_of_a_segmenter_is_noticed(head: str, tmp_path: Path) -> None:
    torch.save(published_segmenter(head).state_dict(), tmp_path / "model.pth")
    assert_wrong_tables_are_noticed(read(tmp_path / "model.pth"), size=33)


@pytest.mark.parametrize(
    "name", ["lraspp_mobilenet_v3_large", "LRASPP_MobileNet_V3_Large_Weights.COCO_WITH_VOC_LABELS_V1"]
)
def test_published_segmenters_are_known_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert from_torchvision.PUBLISHED[name].endswith("/lraspp_mobilenet_v3_large-d234d4ea.pth")
    torch.save(published_segmenter("lraspp").state_dict(), tmp_path / "weights")
    checksum = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()
    file = (tmp_path / "weights").rename(tmp_path / f"lraspp_mobilenet_v3_large-{checksum[:8]}.pth")
    monkeypatch.setitem(from_torchvision.PUBLISHED, name, file.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    origin, checkpoint = read_source(name)
    assert (origin.given, checkpoint.kind) == (name, "torchvision's lraspp_mobilenet_v3_large")
    assert known(checkpoint.config["num_labels"], checkpoint.task)[15] == "person"


def test_both_segmenters_of_torchvision_are_published() -> None:
    assert {"deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"} <= from_torchvision.PUBLISHED.keys()


def test_its_detector_is_published_by_the_name_of_its_function() -> None:
    url = from_torchvision.PUBLISHED["ssdlite320_mobilenet_v3_large"]
    assert url.endswith("/ssdlite320_mobilenet_v3_large_coco-a79551df.pth")
