"""Automatic routing on every family: forwards and `generate` with pictures, without an explicit route."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import LogitsProcessor

from cram.attach import attach, detach
from cram.config import CramConfig
from cram.learning.batches import build_prompt
from cram.loading import load_model, load_processor
from cram.model.attached import AttachedModel
from cram.model.cache import made_cache
from cram.routing.query import Query
from tests.cram import factories, runs
from tests.cram.factories import QUESTIONS, continuing
from tests.cram.model.versions import AHEAD

Samples = list[tuple[str, list[Any]]]
COLOURS = ((40, 60, 190), (60, 160, 60), (220, 190, 60))


def picture(kind: int, seed: int, size: tuple[int, int] = (48, 32), spread: int = 20) -> Image.Image:
    """A smooth picture; those of one kind share colour and pattern and differ by up to `spread` levels."""
    coarse = np.array(COLOURS[kind]) + np.random.default_rng(kind).integers(-40, 41, (3, 4, 3))
    noise = np.random.default_rng(1000 + seed).integers(-spread, spread + 1, (3, 4, 3))
    pixels = Image.fromarray((coarse + noise).clip(0, 255).astype(np.uint8))
    return pixels.resize(size, Image.Resampling.BICUBIC)


SAMPLES: Samples = [
    (QUESTIONS[0], [picture(0, 1)]),
    (QUESTIONS[1], [picture(1, 2), picture(2, 3, (32, 32))]),
    (QUESTIONS[0], []),
    (QUESTIONS[0], [picture(2, 4, (24, 64))]),
]


@cache
def _parts(name: str) -> tuple[Any, Any]:
    with TemporaryDirectory() as folder:
        runs.save_checkpoint(name, Path(folder))
        return load_model(folder, device="cpu"), load_processor(folder)


def routed(name: str) -> tuple[Any, Any, AttachedModel]:
    """A family's model with its processor and an encoder of its own.

    Experts "old" and "new" are of group 0, which question 0 leads to; "other" is of group 1.
    """
    _, processor = _parts(name)
    model = factories.MODELS[name]()
    if name.startswith("qwen"):
        processor.image_processor.size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    settings = {"buffer_rank": 9, "sigma": 1.0, "dropout": 0.0, "group_merge_similarity": 1.0}
    cram = attach(model, CramConfig(**settings), factories.clip_encoder(), processor)
    text = cram.encoder.encode_text(QUESTIONS[:2])
    for group in (0, 1):
        assert cram.method.router.groups.observe(f"task{group}", text[group : group + 1]) == group
    seen = [(QUESTIONS[0], [picture(kind, seed)]) for kind in range(3) for seed in range(4)]
    centroids = read(model, processor, cram, seen).image.unflatten(0, (3, 4)).mean(1)
    for index, (expert, group) in enumerate((("old", 0), ("other", 1), ("new", 0))):
        weights = factories.expert_weights(cram, index)
        cram.method.add_expert(expert, weights, group, centroids[index], trained=False)
    return model, processor, cram


def batch_of(processor: Any, samples: Samples) -> Any:
    processor.tokenizer.padding_side = "left"
    images = [each for _, pictures in samples for each in pictures]
    texts = [build_prompt(processor, question, len(pictures)) for question, pictures in samples]
    return processor(text=texts, images=images or None, padding=True, return_tensors="pt")


def read(model: Any, processor: Any, cram: AttachedModel, samples: Samples) -> Query:
    """The query that a forward reads by itself."""
    queries: list[Query] = []
    cram.hooks.on_query.append(queries.append)
    with torch.no_grad():
        model(**batch_of(processor, samples))
    cram.hooks.on_query.remove(queries.append)
    return queries[0]


def explicit(cram: AttachedModel, samples: Samples) -> Query:
    """The query from the original pictures and questions."""
    return cram.encode([question for question, _ in samples], [pictures for _, pictures in samples])


def answers(model: Any, batch: Any, **settings: Any) -> list[list[int]]:
    made = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, **settings)
    return made[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", factories.MODELS)
def test_generate_routes_every_sample_by_its_own_question_and_pictures(name: str) -> None:
    model, processor, cram = routed(name)
    for settings in ({"num_beams": 1}, {"num_beams": 2, "num_return_sequences": 2}):
        together = answers(model, batch_of(processor, SAMPLES), **settings)
        route = cram.state.route
        rows = len(route.groups) // len(SAMPLES)  # 1 where the tower runs before generation expands the rows
        assert route.groups[::rows].tolist() == [0, 1, 0, 0]
        with cram.fixed(route):
            assert answers(model, batch_of(processor, SAMPLES), **settings) == together
        alone = []
        for index, sample in enumerate(SAMPLES):
            alone += answers(model, batch_of(processor, [sample]), **settings)
            torch.testing.assert_close(route.gates[:, index * rows], cram.state.route.gates[:, 0])
        assert together == alone
    first, last = route.gates[0, 0], route.gates[0, 3 * rows]
    assert first[0] > first[2] and last[0] < last[2]


@pytest.mark.parametrize("name", factories.MODELS)
def test_at_least_99_percent_of_a_stream_take_the_route_of_the_original_pictures(name: str) -> None:
    model, processor, cram = routed(name)
    sizes = [(30 + n % 5 * 9, 31 + n % 4 * 10) for n in range(120)]
    kinds = [n % 3 for n in range(120)]
    samples = [(QUESTIONS[k == 1], [picture(k, 10 + n, sizes[n])]) for n, k in enumerate(kinds)]
    same = right = 0
    for first in range(0, len(samples), 20):
        part = samples[first : first + 20]
        original = cram.encoder.encode([question for question, _ in part], [shown for _, shown in part])
        ours, theirs = cram.route(read(model, processor, cram, part)), cram.route(original)
        experts = ours.gates[0].argmax(1) == theirs.gates[0].argmax(1)
        same += int((experts & (ours.groups == theirs.groups)).sum())
        right += int((theirs.gates[0].argmax(1) == torch.tensor(kinds[first : first + 20])).sum())
    assert right == len(samples) and same >= 0.99 * len(samples)


def striped(kind: int, seed: int, size: tuple[int, int]) -> Image.Image:
    """A picture of one kind with a stripe of another kind at any place: what is cut off decides the route."""
    generator = np.random.default_rng(seed)
    pixels, other = (np.array(picture(k, seed, (24, 24))) for k in (kind, (kind + 1) % 3))
    width = int(generator.integers(4, 13))
    first = int(generator.integers(0, 24 - width))
    pixels[:, first : first + width] = other[:, first : first + width]
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", factories.MODELS)
def test_pictures_of_any_shape_take_the_route_of_their_explicit_query(name: str) -> None:
    model, processor, cram = routed(name)
    sizes = np.random.default_rng(5).integers(20, 160, (60, 2)).tolist()
    samples = [(QUESTIONS[n % 3 == 1], [striped(n % 3, 10 + n, tuple(sizes[n]))]) for n in range(60)]
    furthest = 0.0
    for first in range(0, len(samples), 20):
        part = samples[first : first + 20]
        ours, theirs = cram.route(read(model, processor, cram, part)), cram.route(explicit(cram, part))
        assert torch.equal(ours.groups, theirs.groups)
        furthest = max(furthest, float((ours.gates - theirs.gates).abs().max()))
    # Qwen's processor rounds both sides to whole patches, the others leave nothing to differ but sums.
    assert furthest < (0.15 if name.startswith("qwen") else 1e-5)


@AHEAD
@pytest.mark.parametrize("name", factories.MODELS)
def test_a_static_cache_generates_the_same_behind_padding(name: str) -> None:
    """Generation makes masks of four dimensions for it, on some families one for each kind of layer."""
    model, processor, cram = routed(name)
    batch = batch_of(processor, SAMPLES)
    assert not batch["attention_mask"].all()
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected, gates = model.generate(**batch, **options), cram.state.route.gates
    found = model.generate(**batch, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, expected) and torch.equal(cram.state.route.gates, gates)


class Logits(torch.nn.Module):
    """A model whose only output is logits, and whose pictures have one shape."""

    def __init__(self, model: Any, batch: Any) -> None:
        super().__init__()
        self.model = model
        self.rest = {name: batch[name] for name in batch if name not in RECORDED}

    def forward(self, *inputs: Any) -> Any:
        return self.model(**dict(zip(RECORDED, inputs, strict=True)), **self.rest, use_cache=False).logits


RECORDED = ("input_ids", "attention_mask", "pixel_values")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", factories.MODELS)
def test_a_recorded_forward_has_no_route_of_its_own(name: str) -> None:
    """A trace would answer every question with the experts of its example."""
    model, processor, cram = routed(name)
    batch = batch_of(processor, SAMPLES[:1])
    recorded = Logits(model, batch)
    inputs = tuple(batch[each] for each in RECORDED)
    with torch.no_grad():
        expected = recorded(*inputs)
        route = cram.state.route
        with pytest.raises(ValueError, match="a recorded forward .* must have a route for all inputs"):
            torch.jit.trace(recorded, inputs, check_trace=False)
        with cram.fixed(route):
            traced = torch.jit.trace(recorded, inputs, check_trace=False)
        torch.testing.assert_close(traced(*inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", factories.MODELS)
def test_an_export_is_refused_before_the_vision_tower(name: str) -> None:
    """Qwen's towers cannot be exported, which would be reported in place of the missing route."""
    model, processor, _ = routed(name)
    batch = batch_of(processor, SAMPLES[:1])
    inputs = tuple(batch[each] for each in RECORDED)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="a recorded forward .* must have a route for all inputs"),
    ):
        torch.export.export(Logits(model, batch), inputs, strict=False)


def test_a_strict_export_says_what_to_do_instead() -> None:
    model, processor, cram = routed("llava")
    batch = batch_of(processor, SAMPLES[:1])
    recorded, inputs = Logits(model, batch), tuple(batch[each] for each in RECORDED)
    with torch.no_grad(), cram.fixed(cram.route(explicit(cram, SAMPLES[:1]))):
        with pytest.raises(Exception, match="torch.export takes strict=False"):
            torch.export.export(recorded, inputs, strict=True)
        exported = torch.export.export(recorded, inputs, strict=False).module()
        torch.testing.assert_close(exported(*inputs), recorded(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_of_other_tokens_are_refused(name: str) -> None:
    """Of a whole mask Qwen's models make positions of all tokens; guidance gives the mask alone."""
    model, processor, cram = routed(name)
    batch = batch_of(processor, SAMPLES[:1])
    cache = made_cache(model(**batch, use_cache=True))
    token, mask = torch.tensor([[40]]), F.pad(batch["attention_mask"], (0, 1), value=1)
    more = continuing(model, cache)
    with pytest.raises(ValueError, match="position_ids must be those of the 1 new tokens, got"):
        model(input_ids=token, attention_mask=mask, **more)
    with cram.disabled(), pytest.raises(ValueError, match="leave out guidance_scale"):
        model.generate(**batch, max_new_tokens=3, min_new_tokens=3, guidance_scale=1.5)


class Says(LogitsProcessor):
    """Generates these tokens and nothing else."""

    def __init__(self, tokens: list[int], prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        told = torch.full_like(scores, -torch.inf)
        told[:, self.tokens[input_ids.shape[1] - self.prompt]] = 0
        return told


@pytest.mark.parametrize("name", factories.MODELS)
def test_what_is_generated_routes_nothing_without_a_cache_either(name: str) -> None:
    """Without a cache every forward reads the answer so far; here it holds a question of the other group."""
    model, processor, cram = routed(name)
    batch = batch_of(processor, SAMPLES[:1])
    model.generate(**batch, max_new_tokens=1)
    gates = cram.state.route.gates
    turn = build_prompt(processor, QUESTIONS[1], 0) + "x"
    tokens = processor.tokenizer("</s>" + turn, add_special_tokens=False)["input_ids"]
    says = Says(tokens, batch["input_ids"].shape[1])
    options: dict[str, Any] = {"max_new_tokens": len(tokens), "do_sample": False, "eos_token_id": 319}
    model.generate(**batch, **options, logits_processor=[says], use_cache=False)
    assert torch.equal(cram.state.route.gates, gates)


@pytest.mark.parametrize("name", factories.MODELS)
def test_features_computed_ahead_bring_their_pictures(name: str) -> None:
    model, processor, cram = routed(name)
    batch = batch_of(processor, SAMPLES)
    expected = model(**batch).logits
    gates = cram.state.route.gates
    given = {key: batch.pop(key) for key in ("pixel_values", "image_grid_thw") if key in batch}
    encoded = model.get_image_features(**given, return_dict=True)
    grid = {} if name == "llava" else {key: given[key] for key in given if key == "image_grid_thw"}
    assert torch.equal(model(**batch, **grid, mm_encoder_outputs={"image": encoded}).logits, expected)
    assert torch.equal(cram.state.route.gates, gates)


@pytest.mark.parametrize("name", factories.MODELS)
def test_training_forwards_read_what_generation_reads(name: str) -> None:
    model, processor, cram = routed(name)
    batch = batch_of(processor, SAMPLES)
    answers(model, batch)
    generated = cram.state.route.query
    model.train()(**batch)
    trained = cram.state.query
    assert torch.equal(trained.text, generated.text) and torch.equal(trained.image, generated.image)
    model.eval()
    assert torch.equal(trained.text, cram.encoder.encode_text([question for question, _ in SAMPLES]))
    assert trained.has_image.tolist() == [True, True, False, True]


def test_a_prompt_in_parts_takes_the_route_of_the_whole_prompt_or_is_refused() -> None:
    model, processor, cram = routed("llava")
    whole = 0
    for question in QUESTIONS[:2]:
        batch = batch_of(processor, [(question, []), (question, [])])
        expected = answers(model, batch)
        half = batch["input_ids"].shape[1] // 2 + 1
        for parts in (7, half):  # the first part of 7 tokens is the same for both questions
            try:
                assert answers(model, batch, prefill_chunk_size=parts) == expected
                whole += 1
            except ValueError as error:
                assert "prompt must be in one prefill" in str(error) and "model.cram.fixed" in str(error)
        route = cram.route(explicit(cram, [(question, [])]))
        with cram.fixed(route):
            assert answers(model, batch, prefill_chunk_size=half) == expected
    assert 0 < whole < 4


def test_no_length_of_parts_changes_a_route_silently() -> None:
    model, processor, cram = routed("llava")
    refused = 0
    for question in QUESTIONS[:2]:
        inputs = processor(text=[f"USER: {question} ASSISTANT:"], return_tensors="pt")
        expected = answers(model, inputs)
        route = cram.state.route
        length = inputs["input_ids"].shape[1]
        for parts in (1, 2, 7, length // 2 + 1, length - 2, length - 1):
            try:
                found = answers(model, inputs, prefill_chunk_size=parts)
            except ValueError as error:
                assert "prompt must be in one prefill" in str(error) and "model.cram.fixed" in str(error)
                refused += 1
                continue
            assert found == expected and torch.equal(cram.state.route.gates, route.gates)
    assert 2 <= refused < 12


def test_a_question_that_comes_token_by_token_is_refused() -> None:
    model, processor, cram = routed("llava")
    ids = processor(text=[f"USER: {QUESTIONS[1]} ASSISTANT:"], return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match=r"must be in one prefill, got its first token alone"):
        answers(model, {"input_ids": ids}, prefill_chunk_size=1)
    # "<s>USER: Wr", "it": two words into the question nothing tells its group yet.
    cache = made_cache(model(input_ids=ids[:, :9], use_cache=True))
    model(input_ids=ids[:, 9:11], **continuing(model, cache))
    with pytest.raises(ValueError, match=r"got tokens behind a KV cache that change its route"):
        for place in range(11, ids.shape[1]):
            model(input_ids=ids[:, place : place + 1], **continuing(model, cache))


def test_a_prompt_that_ends_inside_of_a_question_generates() -> None:
    model, processor, cram = routed("llava")
    inputs = processor(text=[f"USER: {QUESTIONS[1]}"], return_tensors="pt")
    found = answers(model, inputs)
    with cram.fixed(cram.state.route):
        assert answers(model, inputs) == found


def test_the_last_token_of_a_question_decides_its_route_also_alone() -> None:
    model, processor, cram = routed("llava")
    words = np.random.default_rng(0).choice(["What", "colour", "is", "Write", "a", "long", "story"], (80, 6))
    begun = [" ".join(row) for row in words]
    groups = [cram.route(cram.encode([f"{q}{end}" for q in begun], [[]] * 80)).groups for end in ("", "?")]
    question = f"{begun[int((groups[0] != groups[1]).nonzero()[0])]}?"
    for prompt in (f"USER: {question}", question):  # neither says where the question ends
        ids = processor(text=[prompt], return_tensors="pt")["input_ids"]
        expected = answers(model, {"input_ids": ids})
        route = cram.route(explicit(cram, [(question, [])]))
        with cram.fixed(route):
            assert answers(model, {"input_ids": ids}) == expected
            assert answers(model, {"input_ids": ids}, prefill_chunk_size=ids.shape[1] - 1) == expected
        with pytest.raises(ValueError, match=r"got tokens behind a KV cache that change its route"):
            answers(model, {"input_ids": ids}, prefill_chunk_size=ids.shape[1] - 1)
        cache = made_cache(model(input_ids=ids[:, :-1], use_cache=True))
        with pytest.raises(ValueError, match=r"got tokens behind a KV cache that change its route"):
            model(input_ids=ids[:, -1:], **continuing(model, cache))


def test_a_cache_that_was_cut_short_takes_another_question_no_more() -> None:
    model, processor, cram = routed("llava")
    first, other = (processor(text=[f"USER: {q} ASSISTANT:"], return_tensors="pt") for q in QUESTIONS[:2])
    ids, same = other["input_ids"], len("sUSER: ")
    for step in (1, ids.shape[1]):
        cache = made_cache(model(**first, use_cache=True))
        cache.crop(same - first["input_ids"].shape[1])
        with pytest.raises(ValueError, match=r"got tokens behind a KV cache that change its route"):
            for place in range(same, ids.shape[1], step):
                model(input_ids=ids[:, place : place + step], **continuing(model, cache))


def test_another_question_behind_a_cache_is_refused() -> None:
    model, processor, cram = routed("qwen2_5_vl")
    cache = made_cache(model(**batch_of(processor, SAMPLES[:1]), use_cache=True))
    same, other = (batch_of(processor, [(question, [])])["input_ids"] for question in QUESTIONS[:2])
    model(input_ids=same, **continuing(model, cache))
    with pytest.raises(ValueError, match=r"prompt must be in one prefill.*model\.cram\.fixed"):
        model(input_ids=other, **continuing(model, cache))


def test_guesses_of_assisted_generation_keep_the_route() -> None:
    model, processor, cram = routed("internvl")
    batch = batch_of(processor, SAMPLES[2:3])
    assert answers(model, batch, prompt_lookup_num_tokens=3) == answers(model, batch)


@pytest.mark.parametrize("name", factories.MODELS)
def test_packed_rows_are_refused(name: str) -> None:
    model, processor, cram = routed(name)
    ids = batch_of(processor, [(QUESTIONS[0], [])])["input_ids"]
    packed = torch.cat([ids, ids], dim=1)
    positions = torch.arange(ids.shape[1]).repeat(2)[None]
    with pytest.raises(ValueError, match=r"must be one whole sample, got packed rows.*model\.cram\.fixed"):
        model(input_ids=packed, position_ids=positions)
    with cram.forced("old"):
        model(input_ids=packed, position_ids=positions)
    whole = torch.arange(ids.shape[1])[None]
    assert torch.equal(model(input_ids=ids, position_ids=whole).logits, model(input_ids=ids).logits)


def test_continuous_batching_is_refused() -> None:
    model, processor, _ = routed("llava")
    ids = batch_of(processor, [(QUESTIONS[0], [])])["input_ids"]
    refusal = pytest.raises(
        ValueError, match=r"got continuous batching, which packs them; use model\.generate"
    )
    with refusal:
        model.generate_batch(inputs=ids.tolist())
    with refusal:
        model.generate(ids, cache_implementation="paged")
    detach(model)
    assert "init_continuous_batching" not in model.__dict__


def test_a_video_is_refused() -> None:
    model, processor, _ = routed("qwen2_5_vl")
    batch = batch_of(processor, SAMPLES[:1])
    batch["input_ids"][0, -1] = factories.SPECIAL["<video>"]
    with pytest.raises(ValueError, match=r"or a video; route explicitly.*model\.cram\.fixed"):
        model.cram.hooks._reader.query(call_of(model, batch))


def call_of(model: Any, batch: Any) -> Any:
    """What the reader remembers of a forward's inputs."""
    reader = model.cram.hooks._reader
    reader.before_core(model.model, (), dict(batch))
    return reader.take()
