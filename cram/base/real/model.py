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
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)

from cram.base.model import (
    FEATURE_WIDTH,
    IMAGE,
    SPECIAL,
    ImageLayout,
    llama_config,
    llava_config,
    start_wide,
    text_config,
    token_id,
)
from cram.base.real.lookups import start_heads
from cram.base.real.tower import COARSE, PATCH, SIZE, LiteTower, LiteTowerConfig, register_tower

VOCABULARY = 1536
IMAGE_TOKENS = (SIZE // PATCH) ** 2
LAYOUT = ImageLayout(PATCH, IMAGE_TOKENS, "full", 0)
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


def build_models(tokenizer: Tokenizer, tower: dict[str, Tensor]) -> tuple[Any, RoutingModel]:
    """Freshly initialised models around a tower with the given weights.

    The multimodal model has 3 Llama layers of width 512, the routing model a text tower of width 96.
    """
    register_tower()
    tokens = {token: token_id(tokenizer, token) for token in SPECIAL}
    size = tokenizer.get_vocab_size()
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    text = llama_config(tokens, size, hidden_size=512, intermediate_size=352, num_hidden_layers=3, **heads)
    config = llava_config(text, LiteTowerConfig(), tokens[IMAGE], LAYOUT)
    llava: Any = LlavaForConditionalGeneration(config)
    routing = RoutingModel(RoutingConfig(text_config(tokens, size, 96).to_dict()))
    start_wide(llava, 0.03, 0.1)
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
