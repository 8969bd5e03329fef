"""Damage for files: bytes, JSON values, headers, and the file system around them. All of it from one seed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

# What a field may hold that nobody expects there.
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    2**31,
    2**53 + 1,
    2**64,
    10**400,
    0.5,
    -0.0,
    1e-320,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "0",
    "x" * 3000,
    "a\nb",
    "a\x85b\u2028c",
    "\0",
    "\ud800",
    "../../outside",
    "/etc/hostname",
    "é",
    [],
    {},
    [[]],
    {"": 0},
    [0] * 2000,
    "F16",
    "cram",
)
SIZE = 1 << 36


def mutate_bytes(content: bytes, random: Random) -> tuple[bytes, str]:
    """Content with one small change, and the name of that change."""
    length = len(content)
    at, other = sorted(random.choices(range(length + 1), k=2))
    changes: dict[str, Callable[[], bytes]] = {
        "flip a bit": lambda: _flip(content, at, random),
        "set a byte": lambda: content[:at] + random.randbytes(1) + content[at + 1 :],
        "cut off": lambda: content[:at],
        "empty": lambda: b"",
        "append": lambda: content + random.randbytes(random.choice((1, 4, 4096))),
        "leave out": lambda: content[:at] + content[other:],
        "repeat": lambda: content[:other] + content[at:],
        "zeros": lambda: content[:at] + bytes(other - at) + content[other:],
        "insert": lambda: content[:at] + random.randbytes(8) + content[at:],
        "swap halves": lambda: content[at:] + content[:at],
    }
    name = random.choice(sorted(changes))
    return changes[name](), name


def _flip(content: bytes, at: int, random: Random) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[min(at, len(changed) - 1)] ^= 1 << random.randrange(8)
    return bytes(changed)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Path of every value inside a JSON value, the whole first."""
    found = [path]
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found += places(value[key], (*path, key))
    return found


def mutate_json(value: Any, random: Random) -> tuple[Any, str]:
    """A JSON value with one part changed, and what was changed. `value` itself may change too.

    A path is drawn level by level, so that the many small parts do not hide the few large ones.
    """
    path: tuple[Any, ...] = ()
    inner = value
    while isinstance(inner, (dict, list)) and inner and (not path or random.random() < 0.8):
        key = random.choice(sorted(inner)) if isinstance(inner, dict) else random.randrange(len(inner))
        path, inner = (*path, key), inner[key]
    if not path:
        return random.choice(VALUES), "whole"
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    kind = random.choice(("replace", "nudge", "remove", "rename", "borrow", "deepen", "add"))
    _change(kind, holder, path[-1], value, random)
    return value, f"{kind} {'.'.join(map(str, path))}"


def _change(kind: str, holder: Any, key: Any, whole: Any, random: Random) -> None:
    if kind == "replace":
        holder[key] = random.choice(VALUES)
    elif kind == "nudge":
        holder[key] = nudged(holder[key], random)
    elif kind == "remove":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[random.choice(("x", f"{key} ", *map(str, holder)))] = holder.pop(key)
    elif kind == "rename":
        random.shuffle(holder)
    elif kind == "borrow":
        other = whole
        for part in random.choice(places(whole)[1:]):
            other = other[part]
        holder[key] = json.loads(json.dumps(other))
    elif kind == "deepen":
        for _ in range(random.choice((1, 50, 150))):
            holder[key] = [holder[key]]
    elif isinstance(holder, dict):
        holder["new"] = random.choice(VALUES)
    else:
        holder.insert(key, random.choice((holder[key], *VALUES)))


def nudged(value: Any, random: Random) -> Any:
    """A value of the same type close by."""
    if type(value) is bool:
        return not value
    if type(value) in (int, float):
        return value + random.choice((-1, 1, 7)) if random.random() < 0.7 else value * random.choice((-1, 2))
    if type(value) is str:
        return random.choice((value[:-1], value + "x", value.upper(), value[::-1], f" {value}"))
    return list(value) if isinstance(value, dict) else value * 2 if isinstance(value, list) else 0


def dump(value: Any) -> bytes:
    """JSON of any value, also where JSON has no word for it."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def mutate_json_file(file: Path, random: Random) -> str:
    """Change a JSON file in one place, by its values or by its text."""
    if random.random() < 0.2:
        content, said = mutate_bytes(file.read_bytes(), random)
        file.write_bytes(content)
        return said
    value, said = mutate_json(json.loads(file.read_bytes()), random)
    file.write_bytes(dump(value))
    return said


def mutate_header(file: Path, random: Random) -> str:
    """Change the header of a safetensors file in one place, or its length."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if random.random() < 0.15:
        other = random.choice((0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1))
        file.write_bytes(other.to_bytes(8, "little") + content[8:])
        return f"header of {other} bytes"
    value, said = mutate_json(json.loads(content[8 : 8 + length]), random)
    text = dump(value)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return f"header: {said}"


def mutate_tree(folder: Path, file: Path, random: Random) -> str:
    """Put something else in the place of a file below `folder`, or beside it."""
    others = [other for other in sorted(folder.rglob("*")) if other.is_file() and other != file]
    other = random.choice(others or [file])
    kept = file.read_bytes()

    def replace(make: Callable[[], object]) -> Callable[[], object]:
        def work() -> None:
            file.unlink()
            make()

        return work

    changes: dict[str, Callable[[], object]] = {
        "missing": file.unlink,
        "folder": replace(file.mkdir),
        "pipe": replace(lambda: os.mkfifo(file)),
        "link to itself": replace(lambda: file.symlink_to(file)),
        "link to another": replace(lambda: file.symlink_to(other)),
        "link to a device": replace(lambda: file.symlink_to("/dev/zero")),
        "huge": lambda: os.truncate(file, SIZE),
        "another's content": lambda: file.write_bytes(other.read_bytes()),
        "swapped": lambda: (file.write_bytes(other.read_bytes()), other.write_bytes(kept)),
        "one more file": lambda: shutil.copy(file, file.with_name("more.json")),
        "other name": lambda: file.rename(file.with_name(file.name.upper())),
        "folder missing": lambda: shutil.rmtree(file.parent),
        "folder linked": lambda: _link_folder(file.parent),
    }
    name = random.choice(sorted(changes))
    changes[name]()
    return name


def _link_folder(folder: Path) -> None:
    moved = folder.with_name(f"moved-{folder.name}")
    folder.rename(moved)
    folder.symlink_to(moved)
