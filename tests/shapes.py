"""Drawn images of shapes: as a folder in COCO's format, as folders of images and masks, and short runs on both."""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mobilenet.training.options import Options


SHAPES = {"circle": (220, 60, 50), "square": (60, 170, 70), "triangle": (60, 90, 210)}
SIZE = (96, 80)  # width and height


def draw(
    count: int, seed: int = 0, large: bool = False
) -> Iterator[tuple[Image.Image, Image.Image, list[tuple[int, list[int]]]]]:
    """Images of one to three shapes on noise, with their masks (0 is the ground) and boxes (x, y, width, height).

    Or of one large shape.
    """
    random = np.random.default_rng(seed)
    for _ in range(count):
        ground = random.normal(150, 12, (SIZE[1], SIZE[0], 3)).clip(0, 255).astype(np.uint8)
        image, mask = Image.fromarray(ground), Image.new("L", SIZE)
        pens = ImageDraw.Draw(image), ImageDraw.Draw(mask)
        objects = []
        cells, width, sides = (
            ((0,), 96, (48, 73)) if large else (random.permutation(3)[: random.integers(1, 4)], 32, (22, 31))
        )
        for cell in cells:
            kind, side = int(random.integers(3)), int(random.integers(*sides))
            left, top = (
                int(cell * width + random.integers(0, width - side + 1)),
                int(random.integers(0, SIZE[1] - side)),
            )
            right, bottom = left + side - 1, top + side - 1
            for pen, color in zip(pens, (list(SHAPES.values())[kind], kind + 1), strict=True):
                if kind == 0:
                    pen.ellipse((left, top, right, bottom), fill=color)
                elif kind == 1:
                    pen.rectangle((left, top, right, bottom), fill=color)
                else:
                    pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=color)
            objects.append((kind, [left, top, side, side]))
        yield image, mask, objects


def draw_coco(folder: Path, count: int, split: str = "train", seed: int = 0) -> dict:
    """Write images and annotations in COCO's format, whose category ids leave numbers out; return the annotations."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "images" / split).mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": []}
    for index, name in enumerate(SHAPES):
        content["categories"].append({"id": 10 * index + 7, "name": name, "supercategory": "shape"})
    for number, (image, _, objects) in enumerate(draw(count, seed)):
        name = f"{number:03}.png"
        image.save(folder / "images" / split / name)
        content["images"].append({"id": 100 + number, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
        for kind, box in objects:
            entry = {"id": len(content["annotations"]), "image_id": 100 + number, "category_id": 10 * kind + 7}
            content["annotations"].append({**entry, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    write(folder, content, split)
    return content


def write(folder: Path, content: dict, split: str = "train") -> None:
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def draw_scenes(folder: Path, count: int, seed: int = 0, large: bool = False) -> Path:
    """Write images and masks, one folder each, and the names of the classes."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number, (image, mask, _) in enumerate(draw(count, seed, large)):
        image.save(folder / "images" / f"{number:03}.png")
        mask.save(folder / "masks" / f"{number:03}.png")
    (folder / "classes.txt").write_text("\n".join(("ground", *SHAPES)) + "\n")
    return folder


def options(task: str, dataset: Path, output: Path, **kwargs: object) -> Options:
    """A small network and few steps."""
    from_scratch = {} if "model" in kwargs else {"width": 0.35}
    given = {"validation": 0.0, "epochs": 2, "batch_size": 4, "precision": "float32", **from_scratch, **kwargs}
    return Options(task=task, dataset=str(dataset), output=str(output), **given)


def encode_png(samples: np.ndarray, bits: int, palette: bool = False) -> bytes:
    """A PNG file of gray or of a palette, with 1, 2, 4 or 8 bits a pixel; Pillow writes gray of 1 and 8 alone."""
    height, width = samples.shape
    spread = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :].reshape(height, -1)
    lines = np.pad(np.packbits(spread, axis=1), ((0, 0), (1, 0)))  # a filter of none before each
    chunks = [(b"IHDR", struct.pack(">IIBB3x", width, height, bits, 3 if palette else 0))]
    chunks += [(b"PLTE", bytes(range(256)) * 3)] if palette else []
    chunks += [(b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def decode_png(data: bytes) -> np.ndarray | None:
    """What a PNG file of gray or of a palette stores, before anything is made of it; None where it has more to it."""
    chunks, start = [], 8
    while start + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        chunks.append((name, data[start + 8 : start + 8 + length]))
        start += 12 + length
    names = [name for name, _ in chunks]
    if names[:1] != [b"IHDR"] or not {*names[1:]} <= {b"PLTE", b"tRNS", b"IDAT", b"IEND"}:
        return None
    width, height, bits, kind, *_, is_interlaced = struct.unpack(">IIBBBBB", chunks[0][1])
    if kind not in (0, 3) or bits > 8 or is_interlaced:
        return None
    side = -(-width * bits // 8)
    stored = zlib.decompressobj().decompress(b"".join(part for name, part in chunks if name == b"IDAT"))
    lines, above = [], bytes(side)
    for start in range(0, height * (side + 1), side + 1):
        line = bytearray(stored[start + 1 : start + 1 + side])
        for index, value in enumerate(line):
            left, corner = (line[index - 1], above[index - 1]) if index else (0, 0)
            around = (left, above[index], corner)
            guess = left + above[index] - corner
            nearest = min(around, key=lambda one, guess=guess: abs(guess - one))
            line[index] = (value + (0, left, above[index], (left + above[index]) // 2, nearest)[stored[start]]) & 255
        lines.append(above := bytes(line))
    spread = np.unpackbits(np.frombuffer(b"".join(lines), np.uint8).reshape(height, side), axis=1)
    samples = spread[:, : width * bits].reshape(height, width, bits)
    return (samples * (1 << np.arange(bits)[::-1])).sum(-1).astype(np.uint8)
