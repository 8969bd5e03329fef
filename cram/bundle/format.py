"""What a bundle's files must look like: the manifest, `cram.json`, names and paths, all checked before use.

Everything here treats the folder as hostile: names follow a whitelist, links are refused, JSON objects have
exactly the known keys, and every file has the size and sha256 that the manifest lists. Nothing is read before
its size is known to be one that the bundle can need: first the manifest, then the sizes of all files, then
`cram.json`, and last the bytes of the tensors.
"""

from __future__ import annotations

import hashlib
import math
import re
import stat
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cram.atomic import read_json, recover_folder
from cram.bundle.peft_folder import CONFIG_FILE, WEIGHTS_FILE, adapter_spec, max_config_bytes
from cram.bundle.tensors import Spec, max_file_bytes
from cram.config import CramConfig, read_config
from cram.values import Values

FORMAT_VERSION = 4
# Format 3 has values of two weights of the base. Formats 1 and 2 keep CRAM's centroids and prototypes in a
# file of their own, also for other methods (zeros there); 1 does not say which method made it.
READABLE = (1, 2, 3, 4)
MANIFEST, DESCRIPTION, ROUTER = "manifest.json", "cram.json", "router.safetensors"
METHOD, SHARED_A = "method.safetensors", "shared_a.safetensors"
EXPERT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_FILE = re.compile(
    rf"{'|'.join(map(re.escape, (DESCRIPTION, ROUTER, METHOD, SHARED_A)))}|"
    rf"experts/{EXPERT_NAME.pattern}/({re.escape(CONFIG_FILE)}|{re.escape(WEIGHTS_FILE)})"
)
# Bytes of the manifest by entry, and of cram.json by expert: a rank for each of some thousand modules.
_MANIFEST_BYTES, _MANIFEST_ENTRY_BYTES = 4096, 600
_DESCRIPTION_BYTES, _EXPERT_BYTES = 1 << 20, 1 << 17
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_NAME, _MAX_DIMENSIONS = 500, 8
# cram.json: field -> type, by format, and the same for one entry of its lists and objects.
_COMMON: dict[str, type] = {
    "format": int,
    "family": str,
    "config": dict,
    "encoder": dict,
    "num_layers": int,
    "modules": dict,
    "experts": list,
}
_FIELDS: dict[int, dict[str, type]] = {
    1: {**_COMMON, "groups": dict},
    2: {**_COMMON, "groups": dict, "method": dict},
    3: {**_COMMON, "shared_a": bool, "method": dict},
    4: {**_COMMON, "shared_a": bool, "method": dict, "base_values": dict},
}
ENCODER_FIELDS: dict[str, type] = {
    "source": str,
    "text_dim": int,
    "image_dim": int,
    "reuses_vision_tower": bool,
}
_ENCODER_WEIGHTS: dict[str, type] = {"sha256": str, "values": dict}
_EXPERT_FIELDS: dict[str, type] = {"name": str, "ranks": dict}
_OLDER_EXPERT_FIELDS: dict[str, type] = {**_EXPERT_FIELDS, "group": int}
_GROUP_FIELDS: dict[str, type] = {"counts": list, "locks": dict}
_METHOD_FIELDS: dict[str, type] = {"tensors": dict, "values": dict}
_FILE_FIELDS: dict[str, type] = {"bytes": int, "sha256": str}


@dataclass(frozen=True)
class ExpertEntry:
    """One expert of a bundle and its rank in every module."""

    name: str
    ranks: dict[str, int]


@dataclass(frozen=True)
class Description:
    """What `cram.json` says.

    Attributes:
        format: Format of the bundle.
        config: The configuration, which names the method.
        family: Model family.
        base_values: Values of the base's weights; see `cram.model.frozen.identity`. None before format 4.
        older_values: Values of the first and the last adapted weight, in format 3 alone; not all have them.
        encoder: The CLIP that routes; see `ENCODER_FIELDS`. Older bundles have no `sha256` and no `values` of
            its weights.
        num_layers: Decoder layers.
        modules: Full module path -> (D_in, D_out), in model order.
        experts: The experts in order.
        shared_a: Whether one A serves all experts of a module and stands in a file of its own.
        tensors: Shapes of the tensors in `method.safetensors`, by name.
        values: JSON values that the method keeps. Before format 3: those of CRAM's groups.
        listed: The manifest's entry, bytes and sha256, of every file.
        stamps: What `check_unchanged` compares, by file, from before any of them was read.
    """

    format: int
    config: CramConfig
    family: str
    base_values: Values | None
    older_values: tuple[float, ...] | None
    encoder: dict[str, Any]
    num_layers: int
    modules: dict[str, tuple[int, int]]
    experts: tuple[ExpertEntry, ...]
    shared_a: bool
    tensors: dict[str, tuple[int, ...]]
    values: dict[str, Any]
    listed: dict[str, dict[str, Any]]
    stamps: dict[str, tuple[int, ...]]

    def files(self) -> set[str]:
        """The files of the bundle beside the manifest."""
        found = {f"experts/{e.name}/{file}" for e in self.experts for file in (CONFIG_FILE, WEIGHTS_FILE)}
        optional = ((ROUTER, self.format < 3), (METHOD, bool(self.tensors)), (SHARED_A, self.shared_a))
        return found | {DESCRIPTION} | {file for file, present in optional if present}

    def specs(self) -> dict[str, Spec]:
        """File of tensors -> names and shapes of its tensors."""
        sides = "B" if self.shared_a else "AB"
        found = {
            f"experts/{e.name}/{WEIGHTS_FILE}": adapter_spec(e.ranks, self.modules, sides)
            for e in self.experts
        }
        if self.shared_a:
            found[SHARED_A] = adapter_spec(self.experts[0].ranks, self.modules, "A")
        if self.tensors:
            found[METHOD] = self.tensors
        if self.format < 3:
            experts, groups = len(self.experts), len(self.values["counts"])
            image, text = self.encoder["image_dim"], self.encoder["text_dim"]
            centroids = (self.num_layers, experts, image if experts else 0)
            found[ROUTER] = {"centroids": centroids, "prototypes": (groups, text if groups else 0)}
        return found


def check_expert_name(name: str) -> None:
    """Refuse a name that cannot be a folder of the bundle.

    Raises:
        ValueError: If `name` has characters besides letters, digits, `_`, `-`, `.`, or starts with one
            of the last two.
    """
    if not EXPERT_NAME.fullmatch(name):
        raise ValueError(f"expert name must match {EXPERT_NAME.pattern}, got {name!r}")


def read_description(folder: Path) -> Description:
    """Check a bundle's manifest, `cram.json` and the sha256 of every file; tensors are not interpreted.

    Raises:
        ValueError: If a file is missing, altered, not listed, of another format, or reached through a link.
    """
    description = describe(folder)
    check_hashes(folder, description)
    check_unchanged(folder, description)
    return description


def describe(folder: Path) -> Description:
    """What `read_description` gives, with the sizes of all files checked and only the JSON read.

    Raises:
        ValueError: As `read_description`, but for altered tensors of the right size.
    """
    recover_folder(folder)
    stamps = {MANIFEST: _stamp(folder / MANIFEST)}
    version, listed = _read_manifest(folder)
    for name, entry in listed.items():
        path = _inside(folder, name)
        stamps[name] = _stamp(path)
        if (size := path.stat().st_size) != entry["bytes"]:
            raise ValueError(
                f"{path} must have {entry['bytes']} bytes as in {MANIFEST}, got an altered file of {size}"
            )
    file = folder / DESCRIPTION
    if DESCRIPTION not in listed:
        raise ValueError(f"{folder / MANIFEST} must list {DESCRIPTION}, got a list without it")
    limit = _DESCRIPTION_BYTES + _EXPERT_BYTES * sum(name.endswith(CONFIG_FILE) for name in listed)
    if (size := listed[DESCRIPTION]["bytes"]) > limit:
        raise ValueError(f"{file} must have at most {limit} bytes for its experts, got {size}")
    _check_hash(folder, DESCRIPTION, listed)
    data = read_json(file, limit)
    older = version < 4 and isinstance(data, dict) and "base_values" in data
    _check_fields(data, _FIELDS[version] | ({"base_values": list} if older else {}), str(file))
    if data["format"] != version:
        raise ValueError(
            f"{folder}: format of {DESCRIPTION} must be {version} as in {MANIFEST}, got {data['format']}"
        )
    try:
        description = _parse(data, listed, stamps)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    wanted = description.files()
    if wanted != listed.keys():
        raise ValueError(
            f"{folder / MANIFEST} must list exactly the files of the experts in {DESCRIPTION}, "
            f"got missing {sorted(wanted - listed.keys())[:8]}, "
            f"unexpected {sorted(listed.keys() - wanted)[:8]}"
        )
    _check_sizes(folder, description)
    return description


def check_hashes(folder: Path, description: Description) -> None:
    """Compare every file of a described bundle with its sha256 in the manifest.

    Raises:
        ValueError: If a file was altered.
    """
    for name in description.listed:
        _check_hash(folder, name, description.listed)


def check_unchanged(folder: Path, description: Description) -> None:
    """Refuse what was read of a described bundle if its files have been replaced or written since.

    A file is opened more than once: for its size, its hash, its header and its tensors. In between another
    bundle can take the folder's place.

    Raises:
        ValueError: If a file is not the one that was there when the bundle was described.
    """
    for name, stamp in description.stamps.items():
        if _stamp(folder / name) != stamp:
            raise ValueError(f"{folder / name} must stay as it is while the bundle is read, got a change")


def _stamp(path: Path) -> tuple[int, ...]:
    """What a file looks like from outside; empty where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _check_hash(folder: Path, name: str, listed: dict[str, dict[str, Any]]) -> None:
    if fingerprint(folder / name) != listed[name]:
        raise ValueError(f"{folder / name} must match its entry in {MANIFEST}, got an altered file")


def _check_sizes(folder: Path, description: Description) -> None:
    """No file may be larger than what `cram.json` says that it holds."""
    limits = {name: max_file_bytes(spec) for name, spec in description.specs().items()}
    for expert in description.experts:
        limit = max_config_bytes(expert.ranks, description.config.scale)
        limits[f"experts/{expert.name}/{CONFIG_FILE}"] = limit
    for name, limit in limits.items():
        if (size := description.listed[name]["bytes"]) > limit:
            raise ValueError(f"{folder / name} must have at most {limit} bytes by {DESCRIPTION}, got {size}")


def fingerprint(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest: its size in bytes and its sha256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read_manifest(folder: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} must be a bundle with a {MANIFEST}, got none")
    file = _inside(folder, MANIFEST)
    experts = folder / "experts"
    entries = 4 + 2 * (sum(1 for _ in experts.iterdir()) if experts.is_dir() else 0)
    data = read_json(file, _MANIFEST_BYTES + entries * _MANIFEST_ENTRY_BYTES)
    _check_fields(data, {"format": int, "files": dict}, str(file))
    if data["format"] not in READABLE:
        raise ValueError(f"format of {file} must be one of {READABLE}, got {data['format']}")
    if strange := [name for name in data["files"] if not _FILE.fullmatch(name)]:
        raise ValueError(f"{file} must list files of a bundle only, got {strange[:5]!r:.200}")
    for name, entry in data["files"].items():
        _check_fields(entry, _FILE_FIELDS, f"{file}: {name}")
        if not _SHA256.fullmatch(entry["sha256"]) or entry["bytes"] < 0:
            raise ValueError(f"{file}: {name} must have its size and sha256, got {entry!r:.200}")
    return data["format"], dict(data["files"])


def _inside(folder: Path, name: str) -> Path:
    """The path of a bundle's file, which must be a regular file reached without links."""
    path = folder
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            raise ValueError(f"{path} must not be a link: nothing outside the bundle is read")
    if not path.is_file() or not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} must be a file, got none: the bundle is incomplete")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} must lie inside {folder}, got {path.resolve()}")
    return path


def _check_fields(value: Any, fields: dict[str, type], where: str) -> None:
    """An object with exactly these fields and types; bool does not pass for int."""
    keys = set(value) if isinstance(value, dict) else None
    if keys != fields.keys():
        found = repr(sorted(keys) if keys else value)
        raise ValueError(f"{where} must have the keys {sorted(fields)}, got {found:.200}")
    for name, kind in fields.items():
        if type(value[name]) is not kind:
            raise ValueError(f"{where}: {name} must be a {kind.__name__}, got {value[name]!r:.100}")


def _parse(
    data: dict[str, Any], listed: dict[str, dict[str, Any]], stamps: dict[str, tuple[int, ...]]
) -> Description:
    version = data["format"]
    older = version < 4 and "base_values" in data
    known = {name: kind for name, kind in _ENCODER_WEIGHTS.items() if name in data["encoder"]}
    _check_fields(data["encoder"], ENCODER_FIELDS | (_ENCODER_WEIGHTS if version > 3 else known), "encoder")
    modules = {name: _sizes(name, shape) for name, shape in data["modules"].items()}
    shared = data.get("shared_a", False)
    experts = _parse_experts(
        data["experts"], _EXPERT_FIELDS if version > 2 else _OLDER_EXPERT_FIELDS, modules
    )
    if shared and len({tuple(expert.ranks.values()) for expert in experts}) != 1:
        raise ValueError("experts with a shared A must be one or more of equal ranks, got other experts")
    config = read_config(data["config"])
    if version > 2:
        _check_fields(data["method"], _METHOD_FIELDS, "method")
        tensors, values = data["method"]["tensors"], data["method"]["values"]
    else:
        tensors, values = data.get("method", {}), _values_of_groups(data, config)
    return Description(
        format=version,
        config=config,
        family=data["family"],
        base_values=_named_values("base_values", data["base_values"]) if version > 3 else None,
        older_values=_finite("base_values", data["base_values"]) if older else None,
        encoder={**data["encoder"], "values": _named_values("encoder", data["encoder"].get("values", {}))},
        num_layers=data["num_layers"],
        modules=modules,
        experts=experts,
        shared_a=shared,
        tensors={name: _state_shape(name, shape) for name, shape in tensors.items()},
        values=values,
        listed=listed,
        stamps=stamps,
    )


def _named_values(field: str, values: Any) -> Values:
    if not isinstance(values, dict) or not all(isinstance(each, list) for each in values.values()):
        raise ValueError(f"values in {field} must be lists by name, got {values!r:.200}")
    return {name: array("d", _finite(field, each)) for name, each in values.items()}


def _finite(field: str, values: Sequence[Any]) -> tuple[float, ...]:
    if not all(type(value) is float and math.isfinite(value) for value in values):
        raise ValueError(f"values in {field} must be finite numbers, got {values!r:.200}")
    return tuple(values)


def _parse_experts(
    listed: list[Any], fields: dict[str, type], modules: dict[str, tuple[int, int]]
) -> tuple[ExpertEntry, ...]:
    for expert in listed:
        _check_fields(expert, fields, "expert")
        check_expert_name(expert["name"])
        ranks = expert["ranks"]
        if ranks.keys() != modules.keys() or not all(type(r) is int and r >= 0 for r in ranks.values()):
            raise ValueError(f"ranks of {expert['name']} must be one per module, got {ranks!r:.200}")
    names = [expert["name"] for expert in listed]
    if len(set(names)) != len(names):
        raise ValueError(f"expert names must be unique, got {names!r:.200}")
    # In the order of the modules, whatever the order in the file.
    return tuple(
        ExpertEntry(each["name"], {path: each["ranks"][path] for path in modules}) for each in listed
    )


def _values_of_groups(data: dict[str, Any], config: CramConfig) -> dict[str, Any]:
    """CRAM's values from a bundle before format 3, which has them beside the method's."""
    _check_fields(data["groups"], _GROUP_FIELDS, "groups")
    counts, locks = data["groups"]["counts"], data["groups"]["locks"]
    if len(counts) > config.max_groups or not all(type(count) is int and count >= 1 for count in counts):
        raise ValueError(f"counts must be up to {config.max_groups} of at least 1, got {counts!r:.200}")
    if not all(type(group) is int and 0 <= group < len(counts) for group in locks.values()):
        raise ValueError(f"locks must name groups below {len(counts)}, got {locks!r:.200}")
    experts = [[expert["name"], expert["group"]] for expert in data["experts"]]
    return {"experts": experts, "locks": locks, "counts": counts}


def _state_shape(name: str, shape: Any) -> tuple[int, ...]:
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not whole or len(shape) > _MAX_DIMENSIONS or not 0 < len(name) <= _MAX_NAME:
        raise ValueError(f"method must give names their shapes, got {name!r:.100}: {shape!r:.100}")
    return tuple(shape)


def _sizes(name: str, shape: Any) -> tuple[int, int]:
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"module {name!r:.200} must have [in, out] sizes, got {shape!r:.100}")
    return shape[0], shape[1]
