"""The orthogonality penalty of a whole model, forward and backward, against the loops that it replaces.

    python -m benchmarks penalty                     128 modules of 512 x 512 on the CPU
    python -m benchmarks penalty --device cuda       128 modules of 4096 x 4096
    python -m benchmarks penalty --toy               tiny shapes: whether it runs, not how fast

All start from the means of the visual tokens, with a gradient for the expert and for gamma. Each must agree
with float64 before it is timed; then they take turns, so none finds its data in the cache. "released" is the
loop as the authors' code has it: an expert is a slot of a parameter padded to ten slots of the largest rank,
and dropout acts on every module's means by itself. "reference" is the leanest form of that loop. The byte
floor counts Q, A, Bt and H read once, dA and dBt written once, over a copy's bandwidth in the same run.
With --out, the lines also go to penalty.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine, ours
from cram_kernels import orthogonality_penalty

IMPLS = ("native", "cpu", "reference")
BATCH, RANK, WIDTH, SCALE = 8, 8, 64, 2.0
# Modules, and their width on each device.
MODULES, FEATURES = 128, {"cpu": 512, "cuda": 4096}
TOY_MODULES, TOY_FEATURES = 3, 80
SLOTS, DROPOUT = 10, 0.05
Step = Callable[[], tuple[Tensor, Sequence[Tensor]]]


@dataclass(frozen=True)
class Model:
    """The arguments of one call: per module means [B, D], experts [r, D], bases [D, k]; and gamma [M, B]."""

    hidden: list[Tensor]
    a: list[Tensor]
    bt: list[Tensor]
    bases: list[Tensor]
    gamma: Tensor


def draw_model(modules: int, features: int, device: torch.device) -> Model:
    """Random modules whose outputs have unit scale."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, fan: int = 1) -> list[Tensor]:
        return [(torch.randn(*shape, generator=generator) / fan**0.5).to(device) for _ in range(modules)]

    return Model(
        hidden=draw(BATCH, features),
        a=draw(RANK, features, fan=features),
        bt=draw(RANK, features, fan=RANK),
        bases=[torch.linalg.qr(columns)[0] for columns in draw(features, WIDTH)],
        gamma=torch.stack(draw(BATCH)).sigmoid(),
    )


def grouped(model: Model, impl: str) -> Step:
    """The public operation on leaves like those of training."""
    a, bt = ([t.clone().requires_grad_() for t in each] for each in (model.a, model.bt))
    gamma = model.gamma.clone().requires_grad_()

    def step() -> tuple[Tensor, Sequence[Tensor]]:
        for leaf in (*a, *bt, gamma):
            leaf.grad = None
        loss = orthogonality_penalty(model.hidden, a, bt, model.bases, gamma, scale=SCALE, impl=impl)
        loss.backward()
        return loss.detach(), [_grad(leaf) for leaf in (*a, *bt, gamma)]

    return step


def candidates(device: torch.device) -> list[str]:
    """Return the implementations that run on a device, the one that "auto" stands for first."""
    return [i for i in IMPLS if ours.missing("orthogonality_penalty", i, device, torch.float32) is None]


def released(model: Model, dropout: float = DROPOUT) -> Step:
    """The released loop: padded slots, dropout module by module, the formula one operation after another."""
    slot = SLOTS // 2
    a = [_slots(each, slot) for each in model.a]
    b = [_slots(each.t(), slot) for each in model.bt]
    gamma = model.gamma.clone().requires_grad_()

    def step() -> tuple[Tensor, Sequence[Tensor]]:
        for leaf in (*a, *b, gamma):
            leaf.grad = None
        terms = []
        for h, a_m, b_m, basis, g in zip(model.hidden, a, b, model.bases, gamma.unbind(0), strict=True):
            z = F.dropout(h, dropout) @ a_m[slot, :RANK].t() @ b_m[slot, :, :RANK].t() * SCALE
            terms.append((g * (z @ basis).pow(2).sum(-1)).mean())
        loss = torch.stack(terms).mean()
        loss.backward()
        grads = [_grad(leaf)[slot] for leaf in a], [_grad(leaf)[slot].t() for leaf in b]
        return loss.detach(), [*grads[0], *grads[1], _grad(gamma)]

    return step


def _slots(values: Tensor, slot: int) -> Tensor:
    padded = values.new_zeros(SLOTS, *values.shape)
    padded[slot] = values
    return padded.requires_grad_()


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def check(name: str, step: Step, truth: Step) -> None:
    """Compare the loss and every gradient with float64.

    Raises:
        ValueError: If they differ by more than float32 sums of this length may.
    """
    (loss, grads), (true_loss, true_grads) = step(), truth()
    for found, true in zip((loss, *grads), (true_loss, *true_grads), strict=True):
        error, scale = (found.double() - true).abs().max(), true.abs().max()
        if not error <= 1e-4 * scale:
            raise ValueError(
                f"{name} must agree with float64 within 1e-4 of the largest value, got {error / scale}"
            )


def time_ms(steps: dict[str, Step], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Return the milliseconds of each step's calls. All steps take turns."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 3):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if turn >= 3:
                found[name].append(1e3 * (time.perf_counter() - start))
    return found


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def floor_ms(modules: int, features: int, device: torch.device) -> float:
    """The bytes of one call over the bandwidth of a copy."""
    moved = 4 * modules * features * (WIDTH + 4 * RANK + BATCH)
    source = torch.empty(2**26 if modules == MODULES else 2**16, device=device)
    target = torch.empty_like(source)
    copies = time_ms({"copy": lambda: (target.copy_(source), ())}, 9, device)["copy"]
    return moved * min(copies) / (2 * source.numel() * source.element_size())


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line of JSON for each candidate, and write penalty.json; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks penalty", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=FEATURES)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--toy", action="store_true", help="tiny shapes: whether it runs, not how fast")
    parser.add_argument("--out", type=Path, help="folder of penalty.json")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    modules, features = (TOY_MODULES, TOY_FEATURES) if arguments.toy else (MODULES, FEATURES[device.type])
    model = draw_model(modules, features, device)
    lists = ([t.double() for t in each] for each in (model.hidden, model.a, model.bt, model.bases))
    wide = Model(*lists, model.gamma.double())
    truth = grouped(wide, "reference")
    steps = {name: grouped(model, name) for name in candidates(device)}
    for name, step in {**steps, "released": released(model, dropout=0.0)}.items():
        check(name, step, truth)
    times = time_ms(steps | {"released": released(model)}, arguments.repeats, device)
    best = statistics.median(times[next(iter(times))])
    rows = [
        {
            "candidate": name,
            "median_ms": statistics.median(values),
            "min_ms": min(values),
            "over_first": statistics.median(values) / best,
        }
        for name, values in times.items()
    ]
    rows.append({"candidate": "byte floor", "median_ms": floor_ms(modules, features, device)})
    shared = {"device": device.type, "threads": torch.get_num_threads(), "modules": modules}
    rows = [row | shared | {"features": features, "rank": RANK} for row in rows]
    for row in rows:
        print(json.dumps(row))
    found = {"environment": machine.environment(device), "rows": rows}
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "penalty.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
