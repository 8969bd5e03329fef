"""Experts read from a bundle straight into the packs of their modules.

The packs are allocated once, at their final size and place, and are filled file after file. Beside them there
is one tensor at a time, so a load needs the memory of the experts and no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cram.bundle.format import SHARED_A, Description
from cram.bundle.peft_folder import PREFIX, adapter_spec, check_adapter
from cram.bundle.tensors import TensorFile, check_tensors
from cram_kernels import PackedExperts


def check_experts(folder: Path, description: Description) -> list[TensorFile]:
    """The headers of every expert's tensors, all checked; the shared A stands first, if there is one.

    Raises:
        ValueError: See `check_adapter` and `check_tensors`.
    """
    modules, scale, files = description.modules, description.config.scale, []
    if description.shared_a:
        spec = adapter_spec(description.experts[0].ranks, modules, "A")
        files.append(check_tensors(folder / SHARED_A, spec))
    sides = "B" if description.shared_a else "AB"
    for expert in description.experts:
        files.append(check_adapter(folder / "experts" / expert.name, expert.ranks, modules, scale, sides))
    return files


def read_packs(
    description: Description, files: list[TensorFile], linears: Mapping[str, nn.Linear]
) -> dict[str, PackedExperts]:
    """Read all experts into one frozen pack per module.

    Args:
        description: The bundle's description.
        files: What `check_experts` gave.
        linears: Module path -> base linear, on whose device the pack lies.

    Returns:
        Module path -> pack; empty for a bundle without experts.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    experts = description.experts
    if not experts:
        return {}
    packs = {path: _empty_pack(description, path, linears[path]) for path in description.modules}
    if description.shared_a:
        for name, tensor in files[0].read():
            path, _ = _place(name)
            for index in range(len(experts)):
                _fill(packs[path], index, "A", tensor)
    for index, file in enumerate(files[len(files) - len(experts) :]):
        for name, tensor in file.read():
            path, side = _place(name)
            _fill(packs[path], index, side, tensor)
    return packs


def _empty_pack(description: Description, path: str, linear: nn.Linear) -> PackedExperts:
    ranks = [expert.ranks[path] for expert in description.experts]
    d_in, d_out = description.modules[path]
    shared = description.shared_a and len(ranks) > 1 and ranks[0] > 0
    device = linear.weight.device
    a = torch.empty(ranks[0] if shared else sum(ranks), d_in, device=device)
    bt = torch.empty(sum(ranks), d_out, device=device)
    return PackedExperts(a, bt, ranks, description.config.scale, shared_a=shared)


def _place(name: str) -> tuple[str, str]:
    """Module path and side of a tensor by its name, which `adapter_spec` made."""
    path, end = name.removeprefix(PREFIX).rsplit(".lora_", 1)
    return path, end[0]


def _fill(pack: PackedExperts, index: int, side: str, tensor: Tensor) -> None:
    rows = slice(pack.offsets[index], pack.offsets[index + 1])
    if side == "B":
        pack.bt[rows].copy_(tensor.t())
    elif not pack.shared_a:
        pack.a[rows].copy_(tensor)
    elif index == 0:
        pack.a.copy_(tensor)
