"""What is measured, ours and every peer's. Each subject lives in a process of its own, and answers on a pipe.

A subject is a function of the setup that loads what it needs and returns `prepare`; `prepare` takes what a measurement
varies (batch, size, ...) and returns what is timed: a function without arguments.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peers import import_timm, import_torchvision
from PIL import Image
from torch import Tensor


class Setup(NamedTuple):
    """Where a subject finds what it runs."""

    model: str  # folder of ours
    native: str  # folder of transformers' own class, with the same weights
    exports: str  # folder of folders: onnx, onnx_int8, openvino, openvino_int8
    images: str  # folder of photographs
    large_images: str  # folder of photographs of 12 megapixels
    tflite: str | None  # a quantized network for LiteRT
    threads: int
    detector: str | None = None  # folder of ours that detects
    detector_tflite: str | None = None  # the file that it was converted from
    segmenter_tflite: str | None = None  # a quantized DeepLab V3 of 513 pixels


Timed = Callable[[], Any]
Prepare = Callable[..., Timed]
SUBJECTS: dict[str, Callable[[Setup], Prepare]] = {}


def subject(name: str) -> Callable[[Callable[[Setup], Prepare]], Callable[[Setup], Prepare]]:
    """Enter a subject under its name in the results."""

    def enter(function: Callable[[Setup], Prepare]) -> Callable[[Setup], Prepare]:
        SUBJECTS[name] = function
        return function

    return enter


# --- The network alone -------------------------------------------------------------------------------------------


def _in_eager(model: torch.nn.Module, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Prepare:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def prepare(batch: int, size: int) -> Timed:
        images = torch.randn(batch, 3, size, size).to(dtype, memory_format=layout)

        @torch.inference_mode()
        def run() -> None:
            model(images)

        return run

    return prepare


def _native(setup: Setup) -> torch.nn.Module:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(setup.native, trust_remote_code=False).eval()


def _timm() -> torch.nn.Module:
    return import_timm().create_model("mobilenetv2_100", num_classes=1001).eval()


def _ours(setup: Setup) -> Any:
    from mobilenet import MobileNetForImageClassification

    return MobileNetForImageClassification.from_pretrained(setup.model).eval()


@subject("transformers")
def _(setup: Setup) -> Prepare:
    return _in_eager(_native(setup))


@subject("timm, channels last")
def _(setup: Setup) -> Prepare:
    return _in_eager(_timm().to(memory_format=torch.channels_last), channels_last=True)


@subject("ours")
def _(setup: Setup) -> Prepare:
    return _in_eager(_ours(setup))


@subject("ours, fused")
def _(setup: Setup) -> Prepare:
    return _in_eager(_ours(setup).fuse())


@subject("ours, fused, bfloat16")
def _(setup: Setup) -> Prepare:
    return _in_eager(_ours(setup).fuse().to(torch.bfloat16), torch.bfloat16)


@subject("ours, fused, torch.compile")
def _(setup: Setup) -> Prepare:
    import torch._inductor.config as inductor

    inductor.freezing = True  # weights as constants, in the layout that the kernels like
    return _in_eager(torch.compile(_ours(setup).fuse()))


def _in_onnxruntime(path: str | os.PathLike, setup: Setup) -> Prepare:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setup.threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())

    def prepare(batch: int, size: int) -> Timed:
        feed = {name: torch.randn(batch, 3, size, size).numpy()}
        return lambda: session.run(None, feed)

    return prepare


@subject("timm, its own export, ONNX Runtime")
def _(setup: Setup) -> Prepare:
    model = _timm()
    from timm.utils.onnx import onnx_export

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "timm.onnx")
        # Its own defaults, but for a dynamic batch, which the measurements need.
        onnx_export(model, str(path), batch_size=2, input_size=(3, 224, 224), dynamic_size=True)
        return _in_onnxruntime(path, setup)


@subject("ours, ONNX Runtime")
def _(setup: Setup) -> Prepare:
    return _in_onnxruntime(Path(setup.exports, "onnx", "model.onnx"), setup)


@subject("ours, ONNX Runtime, int8")
def _(setup: Setup) -> Prepare:
    return _in_onnxruntime(Path(setup.exports, "onnx_int8", "model.onnx"), setup)


def _in_openvino(folder: str, setup: Setup, **properties: str) -> Prepare:
    import openvino

    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": setup.threads, **properties}
    program = Path(setup.exports, folder, "openvino_model.xml")
    request = openvino.Core().compile_model(program, "CPU", properties).create_infer_request()

    def prepare(batch: int, size: int) -> Timed:
        feed = torch.randn(batch, 3, size, size).numpy()
        return lambda: request.infer([feed], share_inputs=True, share_outputs=True)

    return prepare


@subject("ours, OpenVINO, float32")
def _(setup: Setup) -> Prepare:
    return _in_openvino("openvino", setup, INFERENCE_PRECISION_HINT="f32")


@subject("ours, OpenVINO, bfloat16")
def _(setup: Setup) -> Prepare:
    return _in_openvino("openvino", setup, INFERENCE_PRECISION_HINT="bf16")


@subject("ours, OpenVINO, int8")
def _(setup: Setup) -> Prepare:
    return _in_openvino("openvino_int8", setup)


def _in_litert(path: str | None, option: str, setup: Setup) -> Prepare:
    from ai_edge_litert.interpreter import Interpreter

    if path is None:
        raise ImportError(f"no {option} network")
    interpreter = Interpreter(path, num_threads=setup.threads)
    (given,) = interpreter.get_input_details()

    def prepare(batch: int, size: int) -> Timed:
        if list(given["shape"]) != [batch, size, size, 3]:
            interpreter.resize_tensor_input(given["index"], (batch, size, size, 3))
        interpreter.allocate_tensors()
        interpreter.set_tensor(given["index"], torch.randint(256, (batch, size, size, 3), dtype=torch.uint8).numpy())
        return interpreter.invoke

    return prepare


@subject("LiteRT, int8")
def _(setup: Setup) -> Prepare:
    return _in_litert(setup.tflite, "--tflite", setup)


# --- Segmenters, from an image to logits; LiteRT's file goes on to the label of each pixel -------------------------


def _native_segmenter() -> torch.nn.Module:
    """DeepLab V3 on MobileNet V2 1.0 at output stride 8, of random weights."""
    from transformers import MobileNetV2Config, MobileNetV2ForSemanticSegmentation

    torch.manual_seed(0)
    return MobileNetV2ForSemanticSegmentation(MobileNetV2Config(image_size=513, output_stride=8, num_labels=21)).eval()


@contextlib.contextmanager
def _our_segmenter(tflite: str | None = None) -> Iterator[Path]:
    """A folder of ours: converted from a TFLite file, or from transformers' own."""
    from mobilenet.conversion.convert import convert

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        if tflite is None:
            _native_segmenter().save_pretrained(Path(folder, "native"))
        convert(tflite or str(Path(folder, "native")), Path(folder, "ours"), compare=False)
        yield Path(folder, "ours")


@subject("transformers, segmenter")
def _(setup: Setup) -> Prepare:
    return _in_eager(_native_segmenter())


@subject("LiteRT, segmenter of width 0.5, int8")
def _(setup: Setup) -> Prepare:
    return _in_litert(setup.segmenter_tflite, "--segmenter-tflite", setup)


def _segmenters(of_file: bool) -> dict[str, Callable[[Setup], Prepare]]:
    """Subjects by their names: of a TFLite file, or of the same weights as transformers' own."""

    def folder(setup: Setup) -> contextlib.AbstractContextManager[Path]:
        if of_file and setup.segmenter_tflite is None:
            raise ImportError("no --segmenter-tflite network")
        return _our_segmenter(setup.segmenter_tflite if of_file else None)

    def load(setup: Setup) -> Any:
        from mobilenet import MobileNetForSemanticSegmentation

        with folder(setup) as ours:
            return MobileNetForSemanticSegmentation.from_pretrained(ours).eval()

    def exported(setup: Setup) -> Prepare:
        from mobilenet.export.export import export

        with folder(setup) as ours:
            export(str(ours), ours.with_name("onnx"))
            return _in_onnxruntime(ours.with_name("onnx") / "model.onnx", setup)

    name = "ours, segmenter of width 0.5" if of_file else "ours, segmenter"
    return {
        name: lambda setup: _in_eager(load(setup)),
        f"{name}, fused": lambda setup: _in_eager(load(setup).fuse()),
        f"{name}, ONNX Runtime": exported,
    }


SUBJECTS |= _segmenters(of_file=False) | _segmenters(of_file=True)


# --- V3 and V4 alone, of random weights: by preset, timm's name and size ------------------------------------------

FAMILY = {
    "V3 large": ("mobilenet_v3_large_1.0_224", "mobilenetv3_large_100"),
    "V4 conv medium": ("mobilenet_v4_conv_medium_256", "mobilenetv4_conv_medium"),
}


def _family(network: str, preset: str, name: str) -> dict[str, Callable[[Setup], Prepare]]:
    """The subjects of a network, by their names."""

    def theirs() -> torch.nn.Module:
        return import_timm().create_model(name, num_classes=1000).eval()

    def ours(setup: Setup) -> Any:
        from mobilenet import MobileNetConfig, MobileNetForImageClassification

        return MobileNetForImageClassification(MobileNetConfig.from_preset(preset)).eval()

    def their_export(setup: Setup) -> Prepare:
        model = theirs()
        from timm.utils.onnx import onnx_export

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "timm.onnx")
            onnx_export(model, str(path), batch_size=2, input_size=(3, 224, 224), dynamic_size=True)
            return _in_onnxruntime(path, setup)

    def our_export(setup: Setup) -> Prepare:
        from mobilenet import MobileNetImageProcessor
        from mobilenet.export.export import export

        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            ours(setup).save_pretrained(Path(folder, "model"))
            MobileNetImageProcessor().save_pretrained(Path(folder, "model"))
            export(str(Path(folder, "model")), Path(folder, "onnx"))
            return _in_onnxruntime(Path(folder, "onnx", "model.onnx"), setup)

    last = torch.channels_last
    found = {
        "timm, channels last": lambda setup: _in_eager(theirs().to(memory_format=last), channels_last=True),
        "timm": lambda setup: _in_eager(theirs()),
        "ours": lambda setup: _in_eager(ours(setup)),
        "ours, fused": lambda setup: _in_eager(ours(setup).fuse()),
        "ours, fused, bfloat16": lambda setup: _in_eager(ours(setup).fuse().to(torch.bfloat16), torch.bfloat16),
        "timm, its own export, ONNX Runtime": their_export,
        "ours, ONNX Runtime": our_export,
    }
    return {f"{network}: {subject}": load for subject, load in found.items()}


for _network, _names in FAMILY.items():
    SUBJECTS |= _family(_network, *_names)


# --- The image processor alone -----------------------------------------------------------------------------------


def _processing(processor: Any, setup: Setup) -> Prepare:
    def prepare(source: str, count: int) -> Timed:
        folder = setup.large_images if source == "large files" else setup.images
        files = [str(path) for path in sorted(Path(folder).iterdir()) if path.suffix.lower() in (".jpeg", ".jpg")]
        if source == "decoded":
            images = map(Image.open, files)
            # The most frequent size among ImageNet's photographs.
            given = list(itertools.islice((p for p in images if p.size == (500, 375) and p.mode == "RGB"), count))
            for image in given:
                image.load()
        else:
            given = files[:count]
        return lambda: processor(given)

    return prepare


@subject("transformers, processor")
def _(setup: Setup) -> Prepare:
    import transformers

    # The Pillow processor got a name of its own in version 5.5.
    name = "MobileNetV2ImageProcessorPil"
    native = getattr(transformers, name if hasattr(transformers, name) else "MobileNetV2ImageProcessor")
    processor = native.from_pretrained(setup.native)

    def process(images: list[Any]) -> Any:
        images = [p if isinstance(p, Image.Image) else Image.open(p).convert("RGB") for p in images]
        return processor(images, return_tensors="pt")

    return _processing(process, setup)


def _our_processor(setup: Setup, **options: Any) -> Prepare:
    from mobilenet import MobileNetImageProcessor

    processor = MobileNetImageProcessor.from_pretrained(setup.model, **options)
    return _processing(lambda images: processor(images, return_tensors="pt"), setup)


@subject("ours, processor")
def _(setup: Setup) -> Prepare:
    return _our_processor(setup)


@subject("ours, processor, fast_decode")
def _(setup: Setup) -> Prepare:
    return _our_processor(setup, fast_decode=True)


# --- From files to labels ----------------------------------------------------------------------------------------


def _files(setup: Setup, count: int) -> list[str]:
    files = sorted(str(path) for path in Path(setup.images).iterdir() if path.suffix == ".JPEG")
    return list(itertools.islice(itertools.cycle(files), count))


def _pipeline(model: str, setup: Setup, **options: Any) -> Prepare:
    from transformers import pipeline

    classify = pipeline("image-classification", model=model, trust_remote_code=False, device="cpu", **options)

    def prepare(batch: int, count: int) -> Timed:
        files = _files(setup, count)
        return lambda: [best["label"] for (best,) in classify(files, batch_size=batch, top_k=1)]

    return prepare


@subject("transformers, pipeline")
def _(setup: Setup) -> Prepare:
    return _pipeline(setup.native, setup)


@subject("ours, pipeline")
def _(setup: Setup) -> Prepare:
    import mobilenet  # noqa: F401  (it registers the code that the model needs)

    return _pipeline(setup.model, setup)


def _classify(model: str | Path, setup: Setup, engine: str) -> Prepare:
    from mobilenet.classify import run as classify
    from mobilenet.loading import load
    from mobilenet.output import Layout

    classifier = load(str(model), engine=engine)

    def prepare(batch: int, count: int) -> Timed:
        files = _files(setup, count)

        def run() -> list[str]:
            # All that the command does, but for starting Python; it prints a line of JSON for each image.
            with contextlib.redirect_stdout(io.StringIO()) as out:
                classify(files, classifier, layout=Layout.JSON, top_k=1, batch_size=batch)
            return [json.loads(line)["predictions"][0]["label"] for line in out.getvalue().splitlines()]

        return run

    return prepare


@subject("mobilenet classify, torch")
def _(setup: Setup) -> Prepare:
    return _classify(setup.model, setup, "torch")


for _engine in ("onnx", "openvino"):
    for _folder, _bits in ((_engine, ""), (f"{_engine}_int8", ", int8")):
        SUBJECTS[f"mobilenet classify, {_engine}{_bits}"] = lambda setup, engine=_engine, folder=_folder: _classify(
            Path(setup.exports, folder), setup, engine
        )


# --- From files to boxes -----------------------------------------------------------------------------------------


THRESHOLD = 0.5  # of what is detected


def _required(path: str | None, option: str) -> str:
    if path is None:
        raise ImportError(f"no {option}")
    return path


@subject("LiteRT, detector")
def _(setup: Setup) -> Prepare:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(_required(setup.detector_tflite, "--detector-tflite"), num_threads=setup.threads)
    interpreter.allocate_tensors()
    (given,), results = interpreter.get_input_details(), interpreter.get_output_details()
    _, height, width, _ = given["shape"]

    def detect(path: str) -> int:
        with Image.open(path) as image:
            pixels = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        interpreter.set_tensor(
            given["index"],
            torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8).reshape(1, height, width, 3).numpy(),
        )
        interpreter.invoke()
        _, _, scores, _ = (interpreter.get_tensor(result["index"]) for result in results)  # boxes, classes, ..., count
        return int((scores > THRESHOLD).sum())

    def prepare(batch: int, count: int) -> Timed:
        files = _files(setup, count)
        return lambda: [detect(path) for path in files]

    return prepare


def _detecting(model: torch.nn.Module, processor: Any, setup: Setup) -> Prepare:
    @torch.inference_mode()
    def detect(paths: list[str]) -> list[int]:
        found = model(processor(paths, return_tensors="pt").pixel_values)
        return [len(each["scores"]) for each in processor.post_process_object_detection(found, THRESHOLD)]

    def prepare(batch: int, count: int) -> Timed:
        files = _files(setup, count)
        return lambda: [found for start in range(0, count, batch) for found in detect(files[start : start + batch])]

    return prepare


def _our_detector(setup: Setup, fused: bool) -> Prepare:
    from mobilenet import MobileNetForObjectDetection, MobileNetImageProcessor

    folder = _required(setup.detector, "--detector")
    model = MobileNetForObjectDetection.from_pretrained(folder).eval()
    return _detecting(model.fuse() if fused else model, MobileNetImageProcessor.from_pretrained(folder), setup)


@subject("ours, detector")
def _(setup: Setup) -> Prepare:
    return _our_detector(setup, fused=False)


@subject("ours, detector, fused")
def _(setup: Setup) -> Prepare:
    return _our_detector(setup, fused=True)


def _detect(folder: str, setup: Setup, engine: str) -> Prepare:
    from mobilenet.detect import run as detect
    from mobilenet.loading import load
    from mobilenet.output import Layout
    from mobilenet.tasks import DETECTION

    detector = load(folder, engine=engine, task=DETECTION)

    def prepare(batch: int, count: int) -> Timed:
        files = _files(setup, count)

        def run() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                detect(files, detector, layout=Layout.JSON, threshold=THRESHOLD, batch_size=batch)

        return run

    return prepare


for _engine in ("torch", "onnx", "openvino"):

    @subject(f"mobilenet detect, {_engine}")
    def _(setup: Setup, engine: str = _engine) -> Prepare:
        folder = _required(setup.detector, "--detector")
        folder = folder if engine == "torch" else str(Path(setup.exports, f"detector_{engine}"))
        return _detect(folder, setup, engine)


for _engine in ("onnx", "openvino"):

    @subject(f"mobilenet detect, torchvision's SSDLite, {_engine}")
    def _(setup: Setup, engine: str = _engine) -> Prepare:
        return _detect(str(Path(setup.exports, f"detector_ssdlite_{engine}")), setup, engine)


@torch.no_grad()
def _see_background(predictors: list[torch.nn.Module]) -> None:
    """Let nearly all anchors of a random detector see nothing, as a trained one's do: few boxes are then compared."""
    for predict in predictors:
        predict.bias.view(-1, 91)[:, 0] += 12


@subject("torchvision, SSDLite")
def _(setup: Setup) -> Prepare:
    import_torchvision()
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large
    from torchvision.transforms.functional import to_tensor

    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    _see_background([predict[-1] for predict in model.head.classification_head.module_list])

    @torch.inference_mode()
    def detect(paths: list[str]) -> list[int]:
        found = model([to_tensor(Image.open(path).convert("RGB")) for path in paths])
        return [int((each["scores"] > THRESHOLD).sum()) for each in found]

    def prepare(batch: int, count: int) -> Timed:
        files = _files(setup, count)
        return lambda: [found for start in range(0, count, batch) for found in detect(files[start : start + batch])]

    return prepare


def ssdlite() -> tuple[torch.nn.Module, Any]:
    """torchvision's SSDLite as ours, with random weights, and its image processor."""
    from mobilenet.heads_mobilenet import DETECTORS

    from mobilenet import MobileNetConfig, MobileNetForObjectDetection, MobileNetImageProcessor

    name = "ssdlite320_mobilenet_v3_large"
    model = MobileNetForObjectDetection(MobileNetConfig.from_preset(name)).eval()
    _see_background([predict.conv for predict in model.class_predictors])
    return model, MobileNetImageProcessor.from_recipe("ssd", 320, **DETECTORS[name].suppression._asdict())


for _fused, _suffix in ((False, ""), (True, ", fused")):

    @subject(f"ours, torchvision's SSDLite{_suffix}")
    def _(setup: Setup, fused: bool = _fused) -> Prepare:
        model, processor = ssdlite()
        return _detecting(model.fuse() if fused else model, processor, setup)


# --- Training ----------------------------------------------------------------------------------------------------


def _training(model: torch.nn.Module, channels_last: bool, autocast: bool = False) -> Prepare:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def prepare(batch: int, size: int) -> Timed:
        images = torch.randn(batch, 3, size, size).to(memory_format=layout)
        labels = torch.randint(1001, (batch,))

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = model(images)
            logits = output if isinstance(output, Tensor) else output.logits
            torch.nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return prepare


@subject("transformers, training")
def _(setup: Setup) -> Prepare:
    return _training(_native(setup), channels_last=False)


for _autocast, _suffix in ((False, ""), (True, ", bfloat16 autocast")):

    @subject(f"timm, channels last, training{_suffix}")
    def _(setup: Setup, autocast: bool = _autocast) -> Prepare:
        return _training(_timm().to(memory_format=torch.channels_last), True, autocast)

    @subject(f"ours, training{_suffix}")
    def _(setup: Setup, autocast: bool = _autocast) -> Prepare:
        return _training(_ours(setup), False, autocast)

    @subject(f"ours, training as mobilenet train does{_suffix}")
    def _(setup: Setup, autocast: bool = _autocast) -> Prepare:
        from mobilenet.training.run import keep_memory

        keep_memory()
        return _training(_ours(setup).to(memory_format=torch.channels_last), True, autocast)


# --- A GPU -------------------------------------------------------------------------------------------------------


def _on_gpu(model: torch.nn.Module, dtype: torch.dtype, compiling: str | None) -> Prepare:
    model = model.to("cuda", dtype, memory_format=torch.channels_last)
    if compiling:
        model = torch.compile(model, mode=compiling)

    def prepare(batch: int, size: int) -> Timed:
        images = torch.randn(batch, 3, size, size, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)

        @torch.inference_mode()
        def run() -> None:
            model(images)
            torch.cuda.synchronize()

        return run

    return prepare


GPU_SUBJECTS = []
for _name, _load in (
    ("transformers", _native),
    ("timm", lambda _: _timm()),
    ("ours, fused", lambda setup: _ours(setup).fuse()),
):
    for _dtype in (torch.float16, torch.bfloat16):
        for _mode, _how in ((None, "eager"), ("default", "compiled"), ("reduce-overhead", "CUDA graphs")):
            GPU_SUBJECTS.append(f"{_name}, {str(_dtype).removeprefix('torch.')}, {_how}")
            SUBJECTS[GPU_SUBJECTS[-1]] = lambda setup, load=_load, dtype=_dtype, mode=_mode: _on_gpu(
                load(setup), dtype, mode
            )


# --- The process of a subject ------------------------------------------------------------------------------------


def measure(run: Timed, seconds: float) -> float:
    """Seconds that a call takes: the median of calls that fill some time."""
    times = []
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def serve(name: str, setup: Setup) -> Iterator[dict[str, Any]]:
    """Load a subject, then answer each request on stdin, a line of JSON, with another."""
    torch.set_num_threads(setup.threads)
    try:
        prepare = SUBJECTS[name](setup)
    except ImportError as error:
        yield {"missing": str(error)}
        return
    yield {"ready": True}
    prepared: dict[str, Timed] = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = json.dumps(request["varied"], sort_keys=True)
        if key not in prepared:
            prepared[key] = prepare(**request["varied"])
            start = time.perf_counter()
            answers = prepared[key]()  # the first calls compile, allocate and read files into the system's memory
            if time.perf_counter() - start < 2:
                prepared[key]()
        reply = {"seconds": measure(prepared[key], request["seconds"])}
        if request.get("answers"):
            reply["answers"] = answers
        reply["megabytes"] = peak_megabytes()
        yield reply


def peak_megabytes() -> float:
    """Most memory that this process has held. On Linux, getrusage counts what it was forked from."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def agreement(ours: list[str], theirs: list[str]) -> float:
    """Share of images with the same label."""
    return Counter(a == b for a, b in zip(ours, theirs, strict=True))[True] / len(ours)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not for the pipe
    for reply in serve(sys.argv[1], Setup(**json.loads(sys.argv[2]))):
        pipe.write(json.dumps(reply) + "\n")
        pipe.flush()
