"""Which products the native CPU layer computes itself and which torch computes, on this processor.

The table is csrc/expert_lora/crossovers_table.h. The library chooses its row by vendor and instruction
set when it is loaded; nothing is timed.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

from cram_kernels.library import LIBRARIES, library_missing, library_path

UNITS = ("lanes", "pairs", "tiles")


@dataclass(frozen=True)
class Crossovers:
    """A row of the table: numbers of tokens up to which a product is the library's own.

    Attributes:
        vendor: "Intel", "AMD", or "" for the row of processors that nobody measured.
        unit: What multiplies there: "tiles", "pairs", "avx512", "avx2" or "baseline".
        base, gradient: The base product in float32, and its gradient to the input.
        half_base, half_gradient: The same in bfloat16.
    """

    vendor: str
    unit: str
    base: int
    gradient: int
    half_base: int
    half_gradient: int

    def __str__(self) -> str:
        name = f"{self.vendor} with {self.unit}" if self.vendor else f"unmeasured processor with {self.unit}"
        return (
            f"{name}: base product to {self.base} tokens in float32, {self.half_base} in bfloat16; "
            f"its gradient to {self.gradient} and {self.half_gradient}"
        )


def crossovers() -> tuple[Crossovers, str] | None:
    """Return the row in force and why the processor's tile unit is not used ("" if it is).

    None if there is no CPU library.
    """
    if library_missing("cpu") is not None:
        return None
    call = _library().cram_crossovers
    call.restype = ctypes.c_char_p
    vendor, unit, *numbers, reason = call().decode().split("\t")
    return Crossovers(vendor, unit, *map(int, numbers)), reason


def set_crossovers(row: Crossovers | None, unit: str = "tiles") -> None:
    """Put other numbers and at most that unit in force in this process; None puts back the table's.

    For the program that measures a row, and for tests.

    Args:
        row: Its numbers are taken; vendor and unit are not.
        unit: "lanes" (float32), "pairs" or "tiles".
    """
    numbers = (row.base, row.gradient, row.half_base, row.half_gradient) if row else (0, 0, 0, 0)
    call = _library().cram_set_crossovers
    call.restype, call.argtypes = None, [ctypes.c_int64] * 5
    call(*numbers, UNITS.index(unit) if row else -1)


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(library_path(LIBRARIES["cpu"])))
