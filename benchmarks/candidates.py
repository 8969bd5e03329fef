"""The candidates of each case: the baselines, and every implementation through the public functions."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch

from benchmarks import ours, truth
from benchmarks.baselines import linear, loops, packed, peft_lora, products
from benchmarks.cases import DTYPES, GATE_OPS, LAYER_OPS, PART_OPS, STACKED_OPS, Case
from benchmarks.parts import PARTS
from benchmarks.problem import Layer, Problem, leaf

INFERENCE = ("forward", "routed", "decode")
IMPLS = ("cpu", "triton", "native")

Missing = Callable[[Case, torch.device], str | None]


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case.

    Attributes:
        build: Makes the layer on a problem.
        ops: The operations whose cases it takes part in.
        truth: The right results, in float64.
        missing: The reason why it cannot run on this machine, or None.
        captured: True if it can run in a CUDA graph. Code that reads a device value on the host cannot.
        ours: True for this package's implementations.
    """

    build: Callable[[Problem], Layer]
    ops: tuple[str, ...] = LAYER_OPS
    truth: truth.Truth = truth.experts
    missing: Missing = lambda case, device: None
    captured: bool = True
    ours: bool = False


def _no_peft(case: Case, device: torch.device) -> str | None:
    return None if find_spec("peft") else "peft is not installed"


def _no_compiler(case: Case, device: torch.device) -> str | None:
    if not case.compiled:
        return "torch.compile is measured in selected cases only"
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return "torch.compile is turned off (TORCH_COMPILE_DISABLE)"
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "torch.compile needs a C++ compiler"
    return None


def _no_grouped(case: Case, device: torch.device) -> str | None:
    if device.type != "cuda" or DTYPES[case.dtype] is not torch.bfloat16:
        return "torch._grouped_mm takes bfloat16 on CUDA devices"
    return None


def _no_impl(op: str, impl: str, case: Case, device: torch.device) -> str | None:
    return ours.missing(op, impl, device, DTYPES[case.dtype])


def _ours() -> dict[str, Candidate]:
    """One candidate per implementation. The results name implementations that an op lacks."""
    found = {}
    for impl in IMPLS:
        missing = partial(_no_impl, "expert_lora", impl)
        captured = impl != "cpu"  # it looks for gates of 0 on the host
        found[f"cram {impl}"] = Candidate(
            partial(ours.two_ops, impl=impl), missing=missing, captured=captured, ours=True
        )
        found[f"cram {impl} stacked"] = Candidate(
            partial(ours.one_stack, impl=impl),
            STACKED_OPS,
            truth.stacked(truth.experts),
            partial(_no_impl, "stacked_expert_lora", impl),
            captured,
            ours=True,
        )
        found[f"cram {impl} one-op"] = Candidate(
            partial(ours.one_op, impl=impl),
            ("routed",),
            missing=partial(_no_impl, "routed_expert_lora", impl),
            captured=captured,
            ours=True,
        )
    found["cram triton wide"] = Candidate(
        ours.one_product, ("forward",), missing=partial(_no_impl, "expert_lora", "triton"), ours=True
    )
    for impl in ("reference", "triton", "native"):
        found[f"cram gates {impl}"] = Candidate(
            partial(ours.all_gates, impl=impl),
            GATE_OPS,
            truth.gates,
            partial(_no_impl, "centroid_gates", impl),
            ours=True,
        )
    return found


def _parts() -> dict[str, Candidate]:
    return {
        name: Candidate(
            build,
            PART_OPS,
            truth.parts,
            partial(_no_impl, "expert_lora", "triton") if name == "triton" else lambda case, device: None,
            ours=name == "triton",
        )
        for name, build in PARTS.items()
    }


# The others are measured against the first candidate of an operation.
CANDIDATES: dict[str, Candidate] = {
    "base": Candidate(linear.base, truth=truth.base),
    "released": Candidate(loops.released, captured=False),
    "loop": Candidate(loops.loop),
    "peft": Candidate(peft_lora.peft_lora, ("forward", "train", "decode"), truth.lora, _no_peft),
    "peft-9": Candidate(peft_lora.peft_rank9, ("forward", "train", "decode"), truth.lora9, _no_peft),
    "packed": Candidate(packed.packed),
    "compiled": Candidate(packed.compiled, missing=_no_compiler),
    "grouped": Candidate(products.grouped, INFERENCE, missing=_no_grouped),
    "concatenated": Candidate(products.concatenated, INFERENCE),
    "plain": Candidate(partial(ours.all_gates, impl=None), GATE_OPS, truth.gates),
    **_ours(),
    **_parts(),
}


def _stacked(candidate: Candidate) -> Candidate:
    """The candidate, called once per layer of the stack."""

    def build(p: Problem) -> Layer:
        x, gates = leaf(p.x), leaf(p.gates)
        layers = [candidate.build(replace(one, x=x, gates=gates, siblings=())) for one in p.stack]
        shared = {name: layers[0].leaves[name] for name in ("x", "gates") if name in layers[0].leaves}
        own = {f"{n}{i}": t for i, one in enumerate(layers) for n, t in one.leaves.items() if n not in shared}
        return Layer(lambda: tuple(one.forward() for one in layers), {**shared, **own})

    return replace(candidate, build=build, truth=truth.stacked(candidate.truth))


def taking_part(op: str) -> dict[str, Candidate]:
    """Return the candidates of an operation by name."""
    if op in STACKED_OPS:
        layers = {name: _stacked(c) for name, c in CANDIDATES.items() if "train" in c.ops}
        return {**layers, **{name: c for name, c in CANDIDATES.items() if op in c.ops}}
    return {name: candidate for name, candidate in CANDIDATES.items() if op in candidate.ops}
