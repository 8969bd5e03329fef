"""The engine: answers in a batch equal the offline answers of each request alone, token by token."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import cram.model.linear
from cram.attach import attach
from cram.config import CramConfig
from cram.serve.engine.engine import Engine
from cram.serve.engine.limits import Limits
from cram.serve.request import Prompt, QueueFullError, Request, RequestError, Sampling
from tests.cram.factories import (
    MODELS,
    QUESTIONS,
    clip_encoder,
    expert_weights,
    inputs,
    routed_llava,
    tokenizer,
)
from tests.cram.serve.serving import ask, llava_prompt, offline, run

LONG = "Say it at length, with all that can be seen, and in the order in which it is seen. " * 2


def prompts(processor: Any) -> list[Prompt]:
    """Prompts of both groups, of several lengths and numbers of images."""
    return [
        llava_prompt(processor, QUESTIONS[0], 0),
        llava_prompt(processor, QUESTIONS[1], 1, 3),
        llava_prompt(processor, QUESTIONS[2]),
        llava_prompt(processor, LONG, 4),
        llava_prompt(processor, QUESTIONS[0], 5),
        llava_prompt(processor, QUESTIONS[1], 6),
    ]


def test_requests_that_join_and_leave_get_their_offline_answers() -> None:
    model, processor, cram = routed_llava()
    asked = prompts(processor)
    lengths = [3, 40, 9, 21, 70, 14]
    expected = [offline(model, each, length) for each, length in zip(asked, lengths, strict=True)]
    engine = Engine(model, processor, Limits(rows=4))
    pairs = [ask(each, max_tokens=length) for each, length in zip(asked, lengths, strict=True)]
    for request, _ in pairs[:2]:
        engine.submit(request)
    for _ in range(5):
        engine.turn()
    assert engine.load[1] == 1  # the first, of 3 tokens, has left
    for request, _ in pairs[2:]:
        engine.submit(request)
    run(engine, *(heard for _, heard in pairs))
    assert [heard.choices[0].token_ids for _, heard in pairs] == expected
    groups = [heard.started.decision.group for _, heard in pairs if heard.started]
    assert set(groups) == {0, 1}
    assert engine.load == (0, 0)


def test_steps_of_unchanged_rows_repeat_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are bound anew when rows join or leave, and give what calls made anew give."""
    model, processor, _ = routed_llava()
    asked, lengths = prompts(processor), [3, 40, 9]
    with monkeypatch.context() as patch:
        patch.setattr(cram.model.linear, "bound", lambda *_: None)
        expected = [offline(model, each, length) for each, length in zip(asked, lengths, strict=False)]
    binds: list[int] = []
    bind = cram.model.linear.bound

    def counted(members: Any, x: Tensor, gates: Tensor) -> Any:
        binds.append(len(x))
        return bind(members, x, gates)

    monkeypatch.setattr(cram.model.linear, "bound", counted)
    engine = Engine(model, processor, Limits(rows=4))
    pairs = [ask(each, max_tokens=length) for each, length in zip(asked, lengths, strict=False)]
    for request, _ in pairs:
        engine.submit(request)
    run(engine, *(heard for _, heard in pairs))
    assert [heard.choices[0].token_ids for _, heard in pairs] == expected
    assert set(binds) == {1, 2, 3} and len(binds) < sum(lengths)


def test_the_checkpoints_own_generation_settings_decide_nothing() -> None:
    model, processor, _ = routed_llava()
    asked = llava_prompt(processor, QUESTIONS[0], 0)
    expected = offline(model, asked, 12)
    for name, value in {"repetition_penalty": 8.0, "do_sample": True, "min_new_tokens": 12}.items():
        setattr(model.generation_config, name, value)
    engine = Engine(model, processor)
    request, heard = ask(asked, max_tokens=12)
    engine.submit(request)
    run(engine, heard)
    assert heard.choices[0].token_ids == expected


def test_the_answer_depends_on_its_own_gates() -> None:
    model, processor, cram = routed_llava()
    engine = Engine(model, processor)
    asked = llava_prompt(processor, QUESTIONS[0], 0)
    mixtures: list[dict[str, float] | None] = [
        None,
        {},
        {"old": 1.0},
        {"other": 1.0},
        {"old": 0.5, "new": -2.0},
    ]
    pairs = [ask(asked, mixture, max_tokens=12) for mixture in mixtures]
    for request, _ in pairs:
        engine.submit(request)
    run(engine, *(heard for _, heard in pairs))
    got = [heard.choices[0].token_ids for _, heard in pairs]
    contexts = [
        None,
        cram.disabled(),
        cram.forced("old"),
        cram.forced("other"),
        cram.fixed(torch.tensor([0.5, 0.0, -2.0])),
    ]
    assert got == [offline(model, asked, 12, context) for context in contexts]
    assert len({tuple(ids) for ids in got}) == len(got)
    modes = [heard.started.decision.mode for _, heard in pairs if heard.started]
    assert modes == ["automatic", "base", "mixture", "mixture", "mixture"]
    decision = [heard.started.decision for _, heard in pairs if heard.started][4]
    assert decision.gates == {"old": [0.5, 0.5], "new": [-2.0, -2.0]}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_family_answers_as_offline(name: str) -> None:
    model = MODELS[name]()
    cram = attach(model, CramConfig(dropout=0.0), clip_encoder())
    for index, expert in enumerate(("one", "two")):
        cram.method.add_expert(expert, expert_weights(cram, index), 0, torch.ones(16) * index, trained=False)
    engine = Engine(model, tokenizer())
    asked = [
        Prompt(lambda texts=texts, images=images: inputs(name, texts, images))  # type: ignore[misc]
        for texts, images in ((6, 1), (19, 2), (11, 0))
    ]
    mixtures = [{"one": 1.0}, {"one": 0.3, "two": 0.7}, {"two": 1.0}]
    expected = [
        offline(model, each, 10, cram.fixed(torch.tensor([m.get("one", 0.0), m.get("two", 0.0)])))
        for each, m in zip(asked, mixtures, strict=True)
    ]
    pairs = [ask(each, mixture, max_tokens=10) for each, mixture in zip(asked, mixtures, strict=True)]
    for request, _ in pairs:
        engine.submit(request)
    run(engine, *(heard for _, heard in pairs))
    assert [heard.choices[0].token_ids for _, heard in pairs] == expected


def test_sampling_is_a_function_of_the_seed() -> None:
    model, processor, _ = routed_llava()
    engine = Engine(model, processor)
    asked, other = prompts(processor)[:2]

    def sampled(neighbour: bool, **sampling: Any) -> list[list[int]]:
        request, heard = ask(asked, n=3, temperature=1.0, max_tokens=10, **sampling)
        engine.submit(request)
        if neighbour:
            engine.submit(ask(other)[0])
        run(engine, heard)
        return [choice.token_ids for choice in heard.choices]

    first = sampled(False, seed=5)
    assert sampled(True, seed=5) == first
    assert len({tuple(ids) for ids in first}) == 3
    assert sampled(False, seed=6) != first
    assert sampled(False) != sampled(False)
    greedy, heard = ask(asked, max_tokens=10)
    engine.submit(greedy)
    run(engine, heard)
    for top_p in (0.0, 1e-9):
        assert sampled(False, seed=5, top_p=top_p) == [heard.choices[0].token_ids] * 3


def test_n_answers_of_greedy_decoding_are_equal() -> None:
    model, processor, _ = routed_llava()
    engine = Engine(model, processor)
    asked = prompts(processor)[1]
    request, heard = ask(asked, n=2)
    engine.submit(request)
    run(engine, heard)
    assert [choice.token_ids for choice in heard.choices] == [offline(model, asked, 8)] * 2


def test_log_probabilities_are_those_of_one_forward_over_the_whole_answer() -> None:
    model, processor, _ = routed_llava()
    asked = prompts(processor)[0]
    request, heard = ask(asked, logprobs=3)
    engine = Engine(model, processor)
    engine.submit(request)
    run(engine, heard)
    ids, logprobs = heard.choices[0].token_ids, heard.choices[0].logprobs
    given = dict(asked.encode())
    start = given["input_ids"].shape[1]
    given["input_ids"] = torch.cat([given["input_ids"], torch.tensor([ids])], dim=1)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    with torch.no_grad():
        whole = torch.log_softmax(model(**given).logits[0, start - 1 : -1].float(), dim=-1)
    assert [each.token_id for each in logprobs] == ids
    for each, row, token in zip(logprobs, whole, ids, strict=True):
        assert each.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [index for index, _ in each.top] == row.topk(3).indices.tolist()


def test_a_cancelled_request_leaves_and_the_others_do_not_notice() -> None:
    model, processor, _ = routed_llava()
    engine = Engine(model, processor)
    asked = prompts(processor)
    gone, unheard = ask(asked[0], max_tokens=50)
    stays, heard = ask(asked[1], max_tokens=20)
    never, silent = ask(asked[2], max_tokens=20)
    for request in (gone, stays, never):
        engine.submit(request)
    never.cancel()
    for _ in range(6):
        engine.turn()
    before = len(unheard.choices[0].token_ids)
    gone.cancel()
    run(engine, heard)
    assert before and len(unheard.choices[0].token_ids) == before
    assert silent.started is None
    assert heard.choices[0].token_ids == offline(model, asked[1], 20)
    assert engine.load == (0, 0)


def test_a_queue_has_an_end() -> None:
    model, processor, _ = routed_llava()
    engine = Engine(model, processor, Limits(rows=2, waiting=3))
    asked = prompts(processor)[0]
    for _ in range(3):
        engine.submit(ask(asked)[0])
    with pytest.raises(QueueFullError, match="queue is full"):
        engine.submit(ask(asked)[0])
    with pytest.raises(RequestError, match="n must be at most 2, got 3"):
        engine.submit(ask(asked, n=3)[0])


def test_requests_that_cannot_be_answered_fail_alone() -> None:
    model, processor, _ = routed_llava()
    engine = Engine(model, processor, Limits(context=120))
    asked = prompts(processor)
    broken = Prompt(lambda: processor(text=["<image>"], images=[], return_tensors="pt"), "x")
    cases = [
        (ask(llava_prompt(processor, LONG)), "request", "prompt and answer must fit into 120 tokens"),
        (ask(asked[0], {"nobody": 1.0}), "request", "lora must name experts among"),
        (ask(broken), "server", "could not read this prompt"),
    ]
    good, heard = ask(asked[0])
    for (request, _), _, _ in cases:
        engine.submit(request)
    engine.submit(good)
    run(engine, heard, *(each for (_, each), _, _ in cases))
    for (_, each), fault, message in cases:
        assert each.failed is not None
        assert each.failed.fault == fault and message in each.failed.message
    assert heard.choices[0].token_ids == offline(model, asked[0], 8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"max_tokens": 0},
        {"stop": ("",)},
        {"stop": ("a",) * 5},
        {"logprobs": 21},
        {"seed": 2**63},
    ],
)
def test_sampling_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(wrong))} must be"):
        Sampling(**wrong)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e9])
def test_scales_out_of_range_are_refused(scale: float) -> None:
    with pytest.raises(RequestError, match="scale of 'a' must be finite"):
        Request(Prompt(dict), lambda event: None, mixture={"a": scale})


def test_many_threads_get_their_own_answers() -> None:
    model, processor, _ = routed_llava()
    asked = prompts(processor)
    expected = [offline(model, each, 12) for each in asked]
    engine = Engine(model, processor, Limits(rows=5))
    engine.start()
    pairs = [ask(asked[index % len(asked)], max_tokens=12) for index in range(18)]
    threads = [threading.Thread(target=engine.answer, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert engine.stop(30)
    got = [heard.choices[0].token_ids for _, heard in pairs]
    assert got == [expected[index % len(asked)] for index in range(18)]
    with pytest.raises(QueueFullError, match="takes no more requests"):
        engine.submit(ask(asked[0])[0])


def test_stopping_answers_what_is_there() -> None:
    model, processor, _ = routed_llava()
    engine = Engine(model, processor)
    pairs = [ask(each) for each in prompts(processor)]
    for request, _ in pairs:
        engine.submit(request)
    engine.start()
    assert engine.stop(60)
    assert all(heard.choices[0].finish for _, heard in pairs)


def test_a_dry_run_decides_as_the_answer_does() -> None:
    model, processor, _ = routed_llava()
    engine = Engine(model, processor)
    for asked in prompts(processor)[:3]:
        request, heard = ask(asked, max_tokens=1)
        engine.submit(request)
        future = engine.decide(asked)
        run(engine, heard)
        assert heard.started is not None
        dry, made = future.result(), heard.started.decision
        assert dry.group == made.group and dry.mode == made.mode == "automatic"
        assert dry.gates is not None and made.gates is not None
        for name, gates in dry.gates.items():
            assert gates == pytest.approx(made.gates[name], abs=1e-5)


def test_dry_runs_that_never_end_keep_nobody_waiting() -> None:
    model, processor, _ = routed_llava()
    engine = Engine(model, processor)
    asked = llava_prompt(processor, QUESTIONS[0], 0)
    request, heard = ask(asked)
    engine.submit(request)

    def again(_: object) -> None:
        engine.decide(asked).add_done_callback(again)

    again(None)
    run(engine, heard)
    assert heard.failed is None
