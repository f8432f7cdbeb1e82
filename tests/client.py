"""What a user does in a fresh process: load a repository through the Auto classes, run it, train it, save it, push it.

Run as `python -I client.py`. The package cannot be imported unless `--package` names the folder that holds it. Prints
one line of JSON.

`python -I client.py serve` runs many, each in a fork of a process that has imported torch and nothing that knows of
the Hub: to import torch is most of the time that a client takes.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).parent))
from released import CODE


PACKAGE = ("mobilenet", "convert_checkpoint", *(name.removesuffix(".py") for name in CODE))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", help="repository: an id or a folder")
    parser.add_argument("image")
    parser.add_argument("--revision", default="main")
    parser.add_argument("--trust", type=json.loads, help="trust_remote_code: true, or false, or neither")
    parser.add_argument("--code-revision", default="main", help="of a repository that holds the code alone")
    parser.add_argument("--package", help="folder of the package, to import it first")
    parser.add_argument("--snapshot", help="download the repository into this folder or the 'cache', and use that")
    parser.add_argument("--all", action="store_true", help="use every class, not the classifier alone")
    parser.add_argument("--pipeline", help="task: make a pipeline for it, and do nothing else")
    parser.add_argument("--train", action="store_true", help="train a step")
    parser.add_argument("--save", help="folder to save model and processor in")
    parser.add_argument("--push", help="repository to push model and processor to")
    return parser.parse_args(arguments)


def train_a_step(model: torch.nn.Module, pixel_values: torch.Tensor) -> None:
    """Change weights and batch norm statistics."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pixel_values = torch.cat([pixel_values, pixel_values.flip(-1)])
    model(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    model.eval()


def load_backbone(source: str, features: torch.nn.Module, options: dict[str, Any]) -> torch.nn.Module:
    """AutoBackbone.from_pretrained; from the configuration where transformers 5 refuses: folders, and offline."""
    from transformers import AutoBackbone, AutoConfig

    if not os.path.isdir(source) and "HF_HUB_OFFLINE" not in os.environ:
        return AutoBackbone.from_pretrained(source, **options).eval()
    config = AutoConfig.from_pretrained(source, **options)
    backbone = AutoBackbone.from_config(config, trust_remote_code=options["trust_remote_code"])
    backbone.backbone.load_state_dict(features.state_dict(), strict=False)
    return backbone.eval()


@torch.no_grad()
def use_all(given: argparse.Namespace, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """Load and run everything that config.json names, beside the classifier."""
    from transformers import AutoModel, pipeline

    features = AutoModel.from_pretrained(given.source, **options)
    backbone = load_backbone(given.source, features, options | {"out_features": ["stem", "stage5"]})
    output, maps = features(**inputs), backbone(**inputs).feature_maps
    classify = pipeline("image-classification", model=given.source, **options)
    return {
        "pooled": output.pooler_output.tolist(),
        "maps": [list(m.shape) for m in maps],
        "last_map_is_last_hidden_state": torch.equal(maps[-1], output.last_hidden_state),
        "answers": classify(given.image),
    }


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Load classifier and processor, and do what else is asked for."""
    from huggingface_hub import snapshot_download
    from PIL import Image
    from transformers import AutoModelForImageClassification
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    if given.snapshot:
        folder = None if given.snapshot == "cache" else given.snapshot
        given.source = snapshot_download(given.source, revision=given.revision, local_dir=folder)
    options = {
        "revision": given.revision,
        "code_revision": given.code_revision,
        "trust_remote_code": given.trust,
    }
    if given.pipeline:
        from transformers import pipeline

        return {"found": len(pipeline(given.pipeline, model=given.source, **options)(given.image))}
    processor = AutoImageProcessor.from_pretrained(given.source, **options)
    model = AutoModelForImageClassification.from_pretrained(given.source, **options)
    inputs = processor(images=Image.open(given.image), return_tensors="pt")
    if given.train:
        train_a_step(model, inputs["pixel_values"])
    for thing in (model, processor):
        if given.save:
            thing.save_pretrained(given.save)
        if given.push:
            thing.push_to_hub(given.push)
    with torch.no_grad():
        result = {
            "classes": [f"{type(t).__module__}.{type(t).__qualname__}" for t in (model.config, model, processor)],
            "logits": model(**inputs).logits.tolist(),
        }
    return result | use_all(given, inputs, options) if given.all else result


def main(arguments: list[str]) -> None:
    given = parse(arguments)
    if given.package:
        sys.path.insert(0, given.package)
        import mobilenet  # noqa: F401
    else:
        sys.modules.update(dict.fromkeys(PACKAGE))  # to import any of them raises ModuleNotFoundError
    print(json.dumps(run(given)))


def serve() -> None:
    """For each line of input, a client in a process of its own; its exit status is a line of output."""
    import torch._dynamo  # noqa: F401 - transformers imports it sooner or later

    for line in sys.stdin:
        order = json.loads(line)
        process = os.fork()
        if not process:
            signal.alarm(300)
            os.environ.clear()
            os.environ.update(order["environment"])
            os.chdir(order["folder"])
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for stream, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            return main(order["arguments"])
        print(os.waitpid(process, 0)[1], flush=True)
    return None


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main(sys.argv[1:])
