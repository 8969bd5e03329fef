"""What a call costs the host: the whole path of a launch, with a driver that launches nothing.

    python -m tests.cram_kernels.host            microseconds a call, for a linear and for a stack of three
    python -m tests.cram_kernels.host --json     what a decode call does: launches, operations, compilations

Triton's JIT, its caches and the package's own Python run as on a GPU with kernels compiled for sm_90; only
the launcher, which takes 3.4 us in C, is replaced by a function that counts. Tensors are tiny and lie on the
CPU: the base linear is timed alone and taken off.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cram_kernels import PackedExperts, pack_experts
from tests.cram_kernels.aot import _Target

LAUNCHER_US = 3.4
WIDTH, RANKS = 64, (10, 9, 10, 8, 7, 10, 6, 9, 5, 4)
LAUNCHED: Counter[str] = Counter()


class NullDriver(_Target):
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
            LAUNCHED[name] += 1

        return launch


@contextmanager
def null_device() -> Iterator[Any]:
    """Yield the implementation, with CPU tensors taken for tensors of an sm_90 device."""
    from triton.runtime.driver import driver

    from cram_kernels.expert_lora import triton as implementation

    driver.set_active(NullDriver(90))
    with mock.patch.object(implementation, "architecture", lambda device: 90):
        yield implementation


def inputs(tokens: int = 8, layers: int = 1, trained: int = 0) -> tuple[Tensor, list[Any], Tensor]:
    """Return x, layers and gates of a tiny call."""

    def pack() -> PackedExperts:
        a = [torch.randn(rank, WIDTH, dtype=torch.bfloat16) for rank in RANKS]
        return pack_experts(a, [each.t().contiguous() for each in a], 2.0, trained)

    weight = torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16)
    x = torch.randn(tokens, WIDTH, dtype=torch.bfloat16)
    return x, [(weight, None, pack()) for _ in range(layers)], torch.rand(1, len(RANKS))


def microseconds(call: Callable[[], Any], calls: int = 30, rounds: int = 300) -> float:
    """Return the least mean processor time of a call over some rounds."""
    call()
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            call()
        best = min(best, (time.process_time() - start) / calls)
    return best * 1e6


class Recorder(TorchDispatchMode):
    """Counts the operations that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


def decoding(implementation: Any, layers: int, tokens: int = 8) -> dict[str, Any]:
    """Return what the third decode call of a kind does, on new tensors."""
    from triton.runtime.jit import JITFunction

    x, stack, gates = inputs(tokens, layers)
    for _ in range(2):
        implementation.stacked_expert_lora(x, stack, gates, None, 0.0, 0)
    x, gates = x.clone(), gates.clone()
    LAUNCHED.clear()
    asked: list[Any] = []
    with mock.patch.object(JITFunction, "run", lambda *a, **k: asked.append(a)), Recorder() as recorder:
        implementation.stacked_expert_lora(x, stack, gates, None, 0.0, 0)
    return {"launches": dict(LAUNCHED), "operations": dict(recorder.seen), "asked": len(asked)}


def training(implementation: Any) -> dict[str, Any]:
    """Return the launches of the second training step of a kind, and how often the JIT was asked."""
    from triton.runtime.jit import JITFunction

    x, stack, gates = inputs(96, 1, trained=1)
    gates.requires_grad_()

    def step() -> None:
        implementation.stacked_expert_lora(x, stack, gates, None, 0.1, 3)[0].sum().backward()

    step()
    LAUNCHED.clear()
    asked: list[Any] = []
    with mock.patch.object(JITFunction, "run", lambda *a, **k: asked.append(a)):
        step()
    return {"launches": dict(LAUNCHED), "asked": len(asked)}


def main(argv: Sequence[str] | None = None) -> None:
    """Print what each call costs beyond its base linears, or what it does."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.cram_kernels.host", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--json", action="store_true", help="print launches and questions to the compiler")
    arguments = parser.parse_args(argv)
    with null_device() as implementation:
        if arguments.json:
            with torch.no_grad():
                found = {str(layers): decoding(implementation, layers) for layers in (1, 3)}
            print(json.dumps(found | {"training": training(implementation)}))
            return
        report(implementation)


@torch.no_grad()
def report(implementation: Any) -> None:
    """Print the processor time of decode calls."""
    for layers in (1, 3):
        x, stack, gates = inputs(layers=layers)

        def base(x: Tensor = x, stack: list[Any] = stack) -> Any:
            return [F.linear(x, weight) for weight, _, _ in stack]

        def call(x: Tensor = x, stack: list[Any] = stack, gates: Tensor = gates) -> Any:
            return implementation.stacked_expert_lora(x, stack, gates, None, 0.0, 0)

        python = microseconds(call) - microseconds(base)
        print(f"{layers} layers: {python:.1f} us, and {LAUNCHER_US} us a launch")


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("TRITON_INTERPRET must be 0 or unset")
    main()
