"""Which products the native CPU layer computes itself and which torch computes, on this processor.

The table is csrc/expert_lora/crossovers_table.h. The library chooses its row by vendor and instruction
set when it is loaded; nothing is timed.
"""

from __future__ import annotations

import ctypes
from dataclasses import astuple, dataclass
from functools import cache

from cram_kernels.library import LIBRARIES, library_missing, library_path

UNITS = ("lanes", "pairs", "tiles")


@dataclass(frozen=True)
class Crossovers:
    """A row of the table: numbers of tokens for which a product is the library's own.

    Attributes:
        vendor: "Intel", "AMD", or "" for the row of processors that nobody measured.
        unit: What multiplies there: "tiles", "pairs", "avx512", "avx2" or "baseline".
        least, base: The base product in float32 is the library's own from so many up to so many tokens.
        gradient: Its gradient to the input up to so many.
        half_least, half_base, half_gradient: The same in bfloat16.
    """

    vendor: str
    unit: str
    least: int
    base: int
    gradient: int
    half_least: int
    half_base: int
    half_gradient: int

    def __str__(self) -> str:
        name = f"{self.vendor} with {self.unit}" if self.vendor else f"unmeasured processor with {self.unit}"
        return (
            f"{name}: base product of {self.least} to {self.base} tokens in float32, "
            f"{self.half_least} to {self.half_base} in bfloat16; "
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
    numbers = astuple(row)[2:] if row else (0,) * 6
    call = _library().cram_set_crossovers
    call.restype, call.argtypes = None, [ctypes.c_int64] * 7
    call(*numbers, UNITS.index(unit) if row else -1)
    rounds_factors.cache_clear()


@cache
def rounds_factors() -> bool:
    """Return whether products of bfloat16 x round float32 factors to bfloat16 before they multiply.

    Then a copy of the factors in bfloat16 gives the same bits, and is half as much to read.
    """
    return bool(_library().cram_rounds_factors())


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(library_path(LIBRARIES["cpu"])))
