"""Agreement with the released implementation on every case of the layer, gate and penalty families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cram_kernels import centroid_gates, expert_lora, orthogonality_penalty, orthonormal_basis, pack_experts
from tests.conftest import golden_case, golden_cases, golden_dir
from tests.cram_kernels.devices import needs_cuda, needs_interpreter

NOT_NEEDED = {
    "cram_gates__topk2": "keeps the two best experts of each sample and layer: CRAM has no top-k, and the "
    "released configuration never uses it",
}
SLOTS = 10


def cases(family: str) -> list[str]:
    return [case["id"] for case in golden_cases(family) if case["id"] not in NOT_NEEDED]


def close(actual: Tensor, expected: Tensor, slack: float = 1.0) -> None:
    """Compare within the index's default tolerance of the dtype, times the case's `slack`."""
    rtol, atol = (1e-9, 1e-10) if expected.dtype == torch.float64 else (1e-4 * slack, 2e-5 * slack)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("family", ["cram_layer", "cram_gates", "cram_orth_penalty"])
def test_every_case_is_tested_or_listed(family: str) -> None:
    golden_dir()
    tested = {"cram_layer": LAYER, "cram_gates": GATES, "cram_orth_penalty": PENALTY}[family]
    listed = [name for name in NOT_NEEDED if name.startswith(family)]
    assert sorted([*tested, *listed]) == sorted(case["id"] for case in golden_cases(family))


LAYER = cases("cram_layer")
GATES = cases("cram_gates")
PENALTY = cases("cram_orth_penalty")


class Layer:
    """A released layer as packed experts: the slots at their committed ranks, then the active part of the
    buffer."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.ranks = (tensors["param.expert_rank"] * tensors["param.expert_mask"]).tolist()
        a = [tensors["param.expert_A"][i, :r] for i, r in enumerate(self.ranks)]
        b = [tensors["param.expert_B"][i, :, :r] for i, r in enumerate(self.ranks)]
        self.buffer = config["r_buf_active"] if "param.buf_A" in tensors else 0
        if self.buffer:
            a.append(tensors["param.buf_A"][: self.buffer])
            b.append(tensors["param.buf_B"][:, : self.buffer])
        self.experts = pack_experts(a, b, config["scale"], trained=len(a))
        route = config["route"]
        self.leaves: dict[str, Tensor] = {}
        if route["mode"] == "pi":
            pi = self.leaves["pi"] = tensors["in.pi"].clone().requires_grad_("live" in route)
            # The released routing skips such weights, which also cuts their gradient; the layer does not.
            self.gates = torch.where(pi.abs() < 1e-12, 0.0, pi)[None]
            self.gates = torch.nn.functional.pad(self.gates, (0, len(a) - SLOTS))
            return
        self.gates = torch.zeros(1, len(a))
        for side in ("a", "b"):
            weight = self.leaves["w" + side] = torch.tensor(route["w" + side]).requires_grad_()
            slot = len(a) - 1 if route[f"u{side}_buf"] else route["k" + side]
            self.gates = self.gates + weight * torch.eye(len(a))[slot]

    def slot_gradients(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the trained parameters' gradients in the released layout."""
        grad_a, grad_bt = self.experts.trained_a.grad, self.experts.trained_b.grad
        found = {
            key: torch.zeros_like(tensors[key]) for key in tensors if key.startswith(("grad.exp", "grad.buf"))
        }
        for i, rank in enumerate(self.ranks):
            rows = slice(self.experts.offsets[i], self.experts.offsets[i + 1])
            found["grad.expert_A"][i, :rank] = grad_a[rows]
            found["grad.expert_B"][i, :, :rank] = grad_bt[rows].t()
        if self.buffer:
            start = self.experts.offsets[-2]
            found["grad.buf_A"][: self.buffer] = grad_a[start:]
            found["grad.buf_B"][:, : self.buffer] = grad_bt[start:].t()
        return found


@pytest.mark.parametrize(
    ("impl", "device"),
    [
        ("reference", "cpu"),
        ("cpu", "cpu"),
        pytest.param("triton", "cpu", marks=needs_interpreter),
        pytest.param("triton", "cuda", marks=needs_cuda),
    ],
)
@pytest.mark.parametrize("case_id", LAYER)
def test_layer(case_id: str, impl: str, device: str) -> None:
    entry, tensors = golden_case(case_id)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    with torch.device(device):
        layer = Layer(entry["config"], tensors)
    weight = tensors["param.weight"].t() if entry["config"]["fan_in_fan_out"] else tensors["param.weight"]
    x = tensors["in.x"].clone().requires_grad_()
    if impl == "triton" and x.dtype == torch.float64:
        with pytest.raises(NotImplementedError, match="got torch.float64"):
            expert_lora(x, weight, tensors.get("param.bias"), layer.experts, layer.gates, impl=impl)
        return
    y = expert_lora(x, weight, tensors.get("param.bias"), layer.experts, layer.gates, impl=impl)
    close(y, tensors["out.y"])
    (tensors["in.functional"] * y).sum().backward()
    close(x.grad, tensors["grad.x"])
    for key, grad in layer.slot_gradients(tensors).items():
        close(grad, tensors[key])
    for name, leaf in layer.leaves.items():
        if f"grad.{name}" in tensors:
            close(leaf.grad, tensors[f"grad.{name}"])


@pytest.mark.parametrize(
    ("impl", "device"),
    [
        ("reference", "cpu"),
        pytest.param("triton", "cpu", marks=needs_interpreter),
        pytest.param("triton", "cuda", marks=needs_cuda),
    ],
)
@pytest.mark.parametrize("case_id", GATES)
def test_gates(case_id: str, impl: str, device: str) -> None:
    """Per-sample gates and those of the batch mean as one query; the fallback slot is the router's task."""
    entry, loaded = golden_case(case_id)
    tensors = {name: tensor.to(device) for name, tensor in loaded.items()}
    config = entry["config"]
    slack = entry["suggested_tolerance"]["pi_abs"] / 2e-5
    centroids = tensors["param.centroids"].clone().requires_grad_()
    query = tensors["in.q"].clone().requires_grad_()
    older = [s["slot"] for g in config["groups"] for s in g if s["task"] < config["current_task"]]
    rows = [
        c.detach() if config["train_hard"] and i in older else c for i, c in enumerate(centroids.unbind(1))
    ]
    members = torch.zeros(SLOTS, dtype=torch.bool, device=device)
    members[config["pool_slots"]] = True
    if config["include_buf"]:
        rows.append(tensors["param.buf_centroid"])
        members = torch.cat([members, torch.ones_like(members[:1])])

    def gates_of(queries: Tensor) -> Tensor:
        chosen = members.expand(len(queries), -1)
        return centroid_gates(queries, torch.stack(rows, 1), config["sigma"], chosen, impl=impl)[..., :SLOTS]

    gates = gates_of(query)
    close(gates, tensors["out.pi_batch"], slack)
    if not config["pool_slots"]:
        return
    (tensors["in.functional_batch"] * gates).sum().backward()
    close(centroids.grad, tensors["grad.centroids_from_pi_batch"], slack)
    close(query.grad, tensors["grad.q_from_pi_batch"], slack)
    centroids.grad = None
    mean_gates = gates_of(tensors["out.q_mean"][None])[:, 0]
    close(mean_gates, tensors["out.pi_mean"], slack)
    (tensors["in.functional_mean"] * mean_gates).sum().backward()
    close(centroids.grad, tensors["grad.centroids_from_pi_mean"], slack)


class PenaltyModule:
    """One module's new expert as leaves, and the bases of its history."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor], index: int) -> None:
        slots = tensors[f"param.m{index}.slots"].tolist()
        ranks = tensors[f"param.m{index}.rank"].tolist()
        committed = tensors[f"param.m{index}.committed"].tolist()
        self.layer = config["modules"][index]["layer"]
        all_a, all_b = tensors[f"param.m{index}.expert_A"], tensors[f"param.m{index}.expert_B"]
        new = slots.index(config["new_slot"])
        self.a = all_a[new, : ranks[new]].clone().requires_grad_()
        self.bt = all_b[new, :, : ranks[new]].t().clone().requires_grad_()
        self.x = tensors[f"in.m{index}.x"].clone().requires_grad_()
        old = [i for i, s in enumerate(slots) if s in config["hist_slots"] and committed[i]]
        self.output_basis = orthonormal_basis(
            torch.cat([all_b[i, :, : ranks[i]] for i in old] or [all_b[0, :, :0]], 1)
        )
        rows = orthonormal_basis(torch.cat([all_a[i, : ranks[i]] for i in old] or [all_a[0, :0]]).t())
        square = self.a.shape[1] == self.bt.shape[1]
        self.released_basis = rows if square else self.output_basis


def visual_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over visual tokens [B, D]; zero for a sample without any."""
    weights = mask.to(x.dtype)
    return (x * weights[..., None]).sum(1) / weights.sum(1).clamp(min=1)[:, None]


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("reading", ["official", "faithful"])
@pytest.mark.parametrize("case_id", PENALTY)
def test_penalty(case_id: str, reading: str, impl: str) -> None:
    entry, tensors = golden_case(case_id)
    config = entry["config"]
    modules = [PenaltyModule(config, tensors, i) for i in range(len(config["modules"]))]
    centroids = tensors["param.centroids"].clone().requires_grad_()
    gamma = history_mass(config, tensors, centroids)
    if reading == "official":
        # Inputs are stored per layer: the first module of a layer meets the input of the last one.
        firsts = {m.layer: m for m in reversed(modules)}
        lasts = {m.layer: m for m in modules}
        terms = [(m, lasts[layer].x, m.released_basis) for layer, m in sorted(firsts.items())]
    else:
        terms = [(m, m.x, m.output_basis) for m in modules]
    loss = orthogonality_penalty(
        [visual_mean(x, tensors["in.visual_mask"]) for _, x, _ in terms],
        [m.a for m, _, _ in terms],
        [m.bt for m, _, _ in terms],
        [basis for _, _, basis in terms],
        [gamma[m.layer] for m, _, _ in terms],
        scale=config["scale"],
        impl=impl,
    )
    expected = tensors.get("out.loss_official" if reading == "official" else "faithful.loss")
    if expected is None:
        assert entry["expected"]["loss_official"] is None and loss == 0
        return
    close(loss, expected)
    loss.backward()
    prefix = "grad_official" if reading == "official" else "grad_faithful"
    close(centroids.grad, tensors[f"{prefix}.centroids"])
    for i, m in enumerate(modules):
        rank = m.a.shape[0]
        close(or_zero(m.x), tensors[f"{prefix}.m{i}.x"])
        close(or_zero(m.a), tensors[f"{prefix}.m{i}.expert_A_new"][:rank])
        close(or_zero(m.bt).t(), tensors[f"{prefix}.m{i}.expert_B_new"][:, :rank])


def history_mass(config: dict[str, Any], tensors: dict[str, Tensor], centroids: Tensor) -> Tensor:
    """Summed gate of the old experts [layers, B]; only the new expert's centroid gets a gradient."""
    new, old = config["new_slot"], config["hist_slots"]
    pool = [*old, new]
    rows = torch.stack([centroids[:, s] if s == new else centroids[:, s].detach() for s in pool], 1)
    return centroid_gates(tensors["in.image_features"], rows, config["sigma"])[..., : len(old)].sum(-1)


def or_zero(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
