"""Entries of a comparison: fair sizes, ablations as data, refusals."""

from __future__ import annotations

import pytest

from cram.compare.entries import ABLATIONS, BUDGETS, POOL_EXPERTS, Entry, entries
from cram.config import CramConfig
from cram.methods import METHODS

CONFIG = CramConfig(rank_max=9)
TASKS, AVERAGE = 6, 8


def test_every_registered_method_has_a_size_and_says_what_it_is() -> None:
    for name in METHODS:
        entry = Entry(name)
        changes = entry.changes(CONFIG, TASKS, AVERAGE)
        assert changes.keys() == (set() if name == "cram" else {"rank"})
        CramConfig.from_dict({**CONFIG.to_dict(), **changes})
        about, reason = entry.note.split(" Size: ")
        assert len(about) > 20 and reason == f"{BUDGETS[METHODS[name].budget].reason}."


@pytest.mark.parametrize(("kind", "rank"), [("task", 9), ("pool", 7), ("branches", 12), ("one", AVERAGE)])
def test_sizes_by_kind(kind: str, rank: int) -> None:
    assert BUDGETS[kind].rank(9, TASKS, AVERAGE) == rank
    sized = [name for name, method in METHODS.items() if method.budget == kind and name != "cram"]
    assert sized
    for name in sized:
        assert Entry(name).changes(CONFIG, TASKS, AVERAGE) == {"rank": rank}


def test_a_pool_has_the_rows_of_all_tasks() -> None:
    for tasks in (6, 20, 50):
        rows = POOL_EXPERTS * BUDGETS["pool"].rank(9, tasks, AVERAGE)
        assert rows == pytest.approx(9 * tasks, abs=POOL_EXPERTS / 2)
    assert BUDGETS["pool"].rank(1, 1, 1) == 1


def test_one_lora_is_as_large_as_crams_average_expert() -> None:
    one = Entry("sequential")
    assert [one.changes(CONFIG, TASKS, average) for average in (None, 2, 60)] == [
        {"rank": 9},
        {"rank": 2},
        {"rank": 60},
    ]
    assert one.follows_cram and not Entry("cram").follows_cram


def test_ablations_change_exactly_their_fields() -> None:
    expected = {
        "no-centroid-routing": {"sigma": 1e6},
        "no-groups": {"max_groups": 1},
        "fixed-rank": {"rank_min": 9},
        "no-novelty-filter": {"tau_orth": 0.0, "overlap_ratio": 0.0},
        "rank-after-training": {
            "warmup_fraction": 0.95,
            "rank_min": 9,
            "tau_orth": 0.0,
            "overlap_ratio": 0.0,
            "penalty_weight": 0.0,
        },
        "no-penalty": {"penalty_weight": 0.0},
        "as-released": {"released_code": True},
    }
    assert {name: Entry("cram", name).changes(CONFIG, TASKS, AVERAGE) for name in ABLATIONS} == expected
    for changes in expected.values():
        CramConfig.from_dict({**CONFIG.to_dict(), **changes})
    entry = Entry("cram", "no-penalty")
    assert entry.name == "cram: no penalty" and entry.folder == "cram-no-penalty"
    assert entry.note.startswith("CRAM with penalty_weight = 0.0: ")


def test_entries_follow_the_registry_with_cram_first_and_ablations_last() -> None:
    found = entries(["isolated", "sequential", "cram"], ["no-penalty", "no-groups"])
    names = ["cram", "sequential", "isolated", "cram: no groups", "cram: no penalty"]
    assert [entry.name for entry in found] == names
    everything = entries(tuple(METHODS), tuple(ABLATIONS))
    assert {entry.folder for entry in everything} >= METHODS.keys()
    assert len({entry.folder for entry in everything}) == len(METHODS) + len(ABLATIONS)


@pytest.mark.parametrize(
    ("methods", "ablations", "message"),
    [
        (["magic"], [], "methods must be distinct names among .*'cram'.*, got .*'magic'"),
        (["cram", "cram"], [], "methods must be distinct names"),
        ([], [], "methods must be at least one, got"),
        (["cram"], ["no-magic"], "ablations must be distinct names among .*'no-penalty'.*, got .*'no-magic'"),
        (["sequential"], ["no-penalty"], "methods must hold 'cram', which is ablated, got .*'sequential'"),
    ],
)
def test_wrong_names_are_refused(methods: list[str], ablations: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entries(methods, ablations)


def test_notes_name_the_sizes_that_are_in_force() -> None:
    fixed = Entry("cram", "fixed-rank")
    assert "rank_min = 9" in fixed.note and "rank_min = 18" in fixed.note_of(CramConfig(rank_max=18))
    for name in METHODS:
        entry = Entry(name)
        assert (entry.note_of(CONFIG, False) == entry.note) is not entry.follows_cram
    assert "its size follows CRAM only where CRAM is compared too" in Entry("replay").note_of(CONFIG, False)
