import io
import json
import os
import socket
import threading
import time
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import transformers
from mobilenet.preprocessing_mobilenet import UnreadableImageError, open_image
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mobilenet import (
    RECIPES,
    MobileNetConfig,
    MobileNetForImageClassification,
    MobileNetImageProcessor,
    preprocessing_mobilenet,
)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def native(**kwargs: object) -> object:
    """The processor of transformers that uses Pillow."""
    name = "MobileNetV2ImageProcessorPil"
    if not hasattr(transformers, name):  # transformers before 5.5
        name = "MobileNetV2ImageProcessor"
    return getattr(transformers, name)(**kwargs)


def photo(width: int = 60, height: int = 40, mode: str = "RGB") -> Image.Image:
    """A photo of noise, the same each time."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


def pixels(images: object, processor: MobileNetImageProcessor | None = None, **kwargs: object) -> torch.Tensor:
    return (processor or MobileNetImageProcessor())(images, return_tensors="pt", **kwargs).pixel_values


def raw(images: object, **kwargs: object) -> torch.Tensor:
    """Images in values of 0 to 255, without resizing or cropping."""
    off = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), False)
    return pixels(images, **off, **kwargs)


def assert_levels(ours: torch.Tensor, theirs: torch.Tensor, one_level: float) -> None:
    """Equal, but for one level of 255 on at most 1 % of the values.

    The cause: Pillow takes the edges of the crop's box as floats of 32 bits, so that values next to a rounding
    boundary may fall to the other side.
    """
    difference = (ours - theirs).abs()
    assert difference.max() <= one_level * 1.001
    assert (difference > 1e-6).float().mean() <= 0.01


# Equal to transformers


@pytest.mark.parametrize("name", RECIPES)
def test_photographs_equal_transformers_under_every_recipe(photographs, name):
    recipe = RECIPES[name]
    ours = MobileNetImageProcessor.from_recipe(name)
    edge = int(224 / recipe.crop_fraction)
    theirs = native(
        size={"height": 224, "width": 224} if recipe.fit == "stretch" else {"shortest_edge": edge},
        resample=recipe.resample,
        image_mean=list(recipe.mean),
        image_std=list(recipe.std),
        do_center_crop=recipe.fit not in ("corner", "whole"),
    )
    every = 1 if name == "google" else 15
    for path in photographs[::every]:
        image = open_image(path).convert("RGB")
        options, shown = {}, slice(None)
        if recipe.fit == "corner":  # the rest is padding
            longest = max(image.size)
            options["size"] = {"height": 224 * image.height // longest, "width": 224 * image.width // longest}
            shown = (..., slice(options["size"]["height"]), slice(options["size"]["width"]))
        expected = theirs(image, return_tensors="pt", **options).pixel_values
        assert_levels(pixels(image, ours)[shown], expected, one_level=1 / 255 / min(recipe.std))


@pytest.mark.parametrize(
    "options",
    [
        {"do_resize": False},
        {"do_center_crop": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_resize": False, "do_center_crop": False},
        {"size": {"height": 50, "width": 70}},
        {"size": {"shortest_edge": 31}, "crop_size": {"height": 20, "width": 90}},
        {"crop_size": {"height": 33, "width": 21}},
        {"resample": 0},
        {"resample": 3},
        {"image_mean": list(MEAN), "image_std": list(STD)},
        {"rescale_factor": 1 / 127.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(60, 40), (41, 67), (300, 300)])
def test_every_switch_works_as_in_transformers(options, size):
    image = photo(*size)
    options = {"size": {"shortest_edge": 48}, "crop_size": {"height": 32, "width": 32}, **options}
    expected = native()(image, return_tensors="pt", **options).pixel_values
    level = options.get("rescale_factor", 1 / 255) if options.get("do_rescale", True) else 1
    level /= min(options.get("image_std", [0.5])) if options.get("do_normalize", True) else 1
    for given in (pixels(image, **options), pixels(image, MobileNetImageProcessor(**options))):
        assert given.shape == expected.shape
        assert_levels(given, expected, level)


def test_values_by_hand():
    image = Image.new("RGB", (4, 4), (0, 51, 255))
    values = pixels(image, size=4, crop_size=4)[0, :, 0, 0]
    torch.testing.assert_close(values, torch.tensor([-1.0, -0.6, 1.0]))
    values = pixels(image, size=4, crop_size=4, image_mean=MEAN, image_std=STD)[0, :, 0, 0]
    torch.testing.assert_close(values, (torch.tensor([0, 0.2, 1]) - torch.tensor(MEAN)) / torch.tensor(STD))


# Images of every kind


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("L", (2, 2), 100), (100, 100, 100)),
        (Image.new("LA", (2, 2), (100, 0)), (255, 255, 255)),
        (Image.new("LA", (2, 2), (100, 51)).convert("La"), (224, 224, 224)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 128)), (127, 127, 127)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("YCbCr", (2, 2), (128, 128, 128)), (128, 128, 128)),
        (Image.new("HSV", (2, 2), (0, 0, 77)), (77, 77, 77)),
        (Image.new("I;16", (2, 2), 257 * 9), (9, 9, 9)),
        (Image.new("I", (2, 2), 65535), (255, 255, 255)),
        (Image.new("I", (2, 2), 200), (200, 200, 200)),
        (Image.new("F", (2, 2), 0.2), (51, 51, 51)),
        (Image.new("F", (2, 2), 51.0), (51, 51, 51)),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_pillow_images_of_every_mode(image, expected):
    assert raw(image)[0, :, 0, 0].tolist() == list(expected)


def test_palettes_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert raw(image)[0, :, 0].T.tolist() == [[10, 20, 30], [40, 50, 60]]
    image.info["transparency"] = 1
    assert raw(image)[0, :, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize("make", [np.array, lambda image: torch.from_numpy(np.array(image))], ids=["numpy", "torch"])
def test_arrays_in_either_layout_equal_the_image(make):
    image = photo()
    expected = pixels(image)
    array = make(image)
    first = array.transpose(2, 0, 1) if isinstance(array, np.ndarray) else array.permute(2, 0, 1)
    for given in (array, first, array[None], first[None], [array, first], [[array], [first]]):
        for values in pixels(given):
            assert torch.equal(values, expected[0])


def test_floats_in_either_range_equal_the_image():
    image = photo()
    array = np.array(image)
    unit = (array / 255).astype(np.float32)
    options = {"do_resize": False, "crop_size": 32}
    expected = pixels(image, **options)
    for given in (array.astype(np.float32), unit, torch.from_numpy(unit), unit.astype(np.float64)):
        torch.testing.assert_close(pixels(given, **options), expected, rtol=0, atol=1e-6)
    half = pixels(torch.from_numpy(unit).bfloat16(), **options)
    torch.testing.assert_close(half, expected, rtol=0, atol=0.01)


def test_floats_are_resized_without_rounding():
    image = photo(300, 200)
    floats = pixels(np.array(image) / 255)
    assert 1e-4 < (floats - pixels(image)).abs().max() <= 1.01 / 127.5


def test_floats_keep_their_units_without_rescaling():
    unit = np.full((8, 8, 3), 0.25, np.float32)
    assert raw(unit).unique().tolist() == [0.25]
    assert raw(unit * 255).unique().tolist() == [63.75]


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_floats_of_a_batch_have_one_range(make):
    """A frame that is all but black is so beside a brighter one, too."""
    batch = np.zeros((2, 8, 8, 3), np.float32)
    batch[0], batch[1] = 100, 1
    expected = pixels([image.astype(np.uint8) for image in batch])
    torch.testing.assert_close(pixels(make(batch)), expected, rtol=0, atol=1e-6)
    assert raw(make(batch))[1].unique().tolist() == [1]
    assert raw(make(batch / 255))[1].unique().tolist() == pytest.approx([1 / 255])


def test_transparency_of_16_bits_shows_white():
    image = Image.fromarray(np.array([[0, 256 * 100, 65535]], np.uint16))
    image.info["transparency"] = 256 * 100
    assert raw(image)[0, 0].tolist() == [[0, 255, 255]]
    four = raw(image, do_convert_rgb=False)[0]
    assert four[3].tolist() == [[255, 0, 255]]
    assert four[0].tolist() == [[0, 100, 255]]


def test_alpha_of_arrays_shows_white():
    array = np.zeros((4, 4, 4), np.uint8)
    assert raw(array).unique().tolist() == [255]
    assert raw(array / 1.0).unique().tolist() == [1.0]


def test_layout_can_be_said_where_it_cannot_be_seen():
    array = np.zeros((3, 8, 3), np.uint8)
    assert raw(array).shape == (1, 3, 8, 3)
    assert raw(array, input_data_format="channels_last").shape == (1, 3, 3, 8)


def test_grayscale_can_stay_grayscale():
    processor = MobileNetImageProcessor(do_convert_rgb=False, image_mean=0.5, image_std=0.5)
    for image in (photo(mode="L"), np.array(photo(mode="L")), np.array(photo(mode="L"))[None]):
        assert pixels(image, processor).shape == (1, 1, 224, 224)
    model = MobileNetForImageClassification(MobileNetConfig(num_channels=1)).eval()
    assert model(pixels(photo(mode="L"), processor)).logits.shape == (1, 2)


FOUR = {"do_convert_rgb": False, "image_mean": [0.1, 0.2, 0.3, 0.4], "image_std": [0.5, 0.6, 0.7, 0.8]}


def test_networks_of_four_channels_are_given_four():
    """Of each channel, what its own photo in grayscale would be."""
    array = np.random.default_rng(0).integers(0, 256, (60, 80, 4), np.uint8)
    processor = MobileNetImageProcessor(size=32, crop_size=32, **FOUR)
    expected = []
    for channel, (mean, std) in enumerate(zip(FOUR["image_mean"], FOUR["image_std"], strict=True)):
        alone = {"image_mean": mean, "image_std": std, "do_convert_rgb": False}
        expected.append(pixels(array[..., channel], size=32, crop_size=32, **alone))
    expected = torch.cat(expected, dim=1)
    first = array.transpose(2, 0, 1)
    for image in (array, first, torch.from_numpy(array), torch.from_numpy(first.copy()), Image.fromarray(array)):
        assert torch.equal(pixels(image, processor), expected)
    in_floats = pixels(array / 255, processor)
    torch.testing.assert_close(in_floats, expected, rtol=0, atol=2 / 255)  # 8 bits round twice
    model = MobileNetForImageClassification(MobileNetConfig(num_channels=4, width_multiplier=0.25)).eval()
    assert model(expected).logits.shape == (1, 2)


def test_images_of_every_mode_with_transparency_keep_it():
    options = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
    palette = Image.new("P", (2, 2))
    palette.putpalette([10, 20, 30])
    palette.info["transparency"] = 0
    gray = Image.new("L", (2, 2), 7)
    gray.info["transparency"] = 7
    for image, expected in (
        (Image.new("RGBA", (2, 2), (1, 2, 3, 4)), [1, 2, 3, 4]),
        (Image.new("LA", (2, 2), (7, 9)), [7, 7, 7, 9]),
        (gray, [7, 7, 7, 0]),
        (palette, [10, 20, 30, 0]),
        (Image.new("RGB", (2, 2), (1, 2, 3)), [1, 2, 3]),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), [255, 0, 0]),
    ):
        assert pixels(image, do_convert_rgb=False, **options)[0, :, 0, 0].tolist() == expected
    with pytest.raises(ValueError, match="image_mean must have one number, or one for each of 3 channels"):
        MobileNetImageProcessor(**FOUR)(photo())


def test_networks_of_one_channel_are_given_luma():
    """A photo of colors is what Pillow makes of it in mode L, from any source; one of grays stays as it is."""
    processor = MobileNetImageProcessor(do_grayscale=True, image_mean=0.5, image_std=0.5)
    color, gray = photo(), photo(mode="L")
    expected = pixels(color.convert("L"), processor)
    assert expected.shape == (1, 1, 224, 224)
    for image in (color, np.array(color), color.convert("RGBA")):
        assert torch.equal(pixels(image, processor), expected)
    in_floats = pixels(np.array(color) / 255, processor)
    torch.testing.assert_close(in_floats, expected, rtol=0, atol=3 / 255)  # luma and both resizes round
    clear = Image.new("L", (8, 8))
    clear.info["transparency"] = 0
    assert pixels(clear, processor).eq(1).all()  # on a white ground
    for image in (gray, gray.convert("RGB"), np.array(gray)):
        kept = MobileNetImageProcessor(do_convert_rgb=False, image_mean=0.5, image_std=0.5)
        assert torch.equal(pixels(image, processor), pixels(gray, kept))


def test_files_are_turned_upright(tmp_path):
    image = photo(60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    image.save(tmp_path / "on its side.png", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    expected = pixels(upright)
    for source in (
        tmp_path / "on its side.png",
        str(tmp_path / "on its side.png"),
        (tmp_path / "on its side.png").read_bytes(),
    ):
        assert torch.equal(pixels(source), expected)


def smooth(width: int, height: int) -> Image.Image:
    """A photo without sharp edges."""
    return photo(12, 9).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("size", "edge", "decoded"),
    [
        ((1200, 900), 50, (150, 113)),  # an eighth: no less than twice the edge
        ((1200, 900), 100, (300, 225)),
        ((1200, 900), 225, (600, 450)),
        ((1200, 900), 226, (1200, 900)),
        ((900, 1200), 225, (450, 600)),
    ],
)
def test_fast_decode_leaves_twice_what_is_needed(size, edge, decoded, tmp_path, monkeypatch):
    smooth(*size).save(tmp_path / "large.jpg", quality=95)
    seen = []
    resize = preprocessing_mobilenet._resize_and_crop
    monkeypatch.setattr(
        preprocessing_mobilenet, "_resize_and_crop", lambda image, o: seen.append(image.size) or resize(image, o)
    )
    processor = MobileNetImageProcessor(size=edge, crop_size=edge, fast_decode=True)
    found = pixels(tmp_path / "large.jpg", processor)
    exact = pixels(tmp_path / "large.jpg", processor, fast_decode=False)
    assert seen == [decoded, size]
    if decoded == size:
        assert torch.equal(found, exact)
    else:
        assert 0 < (found - exact).abs().max() < 0.1  # of a range of 2


def test_fast_decode_changes_nothing_else(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    smooth(1200, 900).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    smooth(1200, 900).save(tmp_path / "large.png")
    options = {"size": 100, "do_center_crop": False}
    turned = pixels(tmp_path / "turned.jpg", fast_decode=True, **options)
    exact = pixels(tmp_path / "turned.jpg", **options)
    assert turned.shape == exact.shape == (1, 3, 133, 100)
    assert (turned - exact).abs().max() < 0.1
    assert torch.equal(
        pixels(tmp_path / "large.png", fast_decode=True, **options), pixels(tmp_path / "large.png", **options)
    )
    # Without resizing, every pixel is asked for.
    whole = raw(tmp_path / "turned.jpg", fast_decode=True)
    assert whole.shape == (1, 3, 1200, 900)


def test_files_of_a_batch_are_read_in_threads(photographs):
    """The answer is that of one after the other, bit for bit."""
    alone = torch.cat([pixels(path) for path in photographs[:9]])
    threads = set()

    class Path(os.PathLike):
        def __init__(self, path):
            self.path = path

        def __fspath__(self):
            threads.add(threading.current_thread())
            return str(self.path)

    together = pixels([Path(path) for path in photographs[:9]])
    assert torch.equal(together, alone)
    assert threading.main_thread() not in threads


def test_a_broken_file_of_a_batch_is_named(photographs, tmp_path):
    with pytest.raises(UnreadableImageError, match=r"nowhere\.jpg: no such file"):
        pixels([photographs[0], tmp_path / "nowhere.jpg", photographs[1]])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", tmp_path, Path("/dev/zero")):
        with pytest.raises(UnreadableImageError, match=f"^{path}: not a regular file$"):
            pixels(path)


def test_urls_are_fetched(tmp_path, serve):
    photo().save(tmp_path / "noise.png")
    assert torch.equal(pixels(f"{serve(tmp_path)}/noise.png"), pixels(photo()))
    with pytest.raises(UnreadableImageError, match=r"missing\.png: cannot be downloaded: .*404"):
        pixels(f"{serve(tmp_path)}/missing.png")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a b.png", "http://[::1/a.png", "http:///a.png", "http://-.png"])
def test_urls_that_lead_nowhere_are_named(url):
    with pytest.raises(UnreadableImageError, match=r"\.png: cannot be downloaded: "):
        pixels(url)


@pytest.mark.parametrize("scheme", ["file", "ftp", "data"])
def test_only_http_is_fetched(tmp_path, scheme):
    photo().save(tmp_path / "secret.png")
    with pytest.raises(UnreadableImageError, match="no such file"):
        pixels(f"{scheme}://{tmp_path}/secret.png")


def redirect_to(url: str) -> type:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", url)
            self.end_headers()

        def log_message(self, *_): ...

    return Handler


@pytest.fixture
def redirect():
    """A function that starts a server on the loopback, which redirects to a URL, and gives its own."""
    with ExitStack() as stack:

        def start(url: str, address: str = "127.0.0.1") -> str:
            server = stack.enter_context(ThreadingHTTPServer((address, 0), redirect_to(url)))
            Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://{address}:{server.server_port}/photo.png"

        yield start


def test_redirects_are_followed(tmp_path, serve, redirect):
    photo().save(tmp_path / "noise.png")
    assert torch.equal(pixels(redirect(f"{serve(tmp_path)}/noise.png")), pixels(photo()))


@pytest.mark.parametrize("scheme", ["file", "ftp", "data"])
def test_redirects_do_not_lead_to_local_files(tmp_path, redirect, scheme):
    photo().save(tmp_path / "secret.png")
    with pytest.raises(UnreadableImageError, match=rf"photo\.png: cannot be downloaded: .*{scheme}:"):
        pixels(redirect(f"{scheme}://{tmp_path}/secret.png"))


@pytest.mark.parametrize("host", ["127.0.0.1", "%31%32%37.0.0.1", "127%2e0.0.1", "localhos%74", "localhost"])
def test_redirects_do_not_lead_inside(tmp_path, serve, redirect, monkeypatch, host):
    """A public address, which the loopback's second one stands for here, redirects to this machine."""
    photo().save(tmp_path / "secret.png")
    inside = f"{serve(tmp_path)}/secret.png".replace("127.0.0.1", host)
    assert torch.equal(pixels(redirect(inside)), pixels(photo()))  # from inside it may
    is_public = preprocessing_mobilenet._is_public
    monkeypatch.setattr(
        preprocessing_mobilenet, "_is_public", lambda address: address == "127.0.0.2" or is_public(address)
    )
    with pytest.raises(UnreadableImageError, match=r"photo\.png: cannot be downloaded: .* from a public address"):
        pixels(redirect(inside, "127.0.0.2"))


def test_names_that_change_their_address_do_not_lead_inside(tmp_path, serve, redirect, monkeypatch):
    """A name server that tells a public address first, and a private one to whoever asks again."""
    photo().save(tmp_path / "secret.png")
    inside = f"{serve(tmp_path)}/secret.png".replace("127.0.0.1", "rebinding.example")
    real, asked = socket.getaddrinfo, []

    def look_up(host, port, *args, **kwargs):
        if host == "rebinding.example":
            asked.append(host)
            host = "127.0.0.1"
        return real(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    is_public = preprocessing_mobilenet._is_public
    monkeypatch.setattr(
        preprocessing_mobilenet, "_is_public", lambda address: address == "127.0.0.2" or is_public(address)
    )
    with pytest.raises(UnreadableImageError, match="from a public address"):
        pixels(redirect(inside, "127.0.0.2"))
    assert asked == ["rebinding.example"]  # once, to be connected to


def test_schemes_may_be_written_in_capitals(tmp_path, serve):
    photo().save(tmp_path / "noise.png")
    assert torch.equal(pixels(f"{serve(tmp_path)}/noise.png".replace("http", "HTTP")), pixels(photo()))


def test_what_a_redirect_says_itself_is_not_read(tmp_path, serve):
    photo().save(tmp_path / "noise.png")
    url = f"{serve(tmp_path)}/noise.png"

    class Endless(redirect_to(url)):
        def end_headers(self):
            super().end_headers()
            self.flush_headers()
            with suppress(OSError):
                while True:
                    self.wfile.write(bytes(1 << 16))

    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        assert torch.equal(pixels(f"http://127.0.0.1:{server.server_port}/photo.png"), pixels(photo()))
        server.shutdown()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("2001:4860:4860::8888", True),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("64:ff9b::808:808", True),
        ("64:ff9b::7f00:1", False),
    ],
)
def test_addresses_inside_and_outside(address, public):
    assert preprocessing_mobilenet._is_public(address) == public


@pytest.mark.parametrize(
    "start",
    [
        "HTTP/1.1 200 OK\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX-Header: ",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1; extension=",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: ",
    ],
    ids=["body", "header", "chunk extension", "trailer"],
)
def test_a_server_without_an_end_is_left(start, monkeypatch):
    class Trickle(BaseHTTPRequestHandler):
        def do_GET(self):
            self.wfile.write(start.encode())
            with suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)

        def log_message(self, *_): ...

    monkeypatch.setattr(preprocessing_mobilenet, "MAX_SECONDS", 0.3)
    with ThreadingHTTPServer(("127.0.0.1", 0), Trickle) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        begin = time.monotonic()
        with pytest.raises(UnreadableImageError, match=r"cannot be downloaded: no end after 0\.3 seconds"):
            pixels(f"http://127.0.0.1:{server.server_port}/photo.png")
        assert time.monotonic() - begin < 2
        server.shutdown()


def test_a_photograph_of_grayscale_and_one_of_color_make_a_batch(photographs):
    gray = next(path for path in photographs if open_image(path).mode == "L")
    values = pixels([gray, photographs[0], str(photographs[1])])
    assert values.shape == (3, 3, 224, 224)


def test_detail_can_be_reduced_first() -> None:
    """For networks trained on small images: larger ones are reduced to their size first, smaller ones stay."""
    options = {"size": 64, "crop_size": 56}
    plain, reducing = MobileNetImageProcessor(**options), MobileNetImageProcessor(**options, detail_size=32)
    large = photo(300, 200)
    by_hand = plain(large.resize((48, 32), Image.Resampling.BILINEAR))["pixel_values"][0]
    assert np.array_equal(reducing(large)["pixel_values"][0], by_hand)
    assert not np.array_equal(plain(large)["pixel_values"][0], by_hand)
    for same in (photo(48, 32), photo(20, 90)):
        assert np.array_equal(reducing(same)["pixel_values"][0], plain(same)["pixel_values"][0])
    in_a_call = plain(large, detail_size=32)["pixel_values"][0]
    assert np.array_equal(in_a_call, by_hand)


# What comes out


def test_tensors_are_channels_last_without_a_copy():
    values = pixels([photo(), photo(50, 70)])
    assert values.shape == (2, 3, 224, 224)
    assert values.dtype == torch.float32
    assert values.is_contiguous(memory_format=torch.channels_last)


def test_formats_of_the_result():
    processor, image = MobileNetImageProcessor(), photo()
    assert processor(image).pixel_values[0].shape == (3, 224, 224)
    assert isinstance(processor(image, return_tensors="np").pixel_values, np.ndarray)
    last = processor(image, return_tensors="pt", data_format="channels_last").pixel_values
    assert torch.equal(last.permute(0, 3, 1, 2), pixels(image))
    assert pixels(image, device="meta").device.type == "meta"
    shapes = [p.shape for p in processor([image, photo(50, 70)], do_resize=False, do_center_crop=False).pixel_values]
    assert shapes == [(3, 40, 60), (3, 70, 50)]


def test_input_is_not_changed():
    array = np.array(photo())
    before = array.copy()
    raw(array)
    pixels(array)
    assert np.array_equal(array, before)


def test_survives_saving(tmp_path):
    processor = MobileNetImageProcessor.from_recipe("timm", 160, do_convert_rgb=False, fast_decode=True)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["auto_map"] == {"AutoImageProcessor": "image_processing_mobilenet.MobileNetImageProcessor"}
    assert saved["size"] == {"shortest_edge": 182}
    assert (tmp_path / "image_processing_mobilenet.py").is_file()
    MobileNetConfig().save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=False)
    assert {**loaded.to_dict(), "auto_map": None} == {**processor.to_dict(), "auto_map": None}
    assert torch.equal(pixels(photo(), loaded), pixels(photo(), processor))


@pytest.mark.parametrize(
    ("name", "image_size", "shortest_edge"),
    # The preprocessor_config.json of Google's repositories say 146 for 128 pixels, and 219 for 192.
    [("google", 128, 146), ("google", 192, 219), ("google", 224, 256), ("torchvision_v2", 224, 232)],
)
def test_recipes_scale_with_the_image_size(name, image_size, shortest_edge):
    processor = MobileNetImageProcessor.from_recipe(name, image_size)
    assert processor.size == {"shortest_edge": shortest_edge}
    assert processor.crop_size == {"height": image_size, "width": image_size}


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": {"width": 3}}, r"size must be an integer, \(height, width\), .*, got \{'width': 3\}"),
        ({"size": "big"}, "size must be an integer"),
        ({"size": 0}, "size must be made of integers from 1 to 65536, got 0"),
        ({"crop_size": {"shortest_edge": 3}}, "crop_size must be an integer"),
        ({"crop_size": 1 << 30}, "crop_size must be made of integers from 1 to 65536"),
        ({"resample": 17}, r"resample must be one of 0 \(nearest\), .*, got 17"),
        ({"detail_size": 0}, "detail_size must be made of integers from 1 to 65536, got 0"),
        ({"do_resize": "yes"}, "do_resize must be true or false, got 'yes'"),
        ({"rescale_factor": 0}, "rescale_factor must be a number above 0, got 0"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std must be above 0"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "image_mean must be a number, or one for each channel"),
        ({"image_mean": [0.1, 0.2]}, "image_mean must have one number, or one for each of 3 channels"),
    ],
)
def test_bad_options_name_option_allowed_values_and_value(options, message):
    with pytest.raises(ValueError, match=message):
        pixels(photo(), **options)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one image"),
        (np.zeros(5), r"2 or 3 dimensions, or batches of 4, got shape \(5,\)"),
        (np.zeros((5, 5, 7), np.uint8), r"1, 3 or 4 channels, got shape \(5, 5, 7\)"),
        (np.zeros((0, 5, 3), np.uint8), r"must not be empty, got shape \(0, 5, 3\)"),
        (np.full((5, 5, 3), 300), "from 0 to 255, got 300 to 300"),
        (np.full((5, 5, 3), -1.0), "from 0 to 1 or from 0 to 255, got -1.0 to -1.0"),
        (np.full((5, 5, 3), np.nan), "from 0 to 1 or from 0 to 255, got nan to nan"),
        (np.full((5, 5, 3), "a"), "an array must be of integers or floats"),
        (Image.new("I", (2, 2), 70000), "from 0 to 65535, got 70000 to 70000"),
    ],
)
def test_bad_images_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        pixels(images)


def test_other_things_are_no_images():
    with pytest.raises(TypeError, match=r"images must be Pillow images, .*, got int"):
        pixels(7)
    with io.BytesIO(b"image") as stream, pytest.raises(TypeError, match=r"images must be .*, got BytesIO"):
        pixels(stream)
    with pytest.raises(TypeError, match="unknown option do_flip; known are fast_decode, do_convert_rgb, "):
        pixels(photo(), do_flip=True)


def test_images_of_different_sizes_make_no_tensor():
    with pytest.raises(ValueError, match=r"one shape to make one tensor, got \(40, 60, 3\), \(70, 50, 3\)"):
        raw([photo(), photo(50, 70)])


def test_broken_files_are_named(tmp_path):
    photo().save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    for name, reason in [
        ("cut.png", "cannot be decoded"),
        ("text.jpg", "not an image"),
        ("empty.jpg", "not an image"),
        ("none.jpg", "no such file"),
    ]:
        with pytest.raises(UnreadableImageError, match=rf"{name}: {reason}"):
            open_image(tmp_path / name)


def test_a_decompression_bomb_is_refused():
    data = io.BytesIO()
    Image.new("1", (20000, 20000)).save(data, "PNG")
    with pytest.raises(UnreadableImageError, match=r"20000x20000 is over 178956970 pixels|cannot be decoded"):
        open_image(data.getvalue())


def test_images_of_absurd_sides_are_refused():
    data = io.BytesIO()
    Image.new("1", (1, 1_000_001)).save(data, "PNG")
    with pytest.raises(UnreadableImageError, match=r"bytes: 1x1000001 is over 1000000 pixels a side"):
        open_image(data.getvalue())


def test_unknown_recipe_lists_those_that_exist():
    with pytest.raises(ValueError, match=r"name must be one of google, .*, got 'none'"):
        MobileNetImageProcessor.from_recipe("none")


def test_the_longest_edge_fits_and_the_rest_is_black():
    processor = MobileNetImageProcessor(size={"longest_edge": 32}, crop_size=32)
    for height, width in ((20, 40), (40, 20), (64, 64)):
        batch = processor(np.full((height, width, 3), 255, np.uint8), return_tensors="pt").pixel_values
        assert batch.shape == (1, 3, 32, 32)
        assert (batch == 1).sum() == 3 * 32 * (32 if height == width else 16)
