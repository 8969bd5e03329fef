"""Safetensors files read with suspicion: names, shapes and lengths are checked before any allocation."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file

MAX_HEADER_BYTES = 100_000_000

Spec = dict[str, tuple[int, ...]]


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file from its header alone, so that nothing is allocated.

    Raises:
        ValueError: If the header is not one, or the file is not as long as the header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path} must be a safetensors file, got {size} bytes without a valid header")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            shapes = {name: tuple(int(n) for n in entry["shape"]) for name, entry in entries.items()}
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            dtypes = {entry["dtype"] for entry in entries.values()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(f"{path} must have a safetensors header, got {error!r}") from error
    if size != 8 + length + end:
        raise ValueError(f"{path} must have {8 + length + end} bytes by its header, got {size}")
    if dtypes - {"F32"}:
        raise ValueError(f"{path} must hold F32 tensors, got {sorted(map(str, dtypes))}")
    return shapes


def read_tensors(path: Path, spec: Spec) -> dict[str, torch.Tensor]:
    """Read a safetensors file whose tensors must be exactly those of `spec`, finite and fp32.

    Raises:
        ValueError: If names or shapes differ (checked before anything is allocated), or on NaN or Inf.
    """
    shapes = tensor_shapes(path)
    if shapes.keys() != spec.keys():
        matched = len(shapes.keys() & spec.keys())
        raise ValueError(
            f"{path} must hold the tensors of the base model's modules, {matched} of {len(spec)} match; "
            f"missing {_names(spec.keys() - shapes.keys())}; unexpected {_names(shapes.keys() - spec.keys())}"
        )
    for name, shape in spec.items():
        if shapes[name] != shape:
            raise ValueError(f"{name} in {path} must have shape {list(shape)}, got {list(shapes[name])}")
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} in {path} must be finite, got {_count_bad(tensor)} NaN or Inf")
    return tensors


def _count_bad(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape) - int(torch.isfinite(tensor).sum())


def _names(names: set[str], limit: int = 8) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return f"[{', '.join(listed[:limit])}]{more}" if listed else "none"
