"""Sample pictures of the report page: joined by id, judged by the task's scorer, shown with every answer."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from cram.report.examples import BASE, SIDE_PX, gather_examples
from cram.report.page import write_page
from cram.streams.types import Sample, Stream, Task
from tests.cram.report.pages import Page
from tests.cram.report.reports import TASKS, several_seeds, single_seed


def sample(task: str, number: int) -> Sample:
    picture = Image.new("RGB", (600, 300), (number * 40, 0, 0))
    return Sample(f"{task}-{number}", (picture,), f"What is <b>{number}</b>?", "yes", ("yes", "aye"))


STREAM = Stream(
    "toy", tuple(Task(name, (), [sample(name, i) for i in range(5)], "accuracy", 4) for name in TASKS)
)


def answer(folder: Path, texts: dict[str, str]) -> None:
    """Write the answers to every test question, in another order than the stream's."""
    for index, task in enumerate(STREAM.tasks):
        rows = [{"question_id": s.id, "text": texts.get(s.id, "no")} for s in reversed(task.test)]
        file = folder / f"predictions/{index + 1:02d}-{task.name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (folder / "result.json").write_text("{}")


RIGHT = {f"{TASKS[0]}-1": "Aye", f"{TASKS[0]}-2": "line\u2028break"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    report = {"stream": "toy", "methods": {"cram": single_seed()["methods"]["cram"]}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    answer(tmp_path / "tasks/02-count", {})
    answer(tmp_path / "tasks/03-spell", RIGHT)
    answer(tmp_path / BASE, {})
    return tmp_path


def test_a_run_gives_three_questions_per_task_with_the_answers_of_the_last_test(run: Path) -> None:
    found = gather_examples(run, STREAM)
    assert [example.task for example in found] == [name for name in TASKS for _ in range(3)]
    first, second, third, *_ = found
    assert (first.question, first.expected) == ("What is <b>0</b>?", "yes / aye")
    assert [(said.method, said.text, said.right) for said in first.answers] == [
        ("cram", "no", False),
        (BASE, "no", False),
    ]
    assert [said.right for said in second.answers] == [True, False]
    assert third.answers[0].text == "line\u2028break"
    data = first.pictures[0].partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (SIDE_PX, SIDE_PX // 2)


def test_a_comparison_shows_its_first_seed(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(several_seeds()))
    for seed in range(2):
        for name in ("cram", "sequential"):
            answer(tmp_path / f"seeds/{seed}/{name}/tasks/03-spell", {} if seed else RIGHT)
    found = gather_examples(tmp_path, STREAM)
    assert [said.method for said in found[0].answers] == ["cram", "sequential"]
    assert found[1].answers[0].text == "Aye"


def test_questions_that_a_method_has_not_answered_are_left_out(run: Path) -> None:
    file = run / "base/predictions/01-colour-ring.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:2]) + "\n")
    assert [example.question[11:12] for example in gather_examples(run, STREAM)[:2]] == ["3", "4"]


def test_the_page_shows_pictures_questions_and_answers(run: Path) -> None:
    page = Page(write_page(run, gather_examples(run, STREAM)).read_text(encoding="utf-8"))
    words = " ".join(page.text.split())
    assert "What is <b>1</b>? expectedyes / aye cram✓ Aye base✗ no" in words
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(alts) == 9 and alts[0] == "Picture 1 of the question: What is <b>0</b>?"
