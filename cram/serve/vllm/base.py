"""The base as a checkpoint that vLLM loads: whether it is the bundle's, and the shipped one in vLLM's form.

transformers writes the names of a LLaVA's tower without `vision_model`, which published checkpoints have and
vLLM wants. The shipped base is stored in float16 for its size; in process it answers in float32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cram.atomic import new_folder
from cram.base import base_folder
from cram.bundle.bundle import check_base
from cram.bundle.format import fingerprint
from cram.loading import load_model

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TOWER, PUBLISHED = "vision_tower.", "vision_tower.vision_model."
_DIGEST = 12


def check_checkpoint(model: str | Path, bundle: str | Path, revision: str | None = None) -> None:
    """Refuse a bundle that was trained on another base than a checkpoint, as `cram.load` does.

    Weights in the checkpoint's own precision are mapped from its files. So the check reads the few that it
    compares, and needs hardly any memory. Weights of a quantised checkpoint are not compared, as in process.

    Args:
        model: Folder or name of the checkpoint.
        bundle: The bundle, or a run folder.
        revision: Of a model that is given by its name.

    Raises:
        ValueError: If the bundle is of another base, or the revision cannot be read.
        OSError: If there is no model.
    """
    from transformers import AutoConfig

    if revision is not None and not Path(model).is_dir():
        raise ValueError(
            "model must be a folder where --revision is given, so that its weights can be compared with the "
            f"bundle's, got {str(model)!r}"
        )
    config = AutoConfig.from_pretrained(str(model))
    if getattr(config, "quantization_config", None) is None:
        dtype = str(config.dtype or torch.float32).removeprefix("torch.")
        check_base(load_model(model, dtype, "cpu"), bundle)


def published_base(out: Path) -> Path:
    """Write the shipped LLaVA in float32 under the names of published checkpoints.

    Args:
        out: Where the folder `base-<content>` goes. One that lies there is kept.
    """
    source = base_folder() / "llava"
    folder = out / f"base-{fingerprint(source / WEIGHTS)['sha256'][:_DIGEST]}"
    if folder.is_dir():
        return folder
    tensors = {name: tensor.to(torch.float32) for name, tensor in load_file(source / WEIGHTS).items()}
    config = json.loads((source / CONFIG).read_text())
    with new_folder(folder) as partial:
        for file in source.iterdir():
            if file.name not in (WEIGHTS, CONFIG):
                shutil.copy(file, partial)
        save_file(published(tensors), partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps({**config, "dtype": "float32"}, indent=1) + "\n")
    return folder


def published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a LLaVA that transformers has saved, under the names of published checkpoints."""
    return {
        name.replace(TOWER, PUBLISHED, 1) if name.startswith(TOWER) else name: tensor
        for name, tensor in tensors.items()
    }
