"""A picture that changed changes the digest of its stream, whether it is a file or in memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from cram.streams.digests import END_BYTES, pictures_digest, texts_digest
from cram.streams.types import Sample


def sample(*images: Path | Image.Image) -> Sample:
    return Sample("1", images, "What?", "this")


@pytest.mark.parametrize("size", [10, END_BYTES, END_BYTES + 1, 2 * END_BYTES, 5 * END_BYTES])
def test_a_change_at_either_end_of_a_file_and_of_its_size_is_seen(size: int, tmp_path: Path) -> None:
    file = tmp_path / "picture"
    content = os.urandom(size)
    file.write_bytes(content)
    known = pictures_digest([sample(file)])
    for changed in (b"x" + content, b"x" + content[1:], content[:-1] + b"x", content[: size // 2]):
        if changed != content:
            file.write_bytes(changed)
            assert pictures_digest([sample(file)]) != known
    file.write_bytes(content)
    assert pictures_digest([sample(file.rename(tmp_path / "renamed"))]) == known


def test_every_byte_of_a_file_up_to_two_ends_counts(tmp_path: Path) -> None:
    file = tmp_path / "picture"
    content = bytearray(2 * END_BYTES)
    file.write_bytes(content)
    known = pictures_digest([sample(file)])
    for place in (END_BYTES - 1, END_BYTES, END_BYTES + 7):
        content[place] = 1
        file.write_bytes(content)
        assert pictures_digest([sample(file)]) != known
        content[place] = 0


def test_pixels_and_order_count_and_a_mode_that_shows_the_same_does_not() -> None:
    red, blue = (Image.new("RGB", (4, 2), colour) for colour in ("red", "blue"))
    known = pictures_digest([sample(red, blue)])
    assert pictures_digest([sample(red.convert("RGBA"), blue.copy())]) == known
    assert pictures_digest([sample(blue, red)]) != known
    assert pictures_digest([sample(red.resize((2, 4)), blue)]) != known
    assert texts_digest([sample(red)]) == texts_digest([sample(blue)]) != texts_digest([sample(red, blue)])


def test_what_cannot_be_read_is_left_to_the_check_of_the_samples(tmp_path: Path) -> None:
    wide = Image.new("F", (2, 2))
    assert pictures_digest([sample(tmp_path / "none", wide)]) == pictures_digest([])
