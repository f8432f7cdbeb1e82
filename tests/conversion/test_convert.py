"""The converter's frame: the repository that it writes, its comparison, its options, and what happens to bad input."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conversions import assert_fails_without_a_trace, read
from hub import Fault, Hub, ask
from huggingface_hub import ModelCard
from oracles import logits
from PIL import Image
from released import CODE, CONVERTED
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from typer.testing import CliRunner

import convert_checkpoint
from mobilenet import MobileNetForImageClassification
from mobilenet.cli import app
from mobilenet.conversion import ConversionError, parity
from mobilenet.conversion.accuracy import advise, measure_recipes
from mobilenet.conversion.convert import build, convert
from mobilenet.conversion.labels import known


pytestmark = pytest.mark.any_version
SCRIPT = Path(convert_checkpoint.__file__)


@pytest.fixture(scope="module")
def converted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real V2 1.0_224, converted and verified."""
    output = tmp_path_factory.mktemp("converted") / "mobilenet_v2_1.0_224"
    convert(str(data / "checkpoints" / "google_mobilenet_v2_1.0_224"), output)
    return output


@pytest.fixture
def small(data: Path, tmp_path: Path) -> Path:
    """A copy of the real V1 0.25_128 that a test may break."""
    return Path(shutil.copytree(data / "checkpoints" / "google_mobilenet_v1_0.25_128", tmp_path / "small"))


def test_snippet_names_the_cats(converted: Path, cats: Path) -> None:
    # As users type it; since this package is imported, its classes are those that load.
    processor = AutoImageProcessor.from_pretrained(converted, trust_remote_code=True)
    model = AutoModelForImageClassification.from_pretrained(converted, trust_remote_code=True)
    scores = model(**processor(images=Image.open(cats), return_tensors="pt")).logits.softmax(-1)[0]
    assert model.config.id2label[scores.argmax().item()] == "tabby, tabby cat"
    assert scores.max().item() == pytest.approx(0.7847, abs=1e-3)


def test_pipeline_names_the_cats(converted: Path, cats: Path) -> None:
    classify = pipeline("image-classification", model=str(converted), trust_remote_code=True)
    first, second, third = classify(str(cats))[:3]
    assert first == {"label": "tabby, tabby cat", "score": pytest.approx(0.7847, abs=1e-3)}
    assert second == {"label": "tiger cat", "score": pytest.approx(0.1446, abs=1e-3)}
    assert third == {"label": "Egyptian cat", "score": pytest.approx(0.0697, abs=1e-3)}


def test_repository_is_complete(converted: Path) -> None:
    assert {path.name for path in converted.iterdir()} == CONVERTED
    for name in CODE:
        assert (converted / name).read_bytes() == SCRIPT.with_name(name).read_bytes()
    config = json.loads((converted / "config.json").read_text())
    assert (
        config["auto_map"]["AutoModelForImageClassification"] == "modeling_mobilenet.MobileNetForImageClassification"
    )
    processor = json.loads((converted / "preprocessor_config.json").read_text())
    assert processor["auto_map"] == {"AutoImageProcessor": "image_processing_mobilenet.MobileNetImageProcessor"}
    assert (converted / "model.safetensors").stat().st_mode == (converted / "config.json").stat().st_mode


def test_card_tells_the_source_and_the_comparison(converted: Path, data: Path) -> None:
    card = ModelCard.load(converted / "README.md")
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["vision", "mobilenet", "arxiv:1801.04381"],
        "datasets": ["imagenet-1k"],
        "metrics": ["accuracy"],
    }
    source = data / "checkpoints" / "google_mobilenet_v2_1.0_224" / "model.safetensors"
    assert hashlib.sha256(source.read_bytes()).hexdigest() in card.text
    assert "| transformers' MobileNetV2 " in card.text
    assert "| the repository, loaded anew | 8 | 0 | 0 | largest 0.0001 | 100 % |" in card.text
    assert str(data) not in card.text


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite a repository's weights as safetensors, with tensors replaced or, where None, left out."""
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


def test_missing_unexpected_and_misshapen_names_are_listed_at_once(small: Path, tmp_path: Path) -> None:
    edit_weights(
        small,
        **{
            "mobilenet_v1.layer.3.normalization.running_var": None,
            "mobilenet_v1.layer.4.normalization.bias": torch.zeros(7),
            "mobilenet_v1.layer.26.convolution.weight": torch.zeros(1),
        },
    )
    assert_fails_without_a_trace(
        small,
        tmp_path / "output",
        f"{small} does not hold a mobilenet_v1 of width 0.25 with 1001 classes: "
        "1 missing: mobilenet_v1.layer.3.normalization.running_var; "
        "1 unexpected: mobilenet_v1.layer.26.convolution.weight; "
        "1 misshapen: mobilenet_v1.layer.4.normalization.bias [7] instead of [32].",
    )


@pytest.mark.slow
def test_labeled_images_tell_the_recipe(data: Path, tmp_path: Path) -> None:
    source = data / "tflite" / "mobilenet_v1_0.25_224_1_default_1.tflite"
    checkpoint, rows = read(source), sorted((data / "imagenet_sample").glob("*.JPEG"))[::40]
    right = logits(build(checkpoint, ""), checkpoint.processor(rows, return_tensors="pt").pixel_values).argmax(-1)
    for photograph, index in zip(rows, right.tolist(), strict=True):
        (tmp_path / "images" / str(index)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / str(index) / photograph.name).symlink_to(photograph)
    command = ["convert", str(source), str(tmp_path / "output"), "--compare-on", str(tmp_path / "images")]
    done = CliRunner().invoke(app, [*command, "--range=0..1"])
    assert done.exit_code == 0, done.output
    assert f"top-1 on {len(rows)} labeled images" in done.stderr
    advice = " ".join(done.stderr.split())
    assert re.search(
        r"right on [\d.]+ % as written, and on 100 % with --fit crop --range=-1..1: convert again", advice
    )
    labeled = [(str(photograph), index) for photograph, index in zip(rows, right.tolist(), strict=True)]
    measured = measure_recipes(build(checkpoint, ""), checkpoint, labeled)
    assert measured[0].is_ours
    assert advise(measured, len(rows)) is None
    listing = tmp_path / "images" / "labels.csv"
    listing.write_text("file,label\nx.jpg,no such class\n")
    assert_fails_without_a_trace(
        source, tmp_path / "other", "the network has no class 'no such class'", compare_on=tmp_path / "images"
    )


def test_imagenets_labels_ship(data: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    google = (data / "imagenet_labels_1001.txt").read_text(encoding="utf-8").splitlines()
    assert known(1001) == google
    assert known(1000) == google[1:]
    assert known(999) is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(small: Path, tmp_path: Path, value: float) -> None:
    edit_weights(small, **{"classifier.bias": torch.full((1001,), value)})
    assert_fails_without_a_trace(small, tmp_path / "output", str(small), "not finite, in classifier.bias")


class Exploit:
    """Pickled, it would write a file when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


def test_a_pickle_that_would_run_code_is_refused(small: Path, tmp_path: Path) -> None:
    torch.save({"classifier.bias": Exploit(tmp_path / "taken over")}, small / "pytorch_model.bin")
    assert_fails_without_a_trace(small, tmp_path / "output", "pytorch_model.bin: holds more than tensors")
    assert not (tmp_path / "taken over").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_broken_files_are_refused(tmp_path: Path, name: str) -> None:
    source = tmp_path / name
    tensors = {"conv_stem.weight": torch.zeros(32, 3, 3, 3)}
    save_file(tensors, source) if name.endswith("safetensors") else torch.save(tensors, source)
    whole = source.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:30], b"", b"\xff" * 100):
        source.write_bytes(part)
        assert_fails_without_a_trace(source, tmp_path / "output", f"{source}: ")


def test_other_files_are_refused(tmp_path: Path, cats: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.weight": torch.zeros(64)}, tmp_path / "resnet.pth")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    (tmp_path / "folder").mkdir()
    for source, parts in (
        (tmp_path / "resnet.pth", ("resnet.pth: holds no MobileNet of timm", "called conv1.weight, bn1.weight")),
        (tmp_path / "list.pth", ("list.pth: must hold a dictionary of tensors",)),
        (tmp_path / "folder", ("folder: no known source",)),
        (cats, ("000000039769.png: no known source",)),
        (tmp_path / "nothing.pth", ("nothing.pth: no such file or folder",)),
    ):
        assert_fails_without_a_trace(source, tmp_path / "output", *parts)


def test_a_revision_is_for_the_hub(small: Path, tmp_path: Path) -> None:
    assert_fails_without_a_trace(small, tmp_path / "output", "a revision is for Hub ids", revision="main")


def test_output_is_never_overwritten_unasked(converted: Path, small: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(converted, tmp_path / "output"))
    assert_fails_without_a_trace(small, output, f"{output} exists; --overwrite replaces it.")
    convert(str(small), output, overwrite=True, compare=False)
    assert json.loads((output / "config.json").read_text())["width_multiplier"] == 0.25
    assert "Not compared" in (output / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"output", "small"}


def test_a_failed_conversion_leaves_what_it_was_to_overwrite(converted: Path, small: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(converted, tmp_path / "output"))
    (small / "pytorch_model.bin").unlink()
    assert_fails_without_a_trace(small, output, "neither", overwrite=True)


def test_overwriting_replaces_repositories_only(small: Path, tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "beach.jpg").touch()
    (tmp_path / "link").symlink_to(small)
    for output in (tmp_path / "holiday", tmp_path / "holiday" / "beach.jpg", tmp_path / "link"):
        assert_fails_without_a_trace(small, output, "is no model repository", overwrite=True)
    (tmp_path / "holiday" / "config.json").write_text("{}")
    assert_fails_without_a_trace(small, tmp_path / "holiday", "is no model repository", overwrite=True)


def test_overwriting_spares_clones_and_the_source(
    converted: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = Path(shutil.copytree(converted, tmp_path / "clone"))
    (clone / ".git").mkdir()
    assert_fails_without_a_trace(small, clone, "is a clone or the folder you are in", overwrite=True)
    (clone / ".git").rmdir()
    with monkeypatch.context() as context:
        context.chdir(clone)
        assert_fails_without_a_trace(small, Path("../clone"), "is a clone or the folder you are in", overwrite=True)
        assert_fails_without_a_trace(small, clone, "is a clone or the folder you are in", overwrite=True)
    assert_fails_without_a_trace(small, small, "holds the source", overwrite=True)
    (tmp_path / "way").symlink_to(tmp_path)
    assert_fails_without_a_trace(small, tmp_path / "way" / "small", "holds the source", overwrite=True)
    assert_fails_without_a_trace(small / "config.json", small, "holds the source", overwrite=True)


def test_missing_parents_of_the_output_are_made(small: Path, tmp_path: Path) -> None:
    convert(str(small), tmp_path / "a" / "b", compare=False)
    assert (tmp_path / "a" / "b" / "model.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "small"}


def test_a_result_that_does_not_load_is_not_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "LOAD_BACK", "raise SystemExit('no such class')")
    assert_fails_without_a_trace(small, tmp_path / "output", "does not load: no such class")


def test_a_result_that_loads_as_another_network_is_not_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = parity.LOAD_BACK.replace("with torch", "model.classifier.bias.data[7] += 0.01\nwith torch")
    monkeypatch.setattr(parity, "LOAD_BACK", script)
    assert_fails_without_a_trace(small, tmp_path / "output", "is another than the repository, loaded anew", "is 0.01")


def test_without_the_runtime_console_and_card_say_so(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise ImportError("No module named 'timm'")

    monkeypatch.setattr("mobilenet.conversion.from_google.native_oracle", missing)
    done = CliRunner().invoke(app, ["convert", str(small), str(tmp_path / "output")])
    assert done.exit_code == 0, done.output
    said = "Not compared with the source's own runtime: No module named 'timm'."
    card = (tmp_path / "output" / "README.md").read_text()
    assert said in card
    assert "| the repository, loaded anew |" in card
    assert f"Warning: {said}" in " ".join(done.stderr.split())


def test_images_of_the_user_are_compared(small: Path, tmp_path: Path, cats: Path) -> None:
    native, _ = convert(str(small), tmp_path / "output", compare_on=cats.parent)
    assert (native.images, native.agreement) == (9, 1)
    assert_fails_without_a_trace(
        small, tmp_path / "other", "--compare-on must be a folder", compare_on=tmp_path / "none"
    )
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.jpg").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"broken\.jpg: not an image"):
        convert(str(small), tmp_path / "other", compare_on=tmp_path / "images")


def test_dropping_the_background_keeps_the_other_classes(small: Path, tmp_path: Path) -> None:
    convert(str(small), tmp_path / "output", drop_background=True, compare=False)
    kept = build(read(small), "").classifier
    without = MobileNetForImageClassification.from_pretrained(tmp_path / "output").eval()
    assert without.classifier.weight.equal(kept.weight[1:])
    assert without.classifier.bias.equal(kept.bias[1:])
    assert without.config.num_labels == 1000
    assert without.config.id2label[281] == "tabby, tabby cat"
    assert without.config.label2id["tench, Tinca tinca"] == 0
    convert(str(small), tmp_path / "output", drop_background=True, labels="imagenet", compare=False, overwrite=True)
    assert (
        MobileNetForImageClassification.from_pretrained(tmp_path / "output").config.id2label[281] == "tabby, tabby cat"
    )


def test_only_classifiers_have_a_background_to_drop(data: Path, tmp_path: Path) -> None:
    source = data / "tflite" / "deeplabv3.tflite"
    words = "--drop-background is for classifiers of 1001 classes, got a MobileNetForSemanticSegmentation of 21"
    assert_fails_without_a_trace(source, tmp_path / "output", words, drop_background=True)


def test_hidden_files_are_not_compared_on(tmp_path: Path) -> None:
    for name in ("owl.jpg", "._owl.jpg"):
        (tmp_path / name).touch()
    assert parity.find_images(tmp_path) == [str(tmp_path / "owl.jpg")]


def test_labels_come_from_files_and_known_sets(small: Path, tmp_path: Path, data: Path) -> None:
    google = (data / "imagenet_labels_1001.txt").read_text().splitlines()
    (tmp_path / "labels.txt").write_text("\n".join(f"class {index}" for index in range(1001)))
    (tmp_path / "labels.json").write_text(json.dumps({str(index): f"number {index}" for index in range(1001)}))
    for labels, first in (
        ("imagenet-background", "background"),
        (str(tmp_path / "labels.txt"), "class 0"),
        (str(tmp_path / "labels.json"), "number 0"),
    ):
        convert(str(small), tmp_path / "output", labels=labels, compare=False, overwrite=True)
        config = json.loads((tmp_path / "output" / "config.json").read_text())
        assert config["id2label"]["0"] == first
        if first == "background":
            assert [config["id2label"][str(index)] for index in range(1001)] == google
    (tmp_path / "labels.txt").write_text((tmp_path / "labels.txt").read_text(), encoding="utf-8-sig")
    convert(str(small), tmp_path / "output", labels=str(tmp_path / "labels.txt"), compare=False, overwrite=True)
    assert json.loads((tmp_path / "output" / "config.json").read_text())["id2label"]["0"] == "class 0"
    for labels, part in (
        ("imagenet", "must hold a label for each of 1001 classes, got 1000"),
        ("nonsense", "nonsense: no labels: must be imagenet, imagenet-background, a file"),
        (str(small / "config.json"), "config.json: no labels"),
    ):
        assert_fails_without_a_trace(small, tmp_path / "other", part, labels=labels)


def test_recipe_and_size_are_options(small: Path, tmp_path: Path) -> None:
    convert(str(small), tmp_path / "output", recipe="torchvision", image_size=160, compare=False)
    processor = json.loads((tmp_path / "output" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 182}
    assert processor["crop_size"] == {"height": 160, "width": 160}
    assert processor["image_mean"] == [0.485, 0.456, 0.406]
    assert json.loads((tmp_path / "output" / "config.json").read_text())["image_size"] == 160
    with pytest.raises(ValueError, match=r"^recipe must be one of google, keras"):
        convert(str(small), tmp_path / "other", recipe="cake", compare=False)


def test_fused_from_the_start(small: Path, tmp_path: Path, cats: Path) -> None:
    comparisons = convert(str(small), tmp_path / "fused", fuse=True, compare_on=cats.parent)
    assert comparisons
    convert(str(small), tmp_path / "plain", compare=False)
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert len(plain) == 27 * 6 + 2  # 27 convolutions with weight and norm, whose counter is a tensor too
    assert len(fused) == 27 * 2 + 2
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["fused"] is True
    assert "convert without `--fuse`" in (tmp_path / "fused" / "README.md").read_text(encoding="utf-8")
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        ours, expected = (
            MobileNetForImageClassification.from_pretrained(tmp_path / name)(images).logits
            for name in ("fused", "plain")
        )
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_folding_and_unfolding_exclude_each_other(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^unfuse must be left out where fuse is set"):
        convert(str(small), tmp_path / "output", unfuse=True, fuse=True)
    assert not (tmp_path / "output").exists()


def test_unfolding_is_for_folded_networks(small: Path, tmp_path: Path) -> None:
    assert_fails_without_a_trace(small, tmp_path / "output", "--unfuse is for networks", unfuse=True)


def test_command_prints_the_comparison_and_errors_in_one_line(small: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["convert", str(small), str(tmp_path / "output")])
    assert done.exit_code == 0, done.output
    assert "MobileNetV1" in done.stdout
    assert "output is written." in done.stdout.replace("\n", "")
    again = CliRunner().invoke(app, ["convert", str(small), str(tmp_path / "output")])
    assert again.exit_code == 1
    assert again.stderr == f"Error: {tmp_path / 'output'} exists; --overwrite replaces it.\n"
    assert CliRunner().invoke(app, ["convert", str(small)]).exit_code == 2


def run_script(*arguments: object, **options: object) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.any_version
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(small: Path, tmp_path: Path, number: int) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    run = run_script(small, tmp_path / "output", env={**os.environ, "TMPDIR": str(scratch)})
    while not list(tmp_path.glob(".output.*/*/output/config.json")):  # it is at work
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.01)
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode not in (0, None)
    assert "Traceback" not in errors
    assert {path.name for path in tmp_path.iterdir()} == {"scratch", "small"}
    assert not list(scratch.iterdir())


@pytest.mark.any_version
def test_a_full_disk_leaves_nothing(small: Path, tmp_path: Path) -> None:
    def limit() -> None:
        # A file of more bytes fails to be written, as on a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    run = run_script(small, tmp_path / "output", "--no-compare", preexec_fn=limit)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1
    assert errors.startswith("Error: output cannot be written: ")
    assert errors.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"small"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process asks, without pauses between attempts."""
    with Hub() as hub:
        ask(hub.url, tmp_path / "cache", monkeypatch)
        yield hub


def test_hub_ids_are_fetched_and_its_errors_told(
    hub: Hub, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.publish("google/small", small)
    hub.publish("google/small", {"config.json": b"{}"})
    hub.publish("google/denied", small)
    hub.publish("google/ill", small)
    hub.publish("google/no-weights", {"config.json": (small / "config.json").read_bytes()})
    hub.faults += [Fault("google/denied", 401), Fault("google/ill", 403)]
    convert("google/small", tmp_path / "output", revision=commit, compare=False)
    card = (tmp_path / "output" / "README.md").read_text()
    assert f"[google/small](https://huggingface.co/google/small) at revision `{commit}`" in card
    assert "base_model: google/small" in card
    for source, revision, words in (
        ("google/small", "nowhere", "has no revision 'nowhere'"),
        ("google/small", None, "google/small: no known source"),
        ("google/none", None, "no such repository, or it is private"),
        ("google/denied", None, "google/denied: the Hub"),
        ("google/ill", None, "google/ill: the Hub"),
        ("google/no-weights", None, "does not hold model.safetensors nor pytorch_model.bin nor onnx/model.onnx"),
        ("no/such/thing", None, "no/such/thing: no such file or folder."),
    ):
        with pytest.raises(ConversionError, match=re.escape(words)):
            convert(source, tmp_path / "other", revision=revision, compare=False)
    ask("http://127.0.0.1:1", tmp_path / "cache", monkeypatch)
    with pytest.raises(ConversionError, match="the Hub does not answer"):
        convert("google/other", tmp_path / "other", compare=False)
    assert not (tmp_path / "other").exists()
