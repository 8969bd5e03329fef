"""Faults that a user can mend: a wrong path, an unknown name, damaged data, a missing package."""

from __future__ import annotations

from safetensors import SafetensorError

KNOWN_ERRORS = (ValueError, OSError, NotImplementedError, ModuleNotFoundError, SafetensorError)


def first_line(error: BaseException) -> str:
    """What is shown of an error: the first line of its text, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
