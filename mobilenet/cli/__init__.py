"""The `mobilenet` command: a module for each subcommand, which says what it takes, imported when it is named."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from mobilenet.text import clean


# The subcommands: each is a function of its own name in a module of its own name, with a line of help for the list.
COMMANDS = {
    "classify": "Name what images show.",
    "detect": "Find objects in images: what they are, and where.",
    "segment": "Predict the class of every pixel of images.",
    "convert": "Convert a public checkpoint into a repository for transformers.",
    "train": "Train a classifier, detector or segmenter on labeled images and write a complete repository.",
    "evaluate": "Measure a checkpoint on labeled images.",
    "export": "Write a network for another engine.",
    "verify": "Compare a repository with what was released.",
}


# Options by the names that they had before.
RENAMED = {
    "convert": {
        "--no-verify": "--no-compare",
        "--unfold-batch-norm": "--unfuse",
        "--verify": "--compare",
        "--verify-on": "--compare-on",
    },
    "export": {"--pictures": "--images"},
}


def rename_options(command: str, arguments: list[str]) -> list[str]:
    """Arguments of a subcommand with the names that options have now, and a notice on stderr where one had another."""
    renamed = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if (new := RENAMED.get(command, {}).get(name)) is not None:
            typer.echo(f"Notice: {name} is called {new} now.", err=True)
            argument = new + equals + value
        renamed.append(argument)
    return renamed


def quiet_libraries() -> None:
    """Keep off the screen what other libraries say of themselves, and Pillow of images that it reads all the same."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # TensorBoard imports TensorFlow where there is one, unless it finds this.
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if sys.stderr is None or not sys.stderr.isatty():
        for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")


class Group(TyperGroup):
    """The subcommands, each imported when it is to run."""

    options: ClassVar[Mapping[str, str]] = {}  # of the one that runs: by the parameters that their values go to

    def list_commands(self, ctx: Any) -> list[str]:
        """List the names of all subcommands."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Find what the list of subcommands shows of one."""
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find the subcommand that is to run."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            single = typer.Typer(add_completion=False)
            single.command(name)(getattr(import_module(f".{name}", __package__), name))
            command = typer.main.get_command(single)
            rest = rename_options(name, rest)
            self.options = {p.name: p.opts[0] for p in command.params if p.opts[0].startswith("--")}
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run a subcommand, and end an expected error as one line on stderr and exit code 1."""
        try:
            if sys.stdout is None:
                raise OSError("stdout is closed: there is nowhere to print results.")
            if hasattr(sys.stdout, "reconfigure"):
                sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has every name
            quiet_libraries()
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # As the system would: at once, without waiting for threads, and so that a shell's loop ends too.
            sys.stdout.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        except BrokenPipeError:
            raise  # whoever read the output has seen enough: typer ends quietly
        except (OSError, ValueError, ImportError) as error:
            name, must, rest = " ".join(str(error).split()).partition(" must ")
            text = self.options.get(name, name) + must + rest
            # Advice names parameters too, after a comma or a semicolon, or at the start of a sentence.
            advice = r"(?<=[;,.] [Ss]et )\w+(?= )|(?<=; )\w+(?= allows it)"
            text = re.sub(advice, lambda m: self.options.get(m[0], m[0]), text)
            typer.echo(f"Error: {clean(text)}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(cls=Group, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"mobilenet {version('mobilenet')}")
        except PackageNotFoundError:
            typer.echo("mobilenet (not installed: runs from a clone)")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """MobileNets: classify, detect and segment, train and evaluate, convert checkpoints, export, verify."""
