"""Automatic routing: the query of a forward, read from what the model itself is given and computes anyway.

Text: the last user turn, decoded from `input_ids`. Image: caught by a hook on the vision tower. Where the
encoder reuses the tower, the tower's pooled output is the feature; elsewhere the tower's pixels become
pictures again and the encoder reads those. Generation runs the tower before the forward that uses its output,
so what is caught travels with the output object itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from cram.families import Family
from cram.routing.clip import ClipEncoder, load_image_processor, mean_per_sample
from cram.routing.pictures import Pixels, tiles_per_picture, units_per_sample
from cram.routing.query import Query
from cram.routing.threads import PerThread

_CARRIED = "_cram_images"
EXPLICIT = (
    "route explicitly: `with model.cram.fixed(model.cram.route(model.cram.encode(instructions, images))):`"
)


@dataclass(frozen=True)
class Images:
    """What one run of the vision tower saw; a unit is an image, a tile, or all patches of one picture.

    Attributes:
        pixels: Its input.
        tokens: Language tokens of each unit where all have as many; None where a grid tells.
        pooled: Pooled outputs [N, H] of a reused tower, else None.
    """

    pixels: Pixels
    tokens: int | None = None
    pooled: Tensor | None = None

    def sizes(self) -> list[int]:
        """Language tokens of each unit."""
        if self.pixels.grid is None:
            assert self.tokens is not None
            return [self.tokens] * len(self.pixels.values)
        return [patches // self.pixels.merge**2 for patches in self.pixels.grid.prod(-1).tolist()]


@dataclass
class Call:
    """The inputs of one forward of the multimodal model.

    Attributes:
        input_ids: [B, T], or None if the caller gave embeddings.
        mask: Real tokens [B, T] (bool), or None where nothing tells them from padding.
        images: What the vision tower saw, or None without images.
        positions: Position ids [B, T] or [1, T] that the caller gave, or None.
        packed: Whether the caller has said that a row holds several samples.
        prompt_tokens: Length of the whole prompt where `generate` has told it, else None.
    """

    input_ids: Tensor | None
    mask: Tensor | None
    images: Images | None = None
    positions: Tensor | None = None
    packed: bool = False
    prompt_tokens: int | None = None

    def holds_packed_rows(self) -> bool:
        """Whether a row holds several samples: its positions start anew among real tokens."""
        if self.packed or self.positions is None:
            return self.packed
        anew = self.positions[:, 1:] <= self.positions[:, :-1]
        if self.mask is not None and self.mask.shape == self.positions.shape:
            anew &= self.mask[:, :-1].to(anew.device)  # behind left padding positions begin
        return bool(anew.any())

    def prompt(self) -> Call:
        """The same without generated tokens, which a generation without a cache feeds again."""
        if self.input_ids is None or self.prompt_tokens is None:
            return self
        mask = None if self.mask is None else self.mask[:, : self.prompt_tokens]
        return replace(self, input_ids=self.input_ids[:, : self.prompt_tokens], mask=mask)

    def followed_by(self, more: Call, samples: int, kept: int) -> Call:
        """One row for each of S samples: their first `kept` tokens here, and behind them those of `more`."""
        assert self.input_ids is not None and more.input_ids is not None
        rows = [ids[:: len(ids) // samples] for ids in (self.input_ids[:, :kept], more.input_ids)]
        if self.mask is None:
            return Call(torch.cat(rows, dim=1), None)
        mask = self.mask[:: len(self.mask) // samples, :kept]
        return Call(
            torch.cat(rows, dim=1), torch.cat([mask, torch.ones_like(rows[1], dtype=torch.bool)], dim=1)
        )


class PromptReader:
    """Reads queries from the forwards of one model."""

    def __init__(self, model: Any, family: Family, encoder: ClipEncoder, processor: Any = None) -> None:
        self._family, self._encoder, self._config = family, encoder, model.config
        self._name_or_path = str(getattr(model, "name_or_path", "") or "")
        self._signature = inspect.signature(model.get_submodule(family.core).forward)
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._image_processor = getattr(processor, "image_processor", None)
        self._calls: PerThread[Call | None] = PerThread(None)
        self._prompt_tokens: PerThread[int | None] = PerThread(None)

    @property
    def _call(self) -> Call | None:
        """The inputs of the forward that this thread is in."""
        return self._calls.get()

    @_call.setter
    def _call(self, call: Call | None) -> None:
        self._calls.set(call)

    @contextmanager
    def generating(self, prompt_tokens: int | None) -> Iterator[None]:
        """Inside, the forwards of this thread belong to a generation behind a prompt of so many tokens."""
        before = self._prompt_tokens.get()
        self._prompt_tokens.set(prompt_tokens)
        try:
            yield
        finally:
            self._prompt_tokens.set(before)

    def register(self, model: Any) -> list[Any]:
        """Hooks the core module and the vision tower; returns the handles."""
        core, tower = (model.get_submodule(path) for path in (self._family.core, self._family.vision_tower))
        return [
            core.register_forward_pre_hook(self.before_core, with_kwargs=True),
            core.register_forward_hook(self.after_core, always_call=True),
            tower.register_forward_hook(self.after_tower, with_kwargs=True),
        ]

    def before_core(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the module that merges vision and language: remembers its inputs."""
        given = self._signature.bind_partial(*args, **kwargs).arguments if args else kwargs
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        encoded = given.get("mm_encoder_outputs")
        if encoded is not None and "mm_encoder_outputs" not in self._signature.parameters:
            raise ValueError(
                "mm_encoder_outputs must be absent with this transformers, whose model ignores them and sees "
                "no image, got some; pass pixel_values"
            )
        image = encoded.get("image") if isinstance(encoded, Mapping) else None
        real = None if ids is None else real_tokens(mask, *ids.shape)
        positions = given.get("position_ids")
        if positions is not None and positions.dim() == 3:
            # Qwen's rows: one of the text, which may be absent, and one per axis of a picture.
            positions = positions[0] if len(positions) == 4 else None
        packed = kwargs.get("cu_seq_lens_q") is not None
        carried, prompt_tokens = getattr(image, _CARRIED, None), self._prompt_tokens.get()
        self._call = Call(ids, real, carried, positions, packed, prompt_tokens)

    def after_core(self, *_: Any) -> None:
        """Forward hook of the same module, also of a forward that raised: forgets its inputs."""
        self._call = None

    def after_tower(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook of the vision tower: keeps its input and, where it is reused, its pooled output, which
        is overwritten later."""
        values = args[0] if args else kwargs["pixel_values"]
        if self._family.pixels == "patches":
            grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
            images = Images(Pixels(values, grid, int(self._config.vision_config.spatial_merge_size)))
        else:
            reused = self._encoder.reuses_vision_tower
            pooled = output.pooler_output.detach().clone() if reused else None
            images = Images(Pixels(values), self._tokens(int(output.last_hidden_state.shape[1])), pooled)
        setattr(output, _CARRIED, images)
        if self._call is not None:
            self._call.images = images

    def _tokens(self, positions: int) -> int:
        """Language tokens that the tower's output positions of a unit become."""
        strategy = getattr(self._config, "vision_feature_select_strategy", "default")
        return int((positions - (strategy == "default")) * getattr(self._config, "downsample_ratio", 1) ** 2)

    def take(self) -> Call | None:
        """The inputs of the forward in progress; None if the language model was called on its own."""
        call, self._call = self._call, None
        return call

    def visual_tokens(self, call: Call | None) -> bool:
        """Whether the inputs hold image or video tokens."""
        if call is None or call.input_ids is None:
            return False
        return self._holds(call.input_ids, "image") or self._holds(call.input_ids, "video")

    def _holds(self, ids: Tensor, kind: str) -> bool:
        token = getattr(self._config, f"{kind}_token_id", None)
        return token is not None and bool((ids == token).any())

    def query(self, call: Call | None) -> Query:
        """The query of a prefill or training forward; S samples where generation expanded them to k S rows.

        Raises:
            ValueError: If the inputs give no way to route.
        """
        if call is None or call.input_ids is None:
            raise ValueError(
                f"automatic routing must see input_ids of the model's own forward, got none; {EXPLICIT}"
            )
        if call.holds_packed_rows():
            raise ValueError(
                "a row must be one whole sample, got packed rows, whose positions start anew; unpack them or "
                "enter `model.cram.fixed` with one route for all"
            )
        call = call.prompt()
        ids = call.input_ids
        assert ids is not None
        if not self.visual_tokens(call):
            text = self._encoder.encode_text(self.texts(ids, call.mask))
            return Query(text, *mean_per_sample(text.new_zeros(0, self._encoder.image_dim), [0] * len(ids)))
        if call.images is None or self._holds(ids, "video"):
            raise ValueError(
                "automatic routing must see the pixels of all images in the prompt, got image tokens without "
                f"pixels, parts of a prompt, or a video; {EXPLICIT}"
            )
        tokens = torch.sum(ids == self._config.image_token_id, dim=1).tolist()
        sizes = call.images.sizes()
        units, copies = units_per_sample(tokens, sizes)
        mask = None if call.mask is None else call.mask[::copies]
        text = self._encoder.encode_text(self.texts(ids[::copies], mask))
        shown = [self._pictures(row, count, sizes) for row, count in zip(ids[::copies], units, strict=True)]
        features = self._features(call.images, [count for row in shown for count in row])
        return Query(text, *mean_per_sample(features.to(text.device), [len(row) for row in shown]))

    def query_of_more(self, call: Call, before: Query) -> Query:
        """The query of prompts that have grown by text since the query before: a row for each sample."""
        assert call.input_ids is not None
        text = self._encoder.encode_text(self.texts(call.input_ids, call.mask))
        return Query(text, before.image, before.has_image)

    def _pictures(self, row: Tensor, units: int, sizes: list[int]) -> list[int]:
        """Units of each picture of a row [T]."""
        if self._family.pixels == "tiles":
            return tiles_per_picture(row.tolist(), self._config.image_token_id, sizes[0])
        return [1] * units

    def _features(self, images: Images, units: list[int]) -> Tensor:
        """Image features [N, D_q] of N pictures with so many units each."""
        if images.pooled is not None:
            return self._encoder.project(images.pooled)
        chosen = [range(end - count, end) for count, end in zip(units, accumulate(units), strict=True)]
        pictures = images.pixels.pictures(chosen, self._pixel_rules())
        return self._encoder.encode_images([[each] for each in pictures])[0]

    def _pixel_rules(self) -> Any:
        """The image processor, which says how pixels were normalised."""
        if self._image_processor is None:
            self._image_processor = load_image_processor(self._folder())
        return self._image_processor

    def _folder(self) -> str:
        """The model's own folder or name, where the processor's parts are."""
        if not self._name_or_path:
            raise ValueError(
                f"processor must be given to attach for automatic routing, got None; or {EXPLICIT}"
            )
        return self._name_or_path

    def texts(self, input_ids: Tensor, mask: Tensor | None) -> list[str]:
        """The last user turn of each row of input_ids [B, T]; the whole prompt where no turn is marked."""
        rows, prompts = self._prompts(input_ids, mask)
        turns = [self._family.user_turn(prompt) for prompt in prompts]
        missing = [i for i, turn in enumerate(turns) if turn is None]
        whole = iter(self._decode([rows[i] for i in missing], special=False) if missing else [])
        return [self._family.without_placeholders(next(whole)) if turn is None else turn for turn in turns]

    def continues_prompt(self, call: Call, whole: Call, held: int) -> bool:
        """Whether a call behind `held` tokens of a cache brings more of the prompt, and not of its answer.

        Args:
            call: The inputs of the call.
            whole: The tokens of the cache with those of the call behind them.
            held: How many tokens the cache holds.
        """
        if call.prompt_tokens is not None:
            return held < call.prompt_tokens
        assert whole.input_ids is not None
        mask = whole.mask
        known = self.texts(whole.input_ids[:, :held], None if mask is None else mask[:, :held])
        return known != self.texts(whole.input_ids, mask)

    def leaves_turn_open(self, call: Call) -> bool:
        """Whether more of a row's question may follow the inputs; see `Family.leaves_turn_open`."""
        assert call.input_ids is not None
        _, prompts = self._prompts(call.input_ids, call.mask)
        return any(map(self._family.leaves_turn_open, prompts))

    def _prompts(self, input_ids: Tensor, mask: Tensor | None) -> tuple[list[list[int]], list[str]]:
        """Real tokens and decoded text of each row, without the tokens that stand for images."""
        tokenizer = self._loaded_tokenizer()
        kinds = ("image", "vision_start", "vision_end")
        drawn = [getattr(self._config, f"{kind}_token_id", None) for kind in kinds]
        drawn += [getattr(tokenizer, f"{kind}_image_token_id", None) for kind in ("start", "end")]
        keep = torch.ones_like(input_ids, dtype=torch.bool)
        for token in drawn:
            if token is not None:
                keep &= input_ids != token
        if mask is not None:
            keep &= mask.to(keep.device)
        rows = [row[kept].tolist() for row, kept in zip(input_ids.cpu(), keep.cpu(), strict=True)]
        return rows, self._decode(rows, special=True)

    def _decode(self, rows: list[list[int]], special: bool) -> list[str]:
        decode = self._loaded_tokenizer().batch_decode
        return list(decode(rows, skip_special_tokens=not special, clean_up_tokenization_spaces=False))

    def _loaded_tokenizer(self) -> Any:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._folder())
        return self._tokenizer


def real_tokens(mask: Any, rows: int, tokens: int) -> Tensor | None:
    """Positions [B, T] (bool) of an attention mask that are not padding, or None where nothing says which.

    Args:
        mask: [B, T], or what generation makes of it for a static cache: [B, 1, T, S] with S >= T, True (bool)
            or 0 (floating point) where a token is attended to, also one for each kind of layer by name. A
            real token attends to itself, behind any window.
        rows: B.
        tokens: T.
    """
    if isinstance(mask, Mapping):
        mask = next((each for each in mask.values() if isinstance(each, Tensor)), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.shape == (rows, tokens):
        return mask.bool()
    if mask.dim() == 4 and mask.shape[0] == rows and mask.shape[2] == tokens <= mask.shape[3]:
        own = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return own if own.dtype == torch.bool else own == 0
    return None
