"""Mutants that compute the same as the source, each with the reason."""

from __future__ import annotations

EQUIVALENTS: dict[str, str] = {}
