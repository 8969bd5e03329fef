"""The merge by inputs against a dense solve, and what is gathered from the forwards of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cram import attach, detach, load, save
from cram.methods.many import ManyMethod
from cram.methods.parts.inputs import RIDGE, InputRegression, source_of
from cram.model.attached import AttachedModel
from cram.model.state import ForwardState
from tests.cram import factories, runs


def attached() -> tuple[Any, AttachedModel, InputRegression]:
    """A LLaVA with MAny by inputs. Its factors are random after `learn`."""
    clip = factories.clip_model()
    model = factories.llava(clip=clip)
    settings = runs.config(method="many", dropout=0.0, merge_by_inputs=True)
    cram = attach(model, settings, factories.clip_encoder(model, clip))
    assert isinstance(cram.method, ManyMethod) and cram.method.inputs is not None
    return model, cram, cram.method.inputs


def learn(model: Any, cram: AttachedModel, task: str, rows: int = 2) -> dict[str, Tensor]:
    """Train nothing, but run two forwards of training. Returns all inputs of each module, one per row."""
    cram.method.begin_task(task, 5)
    parameters = cram.method.before_step(0)
    assert parameters is not None
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))
    seen: dict[str, list[Tensor]] = {path: [] for path in cram.modules}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, path=path: seen[path].append(inputs[0].detach().flatten(0, -2).double())
        )
        for path, module in cram.modules.items()
    ]
    model.train()
    for images in (0, 1):
        model(**factories.inputs("llava", images=images, rows=rows))
    model.eval()
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(found) for path, found in seen.items()}


def test_moments_are_float32_products_under_autocast() -> None:
    found = []
    for autocast in (False, True):
        _, cram, inputs = attached()
        cram.method.begin_task("one", 5)
        (path, *_) = inputs.sums
        module = cram.modules[path].train()
        cram.hooks._current.state = ForwardState(disabled=True)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            module(torch.randn(2, 5, module.in_features))
        found.append(inputs.sums[path])
    assert torch.equal(*found)


def test_detach_forgets_what_was_gathered() -> None:
    model, cram, inputs = attached()
    learn(model, cram, "one")
    assert inputs.sums
    detach(model)
    assert not inputs.sums


def test_the_merged_weight_is_the_batch_optimum() -> None:
    model, cram, regression = attached()
    inputs = [learn(model, cram, "one"), {}]
    cram.method.end_task()
    inputs[1] = learn(model, cram, "two", rows=3)
    cram.method.end_task()
    for path, module in cram.modules.items():
        moments = [x[path].T @ x[path] / len(x[path]) for x in inputs]
        total = sum(moments[1:], moments[0])
        target = sum(
            b.double() @ a.double() @ s for (a, b), s in zip(module.factors([0, 1]), moments, strict=True)
        )
        ridge = RIDGE * total.diagonal().mean() * torch.eye(len(total), dtype=torch.float64)
        assert isinstance(target, Tensor)
        wanted = torch.linalg.solve(total + ridge, target, left=False)
        a, b = module.solo_factors()
        # The moments are kept in float32, and the ridge is 1e-4 of a mean eigenvalue.
        assert (b.double() @ a.double() - wanted).norm() < 1e-3 * wanted.norm(), path
    assert set(regression.totals) == {p for p in cram.modules if not p.endswith(("k_proj", "v_proj"))}


def test_one_task_is_kept_on_its_own_inputs() -> None:
    """The rows of A alone would not do: the inputs lie in few directions."""
    model, cram, _ = attached()
    inputs = learn(model, cram, "one")
    cram.method.end_task()
    for path, module in cram.modules.items():
        ((a, b),) = module.factors([0])
        merged_a, merged_b = module.solo_factors()
        wanted, found = inputs[path].float() @ a.T @ b.T, inputs[path].float() @ merged_a.T @ merged_b.T
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_a_bundle_holds_the_moments(tmp_path: Path) -> None:
    model, cram, _ = attached()
    learn(model, cram, "one")
    cram.method.end_task()
    save(model, tmp_path / "bundle")
    clip = factories.clip_model()
    plain = factories.llava(clip=clip)
    loaded = load(plain, tmp_path / "bundle", cram.encoder)
    for path, module in loaded.modules.items():
        pairs = zip(module.solo_factors(), cram.modules[path].solo_factors(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    state = cram.method.export_state().tensors
    with pytest.raises(ValueError, match="missing .*inputs"):
        cram.method.import_state({n: t for n, t in state.items() if not n.startswith("inputs.")}, {})


def test_a_checkpoint_holds_what_was_gathered() -> None:
    model, cram, regression = attached()
    learn(model, cram, "one")
    tensors, values = cram.method.export_training()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    other, again, gathered = attached()
    again.method.import_training("one", 5, tensors, values)
    for each in (cram, again):
        each.method.end_task()
    assert regression.tokens == gathered.tokens > 0
    assert all(torch.equal(total, gathered.totals[path]) for path, total in regression.totals.items())
    assert all(torch.equal(rows, gathered.rows[path]) for path, rows in regression.rows.items())


def test_padding_and_answers_outside_of_training_are_not_gathered() -> None:
    model, cram, regression = attached()
    cram.method.begin_task("one", 5)
    batch = factories.inputs("llava", images=0, rows=2)
    model.eval()(**batch)
    with torch.no_grad():
        model.train()(**batch)
    assert regression.tokens == 0
    batch["attention_mask"][0, :3] = 0
    model.train()(**batch)
    assert regression.tokens == int(batch["attention_mask"].sum()) < batch["attention_mask"].numel()


def test_a_task_without_training_is_refused_and_hooks_go() -> None:
    model, cram, regression = attached()
    cram.method.begin_task("one", 5)
    hooked = [module for module in cram.modules.values() if module._forward_pre_hooks]
    assert hooked
    with pytest.raises(ValueError, match="must follow at least one training forward, got none"):
        cram.method.end_task()
    assert not any(module._forward_pre_hooks for module in hooked) and not regression.sums


def test_processes_add_up_tokens_and_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with the same samples have the moments of one."""
    model, cram, regression = attached()
    learn(model, cram, "one")
    tokens, sums = regression.tokens, {path: total.clone() for path, total in regression.sums.items()}
    reduced: list[int] = []

    def all_reduce(tensor: Tensor) -> None:
        reduced.append(tensor.numel())
        tensor.mul_(2)

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    newest = cram.expert_weights(0)
    regression.end_task(newest)
    assert reduced == [1, *(total.numel() for total in sums.values())]
    for path, total in regression.totals.items():
        torch.testing.assert_close(total, (sums[path] / tokens).float())


def test_linears_that_read_the_same_input_share_its_moments() -> None:
    paths = {f"layers.0.self_attn.{name}_proj": None for name in "qkvo"} | {"layers.0.mlp.up_proj": None}
    assert source_of("layers.0.self_attn.v_proj", paths) == "layers.0.self_attn.q_proj"
    assert source_of("layers.0.self_attn.o_proj", paths) == "layers.0.self_attn.o_proj"
    assert source_of("layers.0.mlp.up_proj", paths) == "layers.0.mlp.up_proj"
    del paths["layers.0.self_attn.q_proj"]
    assert source_of("layers.0.self_attn.v_proj", paths) == "layers.0.self_attn.k_proj"
