"""Continual-learning methods over the one expert layer; the registry is data."""

from __future__ import annotations

from cram.methods.cram import CramMethod
from cram.methods.isolated import IsolatedMethod
from cram.methods.method import Method
from cram.methods.sequential import SequentialMethod

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (CramMethod, SequentialMethod, IsolatedMethod)
}

__all__ = ["METHODS", "Method"]
