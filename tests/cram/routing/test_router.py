"""Centroid routing: golden gates, mixed groups, samples without images, growth, released code, statistics."""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cram.config import CramConfig
from cram.methods.parts.warm_up import warmup_steps
from cram.routing.means import CentroidMean
from cram.routing.query import Query, Route
from cram.routing.router import Router
from cram_kernels import centroid_gates
from tests.cram.golden_cases import assert_complete, golden_names, load

TEXT, IMAGE, LAYERS = 16, 12, 3
GATES_LEFT_OUT = {
    "topk2": "top-k routing: the released configuration never turns it on and the method has none",
    "with_buffer": "the buffer takes part in routing only without warm-up, which CramConfig refuses",
}
GATES = (
    "single_expert mid_softmax uncommitted_excluded empty_pool clip768 clip768_saturated all_trainable "
    "exact_hit_large_norm"
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def query_of(image: Tensor, has_image: Tensor | None = None, text: Tensor | None = None) -> Query:
    samples = len(image)
    mask = torch.ones(samples, dtype=torch.bool) if has_image is None else has_image
    return Query(torch.zeros(samples, TEXT) if text is None else text, image, mask)


def make_router(groups: list[int], trained: bool = False, seed: int = 0, **changes: Any) -> Router:
    """A router with two distinct instruction groups and one expert per entry of ``groups``."""
    router = Router(CramConfig.from_dict(changes), LAYERS)
    router.groups.observe("even", prompts(0)[None])
    router.groups.observe("odd", prompts(1)[None])
    rng = seeded(seed)
    for index, group in enumerate(groups):
        last = trained and index == len(groups) - 1
        router.add_expert(f"e{index}", group, torch.randn(LAYERS, IMAGE, generator=rng), trained=last)
    return router


def prompts(group: int) -> Tensor:
    """A text feature [TEXT] of one of the two groups."""
    return torch.cos(torch.arange(TEXT) * torch.pi * (group + 1) / TEXT * 2)


def mixed_query(samples: int = 6, seed: int = 1) -> Query:
    """Alternating groups; every third sample has no image and NaN in its place."""
    rng = seeded(seed)
    text = torch.stack([prompts(s % 2) for s in range(samples)])
    image = torch.randn(samples, IMAGE, generator=rng)
    has_image = torch.arange(samples) % 3 != 2
    return Query(text, image.masked_fill(~has_image[:, None], float("nan")), has_image)


def golden_router(name: str, released: bool) -> tuple[Router, dict[str, Tensor], list[int], dict[str, Any]]:
    """The router of a golden case, the slot of each of its experts, and the case's configuration."""
    case, data = load("cram_gates", name)
    config = case["config"]
    entries = [(e["task"], e["slot"], g) for g, members in enumerate(config["groups"]) for e in members]
    entries = sorted(e for e in entries if e[2] != config["group"] or e[1] in config["pool_slots"])
    router = Router(CramConfig(sigma=config["sigma"], released_code=released), config["n_layers"])
    for task, slot, group in entries:
        last = (task, slot, group) == entries[-1]
        router.add_expert(str(task), group, data["param.centroids"][:, slot], trained=last)
    return router, data, [slot for _, slot, _ in entries], case


def test_golden_gates_table_is_complete() -> None:
    assert_complete("cram_gates", GATES.split(), GATES_LEFT_OUT)


@pytest.mark.parametrize("released", [False, True], ids=["per_sample", "batch_mean"])
@pytest.mark.parametrize("name", golden_names("cram_gates", [*GATES_LEFT_OUT, "empty_pool"]))
def test_golden_gates(name: str, released: bool) -> None:
    router, data, slots, case = golden_router(name, released)
    kind = "mean" if released else "batch"
    gates = router.route(query_of(data["in.q"]), group=case["config"]["group"]).gates
    wanted, functional = data[f"out.pi_{kind}"], data[f"in.functional_{kind}"]
    if released:
        wanted, functional = wanted[:, None].expand(-1, gates.shape[1], -1), functional[:, None]
    tolerance = case["suggested_tolerance"]["pi_abs"]
    torch.testing.assert_close(gates, wanted[:, :, slots], atol=tolerance, rtol=1e-4)
    (functional[:, :, slots] * (gates[:, :1] if released else gates)).sum().backward()
    assert router.trained_centroid is not None and router.trained_centroid.grad is not None
    gradient = data[f"grad.centroids_from_pi_{kind}"][:, slots[-1]]
    scale = float(gradient.abs().max())
    torch.testing.assert_close(
        router.trained_centroid.grad, gradient, atol=2e-5 + 50 * tolerance * scale, rtol=1e-3
    )
    assert not router.frozen_centroids.requires_grad


def test_golden_group_without_experts_means_the_base_model() -> None:
    """The released batch mean falls back to the task's own slot; an expert here always has its centroid."""
    router, data, slots, case = golden_router("empty_pool", released=False)
    assert slots == []
    assert not data["out.pi_batch"].any()
    gates = router.route(query_of(data["in.q"]), group=case["config"]["group"]).gates
    assert gates.shape == (2, 2, 0)


def dense_gates(router: Router, query: Query) -> Tensor:
    """The formula, one sample and layer at a time, in float64."""
    groups = router.groups.assign(query.text)
    gates = torch.zeros(router.num_layers, len(query), router.num_experts, dtype=torch.float64)
    for sample, group in enumerate(groups.tolist()):
        members = router.experts_of(group)
        if not members:
            continue
        if not query.has_image[sample]:
            gates[:, sample, members[0]] = 1.0
            continue
        rows = router.centroids()[:, members].double()
        distance = (query.image[sample].double() - rows).square().sum(-1)
        gates[:, sample, members] = (-distance / (2 * router.config.sigma**2)).softmax(-1)
    return gates


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=6), st.integers(1, 7), st.booleans(), st.integers(0, 99))
def test_gates_follow_the_formula(groups: list[int], samples: int, trained: bool, seed: int) -> None:
    router = make_router(groups, trained=trained, seed=seed)
    query = mixed_query(samples, seed)
    route = router.route(query)
    torch.testing.assert_close(route.gates.double(), dense_gates(router, query), atol=1e-5, rtol=1e-4)
    assert route.gates.dtype == torch.float32 and route.query is query
    members = torch.tensor(groups)[None] == route.groups[:, None]
    assert not route.gates.masked_select(~members).any()


def test_a_batch_equals_its_samples_one_by_one() -> None:
    router, query = make_router([0, 1, 0, 1, 1]), mixed_query(9)
    whole = router.route(query)
    for s in range(9):
        alone = router.route(Query(query.text[s : s + 1], query.image[s : s + 1], query.has_image[s : s + 1]))
        assert alone.groups.tolist() == whole.groups[s : s + 1].tolist()
        torch.testing.assert_close(alone.gates, whole.gates[:, s : s + 1], atol=1e-6, rtol=1e-5)


def test_released_code_averages_over_the_batch() -> None:
    router, query = make_router([0, 0, 1], released_code=True), mixed_query(4)
    route = router.route(query)
    mean = Query(query.text.mean(0)[None], query.image[query.has_image].mean(0)[None], torch.tensor([True]))
    alone = make_router([0, 0, 1]).route(mean)
    torch.testing.assert_close(route.gates, alone.gates.expand(-1, 4, -1))
    assert route.groups.tolist() == alone.groups.tolist() * 4
    assert route.query is query


def test_no_image_gives_the_first_expert_weight_one_without_gradient() -> None:
    router = make_router([1, 0, 0], trained=True)
    query = query_of(torch.zeros(2, IMAGE), torch.tensor([False, True]))
    gates = router.route(query, group=0).gates
    assert gates[:, 0].tolist() == [[0.0, 1.0, 0.0]] * LAYERS
    gates[:, 0].sum().backward()
    assert router.trained_centroid is not None and router.trained_centroid.grad is not None
    assert not router.trained_centroid.grad.any()


def test_locked_group_overrides_the_text() -> None:
    router, query = make_router([0, 1]), mixed_query(4)
    assert router.route(query).groups.tolist() == [0, 1, 0, 1]
    assert router.route(query, group=1).groups.tolist() == [1] * 4


def test_one_kernel_call_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any, **options: Any) -> Tensor:
        calls.append(arguments)
        return centroid_gates(*arguments, **options)

    monkeypatch.setattr("cram.routing.router.centroid_gates", counted)
    make_router([0, 1, 0], trained=True).route(mixed_query(6))
    assert len(calls) == 1 and calls[0][1].shape == (LAYERS, 3, IMAGE)


def test_router_without_experts_routes_to_nothing() -> None:
    route = Router(CramConfig(), LAYERS).route(mixed_query(2))
    assert route.gates.shape == (LAYERS, 2, 0) and route.groups.tolist() == [0, 0]


def test_experts_without_groups_are_an_error() -> None:
    router = Router(CramConfig(), LAYERS)
    router.add_expert("a", 0, torch.zeros(IMAGE), trained=False)
    with pytest.raises(ValueError, match="got no groups"):
        router.route(mixed_query(2))


def test_only_the_trained_centroid_gets_a_gradient() -> None:
    router = make_router([0, 0, 1, 0], trained=True)
    assert [name for name, _ in router.named_parameters()] == ["trained_centroid"]
    query = query_of(torch.randn(2, IMAGE, generator=seeded(3)).requires_grad_())
    assert not query.image.requires_grad
    gates = router.route(query, group=0).gates
    gates[:, :, 0].sum().backward()
    assert router.trained_centroid is not None and router.trained_centroid.grad is not None
    assert (router.trained_centroid.grad.abs().amax(-1) > 0).all()


def gated_layer(gates: Tensor, layer: int, x: Tensor) -> Tensor:
    return torch.sin(x * gates[layer])


@pytest.mark.parametrize("reentrant", [True, False])
def test_one_route_serves_checkpointed_layers(reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        router = make_router([0, 0], trained=True)
        gates = router.route(mixed_query(4), group=0).gates
        x = torch.ones(4, 2, requires_grad=True)
        for layer in range(LAYERS):
            block = partial(gated_layer, gates, layer)
            x = checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)
        x.square().sum().backward()
        assert router.trained_centroid is not None and router.trained_centroid.grad is not None
        gradients.append(router.trained_centroid.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("released", [False, True])
def test_gamma_is_the_mass_of_older_experts_per_sample(released: bool) -> None:
    router = make_router([0, 1, 0, 0], trained=True, released_code=released)
    query = query_of(torch.randn(3, IMAGE, generator=seeded(7)))
    route = router.route(query, group=0)
    gamma = router.gamma(route)
    per_sample = make_router([0, 1, 0, 0], trained=True).route(query, group=0).gates
    torch.testing.assert_close(gamma, 1 - per_sample[:, :, -1])
    assert (gamma[:, :1] != gamma).any()
    assert released == bool((route.gates[:, :1] == route.gates).all())
    gamma.sum().backward()
    assert router.trained_centroid is not None and router.trained_centroid.grad is not None
    assert router.trained_centroid.grad.abs().max() > 0


def test_gamma_of_a_groups_first_expert_is_zero() -> None:
    router = make_router([0, 1], trained=True)
    assert not router.gamma(router.route(query_of(torch.zeros(2, IMAGE)), group=1)).any()


def test_gamma_needs_a_route_and_a_trained_expert() -> None:
    trained, frozen = make_router([0], trained=True), make_router([0])
    with pytest.raises(ValueError, match="gamma must be of a query's route"):
        trained.gamma(Route(torch.ones(LAYERS, 2, 1)))
    with pytest.raises(ValueError, match="gamma must be of a query's route"):
        frozen.gamma(frozen.route(mixed_query(2)))
    with pytest.raises(ValueError, match="gates must be of 1 experts, got 2"):
        trained.gamma(make_router([0, 0]).route(mixed_query(2)))


def test_freezing_keeps_the_gates_and_frees_the_slot() -> None:
    router, query = make_router([0, 0], trained=True), mixed_query(4)
    before = router.route(query).gates.detach()
    assert router.trained_centroid is not None
    with torch.no_grad():
        router.trained_centroid += 0.5
    moved = router.route(query).gates.detach()
    assert (moved != before).any()
    router.freeze()
    torch.testing.assert_close(router.route(query).gates, moved, atol=0, rtol=0)
    assert not router.route(query).gates.requires_grad
    with pytest.raises(ValueError, match="freeze must follow"):
        router.freeze()
    router.add_expert("next", 1, torch.zeros(IMAGE))
    assert router.experts_of(0) == [0, 1] and router.experts_of(1) == [2] and router.num_experts == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("e0", 0, torch.zeros(IMAGE)), r"expert name must be new, got 'e0' among \['e0'\]"),
        (("x", -1, torch.zeros(IMAGE)), "group must be at least 0, got -1"),
        (("x", 0, torch.zeros(IMAGE + 1)), r"centroid must be \[12\] or \[3, 12\], got \[13\]"),
        (("x", 0, torch.zeros(LAYERS + 1, IMAGE)), r"got \[4, 12\]"),
        (("x", 0, torch.full((IMAGE,), float("inf"))), "centroid must be finite"),
    ],
)
def test_wrong_experts_are_refused(arguments: tuple[str, int, Tensor], message: str) -> None:
    router = make_router([0])
    with pytest.raises(ValueError, match=message):
        router.add_expert(*arguments)
    assert router.num_experts == 1 and router.trained_centroid is None


def test_two_trained_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="'e0' must be frozen before adding one, got 'x'"):
        make_router([0], trained=True).add_expert("x", 0, torch.zeros(IMAGE))


def test_non_finite_or_misfit_images_are_refused() -> None:
    router = make_router([0])
    with pytest.raises(ValueError, match="image features must be finite"):
        router.route(query_of(torch.full((1, IMAGE), float("nan"))), group=0)
    with pytest.raises(ValueError, match="image must have D_q=12 columns, got 5"):
        router.route(query_of(torch.zeros(1, 5)), group=0)


@pytest.mark.parametrize(
    ("text", "image", "has_image", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(1, 3), torch.ones(2, dtype=torch.bool), "text and image must be"),
        (torch.zeros(0, 3), torch.zeros(0, 3), torch.ones(0, dtype=torch.bool), "text and image must be"),
        (torch.zeros(3), torch.zeros(1, 3), torch.ones(1, dtype=torch.bool), "text and image must be"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2), r"has_image must be bool \[2\], got torch.f"),
    ],
)
def test_wrong_queries_are_refused(text: Tensor, image: Tensor, has_image: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Query(text, image, has_image)


def test_copies_keep_float32() -> None:
    router = make_router([0, 0], trained=True)
    twin = copy.deepcopy(router).to(torch.bfloat16)
    assert {t.dtype for t in twin.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert torch.equal(twin.route(mixed_query(4)).gates, router.route(mixed_query(4)).gates)


def test_export_import_restores_the_gates() -> None:
    router, twin, query = make_router([0, 1, 0], trained=True), Router(CramConfig(), LAYERS), mixed_query(6)
    tensors, values = router.export_state()
    twin.import_state(tensors, json.loads(json.dumps(values)))
    torch.testing.assert_close(twin.route(query).gates, router.route(query).gates.detach(), atol=0, rtol=0)
    assert twin.expert_names == ["e0", "e1", "e2"] and twin.trained_centroid is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centroids": torch.zeros(LAYERS, 1, IMAGE)}, r"centroids must be \[3, 2, D_q\], got \[3, 1, 12\]"),
        ({"centroids": torch.full((LAYERS, 2, IMAGE), float("nan"))}, "centroids must be finite"),
        ({"experts": [["a", 0], ["a", 0]]}, "names distinct"),
        ({"experts": [["a", 0], ["b", -1]]}, r"experts must be \[name, group below 2\]"),
        ({"experts": [["a", 0], ["b", 2]]}, "group below 2"),
        ({"experts": [["a", 0], [1, 0]]}, "group below 2"),
        ({"experts": [["a", 0], 7]}, "group below 2"),
        ({"experts": {"a": 0}}, "group below 2"),
        ({"centroids": None}, r"state must have \['centroids', 'prototypes'\]"),
        ({"experts": None}, r"state must have \['experts'\]"),
        ({"locks": {"even": 9}}, "locks must name groups"),
    ],
)
def test_import_refuses_broken_state(change: dict[str, Any], message: str) -> None:
    router = make_router([0, 1, 1])
    tensors, values = make_router([0, 1]).export_state()
    state = {k: v for k, v in {**tensors, **values, **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        router.import_state(state, state)
    assert router.num_experts == 3 and router.centroids().shape == (LAYERS, 3, IMAGE)


@pytest.mark.parametrize("name", golden_names("cram_centroid"))
def test_golden_centroid(name: str) -> None:
    _, data = load("cram_centroid", name)
    centroid = CentroidMean()
    for index, running in enumerate(data["out.running_centroid_layer0"]):
        centroid.update(data[f"in.batch{index}"])
        torch.testing.assert_close(centroid.mean(), running, atol=2e-5, rtol=1e-4)
    assert centroid.count == int(data["out.count"])
    router = Router(CramConfig(), len(data["out.buf_centroid"]))
    router.add_expert("a", 0, centroid.mean())
    torch.testing.assert_close(router.centroids()[:, 0], data["out.buf_centroid"], atol=2e-5, rtol=1e-4)


def test_centroid_ignores_samples_without_image() -> None:
    centroid, query = CentroidMean(), mixed_query(5)
    centroid.update(query.image, query.has_image)
    torch.testing.assert_close(centroid.mean(), query.image[query.has_image].mean(0))
    centroid.update(torch.full((1, IMAGE), float("nan")), torch.tensor([False]))
    assert centroid.count == 4


def test_centroid_refuses_bad_features_and_stays_as_it_was() -> None:
    centroid = CentroidMean()
    with pytest.raises(ValueError, match="at least one image, got none"):
        centroid.mean()
    centroid.update(torch.ones(2, 4))
    with pytest.raises(ValueError, match="features must be finite"):
        centroid.update(torch.full((1, 4), float("inf")))
    with pytest.raises(ValueError, match=r"image must be \[N, ..., 4\], got \[1, 5\]"):
        centroid.update(torch.ones(1, 5))
    assert centroid.count == 2 and centroid.mean().tolist() == [1.0] * 4


@pytest.mark.parametrize("name", golden_names("cram_warmup_steps"))
def test_golden_warmup_steps(name: str) -> None:
    case, data = load("cram_warmup_steps", name)
    steps = [warmup_steps(total, case["config"]["ratio"]) for total in data["in.max_steps"].tolist()]
    assert steps == data["out.warmup_steps"].tolist()


def test_golden_statistics_tables_are_complete() -> None:
    assert_complete("cram_centroid", ["stream"])
    assert_complete("cram_warmup_steps", ["r005", "off"])


def test_warmup_needs_steps() -> None:
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        warmup_steps(0, 0.05)
