"""A bundle as adapters for vLLM: one folder per instruction group, of rank R = sum of the experts' ranks.

    <out>/cram-g<group>-<content>/     adapter_config.json, adapter_model.safetensors, cram_group.json
    <out>/<bundle>.json                which adapters serve a bundle, one per group that has experts

    A = [A_1; ...; A_E],  B = scale [B_1, ..., B_E]      zeros where an expert has less rank in a module

An adapter's name contains a digest of its experts, so that another bundle's group is another adapter, and an
unchanged group stays the same one. Plain vLLM refuses the folders, because it would serve all gates as 1.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cram.atomic import new_folder, read_json, write_json
from cram.bundle.format import MANIFEST, Description, check_hashes, check_unchanged, describe, fingerprint
from cram.bundle.packs import check_experts
from cram.bundle.peft_folder import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from cram.bundle.runs import bundle_at
from cram.bundle.tensors import TensorFile
from cram.methods import METHODS
from cram.methods.parts.grouped import GroupedMethod
from cram.model.factors import Factors
from cram.serve.vllm.group import (
    ADAPTER,
    FORMAT,
    LADDER,
    MARKER,
    GateGroup,
    check_weights,
    read_group,
    write_group,
)

_GATED = re.compile(r"(?:^|\.)layers\.\d+\.(?:self_attn|mlp)\.[a-z_]+_proj$")
_RECORD_BYTES = 1 << 20
_DIGEST = 12


@dataclass(frozen=True)
class Adapter:
    """One exported group.

    Attributes:
        name: Under which vLLM serves it; also its folder's name.
        index: Which instruction group.
        group: Its description.
    """

    name: str
    index: int
    group: GateGroup


def export_groups(bundle: str | Path, out: str | Path) -> list[Adapter]:
    """Write the adapters of a bundle, and the record that names them.

    Args:
        bundle: A bundle of a method with instruction groups, or a run folder.
        out: Where to. Adapters that lie there whole are kept.

    Raises:
        ValueError: If the bundle is damaged, its method has no groups, it adapts something that vLLM cannot
            gate, or a group has more rank than a slot of vLLM. Nothing that serves is changed then.
    """
    bundle, out = bundle_at(Path(bundle)), Path(out)
    description = describe(bundle)
    members = groups_of(description, bundle)
    for index, experts in members.items():
        _check_group(description, index, experts)
    files = check_experts(bundle, description)
    check_hashes(bundle, description)
    shared = dict(files[0].read()) if description.shared_a else {}
    own = files[len(files) - len(description.experts) :]
    adapters = [
        _export_group(description, index, experts, [own[e] for e in experts], shared, out)
        for index, experts in members.items()
    ]
    check_unchanged(bundle, description)
    write_json(out / record_name(bundle), {"format": FORMAT, "adapters": {a.index: a.name for a in adapters}})
    return adapters


def exported(bundle: str | Path, out: str | Path) -> list[Adapter]:
    """The adapters that serve a bundle, as `export_groups` wrote them.

    Raises:
        ValueError: If the bundle was not exported to `out`, or an adapter is damaged.
    """
    bundle, out = bundle_at(Path(bundle)), Path(out)
    record = out / record_name(bundle)
    if not record.is_file():
        raise ValueError(f"{out} must hold the export of {bundle}, got none; export it first")
    data = read_json(record, _RECORD_BYTES)
    if (
        not isinstance(data, dict)
        or data.get("format") != FORMAT
        or not isinstance(data.get("adapters"), dict)
    ):
        raise ValueError(
            f"{record} must be a record of format {FORMAT}, got another; export the bundle again"
        )
    return [
        Adapter(str(name), int(index), read_group(out / str(name)))
        for index, name in data["adapters"].items()
    ]


def record_name(bundle: Path) -> str:
    """File name of a bundle's record: by the manifest, which has the sha256 of all files."""
    return f"{hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()[:16]}.json"


def groups_of(description: Description, bundle: Path) -> dict[int, list[int]]:
    """Instruction group -> indices of its experts, oldest first.

    Raises:
        ValueError: If the method has no groups or the bundle no experts.
    """
    method = description.config.method
    if method not in METHODS or not issubclass(METHODS[method], GroupedMethod):
        raise ValueError(
            f"{bundle} must be of a method with instruction groups for vLLM, got {method!r:.100}; "
            "serve it in process, or export single experts with `cram export`"
        )
    listed = description.values.get("experts")
    names = [expert.name for expert in description.experts]
    pairs = listed if isinstance(listed, list) and all(map(_is_pair, listed)) else []
    if [name for name, _ in pairs] != names or not names:
        raise ValueError(f"{bundle} must list a group for each of its experts, got {listed!r:.200}")
    found: dict[int, list[int]] = {}
    for index, (_, group) in enumerate(pairs):
        found.setdefault(group, []).append(index)
    return dict(sorted(found.items()))


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and type(entry[1]) is int and entry[1] >= 0


def _check_group(description: Description, index: int, experts: list[int]) -> None:
    """Refuse what a slot of vLLM cannot hold or the plugin cannot gate."""
    ranks = [max(description.experts[e].ranks.values(), default=0) for e in experts]
    if not 0 < sum(ranks) <= LADDER[-1]:
        raise ValueError(
            f"ranks of group {index} must add up to 1 to {LADDER[-1]}, the most of a slot of vLLM, got "
            f"{sum(ranks)} of {len(ranks)} experts; serve the bundle in process (--gate-floor saves time), "
            "merge experts, or learn the tasks in two groups"
        )
    used = {path for e in experts for path, rank in description.experts[e].ranks.items() if rank}
    if strange := sorted(path for path in used if not _GATED.search(path)):
        raise ValueError(
            "experts must adapt attention and MLP linears of decoder layers to be gated by vLLM (no output "
            f"head, no embeddings, no mixture-of-experts layers), got {strange[:5]}"
        )


def _export_group(
    description: Description,
    index: int,
    experts: list[int],
    files: list[TensorFile],
    shared: Mapping[str, Tensor],
    out: Path,
) -> Adapter:
    ranks = [max(description.experts[e].ranks.values()) for e in experts]
    factors = [_factors(file, shared, description.config.scale) for file in files]
    tensors = {}
    for path, (d_in, d_out) in description.modules.items():
        if any(path in each for each in factors):
            a, b = _joined([each.get(path) for each in factors], ranks, d_in, d_out)
            tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"] = a, b
    modules = tuple(path for path in description.modules if f"{PREFIX}{path}.lora_A.weight" in tensors)
    names = tuple(description.experts[e].name for e in experts)
    content = _content(tensors, (names, ranks, description.num_layers))
    folder = out / f"{ADAPTER}{index}-{content[:_DIGEST]}"
    known = _kept(folder, content)
    if known is None:
        with new_folder(folder) as partial:
            save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
            (partial / CONFIG_FILE).write_text(json.dumps(_config(sum(ranks), modules), indent=1) + "\n")
            weights = fingerprint(partial / WEIGHTS_FILE)
            known = GateGroup(FORMAT, names, tuple(ranks), description.num_layers, modules, content, weights)
            write_group(partial, known)
    return Adapter(folder.name, index, known)


def _factors(file: TensorFile, shared: Mapping[str, Tensor], scale: float) -> dict[str, Factors]:
    """Module path -> A [r, D_in] and scale * B [D_out, r] of one expert."""
    tensors = {**shared, **dict(file.read())}
    paths = [
        name.removeprefix(PREFIX).removesuffix(".lora_B.weight") for name in file.spec if ".lora_B" in name
    ]
    return {
        path: (tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"] * scale)
        for path in paths
    }


def _joined(factors: list[Factors | None], ranks: list[int], d_in: int, d_out: int) -> Factors:
    """One A [R, D_in] and B [D_out, R]; the rows of an expert begin at the sum of the ranks before."""
    a, b = torch.zeros(sum(ranks), d_in), torch.zeros(d_out, sum(ranks))
    start = 0
    for each, rank in zip(factors, ranks, strict=True):
        if each is not None:
            own = each[0].shape[0]
            a[start : start + own], b[:, start : start + own] = each
        start += rank
    return a, b


def _content(tensors: Mapping[str, Tensor], described: tuple[Any, ...]) -> str:
    state = hashlib.sha256(json.dumps([FORMAT, *described]).encode())
    for name in sorted(tensors):
        state.update(f"\0{name}\0{list(tensors[name].shape)}\0".encode())
        state.update(tensors[name].numpy().tobytes())
    return state.hexdigest()


def _kept(folder: Path, content: str) -> GateGroup | None:
    """The group in a folder if it lies there whole."""
    try:
        group = read_group(folder)
        check_weights(folder, group)
    except (OSError, ValueError):
        return None
    return group if group.content == content and (folder / CONFIG_FILE).is_file() else None


def _config(rank: int, modules: tuple[str, ...]) -> dict[str, Any]:
    """PEFT's configuration with alpha = r, since the scale is in B, and the mark that plain vLLM refuses."""
    targets = sorted({path.rsplit(".", 1)[1] for path in modules})
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": MARKER, "target_modules": targets}
