"""Tiny random models, tokenizers and processors that behave like the real ones and load from disk in
milliseconds.

Every tokenizer is byte-level without merges, so any text survives encode and decode unchanged.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cram.attach import attach
from cram.config import CramConfig
from cram.model.attached import AttachedModel
from cram.model.cache import CACHE_NAMES
from cram.routing.clip import ClipEncoder

SPECIAL = {
    "<pad>": 0,
    "<s>": 1,
    "</s>": 2,
    "<image>": 3,
    "<vision_start>": 4,
    "<vision_end>": 5,
    "<|im_start|>": 6,
    "<|im_end|>": 7,
    "<video>": 8,
}
IMAGE_ID = SPECIAL["<image>"]
VOCAB = 320
IMAGE_SIZE, PATCH = 16, 8
TOKENS_PER_IMAGE = (IMAGE_SIZE // PATCH) ** 2
HIDDEN, LAYERS, CLIP_HIDDEN, CLIP_TEXT, PROJECTION = 32, 2, 24, 20, 16

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CLIP_VISION = {
    "hidden_size": CLIP_HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
    "projection_dim": PROJECTION,
}


def tokenizer(clip: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer that puts <s> in front; with `clip` it ends every text with an end-of-text
    token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {**SPECIAL, **{byte: len(SPECIAL) + i for i, byte in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    single = "<s> $A <|im_end|>" if clip else "<s> $A"
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", SPECIAL["<s>"]), ("<|im_end|>", SPECIAL["<|im_end|>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>" if clip else "</s>",
        pad_token="<pad>",
        additional_special_tokens=[t for t in SPECIAL if t not in ("<s>", "</s>", "<pad>")],
        model_max_length=77 if clip else 512,
        padding_side="right" if clip else "left",
    )


def image_processor() -> CLIPImageProcessorPil:
    """CLIP preprocessing at the tiny image size."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)


def llava_processor() -> LlavaProcessor:
    """Processor of the tiny LLaVA, without a chat template."""
    return LlavaProcessor(
        image_processor(),
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def clip_model(seed: int = 7) -> CLIPModel:
    """Random CLIP with an end-of-text id other than the legacy 2, so pooling looks for it."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": VOCAB,
        "hidden_size": CLIP_TEXT,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "bos_token_id": 1,
        "eos_token_id": SPECIAL["<|im_end|>"],
        "pad_token_id": 0,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=CLIP_VISION, projection_dim=PROJECTION))
    return model.eval()


def llava(
    seed: int = 0, clip: CLIPModel | None = None, text: dict[str, Any] | None = None
) -> LlavaForConditionalGeneration:
    """Random LLaVA; with `clip` its tower carries that model's weights, `text` changes its text config."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config={**CLIP_VISION, "model_type": "clip_vision_model"},
        text_config={**TEXT, "model_type": "llama", **(text or {})},
        image_token_index=IMAGE_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    if clip is not None:
        model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    return _stretch(model)


def qwen2_5_vl(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Random Qwen2.5-VL with two language layers."""
    torch.manual_seed(seed)
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **_qwen_ids()
    )
    return _stretch(Qwen2_5_VLForConditionalGeneration(config).eval())


def qwen3_vl(seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """Random Qwen3-VL with two language layers and one deep-stack feature."""
    torch.manual_seed(seed)
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**TEXT, "head_dim": 8, "rope_parameters": rope}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_ids())
    return _stretch(Qwen3VLForConditionalGeneration(config).eval())


def internvl(seed: int = 0) -> InternVLForConditionalGeneration:
    """Random InternVL over a Qwen2 language model."""
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [IMAGE_SIZE, IMAGE_SIZE],
        "patch_size": [4, 4],
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_id=IMAGE_ID,
        downsample_ratio=0.5,
        vision_feature_select_strategy="default",
    )
    return _stretch(InternVLForConditionalGeneration(config).eval())


MODELS = {"llava": llava, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl, "internvl": internvl}


def image(seed: int) -> Image.Image:
    """A picture whose colours depend on the seed strongly enough to move CLIP's features."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(np.kron(blocks, np.ones((6, 6, 1), dtype=np.uint8)))


def inputs(name: str, texts: int = 6, images: int = 1, rows: int = 1) -> dict[str, torch.Tensor]:
    """Model inputs as tensors: `rows` equal-length prompts of a family, each with `images` pictures."""
    torch.manual_seed(11)
    grid = IMAGE_SIZE // 4
    per_image = [SPECIAL["<vision_start>"], *[IMAGE_ID] * TOKENS_PER_IMAGE, SPECIAL["<vision_end>"]]
    words = torch.randint(len(SPECIAL), 260, (rows, texts)).tolist()
    ids = torch.tensor([[1, *per_image * images, *row] for row in words])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    count = rows * images
    if count and name.startswith("qwen"):
        batch["pixel_values"] = torch.randn(count * grid * grid, 3 * 2 * 4 * 4)
        batch["image_grid_thw"] = torch.tensor([[1, grid, grid]] * count)
        batch["mm_token_type_ids"] = (ids == IMAGE_ID).int()
    elif count:
        batch["pixel_values"] = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE)
    return batch


def prompt(question: str, images: int = 1, answer: str = "") -> str:
    """The LLaVA-1.5 prompt of one question."""
    return f"USER: {'<image>' * images}\n{question} ASSISTANT:{' ' + answer if answer else ''}"


def continuing(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument with which a forward of the model continues a KV cache."""
    parameters = inspect.signature(model.forward).parameters
    return {next(name for name in CACHE_NAMES if name in parameters): cache}


def save_clip(folder: Path, clip: CLIPModel) -> Path:
    """Write a CLIP folder that `ClipEncoder.from_pretrained` reads."""
    clip.save_pretrained(folder)
    tokenizer(clip=True).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def save_all(folder: Path) -> Path:
    """Write clip/, llava/ (with its processor; its tower is CLIP's) and the other three families with
    tokenizers."""
    clip = clip_model()
    save_clip(folder / "clip", clip)
    llava(clip=clip).save_pretrained(folder / "llava")
    llava_processor().save_pretrained(folder / "llava")
    for name in ("qwen2_5_vl", "qwen3_vl", "internvl"):
        MODELS[name]().save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    return folder


def clip_encoder(model: Any = None, clip: CLIPModel | None = None) -> ClipEncoder:
    """Encoder over the tiny CLIP; reuses the tower of `model` where it is the same network."""
    return ClipEncoder(clip or clip_model(), tokenizer(clip=True), image_processor(), model=model)


def expert_weights(
    cram: AttachedModel, seed: int, rank: int = 3
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random factors for every adapted linear, with ranks from 1 to `rank`, large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for index, (path, linear) in enumerate(cram.modules.items()):
        r = 1 + (seed + index) % rank
        a = torch.randn(r, linear.in_features, generator=generator) * 0.3
        weights[path] = (a, torch.randn(linear.out_features, r, generator=generator) * 0.3)
    return weights


QUESTIONS = (
    "What colour is it?\nAnswer with one word.",
    "Write a long and detailed story about everything that can be seen here.",
    "How many?",
)


def routed_llava(
    trained: bool = False, text: dict[str, Any] | None = None, **config: Any
) -> tuple[Any, LlavaProcessor, AttachedModel]:
    """LLaVA with two experts in group 0 (the second in training if asked) and one, older, in group 1.

    Question 0 leads to group 0 and question 1 to group 1.
    """
    clip = clip_model()
    model, processor = llava(clip=clip, text=text), llava_processor()
    settings = {"buffer_rank": 9, "sigma": 1.0, "dropout": 0.0, "group_merge_similarity": 1.0, **config}
    cram = attach(model, CramConfig(**settings), clip_encoder(model, clip), processor)
    query = cram.encode(QUESTIONS[:2], [[image(0)], [image(1)]])
    for group in (0, 1):
        assert cram.method.router.groups.observe(f"task{group}", query.text[group : group + 1]) == group
    cram.method.add_expert("old", expert_weights(cram, 0), 0, query.image[0], trained=False)
    cram.method.add_expert("other", expert_weights(cram, 1), 1, query.image[1], trained=False)
    cram.method.add_expert("new", expert_weights(cram, 2), 0, query.image[1] + 0.1, trained=trained)
    return model, processor, cram


def _qwen_ids() -> dict[str, int]:
    return {
        "image_token_id": IMAGE_ID,
        "video_token_id": SPECIAL["<video>"],
        "vision_start_token_id": SPECIAL["<vision_start>"],
        "vision_end_token_id": SPECIAL["<vision_end>"],
    }


def _stretch(model: Any) -> Any:
    """Enlarge the random weights of a fresh model: at std 0.02 two layers hardly react to their input."""
    with torch.no_grad():
        for weight in model.model.language_model.parameters():
            if weight.ndim == 2:
                weight.mul_(5)
    model.generation_config.pad_token_id = 0
    return model


def fresh() -> tuple[Any, Any]:
    """A plain LLaVA and an encoder that reuses its vision tower."""
    clip = clip_model()
    model = llava(clip=clip)
    return model, clip_encoder(model, clip)
