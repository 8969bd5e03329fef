"""The built-in base: small, loaded as any checkpoint, good at its own mixture, near chance on the stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cram
from cram.base import base_folder, pretrain
from cram.base.mixture import FORMATS, MIXTURE, draw_example
from cram.base.model import IMAGE, IMAGE_TOKENS
from cram.base.pretrain import Losses, accuracy_by_kind
from cram.console import ProgressBar
from cram.learning.answers.generate import answer_task
from cram.learning.batches import Budget, EncodedSplit
from cram.loading import Sources
from cram.methods import METHODS
from cram.scoring import score
from cram.streams.builtin import build
from cram.streams.builtin.tasks import CAPTION_FORMAT, LETTER_FORMAT, NUMBER_FORMAT
from cram.streams.types import Stream

# Share of right answers by the best constant guess, in percent, with room for 48 samples.
GUESSING = {"sketches": 35, "charts": 45, "captions": 25, "icons": 45, "arithmetic": 45, "digits": 30}


@pytest.fixture(scope="module")
def loaded() -> Any:
    return Sources("builtin").load("cpu")


@pytest.fixture(scope="module")
def stream() -> Stream:
    return build(seed=11, train_samples=32, test_samples=48)


def test_weights_are_small_and_half_precision() -> None:
    from safetensors import safe_open

    files = sorted(base_folder().rglob("*.safetensors"))
    assert [path.parent.name for path in files] == ["clip", "llava"]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float16}  # noqa: SIM118


def test_card_states_the_training() -> None:
    facts = json.loads((base_folder() / "training.json").read_text())
    card = (base_folder() / "MODEL_CARD.md").read_text()
    assert "python -m cram.base.pretrain" in card
    for kind, accuracy in facts["held_out_accuracy"].items():
        assert f"| {kind} | {accuracy} |" in card
    for stage, steps in facts["steps"].items():
        assert f"| {stage} | {steps} |" in card


def test_encoder_reuses_the_tower(loaded: Any) -> None:
    assert loaded[2].reuses_vision_tower


def test_processor_writes_the_form_of_the_pretraining(loaded: Any) -> None:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Name the object."}]}
    prompt = loaded[1].apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    assert prompt == f"USER: {IMAGE}\nName the object. ASSISTANT:"
    image = np.zeros((48, 48, 3), np.uint8)
    ids = loaded[1](text=[prompt], images=[image], return_tensors="pt")["input_ids"]
    assert (ids == loaded[0].config.image_token_id).sum() == IMAGE_TOKENS


def test_answers_its_own_mixture(loaded: Any) -> None:
    from cram.base.pool import draw_rows, tokenize

    tokenizer = loaded[1].tokenizer.backend_tokenizer
    tokenizer = type(tokenizer).from_str(
        json.dumps({**json.loads(tokenizer.to_str()), "post_processor": None})
    )
    pool = tokenize(draw_rows(seed=99, count=96, workers=1), tokenizer)
    losses = Losses(loaded[0], None, tokenizer)  # type: ignore[arg-type]
    told = json.loads((base_folder() / "training.json").read_text())["held_out_accuracy"]
    found = accuracy_by_kind(losses, pool)
    assert abs(np.mean(list(found.values())) - np.mean(list(told.values()))) < 12
    assert found["name_shape"] > 65 and found["gauge"] > 85 and found["describe_long"] > 50


@pytest.mark.slow
def test_pretraining_writes_a_loadable_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CLIP_STEPS", "FORMAT_STEPS"):
        monkeypatch.setattr(pretrain, name, 2)
    monkeypatch.setattr(pretrain, "CLIP_BATCH", 8)
    monkeypatch.setattr(pretrain, "HELD_OUT", 256)
    pretrain.pretrain(tmp_path, steps=2, batch=8, rate=1e-3, examples=400, seed=1)
    facts = json.loads((tmp_path / "training.json").read_text())
    assert facts["steps"] == {"clip": 2, "llava": 2, "formats": 2}
    model, _, encoder = Sources(str(tmp_path / "llava"), str(tmp_path / "clip")).load("cpu")
    assert encoder.reuses_vision_tower and model.config.image_token_id == 2
    images = [
        [draw_example(np.random.default_rng(i))[0].image or Image.new("RGB", (48, 48))] for i in range(8)
    ]
    features, _ = encoder.encode_images(images)
    assert 2 < features.norm(dim=-1).mean() < 50


def test_is_near_guessing_on_the_stream(loaded: Any, stream: Stream) -> None:
    model, processor, encoder = loaded
    method = METHODS["cram"](cram.attach(model, cram.CramConfig(), encoder, processor))
    try:
        for task in stream.tasks:
            split = EncodedSplit(processor, task.test, Budget(1 << 28))
            with ProgressBar(task.name, len(task.test), False) as bar:
                answers, _ = answer_task(model, processor, method, task, split, bar)
            by_id = {sample.id: answer for sample, answer in zip(task.test, answers, strict=True)}
            assert score(task.scorer, by_id, task.test) <= GUESSING[task.name], task.name
    finally:
        cram.detach(model)


def test_features_tell_instructions_and_pictures_apart(loaded: Any, stream: Stream) -> None:
    encoder = loaded[2]
    texts = torch.stack(
        [encoder.encode_text([s.instruction for s in task.test]).mean(0) for task in stream.tasks]
    )
    texts = torch.nn.functional.layer_norm(texts, texts.shape[-1:])
    similar = torch.nn.functional.cosine_similarity(texts[:, None], texts[None], dim=-1)
    form = torch.tensor(
        [[f in task.test[0].instruction for f in (LETTER_FORMAT, NUMBER_FORMAT, CAPTION_FORMAT)].index(True)
         for task in stream.tasks]
    )  # fmt: skip
    same = form[:, None] == form
    assert similar[same].min() > similar[~same].max() + 0.1
    images = [encoder.encode_images([s.images for s in task.test])[0] for task in stream.tasks]
    centroids = torch.stack([features.mean(0) for features in images])
    for own, features in enumerate(images):
        assert (torch.cdist(features, centroids).argmin(1) == own).float().mean() > 0.95


def test_mixture_holds_no_task_and_no_format_of_the_stream(stream: Stream) -> None:
    rng = np.random.default_rng(5)
    questions = {draw_example(rng)[0].question for _ in range(2000)}
    asked = {sample.instruction for task in stream.tasks for sample in (*task.train, *task.test)}
    forms = (LETTER_FORMAT, NUMBER_FORMAT, CAPTION_FORMAT)
    assert not questions & asked
    assert not any(form in question for form in forms for question in questions)
    assert not set(forms) & set(FORMATS)


def test_every_kind_draws_from_its_seed() -> None:
    for make, weight in MIXTURE:
        first, again = make(np.random.default_rng(4)), make(np.random.default_rng(4))
        assert weight > 0 and (first.question, first.answer) == (again.question, again.answer)
        if first.image is not None and again.image is not None:
            assert first.image.tobytes() == again.image.tobytes()


def test_a_missing_asset_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("cram.base._ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"base must lie in .*llava, got no model.safetensors"):
        base_folder()
