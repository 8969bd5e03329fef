"""Configuration of the built-in base: a tiny LLaVA, the tiny CLIP that shares its tower, and a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from cram.streams.builtin.draw import SIZE

PATCH = 8
IMAGE_TOKENS = (SIZE // PATCH) ** 2
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
# The end token must not have id 2. Old CLIP configs name 2 wrongly, so transformers pools at another token
# then.
SPECIAL = (PAD, BOS, IMAGE, EOS)
FEATURE_WIDTH = 64
TEXT_LENGTH = 77
VOCABULARY = 768

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% if message['role'] == 'user' %} {% else %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Return a byte-level BPE. The texts' common words are single tokens, and any text can be written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer, *, end: bool) -> PreTrainedTokenizerFast:
    """Return the tokenizer for transformers. `end` appends the end token, where CLIP's text tower pools."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}" if end else f"{BOS} $A",
        special_tokens=[(token, copy.token_to_id(token)) for token in (BOS, EOS)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=copy,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[IMAGE],
        model_max_length=TEXT_LENGTH if end else 512,
        padding_side="right" if end else "left",
    )


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the vocabulary must have."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"token must be in the vocabulary, got {token!r}")
    return found


def vision_config() -> CLIPVisionConfig:
    """The vision tower: 4 layers of width 128 on 36 patches."""
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=FEATURE_WIDTH,
    )


def llava_config(tokens: dict[str, int], vocabulary: int) -> LlavaConfig:
    """The multimodal model: 6 Llama layers of width 192 over all patch features of the tower."""
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokens[BOS],
        eos_token_id=tokens[EOS],
        pad_token_id=tokens[PAD],
    )
    return LlavaConfig(
        text_config=text,
        vision_config=vision_config(),
        image_token_index=tokens[IMAGE],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def clip_config(tokens: dict[str, int], vocabulary: int) -> CLIPConfig:
    """The CLIP: the same vision tower and 2 text layers of width 128."""
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=FEATURE_WIDTH,
        bos_token_id=tokens[BOS],
        eos_token_id=tokens[EOS],
        pad_token_id=tokens[PAD],
    )
    return CLIPConfig(
        text_config=text.to_dict(), vision_config=vision_config().to_dict(), projection_dim=FEATURE_WIDTH
    )


def build_models(tokenizer: Tokenizer) -> tuple[LlavaForConditionalGeneration, CLIPModel]:
    """Return freshly initialised models that share one vision tower.

    The language model starts wider than transformers' 0.02, which suits widths of thousands.
    """
    tokens = {token: token_id(tokenizer, token) for token in SPECIAL}
    llava = LlavaForConditionalGeneration(llava_config(tokens, tokenizer.get_vocab_size()))
    clip = CLIPModel(clip_config(tokens, tokenizer.get_vocab_size()))
    clip.vision_model = llava.model.vision_tower
    for parameter in llava.model.language_model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.04)
    nn.init.normal_(llava.get_input_embeddings().weight, std=0.2)
    return llava, clip


def image_processor() -> CLIPImageProcessorPil:
    """Return CLIP's preprocessing at the base's picture size."""
    edge = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=edge)


def save_base(
    folder: Path, llava: LlavaForConditionalGeneration, clip: CLIPModel, tokenizer: Tokenizer
) -> None:
    """Write `folder/llava` and `folder/clip` as fp16 checkpoints that the usual Auto classes load."""
    processor = LlavaProcessor(
        image_processor(),
        wrap_tokenizer(tokenizer, end=False),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    for model, name in ((llava, "llava"), (clip, "clip")):
        model.to(torch.float16).save_pretrained(folder / name)
    processor.save_pretrained(folder / "llava")
    wrap_tokenizer(tokenizer, end=True).save_pretrained(folder / "clip")
    image_processor().save_pretrained(folder / "clip")
