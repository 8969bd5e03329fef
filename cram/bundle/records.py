"""The records of a run folder, read with suspicion: every key and type is checked before use.

A record of a training or of a result carries the sha256 of its own values, so that damage which leaves it a
record is noticed too. A fault is a ValueError of one line that names the file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cram.atomic import read_json
from cram.bundle.format import check_expert_name
from cram.config import read_config

MAX_RECORD_BYTES = 16 << 20

Fields = dict[str, type | tuple[type, ...]]
NUMBER = (int, float)
RUN_FIELDS: Fields = {"format": int, "identity": dict, "settings": dict}
IDENTITY_FIELDS: Fields = {"method": str, "config": dict, "stream": dict, "model": dict}
STREAM_FIELDS: Fields = {"name": str, "tasks": list, "sha256": str}
MODEL_FIELDS: Fields = {"family": str, "dtype": str, "modules": int, "encoder": list, "sha256": str}
# What the records of earlier versions lack.
LATER_FIELDS: Mapping[str, Fields] = {
    "stream": {"pictures": str, "splits": str},
    "model": {"weights": str},
}
TRAINING_FIELDS: Fields = {"seconds": NUMBER, "loss": NUMBER}
RESULT_FIELDS: Fields = {"accuracies": list, "seconds": NUMBER, "routing": dict}
ROUTING_FIELDS: Fields = {"group_accuracy": NUMBER, "expert_accuracy": NUMBER, "mean_gates": dict}
LATER_ROUTING_FIELDS: Fields = {"gate_entropy": NUMBER}
# Of which training and bundle a result tells: sha256 of their files.
OWNERS = ("training", "bundle")
SEAL = "sha256"


def run_record(file: Path, version: int) -> dict[str, Any]:
    """`run.json`: identity and settings.

    Raises:
        ValueError: If a key is missing, unknown or of another type, or a name could leave the folder.
    """
    run = _fields(read_json(file, MAX_RECORD_BYTES), RUN_FIELDS, str(file))
    if run["format"] != version:
        raise ValueError(f"format of {file} must be {version}, got {run['format']!r:.100}")
    identity = _fields(run["identity"], IDENTITY_FIELDS, f"{file}: identity")
    for name, fields in (("stream", STREAM_FIELDS), ("model", MODEL_FIELDS)):
        wanted = _with_later(fields, LATER_FIELDS[name], identity[name])
        _fields(identity[name], wanted, f"{file}: identity.{name}")
    stream = identity["stream"]
    tasks = stream["tasks"]
    if not tasks or not all(isinstance(task, str) for task in tasks) or len(set(tasks)) != len(tasks):
        raise ValueError(f"{file}: tasks must be distinct names, got {tasks!r:.200}")
    try:
        for task in tasks:
            check_expert_name(task)
        read_config({**identity["config"], "method": identity["method"]})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return run


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the sha256 of its values."""
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    return {**record, SEAL: hashlib.sha256(text.encode()).hexdigest()}


def _unsealed(record: Any) -> tuple[Any, Any]:
    """A record without its sha256, and that; records of earlier versions have none."""
    if not isinstance(record, dict) or SEAL not in record:
        return record, None
    return {name: value for name, value in record.items() if name != SEAL}, record[SEAL]


def _check_seal(record: dict[str, Any], seal: Any, file: Path) -> None:
    if seal is not None and seal != sealed(record)[SEAL]:
        raise ValueError(f"{file} must hold the values that were written, got others than its {SEAL} tells")


def training_record(file: Path) -> dict[str, Any]:
    """`training.json`: seconds and loss.

    Raises:
        ValueError: If a number is missing, negative seconds, not finite, or not the one that was written.
    """
    record, seal = _unsealed(read_json(file, MAX_RECORD_BYTES))
    _fields(record, TRAINING_FIELDS, str(file))
    _number(record["seconds"], f"{file}: seconds", 0, math.inf)
    _number(record["loss"], f"{file}: loss", -math.inf, math.inf)
    _check_seal(record, seal, file)
    return record


def result_record(file: Path, tasks: list[str], owners: Mapping[str, str]) -> dict[str, Any]:
    """`result.json` of the last of some tasks.

    Args:
        file: The file.
        tasks: The tasks up to the one that it belongs to.
        owners: sha256 of the training and the bundle that it must tell of.

    Raises:
        ValueError: If a part is missing, of another type or not the one that was written, an accuracy is no
            percentage, or the result belongs to another training or bundle.
    """
    record, seal = _unsealed(read_json(file, MAX_RECORD_BYTES))
    # Results without owners, or without published accuracies, are those of earlier versions.
    own = {name: dict for name in ("of", "published") if isinstance(record, dict) and name in record}
    record = _fields(record, {**RESULT_FIELDS, **own}, str(file))
    if "of" in own and record["of"] != dict(owners):
        other = [name for name in OWNERS if record["of"].get(name) != owners[name]]
        raise ValueError(f"{file} must belong to the files beside it, got the result of another {other}")
    if len(record["accuracies"]) != len(tasks):
        raise ValueError(f"{file}: accuracies must be {len(tasks)}, got {record['accuracies']!r:.200}")
    for task, accuracy in zip(tasks, record["accuracies"], strict=True):
        _number(accuracy, f"{file}: accuracy on {task}", 0, 100)
    _number(record["seconds"], f"{file}: seconds", 0, math.inf)
    for task, routing in record["routing"].items():
        if task not in tasks:
            raise ValueError(f"{file}: routing must be of {tasks}, got {task!r:.100}")
        _check_routing(routing, f"{file}: routing of {task}")
    _check_seal(record, seal, file)
    return record


def _check_routing(routing: Any, where: str) -> None:
    _fields(routing, _with_later(ROUTING_FIELDS, LATER_ROUTING_FIELDS, routing), where)
    for name in ("group_accuracy", "expert_accuracy"):
        _number(routing[name], f"{where}: {name}", 0, 100)
    _number(routing.get("gate_entropy", 0), f"{where}: gate_entropy", 0, math.inf)
    for expert, gate in routing["mean_gates"].items():
        _number(gate, f"{where}: gate of {expert!r:.100}", -math.inf, math.inf)


def _with_later(fields: Fields, later: Fields, found: Any) -> Fields:
    """Return the fields of a record's part, with those of later versions that it has."""
    return fields | {key: kind for key, kind in later.items() if isinstance(found, dict) and key in found}


def _fields(value: Any, fields: Fields, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != fields.keys():
        found = repr(sorted(value) if isinstance(value, dict) else value)
        raise ValueError(f"{where} must have the keys {sorted(fields)}, got {found:.200}")
    for name, kind in fields.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value[name]) not in kinds:
            wanted = " or ".join(each.__name__ for each in kinds)
            raise ValueError(f"{where}: {name} must be a {wanted}, got {value[name]!r:.100}")
    return value


def _number(value: Any, where: str, least: float, most: float) -> None:
    if type(value) not in NUMBER or not least <= value <= most or abs(value) == math.inf:
        raise ValueError(f"{where} must be a finite number from {least} to {most}, got {value!r:.100}")
