"""A trained model's experts and method as a folder, written atomically and read with suspicion.

    experts/<name>/adapter_config.json, adapter_model.safetensors    a plain PEFT LoRA folder per expert
    shared_a.safetensors  the A that all experts share, if they do; their folders then hold B alone
    cram.json             configuration, family, modules with shapes, experts with ranks, the method's values
    method.safetensors    the method's tensors, if any (CRAM: centroids [L, E, D_q], prototypes [G, D_t])
    manifest.json         format version, size and sha256 of every file above; written last

Only safetensors and JSON are read, nothing outside the folder, nothing that the manifest does not list. Every
tensor's name and shape is checked against the base model before it is allocated, and NaN and infinity are
refused. A load that is refused leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from cram.atomic import new_folder, write_json
from cram.attach import attach, attached, detach
from cram.bundle.encoder import check_encoder, named_encoder
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
    check_hashes,
    check_unchanged,
    describe,
    fingerprint,
)
from cram.bundle.packs import check_experts, read_packs
from cram.bundle.peft_folder import write_adapter, write_factors
from cram.bundle.runs import bundle_at
from cram.bundle.tensors import check_tensors
from cram.families import family_of, match_linears
from cram.methods import METHODS
from cram.model.attached import AttachedModel
from cram.model.frozen.identity import base_values, check_base_values, check_older_values
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
    description = describe(folder)
    linears = _check_base(model, description, folder)
    present = getattr(model, "cram", None)
    _check_target(present, description, folder)
    method = (present or description).config.method
    _check_method(method, description, folder)
    if present is not None or encoder is not None:
        check_encoder(present.encoder if present is not None else encoder, description, folder)
    files = check_experts(folder, description)
    # Before format 3 every method's bundle had CRAM's centroids and prototypes, of no use to the others.
    kept = (METHOD, ROUTER) if method == "cram" else (METHOD,)
    specs = {name: spec for name, spec in description.specs().items() if name in kept}
    state_files = [check_tensors(folder / name, spec) for name, spec in specs.items()]
    check_hashes(folder, description)
    packs = read_packs(description, files, linears)
    state = {name: tensor for file in state_files for name, tensor in file.read()}
    check_unchanged(folder, description)
    if encoder is None and present is None:
        encoder = named_encoder(description, model)
        check_encoder(encoder, description, folder)
    cram = present or attach(model, description.config, encoder, processor)
    _take_up(cram, description, packs, state, folder, model if present is None else None)
    return cram


def _take_up(
    cram: AttachedModel,
    description: Description,
    packs: Mapping[str, PackedExperts],
    state: Mapping[str, torch.Tensor],
    folder: Path,
    attached_for_it: nn.Module | None,
) -> None:
    """Put packs and the method's state into a model without experts; all of it or nothing.

    A model that was attached for this bundle is detached again where the method refuses the state.
    """
    before, pool, taken = cram.method.export_state(), cram.pool, False
    try:
        cram.set_packs([expert.name for expert in description.experts], packs)
        cram.method.import_state(state, description.values)
        taken = True
    except ValueError as error:
        raise ValueError(f"{folder} must hold what its method can take up: {error}") from error
    finally:
        if not taken and attached_for_it is not None:
            detach(attached_for_it)
        elif not taken:
            cram.set_packs([], {})
            cram.pool = pool
            # Whoever has taken older experts out of the model puts back what the method knows of them.
            with suppress(ValueError):
                cram.method.import_state(*before)


def check_base(model: nn.Module, folder: str | Path) -> None:
    """Refuse a bundle of another base model, by all that `load` compares; the model stays as it is.

    Args:
        model: A base model, attached or not.
        folder: The bundle, or a run folder.

    Raises:
        ValueError: If the bundle is damaged, or family, modules, sizes or weights are not the model's.
    """
    folder = bundle_at(Path(folder))
    _check_base(model, describe(folder), folder)


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
        "base_values": cram.base_values,
        "config": cram.config.to_dict(),
        "encoder": {
            **{name: kind(getattr(encoder, name)) for name, kind in ENCODER_FIELDS.items()},
            "sha256": encoder.sha256,
            "values": encoder.values,
        },
        "num_layers": cram.num_layers,
        "modules": {path: [m.in_features, m.out_features] for path, m in cram.modules.items()},
        "experts": experts,
        "shared_a": cram.shares_a,
        "method": {"tensors": {name: list(each.shape) for name, each in tensors.items()}, "values": values},
    }


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {tensor.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} must be finite, got NaN or Inf")
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _check_base(model: nn.Module, description: Description, folder: Path) -> dict[str, nn.Linear]:
    """The linears of the model, which must be exactly the bundle's modules, of equal sizes."""
    family = family_of(model)
    if family.name != description.family:
        raise ValueError(f"model must be of family {description.family!r} for {folder}, got {family.name!r}")
    cram = getattr(model, "cram", None)
    if cram is not None:
        linears, layers = {name: module.base for name, module in cram.modules.items()}, cram.num_layers
    else:
        try:
            matched = match_linears(model, family, description.config.target_projections)
        except ValueError as error:
            raise ValueError(f"{folder} must be of the model: {error}") from error
        linears = {name: linear for name, (_, linear) in matched.modules.items()}
        layers = matched.num_layers
    found = {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}
    if layers != description.num_layers:
        raise ValueError(f"layers of {folder} must be the model's {layers}, got {description.num_layers}")
    if found.keys() != description.modules.keys():
        raise ValueError(
            f"modules of {folder} must be those of the model, got only in the bundle "
            f"{sorted(description.modules.keys() - found.keys())[:8]}, only in the model "
            f"{sorted(found.keys() - description.modules.keys())[:8]}"
        )
    for name, sizes in description.modules.items():
        if found[name] != sizes:
            raise ValueError(f"{name} must have (in, out) sizes {sizes} as in {folder}, got {found[name]}")
    if description.base_values is not None:
        values = base_values(model) if cram is None else cram.base_values
        check_base_values(description.base_values, values, folder)
    if description.older_values is not None:
        check_older_values(description.older_values, list(linears.values()), folder)
    return linears


def _check_method(name: str, description: Description, folder: Path) -> None:
    if name not in METHODS:
        raise ValueError(f"{folder}: method must be one of {sorted(METHODS)}, got {name!r:.100}")
    pool, names = METHODS[name].pool, tuple(expert.name for expert in description.experts)
    if pool is not None and names not in ((), pool):
        raise ValueError(f"experts of {name} in {folder} must be {list(pool)} or none, got {names!r:.200}")


def _check_target(cram: AttachedModel | None, description: Description, folder: Path) -> None:
    if cram is None:
        return
    if cram.expert_names:
        raise ValueError(f"model must have no experts yet, got {cram.expert_names}; call detach first")
    config = description.config
    if description.format == 1:
        config = replace(config, method=cram.config.method)  # the format does not say which method made it
    if cram.config != config:
        raise ValueError(f"model must be attached with the bundle's configuration, got another than {folder}")
