"""Bundles altered on purpose, with a manifest that agrees where the checks behind it are meant."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cram.atomic import read_json, write_json


def resign(folder: Path) -> None:
    """Makes the manifest agree with altered files, so that the checks behind it are reached."""
    manifest = read_json(folder / "manifest.json")
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_json(folder / "manifest.json", manifest)


def edit_json(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = read_json(folder / name)
        change(data)
        (folder / name).write_text(json.dumps(data))
        if name != "manifest.json":
            resign(folder)

    return apply


def edit_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)
        resign(folder)

    return apply


def poison(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first_key(tensors)].view(-1)[0] = value

    return apply


def first_key(tensors: dict[str, torch.Tensor]) -> str:
    return sorted(tensors)[0]
