"""Whole models at toy size: what is timed, and what the page says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import models, variants
from benchmarks.programs import e2e
from benchmarks.timing import Limits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def work() -> models.Work:
    return models.random_llava(models.SIZES["toy"], CPU, torch.float32, samples=2)


def test_all_variants_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "toy", "--stream", "toy", "--samples", "2", "--tokens", "2", "--seconds", "0"]
    assert e2e.main([*options, "--device", "cpu", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "e2e-toy.json").read_text())
    assert list(found["rows"]) == list(variants.BUILDERS)
    answered = [row for name, row in found["rows"].items() if name != "cram with penalty"]
    assert all(row["step_us"] > 0 for row in found["rows"].values())
    assert all(row["prompt_us"] > 0 and row["captured_us"] > 0 for row in answered)
    assert (tmp_path / "e2e-toy.md").read_text() == capsys.readouterr().out


def test_chosen_variants_alone_are_measured(tmp_path: Path) -> None:
    options = ["--model", "toy", "--stream", "toy", "--samples", "1", "--tokens", "1", "--seconds", "0"]
    options += ["--variants", "peft", "cram", "--device", "cpu", "--out", str(tmp_path)]
    assert e2e.main(options) == 0
    assert list(json.loads((tmp_path / "e2e-toy.json").read_text())["rows"]) == ["peft", "cram"]
    assert "| cram |" in (tmp_path / "e2e-toy.md").read_text()


def test_ratios_are_throughputs_over_the_bare_model() -> None:
    row = {"step_us": 1.0, "peak_bytes": None, "prompt_us": 100.0, "token_us": 20.0}
    row["captured_us"] = 10.0
    slower = {"prompt_us": 125.0, "token_us": 25.0, "step_us": 2.0, "captured_us": None}
    rows = {"bare": row, "cram": row | slower}
    environment = {"machine": "m", "commit": "c", "load": 0.0}
    (line,) = [
        x for x in e2e.lines({"environment": environment, "settings": {}, "rows": rows}) if "cram" in x
    ]
    cells = dict(zip(e2e.HEADER, [cell.strip() for cell in line.strip("|").split("|")], strict=True))
    assert (cells["prefill over bare"], cells["decode over bare"], cells["over bare"]) == (
        "0.80",
        "0.80",
        "2.00",
    )
    assert cells["captured token"] == cells["captured over bare"] == "–"


def test_a_random_model_routes_every_prompt_anew() -> None:
    """Gates come from the picture, and no text feature from an earlier call."""
    work = models.random_llava(models.SIZES["toy"], CPU, torch.float32, samples=2, routed=True)
    variant = variants.cram(work, variants.draw_factors(work, (4, 1, 3)))
    texts: list[int] = []
    work.encoder._text_model.register_forward_hook(lambda m, a, output: texts.append(1))
    routes: list[torch.Tensor] = []
    handle = variant.model.cram
    run = e2e.generate(variant, work, 2)
    with torch.no_grad():
        handle.hooks.on_query.append(lambda query: routes.append(handle.route(query).gates))
    run(), run()
    assert len(texts) == 2 and len(routes) == 2
    assert not torch.allclose(routes[0], torch.full_like(routes[0], 1 / 3))
    assert not torch.equal(routes[0][:, 0], routes[0][:, 1])


@pytest.mark.parametrize("name", ["bare", "cram"])
def test_a_decode_step_behind_a_cache_of_fixed_size_gives_the_same(name: str) -> None:
    work = models.random_llava(models.SIZES["toy"], CPU, torch.float32, samples=2, routed=True)
    variant = variants.BUILDERS[name](work, variants.draw_factors(work, (4, 1, 3)))
    step = e2e.decode_step(variant, work)
    inputs = dict(work.prompt)
    for key in ("input_ids", "attention_mask"):
        inputs[key] = torch.cat([inputs[key], inputs[key][:, -1:]], 1)
    with variant.around(), torch.no_grad():
        expected = variant.model(**inputs, use_cache=False, logits_to_keep=1).logits
    # float32 through two layers.
    torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-5)


def test_a_step_that_cannot_be_captured_says_why(work: models.Work) -> None:
    variant = variants.bare(work, {})

    def broken(**inputs: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")

    variant.model.forward = broken
    found = e2e.captured({"bare": variant}, work, CPU, Limits(0.0, 1, 1))
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert found == {"bare": {"captured_us": None, "captured_failed": reason}}


def test_bare_goes_back_to_the_embeddings(work: models.Work) -> None:
    variant = variants.bare(work, {})
    seen: list[torch.Tensor] = []
    variant.model.get_input_embeddings().register_forward_hook(lambda m, a, output: seen.append(output))
    e2e.train_step(variant, work)()
    assert seen[0].grad is not None and seen[0].grad.abs().sum() > 0


def test_generation_is_as_long_as_asked(work: models.Work) -> None:
    variant = variants.bare(work, {})
    length = work.prompt["input_ids"].shape[1]
    assert e2e.generate(variant, work, 3)().shape == (2, length + 3)
