"""A trained model's experts and router as a folder, written atomically and read with suspicion.

    experts/<name>/adapter_config.json, adapter_model.safetensors    a plain PEFT LoRA folder an expert
    cram.json             configuration, family, modules with shapes, experts with groups and ranks, groups
    router.safetensors    centroids [L, E, D_q], prototypes [G, D_t]
    method.safetensors    what the method keeps besides, if anything; names and shapes are in cram.json
    manifest.json         format version, size and sha256 of every file above; written last

Only safetensors and JSON are read, nothing outside the folder, nothing that the manifest does not list; every
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
from cram.attach import Cram, attach, attached, detach
from cram.bundle.format import (
    DESCRIPTION,
    ENCODER_FIELDS,
    FORMAT_VERSION,
    MANIFEST,
    METHOD,
    ROUTER,
    Description,
    check_expert_name,
    fingerprint,
    read_description,
)
from cram.bundle.peft_folder import read_adapter, write_adapter
from cram.bundle.tensors import read_tensors
from cram.families import family_of, match_linears
from cram.model.linear import ExpertLinear
from cram.routing.clip import ClipEncoder
from cram_kernels import PackedExperts


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
    for name in cram.router.expert_names:
        check_expert_name(name)
    with new_folder(folder) as partial:
        for index, name in enumerate(cram.router.expert_names):
            (partial / "experts" / name).mkdir(parents=True)
            base = str(getattr(model.config, "_name_or_path", "")) or None
            write_adapter(partial / "experts" / name, cram.expert_weights(index), cram.config.scale, base)
        router = {"centroids": cram.router.centroids(), "prototypes": cram.router.groups.prototypes}
        save_file(_storable(router), partial / ROUTER)
        state = _storable(cram.method.state())
        if state:
            save_file(state, partial / METHOD)
        write_json(partial / DESCRIPTION, _describe(cram, state))
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        listed = {path.relative_to(partial).as_posix(): fingerprint(path) for path in files}
        write_json(partial / MANIFEST, {"format": FORMAT_VERSION, "files": listed})


def load(model: nn.Module, folder: str | Path, encoder: Any = None, processor: Any = None) -> Cram:
    """Put a bundle's experts and router onto a base model.

    Args:
        model: The base model that the bundle was trained on, plain or attached without experts.
        folder: The bundle.
        encoder: The encoder that routes; by default the attached one, else the CLIP that the bundle names.
        processor: See `attach`; unused where the model is attached.

    Returns:
        The model's `Cram`, also `model.cram`.

    Raises:
        ValueError: If the bundle is damaged, incomplete or of another base model; the model is unchanged.
    """
    folder = Path(folder)
    description = read_description(folder)
    _check_base(model, description, folder)
    scale = description.config.scale
    weights = [
        read_adapter(folder / "experts" / expert.name, expert.ranks, description.modules, scale)
        for expert in description.experts
    ]
    router = read_tensors(folder / ROUTER, _router_spec(description))
    state = read_tensors(folder / METHOD, description.method) if description.method else {}
    present = getattr(model, "cram", None)
    _check_target(present, description)
    cram = present or attach(
        model, description.config, encoder or _named_encoder(description, model), processor
    )
    before = cram.router.groups.export_state()
    counts = torch.tensor(description.counts, dtype=torch.int64)
    groups = {"prototypes": router["prototypes"], "counts": counts}
    try:
        cram.router.groups.import_state(groups, {"locks": description.locks})
        for index, (expert, factors) in enumerate(zip(description.experts, weights, strict=True)):
            cram.add_expert(expert.name, factors, expert.group, router["centroids"][:, index], trained=False)
        cram.method.load_state(state)
    except ValueError:
        if present is None:
            detach(model)
        else:
            cram.set_experts((), (), 0)
            cram.router.groups.import_state(*before)
        raise
    return cram


def expert_ranks(cram: Cram, index: int) -> dict[str, int]:
    """Module path -> rank of one expert."""
    return {name: _packed(linear).ranks[index] for name, linear in cram.modules.items()}


def _packed(linear: ExpertLinear) -> PackedExperts:
    if linear.experts is None:
        raise ValueError(f"{linear.name} must have experts, got none")
    return linear.experts


def _describe(cram: Cram, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    router, encoder = cram.router, cram.encoder
    modules = {
        name: [linear.base.in_features, linear.base.out_features] for name, linear in cram.modules.items()
    }
    experts = [
        {"name": name, "group": router.expert_groups[index], "ranks": expert_ranks(cram, index)}
        for index, name in enumerate(router.expert_names)
    ]
    return {
        "format": FORMAT_VERSION,
        "family": cram.family.name,
        "config": cram.config.to_dict(),
        "encoder": {name: kind(getattr(encoder, name)) for name, kind in ENCODER_FIELDS.items()},
        "num_layers": router.num_layers,
        "modules": modules,
        "experts": experts,
        "groups": {"counts": router.groups.counts.tolist(), "locks": router.groups.locks},
        "method": {name: list(tensor.shape) for name, tensor in state.items()},
    }


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {tensor.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} must be finite, got NaN or Inf")
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _router_spec(description: Description) -> dict[str, tuple[int, ...]]:
    experts, groups = len(description.experts), len(description.counts)
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


def _check_target(cram: Cram | None, description: Description) -> None:
    if cram is None:
        return
    if cram.router.expert_names:
        raise ValueError(f"model must have no experts yet, got {cram.router.expert_names}")
    config = description.config
    if description.format == 1:
        config = replace(config, method=cram.config.method)  # the format does not say which method made it
    if cram.config != config:
        raise ValueError("model must be attached with the bundle's configuration, got another one")


def _named_encoder(description: Description, model: nn.Module) -> ClipEncoder:
    if not description.encoder["source"]:
        raise ValueError("encoder must be given: the bundle does not name the CLIP it was trained with")
    return ClipEncoder.from_pretrained(description.encoder["source"], model=model)
