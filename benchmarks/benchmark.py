"""Measure MobileNet V2 against every peer that is installed, and write a report of Markdown and a chart.

python benchmarks/benchmark.py --model my-mobilenet --native google/mobilenet_v2_1.0_224 --images photos/

Each subject runs in a process of its own. All are asked in turn, round after round, so that what the machine does
besides falls on all alike; ratios are taken within a round, and their median is reported.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from subjects import FAMILY, GPU_SUBJECTS, SUBJECTS, Setup, agreement, ssdlite


Varied = dict[str, Any]


class Section(NamedTuple):
    """Subjects that are compared with each other, the first with all."""

    title: str
    subjects: Sequence[str]
    measurements: dict[str, Varied]  # by the column's title
    unit: str = "images/s"  # or "ms": of one call
    compares_answers: bool = False


NETWORKS = (
    "transformers",
    "timm, channels last",
    "ours",
    "ours, fused",
    "ours, fused, bfloat16",
    "ours, fused, torch.compile",
    "timm, its own export, ONNX Runtime",
    "ours, ONNX Runtime",
    "ours, ONNX Runtime, int8",
    "ours, OpenVINO, float32",
    "ours, OpenVINO, bfloat16",
    "ours, OpenVINO, int8",
    "LiteRT, int8",
)
GROWING = ("transformers", "timm, channels last", "ours, fused", "ours, ONNX Runtime")
COMMANDS = (
    "mobilenet classify, torch",
    "mobilenet classify, onnx",
    "mobilenet classify, onnx, int8",
    "mobilenet classify, openvino",
    "mobilenet classify, openvino, int8",
)


DETECTION = (
    "LiteRT, detector",
    "ours, detector",
    "ours, detector, fused",
    "mobilenet detect, torch",
    "mobilenet detect, onnx",
    "mobilenet detect, openvino",
    "torchvision, SSDLite",
    "ours, torchvision's SSDLite",
    "ours, torchvision's SSDLite, fused",
    "mobilenet detect, torchvision's SSDLite, onnx",
    "mobilenet detect, torchvision's SSDLite, openvino",
)
FILES_TO_BOXES = "Detection: files to boxes"
SEGMENTERS = (
    "transformers, segmenter",
    "ours, segmenter",
    "ours, segmenter, fused",
    "ours, segmenter, ONNX Runtime",
    "LiteRT, segmenter of width 0.5, int8",
    "ours, segmenter of width 0.5, fused",
    "ours, segmenter of width 0.5, ONNX Runtime",
)
SEGMENTATION = "Segmentation at 513 pixels"


def sections(quick: bool) -> list[Section]:
    """What is measured."""
    few = 8 if quick else 64
    many = 32 if quick else 300
    batches, sizes = ((1, 4), (96, 224)) if quick else ((1, 2, 4, 8, 16, 32, 64), (96, 128, 160, 192, 224, 320, 448))
    found = [
        Section("The network alone: latency", NETWORKS, {"batch 1, ms": {"batch": 1, "size": 224}}, "ms"),
        Section("The network alone: throughput", NETWORKS, {"batch 32": {"batch": 32, "size": 224}}),
        *(
            Section(
                f"MobileNet {network} alone",
                [name for name in SUBJECTS if name.startswith(f"{network}: ")],
                {f"batch {batch}": {"batch": batch, "size": 224} for batch in (1, 4 if quick else 32)},
            )
            for network in FAMILY
        ),
        Section(
            "The image processor alone",
            ("transformers, processor", "ours, processor", "ours, processor, fast_decode"),
            {
                "500x375, decoded": {"source": "decoded", "count": few},
                "files as they come": {"source": "files", "count": few},
                "files of 12 megapixels": {"source": "large files", "count": 4 if quick else 12},
            },
        ),
        Section(
            "From files to labels",
            ("transformers, pipeline", "ours, pipeline", *COMMANDS),
            {f"batches of {batch}": {"batch": batch, "count": many} for batch in (1, 8, 32)},
            compares_answers=True,
        ),
        Section(SEGMENTATION, SEGMENTERS, {"batch 1, ms": {"batch": 1, "size": 513}}, "ms"),
        Section(
            FILES_TO_BOXES,
            DETECTION,
            {f"batches of {batch}": {"batch": batch, "count": many} for batch in (1, 8)},
        ),
        Section(
            "Training steps",
            (
                "timm, channels last, training",
                "timm, channels last, training, bfloat16 autocast",
                "transformers, training",
                "ours, training",
                "ours, training, bfloat16 autocast",
                "ours, training as mobilenet train does",
                "ours, training as mobilenet train does, bfloat16 autocast",
            ),
            {
                "96 pixels, batch 64": {"batch": 8 if quick else 64, "size": 96},
                "224 pixels, batch 32": {"batch": 4 if quick else 32, "size": 224},
            },
        ),
        Section("Growth with the batch", GROWING, {f"{batch}": {"batch": batch, "size": 224} for batch in batches}),
        Section(
            "Growth with the resolution, batch 8", GROWING, {f"{size}": {"batch": 8, "size": size} for size in sizes}
        ),
    ]
    if torch.cuda.is_available():
        columns = {f"batch {batch}": {"batch": batch, "size": 224} for batch in (1, 256)}
        found.append(Section(f"On the GPU: {torch.cuda.get_device_name()}", GPU_SUBJECTS, columns))
    return found


class Subject:
    """A process that loads a subject, and measures when it is asked."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.name = name
        self.missing: str | None = None
        script = Path(__file__).with_name("subjects.py")
        environment = {**os.environ, "OMP_NUM_THREADS": str(setup.threads), "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join([str(script.parents[1]), environment.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, str(script), name, json.dumps(setup._asdict())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if not os.environ.get("BENCHMARK_DEBUG") else None,
            text=True,
            env=environment,
        )

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer."""
        line = self.process.stdout.readline()
        if not line:
            last = (self.process.communicate()[1] or "").strip().splitlines()
            return {"missing": last[-1] if last else f"exit code {self.process.returncode}"}
        return json.loads(line)

    def ask(self, varied: Varied, seconds: float, answers: bool) -> dict[str, Any]:
        """Measure."""
        self.process.stdin.write(json.dumps({"varied": varied, "seconds": seconds, "answers": answers}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


class Result(NamedTuple):
    """What one subject of a section showed; by measurement, by round."""

    seconds: dict[str, list[float]]
    answers: dict[str, list[str]]
    megabytes: float


def run_section(section: Section, setup: Setup, rounds: int, seconds: float, console: Console) -> dict[str, Result]:
    """Measure a section; what is missing is said and left out."""
    results: dict[str, Result] = {}
    with contextlib.ExitStack() as stack:
        subjects = []
        for name in section.subjects:
            subject = Subject(name, setup)
            stack.callback(subject.stop)
            if "missing" in (answer := subject.answer()):
                console.print(f"  without {name}: {answer['missing']}", highlight=False)
                continue
            subjects.append(subject)
            results[name] = Result({column: [] for column in section.measurements}, {}, 0)
        for round_ in range(rounds):
            for column, varied in section.measurements.items():
                for subject in [subject for subject in subjects if subject.name in results]:
                    result = results[subject.name]
                    answer = subject.ask(varied, seconds, section.compares_answers and round_ == 0)
                    if "missing" in answer:
                        console.print(f"  without {subject.name}: {answer['missing']}", highlight=False)
                        del results[subject.name]
                        continue
                    result.seconds[column].append(answer["seconds"])
                    if "answers" in answer:
                        result.answers[column] = answer["answers"]
                    results[subject.name] = result._replace(megabytes=answer["megabytes"])
            console.print(f"  round {round_ + 1} of {rounds}", highlight=False)
    return results


def ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times as fast ours is: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are numbers."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe(section: Section, results: dict[str, Result]) -> str:
    """A section of the report: for each measurement the median, and how many times as fast as the first subject."""
    if not results:
        return ""
    (first, base), *_ = results.items()
    rows = []
    for name, result in results.items():
        cells = []
        for column, varied in section.measurements.items():
            times = result.seconds[column]
            median = statistics.median(times)
            shown = 1000 * median if section.unit == "ms" else varied.get("count", varied.get("batch")) / median
            cells += [f"{shown:.1f}" if shown < 100 else f"{shown:.0f}", f"{ratio(times, base.seconds[column]):.2f}"]
        if section.compares_answers:
            same = [agreement(answers, base.answers[column]) for column, answers in result.answers.items()]
            cells.append(f"{100 * min(same):.1f} %")
        rows.append([name, *cells, f"{result.megabytes:.0f}"])
    header = [part for column in section.measurements for part in (column, "times")]
    agrees = [f"same top-1 as {first}"] if section.compares_answers else []
    unit = "milliseconds of a call" if section.unit == "ms" else "images a second"
    return (
        f"## {section.title}\n\nIn {unit}; *times*: as fast as {first}; *peak MB*: of the process.\n\n"
        + table(["", *header, *agrees, "peak MB"], rows)
        + "\n"
    )


# Subject, what it is compared with, section and measurement. A measurement of None is the best of all.
CLAIMS = (
    ("ours", "transformers", "latency", "batch 1, ms"),
    ("ours", "transformers", "throughput", "batch 32"),
    ("ours, fused", "transformers", "latency", "batch 1, ms"),
    ("ours, fused", "transformers", "throughput", "batch 32"),
    ("ours, fused", "timm, channels last", "latency", "batch 1, ms"),
    ("ours, fused", "timm, channels last", "throughput", "batch 32"),
    ("ours, ONNX Runtime", "transformers", "latency", "batch 1, ms"),
    ("ours, ONNX Runtime", "timm, its own export, ONNX Runtime", "latency", "batch 1, ms"),
    ("ours, ONNX Runtime", "timm, its own export, ONNX Runtime", "throughput", "batch 32"),
    *(
        (f"{network}: {ours}", f"{network}: {theirs}", f"{network} alone", f"batch {batch}")
        for network in FAMILY
        for ours, theirs in (
            ("ours, fused", "timm, channels last"),
            ("ours, fused", "timm"),
            ("ours, ONNX Runtime", "timm, its own export, ONNX Runtime"),
        )
        for batch in (1, 32)
    ),
    ("ours, ONNX Runtime, int8", "ours, ONNX Runtime", "latency", "batch 1, ms"),
    ("ours, ONNX Runtime, int8", "ours, ONNX Runtime", "throughput", "batch 32"),
    ("ours, OpenVINO, bfloat16", "transformers", "latency", "batch 1, ms"),
    ("ours, OpenVINO, bfloat16", "transformers", "throughput", "batch 32"),
    ("ours, processor", "transformers, processor", "processor", "500x375, decoded"),
    ("ours, processor, fast_decode", "ours, processor", "processor", "files of 12 megapixels"),
    ("mobilenet classify, onnx", "transformers, pipeline", "files to labels", None),
    ("mobilenet classify, onnx, int8", "transformers, pipeline", "files to labels", None),
    ("mobilenet classify, openvino", "transformers, pipeline", "files to labels", None),
    ("ours, detector, fused", "LiteRT, detector", "files to boxes", None),
    ("mobilenet detect, onnx", "LiteRT, detector", "files to boxes", None),
    ("mobilenet detect, openvino", "LiteRT, detector", "files to boxes", None),
    *(
        (ours, "torchvision, SSDLite", "files to boxes", f"batches of {batch}")
        for ours in (
            "ours, torchvision's SSDLite",
            "ours, torchvision's SSDLite, fused",
            "mobilenet detect, torchvision's SSDLite, onnx",
            "mobilenet detect, torchvision's SSDLite, openvino",
        )
        for batch in (1, 8)
    ),
    ("ours, segmenter", "transformers, segmenter", "Segmentation", "batch 1, ms"),
    ("ours, segmenter, fused", "transformers, segmenter", "Segmentation", "batch 1, ms"),
    ("ours, segmenter, ONNX Runtime", "transformers, segmenter", "Segmentation", "batch 1, ms"),
    ("ours, segmenter of width 0.5, fused", "LiteRT, segmenter of width 0.5, int8", "Segmentation", "batch 1, ms"),
    ("ours, training", "transformers, training", "Training", "96 pixels, batch 64"),
    *(
        (f"ours, training{way}{precision}", f"timm, channels last, training{precision}", "Training", column)
        for way in ("", " as mobilenet train does")
        for precision in ("", ", bfloat16 autocast")
        for column in ("96 pixels, batch 64", "224 pixels, batch 32")
    ),
)


def claims(measured: dict[str, dict[str, Result]]) -> str:
    """The ratios that matter, each subject against the peer that it replaces."""
    rows = []
    for ours, theirs, part, column in CLAIMS:
        results = next((found for title, found in measured.items() if part in title), {})
        if ours not in results or theirs not in results:
            continue

        def times(name: str, results: dict[str, Result] = results, column: str | None = column) -> list[float]:
            by_column = results[name].seconds
            return by_column[column] if column else min(by_column.values(), key=statistics.median)

        rows.append([ours, theirs, column or "best batch", f"{ratio(times(ours), times(theirs)):.2f}"])
    return "## Ratios\n\n" + table(["", "against", "measured", "times as fast"], rows) + "\n"


def memory(setup: Setup, counts: tuple[int, int]) -> str:
    """Peak memory of classifying few images and many, each in a process of its own."""
    rows = []
    for name in ("transformers, pipeline", "mobilenet classify, torch", "mobilenet classify, onnx"):
        peaks = []
        for count in counts:
            subject = Subject(name, setup)
            if "missing" not in subject.answer():
                peaks.append(subject.ask({"batch": 8, "count": count}, 0, False)["megabytes"])
            subject.stop()
        if len(peaks) == 2:
            rows.append([name, *(f"{peak:.0f}" for peak in peaks), f"{peaks[1] / peaks[0]:.2f}"])
    header = ["", *(f"{count} images, MB" for count in counts), "ratio"]
    return "## Peak memory\n\n" + table(header, rows) + "\n"


def start_up(setup: Setup, rounds: int) -> str:
    """Seconds from the start of a process to the first answer, libraries and all."""
    import time

    names = (
        "transformers",
        "timm, channels last",
        "ours",
        "ours, fused",
        "ours, ONNX Runtime",
        "ours, OpenVINO, bfloat16",
    )
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            start = time.perf_counter()
            subject = Subject(name, setup)
            if "missing" not in subject.answer():
                subject.ask({"batch": 1, "size": 224}, 0, False)
                seconds[name].append(time.perf_counter() - start)
            subject.stop()
    image = next(Path(setup.images).glob("*.JPEG"))
    classify = ["classify", str(image), "--model"]
    commands = {
        "mobilenet --help": ["--help"],
        "mobilenet classify, torch": [*classify, setup.model],
        "mobilenet classify, onnx": [*classify, str(Path(setup.exports, "onnx"))],
        "mobilenet classify, openvino": [*classify, str(Path(setup.exports, "openvino"))],
    }
    for _ in range(rounds):
        for name, arguments in commands.items():
            start = time.perf_counter()
            command = [str(Path(sys.executable).with_name("mobilenet")), *arguments]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:  # noqa: S603
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    rows = [[name, f"{statistics.median(times):.2f}"] for name, times in seconds.items() if times]
    return "## From nothing to the first answer\n\n" + table(["", "seconds"], rows) + "\n"


def answers(setup: Setup, count: int) -> str:
    """How often settings that are faster predict as the exact ones do; how often rightly, if labels.csv is there."""
    from mobilenet.loading import Model, load

    files = sorted(Path(setup.images).glob("*.JPEG"))[:count]
    truth = {}
    if (table_of_labels := Path(setup.images, "labels.csv")).exists():
        with table_of_labels.open(encoding="utf-8", newline="") as file:
            truth = {row["file"]: row["label"] for row in csv.DictReader(file)}

    def top_1(classifier: Model, pixels: Iterable[np.ndarray]) -> list[str]:
        return [classifier.label(int(classifier.network(image).argmax())) for image in pixels]

    exact = load(setup.model, engine="torch")
    pixels = [exact.read(str(path)) for path in files]
    found = {"torch": top_1(exact, pixels)}
    for folder in sorted(Path(setup.exports).iterdir()):
        if folder.name.startswith("detector"):
            continue
        found[folder.name.replace("_", ", ")] = top_1(load(str(folder)), pixels)
    fast = load(setup.model, engine="torch", fast_decode=True)
    names = "torch, of 12 megapixels", "torch, of 12 megapixels, fast_decode"
    found |= {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        large = str(Path(folder, "large.jpg"))
        for path in files:
            enlarge(path, large)
            for name, classifier in zip(names, (exact, fast), strict=True):
                found[name] += top_1(classifier, [classifier.read(large)])
    rows = []
    for name, labels in found.items():
        base = found[names[0] if name in names else "torch"]
        right = [truth[path.name] == label for path, label in zip(files, labels, strict=True) if path.name in truth]
        rows.append(
            [name, f"{100 * agreement(labels, base):.1f} %", f"{100 * statistics.mean(right):.1f} %" if right else ""]
        )
    return f"## Predictions on {len(files)} images\n\n" + table(["", "same top-1 as torch", "right"], rows) + "\n"


def enlarge(source: Path, target: str | Path) -> None:
    """Make a photograph one of 12 megapixels."""
    with Image.open(source) as image:
        size = (3000, 4000) if image.height > image.width else (4000, 3000)
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(target, quality=90)


def machine(threads: int) -> str:
    """Processor, its instructions, memory, and versions."""
    model, flags = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
                flags = ", ".join(flag for flag in known if flag in value.split())
    packages = ("torch", "transformers", "timm", "onnxruntime", "openvino", "ai-edge-litert", "pillow", "numpy")
    versions = []
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    cores = f"{os.cpu_count()} cores, {threads} threads"
    return (
        f"{model}, {cores}{f' ({flags})' if flags else ''}; Python {platform.python_version()}, {', '.join(versions)}."
    )


def draw(measured: dict[str, dict[str, Result]], path: Path) -> None:
    """Draw the network's speed, at batch 1 and at batch 32, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = (("latency", "batch 1, ms", 1), ("throughput", "batch 32", 32))
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.5), sharey=True, layout="constrained")
    for axis, (part, column, batch) in zip(axes, parts, strict=True):
        results = next(found for title, found in measured.items() if part in title)
        names = list(results)[::-1]
        speeds = [batch / statistics.median(results[name].seconds[column]) for name in names]
        colors = ["#3b6ea8" if name.startswith("ours") else "#b5b5b5" for name in names]
        bars = axis.barh(names, speeds, color=colors)
        axis.bar_label(bars, [f"{speed:.0f}" for speed in speeds], padding=3)
        axis.set_xlim(0, 1.12 * max(speeds))
        axis.set_title(f"batch {batch}: images a second")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("MobileNet V2 1.0, 224 pixels: the network alone")
    figure.savefig(path, dpi=120)


@contextlib.contextmanager
def prepared(
    model: str,
    native: str,
    images: Path,
    tflite: Path | None,
    threads: int,
    exports_too: bool,
    detector: str | None,
    detector_tflite: Path | None,
    segmenter_tflite: Path | None,
) -> Iterator[Setup]:
    """Export the networks where that is measured, and enlarge some photographs to 12 megapixels."""
    from mobilenet.export.export import export

    with tempfile.TemporaryDirectory() as folder:
        exports, large = Path(folder, "exports"), Path(folder, "large")
        exports.mkdir()
        large.mkdir()
        for target in ("onnx", "openvino") if exports_too else ():
            for int8 in (False, True):
                with contextlib.suppress(ImportError):
                    name = f"{target}_int8" if int8 else target
                    export(model, exports / name, target, int8=int8, images=images, min_agreement=0)
        detectors = {"detector": detector, "detector_ssdlite": str(Path(folder, "ssdlite"))} if detector else {}
        for part in ssdlite() if detector else ():
            part.save_pretrained(detectors["detector_ssdlite"])
        for name, source in detectors.items():
            for target in ("onnx", "openvino"):
                with contextlib.suppress(ImportError):
                    export(source, exports / f"{name}_{target}", target, images=images)
        for path in sorted(images.glob("*.JPEG"))[:12]:
            enlarge(path, large / path.name)
        paths = (path and str(path) for path in (tflite, detector_tflite, segmenter_tflite))
        tflite, detector_tflite, segmenter_tflite = paths
        folders = model, native, str(exports), str(images), str(large)
        yield Setup(*folders, tflite, threads, detector, detector_tflite, segmenter_tflite)


def write_seconds(measured: dict[str, dict[str, Result]], output: Path) -> None:
    """Write all that was timed to results.json."""
    output.mkdir(parents=True, exist_ok=True)
    raw = {title: {name: result.seconds for name, result in found.items()} for title, found in measured.items()}
    (output / "results.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


def main(
    model: Annotated[str, typer.Option(help="Folder of a converted MobileNet V2 1.0_224.")],
    native: Annotated[str, typer.Option(help="The same network for transformers' own class.")],
    images: Annotated[Path, typer.Option(help="Folder of JPEG photographs.")],
    output: Annotated[Path, typer.Option(help="Folder for report and chart.")] = Path("benchmarks"),
    tflite: Annotated[Path | None, typer.Option(help="A quantized V2 1.0_224 for LiteRT.")] = None,
    detector: Annotated[str | None, typer.Option(help="Folder of a converted detector.")] = None,
    detector_tflite: Annotated[Path | None, typer.Option(help="The TFLite file that it comes from.")] = None,
    segmenter_tflite: Annotated[Path | None, typer.Option(help="A quantized DeepLab V3 of 513 pixels.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="For each measurement.")] = 1.0,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    only: Annotated[str, typer.Option(help="Only sections whose title contains this.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Tiny settings, to see that it runs.")] = False,
) -> None:
    """Measure, and write results.md, results.json and results.png."""
    console = Console(stderr=True)
    rounds, seconds = (1, 0.05) if quick else (rounds, seconds)
    measured: dict[str, dict[str, Result]] = {}
    chosen = [section for section in sections(quick) if only.lower() in section.title.lower()]
    # These have no use for exports of the model, or make their own.
    alone = ("Training steps", FILES_TO_BOXES, SEGMENTATION)
    exports_too = not chosen or any(section.title not in alone for section in chosen)
    more = detector, detector_tflite, segmenter_tflite
    with prepared(model, native, images, tflite, threads, exports_too, *more) as setup:
        for section in chosen:
            console.print(section.title)
            measured[section.title] = run_section(section, setup, rounds, seconds, console)
            write_seconds(measured, output)  # so that nothing is lost if a later part fails
        extras = [
            write()
            for title, write in {
                "Peak memory": lambda: memory(setup, (32, 64) if quick else (300, 3000)),
                "From nothing to the first answer": lambda: start_up(setup, min(rounds, 3)),
                "Predictions": lambda: answers(setup, 8 if quick else 300),
            }.items()
            if only.lower() in title.lower()
        ]
    reports = [describe(section, measured[section.title]) for section in chosen]
    heading = f"# Benchmark\n\n{machine(threads)}\n\n{rounds} rounds; medians. `{' '.join(sys.argv)}`\n"
    chart = ["![Images a second of every engine](results.png)\n"] if any("throughput" in t for t in measured) else []
    text = "\n".join([heading, *chart, claims(measured), *reports, *extras])
    (output / "results.md").write_text(text, encoding="utf-8")
    if chart and any("latency" in title for title in measured):
        draw(measured, output / "results.png")
    console.print(f"{output / 'results.md'} is written.", highlight=False)


if __name__ == "__main__":
    typer.run(main)
