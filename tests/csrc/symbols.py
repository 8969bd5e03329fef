"""The symbols a compiled library takes from elsewhere, and those that the stable ABI does not promise."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

_ALLOWED = Path(__file__).with_name("torch_2_11_symbols.txt")


def undefined_symbols(file: Path, *flags: str) -> set[str]:
    """Names that an object or library expects others to define; skips the calling test without nm."""
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    text = subprocess.run(
        ["nm", "--undefined-only", *flags, str(file)], capture_output=True, text=True, check=True
    ).stdout
    return {line.split()[-1] for line in text.splitlines() if line.strip()}


def allowed_symbols() -> set[str]:
    """The C symbols of torch 2.11."""
    lines = _ALLOWED.read_text(encoding="utf-8").splitlines()
    return {line for line in lines if not line.startswith("#")}


def foreign_symbols(symbols: set[str]) -> set[str]:
    """Those of torch that are outside the stable ABI of 2.11: newer C symbols, and every C++ symbol."""
    c_names = {name for name in symbols if re.match(r"(aoti_)?torch_", name)}
    mangled = {name for name in symbols if re.match(r"_Z\w*?(3c10|2at|5torch|6caffe2)", name)}
    return (c_names - allowed_symbols()) | mangled
