"""LoRAs as people publish them, made by PEFT on the tiny models: ranks 1 to 128, patterns, rsLoRA, types."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.cram import factories

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
WEIGHTS = "adapter_model.safetensors"


def language(*projections: str) -> str:
    """The rule by which PEFT reaches the language model alone."""
    return rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(projections)})"


@dataclass(frozen=True)
class Published:
    """A LoRA: PEFT's settings, the family it is made on, and how its file differs from what PEFT writes."""

    settings: dict[str, Any]
    family: str
    dtype: torch.dtype = torch.float32
    rename: tuple[str, str] = ("", "")
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> float | None:
        """alpha / r, or alpha / sqrt(r); None where it differs from module to module."""
        if "rank_pattern" in self.settings:
            return None
        rank, alpha = self.settings["r"], self.settings["lora_alpha"]
        return float(alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank))


NEW = "base_model.model.model.language_model.layers"
PUBLISHED = {
    "rank 1": Published({"r": 1, "lora_alpha": 1, "target_modules": language("q_proj", "v_proj")}, "llava"),
    "rank 4, attention": Published(
        {"r": 4, "lora_alpha": 8, "target_modules": language(*ATTENTION)}, "qwen2_5_vl"
    ),
    "rank 8, float16": Published(
        {"r": 8, "lora_alpha": 16, "target_modules": language("q_proj", "v_proj"), "lora_dropout": 0.05},
        "qwen3_vl",
        torch.float16,
    ),
    "rank 16, rsLoRA": Published(
        {"r": 16, "lora_alpha": 16, "use_rslora": True, "target_modules": language(*ATTENTION)}, "internvl"
    ),
    "rank 8, rsLoRA, no power of two": Published(
        {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": language(*ATTENTION)}, "llava"
    ),
    "rank 24, alpha 10, bfloat16": Published(
        {"r": 24, "lora_alpha": 10, "target_modules": language("down_proj", "o_proj")},
        "qwen2_5_vl",
        torch.bfloat16,
    ),
    "rank 64, every linear, older prefix": Published(
        {"r": 64, "lora_alpha": 16, "target_modules": language(*ALL)},
        "llava",
        rename=(NEW, "base_model.model.language_model.model.layers"),
        config={"target_modules": list(ALL)},
    ),
    "rank 128, every linear, fan_in_fan_out": Published(
        {"r": 128, "lora_alpha": 256, "target_modules": language(*ALL)},
        "llava",
        config={"fan_in_fan_out": True},
    ),
    "patterns, one layer": Published(
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": language(*ALL),
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*_proj": 32},
            "alpha_pattern": {"v_proj": 1, r"mlp\.up_proj": 20},
        },
        "qwen3_vl",
    ),
    "rank 32, one layer, Qwen's older prefix": Published(
        {
            "r": 32,
            "lora_alpha": 64,
            "target_modules": [f"model.language_model.layers.1.self_attn.{name}" for name in ATTENTION],
        },
        "qwen2_5_vl",
        rename=(NEW, "base_model.model.model.layers"),
        config={"target_modules": list(ATTENTION), "layers_to_transform": [1]},
    ),
}


@torch.no_grad()
def publish(lora: Published, folder: Path) -> torch.Tensor:
    """Write the LoRA's folder; returns the logits that PEFT gives with it."""
    torch.manual_seed(5)
    made = get_peft_model(factories.MODELS[lora.family](), LoraConfig(**lora.settings))
    for name, weight in made.named_parameters():
        if ".lora_" in name:
            weight.copy_((torch.randn_like(weight) / math.sqrt(weight.shape[1])).to(lora.dtype))
    made.save_pretrained(folder)
    edit_weights(folder, lambda tensors: {key: each.to(lora.dtype) for key, each in tensors.items()})
    logits = peft_logits(lora.family, folder)
    old, new = lora.rename
    edit_weights(folder, lambda tensors: {k.replace(old, new): v for k, v in tensors.items()})
    edit_config(folder, lora.config)
    return logits


@torch.no_grad()
def peft_logits(family: str, folder: Path) -> torch.Tensor:
    """What PEFT makes of a LoRA folder on a family's tiny model."""
    model = PeftModel.from_pretrained(factories.MODELS[family](), folder).eval()
    logits: torch.Tensor = model(**factories.inputs(family)).logits
    return logits


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Replace the tensors of a LoRA folder by what `change` returns."""
    found = change(load_file(folder / WEIGHTS))
    save_file({key: each.contiguous() for key, each in found.items()}, folder / WEIGHTS)


def edit_config(folder: Path, changes: dict[str, Any]) -> None:
    """Change fields of a LoRA's configuration."""
    import json

    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
