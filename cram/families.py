"""The model families that experts can be attached to: where their parts are and how their prompts are
written.

Paths follow transformers 5, in which all four families keep the language model at `model.language_model`.
Only linears inside its decoder layers are matched, never the vision tower, the projector or the output head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: `config.model_type` of its models.
        vision_tower: Path of the vision tower.
        clip_tower: Whether the vision tower is a CLIP vision model with a fixed number of tokens an image,
            so that its pooled output can serve as the routing feature.
        pixels: How its `pixel_values` hold pictures: "images", "tiles" or "patches"; see
            `cram.routing.pictures`.
        turns: (what opens the user's turn, what ends it) in prompts.
        placeholders: Strings that stand for images in a decoded prompt.
        projector: Path of the module from the tower to the language model; None if the tower contains it.
        core: Path of the module that merges vision and language.
        language_model: Path of the language model.
    """

    name: str
    vision_tower: str
    clip_tower: bool
    pixels: Literal["images", "tiles", "patches"]
    turns: tuple[tuple[str, str], ...]
    placeholders: tuple[str, ...]
    projector: str | None = None
    core: str = "model"
    language_model: str = "model.language_model"

    def user_turn(self, prompt: str) -> str | None:
        """The last user turn of a decoded prompt without image placeholders, or None if no marker is found.

        What follows the turn (the answer of a training prompt) is cut off, and so is the beginning of a
        marker at the end of a prompt that is not whole. A question may contain markers that are words, such
        as "ASSISTANT:"; the whole question is the turn.
        """
        found = self._last_turn(prompt)
        if found is None:
            return None
        text, end = found
        cut = text.find(end) if end in _CONTROL else text.rfind(end)
        if cut < 0:
            begun = (size for size in range(len(end) - 1, 0, -1) if text.endswith(f" {end[:size]}"))
            cut = len(text) - next(begun, 0)
        return self.without_placeholders(text[:cut])

    def leaves_turn_open(self, prompt: str) -> bool:
        """Whether more of the question may follow a decoded prompt: it ends inside of a user turn, or it has
        no markers."""
        found = self._last_turn(prompt)
        return found is None or found[1] not in found[0]

    def _last_turn(self, prompt: str) -> tuple[str, str] | None:
        """What stands behind the opening of the last user turn, and the marker that ends such turns.

        The template is the one whose opening comes first. Its opening opens a further turn only behind an
        answer; elsewhere it is a part of what is said.
        """
        places = [(prompt.find(opening), opening, end) for opening, end in self.turns if opening in prompt]
        if not places:
            return None
        first, opening, end = min(places)
        start = prompt.rfind(opening)
        while end not in _CONTROL and start > first:
            before = prompt.rfind(opening, 0, start)
            if _is_answered(prompt, before, start, end):
                break
            start = before
        return prompt[start + len(opening) :], end

    def without_placeholders(self, text: str) -> str:
        """The text without image placeholders and outer white space."""
        for placeholder in self.placeholders:
            text = text.replace(placeholder, "")
        return text.strip()


_CONTROL = ("<|im_end|>",)  # markers that are control tokens, which no question holds
_ANSWERED = "</s>"  # what ends an answer in prompts whose markers are words
_VICUNA = ("USER:", "ASSISTANT:")
_CHATML = ("<|im_start|>user\n", "<|im_end|>")
_PROJECTOR = "model.multi_modal_projector"
_QWEN_PLACEHOLDERS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        # LLaVA-1.5 speaks Vicuna; the later checkpoints of the same class use ChatML or Llama-2 markers.
        Family(
            "llava",
            "model.vision_tower",
            True,
            "images",
            (_VICUNA, _CHATML, ("[INST]", "[/INST]")),
            ("<image>",),
            _PROJECTOR,
        ),
        Family("qwen2_5_vl", "model.visual", False, "patches", (_CHATML,), _QWEN_PLACEHOLDERS),
        Family("qwen3_vl", "model.visual", False, "patches", (_CHATML,), _QWEN_PLACEHOLDERS),
        Family(
            "internvl",
            "model.vision_tower",
            False,
            "tiles",
            (_CHATML,),
            ("<img>", "<IMG_CONTEXT>", "</img>"),
            _PROJECTOR,
        ),
    )
}


def _is_answered(prompt: str, before: int, start: int, end: str) -> bool:
    """Whether an answer stands right before the opening at `start`; the opening before it is at `before`.

    Some templates end an answer with `_ANSWERED`. That of the converted LLaVA-1.5 checkpoints does not: there
    a turn must have ended since the opening before.
    """
    if _ANSWERED in prompt:
        return prompt[:start].rstrip().endswith(_ANSWERED)
    return end in prompt[before:start]


@dataclass(frozen=True)
class Matched:
    """The linears of a model that experts act on.

    Attributes:
        family: Name of the family.
        modules: Full module path -> (decoder layer, linear), in model order.
        counts: Projection -> number of matched linears.
        skipped: Paths of the language model's other linears.
        num_layers: Decoder layers.
    """

    family: str
    modules: dict[str, tuple[int, nn.Linear]]
    counts: dict[str, int]
    skipped: tuple[str, ...]
    num_layers: int

    def __str__(self) -> str:
        counts = ", ".join(f"{name} x {count}" for name, count in self.counts.items())
        return (
            f"{self.family}: {len(self.modules)} linears in {self.num_layers} layers ({counts}), "
            f"{len(self.skipped)} other language-model linears left alone"
        )


def family_of(model: nn.Module) -> Family:
    """The family of a model, by the `model_type` of its config.

    Raises:
        ValueError: If the family is not known; the message names the known ones.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(
            f"model must be one of the families {sorted(FAMILIES)}, got {kind or type(model).__name__!r}"
        )
    return FAMILIES[kind]


def match_linears(model: nn.Module, family: Family, projections: Iterable[str]) -> Matched:
    """Finds the linears named `projections` in every decoder layer of the language model.

    Raises:
        ValueError: If a projection is missing in any layer, so that no part of an adapter is silently
            without effect, or is no `nn.Linear`.
    """
    wanted = tuple(projections)
    pattern = re.compile(rf"{re.escape(family.language_model)}\.layers\.(\d+)\.(?:.+\.)?([^.]+)")
    modules: dict[str, tuple[int, nn.Linear]] = {}
    counts = dict.fromkeys(wanted, 0)
    skipped, layers = [], set()
    for path, module in model.named_modules():
        found = pattern.fullmatch(path)
        if found is None:
            continue
        layer, projection = int(found[1]), found[2]
        if not isinstance(module, nn.Linear):
            if projection in counts:
                raise ValueError(
                    f"{path} must be an `nn.Linear` or of a class made from it, as those of bitsandbytes, "
                    f"torchao and quanto are, got {type(module).__module__}.{type(module).__name__}"
                )
            continue
        layers.add(layer)
        if projection in counts:
            modules[path] = (layer, module)
            counts[projection] += 1
        else:
            skipped.append(path)
    if not layers or any(count != len(layers) for count in counts.values()):
        leaves = sorted({path.rsplit(".", 1)[1] for path in [*skipped, *modules]})
        raise ValueError(
            f"target_projections must name linears of all {len(layers)} decoder layers under "
            f"{family.language_model}, got {counts} matches; linears there: {leaves}"
        )
    return Matched(family.name, modules, counts, tuple(skipped), len(layers))
