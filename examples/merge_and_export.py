"""Take experts out: as a LoRA that PEFT loads, and merged into the base model.

    python examples/merge_and_export.py BUNDLE [FOLDER]

BUNDLE is a bundle or a run folder on the base that comes with the package, such as the one that
`import_lora.py` writes. With fixed gates several experts are exactly one LoRA.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image

import cram
from cram.bundle.export import export_lora, export_merged
from cram.loading import Sources

QUESTION = "What colour is the picture? Answer with one word."


def main(bundle: Path, folder: Path) -> None:
    """Export the route of one kind of picture twice, and compare the two."""
    model, processor, encoder = Sources("builtin").load("cpu")
    handle = cram.load(model, bundle, encoder, processor)
    picture = Image.new("RGB", (64, 64), "red")
    gates = handle.route(handle.encode([QUESTION], [[picture]])).gates[:, 0]
    export_lora(model, folder / "lora", gates)
    export_merged(model, folder / "merged", gates, processor)

    base, _, _ = Sources("builtin").load("cpu")
    peft = PeftModel.from_pretrained(base, folder / "lora").eval()
    prompt = f"USER: <image>\n{QUESTION} ASSISTANT:"
    inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
    with torch.no_grad():
        difference = (peft(**inputs).logits - model(**inputs).logits).abs().max()
    print(f"PEFT's logits differ from those of the merged model by at most {difference:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "runs/exported"))
