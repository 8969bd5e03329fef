"""One group of experts as one LoRA slot of vLLM: `cram_group.json`, and gates as requests carry them.

The experts of a group stand one after another on the rank axis, R = sum of their ranks. The gates [L, E] of a
request become one factor per layer and rank row: the value of expert e in all its rows. This module needs
neither vLLM nor a model.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cram.atomic import read_json
from cram.bundle.format import fingerprint
from cram.bundle.peft_folder import WEIGHTS_FILE

KEY = "cram_gates"
GROUP_FILE = "cram_group.json"
# How the names of adapters begin that hold a group.
ADAPTER = "cram-g"
# `bias` in the adapter_config.json of a group. Plain vLLM refuses the value; the plugin takes it away.
MARKER = "cram-gated"
FORMAT = 1
MAX_GATE = 100.0
MAX_GROUP_BYTES = 64 << 20
LADDER = (1, 8, 16, 32, 64, 128, 256, 320, 512)

Gates = NDArray[np.float32]


@dataclass(frozen=True)
class GateGroup:
    """What `cram_group.json` says.

    Attributes:
        format: Format of the file.
        experts: Names of the experts, oldest first.
        ranks: Rank rows of each expert, the same in all modules.
        layers: Decoder layers.
        modules: Paths of the modules that the experts adapt, as the base model names them.
        content: Digest of the experts; names the folder.
        weights: Size in bytes and sha256 of the tensors' file.
    """

    format: int
    experts: tuple[str, ...]
    ranks: tuple[int, ...]
    layers: int
    modules: tuple[str, ...]
    content: str
    weights: dict[str, Any]

    @property
    def rank(self) -> int:
        """R."""
        return sum(self.ranks)

    @property
    def slot(self) -> int:
        """The smallest `--max-lora-rank` that holds the group."""
        return slot_of(self.rank)

    def gates(self, value: Any) -> Gates:
        """Gates [L, E] from what a request carries.

        Args:
            value: Base64 of L * E little-endian float32, or L * E numbers, or E numbers for all layers.

        Raises:
            ValueError: If it is anything else, or a gate is not finite or larger than `MAX_GATE`.
        """
        layers, experts = self.layers, len(self.experts)
        wanted = f"'{KEY}' must be base64 of {layers} x {experts} float32 (or as many numbers, or {experts})"
        count = layers * experts
        if isinstance(value, str):
            if len(value) != 4 * -(-4 * count // 3):
                raise ValueError(f"{wanted}, got {len(value)} characters")
            try:
                flat = np.frombuffer(base64.b64decode(value, validate=True), "<f4").astype(np.float32)
            except (binascii.Error, ValueError):
                raise ValueError(f"{wanted}, got text that is not base64") from None
        elif isinstance(value, list | tuple) and len(value) in (count, experts):
            if not all(type(each) in (int, float) and abs(each) <= MAX_GATE for each in value):
                raise ValueError(f"{wanted} of at most {MAX_GATE:g} in size, got other values")
            flat = np.asarray(value, np.float32)
            flat = flat if len(flat) == count else np.tile(flat, layers)
        else:
            size = f" of {len(value)}" if isinstance(value, list | tuple) else ""
            raise ValueError(f"{wanted}, got {'none' if value is None else type(value).__name__ + size}")
        if flat.size != count or not bool((np.abs(flat) <= MAX_GATE).all()):
            raise ValueError(f"{wanted} of at most {MAX_GATE:g} in size, got other values")
        return flat.reshape(layers, experts)

    def rows(self, gates: Gates) -> Gates:
        """One factor per layer and rank row [L, R] from gates [L, E]."""
        return np.ascontiguousarray(np.repeat(gates, self.ranks, axis=1))

    def salt(self, gates: Gates) -> str:
        """What the prefix cache must know of a request: group and gates."""
        state = hashlib.blake2b(self.content.encode(), digest_size=16)
        state.update(np.ascontiguousarray(gates, "<f4").tobytes())
        return f"cram:{state.hexdigest()}|"


def encode(gates: Any) -> str:
    """The value of `cram_gates` for gates [L, E]."""
    return base64.b64encode(np.ascontiguousarray(gates, "<f4").tobytes()).decode()


def slot_of(rank: int) -> int:
    """The rung of vLLM's ladder of ranks that holds `rank`.

    Raises:
        ValueError: If none does.
    """
    fitting = [rung for rung in LADDER if rung >= rank]
    if not fitting:
        raise ValueError(f"rank must be at most {LADDER[-1]}, got {rank}")
    return fitting[0]


def group_at(folder: str | Path) -> GateGroup | None:
    """The group in a folder, or None for an ordinary adapter. A file is read once until it changes.

    Raises:
        ValueError: If the folder is damaged.
    """
    try:
        status = os.stat(os.path.join(folder, GROUP_FILE))
    except OSError:
        return None
    return _read(str(folder), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=256)
def _read(folder: str, changed_ns: int, size: int) -> GateGroup:
    return read_group(Path(folder))


def read_group(folder: Path) -> GateGroup:
    """Read `cram_group.json`, and compare the size of the tensors' file with it.

    Raises:
        ValueError: If the file is damaged, of another format, or the tensors' file is not whole.
    """
    file = folder / GROUP_FILE
    data = read_json(file, MAX_GROUP_BYTES)
    if not isinstance(data, dict) or data.keys() != {field.name for field in fields(GateGroup)}:
        raise ValueError(f"{file} must have the fields of a group, got others; export the bundle again")
    if data["format"] != FORMAT:
        raise ValueError(f"format of {file} must be {FORMAT}, got {data['format']!r:.50}")
    if not _whole(data):
        raise ValueError(
            f"{file} must describe experts with ranks, got other values; export the bundle again"
        )
    tupled = {name: tuple(data[name]) for name in ("experts", "ranks", "modules")}
    group = GateGroup(**{**data, **tupled})
    weights = folder / WEIGHTS_FILE
    size = weights.stat().st_size if weights.is_file() else 0
    if size != group.weights["bytes"]:
        raise ValueError(
            f"{weights} must have {group.weights['bytes']} bytes, got {size}; export the bundle again"
        )
    return group


def check_weights(folder: Path, group: GateGroup) -> None:
    """Compare the tensors' file with its sha256.

    Raises:
        ValueError: If it was altered.
    """
    if fingerprint(folder / WEIGHTS_FILE) != group.weights:
        raise ValueError(f"{folder / WEIGHTS_FILE} must be as exported, got an altered file; export it again")


def write_group(folder: Path, group: GateGroup) -> None:
    """Write `cram_group.json` into a folder that has the tensors."""
    (folder / GROUP_FILE).write_text(json.dumps(asdict(group), indent=1) + "\n", encoding="utf-8")


def _whole(data: dict[str, Any]) -> bool:
    """Whether all fields have their types, and ranks and layers are possible."""
    experts, ranks, modules, weights = (data[name] for name in ("experts", "ranks", "modules", "weights"))
    return (
        isinstance(experts, list)
        and isinstance(ranks, list)
        and isinstance(modules, list)
        and all(isinstance(name, str) for name in [*experts, *modules, data["content"]])
        and all(type(rank) is int and rank >= 0 for rank in ranks)
        and len(ranks) == len(experts) > 0
        and 0 < sum(ranks) <= LADDER[-1]
        and type(data["layers"]) is int
        and data["layers"] > 0
        and isinstance(weights, dict)
        and type(weights.get("bytes")) is int
        and isinstance(weights.get("sha256"), str)
    )
