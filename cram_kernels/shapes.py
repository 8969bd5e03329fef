"""Which factors, ranks and counts fit together in one pack of experts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_expert(a: Tensor, b: Tensor, in_features: int, out_features: int) -> None:
    """Raise ValueError where A [r, D_in] and B [D_out, r] are no expert of these widths."""
    rank = a.shape[0]
    if a.shape != (rank, in_features) or b.shape != (out_features, rank):
        raise ValueError(
            f"an expert must have A [r, {in_features}] and B [{out_features}, r], "
            f"got A {list(a.shape)} and B {list(b.shape)}"
        )


def check_storage(
    a: Tensor, bt: Tensor, ranks: Sequence[int], trained: int, gate_columns: int | None, shared_a: bool
) -> None:
    """Raise ValueError where the arguments of `PackedExperts` do not fit together."""
    if a.dim() != 2 or bt.dim() != 2 or (a.shape[0] != bt.shape[0] and not shared_a):
        raise ValueError(
            f"a and bt must be [R, D_in] and [R, D_out], got {list(a.shape)} and {list(bt.shape)}"
        )
    if not (a.shape[1] and bt.shape[1]):
        raise ValueError(f"D_in and D_out must be at least 1, got {a.shape[1]} and {bt.shape[1]}")
    if a.dtype != bt.dtype or a.device != bt.device:
        raise ValueError(
            f"a and bt must share dtype and device, got {a.dtype} on {a.device} and {bt.dtype} on {bt.device}"
        )
    if shared_a and (gate_columns is not None or set(ranks) != {a.shape[0]}):
        raise ValueError(
            f"experts of a shared A must have its rank {a.shape[0]} and no room, "
            f"got ranks {tuple(ranks)} and gate_columns {gate_columns}"
        )
    room = bt.shape[0] - sum(ranks)
    if any(rank < 0 for rank in ranks) or room < 0 or (room and gate_columns is None):
        raise ValueError(f"ranks must be non-negative and sum to {bt.shape[0]}, got {tuple(ranks)}")
    if gate_columns is not None and (gate_columns < len(ranks) or (room and not gate_columns)):
        raise ValueError(f"gate_columns must be at least {max(len(ranks), 1)}, got {gate_columns}")
    if room and trained:
        raise ValueError(f"a pack with room must be frozen, got {trained} trained experts")
    if not 0 <= trained <= len(ranks):
        raise ValueError(f"trained must lie in [0, {len(ranks)}], got {trained}")
