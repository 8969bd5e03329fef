"""Safetensors files read with suspicion: names, shapes and places are checked before any allocation.

The reader is this module's own. It copies one tensor at a time, so that a file of any size costs the memory
of its largest tensor.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Spec = dict[str, tuple[int, ...]]

VALUE_BYTES = 4
# Bytes of a header: an entry's name, its fields, 20 digits a number; twice that and some for other writers.
_ENTRY_BYTES, _NUMBER_BYTES, _SPARE_BYTES = 100, 20, 65536


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header agrees with what was expected.

    Attributes:
        path: The file.
        spec: Shape of every tensor by name.
        starts: First byte of every tensor in the file, in the order of the bytes.
    """

    path: Path
    spec: Spec
    starts: dict[str, int]

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, one after another.

        Raises:
            ValueError: If a value is NaN or infinite, or the file has become shorter.
        """
        with self.path.open("rb") as file:
            for name, start in self.starts.items():
                tensor = torch.empty(self.spec[name])
                file.seek(start)
                found = file.readinto(tensor.numpy()) if tensor.numel() else 0  # type: ignore[arg-type]
                if found != VALUE_BYTES * tensor.numel():
                    raise ValueError(f"{self.path} must stay as it is while it is read, got a shorter file")
                if not bool(torch.isfinite(tensor).all()):
                    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
                    raise ValueError(f"{name} in {self.path} must be finite, got {bad} NaN or Inf")
                yield name, tensor


def max_file_bytes(spec: Spec) -> int:
    """Bytes that a safetensors file of these tensors has at most."""
    return 8 + _max_header_bytes(spec) + VALUE_BYTES * sum(map(math.prod, spec.values()))


def check_tensors(path: Path, spec: Spec) -> TensorFile:
    """Read the header of a safetensors file whose tensors must be exactly those of `spec`, in float32.

    Raises:
        ValueError: If the header is larger than these tensors need, is not one, or names other tensors,
            shapes or places; no tensor has been read then.
    """
    header, begin = _header(path, _max_header_bytes(spec))
    size = path.stat().st_size
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != begin + end:
        raise ValueError(f"{path} must have {begin + end} bytes by its header, got {size}")
    if dtypes := sorted({entry["dtype"] for entry in header.values()} - {"F32"}):
        raise ValueError(f"{path} must hold F32 tensors, got {dtypes!r:.200}")
    if header.keys() != spec.keys():
        matched = len(header.keys() & spec.keys())
        raise ValueError(
            f"{path} must hold the tensors of the base model's modules, {matched} of {len(spec)} match; "
            f"missing {_names(spec.keys() - header.keys())}; unexpected {_names(header.keys() - spec.keys())}"
        )
    for name, shape in spec.items():
        if header[name]["shape"] != list(shape):
            raise ValueError(
                f"{name} in {path} must have shape {list(shape)}, got {header[name]['shape']!r:.200}"
            )
    place = 0
    starts = {}
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        first, last = header[name]["data_offsets"]
        if first != place or last - first != VALUE_BYTES * math.prod(spec[name]):
            raise ValueError(
                f"{name} in {path} must begin at byte {place} and fill its shape, got {first, last}"
            )
        starts[name], place = begin + first, last
    return TensorFile(path, spec, starts)


def read_tensors(path: Path, spec: Spec) -> dict[str, Tensor]:
    """All tensors of a safetensors file, which must be exactly those of `spec`, finite and float32.

    Raises:
        ValueError: As `check_tensors` and `TensorFile.read`.
    """
    return dict(check_tensors(path, spec).read())


def _max_header_bytes(spec: Spec) -> int:
    entries = (
        len(json.dumps(name)) + _ENTRY_BYTES + _NUMBER_BYTES * (len(shape) + 2)
        for name, shape in spec.items()
    )
    return 2 * sum(entries) + _SPARE_BYTES


def _header(path: Path, limit: int) -> tuple[dict[str, Any], int]:
    """Entries of the tensors, each with dtype, shape and data_offsets of the right types; first data byte."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 <= length <= size - 8:
            raise ValueError(f"{path} must be a safetensors file, got {size} bytes without a valid header")
        if length > limit:
            raise ValueError(f"header of {path} must have at most {limit} bytes, got {length}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} must have a safetensors header, got {error!r:.200}") from error
    entries = (
        {name: entry for name, entry in header.items() if name != "__metadata__"} if _is(header, dict) else {}
    )
    if not _is(header, dict) or not all(map(_is_entry, entries.values())):
        raise ValueError(f"{path} must have a safetensors header, got entries of other types")
    return entries, 8 + length


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return False
    shape, offsets = entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets] if _is(shape, list) and _is(offsets, list) and len(offsets) == 2 else [-1]
    return _is(entry["dtype"], str) and all(_is(number, int) and number >= 0 for number in numbers)


def _is(value: object, kind: type) -> bool:
    return type(value) is kind


def _names(names: set[str], limit: int = 8) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return f"{', '.join(map(_plain, listed[:limit])).join('[]')}{more}" if listed else "none"


def _plain(name: str) -> str:
    """A name in one line of bounded length."""
    return ascii(name)[1:-1][:200]
