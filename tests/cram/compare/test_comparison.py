"""Comparisons on tiny checkpoints: reports, resuming after a kill, processes side by side, refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cram.atomic import read_json
from cram.cli import main
from cram.compare.board import Board, run_comparison
from cram.compare.comparison import EXTRA, Comparison, Run, equal_rank, stored
from cram.compare.entries import ABLATIONS, entries
from cram.config import CramConfig
from cram.loading import Sources
from cram.report.schema import by_seed, validate_report
from tests.cram import factories, runs
from tests.cram.runs import files

ROOT = Path(__file__).resolve().parents[3]
CONFIG = [f"{key}={value}" for key, value in runs.SETTINGS.items()]
METHODS = ["cram", "sequential", "isolated"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip/, llava/, data/stream.yaml; not to be written to."""
    folder = tmp_path_factory.mktemp("place")
    clip = factories.clip_model()
    factories.save_clip(folder / "clip", clip)
    runs.save_checkpoint("llava", folder / "llava")
    factories.llava(clip=clip).save_pretrained(folder / "llava")
    runs.write_stream(folder / "data")
    return folder


def command(place: Path, out: Path, *more: str) -> list[str]:
    """Arguments of `cram compare` over two seeds."""
    return [
        *("compare", "--model", str(place / "llava"), "--clip", str(place / "clip"), "--out", str(out)),
        *("--stream", str(place / "data/stream.yaml"), "--config", *CONFIG, "--seeds", "2"),
        *("--methods", *METHODS, *more),
    ]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The share of a run with two jobs at once is one thread at least; here all have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods and an ablation over two seeds, not to be written to."""
    out = tmp_path_factory.mktemp("finished") / "compare"
    assert main(command(place, out, "--ablations", "no-penalty")) == 0
    return out


def results(folder: Path) -> dict[str, bytes]:
    """The files of all runs that hold no times: bundles, predictions, identities."""
    kept = ("bundle/", "predictions/", "run.json")
    return {name: data for name, data in files(folder / "seeds").items() if any(k in name for k in kept)}


def accuracies(folder: Path) -> dict[str, Any]:
    """Matrix and size of every entry of every seed."""
    seeds = by_seed(validate_report(read_json(folder / "report.json")))
    return {s: {n: (m["matrix"], m["parameters"]) for n, m in found.items()} for s, found in seeds.items()}


def test_the_report_holds_every_entry_of_every_seed(finished: Path) -> None:
    report = validate_report(read_json(finished / "report.json"))
    seeds = by_seed(report)
    assert list(seeds) == ["0", "1"]
    for found in seeds.values():
        assert list(found) == [*METHODS, "cram: no penalty"]
        assert [m["entry"]["told_task"] for m in found.values()] == [False, False, True, False]
        for name, method in found.items():
            assert method["entry"]["method"] == name.split(":")[0] and method["entry"]["note"]
            assert method["inference"]["tokens"] == 3 and method["inference"]["samples"] == 4
            assert method["inference"]["prefills"] == 1 and method["peak_memory_bytes"] > 50e6
    assert report["settings"]["jobs"] == 1 and report["settings"]["model"].endswith("llava")
    assert (finished / "report.html").is_file() and (finished / "table.md").is_file()


def test_sequential_is_as_large_as_an_average_expert(finished: Path, place: Path) -> None:
    for seed, found in by_seed(validate_report(read_json(finished / "report.json"))).items():
        model, _, _ = Sources(str(place / "llava"), str(place / "clip")).load("cpu")
        rank = equal_rank(model, CramConfig(), finished / "seeds" / seed / "cram")
        assert found["sequential"]["entry"]["changes"]["rank"] == rank
        average = found["cram"]["parameters"]["total"] / 2
        widths = found["sequential"]["parameters"]["total"] / rank
        assert abs(found["sequential"]["parameters"]["total"] - average) <= widths / 2


def test_an_ablation_differs_from_cram_by_exactly_its_fields(finished: Path) -> None:
    for seed in ("0", "1"):
        folder = finished / "seeds" / seed
        whole, ablated = (
            read_json(folder / name / "run.json")["identity"] for name in ("cram", "cram-no-penalty")
        )
        assert ablated["config"] == {**whole["config"], "penalty_weight": 0.0}
        assert whole["config"]["penalty_weight"] != 0.0
        assert {k: v for k, v in ablated.items() if k != "config"} == {
            k: v for k, v in whole.items() if k != "config"
        }
        assert read_json(folder / "cram-no-penalty" / EXTRA)["entry"]["changes"] == {"penalty_weight": 0.0}


def test_sizes_are_those_of_the_newest_bundle(finished: Path) -> None:
    from safetensors.torch import load_file

    run = finished / "seeds/0/isolated"
    bundle = run / "tasks/02-letter/bundle"
    values = sum(t.numel() for f in bundle.rglob("*.safetensors") for t in load_file(f).values())
    size = sum(len(data) for data in files(bundle).values())
    assert stored(run) == {"values": values, "bundle_bytes": size}
    method = read_json(finished / "report.json")["seeds"]["0"]["isolated"]
    assert method["stored"] == stored(run) and values >= method["parameters"]["total"]


def test_a_finished_comparison_is_not_touched_again(finished: Path, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "compare"
    shutil.copytree(finished, out)
    before = files(out)
    assert main(command(place, out, "--ablations", "no-penalty")) == 0
    assert files(out / "seeds") == {k[6:]: v for k, v in before.items() if k.startswith("seeds/")}
    assert read_json(out / "report.json") == json.loads(before["report.json"])


def test_it_goes_on_after_a_kill_in_the_middle(finished: Path, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "compare"
    arguments = command(place, out, "--ablations", "no-penalty")
    running = subprocess.Popen([sys.executable, "-m", "cram", *arguments], cwd=ROOT)
    # The first seed's CRAM is done and sequential is in its first or second task.
    while not list(out.glob("seeds/0/sequential/tasks/01-*/training.json")) and running.poll() is None:
        time.sleep(0.01)
    running.kill()
    running.wait()
    assert not (out / "seeds/0/isolated").exists()
    kept = (out / "seeds/0/cram" / EXTRA).read_bytes()
    assert main(arguments) == 0
    assert (out / "seeds/0/cram" / EXTRA).read_bytes() == kept, "what was measured is not measured again"
    assert accuracies(out) == accuracies(finished)
    assert results(out).keys() == results(finished).keys()


def test_jobs_side_by_side_give_the_same(
    finished: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "two"
    arguments = command(place, out, "--seeds", "1", "--methods", "cram", "isolated", "--jobs", "2")
    assert main(arguments) == 0
    report = read_json(out / "report.json")
    assert report["settings"]["jobs"] == 2 and list(report["methods"]) == ["cram", "isolated"]
    # Here as there a run has one thread, so nothing differs at all.
    wanted, parts = results(finished), ("0/base/", "0/cram/", "0/isolated/")
    assert results(out) == {k: v for k, v in wanted.items() if k.startswith(parts)}
    said = capsys.readouterr()
    assert "== 2 runs, 2 at a time: cram, seed 0; isolated, seed 0\n" in said.out
    assert "compare [########################] 4/4" in said.err


def test_time_left_is_shown_before_a_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(place, tmp_path / "one", "--seeds", "1", "--methods", "isolated", "sequential")
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "== run 1 of 2: sequential, seed 0\n" in said, "nothing is known before the first"
    assert "== run 2 of 2: isolated, seed 0; all: compare [############------------] 2/4" in said
    assert "methods" in read_json(tmp_path / "one/report.json"), "one seed has no seeds around it"


def test_fewer_tests_and_wrong_numbers(place: Path, tmp_path: Path) -> None:
    made = comparison(place, tmp_path, tests=2)
    assert [len(task.test) for task in made.load_stream(0).tasks] == [2, 2]
    whole = comparison(place, tmp_path).load_stream(0)
    assert made.load_stream(0).tasks[0].test == whole.tasks[0].test[:2]
    for field in ("seeds", "tests"):
        with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
            comparison(place, tmp_path, **{field: 0})
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        run_comparison(made, jobs=0)


def comparison(place: Path, out: Path, **changes: Any) -> Comparison:
    """CRAM alone with one seed."""
    sources = Sources(str(place / "llava"), str(place / "clip"))
    options: dict[str, Any] = {"entries": tuple(entries(["cram"], ())), "seeds": 1, **changes}
    file = str(place / "data/stream.yaml")
    return Comparison(out=out, config=runs.config(), sources=sources, stream=file, **options)


def test_every_seed_runs_on_its_own_stream(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[int, str]] = []
    load = Comparison.load_stream
    monkeypatch.setattr(Comparison, "load_stream", lambda self, seed: replace(load(self, 0), name=str(seed)))
    monkeypatch.setattr(Run, "execute", lambda self, stream, shown: ran.append((self.seed, stream.name)))
    monkeypatch.setattr(Board, "update", lambda self, done: setattr(self, "report", {}))
    made = comparison(place, tmp_path, seeds=3, entries=tuple(entries(["cram", "isolated"], ())))
    run_comparison(made, shown=False)
    assert ran == [(0, "0"), (0, "0"), (1, "1"), (1, "1"), (2, "2"), (2, "2")]
    ran.clear()
    run_comparison(replace(made, seeds=2, first_seed=4), shown=False)
    assert ran == [(4, "4"), (4, "4"), (5, "5"), (5, "5")]


def test_a_seed_of_its_own_keeps_its_number_in_the_report(place: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        made = comparison(place, tmp_path / str(seed), first_seed=seed)
        assert list(by_seed(run_comparison(made, shown=False))) == [str(seed)]


def test_a_run_without_cram_beside_it_has_the_full_rank(place: Path, tmp_path: Path) -> None:
    alone = comparison(place, tmp_path, entries=tuple(entries(["sequential"], ())))
    assert Run(alone, alone.entries[0], 0).after is None
    both = comparison(place, tmp_path, entries=tuple(entries(["sequential", "cram"], ())))
    after = Run(both, both.entries[1], 1).after
    assert after is not None and after.name == "cram, seed 1"


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_another_configuration_in_the_same_folder_is_one_line(
    jobs: str, finished: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compare"
    shutil.copytree(finished, out)
    before = files(out)
    capsys.readouterr()
    assert main([*command(place, out, "--jobs", jobs), "--config", *CONFIG, "sigma=1"]) == 2
    said = capsys.readouterr().err
    assert "belongs to another configuration: config.sigma = 2.0 there, 1.0 here" in said
    assert files(out) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "magic"], ("methods must be distinct names among", "'magic'")),
        (["--ablations", "no-magic"], ("ablations must be distinct names among", "'no-magic'")),
        (["--methods", "sequential", "--ablations"], ("methods must hold 'cram'",)),
        (["--seeds", "0"], ("seeds must be at least 1",)),
        (["--first-seed", "-1"], ("first_seed must be at least 0",)),
        (["--search", "--first-seed", "999"], ("seeds must leave out 1000",)),
        (["--found", "nowhere.json"], ("nowhere.json",)),
        (["--found", "nowhere.json", "--search"], ("got --found and --search",)),
        (["--jobs", "0"], ("jobs must be at least 1",)),
        (["--stream", "nowhere.yaml"], ("nowhere.yaml",)),
        (["--stream", "nowhere.yaml", "--jobs", "2"], ("nowhere.yaml",)),
        (["--config", "sigma=-1"], ("sigma must be positive",)),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str],
    words: tuple[str, ...],
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*command(place, tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("cram: ") and all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_quick_takes_the_small_base_fewer_steps_and_all_ablations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from cram.commands import compare
    from cram.compare.comparison import QUICK, QUICK_SEEDS, QUICK_TESTS, SMALL_BASE
    from cram.methods import METHODS as KNOWN

    asked: list[Comparison] = []

    def stop(made: Comparison, jobs: int) -> None:
        asked.append(made)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_comparison", stop)
    out = str(tmp_path)
    assert main(["compare", "--quick", "--out", out]) == 130
    assert main(["compare", "--out", out, "--ablations", "--config", "batch_size=4"]) == 130
    quick, full = asked
    assert quick.config == CramConfig.from_dict({**SMALL_BASE, **QUICK})
    assert (quick.seeds, quick.tests) == (QUICK_SEEDS, QUICK_TESTS) == (2, 64), "as docs/results.md says"
    assert {entry.method for entry in quick.entries} == KNOWN.keys()
    assert full.config == CramConfig.from_dict({**SMALL_BASE, "batch_size": 4})
    assert [entry.ablation for entry in full.entries if entry.ablation] == list(ABLATIONS)
    assert (full.seeds, full.tests) == (3, None)
