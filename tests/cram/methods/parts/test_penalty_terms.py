"""Inputs of the orthogonality penalty: golden losses and gradients in both readings, visual-token means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cram.config import CramConfig
from cram.methods.parts.penalty import ModuleShape, PenaltyTerm, history_columns, penalty_terms
from cram.model.hooks import visual_token_mask
from cram.routing.query import Query
from cram.routing.router import Router
from cram_kernels import available_impls, orthogonality_penalty, orthonormal_basis, visual_mean
from tests.cram.golden_cases import assert_complete, golden_names, load

NAMES = "attn_square one_module_rect layer_without_history no_visual_tokens mixed_square_rect no_history"
LEFT_OUT: dict[str, str] = {}


def golden_router(case: dict[str, Any], data: dict[str, Tensor], config: CramConfig) -> Router:
    """The group's committed experts and the new one, trained, in task order."""
    group = case["config"]["groups"][case["config"]["group"]]
    router = Router(config, len(data["param.centroids"]))
    for entry in sorted(group, key=lambda entry: entry["task"]):
        slot, new = entry["slot"], case["config"]["new_slot"]
        centroid = data["param.centroids"][:, slot]
        router.add_expert(str(slot), case["config"]["group"], centroid, trained=slot == new)
    return router


def golden_experts(case: dict[str, Any], data: dict[str, Tensor], index: int) -> tuple[Any, list[Any]]:
    """New factors (a, b transposed, both leaves) and the committed older ones (a, b) of one module."""
    a, b = data[f"param.m{index}.expert_A"], data[f"param.m{index}.expert_B"]
    new, older = None, []
    for row, slot in enumerate(data[f"param.m{index}.slots"].tolist()):
        rank = int(data[f"param.m{index}.rank"][row])
        if slot == case["config"]["new_slot"]:
            new = [t.clone().requires_grad_() for t in (a[row, :rank], b[row, :, :rank].mT)]
        elif slot in case["config"]["hist_slots"] and data[f"param.m{index}.committed"][row]:
            older.append((a[row, :rank], b[row, :, :rank]))
    return new, older


def test_golden_table_is_complete() -> None:
    assert_complete("cram_orth_penalty", NAMES.split(), LEFT_OUT)


@pytest.mark.parametrize("impl", ["reference", "cpu", "native", "native, tokens"])
@pytest.mark.parametrize("released", [True, False], ids=["official", "faithful"])
@pytest.mark.parametrize("name", golden_names("cram_orth_penalty", LEFT_OUT))
def test_golden_penalty(name: str, released: bool, impl: str) -> None:
    """Under "native, tokens" the operation takes the means itself."""
    impl, *tokens = impl.split(", ")
    if (missing := available_impls()["orthogonality_penalty"][impl]) is not None:
        pytest.skip(missing)
    case, data = load("cram_orth_penalty", name)
    config = CramConfig(released_code=released)
    router = golden_router(case, data, config)
    image = data["in.image_features"]
    query = Query(torch.zeros(len(image), 4), image, torch.ones(len(image), dtype=torch.bool))
    gamma = router.gamma(router.route(query, group=case["config"]["group"]))
    shapes = {
        str(m["index"]): ModuleShape(m["layer"], m["in_features"], m["out_features"])
        for m in case["config"]["modules"]
    }
    inputs = {module: data[f"in.m{module}.x"].clone().requires_grad_() for module in shapes}
    experts = {module: golden_experts(case, data, int(module)) for module in shapes}
    mask = data["in.visual_mask"].bool()
    hidden, new_a, new_bt, bases, gammas = [], [], [], [], []
    for term in penalty_terms(shapes, config):
        (a, bt), older = experts[term.module]
        hidden.append(inputs[term.input_module] if tokens else visual_mean(inputs[term.input_module], mask))
        new_a.append(a)
        new_bt.append(bt)
        columns = history_columns(term.basis, older) if older else torch.zeros(bt.shape[1], 0)
        bases.append(orthonormal_basis(columns))
        gammas.append(gamma[shapes[term.module].layer])
    loss = orthogonality_penalty(
        hidden, new_a, new_bt, bases, gammas, scale=config.scale, mask=mask if tokens else None, impl=impl
    )
    if case["expected"]["loss_official"] is None:
        assert loss == 0.0 and not gamma.any()
        return
    kind = "official" if released else "faithful"
    expected = case["expected"][f"loss_{kind}"]
    torch.testing.assert_close(loss, torch.tensor(expected), atol=2e-5, rtol=1e-4)
    loss.backward()
    assert router.trained_centroid is not None
    pairs = [(router.trained_centroid, data[f"grad_{kind}.centroids"][:, case["config"]["new_slot"]])]
    for module in shapes:
        a, bt = experts[module][0]
        rank = len(a)
        pairs.append((a, data[f"grad_{kind}.m{module}.expert_A_new"][:rank]))
        pairs.append((bt, data[f"grad_{kind}.m{module}.expert_B_new"][:, :rank].mT))
        pairs.append((inputs[module], data[f"grad_{kind}.m{module}.x"]))
    for leaf, gradient in pairs:
        actual = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(actual, gradient, atol=1e-4, rtol=1e-3)


LLAMA = {f"{layer}.{name}": ModuleShape(layer, 8, 8) for layer in range(2) for name in "qkvo"}
GROUPED_QUERY = {"q": ModuleShape(0, 8, 8), "k": ModuleShape(0, 8, 4), "o": ModuleShape(0, 8, 8)}


def test_faithful_terms_are_one_per_module_on_its_own_input() -> None:
    assert penalty_terms(LLAMA, CramConfig()) == [PenaltyTerm(name, name, "output") for name in LLAMA]


def test_released_terms_are_the_first_linear_on_the_last_input() -> None:
    config = CramConfig(released_code=True)
    assert penalty_terms(LLAMA, config) == [("0.q", "0.o", "input"), ("1.q", "1.o", "input")]
    assert penalty_terms(GROUPED_QUERY, config) == [("q", "o", "input")]
    only_k = {"k": GROUPED_QUERY["k"]}
    assert penalty_terms(only_k, config) == [("k", "k", "output")]


def test_released_terms_refuse_inputs_of_another_width() -> None:
    modules = {"q": ModuleShape(0, 8, 12), "o": ModuleShape(0, 12, 8)}
    with pytest.raises(ValueError, match="q and o to have inputs of equal width, got 8 and 12"):
        penalty_terms(modules, CramConfig(released_code=True))
    assert len(penalty_terms(modules, CramConfig())) == 2


def test_history_columns_are_detached_and_need_history() -> None:
    a, b = torch.randn(2, 5, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    assert torch.equal(history_columns("output", [(a, b), (a[:0], b[:, :0])]), b)
    assert torch.equal(history_columns("input", [(a, b)]), a.mT)
    assert not history_columns("output", [(a, b)]).requires_grad
    with pytest.raises(ValueError, match="older experts must not be empty"):
        history_columns("output", [])


def expand(ids: Tensor, attention: Tensor | None, patches: int, token: int) -> tuple[Tensor, Tensor]:
    """Input ids with each image token repeated per patch and padding dropped, right-padded with 0."""
    rows = []
    for row in range(len(ids)):
        kept = ids[row] if attention is None else ids[row][attention[row].bool()]
        rows.append(kept.repeat_interleave(torch.where(kept == token, patches, 1)))
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


@pytest.mark.parametrize("name", golden_names("cram_visual_mask"))
def test_golden_visual_mean(name: str) -> None:
    case, data = load("cram_visual_mask", name)
    token = case["config"]["image_token_index"]
    ids, attention = expand(
        data["in.input_ids"], data.get("in.attention_mask"), case["config"]["num_patches"], token
    )
    mask = visual_token_mask(ids, token, attention)
    assert torch.equal(mask, data["out.visual_mask"].bool())
    mean = visual_mean(data["in.hidden"], mask)
    torch.testing.assert_close(mean, data["out.visual_mean"], atol=2e-5, rtol=1e-4)


def test_golden_visual_table_is_complete() -> None:
    assert_complete("cram_visual_mask", ["a", "nomask"])


def test_padding_that_holds_the_image_token_is_not_visual() -> None:
    ids = torch.tensor([[9, 9, 1]])
    assert visual_token_mask(ids, 9).tolist() == [[True, True, False]]
    assert visual_token_mask(ids, 9, torch.tensor([[0, 1, 1]])).tolist() == [[False, True, False]]
