"""What a compiled kernel's text says: instructions that a warp issues, and what it loads before it waits.

The bound of a launch by instructions is the longest of three: all instructions at four a clock and
multiprocessor, those of the integer pipe at two, integer multiply-adds at two (compute capability 9.0, table
"Throughput of Native Arithmetic Instructions" of the CUDA programming guide). A loop's instructions count as
often as `Launch.steps` says.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

# An H200: multiprocessors times clocks a microsecond; bytes of a copy and half-precision FLOPs a microsecond.
CLOCKS, BYTES_A_US, FLOPS_A_US = 132 * 1755.0, 4.3e6, 790e6
# Instructions a clock on one multiprocessor: all of them, and those of a pipe of 64 lanes.
ISSUED, OF_A_PIPE = 4.0, 2.0

_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_TARGET = re.compile(r"\b0x([0-9a-f]+)")
_INTEGER = re.compile(
    "LOP3?|ISETP|F?SEL|PRMT|SH[FLR]|IADD3?|VIADD(MNMX)?|LEA|V?IMNMX|FMNMX|FSETP|PLOP3|SGXT|BMSK|IABS|MOV|F2FP|"
    "HSETP2|HMNMX2|POPC|ICMP"
)
_LOADS = ("LDG", "LDGSTS", "LD", "UBLKCP", "UTMALDG")

_PRODUCT = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.([\w.:]+)")
_LOAD = re.compile(r"\bld\.global(?:\.(?!v\d)[\w:]+)*?\.(?:v(\d)\.)?[bsuf](\d+)\b")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s[^;]*?,\s*(0x[0-9a-f]+|\d+)\s*[,;]")
# A copy that is waited for while later ones are on their way.
_AHEAD = re.compile(r"\bcp\.async\.wait_group\s+(0x[0-9a-f]+|\d+)\s*;")
# A factor of the dropout mask's hash, as a signed and as an unsigned number.
_HASH = (str(0x7FEB352D), hex(0x7FEB352D))

_STATEMENT = re.compile(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)(.*)")
_REGISTER = re.compile(r"%\w+")
_PARAMETER = re.compile(r"_param_(\d+)\b")
_READS = ("ld.global", "cp.async.ca.shared.global", "cp.async.cg.shared.global", "cp.async.bulk")


@dataclass
class Work:
    """Instructions of one warp by pipe, apart and in loops."""

    once: dict[str, int] = field(default_factory=dict)
    looped: dict[str, int] = field(default_factory=dict)
    # Loads of global memory in front of the wait for the kernel in front; -1 without a wait.
    early_loads: int = -1

    def total(self, steps: int, pipe: str = "all") -> int:
        """Return the instructions that a warp issues in so many passes of the loop."""
        return self.once.get(pipe, 0) + steps * self.looped.get(pipe, 0)


def issue_us(work: Work, warps: int, steps: int) -> float:
    """Return the least microseconds in which an H200 issues the instructions of so many warps."""
    rates = {"all": ISSUED, "integer": OF_A_PIPE, "multiply": OF_A_PIPE}
    return max(warps * work.total(steps, pipe) / (CLOCKS * rate) for pipe, rate in rates.items())


def read_sass(text: str) -> Work:
    """Count the instructions of a kernel's SASS."""
    found = [(int(place, 16), name, rest) for place, name, rest in _SASS.findall(text)]
    loops, end = [], found[-1][0] if found else 0
    for place, name, rest in found:
        target = _TARGET.search(rest)
        if name.startswith("BRA") and target:
            if int(target[1], 16) == place:  # what follows the last instruction
                end = min(end, place)
            elif int(target[1], 16) < place:
                loops.append((int(target[1], 16), place))
    work, once, looped, early = Work(), Counter[str](), Counter[str](), 0
    for place, name, _ in found:
        if place >= end or name.startswith("NOP"):
            continue
        counter = looped if any(low <= place <= high for low, high in loops) else once
        operation = name.split(".")[0]
        counter["all"] += 1
        counter["integer"] += bool(_INTEGER.fullmatch(operation))
        counter["multiply"] += operation == "IMAD"
        early += operation in _LOADS
        if operation == "ACQBULK" and work.early_loads < 0:
            work.early_loads = early
    work.once, work.looped = dict(once), dict(looped)
    return work


def read_ptx(ptx: str) -> dict[str, Any]:
    """Return what the checks need of a kernel's PTX, by the names of `Compiled`'s fields."""
    loads = Counter(int(vector or 1) * int(bits) // 8 for vector, bits in _LOAD.findall(ptx))
    loads.update(int(width, 0) for width in _COPY.findall(ptx))
    return {
        "mma": sorted({".".join(parts) for parts in _PRODUCT.findall(ptx)}),
        "loads": {str(width): loads[width] for width in sorted(loads)},
        "local": bool(re.search(r"\.local\b", ptx)),
        "loops_ahead": sum(int(left, 0) > 0 for left in _AHEAD.findall(ptx)),
        "hashes": any(word in ptx for word in _HASH),
        "waits": "griddepcontrol.wait" in ptx,
        "signals": "griddepcontrol.launch_dependents" in ptx,
    }


def early_reads(ptx: str) -> tuple[set[int], int]:
    """Return the parameters that a kernel reads before it waits, and how many loads stand there.

    A register belongs to a parameter if it was computed from it: addresses are traced through the text until
    nothing changes. A kernel that does not wait reads nothing early.
    """
    statements = _statements(ptx)
    wait = next((place for place, (name, _) in enumerate(statements) if name == "griddepcontrol.wait"), 0)
    of: dict[str, set[int]] = {}
    changed = True
    while changed:
        changed = False
        for name, operands in statements:
            registers = _REGISTER.findall(operands)
            if not registers or name.startswith((*_READS, "st.", "bra")):
                continue
            sources = {int(number) for number in _PARAMETER.findall(operands)}
            for register in registers[1:]:
                sources |= of.get(register, set())
            if not sources <= of.setdefault(registers[0], set()):
                of[registers[0]] |= sources
                changed = True
    loads = [operands for name, operands in statements[:wait] if name.startswith(_READS)]
    read: set[int] = set()
    for operands in loads:
        # A copy names its target first; the last address is the source.
        for register in _REGISTER.findall(operands[operands.rindex("[") :].split("]")[0]):
            read |= of.get(register, set())
    return read, len(loads)


def _statements(ptx: str) -> list[tuple[str, str]]:
    """Return the name and the operands of each instruction in order."""
    body = re.sub(r"//[^\n]*", "", ptx[ptx.index(".entry") :])
    pieces = (_STATEMENT.match(piece) for line in body.split("\n") for piece in line.split(";"))
    return [(piece[1], piece[2]) for piece in pieces if piece]
