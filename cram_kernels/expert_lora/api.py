"""Public expert_lora: checks, the autocast rule, and the choice of implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from cram_kernels.dispatch import Op, check_devices, triton_missing
from cram_kernels.expert_lora import cpu, native, reference
from cram_kernels.expert_lora.dropout import seed_tensor
from cram_kernels.packing import PackedExperts

Result = TypeVar("Result", Tensor, list[Tensor])


def _triton(*arguments: Any) -> Tensor:
    from cram_kernels.expert_lora import triton

    return triton.expert_lora(*arguments)


OP = Op(
    "expert_lora",
    {
        "reference": reference.expert_lora,
        "cpu": cpu.expert_lora,
        "triton": _triton,
        "native": native.expert_lora,
    },
    {"triton": triton_missing, "native": native.missing},
)
SHARED_A = Op(
    "expert_lora with a shared A",
    {name: OP.impls[name] for name in ("reference", "cpu", "native")},
    {"native": native.missing},
)


def expert_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: PackedExperts,
    gates: Tensor,
    segments: Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    impl: str = "auto",
) -> Tensor:
    """Apply a frozen linear layer and a gated sum of LoRA experts.

        y = W0 x + b + sum_e gates[s(t), e] * scale * B_e A_e drop(x)

    T is the product of x's leading dimensions, s(t) the segment of token t. A gate of exactly 0 selects: NaN
    or Inf behind it does not reach y. Gradients flow to x, to the gates and to the trained suffix of
    `experts`; there is no second derivative in any implementation but the reference.

    Args:
        x: Input [..., D_in].
        weight: Frozen base weight [D_out, D_in], same dtype as x.
        bias: Frozen base bias [D_out] or None.
        experts: The packed experts. Cast to x.dtype for the products (master weights may be float32).
        gates: [S, E] or [T, E], float32 (float64 with float64 x). Applied and summed in their own precision.
        segments: int [T], the gate row of each token; None if S divides T evenly, token blocks in order.
        dropout: Probability in [0, 1) of dropping an element of x on the experts' path; one mask for all
            experts.
        seed: Seed of the dropout mask, see `dropout_mask`. A tensor keeps a compiled step whole.
        impl: "auto" (the first that can run of "native", "cpu" for CPU tensors and "triton", "cpu" for CUDA
            tensors), "reference", "cpu" (rank-packed eager operations, right on any device), "native" (CPU
            tensors, one call each way; bfloat16, float32) or "triton" (CUDA devices, or CPU tensors under
            Triton's interpreter; bfloat16, float16, float32). Experts with a shared A have no
            "triton".

    Returns:
        y [..., D_out] in x.dtype. Inside an autocast region x, weight and bias are cast to the region's dtype
        first, as `torch.nn.functional.linear` does, and y has that dtype; gates keep theirs. float64 is left
        alone.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, a segment does not exist (CPU tensors; on other
            devices, where nobody waits for the values, its rows of y are NaN), `weight` or `bias` require
            grad, or `impl` is unknown.
        NotImplementedError: `impl` is known but this op does not have it, or it cannot serve these tensors.

    Source: CRAM (arXiv 2606.02502), expert layer with centroid-routed weights.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return expert_lora(
                x, weight, bias, experts, gates, segments, dropout=dropout, seed=seed, impl=impl
            )
    op = (SHARED_A if experts.shared_a else OP).select(impl, x.device, x.dtype)
    arguments = (x, weight, bias, experts, gates, segments, dropout)
    by_kernel = op is native.expert_lora and sees_faults([arguments[1:4]], gates, segments, dropout)
    return checked(op, arguments, seed, partial(check_layer, *arguments), by_kernel)


def sees_faults(
    layers: Sequence[tuple[Tensor, Tensor | None, PackedExperts]],
    gates: Tensor,
    segments: Tensor | None,
    dropout: float,
) -> bool:
    """Whether the native kernel itself refuses all that can be wrong with such a call, on CPU tensors."""
    if segments is not None or dropout or torch.compiler.is_compiling():
        return False
    columns = gates.shape[-1:]
    for weight, bias, experts in layers:
        frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        if not frozen or columns != (experts.gate_columns,):
            return False
    return True


def checked(
    op: Callable[..., Result],
    arguments: tuple[Any, ...],
    seed: int | Tensor,
    check: Callable[[], None],
    by_kernel: bool,
) -> Result:
    """Return what an operation computes. What it cannot compute, `check` refuses in words of the caller.

    Args:
        op: The operation.
        arguments: Its arguments up to dropout.
        seed: Seed of the dropout mask.
        check: Raises where the arguments do not fit together.
        by_kernel: Whether the kernel sees every fault itself; then `check` only explains, because checks in
            Python cost half of the time of a small call.
    """
    if not by_kernel:
        check()
        return op(*arguments, seed_tensor(seed) if arguments[-1] else None)
    try:
        return op(*arguments, None)
    except (RuntimeError, ValueError):
        check()
        raise


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that an autocast region asks for, or None outside of one and for float64."""
    # `device.type` makes a new string each time, which costs a small call on a CPU a part of its time.
    device = "cpu" if x.is_cpu else x.device.type
    if device not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device):
        return None
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def check_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: PackedExperts,
    gates: Tensor,
    segments: Tensor | None,
    dropout: float,
) -> None:
    """Raise ValueError where one layer's arguments do not fit together; see `expert_lora`."""
    check_base(x, weight, bias, experts, dropout)
    check_devices(x.device, gates=gates, segments=segments)
    columns, shape = experts.gate_columns, gates.shape
    if len(shape) != 2 or shape[1] != columns:
        raise ValueError(f"gates must be [S, {columns}] or [T, {columns}], got {list(shape)}")
    if gates.dtype != torch.float32 and not (gates.dtype == x.dtype == torch.float64):
        raise ValueError(
            f"gates must be float32 (or float64 with float64 x), got {gates.dtype} with {x.dtype} x"
        )
    if shape[0] != 1 or segments is not None:
        check_segments(x.shape[:-1].numel(), shape[0], segments)


def check_base(
    x: Tensor, weight: Tensor, bias: Tensor | None, experts: PackedExperts, dropout: float
) -> None:
    """Raise ValueError where the input, the base linear, the experts and dropout do not fit together."""
    # nn.Module finds a buffer by name after its own attributes, at a microsecond each.
    buffers: Any = experts._buffers
    d_out, d_in = buffers["bt"].shape[1], buffers["a"].shape[1]
    if weight.shape != (d_out, d_in):
        raise ValueError(f"weight must be [{d_out}, {d_in}] to fit the experts, got {list(weight.shape)}")
    if not x.dim() or x.shape[-1] != d_in:
        raise ValueError(f"x must be [..., {d_in}], got {list(x.shape)}")
    if x.dtype != weight.dtype:
        raise ValueError(f"x must have weight's dtype {weight.dtype}, got {x.dtype}")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight and bias must be frozen (requires_grad=False), got one that requires grad")
    if bias is not None and (bias.shape != (d_out,) or bias.dtype != weight.dtype):
        raise ValueError(f"bias must be {weight.dtype} [{d_out}], got {bias.dtype} {list(bias.shape)}")
    check_devices(x.device, weight=weight, bias=bias, experts=buffers["bt"])
    if not torch.compiler.is_compiling():
        experts.check_rows()
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")


def check_segments(tokens: int, rows: int, segments: Tensor | None) -> None:
    """Raise ValueError where tokens cannot be told which of the S rows of gates (or queries) they use."""
    if segments is None:
        if tokens and (not rows or tokens % rows):
            raise ValueError(f"gates must have S rows with S dividing T = {tokens}, got S = {rows}")
        return
    if segments.shape != (tokens,) or segments.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"segments must be int32 or int64 [{tokens}], got {segments.dtype} {list(segments.shape)}"
        )
    # Elsewhere a look at the values would wait for the device, and the compiler has none.
    if tokens and segments.is_cpu and not torch.compiler.is_compiling():
        low, high = (int(value) for value in torch.aminmax(segments))
        if low < 0 or high >= rows:
            raise ValueError(f"segments must lie in [0, {rows}), got values from {low} to {high}")
