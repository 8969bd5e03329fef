"""The search for each method's settings: the same trials for all, the best Last wins, results are used."""

from __future__ import annotations

from pathlib import Path

import pytest

from cram.atomic import read_json
from cram.cli import main
from cram.compare import search as searching
from cram.compare.search import best, scaled
from cram.config import CramConfig
from cram.report.schema import by_seed, validate_report
from tests.cram import factories, runs


def test_the_highest_last_wins_and_then_the_smaller_size() -> None:
    trials = [
        {"learning_rate": 1.0, "rank_max": 9, "last": 50.0, "parameters": 10},
        {"learning_rate": 2.0, "rank_max": 18, "last": 60.0, "parameters": 20},
        {"learning_rate": 3.0, "rank_max": 9, "last": 60.0, "parameters": 10},
    ]
    assert best(trials) == {"learning_rate": 3.0, "rank_max": 9}


def test_a_trial_scales_rate_and_ranks() -> None:
    config = CramConfig(learning_rate=3e-3, rank_min=4, rank_max=9, buffer_rank=12)
    found = scaled(config, 1 / 3, 2.0)
    assert found == {
        "learning_rate": pytest.approx(1e-3),
        "rank_min": 8,
        "rank_max": 18,
        "buffer_rank": 18,
    }
    CramConfig.from_dict({**config.to_dict(), **found})


def test_what_was_found_is_what_the_runs_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(searching, "RATES", (1.0, 3.0))
    factories.save_clip(tmp_path / "clip", clip := factories.clip_model())
    runs.save_checkpoint("llava", tmp_path / "llava")
    factories.llava(clip=clip).save_pretrained(tmp_path / "llava")
    runs.write_stream(tmp_path / "data")
    settings = [f"{key}={value}" for key, value in runs.SETTINGS.items()]
    command = ["compare", "--model", str(tmp_path / "llava"), "--clip", str(tmp_path / "clip")]
    command += ["--stream", str(tmp_path / "data/stream.yaml"), "--out", str(out := tmp_path / "compare")]
    command += ["--seeds", "2", "--orders", "2", "--search", "--methods", "cram", "sequential"]
    assert main([*command, "--ablations", "no-penalty", "--config", *settings]) == 0

    searched = read_json(out / "search.json")
    rates = {method: best(trials[:2])["learning_rate"] for method, trials in searched["trials"].items()}
    names = {method: round(rate / runs.SETTINGS["learning_rate"]) for method, rate in rates.items()}
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("== trial")] == [
        "== trial 1 of 4: cram, 1-1",
        "== trial 2 of 4: sequential, 1-1",
        "== trial 3 of 4: cram, 3-1",
        "== trial 4 of 4: sequential, 3-1",
        f"== trial 1 of 2: cram, {names['cram']}-2",
        f"== trial 2 of 2: sequential, {names['sequential']}-2",
    ]
    assert searched["seed"] == searching.SEED
    for method, (*same_size, larger) in searched["trials"].items():
        assert larger["learning_rate"] == rates[method]
        assert {larger["rank_max"], *(2 * trial["rank_max"] for trial in same_size)} == {larger["rank_max"]}
    *same_size, larger = searched["trials"]["sequential"]
    followed = next(trial for trial in same_size if trial["learning_rate"] == larger["learning_rate"])
    assert larger["parameters"] == 2 * followed["parameters"]
    assert {method: len(trials) for method, trials in searched["trials"].items()} == {
        "cram": 3,
        "sequential": 3,
    }
    report = validate_report(read_json(out / "report.json"))
    assert report["settings"]["found"] == searched["found"] and report["settings"]["orders"] == 2
    seeds = by_seed(report)
    assert seeds["1"]["cram"]["tasks"] == seeds["0"]["cram"]["tasks"][::-1]
    for seed in ("0", "1"):
        for name in ("cram", "cram-no-penalty", "sequential"):
            record = read_json(out / "seeds" / seed / name / "run.json")
            found = searched["found"][name.split("-")[0]]
            config = record["identity"]["config"]
            assert {key: config[key] for key in found} == found, name
            assert record["settings"]["order"] == int(seed)
    table = (out / "table.md").read_text()
    assert "Differences to CRAM" in table and "Settings found" in table
    assert main(["eval", str(out / "seeds/1/cram")]) == 0
    command[command.index("--out") + 1] = str(elsewhere := tmp_path / "elsewhere")
    command[command.index("--search")] = f"--found={out / 'search.json'}"
    assert main([*command, "--config", *settings]) == 0
    again = validate_report(read_json(elsewhere / "report.json"))
    assert again["settings"]["found"] == searched["found"] and not (elsewhere / "search").exists()
    for seed, methods in by_seed(again).items():
        assert all(seeds[seed][name]["matrix"] == method["matrix"] for name, method in methods.items())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "must be the search.json of a search"),
        ('{"found": {"cram": 3}}', "must be the search.json of a search"),
        ('{"found": {"magic": {}}}', "must name methods among"),
        ('{"found": {"cram": {"sigma": -1}}}', "sigma must be positive"),
        ('{"found": {"cram": {"speed": 1}}}', "speed"),
    ],
)
def test_a_file_that_no_search_wrote_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        searching.read_found(tmp_path / "search.json")


def test_the_seed_of_a_search_is_in_no_result(tmp_path: Path) -> None:
    file = tmp_path / "search.json"
    file.write_text('{"seed": 1000, "found": {"sequential": {"rank_max": 4}}}')
    assert searching.read_found(file, range(3)) == {"sequential": {"rank_max": 4}}
    with pytest.raises(ValueError, match="seeds must leave out 1000, on which .*search.json was found"):
        searching.read_found(file, range(999, 1001))
