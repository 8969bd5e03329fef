"""What a call costs the host: the whole path of a launch, with a driver that launches nothing.

    python -m tests.cram_kernels.host            microseconds per call of the public functions
    python -m tests.cram_kernels.host --json     what calls do in order: launches, operations; compilations

Triton's JIT, its caches and the package's own Python run as on a GPU with kernels compiled for sm_90; only
the launcher, which takes 3.4 us in C, is replaced by a function that notes its name. Tensors are tiny and lie
on the CPU. For times, the base product is a tensor that is there already.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import cycle
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cram_kernels import (
    PackedExperts,
    expert_lora,
    pack_experts,
    routed_expert_lora,
    stacked_expert_lora,
)
from cram_kernels.launch import Launch
from tests.cram_kernels.aot_driver import Target

LAUNCHER_US = 3.4
WIDTH, RANKS = 64, (10, 9, 10, 8, 7, 10, 6, 9, 5, 4)
# Kernels launched and operations called, in their order; what the launcher of each kernel got last.
SEEN: list[str] = []
GIVEN: dict[str, tuple[Any, ...]] = {}


class NullDriver(Target):
    """Loads no kernel and launches none: counts launches by the kernel's name."""

    def __init__(self, arch: int) -> None:
        super().__init__(arch)
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 2, 32, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 227 * 1024},
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return what stands in for the launcher of one compiled kernel."""
        name = metadata.name

        def launch(*arguments: Any) -> None:
            SEEN.append(name)
            GIVEN[name] = arguments

        return launch


@contextmanager
def null_device() -> Iterator[Any]:
    """Yield the implementation, with CPU tensors taken for tensors of an sm_90 device."""
    from triton.runtime.driver import driver

    from cram_kernels.expert_lora import routed_triton
    from cram_kernels.expert_lora import triton as implementation

    driver.set_active(NullDriver(90))
    with (
        mock.patch.object(implementation, "architecture", lambda device: 90),
        mock.patch.object(routed_triton, "architecture", lambda device: 90),
    ):
        yield implementation


def inputs(tokens: int = 8, layers: int = 1, trained: int = 0) -> tuple[Tensor, list[Any], Tensor]:
    """Return x, layers and gates of a tiny call."""

    def pack() -> PackedExperts:
        a = [torch.randn(rank, WIDTH, dtype=torch.bfloat16) for rank in RANKS]
        return pack_experts(a, [each.t().contiguous() for each in a], 2.0, trained)

    weights = torch.randn(layers, WIDTH, WIDTH, dtype=torch.bfloat16)
    x = torch.randn(tokens, WIDTH, dtype=torch.bfloat16)
    return x, [(weight, None, pack()) for weight in weights], torch.rand(1, len(RANKS))


def microseconds(call: Callable[[], Any], calls: int = 300, rounds: int = 31) -> float:
    """Return the median over some rounds of a call's mean time on this thread, without garbage collection."""
    call()
    found = timeit.repeat(call, timer=time.thread_time, repeat=rounds, number=calls)
    return statistics.median(found) / calls * 1e6


class Recorder(TorchDispatchMode):
    """Notes the operations that reach the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        SEEN.append(str(function.overloadpacket))
        return function(*args, **(kwargs or {}))


def third(call: Callable[[Tensor, Tensor], Any], x: Tensor, gates: Tensor) -> dict[str, Any]:
    """Return what the third call of a kind does, on new tensors."""
    from triton.runtime.jit import JITFunction

    for _ in range(2):
        call(x, gates)
    x, gates = x.clone(), gates.clone()
    SEEN.clear()
    asked: list[Any] = []
    described: list[Launch] = []
    original = Launch.run
    with (
        mock.patch.object(JITFunction, "run", lambda *a, **k: asked.append(a)),
        mock.patch.object(Launch, "run", lambda launch: described.append(launch) or original(launch)),
        Recorder(),
    ):
        call(x, gates)
    return {"seen": SEEN.copy(), "asked": len(asked), "described": len(described)}


def decoding(implementation: Any, layers: int, strided: bool = False) -> dict[str, Any]:
    """Return what a decode call does; `strided`: the factors B must be copied first."""
    x, stack, gates = inputs(8, layers)
    for _, _, pack in stack if strided else ():
        pack.bt = pack.bt.t().contiguous().t()
    return third(lambda x, g: implementation.stacked_expert_lora(x, stack, g, None, 0.0, 0), x, gates)


def repeated(implementation: Any) -> dict[str, Any]:
    """Return how many packs a call of three reads whose kind was first seen with one pack three times."""
    # No other call here has so many tokens.
    x, stack, gates = inputs(9, 3)
    for layers in ([stack[0]] * 3, stack):
        implementation.stacked_expert_lora(x, layers, gates, None, 0.0, 0)
    tuples = [value for value in GIVEN["_shrink"] if isinstance(value, tuple) and len(value) == 3]
    factors = next(value for value in tuples if all(isinstance(item, Tensor) for item in value))
    return {"packs": len({item.data_ptr() for item in factors})}


def routing(strided: bool = False) -> dict[str, Any]:
    """Return what a decode call does that computes its own gates."""
    from cram_kernels.expert_lora.routed_triton import routed_expert_lora

    x, ((weight, bias, pack),), _ = inputs(8)
    if strided:
        pack.bt = pack.bt.t().contiguous().t()
    centroids = torch.randn(len(RANKS), 32)
    return third(
        lambda x, query: routed_expert_lora(x, weight, bias, pack, query, centroids, 1.0, None, None, 0.0, 0),
        x,
        torch.randn(1, 32),
    )


def streaming(implementation: Any) -> dict[str, Any]:
    """Return what a decode call of a stack does whose base products are part of its launches."""
    from cram_kernels.expert_lora import tiles

    tile = tiles.streamed((64, 16, 64, 128, 2, 4, 3), WIDTH)
    with mock.patch.object(tiles, "stream_tile", lambda *_: tile):
        return decoding(implementation, 3)


def training(implementation: Any) -> dict[str, Any]:
    """Return what the second training step of a kind launches, and how often the JIT was asked."""
    from triton.runtime.jit import JITFunction

    x, stack, gates = inputs(96, 1, trained=1)
    gates.requires_grad_()

    def step() -> None:
        implementation.stacked_expert_lora(x, stack, gates, None, 0.1, 3)[0].sum().backward()

    step()
    SEEN.clear()
    asked: list[Any] = []
    with mock.patch.object(JITFunction, "run", lambda *a, **k: asked.append(a)):
        step()
    return {"seen": SEEN.copy(), "asked": len(asked)}


@torch.no_grad()
def everything(implementation: Any) -> dict[str, dict[str, Any]]:
    """Return what each kind of call does, by name."""
    found = {f"linear{' strided' * s}": decoding(implementation, 1, s) for s in (False, True)}
    found |= {f"stack{' strided' * s}": decoding(implementation, 3, s) for s in (False, True)}
    found |= {f"routed{' strided' * s}": routing(s) for s in (False, True)}
    found["repeated"] = repeated(implementation)
    found["streamed"] = streaming(implementation)
    with torch.enable_grad():
        found["training"] = training(implementation)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print what each call costs beyond its base linears, or what it does."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.cram_kernels.host", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--json", action="store_true", help="print launches and questions to the compiler")
    arguments = parser.parse_args(argv)
    with null_device() as implementation:
        if arguments.json:
            print(json.dumps(everything(implementation)))
            return
        report(implementation)


@contextmanager
def public_functions() -> Iterator[None]:
    """Let the public functions take CPU tensors for "triton"."""
    modules = (f"cram_kernels.expert_lora.{name}" for name in ("api", "stacked", "routed"))
    served = [
        mock.patch.dict(import_module(name).OP.missing, {"triton": lambda *_: None}) for name in modules
    ]
    with served[0], served[1], served[2]:
        yield


@torch.no_grad()
def report(implementation: Any) -> None:
    """Print this thread's time for decode calls without their base products."""
    x, stack, gates = inputs(layers=3)
    weight, bias, pack = stack[0]
    route: Any = torch.randn(1, 32), torch.randn(len(RANKS), 32), 1.0
    calls: dict[str, Callable[[], Any]] = {
        "linear": lambda: expert_lora(x, weight, bias, pack, gates, impl="triton"),
        "stack of three": lambda: stacked_expert_lora(x, stack, gates, impl="triton"),
        "linear that routes": lambda: routed_expert_lora(x, weight, bias, pack, *route, impl="triton"),
    }
    made = cycle([F.linear(x, weight) for _ in stack])
    places = [import_module(f"cram_kernels.expert_lora.{name}") for name in ("decode", "routed_decode")]
    products = [mock.patch.object(place, "linear", lambda *_: next(made)) for place in places]
    with products[0], products[1], public_functions():
        for name, call in calls.items():
            python = microseconds(call)
            total = python + 2 * LAUNCHER_US
            print(f"{name}: {python:.1f} us, with two launches of {LAUNCHER_US} us {total:.1f} us")


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("TRITON_INTERPRET must be 0 or unset")
    main()
