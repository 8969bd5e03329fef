"""Experts of different ranks packed along one rank axis.

A [R, D_in] and Bt [R, D_out] hold every expert's rows one after another (B stored transposed), expert e in
rows ``offsets[e]:offsets[e + 1]``. Frozen experts are the prefix, trained ones the suffix: an expert is a row
view, its gradient is contiguous, and no rank is padded. The leaf parameters ``trained_a`` and ``trained_b``
alias the suffix, so an optimiser step is seen by the kernels without a copy; the alias is renewed wherever
PyTorch replaces storage (``.to()``, copies, pickles, loaded states).

A pack may hold room for experts to come (`reserve`): zero rows and unused gate columns. `insert` fills them
in place, so shapes and addresses stay what a captured CUDA graph has seen.

With a shared A all experts are branches of one down projection [r, D_in], held once; the rows above are then
those of Bt [E r, D_out] alone. The shared A is trained while any branch is, frozen branches included in its
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from cram_kernels.leaves import NAMES, Place, counted_with, ending_in, place_of
from cram_kernels.shapes import check_expert, check_storage


class PackedExperts(nn.Module):
    """LoRA experts of one linear layer, packed by rank.

    Args:
        a: Down projections [R, D_in], expert after expert. Kept, not copied.
        bt: Transposed up projections [R, D_out], same rows, same dtype and device. Kept, not copied.
        ranks: Rank of each expert; zero is legal. Sums to R, or to less with `gate_columns`: rows beyond are
            room.
        scale: LoRA scale (alpha / r) of every expert.
        trained: How many of the last experts get gradients.
        gate_columns: Columns that gates must have, at least the number of experts and 1; None for exactly the
            number of experts and no room.
        shared_a: Whether `a` is one [r, D_in] that all experts read; every rank is then r, and there is no
            room.

    Attributes:
        a, bt: The packed storage, without gradient.
        trained_a, trained_b: Leaf parameters [r, D_in] and [r, D_out] that alias the last rows of `a` and
            `bt` (r = summed rank of the trained experts), or None with ``trained=0``. With a shared A,
            `trained_a` is all of it.
        expert_of_row: [R] int64, the gate column of each packed row of `bt`; rows that are room name the last
            column.
        gate_columns: Columns that gates must have.
        offsets: E + 1 row offsets.
        copied_back: Set it where something else holds the values of the leaf parameters and copies them back
            into `a` and `bt` after each change; calls then read `a` and `bt` alone.

    Raises:
        ValueError: Shapes, dtypes, ranks or `trained` do not fit together, or a width is 0.
    """

    a: Tensor
    bt: Tensor
    expert_of_row: Tensor
    trained_a: nn.Parameter | None
    trained_b: nn.Parameter | None

    def __init__(
        self,
        a: Tensor,
        bt: Tensor,
        ranks: Sequence[int],
        scale: float,
        trained: int = 0,
        gate_columns: int | None = None,
        shared_a: bool = False,
    ) -> None:
        super().__init__()
        check_storage(a, bt, ranks, trained, gate_columns, shared_a)
        self.ranks = tuple(int(rank) for rank in ranks)
        self.offsets = tuple(accumulate(self.ranks, initial=0))
        self.scale = float(scale)
        self.trained = trained
        self.gate_columns = len(self.ranks) if gate_columns is None else gate_columns
        self.shared_a = shared_a
        self.register_buffer("a", a.detach())
        self.register_buffer("bt", bt.detach())
        owners = torch.repeat_interleave(
            torch.tensor([*range(len(self.ranks)), self.gate_columns - 1]),
            torch.tensor([*self.ranks, bt.shape[0] - self.total_rank]),
        )
        self.register_buffer("expert_of_row", owners.to(a.device), persistent=False)
        tail_a, tail_b = self._trained_rows()
        self.trained_a = nn.Parameter(tail_a) if trained else None
        self.trained_b = nn.Parameter(tail_b) if trained else None
        self.copied_back = False
        self._places = self._places_of_leaves()
        self._checked: tuple[Tensor | None, int] = (None, 0)
        self._stepped = False  # whether an optimiser may step on the storage
        self._copied: tuple[Tensor, Tensor, int, int, tuple[Tensor, Tensor]] | None = None

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        scale: float,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> PackedExperts:
        """Return a pack without experts, to be filled by `append`."""
        a = torch.zeros(0, in_features, dtype=dtype, device=device)
        return cls(a, a.new_zeros(0, out_features), (), scale)

    @property
    def num_experts(self) -> int:
        """Number of experts E."""
        return len(self.ranks)

    @property
    def total_rank(self) -> int:
        """Number of packed rows R (of `bt`), without room."""
        return self.offsets[-1]

    @property
    def trained_rank(self) -> int:
        """Number of packed rows (of `bt`) that get gradients."""
        return self.total_rank - self.offsets[self.num_experts - self.trained]

    @property
    def in_features(self) -> int:
        """Input width D_in."""
        return self.a.shape[1]

    @property
    def out_features(self) -> int:
        """Output width D_out."""
        return self.bt.shape[1]

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return what a call multiplies by and where its gradients go: A, Bt, `trained_a` and `trained_b`.

        A and Bt are `a` and `bt`, or copies of them where a leaf parameter has been given other memory
        (`functional_call`, a parametrization, an optimiser that flattens): the leaf's values count. The
        compiler, which has no addresses, sees another tensor in a leaf's place, but not other memory in it.

        Raises:
            ValueError: A leaf has another shape than the rows that it stands for.
        """
        buffers: Any = self._buffers
        a, bt = buffers["a"], buffers["bt"]
        if not self.trained:
            return a, bt, None, None
        # nn.Module finds a parameter by name after its own attributes, and a parametrization takes it out.
        leaf_of: Any = self._parameters
        leaf_a, leaf_b = [leaf_of[each] if each in leaf_of else getattr(self, each) for each in NAMES]
        if not self.copied_back:
            of_a, of_b = self._places
            a, bt = ending_in(NAMES[0], a, leaf_a, of_a), ending_in(NAMES[1], bt, leaf_b, of_b)
        return a, bt, leaf_a, leaf_b

    def is_in_place(self) -> bool:
        """Whether calls multiply by `a` and `bt` themselves; see `factors`."""
        a, bt, *_ = self.factors()
        return a is self._buffers["a"] and bt is self._buffers["bt"]

    def expert(self, i: int) -> tuple[Tensor, Tensor]:
        """Return views of expert `i` in PEFT's shapes: A [r_i, D_in], B [D_out, r_i].

        A trained expert's views belong to the leaf parameters, so autograd reaches them; so does the shared A
        of any expert while it is trained.

        Raises:
            IndexError: There is no expert `i`.
        """
        if not -self.num_experts <= i < self.num_experts:
            raise IndexError(f"expert must lie in [0, {self.num_experts}), got {i}")
        i %= self.num_experts
        lo, hi = self.offsets[i], self.offsets[i + 1]
        shared = (self.a if self.trained_a is None else self.trained_a) if self.shared_a else None
        if i < self.num_experts - self.trained:
            return self.a[lo:hi] if shared is None else shared, self.bt[lo:hi].t()
        assert self.trained_a is not None and self.trained_b is not None
        start = self.total_rank - self.trained_rank
        a = self.trained_a[lo - start : hi - start] if shared is None else shared
        return a, self.trained_b[lo - start : hi - start].t()

    def append(self, a: Tensor, b: Tensor, trained: int = 1) -> PackedExperts:
        """Return a new pack with one more expert; everything before it is frozen, this pack stays as it is.

        Args:
            a: Down projection [r, D_in]; cast to the pack's dtype and device.
            b: Up projection [D_out, r].
            trained: 1 to train the new expert, 0 to keep it frozen.

        Raises:
            ValueError: Shapes do not fit the pack, its A is shared, or `trained` is neither 0 nor 1.
        """
        self._refuse_shared("append")
        if trained not in (0, 1):
            raise ValueError(f"trained must be 0 or 1 for one appended expert, got {trained}")
        check_expert(a, b, self.in_features, self.out_features)
        held_a, held_bt, *_ = self.factors()
        packed_a = torch.cat([held_a[: self.total_rank], a.detach().to(self.a)])
        packed_bt = torch.cat([held_bt[: self.total_rank], b.detach().t().to(self.bt)])
        return PackedExperts(packed_a, packed_bt, (*self.ranks, a.shape[0]), self.scale, trained)

    def freeze(self) -> PackedExperts:
        """Return a pack over the same storage in which no expert gets gradients."""
        columns = None if self.shared_a else self.gate_columns
        frozen = PackedExperts(
            *self.factors()[:2], self.ranks, self.scale, gate_columns=columns, shared_a=self.shared_a
        )
        frozen._stepped = self.trained > 0 or self._stepped
        return frozen

    def reserve(self, rows: int, experts: int) -> PackedExperts:
        """Return a frozen pack of these experts with room for more, in storage of its own.

        Gates for it have `experts` columns; the columns of experts that are not there yet do nothing.

        Args:
            rows: Packed rows in all; multiples of 16 waste nothing on a GPU.
            experts: Experts in all.

        Raises:
            ValueError: The room is smaller than what the pack holds, or its A is shared.
        """
        self._refuse_shared("reserve")
        if rows < self.total_rank or experts < max(self.num_experts, 1):
            raise ValueError(
                f"room must be at least {self.total_rank} rows and {max(self.num_experts, 1)} experts, "
                f"got {rows} and {experts}"
            )
        held = self.factors()[:2]
        a, bt = (side.new_zeros(rows, side.shape[1]) for side in held)
        a[: self.total_rank], bt[: self.total_rank] = (side[: self.total_rank] for side in held)
        return PackedExperts(a, bt, self.ranks, self.scale, gate_columns=experts)

    @torch.no_grad()
    def insert(self, a: Tensor, b: Tensor) -> int:
        """Add a frozen expert in place, in the room that `reserve` made; return its index.

        Shapes and addresses of the pack's tensors stay; only values change, so a captured CUDA graph uses the
        expert from its next replay on.

        Args:
            a: Down projection [r, D_in]; cast to the pack's dtype and device.
            b: Up projection [D_out, r].

        Raises:
            ValueError: Shapes do not fit the pack, the pack is in training, or there is no room.
        """
        check_expert(a, b, self.in_features, self.out_features)
        rows = slice(self.total_rank, self.total_rank + a.shape[0])
        if self.trained or rows.stop > self.a.shape[0] or self.num_experts == self.gate_columns:
            raise ValueError(
                f"an inserted expert must find room in a frozen pack, got {a.shape[0]} rows for "
                f"{self.a.shape[0] - self.total_rank} and {self.gate_columns - self.num_experts} free "
                f"experts, {self.trained} trained"
            )
        self.a[rows] = a.to(self.a)
        self.bt[rows] = b.t().to(self.bt)
        self.expert_of_row[rows] = self.num_experts
        self.ranks = (*self.ranks, a.shape[0])
        self.offsets = (*self.offsets, rows.stop)
        return self.num_experts - 1

    def narrowed(self) -> tuple[Tensor, Tensor]:
        """Return `a` and `bt`, or copies of them in bfloat16, which are kept until a value of theirs changes.

        Packs in training and what `freeze` makes of them have none, because fused optimisers change values
        without counting; nor have inference tensors, which never count. A change through `.data` is not
        counted either, nor a fused step on storage that another pack was given without `freeze`.
        """
        a, bt = self.a, self.bt
        counted = not (self.trained or self._stepped or a.is_inference() or bt.is_inference())
        if a.dtype != torch.float32 or not counted:
            return a, bt
        kept = self._copied
        if kept and kept[0] is a and kept[1] is bt and kept[2] == a._version and kept[3] == bt._version:
            return kept[4]
        with torch.inference_mode(False):  # a later call with gradients must be able to save them
            copies = a.to(torch.bfloat16), bt.to(torch.bfloat16)
        self._copied = (a, bt, a._version, bt._version, copies)
        return copies

    def check_rows(self) -> None:
        """Raise ValueError where `expert_of_row` names a column that gates do not have.

        The values are read after a change alone, and on CPUs alone: elsewhere they would be waited for.
        """
        owners = self.expert_of_row
        # Inference tensors do not count their changes.
        version = -1 if owners.is_inference() else owners._version
        if self._checked[0] is owners and self._checked[1] == version >= 0:
            return
        rows = self.bt.shape[:1]
        if owners.shape != rows or owners.dtype != torch.int64 or owners.device != self.bt.device:
            raise ValueError(
                f"expert_of_row must be int64 {list(rows)} on {self.bt.device}, "
                f"got {owners.dtype} {list(owners.shape)} on {owners.device}"
            )
        if owners.is_cpu and owners.numel():
            low, high = (int(value) for value in torch.aminmax(owners))
            if low < 0 or high >= self.gate_columns:
                raise ValueError(
                    f"expert_of_row must lie in [0, {self.gate_columns}), got values from {low} to {high}"
                )
        self._checked = (owners, version)

    def extra_repr(self) -> str:
        """Show what the pack holds."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, ranks={self.ranks}, "
            f"scale={self.scale:g}, trained={self.trained}, gate_columns={self.gate_columns}"
            + (", shared_a=True" if self.shared_a else "")
        )

    def _trained_rows(self) -> tuple[Tensor, Tensor]:
        """Views of the packed storage that the leaf parameters alias: of `a` and of `bt`."""
        start = self.total_rank - self.trained_rank
        return self.a if self.shared_a else self.a[start:], self.bt[start:]

    def _refuse_shared(self, method: str) -> None:
        """An expert has an A of its own; a pack whose A is shared takes none, so it is packed anew."""
        if self.shared_a:
            raise ValueError(f"{method} must not be called on experts with a shared A; pack them together")

    def _alias(self) -> None:
        """Point the leaf parameters at the end of the packed storage again, keeping their identity."""
        if self.trained_a is not None and self.trained_b is not None:
            self.trained_a.data, self.trained_b.data = self._trained_rows()
            self.a, self.bt = counted_with(self.trained_a, self.a), counted_with(self.trained_b, self.bt)
        self._places = self._places_of_leaves()

    def _places_of_leaves(self) -> tuple[Place, ...]:
        """Where the leaf parameters lie in the packed storage; nothing without them."""
        if self.trained_a is None or self.trained_b is None:
            return ()
        return place_of(self.trained_a, self.a), place_of(self.trained_b, self.bt)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedExperts:
        self._buffers.update(self._gathered())
        super()._apply(fn, recurse)
        self._alias()
        return self

    def _gathered(self) -> dict[str, Tensor | None]:
        """The packed storage with the values of the leaf parameters in it, whatever memory they are in."""
        return dict(zip(("a", "bt"), self.factors(), strict=False))

    def __getstate__(self) -> dict[str, Any]:
        buffers = {**self._buffers, **self._gathered()}
        return {**self.__dict__, "_buffers": buffers, "_copied": None, "copied_back": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._alias()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.is_in_place():
            destination.update({prefix + name: values for name, values in self._gathered().items()})
        # They are rows of `a` and `bt`; safetensors would refuse them as shared memory.
        for name in NAMES:
            destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys += [key for key in missing if key not in (prefix + "trained_a", prefix + "trained_b")]
        self._alias()


def pack_experts(
    a: Sequence[Tensor], b: Sequence[Tensor], scale: float, trained: int = 0, shared_a: bool = False
) -> PackedExperts:
    """Pack experts given in PEFT's shapes.

    Args:
        a: One [r_i, D_in] per expert; ranks may differ, zero is legal.
        b: One [D_out, r_i] per expert, same dtype and device.
        scale: LoRA scale (alpha / r) of every expert.
        trained: How many of the last experts get gradients.
        shared_a: Hold one A [r, D_in] for all experts; every a_i must be that matrix.

    Returns:
        A pack with its own storage (values are copied).

    Raises:
        ValueError: No expert (use `PackedExperts.empty`), shapes, dtypes or `trained` do not fit together, or
            the A that should be shared are not equal.
    """
    if not a or len(a) != len(b):
        raise ValueError(f"a and b must be equally long and not empty, got {len(a)} and {len(b)} experts")
    for a_i, b_i in zip(a, b, strict=True):
        check_expert(a_i, b_i, a[0].shape[-1], b[0].shape[0])
        if a_i.dtype != a[0].dtype or a_i.device != a[0].device:
            raise ValueError(
                f"experts must share dtype and device, got {a_i.dtype} on {a_i.device} "
                f"beside {a[0].dtype} on {a[0].device}"
            )
    ranks = [a_i.shape[0] for a_i in a]
    packed_bt = torch.cat([b_i.detach().t() for b_i in b])
    if shared_a:
        other = [i for i, a_i in enumerate(a) if not (a_i.is_set_to(a[0]) or torch.equal(a_i, a[0]))]
        if other:
            raise ValueError(f"a must be one matrix for all experts with shared_a, got others at {other}")
        return PackedExperts(a[0].detach().clone(), packed_bt, ranks, scale, trained, shared_a=True)
    return PackedExperts(torch.cat([a_i.detach() for a_i in a]), packed_bt, ranks, scale, trained)
