"""Networks that people make of MobileNets: what they become, against themselves, or the layer that is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import variants
from conversions import assert_fails_without_a_trace, read
from mobilenet.layers_mobilenet import SqueezeExcite
from typer.testing import CliRunner
from variants import Variant

from mobilenet import MobileNetConfig
from mobilenet.cli import app
from mobilenet.conversion import Options
from mobilenet.conversion.convert import build
from mobilenet.conversion.graph import Act, Add, Affine, Conv, Graph, Mul, Pool, match, table
from mobilenet.conversion.preprocessing import find
from mobilenet.synthetic import draw_images


pytestmark = pytest.mark.any_version

pytest.importorskip("keras", reason="Keras is not installed")
pytest.importorskip("h5py", reason="h5py is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

SMALL = {"size": 32}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from oracles import DATA

    photographs = sorted(map(str, (DATA / "imagenet_sample").glob("*.JPEG")))[::50]
    return photographs or draw_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize(
    ("variant", "field"),
    [
        # What was once taken for keras.applications, and compared with it.
        (Variant(2, pool="max", suffix=".h5", **SMALL), ("pooling", "max")),
        (Variant(1, act="relu", suffix=".h5", **SMALL), ("hidden_act", "relu")),
        (Variant(1, scaling="255", suffix=".h5", **SMALL), ("hidden_act", "relu6")),
        (Variant(1, head="sigmoid", suffix=".h5", **SMALL), ("problem_type", "multi_label_classification")),
        (Variant(2, pool="max", suffix=".onnx", **SMALL), ("pooling", "max")),
        (Variant(2, scaling="arithmetic", suffix=".onnx", **SMALL), ("hidden_act", "relu6")),
        (Variant(2, head="sigmoid", suffix=".onnx", **SMALL), ("problem_type", "multi_label_classification")),
        # What else has a place.
        (Variant(1, head="one", suffix=".onnx", **SMALL), ("num_labels", 1)),
        (Variant(1, hidden=(16,), **SMALL), ("classifier_hidden_sizes", (16,))),
        (Variant(1, hidden=(24, 12), hidden_act="relu6", suffix=".onnx", **SMALL), ("classifier_hidden_act", "relu6")),
        (Variant(1, pool="features", **SMALL), ("num_labels", 0)),
        (Variant(2, pool="map", suffix=".onnx", **SMALL), ("num_labels", 0)),
        (Variant(1, norm="none", **SMALL), ("use_batch_norm", False)),
        (Variant(1, norm="epsilons", **SMALL), ("batch_norm_eps", 1e-2)),
        (Variant(1, padding="symmetric", act="silu", suffix=".onnx", **SMALL), ("padding", "symmetric")),
        (Variant(1, channels=1, scaling="norm", **SMALL), ("num_channels", 1)),
    ],
    ids=lambda value: value.differences if isinstance(value, Variant) else "",
)
def test_what_has_a_place_converts(variant: Variant, field: tuple, images: list[str], tmp_path: Path) -> None:
    assert variants.attempt(variant, tmp_path, images).startswith("converted")
    name, value = field
    assert read(tmp_path / f"variant{variant.suffix}").config[name] == value


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        (Variant(2, act="relu4", **SMALL), ("4", "and must have one of relu, relu6, hardswish, silu, gelu")),
        (Variant(1, act="some other", suffix=".onnx", **SMALL), ("has the activation relu where others have relu6",)),
        (Variant(1, act="none", **SMALL), ("has no activation",)),
        (Variant(1, norm="after act", **SMALL), ("is a batch norm: MobileNet V1 has a depthwise convolution of 3x3",)),
        (Variant(1, padding="valid", **SMALL), ("pads 32x32 pixels by 0 and 0 rows",)),
        (Variant(1, padding="mixed", suffix=".onnx", **SMALL), ("all must pad as TensorFlow's SAME does",)),
        (Variant(1, pool="flatten", size=64), ("must be a pooling over 2x2 pixels",)),
        (
            Variant(1, scaling="negative", suffix=".onnx", **SMALL),
            ("scales its input by a factor that is not above 0",),
        ),
        (Variant(1, head="scaled", **SMALL), ("comes after ",)),
        (Variant(1, hidden=(16,), hidden_act="tanh", **SMALL), ("layers before the classifier must all have",)),
        (
            Variant(2, sums="one missing", width=0.35, suffix=".onnx", **SMALL),
            ("MobileNet V2 has a sum there (stages.2.2)",),
        ),
        (Variant(2, sums="activated", width=0.35, **SMALL), ("is the activation relu6",)),
        (
            Variant(1, body="one block less", **SMALL),
            ("MobileNet V1 has a depthwise convolution of 3x3 with stride 2 there",),
        ),
        (Variant(1, body="other kernel", suffix=".onnx", **SMALL), ("is a depthwise convolution of 5x5",)),
        (
            Variant(1, body="other channels", width=0.5, **SMALL),
            ("has 64 channels in and 72 out, which no width multiplier of MobileNet V1 gives",),
        ),
    ],
    ids=lambda value: value.differences if isinstance(value, Variant) else "",
)
def test_what_has_none_is_refused_by_the_name_of_its_layer(
    variant: Variant, words: tuple[str, ...], tmp_path: Path
) -> None:
    path, _ = variants.write(variant, tmp_path)
    assert_fails_without_a_trace(path, tmp_path / "output", f"{path}: is no MobileNet that can be converted: ", *words)


@pytest.mark.slow
def test_variants_by_chance_are_refused_or_equal(images: list[str], tmp_path: Path) -> None:
    results = []
    for seed in range(10):
        folder = tmp_path / str(seed)
        folder.mkdir()
        results.append(variants.attempt(variants.draw(seed), folder, images, seed))
    converted = sum(result.startswith("converted") for result in results)
    assert 2 < converted < 9


@pytest.mark.slow
def test_an_odd_network_converts_whole_and_says_how(tmp_path: Path, images: list[str]) -> None:
    variant = Variant(2, scaling="127.5", pool="max", head="sigmoid", hidden=(16,), size=32, form="sequential")
    path, run = variants.write(variant, tmp_path)
    output = tmp_path / "output"
    (tmp_path / "labels.txt").write_text("\n".join(f"{index} kind {index}" for index in range(5)))
    done = CliRunner().invoke(app, ["convert", str(path), str(output)])
    assert done.exit_code == 0, done.output
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "| the file in Keras, sigmoid |" in card
    assert "Assumed: that images are cropped to the middle 87.5 % (--fit says otherwise)." in card
    assert "Warning: The file does not say how to prepare images." in done.stderr
    config = json.loads((output / "config.json").read_text())
    assert (config["pooling"], config["classifier_hidden_sizes"]) == ("max", [16])
    assert config["id2label"]["4"] == "kind 4"
    from transformers import pipeline

    classify = pipeline("image-classification", model=str(output), trust_remote_code=True)
    scores = {answer["label"]: answer["score"] for answer in classify(images[0], top_k=5)}
    processor = read(path).feed
    expected = run(processor(images[:1], return_tensors="pt").pixel_values)[0]
    assert [scores[f"kind {index}"] for index in range(5)] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_number_that_is_off_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = variants.write(Variant(size=32, scaling="255", head="sigmoid"), tmp_path)
    real = build

    def off(*args: object) -> torch.nn.Module:
        model = real(*args)
        model.classifier.bias.data[0] += 0.01
        return model

    monkeypatch.setattr("mobilenet.conversion.convert.build", off)
    assert_fails_without_a_trace(path, tmp_path / "output", "the converted network is another than the file in Keras")


# By hand, where no framework writes it.


def chain(*ops: object, size: int = 32) -> Graph:
    """A graph whose operations follow each other."""
    made = [replace(op, name=f"op {i}", inputs=(i,), output=i + 1) for i, op in enumerate(ops)]
    return Graph(ops=made, input=0, output=len(made), channels=3, size=size)


COMMON = {"name": "", "inputs": (), "output": 0}


def plain_v1() -> list[object]:
    ops: list[object] = []
    torch.manual_seed(0)

    def conv(before: int, after: int, kernel: int, stride: int, groups: int = 1) -> None:
        weight = torch.randn(after, before // groups, kernel, kernel)
        pads = ((kernel // 2,) * 2,) * 2
        ops.append(Conv(**COMMON, weight=weight, stride=(stride, stride), pads=pads, groups=groups))
        ops.append(Act(**COMMON, function="relu"))

    conv(3, 8, 3, 2)
    channels = 8
    for block in (block for stage in MobileNetConfig("mobilenet_v1", 0.25).stages for block in stage):
        conv(channels, channels, 3, block.stride, channels)
        conv(channels, block.out_channels, 1, 1)
        channels = block.out_channels
    ops.append(Pool(**COMMON, kind="avg"))
    ops.append(Conv(**COMMON, weight=torch.randn(4, channels, 1, 1)))
    return ops


def test_linear_depthwise_convolutions_and_affine_parts_are_expressed() -> None:
    ops = [op for index, op in enumerate(plain_v1()) if not (index > 1 and index % 4 == 3 and isinstance(op, Act))]
    depthwise = [i for i, op in enumerate(ops) if isinstance(op, Conv) and op.groups > 1]
    assert all(not isinstance(ops[i + 1], Act) for i in depthwise)
    found = match(chain(*ops), "here", 32)
    assert found.config["depthwise_activation"] is False
    scaled = [*ops[:-1], Affine(**COMMON, factor=torch.tensor(2.0), offset=torch.tensor(1.0)), ops[-1]]
    other = match(chain(*scaled), "here", 32)
    torch.testing.assert_close(other.tensors["classifier.weight"], 2 * found.tensors["classifier.weight"])
    torch.testing.assert_close(
        other.tensors["classifier.bias"], found.tensors["classifier.weight"].sum(1), atol=1e-4, rtol=0
    )
    with pytest.raises(ValueError, match=r"op .* scales features that no classifier takes"):
        match(chain(*scaled[:-1]), "here", 32)


def test_two_linear_layers_are_one() -> None:
    ops = plain_v1()
    last = Conv(**COMMON, weight=torch.randn(2, 4, 1, 1), bias=torch.ones(2))
    found, merged = match(chain(*ops), "here", 32), match(chain(*ops, last), "here", 32)
    assert merged.config["num_labels"] == 2
    expected = last.weight.flatten(1) @ found.tensors["classifier.weight"]
    torch.testing.assert_close(merged.tensors["classifier.weight"], expected)


def act(function: str, before: int, after: int) -> Act:
    return Act(name="", inputs=(before,), output=after, function=function)


def times(factor: float, offset: float, before: int, after: int) -> Affine:
    constants = torch.tensor(factor), torch.tensor(offset)
    return Affine(name="", inputs=(before,), output=after, factor=constants[0], offset=constants[1])


SHIFTED = [times(1, 3, 0, 1), act("relu6", 1, 2)]  # relu6(x + 3)


@pytest.mark.parametrize(
    ("ops", "function"),
    [
        ([*SHIFTED, times(1 / 6, 0, 2, 3), Mul(name="", inputs=(0, 3), output=4)], "hardswish"),
        ([*SHIFTED, times(0.16667, 0, 2, 3), Mul(name="", inputs=(3, 0), output=4)], "hardswish"),
        ([*SHIFTED, Mul(name="", inputs=(0, 2), output=3), times(1 / 6, 0, 3, 4)], "hardswish"),
        ([act("hardsigmoid", 0, 1), Mul(name="", inputs=(0, 1), output=4)], "hardswish"),
        ([act("sigmoid", 0, 1), Mul(name="", inputs=(1, 0), output=4)], "silu"),
        ([times(1, 2, 0, 1), act("relu6", 1, 2), times(1 / 6, 0, 2, 3), Mul(name="", inputs=(0, 3), output=4)], None),
        ([*SHIFTED, times(0.2, 0, 2, 3), Mul(name="", inputs=(0, 3), output=4)], None),
        ([act("sigmoid", 5, 1), Mul(name="", inputs=(1, 0), output=4)], None),
    ],
)
def test_activations_that_are_written_as_products_are_recognized(ops: list, function: str | None) -> None:
    """As Keras 2, slim, ONNX and PyTorch write them; with another number, or of two values, they are none."""
    last = Graph(ops=ops, input=0, output=4, channels=3).chain()[-1]
    assert (last.function if isinstance(last, Act) else None) == function
    if function:
        assert last.inputs == (0,)


def squeeze(function: str = "relu", window: tuple[int, int] | None = None, shift: float = 3) -> list:
    """Squeeze-and-excite of 16 channels, whose hard sigmoid adds its 3 before or in the bias."""
    torch.manual_seed(0)
    reduce = Conv(name="", inputs=(1,), output=2, weight=torch.randn(8, 16, 1, 1), bias=torch.randn(8))
    expand = Conv(name="", inputs=(3,), output=4, weight=torch.randn(16, 8, 1, 1), bias=torch.ones(16) + 3 - shift)
    gate = [times(1, shift, 4, 5)] if shift else []
    return [
        *(Pool(name="", inputs=(0,), output=1, kind="avg", window=window), reduce, act(function, 2, 3), expand),
        *(*gate, act("relu6", 5 if shift else 4, 6), times(1 / 6, 0, 6, 7), Mul(name="", inputs=(0, 7), output=8)),
    ]


@pytest.mark.parametrize("shift", [3, 0])
def test_squeeze_and_excite_is_one_operation(shift: float) -> None:
    (found,) = Graph(ops=squeeze(shift=shift), input=0, output=8, channels=16).chain()
    assert (found.in_channels, found.out_channels, found.inputs) == (16, 8, (0,))
    x = torch.randn(2, 16, 3, 5)
    ours = SqueezeExcite(16, 8)
    ours.load_state_dict({name.removeprefix("at."): tensor for name, tensor in found.tensors("at").items()})
    torch.testing.assert_close(found.expand.bias, torch.ones(16))
    pooled = x.mean((2, 3), keepdim=True)
    gate = (
        found.expand.weight.flatten(1)
        @ (found.reduce.weight.flatten(1) @ pooled.flatten(1).T + found.reduce.bias[:, None]).relu()
    )
    expected = x * ((gate.T + 1 + 3).clamp(0, 6) / 6)[:, :, None, None]
    torch.testing.assert_close(ours(x), expected)


def test_another_branch_is_none() -> None:
    assert isinstance(Graph(ops=squeeze("hardswish"), input=0, output=8, channels=16).chain()[-1], Mul)


def test_a_ring_or_a_second_input_is_refused() -> None:
    ring = [Add(name="sum", inputs=(2, 0), output=1), Act(name="act", inputs=(1,), output=2, function="relu")]
    with pytest.raises(ValueError, match=r"here: .* depends on itself"):
        match(Graph(ops=ring, input=0, output=2, channels=3, size=32), "here", 32)
    with pytest.raises(ValueError, match="the end of the network comes where"):
        match(Graph(ops=[], input=0, output=9, channels=3, size=32), "here", 32)


def test_names_are_those_of_the_network() -> None:
    config = {"architecture": "mobilenet_v2", "classifier_hidden_sizes": (8,), "num_labels": 3}
    rows = table(config).rows
    assert {"stem", "block.expand", "block.depthwise", "block.project", "head", "hidden.0", "classifier"} == set(rows)


@pytest.mark.parametrize(
    ("factor", "offset", "mean", "std"),
    [
        (1 / 127.5, -1.0, 0.5, 0.5),  # all of it in the network
        (1.0, -110.0, 110 / 255, 1 / 255),  # the factor has gone into the first convolution
        (2.0, -1.0, 0.75, 0.25),  # of values that are scaled already, as is assumed and said
    ],
)
def test_a_scaling_tells_whether_it_is_for_bytes(factor: float, offset: float, mean: float, std: float) -> None:
    found = find(Options(), "keras", 32, scaling=(torch.tensor(factor), torch.tensor(offset)))
    count = len(found.processor.image_mean)
    assert found.processor.image_mean == pytest.approx([mean] * count)
    assert found.processor.image_std == pytest.approx([std] * count)
    assert ("--range" in found.warnings[0]) == (factor == 2)
