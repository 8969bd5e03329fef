"""The long built-in streams: a task depends on the seed and its name alone, and recurs as the table says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from cram.scoring import score
from cram.streams import load_stream
from cram.streams.builtin import STREAMS, BuiltinStream, build
from cram.streams.builtin.draw import COLORS, SHAPES
from cram.streams.builtin.long import DOMAINS, TABLE, make_tasks
from cram.streams.builtin.questions import FORMATS, QUESTIONS
from cram.streams.builtin.scenes import LAYOUTS, PATTERNS, PENS, STYLES, Scene, Thing, render
from cram.streams.builtin.tasks import TASKS
from cram.streams.registry import BUILTIN
from cram.streams.types import Sample, Stream, Task

NAMES = [task.name for task in STREAMS["builtin-50"].tasks]
COLOR, SHAPE = "|".join(COLORS), "|".join(SHAPES)
ANSWERS = {
    "letter": r"[A-H]",
    "number": r"\d|10",
    "caption": r"a [a-z0-9 ,]+\.",
    "word": rf"{COLOR}|{SHAPE}|zero|one|two|three|four|five|six|seven|eight|nine",
    "check": r"yes|no",
    "list": rf"({COLOR})(, ({COLOR}))+",
}


@pytest.fixture(scope="module")
def stream() -> Stream:
    return build(3, 48, 32, "builtin-50")


def row_of(task: Task) -> tuple[str, str]:
    """Layout and question of a task, read off its name."""
    domain, question = re.sub(r"-\d+$", "", task.name).split("-")
    return DOMAINS[domain][0], question


def pictures(samples: Sequence[Sample]) -> list[tuple[bytes, str]]:
    return [(sample.images[0].tobytes(), sample.instruction) for sample in samples]


def same(left: Task, right: Task) -> bool:
    return all(
        pictures(a) == pictures(b) and [s.answer for s in a] == [s.answer for s in b]
        for a, b in ((left.train, right.train), (left.test, right.test))
    )


def test_a_seed_decides_the_stream(stream: Stream) -> None:
    again, other = (build(seed, 48, 32, "builtin-50") for seed in (3, 4))
    for task, repeated, different in zip(stream.tasks, again.tasks, other.tasks, strict=True):
        assert same(task, repeated)
        assert not set(pictures(task.train)) & set(pictures(different.train))


def test_a_task_does_not_depend_on_its_neighbours(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ("boards shape", "tickets even", "charts value")
    monkeypatch.setitem(STREAMS, "other", BuiltinStream(make_tasks(rows), 8, 8))
    known = {task.name: task for task in stream.tasks}
    for task in build(3, 48, 32, "other").tasks:
        assert same(task, known[task.name])
    assert [task.name for task in build(3, 1, 1, "builtin-20").tasks] == NAMES[:20]


def test_no_question_occurs_twice_in_a_stream(stream: Stream) -> None:
    seen = Counter(key for task in stream.tasks for key in pictures((*task.train, *task.test)))
    assert max(seen.values()) == 1 and len(seen) == 50 * (48 + 32)


def test_no_two_tasks_share_a_key() -> None:
    keys = [task.key for task in (*TASKS, *STREAMS["builtin-50"].tasks)]
    assert len(set(keys)) == len(keys) == 56


def test_answers_have_their_form_and_score_full(stream: Stream) -> None:
    for task in stream.tasks:
        layout, question = row_of(task)
        asked = QUESTIONS[layout][question].format
        samples = (*task.train, *task.test)
        assert all(re.fullmatch(ANSWERS[asked], sample.answer) for sample in samples), task.name
        assert all(s.instruction.endswith(FORMATS[asked].sentence) for s in samples), task.name
        assert task.scorer == FORMATS[asked].scorer
        assert score(task.scorer, {s.id: s.answer for s in task.test}, task.test) > 99.9, task.name


def test_no_answer_can_be_guessed(stream: Stream) -> None:
    for task in stream.tasks:
        counts = Counter(sample.answer for sample in (*task.train, *task.test))
        assert len(counts) >= 2 and max(counts.values()) <= 0.75 * 80, (task.name, counts.most_common(2))


def test_answers_fit_their_length_limit(stream: Stream) -> None:
    from cram.loading import Sources

    tokenizer = Sources("builtin").load("cpu")[1].tokenizer
    for task in stream.tasks:
        longest = max(
            (s.answer for s in task.train), key=lambda answer: len(tokenizer(f" {answer}").input_ids)
        )
        # One token more for the beginning and one for the end of an answer.
        assert len(tokenizer(f" {longest}").input_ids) - 1 + 1 <= task.max_new_tokens, (task.name, longest)


def test_the_table_holds_every_kind_of_recurrence() -> None:
    for rows in (TABLE[:20], TABLE):
        pairs = [tuple(row.split()) for row in rows]
        forms = [QUESTIONS[DOMAINS[domain][0]][question].format for domain, question in pairs]
        repeated = [later in pairs[:i] for i, later in enumerate(pairs)]
        other_domain = [
            any(q == question and d != domain for d, q in pairs[:i])
            for i, (domain, question) in enumerate(pairs)
        ]
        other_form = [
            any(d == domain and f != forms[i] for (d, _), f in zip(pairs[:i], forms, strict=False))
            for i, (domain, _) in enumerate(pairs)
        ]
        same_form = [
            any(
                d == domain and q != question and f == forms[i]
                for (d, q), f in zip(pairs[:i], forms, strict=False)
            )
            for i, (domain, question) in enumerate(pairs)
        ]
        kinds = [sum(kind) for kind in (repeated, other_domain, other_form, same_form)]
        assert all(kinds), kinds
        assert set(forms) == set(FORMATS)
    assert len(TABLE) == 50


def test_every_part_is_used() -> None:
    pairs = [row.split() for row in TABLE]
    assert {domain for domain, _ in pairs} == set(DOMAINS)
    asked = {(DOMAINS[domain][0], question) for domain, question in pairs}
    assert asked == {(layout, name) for layout, questions in QUESTIONS.items() for name in questions}
    assert {layout for layout, _ in DOMAINS.values()} == set(LAYOUTS)
    assert {style for _, style in DOMAINS.values()} == set(STYLES)
    assert {style.pen for style in STYLES.values()} == set(PENS)
    assert {style.pattern for style in STYLES.values()} == set(PATTERNS)


def test_revisits_are_named_by_their_number() -> None:
    names = [task.name for task in make_tasks(("sketches shape", "balls count", *["sketches shape"] * 2))]
    assert names == ["sketches-shape", "balls-count", "sketches-shape-2", "sketches-shape-3"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_goes_with_every_style(layout: str, style: str) -> None:
    scene = LAYOUTS[layout](np.random.default_rng(1))
    image = render(np.random.default_rng(2), scene, STYLES[style])
    empty = render(np.random.default_rng(2), Scene(()), STYLES[style])
    drawn = np.abs(np.asarray(image, np.int16) - np.asarray(empty, np.int16)).max(2) > 24
    rows, columns = np.nonzero(drawn)
    assert image.size == (48, 48) and image.mode == "RGB"
    for thing in scene.things:
        if thing.kind != "bar":
            near = (abs(columns - thing.x) <= thing.radius + 1) & (abs(rows - thing.y) <= thing.radius + 1)
            assert near.sum() >= 6, thing


TRUTH: list[tuple[str, str, Scene, str]] = [
    ("single", "shape", Scene((Thing("cross", "red", 24, 24, 12),)), "E"),
    ("single", "corners", Scene((Thing("triangle", "red", 24, 24, 12),)), "3"),
    ("single", "name", Scene((Thing("heart", "blue", 24, 24, 12),)), "heart"),
    ("single", "color", Scene((Thing("heart", "blue", 24, 24, 12),)), "blue"),
    ("digit", "spell", Scene((Thing("digit", None, 24, 24, 12, level=7),)), "seven"),
    ("digit", "next", Scene((Thing("digit", None, 24, 24, 12, level=9),)), "10"),
    ("digit", "even", Scene((Thing("digit", None, 24, 24, 12, level=9),)), "no"),
    ("digit", "even", Scene((Thing("digit", None, 24, 24, 12, level=4),)), "yes"),
    ("single", "round", Scene((Thing("ring", "blue", 24, 24, 12),)), "yes"),
    ("single", "round", Scene((Thing("star", "blue", 24, 24, 12),)), "no"),
    ("single", "warm", Scene((Thing("ring", "orange", 24, 24, 12),)), "yes"),
    ("single", "warm", Scene((Thing("ring", "purple", 24, 24, 12),)), "no"),
]
PAIR = Scene(
    (Thing("star", "red", 13, 24, 10), Thing("ring", "green", 35, 24, 5.5, large=False)), vertical=False
)
ICONS = Scene(tuple(Thing("star", color, 0, 0, 7) for color in (None, None, "purple", None)))
CHART = Scene(tuple(Thing("bar", c, 0, 0, 4, level=n) for c, n in (("red", 2), ("green", 6), ("blue", 3))))
BALLS = Scene(tuple(Thing("circle", "red", 0, 0, 5) for _ in range(4)))
TRUTH += [
    ("pair", "caption", PAIR, "a large red star left of a small green ring."),
    ("pair", "colors", PAIR, "red, green"),
    ("pair", "sizes", PAIR, "A"),
    ("corners", "place", ICONS, "C"),
    ("corners", "color", ICONS, "purple"),
    ("corners", "caption", ICONS, "a purple icon is lit at the bottom left."),
    ("bars", "count", CHART, "3"),
    ("bars", "tallest", CHART, "green"),
    ("bars", "option", CHART, "B"),
    ("bars", "colors", CHART, "red, green, blue"),
    ("bars", "caption", CHART, "a chart of 3 bars, the tallest bar is green."),
    ("crowd", "count", BALLS, "4"),
    ("crowd", "many", BALLS, "D"),
    ("crowd", "more", BALLS, "yes"),
    ("crowd", "more", Scene(BALLS.things[:2]), "no"),
    ("bars", "warm", CHART, "no"),
    ("corners", "top", ICONS, "no"),
    ("corners", "top", Scene(ICONS.things[1:]), "yes"),
    ("pair", "above", PAIR, "no"),
    ("pair", "above", Scene(PAIR.things, vertical=True), "yes"),
]


@pytest.mark.parametrize(("layout", "question", "scene", "answer"), TRUTH)
def test_answers_are_read_off_the_scene(layout: str, question: str, scene: Scene, answer: str) -> None:
    assert QUESTIONS[layout][question].ask(np.random.default_rng(0), scene)[1] == answer


@pytest.mark.parametrize(
    ("layout", "question", "scene", "truth"),
    [
        ("bars", "value", CHART, {"tallest": "6", "shortest": "2"}),
        ("crowd", "change", BALLS, {"Add": "5", "Subtract": "3"}),
    ],
)
def test_wordings_that_vary_keep_to_the_scene(
    layout: str, question: str, scene: Scene, truth: dict[str, str]
) -> None:
    rng = np.random.default_rng(0)
    drawn = [QUESTIONS[layout][question].ask(rng, scene) for _ in range(200)]
    for word, answer in truth.items():
        answers = [found for text, found in drawn if word in text]
        assert answers and set(answers) == {answer}


def test_registry_knows_the_streams() -> None:
    assert list(STREAMS) == list(BUILTIN)
    for name, count in (("builtin-20", 20), ("builtin-50", 50)):
        stream = load_stream(name, seed=1, limit=2)
        assert stream.name == name and [task.name for task in stream.tasks] == NAMES[:count]
        assert all(len(task.train) == len(task.test) == 2 for task in stream.tasks)
    assert 0 < STREAMS["builtin-50"].test_samples < STREAMS["builtin"].test_samples


def test_each_format_is_one_instruction_group(stream: Stream) -> None:
    """The wordings' aim: CRAM's groups are the formats, every test question finds its group, six suffice."""
    from cram.config import CramConfig
    from cram.loading import Sources
    from cram.routing.groups import InstructionGroups

    encoder = Sources("builtin").load("cpu")[2]
    groups = InstructionGroups(CramConfig(max_groups=10))
    for task in stream.tasks:
        for start in (0, 16, 32):
            groups.observe(
                task.name, encoder.encode_text([s.instruction for s in task.train[start : start + 16]])
            )
    forms = {task.name: QUESTIONS[row_of(task)[0]][row_of(task)[1]].format for task in stream.tasks}
    assert groups.locks.keys() == forms.keys()
    assert {(forms[name], group) for name, group in groups.locks.items()} == set(
        zip(dict.fromkeys(forms.values()), range(len(FORMATS)), strict=True)
    )
    for task in stream.tasks:
        found = groups.assign(encoder.encode_text([s.instruction for s in task.test]))
        assert (found == groups.locks[task.name]).all(), task.name


def test_pictures_tell_the_domains_apart(stream: Stream) -> None:
    """Pictures lie nearest to their own domain's mean, whatever is asked: what routing by image needs."""
    import torch

    from cram.loading import Sources

    encoder = Sources("builtin").load("cpu")[2]
    first = {task.name.split("-")[0]: task for task in reversed(stream.tasks)}
    assert first.keys() == DOMAINS.keys()
    centroids = torch.stack(
        [encoder.encode_images([s.images for s in task.train])[0].mean(0) for task in first.values()]
    )
    for own, (name, task) in enumerate(first.items()):
        features, _ = encoder.encode_images([s.images for s in task.test])
        assert (torch.cdist(features, centroids).argmin(1) == own).float().mean() > 0.85, name
