"""`torch.compile`: a whole model, and decode steps behind a static cache as one graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from cram.attach import attach
from cram.config import CramConfig
from cram.model.state import ForwardState
from cram.routing.query import Route
from tests.cram import factories
from tests.cram.factories import QUESTIONS, image, prompt, routed_llava

pytestmark = [
    # torch says these of itself when it compiles.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
]

GRAPHS: list[Any] = []  # one entry per compiled graph; `generate` copies its backend


def counting(module: Any, inputs: Any) -> Callable[..., Any]:
    """A backend that counts the graphs and runs them as they are."""
    GRAPHS.append(module)
    return module.forward


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No graphs of other tests."""
    torch.compiler.reset()
    GRAPHS.clear()
    yield
    torch.compiler.reset()


def answers(model: Any, batch: Any, backend: Any = None) -> list[list[int]]:
    settings: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    if backend is not None:
        compiled = CompileConfig(backend=backend, fullgraph=True, mode=None)
        compiled._compile_all_devices = True  # type: ignore[attr-defined]
        settings |= {"cache_implementation": "static", "compile_config": compiled}
    made = model.generate(**batch, **settings)
    return made[:, batch["input_ids"].shape[1] :].tolist()


def batch_of(processor: Any, question: int, picture: int) -> Any:
    return processor(text=[prompt(QUESTIONS[question])], images=[image(picture)], return_tensors="pt")


def test_decoding_behind_a_static_cache_is_one_graph_for_all_routes() -> None:
    model, processor, cram = routed_llava()
    batches = [batch_of(processor, 0, picture) for picture in (0, 1)]
    expected = [answers(model, batch) for batch in batches]
    gates = []
    for batch, tokens in zip(batches, expected, strict=True):
        assert answers(model, batch, counting) == tokens
        gates.append(cram.state.route.gates)
    assert len(GRAPHS) == 1
    assert not torch.equal(gates[0], gates[1]) and expected[0] != expected[1]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_decoding_with_a_fixed_route_is_one_graph_in_every_family(name: str) -> None:
    model = factories.MODELS[name]()
    cram = attach(model, CramConfig(dropout=0.0), factories.clip_encoder())
    cram.add_expert("one", factories.expert_weights(cram, 0), trained=False)
    batch = factories.inputs(name, images=0)
    with cram.forced("one"):
        expected = answers(model, batch)
        assert answers(model, batch, counting) == expected
        assert answers(model, factories.inputs(name, images=0), counting) == expected
    assert len(GRAPHS) == 1


def test_a_copied_cache_does_not_keep_its_route_in_a_traced_step() -> None:
    model, processor, _ = routed_llava()
    made = model.generate(
        **batch_of(processor, 0, 0), max_new_tokens=2, do_sample=False, return_dict_in_generate=True
    )
    cache = made.past_key_values
    assert cache.cram_kept.state is not None
    assert copy.deepcopy(cache).cram_kept.state is None


@pytest.mark.slow
@pytest.mark.parametrize("route", ["automatic", "forced"])
def test_a_compiled_model_gives_the_same_logits(route: str) -> None:
    model, processor, cram = routed_llava()
    compiled = torch.compile(model, backend="eager")
    for picture in (0, 1):
        batch = batch_of(processor, 0, picture)
        with cram.forced("other") if route == "forced" else nullcontext(), torch.no_grad():
            assert torch.equal(compiled(**batch).logits, model(**batch).logits)


@pytest.mark.slow
def test_inductor_compiles_forward_and_decoding() -> None:
    model, processor, _ = routed_llava()
    batch = batch_of(processor, 0, 0)
    expected, tokens = model(**batch).logits, answers(model, batch)
    found = torch.compile(model)(**batch).logits
    # Inductor adds in another order: 1e-4 of logits up to about 10.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert answers(model, batch, "inductor") == tokens


@pytest.mark.filterwarnings("ignore")  # Dynamo's own, which would end the compilation
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_linear_is_one_graph_in_both_stages_of_training(dropout: float) -> None:
    model, encoder = factories.fresh()
    cram = attach(model, CramConfig(dropout=dropout), encoder, factories.llava_processor())
    cram.method.begin_task("task", 40)
    model.train()
    query = cram.encode([QUESTIONS[0]], [[image(0)]])
    linear = next(iter(cram.modules.values()))
    x = torch.randn(1, 3, linear.in_features)
    for step in (0, 2):  # the buffer, the expert
        cram.method.before_step(step)
        cram.method.observe(query)
        linear.current.state = ForwardState(Route(torch.ones(cram.num_layers, 1, cram.num_experts)))
        torch.manual_seed(step)
        wanted = linear(x)
        compiled = torch.compile(linear, backend=counting, fullgraph=True)
        for _ in range(2):
            torch.manual_seed(step)
            torch.testing.assert_close(compiled(x), wanted)
    assert len(GRAPHS) == 2


@pytest.mark.filterwarnings("ignore")  # Dynamo's own, which would end the compilation
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_adds_no_graph_to_a_training_step(checkpointing: bool) -> None:
    """Eager and compiled steps draw the same masks, also where checkpointing runs a layer again."""
    counts, gradients = [], []
    for dropout, backend in ((0.0, counting), (0.3, counting), (0.3, None), (0.3, "aot_eager")):
        torch.compiler.reset()
        GRAPHS.clear()
        model, processor, cram = routed_llava(trained=True, dropout=dropout)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        step = model if backend is None else torch.compile(model, backend=backend)
        torch.manual_seed(7)
        step(**batch_of(processor, 0, 0)).logits.square().sum().backward()
        counts.append(len(GRAPHS))
        gradients.append(next(iter(cram.modules.values())).experts.trained_b.grad)
    assert counts[0] == counts[1]
    assert not torch.equal(gradients[0], gradients[1])
    for found in gradients[1], gradients[3]:
        torch.testing.assert_close(found, gradients[2])
