"""The command line: every command on tiny checkpoints, and one line for every known fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cram
from cram import loading
from cram.atomic import read_json
from cram.cli import main
from cram.commands import demo, info
from cram.commands.options import parse_config
from cram.console import ProgressBar, clock
from cram.report.schema import validate_report
from tests.cram import factories, runs
from tests.cram.runs import files, timeless

CONFIG = [f"{key}={value}" for key, value in runs.SETTINGS.items()]
FAMILIES = list(factories.MODELS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip/, one folder a family, data/stream.yaml; not to be written to."""
    folder = tmp_path_factory.mktemp("place")
    factories.save_clip(folder / "clip", factories.clip_model())
    for name in FAMILIES:
        runs.save_checkpoint(name, folder / name)
    clip = factories.clip_model()
    factories.llava(clip=clip).save_pretrained(folder / "llava")
    runs.write_stream(folder / "data")
    return folder


def train(place: Path, out: Path, family: str = "llava", *more: str, stream: str | None = None) -> list[str]:
    """Arguments of `cram train`."""
    return [
        *("train", "--model", str(place / family), "--clip", str(place / "clip"), "--out", str(out)),
        *("--stream", stream or str(place / "data/stream.yaml"), "--config", *CONFIG, *more),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_train_learns_a_stream_file_with_every_family(
    family: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train(place, tmp_path / "run", family)) == 0
    said = capsys.readouterr()
    assert "after letter: colour" in said.out and "train 2/2 letter" in said.err
    report = validate_report(read_json(tmp_path / "run/report.json"))
    assert report["stream"] == "filed" and report["methods"]["cram"]["tasks"] == ["colour", "letter"]
    assert report["settings"]["model"] == str(place / family)
    assert (tmp_path / "run/report.html").is_file()


def test_eval_repeats_the_last_row_and_info_describes_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    monkeypatch.chdir(place)
    relative = [argument.replace(f"{place}/", "") for argument in train(place, run, "qwen2_5_vl")]
    assert main(relative) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "--run", "run"]) == 0
    row = read_json(run / "report.json")["methods"]["cram"]["matrix"][-1]
    assert list(read_json(run / "eval/filed/result.json")["accuracies"].values()) == row
    capsys.readouterr()
    assert main(["info", str(run)]) == 0
    said = capsys.readouterr().out
    assert "run of cram on filed (colour, letter)" in said and "learnt tasks: 2 of 2" in said
    assert "family qwen2_5_vl, 8 linears in 2 layers" in said and "2 experts" in said


def test_info_describes_models_and_the_installation(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(place / "internvl")]) == 0
    assert "internvl: 8 linears in 2 layers (q_proj x 2" in capsys.readouterr().out
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert f"cram {cram.__version__}" in said and "families: internvl, llava, qwen2_5_vl, qwen3_vl" in said
    assert "expert_lora: reference, cpu" in said
    assert "no cpu: centroid_gates has no 'cpu' implementation" in said


@pytest.fixture
def tiny_base(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny checkpoints in the place of the built-in base."""
    monkeypatch.setattr(loading, "base_folder", lambda: place)


@pytest.mark.usefixtures("tiny_base")
def test_demo_compares_the_methods_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = demo.DemoSettings({**demo.QUICK.config, "max_steps": 2}, limit=2)
    monkeypatch.setattr(demo, "QUICK", quick)
    out = tmp_path / "demo"
    assert main(["demo", "--quick", "--jobs", "1", "--out", str(out), "--methods", "cram", "sequential"]) == 0
    said = capsys.readouterr().out
    assert "parameters" in said and "sequential" in said
    report = validate_report(read_json(out / "report.json"))
    assert list(report["methods"]) == ["cram", "sequential"]
    assert len(report["methods"]["cram"]["tasks"]) == 6
    each = [method["parameters"]["per_task"] for method in report["methods"].values()]
    assert each[1]["sketches"] == pytest.approx(sum(each[0].values()) / 6, rel=0.15)
    before = files(out / "seeds")
    assert main(["demo", "--quick", "--jobs", "1", "--out", str(out), "--methods", "sequential", "cram"]) == 0
    assert files(out / "seeds") == before
    assert timeless(read_json(out / "report.json")) == timeless(report)


@pytest.mark.usefixtures("tiny_base")
def test_demo_over_seeds_keeps_one_object_a_seed(tmp_path: Path) -> None:
    settings = demo.DemoSettings({**demo.QUICK.config, "max_steps": 2}, limit=1)
    report = demo.run_demo(tmp_path, seeds=2, methods=["isolated"], settings=settings, jobs=1, progress=False)
    assert list(report["seeds"]) == ["0", "1"]
    assert sorted(path.name for path in (tmp_path / "seeds").iterdir()) == ["0", "1"]


@pytest.mark.parametrize(
    ("threads", "device", "seeds", "jobs"),
    [(1, "cpu", 1, 1), (2, "cpu", 1, 3), (8, "cpu", 1, 3), (8, "cpu", 3, 9), (8, "cuda", 3, 1)],
)
def test_demo_keeps_the_processor_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, device: str, seeds: int, jobs: int
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(demo, "run_comparison", lambda comparison, jobs, shown: taken.append(jobs))
    demo.run_demo(tmp_path, seeds=seeds, device=device)
    assert taken == [jobs]


def missing_image(data: Path) -> None:
    (data / "letter-2.png").unlink()


def missing_answer(data: Path) -> None:
    edit(data / "letter-train.json", lambda rows: rows[3]["conversations"].pop())


def empty_task(data: Path) -> None:
    (data / "letter-test.json").write_text("[]")


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    rows = json.loads(file.read_text())
    change(rows)
    file.write_text(json.dumps(rows))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (missing_image, ("letter", "letter-2.png")),
        (missing_answer, ("letter-train.json", "row 3")),
        (empty_task, ("letter-test.json",)),
    ],
)
def test_faulty_data_is_one_line_before_anything_is_written(
    damage: Callable[[Path], None],
    words: tuple[str, ...],
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = runs.write_stream(tmp_path / "data")
    damage(file.parent)
    refused(train(place, tmp_path / "run", stream=str(file)), words, tmp_path, capsys)


def refused(
    arguments: list[str], words: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(folder)
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("cram: ")
    assert all(word in said for word in words), said
    assert files(folder) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "learning_rat=1"], ("config keys must be among", "learning_rate")),
        (["--config", "sigma=-1"], ("sigma must be positive",)),
        (["--config", "sigma"], ("--config must be KEY=VALUE",)),
        (["--method", "magic"], ("method must be one of ['",)),
        (["--stream", "nowhere.yaml"], ("nowhere.yaml",)),
        (["--dtype", "int8"], ("dtype must be one of",)),
        (["--model", "no/such/folder"], ("no/such/folder",)),
        (["--clip", "no/such/clip"], ("no/such/clip",)),
        (["--limit", "0"], ("limit must be at least 1",)),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str],
    words: tuple[str, ...],
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused([*train(place, tmp_path / "run"), *arguments], words, tmp_path, capsys)


def test_an_unknown_family_is_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    arguments = [*train(place, tmp_path / "run"), "--model", str(tmp_path / "bert")]
    refused(arguments, ("model must be of a family among", "'bert'"), tmp_path, capsys)


def test_features_that_are_not_finite_are_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = factories.clip_model()
    clip.visual_projection.weight.data[0, 0] = float("nan")
    factories.save_clip(tmp_path / "clip", clip)
    for family in ("llava", "qwen3_vl"):
        arguments = [*train(place, tmp_path / "run", family), "--clip", str(tmp_path / "clip")]
        refused_quietly(arguments, "features must be finite", tmp_path, capsys)


def refused_quietly(
    arguments: list[str], word: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `refused`, after a progress line may have been shown."""
    before = files(folder)
    assert main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("cram: ") and word in last
    assert files(folder) == before


TRAIN = ["--model", "builtin", "--stream", "builtin", "--out", "run"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["eval", "--run", "."], "must be a run folder"),
        (["info", "."], "must be a run, a bundle or a model folder"),
        (["train", *TRAIN, "--data-root", "."], "--data-root must stand with a stream file"),
        (["check", "builtin", "--data-root", "."], "--data-root must stand with a stream file"),
        (["compare", "--data-root", "."], "--data-root must stand with a stream file"),
        (["train", *TRAIN, "--seed", "3", "--config", "seed=4"], "seed must be given once"),
        (["compare", "--config", "seed=4"], "--config must leave method and seed to"),
        (["compare", "--merge", "r.json", "--quick"], "--quick must stand without --merge"),
        (["compare", "--merge", "r.json", "--found", "f"], "--found must stand without --merge"),
        (["demo", "--seeds", "0"], "seeds must be at least 1"),
        (["demo", "--methods", "magic"], "methods must be distinct names"),
    ],
)
def test_other_commands_refuse_in_one_line(
    arguments: list[str],
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(arguments, (word,), tmp_path, capsys)


def test_stopping_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", stop)
    assert main(["info"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_configuration_starts_from_the_streams_preset() -> None:
    assert parse_config([], "trigap", {}).max_groups == 10
    assert parse_config(["max_groups=3"], "trigap", {"seed": None}).max_groups == 3
    chosen = parse_config(['target_projections=["q_proj"]', "max_steps=null"], "x.yaml", {"seed": 7})
    assert chosen.target_projections == ("q_proj",) and chosen.max_steps is None and chosen.seed == 7


def test_progress_is_written_at_every_tenth_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("work", 40) as bar:
        for _ in range(40):
            bar.advance(note="loss 1")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[-1].startswith("work [########################] 40/40")
    assert clock(59.6) == "1:00" and clock(3725) == "1:02:05"


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "--out"],
        ["demo", "--out"],
    ],
    ids=lambda words: words[0],
)
def test_several_processes_do_not_write_one_folder(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*words, str(tmp_path / "run")]) == 2
    assert f"cram {words[0]} must run as one process, got WORLD_SIZE=2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
