"""CLIP features: reuse of the vision tower, text cache, means over images, checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

from cram.routing.clip import ClipEncoder, mean_per_sample
from tests.cram import factories

IMAGES = [[factories.image(0)], [], [factories.image(1), factories.image(2)]]


def test_equal_tower_is_reused_and_gives_the_same_features() -> None:
    clip = factories.clip_model()
    model = factories.llava(clip=clip)
    reused, own = factories.clip_encoder(model, clip), factories.clip_encoder(clip=factories.clip_model())
    assert reused.reuses_vision_tower and not own.reuses_vision_tower
    assert torch.equal(reused.encode_images(IMAGES)[0], own.encode_images(IMAGES)[0])
    pixels = factories.inputs("llava", rows=3)["pixel_values"]
    expected = clip.get_image_features(pixels).pooler_output
    assert torch.equal(reused.project(model.model.vision_tower(pixels).pooler_output), expected)
    assert torch.equal(own.encode_pixels(pixels), expected)


def test_another_tower_is_not_reused() -> None:
    clip = factories.clip_model()
    model = factories.llava(clip=clip)
    with torch.no_grad():
        model.model.vision_tower.post_layernorm.bias[3] += 1e-3
    assert not factories.clip_encoder(model, clip).reuses_vision_tower
    assert not factories.clip_encoder(factories.llava(), clip).reuses_vision_tower
    assert not factories.clip_encoder(factories.internvl(), clip).reuses_vision_tower


def test_an_encoder_moves_its_own_networks_and_no_reused_tower() -> None:
    clip = factories.clip_model()
    model = factories.llava(clip=clip)
    for encoder, moves in ((factories.clip_encoder(model, clip), False), (factories.clip_encoder(), True)):
        assert encoder.to("meta") is encoder
        for network in (encoder._text_model, encoder._projection):
            assert next(network.parameters()).is_meta
        assert next(encoder._vision.parameters()).is_meta == moves
    assert not next(model.model.vision_tower.parameters()).is_meta


class Stored(torch.Tensor):
    """A weight that is stored in another form and compares with nothing, as torchao's."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.equal:
            raise NotImplementedError("attempting to run unimplemented operator aten.equal")
        return super().__torch_function__(func, types, args, kwargs or {})


def stored(tower: Any) -> None:
    linear = tower.encoder.layers[0].mlp.fc1
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Stored), requires_grad=False)


def changed_by_reading(tower: Any) -> None:
    """bitsandbytes' 4-bit linears on some processors convert their weight back to write it."""

    def lose(*arguments: Any) -> None:
        raise AssertionError("the state dict of a model was asked for")

    stored(tower)
    tower.encoder.layers[0].mlp.fc1._register_state_dict_hook(lose)


def offloaded(tower: Any) -> None:
    cpu_offload(tower, torch.device("cpu"))


@pytest.mark.parametrize("kind", [stored, changed_by_reading, offloaded])
def test_a_tower_that_cannot_be_compared_is_not_reused(kind: Any) -> None:
    clip = factories.clip_model()
    model = factories.llava(clip=clip)
    kind(model.model.vision_tower)
    encoder = factories.clip_encoder(model, clip)
    assert not encoder.reuses_vision_tower
    assert torch.equal(encoder.encode_images(IMAGES)[0], factories.clip_encoder().encode_images(IMAGES)[0])


@pytest.mark.parametrize("change", [{"num_attention_heads": 4}, {"hidden_act": "gelu"}])
def test_equal_weights_of_another_network_are_not_reused(change: dict[str, Any]) -> None:
    clip = factories.clip_model()
    model = factories.llava(clip=clip)
    for name, value in change.items():
        setattr(model.model.vision_tower.config, name, value)
    assert not factories.clip_encoder(model, clip).reuses_vision_tower


def test_half_precision_tower_is_reused_in_its_own_precision() -> None:
    clip = factories.clip_model()
    model = factories.llava(clip=clip).to(torch.bfloat16)
    encoder = factories.clip_encoder(model, clip)
    assert encoder.reuses_vision_tower
    v, _ = encoder.encode_images(IMAGES)
    exact, _ = factories.clip_encoder().encode_images(IMAGES)
    assert v.dtype == torch.float32
    torch.testing.assert_close(v, exact, rtol=0.05, atol=0.05)


def test_explicit_features_do_not_reach_the_models_own_hook() -> None:
    clip = factories.clip_model()
    model = factories.llava(clip=clip)
    calls: list[object] = []
    model.model.vision_tower.register_forward_hook(lambda *call: calls.append(call))
    factories.clip_encoder(model, clip).encode_images(IMAGES)
    assert not calls


def test_features_of_a_sample_are_the_mean_over_its_images() -> None:
    encoder = factories.clip_encoder()
    v, has_image = encoder.encode_images(IMAGES)
    each, _ = encoder.encode_images([[image] for sample in IMAGES for image in sample])
    assert has_image.tolist() == [True, False, True]
    torch.testing.assert_close(v, torch.stack([each[0], torch.zeros_like(each[0]), (each[1] + each[2]) / 2]))
    assert v.norm(dim=1)[0] > 1


def test_many_images_are_encoded_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = factories.clip_encoder()
    pictures = [[factories.image(0), factories.image(1)], [factories.image(2)], [], [factories.image(3)]]
    whole, has_image = encoder.encode_images(pictures)
    sizes = []
    real = encoder.encode_pixels
    monkeypatch.setattr("cram.routing.clip.IMAGES_A_PASS", 3)
    monkeypatch.setattr(encoder, "encode_pixels", lambda pixels: sizes.append(len(pixels)) or real(pixels))
    parts, again = encoder.encode_images(pictures)
    assert sizes == [3, 1] and torch.equal(has_image, again)
    torch.testing.assert_close(parts, whole)


def test_no_image_at_all() -> None:
    query = factories.clip_encoder().encode(["What?"], [[]])
    assert query.image.shape == (1, factories.PROJECTION)
    assert not query.has_image.any() and not query.image.any()


def test_text_features_are_the_pooled_output_and_do_not_depend_on_neighbours() -> None:
    clip = factories.clip_model()
    encoder = factories.clip_encoder(clip=clip)
    together = encoder.encode_text(factories.QUESTIONS)
    assert together.shape == (3, factories.CLIP_TEXT)
    for question, row in zip(factories.QUESTIONS, together, strict=True):
        ids = factories.tokenizer(clip=True)(question, return_tensors="pt")["input_ids"]
        expected = clip.text_model(ids).last_hidden_state[0, -1]
        torch.testing.assert_close(row, expected)
        torch.testing.assert_close(
            factories.clip_encoder().encode_text([question])[0], row, atol=1e-5, rtol=1e-5
        )


def test_long_texts_are_cut_at_77_tokens() -> None:
    encoder = factories.clip_encoder()
    long = "a" * 75
    assert torch.equal(encoder.encode_text([long + "bc"]), encoder.encode_text([long + "de and so on"]))


def test_texts_are_cached_by_string(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = factories.clip_encoder()
    runs: list[list[str]] = []
    run = encoder._run_text
    monkeypatch.setattr(encoder, "_run_text", lambda texts: runs.append(texts) or run(texts))
    first = encoder.encode_text(["a", "b", "a"])
    second = encoder.encode_text(["b", "c", "a"])
    assert runs == [["a", "b"], ["c"]]
    assert torch.equal(first[0], first[2])
    assert torch.equal(second[[2, 0]], first[:2])


def test_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cram.routing.clip.CACHED_TEXTS", 2)
    encoder = factories.clip_encoder()
    assert encoder.encode_text(["a", "b", "c"]).shape[0] == 3
    assert list(encoder._texts) == ["b", "c"]
    encoder.encode_text(["d", "b"])
    assert list(encoder._texts) == ["c", "d"]


def test_encoder_from_disk_equals_the_one_in_memory(tmp_path: Path) -> None:
    clip = factories.clip_model()
    factories.save_clip(tmp_path, clip)
    model = factories.llava(clip=clip)
    loaded = ClipEncoder.from_pretrained(str(tmp_path), model)
    assert loaded.reuses_vision_tower and loaded.source == str(tmp_path)
    assert (loaded.text_dim, loaded.image_dim) == (factories.CLIP_TEXT, factories.PROJECTION)
    query, expected = (e.encode(["What?"], IMAGES[:1]) for e in (loaded, factories.clip_encoder()))
    torch.testing.assert_close(query.text, expected.text)
    torch.testing.assert_close(query.image, expected.image)


def test_encoder_is_frozen() -> None:
    clip = factories.clip_model()
    encoder = factories.clip_encoder(clip=clip)
    assert not encoder.encode_images(IMAGES)[0].requires_grad
    for part in (clip.text_model, clip.vision_model, clip.visual_projection):
        assert not any(p.requires_grad for p in part.parameters())
    assert encoder.to("cpu") is encoder


def test_features_that_are_not_finite_are_refused() -> None:
    clip = factories.clip_model()
    encoder = factories.clip_encoder(clip=clip)
    with pytest.raises(ValueError, match="image features must be finite, got NaN or Inf"):
        encoder.project(torch.full((1, factories.CLIP_HIDDEN), torch.nan))
    with torch.no_grad():
        clip.text_model.final_layer_norm.bias[0] = torch.inf
    with pytest.raises(ValueError, match="text features must be finite"):
        encoder.encode_text(["a"])
    assert not encoder._texts


def test_wrong_arguments_are_refused() -> None:
    encoder = factories.clip_encoder()
    with pytest.raises(ValueError, match=r"pooled must be \[N, 24\], got \[2, 5\]"):
        encoder.project(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"one list an instruction \(1\), got 2"):
        encoder.encode(["a"], [[], []])
    for texts in ([], "a"):
        with pytest.raises(ValueError, match="non-empty list of strings"):
            encoder.encode_text(texts)
    with pytest.raises(ValueError, match="images must be 3 in all, got 2 features"):
        mean_per_sample(torch.zeros(2, 4), [1, 2])


def test_a_tokenizer_without_end_of_text_is_refused() -> None:
    clip = factories.clip_model()
    encoder = ClipEncoder(clip, factories.tokenizer(clip=False), factories.image_processor())
    with pytest.raises(ValueError, match="end-of-text id 7, got none"):
        encoder.encode_text(["a"])


def test_autocast_changes_no_feature_and_leaves_none_behind() -> None:
    texts, pictures = ["What colour is it?"], [[factories.image(0)]]
    expected = factories.clip_encoder().encode(texts, pictures)
    encoder = factories.clip_encoder()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = encoder.encode(texts, pictures)
    for found in (inside, encoder.encode(texts, pictures)):
        assert torch.equal(found.text, expected.text) and torch.equal(found.image, expected.image)
