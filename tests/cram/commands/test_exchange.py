"""`cram import`, `cram export` and `cram chat` on tiny checkpoints."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cram.atomic import read_json
from cram.bundle.format import read_description
from cram.cli import main
from cram.commands.export import routed_gates
from cram.learning.answers.predict import Turn
from tests.cram import factories, runs
from tests.cram.bundle.loras import ATTENTION, WEIGHTS, Published, language, publish
from tests.cram.runs import files

ASK = "What colour is it?\nAnswer with one word."


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip/, llava/, two pictures, a LoRA, and a bundle with two imported experts; not to be written to."""
    folder = tmp_path_factory.mktemp("exchange")
    clip = factories.clip_model()
    factories.save_clip(folder / "clip", clip)
    factories.llava(clip=clip).save_pretrained(folder / "llava")
    factories.llava_processor().save_pretrained(folder / "llava")
    for index in range(2):
        factories.image(index).save(folder / f"{index}.png")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": language(*ATTENTION)}
    publish(Published(settings, "llava"), folder / "lora")
    publish(Published({**settings, "r": 2, "lora_alpha": 2}, "llava"), folder / "second")
    first = ["--task", "one", "--images", *pictures(folder), "--instructions", ASK]
    assert main(["import", str(folder / "lora"), *first, "--out", str(folder / "b1"), *base(folder)]) == 0
    rows = [{"text": ASK, "image": "0.png"}, {"text": ASK, "image": ["1.png"], "question_id": "x"}]
    (folder / "samples.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    second = ["--task", "two", "--samples", str(folder / "samples.jsonl"), "--bundle", str(folder / "b1")]
    assert main(["import", str(folder / "second"), *second, "--out", str(folder / "b2"), *base(folder)]) == 0
    return folder


def base(place: Path) -> list[str]:
    return ["--model", str(place / "llava"), "--clip", str(place / "clip")]


def bundle(place: Path) -> list[str]:
    return ["--bundle", str(place / "b2"), *base(place)]


def pictures(place: Path) -> list[str]:
    return [str(place / "0.png"), str(place / "1.png")]


def test_imported_experts_share_the_group_of_their_questions(place: Path) -> None:
    found = read_description(place / "b2")
    assert [(each.name, set(each.ranks.values())) for each in found.experts] == [("one", {4}), ("two", {2})]
    assert found.values["experts"] == [["one", 0], ["two", 0]]


def test_import_joins_the_newest_state_of_a_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "b2", tmp_path / "run/tasks/01-two/bundle")
    settings = {"model": str(place / "llava"), "clip": str(place / "clip"), "dtype": "float32"}
    identity = {
        "method": "cram",
        "config": {},
        "stream": {"name": "toy", "tasks": ["two", "later"], "sha256": ""},
        "model": {"family": "llava", "dtype": "float32", "modules": 8, "encoder": [16, 16], "sha256": ""},
    }
    run = {"format": 1, "identity": identity, "settings": settings}
    (tmp_path / "run/run.json").write_text(json.dumps(run))
    sample = ["--task", "three", "--images", str(place / "0.png"), "--instructions", ASK]
    arguments = ["import", str(place / "lora"), "--run", str(tmp_path / "run"), *sample]
    assert main([*arguments, "--out", str(tmp_path / "b3")]) == 0
    assert "expert three of 8 linears, ranks 4 to 4, group 0, 3 experts" in capsys.readouterr().out
    assert [each.name for each in read_description(tmp_path / "b3").experts] == ["one", "two", "three"]


def test_export_gives_back_the_imported_tensors(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", *bundle(place), "--expert", "two", "--scale", "1", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: LoRA of two 1\n"
    found, original = load_file(out / WEIGHTS), load_file(place / "second" / WEIGHTS)
    assert found.keys() == original.keys()
    assert all(torch.equal(found[key], each) for key, each in original.items())


def test_export_of_a_question_keeps_its_route(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = ["--question", ASK, *(word for path in pictures(place) for word in ("--image", path))]
    assert main(["export", *bundle(place), *asked, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: LoRA of one 0.5, two 0.5\n"
    assert set(read_json(out / "adapter_config.json")["rank_pattern"].values()) == {6}
    assert main(["export", *bundle(place), *asked, "--merge", "--out", str(tmp_path / "merged")]) == 0
    assert "base model merged with one 0.5, two 0.5" in capsys.readouterr().out
    assert (tmp_path / "merged/model.safetensors").is_file()


def test_samples_of_several_groups_have_no_common_gates() -> None:
    _, _, cram = factories.routed_llava()
    turns = [Turn.of(question, factories.image(0)) for question in factories.QUESTIONS[:2]]
    with pytest.raises(ValueError, match=r"must fall into one instruction group, got groups \[0, 1\]"):
        routed_gates(cram, turns)


def test_a_method_without_groups_gives_no_gates(tmp_path: Path) -> None:
    cram = runs.learner(tmp_path, "sequential").cram
    with pytest.raises(ValueError, match="must have instruction groups to take gates from a question"):
        routed_gates(cram, [Turn.of(ASK)])


def test_chat_answers_line_by_line_and_survives_wrong_ones(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = f"{ASK.splitlines()[0]}\n"
    lines = [asked, "/image gone.png\n", "what is <image>\n", "/jump\n", "\n", f"/image {place / '1.png'}\n"]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join([*lines, asked, "/new\n", asked, "/quit\n", asked])))
    chat = ["chat", *bundle(place), "--max-new-tokens", "2", "--image", str(place / "0.png")]
    assert main(chat) == 0
    said = capsys.readouterr()
    assert said.err.count("(group 0; ") == 3 and len(said.out.splitlines()) == 3
    wrong = [line for line in said.err.splitlines() if line.startswith("cram: ")]
    assert len(wrong) == 3 and "gone.png" in wrong[0] and "<image>" in wrong[1] and "'/jump'" in wrong[2]


LORA = ["import", "lora", "--task", "t", "--out", "b"]
EXPORT = ["export", "--bundle", "b", "--model", "m", "--out", "o"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (LORA, "--samples or --instructions must be given, got neither"),
        (
            [*LORA, "--samples", "s", "--instructions", "x"],
            "--samples or --instructions must be given, got b",
        ),
        ([*LORA, "--samples", "s", "--images", "i"], "--images must stand with --instructions"),
        ([*LORA, "--images", "a", "b", "c", "--instructions", "x", "y"], "one for each of 3 images, got 2"),
        ([*LORA, "--images", "a.png", "--instructions", "x"], "--images must be files, got 'a.png'"),
        ([*LORA, "--instructions", "x"], "--model must name the bundle's base model"),
        (
            [*LORA, "--instructions", "x", "--run", "r", "--config", "sigma=1"],
            "--config must stand without",
        ),
        (EXPORT, "one of --expert, --gates and --question must be given, got none"),
        ([*EXPORT, "--expert", "e", "--question", "q"], "must be given, got ['expert', 'question']"),
        ([*EXPORT, "--expert", "e", "--image", "i"], "--image must stand with --question"),
        ([*EXPORT, "--expert", "e", "--merge", "--scale", "1"], "--scale must stand without --merge"),
        ([*EXPORT, "--gates", "e=x"], "--gates must be NAME=GATE with a number, got 'e=x'"),
        ([*EXPORT, "--question", "q", "--image", "i.png"], "--image must be a file, got 'i.png'"),
        (["chat", "--run", "r", "--image", "gone.png"], "gone.png"),
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
    refused(arguments, words, tmp_path, capsys)


def refused(arguments: list[str], words: str, folder: Path, capsys: Any) -> None:
    before = files(folder)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("cram: ") and words in said, said
    assert files(folder) == before
