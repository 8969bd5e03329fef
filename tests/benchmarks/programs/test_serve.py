"""The server under load at toy size, and what its page says of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks import load
from benchmarks.load import Heard
from benchmarks.programs import serve

pytest.importorskip("uvicorn", reason="the server needs the extra `serve`")


def test_arrivals_are_a_poisson_process() -> None:
    moments = list(load.arrivals(50.0, 100.0, seed=0))
    gaps = [later - earlier for earlier, later in zip(moments, moments[1:], strict=False)]
    # The deviation of a Poisson count is its root: 5000 +- 71.
    assert abs(len(moments) - 5000) < 300 and moments[0] > 0 and moments[-1] < 100
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(mean**2, rel=0.15)
    assert moments == list(load.arrivals(50.0, 100.0, seed=0)) != list(load.arrivals(50.0, 100.0, seed=1))


def test_latencies_count_from_the_moment_that_was_due() -> None:
    late = Heard(due=1.0, status=200, moments=[1.5, 1.6, 1.8], whole=True, ended=1.8)
    broken = Heard(due=1.0, status=200, moments=[1.1], ended=1.2)
    refused = Heard(due=1.0, status=429, ended=1.1)
    found = load.summary([late, broken, refused])
    assert (found["requests"], found["answered"], found["refused"]) == (3, 1, 1)
    assert found["first_token_ms"]["p50"] == pytest.approx(500)
    assert found["token_ms"]["p50"] == pytest.approx(150)
    assert found["tokens_per_s"] == pytest.approx(3 / 0.8)
    assert load.summary([refused])["token_ms"] == {}


def test_a_server_that_is_not_there_counts_as_unanswered() -> None:
    heard = asyncio.run(load.ask(9, {}))
    assert heard.status == 0 and not heard.whole


@pytest.mark.slow
def test_every_part_runs_at_toy_size(tmp_path: Path) -> None:
    sizes = ["--model", "toy", "--requests", "1", "--seconds", "1", "--out", str(tmp_path)]
    assert serve.main([*sizes, "--parts", "token"]) == 0
    assert serve.main([*sizes, "--parts", "throughput", "growth", "prefill", "open"]) == 0
    found = json.loads((tmp_path / "serve.json").read_text())
    assert list(found["parts"]) == list(serve.PARTS)
    for rows in found["parts"].values():
        for row in rows.values():
            assert row.get("requests") == row.get("answered")
    text = (tmp_path / "serve.md").read_text()
    assert "| PEFT adapter_names, 8 rows |" in text
    throughput = found["parts"]["throughput"]
    one, eight = (throughput[f"bare forwards alone, {rows}"]["tokens_per_s"] for rows in ("1 row", "8 rows"))
    assert 0 < one < eight
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")
