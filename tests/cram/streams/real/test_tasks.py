"""The stream of real pictures: decided by its seed, disjoint splits, shared pictures, right answers."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cram.scoring import score
from cram.streams import load_stream
from cram.streams.builtin import STREAMS, build
from cram.streams.builtin.tasks import TASKS as DRAWN_TASKS
from cram.streams.real.charts import draw_window
from cram.streams.real.chosen import ANIMALS, GROUNDS
from cram.streams.real.compose import CARDS, PLACES, SIZE, Look, crop, place
from cram.streams.real.flag_colors import COLORS, clear_regions
from cram.streams.real.questions import FORMATS, WORDINGS, number_words
from cram.streams.real.sheets import load_set
from cram.streams.real.tasks import TASKS, _scans, draw_animal, draw_flag, draw_number, flag_names
from cram.streams.types import Sample, Stream, Task

ANSWERS = {
    "animal-pick": r"[A-D]",
    "digit-read": r"[1-9]\d",
    "flag-pick": r"[A-D]",
    "food-count": r"[1-6]",
    "animal-caption": rf"a (small|large) \w+ ({'|'.join(PLACES)}) a ({'|'.join(CARDS)}) card\.",
    "animal-pick-2": r"[A-D]",
    "surface-word": r"\w+",
    "flag-colour": "|".join(COLORS),
    "digit-pick": r"[A-D]",
    "chart-value": r"[1-9]",
}
SHARED_PICTURES = (
    ("animal-pick", "animal-caption"),
    ("digit-read", "digit-pick"),
    ("flag-pick", "flag-colour"),
)
SHARED_FORMATS = (
    ("animal-pick", "flag-pick", "animal-pick-2", "digit-pick"),
    ("digit-read", "food-count", "chart-value"),
    ("surface-word", "flag-colour"),
    ("animal-caption",),
)


@pytest.fixture(scope="module")
def stream() -> Stream:
    return build(3, 40, 16, "builtin-real")


def known(samples: tuple[Sample, ...]) -> list[str]:
    return [hashlib.sha256(sample.images[0].tobytes()).hexdigest() for sample in samples]


def named(stream: Stream, name: str) -> Task:
    return next(task for task in stream.tasks if task.name == name)


def right_option(sample: Sample) -> str:
    """The text of the option that the answer's letter stands for."""
    options = dict(re.findall(r"([A-D])\. (.+?)(?= [B-D]\. | Answer with)", sample.instruction))
    assert len(set(options.values())) == 4
    return str(options[sample.answer])


def test_a_seed_decides_the_stream(stream: Stream) -> None:
    again, other = build(3, 8, 8, "builtin-real"), build(4, 8, 8, "builtin-real")
    for task, same, different in zip(stream.tasks, again.tasks, other.tasks, strict=True):
        assert known(task.train[:8]) == known(same.train) and known(task.test[:8]) == known(same.test)
        assert [s.answer for s in task.train[:8]] == [s.answer for s in same.train]
        assert not set(known(task.train)) & set(known(different.train))


def test_a_seed_places_drawings_alike_in_every_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is trained and its results are published on pictures of these numbers."""
    looks: list[tuple[float, ...]] = []

    def placed(picture: Image.Image, pixels: np.ndarray, look: Look) -> None:
        looks.append((look.x, look.y, look.width, look.turn, look.mirrored, *look.light))
        place(picture, pixels, look)

    monkeypatch.setattr("cram.streams.real.tasks.place", placed)
    build(3, 6, 3, "builtin-real")
    numbers = "\n".join(" ".join(f"{value:.4f}" for value in look) for look in looks)
    assert len(looks) == 85
    assert hashlib.sha256(numbers.encode()).hexdigest()[:16] == "c3a6edd5dc485bf9"


def test_no_picture_is_in_both_splits_or_twice(stream: Stream) -> None:
    for task in stream.tasks:
        train, test = known(task.train), known(task.test)
        assert not set(train) & set(test), task.name
        assert len(set(train)) == len(train) and len(set(test)) == len(test), task.name


def test_pictures_are_small_and_rgb(stream: Stream) -> None:
    assert {s.images[0].size for task in stream.tasks for s in task.train} == {(SIZE, SIZE)}
    assert {s.images[0].mode for task in stream.tasks for s in task.train} == {"RGB"}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_have_their_form_and_score_full(stream: Stream, name: str) -> None:
    task = named(stream, name)
    assert all(re.fullmatch(ANSWERS[name], sample.answer) for sample in (*task.train, *task.test))
    assert score(task.scorer, {s.id: s.answer for s in task.test}, task.test) > 99.9
    most = Counter(sample.answer for sample in task.train).most_common(1)[0][1]
    assert most <= 0.5 * len(task.train), "one answer is too often right"


def test_the_page_of_streams_has_the_sizes() -> None:
    page = (Path(__file__).parents[4] / "docs/streams.md").read_text()
    own = STREAMS["builtin-real"]
    assert f"| {own.train_samples}, {own.test_samples} |" in page
    assert f"one of {len(flag_names())} flags" in page and f"one of {len(ANIMALS)} animals" in page
    assert all(f"| {i} | `{task.name}` |" in page for i, task in enumerate(TASKS, start=1))


def test_order_sizes_and_keys() -> None:
    assert [task.name for task in TASKS] == list(ANSWERS)
    own = STREAMS["builtin-real"]
    assert 600 <= own.train_samples <= 1000 and own.test_samples == 200
    limited = load_stream("builtin-real", limit=2)
    assert [task.name for task in limited.tasks] == list(ANSWERS) and len(limited.tasks[0].train) == 2
    others = [task.key for task in (*DRAWN_TASKS, *STREAMS["builtin-50"].tasks)]
    keys = [task.key for task in TASKS]
    assert len(set(keys)) == len(keys) and not set(keys) & set(others)


def test_tasks_of_a_format_end_alike_and_are_scored_alike(stream: Stream) -> None:
    ends = {form[0] for form in FORMATS.values()}
    for names in SHARED_FORMATS:
        tasks = [named(stream, name) for name in names]
        assert len({(task.scorer, task.max_new_tokens) for task in tasks}) == 1
        (sentence,) = {
            next(end for end in ends if sample.instruction.endswith(end))
            for task in tasks
            for sample in (*task.train, *task.test)
        }
        assert not any(
            sample.instruction.endswith(sentence)
            for task in stream.tasks
            if task.name not in names
            for sample in task.train
        )


def test_tasks_that_share_pictures_draw_them_alike() -> None:
    """From the same state of the generator, both tasks of a pair make the same picture."""
    for pair in SHARED_PICTURES:
        first, second = (next(task for task in TASKS if task.name == name) for name in pair)
        for split in ("train", "test"):
            drawn = [task.draw(np.random.default_rng(5), split) for task in (first, second)]
            assert drawn[0][0].tobytes() == drawn[1][0].tobytes()
            assert drawn[0][1] != drawn[1][1]


def test_every_task_has_several_wordings_and_uses_them(stream: Stream) -> None:
    assert all(len(set(texts)) == len(texts) >= 3 for texts in WORDINGS.values())
    for task in stream.tasks:
        assert len({re.split(r"[?.]", sample.instruction)[0] for sample in task.train}) >= 2, task.name


@pytest.mark.parametrize(
    ("name", "drawings"),
    [("animal-pick", "noto-animals"), ("animal-pick-2", "twemoji-animals"), ("flag-pick", "flags")],
)
def test_the_right_option_is_the_drawing_that_is_placed(
    monkeypatch: pytest.MonkeyPatch, name: str, drawings: str
) -> None:
    placed: list[np.ndarray] = []
    monkeypatch.setattr("cram.streams.real.tasks.place", lambda _, pixels, __: placed.append(pixels))
    draw = next(task for task in TASKS if task.name == name).draw
    for seed in range(40):
        picture, instruction, answer = draw(np.random.default_rng(seed), "train")
        sample = Sample("0", (picture,), instruction, answer)
        shown = load_set(drawings).picture(right_option(sample))
        assert np.array_equal(placed[-1], np.asarray(shown))


def test_a_placed_drawing_is_seen_where_it_was_placed() -> None:
    picture, fox = Image.new("RGB", (SIZE, SIZE), "white"), load_set("noto-animals").picture("fox")
    place(picture, np.asarray(fox), Look(30, 60, 40, 0.0))
    changed = np.argwhere(np.asarray(picture).min(-1) < 250)
    assert (changed.min(0) >= (39, 9)).all() and (changed.max(0) <= (81, 51)).all()
    shown = np.asarray(picture)[40:80, 10:50]
    small = Image.alpha_composite(Image.new("RGBA", fox.size, "white"), fox).convert("RGB").resize((40, 40))
    assert np.abs(shown.astype(int) - np.asarray(small).astype(int)).mean() < 12
    mirrored = Image.new("RGB", (SIZE, SIZE), "white")
    place(mirrored, np.asarray(fox), Look(48, 48, 40, 0.0, mirrored=True))
    straight = Image.new("RGB", (SIZE, SIZE), "white")
    place(straight, np.asarray(fox)[:, ::-1], Look(48, 48, 40, 0.0))
    assert mirrored.tobytes() == straight.tobytes()


def test_captions_say_size_place_and_card() -> None:
    for seed in range(12):
        picture, shown = draw_animal(np.random.default_rng(seed), "noto-animals")
        pixels = np.asarray(picture, np.int32)
        card = pixels[0, 0]
        nearest = min(CARDS, key=lambda name: int(np.abs(card - np.asarray(CARDS[name])).sum()))
        assert nearest == shown.card
        rows, columns = np.nonzero(np.abs(pixels - pixels[:, :1]).sum(-1) > 40)
        assert (np.ptp(columns) > 46 or np.ptp(rows) > 46) == shown.large
        side, height = PLACES[shown.place]
        for sign, middle in ((side, columns.mean()), (height, rows.mean())):
            assert abs(middle - SIZE / 2 - sign * 12) < 18 and (sign == 0 or sign * (middle - SIZE / 2) > 0)
        assert shown.caption == (
            f"a {'large' if shown.large else 'small'} {shown.name} {shown.place} a {shown.card} card."
        )


def test_each_half_of_a_number_shows_a_scan_of_its_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With d + 1 dots in place of the scans of the digit d, the dots of each half are counted."""
    dots = np.zeros((10, 28, 28, 4), np.uint8)
    for digit in range(10):
        for i in range(digit + 1):
            top, left = 5 + 7 * (i // 4), 4 + 5 * (i % 4)
            dots[digit, top : top + 3, left : left + 3] = 255
    scans = {str(digit): dots[digit : digit + 1] for digit in range(10)}
    monkeypatch.setattr("cram.streams.real.tasks._scans", lambda _: scans)
    for seed in range(20):
        picture, number = draw_number(np.random.default_rng(seed), "train")
        seen = np.asarray(picture.convert("L")) > 120
        halves = (seen & (np.arange(SIZE) < 48), seen & (np.arange(SIZE) >= 48))
        assert [num_parts(half) - 1 for half in halves] == [number // 10, number % 10]


def test_scans_of_a_number_are_those_of_its_split() -> None:
    for split in ("train", "test"):
        scans = load_set(f"digits-{split}")
        for digit, found in _scans(split).items():
            chosen = [name == digit for name in scans.names]
            assert np.array_equal(found, scans.pixels[chosen])


def test_wrong_numbers_share_a_digit_with_the_right_one(stream: Stream) -> None:
    values = {number_words(number): number for number in range(100)}
    assert len(values) == 100 and number_words(7) == "seven" and number_words(42) == "forty-two"
    for sample in named(stream, "digit-pick").train:
        right = values[right_option(sample)]
        for option in re.findall(r"[A-D]\. ([a-z-]+)", sample.instruction):
            assert (
                option == number_words(right)
                or sum(a == b for a, b in zip(str(values[option]), str(right), strict=True)) == 1
            )


def test_flags_have_a_clear_region() -> None:
    assert len(flag_names()) >= 110
    assert clear_regions()["Chad"] == {
        "on the left of the flag": "blue",
        "on the right of the flag": "red",
        "in the middle of the flag": "yellow",
    }
    assert clear_regions()["Japan"]["in the middle of the flag"] == "red"
    names = {draw_flag(np.random.default_rng(seed))[1] for seed in range(80)}
    assert len(names) > 40 and names <= set(flag_names())


def test_as_many_foods_lie_there_as_the_answer_says() -> None:
    """On a plain ground, foods are counted as connected parts of the picture."""
    draw = next(task for task in TASKS if task.name == "food-count").draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cram.streams.real.tasks.crop", lambda *_: Image.new("RGB", (SIZE, SIZE), (0, 0, 0)))
        for seed in range(25):
            picture, _, answer = draw(np.random.default_rng(seed), "train")
            assert num_parts(np.asarray(picture).max(-1) > 20) == int(answer)


def num_parts(mask: np.ndarray) -> int:
    """Connected parts of more than 8 pixels, neighbours in four directions."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        shifts = [
            padded[1:-1, 1:-1],
            padded[:-2, 1:-1],
            padded[2:, 1:-1],
            padded[1:-1, :-2],
            padded[1:-1, 2:],
        ]
        grown = np.where(mask, np.maximum.reduce(shifts), 0)
        if (grown == labels).all():
            return int((np.unique(labels[mask], return_counts=True)[1] > 8).sum())
        labels = grown


def test_the_marked_bar_is_as_high_as_the_answer() -> None:
    draw = next(task for task in TASKS if task.name == "chart-value").draw
    for seed in range(25):
        picture, _, answer = draw(np.random.default_rng(seed), "train")
        pixels = np.asarray(picture, np.int32)
        rows = np.nonzero((np.ptp(pixels, axis=-1) > 60).sum(1) >= 4)[0]
        assert round((rows.max() - rows.min() + 1) / (83 / 9)) == int(answer)


def test_test_charts_come_from_other_series() -> None:
    train, test = (
        {draw_window(np.random.default_rng(seed), split) for seed in range(200)}
        for split in ("train", "test")
    )
    assert {window.values[window.marked] for window in train} == set(range(1, 10))
    assert {window.title for window in train} == {window.title for window in test}


def test_crops_of_the_splits_come_from_other_parts_of_the_photos() -> None:
    train, test = load_set("surfaces-train"), load_set("surfaces-test")
    assert train.names == test.names and set(GROUNDS) <= set(train.names)
    for one, other in zip(train.pixels, test.pixels, strict=True):
        assert not np.array_equal(one, other)
    a, b = (crop(np.random.default_rng(1), train.pixels[0], 110, 180) for _ in range(2))
    assert a.tobytes() == b.tobytes() and a.size == (SIZE, SIZE)
