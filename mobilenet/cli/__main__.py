"""`python -m mobilenet.cli`, as torchrun wants it."""

from . import app


app(prog_name="mobilenet")
