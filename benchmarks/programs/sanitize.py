"""Every operation of the package once, forward and backward, on small odd shapes, against float64.

Run it under compute-sanitizer, which sees a single wrong access in a launch of any size:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks sanitize
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from benchmarks import ours, truth
from benchmarks.candidates import Candidate, taking_part
from benchmarks.cases import GATE_OPS, LAYER_OPS, PART_OPS, STACKED_OPS, STREAMS, Case
from benchmarks.problem import SCALE, Problem, make
from benchmarks.programs.experiments import STREAM_ROWS, in_one_launch
from benchmarks.suite import failures, passed
from cram_kernels import expert_lora, orthogonality_penalty, pack_experts
from cram_kernels.dispatch import IMPLS

# One token, one token more than a block, more than any block of the decode path, and several blocks.
TOKENS = (1, 17, 65, 300)


def checked(dtype: str) -> Iterator[tuple[Case, str, Candidate]]:
    """Yield every operation and size, with each way of this package to compute it."""
    for op in (*LAYER_OPS, *STACKED_OPS, *GATE_OPS, *PART_OPS):
        for tokens in TOKENS if op not in GATE_OPS else (3,):
            segments = tokens if op in ("decode", *GATE_OPS) else 1
            projection = "" if op in GATE_OPS else "q+k+v" if op in STACKED_OPS else "k"
            case = Case(op, "toy", projection, "toy", tokens, segments, dtype)
            for name, candidate in taking_part(op).items():
                if candidate.ours:
                    yield case, name, candidate


def calls(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what launches kernels of Triton on a GPU, each with a call."""
    for case, name, candidate in checked("bfloat16"):
        if "triton" in name:
            p = make(case, device)
            yield f"sanitize {case.name}", partial(truth.results, p, candidate.build(p))
    yield "sanitize dropout and segment map", partial(_dropped, device, "triton")
    yield "sanitize W and A in one launch", _streamed(device)[1]


def checks(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield name and check of every implementation that runs on the device."""
    # On a GPU these run PyTorch's own kernels, which take long to check.
    foreign = ("cram cpu", "cram cpu one-op", "cram cpu stacked") if device.type == "cuda" else ()
    for case, name, candidate in checked("bfloat16" if device.type == "cuda" else "float32"):
        if name not in foreign and candidate.missing(case, device) is None:
            yield f"{case.name} {name}", partial(_gated, candidate, case, device)
    if ours.missing("expert_lora", "triton", device, torch.bfloat16) is None:
        yield "W and A in one launch", partial(_streamed_right, device)
    for impl in IMPLS:
        if ours.missing("expert_lora", impl, device, torch.float32) is None:
            yield f"dropout and segment map, {impl}", partial(_dropped, device, impl)
        if ours.missing("orthogonality_penalty", impl, device, torch.float32) is None:
            yield f"penalty, {impl}", partial(_penalised, device, impl)


def _gated(candidate: Candidate, case: Case, device: torch.device) -> float:
    return passed(candidate, make(case, device))


def _streamed(device: torch.device, dtype: str = "bfloat16") -> tuple[Problem, Callable[[], torch.Tensor]]:
    """A decode step of two blocks of tokens, its base product in the launches of the experts."""
    p = make(Case("decode", "toy", "k", "toy", 17, 17, dtype), device)
    return p, torch.no_grad()(in_one_launch(p, STREAM_ROWS[0]))


def _streamed_right(device: torch.device, dtype: str = "bfloat16") -> float:
    p, step = _streamed(device, dtype)
    return truth.error({"y": step()}, truth.experts(p), truth.LIMITS[p.case.dtype])


def _dropped(device: torch.device, impl: str) -> None:
    """Dropout, a token map and three ranks, forward and backward."""
    p = make(Case("train", "toy", "k", "toy", 33, 1, "float32"), device)
    experts = pack_experts(p.a, p.b, SCALE, trained=1)
    gates = p.gates.repeat(2, 1).requires_grad_()
    segments = (torch.arange(33, device=device) * 7 % 2).int()
    x = p.x.clone().requires_grad_()
    y = expert_lora(x, p.weight, p.bias, experts, gates, segments, dropout=0.1, seed=3, impl=impl)
    y.backward(p.dy)


def _penalised(device: torch.device, impl: str) -> None:
    """Two modules of different widths, one without history."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    widths, ranks = ((48, 64), (32, 40)), (5, 3)
    hidden = [draw(3, d_in) for d_in, _ in widths]
    a = [draw(r, d_in).requires_grad_() for r, (d_in, _) in zip(ranks, widths, strict=True)]
    b = [draw(r, d_out).requires_grad_() for r, (_, d_out) in zip(ranks, widths, strict=True)]
    bases = [torch.linalg.qr(draw(64, 7))[0], draw(40, 0)]
    gamma = [draw(3).sigmoid() for _ in widths]
    orthogonality_penalty(hidden, a, b, bases, gamma, scale=SCALE, impl=impl).backward()


def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks. Return 1 if a check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks sanitize", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    count, failed = 0, []
    for name, check in checks(device):
        count += 1
        try:
            check()
            if device.type == "cuda":
                torch.cuda.synchronize()
        except failures() as error:
            failed.append(name)
            print(f"FAILED {name}: {error}", flush=True)
    print(f"{count - len(failed)} of {count} checks passed on {device} (experts' ranks {STREAMS['toy']})")
    return int(bool(failed))
