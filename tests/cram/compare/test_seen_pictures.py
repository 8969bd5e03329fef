"""Pictures that a tower has seen: the same features, fewer passes, and towers that are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from cram.compare.seen_pictures import PASS, SeenPictures
from tests.cram import factories


@pytest.fixture
def llava() -> LlavaForConditionalGeneration:
    return factories.llava().eval().requires_grad_(False)


@pytest.fixture
def passes(llava: Any) -> list[int]:
    """Number of pictures of each pass through the tower's layers."""
    seen: list[int] = []
    embeddings = llava.model.vision_tower.embeddings
    embeddings.register_forward_pre_hook(
        lambda module, inputs, named: seen.append(_rows(inputs, named)), with_kwargs=True
    )
    return seen


def _rows(inputs: tuple[Any, ...], named: dict[str, Any]) -> int:
    return len(inputs[0] if inputs else named["pixel_values"])


def pictures(count: int, seed: int = 0) -> Tensor:
    size = factories.IMAGE_SIZE
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def features(llava: Any, pixels: Tensor, **settings: Any) -> Tensor:
    found: Tensor = torch.stack(list(llava.model.get_image_features(pixels, **settings).pooler_output))
    return found


def test_each_picture_passes_once_and_has_the_features_of_the_plain_tower(
    llava: Any, passes: list[int]
) -> None:
    pixels, seen = pictures(PASS + 3), SeenPictures()
    plain = features(llava, pixels)
    passes.clear()
    with seen.shown_to(llava):
        first = features(llava, pixels)
        again = features(llava, pixels.flip(0)).flip(0)
    assert passes == [PASS, PASS] and len(seen) == PASS + 3
    torch.testing.assert_close(first, plain)
    assert torch.equal(first, again)
    features(llava, pixels)
    assert passes[2:] == [PASS + 3], "outside the tower runs as ever"


def test_what_was_seen_before_changes_no_bit(llava: Any) -> None:
    pixels, alone = pictures(5), SeenPictures()
    with alone.shown_to(llava):
        one = torch.cat([features(llava, pixel[None]) for pixel in pixels])
    with SeenPictures().shown_to(llava):
        together = features(llava, pixels)
    assert torch.equal(one, together)


def test_a_picture_twice_in_a_batch_passes_once(llava: Any, passes: list[int]) -> None:
    pixels, seen = pictures(1).repeat(3, 1, 1, 1), SeenPictures()
    with seen.shown_to(llava):
        found = features(llava, pixels)
    assert passes == [PASS] and len(seen) == 1
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_other_settings_are_another_call(llava: Any, passes: list[int]) -> None:
    tower, pixels = llava.model.vision_tower, pictures(2)
    with SeenPictures().shown_to(llava):
        shown = tower(pixels, output_hidden_states=True)
        hidden = tower(pixels, output_hidden_states=False)
    assert len(shown.hidden_states) == factories.CLIP_VISION["num_hidden_layers"] + 1
    assert hidden.hidden_states is None and passes == [PASS, PASS]


def test_without_memory_nothing_is_kept(llava: Any, passes: list[int]) -> None:
    pixels, seen = pictures(2), SeenPictures(max_bytes=0)
    with seen.shown_to(llava):
        assert torch.equal(features(llava, pixels), features(llava, pixels))
    assert len(seen) == 0 and passes == [PASS, PASS]


def test_models_with_equal_towers_share_what_was_seen(llava: Any, passes: list[int]) -> None:
    other, seen, pixels = factories.llava().eval().requires_grad_(False), SeenPictures(), pictures(2)
    other.load_state_dict(llava.state_dict())
    with seen.shown_to(other):
        found = features(other, pixels)
    with seen.shown_to(llava):
        assert torch.equal(features(llava, pixels), found) and passes == []


def test_a_tower_that_trains_is_left_alone(llava: Any, passes: list[int]) -> None:
    parameter = next(llava.model.vision_tower.parameters()).requires_grad_(True)
    with SeenPictures().shown_to(llava):
        features(llava, pictures(2)).sum().backward()
    assert passes == [2] and parameter.grad is not None


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_every_family_answers_as_without(family: str) -> None:
    model = getattr(factories, family)().eval().requires_grad_(False)
    inputs, seen = factories.inputs(family, rows=2), SeenPictures()
    with torch.no_grad():
        plain = model(**inputs).logits
        with seen.shown_to(model):
            first, again = model(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(first, plain)
    assert torch.equal(first, again)
    assert (len(seen) > 0) == (family in ("llava", "internvl")), "Qwen's towers take patches, not pictures"


def test_an_error_leaves_the_tower_as_it_was(llava: Any) -> None:
    tower = llava.model.vision_tower
    with pytest.raises(ZeroDivisionError), SeenPictures().shown_to(llava):
        raise ZeroDivisionError
    assert "forward" not in vars(tower)
