"""What holds for every registered method: bundles, batches, caches, checkpointing, kills, precisions."""

from __future__ import annotations

import copy
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cram import ContinualLearner, attach, detach, load, save
from cram.atomic import read_json
from cram.compare.entries import BUDGETS
from cram.console import ProgressBar
from cram.learning.batches import EncodedSplit
from cram.learning.schedule import task_seed
from cram.learning.training import train_task
from cram.methods import METHODS
from cram.methods.base import Method, check_state
from cram.model.attached import AttachedModel
from cram.model.cache import made_cache
from cram.report.schema import validate_report
from tests.cram import factories, runs
from tests.cram.factories import QUESTIONS, continuing, image, prompt
from tests.cram.kills import Killed, writes
from tests.cram.model.checkpointing import MODES, enable_checkpointing
from tests.cram.runs import files, results

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
SAMPLES: list[tuple[str, list[Any]]] = [
    ("Which colour", [image(0)]),
    ("Choose the letter of the right option: A or B", [image(51), image(2)]),
    (QUESTIONS[2], []),
    ("Which colour?", [image(52)]),
]


@cache
def _learnt(method: str) -> ContinualLearner:
    # Both tasks share a group, so that the gates depend on the pictures.
    made = runs.learner(Path("/nowhere"), method, dropout=0.0, group_merge_similarity=-1.0, sigma=1.0)
    for index in range(2):
        train(made, index)
    return made


def train(made: ContinualLearner, index: int) -> None:
    """Learns a task without writing anything."""
    task = made.stream.tasks[index]
    split = EncodedSplit(made.processor, task.train, made._budget)
    train_task(
        made.model,
        made.method,
        split.example,
        task=task.name,
        num_samples=len(task.train),
        padding=made._padding,
        seed=task_seed(0, index),
        bar=ProgressBar("", 5, shown=False),
    )


def each_kind_of_state() -> Iterator[Any]:
    """All methods; those whose state is of a kind that another has too are slow tests."""
    for method in METHODS:
        quick = method in ("cram", "branchlora", "keeplora", "same")
        yield pytest.param(method, marks=[] if quick else pytest.mark.slow)


@pytest.fixture(params=METHODS)
def learnt(request: pytest.FixtureRequest) -> ContinualLearner:
    """A model that has learnt two tasks by each of the methods; a copy, to do anything with."""
    made = copy.copy(_learnt(request.param))
    made.model = copy.deepcopy(made.model)
    made.cram, made.method = made.model.cram, made.model.cram.method
    assert made.method.cram is made.cram
    return made


def told(cram: AttachedModel) -> AbstractContextManager[Any]:
    """Whatever a method must be told before it answers."""
    return cram.forced("letter") if cram.method.told_task else nullcontext()


def batch_of(processor: Any, samples: list[tuple[str, list[Any]]]) -> Any:
    images = [picture for _, pictures in samples for picture in pictures]
    texts = [prompt(question, len(pictures)) for question, pictures in samples]
    processor.tokenizer.padding_side = "left"
    return processor(text=texts, images=images or None, padding=True, return_tensors="pt")


def answers(model: Any, batch: Any, **settings: Any) -> list[list[int]]:
    made = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, **settings)
    return made[:, batch["input_ids"].shape[1] :].tolist()


def last_logits(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits[:, -1]


def fresh() -> tuple[Any, Any]:
    clip = factories.clip_model()
    model = factories.llava(clip=clip)
    return model, factories.clip_encoder(model, clip)


def test_a_bundle_answers_as_the_model_that_wrote_it(learnt: ContinualLearner, tmp_path: Path) -> None:
    model, cram, batch = learnt.model, learnt.cram, batch_of(learnt.processor, SAMPLES)
    save(model, tmp_path / "b")
    # Texts that the encoder remembers were encoded in other batches and differ in the last bit.
    cram.encoder.to("cpu")
    plain, _ = fresh()
    base = last_logits(plain, batch)
    # The encoder itself: another copy of its weights may round the last bit of a feature otherwise.
    loaded = load(plain, tmp_path / "b", cram.encoder, learnt.processor)
    assert loaded.method.name == cram.method.name and loaded.expert_names == cram.expert_names
    with told(cram), told(loaded):
        expected = last_logits(model, batch)
        assert (expected - base).abs().max() > 1e-3
        assert torch.equal(last_logits(plain, batch), expected)
        for settings in ({}, {"num_beams": 2}):
            assert answers(plain, batch, **settings) == answers(model, batch, **settings)
    save(plain, tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "b")


def test_a_batch_answers_as_its_samples_alone(learnt: ContinualLearner) -> None:
    model, processor = learnt.model, learnt.processor
    with told(learnt.cram):
        together = last_logits(model, batch_of(processor, SAMPLES))
        made = answers(model, batch_of(processor, SAMPLES))
        for index, sample in enumerate(SAMPLES):
            alone = batch_of(processor, [sample])
            logits = last_logits(model, alone)[0]
            torch.testing.assert_close(together[index], logits, atol=1e-5, rtol=1e-4)
            assert answers(model, alone) == made[index : index + 1]


def test_gates_from_pictures_differ_from_sample_to_sample() -> None:
    """Without this the tests of batches and caches say nothing about CRAM's gates."""
    made = _learnt("cram")
    model, batch = copy.deepcopy(made.model), batch_of(made.processor, SAMPLES)
    last_logits(model, batch)
    gates = model.cram.state.route.gates
    seen = gates[:, [0, 1, 3]]
    assert ((seen > 0.02) & (seen < 0.98)).all()
    assert (seen[:, 0] - seen[:, 1]).abs().max() > 0.05
    assert torch.equal(gates[:, 2], torch.tensor([1.0, 0.0]).expand(2, 2))


def test_interleaved_caches_keep_their_own_gates(learnt: ContinualLearner) -> None:
    model, processor = learnt.model, learnt.processor
    steps = {"input_ids": torch.tensor([[40]])}
    batches = [batch_of(processor, [sample]) for sample in SAMPLES[:2]]
    with told(learnt.cram), torch.no_grad():
        expected = []
        for batch in batches:
            past = made_cache(model(**batch, use_cache=True))
            expected.append(last_logits(model, {**steps, **continuing(model, past)}))
        caches = [made_cache(model(**batch, use_cache=True)) for batch in batches]
        for past, logits in zip(caches, expected, strict=True):
            assert torch.equal(last_logits(model, {**steps, **continuing(model, past)}), logits)


def gradients(learnt: ContinualLearner, mode: dict[str, bool] | None) -> dict[str, Tensor]:
    """Of the first batch of a third task, with factors that are not at their start."""
    made = copy.copy(learnt)
    made.model = copy.deepcopy(learnt.model)
    cram: AttachedModel = made.model.cram
    if mode is not None:
        enable_checkpointing(made.model, mode)
    torch.manual_seed(3)
    cram.method.begin_task("mixed", 5)
    # KeepLoRA trains nothing in its first step.
    at_first = cram.method.before_step(0)
    parameters = cram.method.before_step(1) or at_first
    assert parameters is not None
    trained = {id(parameter) for parameter in parameters}
    # A method may train values of its own that no layer reads.
    assert {id(p) for p in made.model.parameters() if p.requires_grad} <= trained
    if cram.method.uses_queries:
        cram.hooks.on_query.append(cram.method.observe)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = learnt.processor(
        text=[prompt(QUESTIONS[0], 1, "yes"), prompt(QUESTIONS[1], 1, "no way")],
        images=[image(0), image(3)],
        padding=True,
        return_tensors="pt",
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    gates = cram.fixed(cram.method.gates("mixed")) if cram.method.told_task else nullcontext()
    made.model.train()
    with gates:
        loss = made.model(**batch, labels=labels, use_cache=False).loss
        extra = cram.method.extra_loss(cram.state)
        (loss if extra is None else loss + extra).backward()
    assert all(parameter.grad is not None for parameter in parameters)
    return {"loss": loss.detach(), **{str(i): p.grad for i, p in enumerate(parameters)}}


def test_checkpointing_changes_no_gradient(learnt: ContinualLearner) -> None:
    plain = gradients(learnt, None)
    assert any(bool(gradient.any()) for name, gradient in plain.items() if name != "loss")
    for mode in MODES:
        torch.testing.assert_close(gradients(learnt, mode), plain, atol=1e-6, rtol=1e-5)


def test_a_task_ends_without_anything_in_training(learnt: ContinualLearner) -> None:
    assert learnt.cram.trainable_parameters() == []
    assert not [p for p in learnt.model.parameters() if p.requires_grad]
    assert learnt.cram.hooks.on_query == [] and not learnt.cram.in_training


def kinds_and_hooks(model: Any) -> dict[str, Any]:
    """Of every module its type, and how many hooks it has."""
    return {
        path: (type(module), len(module._forward_pre_hooks), len(module._forward_hooks))
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("method", METHODS)
def test_detach_restores_the_model_and_a_bundle_without_experts_is_legal(method: str, tmp_path: Path) -> None:
    model, encoder = fresh()
    before = kinds_and_hooks(model)
    cram = attach(model, runs.config(method=method, merge_by_inputs=method == "many"), encoder)
    save(model, tmp_path / "b")
    cram.method.begin_task("colour", 5)
    detach(model)
    assert kinds_and_hooks(model) == before
    assert load(model, tmp_path / "b", encoder).num_experts == 0


@pytest.mark.parametrize("method", list(each_kind_of_state()))
def test_a_kill_while_saving_repeats_nothing_and_ends_the_same(method: str, tmp_path: Path) -> None:
    """The kill hits the second task's bundle; the rerun is the uninterrupted run, and its report is valid."""
    first = runs.learner(tmp_path / "run", method)
    first.learn(0)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    with writes() as counted:
        report = runs.learner(tmp_path / "whole", method).run()
    committed = results(tmp_path / "run")
    inside = [index for index, write in enumerate(counted) if "02-letter/.bundle.partial" in write]
    with writes(inside[len(inside) // 2]), pytest.raises(Killed):
        runs.learner(tmp_path / "run", method).run()
    runs.learner(tmp_path / "run", method).run()
    assert committed.items() <= results(tmp_path / "run").items()
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    parameters = validate_report(report)["methods"][method]["parameters"]
    assert parameters == read_json(tmp_path / "run/report.json")["methods"][method]["parameters"]
    assert parameters["total"] == sum(parameters["per_task"].values()) > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_half_precision_base_trains_float32_values(method: str, tmp_path: Path) -> None:
    clip = factories.clip_model()
    model = factories.llava(clip=clip).to(torch.bfloat16)
    made = ContinualLearner(
        model,
        factories.llava_processor(),
        runs.two_tasks(),
        runs.config(method=method),
        out=tmp_path / "run",
        encoder=factories.clip_encoder(model, clip),
        progress=False,
    )
    train(made, 0)
    model.half().to(torch.bfloat16)
    packs = [module.experts for module in made.cram.modules.values()]
    state = made.method.export_state().tensors.values()
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in state)
    assert all(bool(pack.a.isfinite().all() and pack.bt.isfinite().all()) for pack in packs)


def test_an_exported_state_is_a_copy_that_gives_back_the_answers(learnt: ContinualLearner) -> None:
    """A server goes back to an earlier bundle by the state that it took before the newer one came."""
    model, method, batch = learnt.model, learnt.method, batch_of(learnt.processor, SAMPLES)
    with told(learnt.cram):
        expected = last_logits(model, batch)
        taken = method.export_state()
        kept = {name: tensor.clone() for name, tensor in taken.tensors.items()}
        method.import_state({name: tensor.roll(1, -1) for name, tensor in kept.items()}, taken.values)
        assert all(torch.equal(tensor, kept[name]) for name, tensor in taken.tensors.items())
        if kept and method.expert_groups() == {} and method.name != "keeplora":
            assert not torch.equal(last_logits(model, batch), expected)
        method.import_state(*taken)
        assert torch.equal(last_logits(model, batch), expected)


def test_a_prompt_in_parts_is_answered_as_in_one_or_refused(learnt: ContinualLearner) -> None:
    model, cram = learnt.model, learnt.cram
    for question in ("Which colour is this", "Choose the letter of the right option: A or B"):
        inputs = learnt.processor(text=[f"USER: {question} ASSISTANT:"], return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        with told(cram):
            expected = answers(model, inputs)
            for parts in (2, 7, length // 2 + 1, length - 1):
                try:
                    assert answers(model, inputs, prefill_chunk_size=parts) == expected
                except ValueError as error:
                    assert "prompt must be in one prefill" in str(error)
            assert answers(model, inputs, prompt_lookup_num_tokens=3) == expected


def test_another_question_behind_a_cache_is_refused(learnt: ContinualLearner) -> None:
    """But by methods whose gates do not depend on the question."""
    model, cram = learnt.model, learnt.cram
    first, other = (
        learnt.processor(text=[f"USER: {question} ASSISTANT:"], return_tensors="pt")["input_ids"]
        for question in ("Which colour", "Choose the letter of the right option: A or B")
    )
    with told(cram), torch.no_grad():
        cache = made_cache(model(input_ids=first, use_cache=True))
        gating = next(iter(cram.modules.values())).gating
        routed = cram.method.uses_queries or (gating is not None and gating.reads_prompts)
        refused = pytest.raises(ValueError, match="prompt must be in one prefill")
        with refused if routed and cram.method.name != "cram" else nullcontext():
            model(input_ids=other, **continuing(model, cache))


def test_threads_do_not_meet(learnt: ContinualLearner) -> None:
    model = learnt.model
    batches = [batch_of(learnt.processor, [sample]) for sample in (SAMPLES[0], SAMPLES[3])]

    def answer(batch: Any) -> Tensor:
        with told(learnt.cram):
            return last_logits(model, batch)

    alone = [answer(batch) for batch in batches]
    barrier = threading.Barrier(2, timeout=60)

    def wait(*_: Any) -> None:
        barrier.wait()

    linears = [
        model.model.multi_modal_projector.linear_1,
        model.model.language_model.layers[0].self_attn.q_proj,
    ]
    for linear in linears:
        linear.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(answer, batches))
    assert all(torch.equal(*each) for each in zip(found, alone, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_autocast_leaves_routing_and_what_is_gathered_in_their_precision(method: str, tmp_path: Path) -> None:
    made = [runs.learner(tmp_path, method, dropout=0.0, merge_by_inputs=method == "many") for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        train(made[0], 0)
    train(made[1], 0)
    states = [each.method.export_state().tensors for each in made]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        # Directions of nearly equal strength turn when their inputs are rounded.
        if method == "keeplora" or name.endswith("basis"):
            continue
        close = torch.cosine_similarity(tensor.flatten(), states[1][name].flatten(), dim=0)
        assert tensor.dtype == torch.float32 and bool(tensor.isfinite().all())
        assert close > 0.9 or not tensor.any(), name


def test_a_state_must_have_the_names_and_shapes_of_the_method() -> None:
    check_state({"a": torch.zeros(2)}, {"a": (2,)})
    with pytest.raises(ValueError, match=r"missing \['a'\], unexpected \['b'\]"):
        check_state({"b": torch.zeros(2)}, {"a": (2,)})
    with pytest.raises(ValueError, match=r"state a must have shape \[2\], got \[3\]"):
        check_state({"a": torch.zeros(3)}, {"a": (2,)})


def test_an_unknown_method_is_refused_and_the_model_stays_plain() -> None:
    model, encoder = fresh()
    with pytest.raises(ValueError, match="method must be one of"):
        attach(model, runs.config(method="magic"), encoder)
    assert not hasattr(model, "cram")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_is_one_small_file_that_says_what_it_is(method: type[Method]) -> None:
    module = sys.modules[method.__module__]
    assert module.__file__ is not None
    assert method.__module__ in (f"cram.methods.{method.name}", f"cram.methods.baselines.{method.name}")
    assert Path(module.__file__).read_text().count("\n") <= 150
    assert module.__doc__ and method.budget in BUDGETS


def test_contributors_are_shown_a_method_as_it_is() -> None:
    text = (Path(__file__).resolve().parents[3] / "CONTRIBUTING.md").read_text()
    shown = text.split("```python\n")[1].split("```")[0]
    assert shown == Path(sys.modules[METHODS["sequential"].__module__].__file__ or "").read_text()
