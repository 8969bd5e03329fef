"""The configuration: the published constants, validation, and the way through JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cram.config import _RULES, CramConfig

PUBLISHED = {
    "group_margin": 0.1,
    "group_merge_similarity": 0.8,
    "sigma": 2.0,
    "tau_alloc": 0.08,
    "tau_orth": 0.99,
    "warmup_fraction": 0.05,
    "buffer_rank": 48,
    "rank_min": 4,
    "scale": 2.0,
    "dropout": 0.05,
    "penalty_weight": 1.0,
    "target_projections": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "learning_rate": 2e-4,
    "lr_warmup_ratio": 0.03,
    "weight_decay": 0.0,
    "batch_size": 8,
    "epochs": 1,
}


@pytest.mark.parametrize(
    ("config", "max_groups", "rank_max"), [(CramConfig.ucit(), 5, 9), (CramConfig.trigap(), 10, 10)]
)
def test_presets_hold_the_published_constants(config: CramConfig, max_groups: int, rank_max: int) -> None:
    assert {name: getattr(config, name) for name in PUBLISHED} == PUBLISHED
    assert (config.max_groups, config.rank_max) == (max_groups, rank_max)
    assert not config.released_code


def test_presets_take_changes() -> None:
    assert CramConfig.trigap(seed=3, rank_max=12) == CramConfig(max_groups=10, rank_max=12, rank=10, seed=3)


def test_every_number_has_a_rule() -> None:
    numbers = {f.name for f in dataclasses.fields(CramConfig) if not isinstance(f.default, bool)}
    assert set(_RULES) == numbers


@given(
    st.builds(
        CramConfig,
        group_margin=st.floats(0, 2),
        max_groups=st.integers(1, 50),
        sigma=st.floats(1e-3, 1e3),
        rank_min=st.integers(0, 4),
        rank_max=st.integers(4, 48),
        max_steps=st.none() | st.integers(2, 10**6),
        released_code=st.booleans(),
        target_projections=st.lists(st.text(min_size=1), min_size=1, unique=True).map(tuple),
    )
)
def test_json_round_trip_is_the_identity(config: CramConfig) -> None:
    assert CramConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_integers_for_floats_become_floats() -> None:
    assert isinstance(CramConfig(sigma=1).sigma, float)


WRONG: list[tuple[str, Any, str]] = [
    ("group_margin", -0.1, r"group_margin must be in \[0, 2\], got -0.1"),
    ("group_merge_similarity", 1.5, "group_merge_similarity must be in"),
    ("max_groups", 0, "max_groups must be at least 1, got 0"),
    ("max_groups", True, "max_groups must be a int, got True"),
    ("sigma", 0.0, "sigma must be positive, got 0.0"),
    ("sigma", math.nan, "sigma must be a finite float, got nan"),
    ("sigma", 10**400, "sigma must be a finite float, got 1000"),
    ("sigma", "2", "sigma must be a finite float, got '2'"),
    ("tau_alloc", -1.0, "tau_alloc must be at least 0"),
    ("tau_orth", 1.0, r"tau_orth must be in \[0, 1\), got 1.0"),
    ("warmup_fraction", 0.0, r"warmup_fraction must be in \(0, 1\), got 0.0"),
    ("buffer_rank", 0, "buffer_rank must be at least 1"),
    ("buffer_rank", 8, "rank_max must not exceed buffer_rank=8, got 9"),
    ("rank_min", 10, "rank_min must not exceed rank_max=9, got 10"),
    ("rank_min", -1, "rank_min must be at least 0"),
    ("rank_max", 4.5, "rank_max must be a int, got 4.5"),
    ("scale", -2.0, "scale must be positive"),
    ("dropout", 1.0, "dropout must be in"),
    ("penalty_weight", math.inf, "penalty_weight must be a finite float"),
    ("overlap_weight", -0.5, "overlap_weight must be at least 0"),
    ("released_code", 1, "released_code must be a bool, got 1"),
    ("target_projections", [], "target_projections must be a non-empty tuple"),
    ("target_projections", ["q_proj", "q_proj"], "distinct names"),
    ("target_projections", "q_proj", "target_projections must be a tuple"),
    ("learning_rate", 0, "learning_rate must be positive"),
    ("batch_size", 0, "batch_size must be at least 1"),
    ("max_steps", 1, "max_steps must be None or at least 2"),
    ("max_steps", 10.0, "max_steps must be a int"),
    ("seed", -1, "seed must be at least 0"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_wrong_values_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CramConfig.from_dict({name: value})


def test_unknown_keys_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"among \['group_margin'.*got \['ranks', 'theta'\]"):
        CramConfig.from_dict({"theta": 0.1, "ranks": 4})


def test_fields_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CramConfig().sigma = 1.0  # type: ignore[misc]
