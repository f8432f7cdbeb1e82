"""Networks with all that transformers adds: to train, export and save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging

from .image_processing_mobilenet import MobileNetImageProcessor
from .loading import Files, Network, loading, read_config
from .modeling_mobilenet import MobileNetForImageClassification
from .networks import as_function, check_weights, configure
from .pickles import check_pickle
from .registration import AutoImageProcessor, AutoModelForImageClassification


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


def _pickles(files: Files) -> Iterator[Path]:
    """The pickles that transformers would read weights from."""
    if files.find("model.safetensors") is None:
        names = {"pytorch_model.bin"}
        for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            names.update(((files.read_json(index) or {}).get("weight_map") or {}).values())
        yield from filter(None, (files.find(name) for name in sorted(names) if not name.endswith(".safetensors")))


def load_network(
    model: str, revision: str | None = None, labels: list[str] | None = None
) -> tuple[MobileNetForImageClassification, MobileNetImageProcessor]:
    """Load a network in float32 and its image processor. Code that comes with them does not run.

    Args:
        model: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
        labels: Names for its classes; where there are more or fewer of them, the classifier starts anew.

    Raises:
        ValueError: There is no such model, it is broken, it is no MobileNet, or its weights do not fit its
            configuration.
    """
    files = Files(model, revision)
    with loading(model), _quiet():
        config = configure(read_config(files))
        for path in _pickles(files):
            check_pickle(path)
        if labels is not None:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: index for index, label in enumerate(labels)}
        options = {"revision": files.revision, "trust_remote_code": False}
        network, report = AutoModelForImageClassification.from_pretrained(
            model,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
        # transformers gives such tensors random values. Before version 5 it reports names alone, without shapes.
        mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
        check_weights(sorted({*report["missing_keys"], *mismatched} - {*(() if labels is None else _CLASSIFIER)}))
        return network, AutoImageProcessor.from_pretrained(model, **options)


def load_classifier(model: str, revision: str | None, device: torch.device, dtype: torch.dtype) -> Network:
    """A fused network as a function of arrays, from weights in any form that transformers loads."""
    network = load_network(model, revision)[0].fuse().to(device, dtype)
    return as_function(lambda pixels: network(pixel_values=pixels, return_dict=True).logits, device, dtype)
