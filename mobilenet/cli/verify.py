"""The options of `mobilenet verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from mobilenet import integrity
from mobilenet.text import clean


def show(findings: list[integrity.Finding], as_json: bool = False) -> None:
    """Print findings: a line of JSON for each file; or its name and verdict, and its SHA-256 in a line of its own."""
    if as_json:
        for finding in findings:
            print(json.dumps(finding._asdict()))
        return
    console = Console(highlight=False)
    for file, checksum, verdict, is_problem in findings:
        text = Text(f"{clean(file)}  ")
        text.append(clean(verdict), style="bold red" if is_problem else "green")
        console.print(text, soft_wrap=True)
        if checksum:
            console.print(f"    {checksum}", style="dim", soft_wrap=True)


def verify(
    folder: Annotated[Path, typer.Argument(help="Repository, as downloaded or cloned.", show_default=False)],
    against: Annotated[
        str | None, typer.Option(help="Hub id of the repository that it should equal.", show_default=False)
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of that repository.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines, one for each file.")] = False,
) -> None:
    """Print the SHA-256 of a repository's code, configurations and weights, and compare them with what was released.

    Code is compared with that of this installation; with --against, every file with what the Hub tells of another
    repository. The exit code is 1 if a file differs, is a pickle, is a link out of the folder, or runs other code.
    """
    findings = integrity.verify(folder, against, revision)
    show(findings, as_json)
    if any(finding.is_problem for finding in findings):
        raise typer.Exit(1)
