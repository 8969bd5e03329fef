"""Configuration of the built-in base: a tiny LLaVA, the tiny CLIP that shares its tower, and a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

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
    PretrainedConfig,
    PreTrainedModel,
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


class ImageLayout(NamedTuple):
    """How a picture becomes tokens of the language model.

    Attributes:
        patch: Pixels of a patch's edge.
        tokens: Tokens of a picture.
        strategy: LLaVA's `vision_feature_select_strategy`.
        more_tokens: Outputs of the tower that the strategy leaves out.
    """

    patch: int
    tokens: int
    strategy: str
    more_tokens: int


LAYOUT = ImageLayout(PATCH, IMAGE_TOKENS, "default", 1)


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


def llama_config(tokens: dict[str, int], vocabulary: int, **sizes: int) -> LlamaConfig:
    """A language model of the given sizes whose embeddings are its output layer too."""
    return LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokens[BOS],
        eos_token_id=tokens[EOS],
        pad_token_id=tokens[PAD],
        **sizes,
    )


def text_config(tokens: dict[str, int], vocabulary: int, width: int) -> CLIPTextConfig:
    """CLIP's text tower: 2 layers of a width."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=FEATURE_WIDTH,
        bos_token_id=tokens[BOS],
        eos_token_id=tokens[EOS],
        pad_token_id=tokens[PAD],
    )


def llava_config(text: LlamaConfig, vision: PretrainedConfig, image: int, layout: ImageLayout) -> LlavaConfig:
    """A language model that sees the last features of a vision tower at the places of the token `image`."""
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image,
        image_seq_length=layout.tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy=layout.strategy,
        tie_word_embeddings=True,
    )


def start_wide(llava: LlavaForConditionalGeneration, weights: float, embeddings: float) -> None:
    """Draw the language model's values anew, wider than transformers' 0.02, which suits widths of thousands.

    Args:
        llava: The model.
        weights: Standard deviation of the weights.
        embeddings: That of the embeddings.
    """
    for parameter in llava.model.language_model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=weights)
    nn.init.normal_(llava.get_input_embeddings().weight, std=embeddings)


def build_models(tokenizer: Tokenizer) -> tuple[LlavaForConditionalGeneration, CLIPModel]:
    """Return freshly initialised models that share one vision tower.

    The multimodal model has 6 Llama layers of width 192, the CLIP a text tower of width 128.
    """
    tokens = {token: token_id(tokenizer, token) for token in SPECIAL}
    size = tokenizer.get_vocab_size()
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6}
    text = llama_config(tokens, size, hidden_size=192, intermediate_size=352, num_hidden_layers=6, **heads)
    llava = LlavaForConditionalGeneration(llava_config(text, vision_config(), tokens[IMAGE], LAYOUT))
    clip = CLIPModel(
        CLIPConfig(
            text_config=text_config(tokens, size, 128).to_dict(),
            vision_config=vision_config().to_dict(),
            projection_dim=FEATURE_WIDTH,
        )
    )
    clip.vision_model = llava.model.vision_tower
    start_wide(llava, 0.04, 0.2)
    return llava, clip


def image_processor() -> CLIPImageProcessorPil:
    """Return CLIP's preprocessing at the base's picture size."""
    edge = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=edge)


def save_base(
    folder: Path,
    llava: LlavaForConditionalGeneration,
    clip: PreTrainedModel,
    tokenizer: Tokenizer,
    images: CLIPImageProcessorPil,
    layout: ImageLayout,
) -> None:
    """Write `folder/llava` and `folder/clip` as fp16 checkpoints with what prepares their inputs."""
    for model, name in ((llava, "llava"), (clip, "clip")):
        model.to(torch.float16).save_pretrained(folder / name)
    LlavaProcessor(
        images,
        wrap_tokenizer(tokenizer, end=False),
        patch_size=layout.patch,
        vision_feature_select_strategy=layout.strategy,
        num_additional_image_tokens=layout.more_tokens,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder / "llava")
    wrap_tokenizer(tokenizer, end=True).save_pretrained(folder / "clip")
    images.save_pretrained(folder / "clip")
