"""Train a MobileNet on labelled pictures, from scratch or from a checkpoint, and evaluate one."""

from __future__ import annotations

import ctypes
import dataclasses
import inspect
import json
import os
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

import torch
import typer


if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import Tensor

    from .image_processing_mobilenet import MobileNetImageProcessor
    from .modeling_mobilenet import MobileNetForImageClassification
    from .pictures import Pictures

RECORD = "training.json"
OPTIMIZERS = ("sgd", "rmsprop", "adamw")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
BALANCES = ("none", "weights", "sampling")


def _option(text: str, *names: str, **kwargs: Any) -> Any:
    return typer.Option(*names, help=text, **kwargs)


@dataclass(kw_only=True)
class Options:
    """A training run in full: with the same options, data, versions and hardware, it gives the same weights."""

    # What to train on
    dataset: Annotated[
        str,
        typer.Argument(
            help="Folder with a folder of pictures for each class (or with such folders in train, validation and "
            "test), parquet file, folder of parquet files, or dataset of the Hub."
        ),
    ]
    output: Annotated[str, _option("Folder to write the finished repository to.", "--output", "-o")]
    subset: Annotated[str | None, _option("Configuration of a dataset of the Hub, where it has several.")] = None
    revision: Annotated[str | None, _option("Branch, tag or commit of a dataset of the Hub.")] = None
    image_column: Annotated[str | None, _option("Column of the pictures, where there are several.")] = None
    label_column: Annotated[str | None, _option("Column of the labels, where there are several.")] = None
    train_split: Annotated[str, _option("Split to train on.")] = "train"
    validation_split: Annotated[
        str | None, _option("Split to evaluate after each epoch; by default 'validation', where there is one.")
    ] = None
    validation: Annotated[
        float, _option("Share of the training pictures to hold out where there is no such split; 0 for none.")
    ] = 0.1
    test_split: Annotated[
        str | None, _option("Split to measure the finished model on; by default 'test', where there is one.")
    ] = None
    skip_unreadable: Annotated[bool, _option("Leave out pictures that cannot be read.")] = False

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
    architecture: Annotated[str, _option("From scratch: mobilenet_v1 or mobilenet_v2.")] = "mobilenet_v2"
    width: Annotated[float, _option("From scratch: width multiplier.")] = 1.0
    output_stride: Annotated[int, _option("From scratch: 32, 16 or 8.")] = 32
    image_size: Annotated[
        int | None, _option("Side of the network's input in pixels; by default the checkpoint's, or 224.")
    ] = None
    first_size: Annotated[
        int | None,
        _option("Side of the pictures in the first epoch; it grows to the full size over three quarters of them."),
    ] = None
    crop_fraction: Annotated[
        float | None,
        _option(
            "Share of a picture's shorter edge that the center crop keeps; by default the checkpoint's, or 0.875."
        ),
    ] = None
    detail_size: Annotated[
        int | None,
        _option(
            "Side of the pictures to train on, where it is far below the network's input: the finished repository "
            "reduces larger pictures to it first, as they would look too sharp."
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
            "From a checkpoint: give its batch norms the statistics of these pictures before training, while weight "
            "and bias keep its answers as they are."
        ),
    ] = True

    # How to vary the pictures
    crop_scale: Annotated[float, _option("Least share of the area that a random crop keeps; 1 for no crops.")] = 0.35
    flip: Annotated[bool, _option("Mirror half of the pictures.")] = True
    trivial_augment: Annotated[bool, _option("Apply TrivialAugment.")] = False
    erasing: Annotated[float, _option("Probability of erasing a random box.")] = 0.0
    mixup: Annotated[float, _option("Alpha of mixup; 0 for none.")] = 0.0

    # How to optimize
    epochs: Annotated[int, _option("Epochs.")] = 30
    batch_size: Annotated[int, _option("Pictures in a batch, in each process.")] = 128
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
            "Peak learning rate for 256 pictures a step; it grows in proportion to these. By default 0.003 for adamw, "
            "and otherwise 0.1 from scratch and 0.02 from a checkpoint."
        ),
    ] = None
    momentum: Annotated[float, _option("Momentum.")] = 0.9
    weight_decay: Annotated[float, _option("Of convolutions, but no depthwise ones, and of the classifier.")] = 4e-5
    warmup: Annotated[float, _option("Share of the steps in which the learning rate rises; then it falls.")] = 0.05
    label_smoothing: Annotated[float, _option("Share of the target that is spread over all labels.")] = 0.1
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
    workers: Annotated[int, _option("Processes that gather batches; 0 suits pictures that fit in memory.")] = 0
    log_steps: Annotated[int | None, _option("Steps between log lines; by default a tenth of an epoch.")] = None
    save_steps: Annotated[int | None, _option("Steps between checkpoints; by default an epoch.")] = None
    time_limit: Annotated[
        float | None, _option("Minutes after which to save a checkpoint and stop; the same command goes on from it.")
    ] = None
    keep_checkpoints: Annotated[bool, _option("Keep the last checkpoints when the repository is written.")] = False
    restart: Annotated[bool, _option("Forget the checkpoints of an unfinished run.")] = False
    overwrite: Annotated[bool, _option("Replace the folder that is there.")] = False

    def check(self) -> None:
        """Raise ValueError for the first option whose value is not allowed."""
        for name, allowed, holds in (
            ("optimizer", f"one of {', '.join(OPTIMIZERS)}", self.optimizer in (None, *OPTIMIZERS)),
            ("precision", f"one of {', '.join(PRECISIONS)}", self.precision in PRECISIONS),
            ("balance", f"one of {', '.join(BALANCES)}", self.balance in BALANCES),
            ("validation", "from 0 to below 1", 0 <= self.validation < 1),
            ("image_size", "at least 1", self.image_size is None or self.image_size >= 1),
            ("first_size", "at least 1", self.first_size is None or self.first_size >= 1),
            ("detail_size", "at least 1", self.detail_size is None or self.detail_size >= 1),
            ("crop_fraction", "above 0 and at most 1", self.crop_fraction is None or 0 < self.crop_fraction <= 1),
            ("crop_scale", "above 0 and at most 1", 0 < self.crop_scale <= 1),
            ("erasing", "from 0 to 1", 0 <= self.erasing <= 1),
            ("mixup", "at least 0", self.mixup >= 0),
            ("epochs", "at least 1", self.epochs >= 1),
            ("batch_size", "at least 1", self.batch_size >= 1),
            ("accumulation", "at least 1", self.accumulation >= 1),
            ("learning_rate", "above 0", self.learning_rate is None or self.learning_rate > 0),
            ("momentum", "from 0 to below 1", 0 <= self.momentum < 1),
            ("weight_decay", "at least 0", self.weight_decay >= 0),
            ("warmup", "from 0 to 1", 0 <= self.warmup <= 1),
            ("label_smoothing", "from 0 to below 1", 0 <= self.label_smoothing < 1),
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
        for field in dataclasses.fields(self) if self.model is not None else ():
            if field.name in FROM_SCRATCH and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} must be left out where model is given, as the checkpoint has its own.")

    @property
    def chosen_optimizer(self) -> str:
        """The optimizer's name."""
        return self.optimizer or ("sgd" if self.model is None else "adamw")

    @property
    def peak_learning_rate(self) -> float:
        """For 256 pictures a step."""
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


# Options that a checkpoint to start from decides.
FROM_SCRATCH = ("architecture", "width", "output_stride")

# Options that may differ when a run is resumed: they do not change its weights.
FREE_TO_CHANGE = ("time_limit", "save_steps", "log_steps", "keep_checkpoints", "overwrite", "restart", "workers")


def need(*modules: str) -> None:
    """Raise ImportError, saying what to install, unless the modules of the extra `train` are there."""
    from importlib.util import find_spec

    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ImportError(f'training needs {", ".join(missing)}: pip install "mobilenet[train]"')


def keep_memory() -> None:
    """Tell glibc's malloc to keep the memory that is freed, as every step of a training run needs the same again.

    By default it gives large blocks back to the system, which has to clear every page anew: on a CPU, a third of the
    time of a training step. Other systems and C libraries stay as they are.

    Source: mallopt(3); M_MMAP_MAX is -4, M_TRIM_THRESHOLD -1, M_ARENA_MAX -8.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in ((-8, 1), (-4, 0), (-1, -1)):
            mallopt(parameter, value)


def run(options: Options) -> bool:
    """Train, and write a repository; returns False where the time limit came first.

    Raises:
        FileExistsError: The output folder exists, and options.overwrite is not set.
        ImportError: The extra is not installed.
        ValueError: An option is not allowed, or the pictures cannot be trained on.
    """
    need("accelerate", "datasets", "kornia", "matplotlib", "tensorboard", "torchmetrics")
    options.check()
    output = Path(options.output)
    if output.exists() and not options.overwrite:
        raise FileExistsError(f"{output} exists: set --overwrite to replace it.")

    from accelerate import PartialState
    from transformers import set_seed
    from transformers.utils import logging

    from .convert_checkpoint import check_output
    from .trainer import checkpoints

    for source in (options.dataset, options.model or ""):
        check_output(output, options.overwrite, source)
    logging.disable_progress_bar()
    if not torch.cuda.is_available():
        keep_memory()
    state = PartialState(cpu=not torch.cuda.is_available())  # or it would not see the other processes on CPUs
    work = options.work
    with state.main_process_first():
        _check_unfinished(options, state)
    set_seed(options.seed)
    try:
        return _run(options, state)
    except BaseException as error:
        if state.is_main_process and not checkpoints(work):  # nothing to go on from: leave nothing behind
            shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise ValueError(
                f"batch_size must be what the memory of the GPU takes, got {options.batch_size}; with a smaller one, "
                "set accumulation to keep the pictures of a step."
            ) from error
        raise


def _run(options: Options, state: PartialState) -> bool:
    from . import trainer as training
    from .pictures import Augment, Normalize, check_classes

    data = _read(options)
    model, processor = _build(options, data.names)
    if state.is_main_process:
        _prepare_work(options, state.num_processes)
    with state.local_main_process_first():
        train, validation, test = (
            _decode(options, data, split, processor, state) for split in ("train", "validation", "test")
        )
    check_classes(train.labels, data.names)  # some of them may be of no readable picture
    state.wait_for_everyone()
    frozen = [] if options.last_stages is None else training.freeze(model, options.last_stages)
    size = _input_size(processor)
    trainer = training.ClassifierTrainer(
        model.to(memory_format=torch.channels_last),
        training_arguments(options, len(train), state.num_processes, validation is not None),
        options,
        train,
        validation,
        Augment(size, options.crop_scale, options.flip, options.trivial_augment, options.erasing),
        Normalize(processor),
        frozen=frozen,
        minutes=options.time_limit,
        **_reporting(options.work, state.is_main_process),
    )
    last = training.checkpoints(options.work)
    if last and state.is_main_process:
        print(f"resuming from {last[-1]}", flush=True)
    if options.align_norms and options.model is not None and not last:
        trainer.align_batch_norm()
    trainer.train(resume_from_checkpoint=str(last[-1]) if last else None)
    if trainer.state.global_step < trainer.state.max_steps:
        if state.is_main_process:
            print(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; run again to go on")
        return False
    with trainer.averaged_weights():
        if state.is_main_process:
            _finish(options, model, processor, trainer.state.log_history, data, validation, test)
    state.wait_for_everyone()
    return True


def _check_unfinished(options: Options, state: PartialState) -> None:
    """Forget an unfinished run, or raise ValueError where it was another one."""
    work = options.work
    record = work / RECORD
    if work.exists() and any(work.iterdir()) and not record.exists():
        raise ValueError(f"{work} must be free for the unfinished run, but holds something else.")
    if options.restart and state.is_main_process:
        shutil.rmtree(work, ignore_errors=True)
    if record.exists():
        recorded = json.loads(record.read_text(encoding="utf-8"))
        before = recorded["options"] | {"processes": recorded["processes"]}
        now = dataclasses.asdict(options) | {"processes": state.num_processes}
        changed = [
            f"{name} (was {before.get(name)!r})"
            for name, value in now.items()
            if value != before.get(name) and name not in FREE_TO_CHANGE
        ]
        if changed:
            raise ValueError(
                f"{work} holds an unfinished run with other options: {', '.join(changed)}. Set them as they were to "
                "go on, or set --restart to forget it."
            )


def _prepare_work(options: Options, processes: int) -> None:
    """Make the folder of the unfinished run."""
    from .report import write_json
    from .trainer import STAGING

    shutil.rmtree(options.work / STAGING, ignore_errors=True)
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / RECORD).exists():
        write_json(options.work / RECORD, _record(options, processes))


def _record(options: Options, processes: int) -> dict[str, Any]:
    """All that is needed to run this again."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": sys.version.split()[0]}
    for package in ("torch", "transformers", "accelerate", "datasets", "kornia", "pillow", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "command": options.command(processes),
        "options": dataclasses.asdict(options),
        "processes": processes,
        "precision": _best_precision() if options.precision == "auto" else options.precision,
        "hardware": hardware,
        "versions": versions,
    }


class Data(NamedTuple):
    """The splits of a run, undecoded."""

    names: list[str]
    train: Any
    validation: Any
    test: Any
    splits: dict[str, str]  # what the dataset calls those of them that it has


def _read(options: Options) -> Data:
    from .pictures import LABEL, check_classes, hold_out, load_splits

    splits = load_splits(options.dataset, options.subset, options.revision, options.image_column, options.label_column)

    used = {}
    for role, wanted, default in (
        ("train", options.train_split, None),
        ("validation", options.validation_split, "validation"),
        ("test", options.test_split, "test"),
    ):
        if wanted is not None and wanted not in splits:
            raise ValueError(f"{role}_split must be one of {', '.join(splits)}, got {wanted!r}.")
        if (wanted or default) in splits:
            used[role] = wanted or default
    train, validation, test = (
        splits[used[role]] if role in used else None for role in ("train", "validation", "test")
    )
    names = train.features[LABEL].names
    check_classes(train[LABEL][:], names)
    if validation is None and options.validation:
        train, validation = hold_out(train, options.validation, options.seed)
    return Data(names, train, validation, test, used)


def _build(options: Options, names: list[str]) -> tuple[MobileNetForImageClassification, MobileNetImageProcessor]:
    """The network and the processor to start with."""
    from . import MobileNetConfig, MobileNetForImageClassification, MobileNetImageProcessor
    from .classify import load_network

    if options.model is None:
        size = options.image_size or 224
        processor = MobileNetImageProcessor(
            size={"shortest_edge": round(size / (options.crop_fraction or 0.875))},
            crop_size=size,
            detail_size=options.detail_size,
        )
        config = MobileNetConfig(
            architecture=options.architecture,
            width_multiplier=options.width,
            output_stride=options.output_stride,
            image_size=size,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
        return MobileNetForImageClassification(config), processor
    model, processor = load_network(options.model, labels=names)
    if options.start_labels is not None:
        start_classifier(model, load_network(options.model)[0].classifier, Path(options.start_labels))
    if options.detail_size:
        processor.detail_size = options.detail_size
    if options.image_size or options.crop_fraction:
        current = _input_size(processor)[0]
        size = options.image_size or current
        square = {"height": size, "width": size}
        if options.crop_fraction or processor.do_center_crop:
            fraction = options.crop_fraction or current / processor.size.get("shortest_edge", current)
            processor.size = {"shortest_edge": round(size / fraction)}
            processor.do_resize = processor.do_center_crop = True
        else:
            processor.size = square
        processor.crop_size = square
        model.config.image_size = size
    return model, processor


@torch.no_grad()
def start_classifier(model: MobileNetForImageClassification, source: torch.nn.Linear, path: Path) -> None:
    """Give each label the mean weights of the classes of another classifier that it covers.

    Args:
        model: The network whose classifier starts.
        source: The other classifier, on the same features.
        path: JSON file: for each label of the network a list of indices of the other's classes.

    Raises:
        ValueError: The file does not name the network's labels, or no classes of the other one.
    """
    try:
        classes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"start_labels must be a JSON file, got {path}: {error}") from error
    labels = {label: index for index, label in model.config.id2label.items()}
    if not isinstance(classes, dict) or classes.keys() != labels.keys():
        raise ValueError(f"start_labels must name each of the labels {', '.join(labels)} and no other, got {path}.")
    for label, indices in classes.items():
        valid = isinstance(indices, list) and indices and all(type(index) is int for index in indices)
        if not valid or not 0 <= min(indices) <= max(indices) < source.out_features:
            allowed = f"a list of classes from 0 to {source.out_features - 1}"
            raise ValueError(f"start_labels must give {label} {allowed}, got {indices!r}.")
        model.classifier.weight[labels[label]] = source.weight[indices].mean(0)
        model.classifier.bias[labels[label]] = source.bias[indices].mean()


def _input_size(processor: MobileNetImageProcessor) -> tuple[int, int]:
    """Height and width of what the network sees."""
    size = processor.crop_size if processor.do_center_crop else processor.size
    if "height" not in size:
        raise ValueError(f"the image processor must give one height and width, got size {size} without a center crop.")
    return size["height"], size["width"]


def _decode(
    options: Options, data: Data, split: str, processor: MobileNetImageProcessor, state: PartialState
) -> Pictures | None:
    from .pictures import Storage, decode

    rows = getattr(data, split)
    if rows is None:
        return None
    square = processor.size.get("shortest_edge", max(_input_size(processor))) if split == "train" else None
    storage = Storage(options.work, shared=state.num_processes > 1)
    return decode(rows, processor, storage, split, square, options.skip_unreadable, not state.is_main_process)


def _best_precision() -> str:
    """The precision that the hardware is fast at."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


def training_arguments(options: Options, count: int, processes: int, validates: bool) -> Any:
    """The recipe in the words of the Trainer."""
    from transformers import TrainingArguments

    from .trainer import whole_batches

    batch = options.batch_size * processes
    steps = -(-whole_batches(count, batch) // (batch * options.accumulation))
    pictures = min(batch * options.accumulation, count)
    precision = _best_precision() if options.precision == "auto" else options.precision
    return TrainingArguments(
        output_dir=str(options.work),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=2 * options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.peak_learning_rate * pictures / 256,
        lr_scheduler_type="cosine",
        warmup_steps=round(options.warmup * steps * options.epochs),
        max_grad_norm=0.0,
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        use_cpu=not torch.cuda.is_available(),
        torch_compile=options.compile,
        dataloader_num_workers=options.workers,
        dataloader_persistent_workers=options.workers > 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        eval_strategy="epoch" if validates else "no",
        save_strategy="no",  # the trainer's own callback decides
        logging_steps=options.log_steps or max(1, steps // 10),
        logging_nan_inf_filter=False,
        seed=options.seed,
        report_to="none",
        ddp_find_unused_parameters=False,
    )


def _reporting(work: Path, is_main: bool) -> dict[str, Any]:
    """TensorBoard's log, and the metrics of an evaluation."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    from .report import evaluate_logits

    callbacks = [TensorBoardCallback(SummaryWriter(str(work / "runs")))] if is_main else []
    return {"callbacks": callbacks, "compute_metrics": evaluate_logits}


def _finish(
    options: Options,
    model: MobileNetForImageClassification,
    processor: MobileNetImageProcessor,
    log: list[dict[str, float]],
    data: Data,
    validation: Pictures | None,
    test: Pictures | None,
) -> None:
    """Write the repository beside its place, measure what was written, and move it there."""
    from .modeling_mobilenet import MobileNetForImageClassification as Classifier
    from .report import plot_confusion, plot_course, write_card

    work, output = options.work, Path(options.output)
    repository = work / "repository"
    shutil.rmtree(repository, ignore_errors=True)
    model.save_pretrained(repository)
    processor.save_pretrained(repository)
    shutil.copy(work / RECORD, repository)
    shutil.copy(work / "log.csv", repository)
    shutil.copytree(work / "runs", repository / "runs")
    plot_course(log, repository / "curves.png")
    written = Classifier.from_pretrained(repository)
    command = json.loads((work / RECORD).read_text(encoding="utf-8"))["command"]
    measured = {}
    for split, pictures in (("validation", validation), ("test", test)):
        if pictures is not None:
            logits = predict(written, processor, pictures, options.batch_size)
            measured[split] = (logits, torch.from_numpy(pictures.labels))
    if measured:
        plot_confusion(*list(measured.values())[-1], data.names, repository / "confusion_matrix.png")
    write_card(repository, options, written, measured, data.splits, command)
    replaced = work / "replaced"
    if output.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(output, replaced)
    os.replace(repository, output)
    shutil.rmtree(replaced if options.keep_checkpoints else work, ignore_errors=True)
    print(f"wrote {output}")


@torch.no_grad()
def predict(
    model: MobileNetForImageClassification,
    processor: MobileNetImageProcessor,
    pictures: Pictures,
    batch_size: int = 128,
) -> Tensor:
    """Logits of pictures that the processor has resized and cropped, computed in float32: (N, classes)."""
    from .pictures import Normalize, progress_bar

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    normalize = Normalize(processor).to(device)
    logits = []
    with progress_bar("measuring") as bar:
        for start in bar.track(range(0, len(pictures), batch_size)):
            pixels = torch.from_numpy(pictures.pixels[start : start + batch_size])
            logits.append(model(normalize(pixels.to(device))).logits.float().cpu())
    return torch.cat(logits)


class Evaluation(NamedTuple):
    """What a checkpoint scores on a split."""

    split: str
    pictures: int
    metrics: dict[str, float]
    by_class: dict[str, float]
    on_card: float | None  # the accuracy that the checkpoint's model card gives for this split


def evaluate_checkpoint(
    model: str,
    dataset: str,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    batch_size: int = 128,
    skip_unreadable: bool = False,
) -> Evaluation:
    """Measure a checkpoint on labelled pictures, in float32 and with its own processor.

    Args:
        model: Folder or Hub id.
        dataset: As Options has it.
        split: By default test, or else validation, or else the only one.
        subset: As Options has it.
        revision: Of a dataset of the Hub.
        image_column: As Options has it.
        label_column: As Options has it.
        batch_size: Pictures that the network sees at once.
        skip_unreadable: As Options has it.

    Raises:
        ValueError: The labels of checkpoint and dataset differ, or there is no such split.
    """
    need("datasets", "torchmetrics")
    import tempfile

    from .classify import load_network
    from .pictures import LABEL, Storage, decode, listed, load_splits
    from .report import accuracy_on_card, class_accuracies, metrics

    splits = load_splits(dataset, subset, revision, image_column, label_column)
    split = split or next((name for name in ("test", "validation") if name in splits), next(iter(splits)))
    if split not in splits:
        raise ValueError(f"split must be one of {', '.join(splits)}, got {split!r}.")
    network, processor = load_network(model)
    names = splits[split].features[LABEL].names
    known = {label: index for index, label in network.config.id2label.items()}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"dataset must have labels that the checkpoint knows, {listed(list(known))}; it has {listed(unknown)}."
        )
    with tempfile.TemporaryDirectory() as folder:
        pictures = decode(splits[split], processor, Storage(Path(folder)), split, None, skip_unreadable)
        logits = predict(network, processor, pictures, batch_size)
    labels = torch.tensor([known[name] for name in names])[torch.from_numpy(pictures.labels)]
    accuracies = class_accuracies(logits, labels)
    return Evaluation(
        split,
        len(pictures),
        metrics(logits, labels),
        {name: accuracies[known[name]] for name in names},
        accuracy_on_card(model, dataset, split, subset),
    )


# The commands


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take defaults from a file that a run left; what the command line says goes first."""
    if path is not None:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            recorded, processes = record["options"], record["processes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise typer.BadParameter(f"{path} must be the {RECORD} of a run: {error}") from error
        context.default_map = {
            name: value for name, value in recorded.items() if value is not None and name not in FREE_TO_CHANGE
        }
        if processes != (here := int(os.environ.get("WORLD_SIZE", "1"))):
            typer.echo(
                f"Note: that run had {processes} processes, each with its batch; this one has {here}.", err=True
            )
    return path


def train(config: Path | None = None, **given: Any) -> None:
    """Train a MobileNet on labelled pictures and write a complete repository.

    The same command goes on where an interrupted run stopped, to the same weights. Several GPUs or machines (which
    must share the output folder): start it with torchrun or accelerate launch.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is of no use is removed on the way out
    if not run(Options(**given)):
        raise typer.Exit(3)


def _signature() -> inspect.Signature:
    """The options as parameters of the command."""
    config = Annotated[
        Path | None,
        typer.Option(
            "--config", callback=_read_config, is_eager=True, help=f"{RECORD} of a run to repeat; options override it."
        ),
    ]
    hints = get_type_hints(Options, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(Options)
    ]
    return inspect.Signature(
        [*parameters, inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=config)]
    )


train.__signature__ = _signature()
train.__annotations__ = {name: p.annotation for name, p in train.__signature__.parameters.items()}


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a MobileNet.")],
    dataset: Annotated[str, typer.Argument(help="As for mobilenet train.")],
    split: Annotated[
        str | None, typer.Option(help="Split; by default test, or else validation, or else the only one.")
    ] = None,
    subset: Annotated[
        str | None, typer.Option(help="Configuration of a dataset of the Hub, where it has several.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a dataset of the Hub.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the pictures, where there are several.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels, where there are several.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that the network sees at once.")] = 128,
    skip_unreadable: Annotated[bool, typer.Option(help="Leave out pictures that cannot be read.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Measure a checkpoint on labelled pictures, as its model card says it was measured."""
    result = evaluate_checkpoint(
        model, dataset, split, subset, revision, image_column, label_column, batch_size, skip_unreadable
    )
    if as_json:
        print(json.dumps(result._asdict()))
        return
    from rich.console import Console
    from rich.table import Table

    from .report import shown

    table = Table("", f"{result.split}, {result.pictures:,} pictures")
    for name, value in result.metrics.items():
        table.add_row(name.replace("_", " "), shown(value))
    if result.on_card is not None:
        table.add_row("accuracy on the card", shown(result.on_card))
    table.add_section()
    for name, value in result.by_class.items():
        table.add_row(name, shown(value))
    Console().print(table)
