"""Export to other engines through transformers.exporters, each proved against torch before it is kept."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import io
import json
import logging as python_logging
import os
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import transformers
import typer
from huggingface_hub import ModelCard, ModelCardData
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from .architectures_mobilenet import ARCHITECTURES
from .classify import find, load_network
from .conversion.progress import status, track
from .conversion.proof import draw_pictures
from .convert_checkpoint import staged
from .text import clean, markdown


class Target(str, Enum):
    """Where the network shall run."""

    ONNX = "onnx"
    OPENVINO = "openvino"
    EXECUTORCH = "executorch"
    TRANSFORMERS_JS = "transformers.js"


class ExportError(ValueError):
    """A network that cannot be exported, or an export that does not answer as the network does."""


# Packages and the extra of ours that brings them.
_NEEDS = {
    Target.ONNX: (("onnx", "onnxruntime", "onnxscript"), "onnx"),
    Target.OPENVINO: (("openvino",), "openvino"),
    Target.EXECUTORCH: (("executorch",), "executorch"),
    Target.TRANSFORMERS_JS: (("onnx", "onnxruntime", "onnxscript"), "onnx"),
}
_NEEDS_FOR_INT8 = {Target.OPENVINO: "nncf", Target.EXECUTORCH: "torchao"}

# Largest difference of logits from torch's, over the largest logit, that float32 may show.
TOLERANCE = 1e-4
# Share of pictures on which an int8 or bfloat16 network must give torch's answer.
MIN_AGREEMENT = 0.9
# Pictures to calibrate int8 on, and pictures to compare on.
MAX_PICTURES = 150
# ExecuTorch plans its memory for the largest batch.
_EXECUTORCH_BATCH = 32


class Engine(NamedTuple):
    """An exported network, loaded back."""

    name: str
    run: Callable[[Tensor], Tensor]  # from pixel_values to logits
    is_exact: bool  # whether it computes in float32
    takes_any_size: bool


class Timed(NamedTuple):
    """Answers to pictures that came one by one."""

    logits: Tensor  # of shape (pictures, labels)
    milliseconds: float  # for one picture, the median


class Comparison(NamedTuple):
    """How an exported network answers, beside torch."""

    name: str
    pictures: int
    difference: float  # largest difference of logits
    agreement: float  # share of pictures with the same top-1
    milliseconds: float  # for one picture, the median
    torch_milliseconds: float

    COLUMNS = ("engine", "pictures", "difference", "same top-1", "ms", "torch, ms", "speed")

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of the table that is printed and written into the model card."""
        return (
            self.name,
            str(self.pictures),
            f"{self.difference:.1e}",
            f"{100 * self.agreement:.4g} %",
            f"{self.milliseconds:.1f}",
            f"{self.torch_milliseconds:.1f}",
            f"{self.torch_milliseconds / self.milliseconds:.1f}x",
        )


def export(
    source: str,
    output: str | os.PathLike,
    target: str = Target.ONNX,
    *,
    int8: bool = False,
    pictures: str | os.PathLike | None = None,
    revision: str | None = None,
    min_agreement: float = MIN_AGREEMENT,
    overwrite: bool = False,
) -> list[Comparison]:
    """Export a network, fused, with its labels and its image processor. Code that comes with it does not run.

    ONNX takes any batch, height and width; OpenVINO any batch; ExecuTorch a batch of up to 32. The result is loaded
    back and compared with torch; `transformers.exporters.ExportedModel.from_pretrained` loads it. transformers.js is
    given its own layout, with a float32 and an int8 network.

    Args:
        source: Folder or Hub id of a MobileNet.
        output: Folder to write. It appears complete or not at all.
        target: "onnx", "openvino", "executorch" or "transformers.js".
        int8: Whether to quantize weights (a scale for each channel) and activations to 8 bits.
        pictures: Folder of pictures such as the network will see. int8 is calibrated on half of them and compared with
            torch on the other half; transformers.js needs it too. Without int8 it may be left out: drawn pictures do.
        revision: Branch, tag or commit of a Hub id.
        min_agreement: Share of the pictures on which int8 and bfloat16 must give torch's answer.
        overwrite: Whether to replace a repository that exists.

    Returns:
        How what was written compares with torch.

    Raises:
        ImportError: transformers is too old, or the target's packages are missing.
        ExportError: An argument is not what it allows, or the result answers otherwise than torch.
        OSError: The source cannot be loaded.
    """
    try:
        target = Target(target)
    except ValueError:
        raise ExportError(f"target must be one of {', '.join(t.value for t in Target)}, got {target!r}.") from None
    quantizes = int8 or target is Target.TRANSFORMERS_JS
    if target is Target.TRANSFORMERS_JS and int8:
        raise ExportError("transformers.js is given a float32 and an int8 network in any case; leave out int8.")
    if quantizes and pictures is None:
        raise ExportError("int8 must be calibrated: name a folder of pictures such as the network will see.")
    check_installed(target, quantizes)
    with staged(Path(output), overwrite, source) as folder, tempfile.TemporaryDirectory() as scratch, _quiet():
        with status("loading"):
            network, processor = load_network(source, revision)
            network.fuse()
        paths = draw_pictures(Path(scratch)) if pictures is None else _pick(pictures, 2 if quantizes else 1)
        tensors = [processor(path, return_tensors="pt").pixel_values for path in track(paths, "reading")]
        if len(shapes := {tuple(tensor.shape[-2:]) for tensor in tensors}) > 1:
            raise ExportError(f"pictures must leave the image processor in one size, got {len(shapes)} sizes.")
        calibrate_on, compare_on = (tensors[0::2], tensors[1::2]) if quantizes else ([], tensors)
        exporter = _Exporter(network, processor, *shapes, calibrate_on)
        if target is Target.TRANSFORMERS_JS:
            engines = _write_transformers_js(exporter, folder)
        else:
            engines = _write(exporter, target, int8, folder)
        expected = _time(exporter.run, compare_on, "comparing torch")
        comparisons = [_compare(exporter, engine, compare_on, expected, min_agreement) for engine in engines]
        _card(source, target, exporter, comparisons).save(folder / "README.md")
    return comparisons


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
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise ImportError(f"{target.value} needs {', '.join(missing)}: pip install 'mobilenet[{extra}]'")


def _pick(folder: str | os.PathLike, parts: int) -> list[str]:
    """Pictures below a folder, evenly spread over it, no more than MAX_PICTURES for each part."""
    if not os.path.isdir(folder):
        raise ExportError(f"pictures must be a folder, got {os.fspath(folder)}.")
    found = [picture.name for picture in find([os.fspath(folder)]) if picture.error is None]
    if len(found) < parts:
        raise ExportError(f"pictures must be a folder of at least {parts} pictures, got {len(found)} in {folder}.")
    count = min(len(found), parts * MAX_PICTURES)
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


class _Exporter:
    """A fused network on its way through the exporters of transformers."""

    def __init__(
        self,
        network: PreTrainedModel,
        processor: BaseImageProcessor,
        size: tuple[int, int],
        calibrate_on: Sequence[Tensor],
    ) -> None:
        self.network = network
        self.config = network.config
        self.processor = processor
        self.size = size  # height and width of the pictures
        self.calibrate_on = calibrate_on

    @torch.inference_mode()
    def run(self, pixel_values: Tensor) -> Tensor:
        """Logits of torch."""
        return self.network(pixel_values).logits

    def export(self, target: Target, int8: bool) -> Any:
        """An ExportedModel of the fused network."""
        from transformers import exporters

        quantizer = self._quantizer(target) if int8 else None
        is_bounded = target is Target.EXECUTORCH
        batch = torch.export.Dim("batch", max=_EXECUTORCH_BATCH) if is_bounded else torch.export.Dim.DYNAMIC
        options = {"dynamic_shapes": {"pixel_values": {0: batch}}, "quantizer": quantizer}
        sample = {"pixel_values": torch.randn(2, self.config.num_channels, *self.size)}
        network = copy.deepcopy(self.network)  # an exporter may change it
        if target is Target.OPENVINO:
            return exporters.OpenVINOExporter().export(network, sample, exporters.OpenVINOConfig(**options))
        if target is Target.EXECUTORCH:
            return exporters.ExecutorchExporter().export(network, sample, exporters.ExecutorchConfig(**options))
        exported = exporters.OnnxExporter().export(network, sample, exporters.OnnxConfig(**options))
        _free_size(exported.program, self.config.padding == "same")
        return exported

    def _quantizer(self, target: Target) -> Any:
        """int8 with a scale for each channel of a weight and one for each activation, calibrated on the pictures."""
        calibration = [{"pixel_values": pixel_values} for pixel_values in self.calibrate_on]
        makers = {
            Target.ONNX: _onnx_quantizer,
            Target.OPENVINO: _openvino_quantizer,
            Target.EXECUTORCH: _pt2e_quantizer,
        }
        return makers[target](calibration)


# The stem and the first block see few channels, whose values lie far apart: in 8 bits they cost more answers than all
# that follows, and in float32 hardly any time.
_CONVOLUTIONS_IN_FLOAT = 3


def _onnx_quantizer(calibration: list[dict[str, Tensor]]) -> Any:
    from onnxruntime.quantization import QuantType
    from transformers.exporters import OnnxRuntimeQuantizer, OnnxRuntimeStaticConfig

    class Quantizer(OnnxRuntimeQuantizer):
        def quantize(self, model: Any, *args: Any) -> Any:
            convolutions = [node.name for node in model.graph if node.op_type == "Conv"]
            self.config.nodes_to_exclude = convolutions[:_CONVOLUTIONS_IN_FLOAT]
            return super().quantize(model, *args)

    # Unsigned activations with signed weights are what the instructions of x86 multiply.
    signs = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    return Quantizer(OnnxRuntimeStaticConfig(per_channel=True, **signs), calibration)


def _openvino_quantizer(calibration: list[dict[str, Tensor]]) -> Any:
    import nncf
    from transformers.exporters import NNCFOpenVINOQuantizer, NNCFQuantizationConfig

    class Quantizer(NNCFOpenVINOQuantizer):
        def quantize(self, model: Any, *args: Any) -> Any:
            kinds = ("Convolution", "GroupConvolution")
            operations = [op for op in model.get_ordered_ops() if op.get_type_name() in kinds]
            names = [operation.get_friendly_name() for operation in operations[:_CONVOLUTIONS_IN_FLOAT]]
            self.config.ignored_scope = nncf.IgnoredScope(names=names)
            return super().quantize(model, *args)

    # What an activation lets through is not symmetric about 0: "mixed" gives it a zero point of its own.
    preset = nncf.QuantizationPreset.MIXED
    return Quantizer(NNCFQuantizationConfig(preset=preset, subset_size=len(calibration)), calibration)


def _pt2e_quantizer(calibration: list[dict[str, Tensor]]) -> Any:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from torchao.quantization.pt2e import MinMaxObserver
    from transformers.exporters import PT2EQuantizer

    config = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True)
    # The histograms that it would collect take seconds a picture.
    activations = dataclasses.replace(
        config.input_activation, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-12)
    )
    config = dataclasses.replace(config, input_activation=activations, output_activation=activations)
    return PT2EQuantizer(xnnpack_quantizer.XNNPACKQuantizer().set_global(config), calibration)


def _free_size(graph_model: Any, pads_same: bool) -> None:
    """Let an ONNX graph, traced at one height and width, take any.

    ONNX has TensorFlow's SAME padding of its own, which runtimes compute from the picture at hand. Traced sizes would
    need an operator that pads before each strided convolution, at the price of a copy of its input.
    """
    from onnx_ir import AttrString, Shape
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    graph = graph_model.graph
    for node in graph:
        if node.op_type == "Conv" and pads_same and max(node.attributes["strides"].as_ints()) > 1:
            del node.attributes["pads"]
            node.attributes["auto_pad"] = AttrString("auto_pad", "SAME_UPPER")
        for value in node.outputs:
            value.shape = None
    (pixels,), (logits,) = graph.inputs, graph.outputs
    channels = pixels.shape[1]
    pixels.shape = Shape(["batch", channels, "height", "width"])
    logits.shape = Shape(["batch", "labels"])
    ClearMetadataAndDocStringPass()(graph_model)  # paths of this machine, among others


def _write(exporter: _Exporter, target: Target, int8: bool, folder: Path) -> list[Engine]:
    """Write what `ExportedModel.from_pretrained` and `mobilenet classify` read, and load it back."""
    from transformers.exporters import ExportedModel

    with status(f"exporting to {target.value}"):
        exported = exporter.export(target, int8)
        try:
            exported.save_pretrained(folder)
        except RuntimeError as error:  # OpenVINO's word for a disk that is full or forbidden
            raise ExportError(f"{folder.name} cannot be written: {error}") from error
        exporter.processor.save_pretrained(folder)

    def load(**options: Any) -> Callable[[Tensor], Tensor]:
        exported = ExportedModel.from_pretrained(folder, **options)
        return lambda pixel_values: exported(pixel_values=pixel_values).logits

    kind = "int8" if int8 else "float32"
    if target is Target.ONNX:
        return [Engine(f"ONNX Runtime, {kind}", load(), not int8, True)]
    if target is Target.EXECUTORCH:
        return [Engine(f"ExecuTorch, {kind}", load(), not int8, False)]
    # OpenVINO computes in the precision that the processor is fastest in, unless it is told.
    name = "OpenVINO, int8" if int8 else "OpenVINO"
    in_float32 = load(device="cpu", config={"INFERENCE_PRECISION_HINT": "f32"})
    return [
        Engine(f"{name}, computing in float32", in_float32, not int8, False),
        Engine(f"{name}, as it loads", load(), False, False),
    ]


def _write_transformers_js(exporter: _Exporter, folder: Path) -> list[Engine]:
    """Write what transformers.js reads: names of the classes it knows, each network in one file of its own."""
    import onnx_ir
    from onnxruntime import InferenceSession

    config = exporter.config
    name = ARCHITECTURES[config.architecture].native
    native = AutoConfig.for_model(
        config.architecture,
        architectures=[f"{name}ForImageClassification"],
        **{name: getattr(config, name) for name in ("image_size", "num_channels", "id2label", "label2id")},
        depth_multiplier=config.width_multiplier,
    )
    native.save_pretrained(folder)
    options = exporter.processor.to_dict()
    options.pop("auto_map", None)
    options["image_processor_type"] = f"{name}ImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    (folder / "onnx").mkdir()

    def load(path: Path) -> Callable[[Tensor], Tensor]:
        session = InferenceSession(path)
        return lambda pixel_values: torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])

    engines = []
    for name, int8 in (("model.onnx", False), ("model_quantized.onnx", True)):
        with status(f"exporting onnx/{name}"):
            onnx_ir.save(exporter.export(Target.ONNX, int8).program, folder / "onnx" / name)
        kind = "int8" if int8 else "float32"
        engines.append(Engine(f"onnx/{name}, {kind}", load(folder / "onnx" / name), not int8, True))
    return engines


def _compare(
    exporter: _Exporter, engine: Engine, pictures: Sequence[Tensor], expected: Timed, min_agreement: float
) -> Comparison:
    """Hold an export against torch: picture by picture, in a batch, and at another size.

    Raises:
        ExportError: They do not answer alike.
    """
    channels, (height, width) = exporter.config.num_channels, exporter.size
    shapes = [(3, channels, height, width)]
    if engine.takes_any_size:
        shapes.append((2, channels, height + 31, max(33, width - 32)))
    for shape in shapes:
        pixel_values = torch.randn(shape)
        _check(engine, engine.run(pixel_values), exporter.run(pixel_values))
    answers = _time(engine.run, pictures, f"comparing {engine.name}")
    _check(engine, answers.logits, expected.logits)
    agreement = (answers.logits.argmax(-1) == expected.logits.argmax(-1)).double().mean().item()
    if not engine.is_exact and agreement < min_agreement:
        raise ExportError(
            f"{engine.name} gives torch's answer on {100 * agreement:.3g} % of {len(pictures)} pictures, "
            f"{100 * min_agreement:.3g} % are asked for; nothing was written."
        )
    difference = (answers.logits - expected.logits).abs().max().item()
    times = answers.milliseconds, expected.milliseconds
    return Comparison(engine.name, len(pictures), difference, agreement, *times)


def _check(engine: Engine, logits: Tensor, expected: Tensor) -> None:
    if logits.shape != expected.shape or not logits.isfinite().all():
        raise ExportError(
            f"{engine.name} must give finite logits of shape {tuple(expected.shape)}, got {tuple(logits.shape)}; "
            "nothing was written."
        )
    allowed = TOLERANCE * max(1, expected.abs().max().item())
    difference = (logits - expected).abs().max().item()
    if engine.is_exact and difference > allowed:
        raise ExportError(
            f"{engine.name} answers otherwise than torch: logits differ by {difference:.3g}, {allowed:.3g} is "
            "allowed; nothing was written."
        )


def _time(run: Callable[[Tensor], Tensor], pictures: Sequence[Tensor], description: str) -> Timed:
    """Run pictures of shape (1, C, H, W) one by one."""
    run(pictures[0])  # the first call allocates
    logits, seconds = [], []
    for pixel_values in track(pictures, description):
        start = time.perf_counter()
        logits.append(run(pixel_values))
        seconds.append(time.perf_counter() - start)
    return Timed(torch.cat(logits), 1000 * statistics.median(seconds))


def _card(source: str, target: Target, exporter: _Exporter, comparisons: Sequence[Comparison]) -> ModelCard:
    """Describe an exported network."""
    config = exporter.config
    is_js = target is Target.TRANSFORMERS_JS
    data = ModelCardData(
        library_name="transformers.js" if is_js else "transformers",
        pipeline_tag="image-classification",
        tags=["vision", "mobilenet", *([] if is_js else [target.value])],
        base_model=None if os.path.isdir(source) else source,
    )
    lines = [Comparison.COLUMNS, ["---"] * len(Comparison.COLUMNS), *(row.cells for row in comparisons)]
    height, width = exporter.size
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n"
        f"# {ARCHITECTURES[config.architecture].title} for {target.value}\n\n"
        f"Width {config.width_multiplier:g}, {config.num_labels} classes, batch norm folded, exported at "
        f"{height}x{width} pixels from {markdown(Path(source).name if os.path.isdir(source) else source)}.\n\n"
        + (_USE_JS if is_js else _USE)
        + "\n\n## Beside torch\n\nThe largest difference of logits, and the median time of one picture.\n\n"
        + "\n".join(f"| {' | '.join(line)} |" for line in lines)
        + "\n"
    )


_USE = """```python
import mobilenet  # the installed package: knows the configuration and the image processor
from transformers import AutoImageProcessor, pipeline
from transformers.exporters import ExportedModel

folder = "path/to/this/repository"
model = ExportedModel.from_pretrained(folder)
classify = pipeline(
    "image-classification", model=model, image_processor=mobilenet.MobileNetImageProcessor.from_pretrained(folder)
)
classify("photo.jpg")
```"""

_USE_JS = """```js
import { pipeline } from "@huggingface/transformers";

const classify = await pipeline("image-classification", "owner/this-repository", { dtype: "q8" });
await classify("photo.jpg");
```

`dtype: "q8"` is `onnx/model_quantized.onnx`, what browsers load by default; `dtype: "fp32"` is `onnx/model.onnx`."""


def command(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a MobileNet.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    target: Annotated[Target, typer.Option("--target", "-t", help="Where the network shall run.")] = Target.ONNX,
    int8: Annotated[bool, typer.Option("--int8", help="Quantize weights and activations to 8 bits.")] = False,
    pictures: Annotated[
        Path | None,
        typer.Option(
            help="Folder of pictures such as the network will see, to calibrate int8 on and to compare on.",
            show_default=False,
        ),
    ] = None,
    min_agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Share of pictures on which int8 and bfloat16 must answer as torch.")
    ] = MIN_AGREEMENT,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a repository that exists.")] = False,
) -> None:
    """Write a network for another engine, and prove that it answers as torch does. No code of the source is run."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # temporary folders are removed on the way out
    comparisons = export(
        source,
        output,
        target,
        int8=int8,
        pictures=pictures,
        min_agreement=min_agreement,
        revision=revision,
        overwrite=overwrite,
    )
    console = Console()
    table = Table(*Comparison.COLUMNS, caption="difference: largest of logits; ms: one picture, the median")
    for comparison in comparisons:
        table.add_row(*comparison.cells)
    console.print(table)
    console.print(clean(f"{output} is written."), highlight=False, markup=False, soft_wrap=True)
