"""Configuration of the second base: a LLaVA on the frozen tower, and the routing model that shares it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
)

from cram.base.model import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    IMAGE,
    PAD,
    SPECIAL,
    TEXT_LENGTH,
    token_id,
    wrap_tokenizer,
)
from cram.base.real.lookups import start_heads
from cram.base.real.tower import COARSE, PATCH, SIZE, LiteTower, LiteTowerConfig, register_tower

VOCABULARY = 1536
IMAGE_TOKENS = (SIZE // PATCH) ** 2
FEATURE_WIDTH = 64
# The tower was trained on (value - 127) / 128, with values of 0 to 255.
PIXEL_MEAN, PIXEL_STD = 127 / 255, 128 / 255


class RoutingConfig(PretrainedConfig):
    """Sizes of the routing model. `text_config` is CLIP's."""

    model_type = "cram_routing"

    def __init__(
        self, text_config: dict[str, Any] | None = None, projection_dim: int = FEATURE_WIDTH, **rest: Any
    ) -> None:
        super().__init__(**rest)
        self.text_config = CLIPTextConfig(**(text_config or {}))
        self.projection_dim = projection_dim


class RoutingModel(PreTrainedModel):
    """CLIP's text tower and a projection of the vision tower's pooled features: what `ClipEncoder` reads.

    The vision tower itself is stored with the LLaVA alone; `load_routing` puts it in as `vision_model`.
    """

    config_class = RoutingConfig

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config)
        self.text_model = CLIPTextModel(config.text_config)
        self.visual_projection = nn.Linear(COARSE, config.projection_dim, bias=False)
        self.post_init()


def llava_config(tokens: dict[str, int], vocabulary: int) -> LlavaConfig:
    """3 Llama layers of width 512 over the 16 tokens of the tower."""
    register_tower()
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokens[BOS],
        eos_token_id=tokens[EOS],
        pad_token_id=tokens[PAD],
    )
    return LlavaConfig(
        text_config=text,
        vision_config=LiteTowerConfig(),
        image_token_index=tokens[IMAGE],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )


def routing_config(tokens: dict[str, int], vocabulary: int) -> RoutingConfig:
    """2 text layers of width 96."""
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=FEATURE_WIDTH,
        bos_token_id=tokens[BOS],
        eos_token_id=tokens[EOS],
        pad_token_id=tokens[PAD],
    )
    return RoutingConfig(text.to_dict())


def build_models(tokenizer: Tokenizer, tower: dict[str, Tensor]) -> tuple[Any, RoutingModel]:
    """Freshly initialised models around a tower with the given weights.

    The language model starts wider than transformers' 0.02, which suits widths of thousands.
    """
    tokens = {token: token_id(tokenizer, token) for token in SPECIAL}
    size = tokenizer.get_vocab_size()
    llava: Any = LlavaForConditionalGeneration(llava_config(tokens, size))
    routing = RoutingModel(routing_config(tokens, size))
    for parameter in llava.model.language_model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.03)
    nn.init.normal_(llava.get_input_embeddings().weight, std=0.1)
    start_heads(llava.model.language_model)
    llava.model.vision_tower.load_state_dict(tower)
    llava.model.vision_tower.requires_grad_(False)
    return llava, routing


def image_processor() -> CLIPImageProcessorPil:
    """The tower's preprocessing: the shorter edge to 128 pixels, the middle, values from -1 to 1."""
    edge = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=edge, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3
    )


def save_base(folder: Path, llava: Any, routing: RoutingModel, tokenizer: Tokenizer) -> None:
    """Write `folder/llava` and `folder/clip` in fp16. The tower is written once, with the LLaVA."""
    processor = LlavaProcessor(
        image_processor(),
        wrap_tokenizer(tokenizer, end=False),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )
    llava.to(torch.float16).save_pretrained(folder / "llava")
    routing.to(torch.float16).save_pretrained(folder / "clip")
    processor.save_pretrained(folder / "llava")
    wrap_tokenizer(tokenizer, end=True).save_pretrained(folder / "clip")
    image_processor().save_pretrained(folder / "clip")


def load_routing(folder: Path) -> tuple[RoutingModel, dict[str, Any]]:
    """The routing model of `folder/clip` with the tower of `folder/llava`, in fp32, and the loading report.

    Raises:
        OSError: If there is no model in the folder.
    """
    routing, report = RoutingModel.from_pretrained(
        folder / "clip", dtype=torch.float32, output_loading_info=True
    )
    stored = load_file(folder / "llava" / "model.safetensors")
    # What stands before the tower's name depends on the version of transformers that wrote the file.
    weights = {k.split("vision_tower.")[1]: v for k, v in stored.items() if "vision_tower." in k}
    tower = LiteTower(LiteTowerConfig())
    tower.load_state_dict(weights)
    routing.vision_model = tower
    return routing, report
