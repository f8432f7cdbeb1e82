"""Feed a target of hostile.py what a coverage-guided fuzzer makes of its seeds.

python tests/fuzz.py image corpus/image -max_total_time=600

Every bug ends the run, and leaves the input that shows it: a crash, a hang, an error that is not the target's, or more
memory than -rss_limit_mb allows. `-print_final_stats=1` counts; options are libFuzzer's.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import atheris


sys.path.insert(0, str(Path(__file__).parents[1]))
# Modules that are not to be instrumented come first: they would be compiled anew, which takes minutes.
with atheris.instrument_imports(include=["PIL"]):
    import PIL.Image

    PIL.Image.init()
import torch
from transformers import (  # noqa: F401
    AutoBackbone,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    Trainer,
)


with atheris.instrument_imports(include=["convert_checkpoint", "mobilenet", "h5py", "zipfile", "flatbuffers"]):
    import hostile

with suppress(ImportError):  # what training needs may lack
    import datasets  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import torchmetrics.functional.classification  # noqa: F401

    with atheris.instrument_imports(include=["mobilenet"]):
        import mobilenet.training.boxes
        import mobilenet.training.masks
        import mobilenet.training.report  # noqa: F401


def main() -> None:
    """Write the seeds of a target into its corpus, and start."""
    torch.set_num_threads(1)
    name, corpus, *options = sys.argv[1:]
    target = hostile.TARGETS[name]
    folder = Path(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    seeds = list(target.seeds())
    if not seeds:
        sys.exit(f"{name} has no seeds: its real files are looked for in the folder that MOBILENET_TEST_DATA names.")
    for index, seed in enumerate(seeds):
        (folder / f"seed-{index}").write_bytes(seed)
        hostile.attempt(target, seed)
    longest = max(map(len, seeds))
    defaults = [f"-max_len={2 * longest}", "-timeout=30", "-rss_limit_mb=4096", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *defaults, *options, corpus], lambda data: hostile.attempt(target, data))
    with hostile.bounded_memory():
        atheris.Fuzz()


if __name__ == "__main__":
    main()
