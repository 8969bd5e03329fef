"""One expert as a plain PEFT LoRA folder: `adapter_config.json` and `adapter_model.safetensors`.

Every module has its own rank, so `rank_pattern` and `alpha_pattern` name each module by its full path and
`target_modules` lists exactly the modules with a rank; by PEFT's rule for names a bare `q_proj` would reach
the vision tower too. PEFT, and whatever reads PEFT folders, loads an expert without this package.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from cram.atomic import read_json
from cram.bundle.tensors import Spec, TensorFile, check_tensors
from cram.model.factors import Factors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_BASE_NAME_BYTES = 8192


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


def adapter_spec(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], sides: str = "AB") -> Spec:
    """Names and shapes of the tensors of an expert.

    Args:
        ranks: Module path -> rank.
        shapes: Module path -> (D_in, D_out).
        sides: Which factors: "AB", or "A" or "B" alone.
    """
    spec: Spec = {}
    for name, rank in ranks.items():
        d_in, d_out = shapes[name]
        both = {"A": (rank, d_in), "B": (d_out, rank)}
        if rank > 0:
            spec.update({f"{PREFIX}{name}.lora_{side}.weight": both[side] for side in sides})
    return spec


def write_adapter(
    folder: Path, weights: Mapping[str, Factors], scale: float, base: str | None, sides: str = "AB"
) -> None:
    """Write one expert.

    Args:
        folder: An existing, empty folder.
        weights: Per module path A [r, D_in] and B [D_out, r]; rank 0 leaves the module out.
        scale: What B A is multiplied by, alpha / r in PEFT.
        base: Name of the base model for `base_model_name_or_path`.
        sides: "AB"; "B" where A stands elsewhere, which PEFT does not read.
    """
    ranks = {name: a.shape[0] for name, (a, _) in weights.items()}
    text = json.dumps(adapter_config(ranks, scale, base), indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n")
    write_factors(folder / WEIGHTS_FILE, weights, sides)


def write_factors(file: Path, weights: Mapping[str, Factors], sides: str) -> None:
    """Write the factors of modules of rank 1 and more under PEFT's names; `sides` as in `adapter_spec`."""
    tensors = {}
    for name, (a, b) in weights.items():
        both = {"A": a, "B": b}
        if a.shape[0] > 0:
            found = {f"{PREFIX}{name}.lora_{side}.weight": both[side] for side in sides}
            tensors.update({key: tensor.detach().cpu().contiguous() for key, tensor in found.items()})
    save_file(tensors, file, metadata={"format": "pt"})


def check_adapter(
    folder: Path, ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], scale: float, sides: str
) -> TensorFile:
    """Check one expert's configuration, and names and shapes of its tensors, against what is expected.

    Args:
        folder: The expert's folder.
        ranks: Module path -> rank.
        shapes: Module path -> (D_in, D_out).
        scale: The scale of every module.
        sides: "AB"; "B" where A stands elsewhere.

    Raises:
        ValueError: If anything differs; the message lists both name sets where names differ.
    """
    expected = adapter_config(ranks, scale, None)
    stored = read_json(folder / CONFIG_FILE, max_config_bytes(ranks, scale))
    base = stored.get("base_model_name_or_path") if isinstance(stored, dict) else None
    named = base is None or isinstance(base, str)
    if not isinstance(stored, dict) or not named or {**stored, "base_model_name_or_path": None} != expected:
        raise ValueError(f"{folder / CONFIG_FILE} must agree with cram.json, got {stored!r:.200}")
    return check_tensors(folder / WEIGHTS_FILE, adapter_spec(ranks, shapes, sides))


def max_config_bytes(ranks: Mapping[str, int], scale: float) -> int:
    """Bytes that an expert's `adapter_config.json` has at most; indentation at most doubles them."""
    return 2 * len(json.dumps(adapter_config(ranks, scale, None))) + _BASE_NAME_BYTES
