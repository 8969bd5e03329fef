"""A stream is checked as a whole before the first step; every fault names its file and row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import processors

from cram.learning.checks import check_samples, check_tests, few_steps
from cram.loading import load_processor
from cram.streams.types import Sample, Stream, Task
from tests.cram import factories, runs

PROCESSOR = factories.llava_processor()
GOOD = Sample("1", (factories.image(0),), "Which colour?", "red", (), "test.json, row 3")


def stream(**changes: Any) -> Stream:
    """Two tasks; the last test sample of the last one is changed."""
    tasks = [Task(name, (GOOD,), (GOOD,), "accuracy", 3) for name in ("one", "two")]
    return Stream("toy", (tasks[0], replace(tasks[1], test=(GOOD, replace(GOOD, id="2", **changes)))))


def check(processor: Any = PROCESSOR, **changes: Any) -> None:
    check_samples(stream(**changes), processor, factories.llava())


def test_a_good_stream_passes() -> None:
    check()


@pytest.mark.parametrize("token", ["</s>", "<image>", "<|im_end|>", "<s>"])
@pytest.mark.parametrize("field", ["instruction", "answer", "references"])
def test_control_tokens_in_a_text_are_refused(token: str, field: str) -> None:
    text = f"red {token}"
    with pytest.raises(
        ValueError, match=r"^test\.json, row 3: the (question|answer) must hold no control token"
    ):
        check(**{field: (text,) if field == "references" else text})


@pytest.mark.parametrize(
    "texts",
    [
        {"instruction": "What says ASSISTANT: and then USER: here?"},
        {"instruction": "Which?", "answer": "ASSISTANT: red"},
    ],
)
def test_role_markers_that_hide_the_question_are_refused(texts: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"row 3: question and answer must leave the question readable"):
        check(**texts)
    check(instruction="Who says ASSISTANT: here?", answer="the USER: of it")


def test_a_tokenizer_that_ends_every_prompt_is_refused() -> None:
    processor = factories.llava_processor()
    ids = [(token, factories.SPECIAL[token]) for token in ("<s>", "</s>")]
    processor.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ids
    )
    with pytest.raises(ValueError, match=r"tokenizer must not end a prompt, got one that adds '</s>'"):
        check(processor)


def test_a_prompt_beyond_the_context_is_counted_and_refused() -> None:
    # 512 tokens hold "<s>USER: ", a picture of 4, a line, the text, " ASSISTANT:" and 3 of the answer.
    most = 512 - len("sUSER: ") - 4 - len("\n ASSISTANT:") - 3
    check(instruction="x" * most)
    with pytest.raises(ValueError, match=r"row 3: prompt and answer must fit into 512 tokens, got 513"):
        check(instruction="x" * (most + 1))


def test_a_file_that_is_no_picture_is_named_before_training(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"^test\.json, row 3: picture .*x\.png: image .* readable picture"):
        check(images=(tmp_path / "x.png",))


def test_a_strip_that_the_processor_refuses_is_named_before_training(tmp_path: Path) -> None:
    Image.new("RGB", (900, 1)).save(tmp_path / "strip.png")
    processor = load_processor(runs.save_checkpoint("qwen2_5_vl", tmp_path / "qwen"))
    with pytest.raises(ValueError, match=r"^test\.json, row 3: picture .*strip\.png: .*aspect ratio"):
        check(processor, images=(tmp_path / "strip.png",))


def test_every_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cram.learning import checks

    opened: list[Path] = []
    original = checks.open_image
    monkeypatch.setattr(checks, "open_image", lambda image: opened.append(image) or original(image))
    monkeypatch.setattr(checks.os, "cpu_count", lambda: 1)
    factories.image(0).save(tmp_path / "x.png")
    sample = replace(GOOD, images=(tmp_path / "x.png",))
    check_samples(
        Stream("toy", (Task("a", [sample] * 4, [sample], "accuracy", 3),)), PROCESSOR, factories.llava()
    )
    assert opened == [tmp_path / "x.png"]


def test_a_run_checks_its_stream_before_the_first_step(tmp_path: Path) -> None:
    tasks = runs.two_tasks().tasks
    broken = replace(tasks[1], test=(*tasks[1].test, replace(GOOD, answer="</s>")))
    learner = runs.learner(tmp_path / "run", tasks=Stream("toy", (tasks[0], broken)))
    with pytest.raises(ValueError, match="must hold no control token"):
        learner.run()
    assert not list((tmp_path / "run").glob("tasks/*"))


def test_tasks_with_too_few_steps_are_named() -> None:
    config = runs.config(max_steps=None, epochs=1, batch_size=1, learning_rate=2e-4)
    (one, two) = few_steps(stream(), config)
    assert one == (
        "task 'one' has 1 steps at learning rate 0.0002, which hardly move a weight; give it 25 (epochs, "
        "max_steps, batch_size) or a higher rate"
    )
    assert two.startswith("task 'two'")
    assert not few_steps(stream(), runs.config(max_steps=25, learning_rate=2e-4))


@pytest.mark.parametrize("method", ["cram", "keeplora"])
def test_a_later_task_that_is_too_short_is_named_before_the_first_one(method: str, tmp_path: Path) -> None:
    one, two = runs.two_tasks().tasks
    short = Stream("toy", (one, Task("letter", two.train[:3], two.test, "accuracy", 3)))
    with pytest.raises(ValueError, match="task 'letter' must have at least 2 steps, got 1"):
        runs.learner(tmp_path / "run", method, tasks=short, max_steps=None).run()
    assert not list(tmp_path.rglob("bundle"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scorer": "number"}, "scorer of task 't': .*: .*'number' must be a text with one number"),
        ({"max_new_tokens": 0}, "max_new_tokens of task 't' must be an int >= 1, got 0"),
        ({"max_new_tokens": True}, "max_new_tokens of task 't' must be an int >= 1, got True"),
        ({"published": "magic"}, "published of task 't': scorer must be one of"),
        ({"published": "mcitlib_grounding"}, "an answer scored by 'mcitlib_grounding' must be a box"),
    ],
)
def test_a_test_that_could_not_be_scored_is_refused(change: dict[str, Any], words: str) -> None:
    sample = Sample("1", (), "q", "dog")
    task = Task("t", [sample], [sample], "accuracy", 4)
    check_tests(Stream("s", (task,)))
    with pytest.raises(ValueError, match=words):
        check_tests(Stream("s", (replace(task, **change),)))
