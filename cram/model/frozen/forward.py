"""Experts beside a base linear whose own forward must run.

    y = base(x) + sum_e gates[s, e] * scale * B_e A_e dropout(x)

`cram_kernels.expert_lora` computes the base linear itself, from its weight and bias. That is right for a
plain `nn.Linear` alone. Four kinds of linear compute something else, and are called: a subclass, a
parametrised linear, a linear with hooks (offloading brings the weight to its device in one), and a linear
whose weight is a tensor subclass. Quantised linears are of the first kind or of the last. Experts with gate 0
add exactly 0, so that y is bit for bit base(x).

Saved for backward: the experts' rows in the dtype of x, whereas the fused op makes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from cram_kernels import PackedExperts, dropout_mask, keep_scale

_PLAIN_WEIGHTS = (nn.Parameter, Tensor)
# Where accelerate keeps the hook that brings a module's tensors to the device that computes.
_PLACEMENT = "_hf_hook"
# Steps of autograd between the input of a linear and its output that are looked at.
NODES_OF_A_LINEAR = 32


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear computes exactly `F.linear(x, weight, bias)`: its weight may be read instead."""
    return plain_tensors(linear) is not None


def plain_tensors(linear: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a plain linear, or None of any other.

    Hooks and weights may be exchanged at any time, so every call asks; it costs a few dictionary look-ups.
    """
    if type(linear) is not nn.Linear:
        return None
    hooks = linear._forward_hooks or linear._forward_pre_hooks
    if hooks or linear._backward_hooks or linear._backward_pre_hooks or "forward" in linear.__dict__:
        return None
    parameters = linear._parameters
    weight: Any = parameters.get("weight")
    bias = parameters.get("bias")
    if type(weight) not in _PLAIN_WEIGHTS or not (bias is None or type(bias) in _PLAIN_WEIGHTS):
        return None
    return weight, bias


def device_of(linear: nn.Module) -> torch.device:
    """The device that a linear computes on, also while its weight is offloaded."""
    weight: Any = linear.weight
    device: torch.device = weight.device
    if device.type != "meta":
        return device
    hook = linear.__dict__.get(_PLACEMENT)
    for each in getattr(hook, "hooks", (hook,)):
        if (found := getattr(each, "execution_device", None)) is not None:
            return torch.device("cuda", found) if isinstance(found, int) else torch.device(found)
    return device


@contextmanager
def in_place(experts: PackedExperts) -> Iterator[PackedExperts]:
    """The experts on the device that computes, inside; afterwards offloaded again if they were.

    Raises:
        ValueError: If offloaded experts are in training, whose optimiser would hold other tensors.
    """
    hook = experts.__dict__.get(_PLACEMENT)
    if hook is None:
        yield experts
        return
    if experts.trained and experts.trained_a is not None and experts.trained_a.device != experts.a.device:
        raise ValueError(
            "experts in training must stay on the device that computes, got offloaded ones; "
            "offload the model after `model.cram.freeze`"
        )
    hook.pre_forward(experts)
    try:
        yield experts
    finally:
        hook.post_forward(experts, None)


def beside(
    base: nn.Module,
    x: Tensor,
    experts: PackedExperts,
    gates: Tensor,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
) -> Tensor:
    """The output of a linear's own forward plus that of its experts; see the head of this file.

    Args:
        base: The linear, called once.
        x: Input [..., D_in].
        experts: The packed experts.
        gates: [S, E] or [T, E]; a gate of exactly 0 selects, as in `cram_kernels.expert_lora`.
        dropout: Probability of dropping an element of x on the experts' path.
        seed: Seed of the dropout mask.

    Returns:
        [..., D_out] in the dtype and on the device of the base's output.

    Raises:
        ValueError: If x needs a gradient, and the base's product has no derivative.
    """
    y: Tensor = base(x)
    if x.requires_grad and not torch.compiler.is_compiling():
        _check_derivative(base, x, y)
    rows = x.reshape(-1, x.shape[-1]).to(y.device)
    scale = experts.scale
    if dropout:
        rows = rows * dropout_mask(seed, rows.shape[0], rows.shape[1], dropout, rows.device, rows.dtype)
        scale *= keep_scale(dropout)
    out = y.reshape(-1, y.shape[-1])
    with in_place(experts):
        for a, bt, owner in _parts(experts, y.device):
            out = _added(out, rows, a, bt, gates.to(y.device).index_select(1, owner), scale)
    return out.view(y.shape)


def _check_derivative(base: nn.Module, x: Tensor, y: Tensor) -> None:
    """Refuses y = base(x) through which no gradient goes: some quantised products are for inference alone."""
    nodes: list[Any] = [y.grad_fn]
    for _ in range(NODES_OF_A_LINEAR):
        node = nodes.pop() if nodes else None
        if node is None:
            return
        if node.name().endswith("NotImplemented"):
            raise ValueError(
                "base must have a derivative to train experts on it, got a linear with a weight of type "
                f"{type(getattr(base, 'weight', None)).__name__} without one; train on the base in another "
                "form and load the bundle on this one"
            )
        nodes.extend(parent for parent, _ in node.next_functions if parent not in (None, x.grad_fn))


def _parts(experts: PackedExperts, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(a, bt, owner) of the frozen rows of the pack and of those in training; the latter are the leaves."""
    tail, owner = experts.total_rank - experts.trained_rank, experts.expert_of_row.to(device)
    trained_a, trained_b = experts.trained_a, experts.trained_b
    if trained_a is None or trained_b is None:
        yield experts.a.to(device), experts.bt.to(device), owner
        return
    yield trained_a if experts.shared_a else experts.a[:tail], experts.bt[:tail], owner[:tail]
    yield trained_a, trained_b, owner[tail:]


def _added(y: Tensor, x: Tensor, a: Tensor, bt: Tensor, gates: Tensor, scale: float) -> Tensor:
    """y [T, D_out] + (x a^T o gates scale) bt for a [R, D_in], or a shared one [r, D_in], bt [R, D_out].

    Args:
        y, x: Output of the base and input of the experts [T, D_in].
        a, bt: Packed factors.
        gates: [S, R], the gate of each row of bt.
        scale: Of all rows.
    """
    rank = len(bt)
    copies = rank // len(a) if len(a) else 1
    live = (gates != 0).any(0)
    if torch.compiler.is_compiling() or gates.requires_grad or unpack_dual(gates).tangent is not None:
        # Every row takes part: its gate has a derivative also at 0, which NaN behind it must not reach.
        bt = torch.where(live[:, None], bt, bt.nan_to_num())
        z = F.linear(x, a.to(x.dtype)).repeat(1, copies)
    else:
        kept = live.nonzero().squeeze(1)
        bt, gates = bt[kept], gates[:, kept]
        shared = copies > 1
        z = F.linear(x, (a if shared else a[kept]).to(x.dtype))
        z = z.repeat(1, copies)[:, kept] if shared else z
    weights = (gates * scale).repeat_interleave(len(x) // len(gates), 0)
    u = torch.where(weights == 0, z.nan_to_num(), z) * weights
    return torch.addmm(y, u.to(y.dtype), bt.to(y.dtype))
