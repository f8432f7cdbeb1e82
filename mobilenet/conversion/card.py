"""The model card of a converted network: where its weights come from, how they were checked, how to use them."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from mobilenet.architectures_mobilenet import ARCHITECTURES
from mobilenet.configuration_mobilenet import MobileNetConfig
from mobilenet.text import markdown

from .checkpoint import Checkpoint, Origin, sha256
from .proof import Comparison


def write_card(
    config: MobileNetConfig,
    origin: Origin,
    checkpoint: Checkpoint,
    comparisons: Sequence[Comparison],
    caveats: Sequence[str],
) -> ModelCard:
    """Describe a converted network."""
    architecture = ARCHITECTURES[config.architecture]
    data = ModelCardData(
        license=checkpoint.license,
        library_name="transformers",
        pipeline_tag="image-classification" if config.num_labels else "image-feature-extraction",
        tags=["vision", "mobilenet", f"arxiv:{architecture.paper}"],
        datasets=["imagenet-1k"] if config.num_labels in (1000, 1001) else None,
        metrics=["accuracy"],
        base_model=origin.given if origin.revision else None,
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {architecture.title}, width {config.width_multiplier:g}, {config.image_size} pixels",
        f"Converted from {checkpoint.kind}. "
        + (f"{config.num_labels} classes. " if config.num_labels else "Features, without a classifier. ")
        + f"Paper: [arXiv:{architecture.paper}](https://arxiv.org/abs/{architecture.paper}).",
        _USE,
        *([_FINE_TUNE] if config.has_batch_norm else []),
        "## Source",
        _source(origin, checkpoint),
        "## Verification",
        *([_table(Comparison.COLUMNS, [comparison.cells for comparison in comparisons])] if comparisons else []),
        *dict.fromkeys([*caveats, *checkpoint.warnings]),
        f"Made with {', '.join(_versions())}.",
        *(["## Notes", *checkpoint.notes] if checkpoint.notes else []),
    ]
    return ModelCard("\n\n".join(sections) + "\n")


_USE = """## Use

```python
from transformers import pipeline

classify = pipeline("image-classification", model="path/to/this/repository", trust_remote_code=True)
classify("photo.jpg")
```

`trust_remote_code` runs the six Python files of this repository: `architectures_mobilenet.py`,
`configuration_mobilenet.py`, `image_processing_mobilenet.py`, `layers_mobilenet.py`, `modeling_mobilenet.py` and
`preprocessing_mobilenet.py`. After `import mobilenet`, the installed package, it is not needed."""

_FINE_TUNE = """## Fine-tune

`mobilenet train pictures --model path/to/this/repository --output fine-tuned`, or any training loop for PyTorch."""


def _source(origin: Origin, checkpoint: Checkpoint) -> str:
    given = f"[{origin.given}]({origin.url})" if origin.url else markdown(Path(origin.given).name)
    where = f"{given} at revision `{origin.revision}`" if origin.revision else given
    return f"{where}\n\n" + _table(
        ("file", "SHA-256"), [(markdown(path.name), f"`{sha256(path)}`") for path in checkpoint.files]
    )


def _versions() -> list[str]:
    try:
        own = [f"mobilenet {version('mobilenet')}"]
    except PackageNotFoundError:  # a clone
        own = []
    return [
        *own,
        f"transformers {transformers.__version__}",
        f"torch {torch.__version__}",
        f"Python {platform.python_version()}",
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
