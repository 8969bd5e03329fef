"""Tiny checkpoints that vLLM loads on a CPU, and bundles for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import cram
from cram.base import base_folder
from cram.loading import load_encoder, load_model, load_processor
from cram.model.attached import AttachedModel
from cram.model.factors import Factors
from cram.serve.vllm.base import published_base
from cram.serve.vllm.export import export_groups
from tests.cram import factories
from tests.cram.serve.vllm.bundles import PROJECTIONS

QUESTIONS = ("What color is the shape?", "How many objects are in the picture?")
GAIN = 0.25
LLAVA_VOCABULARY, QWEN_VOCABULARY = 627, factories.VOCAB
QWEN_NAMES = {
    "<image>": "<|image_pad|>",
    "<video>": "<|video_pad|>",
    "<vision_start>": "<|vision_start|>",
    "<vision_end>": "<|vision_end|>",
}
QWEN_IDS = {
    "image_token_id": "<image>",
    "video_token_id": "<video>",
    "vision_start_token_id": "<vision_start>",
    "vision_end_token_id": "<vision_end>",
}
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llava(folder: Path) -> Path:
    """The built-in LLaVA (6 layers, 627 tokens) in float32, under the names of published checkpoints."""
    return published_base(folder.parent).rename(folder)


def qwen2_5_vl(folder: Path) -> Path:
    """A random Qwen2.5-VL of three layers with heads of 32, which vLLM's CPU attention takes."""
    torch.manual_seed(3)
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 2,
        "out_hidden_size": 128,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
    text = {**factories.TEXT, **sizes, "rope_parameters": rope}
    ids = {name: factories.SPECIAL[token] for name, token in QWEN_IDS.items()}
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    )
    with torch.no_grad():
        for weight in model.model.language_model.parameters():
            if weight.ndim == 2:
                weight.mul_(5)
    model.save_pretrained(folder)
    side = factories.IMAGE_SIZE**2
    Qwen2VLImageProcessorPil(patch_size=4, min_pixels=side, max_pixels=side).save_pretrained(folder)
    backend = factories.tokenizer().backend_tokenizer.to_str()
    for ours, theirs in QWEN_NAMES.items():
        backend = backend.replace(f'"{ours}"', f'"{theirs}"')
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend),
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=list(QWEN_NAMES.values()),
        model_max_length=512,
    ).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    return folder


def weights(handle: AttachedModel, seed: int) -> dict[str, Factors]:
    """An expert of ranks 4 to 9 that changes the model's answers."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for index, (path, linear) in enumerate(handle.modules.items()):
        rank = 4 + (seed + index) % 6
        a = torch.randn(rank, linear.in_features, generator=generator) * linear.in_features**-0.5
        b = torch.randn(linear.out_features, rank, generator=generator) * rank**-0.5
        made[path] = (a, b * GAIN / handle.config.scale)
    return made


def attached(model_folder: str | Path, clip_folder: str | Path) -> tuple[Any, Any, AttachedModel]:
    """Model, processor and handle with five experts: three in group 0, two in group 1; gates by layer."""
    model = load_model(model_folder)
    processor, encoder = load_processor(model_folder), load_encoder(clip_folder, model)
    query = encoder.encode(list(QUESTIONS), [[factories.image(0)], [factories.image(1)]])
    features, _ = encoder.encode_images([[factories.image(k)] for k in range(5)])
    spread = float(torch.cdist(features, features).pow(2).mean().sqrt())
    config = cram.CramConfig(sigma=spread / 2, target_projections=PROJECTIONS, group_merge_similarity=1.0)
    handle = cram.attach(model, config, encoder, processor)
    for group in (0, 1):
        assert handle.method.router.groups.observe(f"kind{group}", query.text[group : group + 1]) == group
    generator = torch.Generator().manual_seed(5)
    for expert in range(5):
        noise = torch.randn(handle.num_layers, features.shape[1], generator=generator) * features.std()
        add(handle, f"task{expert}", int(expert >= 3), features[expert] + noise * 0.6)
    return model, processor, handle


def add(handle: AttachedModel, name: str, group: int, centroid: Tensor) -> None:
    """One more expert."""
    made = weights(handle, handle.num_experts)
    handle.method.add_expert(name, made, group, centroid, trained=False)


def exported_llava(place: Path) -> tuple[Path, Path]:
    """A checkpoint, and the exported adapter of group 0 of a bundle for it."""
    model, _, _ = attached(base_folder() / "llava", base_folder() / "clip")
    cram.save(model, place / "bundle")
    adapters = export_groups(place / "bundle", place / "out")
    return llava(place / "model"), place / "out" / adapters[0].name
