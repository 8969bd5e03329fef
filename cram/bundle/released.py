"""Checkpoints of CRAM's released code (and of Prism, on which it is built) become experts.

    adapter_model.bin   per linear lora_cram.expert_A [slots, R, D_in], expert_B [slots, D_out, R], expert_r
                        and expert_mask [slots]; a buffer, which is not read
    cram_state.bin      prototypes and counts of the groups, the tasks and slots of each group, and
                        centroid_vis [L, slots, D_q]

The files are pickles. They are read with `weights_only`, which admits tensors and plain values alone, and
only by this explicit conversion. An expert adds 2 B A there too, whatever its rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cram.bundle.format import check_expert_name
from cram.bundle.importer import module_path
from cram.methods.parts.grouped import GroupedMethod
from cram.model.attached import AttachedModel
from cram.model.factors import Factors

WEIGHTS, STATE = "adapter_model.bin", "cram_state.bin"
SCALE = 2.0
_KEY = re.compile(r"(.+)\.lora_cram(?:\.[^.]+)?\.(expert_A|expert_B|expert_r|expert_mask|buf_A|buf_B)")
# What a file raises that is no such pickle, or one of other objects.
_FAULTS = (RuntimeError, EOFError, ValueError, torch.serialization.pickle.UnpicklingError)  # type: ignore[attr-defined]


def import_released(cram: AttachedModel, folder: str | Path, tasks: Sequence[str]) -> list[str]:
    """Take all experts and groups of a released checkpoint; nothing changes if a check fails.

    Args:
        cram: The handle of a model without experts, whose method has groups.
        folder: Holds `adapter_model.bin` and `cram_state.bin`.
        tasks: Names of the tasks, in the order of their numbers in the checkpoint.

    Returns:
        The names of the experts, oldest first.

    Raises:
        ValueError: If the files are absent, hold something else than tensors and plain values, or do not fit
            the model, its encoder, its configuration or the names.
    """
    method = cram.method
    if not isinstance(method, GroupedMethod) or cram.num_experts:
        raise ValueError(f"model must have a method with groups and no experts, got {method.name!r}")
    if cram.config.scale != SCALE:
        raise ValueError(f"scale must be {SCALE:g}, as in the released code, got {cram.config.scale:g}")
    folder = Path(folder)
    state, weights = _load(folder / STATE), _load(folder / WEIGHTS)
    slots = _slots(state, tasks)
    centroids = _centroids(cram, state, folder)
    factors = _factors(cram, weights, folder / WEIGHTS)
    experts = {}
    for task, (slot, _) in slots.items():
        check_expert_name(task)
        experts[task] = {path: _expert(each, slot) for path, each in factors.items()}
        cram.check_expert(task, experts[task])
    tensors = {
        "prototypes": torch.stack([each.float() for each in state["group_prototypes"]]),
        "counts": torch.tensor(state["group_counts"], dtype=torch.int64),
    }
    if tensors["prototypes"].shape[1:] != (cram.encoder.text_dim,):
        wanted = cram.encoder.text_dim
        raise ValueError(f"prototypes must have {wanted} values, got {list(tensors['prototypes'].shape)}")
    method.router.groups.import_state(tensors, {"locks": {task: group for task, (_, group) in slots.items()}})
    for task, (slot, group) in slots.items():
        method.add_expert(task, experts[task], group, centroids[:, slot].float(), trained=False)
    return list(slots)


def _load(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file.parent} must hold {WEIGHTS} and {STATE}, got no {file.name}")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except _FAULTS as error:
        told = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} must hold tensors and plain values alone, got {told}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold values by name, got {type(found).__name__}")
    return found


def _slots(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Task name -> (slot, group), by number of the task."""
    keys = ("group_prototypes", "group_counts", "group_tasks", "group_experts", "centroid_vis")
    if missing := [key for key in keys if key not in state]:
        raise ValueError(f"{STATE} must hold {list(keys)}, got none of {missing}")
    rows = zip(state["group_tasks"], state["group_experts"], strict=True)
    found = {
        int(task): (int(slot), group)
        for group, (tasks, slots) in enumerate(rows)
        for task, slot in zip(tasks, slots, strict=True)
    }
    if not found or len(found) != len(names) or len(set(names)) != len(names):
        raise ValueError(f"names must be given to the tasks {sorted(found)}, got {list(names)}")
    return {name: found[number] for name, number in zip(names, sorted(found), strict=True)}


def _centroids(cram: AttachedModel, state: Mapping[str, Any], folder: Path) -> Tensor:
    found: Tensor = state["centroid_vis"]
    if found.dim() != 3 or (found.shape[0], found.shape[2]) != (cram.num_layers, cram.encoder.image_dim):
        wanted = f"[{cram.num_layers}, slots, {cram.encoder.image_dim}]"
        raise ValueError(f"centroid_vis in {folder / STATE} must be {wanted}, got {list(found.shape)}")
    if not bool(found.isfinite().all()):
        raise ValueError(f"centroid_vis in {folder / STATE} must be finite, got NaN or Inf")
    return found


def _factors(cram: AttachedModel, weights: Mapping[str, Any], file: Path) -> dict[str, dict[str, Tensor]]:
    """Module path -> part -> tensor; exactly the adapted linears."""
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, value in weights.items():
        match = _KEY.fullmatch(key)
        path = None if match is None else module_path(match[1])
        if match is None or path is None or path not in cram.modules:
            strange.append(key)
        else:
            found.setdefault(path, {})[match[2]] = value
    whole = {path for path, parts in found.items() if {"expert_A", "expert_B", "expert_r"} <= parts.keys()}
    if strange or whole != set(cram.modules):
        lost = sorted(set(cram.modules) - whole)
        raise ValueError(
            f"{file} must hold the experts of the model's adapted linears and nothing else, got also "
            f"{strange[:4]} and none of {lost[:4]}"
        )
    return found


def _expert(parts: Mapping[str, Tensor], slot: int) -> Factors:
    """(a [r, D_in], b [D_out, r]) of one slot, without the rows beyond its rank."""
    used = "expert_mask" not in parts or bool(parts["expert_mask"][slot])
    rank = int(parts["expert_r"][slot]) if used else 0
    a, b = parts["expert_A"][slot, :rank], parts["expert_B"][slot, :, :rank]
    return a.float().contiguous(), b.float().contiguous()
