"""Ahead-of-time compilation of launches: what Triton's JIT would build for them on a GPU, without a GPU.

    python -m tests.cram_kernels.aot --arch 90                one line a kernel: registers, shared memory, ...
    python -m tests.cram_kernels.aot --arch 80 90 100 --all   every shape; exit status 1 where a check fails

`Launch.run` itself drives the JIT, under a driver that names a target and has no device: signature, constants
and options are those of a launch on a GPU. Tensors are on the "meta" device; a pointer is aligned as its
storage offset is, because allocations start on 512 bytes. Triton reads TRITON_INTERPRET where a kernel is
defined, so pytest, which has it on, runs this module in a process of its own (`compiled`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cram_kernels.launch import Launch
from tests.cram_kernels.aot_code import (
    BYTES_A_US,
    FLOPS_A_US,
    Work,
    early_reads,
    issue_us,
    read_ptx,
    read_sass,
)
from tests.cram_kernels.aot_driver import Target, Warm

ROOT = Path(__file__).resolve().parents[2]
# Bytes of shared memory that one program may ask for; registers of a multiprocessor and of a thread.
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# What a launch in a captured graph costs anyway: instructions that fit into it need no bytes to hide behind.
LAUNCH_US = 2.5
REGISTERS, REGISTERS_A_THREAD = 65536, 255
# The assembler itself keeps a few loop-invariant addresses in local memory where this lets one more program
# fit on a multiprocessor (8 and 16 bytes a thread were seen, at 48 to 96 registers).
PARKED_BYTES, PARKING_REGISTERS = 32, 128

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) ")


class Excuse(NamedTuple):
    """Why issuing a launch's instructions may take `times` as long as its bytes on an H200."""

    why: str
    times: float = math.inf


@dataclass(frozen=True)
class Case:
    """Launches that run one behind another, and what their kernels must be.

    Args:
        label: Operation and shape, for a reader.
        launches: In the order in which they run.
        narrow: Names of the kernels that cannot load all that is large by 16 bytes.
        wgmma: Names of the kernels whose tiles are large enough for sm_90's asynchronous products.
        excused: Kernel -> why its instructions may take longer than its bytes.
        pipelined: Kernel -> loops that load the next steps' operands while they compute.
    """

    label: str
    launches: tuple[Launch, ...]
    narrow: tuple[str, ...] = ()
    wgmma: tuple[str, ...] = ()
    excused: dict[str, Excuse] = field(default_factory=dict)
    pipelined: dict[str, int] = field(default_factory=dict)


@dataclass
class Compiled:
    """One kernel as compiled for one architecture: plain data, which survives JSON."""

    label: str
    kernel: str
    arch: int
    warps: int
    stages: int
    constants: dict[str, Any]
    products: bool
    aligned: bool
    wgmma: bool
    late: list[str]
    front: bool
    # How many times as long as its bytes its instructions may take, and why.
    times: float = 1.0
    excused: str = ""
    pipelined: int = 0
    error: str = ""
    # Runtime argument -> type, with ":16" where the JIT knows divisibility by 16.
    signature: dict[str, Any] = field(default_factory=dict)
    registers: int = 0
    stack: int = 0
    shared: int = 0
    local: bool = False
    # Loops with loads in flight for later steps; whether the dropout mask is made.
    loops_ahead: int = 0
    hashes: bool = False
    waits: bool = False
    signals: bool = False
    # Arguments read in front of the wait; loads there in the PTX and in the machine code.
    early: list[str] = field(default_factory=list)
    early_loads: tuple[int, int] = (0, 0)
    work: dict[str, Any] = field(default_factory=dict)
    # Least microseconds of one launch on an H200: issuing its instructions; moving its bytes or its products.
    issue_us: float = 0.0
    bytes_us: float = 0.0
    mma: list[str] = field(default_factory=list)
    # Bytes of a load -> loads in the program's text.
    loads: dict[str, int] = field(default_factory=dict)

    @property
    def dependent(self) -> bool:
        """Whether it starts before the kernel in front has ended."""
        return bool(self.late)

    @property
    def hidden(self) -> float:
        """Microseconds by which issuing exceeds what hides it; negative if it does not."""
        return self.issue_us - max(self.bytes_us, LAUNCH_US)

    @property
    def half(self) -> bool:
        """Whether a half-precision tensor is among the arguments."""
        return any(kind.startswith(("*bf16", "*fp16")) for kind in _leaves(self.signature))

    @property
    def programs(self) -> int:
        """Programs that fit on one multiprocessor by registers, shared memory and threads."""
        by_registers = REGISTERS // (max(self.registers, 1) * 32 * self.warps)
        return min(by_registers, SHARED_BYTES[self.arch] // max(self.shared, 1), 64 // self.warps, 32)


def violations(kernel: Compiled) -> list[str]:
    """Return what is wrong with a compiled kernel; empty if nothing is."""
    if kernel.error:
        return [f"must compile, got {kernel.error}"]
    limit, mma = SHARED_BYTES[kernel.arch], kernel.mma
    tensor_cores = kernel.products and kernel.half
    rules = [
        (kernel.shared <= limit, f"shared memory must be <= {limit} bytes, got {kernel.shared}"),
        (
            kernel.stack <= (PARKED_BYTES if kernel.registers <= PARKING_REGISTERS else 0),
            f"registers must not spill, got {kernel.registers} and a stack of {kernel.stack} bytes",
        ),
        (not kernel.local, "local memory must not be used"),
        (kernel.registers <= REGISTERS_A_THREAD, f"registers must be <= 255, got {kernel.registers}"),
        (not any("tf32" in name for name in mma), f"products must not be tf32, got {mma}"),
        (not any(".f16.f16.f16" in name for name in mma), f"sums must be float32, got {mma}"),
        (bool(mma) or not tensor_cores, "half-precision products must use tensor cores, got none"),
        (
            not (tensor_cores and kernel.wgmma and kernel.arch == 90) or any("wgmma" in name for name in mma),
            f"large tiles must use wgmma, got {mma}",
        ),
        (
            not kernel.aligned or "16" in kernel.loads and "2" not in kernel.loads,
            f"loads must be 16 bytes wide, got (bytes: loads) {kernel.loads}",
        ),
        (kernel.arch >= 90 or not kernel.dependent, "a dependent launch must be on sm_90 or newer"),
        (
            kernel.waits == kernel.dependent,
            f"a kernel must wait iff its launch is dependent ({kernel.dependent}), got {kernel.waits}",
        ),
        (
            not set(kernel.early) & set(kernel.late),
            f"a kernel must not read {kernel.late} before it waits, got {kernel.early}",
        ),
        (
            not kernel.dependent or kernel.early_loads[1] <= kernel.early_loads[0],
            f"the assembler must move no load in front of the wait, got (PTX, SASS) {kernel.early_loads}",
        ),
        (
            kernel.arch != 90 or kernel.issue_us <= kernel.times * max(kernel.bytes_us, LAUNCH_US),
            f"issuing must hide behind bytes ({kernel.bytes_us:.1f} us), got {kernel.issue_us:.1f} us",
        ),
        (
            kernel.loops_ahead >= kernel.pipelined,
            f"{kernel.pipelined} loops must load ahead, got {kernel.loops_ahead}",
        ),
        (
            not kernel.hashes or kernel.kernel == "_dropout_bits",
            "the dropout mask must be hashed by _dropout_bits alone",
        ),
        (
            kernel.signals == kernel.front,
            f"a kernel must release iff a dependent launch follows ({kernel.front}), got {kernel.signals}",
        ),
    ]
    return [what for holds, what in rules if not holds]


def _leaves(kinds: Any) -> Iterator[str]:
    if isinstance(kinds, str):
        yield kinds
    else:
        for item in kinds.values() if isinstance(kinds, dict) else kinds:
            yield from _leaves(item)


def compile_cases(cases: Iterable[Case], arch: int) -> list[Compiled]:
    """Compile every launch of the cases for sm_<arch>, each distinct kernel once.

    A kernel that several cases share must be what any of them asks for.
    """
    from triton.runtime.driver import driver

    driver.set_active(Target(arch))
    seen: dict[Any, Compiled] = {}
    for case in cases:
        followers = [launch.dependent for launch in case.launches[1:]] + [False]
        for launch, front in zip(case.launches, followers, strict=True):
            if all(launch.grid):
                key, kernel, record = _compile(case, launch, arch, front)
                known = seen.setdefault(key, record)
                if kernel is not None:
                    if known is record:
                        _read(kernel, record, launch)
                    _bounds(known, record, launch)
                for flag in ("products", "aligned", "wgmma", "front"):
                    setattr(known, flag, getattr(known, flag) or getattr(record, flag))
    return list(seen.values())


def _compile(case: Case, launch: Launch, arch: int, front: bool) -> tuple[Any, Any, Compiled]:
    """Return what tells the kernel from others, the kernel (None if it fails), and a record of neither."""
    from triton.errors import TritonError

    name = launch.kernel.fn.__name__
    excuse = case.excused.get(name, Excuse("", 1.0))
    record = Compiled(
        label=case.label,
        kernel=name,
        arch=arch,
        warps=launch.warps,
        stages=launch.stages,
        constants=dict(launch.constants),
        products=launch.flops > 0,
        aligned=name not in case.narrow,
        wgmma=name in case.wgmma,
        late=list(launch.late),
        front=front,
        times=excuse.times,
        excused=excuse.why,
        pipelined=case.pipelined.get(name, 0),
    )
    warm = Warm(launch.kernel)
    try:
        # A failing assembler prints the whole program to standard output.
        with contextlib.redirect_stdout(io.StringIO()):
            dataclasses.replace(launch, kernel=warm).run()
    except (TritonError, RuntimeError) as error:
        record.error = _reason(error)
        return (case.label, name, str(record.constants)), None, record
    kernel: Any = warm.result
    return kernel.hash, kernel, record


def _read(kernel: Any, record: Compiled, launch: Launch) -> None:
    """Fill in what the compiled code says."""
    record.signature = _signature(kernel.src)
    record.shared = kernel.metadata.shared
    if not kernel.metadata.launch_pdl:
        record.late = []
    record.registers, record.stack = map(int, _USAGE.findall(_dumped(kernel, "--dump-resource-usage"))[0])
    for found, value in read_ptx(kernel.asm["ptx"]).items():
        setattr(record, found, value)
    work = read_sass(_dumped(kernel, "--dump-sass"))
    record.work = dataclasses.asdict(work)
    names = [
        name for name, kinds in record.signature.items() for kind in _leaves([kinds]) if kind != "constexpr"
    ]
    read, loads = early_reads(kernel.asm["ptx"])
    record.early = sorted({names[place] for place in read if place < len(names)})
    record.early_loads = (loads, max(work.early_loads, 0))


def _bounds(known: Compiled, record: Compiled, launch: Launch) -> None:
    """Keep the bounds of the launch of a kernel whose instructions are hidden least."""
    programs = 1
    for size in launch.grid:
        programs *= size
    record.issue_us = issue_us(Work(**known.work), programs * launch.warps, launch.steps)
    record.bytes_us = launch.floor_us(BYTES_A_US, FLOPS_A_US)
    if known.hidden <= record.hidden:
        known.issue_us, known.bytes_us = record.issue_us, record.bytes_us
        known.label, known.excused, known.times = record.label, record.excused, record.times


def _reason(error: BaseException) -> str:
    """Return the innermost cause; an assembler's reason stands at its start, a compiler's at its end."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) < 400 else f'{text[:200]} ... {text[-200:]}'}"


def _signature(source: Any) -> dict[str, Any]:
    def mark(kind: Any, path: tuple[int, ...]) -> Any:
        if isinstance(kind, tuple):
            return [mark(item, (*path, place)) for place, item in enumerate(kind)]
        return kind + ":16" * (["tt.divisibility", 16] in source.attrs.get(path, []))

    kinds = enumerate(source.signature.items())
    return {name: mark(kind, (place,)) for place, (name, kind) in kinds if kind != "constexpr"}


def _dumped(kernel: Any, what: str) -> str:
    """Return what the CUDA toolkit's reader says of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = next(path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
    return subprocess.run([tool, what, cubin], capture_output=True, text=True, check=True).stdout


def compiled(cases: str, arch: int, *, full: bool = False) -> list[Compiled]:
    """Compile in a process of its own, without the interpreter and with an empty cache.

    Args:
        cases: "module:function"; the function takes (arch, full) and returns cases.
        arch: 80, 90 or 100.
        full: Every shape, instead of the fewest that meet every row of the tables.
    """
    with tempfile.TemporaryDirectory() as cache:
        settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-m",
            "tests.cram_kernels.aot",
            "--json",
            "--cases",
            cases,
            "--arch",
            f"{arch}",
        ]
        command += ["--all"] * full
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return [Compiled(**record) for record in json.loads(done.stdout)]


def table(kernels: list[Compiled]) -> str:
    """Return one line a kernel, most registers first, and below it what is wrong with it."""
    head = "kernel sm warps stages registers stack shared programs issue_us bytes_us instructions products "
    head += "loads(bytes:count) constants case"
    rows, notes = [head.split()], [[]]
    for one in sorted(kernels, key=lambda k: (k.kernel, k.arch, -k.registers)):
        numbers = (one.arch, one.warps, one.stages, one.registers, one.stack, one.shared, one.programs)
        mma = ",".join(sorted({name.split(".")[0] for name in one.mma})) or "-"
        loads = ",".join(f"{width}:{count}" for width, count in one.loads.items())
        constants = ",".join(f"{name}={value}" for name, value in one.constants.items())
        bounds = f"{one.issue_us:.1f}", f"{one.bytes_us:.1f}"
        count = "+".join(str(one.work.get(part, {}).get("all", 0)) for part in ("once", "looped"))
        rows.append([one.kernel, *map(str, numbers), *bounds, count, mma, loads, constants, one.label])
        notes.append(violations(one))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row, wrong in zip(rows, notes, strict=True):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        lines += [f"  ! {what}" for what in wrong]
    return "\n".join(lines)


def main() -> int:
    """Compile and print; return 1 if the table shows anything wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="tests.cram_kernels.aot_cases:shipped", help="module:function")
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=sorted(SHARED_BYTES))
    parser.add_argument("--all", action="store_true", help="every shape")
    parser.add_argument("--json", action="store_true", help="records instead of the table")
    given = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET must be 0 or unset")
    module, function = given.cases.split(":")
    source = getattr(importlib.import_module(module), function)
    kernels = [one for arch in given.arch for one in compile_cases(source(arch, given.all), arch)]
    if given.json:
        print(json.dumps([dataclasses.asdict(one) for one in kernels], default=str))
        return 0
    print(table(kernels))
    return int(any(map(violations, kernels)))


if __name__ == "__main__":
    sys.exit(main())
