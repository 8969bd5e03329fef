"""Toy launches for the tests of `aot`: sound ones, and for every check one that must not pass it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from cram_kernels.launch import Launch
from tests.cram_kernels.aot import Case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@triton.jit(do_not_specialize=["tokens"])
def _toy(
    x,
    w,
    y,
    tokens,
    width,
    stride,
    offsets,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM: tl.constexpr,
    SIGNAL: tl.constexpr,
    WAIT: tl.constexpr,
    EARLY: tl.constexpr,
    HASH: tl.constexpr,
):
    if SIGNAL:
        gdc_launch_dependents()
    first = 0.0
    if EARLY:
        first = tl.load(x + tl.program_id(0)).to(tl.float32)
    if WAIT:
        gdc_wait()
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = offsets[0] + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_T, BLOCK_N), SUM)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x + rows[:, None] * stride + k[None, :], mask=rows[:, None] < tokens, other=0.0)
        w_tile = tl.load(w + columns[:, None] * width + k[None, :])
        if PRECISION == "none":
            total += tl.sum(x_tile[:, None, :].to(tl.float32) * w_tile[None, :, :].to(tl.float32), 2)
        else:
            total = tl.dot(x_tile, tl.trans(w_tile), total, input_precision=PRECISION, out_dtype=SUM)
    places = y + rows[:, None] * BLOCK_N + columns[None, :]
    if EARLY:
        total += first
    if HASH:
        total += ((rows * 0x7FEB352D) >> 16)[:, None].to(SUM)
    tl.store(places, total.to(y.dtype.element_ty), mask=rows[:, None] < tokens)


def toy(
    *,
    dtype: torch.dtype = BF16,
    tokens: int = 512,
    stride: int = 4096,
    offset: int = 0,
    offsets: tuple[int, int] = (0, 7),
    warps: int = 4,
    stages: int = 3,
    dependent: bool = False,
    moved_bytes: int = 10**9,
    steps: int = 1,
    **constants: Any,
) -> Launch:
    """Return a launch of Y = X W^T; X starts `offset` elements into its storage."""
    x = torch.empty(offset + tokens * stride, dtype=dtype, device="meta")[offset:]
    w, y = (
        torch.empty(64, 4096, dtype=dtype, device="meta"),
        torch.empty(tokens, 64, dtype=dtype, device="meta"),
    )
    usual = {"BLOCK_T": 64, "BLOCK_N": 64, "BLOCK_K": 64, "PRECISION": "ieee", "SUM": tl.float32}
    return Launch(
        kernel=_toy,
        grid=(triton.cdiv(tokens, 64),),
        arguments={
            "x": x,
            "w": w,
            "y": y,
            "tokens": tokens,
            "width": 4096,
            "stride": stride,
            "offsets": offsets,
        },
        constants={**usual, "SIGNAL": False, "WAIT": False, "EARLY": False, "HASH": False, **constants},
        warps=warps,
        stages=stages,
        cost=lambda: (moved_bytes, 1),
        steps=steps,
        late=("x",) if dependent else (),
    )


def sound(arch: int, full: bool) -> Iterator[Case]:
    """Yield cases in which nothing is wrong."""
    yield Case("half", (toy(),), wgmma=("_toy",))
    yield Case("scalar", (toy(dtype=FP32, BLOCK_K=16, stages=2),))
    yield Case("odd", (toy(tokens=1, stride=100, offset=1, offsets=(1, 16)),), narrow=("_toy",))
    if arch >= 90:
        yield Case("pair", (toy(SIGNAL=True, BLOCK_N=32), toy(WAIT=True, BLOCK_N=32, dependent=True)))
    yield Case("empty", (toy(tokens=0),))


def unsound(arch: int, full: bool) -> Iterator[Case]:
    """Yield one case for each check, labelled with a part of what the check says."""
    if arch < 90:
        yield Case("must be on sm_90", (toy(dependent=True),))
        yield Case("must compile, no griddepcontrol", (toy(WAIT=True),))
        return
    yield Case("must compile", (toy(BLOCK_K=8),))
    yield Case("must not spill", (toy(warps=1, BLOCK_N=128),))
    yield Case("shared memory must be", (toy(BLOCK_K=256, stages=5),))
    yield Case("must not be tf32", (toy(dtype=FP32, PRECISION="tf32"),))
    yield Case("sums must be float32", (toy(dtype=FP16, SUM=tl.float16),))
    yield Case("must use tensor cores", (toy(PRECISION="none", BLOCK_T=16, BLOCK_N=16, BLOCK_K=32),))
    yield Case("must use wgmma", (toy(BLOCK_T=32),), wgmma=("_toy",))
    yield Case("must be 16 bytes wide", (toy(stride=100),))
    yield Case("must be 16 bytes wide, pointer", (toy(offset=1),))
    yield Case("must wait iff", (toy(dependent=True, BLOCK_T=128),))
    yield Case("must wait iff, not dependent", (toy(WAIT=True, BLOCK_T=128),))
    yield Case("must not read ['x'] before it waits", (toy(WAIT=True, EARLY=True, dependent=True),))
    yield Case("issuing must hide", (toy(tokens=1 << 22, moved_bytes=0, steps=64, BLOCK_K=32),))
    yield Case("loops must load ahead", (toy(stages=1),), pipelined={"_toy": 1})
    yield Case("must be hashed by", (toy(HASH=True),))
    yield Case("must release iff", (toy(BLOCK_N=16), toy(WAIT=True, BLOCK_N=32, dependent=True)))
    yield Case("must release iff, nothing behind", (toy(SIGNAL=True, BLOCK_T=128),))
