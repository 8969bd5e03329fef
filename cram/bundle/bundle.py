"""A trained model's experts and method as a folder, written atomically and read with suspicion.

    experts/<name>/adapter_config.json, adapter_model.safetensors    a plain PEFT LoRA folder per expert
    shared_a.safetensors  the A that all experts share, if they do; their folders then hold B alone
    cram.json             configuration, family, modules with shapes, experts with ranks, the method's values
    method.safetensors    the method's tensors, if any (CRAM: centroids [L, E, D_q], prototypes [G, D_t])
    manifest.json         format version, size and sha256 of every file above; written last

Only safetensors and JSON are read, nothing outside the folder, nothing that the manifest does not list. Every
tensor's name and shape is checked against the base model before it is allocated, and NaN and infinity are
refused. A model is changed only after everything has been checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from cram.atomic import new_folder, write_json
from cram.attach import attach, attached, detach
from cram.bundle.format import (
    DESCRIPTION,
    ENCODER_FIELDS,
    FORMAT_VERSION,
    MANIFEST,
    METHOD,
    ROUTER,
    SHARED_A,
    Description,
    check_expert_name,
    fingerprint,
    read_description,
)
from cram.bundle.peft_folder import adapter_spec, read_adapter, write_adapter, write_factors
from cram.bundle.runs import bundle_at
from cram.bundle.tensors import read_tensors
from cram.families import family_of, match_linears
from cram.model.attached import AttachedModel
from cram.model.factors import Factors
from cram.routing.clip import ClipEncoder


def save(model: nn.Module, folder: str | Path) -> None:
    """Write the experts and the router of an attached model as a bundle.

    At every moment the folder is the previous one or the complete new one.

    Args:
        model: A model that `attach` has been called on; an expert in training is saved as it is.
        folder: Where to; an existing bundle is replaced, any other folder with files in it is refused.

    Raises:
        ValueError: If the model is not attached, `folder` holds something that is not a bundle, or a value is
            not finite.
    """
    cram = attached(model)
    folder = Path(folder)
    if folder.exists() and not (folder / MANIFEST).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"folder must be new, empty or a bundle, got {folder} with other files")
    for name in cram.expert_names:
        check_expert_name(name)
    state = cram.method.export_state()
    tensors = _storable(state.tensors)
    with new_folder(folder) as partial:
        _write_experts(cram, str(getattr(model.config, "_name_or_path", "")) or None, partial)
        if tensors:
            save_file(tensors, partial / METHOD)
        write_json(partial / DESCRIPTION, _describe(cram, tensors, state.values))
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        listed = {path.relative_to(partial).as_posix(): fingerprint(path) for path in files}
        write_json(partial / MANIFEST, {"format": FORMAT_VERSION, "files": listed})


def _write_experts(cram: AttachedModel, base: str | None, folder: Path) -> None:
    sides = "B" if cram.shares_a else "AB"
    for index, name in enumerate(cram.expert_names):
        weights = cram.expert_weights(index)
        (folder / "experts" / name).mkdir(parents=True)
        write_adapter(folder / "experts" / name, weights, cram.config.scale, base, sides)
        if cram.shares_a and index == 0:
            write_factors(folder / SHARED_A, weights, "A")


def load(model: nn.Module, folder: str | Path, encoder: Any = None, processor: Any = None) -> AttachedModel:
    """Put a bundle's experts and router onto a base model.

    Args:
        model: The base model that the bundle was trained on, plain or attached without experts.
        folder: The bundle, or a run folder, of which the newest complete state is taken.
        encoder: The encoder that routes; by default the attached one, else the CLIP that the bundle names.
        processor: See `attach`; unused where the model is attached.

    Returns:
        The model's handle, also `model.cram`.

    Raises:
        ValueError: If the bundle is damaged, incomplete or of another base model; the model is unchanged.
    """
    folder = bundle_at(Path(folder))
    description = read_description(folder)
    _check_base(model, description, folder)
    present = getattr(model, "cram", None)
    _check_target(present, description)
    weights = _read_experts(folder, description)
    state = read_tensors(folder / METHOD, description.tensors) if description.tensors else {}
    legacy = read_tensors(folder / ROUTER, _router_spec(description)) if description.format < 3 else {}
    cram = present or attach(
        model, description.config, encoder or _named_encoder(description, model), processor
    )
    if cram.config.method == "cram":
        state = {**state, **legacy}
    before = cram.method.export_state()
    try:
        cram.set_experts([expert.name for expert in description.experts], weights, trained=0)
        cram.method.import_state(state, description.values)
    except ValueError:
        if present is None:
            detach(model)
        else:
            cram.set_experts((), (), 0)
            cram.method.import_state(*before)
        raise
    return cram


def _read_experts(folder: Path, description: Description) -> list[dict[str, Factors]]:
    """The factors of every expert; one A is the same tensor in all experts that share it."""
    modules, scale, shared = description.modules, description.config.scale, None
    if description.shared_a:
        spec = adapter_spec(description.experts[0].ranks, modules, "A") if description.experts else {}
        shared = read_tensors(folder / SHARED_A, spec)
    return [
        read_adapter(folder / "experts" / expert.name, expert.ranks, modules, scale, shared)
        for expert in description.experts
    ]


def _describe(
    cram: AttachedModel, tensors: Mapping[str, torch.Tensor], values: dict[str, Any]
) -> dict[str, Any]:
    encoder = cram.encoder
    experts = [
        {"name": name, "ranks": cram.expert_ranks(index)} for index, name in enumerate(cram.expert_names)
    ]
    return {
        "format": FORMAT_VERSION,
        "family": cram.family.name,
        "config": cram.config.to_dict(),
        "encoder": {name: kind(getattr(encoder, name)) for name, kind in ENCODER_FIELDS.items()},
        "num_layers": cram.num_layers,
        "modules": {path: [m.in_features, m.out_features] for path, m in cram.modules.items()},
        "experts": experts,
        "shared_a": cram.num_experts > 0 and cram.shares_a,
        "method": {"tensors": {name: list(each.shape) for name, each in tensors.items()}, "values": values},
    }


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {tensor.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} must be finite, got NaN or Inf")
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _router_spec(description: Description) -> dict[str, tuple[int, ...]]:
    experts, groups = len(description.experts), len(description.values["counts"])
    image, text = description.encoder["image_dim"], description.encoder["text_dim"]
    return {
        "centroids": (description.num_layers, experts, image if experts else 0),
        "prototypes": (groups, text if groups else 0),
    }


def _check_base(model: nn.Module, description: Description, folder: Path) -> None:
    """The bundle's modules must be exactly the linears that the model is attached on, of equal sizes."""
    family = family_of(model)
    if family.name != description.family:
        raise ValueError(f"model must be of family {description.family!r} for {folder}, got {family.name!r}")
    cram = getattr(model, "cram", None)
    if cram is not None:
        found = {n: (m.base.in_features, m.base.out_features) for n, m in cram.modules.items()}
    else:
        matched = match_linears(model, family, description.config.target_projections).modules
        found = {n: (linear.in_features, linear.out_features) for n, (_, linear) in matched.items()}
    if found.keys() != description.modules.keys():
        raise ValueError(
            f"modules of {folder} must be those of the model, got only in the bundle "
            f"{sorted(description.modules.keys() - found.keys())[:8]}, only in the model "
            f"{sorted(found.keys() - description.modules.keys())[:8]}"
        )
    for name, sizes in description.modules.items():
        if found[name] != sizes:
            raise ValueError(f"{name} must have (in, out) sizes {sizes} as in {folder}, got {found[name]}")


def _check_target(cram: AttachedModel | None, description: Description) -> None:
    if cram is None:
        return
    if cram.expert_names:
        raise ValueError(f"model must have no experts yet, got {cram.expert_names}")
    config = description.config
    if description.format == 1:
        config = replace(config, method=cram.config.method)  # the format does not say which method made it
    if cram.config != config:
        raise ValueError("model must be attached with the bundle's configuration, got another one")


def _named_encoder(description: Description, model: nn.Module) -> ClipEncoder:
    if not description.encoder["source"]:
        raise ValueError("encoder must be given: the bundle does not name the CLIP it was trained with")
    return ClipEncoder.from_pretrained(description.encoder["source"], model=model)
