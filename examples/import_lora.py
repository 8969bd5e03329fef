"""Make an expert of a LoRA that PEFT has trained.

    python examples/import_lora.py [FOLDER]

Writes a LoRA with PEFT into FOLDER/lora, as if it had been downloaded, imports it with two pictures and a
question of its task, and saves a bundle. Questions like that one are then routed to it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

import cram
from cram.bundle.importer import import_lora
from cram.loading import Sources

LANGUAGE_MODEL = r".*language_model\.layers\.\d+\.self_attn\.[qkvo]_proj"
QUESTION = "What colour is the picture? Answer with one word."


def write_lora(folder: Path) -> None:
    """A LoRA of rank 16 with random factors."""
    model, _, _ = Sources("builtin").load("cpu")
    lora = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LANGUAGE_MODEL))
    with torch.no_grad():
        for name, weight in lora.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    lora.save_pretrained(folder)


def main(folder: Path) -> None:
    """Write a LoRA, import it, save the bundle, answer with it."""
    write_lora(folder / "lora")
    model, processor, encoder = Sources("builtin").load()
    handle = cram.attach(model, cram.CramConfig(), encoder, processor)
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    group = import_lora(handle, folder / "lora", "colours", [QUESTION] * 2, [[each] for each in pictures])
    cram.save(model, folder / "bundle")
    print(f"expert colours in group {group}, saved in {folder / 'bundle'}")
    answer = handle.answer(pictures[0], QUESTION, max_new_tokens=4)
    print(f"answer: {answer} ({answer.routing()})")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/import-lora"))
