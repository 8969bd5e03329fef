"""Experts as something that works without this package: a PEFT LoRA folder, or weights of the base model.

With fixed gates g_e of a layer the experts of a linear add

    sum_e g_e scale B_e A_e  =  scale [g_1 B_1, ..., g_E B_E] [A_1; ...; A_E]

so they are exactly one LoRA whose rank is the sum of theirs. A is concatenated along the rank, B gets the
gates. Where all experts share one A, that A stands in the result once and the weighted B are summed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cram.atomic import new_folder
from cram.attach import attached, detach
from cram.bundle.peft_folder import write_adapter
from cram.model.attached import AttachedModel
from cram.model.factors import Factors
from cram.model.frozen.forward import is_plain


def export_lora(
    model: Any, folder: str | Path, gates: Mapping[str, float] | Tensor, scale: float | None = None
) -> None:
    """Write experts with fixed gates as one plain PEFT LoRA folder.

    One expert with gate 1 is written as it is. `peft.PeftModel.from_pretrained(base, folder)` then gives what
    the attached model gives inside `model.cram.fixed(gates)`.

    Args:
        model: An attached model.
        folder: A new or empty folder.
        gates: Expert -> gate, 0 for experts that are not named; or [E], or [L, E] with a row per layer.
        scale: What PEFT multiplies B A by (alpha / r), folded into B; by default the configuration's scale.
            A power of two times that scale changes B exactly.

    Raises:
        ValueError: If the folder has files, an expert is unknown, no gate differs from 0, a gate is not
            finite, `scale` is not positive, or the method acts elsewhere in the model, too.
    """
    cram = attached(model)
    weights = combined(cram, gates)
    own = cram.config.scale if scale is None else scale
    if not 0 < own < float("inf"):
        raise ValueError(f"scale must be positive, got {own}")
    if own != cram.config.scale:
        factor = cram.config.scale / own
        weights = {path: (a, (b.double() * factor).float()) for path, (a, b) in weights.items()}
    if not any(a.shape[0] for a, _ in weights.values()):
        raise ValueError(f"experts must have a rank above 0 in some linear, got none of {cram.expert_names}")
    _check_new(Path(folder))
    base = str(getattr(model.config, "_name_or_path", "")) or None
    with new_folder(Path(folder)) as partial:
        write_adapter(partial, weights, own, base)


def merge(model: Any, gates: Mapping[str, float] | Tensor) -> None:
    """Add experts with fixed gates to the base weights and detach the model.

    The model is a plain transformers model afterwards, which answers as if every question had these gates.
    The sum is rounded once to the dtype of the weight.

    Args:
        model: An attached model.
        gates: See `export_lora`.

    Raises:
        ValueError: As `export_lora`, or if a base linear is not exactly `nn.Linear` with a floating point
            weight: quantised, offloaded, parametrised, with hooks.
    """
    cram = attached(model)
    weights = combined(cram, gates)
    linears = {path: module.base for path, module in cram.modules.items()}
    for path, linear in linears.items():
        if not is_plain(linear) or not linear.weight.is_floating_point():
            raise ValueError(
                f"{path} must be a plain linear with a floating point weight to be merged, got "
                f"{type(linear).__name__} with {type(linear.weight).__name__} of {linear.weight.dtype}; put "
                "the bundle on the base as it was before it was quantised, offloaded or hooked"
            )
    detach(model)
    with torch.no_grad():
        for path, (a, b) in weights.items():
            weight = linears[path].weight
            update = cram.config.scale * (b.double() @ a.double())
            weight.copy_((weight.double() + update).to(weight.dtype))


def export_merged(
    model: Any, folder: str | Path, gates: Mapping[str, float] | Tensor, processor: Any
) -> None:
    """Write the base model with merged experts as a model folder of transformers; see `merge`.

    Args:
        model: An attached model; it is detached and merged.
        folder: A new or empty folder.
        gates: See `export_lora`.
        processor: Written beside the model.

    Raises:
        ValueError: As `merge`, or if the folder has files.
    """
    _check_new(Path(folder))
    merge(model, gates)
    with new_folder(Path(folder)) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)


def combined(cram: AttachedModel, gates: Mapping[str, float] | Tensor) -> dict[str, Factors]:
    """Module path -> A [r, D_in], B [D_out, r] of the experts with fixed gates; rank 0 where none acts.

    Raises:
        ValueError: As `export_lora`.
    """
    if cram.method.acts_elsewhere:
        raise ValueError(
            f"experts must hold all that their method does, got {cram.method.name!r}, which has LoRAs in the "
            "projector, too; the result would answer otherwise about pictures"
        )
    table = gate_table(cram, gates)
    experts = [cram.expert_weights(index) for index in range(cram.num_experts)]
    found = {}
    for path, module in cram.modules.items():
        row = table[module.layer].tolist()
        acting = [(gate, *each[path]) for gate, each in zip(row, experts, strict=True) if gate]
        found[path] = _joined(acting, experts[0][path], cram.shares_a)
    return found


def gate_table(cram: AttachedModel, gates: Mapping[str, float] | Tensor) -> Tensor:
    """Gates [L, E] in float64 from names, [E] or [L, E].

    Raises:
        ValueError: As `export_lora`.
    """
    names, layers = cram.expert_names, cram.num_layers
    if isinstance(gates, Mapping):
        if unknown := sorted(gates.keys() - set(names)):
            raise ValueError(f"gates must be of experts among {names}, got {unknown}")
        gates = torch.tensor([float(gates.get(name, 0.0)) for name in names], dtype=torch.float64)
    table = gates.detach().double().cpu()
    if table.shape not in ((len(names),), (layers, len(names))):
        raise ValueError(f"gates must be [{len(names)}] or [{layers}, {len(names)}], got {list(table.shape)}")
    if not bool(table.isfinite().all()):
        raise ValueError("gates must be finite, got NaN or Inf")
    if not bool(table.any()):
        raise ValueError("gates must not all be 0: no expert would act")
    return table.expand(layers, len(names))


def _joined(acting: list[tuple[float, Tensor, Tensor]], like: Factors, shares_a: bool) -> Factors:
    if not acting:
        return like[0][:0], like[1][:, :0]
    weighted = [b if gate == 1 else (b.double() * gate).float() for gate, _, b in acting]
    if len(acting) == 1:
        return acting[0][1], weighted[0]
    if shares_a:
        total = torch.stack([b.double() * gate for gate, _, b in acting]).sum(0)
        return acting[0][1], total.float()
    return torch.cat([a for _, a, _ in acting]), torch.cat(weighted, dim=1)


def _check_new(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"folder must be new or empty, got {folder} with files")
