"""Adaptive-rank instantiation: golden experts, both readings of the scale, properties against a dense SVD."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cram.config import CramConfig
from cram.methods.parts.instantiate import Factors, Instantiation, _select, instantiate_modules, least_novelty
from tests.cram.golden_cases import assert_complete, golden_names, load

NAMES = (
    "sq_nohist wide_none_above tall_all_above_cap sq_hist_mixed sq_hist_all_filtered rect_hist_floor_order "
    "hist_list_dirty r_buf_below_floor cap_before_filter_R10 too_flat taunovel_zero r_active_below_capacity "
    "real_size_512 rank_min_zero zero_buffer hist_fills_space"
)
LEFT_OUT: dict[str, str] = {}


Inputs = tuple[dict[str, Tensor], Factors, list[Tensor], CramConfig]


def golden_inputs(name: str, **changes: Any) -> Inputs:
    """Tensors of a case, its buffer without inactive rows, its valid history, and its configuration."""
    case, data = load("cram_instantiate", name)
    given_config = case["config"]
    active = given_config["r_buf_active"]
    buffer = (data["in.buf_A"][:active], data["in.buf_B"][:, :active])
    history = []
    for index, slot in enumerate(data.get("in.hist_slot_ids", torch.zeros(0)).tolist()):
        if slot in given_config["hist_expert_slots"] and data["in.hist_committed_mask"][index]:
            history.append(data["in.hist_A"][index, : int(data["in.hist_rank"][index])])
    config = CramConfig(
        scale=given_config["scale"],
        tau_alloc=given_config["tau_alloc"],
        tau_orth=given_config["tau_novel"],
        rank_min=given_config["rank_min"],
        rank_max=given_config["rank_max"],
        **changes,
    )
    return data, buffer, history, config


def one(buffer: Factors, history: list[Tensor], config: CramConfig) -> Instantiation:
    return instantiate_modules({"m": buffer}, {"m": history}, config)["m"]


def random_module(seed: int, d_in: int, d_out: int, rank: int, size: float = 1.0) -> Factors:
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, d_in, generator=rng) / d_in**0.5
    return a, size * torch.randn(d_out, rank, generator=rng) / d_out**0.5


def test_golden_table_is_complete() -> None:
    assert_complete("cram_instantiate", NAMES.split(), LEFT_OUT)


@pytest.mark.parametrize("released", [True, False], ids=["released", "faithful"])
@pytest.mark.parametrize("name", golden_names("cram_instantiate", LEFT_OUT))
def test_golden_expert(name: str, released: bool) -> None:
    data, buffer, history, config = golden_inputs(name, released_code=released)
    made = one(buffer, history, config)
    assert made.rank == int(data["out.rank"])
    torch.testing.assert_close(made.singular_values, data["out.singular_values"], atol=1e-5, rtol=1e-4)
    if "out.selected_index" not in data:  # a buffer of zeros: factors of 1e-6 with directions of rounding
        assert made.a.abs().max() <= 1e-6 and made.b.abs().max() <= 1e-6
        return
    assert made.selected == tuple(data["out.selected_index"].tolist())
    product = made.b @ made.a * (1.0 if released else config.scale)
    torch.testing.assert_close(product, data["out.B_new"] @ data["out.A_new"], atol=2e-5, rtol=1e-4)
    if "info.novelty" in data and config.tau_orth:
        novelty = data["info.novelty"][: config.rank_max].float()
        torch.testing.assert_close(torch.tensor(made.novelty), novelty, atol=1e-5, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    d_in=st.integers(3, 24),
    d_out=st.integers(3, 24),
    rank=st.integers(1, 12),
    size=st.floats(1e-3, 4.0),
    bounds=st.sampled_from([(0, 1), (2, 3), (4, 9), (9, 9)]),
    older=st.lists(st.integers(0, 5), max_size=3),
)
def test_expert_matches_a_dense_reading(
    seed: int, d_in: int, d_out: int, rank: int, size: float, bounds: tuple[int, int], older: list[int]
) -> None:
    a, b = random_module(seed, d_in, d_out, rank, size)
    history = [random_module(seed + 1 + k, d_in, d_out, r)[0] for k, r in enumerate(older)]
    config = CramConfig(rank_min=bounds[0], rank_max=bounds[1])
    made = one((a, b), history, config)
    left, values, right = torch.linalg.svd(config.scale * b.double() @ a.double(), full_matrices=False)
    possible = min(rank, d_in, d_out)
    torch.testing.assert_close(made.singular_values.double(), values[:possible], atol=1e-5, rtol=1e-4)
    assert min(possible, max(config.rank_min, 1)) <= made.rank <= min(possible, config.rank_max)
    assert len(set(made.selected)) == made.rank and max(made.selected) < config.rank_max
    basis = torch.linalg.qr(torch.cat([a.new_zeros(0, d_in), *history]).double().mT)[0]
    expected = torch.zeros(d_out, d_in, dtype=torch.float64)
    for j in made.selected:
        residual = right[j] - basis @ (basis.mT @ right[j])
        # Where the history nearly fills the space, rounding decides the direction.
        assume(residual.norm() > 1e-3)
        expected += values[j] * torch.outer(left[:, j], residual / residual.norm())
    assert made.a.dtype == made.b.dtype == torch.float32
    update = config.scale * (made.b @ made.a).double()
    torch.testing.assert_close(update, expected, atol=2e-3 * size, rtol=1e-2)


@pytest.mark.parametrize(
    ("values", "novelty", "kept"),
    [
        ([0.5, 0.5, 0.1], (1.0, 1.0, 1.0), (0,)),
        ([0.6, 0.51, 0.5], (1.0, 1.0, 1.0), (0, 1)),
        ([0.9, 0.8, 0.7], (1.0, 0.25, 1.0), (0, 2)),
        ([0.9, 0.8, 0.7], (0.25, 0.25, 0.2), (0,)),
        ([0.9, 0.8, 0.7, 0.6, 0.6], (1.0,) * 5, (0, 1, 2, 3)),
    ],
    ids=["none above", "one at the threshold", "one at the novelty", "all filtered", "cap"],
)
def test_a_direction_must_exceed_both_thresholds(
    values: list[float], novelty: tuple[float, ...], kept: tuple[int, ...]
) -> None:
    config = CramConfig(tau_alloc=0.5, tau_orth=0.25, rank_min=1, rank_max=4)
    assert _select(values, novelty, config.tau_orth, config) == kept


def test_the_floor_takes_the_largest_of_the_others() -> None:
    config = CramConfig(tau_alloc=0.5, tau_orth=0.25, rank_min=3, rank_max=4)
    assert _select([0.9, 0.8, 0.7, 0.1, 0.1], (1.0, 0.1, 0.1, 1.0, 1.0), 0.25, config) == (0, 1, 2)
    assert _select([0.9, 0.1], (1.0, 1.0), 0.25, config) == (0, 1)


@pytest.mark.parametrize(
    ("width", "dimensions", "tau"), [(4096, 9, 0.990), (192, 9, 0.760), (192, 18, 0.395)]
)
def test_the_threshold_follows_width_and_history(width: int, dimensions: int, tau: float) -> None:
    config = CramConfig(overlap_ratio=9.0)
    assert abs(least_novelty(config, dimensions, width) - tau) < 1e-3
    assert least_novelty(config, width, width) == 0
    assert least_novelty(CramConfig(), dimensions, width) == 0.99


def test_a_ratio_keeps_what_the_constant_rejects_in_a_narrow_layer() -> None:
    """9 of 64 dimensions are old. The stronger direction leans on them, the other does as chance would."""
    generator = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0].T
    old, outside = frame[:9], frame[9:11]
    share = (9 / 64) ** 0.5
    typical = share * old[0] + (1 - share**2) ** 0.5 * outside[0]
    leaning = 0.9 * old[1] + 0.19**0.5 * outside[1]
    b = torch.linalg.qr(torch.randn(32, 2, generator=generator))[0]
    buffers = {"m": (torch.stack([leaning, typical]), b * torch.tensor([2.0, 1.0]))}
    # Twice the old rows do not make two histories of one.
    history = {"m": [old, old * 2]}
    kept = {
        ratio: instantiate_modules(
            buffers, history, CramConfig(rank_min=0, rank_max=2, buffer_rank=2, overlap_ratio=ratio)
        )["m"].selected
        for ratio in (0.0, 2.0, 5.0, 7.0)
    }
    assert kept == {0.0: (0,), 2.0: (1,), 5.0: (1,), 7.0: (0, 1)}


def test_projected_rows_avoid_the_history_and_keep_their_length() -> None:
    history = [random_module(k, 40, 40, 6)[0] for k in (1, 2)]
    made = one(random_module(0, 40, 40, 12), history, CramConfig(rank_min=5))
    assert (made.a @ torch.cat(history).mT).abs().max() < 1e-5
    share = made.singular_values[list(made.selected)] / 2
    torch.testing.assert_close(made.a.square().sum(1), share)
    torch.testing.assert_close(made.b.square().sum(0), share)


def test_dependent_history_counts_once() -> None:
    rows = random_module(1, 30, 30, 4)[0]
    module = random_module(0, 30, 30, 10)
    plain = one(module, [rows], CramConfig())
    mixed = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(9)))[0] @ rows
    repeated = one(module, [rows, 1e-4 * mixed, torch.zeros(2, 30), rows[:0]], CramConfig())
    assert repeated.selected == plain.selected
    torch.testing.assert_close(repeated.b @ repeated.a, plain.b @ plain.a, atol=1e-5, rtol=1e-4)


def test_rank_zero_history_is_no_history() -> None:
    module = random_module(0, 30, 30, 10)
    plain, empty = one(module, [], CramConfig()), one(module, [torch.zeros(0, 30)], CramConfig())
    assert torch.equal(plain.a, empty.a) and empty.novelty == (1.0,) * 9
    # Rows of zeros span nothing either, but the filter measures against them.
    zeros = one(module, [torch.zeros(3, 30)], CramConfig())
    assert zeros.selected == plain.selected and zeros.novelty == pytest.approx((1.0,) * 9, abs=1e-5)


def test_released_expert_starts_at_scale_times_the_faithful_one() -> None:
    module = random_module(0, 30, 20, 10)
    faithful, released = one(module, [], CramConfig()), one(module, [], CramConfig(released_code=True))
    assert faithful.selected == released.selected
    torch.testing.assert_close(released.b @ released.a, 2.0 * faithful.b @ faithful.a)


def test_full_rank_choice_reproduces_the_update() -> None:
    a, b = random_module(0, 30, 20, 6, size=5.0)
    made = one((a, b), [], CramConfig(scale=3.0, rank_max=6))
    torch.testing.assert_close(made.b @ made.a, b @ a, atol=1e-5, rtol=1e-4)


def test_modules_do_not_depend_on_their_neighbours() -> None:
    shapes = [(24, 24), (24, 24), (24, 16), (16, 24), (24, 24), (24, 24)]
    buffers = {f"m{i}": random_module(i, d_in, d_out, 8) for i, (d_in, d_out) in enumerate(shapes)}
    history = {"m1": [random_module(50, 24, 24, 3)[0]], "m4": [random_module(51, 24, 24, 7)[0]], "m2": []}
    together = instantiate_modules(buffers, history, CramConfig())
    assert list(together) == list(buffers)
    for name, made in together.items():
        alone = one(buffers[name], history.get(name, []), CramConfig())
        assert made.selected == alone.selected and made.novelty == pytest.approx(alone.novelty, abs=1e-6)
        torch.testing.assert_close(made.b @ made.a, alone.b @ alone.a, atol=1e-6, rtol=1e-4)


def test_half_precision_parameters_give_detached_float32_factors() -> None:
    a, b = random_module(0, 24, 24, 8)
    buffer = (torch.nn.Parameter(a.bfloat16()), torch.nn.Parameter(b.bfloat16()))
    made = one(buffer, [a.bfloat16()], CramConfig())
    assert made.a.dtype == torch.float32 and not made.a.requires_grad and not made.b.requires_grad
    assert torch.equal(buffer[0].detach(), a.bfloat16())


def test_autocast_does_not_round_the_factors() -> None:
    module, older = random_module(0, 24, 24, 8), random_module(1, 24, 24, 3)[0]
    plain = one(module, [older], CramConfig())
    with torch.autocast("cpu", torch.bfloat16):
        cast = one(module, [older], CramConfig())
    assert torch.equal(cast.a, plain.a) and torch.equal(cast.b, plain.b)


class LargestResult(TorchDispatchMode):
    """Records the largest number of elements any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_nothing_of_the_weights_size_is_formed() -> None:
    with LargestResult() as largest:
        one(random_module(0, 600, 500, 8), [random_module(1, 600, 500, 4)[0]], CramConfig(rank_max=8))
    assert largest.elements <= 600 * 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "width", "limit_s"), [(24, 192, 0.05), (128, 4096, 10.0)], ids=["tiny", "llava-7b"]
)
def test_speed(modules: int, width: int, limit_s: float) -> None:
    buffers = {f"m{i}": random_module(i, width, width, 48) for i in range(modules)}
    history = {name: [random_module(i + 999, width, width, 9)[0]] for i, name in enumerate(buffers)}
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        instantiate_modules(buffers, history, CramConfig())
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < limit_s


@pytest.mark.parametrize(
    ("a", "b", "older", "message"),
    [
        (torch.zeros(4, 6), torch.zeros(5, 3), [], r"must be \[r, D_in\].*got \[4, 6\] and \[5, 3\]"),
        (torch.zeros(0, 6), torch.zeros(5, 0), [], "r at least 1"),
        (torch.zeros(4, 6), torch.zeros(5, 4), [torch.zeros(2, 5)], r"must be \[r_k, 6\], got \[\[2, 5\]\]"),
        (torch.full((4, 6), float("nan")), torch.zeros(5, 4), [], "of m must be finite"),
        (torch.zeros(4, 6), torch.full((5, 4), float("inf")), [], "of m must be finite"),
        (torch.zeros(4, 6), torch.zeros(5, 4), [torch.full((1, 6), float("nan"))], "of m must be finite"),
    ],
)
def test_bad_buffers_are_refused(a: Tensor, b: Tensor, older: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one((a, b), older, CramConfig())


def test_history_of_an_unknown_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be among the buffers' \['m'\], got \['n'\]"):
        instantiate_modules({"m": random_module(0, 8, 8, 4)}, {"n": []}, CramConfig())
