"""What ships: every launch that the operations make, over sizes of real models, on "meta" tensors.

The expert layer is recorded: it runs forward and backward with `Launch.run` replaced by a recorder and
`architecture` by the one asked for, so tiles, order and flags are those of a GPU and nothing is listed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, product
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from cram_kernels.centroid_gates.kernels import launches as gates_launches
from cram_kernels.expert_lora import routed_triton, tiles, wide
from cram_kernels.expert_lora import triton as expert_lora
from cram_kernels.expert_lora.decode import PLANES_TOKENS
from cram_kernels.expert_lora.dropout import seed_tensor
from cram_kernels.launch import Launch
from cram_kernels.packing import PackedExperts, pack_experts
from tests.cram_kernels.aot import Case, Excuse

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (x, experts): every precision, and float32 masters on a half-precision base.
DTYPES = ((BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32))
WIDTHS = (2048, 3584, 4096, 11008, 14336, 18944)
TOKENS = (1, 16, 64, 512, 2048, 8192)
RANKS = (16, 43, 64, 78, 128, 256)
# What cannot load by 16 bytes: an expert's rows start anywhere, and the dropout bits are not loaded at all.
NARROW = ("_expert_sums", "_dropout_bits")
# Loops whose operands come from memory: SHRINK's, and the two over the query.
PIPELINED = {"_shrink": 1, "_stream": 2, "_routed_shrink": 3, "_gates": 2}
# The streams that the benchmark and the product run: ten and nine experts of uneven ranks.
STREAMS = {78: (10, 9, 10, 8, 7, 10, 6, 9, 5, 4), 43: (10, 4, 5, 4, 4, 4, 4, 4, 4), 512: (8,) * 64}
# A row of `tiles.STREAM`, which has none: what runs if the experiments say so.
STREAM_ROW = (64, 16, 64, 128, 2, 4, 3)
# Why the instructions of a launch may take longer than its bytes on an H200.
FLOAT32 = Excuse("products in float32 run on the scalar units")
TWO_BRANCHES = Excuse("its programs take one of two branches, and the text holds both")
SKIPPED = Excuse("a block without a token of the segment is skipped, and the bound counts it")
HASHED = Excuse("an integer hash for every two elements, once a step instead of three times")
GATES_EXCUSED = {
    "_gates": Excuse("distances in float32 on the scalar units: on tensor cores their terms would cancel"),
    "_query_gradient": Excuse("as the distances"),
    "_centroid_gradient": Excuse(
        "programs of frozen rows only write zeros, and the bound counts them as trained"
    ),
}
PLANES = Excuse("each block of columns adds up to seven planes, in place of a launch that folds them")
MASKED = Excuse("the mask is selected in registers, once for each tile of 128 packed rows")
FOUR_STEPS = Excuse(
    "four steps over 256 packed rows issue as long as its bytes take, 4 % longer from newer compilers", 1.05
)
EIGHT_STEPS = Excuse(
    "every 64 packed rows are one more step over the same bytes of y: eight steps issue 12 % longer", 1.15
)
# (L, S, E, D_q, trained) for each tile of the gates.
GATES = (
    (1, 3, 2, 768, 1),
    (32, 16, 8, 768, 1),
    (32, 16, 10, 768, 4),
    (28, 8, 24, 768, 1),
    (64, 64, 64, 1024, 1),
    (32, 4, 128, 512, 128),
    (32, 4, 200, 768, 8),
    (32, 4, 300, 768, 1),
)


@dataclass(frozen=True)
class Call:
    """One call of the expert layer, forward and perhaps backward."""

    tokens: int
    train: bool
    dtype: torch.dtype = BF16
    expert_dtype: torch.dtype = BF16
    width: int = 4096
    rank: int = 128
    dropout: float = 0.0
    mapped: bool = False
    stack: int = 1
    routed: bool = False
    # Base products in one launch with SHRINK; one product over [x | U].
    streamed: bool = False
    wide: bool = False
    samples: int = 8
    # Where the gates start in their storage.
    offset: int = 0
    seed: int = 1234

    @property
    def label(self) -> str:
        """Precision and shape, for a reader."""
        extra = f"{' train' * self.train}{' dropout' * bool(self.dropout)}{' mapped' * self.mapped}"
        extra += " routed" * self.routed + " streamed" * self.streamed + " wide" * self.wide
        names = f"{str(self.dtype)[6:]}/{str(self.expert_dtype)[6:]}"
        return f"{names} T={self.tokens} D={self.width} R={self.rank} x{self.stack}{extra}"


def shipped(arch: int, full: bool) -> Iterator[Case]:
    """Yield the cases of an architecture: the fewest that meet every row of the tables, or all sizes too."""
    for call in chain(chosen(arch), product_of_sizes() if full else ()):
        large = ("_shrink", "_routed_shrink", "_expand") if call.tokens >= 2048 else ()
        yield Case(call.label, tuple(recorded(call, arch)), NARROW, large, excuses(call), PIPELINED)
    sizes = GATES if full or arch == 90 else GATES[1:2]
    for size, masked in product(sizes, (False, True) if full else (True,)):
        for launch in gates_launches(*size, masked=masked):
            label = f"gates {size}{' members' * masked}"
            yield Case(label, (launch,), NARROW, excused=GATES_EXCUSED, pipelined=PIPELINED)


def excuses(call: Call) -> dict[str, Excuse]:
    """Return the kernels of a call whose instructions may take longer than their bytes, with the reason."""
    found = {"_dropout_bits": HASHED, "_routed_shrink": TWO_BRANCHES}
    if call.train and call.rank >= 256:
        found["_expand"] = FOUR_STEPS if call.rank == 256 else EIGHT_STEPS
    if call.dtype == FP32:
        found |= {"_shrink": FLOAT32, "_expand": FLOAT32, "_gram": FLOAT32}
    if not call.train and call.tokens <= PLANES_TOKENS:
        found["_expand"] = found["_join"] = PLANES
    if call.mapped:
        found["_segment_sums"] = SKIPPED
    if call.dropout:
        found["_shrink"] = MASKED
    return found


def product_of_sizes() -> Iterator[Call]:
    """Yield every precision and size with and without training, and each option at every T."""
    for tokens, train, (dtype, expert), width, rank in product(
        table_tokens(), (False, True), DTYPES, WIDTHS, RANKS
    ):
        yield Call(tokens, train, dtype, expert, width, rank)
    options: tuple[dict[str, Any], ...] = (
        {"dropout": 0.05},
        {"mapped": True},
        {"routed": True},
        {"stack": 2},
        {"stack": 3, "dropout": 0.05, "mapped": True},
    )
    for tokens, train, rank, option in product(table_tokens(), (False, True), (100, 256), options):
        yield Call(tokens, train, rank=rank, **option)


def chosen(arch: int) -> Iterator[Call]:
    """Yield few calls that meet every row of the tables, and each option once."""
    for tokens in table_tokens():
        yield Call(tokens, train=True)
    yield Call(16, train=False, rank=78)
    yield Call(16, train=False, rank=78, routed=True)
    yield Call(16, train=False, rank=78, streamed=True)
    yield Call(64, train=True, dtype=FP32, expert_dtype=FP32)
    yield Call(2048, train=True, dtype=FP32, expert_dtype=FP32)
    if arch == 90:
        yield Call(2048, train=True, rank=78, routed=True)
        yield Call(16, train=False, expert_dtype=FP32)
        yield Call(16, train=False, dtype=FP32, expert_dtype=FP32)
        yield Call(2048, train=True, dtype=FP16, expert_dtype=FP16)
        yield Call(1, train=False, width=18944, rank=43)
        yield Call(16, train=False, rank=256, stack=3, mapped=True)
        yield Call(16, train=False, rank=78, stack=3)
        yield Call(16, train=False, rank=256, stack=3, mapped=True, streamed=True)
        yield Call(8192, train=False, rank=78, wide=True)
        yield Call(8192, train=True, rank=512)
        yield Call(1024, train=True, rank=43)
        yield Call(8192, train=True, rank=78)
        yield Call(8192, train=False, rank=78, dropout=0.05)
        yield Call(2048, train=True, width=3584, rank=78, dropout=0.05, mapped=True)
        yield Call(8192, train=True, rank=256, stack=3)
        yield Call(8192, train=True, rank=256, dropout=0.05, mapped=True)
        yield Call(512, train=True, rank=256, dropout=0.05, mapped=True)


def alike(arch: int, full: bool) -> Iterator[Case]:
    """Yield calls that must share their kernels: they differ in what changes from request to request.

    Samples, where a layer's gates start in memory (layers of ten experts start on 8 bytes), ranks within one
    pitch, the trained rows and the dropout seed.
    """
    usual: dict[str, Any] = {"rank": 78}
    for train, tokens in ((False, 32), (True, 2048)):
        for change in ({}, {"samples": 1}, {"samples": 2}, {"samples": 16}, {"offset": 10}, {"offset": 1}):
            for seed in (1234, 0, 2**40 + 7) if train else (1234,):
                options = usual | change | {"seed": seed, "dropout": 0.05 * train}
                yield Case(f"{change} {seed}", tuple(recorded(Call(tokens, train, **options), arch)))
        options = usual | {"rank": 80, "dropout": 0.05 * train}
        yield Case("80 rows", tuple(recorded(Call(tokens, train, **options), arch)))


def table_tokens() -> list[int]:
    """Return the sizes asked for, and one in each bucket of the tables of tiles."""
    tables = (tiles.SHRINK, tiles.EXPAND, tiles.GRAM)
    limits = {row[0] for table in tables for rows in table.values() for row in rows if row[0] is not None}
    return sorted({*TOKENS, *limits, 2 * max(limits)})


def recorded(call: Call, arch: int) -> list[Launch]:
    """Return the launches of one call in order."""
    x = empty(call.tokens, call.width, dtype=call.dtype).requires_grad_(call.train)
    weight = empty(call.width, call.width, dtype=call.dtype)
    layers = [(weight, None, packed(call)) for _ in range(call.stack)]
    count, samples = len(ranks_of(call)), min(call.tokens, call.samples)
    gates = (
        empty(samples * count + call.offset)[call.offset :].view(samples, count).requires_grad_(call.train)
    )
    segments = empty(call.tokens, dtype=torch.int64) if call.mapped else None
    tile = tiles.streamed(STREAM_ROW, call.width) if call.streamed else None
    mask = (call.dropout, seed_tensor(call.seed) if call.dropout else None)
    with (
        recording(arch) as launches,
        torch.set_grad_enabled(call.train),
        mock.patch.object(tiles, "stream_tile", lambda *_: tile),
    ):
        if call.wide:
            (_, bias, experts), outputs = layers[0], []
            rows = empty(call.tokens, call.width + wide.room(experts), dtype=call.dtype)
            wide.wide_expert_lora(rows, wide.widened(weight, experts), bias, experts, gates, segments)
        elif call.routed:
            query, centroids = empty(samples, 768), empty(count, 768)
            route = (query.requires_grad_(call.train), centroids, 1.0, None)
            outputs = [routed_triton.routed_expert_lora(x, *layers[0], *route, segments, *mask)]
        else:
            outputs = expert_lora.stacked_expert_lora(x, layers, gates, segments, *mask)
        if call.train:
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    return launches


def ranks_of(call: Call) -> tuple[int, ...]:
    """Return uneven ranks that add up to the call's: a stream's, or four."""
    return STREAMS.get(call.rank, (call.rank - 3 * (call.rank // 4), *[call.rank // 4] * 3))


def packed(call: Call) -> PackedExperts:
    """Return experts whose ranks add up to the call's; the last is trained where it trains."""
    ranks = ranks_of(call)
    a = [empty(rank, call.width, dtype=call.expert_dtype) for rank in ranks]
    b = [empty(call.width, rank, dtype=call.expert_dtype) for rank in ranks]
    return pack_experts(a, b, scale=2.0, trained=int(call.train))


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Return a tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


@contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Collect launches instead of running them, as if every device were of one architecture."""
    launches: list[Launch] = []
    with (
        mock.patch.object(Launch, "run", lambda launch: launches.append(launch)),
        # No call is kept for the next one: it would not be described again.
        mock.patch.object(Launch, "prepared", lambda launch, tensors: None),
        mock.patch.object(expert_lora, "architecture", lambda device: arch),
        mock.patch.object(routed_triton, "architecture", lambda device: arch),
        mock.patch.object(wide, "architecture", lambda device: arch),
        # The "meta" device has no autocast to turn off.
        mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()),
    ):
        yield launches
