"""Convert a MobileNet of any public source into a repository for transformers, and compare both.

python convert_checkpoint.py google/mobilenet_v2_1.0_224 my-mobilenet
"""

import sys

from mobilenet.cli import app
from mobilenet.conversion.convert import convert


__all__ = ["convert"]

if __name__ == "__main__":
    app(["convert", *sys.argv[1:]], prog_name="mobilenet")
