"""The `mobilenet` command: what each subcommand takes. The work lies in a module for each, imported when it runs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import convert_checkpoint


class Group(TyperGroup):
    """Subcommands whose expected errors end as one line on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run a subcommand."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # whoever read the output has seen enough: typer ends quietly
        except (OSError, ValueError, ImportError) as error:
            from .classify import clean

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
    """MobileNets: classify pictures, convert checkpoints."""


@app.command()
def classify(
    pictures: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders (with all below them), quoted patterns such as 'trips/**/*.jpg', URLs, or - to read "
            "such names from stdin, one a line.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or Hub id of a MobileNet.", show_default=False)
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Labels for each picture.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each picture.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a CSV row for each label.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that the network sees at once.")] = 32,
) -> None:
    """Name what pictures show. No code that comes with a model is run.

    A picture that cannot be read is reported on stderr, and the rest goes on; the exit code is then 1.

    With --json, each picture gives one line: {"file", "predictions": [{"label", "index", "score"}]}, or
    {"file", "error"}. With --csv, the columns are file, rank, index, label, score.
    """
    from . import classify

    if as_json and as_csv:
        raise typer.BadParameter("--json and --csv exclude each other.")
    model = model or classify.default_model()
    if model is None:
        raise typer.BadParameter("name a folder or a Hub id: there is no default model.", param_hint="--model")
    layout = classify.JSON if as_json else classify.CSV if as_csv else classify.TABLE
    classifier = classify.load(model, revision=revision)
    if classify.run(pictures, classifier, layout=layout, top_k=top_k, batch_size=batch_size):
        raise typer.Exit(1)


app.command("convert")(convert_checkpoint.command)


if __name__ == "__main__":
    app(prog_name="mobilenet")
