"""The options of a training run."""

from __future__ import annotations

import dataclasses
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


RECORD = "training.json"
OPTIMIZERS = ("sgd", "rmsprop", "adamw")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
BALANCES = ("none", "weights", "sampling")
TASKS = ("classification", "detection", "segmentation")
# Images in a batch by default: those of detectors and segmenters are larger.
BATCH_SIZES = {"classification": 128, "detection": 32, "segmentation": 16}


def _option(text: str, *names: str, **kwargs: Any) -> Any:
    return typer.Option(*names, help=text, **kwargs)


@dataclass(kw_only=True)
class Options:
    """A training run in full: with the same options, data, versions and hardware, it gives the same weights."""

    # What to train on
    dataset: Annotated[
        str,
        typer.Argument(
            help="Folder with a folder of images for each class (or with such folders in train, validation and "
            "test), parquet file, folder of parquet files, or dataset of the Hub. For detection, a folder in COCO's "
            "format or a dataset with a column of objects; for segmentation, folders images and masks or a dataset "
            "with columns of both."
        ),
    ]
    output: Annotated[str, _option("Folder to write the finished repository to.", "--output", "-o")]
    task: Annotated[str, _option("classification, detection or segmentation.")] = "classification"
    subset: Annotated[str | None, _option("Configuration of a dataset of the Hub, where it has several.")] = None
    revision: Annotated[str | None, _option("Branch, tag or commit of a dataset of the Hub.")] = None
    image_column: Annotated[str | None, _option("Column of the images, where there are several.")] = None
    label_column: Annotated[str | None, _option("Column of the labels, where there are several.")] = None
    label_names: Annotated[
        str | None,
        _option(
            "For segmentation: file with the names of the classes, one a line or as JSON; by default classes.txt or "
            "labels.json in the dataset's folder, or else the numbers that the masks hold."
        ),
    ] = None
    train_split: Annotated[str, _option("Split to train on.")] = "train"
    validation_split: Annotated[
        str | None, _option("Split to evaluate after each epoch; by default 'validation', where there is one.")
    ] = None
    validation: Annotated[
        float, _option("Share of the training images to hold out where there is no such split; 0 for none.")
    ] = 0.1
    test_split: Annotated[
        str | None, _option("Split to measure the finished model on; by default 'test', where there is one.")
    ] = None
    skip_unreadable: Annotated[
        bool, _option("Leave out images that cannot be read, or whose boxes or masks are broken.")
    ] = False
    external_images: Annotated[
        bool, _option("Read images that rows of the dataset name by a URL or by a path outside of it.")
    ] = False

    # What to train
    model: Annotated[
        str | None, _option("Folder or Hub id of a MobileNet to start from; by default from scratch.", "--model", "-m")
    ] = None
    start_labels: Annotated[
        str | None,
        _option(
            "JSON file with the classes of the checkpoint that each new label covers, by their indices: "
            '{"dog": [152, 153]}. The classifier starts from the mean of their weights instead of anew.'
        ),
    ] = None
    architecture: Annotated[
        str | None,
        _option(
            "From scratch: the table of the network, such as mobilenet_v4_conv_small; by default mobilenet_v2, or the "
            "detector's."
        ),
    ] = None
    width: Annotated[float, _option("From scratch: width multiplier.")] = 1.0
    output_stride: Annotated[
        int | None,
        _option(
            "From scratch, or for a new detector or segmenter: 32, 16 or 8; by default 32, and 16 for segmentation."
        ),
    ] = None
    detector: Annotated[
        str | None,
        _option(
            "For detection, from scratch or from a classifier: the table of the detector, such as "
            "ssdlite_mobilenet_v2; by default one for the architecture."
        ),
    ] = None
    segmentation_head: Annotated[
        str | None,
        _option(
            "For segmentation, from scratch or from a classifier: deeplab_v3_light, deeplab_v3 or lraspp; by default "
            "the last for V3, and otherwise the first."
        ),
    ] = None
    image_size: Annotated[
        int | None,
        _option(
            "Side of the network's input in pixels; by default the checkpoint's, or 224, the detector's, or 513 for "
            "segmentation."
        ),
    ] = None
    train_size: Annotated[
        int | None,
        _option(
            "Side of the augmented images that the network trains on, by default that of its input; it may be "
            "smaller, as crops enlarge what they show (arXiv:1906.06423)."
        ),
    ] = None
    first_size: Annotated[
        int | None,
        _option("Side of the images in the first epoch; it grows to the full size over three quarters of them."),
    ] = None
    crop_fraction: Annotated[
        float | None,
        _option("Share of an image's shorter edge that the center crop keeps; by default the checkpoint's, or 0.875."),
    ] = None
    detail_size: Annotated[
        int | None,
        _option(
            "Side of the images to train on, where it is far below the network's input: the finished repository "
            "reduces larger images to it first, as they would look too sharp."
        ),
    ] = None
    last_stages: Annotated[
        int | None,
        _option(
            "Train the last so many stages and the head alone, and with 0 the classifier alone. What does not train "
            "stays in eval mode, norms too."
        ),
    ] = None
    align_norms: Annotated[
        bool,
        _option(
            "From a checkpoint: give its batch norms the statistics of these images before training, while weight "
            "and bias keep its predictions as they are."
        ),
    ] = True

    # How to augment the images
    crop_scale: Annotated[float, _option("Least share of the area that a random crop keeps; 1 for no crops.")] = 0.35
    flip: Annotated[bool, _option("Mirror half of the images.")] = True
    trivial_augment: Annotated[
        bool, _option("Apply TrivialAugment; where there are boxes or masks, what changes colors alone.")
    ] = False
    erasing: Annotated[float, _option("Probability of erasing a random box.")] = 0.0
    mixup: Annotated[float, _option("Alpha of mixup; 0 for none.")] = 0.0

    # How to optimize
    epochs: Annotated[int, _option("Epochs.")] = 30
    batch_size: Annotated[
        int | None,
        _option("Images in a batch, in each process; by default 128, 32 for detection, 16 for segmentation."),
    ] = None
    accumulation: Annotated[int, _option("Batches that make one step.")] = 1
    optimizer: Annotated[
        str | None,
        _option(
            "sgd (with Nesterov's momentum), rmsprop or adamw; by default sgd from scratch, adamw from a checkpoint."
        ),
    ] = None
    learning_rate: Annotated[
        float | None,
        _option(
            "Peak learning rate for 256 images a step; it grows in proportion to these. By default 0.003 for adamw, "
            "and otherwise 0.1 from scratch and 0.02 from a checkpoint."
        ),
    ] = None
    momentum: Annotated[float, _option("Momentum.")] = 0.9
    weight_decay: Annotated[float, _option("Of convolutions, but no depthwise ones, and of the classifier.")] = 4e-5
    warmup: Annotated[float, _option("Share of the steps in which the learning rate rises; then it falls.")] = 0.05
    label_smoothing: Annotated[float, _option("Share of the target that is spread over all labels.")] = 0.1
    retain: Annotated[
        float,
        _option(
            "From a checkpoint: weight of a second loss, by which the network goes on to predict the checkpoint's own "
            "classes as the checkpoint does, and so forgets less of what these images do not show; 0 for none."
        ),
    ] = 0.0
    balance: Annotated[
        str, _option("Against unequal classes: none, weights (of the loss) or sampling (rare ones more often).")
    ] = "none"
    ema: Annotated[float, _option("Decay of the weights' moving average; 0 for none.")] = 0.999
    seed: Annotated[int, _option("Seed.")] = 0

    # How to run
    precision: Annotated[
        str, _option("auto (mixed where the hardware is fast at it), float32, bfloat16, float16.")
    ] = "auto"
    compile: Annotated[bool, _option("Compile the network with torch.compile.")] = False
    workers: Annotated[int, _option("Processes that gather batches; 0 suits images that fit in memory.")] = 0
    log_steps: Annotated[int | None, _option("Steps between log lines; by default a tenth of an epoch.")] = None
    save_steps: Annotated[int | None, _option("Steps between checkpoints; by default an epoch.")] = None
    time_limit: Annotated[
        float | None, _option("Minutes after which to save a checkpoint and stop; the same command goes on from it.")
    ] = None
    keep_checkpoints: Annotated[bool, _option("Keep the last checkpoints when the repository is written.")] = False
    restart: Annotated[bool, _option("Forget the checkpoints of an unfinished run.")] = False
    overwrite: Annotated[bool, _option("Replace the folder that is there.")] = False

    def __post_init__(self) -> None:
        for name, value in _OF_CLASSIFIERS.items():
            if self.task == "classification" and getattr(self, name) == value:
                setattr(self, name, None)

    def check(self) -> None:
        """Raise ValueError for the first option whose value is not allowed."""
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}.")
        for name, tasks in MEANT_FOR.items():
            if self.task not in tasks and getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ValueError(f"{name} must be left out for {self.task}: it is for {' and '.join(tasks)}.")
        for name, allowed, holds in (
            ("optimizer", f"one of {', '.join(OPTIMIZERS)}", self.optimizer in (None, *OPTIMIZERS)),
            ("precision", f"one of {', '.join(PRECISIONS)}", self.precision in PRECISIONS),
            ("balance", f"one of {', '.join(BALANCES)}", self.balance in BALANCES),
            ("validation", "from 0 to below 1", 0 <= self.validation < 1),
            ("image_size", "at least 1", self.image_size is None or self.image_size >= 1),
            ("train_size", "at least 1", self.train_size is None or self.train_size >= 1),
            ("first_size", "at least 1", self.first_size is None or self.first_size >= 1),
            ("detail_size", "at least 1", self.detail_size is None or self.detail_size >= 1),
            ("crop_fraction", "above 0 and at most 1", self.crop_fraction is None or 0 < self.crop_fraction <= 1),
            ("crop_scale", "above 0 and at most 1", 0 < self.crop_scale <= 1),
            ("erasing", "from 0 to 1", 0 <= self.erasing <= 1),
            ("mixup", "at least 0", self.mixup >= 0),
            ("epochs", "at least 1", self.epochs >= 1),
            ("batch_size", "at least 1", self.batch_size is None or self.batch_size >= 1),
            ("accumulation", "at least 1", self.accumulation >= 1),
            ("learning_rate", "a number above 0", self.learning_rate is None or 0 < self.learning_rate < math.inf),
            ("momentum", "from 0 to below 1", 0 <= self.momentum < 1),
            ("weight_decay", "at least 0", self.weight_decay >= 0),
            ("warmup", "from 0 to 1", 0 <= self.warmup <= 1),
            ("label_smoothing", "from 0 to below 1", 0 <= self.label_smoothing < 1),
            ("retain", "at least 0", self.retain >= 0),
            ("ema", "from 0 to below 1", 0 <= self.ema < 1),
            ("workers", "at least 0", self.workers >= 0),
            ("log_steps", "at least 1", self.log_steps is None or self.log_steps >= 1),
            ("save_steps", "at least 1", self.save_steps is None or self.save_steps >= 1),
            ("time_limit", "above 0", self.time_limit is None or self.time_limit > 0),
        ):
            if not holds:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}.")
        if self.start_labels is not None and self.model is None:
            raise ValueError("start_labels must be left out from scratch: it is for a checkpoint's classifier.")
        if self.retain and self.model is None:
            raise ValueError("retain must be left out from scratch: it is for what a checkpoint knows.")
        for field in dataclasses.fields(self) if self.model is not None else ():
            if field.name in FROM_SCRATCH[self.task] and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} must be left out where model is given, as the checkpoint has its own.")

    @property
    def images_per_batch(self) -> int:
        """In each process."""
        return self.batch_size or BATCH_SIZES[self.task]

    @property
    def chosen_optimizer(self) -> str:
        """The optimizer's name."""
        return self.optimizer or ("sgd" if self.model is None else "adamw")

    @property
    def peak_learning_rate(self) -> float:
        """For 256 images a step."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.chosen_optimizer == "adamw":
            return 0.003
        return 0.1 if self.model is None else 0.02

    @property
    def work(self) -> Path:
        """The folder beside the output that holds checkpoints and logs until the run is finished."""
        output = Path(self.output).absolute()
        return output.with_name(output.name + ".training")

    def command(self, processes: int = 1) -> str:
        """The command that runs this."""
        launch = ["torchrun", "--nproc-per-node", str(processes), "-m", "mobilenet.cli"]
        words = [*(launch if processes > 1 else ["mobilenet"]), "train", self.dataset, "--output", self.output]
        for field in dataclasses.fields(self)[2:]:
            value, flag = getattr(self, field.name), "--" + field.name.replace("_", "-")
            if value != field.default:
                words += [flag if value else "--no-" + flag[2:]] if isinstance(value, bool) else [flag, str(value)]
        return shlex.join(words)


# What a classifier has by default. The records of earlier versions name it; with a checkpoint, it counts for nothing.
_OF_CLASSIFIERS = {"architecture": "mobilenet_v2", "output_stride": 32, "batch_size": 128}

# Options that a checkpoint to start from decides.
_OF_BACKBONE = ("architecture", "width")
FROM_SCRATCH = {
    "classification": (*_OF_BACKBONE, "output_stride"),
    "detection": _OF_BACKBONE,
    "segmentation": _OF_BACKBONE,
}

# Options that are not for all tasks.
_CLASSIFICATION = ("classification",)
MEANT_FOR = {
    "start_labels": _CLASSIFICATION,
    "crop_fraction": _CLASSIFICATION,
    "train_size": _CLASSIFICATION,
    "detail_size": _CLASSIFICATION,
    "erasing": _CLASSIFICATION,
    "mixup": _CLASSIFICATION,
    "label_smoothing": _CLASSIFICATION,
    "retain": _CLASSIFICATION,
    "balance": _CLASSIFICATION,
    "first_size": ("classification", "segmentation"),
    "detector": ("detection",),
    "segmentation_head": ("segmentation",),
    "label_names": ("segmentation",),
}

# Options that may differ when a run is resumed: they do not change its weights.
FREE_TO_CHANGE = ("time_limit", "save_steps", "log_steps", "keep_checkpoints", "overwrite", "restart", "workers")
