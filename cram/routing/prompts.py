"""Automatic routing: the query of a forward, read from what the model itself is given and computes anyway.

Text: the last user turn, decoded from `input_ids`. Image: the pooled output of the model's own vision tower,
caught by a hook. That output object is overwritten right after the tower returns, and generation runs the
tower before the forward that uses it, so the features travel with the output object itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cram.families import Family
from cram.routing.clip import ClipEncoder, mean_per_sample
from cram.routing.query import Query
from cram.routing.threads import PerThread

_CARRIED = "_cram_tower_features"
_EXPLICIT = (
    "route explicitly: `with model.cram.fixed(model.cram.route(model.cram.encode(instructions, images))):`"
)


@dataclass(frozen=True)
class TowerFeatures:
    """Pooled outputs [N, H] of one run of the vision tower, and the tokens it makes of an image."""

    pooled: Tensor
    tokens: int


@dataclass
class Call:
    """The inputs of one forward of the multimodal model.

    Attributes:
        input_ids: [B, T], or None if the caller gave embeddings.
        mask: Real tokens [B, T] (bool), or None where nothing tells them from padding.
        tower: Features of the images, or None without a reused tower or without images.
    """

    input_ids: Tensor | None
    mask: Tensor | None
    tower: TowerFeatures | None = None


class PromptReader:
    """Reads queries from the forwards of one model."""

    def __init__(self, model: Any, family: Family, encoder: ClipEncoder, processor: Any = None) -> None:
        self._family, self._encoder, self._config = family, encoder, model.config
        self._name_or_path = str(getattr(model, "name_or_path", "") or "")
        self._signature = inspect.signature(model.get_submodule(family.core).forward)
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._calls: PerThread[Call | None] = PerThread(None)

    @property
    def _call(self) -> Call | None:
        """The inputs of the forward that this thread is in."""
        return self._calls.get()

    @_call.setter
    def _call(self, call: Call | None) -> None:
        self._calls.set(call)

    def register(self, model: Any) -> list[Any]:
        """Hooks the core module and a reused vision tower; returns the handles."""
        core = model.get_submodule(self._family.core)
        handles = [core.register_forward_pre_hook(self.before_core, with_kwargs=True)]
        if self._encoder.reuses_vision_tower:
            tower = model.get_submodule(self._family.vision_tower)
            handles.append(tower.register_forward_hook(self.after_tower))
        return handles

    def before_core(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the module that merges vision and language: remembers its inputs."""
        given = self._signature.bind_partial(*args, **kwargs).arguments if args else kwargs
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        encoded = given.get("mm_encoder_outputs")
        image = encoded.get("image") if isinstance(encoded, Mapping) else None
        real = None if ids is None else real_tokens(mask, *ids.shape)
        self._call = Call(ids, real, getattr(image, _CARRIED, None))

    def after_tower(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of a reused vision tower: keeps the pooled output before it is overwritten."""
        features = TowerFeatures(output.pooler_output.detach().clone(), output.last_hidden_state.shape[1])
        setattr(output, _CARRIED, features)
        if self._call is not None:
            self._call.tower = features

    def take(self) -> Call | None:
        """The inputs of the forward in progress; None if the language model was called on its own."""
        call, self._call = self._call, None
        return call

    def visual_tokens(self, call: Call | None) -> bool:
        """Whether the inputs hold image or video tokens."""
        if call is None or call.input_ids is None:
            return False
        kinds = [getattr(self._config, f"{kind}_token_id", None) for kind in ("image", "video")]
        return any(bool((call.input_ids == kind).any()) for kind in kinds if kind is not None)

    def query(self, call: Call | None) -> Query:
        """The query of a prefill or training forward; S samples where generation expanded them to k S rows.

        Raises:
            ValueError: If the inputs give no way to route.
        """
        if call is None or call.input_ids is None:
            raise ValueError(
                f"automatic routing must see input_ids of the model's own forward, got none; {_EXPLICIT}"
            )
        ids = call.input_ids
        if not self.visual_tokens(call):
            text = self._encoder.encode_text(self.texts(ids, call.mask))
            return Query(text, *mean_per_sample(text.new_zeros(0, self._encoder.image_dim), [0] * len(ids)))
        if call.tower is None:
            raise ValueError(
                "automatic routing must reuse the model's CLIP vision tower, got images without its features "
                f"({self._family.name}, reuses_vision_tower={self._encoder.reuses_vision_tower}); {_EXPLICIT}"
            )
        images, copies = self._images_per_sample(ids, call.tower)
        mask = None if call.mask is None else call.mask[::copies]
        text = self._encoder.encode_text(self.texts(ids[::copies], mask))
        return Query(text, *mean_per_sample(self._encoder.project(call.tower.pooled), images))

    def texts(self, input_ids: Tensor, mask: Tensor | None) -> list[str]:
        """The last user turn of each row of input_ids [B, T]; the whole prompt where no turn is marked."""
        keep = input_ids != self._config.image_token_id
        if mask is not None:
            keep &= mask.to(keep.device)
        rows = [row[kept].tolist() for row, kept in zip(input_ids.cpu(), keep.cpu(), strict=True)]
        prompts = self._decode(rows, special=True)
        turns = [self._family.user_turn(prompt) for prompt in prompts]
        missing = [i for i, turn in enumerate(turns) if turn is None]
        whole = iter(self._decode([rows[i] for i in missing], special=False) if missing else [])
        return [self._family.without_placeholders(next(whole)) if turn is None else turn for turn in turns]

    def _decode(self, rows: list[list[int]], special: bool) -> list[str]:
        if self._tokenizer is None:
            if not self._name_or_path:
                raise ValueError(
                    f"processor must be given to attach for automatic routing, got None; or {_EXPLICIT}"
                )
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._name_or_path)
        return list(
            self._tokenizer.batch_decode(
                rows, skip_special_tokens=not special, clean_up_tokenization_spaces=False
            )
        )

    def _images_per_sample(self, ids: Tensor, tower: TowerFeatures) -> tuple[list[int], int]:
        """Images of each sample and the rows k that generation made of each sample.

        The tower runs before generation expands the rows, so N features may stand for k N images.
        """
        strategy = getattr(self._config, "vision_feature_select_strategy", "default")
        size = tower.tokens - (strategy == "default")
        tokens = torch.sum(ids == self._config.image_token_id, dim=1).tolist()
        rows, total, found = len(tokens), sum(tokens), tower.pooled.shape[0]
        copies = total // (size * found)
        samples = tokens[:: max(copies, 1)]
        expanded = [count for count in samples for _ in range(copies)]
        if total != copies * size * found or expanded != tokens or any(count % size for count in samples):
            raise ValueError(
                f"input_ids must hold {size} image tokens for each of {found} images, "
                f"got {tokens} in {rows} rows"
            )
        return [count // size for count in samples], copies


def real_tokens(mask: Any, rows: int, tokens: int) -> Tensor | None:
    """Positions [B, T] (bool) of an attention mask that are not padding, or None where nothing says which.

    Args:
        mask: [B, T], or what generation makes of it for a static cache: [B, 1, T, S] with S >= T, True (bool)
            or 0 (floating point) where a token is attended to. The last token attends to all real ones.
        rows: B.
        tokens: T.
    """
    if not isinstance(mask, Tensor):
        return None
    if mask.shape == (rows, tokens):
        return mask.bool()
    if mask.dim() == 4 and mask.shape[0] == rows and mask.shape[2] == tokens <= mask.shape[3]:
        last = mask[:, 0, -1, :tokens]
        return last if last.dtype == torch.bool else last == 0
    return None
