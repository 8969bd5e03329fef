"""Pictures as the model sees them: upright, 8 bits, without transparency; what cannot be kept is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cram.streams.types import open_image

ORIENTATION = 0x0112
LEFT, RIGHT = (250, 10, 10), (10, 10, 250)


def two_halves(mode: str = "RGB") -> Image.Image:
    """Red on the left, blue on the right, 8 x 4."""
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, :4], pixels[:, 4:] = LEFT, RIGHT
    return Image.fromarray(pixels).convert(mode)


def at(image: Image.Image, x: int, y: int) -> Any:
    return np.asarray(image)[y, x].tolist()


@pytest.mark.parametrize("opened", [False, True])
def test_a_photograph_is_turned_upright(tmp_path: Path, opened: bool) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # shown upright after a quarter turn clockwise
    file = tmp_path / "x.png"
    two_halves().save(file, exif=exif)
    with Image.open(file) as image:
        found = open_image(image if opened else file)
    assert found.size == (4, 8) and at(found, 1, 1) == list(LEFT) and at(found, 1, 6) == list(RIGHT)
    assert open_image(found).size == (4, 8)


@pytest.mark.parametrize("kind", ["<u2", ">u2"])
def test_grey_of_16_bits_is_scaled(tmp_path: Path, kind: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=kind)
    file = tmp_path / ("x.png" if kind == "<u2" else "x.tif")
    Image.fromarray(values).save(file)
    assert np.asarray(open_image(file))[0].tolist() == [[value] * 3 for value in (0, 1, 128, 255)]


@pytest.mark.parametrize(("kind", "words"), [(np.float32, "floating-point"), (np.int32, "32-bit integers")])
def test_wider_channels_are_refused(tmp_path: Path, kind: Any, words: str) -> None:
    Image.fromarray(np.array([[0.25, 0.75]], dtype=kind)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=rf"x\.tif must have 8 or 16 bits per channel, got {words}"):
        open_image(tmp_path / "x.tif")


def transparent(mode: str) -> Image.Image:
    """A black stroke on the right of a transparent ground whose hidden colour is black."""
    drawing = np.zeros((4, 8, 4), dtype=np.uint8)
    drawing[:, 4:, 3] = 255
    return Image.fromarray(drawing).convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_becomes_white(tmp_path: Path, mode: str) -> None:
    file, options = tmp_path / "x.png", {}
    image = transparent("RGBA" if mode in "PRGB" else mode)
    if mode == "P":
        image = Image.fromarray(np.repeat(np.array([[1, 0]], np.uint8), 4, 1).repeat(4, 0), "P")
        image.putpalette([0, 0, 0, 0, 0, 0])
        options = {"transparency": 1}
    elif mode == "RGB":
        image = two_halves()
        options = {"transparency": LEFT}
    image.save(file, **options)
    found = open_image(file)
    assert at(found, 1, 1) == [255] * 3
    assert at(found, 6, 1) == (list(RIGHT) if mode == "RGB" else [0] * 3)


def test_a_transparent_value_of_16_bits_becomes_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32896]], np.uint16)).save(tmp_path / "x.png", transparency=0)
    assert np.asarray(open_image(tmp_path / "x.png"))[0].tolist() == [[255] * 3, [128] * 3]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.zeros((2, 2, 3), np.uint8), "opened PIL image or a Path, got ndarray"),
        (Image.new("L", (0, 3)), "0 x 3"),
    ],
)
def test_what_shows_nothing_or_is_no_picture_is_refused(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        open_image(value)


def test_what_is_half_transparent_is_mixed_with_white() -> None:
    assert at(open_image(Image.new("RGBA", (1, 1), (0, 0, 0, 51))), 0, 0) == [204] * 3


def test_opaque_pictures_keep_every_value() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    for mode in ("RGB", "RGBA"):
        assert np.array_equal(np.asarray(open_image(Image.fromarray(noise).convert(mode))), noise)


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert at(open_image(tmp_path / "x.webp"), 0, 0) == [255, 0, 0]


def test_the_frames_of_an_animation_are_not_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    frames = [Image.new("L", (4, 4), value) for value in (255, 0)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    counting = property(lambda image: pytest.fail("counted"))
    monkeypatch.setattr("PIL.GifImagePlugin.GifImageFile.n_frames", counting)
    assert at(open_image(tmp_path / "x.gif"), 0, 0) == [255] * 3


def test_several_pages_are_refused(tmp_path: Path) -> None:
    pages = [Image.new("L", (4, 4), value) for value in (0, 255)]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=r"x\.tif must be one picture, got 2 pages; save each page"):
        open_image(tmp_path / "x.tif")


def test_a_fault_of_a_picture_in_memory_is_named() -> None:
    buffer = io.BytesIO()
    two_halves().save(buffer, "PNG")
    cut = Image.open(io.BytesIO(buffer.getvalue()[:60]))
    with pytest.raises(ValueError, match="image in memory must be a readable picture"):
        open_image(cut)
