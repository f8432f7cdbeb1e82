"""The options of `mobilenet convert`."""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mobilenet.preprocessing_mobilenet import FITS, RANGES, RECIPES
from mobilenet.tables import table
from mobilenet.text import clean


def _stop(*_: object) -> None:
    sys.exit(143)  # as a shell reports SIGTERM; temporary folders are removed on the way out


def _numbers(name: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name} must be numbers with commas between them, got {text!r}.") from error


def convert(
    source: Annotated[
        str, typer.Argument(help="Hub id, folder, file, or name of published weights.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="File of labels (one a line, or JSON), imagenet (1000) or imagenet-background (1001, as Google "
            "counts). By default the source's own, or ImageNet's where the number of classes is one of these.",
            show_default=False,
        ),
    ] = None,
    drop_background: Annotated[
        bool, typer.Option("--drop-background", help="Leave out class 0 of Google's 1001 classes.")
    ] = False,
    unfuse: Annotated[
        bool,
        typer.Option("--unfuse", help="Put batch norms back into a network that comes folded, to fine-tune it."),
    ] = False,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Fold batch norms into the convolutions: faster, for inference only.")
    ] = False,
    pixel_range: Annotated[
        str | None,
        typer.Option(
            "--range",
            help=f"What the network sees of pixels: {', '.join(RANGES)}. By default as the source records it.",
            show_default=False,
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(help="Mean of values in 0 to 1, or one for each channel: 0.485,0.456,0.406.", show_default=False),
    ] = None,
    std: Annotated[str | None, typer.Option(help="Deviation, likewise.", show_default=False)] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            help=f"How images are fitted: {', '.join(FITS)}. By default as the recipe says.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help=f"Preprocessing: {', '.join(RECIPES)}. By default as the source records it, or its publisher's.",
            show_default=False,
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Side of the images; by default as the source records it, or 224.", show_default=False
        ),
    ] = None,
    compare_on: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images to compare on; by default, synthetic ones. With a folder for each class, or a "
            "labels.csv, accuracy is measured under each plausible recipe.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare/--no-compare", help="Compare with the source's runtime.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a repository that exists.")] = False,
) -> None:
    """Convert a MobileNet into a repository for transformers, and compare both.

    \b
    SOURCE is one of
      google/mobilenet_v2_1.0_224         Hub id or folder of transformers' own
      timm/mobilenetv2_100.ra_in1k        Hub id, folder, .safetensors or .pth
      MobileNet_V2_Weights.IMAGENET1K_V2  torchvision's name, or its .pth
      ssdlite320_mobilenet_v3_large       torchvision's detector, or its .pth
      lraspp_mobilenet_v3_large           torchvision's segmenters, or their .pth
      google/deeplabv3_mobilenet_v2_1.0_513  segmenter: Hub id or folder
      network.pth                         V1 without batch norm, as courses teach it
      mobilenet_v1_1.0_224.tgz            slim: archive or .ckpt (tensorflow)
      mobilenet_1_0_224_tf.h5             Keras: .h5, .weights.h5, .keras (h5py)
      mobilenet_v2_1.0_224_quant.tflite   TFLite, any bits (ai-edge-litert)
      coco_ssd_mobilenet_v1_quant.tflite  a detector in TFLite (ai-edge-litert)
      ssd_mobilenet_v1_coco.tar.gz        TensorFlow's detectors, or .ckpt (tensorflow)
      mobilenetv2-12.onnx                 ONNX, any bits, or a repository of it (onnx)
    """
    signal.signal(signal.SIGTERM, _stop)
    module = import_module("mobilenet.conversion.convert")
    import_module("transformers.utils.logging").disable_progress_bar()  # one bar is enough
    comparisons = module.convert(
        source,
        output,
        revision=revision,
        recipe=recipe,
        image_size=image_size,
        pixel_range=pixel_range,
        mean=_numbers("mean", mean),
        std=_numbers("std", std),
        fit=fit,
        labels=labels,
        drop_background=drop_background,
        unfuse=unfuse,
        fuse=fuse,
        compare=compare,
        compare_on=compare_on,
        overwrite=overwrite,
    )
    console = Console()
    if comparisons:
        console.print(table(module.columns(comparisons), (comparison.cells for comparison in comparisons)))
    console.print(clean(f"{output} is written."), highlight=False, markup=False, soft_wrap=True)
