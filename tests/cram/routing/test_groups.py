"""Instruction groups: golden streams, invariants, refusal of bad input, and two processes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cram.config import CramConfig
from cram.routing.groups import InstructionGroups, normalise_text
from cram.routing.means import CentroidMean
from tests.cram.golden_cases import assert_complete, golden_names, load

LEFT_OUT: dict[str, str] = {}


def make(**changes: float) -> InstructionGroups:
    return InstructionGroups(CramConfig.from_dict(changes))


def direction(*weights: float, width: int = 32) -> Tensor:
    """A feature [1, width] whose LayerNorm has cosines with basis features given by the weights."""
    columns = torch.cat([torch.ones(width, 1), torch.randn(width, 8, generator=seeded(5))], 1)
    basis = torch.linalg.qr(columns)[0][:, 1 : 1 + len(weights)]
    return (torch.tensor(weights, dtype=torch.float32) @ basis.T)[None] * 7 + 3


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def snapshot(groups: InstructionGroups) -> tuple[Tensor, Tensor, dict[str, int]]:
    tensors, values = groups.export_state()
    return tensors["prototypes"], tensors["counts"], values["locks"]


def test_golden_table_is_complete() -> None:
    names = "ucit_like merge08_yes_no gmax_ambiguous_moves gmax1 low_similarity_margin revisit_theta02_b1"
    assert_complete("cram_groups", names.split(), LEFT_OUT)


@pytest.mark.parametrize("name", golden_names("cram_groups", LEFT_OUT))
def test_golden_stream(name: str) -> None:
    case, data = load("cram_groups", name)
    config = case["config"]
    groups = make(
        group_margin=config["theta"],
        group_merge_similarity=config["single_group_merge_similarity"],
        max_groups=config["max_groups"],
    )
    batches = data["in.text_features"].split(data["in.batch_sizes"].tolist())
    seen = []
    for task, batch, text in zip(data["in.task_ids"].tolist(), batches, data["out.text_vector"], strict=True):
        torch.testing.assert_close(normalise_text(batch.mean(0)), text, atol=2e-5, rtol=1e-4)
        before = len(groups)
        group = groups.observe(str(task), batch)
        seen.append([group, int(len(groups) > before), int(str(task) in groups.locks), len(groups)])
    keys = ("out.group", "out.is_new_group", "out.task_locked_after", "out.n_groups_after")
    assert seen == torch.stack([data[key] for key in keys], 1).tolist()
    assert groups.locks == case["expected"]["task_group_lock"]
    assert groups.counts.tolist() == data["out.counts"].tolist()
    torch.testing.assert_close(groups.prototypes, data["out.prototypes"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", golden_names("cram_groups", LEFT_OUT))
def test_golden_inference(name: str) -> None:
    case, data = load("cram_groups", name)
    groups = make(max_groups=case["config"]["max_groups"])
    groups.import_state({"prototypes": data["out.prototypes"], "counts": data["out.counts"]}, {"locks": {}})
    queries = data["in.query_features"].split(data["in.query_batch_sizes"].tolist())
    means = torch.stack([query.mean(0) for query in queries])
    assert groups.assign(means).tolist() == data["out.query_group"].tolist()


def test_single_group_compares_with_the_merge_similarity_only() -> None:
    groups = make(max_groups=5)
    assert groups.observe("a", direction(1, 0)) == 0
    assert groups.observe("b", direction(0.9, 0.3)) == 0
    assert groups.observe("c", direction(0.6, 0.8)) == 1


def test_margin_decides_among_several_groups_even_at_low_similarity() -> None:
    groups = make(max_groups=5)
    groups.observe("a", direction(1, 0, 0))
    groups.observe("b", direction(0, 1, 0))
    assert groups.observe("c", direction(0.2, 0, 0.98)) == 0
    assert groups.observe("d", direction(0.5, 0.39, 0, 0.77)) == 2


@pytest.mark.parametrize(("similarities", "group"), [([0.5], 1), ([0.50001], 0)])
def test_the_merge_similarity_itself_is_not_enough(
    similarities: list[float], group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = make(group_merge_similarity=0.5)
    groups.observe("a", direction(1, 0))
    monkeypatch.setattr(InstructionGroups, "similarity", lambda self, text: torch.tensor(similarities))
    assert groups.observe("b", direction(0, 1)) == group


@pytest.mark.parametrize(("similarities", "group"), [([0.25, 0.5], 2), ([0.25, 0.75], 1), ([0.75, 0.25], 0)])
def test_the_margin_itself_is_not_enough(
    similarities: list[float], group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = make(group_margin=0.25)
    groups.observe("a", direction(1, 0))
    groups.observe("b", direction(0, 1))
    monkeypatch.setattr(InstructionGroups, "similarity", lambda self, text: torch.tensor(similarities))
    assert groups.observe("c", direction(1, 1)) == group


def test_similarities_are_cosines_whatever_the_lengths() -> None:
    groups = make()
    prototypes = torch.stack([direction(1, 0)[0], 9 * direction(0, 1)[0]])
    groups.import_state({"prototypes": prototypes, "counts": torch.ones(2, dtype=torch.int64)}, {"locks": {}})
    text = 5 * torch.randn(3, 4, 32, generator=seeded(3))
    expected = torch.cosine_similarity(text[..., None, :], prototypes, dim=-1)
    torch.testing.assert_close(groups.similarity(text), expected, atol=1e-6, rtol=1e-5)


def test_ambiguity_at_the_limit_neither_locks_nor_changes_state() -> None:
    groups = make(max_groups=2)
    groups.observe("a", direction(1, 0, 0))
    groups.observe("b", direction(0, 1, 0))
    before = snapshot(groups)
    assert groups.observe("c", direction(0.7, 0.69, 0)) == 0
    assert groups.observe("c", direction(0.69, 0.7, 0)) == 1
    torch.testing.assert_close(snapshot(groups), before, atol=0, rtol=0)
    assert groups.observe("c", direction(0, 1, 0.2)) == 1
    assert groups.locks["c"] == 1
    assert groups.observe("c", direction(1, 0, 0)) == 1


def test_lock_settles_an_ambiguous_task_once() -> None:
    groups = make(max_groups=1)
    groups.observe("a", direction(1, 0))
    assert groups.observe("b", direction(0, 1)) == 0 and "b" not in groups.locks
    groups.lock("b", 0)
    groups.lock("b", 0)
    assert groups.observe("b", direction(0, 1)) == 0 and groups.counts.tolist() == [2]
    with pytest.raises(ValueError, match=r"group must be in \[0, 1\), got 1"):
        groups.lock("c", 1)
    groups = make(max_groups=2)
    groups.observe("a", direction(1, 0))
    groups.observe("b", direction(0, 1))
    with pytest.raises(ValueError, match="'a' must keep its group 0, got 1"):
        groups.lock("a", 1)


def test_layer_norm_makes_groups_blind_to_shift_and_scale() -> None:
    groups = make()
    groups.observe("a", direction(1, 0))
    groups.observe("b", direction(0, 1))
    feature = direction(0.8, 0.2)
    assert groups.assign(torch.cat([feature, feature * 50 - 20])).tolist() == [0, 0]


def test_autocast_does_not_round_the_cosines() -> None:
    groups, features = make(), torch.randn(64, 32, generator=seeded(4))
    groups.observe("a", direction(1, 0))
    groups.observe("b", direction(0, 1))
    plain = groups.similarity(normalise_text(features))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(groups.similarity(normalise_text(features)), plain)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=12), st.integers(0, 99))
def test_running_mean_invariants(stream: list[tuple[int, int]], seed: int) -> None:
    groups = make(max_groups=3)
    rng, absorbed = seeded(seed), {}
    for task, size in stream:
        batch = torch.randn(size, 16, generator=rng) + 2 * torch.eye(4, 16)[task]
        group = groups.observe(str(task), batch)
        if str(task) in groups.locks:
            assert group == groups.locks[str(task)]
            absorbed.setdefault(group, []).append(normalise_text(batch.mean(0)))
    assert groups.counts.tolist() == [len(absorbed[g]) for g in range(len(groups))]
    means = torch.stack([torch.stack(absorbed[g]).mean(0) for g in range(len(groups))])
    torch.testing.assert_close(groups.prototypes, means, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_features_are_refused_and_change_nothing(bad: float) -> None:
    groups = make()
    groups.observe("a", direction(1, 0))
    before = snapshot(groups)
    features = torch.cat([direction(1, 0), direction(0, 1)])
    features[1, 3] = bad
    for task in ("a", "new"):
        with pytest.raises(ValueError, match="features must be finite"):
            groups.observe(task, features)
    with pytest.raises(ValueError, match="features must be finite"):
        groups.assign(features)
    torch.testing.assert_close(snapshot(groups), before, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(32), r"float \[B, D_t\], got torch.float32 \[32\]"),
        (torch.zeros(0, 32), "non-empty"),
        (torch.zeros(2, 32, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(2, 31), "D_t=32 columns, got 31"),
    ],
)
def test_wrong_shapes_are_refused(features: Tensor, message: str) -> None:
    groups = make()
    groups.observe("a", direction(1, 0))
    with pytest.raises(ValueError, match=message):
        groups.observe("b", features)
    assert list(groups.locks) == ["a"]


def test_assign_needs_a_group() -> None:
    with pytest.raises(ValueError, match="got no groups"):
        make().assign(direction(1, 0))


def test_export_import_continues_the_stream_identically() -> None:
    groups, twin = make(), make()
    for task, weights in {"a": (1, 0, 0), "b": (0, 1, 0)}.items():
        groups.observe(task, direction(*weights))
    tensors, values = groups.export_state()
    twin.import_state(tensors, json.loads(json.dumps(values)))
    for stream in (groups, twin):
        stream.observe("a", direction(0.5, 0.1, 0.5))
        stream.observe("c", direction(0.1, 0.2, 0.9))
    torch.testing.assert_close(snapshot(groups), snapshot(twin), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": torch.ones(2)}, r"must be \[G, D_t\] and \[G\], got"),
        ({"counts": torch.zeros(2, dtype=torch.int64)}, "counts of at least 1"),
        ({"prototypes": torch.full((2, 32), float("nan"))}, "prototypes must be finite"),
        ({"prototypes": torch.zeros(3, 32)}, r"must be \[G, D_t\] and \[G\]"),
        ({"prototypes": torch.ones(6, 4), "counts": torch.ones(6, dtype=torch.int64)}, "max_groups=5, got 6"),
        ({"locks": {"a": 2}}, r"locks must name groups in \[0, 2\), got \{'a': 2\}"),
        ({"locks": {"a": True}}, "locks must name groups"),
    ],
)
def test_import_refuses_broken_state(change: dict[str, object], message: str) -> None:
    groups = make()
    groups.observe("a", direction(1, 0))
    before = snapshot(groups)
    state = {"prototypes": torch.ones(2, 32), "counts": torch.ones(2, dtype=torch.int64), "locks": {"a": 1}}
    state.update(change)
    with pytest.raises(ValueError, match=message):
        groups.import_state(state, state)  # type: ignore[arg-type]
    torch.testing.assert_close(snapshot(groups), before, atol=0, rtol=0)


def test_state_stays_float32_and_copies_are_independent() -> None:
    groups = make()
    groups.observe("a", direction(1, 0).half())
    twin = copy.deepcopy(groups).to(torch.bfloat16)
    assert twin.prototypes.dtype == torch.float32
    twin.observe("a", direction(0, 1))
    assert groups.counts.tolist() == [1] and twin.counts.tolist() == [2]


def observe_share(rank: int, folder: str, images: Tensor, text: Tensor) -> None:
    """One of two processes: statistics of its share of a batch; the second process has no image at all."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    groups, centroid = make(), CentroidMean()
    rows = slice(0, 2) if rank == 0 else slice(2, 5)
    groups.observe("a", text[rows])
    centroid.update(images[rows], torch.full((rows.stop - rows.start,), rank == 0))
    refused = False
    try:
        groups.observe("a", text[rows] * (float("nan") if rank else 1.0))
    except ValueError:
        refused = True
    seen = (groups.prototypes, groups.counts, centroid.mean(), centroid.count, refused)
    torch.save(seen, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_processes_see_one_batch(tmp_path: Path) -> None:
    images, text = torch.randn(5, 6, generator=seeded(1)), torch.randn(5, 8, generator=seeded(2))
    mp.spawn(observe_share, (str(tmp_path), images, text), nprocs=2)
    for rank in range(2):
        prototypes, counts, centroid, count, refused = torch.load(tmp_path / str(rank), weights_only=True)
        torch.testing.assert_close(prototypes, normalise_text(text.mean(0))[None])
        torch.testing.assert_close(centroid, images[:2].mean(0))
        assert counts.tolist() == [1] and count == 2 and refused
