"""One expert as a plain PEFT LoRA folder: `adapter_config.json` and `adapter_model.safetensors`.

Every module has its own rank, so `rank_pattern` and `alpha_pattern` name each module by its full path and
`target_modules` lists exactly the modules with a rank; by PEFT's rule for names a bare `q_proj` would reach
the vision tower too. PEFT, and whatever reads PEFT folders, loads an expert without this package.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cram.atomic import read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_HEADER_BYTES = 100_000_000

Factors = tuple[torch.Tensor, torch.Tensor]
Spec = dict[str, tuple[int, ...]]


def adapter_config(ranks: Mapping[str, int], scale: float, base: str | None) -> dict[str, Any]:
    """PEFT's LoRA configuration for modules of the given ranks, each with alpha = scale * rank."""
    used = {name: rank for name, rank in ranks.items() if rank > 0}
    common = Counter(used.values()).most_common(1)[0][0] if used else 1
    alpha = {name: _integer(scale * rank) for name, rank in used.items()}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": common,
        "lora_alpha": _integer(scale * common),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(used),
        "rank_pattern": used,
        "alpha_pattern": alpha,
    }


def _integer(value: float) -> float | int:
    return int(value) if value == int(value) else value


def adapter_spec(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> Spec:
    """Names and shapes of the tensors of an expert; `shapes` holds (D_in, D_out) of each module."""
    spec: Spec = {}
    for name, rank in ranks.items():
        if rank > 0:
            spec[f"{PREFIX}{name}.lora_A.weight"] = (rank, shapes[name][0])
            spec[f"{PREFIX}{name}.lora_B.weight"] = (shapes[name][1], rank)
    return spec


def write_adapter(folder: Path, weights: Mapping[str, Factors], scale: float, base: str | None) -> None:
    """Write one expert.

    Args:
        folder: An existing, empty folder.
        weights: Per module path A [r, D_in] and B [D_out, r]; rank 0 leaves the module out.
        scale: What B A is multiplied by, alpha / r in PEFT.
        base: Name of the base model for `base_model_name_or_path`.
    """
    ranks = {name: a.shape[0] for name, (a, _) in weights.items()}
    tensors = {}
    for name, (a, b) in weights.items():
        if a.shape[0] > 0:
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a.detach().cpu().contiguous()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = b.detach().cpu().contiguous()
    (folder / CONFIG_FILE).write_text(json.dumps(adapter_config(ranks, scale, base), indent=2) + "\n")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def read_adapter(
    folder: Path, ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], scale: float
) -> dict[str, Factors]:
    """Read one expert, checking names, shapes, scale and finiteness against what is expected.

    Returns:
        Per module path A [r, D_in] and B [D_out, r] in fp32; empty factors where the rank is 0.

    Raises:
        ValueError: If anything differs; the message lists both name sets where names differ.
    """
    expected = adapter_config(ranks, scale, None)
    stored = read_json(folder / CONFIG_FILE)
    if not isinstance(stored, dict) or {**stored, "base_model_name_or_path": None} != expected:
        raise ValueError(f"{folder / CONFIG_FILE} must agree with cram.json, got {stored!r:.200}")
    tensors = read_tensors(folder / WEIGHTS_FILE, adapter_spec(ranks, shapes))
    weights = {}
    for name, rank in ranks.items():
        d_in, d_out = shapes[name]
        empty = (torch.zeros(0, d_in), torch.zeros(d_out, 0))
        key = f"{PREFIX}{name}.lora_"
        weights[name] = (tensors[f"{key}A.weight"], tensors[f"{key}B.weight"]) if rank > 0 else empty
    return weights


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
