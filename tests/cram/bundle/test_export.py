"""Experts leave as PEFT folders and as merged weights; PEFT and transformers then give the same logits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForImageTextToText

from cram import attach
from cram.atomic import read_json
from cram.bundle.export import export_lora, export_merged, gate_table, merge
from cram.config import CramConfig
from tests.cram import factories, runs
from tests.cram.kills import every_end
from tests.cram.runs import files


def inputs() -> Any:
    """One question with its picture."""
    processor = factories.llava_processor()
    prompt = factories.prompt(factories.QUESTIONS[0])
    return processor(text=[prompt], images=[factories.image(0)], return_tensors="pt")


@torch.no_grad()
def peft_logits(folder: Path) -> torch.Tensor:
    """What PEFT makes of a folder on the plain base."""
    base, _ = factories.fresh()
    return PeftModel.from_pretrained(base, folder).eval()(**inputs()).logits


@torch.no_grad()
@pytest.mark.parametrize(
    "gates",
    [
        {"old": 1.0},
        {"new": 2.0},
        {"old": 0.25, "new": 0.75},
        {"old": 0.3, "other": -0.2, "new": 1.1},
        torch.tensor([[0.5, 0.0, 0.5], [0.9, 0.1, 0.0]]),
    ],
    ids=["one", "doubled", "two", "negative", "by layer"],
)
def test_fixed_gates_are_one_lora_on_the_rank_axis(gates: Any, tmp_path: Path) -> None:
    model, _, cram = factories.routed_llava()
    table = gate_table(cram, gates)
    with cram.fixed(table[:, None].float()):
        expected = model(**inputs()).logits
    model.config._name_or_path = "some/base"
    export_lora(model, tmp_path / "lora", gates)
    found = peft_logits(tmp_path / "lora")
    with cram.disabled():
        assert (found - model(**inputs()).logits).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    written = read_json(tmp_path / "lora/adapter_config.json")
    ranks = written["rank_pattern"]
    assert written["base_model_name_or_path"] == "some/base"
    for path, module in cram.modules.items():
        acting = [i for i, gate in enumerate(table[module.layer].tolist()) if gate]
        assert ranks[path] == sum(cram.expert_ranks(i)[path] for i in acting)


@torch.no_grad()
def test_the_route_of_a_picture_is_kept_by_one_lora(tmp_path: Path) -> None:
    model, _, cram = factories.routed_llava()
    expected = model(**inputs()).logits
    route = cram.route(cram.encode([factories.QUESTIONS[0]], [[factories.image(0)]]))
    export_lora(model, tmp_path / "lora", route.gates[:, 0])
    torch.testing.assert_close(peft_logits(tmp_path / "lora"), expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_another_scale_is_folded_into_b(scale: float, tmp_path: Path) -> None:
    model, _, _ = factories.routed_llava()
    export_lora(model, tmp_path / "own", {"new": 1.0})
    export_lora(model, tmp_path / "other", {"new": 1.0}, scale=scale)
    config = read_json(tmp_path / "other/adapter_config.json")
    assert config["lora_alpha"] == scale * config["r"]
    torch.testing.assert_close(
        peft_logits(tmp_path / "other"), peft_logits(tmp_path / "own"), atol=2e-5, rtol=1e-5
    )


def test_a_branch_with_a_shared_a_becomes_a_whole_folder(tmp_path: Path) -> None:
    learner = runs.learner(tmp_path / "run", "branchlora")
    learner.learn(0)
    model, cram = learner.model, learner.cram
    assert cram.shares_a
    for name, gates in (("one", {"branch1": 1.0}), ("two", {"branch0": 0.5, "branch3": 0.25})):
        with torch.no_grad(), cram.fixed(gate_table(cram, gates).float()[:, None]):
            expected = model(**inputs()).logits
        export_lora(model, tmp_path / name, gates)
        torch.testing.assert_close(peft_logits(tmp_path / name), expected, atol=2e-5, rtol=1e-5)
        ranks = read_json(tmp_path / name / "adapter_config.json")["rank_pattern"]
        assert set(ranks.values()) == {cram.config.rank}


@torch.no_grad()
def test_a_merged_model_is_a_plain_one_with_the_same_logits(tmp_path: Path) -> None:
    model, processor, cram = factories.routed_llava()
    gates = {"old": 0.25, "new": 0.75}
    with cram.fixed(gate_table(cram, gates).float()[:, None]):
        expected = model(**inputs()).logits
    export_merged(model, tmp_path / "merged", gates, processor)
    assert not hasattr(model, "cram")
    torch.testing.assert_close(model(**inputs()).logits, expected, atol=2e-5, rtol=1e-5)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(again(**inputs()).logits, model(**inputs()).logits)
    assert (tmp_path / "merged/processor_config.json").is_file()
    plain, _ = factories.fresh()
    assert plain.state_dict().keys() == model.state_dict().keys()


def test_a_merge_is_rounded_once_to_the_weights_type() -> None:
    model, encoder = factories.fresh()
    model.to(torch.bfloat16)
    cram = attach(model, CramConfig(buffer_rank=9), encoder)
    weights = factories.expert_weights(cram, 1)
    cram.method.add_expert("one", weights, 0, torch.zeros(factories.PROJECTION), trained=False)
    before = {path: module.weight.double() for path, module in cram.modules.items()}
    merge(model, {"one": 0.5})
    for path, (a, b) in weights.items():
        exact = before[path] + 2.0 * ((b.double() * 0.5).float().double() @ a.double())
        assert torch.equal(model.get_submodule(path).weight, exact.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("gates", "words"),
    [
        (
            {"old": 1.0, "nobody": 1.0},
            r"gates must be of experts among \['old', 'other', 'new'\], got \['nobody'\]",
        ),
        ({}, "gates must not all be 0"),
        ({"old": float("nan")}, "gates must be finite"),
        (torch.ones(2), r"gates must be \[3\] or \[2, 3\], got \[2\]"),
    ],
)
def test_wrong_gates_are_refused_before_anything_is_written(gates: Any, words: str, tmp_path: Path) -> None:
    model, processor, cram = factories.routed_llava()
    before = {path: module.weight.clone() for path, module in cram.modules.items()}
    with pytest.raises(ValueError, match=words):
        export_lora(model, tmp_path / "x", gates)
    with pytest.raises(ValueError, match=words):
        export_merged(model, tmp_path / "x", gates, processor)
    assert not (tmp_path / "x").exists() and model.cram is cram
    assert all(torch.equal(module.weight, before[path]) for path, module in cram.modules.items())


class Scaled(nn.Linear):
    """A linear that computes something else than its weight says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Packed(torch.Tensor):
    """A weight that is stored in another form; it says of itself that it is floating point."""


def scaled(linear: nn.Linear) -> None:
    linear.__class__ = Scaled


def hooked(linear: nn.Linear) -> None:
    linear.register_forward_hook(lambda module, args, output: output + 1)


def packed(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Packed), requires_grad=False)


def whole_numbers(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)


@pytest.mark.parametrize("change", [scaled, hooked, packed, whole_numbers])
def test_a_linear_that_is_more_than_its_weight_is_not_merged(change: Any, tmp_path: Path) -> None:
    """Added to such a weight, an expert would act otherwise than beside it."""
    model, processor, cram = factories.routed_llava()
    path, last = list(cram.modules.items())[-1]
    change(last.base)
    before = {path: module.weight.clone() for path, module in cram.modules.items()}
    with pytest.raises(ValueError, match=f"{path} must be a plain linear with a floating point weight"):
        export_merged(model, tmp_path / "x", {"old": 1.0}, processor)
    assert model.cram is cram and not (tmp_path / "x").exists()
    assert all(torch.equal(module.weight, before[path]) for path, module in cram.modules.items())


def test_other_refusals_leave_model_and_folder_alone(tmp_path: Path) -> None:
    model, processor, cram = factories.routed_llava()
    (tmp_path / "mine").write_text("kept")
    for call in (export_lora, lambda *args: export_merged(*args, processor)):
        with pytest.raises(ValueError, match="folder must be new or empty"):
            call(model, tmp_path, {"old": 1.0})
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"] and model.cram is cram
    with pytest.raises(ValueError, match="scale must be positive, got 0.0"):
        export_lora(model, tmp_path / "x", {"old": 1.0}, scale=0.0)
    empty = {p: (a[:0], b[:, :0]) for p, (a, b) in cram.expert_weights(0).items()}
    cram.method.add_expert("none", empty, 0, torch.zeros(factories.PROJECTION), trained=False)
    with pytest.raises(ValueError, match="must have a rank above 0 in some linear"):
        export_lora(model, tmp_path / "x", {"none": 1.0})
    assert not (tmp_path / "x").exists()


def test_a_kill_while_exporting_leaves_no_folder_or_the_whole_one(tmp_path: Path) -> None:
    model, _, _ = factories.routed_llava()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    export_lora(model, whole, {"old": 1.0})

    def restore() -> None:
        shutil.rmtree(cut, ignore_errors=True)

    for end in every_end(lambda: export_lora(model, cut, {"old": 1.0}), restore):
        assert not cut.exists() or files(cut) == files(whole), end
    restore()
    export_lora(model, cut, {"old": 1.0})
    assert files(cut) == files(whole)
