"""The collected pictures: readable, disjoint, and each with a licence beside it."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from cram.streams.real.chosen import ANIMALS, FOODS, SURFACES
from cram.streams.real.sheets import ASSETS, load_set, load_tables, set_names

INDEX = json.loads((ASSETS / "index.json").read_text())


@pytest.mark.parametrize("name", set_names())
def test_sets_hold_what_the_index_says(name: str) -> None:
    pictures = load_set(name)
    width, height = INDEX[name]["size"]
    assert pictures.pixels.shape == (len(pictures.names), height, width, 4)
    assert len(pictures.categories) == len(pictures)
    shown = (pictures.pixels[..., 3] > 0).reshape(len(pictures), -1).mean(1)
    assert shown.min() > 0.02, pictures.names[int(shown.argmin())]
    assert not pictures.pixels.flags.writeable


def test_the_stream_has_the_chosen_pictures() -> None:
    assert load_set("noto-animals").names == load_set("twemoji-animals").names == tuple(sorted(ANIMALS))
    assert load_set("twemoji-foods").names == tuple(name.replace("-", " ") for name in sorted(FOODS))
    assert load_set("surfaces-train").names == tuple(SURFACES)
    assert load_set("noto-animals").picture("fox").size == (72, 72)
    assert len(load_set("flags")) == 120 and not set(load_set("flags").names) & set(
        load_set("flags-free").names
    )
    assert not set(load_set("noto").names) & set(ANIMALS)


def test_no_picture_of_the_stream_is_free_as_well() -> None:
    seen = {
        use: {
            hashlib.sha256(pixels.tobytes()).hexdigest()
            for name in set_names(use)
            for pixels in load_set(name).pixels
        }
        for use in ("stream", "free")
    }
    assert not seen["stream"] & seen["free"]


def test_no_scan_is_in_two_sets() -> None:
    scans = [
        hashlib.sha256(pixels.tobytes()).hexdigest()
        for name in ("digits-train", "digits-test", "digits-free")
        for pixels in load_set(name).pixels
    ]
    assert len(scans) == len(set(scans)) == 5000


def test_boxes_of_the_splits_do_not_overlap() -> None:
    for name, (_, one, other) in SURFACES.items():
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, name


def test_every_file_has_a_licence_that_names_it() -> None:
    licences = {path.name: path.read_text() for path in ASSETS.glob("LICENSE-*.md")}
    for entry in INDEX.values():
        assert entry["file"] in licences[entry["licence"]]
    files = {path.name for path in ASSETS.iterdir()}
    described = {"index.json", "APACHE-2.0.txt", *licences, *(entry["file"] for entry in INDEX.values())}
    assert files == described | {"tables.json"} and "tables.json" in licences["LICENSE-tables.md"]
    assert all(f"{name} |" in licences["LICENSE-photos.md"] for name in SURFACES)
    for name, text in licences.items():
        assert any(
            word in text for word in ("Apache License 2.0", "CC BY", "MIT License", "public domain")
        ), name


def test_share_alike_pictures_have_files_of_their_own() -> None:
    licences = {path.name: path.read_text() for path in ASSETS.glob("LICENSE-*.md")}
    alike = {name for name, text in licences.items() if "ShareAlike" in text}
    assert alike == {"LICENSE-digits.md"}
    assert {name for name, entry in INDEX.items() if entry["licence"] in alike} == {
        "digits-train", "digits-test", "digits-free",
    }  # fmt: skip


def test_series_are_whole_numbers_and_the_splits_apart() -> None:
    tables = load_tables()
    assert all(isinstance(v, int) and 1 <= v <= 9 for row in tables for v in row["values"])
    names = {
        split: {(row["title"], row["name"]) for row in tables if row["split"] == split}
        for split in ("train", "test", "free")
    }
    assert not names["train"] & names["test"] and names["free"]
    titles = {split: {title for title, _ in found} for split, found in names.items()}
    assert titles["train"] == titles["test"] and not titles["train"] & titles["free"]


def test_all_pictures_together_are_small() -> None:
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 6_000_000


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="name must be one of .* got 'nothing'"):
        load_set("nothing")
    with pytest.raises(ValueError, match="name must be one of the 96 names of noto-animals, got 'yeti'"):
        load_set("noto-animals").picture("yeti")


def test_digits_are_light_on_dark() -> None:
    scans = load_set("digits-test")
    assert np.unique(scans.pixels[..., 0]).tolist() == list(range(0, 256, 17))
    assert [scans.names.count(str(digit)) for digit in range(10)] == [80] * 10
