"""The manifest of a stream, its faults, and miniatures of the published layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cram.cli import main
from cram.config import CramConfig
from cram.learning.learner import ContinualLearner
from cram.scoring.scorers import SCORERS
from cram.streams import Sample, Stream, StreamError, Task, load_stream
from cram.streams.check import check_stream
from cram.streams.published import with_suffix
from cram.streams.registry import SHIPPED, stream_content, stream_training
from tests.cram import factories, runs

# Scorer -> an answer of its kind.
ANSWERS: dict[str, Any] = {
    "accuracy": "up",
    "option_letter": "B",
    "vqa_soft": "up",
    "box": "[0.1, 0.2, 0.5, 0.6]",
    "anls": "up",
    "coco_caption": "a red ball",
}


def miniature(name: str, root: Path, samples: int = 4) -> Path:
    """Write a tiny copy of a published layout, exactly where its stream file expects everything."""
    _, content = stream_content(name)
    for number, entry in enumerate(content["tasks"]):
        answer = ANSWERS[entry["scorer"]]
        for split in ("train", "test"):
            images = root / entry.get("images", content.get("images", "."))
            if split == "test" and "test_images" in entry:
                images = root / entry["test_images"]
            (images / "pictures").mkdir(parents=True, exist_ok=True)
            rows = []
            for index in range(samples):
                picture = f"pictures/{entry['name']}-{split}-{index}.png"
                factories.image(50 * number + index + 10 * (split == "test")).save(images / picture)
                question = f"Question {index} {split}\n{entry.get('prompt', 'Answer.')}"
                rows.append(row(entry, split, index, picture, question, answer))
            file = root / entry[split]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rows))
        extra_files(entry, root, samples)
    return root


def row(entry: dict[str, Any], split: str, index: int, picture: str, question: str, answer: str) -> Any:
    """A row as LLaVA's training JSON, or as the test JSON of the benchmarks."""
    if split == "train":
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        return {"id": str(index), "image": picture, "conversations": turns}
    key = "answer_bbox" if entry["scorer"] == "box" else "answer"
    return {"question_id": str(index), "image": picture, "text": question, key: answer}


def extra_files(entry: dict[str, Any], root: Path, samples: int) -> None:
    """The captions and the human answers that a task names."""
    if "references" in entry:
        images = [{"id": i, "file_name": f"{entry['name']}-test-{i}.png"} for i in range(samples)]
        captions = [{"image_id": i, "caption": "a red ball"} for i in range(samples) for _ in range(5)]
        (root / entry["references"]).write_text(json.dumps({"images": images, "annotations": captions}))
    if "human_answers" in entry:
        rows = [{"question_id": i, "answers": ["up"] * 7 + ["down"] * 3} for i in range(samples)]
        (root / entry["human_answers"]).parent.mkdir(parents=True, exist_ok=True)
        (root / entry["human_answers"]).write_text(json.dumps({"data": rows}))


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_miniature_is_read_and_described(name: str, tmp_path: Path) -> None:
    stream = load_stream(name, data_root=miniature(name, tmp_path))
    _, content = stream_content(name)
    assert [task.name for task in stream.tasks] == [entry["name"] for entry in content["tasks"]]
    manifest = check_stream(stream, content, pictures=True)
    counts = {entry["name"]: entry["counts"]["test"] for entry in content["tasks"] if "counts" in entry}
    wanted = [f"{task}: must have {count} test samples, got 4" for task, count in counts.items()]
    assert manifest["faults"] == wanted
    for task, entry in zip(manifest["tasks"], content["tasks"], strict=True):
        assert (task["train"]["samples"], task["test"]["samples"], task["shared_pictures"]) == (4, 4, 0)
        assert task["train"]["pictures"] == task["test"]["pictures"] == 4
        assert task["prompted"] == (100.0 if "prompt" in entry else None)
    CramConfig(**stream_training(name))
    assert content["source"] and manifest["source"] == content["source"]
    assert all(entry.get("published", "accuracy") in SCORERS for entry in content["tasks"])


@pytest.mark.parametrize("name", ["ucit", "trigap"])
def test_the_streams_of_the_paper_are_learnt_with_its_settings(name: str) -> None:
    assert CramConfig(**stream_training(name)) == getattr(CramConfig, name)()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_miniature_is_trained_tested_and_scored(name: str, tmp_path: Path) -> None:
    stream = load_stream(name, data_root=miniature(name, tmp_path / "data"))
    model, encoder = factories.fresh()
    settings = runs.config(max_steps=2, batch_size=2, max_groups=10)
    made = ContinualLearner(
        model,
        factories.llava_processor(),
        stream,
        settings,
        out=tmp_path / "run",
        encoder=encoder,
        progress=False,
    )
    report = made.run()["methods"]["cram"]
    assert report["tasks"] == [task.name for task in stream.tasks] and len(report["matrix"][-1]) == len(
        stream.tasks
    )


def test_suffixes_human_answers_and_boxes_are_read(tmp_path: Path) -> None:
    stream = load_stream("mllm-dcl", data_root=miniature("mllm-dcl", tmp_path / "dcl"))
    asked = {task.name: task.test[0].instruction for task in stream.tasks}
    assert asked["Med"].endswith("Answer the question with a single word (or phrase).")
    assert asked["Fin"].endswith("e.g., A, B, C, D.") and asked["RS"].endswith("Answer.")
    stream = load_stream("coin", data_root=miniature("coin", tmp_path / "coin"))
    tasks = {task.name: task for task in stream.tasks}
    assert tasks["TextVQA"].test[0].references == ("up",) * 7 + ("down",) * 3
    assert tasks["Grounding"].test[0].answer == ANSWERS["box"]
    assert tasks["OCRVQA"].published == "mcitlib_ocrvqa"


def test_a_file_of_human_answers_that_is_no_json_is_named(tmp_path: Path) -> None:
    root = miniature("coin", tmp_path)
    _, content = stream_content("coin")
    (name,) = {entry["human_answers"] for entry in content["tasks"] if "human_answers" in entry}
    (root / name).write_text("{")
    with pytest.raises(StreamError, match=rf"{Path(name).name}, field '.file.': must be JSON, got"):
        load_stream("coin", data_root=root)


def test_the_command_prints_a_manifest_and_refuses_leaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = runs.write_stream(tmp_path)
    out = tmp_path / "manifest.json"
    # The miniature of the run tests shows the same picture files in both splits, under other questions.
    code = main(["check", str(file), "--out", str(out), "--pictures"])
    said = capsys.readouterr()
    manifest = json.loads(out.read_text())
    assert "colour" in said.out and manifest["tasks"][0]["train"]["samples"] == 6
    assert code == (2 if manifest["faults"] else 0)
    rows = json.loads((tmp_path / "colour-test.json").read_text())
    train = json.loads((tmp_path / "colour-train.json").read_text())
    rows[0]["text"] = train[0]["conversations"][0]["value"].removeprefix("<image>\n")
    rows[0]["image"] = train[0]["image"]
    (tmp_path / "colour-test.json").write_text(json.dumps(rows))
    assert main(["check", str(file)]) == 2
    said = capsys.readouterr()
    assert "test questions are in the training data" in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize("trained", ["Which?", "Which? Say it.", "Which? Say A."])
def test_a_leak_is_seen_behind_the_suffix_of_the_tests(trained: str) -> None:
    suffix = {"A": " Say A.", "*": " Say it."}
    answer = "A" if "Say A" in trained else "up"
    train = [Sample("0", (Path("a.png"),), trained, answer)]
    asked = Sample("1", (Path("a.png"),), trained.removesuffix(suffix["A"]), answer)
    other = Sample("2", (Path("b.png"),), trained, answer)
    stream = Stream("toy", (Task("t", train, with_suffix([asked, other], suffix), "accuracy", 3),))
    described = {"tasks": [{"name": "t", "test_suffix": suffix}]}
    assert check_stream(stream, described)["faults"] == [
        "t: 1 test questions are in the training data, such as 'Which?'"
    ]


def test_the_built_in_stream_has_no_leak(capsys: pytest.CaptureFixture[str]) -> None:
    stream = load_stream("builtin", limit=20)
    assert check_stream(stream, {})["faults"] == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("published", "magic", "must be a scorer"),
        ("counts", "{train: 0}", "must be numbers of train and test"),
        ("counts", "{dev: 3}", "must be numbers of train and test"),
        ("test_suffix", "{A: 1}", "must be texts by answer"),
    ],
)
def test_wrong_published_facts_are_refused(key: str, value: str, words: str, tmp_path: Path) -> None:
    file = runs.write_stream(tmp_path)
    text = file.read_text().replace("    scorer: accuracy", f"    scorer: accuracy\n    {key}: {value}", 1)
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        load_stream(file)
