"""Reports of one comparison that was run in several places become one, and other reports are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from cram.cli import main
from cram.compare.merged import merge
from cram.report.schema import Report, validate_report
from tests.cram.report.reports import comparison


def part(seeds: list[str], methods: list[str] | None = None, **changes: Any) -> Report:
    """Some seeds and methods of a comparison of four seeds."""
    whole = comparison(4)
    chosen = {
        seed: {n: m for n, m in whole["seeds"][seed].items() if methods is None or n in methods}
        for seed in seeds
    }
    return validate_report({**whole, "seeds": chosen, **changes})


NAMES = list(comparison(1)["seeds"]["0"])


def test_seeds_of_two_places_are_the_report_of_one() -> None:
    whole = part(["0", "1", "2", "3"])
    assert merge([part(["2", "3"]), part(["0", "1"])])["seeds"] == whole["seeds"]
    assert list(merge([part(["2", "3"]), part(["0"]), part(["1"])])["seeds"]) == ["0", "1", "2", "3"]
    assert merge([whole]) == whole


def test_methods_of_two_places_are_the_report_of_one() -> None:
    parts = [part(["0", "1"], NAMES[:2]), part(["0", "1"], NAMES[2:])]
    assert merge(parts)["seeds"] == part(["0", "1"])["seeds"]
    assert list(merge(parts[::-1])["seeds"]["0"]) == [*NAMES[2:], *NAMES[:2]]


def test_one_run_may_stand_in_two_reports_with_one_result() -> None:
    both = [part(["0", "1"]), part(["1", "2"])]
    assert list(merge(both)["seeds"]) == ["0", "1", "2"]
    other = copy.deepcopy(both[1])
    other["seeds"]["1"][NAMES[0]]["matrix"][0][0] += 1
    with pytest.raises(ValueError, match=f"must have one result, got two for {NAMES[0]}, seed 1"):
        merge([both[0], other])


def test_the_places_may_differ_in_jobs_alone() -> None:
    settings = part(["0"])["settings"]
    merged = merge([part(["0"]), part(["1"], settings={**settings, "jobs": 7, "threads": 3})])
    assert merged["settings"] == settings
    with pytest.raises(ValueError, match=r"the same settings.model, got 'toy' and 'other'"):
        merge([part(["0"]), part(["1"], settings={**settings, "model": "other"})])
    with pytest.raises(ValueError, match=r"the same settings.tests, got None and 64"):
        merge([part(["0"]), part(["1"], settings={**settings, "tests": 64})])
    with pytest.raises(ValueError, match=r"the same stream, got 'toy' and 'other'"):
        merge([part(["0"]), part(["1"], stream="other")])


def test_a_method_without_a_seed_is_named() -> None:
    with pytest.raises(
        ValueError, match=f"every method must have every seed, got none of {NAMES[0]}, seed 1$"
    ):
        merge([part(["0"]), part(["1"], NAMES[1:])])
    with pytest.raises(ValueError, match="at least one report"):
        merge([])


def test_the_base_is_the_mean_over_all_seeds() -> None:
    tasks = part(["0"])["seeds"]["0"][NAMES[0]]["tasks"]

    def base(value: float) -> dict[str, float]:
        return dict.fromkeys(tasks, value)

    three, one = part(["0", "1", "2"], base=base(10.0)), part(["3"], base=base(50.0))
    assert merge([three, one])["base"] == base(20.0)
    assert merge([part(["0"], NAMES[:2], base=base(1.0)), part(["0"], NAMES[2:], base=base(1.0))])[
        "base"
    ] == base(1.0)
    assert "base" not in merge([three, part(["3"])])
    assert "base" not in merge([three, part(["2", "3"], base=base(50.0))])


def test_settings_that_were_searched_stay_with_their_methods() -> None:
    settings = part(["0"])["settings"]
    parts = [
        part(["0"], [name], settings={**settings, "found": {name: {"rank_max": rank}}})
        for rank, name in enumerate(NAMES, 1)
    ]
    assert merge(parts)["settings"]["found"] == {n: {"rank_max": r} for r, n in enumerate(NAMES, 1)}


def test_runs_with_other_settings_of_their_method_are_refused() -> None:
    common, names = {**part(["0"])["settings"], "config": {"rank_max": 9}}, ["cram", "cram: no penalty"]
    parts = [
        part([seed], names, settings={**common, **found})
        for seed, found in (("0", {}), ("1", {"found": {"cram": {"rank_max": 9}}}))
    ]
    assert set(merge(parts)["seeds"]) == {"0", "1"}
    other = part(["2"], names, settings={**common, "found": {"cram": {"rank_max": 18}}})
    for pair in ([parts[0], other], [other, parts[1]]):
        with pytest.raises(ValueError, match=r"the same settings.found of cram.*, rank_max, got (9|18) and "):
            merge(pair)
    unused = part(["2"], ["isolated"], settings={**common, "found": {"cram": {"rank_max": 18}}})
    with pytest.raises(ValueError, match="every method must have every seed"):
        merge([parts[0], unused])


def test_a_size_that_cram_decides_in_one_report_alone_is_refused() -> None:
    parts = [part(["0"], ["sequential"]), part(["1"], ["sequential"])]
    for each, sized in zip(parts, (True, False), strict=True):
        for methods in each["seeds"].values():
            methods["sequential"]["entry"]["sized_by_cram"] = sized
    with pytest.raises(
        ValueError, match="the same size of sequential, got .CRAM's average expert. and .rank_max."
    ):
        merge(parts)


def test_a_seed_must_be_a_number() -> None:
    whole = comparison(1)
    with pytest.raises(ValueError, match=r"seeds must be named by their numbers, got \['one'\]"):
        validate_report({**whole, "seeds": {"one": whole["seeds"]["0"]}})


def test_the_command_joins_files_and_touches_no_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, seeds in zip(files, (["0", "1"], ["2"]), strict=True):
        file.write_text(json.dumps(part(seeds)))
    command = ["compare", "--merge", *map(str, files), "--out", str(out := tmp_path / "new/joined")]
    assert main(command) == 0 and main(command) == 0
    assert "3 seeds" in (out / "table.md").read_text()
    assert (out / "report.html").is_file()
    (out / "seeds").mkdir()
    before = (out / "report.json").read_bytes()
    capsys.readouterr()
    assert main(command) == 2
    assert "must hold no runs" in capsys.readouterr().err
    assert (out / "report.json").read_bytes() == before
    assert main([*command[:-1], str(tmp_path / "other"), "--merge", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err and not (tmp_path / "other").exists()
