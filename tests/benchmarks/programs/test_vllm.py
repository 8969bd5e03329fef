"""The program for vLLM's plugin: ratios pair the rounds, the page has every candidate."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.programs import vllm

RATES = {
    phase: {
        vllm.name(kind, plugin): [10.0 + place, 30.0 + place, 20.0 + place]
        for place, (kind, plugin) in enumerate(vllm.CANDIDATES)
    }
    for phase in vllm.PHASES
}


def test_a_ratio_is_the_median_of_its_rounds() -> None:
    found = vllm.ratios(RATES)
    assert found["gated / plain"]["decode"] == pytest.approx(24 / 22)
    assert found["base, with the plugin / without"]["prefill"] == pytest.approx(20 / 21)


def test_the_page_has_every_candidate_and_ratio() -> None:
    found = {"environment": {"machine": "here"}, "settings": {"rounds": 3}}
    page = "\n".join(vllm.lines({**found, "rates": RATES, "ratios": vllm.ratios(RATES)}))
    for row in ("| base, no plugin | 21.0 | 21.0 |", "| gated | 24.0 | 24.0 |", "| gated / plain | 1.091 |"):
        assert row in page


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here; run `make vllm-tests`")
def test_a_toy_run_measures_all(tmp_path: Path) -> None:
    assert vllm.main(["--model", "toy", "--rounds", "1", "--out", str(tmp_path)]) == 0
    rates = json.loads((tmp_path / "vllm.json").read_text())["rates"]
    assert all(set(rates[phase]) == {vllm.name(*each) for each in vllm.CANDIDATES} for phase in vllm.PHASES)
    assert all(rate > 0 for rows in rates.values() for row in rows.values() for rate in row)
