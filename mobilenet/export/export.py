"""Export to other engines through transformers.exporters, each compared with torch before it is kept."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging as python_logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.utils import logging

from mobilenet.architectures_mobilenet import ARCHITECTURES
from mobilenet.cards import export_card
from mobilenet.find_images import find
from mobilenet.loading import Files, loading, onnx_session, read_config
from mobilenet.preprocessing_mobilenet import OPTIONS, read_options
from mobilenet.pretrained import load_network
from mobilenet.progress import status, track
from mobilenet.repository import staged, write_json
from mobilenet.require import require
from mobilenet.synthetic import draw_images
from mobilenet.tasks import CLASSIFICATION, DETECTION, SEGMENTATION, Task, task_of

from . import MIN_AGREEMENT, Target
from .compare import Comparison, Engine, ExportError, Outputs, compare, measure
from .exporter import Exporter
from .suppression import OUTPUT, suppress_in_graph


# Packages and the extra of ours that brings them.
_NEEDS = {
    Target.ONNX: (("onnx", "onnxruntime", "onnxscript"), "onnx"),
    Target.OPENVINO: (("openvino",), "openvino"),
    Target.EXECUTORCH: (("executorch",), "executorch"),
    Target.TRANSFORMERS_JS: (("onnx", "onnxruntime", "onnxscript"), "onnx"),
}
_NEEDS_FOR_INT8 = {Target.OPENVINO: "nncf", Target.EXECUTORCH: "torchao"}
# Images to calibrate int8 on, and images to compare on.
MAX_IMAGES = 150


def export(
    source: str,
    output: str | os.PathLike,
    target: str = Target.ONNX,
    *,
    int8: bool = False,
    images: str | os.PathLike | None = None,
    revision: str | None = None,
    min_agreement: float = MIN_AGREEMENT,
    nms: bool = False,
    overwrite: bool = False,
) -> list[Comparison]:
    """Export a network, fused, with its labels and its image processor. Code that comes with it does not run.

    ONNX takes any batch, height and width, but of a detector, whose anchors are made for one size; OpenVINO any
    batch; ExecuTorch a batch of up to 32. The result is loaded back and compared with torch;
    `transformers.exporters.ExportedModel.from_pretrained` loads it. transformers.js is given its own layout, with a
    float32 and an int8 network, of classifiers alone.

    Args:
        source: Folder or Hub id of a MobileNet.
        output: Folder to write. It appears complete or not at all.
        target: "onnx", "openvino", "executorch" or "transformers.js".
        int8: Whether to quantize weights (a scale for each channel) and activations to 8 bits.
        images: Folder of images such as the network will see. int8 is calibrated on half of them and compared with
            torch on the other half; transformers.js needs it too. Without int8 it may be left out: drawn images do.
        revision: Branch, tag or commit of a Hub id.
        min_agreement: Share of the images on which int8 and bfloat16 must give torch's prediction; of a segmenter, of
            pixels, and of a detector, of objects.
        nms: Whether a detector's ONNX graph suppresses overlapping boxes itself.
        overwrite: Whether to replace a repository that exists.

    Returns:
        How what was written compares with torch.

    Raises:
        ImportError: transformers is too old, or the target's packages are missing.
        ExportError: An argument is not what it allows, or the result predicts otherwise than torch.
        OSError: The source cannot be loaded.
    """
    try:
        target = Target(target)
    except ValueError:
        raise ExportError(f"target must be one of {', '.join(t.value for t in Target)}, got {target!r}.") from None
    if nms and target is not Target.ONNX:
        raise ExportError(f"nms must be left out for {target.value}: ONNX alone has the operator.")
    quantizes = int8 or target is Target.TRANSFORMERS_JS
    if target is Target.TRANSFORMERS_JS and int8:
        raise ExportError("transformers.js is given a float32 and an int8 network in any case; leave out int8.")
    if quantizes and images is None:
        raise ExportError("int8 must be calibrated: name a folder of images such as the network will see.")
    check_installed(target, quantizes)
    with staged(Path(output), overwrite, source) as folder, tempfile.TemporaryDirectory() as scratch, _quiet():
        with status("loading"):
            task = _find_task(source, revision, target, nms)
            network, processor = load_network(source, revision, task=task)
            network.fuse()
        paths = draw_images(Path(scratch)) if images is None else _pick(images, 2 if quantizes else 1)
        tensors = [processor(path, return_tensors="pt").pixel_values for path in track(paths, "reading")]
        shapes = list(dict.fromkeys(tuple(tensor.shape[-2:]) for tensor in tensors))
        if len(shapes) > 1 and not (task is SEGMENTATION and target is Target.ONNX):
            raise ExportError(f"images must leave the image processor in one size, got {len(shapes)} sizes.")
        calibrate_on, compare_on = (tensors[0::2], tensors[1::2]) if quantizes else ([], tensors)
        exporter = Exporter(network, processor, shapes[0], calibrate_on, task)
        if target is Target.TRANSFORMERS_JS:
            engines = write_transformers_js(exporter, folder)
        else:
            engines = write(exporter, target, int8, folder, **({"nms": True} if nms else {}))
        expected = measure(exporter.run, compare_on, "comparing torch")
        options = _options(processor)
        comparisons = [
            compare(engine, exporter.run, compare_on, expected, min_agreement, task, options) for engine in engines
        ]
        columns = comparisons[0].columns
        card = export_card(source, target.value, exporter.config, exporter.size, columns, comparisons, task)
        card.save(folder / "README.md")
    return comparisons


def _find_task(source: str, revision: str | None, target: Target, nms: bool) -> Task:
    """What a network is for.

    Raises:
        ExportError: The target or an option is not for such a network.
    """
    with loading(source):
        task = task_of(read_config(Files(source, revision)))
    if task is not CLASSIFICATION and target is Target.TRANSFORMERS_JS:
        raise ExportError(f"target must be onnx, openvino or executorch for {task.kind}, got {target.value}.")
    if nms and task is not DETECTION:
        raise ExportError(f"nms must be left out for {task.kind}.")
    return task


def check_installed(target: Target, quantizes: bool) -> None:
    """Raise ImportError, with what to install, where a target cannot be exported to."""
    try:
        importlib.import_module("transformers.exporters")
    except ImportError as error:
        raise ImportError(
            "export needs transformers.exporters, which transformers 5.23 has and transformers "
            f"{transformers.__version__} has not: pip install 'transformers>=5.23'"
        ) from error
    packages, extra = _NEEDS[target]
    if quantizes and target in _NEEDS_FOR_INT8:
        packages = (*packages, _NEEDS_FOR_INT8[target])
    require(*packages, extra=extra, purpose=target.value)


def _pick(folder: str | os.PathLike, parts: int) -> list[str]:
    """Images below a folder, evenly spread over it, no more than MAX_IMAGES for each part."""
    if not os.path.isdir(folder):
        raise ExportError(f"images must be a folder, got {os.fspath(folder)}.")
    found = [image.name for image in find([os.fspath(folder)]) if image.error is None]
    if len(found) < parts:
        raise ExportError(f"images must be a folder of at least {parts} images, got {len(found)} in {folder}.")
    count = min(len(found), parts * MAX_IMAGES)
    return [found[index * len(found) // count] for index in range(count)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves what exporters print, log and warn of: versions, progress and advice for their developers."""
    verbosity, level = logging.get_verbosity(), python_logging.root.manager.disable
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    python_logging.disable(python_logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        python_logging.disable(level)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _options(processor: Any) -> dict[str, Any]:
    """All options of an image processor."""
    return read_options({name: getattr(processor, name) for name in OPTIONS})


def write(exporter: Exporter, target: Target, int8: bool, folder: Path, nms: bool = False) -> list[Engine]:
    """Write what `ExportedModel.from_pretrained` and `mobilenet classify` read, and load it back."""
    from transformers.exporters import ExportedModel

    with status(f"exporting to {target.value}"):
        exported = exporter.export(target, int8)
        outputs = exporter.task.outputs
        if nms:
            suppress_in_graph(exported, _options(exporter.processor))
            outputs = (OUTPUT,)
        try:
            exported.save_pretrained(folder)
        except RuntimeError as error:  # OpenVINO's word for a disk that is full or forbidden
            raise ExportError(f"{folder.name} cannot be written: {error}") from error
        exporter.processor.save_pretrained(folder)

    manifest = folder / "export.json"
    about = {"task": exporter.task.name, "outputs": outputs}
    write_json(manifest, {**json.loads(manifest.read_text(encoding="utf-8")), **about})

    def load(**options: Any) -> Callable[[Tensor], Outputs]:
        exported = ExportedModel.from_pretrained(folder, **options)

        def run(pixel_values: Tensor) -> Outputs:
            found = exported(pixel_values=pixel_values)
            return tuple(found[name] for name in outputs)

        return run

    kind = "int8" if int8 else "float32"
    if target is Target.ONNX:
        return [Engine(f"ONNX Runtime, {kind}", load(), not int8, exporter.task is not DETECTION, nms)]
    if target is Target.EXECUTORCH:
        return [Engine(f"ExecuTorch, {kind}", load(), not int8, False)]
    # OpenVINO computes in the precision that the processor is fastest in, unless it is told.
    name = "OpenVINO, int8" if int8 else "OpenVINO"
    in_float32 = load(device="cpu", config={"INFERENCE_PRECISION_HINT": "f32"})
    return [
        Engine(f"{name}, computing in float32", in_float32, not int8, False),
        Engine(f"{name}, as it loads", load(), False, False),
    ]


def write_transformers_js(exporter: Exporter, folder: Path) -> list[Engine]:
    """Write what transformers.js reads: names of the classes it knows, each network in one file of its own."""
    import onnx_ir

    config = exporter.config
    name = ARCHITECTURES[config.architecture].native
    fields = {
        "model_type": name.replace("MobileNetV", "mobilenet_v"),
        "architectures": [f"{name}ForImageClassification"],
        **{field: getattr(config, field) for field in ("image_size", "num_channels", "id2label", "label2id")},
        "depth_multiplier": config.width_multiplier,
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    options = exporter.processor.to_dict()
    options.pop("auto_map", None)
    options["image_processor_type"] = f"{name}ImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    (folder / "onnx").mkdir()

    def load(path: Path) -> Callable[[Tensor], Outputs]:
        session = onnx_session(path, torch.get_num_threads())
        return lambda pixel_values: (torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0]),)

    engines = []
    for name, int8 in (("model.onnx", False), ("model_quantized.onnx", True)):
        with status(f"exporting onnx/{name}"):
            onnx_ir.save(exporter.export(Target.ONNX, int8).program, folder / "onnx" / name)
        kind = "int8" if int8 else "float32"
        engines.append(Engine(f"{name}, {kind}", load(folder / "onnx" / name), not int8, True))
    return engines
