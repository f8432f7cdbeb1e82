"""The `mobilenet` command: what each subcommand takes. The work lies in a module for each, imported when it runs."""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .classify import Engine, Layout, default_model, load, run
from .text import clean


# Chelsea, by Stéfan van der Walt, who put the photograph into the public domain (CC0); scikit-image has it too.
EXAMPLE = Path(__file__).with_name("example.jpg")

# Subcommands that bring their own options: module and function.
MODULES = {
    "convert": ("convert_checkpoint", "command"),
    "train": ("train", "train"),
    "evaluate": ("train", "evaluate"),
    "export": ("export", "command"),
    "verify": ("verify", "command"),
}


class Group(TyperGroup):
    """Subcommands, of which those in MODULES are imported when they are named."""

    def list_commands(self, ctx: Any) -> list[str]:
        """List the names of all subcommands."""
        return [*dict.fromkeys([*super().list_commands(ctx), *MODULES])]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Find a subcommand by its name."""
        if cmd_name in MODULES and cmd_name not in self.commands:
            module, function = MODULES[cmd_name]
            single = typer.Typer(add_completion=False)
            single.command(cmd_name)(getattr(import_module(f".{module}", __package__), function))
            self.commands[cmd_name] = typer.main.get_command(single)
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        """Run a subcommand, and end an expected error as one line on stderr and exit code 1."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # As the system would: at once, without waiting for threads, and so that a shell's loop ends too.
            sys.stdout.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        except BrokenPipeError:
            raise  # whoever read the output has seen enough: typer ends quietly
        except (OSError, ValueError, ImportError) as error:
            typer.echo(f"Error: {clean(' '.join(str(error).split()))}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


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
    """MobileNets: classify pictures, train and evaluate, convert checkpoints, export to other engines, verify."""


@app.command()
def classify(
    pictures: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders (with all below them), quoted patterns such as 'trips/**/*.jpg', URLs, or - to read "
            "such names from stdin, one a line.",
            show_default=False,
        ),
    ] = None,
    example: Annotated[
        bool, typer.Option("--example", help="Classify the photograph of a cat that comes with the package.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Folder or Hub id of a MobileNet; in a clone, by default its own.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Labels for each picture.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines, one for each picture.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a row for each label of a picture.")] = False,
    engine: Annotated[
        Engine, typer.Option(help="What runs the network: what the model was exported for, or torch.")
    ] = Engine.AUTO,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that the network sees at once.")] = 8,
    fast_decode: Annotated[
        bool,
        typer.Option("--fast-decode", help="Decode large JPEGs at a reduced size: several times as fast, not exact."),
    ] = False,
) -> None:
    """Name what pictures show. No code that comes with a model is run.

    A picture that cannot be read is reported on stderr, and the rest goes on; the exit code is then 1.

    --json prints an object a line, with file, and predictions (of label, index and score) or error. --csv prints the
    columns file, rank, index, label and score.
    """
    pictures = [*(pictures or []), *([str(EXAMPLE)] if example else [])]
    if not pictures:
        raise typer.BadParameter("name pictures, or take --example.", param_hint="PICTURES")
    if as_json and as_csv:
        raise typer.BadParameter("--json and --csv exclude each other.")
    model = model or default_model()
    if model is None:
        message = "name a folder or a Hub id: the default weights come with a clone, not with the installed package."
        raise typer.BadParameter(message, param_hint="--model")
    layout = Layout.JSON if as_json else Layout.CSV if as_csv else Layout.TABLE
    classifier = load(model, revision=revision, engine=engine, fast_decode=fast_decode)
    typer.echo(f"Engine: {classifier.engine}", err=True)
    if run(pictures, classifier, layout=layout, top_k=top_k, batch_size=batch_size):
        raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="mobilenet")
