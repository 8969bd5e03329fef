"""The vision tower of the second base: EfficientNet-Lite0 (Tan and Le, 2019; Google's "lite" variant).

A picture of 128 x 128 pixels becomes 4 x 4 tokens. A token joins what two depths say about its cell:

    token [768] = (the 2 x 2 cells of block 11's output at stride 16 [4 x 112], the last block's output [320])

The fine part keeps places and strokes, the coarse part names what is there. `pooler_output` [320] is the mean
of the coarse part over the picture. Every channel is shifted and scaled to mean 0 and deviation 1 over the
training pictures, which `cram.base.real.pool.standardise` measures. Batch normalisation is folded into the
convolutions, so the network is convolutions with biases, ReLU6 and sums. transformers uses the class as it
uses any vision tower.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

SIZE, PATCH = 128, 32
STEM = 32
# (channels, kernel, stride, expansion) of each block.
BLOCKS = (
    (16, 3, 1, 1),
    (24, 3, 2, 6), (24, 3, 1, 6),
    (40, 5, 2, 6), (40, 5, 1, 6),
    (80, 3, 2, 6), (80, 3, 1, 6), (80, 3, 1, 6),
    (112, 5, 1, 6), (112, 5, 1, 6), (112, 5, 1, 6),
    (192, 5, 2, 6), (192, 5, 1, 6), (192, 5, 1, 6), (192, 5, 1, 6),
    (320, 3, 1, 6),
)  # fmt: skip
FINE_BLOCK = 10  # the last block at stride 16
PICTURES_A_PASS = 16
FINE, COARSE = 4 * BLOCKS[FINE_BLOCK][0], BLOCKS[-1][0]


class LiteTowerConfig(PretrainedConfig):
    """Sizes that transformers and the processor ask for; the layers themselves are fixed."""

    model_type = "efficientnet_lite0"

    def __init__(
        self, hidden_size: int = FINE + COARSE, image_size: int = SIZE, patch_size: int = PATCH, **rest: Any
    ) -> None:
        super().__init__(**rest)
        self.hidden_size, self.image_size, self.patch_size = hidden_size, image_size, patch_size


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow does: at stride 2, one more pixel below and right."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        spare = kernel - stride
        # An even border is the convolution's own; an odd one must be written first.
        super().__init__(inputs, outputs, kernel, stride, 0 if spare % 2 else spare // 2, groups=groups)
        self.border = (spare // 2, spare - spare // 2) * 2 if spare % 2 else ()

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        return super().forward(F.pad(x, self.border) if self.border else x)


class Block(nn.Module):
    """Inverted residual: widen, filter each channel, narrow, and add the input where shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = SameConv(inputs, inner, 1) if expansion > 1 else None
        self.depthwise = SameConv(inner, inner, kernel, stride, groups=inner)
        self.project = SameConv(inner, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        inner = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        out = self.project(F.relu6(self.depthwise(inner), inplace=True))
        return out + x if self.residual else out


class LiteTower(PreTrainedModel):
    """The tower as a transformers model; always frozen."""

    config_class = LiteTowerConfig
    main_input_name = "pixel_values"

    def __init__(self, config: LiteTowerConfig) -> None:
        super().__init__(config)
        self.stem = SameConv(3, STEM, 3, 2)
        widths = (STEM, *(block[0] for block in BLOCKS))
        self.blocks = nn.ModuleList(
            Block(inputs, *block) for inputs, block in zip(widths, BLOCKS, strict=False)
        )
        self.mean = nn.Parameter(torch.zeros(FINE + COARSE), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(FINE + COARSE), requires_grad=False)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Tokens [N, 16, 768] as last and only hidden state, pooled features [N, 320].

        Raises:
            ValueError: If the pictures are not 128 x 128.
        """
        if pixel_values.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"pixel_values must be [N, 3, {SIZE}, {SIZE}], got {list(pixel_values.shape)}")
        # A CPU keeps the values of a few pictures in its cache.
        a_pass = PICTURES_A_PASS if pixel_values.is_cpu else max(1, len(pixel_values))
        tokens = torch.cat([self._tokens(some) for some in pixel_values.split(a_pass)])
        return BaseModelOutputWithPooling(tokens, tokens[..., FINE:].mean(1), (tokens,))

    def _tokens(self, pixel_values: Tensor) -> Tensor:
        # On a CPU the convolutions of single channels take half as long with the channels last.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        x, fine = F.relu6(self.stem(pixel_values), inplace=True), pixel_values
        for index, block in enumerate(self.blocks):
            x = block(x)
            fine = x if index == FINE_BLOCK else fine
        tokens = torch.cat([F.pixel_unshuffle(fine, 2), x], dim=1).flatten(2).transpose(1, 2)
        return (tokens - self.mean) * self.scale


def register_tower() -> None:
    """Make the tower known to transformers' Auto classes; calling it again changes nothing."""
    AutoConfig.register(LiteTowerConfig.model_type, LiteTowerConfig, exist_ok=True)
    AutoModel.register(LiteTowerConfig, LiteTower, exist_ok=True)
