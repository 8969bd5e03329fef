"""Gates below a floor: what is dropped, and the bound on what that changes."""

from __future__ import annotations

import pytest
import torch

from cram.routing.query import Route
from cram.serve.engine.engine import Engine
from cram.serve.engine.pruning import pruned, pruning_bound
from cram_kernels import expert_lora
from tests.cram.factories import QUESTIONS, routed_llava
from tests.cram.serve.serving import ask, llava_prompt, run


def test_small_gates_are_dropped_and_the_largest_stays() -> None:
    gates = torch.tensor([[0.5, 0.3, 0.2], [0.05, 0.04, 0.01]])
    assert pruned(gates, 0.25).tolist() == torch.tensor([[0.5, 0.3, 0.0], [0.05, 0.0, 0.0]]).tolist()
    assert torch.equal(pruned(gates, 0.0), gates)


GATES = torch.tensor([[0.90, 0.08, 0.02], [0.60, 0.36, 0.04], [0.34, 0.33, 0.33], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize(("floor", "dropped"), [(0.03, 1), (0.1, 3), (0.35, 5)])
def test_no_output_moves_further_than_the_bound(floor: float, dropped: int) -> None:
    _, _, cram = routed_llava()
    less = pruned(GATES, floor)
    assert int((less != GATES).sum()) == dropped
    bounds = pruning_bound(cram, Route(GATES.expand(cram.num_layers, -1, -1)), floor)
    tightest = 0.0
    for path, module in cram.modules.items():
        # The inputs that the last expert, dropped first, enlarges most: the bound must not be a loose one.
        a, b = module.factors([2])[0]
        x = torch.linalg.svd(b @ a)[2][:1].expand(4, -1).contiguous()
        outputs = [
            expert_lora(x, module.base.weight, module.base.bias, module.experts, gates)
            for gates in (GATES, less)
        ]
        moved = (outputs[0] - outputs[1]).norm(dim=-1).double()
        # Outputs of size 10 in float32 are known to about 1e-5.
        assert (moved <= bounds[path] + 1e-4).all(), path
        assert moved[3] == bounds[path][3] == 0
        tightest = max(tightest, float(moved[0] / bounds[path][0]))
    assert tightest > (0.9 if dropped == 1 else 0.2)


def test_the_engine_prunes_automatic_gates_alone() -> None:
    model, processor, cram = routed_llava()
    asked = llava_prompt(processor, QUESTIONS[0], 0)
    engine = Engine(model, processor, gate_floor=0.45)
    pairs = [ask(asked, max_tokens=1), ask(asked, {"old": 0.1}, max_tokens=1)]
    for request, _ in pairs:
        engine.submit(request)
    run(engine, *(heard for _, heard in pairs))
    automatic, named = (heard.started.decision.gates for _, heard in pairs if heard.started)
    free = cram.route(cram.encode([asked.instruction], [list(asked.images)])).gates[:, 0]
    assert ((free > 0) & (free < 0.45)).any()
    assert automatic is not None and named is not None
    none = [0.0] * cram.num_layers
    kept = torch.tensor([automatic.get(name, none) for name in cram.expert_names]).t()
    torch.testing.assert_close(kept, pruned(free, 0.45), atol=1e-5, rtol=1e-5)
    assert named["old"] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("floor", [-0.1, 1.5, float("nan")])
def test_a_floor_out_of_range_is_refused(floor: float) -> None:
    model, processor, _ = routed_llava()
    with pytest.raises(ValueError, match=r"gate_floor must be in \[0, 1\]"):
        Engine(model, processor, gate_floor=floor)
