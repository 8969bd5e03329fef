"""Samples, tasks, streams, and the opening of images."""

from __future__ import annotations

import os
import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from cram.streams.types import Sample, Stream, Task, open_image, open_images
from tests.cram.streams.layouts import picture


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_images_are_opened_as_rgb(tmp_path: Path, mode: str) -> None:
    file = tmp_path / f"x.{'jpg' if mode == 'CMYK' else 'png'}"
    Image.new(mode, (5, 4)).save(file)
    sample = Sample("1", (file, Image.new("L", (2, 3))), "q", "a")
    opened = open_images(sample)
    assert [image.mode for image in opened] == ["RGB", "RGB"]
    assert [image.size for image in opened] == [(5, 4), (2, 3)]


def test_a_sample_is_found_by_its_source_or_its_id() -> None:
    assert Sample("7", (), "q", "a", source="x.json, row 3").place == "x.json, row 3"
    assert Sample("7", (), "q", "a").place == "sample '7'"


def test_no_images() -> None:
    assert open_images(Sample("1", (), "q", "a")) == []


def test_huge_images_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    file = tmp_path / "bomb.png"
    Image.new("1", (9_000, 8_000)).save(file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"bomb.png must have at most 64000000 pixels, got 9000 x 8000"):
        open_image(file)


def test_palettes_with_transparency_are_opened_without_a_warning(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 10, 20])
    image.save(tmp_path / "x.png", transparency=b"\xff\x80")
    assert open_image(tmp_path / "x.png").getpixel((0, 0)) == (227, 132, 137)


def test_the_pixel_limit_is_inclusive(tmp_path: Path) -> None:
    picture(tmp_path / "x.png", size=(4, 5))
    assert open_image(tmp_path / "x.png", max_pixels=20).size == (4, 5)
    with pytest.raises(ValueError, match="at most 19 pixels"):
        open_image(tmp_path / "x.png", max_pixels=19)


@pytest.mark.parametrize("limit", [10, 1500])
def test_pillows_own_limits_are_reported_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    picture(tmp_path / "x.png", size=(40, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match="x.png must have at most"):
        open_image(tmp_path / "x.png")


@pytest.mark.parametrize("content", [b"", b"not a picture"])
def test_unreadable_images_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match="x.png must be a readable picture"):
        open_image(tmp_path / "x.png")


def test_truncated_images_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "x.png", size=(64, 64))
    data = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="x.png must be a readable picture"):
        open_image(tmp_path / "x.png")


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    picture(tmp_path / "x.webp")
    os.truncate(tmp_path / "x.webp", 64 << 30)
    with pytest.raises(ValueError, match=r"x.webp must have at most 64000000 pixels, got 68719476736 bytes"):
        open_image(tmp_path / "x.webp")


def test_a_damaged_length_asks_for_no_memory(tmp_path: Path) -> None:
    picture(tmp_path / "x.png", size=(24, 16))
    content = bytearray((tmp_path / "x.png").read_bytes())
    content[33] = 0x7E
    (tmp_path / "x.png").write_bytes(content)
    tracemalloc.start()
    try:
        with suppress(ValueError):  # Some versions of Pillow read on behind the damage.
            open_image(tmp_path / "x.png")
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "fault", [ValueError("tile\nbreak"), struct.error("x"), KeyError(3), IndexError("i"), TypeError("t")]
)
def test_whatever_a_reader_raises_names_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    picture(tmp_path / "x.png")

    def read(*_: object) -> None:
        raise fault

    monkeypatch.setattr(Image, "open", read)
    with pytest.raises(ValueError, match="x.png must be a readable picture, got: ") as refused:
        open_image(tmp_path / "x.png")
    assert "\n" not in str(refused.value)


def test_accepted_answers() -> None:
    assert Sample("1", (), "q", "a").accepted == ("a",)
    assert Sample("1", (), "q", "a", ("a", "b")).accepted == ("a", "b")


def test_streams_have_distinct_tasks() -> None:
    task = Task("x", [Sample("1", (), "q", "a")], [Sample("1", (), "q", "a")], "accuracy", 8)
    assert Stream("s", (task,)).tasks == (task,)
    with pytest.raises(ValueError, match=r"task names of stream 's' must be unique, got \['x', 'x'\]"):
        Stream("s", (task, task))
    with pytest.raises(ValueError, match="stream 's' must have at least one task"):
        Stream("s", ())


def test_an_order_is_the_same_tasks_shuffled_and_the_same_each_time() -> None:
    tasks = tuple(Task(str(index), (), (), "exact_match", 4) for index in range(10))
    stream = Stream("toy", tasks)
    assert stream.in_order(0) == stream
    orders = [stream.in_order(number).tasks for number in range(4)]
    assert len(set(orders)) == 4 and all(set(order) == set(tasks) for order in orders)
    assert stream.in_order(3).tasks == orders[3]
    with pytest.raises(ValueError, match="order must be at least 0, got -1"):
        stream.in_order(-1)
