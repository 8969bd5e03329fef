"""The base `builtin-real`: its tower, its training examples, and what is shipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cram.base import base_folder
from cram.base.real import pictures, pool, real_base_folder, siblings, train
from cram.base.real.model import IMAGE_TOKENS
from cram.base.real.pool import NO_PICTURE, Pool, Row, batches, standardise
from cram.base.real.released import NORM_EPS, from_checkpoint
from cram.base.real.siblings import MAKERS
from cram.base.real.tower import BLOCKS, COARSE, FINE, FINE_BLOCK, STEM, LiteTower, LiteTowerConfig
from cram.base.real.wordings import FORMATS, HELD_OUT, instruction, sentences
from cram.loading import Sources, load_encoder, load_processor, shipped_folder
from cram.streams.real import sheets

BYTES = 25_000_000  # of all shipped bases


@pytest.fixture(scope="module")
def loaded() -> Any:
    return Sources("builtin-real").load("cpu")


def random_checkpoint() -> dict[str, Tensor]:
    """Tensors named and shaped as in the ImageNet checkpoint."""
    made: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(3)

    def add(conv: str, norm: str, outputs: int, inputs: int, kernel: int) -> None:
        fan = inputs * kernel * kernel
        shape = (outputs, inputs, kernel, kernel)
        made[f"{conv}.weight"] = torch.randn(shape, generator=generator) * (2 / fan) ** 0.5
        for name, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
            made[f"{norm}.{name}"] = torch.rand(outputs, generator=generator) + low

    add("_conv_stem", "_bn0", STEM, 3, 3)
    inputs = STEM
    for index, (outputs, kernel, _, expansion) in enumerate(BLOCKS):
        place, inner = f"_blocks.{index}.", inputs * expansion
        if expansion > 1:
            add(f"{place}_expand_conv", f"{place}_bn0", inner, inputs, 1)
        add(f"{place}_depthwise_conv", f"{place}_bn1", inner, 1, kernel)
        add(f"{place}_project_conv", f"{place}_bn2", outputs, inner, 1)
        inputs = outputs
    return made


def unfolded(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The fine and the coarse features with normalisation in place, written out."""

    def step(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        weight = weights[f"{conv}.weight"]
        kernel, groups = weight.shape[-1], len(weight) if weight.shape[1] == 1 else 1
        after = kernel - stride - (kernel - stride) // 2
        x = F.pad(x, ((kernel - stride) // 2, after) * 2)
        x = F.conv2d(x, weight, stride=stride, groups=groups)
        statistics = (weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *statistics, eps=NORM_EPS)

    x = F.relu6(step(x, "_conv_stem", "_bn0", 2))
    for index, (outputs, _, stride, expansion) in enumerate(BLOCKS):
        place, inner = f"_blocks.{index}.", x
        if expansion > 1:
            inner = F.relu6(step(x, f"{place}_expand_conv", f"{place}_bn0"))
        inner = F.relu6(step(inner, f"{place}_depthwise_conv", f"{place}_bn1", stride))
        inner = step(inner, f"{place}_project_conv", f"{place}_bn2")
        x = inner + x if stride == 1 and x.shape[1] == outputs else inner
        if index == FINE_BLOCK:
            fine = x
    return fine, x


def test_tower_is_the_checkpoint_with_its_normalisation_folded_in() -> None:
    weights = random_checkpoint()
    tower = LiteTower(LiteTowerConfig())
    tower.load_state_dict(from_checkpoint(weights))
    tower.double()
    values = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        output = tower.eval()(values)
        fine, coarse = unfolded({k: v.double() for k, v in weights.items()}, values)
    assert output.last_hidden_state.shape == (2, IMAGE_TOKENS, FINE + COARSE)
    # Folded in float32, compared in float64: 2^-24 per weight, through 48 layers.
    close = {"rtol": 1e-4, "atol": 1e-4 * float(coarse.std())}
    torch.testing.assert_close(output.pooler_output, coarse.mean((2, 3)), **close)
    torch.testing.assert_close(output.last_hidden_state[:, 6, FINE:], coarse[:, :, 1, 2], **close)
    cell = fine[:, :, 2:4, 4:6].flatten(1)
    torch.testing.assert_close(output.hidden_states[-1][:, 6, :FINE], cell, **close)


def test_tower_refuses_other_sizes() -> None:
    tower = LiteTower(LiteTowerConfig())
    with pytest.raises(ValueError, match=r"pixel_values must be \[N, 3, 128, 128\], got \[1, 3, 96, 96\]"):
        tower(torch.zeros(1, 3, 96, 96))


def test_standardised_features_have_no_mean_and_unit_deviation() -> None:
    tower = LiteTower(LiteTowerConfig())
    features = torch.randn(50, IMAGE_TOKENS, FINE + COARSE) * 3 + 5
    scaled = standardise(tower, features).flatten(0, 1)
    assert scaled.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(scaled.std(0), torch.ones(FINE + COARSE))


def test_features_are_standardised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PICTURES_A_PASS", 4)
    monkeypatch.setattr(pool, "PASSES_MEASURED", 2)
    tower = LiteTower(LiteTowerConfig())
    tower.load_state_dict(from_checkpoint(random_checkpoint()))
    tower.eval()
    features, rows = pool.draw_pictures(0, 24, 2, tower, measure=True)
    again, same = pool.draw_pictures(0, 24, 2, tower)
    assert rows == same and len(rows) == 48
    # Features are rounded to bf16 before and after the standardisation of the first passes.
    torch.testing.assert_close(features.float(), again.float(), rtol=2**-6, atol=2**-4)


def test_held_out_wordings_are_in_no_training() -> None:
    from cram.streams.real import questions

    known = {sentence for form in FORMATS for sentence in sentences(form)}
    held = {sentence for form in FORMATS for sentence in HELD_OUT[form]}
    assert not known & held
    for form, (sentence, *_) in questions.FORMATS.items():
        assert sentence in HELD_OUT[form]
    rng = np.random.default_rng(0)
    texts = [instruction(rng, "What is it?", None, form) for form in FORMATS for _ in range(200)]
    assert not any(sentence in text for sentence in held for text in texts)


class Unread:
    """The pixels of a set that must not be looked at."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError("a picture of the stream was read")

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("a picture of the stream was read")


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def load(name: str) -> sheets.PictureSet:
        found = sheets.load_set(name)
        return found if found.use == "free" else replace(found, pixels=Unread())

    for module in (pictures, siblings):
        monkeypatch.setattr(module, "load_set", load)
    pictures.drawings.cache_clear()
    yield
    pictures.drawings.cache_clear()


@pytest.mark.usefixtures("guarded")
def test_makers_draw_by_seed_and_from_free_sets_alone() -> None:
    with pytest.raises(AssertionError, match="picture of the stream"):
        siblings.load_set("flags").pixels[0]
    for make, weight in MAKERS:
        for seed in range(3):
            (first, asks), (again, same) = (
                make(np.random.default_rng(seed)),
                make(np.random.default_rng(seed)),
            )
            assert weight > 0 and asks == same
            if first is not None and again is not None:
                assert first.size == (128, 128) and first.tobytes() == again.tobytes()
            for ask in asks:
                assert ask.form in FORMATS and ask.answer
                if ask.form == "letter":
                    assert len(set(ask.options)) == len(ask.options) == 4
                    assert ask.answer in "ABCD"


def test_answers_of_a_maker_are_those_of_its_picture() -> None:
    for seed in range(20):
        _, asks = siblings.numeral(np.random.default_rng(seed))
        read = next(ask.answer for ask in asks if ask.form == "number")
        for ask in asks:
            if ask.form == "letter" and not ask.question.startswith("Which digit"):
                right = ask.options["ABCD".index(ask.answer)]
                assert right in (read, siblings.number_words(int(read)) if len(read) < 3 else read)


def test_batches_hold_every_row_once_within_their_budget() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, size=300)
    rows = [Row(NO_PICTURE, "letters", "word", "", "", "") for _ in lengths]
    ids = [[1] * int(n) for n in lengths]
    examples = Pool(torch.zeros(0, 16, 768), rows, ids, ids, ids, np.zeros(300, int))
    seen: list[int] = []
    for index in batches(examples, 512, np.random.default_rng(1), np.arange(300)):
        assert len(index) * lengths[index].max() <= 512
        seen += index.tolist()
        if len(seen) >= 300:
            break
    assert sorted(seen) == list(range(300))


def test_all_bases_together_are_small_and_half_precision() -> None:
    from safetensors import safe_open

    folders = (base_folder(), real_base_folder())
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= BYTES
    for path in real_base_folder().rglob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float16}  # noqa: SIM118


def test_card_states_the_training_and_the_licences() -> None:
    facts = json.loads((real_base_folder() / "training.json").read_text())
    card = (real_base_folder() / "MODEL_CARD.md").read_text()
    assert "python -m cram.base.real.train" in card and "python -m benchmarks base" in card
    for name in ("questions", "pictures", "steps", "formats_steps"):
        assert f"{facts[name]:,}" in card, name
    assert f"{facts['held_out_mean']}" in card and f"{facts['answer_loss']}" in card
    notice = (real_base_folder() / "LICENSE-efficientnet.md").read_text()
    assert "Apache" in notice and "ML Illustrated" in notice


def test_loads_with_its_encoder_on_one_tower(loaded: Any) -> None:
    model, processor, encoder = loaded
    assert encoder.reuses_vision_tower and encoder.source == "builtin-real"
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Name the thing."}]}
    prompt = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    assert prompt == "USER: <image>\nName the thing. ASSISTANT:"
    batch = processor(text=[prompt], images=[Image.new("RGB", (96, 96))], return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_id).sum() == IMAGE_TOKENS
    assert batch["pixel_values"].unique().numel() == 1
    assert float(batch["pixel_values"][0, 0, 0, 0]) == pytest.approx(-127 / 128)


def test_generates_the_same_alone_and_in_a_batch(loaded: Any) -> None:
    model, processor, _ = loaded
    rng = np.random.default_rng(0)
    shown = [Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8)) for _ in range(3)]
    prompts = [
        f"USER: <image>\n{text} ASSISTANT:" for text in ("What is it?", "Count the things.", "Describe.")
    ]

    def answers(index: list[int]) -> list[str]:
        batch = processor(
            text=[prompts[i] for i in index],
            images=[shown[i] for i in index],
            return_tensors="pt",
            padding=True,
        )
        made = model.generate(**batch, max_new_tokens=6, do_sample=False)
        return processor.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    together = answers([0, 1, 2])
    assert together == answers([0, 1, 2]) == [answers([i])[0] for i in range(3)]
    assert all(text.strip() for text in together)


def test_text_tower_sees_formats_in_wordings_it_never_saw(loaded: Any) -> None:
    encoder = loaded[2]
    asked = {
        "letter": "Which one is it? A. fox B. owl C. bee D. cat",
        "number": "How many are there?",
        "caption": "What does the picture show?",
        "word": "What does the picture show?",
    }
    texts = {
        form: encoder.encode_text([f"{question} {sentence}" for sentence in HELD_OUT[form]])
        for form, question in asked.items()
    }
    unit = {f: F.normalize(F.layer_norm(t, t.shape[-1:]).mean(0), dim=0) for f, t in texts.items()}
    for one in unit:
        assert all(float(unit[one] @ unit[other]) < 0.5 for other in unit if other != one)


@pytest.mark.slow
def test_training_writes_a_loadable_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "HELD_OUT", 70)
    torch.save(random_checkpoint(), tmp_path / "tower.pth")
    train.train(tmp_path / "tower.pth", tmp_path / "base", 0.05, 150, 4, 0, 3)
    facts = json.loads((tmp_path / "base/training.json").read_text())
    assert facts["steps"] > facts["naming_steps"] > 0 and facts["formats_steps"] == 3
    monkeypatch.setattr("cram.base.real.ASSETS", tmp_path / "base")
    model, _, encoder = Sources("builtin-real").load("cpu")
    assert encoder.reuses_vision_tower and model.config.image_token_id == 2
    rng = np.random.default_rng(0)
    drawn = [[siblings.thing(rng)[0]] for _ in range(8)]
    features, _ = encoder.encode_images(drawn)
    assert 2 < features.norm(dim=-1).mean() < 50


def test_a_missing_asset_and_an_unknown_base_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cram.base.real.ASSETS", tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"builtin-real must lie in .*llava, got no model.safetensors"
    ):
        real_base_folder()
    with pytest.raises(ValueError, match=r"base must be one of \('builtin', 'builtin-real'\), got 'tiny'"):
        shipped_folder("tiny")


def test_a_trained_folder_loads_by_path(tmp_path: Path, loaded: Any) -> None:
    for part in ("llava", "clip"):
        (tmp_path / part).symlink_to(real_base_folder() / part)
    assert load_processor(tmp_path / "llava").patch_size == 32
    encoder = load_encoder(tmp_path / "clip", loaded[0])
    assert encoder.reuses_vision_tower and encoder.source == str(tmp_path / "clip")
    question = ["Which animal is shown? Give one word."]
    torch.testing.assert_close(encoder.encode_text(question), loaded[2].encode_text(question))
    with pytest.raises(ValueError, match="model must be given for the encoder"):
        load_encoder(tmp_path / "clip")
