"""Random calls of every operation: the implementations agree, refuse alike, and never read out of bounds.

The raw native operations get arguments that the public functions would refuse. They may refuse too; what they
must not do, a sanitizer sees.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from cram_kernels import (
    PackedExperts,
    centroid_gates,
    expert_lora,
    orthogonality_penalty,
    pack_experts,
    routed_expert_lora,
    stacked_expert_lora,
)
from cram_kernels.library import native_missing
from tests.fuzz.guard import Outcome, Tally

WIDTHS = (1, 3, 8, 17, 64)
IMPLS = ("reference", "cpu", "native")
FLOATS = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
REFUSALS = (ValueError, NotImplementedError)


def draw_layer(random: Random) -> dict[str, Any]:
    """Arguments of `expert_lora` that fit together."""
    d_in, d_out, tokens = (random.choice(WIDTHS) for _ in range(3))
    tokens = random.choice((0, 1, tokens, 2 * tokens, 70))
    dtype = random.choice(FLOATS[:2]) if random.random() < 0.9 else torch.float64
    ranks = [random.choice((0, 1, 2, 7)) for _ in range(random.choice((1, 2, 5)))]
    shared = random.random() < 0.2
    ranks = [max(ranks[0], 1)] * len(ranks) if shared else ranks
    a = [torch.randn(rank, d_in) for rank in ranks]
    a = [a[0]] * len(a) if shared else a
    trained = random.randrange(len(ranks) + 1)
    experts = pack_experts(a, [torch.randn(d_out, rank) for rank in ranks], 2.0, trained, shared)
    rows = random.choice([each for each in (1, 2, 3, max(tokens, 1)) if tokens % each == 0])
    gates = torch.rand(rows, len(ranks)) * torch.randint(0, 2, (rows, len(ranks)))
    gates = gates.double() if dtype is torch.float64 else gates
    map_of = torch.randint(0, rows, (tokens,)) if random.random() < 0.3 else None
    return {
        "x": torch.randn(tokens, d_in, dtype=dtype).requires_grad_(random.random() < 0.5),
        "weight": torch.randn(d_out, d_in, dtype=dtype),
        "bias": random.choice((None, torch.randn(d_out, dtype=dtype))),
        "experts": experts,
        "gates": gates.requires_grad_(random.random() < 0.5),
        "segments": map_of,
    }


def spoil(value: Any, random: Random) -> Any:
    """A tensor that does not fit any more, or something that may still fit."""
    if isinstance(value, PackedExperts):
        owners = value.expert_of_row
        if owners.numel():
            owners[random.randrange(owners.numel())] = random.choice((-1, value.gate_columns, 2**62, 2**31))
        return value
    if isinstance(value, (list, tuple)):
        at = random.randrange(len(value) + 1)
        if at == len(value):
            return [*value, *value[:1]] or [torch.zeros(2)]
        return [spoil(each, random) if i == at else each for i, each in enumerate(value)]
    if not isinstance(value, Tensor):
        return random.choice((None, torch.zeros(0), torch.zeros(3)))
    value = value.detach()
    ways: tuple[Callable[[], Tensor], ...] = (
        lambda: value[:0],
        lambda: value[..., :0],
        lambda: value[: max(len(value) - 1, 0)] if value.dim() else value,
        lambda: torch.cat([value, value]) if value.dim() else value,
        lambda: value.to(random.choice(FLOATS)),
        lambda: value.unsqueeze(0),
        lambda: value.flatten(),
        lambda: value.to("meta"),
        lambda: value.new_zeros(()),
        lambda: value.to(torch.int64) * random.choice((1, -1, 2**40)),
        lambda: value.mT if value.dim() > 1 else value,
        lambda: value.to(torch.bool),
        lambda: value.repeat_interleave(2, -1)[..., ::2] if value.dim() else value,
    )
    return random.choice(ways)()


def draw_penalty(random: Random) -> dict[str, Any]:
    """Arguments of `orthogonality_penalty` that fit together."""
    batch, tokens, modules = random.choice((0, 1, 3)), random.choice((0, 1, 4)), random.choice((0, 1, 3))
    masked = random.random() < 0.5
    hidden, a, b, bases = [], [], [], []
    for _ in range(modules):
        d_in, d_out, rank = random.choice(WIDTHS), random.choice(WIDTHS), random.choice((0, 1, 4))
        hidden.append(torch.randn(*((batch, tokens, d_in) if masked else (batch, d_in))))
        a.append(torch.randn(rank, d_in).requires_grad_())
        b.append(torch.randn(rank, d_out).requires_grad_())
        bases.append(torch.linalg.qr(torch.randn(d_out, min(d_out, random.choice((0, 1, 5)))))[0])
    return {
        "hidden": hidden,
        "trained_a": a,
        "trained_b": b,
        "bases": bases,
        "gamma": torch.rand(modules, batch),
        "mask": torch.rand(batch, tokens) < 0.5 if masked else None,
    }


def draw_gates(random: Random) -> dict[str, Any]:
    """Arguments of `centroid_gates` that fit together."""
    samples, experts, width = random.choice((0, 1, 4)), random.choice((0, 1, 5)), random.choice(WIDTHS)
    members = torch.rand(samples, experts) < 0.7 if random.random() < 0.5 else None
    return {
        "query": torch.randn(samples, width),
        "centroids": torch.randn(random.choice((1, 3)), experts, width).requires_grad_(),
        "members": members,
    }


def call_layer(impl: str, arguments: dict[str, Any]) -> list[Tensor]:
    """The layer's output and gradients."""
    y = expert_lora(**arguments, impl=impl)
    leaves = [t for t in (arguments["x"], arguments["gates"], *arguments["experts"].parameters())]
    return [y, *gradients(y, leaves)]


def call_stack(impl: str, arguments: dict[str, Any]) -> list[Tensor]:
    """Two layers that read one x."""
    one = (arguments["weight"], arguments["bias"], arguments["experts"])
    found = stacked_expert_lora(
        arguments["x"], [one, one], arguments["gates"], arguments["segments"], impl=impl
    )
    return [*found, *gradients(sum(found), [arguments["x"], arguments["gates"]])]


def call_routed(impl: str, arguments: dict[str, Any]) -> list[Tensor]:
    """A layer that computes its gates."""
    arguments = dict(arguments)
    gates = torch.atleast_1d(arguments.pop("gates"))
    query, centroids = torch.ones(len(gates), 5), torch.linspace(-1, 1, 5 * gates.shape[-1]).view(-1, 5)
    return [routed_expert_lora(**arguments, query=query, centroids=centroids, sigma=1.0, impl=impl)]


def call_penalty(impl: str, arguments: dict[str, Any]) -> list[Tensor]:
    """The penalty and its gradients."""
    loss = orthogonality_penalty(**arguments, scale=1.5, impl=impl)
    return [loss, *gradients(loss, [*arguments["trained_a"], *arguments["trained_b"]])]


def call_gates(impl: str, arguments: dict[str, Any]) -> list[Tensor]:
    """Gates and their gradient; there is no "cpu"."""
    own = "native" if impl == "native" else "reference"
    gates = centroid_gates(**arguments, sigma=1.0, impl=own)
    return [gates, *gradients(gates * torch.arange(gates.shape[-1]), [arguments["centroids"]])]


def gradients(y: Any, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of the sum of y, of those leaves that want one."""
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not (wanted and y.requires_grad):
        return []
    found = torch.autograd.grad(y.sum(), wanted, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(wanted, found, strict=True)]


CALLS: tuple[tuple[Callable[[Random], dict[str, Any]], Callable[..., list[Tensor]]], ...] = (
    (draw_layer, call_layer),
    (draw_layer, call_stack),
    (draw_layer, call_routed),
    (draw_penalty, call_penalty),
    (draw_gates, call_gates),
)


def check(seed: int) -> tuple[str, str, str | None]:
    """One random call in every implementation: its words, what came of it, and what is wrong with that."""
    random = Random(seed)
    torch.manual_seed(seed)
    draw, call = random.choice(CALLS)
    arguments = draw(random)
    said = call.__name__
    if random.random() < 0.6:
        name = random.choice(sorted(arguments))
        arguments[name] = spoil(arguments[name], random)
        said = f"{said}, {name} spoilt"
    found = {}
    for impl in IMPLS:
        with Outcome() as found[impl]:
            found[impl].value = call(impl, arguments)
    return said, *_judge(found)


def _judge(found: dict[str, Outcome]) -> tuple[str, str | None]:
    errors = {impl: each.error for impl, each in found.items() if each.error is not None}
    for impl, error in errors.items():
        if not isinstance(error, REFUSALS):
            return "raised", f"{impl}: {type(error).__name__}: {str(error)[:300]}"
    refused = {impl for impl, error in errors.items() if not isinstance(error, NotImplementedError)}
    if refused and refused != found.keys() - (errors.keys() - refused):
        return "refused", f"by {sorted(refused)} alone: {errors}"
    values = [each.value for each in found.values() if each.error is None]
    for other in values[1:]:
        loose = 0.2 if any(each.dtype == torch.bfloat16 for each in values[0]) else 2e-3
        for one, two in zip(values[0], other, strict=True):
            if one.shape != two.shape or one.dtype != two.dtype:
                return "differs", f"{one.dtype} {list(one.shape)} and {two.dtype} {list(two.shape)}"
            if not torch.allclose(one.detach(), two.detach(), rtol=loose, atol=loose * 20, equal_nan=True):
                return "differs", f"by {float((one - two).abs().max())}"
    return ("refused" if refused else "computed"), None


def raw(seed: int) -> None:
    """One raw native operation with arguments that need not fit; it may refuse."""
    random = Random(seed)
    torch.manual_seed(seed)
    ops = torch.ops.cram
    layer = draw_layer(random)
    experts, gates = layer["experts"], layer["gates"].detach().float()
    d_out, rows = experts.bt.shape[1], experts.bt.shape[0]
    x = layer["x"].detach()
    shared: dict[str, Any] = {
        "weight": layer["weight"],
        "a": experts.a,
        "bt": experts.bt,
        "owner": experts.expert_of_row,
        "gates": gates,
        "scale": 2.0,
    }
    first = random.choice((0, rows, rows // 2, -1, rows + 3))
    words = {"dropped": random.choice((0, 6554)), "row_word": 3, "pair_word": 5}
    needs = {name: random.random() < 0.5 for name in ("need_x", "need_gates", "need_a", "need_b")}
    dy = torch.randn(*x.shape[:-1], d_out, dtype=x.dtype)
    z = torch.randn(len(x), random.choice((rows, rows // 2, 0)), dtype=x.dtype)
    penalty = draw_penalty(random)
    wanted = {name: random.random() < 0.5 for name in ("want_hidden", "want_a", "want_bt", "want_gamma")}
    calls: tuple[tuple[Any, dict[str, Any]], ...] = (
        (ops.packed_expert_lora, {"x": x, "bias": layer["bias"], **shared}),
        (ops.packed_expert_lora_forward, {"x": x, "bias": layer["bias"], **shared, "first": first, **words}),
        (
            ops.packed_expert_lora_backward,
            {"dy": dy, "x": x, "z": z, **shared, "tail": first, **words, **needs},
        ),
        (
            ops.orthogonality_penalty,
            {
                "hidden": penalty["hidden"],
                "a": [each.detach() for each in penalty["trained_a"]],
                "bt": [each.detach() for each in penalty["trained_b"]],
                "bases": penalty["bases"],
                "gamma": penalty["gamma"].flatten(),
                "mask": penalty["mask"],
                "scale": 1.5,
                **wanted,
            },
        ),
        (ops.native_centroid_gates, {**draw_gates(random), "sigma": 2.0}),
    )
    op, arguments = random.choice(calls)
    tensors = [name for name, value in arguments.items() if isinstance(value, (Tensor, list))]
    for name in random.sample(tensors, random.choice((0, 1, 1, 2))):
        arguments[name] = spoil(arguments[name], random)
    if random.random() < 0.2 and experts.expert_of_row.numel():
        spoil(experts, random)
    with Outcome():
        op(**arguments)


def prepare(place: Path) -> None:
    """Load the native library."""
    native_missing(None, None)


def run(ready: None, seeds: range, place: Path) -> Tally:
    """One call and one raw call per seed."""
    tally = Tally()
    for seed in seeds:
        with tally.timed(seed):
            said, kind, fault = check(seed)
        tally.add(kind, seed, said, fault)
        if native_missing(torch.device("cpu"), torch.float32) is None:
            raw(seed)
    return tally
