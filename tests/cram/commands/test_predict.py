"""`cram predict`: a question, JSON lines of them, and one line for what is wrong."""

from __future__ import annotations

import argparse
import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from cram.cli import main
from cram.commands import options
from cram.commands.predict import read_questions
from cram.scoring.scorers import read_predictions
from tests.cram import factories, runs
from tests.cram.runs import files


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip/, llava/, data/ and run/; not to be written to."""
    folder = tmp_path_factory.mktemp("place")
    clip = factories.clip_model()
    factories.save_clip(folder / "clip", clip)
    factories.llava(clip=clip).save_pretrained(folder / "llava")
    factories.llava_processor().save_pretrained(folder / "llava")
    runs.write_stream(folder / "data")
    base = ["--model", str(folder / "llava"), "--clip", str(folder / "clip")]
    config = [f"{key}={value}" for key, value in runs.SETTINGS.items()]
    stream = ["--stream", str(folder / "data/stream.yaml"), "--config", *config]
    assert main(["train", *base, "--out", str(folder / "run"), *stream]) == 0
    return folder


def test_a_question_is_answered_from_a_run_or_a_bundle(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--max-new-tokens", "3", "--image", str(place / "data/colour-0.png"), "Which colour"]
    assert main(["predict", "--run", str(place / "run"), *asked]) == 0
    said = capsys.readouterr()
    expected = read_predictions(place / "run/tasks/02-letter/predictions/01-colour.jsonl")
    assert said.out == f"{expected['colour-test-0']}\n"
    assert said.err.startswith("(group ") and "colour " in said.err and said.err.count("\n") == 1
    bundle = ["--bundle", str(place / "run/tasks/02-letter/bundle")]
    base = ["--model", str(place / "llava"), "--clip", str(place / "clip")]
    assert main(["predict", *bundle, *base, *asked]) == 0
    assert capsys.readouterr() == said


def test_a_dtype_takes_the_place_of_the_runs(place: Path) -> None:
    parser = argparse.ArgumentParser()
    options.add_trained(parser)
    for given, expected in (([], torch.float32), (["--dtype", "bfloat16"], torch.bfloat16)):
        model, _ = options.load_trained(parser.parse_args(["--run", str(place / "run"), *given]))
        assert model.dtype is expected


def test_json_lines_in_and_out_are_predictions(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = json.loads((place / "data/colour-test.json").read_text())
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "data/questions.jsonl").write_text(lines)
    command = ["predict", "--run", str(place / "run"), "--max-new-tokens", "3"]
    out = tmp_path / "new/answers.jsonl"
    assert main([*command, "--questions", str(place / "data/questions.jsonl"), "--out", str(out)]) == 0
    expected = read_predictions(place / "run/tasks/02-letter/predictions/01-colour.jsonl")
    assert read_predictions(out) == expected
    first = json.loads(out.read_text().split("\n")[0])
    assert first.keys() == {"question_id", "text", "group", "gates"}
    assert list(first["gates"]) == ["colour", "letter"]
    capsys.readouterr()
    monkeypatch.chdir(place / "data")
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main([*command, "--questions", "-"]) == 0
    assert capsys.readouterr().out == out.read_text()


def test_separators_inside_a_text_end_no_line(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four\nfive"
    (tmp_path / "q.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8")
    [(name, turn)] = read_questions(str(tmp_path / "q.jsonl"))
    assert name == "1" and turn.question == text


FAULTY = {
    "not json": ("{", "line 2: must be a JSON object"),
    "a list": ("[]", "line 2: must be a JSON object"),
    "no text": ('{"question_id": "b"}', "line 2: text must be a non-empty string, got None"),
    "a repeated id": (
        '{"question_id": "a", "text": "x"}',
        "line 2: question_id must be unique, got 'a' again",
    ),
    "an id of another type": ('{"question_id": 1.5, "text": "x"}', "line 2: question_id must be a string"),
    "a lost picture": ('{"text": "x", "image": "gone.png"}', "line 2: image must be an existing file"),
    "a lost picture of several": ('{"text": "x", "images": ["gone.png"]}', "line 2: images must be an exist"),
    "a picture under another name": ('{"text": "x", "img": "a.png"}', "field 'img': must be named 'image'"),
    "a picture of another type": ('{"text": "x", "image": 3}', "line 2: image must be a path"),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_faulty_row_is_one_line_before_a_model_is_loaded(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, words = FAULTY[fault]
    (tmp_path / "q.jsonl").write_text(f'{{"question_id": "a", "text": "x"}}\n{row}\n')
    refused(
        ["predict", "--run", "nowhere", "--questions", str(tmp_path / "q.jsonl")], words, tmp_path, capsys
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run", "r"], "a question or --questions must be given, got neither"),
        (["--run", "r", "--questions", "q", "What?"], "a question or --questions must be given, got both"),
        (["--run", "r", "--questions", "q", "--image", "i.png"], "--image must stand beside one question"),
        (["--run", "r", "--out", "f", "What?"], "--out must stand beside --questions"),
        (["What?"], "--run or --bundle must be given, got neither"),
        (["--run", "r", "--bundle", "b", "What?"], "--run or --bundle must be given, got both"),
        (["--bundle", "b", "What?"], "--model must name the bundle's base model"),
        (["--run", "r", "What?"], "r must be a run folder"),
        (["--run", "r", " "], "question must be a non-empty string"),
        (["--run", "r", "--max-new-tokens", "0", "What?"], "--max-new-tokens must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(["predict", *arguments], words, tmp_path, capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "Which colour", "--run"], "['model', 'clip', 'dtype']; give --bundle and --model"),
        (["chat", "--run"], "['model', 'clip', 'dtype']; give --bundle and --model"),
        (["serve", "--port", "0", "--run"], "['model', 'clip']; give --bundle and --model"),
        (["serve", "--engine", "vllm", "--run"], "['model', 'clip']; give --bundle and --model"),
        (["serve", "--model", "builtin", "--port", "0", "--run"], "['clip']; give --bundle and --model"),
        (["eval"], "'model', 'clip', 'dtype']; give a run of `cram train`"),
    ],
)
def test_a_run_that_was_made_in_python_is_refused_in_one_line(
    arguments: list[str],
    words: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    record["settings"] = {"config": record["settings"]["config"]}
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    refused([*arguments, str(tmp_path / "run")], words, tmp_path, capsys)


def refused(arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(folder)
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("cram: ") and words in said, said
    assert files(folder) == before
