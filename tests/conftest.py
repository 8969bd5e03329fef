"""What all tests share: a seeded generator, and the golden vectors (where they lie, how a case is read)."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

# Triton decides at import between its compiler and its interpreter, which takes CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same state of PyTorch's global generator."""
    torch.manual_seed(0)


def golden_dir() -> Path:
    """Return the folder of golden vectors: $CRAM_GOLDEN, else ../shared/golden beside the repository.

    Skips the calling test if there is none.
    """
    folder = _golden_folder()
    if not (folder / "index.json").is_file():
        pytest.skip(f"golden vectors are absent: no {folder / 'index.json'} (set CRAM_GOLDEN)")
    return folder


def golden_cases(family: str) -> list[dict[str, Any]]:
    """Return the index entries of a family in order; empty if the folder is absent."""
    return [case for case in _index()["cases"] if case["family"] == family]


def golden_case(case_id: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return one case's index entry and its tensors; skips the calling test if the folder is absent."""
    folder = golden_dir()
    entry = next(case for case in _index()["cases"] if case["id"] == case_id)
    return entry, load_file(folder / entry["file"])


def _golden_folder() -> Path:
    return Path(os.environ.get("CRAM_GOLDEN", _BESIDE))


@cache
def _index() -> dict[str, Any]:
    file = _golden_folder() / "index.json"
    return json.loads(file.read_text()) if file.is_file() else {"cases": []}
