"""What a bundle's files must look like: the manifest, `cram.json`, names and paths, all checked before use.

Everything here treats the folder as hostile: names follow a whitelist, links are refused, JSON objects have
exactly the known keys, and every file has the size and sha256 that the manifest lists.
"""

from __future__ import annotations

import hashlib
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cram.atomic import read_json, recover_folder
from cram.bundle.peft_folder import CONFIG_FILE, WEIGHTS_FILE
from cram.config import CramConfig, read_config

FORMAT_VERSION = 3
# Formats 1 and 2 keep CRAM's centroids and prototypes in a file of their own, also for other methods (zeros
# there); 1 does not say which method made it.
READABLE = (1, 2, 3)
MANIFEST, DESCRIPTION, ROUTER = "manifest.json", "cram.json", "router.safetensors"
METHOD, SHARED_A = "method.safetensors", "shared_a.safetensors"
EXPERT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_FILE = re.compile(
    rf"{'|'.join(map(re.escape, (DESCRIPTION, ROUTER, METHOD, SHARED_A)))}|"
    rf"experts/{EXPERT_NAME.pattern}/({re.escape(CONFIG_FILE)}|{re.escape(WEIGHTS_FILE)})"
)
_MAX_JSON_BYTES = 50_000_000
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
}
ENCODER_FIELDS: dict[str, type] = {
    "source": str,
    "text_dim": int,
    "image_dim": int,
    "reuses_vision_tower": bool,
}
_EXPERT_FIELDS: dict[str, type] = {"name": str, "ranks": dict}
_GROUP_FIELDS: dict[str, type] = {"counts": list, "locks": dict}
_METHOD_FIELDS: dict[str, type] = {"tensors": dict, "values": dict}


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
        encoder: The CLIP that routes; see `ENCODER_FIELDS`.
        num_layers: Decoder layers.
        modules: Full module path -> (D_in, D_out), in model order.
        experts: The experts in order.
        shared_a: Whether one A serves all experts of a module and stands in a file of its own.
        tensors: Shapes of the tensors in `method.safetensors`, by name.
        values: JSON values that the method keeps. Before format 3: those of CRAM's groups.
    """

    format: int
    config: CramConfig
    family: str
    encoder: dict[str, Any]
    num_layers: int
    modules: dict[str, tuple[int, int]]
    experts: tuple[ExpertEntry, ...]
    shared_a: bool
    tensors: dict[str, tuple[int, ...]]
    values: dict[str, Any]

    def files(self) -> set[str]:
        """The files of the bundle beside the manifest."""
        found = {f"experts/{e.name}/{file}" for e in self.experts for file in (CONFIG_FILE, WEIGHTS_FILE)}
        optional = ((ROUTER, self.format < 3), (METHOD, bool(self.tensors)), (SHARED_A, self.shared_a))
        return found | {DESCRIPTION} | {file for file, present in optional if present}


def check_expert_name(name: str) -> None:
    """Refuse a name that cannot be a folder of the bundle.

    Raises:
        ValueError: If `name` has characters besides letters, digits, `_`, `-`, `.`, or starts with one
            of the last two.
    """
    if not EXPERT_NAME.fullmatch(name):
        raise ValueError(f"expert name must match {EXPERT_NAME.pattern}, got {name!r}")


def read_description(folder: Path) -> Description:
    """Check a bundle's manifest, files and `cram.json`; tensors are not read.

    Raises:
        ValueError: If a file is missing, altered, not listed, of another format, or reached through a link.
    """
    recover_folder(folder)
    version, listed = _read_manifest(folder)
    for name, entry in listed.items():
        path = _inside(folder, name)
        if fingerprint(path) != entry:
            raise ValueError(f"{path} must match its entry in {MANIFEST}, got an altered file")
    data = read_json(folder / DESCRIPTION)
    _check_fields(data, _FIELDS[version], DESCRIPTION)
    if data["format"] != version:
        raise ValueError(f"format of {DESCRIPTION} must be {version} as in {MANIFEST}, got {data['format']}")
    description = _parse(data)
    wanted = description.files()
    if wanted != listed.keys():
        raise ValueError(
            f"{folder / MANIFEST} must list exactly the files of the experts in {DESCRIPTION}, "
            f"got missing {sorted(wanted - listed.keys())}, unexpected {sorted(listed.keys() - wanted)}"
        )
    return description


def fingerprint(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest: its size in bytes and its sha256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read_manifest(folder: Path) -> tuple[int, dict[str, Any]]:
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} must be a bundle with a {MANIFEST}, got none")
    data = read_json(_inside(folder, MANIFEST))
    _check_fields(data, {"format": int, "files": dict}, MANIFEST)
    if data["format"] not in READABLE:
        raise ValueError(f"format of {folder / MANIFEST} must be one of {READABLE}, got {data['format']}")
    if strange := [name for name in data["files"] if not _FILE.fullmatch(name)]:
        raise ValueError(f"{folder / MANIFEST} must list files of a bundle only, got {strange[:5]}")
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
    if path.suffix == ".json" and path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path} must have at most {_MAX_JSON_BYTES} bytes, got {path.stat().st_size}")
    return path


def _check_fields(value: Any, fields: dict[str, type], where: str) -> None:
    """An object with exactly these fields and types; bool does not pass for int."""
    keys = set(value) if isinstance(value, dict) else None
    if keys != fields.keys():
        raise ValueError(f"{where} must have the keys {sorted(fields)}, got {sorted(keys or ()) or value!r}")
    for name, kind in fields.items():
        if type(value[name]) is not kind:
            raise ValueError(f"{where}: {name} must be a {kind.__name__}, got {value[name]!r:.100}")


def _parse(data: dict[str, Any]) -> Description:
    version = data["format"]
    _check_fields(data["encoder"], ENCODER_FIELDS, f"{DESCRIPTION}: encoder")
    modules = {name: _sizes(name, shape) for name, shape in data["modules"].items()}
    entry_fields = _EXPERT_FIELDS if version > 2 else {**_EXPERT_FIELDS, "group": int}
    for expert in data["experts"]:
        _check_fields(expert, entry_fields, f"{DESCRIPTION}: expert")
        check_expert_name(expert["name"])
        ranks = expert["ranks"]
        if ranks.keys() != modules.keys() or not all(type(r) is int and r >= 0 for r in ranks.values()):
            raise ValueError(
                f"{DESCRIPTION}: ranks of {expert['name']} must be one per module, got {ranks!r:.200}"
            )
    names = [expert["name"] for expert in data["experts"]]
    if len(set(names)) != len(names):
        raise ValueError(f"{DESCRIPTION}: expert names must be unique, got {names}")
    config = read_config(data["config"])
    if version > 2:
        _check_fields(data["method"], _METHOD_FIELDS, f"{DESCRIPTION}: method")
        tensors, values = data["method"]["tensors"], data["method"]["values"]
    else:
        tensors, values = data.get("method", {}), _values_of_groups(data, config)
    return Description(
        format=version,
        config=config,
        family=data["family"],
        encoder=data["encoder"],
        num_layers=data["num_layers"],
        modules=modules,
        experts=tuple(ExpertEntry(each["name"], each["ranks"]) for each in data["experts"]),
        shared_a=data.get("shared_a", False),
        tensors={name: _state_shape(name, shape) for name, shape in tensors.items()},
        values=values,
    )


def _values_of_groups(data: dict[str, Any], config: CramConfig) -> dict[str, Any]:
    """CRAM's values from a bundle before format 3, which has them beside the method's."""
    _check_fields(data["groups"], _GROUP_FIELDS, f"{DESCRIPTION}: groups")
    counts, locks = data["groups"]["counts"], data["groups"]["locks"]
    if len(counts) > config.max_groups or not all(type(count) is int and count >= 1 for count in counts):
        raise ValueError(
            f"{DESCRIPTION}: counts must be up to {config.max_groups} of at least 1, got {counts}"
        )
    if not all(type(group) is int and 0 <= group < len(counts) for group in locks.values()):
        raise ValueError(f"{DESCRIPTION}: locks must name groups below {len(counts)}, got {locks}")
    experts = [[expert["name"], expert["group"]] for expert in data["experts"]]
    return {"experts": experts, "locks": locks, "counts": counts}


def _state_shape(name: str, shape: Any) -> tuple[int, ...]:
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not whole or len(shape) > _MAX_DIMENSIONS or not 0 < len(name) <= _MAX_NAME:
        raise ValueError(
            f"{DESCRIPTION}: method must give names their shapes, got {name!r:.100}: {shape!r:.100}"
        )
    return tuple(shape)


def _sizes(name: str, shape: Any) -> tuple[int, int]:
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"{DESCRIPTION}: module {name} must have [in, out] sizes, got {shape!r:.100}")
    return shape[0], shape[1]
