"""Exports predict as torch does, run where they are meant to, and appear whole or not at all."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from oracles import randomize_norms
from PIL import Image
from released import CODE
from torch import Tensor
from transformers import pipeline
from typer.testing import CliRunner, Result

from mobilenet import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor
from mobilenet.cli import app
from mobilenet.conversion.convert import convert
from mobilenet.export import export
from mobilenet.export.compare import Engine, ExportError


pytestmark = pytest.mark.any_version


has_exporters = importlib.util.find_spec("transformers.exporters") is not None
needs_exporters = pytest.mark.skipif(not has_exporters, reason="transformers is too old to export: 5.23 has exporters")

# torch and executorch must come from one release; where they do not, nobody has it.
TARGETS = ["onnx", "openvino", *(["executorch"] if importlib.util.find_spec("executorch") else [])]
FILES = {
    "onnx": {"model.onnx", "model.onnx.data"},
    "openvino": {"openvino_model.xml", "openvino_model.bin"},
    "executorch": {"model.pte"},
}
# No network of torch is beside an exported one, but what its configuration and its image processor need.
BESIDE = {"README.md", "config.json", "export.json", "preprocessor_config.json"} | {
    name for name in CODE if name.startswith(("arch", "conf", "heads", "image", "post", "pre"))
}
LABELS = {0: "stone", 1: "scissors", 2: "paper", 3: "lizard", 4: "spock"}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def make_model(folder: Path, **options: object) -> MobileNetForImageClassification:
    """Save a small network with batch norms of arbitrary statistics, for images of 64 pixels."""
    torch.manual_seed(0)
    config = MobileNetConfig(**{"width_multiplier": 0.35, "image_size": 64, "id2label": LABELS, **options})
    model = randomize_norms(MobileNetForImageClassification(config)).eval()
    model.classifier.weight.data.normal_()
    model.save_pretrained(folder)
    MobileNetImageProcessor.from_recipe("google", 64).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


@pytest.fixture(scope="module", params=TARGETS)
def exported(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not has_exporters:
        pytest.skip("transformers is too old to export: 5.23 has exporters")
    folder = tmp_path_factory.mktemp("exports") / request.param
    result = run(model, folder, "--target", request.param)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert re.search(r" 8 .* 100 % ", result.stdout)
    assert re.search(r"is\s+written\.\n$", result.stdout)
    return folder


def predict(model: torch.nn.Module, pixel_values: Tensor) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=pixel_values).logits


def load(folder: Path) -> object:
    from transformers.exporters import ExportedModel

    # OpenVINO would compute in bfloat16 where that is faster.
    options = {"config": {"INFERENCE_PRECISION_HINT": "f32"}} if folder.name == "openvino" else {}
    return ExportedModel.from_pretrained(folder, device="cpu", **options)


@pytest.mark.parametrize("batch", [1, 5])
def test_predicts_as_torch(exported, model, batch):
    theirs, ours = load(exported), MobileNetForImageClassification.from_pretrained(model).eval()
    pixel_values = torch.randn(batch, 3, 64, 64)
    expected = predict(ours, pixel_values)
    assert expected.std() > 0.1
    torch.testing.assert_close(predict(theirs, pixel_values), expected, rtol=1e-4, atol=1e-4)


def test_folder_is_complete(exported):
    assert {path.name for path in exported.iterdir()} == BESIDE | FILES[exported.name]
    config = MobileNetConfig.from_pretrained(exported)
    assert config.id2label == LABELS
    assert (config.use_batch_norm, config.fused, config.has_batch_norm) == (True, True, False)
    card = ModelCard.load(exported / "README.md")
    assert card.data.library_name == "transformers"
    assert re.search(r"\| 8 \| \d\.\de-\d\d \| 100 % \|", card.text)
    here = str(Path(__file__).parents[2]).encode()
    assert not [path.name for path in exported.iterdir() if here in path.read_bytes()]


def test_pipeline_takes_it(exported, model, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 110, 3), np.uint8)).save(tmp_path / "noise.png")
    classify = pipeline(
        "image-classification",
        model=load(exported),
        image_processor=MobileNetImageProcessor.from_pretrained(exported),
    )
    expected = pipeline("image-classification", model=str(model), trust_remote_code=False)
    (*theirs,) = classify(str(tmp_path / "noise.png"))
    for ours in expected(str(tmp_path / "noise.png")):
        (same,) = [line for line in theirs if line["label"] == ours["label"]]
        assert same["score"] == pytest.approx(ours["score"], abs=1e-4)


@needs_exporters
@pytest.mark.parametrize(
    ("options", "operators"),
    [
        ({}, {"Conv": 52, "Clip": 35, "Add": 10, "ReduceMean": 1, "Gemm": 1}),
        ({"architecture": "mobilenet_v1", "padding": "symmetric", "hidden_act": "relu"}, {"Conv": 27, "Relu": 27}),
        ({"architecture": "mobilenet_v1", "output_stride": 8}, {"Conv": 27, "Clip": 27}),
    ],
)
def test_onnx_takes_any_size_and_holds_no_needless_operator(tmp_path, options, operators):
    import onnx

    ours = make_model(tmp_path / "model", **options)
    export.export(str(tmp_path / "model"), tmp_path / "onnx")
    theirs = load(tmp_path / "onnx")
    for shape in ((1, 3, 64, 64), (2, 3, 97, 130), (3, 3, 33, 224), (1, 3, 7, 5)):
        pixel_values = torch.randn(shape)
        torch.testing.assert_close(
            predict(theirs, pixel_values), predict(ours, pixel_values), rtol=1e-4, atol=1e-4, msg=str(shape)
        )
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    found = Counter(node.op_type for node in graph.node)
    assert found == {"ReduceMean": 1, "Gemm": 1, **operators}


@pytest.fixture(scope="module")
def real_model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "model"
    convert(str(data / "checkpoints" / "google_mobilenet_v2_1.0_224"), folder, compare=False)
    return folder


@pytest.fixture(scope="module")
def sample(photographs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 100 photographs."""
    folder = tmp_path_factory.mktemp("sample")
    for path in photographs[::3]:
        (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.slow
@needs_exporters
def test_int8_is_calibrated_by_channel(real_model, sample, tmp_path):
    import onnx

    (comparison,) = export.export(str(real_model), tmp_path / "int8", int8=True, images=sample)
    assert comparison.images == 50
    assert comparison.agreement >= 0.9
    graph = onnx.load(tmp_path / "int8" / "model.onnx").graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    outputs = {output: node for node in graph.node for output in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 52
    quantized = [outputs[node.input[1]] for node in convolutions if node.input[1] in outputs]
    assert len(quantized) == 49  # all but the stem and the first block
    for weight in quantized:
        values, scales, _ = (tensors[name] for name in weight.input)
        assert weight.op_type == "DequantizeLinear"
        assert values.dtype == np.int8
        assert scales.shape == values.shape[:1]
        assert len(np.unique(scales)) > 1
    size = sum(path.stat().st_size for path in (tmp_path / "int8").glob("model.onnx*"))
    assert size < (real_model / "model.safetensors").stat().st_size / 3
    # Any height and width, too.
    assert predict(load(tmp_path / "int8"), torch.randn(2, 3, 131, 97)).shape == (2, 1001)


@pytest.mark.slow
@needs_exporters
def test_openvino_int8_keeps_its_predictions(real_model, sample, tmp_path):
    options = {"int8": True, "images": sample, "min_agreement": 0.85}
    for comparison in export.export(str(real_model), tmp_path / "int8", "openvino", **options):
        assert comparison.agreement >= 0.85
    weights = (tmp_path / "int8" / "openvino_model.bin").stat().st_size
    assert weights < (real_model / "model.safetensors").stat().st_size / 3


@pytest.mark.slow
@needs_exporters
def test_transformers_js_finds_what_it_reads(real_model, sample, tmp_path):
    comparisons = export.export(str(real_model), tmp_path / "js", "transformers.js", images=sample)
    assert [comparison.name for comparison in comparisons] == [
        "model.onnx, float32",
        "model_quantized.onnx, int8",
    ]
    assert {str(path.relative_to(tmp_path / "js")) for path in (tmp_path / "js").rglob("*") if path.is_file()} == {
        "README.md",
        "config.json",
        "onnx/model.onnx",
        "onnx/model_quantized.onnx",
        "preprocessor_config.json",
    }
    config, processor = (
        json.loads((tmp_path / "js" / name).read_text()) for name in ("config.json", "preprocessor_config.json")
    )
    assert config["model_type"] == "mobilenet_v2"
    assert config["id2label"]["282"] == "tabby, tabby cat"
    assert (config["depth_multiplier"], config["image_size"]) == (1.0, 224)
    assert processor["image_processor_type"] == "MobileNetV2ImageProcessor"
    assert "auto_map" not in config | processor
    assert processor["crop_size"] == {"height": 224, "width": 224}
    assert ModelCard.load(tmp_path / "js" / "README.md").data.library_name == "transformers.js"


def wrong(name: str, *, is_exact: bool) -> Engine:
    """An engine that always predicts label 0."""
    return Engine(name, lambda pixel_values: (torch.eye(5)[0].expand(len(pixel_values), 5),), is_exact, False)


@pytest.mark.parametrize(
    ("is_exact", "message"),
    [
        (True, r"ONNX predicts otherwise than torch: logits differ by .+, .+ is allowed; nothing was written\."),
        (False, r"ONNX gives torch's prediction on .+ % of 8 images, 100 % are asked for; nothing was written\."),
    ],
)
def test_an_export_that_predicts_otherwise_is_not_kept(monkeypatch, model, tmp_path, is_exact, message):
    monkeypatch.setattr(export, "check_installed", lambda *_: None)
    monkeypatch.setattr(export, "write", lambda *_: [wrong("ONNX", is_exact=is_exact)])
    with pytest.raises(ExportError, match=message):
        export.export(str(model), tmp_path / "out", min_agreement=1.0)
    assert not list(tmp_path.iterdir())


def test_logits_that_are_no_numbers_are_not_kept(monkeypatch, model, tmp_path):
    engine = Engine("ONNX", lambda pixel_values: (torch.full((len(pixel_values), 5), torch.nan),), False, False)
    monkeypatch.setattr(export, "check_installed", lambda *_: None)
    monkeypatch.setattr(export, "write", lambda *_: [engine])
    with pytest.raises(ExportError, match="ONNX must give finite logits"):
        export.export(str(model), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupted_export_leaves_nothing(monkeypatch, model, tmp_path, error):
    def interrupt(exporter: object, target: object, int8: bool, folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"half")
        raise error

    monkeypatch.setattr(export, "check_installed", lambda *_: None)
    monkeypatch.setattr(export, "write", interrupt)
    with pytest.raises(error):
        export.export(str(model), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_it_needs_is_named(monkeypatch, model, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers.exporters", None)  # as in older versions
    result = run(model, tmp_path / "out")
    assert result.exit_code == 1
    assert re.fullmatch(
        r"Error: export needs transformers.exporters, .+: pip install 'transformers>=5.23'\n", result.stderr
    )


@needs_exporters
@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        (
            "onnxscript",
            (),
            'Error: onnx needs onnxscript: in a clone of this project, pip install -c constraints.txt -e ".[onnx]"',
        ),
        ("nncf", ("-t", "openvino", "--int8", "--images", "."), "Error: openvino needs nncf: in a clone"),
        (
            "executorch",
            ("-t", "executorch"),
            'executorch: in a clone of this project, pip install -c constraints.txt -e ".[executorch]"',
        ),
    ],
)
def test_a_missing_package_is_named(monkeypatch, model, tmp_path, missing, arguments, message):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else find_spec(name))
    result = run(model, tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--int8",), "int8 must be calibrated: name a folder of images"),
        (("-t", "transformers.js"), "int8 must be calibrated: name a folder of images"),
        (("-t", "transformers.js", "--int8"), "a float32 and an int8 network in any case"),
        (("--images", "nowhere"), "images must be a folder, got nowhere."),
        (("--images", "{empty}"), "images must be a folder of at least 1 images, got 0"),
    ],
)
def test_bad_arguments(monkeypatch, model, tmp_path, arguments, message):
    monkeypatch.setattr(export, "check_installed", lambda *_: None)
    (tmp_path / "empty").mkdir()
    result = run(model, tmp_path / "out", *(argument.format(empty=tmp_path / "empty") for argument in arguments))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_unknown_target(model, tmp_path):
    with pytest.raises(ExportError, match=r"target must be one of onnx, .+, transformers\.js, got 'coreml'\."):
        export.export(str(model), tmp_path / "out", "coreml")
    assert run(model, tmp_path / "out", "-t", "coreml").exit_code == 2


def test_a_missing_model_is_one_error(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "check_installed", lambda *_: None)
    result = run(tmp_path / "nowhere", tmp_path / "out")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept(monkeypatch, model, tmp_path):
    monkeypatch.setattr(export, "check_installed", lambda *_: None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    result = run(model, tmp_path / "out")
    assert result.exit_code == 1
    assert "--overwrite replaces it" in result.stderr
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
