"""Questions whose answers decide how the layer is put together on a GPU, asked with the library's products.

Sizes are those of one square linear of LLaVA-1.5-7B with the experts of TriGap. All ways of a size take turns
in one process, each as a graph that walks through buffers which no cache holds. A way that gives wrong values
or fails says why and costs the others nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine, truth
from benchmarks.cases import Case
from benchmarks.ours import two_ops
from benchmarks.problem import Problem, make, rotation
from benchmarks.report import duration
from benchmarks.suite import failures
from benchmarks.timing import Limits, Step, interleaved, sampler

PROMPT, DECODE = (8192, 4096, 1024), (16, 1, 8, 64)
LIMITS = {"full": Limits(0.1, 7, 25, sets=8), "toy": Limits(0.0, 1, 1, sets=2)}
SIZES = {"full": ("LLaVA-1.5-7B", "trigap", "bfloat16"), "toy": ("toy", "toy", "float32")}
PITCH = 16  # packed rows are padded to a multiple of it
# Rows that `tiles.STREAM` might have. By arithmetic at width 4096 and 80 packed rows: (64 + 2) x 2 programs,
# one for each of 132 multiprocessors, with four loads of 16 kB in flight; (128 + 3) x 1; (32 + 1) x 4. With
# fewer rows a program would read as much of x through the L2 cache as of W.
STREAM_ROWS = (
    (16, 16, 64, 128, 2, 4, 4),
    (16, 16, 32, 256, 1, 4, 3),
    (16, 16, 128, 128, 4, 8, 3),
    (64, 64, 64, 128, 2, 4, 3),
    (64, 64, 128, 64, 4, 8, 4),
)
# Name -> whether the base product comes last, with beta = 1, and tokens at a time.
ORDERS = {
    "base first": (False, None),
    "base first in chunks of 4096": (False, 4096),
    "base first in chunks of 2048": (False, 2048),
    "base last": (True, None),
    "base last in chunks of 4096": (True, 4096),
}


@dataclass(frozen=True)
class Way:
    """One way to compute something.

    Attributes:
        build: Makes what is timed from a problem.
        expected: What it must give, in float64; None where its result is not one of a layer.
        tokens: The sizes at which it is asked about.
        needs_cuda: What it cannot do on a CPU, or "".
        ours: Whether it launches kernels of this package.
    """

    build: Callable[[Problem], Step]
    expected: Callable[[Problem], Tensor] | None = None
    tokens: tuple[int, ...] = (*PROMPT, *DECODE)
    needs_cuda: str = ""
    ours: bool = False


@dataclass(frozen=True)
class Packed:
    """Factors padded to whole blocks of rows, a result to write, and U [T, pitch]."""

    a: Tensor
    bt: Tensor
    u: Tensor
    y: Tensor

    @classmethod
    def of(cls, p: Problem) -> Packed:
        """Pad the factors of a problem."""
        missing = -len(p.packed_a) % PITCH
        a, bt = F.pad(p.packed_a, (0, 0, 0, missing)), F.pad(p.packed_bt, (0, 0, 0, missing))
        return cls(a, bt, F.linear(p.x, a), torch.empty_like(p.dy))


def base_alone(p: Problem) -> Tensor:
    """X W^T in float64."""
    return p.x.double() @ p.weight.double().t()


def base_and_experts(p: Problem) -> Tensor:
    """X W^T + U Bt in float64, from the same U."""
    k = Packed.of(p)
    return base_alone(p) + k.u.double() @ k.bt.double()


def base_then_expand(p: Problem) -> Step:
    """The base product, then U Bt added in place: two more passes over y."""
    k = Packed.of(p)
    return lambda: F.linear(p.x, p.weight).addmm_(k.u, k.bt)


def expand_then_base(p: Problem) -> Step:
    """U Bt written once, then the base product with beta = 1: its reading of y hides behind the products."""
    k = Packed.of(p)
    return lambda: torch.mm(k.u, k.bt, out=k.y).addmm_(p.x, p.weight.t())


def one_product(p: Problem, rows: int) -> Step:
    """[x | U] [W | B] as one product, `rows` deeper than the base product."""
    wide = torch.cat([p.x, p.x[:, :rows]], 1), torch.cat([p.weight, p.weight[:, :rows]], 1)
    return lambda: F.linear(*wide)


def in_chunks(p: Problem, tokens: int) -> Step:
    """Base and U Bt, so many tokens at a time, so that y is still in the cache when it is added to."""
    k = Packed.of(p)

    def step() -> Tensor:
        for start in range(0, len(p.x), tokens):
            rows = slice(start, start + tokens)
            torch.mm(p.x[rows], p.weight.t(), out=k.y[rows])
            k.y[rows].addmm_(k.u[rows], k.bt)
        return k.y

    return step


def on_two_streams(p: Problem) -> Step:
    """The base product beside x A^T: both need x alone."""
    k, other = Packed.of(p), torch.cuda.Stream()

    def step() -> Tensor:
        main = torch.cuda.current_stream()
        other.wait_stream(main)
        with torch.cuda.stream(other):
            F.linear(p.x, k.a)
        y = F.linear(p.x, p.weight)
        main.wait_stream(other)
        return y

    return step


def in_one_launch(p: Problem, row: Any) -> Step:
    """The package's decode step with W and A in one launch, by a row that `tiles.STREAM` might have."""
    from cram_kernels.expert_lora import tiles

    tile, layer = tiles.streamed(row, p.x.shape[1]), two_ops(p, "triton")

    def step() -> Any:
        with mock.patch.object(tiles, "stream_tile", lambda *_: tile):
            return layer.forward()

    return step


def in_order(p: Problem, base_last: bool, chunk: int | None = None) -> Step:
    """The package's layer with the base product and EXPAND in an order of choice."""
    from cram_kernels.expert_lora import tiles

    order, layer = tiles.Order(chunk, base_last), two_ops(p, "triton")

    def step() -> Any:
        with mock.patch.object(tiles, "order", lambda *_: order):
            return layer.forward()

    return step


WAYS: dict[str, Way] = {
    "base": Way(lambda p: lambda: F.linear(p.x, p.weight), base_alone),
    "x A^T by the library": Way(lambda p: (k := Packed.of(p)) and (lambda: F.linear(p.x, k.a))),
    "y += U Bt by the library": Way(lambda p: (k := Packed.of(p)) and (lambda: k.y.addmm_(k.u, k.bt))),
    "base, then expand": Way(base_then_expand, base_and_experts),
    "expand, then base with beta 1": Way(expand_then_base, base_and_experts),
    "one product, 80 deeper": Way(lambda p: one_product(p, 80)),
    "one product, 128 deeper": Way(lambda p: one_product(p, 128)),
    "in chunks of 4096": Way(lambda p: in_chunks(p, 4096), base_and_experts, (8192,)),
    "in chunks of 2048": Way(lambda p: in_chunks(p, 2048), base_and_experts, (8192, 4096)),
    "base beside x A^T on a second stream": Way(on_two_streams, base_alone, needs_cuda="streams"),
    "layer": Way(lambda p: two_ops(p, "triton").forward, lambda p: truth.experts(p)["y"], DECODE, ours=True),
    **{
        f"layer, W and A in one launch, {row[1]} x {row[2]}, split {row[4]}": Way(
            lambda p, row=row: in_one_launch(p, row),
            lambda p: truth.experts(p)["y"],
            tuple(tokens for tokens in DECODE if (tokens > 16) == (row[1] > 16)),
            ours=True,
        )
        for row in STREAM_ROWS
    },
    **{
        f"layer, {name}": Way(
            lambda p, order=order: in_order(p, *order), lambda p: truth.experts(p)["y"], PROMPT, ours=True
        )
        for name, order in ORDERS.items()
    },
}


def case_of(size: str, tokens: int) -> Case:
    """Return the case of a size."""
    model, stream, dtype = SIZES[size]
    segments = 8 if tokens >= 1024 else 1
    return Case("forward", model, "q", stream, tokens, segments, dtype)


def calls(device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the ways that launch kernels of this package, each with a call."""
    for tokens in (*PROMPT, *DECODE):
        p = make(case_of("full", tokens), device)
        for name, way in WAYS.items():
            if way.ours and tokens in way.tokens:
                yield f"experiments {name} T{tokens}", torch.no_grad()(way.build(p))


def measure(size: str, tokens: int, asked: int, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for every way that is asked about at `asked` tokens, measured at `tokens`."""
    limits, rows = LIMITS[size], {}
    problems = rotation(case_of(size, tokens), device, machine.cache_bytes(device), limits.sets)
    samplers = {}
    with torch.no_grad():
        for name, way in WAYS.items():
            if asked not in way.tokens:
                continue
            rows[name] = {"name": name, "tokens": tokens}
            if device.type != "cuda" and way.needs_cuda:
                rows[name]["skipped"] = f"no CUDA device, which has {way.needs_cuda}"
                continue
            try:
                steps = [way.build(p) for p in problems]
                if way.expected is not None:
                    with torch.enable_grad():
                        wanted = {"y": way.expected(problems[0])}
                    limit = truth.LIMITS[problems[0].case.dtype]
                    rows[name]["error"] = truth.error({"y": steps[0]()}, wanted, limit)
                samplers[name] = sampler(steps, device, captured=True)
            except failures() as error:
                rows[name]["failed"] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        for name, timing in interleaved(samplers, device, limits).items():
            rows[name] |= asdict(timing)
    return list(rows.values())


def line(row: dict[str, Any]) -> str:
    """One row on one line."""
    what = duration(row["median_us"]) if "median_us" in row else row.get("failed") or row["skipped"]
    return f"T {row['tokens']}: {row['name']}: {what}"


def main(argv: Sequence[str] | None = None) -> int:
    """Answer; writes experiments.json after every size; returns 1 if a way failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks experiments", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no size after so long")
    parser.add_argument("--toy", action="store_true", help="tiny shapes: whether it runs, not how fast")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of experiments.json")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deadline = time.monotonic() + arguments.seconds
    found: dict[str, Any] = {"environment": machine.environment(device), "rows": []}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for asked in (PROMPT[0], DECODE[0], DECODE[-1]) if arguments.toy else (*PROMPT, *DECODE):
        if time.monotonic() > deadline:
            break
        rows = measure("toy", 32, asked, device) if arguments.toy else measure("full", asked, asked, device)
        found["rows"] += rows
        (arguments.out / "experiments.json").write_text(json.dumps(found, indent=1) + "\n")
        print("\n".join(map(line, rows)), flush=True)
    return int(any("failed" in row for row in found["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
