"""Networks with all that transformers adds: to train, export and save."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from . import registration
from .image_processing_mobilenet import MobileNetImageProcessor
from .loading import Files, Network, loading, read_config
from .networks import as_function, check_weights, configure
from .pickles import check_pickle
from .tasks import CLASSIFICATION, Task, check_task, task_of


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings and bars of transformers off the screen."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


_CLASSIFIER = ("classifier.bias", "classifier.weight")
_OF_CLASSIFIERS = ("classifier_dropout", "classifier_hidden_sizes", "classifier_hidden_act")  # fields


def _beside_backbone(names: Iterable[str]) -> set[str]:
    """Those of these weights that are not the backbone's."""
    return {name for name in names if not name.startswith("backbone.")}


def _pickles(files: Files) -> Iterator[Path]:
    """The pickles that transformers would read weights from."""
    if files.find("model.safetensors") is None:
        names = {"pytorch_model.bin"}
        for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            names.update(((files.read_json(index) or {}).get("weight_map") or {}).values())
        yield from filter(None, (files.find(name) for name in sorted(names) if not name.endswith(".safetensors")))


def load_network(
    model: str,
    revision: str | None = None,
    labels: list[str] | None = None,
    task: Task = CLASSIFICATION,
    **fields: Any,
) -> tuple[PreTrainedModel, MobileNetImageProcessor]:
    """Load a network in float32 and its image processor. Code that comes with them does not run.

    Args:
        model: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
        labels: Names for its classes; where there are more or fewer of them, what predicts classes starts anew.
        task: What the network shall be for.
        **fields: Of the configuration, with which a classifier becomes a network for another task: what it has
            beside the classifier's backbone starts anew.

    Raises:
        ValueError: There is no such model, it is broken, it is no MobileNet, it is for another task, or its weights do
            not fit its configuration.
    """
    files = Files(model, revision)
    with loading(model), _quiet():
        content = read_config(files)
        if files.find("adapter_config.json") is not None:
            # With PEFT, transformers would load the network that it names instead, wherever that lies.
            raise ValueError("it holds an adapter, which must be merged first, by merge_and_unload().")
        becomes = bool(fields) and task is not CLASSIFICATION and task_of(content) is CLASSIFICATION
        if becomes:
            content = {name: content[name] for name in content if name not in _OF_CLASSIFIERS} | fields
        else:
            check_task(content, task)
        config = configure(content)
        for path in _pickles(files):
            check_pickle(path)
        if labels is not None:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: index for index, label in enumerate(labels)}
        options = {"revision": files.revision, "trust_remote_code": False}
        network, report = getattr(registration, task.auto_class).from_pretrained(
            model,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
        # transformers gives such tensors random values. Before version 5 it reports names alone, without shapes.
        mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
        wrong = {*report["missing_keys"], *mismatched}
        if becomes:
            anew = _beside_backbone(wrong)
        elif task is CLASSIFICATION:
            anew = {*(() if labels is None else _CLASSIFIER)}
        else:
            anew = set() if labels is None else _beside_backbone(mismatched)
        check_weights(sorted(wrong - anew))
        return network, registration.AutoImageProcessor.from_pretrained(model, **options)


def load_function(
    model: str, revision: str | None, device: torch.device, dtype: torch.dtype, task: Task = CLASSIFICATION
) -> Network:
    """A fused network as a function of arrays, from weights in any form that transformers loads."""
    network = load_network(model, revision, task=task)[0].fuse().to(device, dtype)

    def run(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = network(pixel_values=pixels, return_dict=True)
        return tuple(outputs[name] for name in task.outputs)

    return as_function(run, device, dtype)
