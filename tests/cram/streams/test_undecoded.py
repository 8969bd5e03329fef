"""Opened images of samples stay encoded: every use decodes anew, and threads may share one."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cram.console import ProgressBar
from cram.learning.checks import _check_pictures
from cram.streams.digests import pictures_digest
from cram.streams.messages import samples_of
from cram.streams.types import Sample, open_image, open_images
from tests.cram import factories

FORMATS = ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]
ORIENTATION = 0x0112


def noise(width: int = 40, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    made = io.BytesIO()
    image.save(made, form, **options)
    return made.getvalue()


def undecoded(image: Any) -> bool:
    return image._im is None and image.fp is not None


@pytest.mark.parametrize("form", FORMATS)
def test_bytes_of_a_row_stay_encoded_after_every_use(form: str) -> None:
    content = encode(noise(), form)
    row = {"prompt": "q", "completion": "a", "image": {"bytes": content, "path": None}}
    (sample,) = samples_of([row], Path("x"), None)
    first = open_images(sample)[0].tobytes()
    assert pictures_digest([sample]) == pictures_digest([Sample("0", tuple(open_images(sample)), "q", "a")])
    _check_pictures([sample], factories.llava_processor(), ProgressBar("check", 1, False))
    assert undecoded(sample.images[0])
    assert (
        open_images(sample)[0].tobytes() == first == Image.open(io.BytesIO(content)).convert("RGB").tobytes()
    )


@pytest.mark.parametrize("form", FORMATS)
def test_an_image_opened_from_a_file_stays_undecoded_and_usable(tmp_path: Path, form: str) -> None:
    file = tmp_path / "x"
    file.write_bytes(encode(noise(), form))
    with Image.open(file) as image:
        found = open_image(image)
        assert undecoded(image)
        assert found.tobytes() == open_image(file).tobytes() == image.convert("RGB").tobytes()
        assert open_image(image).tobytes() == found.tobytes()


def test_one_image_of_many_samples_is_opened_from_eight_threads(tmp_path: Path) -> None:
    noise(600, 600).save(tmp_path / "x.png")
    wanted = open_image(tmp_path / "x.png").tobytes()
    for _ in range(4):
        with Image.open(tmp_path / "x.png") as image, ThreadPoolExecutor(8) as pool:
            samples = [Sample(str(number), (image,), "q", "a") for number in range(16)]
            for (found,) in pool.map(open_images, samples):
                assert found.tobytes() == wanted


def test_an_animation_of_many_bytes_is_opened_from_eight_threads() -> None:
    frames = [noise(90, 90).rotate(turn) for turn in range(150)]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert len(content) > 4 * 90 * 90 + (1 << 20)
    wanted = Image.open(io.BytesIO(content)).convert("RGB").tobytes()
    for _ in range(4):
        image = Image.open(io.BytesIO(content))
        with ThreadPoolExecutor(8) as pool:
            assert {found.tobytes() for found in pool.map(open_image, [image] * 16)} == {wanted}


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_the_frame_at_hand_is_opened(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    content = encode(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
    image = Image.open(io.BytesIO(content))
    image.seek(2)
    assert open_image(image).getpixel((0, 0)) == (0, 0, 255) and image.tell() == 2


def test_what_was_changed_of_an_opened_image_counts() -> None:
    content = encode(noise(64, 64), "JPEG")
    drafted = Image.open(io.BytesIO(content))
    drafted.draft("L", (16, 16))
    assert open_image(drafted).size == (16, 16)
    drawn = Image.open(io.BytesIO(content))
    drawn.paste((1, 2, 3), (0, 0, 64, 64))
    assert open_image(drawn).getpixel((5, 5)) == (1, 2, 3)
    clear = Image.new("P", (4, 4), 1)
    clear.putpalette([0, 0, 0, 200, 10, 20])
    image = Image.open(io.BytesIO(encode(clear, "PNG", transparency=1)))
    assert open_image(image).getpixel((0, 0)) == (255, 255, 255)
    del image.info["transparency"]
    assert open_image(image).getpixel((0, 0)) == (200, 10, 20)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda sample: pickle.loads(pickle.dumps(sample))]
)
def test_copies_and_pickles_of_samples_stay_undecoded(tmp_path: Path, form: str, copied: Any) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    (tmp_path / "x").write_bytes(encode(noise(), form, exif=exif))
    with Image.open(tmp_path / "x") as image:
        sample = Sample("1", (image, noise(3, 2), tmp_path / "x"), "q", "a", ("a", "b"), "x, row 1")
        found = copied(sample)
        assert undecoded(image) and undecoded(found.images[0])
        for one, other in zip(open_images(sample), open_images(found), strict=True):
            assert one.size == other.size and one.tobytes() == other.tobytes()
    assert open_images(found)[0].size == (24, 40)
    assert (found.images[1:], found.place) == (sample.images[1:], "x, row 1")
    assert found.accepted == ("a", "b")


def test_a_closed_file_is_refused_with_words(tmp_path: Path) -> None:
    noise().save(tmp_path / "x.png")
    image = Image.open(tmp_path / "x.png")
    assert image.fp is not None
    image.fp.close()
    with pytest.raises(ValueError, match=r"x\.png must be a readable picture, got: .*closed file"):
        open_image(image)
