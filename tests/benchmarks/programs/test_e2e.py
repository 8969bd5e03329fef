"""Whole models at toy size, and the variants of a model against each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import models
from benchmarks.programs import e2e

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def work() -> models.Work:
    return models.random_llava(models.SIZES["toy"], CPU, torch.float32, samples=2)


def test_all_variants_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "toy", "--stream", "toy", "--samples", "2", "--tokens", "2", "--seconds", "0"]
    assert e2e.main([*options, "--device", "cpu", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "e2e-toy.json").read_text())
    assert list(found["rows"]) == list(e2e.BUILDERS)
    answered = [row for name, row in found["rows"].items() if name != "cram with penalty"]
    assert all(row["step_us"] > 0 for row in found["rows"].values())
    assert all(row["prompt_us"] > 0 for row in answered)
    assert (tmp_path / "e2e-toy.md").read_text() == capsys.readouterr().out


def test_cram_and_the_released_loop_are_the_same_function(work: models.Work) -> None:
    factors = e2e.draw_factors(work, (4, 1, 3))
    logits = {}
    for name in ("bare", "released", "cram"):
        variant = e2e.BUILDERS[name](work, factors)
        with variant.around(), torch.no_grad():
            logits[name] = variant.model(**work.prompt).logits
    # float32 through two layers.
    torch.testing.assert_close(logits["cram"], logits["released"], rtol=1e-4, atol=1e-5)
    assert (logits["cram"] - logits["bare"]).abs().max() > 1e-3


def test_variants_share_the_weights_and_train_their_own(work: models.Work) -> None:
    before = {name: tensor.clone() for name, tensor in work.model.state_dict().items()}
    weights = {p.data_ptr() for p in work.model.parameters()}
    trained = {"bare": 0, "released": 8 * 2, "peft": 8 * 2, "peft-9": 8 * 2, "cram": 8 * 2 + 1}
    for name, variant in e2e.built(work, "toy").items():
        variant.model.train()
        assert weights <= {p.data_ptr() for p in variant.model.parameters()}, name
        assert len(variant.parameters) == trained[name], name
        old = [p.detach().clone() for p in variant.parameters]
        losses = [float(e2e.train_step(variant, work)()) for _ in range(2)]
        assert all(torch.isfinite(torch.tensor(losses)))
        moved = [not torch.equal(a, b) for a, b in zip(old, variant.parameters, strict=True)]
        # Fixed gates leave the centroid without a gradient.
        assert all(moved[: 8 * 2]), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in work.model.state_dict().items())


def test_chosen_variants_alone_are_measured(tmp_path: Path) -> None:
    options = ["--model", "toy", "--stream", "toy", "--samples", "1", "--tokens", "1", "--seconds", "0"]
    options += ["--variants", "peft", "cram", "--device", "cpu", "--out", str(tmp_path)]
    assert e2e.main(options) == 0
    assert list(json.loads((tmp_path / "e2e-toy.json").read_text())["rows"]) == ["peft", "cram"]
    assert "| cram |" in (tmp_path / "e2e-toy.md").read_text()


def test_ratios_are_throughputs_over_the_bare_model() -> None:
    row = {"step_us": 1.0, "peak_bytes": None, "prompt_us": 100.0, "token_us": 20.0}
    rows = {"bare": row, "cram": row | {"prompt_us": 125.0, "token_us": 25.0, "step_us": 2.0}}
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


def test_a_random_model_routes_every_prompt_anew() -> None:
    """Gates come from the picture, and no text feature from an earlier call."""
    work = models.random_llava(models.SIZES["toy"], CPU, torch.float32, samples=2, routed=True)
    variant = e2e.cram(work, e2e.draw_factors(work, (4, 1, 3)))
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


def test_bare_goes_back_to_the_embeddings(work: models.Work) -> None:
    variant = e2e.bare(work, {})
    seen: list[torch.Tensor] = []
    variant.model.get_input_embeddings().register_forward_hook(lambda m, a, output: seen.append(output))
    e2e.train_step(variant, work)()
    assert seen[0].grad is not None and seen[0].grad.abs().sum() > 0


def test_generation_is_as_long_as_asked(work: models.Work) -> None:
    variant = e2e.bare(work, {})
    length = work.prompt["input_ids"].shape[1]
    assert e2e.generate(variant, work, 3)().shape == (2, length + 3)
