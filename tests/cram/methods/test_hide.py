"""HiDe-LLaVA against its golden vectors, and its anchors and fused layers through the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cram import attach
from cram.methods.hide import TEMPERATURE, anchor_gates, fused
from cram.model.attached import AttachedModel
from cram.model.linear import ExpertLinear
from cram.model.state import ForwardState
from cram.routing.means import CentroidMean
from cram.routing.query import Query, Route
from cram_kernels import pack_experts
from tests.cram import factories, runs
from tests.cram.factories import QUESTIONS, image, prompt
from tests.cram.golden_cases import assert_complete, golden_names, load


def close(found: Tensor, wanted: Tensor) -> None:
    """The tolerance of the golden vectors' float32."""
    torch.testing.assert_close(found, wanted.float(), atol=2e-5, rtol=1e-4)


def query(image: Tensor, text: Tensor) -> Query:
    return Query(text, image, torch.ones(len(text), dtype=torch.bool))


def golden_layer(name: str) -> tuple[ExpertLinear, dict[str, Tensor], int]:
    """A linear with the LoRAs of the case's tasks so far, not trained, in evaluation mode."""
    case, tensors = load("hide_layer", name)
    config = case["config"]
    base = nn.Linear(config["in_features"], config["out_features"], bias=False).requires_grad_(False)
    base.weight.copy_(tensors["param.weight"])
    layer = ExpertLinear(base, 0, "linear", ForwardState(), 0.0)
    tasks = config["cur_task"] + 1
    pairs = list(zip(tensors["param.lora_A"][:tasks], tensors["param.lora_B"][:tasks], strict=True))
    layer.set_experts(pairs, config["scaling"], trained=0)
    return layer.eval(), tensors, tasks


def run(layer: ExpertLinear, tensors: dict[str, Tensor], gates: Tensor) -> Tensor:
    """Output, after the backward pass of the case's functional; the gradient of x is checked."""
    layer.current.state = ForwardState(Route(gates[None, None]))
    x = tensors["in.x"].clone().requires_grad_()
    output = layer(x)
    (output * tensors["in.functional"]).sum().backward()
    close(x.grad, tensors["grad.x"])
    return output


def test_golden_training_uses_the_newest_alone() -> None:
    layer, tensors, tasks = golden_layer("train")
    pairs = layer.factors(range(tasks))
    layer.set_experts(pairs, 2.0, trained=1)
    close(run(layer.train(), tensors, torch.eye(tasks)[-1]), tensors["out.y"])
    a, b = layer.trainable()
    close(a.grad, tensors["grad.lora_A"][tasks - 1])
    close(b.grad.T, tensors["grad.lora_B"][tasks - 1])
    assert not tensors["grad.lora_A"][: tasks - 1].any()


def test_golden_fused_layer() -> None:
    layer, tensors, tasks = golden_layer("fused")
    a, b = fused(layer.factors(range(tasks)))
    layer.solo = pack_experts([a], [b], 2.0)
    close(run(layer, tensors, torch.zeros(tasks)), tensors["out.y"])


def test_golden_top_layer() -> None:
    layer, tensors, tasks = golden_layer("last")
    pairs = layer.factors(range(tasks))
    layer.set_experts(pairs, 2.0, trained=tasks)
    close(run(layer, tensors, tensors["in.expert_weight"].float()), tensors["out.y"])
    a, b = layer.trainable()
    close(a.grad.view(tensors["grad.lora_A"].shape), tensors["grad.lora_A"])
    close(b.grad.view(tasks, -1, b.shape[1]).mT, tensors["grad.lora_B"])


@pytest.mark.parametrize("name", golden_names("hide_anchor_routing"))
def test_golden_anchors_and_weights(name: str) -> None:
    case, tensors = load("hide_anchor_routing", name)
    ids = tensors["in.train_task_ids"].tolist()
    width = case["config"]["feature_dim"]
    anchors = {kind: torch.zeros(case["config"]["n_anchors"], width) for kind in ("image", "text")}
    for kind, rows in anchors.items():
        means = [CentroidMean() for _ in range(max(ids) + 1)]
        for step, task in enumerate(ids):
            means[task].update(tensors[f"in.train{step}.{kind}"])
        for task, mean in enumerate(means):
            rows[task] = mean.mean()
        close(rows, tensors[f"out.{kind}_anchors"])
    for index, wanted in enumerate(tensors["out.expert_weight"]):
        asked = query(tensors[f"in.query{index}.image"], tensors[f"in.query{index}.text"])
        gates = anchor_gates(asked, anchors["image"], anchors["text"], batch_maximum=True)
        close(gates, wanted[None])
        single = anchor_gates(asked, anchors["image"], anchors["text"])
        assert single.shape == (len(asked), len(wanted))
        if len(asked) == 1:
            close(single, wanted[None])


def test_all_golden_cases_are_used() -> None:
    assert_complete("hide_layer", {"train", "fused", "last"})
    assert_complete("hide_anchor_routing", {"a"})


def test_a_sample_is_weighed_by_its_own_query() -> None:
    images, texts = torch.randn(3, 8), torch.randn(3, 6)
    asked = query(torch.randn(5, 8), torch.randn(5, 6))
    together = anchor_gates(asked, images, texts)
    for row in range(5):
        alone = query(asked.image[row : row + 1], asked.text[row : row + 1])
        torch.testing.assert_close(anchor_gates(alone, images, texts)[0], together[row])


def test_an_absent_image_has_cosine_zero() -> None:
    images, texts = torch.randn(3, 8), torch.randn(3, 6)
    asked = Query(torch.randn(1, 6), torch.randn(1, 8), torch.tensor([False]))
    wanted = torch.softmax(torch.cosine_similarity(asked.text, texts) / 2 / TEMPERATURE, 0)
    torch.testing.assert_close(anchor_gates(asked, images, texts)[0], wanted)


def learnt(tasks: int, **changes: Any) -> tuple[Any, Any, AttachedModel]:
    """A LLaVA after tasks whose LoRAs and anchors are random."""
    clip = factories.clip_model()
    model, processor = factories.llava(clip=clip), factories.llava_processor()
    config = runs.config(method="hide", dropout=0.0, **changes)
    cram = attach(model, config, factories.clip_encoder(model, clip), processor)
    for task in range(tasks):
        cram.method.begin_task(f"task{task}", 5)
        with torch.no_grad():
            for parameter in cram.trainable_parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        cram.method.observe(cram.encode(QUESTIONS[:2], [[image(task)], []]))
        cram.method.end_task()
    return model.eval(), processor, cram


@torch.no_grad()
def test_layers_below_the_top_are_fused_and_the_top_is_weighed() -> None:
    model, processor, cram = learnt(3)
    batch = processor(text=[prompt(QUESTIONS[1])], images=[image(9)], return_tensors="pt")
    found = model(**batch).logits
    current = cram.state.route
    assert current is not None
    asked = cram.encode([QUESTIONS[1]], [[image(9)]])
    weights = anchor_gates(asked, *cram.method.export_state().tensors.values())[0]
    torch.testing.assert_close(current.gates, weights.expand(factories.LAYERS, 1, 3))
    assert weights.max() - weights.min() > 1e-3
    for module in cram.modules.values():
        pairs = module.factors(range(3))
        if module.layer == factories.LAYERS - 1:
            assert module.solo is None
            update = sum(weight * b @ a for weight, (a, b) in zip(weights, pairs, strict=True))
        else:
            update = sum(b for _, b in pairs) @ sum(a for a, _ in pairs)
        module.base.weight += 2.0 * update
    with cram.disabled():
        torch.testing.assert_close(found, model(**batch).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_products_add_up_below_the_top_and_the_top_takes_one_task() -> None:
    model, processor, cram = learnt(3, fuse_products=True)
    batch = processor(text=[prompt(QUESTIONS[1])], images=[image(9)], return_tensors="pt")
    found = model(**batch).logits
    asked = cram.encode([QUESTIONS[1]], [[image(9)]])
    best = anchor_gates(asked, *cram.method.export_state().tensors.values())[0].argmax()
    for module in cram.modules.values():
        assert module.solo is None
        products = [b @ a for a, b in module.factors(range(3))]
        module.base.weight += 2.0 * (
            products[best] if module.layer == factories.LAYERS - 1 else sum(products)
        )
    with cram.disabled():
        torch.testing.assert_close(found, model(**batch).logits, atol=1e-4, rtol=1e-4)


def test_anchors_are_means_by_sample_and_a_new_task_starts_its_own() -> None:
    _, _, cram = learnt(1)
    before = {name: rows.clone() for name, rows in cram.method.export_state().tensors.items()}
    cram.method.begin_task("new", 5)
    queries = [cram.encode([QUESTIONS[i]] * n, [[image(i)]] * n) for i, n in ((0, 3), (1, 1))]
    for each in queries:
        cram.method.observe(each)
    cram.method.observe(cram.encode([QUESTIONS[2]], [[]]))
    state = cram.method.export_state().tensors
    images = torch.cat([each.image for each in queries])
    texts = torch.cat([each.text for each in queries] + [cram.encoder.encode_text([QUESTIONS[2]])])
    torch.testing.assert_close(state["image_anchors"][1], images.mean(0))
    torch.testing.assert_close(state["text_anchors"][1], texts.mean(0))
    assert all(torch.equal(rows[:1], before[name]) for name, rows in state.items())


def test_in_training_the_newest_acts_alone() -> None:
    _, _, cram = learnt(3)
    asked = cram.encode([QUESTIONS[0]], [[image(1)]])
    gates = cram.method.route(asked, True).gates
    assert torch.equal(gates, torch.tensor([0.0, 0.0, 1.0]).expand(factories.LAYERS, 1, 3))


def test_released_code_takes_the_largest_cosine_of_the_batch() -> None:
    image_rows, text_rows = torch.randn(3, 8), torch.randn(3, 6)
    asked = query(torch.randn(4, 8), torch.randn(4, 6))
    gates = anchor_gates(asked, image_rows, text_rows, batch_maximum=True)
    cosines = [
        torch.stack([torch.cosine_similarity(row[None], rows) for row in features]).amax(0)
        for features, rows in ((asked.image, image_rows), (asked.text, text_rows))
    ]
    torch.testing.assert_close(gates[0], torch.softmax(sum(cosines) / 2 / TEMPERATURE, 0))


def test_a_wrong_state_changes_nothing() -> None:
    _, _, cram = learnt(2)
    state = {name: rows.clone() for name, rows in cram.method.export_state().tensors.items()}
    with pytest.raises(ValueError, match=r"image_anchors must have shape \[2, 16\], got \[1, 16\]"):
        cram.method.import_state({**state, "image_anchors": state["image_anchors"][:1]}, {})
    assert all(torch.equal(rows, state[name]) for name, rows in cram.method.export_state().tensors.items())
