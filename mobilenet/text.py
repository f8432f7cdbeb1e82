"""Text from outside, such as labels and file names, made fit for terminals and for Markdown."""

import re


def clean(text: str) -> str:
    """Replace what a terminal would obey instead of show: control characters, escapes, changes of direction."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def markdown(text: str) -> str:
    """Escape what Markdown would obey instead of show, HTML included; fit for a line and for a cell of a table."""
    return re.sub(r"([\\`*_\[\]<>|~&$])", r"\\\1", clean(text))


def percent(share: float | None) -> str:
    """A share for people."""
    return "none" if share is None else f"{100 * share:.2f} %"
