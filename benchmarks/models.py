"""Whole models for the end-to-end benchmark: the shipped base, and random LLaVAs of real shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import QUERY_WIDTH
from cram.base import base_folder
from cram.loading import Sources

IMAGE_TOKEN, TEXT_TOKENS, ANSWER_TOKENS = 5, 128, 16


@dataclass(frozen=True)
class Work:
    """A model with one training batch and one prompt batch.

    Attributes:
        model: In evaluation mode, on its device.
        encoder, processor: Arguments for `cram.attach`. A tokenizer may stand for the processor.
        batch, labels: Model inputs of a training step, labels [B, T].
        prompt: Model inputs of generation.
        routed: True if the encoder can route. Otherwise gates are fixed.
    """

    model: Any
    encoder: Any
    processor: Any
    batch: Mapping[str, Tensor]
    labels: Tensor
    prompt: Mapping[str, Tensor]
    routed: bool


@dataclass(frozen=True)
class Size:
    """Shape of a random LLaVA: the language model's, the vision tower's, and CLIP's text model's."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    vision: tuple[int, int, int]  # hidden, layers, image size at 14 pixels a patch: it gives the image tokens
    vocabulary: int = 32064
    text: tuple[int, int] = (QUERY_WIDTH, 12)  # hidden, layers


SIZES = {
    "toy": Size(64, 2, 2, 96, (32, 2, 28), 512, (32, 2)),
    "1b": Size(2048, 24, 16, 5504, (1024, 24, 336)),
    "7b": Size(4096, 32, 32, 11008, (1024, 24, 336)),
}


def shared_copy(model: Any) -> Any:
    """Copy the modules but not the weights."""
    kept = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept).requires_grad_(False)


def demo(device: torch.device, dtype: torch.dtype, samples: int) -> Work:
    """The shipped base with samples of the built-in stream's first task."""
    from cram.learning.batches import collate, encode_sample, pad_id, training_batch
    from cram.streams import load_stream

    name = str(dtype).removeprefix("torch.")
    model, processor, encoder = Sources("builtin", dtype=name).load(device.type)
    task = load_stream("builtin", limit=samples).tasks[0]
    padding = pad_id(processor.tokenizer)
    batch, labels = training_batch([encode_sample(processor, s) for s in task.train[:samples]], padding)
    prompt = collate([encode_sample(processor, s) for s in task.test[:samples]], padding, left=True)
    move = _mover(device, dtype)
    return Work(model, encoder, processor, move(batch), labels.to(device), move(prompt), routed=True)


def random_llava(
    size: Size, device: torch.device, dtype: torch.dtype, samples: int, routed: bool = False
) -> Work:
    """A LLaVA with random weights; prompts of one image and `TEXT_TOKENS`, words of the shipped base.

    With `routed`, a random CLIP encodes the prompts, on the model's own vision tower, as with LLaVA-1.5.
    """
    from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

    width, depth, pixels = size.vision
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": depth,
            "num_attention_heads": max(width // 64, 1),
            "image_size": pixels,
            "patch_size": 14,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": size.hidden,
            "intermediate_size": size.mlp,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "vocab_size": size.vocabulary,
            "max_position_embeddings": 4096,
        },
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.pad_token_id = 0
    image_tokens = (pixels // 14) ** 2
    encoder, processor = SimpleNamespace(image_dim=QUERY_WIDTH, reuses_vision_tower=False), None
    vocabulary = size.vocabulary
    if routed:
        encoder, processor = _random_clip(model, size), AutoTokenizer.from_pretrained(base_folder() / "llava")
        vocabulary = min(vocabulary, len(processor))
    text = torch.randint(10, vocabulary, (samples, TEXT_TOKENS))
    ids = torch.cat([torch.full((samples, image_tokens), IMAGE_TOKEN), text], 1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(samples, 3, pixels, pixels),
    }
    labels = torch.full_like(ids, -100)
    labels[:, -ANSWER_TOKENS:] = ids[:, -ANSWER_TOKENS:]
    inputs = _mover(device, dtype)(inputs)
    return Work(model, encoder, processor, inputs, labels.to(device), inputs, routed)


def _random_clip(model: Any, size: Size) -> Any:
    """A CLIP whose vision model has the weights of the model's tower, with the shipped base's tokenizer."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    from cram.families import family_of
    from cram.routing.clip import ClipEncoder

    tower, source = model.get_submodule(family_of(model).vision_tower), base_folder() / "clip"
    hidden, layers = size.text
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(hidden // 64, 1),
        "vocab_size": max(len(tokenizer), 49408),
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = CLIPConfig(
        text_config=text, vision_config=tower.config.to_dict(), projection_dim=min(hidden, QUERY_WIDTH)
    )
    with torch.device(model.device):
        clip = CLIPModel(config)
    clip.vision_model.load_state_dict(tower.state_dict())
    encoder = ClipEncoder(clip, tokenizer, None, model)  # pixels reach the tower as they are
    assert encoder.reuses_vision_tower
    return encoder


def _mover(device: torch.device, dtype: torch.dtype) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    def move(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.to(device, dtype if t.is_floating_point() else None) for name, t in inputs.items()}

    return move
