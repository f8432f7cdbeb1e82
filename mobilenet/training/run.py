"""A training run, from the options to a finished repository."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging

from mobilenet.cards import HELD_OUT, WORDS, write_card
from mobilenet.image_processing_mobilenet import MobileNetImageProcessor
from mobilenet.repository import Claim, claimed, write_json

from .augment import Normalize
from .data import Images, Reader, Storage, decode, folders_of, load_splits, tell
from .options import FREE_TO_CHANGE, RECORD, Options
from .report import plot_curves
from .task import Split, TrainingTask, input_size, training_task
from .trainer import STAGING, checkpoints, diverged, freeze, whole_batches


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
        ValueError: An option is not allowed, the images cannot be trained on, another run writes the output, or that
            exists and is not to be replaced.
    """
    options.check()
    logging.disable_progress_bar()
    if not torch.cuda.is_available():
        keep_memory()
    state = PartialState(cpu=not torch.cuda.is_available())  # or it would not see the other processes on CPUs
    with contextlib.ExitStack() as stack:
        claim = None
        if state.is_main_process:
            sources = (options.dataset, options.model or "")
            claim = stack.enter_context(claimed(Path(options.output), options.overwrite, *sources))
        return _run_claimed(options, state, claim)


def _run_claimed(options: Options, state: PartialState, claim: Claim | None) -> bool:
    """Train, while the main process keeps others from the output."""
    work = options.work
    with state.main_process_first():
        _check_unfinished(options, state)
    set_seed(options.seed)
    try:
        return _run(options, state, claim)
    except BaseException as error:
        if state.is_main_process and not checkpoints(work):  # nothing to go on from: leave nothing behind
            shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise ValueError(
                f"batch_size must be what the memory of the GPU takes, got {options.images_per_batch}; with a smaller "
                "one, set accumulation to keep the images of a step."
            ) from error
        raise


def _run(options: Options, state: PartialState, claim: Claim | None) -> bool:
    data = _read(options)
    task = data.task
    model, processor = task.build(options, data.names)
    with state.main_process_first():
        _prepare_work(options, state.num_processes, data.images)
    with state.local_main_process_first():
        train, validation, test = (
            _decode(options, data, split, processor, state) for split in ("train", "validation", "test")
        )
    note = task.labels.check(train.labels, data.names)  # some of them may be of no readable image
    if note and state.is_main_process:
        tell(f"Note: {note}")
    state.wait_for_everyone()
    frozen = [] if options.last_stages is None else freeze(model, options.last_stages)
    size = input_size(processor) if options.train_size is None else (options.train_size, options.train_size)
    trainer = task.trainer(
        model.to(memory_format=torch.channels_last),
        training_arguments(options, len(train), state.num_processes, validation is not None),
        options,
        train,
        validation,
        task.augment(options, size),
        Normalize(processor),
        frozen=frozen,
        minutes=options.time_limit,
        callbacks=_callbacks(options.work, state.is_main_process),
        **task.trainer_options(processor, data.names),
    )
    last = checkpoints(options.work)
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
            _finish(claim, options, model, processor, trainer.state.log_history, data, validation, test)
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
        try:
            recorded = json.loads(record.read_text(encoding="utf-8"))
            before = recorded["options"] | {"processes": recorded["processes"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{record} must be the record of a run, but cannot be read: {error!r}.") from error
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


def _prepare_work(options: Options, processes: int, images: dict[str, int]) -> None:
    """Make the folder of the unfinished run, or raise ValueError where it was on other images."""
    record = options.work / RECORD
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8")).get("images", images)
        if before != images:
            raise ValueError(
                f"{options.work} holds an unfinished run on another number of images: {before}, now {images}. Set "
                "--restart to forget it."
            )
    shutil.rmtree(options.work / STAGING, ignore_errors=True)
    options.work.mkdir(parents=True, exist_ok=True)
    if not record.exists():
        write_json(record, _record(options, processes, images))


def _record(options: Options, processes: int, images: dict[str, int]) -> dict[str, Any]:
    """All that is needed to run this again."""
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
        "images": images,
        "precision": _best_precision() if options.precision == "auto" else options.precision,
        "hardware": hardware,
        "versions": versions,
    }


class Data(NamedTuple):
    """The splits of a run, undecoded."""

    task: TrainingTask
    names: list[str]
    train: Any
    validation: Any
    test: Any
    splits: dict[str, str]  # what the dataset calls those of them that it has

    @property
    def images(self) -> dict[str, int]:
        """How many images each split has."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: len(rows) for name, rows in splits.items() if rows is not None}


def _read(options: Options) -> Data:
    task = training_task(options.task)
    labels = task.labels
    splits = load_splits(
        options.dataset, options.subset, options.revision, options.image_column, options.label_column, labels
    )
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
    labels.find_names(splits, options.dataset, options.label_names, _folders(options))
    labels.check_rows(train)
    if validation is None and options.validation:
        train, validation = labels.hold_out(train, options.validation, options.seed)
    for rows in (validation, test):
        if rows is not None:
            labels.check_measured(rows)
    return Data(task, labels.names(train), train, validation, test, used)


def _folders(options: Options) -> list[Path] | None:
    """Where files may lie that rows name; None for anywhere."""
    return None if options.external_images else folders_of(options.dataset)


def _decode(
    options: Options, data: Data, split: str, processor: MobileNetImageProcessor, state: PartialState
) -> Images | None:
    rows = getattr(data, split)
    if rows is None:
        return None
    square = data.task.training_side(processor) if split == "train" else None
    return decode(
        rows,
        processor,
        Storage(options.work, shared=state.num_processes > 1),
        split,
        square,
        options.skip_unreadable,
        not state.is_main_process,
        _folders(options),
        data.task.labels,
    )


def _best_precision() -> str:
    """The precision that the hardware is fast at."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


def training_arguments(options: Options, count: int, processes: int, validates: bool) -> TrainingArguments:
    """The recipe in the words of the Trainer."""
    batch = options.images_per_batch * processes
    steps = -(-whole_batches(count, batch) // (batch * options.accumulation))
    images = min(batch * options.accumulation, count)
    precision = _best_precision() if options.precision == "auto" else options.precision
    return TrainingArguments(
        output_dir=str(options.work),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.images_per_batch,
        per_device_eval_batch_size=2 * options.images_per_batch,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.peak_learning_rate * images / 256,
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


def _callbacks(work: Path, is_main: bool) -> list[TensorBoardCallback]:
    """TensorBoard's log."""
    return [TensorBoardCallback(SummaryWriter(str(work / "runs")))] if is_main else []


def _finish(
    claim: Claim,
    options: Options,
    model: PreTrainedModel,
    processor: MobileNetImageProcessor,
    log: list[dict[str, float]],
    data: Data,
    validation: Images | None,
    test: Images | None,
) -> None:
    """Write the repository beside its place, measure what was written, and move it there.

    Raises:
        ValueError: Training has diverged.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
        raise diverged(options)
    work = options.work
    repository = work / "repository"
    shutil.rmtree(repository, ignore_errors=True)
    model.save_pretrained(repository)
    processor.save_pretrained(repository)
    shutil.copy(work / RECORD, repository)
    shutil.copy(work / "log.csv", repository)
    shutil.copytree(work / "runs", repository / "runs")
    plot_curves(log, repository / "curves.png", data.task.trainer.metric)
    written = type(model).from_pretrained(repository)
    command = json.loads((work / RECORD).read_text(encoding="utf-8"))["command"]
    measured = {}
    for role, images in (("validation", validation), ("test", test)):
        if images is not None:
            rows, reader = getattr(data, role), Reader(processor, _folders(options))
            split = Split(rows, lambda images=images: images, reader, options.skip_unreadable, is_known=True)
            scores = data.task.measure(written, processor, split, options.images_per_batch)
            measured[data.splits.get(role, HELD_OUT)] = scores.measured
            scores.plot(repository / WORDS[options.task].plot)  # of the last one
    write_card(repository, options, written, measured, command)
    claim.put(repository)
    if not options.keep_checkpoints:
        shutil.rmtree(work, ignore_errors=True)
    print(f"wrote {options.output}")
