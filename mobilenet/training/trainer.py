"""The training loop: transformers' Trainer, with the weights averaged, and a resumption that changes nothing."""

from __future__ import annotations

import copy
import csv
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from mobilenet.batch_norm import align_batch_norm
from mobilenet.progress import progress_bar

from .augment import mix
from .data import Batches, Images, Order, identity_collate
from .options import Options


AVERAGE = "average.safetensors"
STAGING = "incomplete"
CHECKPOINTS_KEPT = 2
ALIGNED = 1024  # images that give batch norms their first statistics


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, the oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def diverged(options: Options) -> ValueError:
    """The error of a run whose loss or weights are no finite numbers any more."""
    rate = options.peak_learning_rate
    return ValueError(f"learning_rate must be less: at {rate:g}, training has diverged; --restart begins anew.")


def whole_batches(count: int, batch: int) -> int:
    """The most images that make whole batches; all of them where they do not fill one."""
    return count // batch * batch or count


def freeze(model: nn.Module, last_stages: int) -> list[nn.Module]:
    """Leave only the classifier trainable, or with it the head and the last stages; return what is frozen.

    Args:
        model: A network on a backbone, such as a MobileNetForImageClassification.
        last_stages: 0 for the classifier alone, which is all of the network but its backbone; k for it, the head and
            the last k stages.

    Raises:
        ValueError: The network has fewer stages.
    """
    backbone = model.backbone
    count = len(backbone.stages)
    if not 0 <= last_stages <= count:
        raise ValueError(f"last_stages must be an integer from 0 to {count}, got {last_stages}.")
    frozen = [backbone.stem, *backbone.stages[: count - last_stages]]
    if last_stages == 0 and hasattr(backbone, "head"):
        frozen.append(backbone.head)
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters: those that decay, which are weights of convolutions and classifiers, and the others.

    Norms, biases and depthwise kernels do not decay.

    Source: MobileNetV1, Section 3.2 (arXiv:1704.04861): "very little or no weight decay (l2 regularization) on the
        depthwise filters"; regularize_depthwise=False of slim/nets/mobilenet_v1.py.
    """
    decaying = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) in decaying], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in decaying], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: list[dict[str, Any]], options: Options, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer that the options name.

    Source: RMSprop: slim/train_image_classifier.py (decay 0.9, momentum 0.9, epsilon 1).
    """
    if options.chosen_optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, learning_rate, alpha=0.9, eps=1.0, momentum=options.momentum)
    if options.chosen_optimizer == "adamw":
        return torch.optim.AdamW(groups, learning_rate)
    return torch.optim.SGD(groups, learning_rate, options.momentum, nesterov=options.momentum > 0)


class ImageTrainer(Trainer):
    """Trains a network on decoded images, and evaluates the moving average of its weights.

    A subclass says what a task's labels are to the network: it varies them with their images, and computes the loss.

    Args:
        model: A network that takes `pixel_values`.
        args: Arguments of the Trainer.
        options: The recipe.
        train: Images to train on.
        validation: Images to evaluate on after each epoch, or None.
        augment: Varies a batch of bytes.
        normalize: Turns bytes into what the network takes.
        frozen: Modules that do not train: their norms stay in eval mode.
        minutes: Time after which to save a checkpoint and stop.
        **kwargs: Further arguments of the Trainer.
    """

    metric = "accuracy"  # the metric of an evaluation that is shown
    measures_batches = False  # whether metrics take batch by batch: predictions of all images may not fit in memory

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        options: Options,
        train: Images,
        validation: Images | None,
        augment: nn.Module,
        normalize: nn.Module,
        frozen: list[nn.Module] | None = None,
        minutes: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.options = options
        args.batch_eval_metrics = self.measures_batches
        super().__init__(
            model,
            args,
            train_dataset=Batches(train),
            eval_dataset=None if validation is None else Batches(validation),
            data_collator=identity_collate,
            **kwargs,
        )
        self.augment = augment.to(args.device)
        self.normalize = normalize.to(args.device)
        self.frozen = frozen or []
        self.average = None
        if options.ema:
            self.average = AveragedModel(self.model, multi_avg_fn=self._blend, use_buffers=True)
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(TrainingCallback(self, minutes))

    # What a task decides

    def vary(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Vary bytes and labels for training."""
        return self.augment(pixels, labels)

    def loss(self, model: nn.Module, pixel_values: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch; in evaluation also what the metrics take, for each image."""
        raise NotImplementedError

    def sampling_weights(self) -> Tensor | None:
        """How often to draw each image, of shape (N,); None for all alike."""
        return None

    # What differs from the Trainer's own training step

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The task's loss: of varied images in training, of images as they are in evaluation."""
        pixels, labels = inputs["pixels"], inputs["labels"]
        if model.training:
            self._freeze()
            pixels, labels = self.vary(pixels, labels)
        loss, outputs = self.loss(model, self.normalize(pixels), labels)
        return (loss, outputs) if return_outputs else loss

    def _freeze(self) -> None:
        for module in self.frozen:
            module.eval()

    def _size(self) -> tuple[int, int]:
        """This epoch's height and width: they grow by 8 pixels at a time over the first 3/4 of the epochs.

        Source: progressive learning: EfficientNetV2, Section 4.1 (arXiv:2104.00298).
        """
        first, size = self.options.first_size, self.augment.size
        if not first:
            return size
        progress = int(self.state.epoch or 0) / (0.75 * self.options.epochs)
        return tuple(min(full, first + int((full - first) * progress) // 8 * 8) for full in size)

    def align_batch_norm(self) -> None:
        """Start from what the checkpoint computes: give its batch norms the statistics of the varied images."""
        images = self.train_dataset.images
        chosen = torch.linspace(0, len(images) - 1, min(len(images), ALIGNED)).round().long()
        with self._random_numbers_kept():
            torch.manual_seed(self.options.seed)
            batches = (images.batch(part.numpy()) for part in chosen.split(self.options.images_per_batch))
            varied = (
                self.vary(*(batch[name].to(self.args.device) for name in ("pixels", "labels")))[0] for batch in batches
            )
            # What stands anew on a checkpoint's backbone has learned nothing to keep.
            align_batch_norm(self.model, map(self.normalize, varied), spares_new=True)

    def _random_numbers_kept(self) -> AbstractContextManager[None]:
        """Whatever is drawn within, training goes on with the random numbers it would have had."""
        return torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else [])

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Decay only what shall decay."""
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.options.weight_decay)
            self.optimizer = make_optimizer(groups, self.options, self.args.learning_rate)
        return self.optimizer

    def _get_train_sampler(self, *args: Any) -> Order:
        # Whole epochs are exact in state.epoch; within one, its whole part is the number of the epoch.
        return Order(
            len(self.train_dataset),
            whole_batches(len(self.train_dataset), self.options.images_per_batch * self.args.world_size),
            self.options.seed,
            lambda: int(self.state.epoch or 0),
            self.sampling_weights(),
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing: the Trainer's estimate is for text."""
        return 0

    # The average of the weights

    def _blend(self, averages: list[Tensor], currents: list[Tensor], _: Tensor | int) -> None:
        """Move averages toward current values; early on faster, as there is little to average yet.

        Source: tf.train.ExponentialMovingAverage with num_updates.
        """
        step = self.state.global_step
        decay = min(self.options.ema, (1 + step) / (10 + step))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, currents, 1 - decay)
        else:
            torch._foreach_copy_(averages, currents)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within, the model has the averaged weights."""
        if self.average is None or not self.state.global_step:
            yield
            return
        current = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.average.module.state_dict())
        try:
            yield
        finally:
            self.model.load_state_dict(current)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the averaged weights, and leave the random numbers as they were."""
        with self.averaged_weights(), self._random_numbers_kept():
            return super().evaluate(*args, **kwargs)

    # Checkpoints that are complete or absent

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        if (folder / name).exists():
            return
        self.args.output_dir = str(folder / STAGING)
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.output_dir = str(folder)
        if self.args.should_save and self.average is not None:
            save_file(
                {name: tensor.contiguous() for name, tensor in self.average.module.state_dict().items()},
                folder / STAGING / name / AVERAGE,
            )
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            os.replace(folder / STAGING / name, folder / name)
            (folder / STAGING).rmdir()
            for old in checkpoints(folder)[:-CHECKPOINTS_KEPT]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            self.average.module.load_state_dict(load_file(Path(resume_from_checkpoint) / AVERAGE))
            self.average.n_averaged.fill_(1)  # not the first time: the first one copies


class ClassifierTrainer(ImageTrainer):
    """Trains a classifier, whose output has logits, on images and their classes: see ImageTrainer.

    Args:
        teacher: The checkpoint that it starts from, with its own classes, where options.retain is above 0.
    """

    TEMPERATURE = 2.0  # of probabilities that are retained, by which small ones count too

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        options: Options,
        train: Images,
        *rest: Any,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, options, train, *rest, **kwargs)
        self.teacher = teacher
        if teacher is not None:
            self.former_classifier = copy.deepcopy(teacher.classifier).to(args.device).requires_grad_(False)
            self.teacher = teacher.fuse().to(args.device, memory_format=torch.channels_last)
            self.model.dropout.register_forward_pre_hook(self._keep_features)
        counts = torch.bincount(torch.from_numpy(train.labels)).float()
        self.class_weights = counts.sum() / (len(counts) * counts)  # their mean over the images is 1

    def vary(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Vary bytes alone: a class holds for all that an image may look like."""
        return self.augment(pixels, self._size()), labels

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy: of varied images and soft targets in training, plain in evaluation."""
        pixels, labels = inputs["pixels"], inputs["labels"]
        if model.training:
            self._freeze()
            options = self.options
            pixels, _ = self.vary(pixels, labels)
            targets = F.one_hot(labels, len(self.class_weights)).float()
            if options.mixup:
                pixels, targets = mix(pixels, targets, options.mixup)
            pixel_values = self.normalize(pixels)
            logits = model(pixel_values=pixel_values).logits.float()
            weights = self.class_weights.to(logits.device) if options.balance == "weights" else None
            loss = F.cross_entropy(logits, targets, weight=weights, label_smoothing=options.label_smoothing)
            if self.teacher is not None:
                loss = loss + options.retain * self._forgotten(pixel_values)
        else:
            logits = model(pixel_values=self.normalize(pixels)).logits.float()
            loss = F.cross_entropy(logits, labels)
        return (loss, {"logits": logits}) if return_outputs else loss

    def _keep_features(self, dropout: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0]

    def _forgotten(self, pixel_values: Tensor) -> Tensor:
        """How far the checkpoint's own classifier, on the network's features, is from what the checkpoint predicts.

        Source: learning without forgetting: Li and Hoiem, Section 3 (arXiv:1606.09282); the former classifier stays.
        """
        with self.accelerator.autocast():  # the network itself has its own
            with torch.no_grad():
                expected = self.teacher(pixel_values=pixel_values).logits
            found = self.former_classifier(self.features)
        logarithms = (F.log_softmax(logits.float() / self.TEMPERATURE, 1) for logits in (found, expected))
        return self.TEMPERATURE**2 * F.kl_div(*logarithms, reduction="batchmean", log_target=True)

    def sampling_weights(self) -> Tensor | None:
        """Rare classes as often as the others, where the options say so."""
        if self.options.balance != "sampling":
            return None
        return self.class_weights[torch.from_numpy(self.train_dataset.images.labels)]


class TrainingCallback(TrainerCallback):
    """What happens along the way: averaging, checkpoints, the time limit, progress, the log as CSV.

    Args:
        trainer: The trainer.
        minutes: Time after which to stop.
    """

    def __init__(self, trainer: ImageTrainer, minutes: float | None) -> None:
        self.trainer = trainer
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.progress = progress_bar("training", quiet=not trainer.is_world_process_zero())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let each process vary its images in its own way."""
        torch.manual_seed(self.trainer.options.seed + args.process_index)
        self.progress.start()
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Average the weights; save where it is time to."""
        if self.trainer.average is not None:
            self.trainer.average.update_parameters(self.trainer.model)
        every = self.trainer.options.save_steps
        late = self.deadline is not None and self._as_first_process(time.monotonic() > self.deadline)
        control.should_training_stop = control.should_training_stop or late
        if late or (every and state.global_step % every == 0):
            # At the end of an epoch, the checkpoint waits for the evaluation.
            control.should_save = state.epoch != int(state.epoch)
        self.progress.update(self.task, completed=state.global_step)

    def _as_first_process(self, late: bool) -> bool:
        """What the first process says: all must stop at the same step."""
        if self.trainer.args.world_size == 1:
            return late
        return bool(broadcast(torch.tensor(float(late), device=self.trainer.args.device)))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log and save; where the time limit broke an epoch off, that is done."""
        complete = state.epoch == int(state.epoch)
        control.should_log = complete
        control.should_evaluate = control.should_evaluate and complete
        control.should_save = complete

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Clear the progress bar."""
        self.progress.stop()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the log anew: rows that a killed run had added since its last checkpoint disappear."""
        if not state.is_world_process_zero:
            return
        columns = [
            "step",
            "epoch",
            *sorted({name for entry in state.log_history for name in entry} - {"step", "epoch"}),
        ]
        path = Path(args.output_dir) / "log.csv"
        partial = path.with_suffix(".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(state.log_history)
        os.replace(partial, path)
        entry, metric = state.log_history[-1], self.trainer.metric
        if not math.isfinite(float(entry.get("loss", 0))):
            raise diverged(self.trainer.options)
        if f"eval_{metric}" in entry or ("loss" in entry and state.epoch == int(state.epoch)):
            shown = {"loss": "loss {:.4f}", "eval_loss": "validation loss {:.4f}"}
            shown[f"eval_{metric}"] = metric.replace("_", " ") + " {:.2%}"
            figures = ", ".join(text.format(float(entry[key])) for key, text in shown.items() if key in entry)
            self.progress.console.print(f"epoch {state.epoch:g} of {args.num_train_epochs:g}: {figures}")
