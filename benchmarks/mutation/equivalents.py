"""Mutants that compute the same as the source, each with the reason."""

from __future__ import annotations

EQUIVALENTS: dict[str, str] = {
    "cram/atomic.py write_json: indent=2 -> indent=3": "The spaces of a JSON file carry no value.",
    "cram/bundle/packs.py _empty_pack: ranks[0] -> ranks[1]": (
        "A description with a shared A is refused unless its experts have equal ranks."
    ),
    "cram_kernels/packing.py PackedExperts._alias: self.trained_a is not None and self.trained_b is not None -> "
    "self.trained_a is not None or self.trained_b is not None": (
        "The two parameters are made together, or neither is."
    ),
}
