"""PackedExperts: layout, views, aliasing through everything that replaces storage, refusals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cram_kernels import PackedExperts, expert_lora, pack_experts
from cram_kernels.testing import layer_inputs

RANKS = (4, 0, 9, 1)
D_IN, D_OUT = 6, 5


def factors(ranks: tuple[int, ...] = RANKS) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    a = [torch.randn(r, D_IN, generator=generator) for r in ranks]
    b = [torch.randn(D_OUT, r, generator=generator) for r in ranks]
    return a, b


def assert_aliased(experts: PackedExperts) -> None:
    """The leaf parameters must share memory with the last rows of the packed storage."""
    start = experts.total_rank - experts.trained_rank
    for leaf, packed in ((experts.trained_a, experts.a), (experts.trained_b, experts.bt)):
        assert isinstance(leaf, nn.Parameter) and leaf.is_leaf and leaf.requires_grad
        assert leaf.data_ptr() == packed[start:].data_ptr() and leaf.dtype == packed.dtype
        torch.testing.assert_close(leaf.detach(), packed[start:])


def test_layout_and_views() -> None:
    a, b = factors()
    experts = pack_experts(a, b, 2.0, trained=2)
    assert (experts.num_experts, experts.total_rank, experts.trained_rank) == (4, 14, 10)
    assert (experts.in_features, experts.out_features, experts.scale) == (D_IN, D_OUT, 2.0)
    assert experts.offsets == (0, 4, 4, 13, 14)
    assert experts.expert_of_row.tolist() == [0] * 4 + [2] * 9 + [3]
    for i, (a_i, b_i) in enumerate(zip(a, b, strict=True)):
        for e in (i, i - 4):
            assert torch.equal(experts.expert(e)[0], a_i) and torch.equal(experts.expert(e)[1], b_i)
    assert [experts.expert(i)[0].requires_grad for i in range(4)] == [False, False, True, True]
    assert not experts.a.requires_grad and not experts.bt.requires_grad
    with pytest.raises(IndexError, match=r"expert must lie in \[0, 4\), got 4"):
        experts.expert(4)
    assert "ranks=(4, 0, 9, 1)" in repr(experts)


@pytest.mark.parametrize("trained", [0, 1, 2, 4])
def test_trained_suffix(trained: int) -> None:
    experts = pack_experts(*factors(), 2.0, trained)
    assert len(list(experts.parameters())) == (2 if trained else 0)
    if trained:
        assert_aliased(experts)
    else:
        assert experts.trained_a is None and experts.trained_b is None


def test_optimiser_step_reaches_storage() -> None:
    experts = pack_experts(*factors(), 2.0, trained=1)
    before = experts.bt.clone()
    (experts.trained_a.sum() + experts.trained_b.sum()).backward()
    torch.optim.AdamW(experts.parameters(), lr=0.1).step()
    assert torch.equal(experts.bt[:13], before[:13]) and not torch.equal(experts.bt[13:], before[13:])
    assert_aliased(experts)


def reload(experts: PackedExperts, *, assign: bool) -> PackedExperts:
    fresh = pack_experts(*(list(map(torch.zeros_like, f)) for f in factors()), 2.0, trained=1)
    fresh.load_state_dict(experts.state_dict(), assign=assign)
    return fresh


@pytest.mark.parametrize(
    "replace",
    [
        lambda experts: experts.to(torch.float64),
        lambda experts: experts.bfloat16(),
        lambda experts: nn.Sequential(experts).half()[0],
        copy.deepcopy,
        lambda experts: pickle.loads(pickle.dumps(experts)),
        lambda experts: reload(experts, assign=False),
        lambda experts: reload(experts, assign=True),
    ],
    ids=["to", "bfloat16", "parent", "deepcopy", "pickle", "load", "load_assign"],
)
def test_alias_survives(replace: Callable[[PackedExperts], PackedExperts]) -> None:
    experts = pack_experts(*factors(), 2.0, trained=1)
    values = experts.a.clone()
    replaced = replace(experts)
    assert_aliased(replaced)
    torch.testing.assert_close(replaced.a, values.to(replaced.a.dtype))
    with torch.no_grad():
        replaced.trained_a.add_(1)
    assert_aliased(replaced)


def test_conversion_keeps_parameter_identity() -> None:
    """An optimiser made before `.to()` must keep stepping the same parameters."""
    experts = pack_experts(*factors(), 2.0, trained=1)
    leaf = experts.trained_a
    assert experts.double().trained_a is leaf


def test_copies_are_independent() -> None:
    experts = pack_experts(*factors(), 2.0, trained=1)
    copied = copy.deepcopy(experts)
    with torch.no_grad():
        copied.trained_a.zero_()
    assert experts.trained_a.abs().sum() > 0


def test_state_dict_holds_each_value_once(tmp_path: Path) -> None:
    experts = pack_experts(*factors(), 2.0, trained=1)
    assert set(experts.state_dict()) == {"a", "bt"}
    save_file(nn.ModuleDict({"q": experts}).state_dict(), tmp_path / "experts.safetensors")
    parent = nn.ModuleDict({"q": pack_experts(*factors(), 2.0, trained=1)})
    assert parent.load_state_dict(load_file(tmp_path / "experts.safetensors")).missing_keys == []
    with pytest.raises(RuntimeError, match="Missing key"):
        parent.load_state_dict({"q.a": experts.a})


def test_append_freezes_what_was_there() -> None:
    experts = pack_experts(*factors((4,)), 2.0, trained=1)
    a, b = factors((3,))
    longer = experts.append(a[0].double(), b[0].double())
    assert longer.ranks == (4, 3) and longer.trained == 1 and longer.a.dtype == torch.float32
    assert torch.equal(longer.expert(1)[1], b[0]) and not longer.expert(0)[0].requires_grad
    assert experts.ranks == (4,) and longer.a.data_ptr() != experts.a.data_ptr()
    assert experts.append(a[0], b[0], trained=0).trained_a is None


def test_empty_and_append() -> None:
    experts = PackedExperts.empty(D_IN, D_OUT, 2.0, dtype=torch.float64)
    assert (experts.num_experts, experts.total_rank, experts.trained_rank) == (0, 0, 0)
    assert experts.append(*(f[0] for f in factors((3,)))).ranks == (3,)


def test_freeze_shares_values() -> None:
    experts = pack_experts(*factors(), 2.0, trained=1)
    frozen = experts.freeze()
    assert frozen.trained == 0 and not list(frozen.parameters())
    assert frozen.a.data_ptr() == experts.a.data_ptr()


A, B = torch.zeros(2, D_IN), torch.zeros(D_OUT, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pack_experts([], [], 2.0), "equally long and not empty, got 0 and 0"),
        (lambda: pack_experts([A], [B, B], 2.0), "equally long and not empty, got 1 and 2"),
        (
            lambda: pack_experts([A], [B[:, :1]], 2.0),
            r"A \[r, 6\] and B \[5, r\], got A \[2, 6\] and B \[5, 1\]",
        ),
        (lambda: pack_experts([A, A[:, 1:]], [B, B], 2.0), r"A \[r, 6\].*got A \[2, 5\]"),
        (lambda: pack_experts([A, A.double()], [B, B.double()], 2.0), "must share dtype and device"),
        (lambda: pack_experts([A], [B.double()], 2.0), "must share dtype and device"),
        (lambda: pack_experts([A], [B], 2.0, trained=2), r"trained must lie in \[0, 1\], got 2"),
        (lambda: PackedExperts(A, B.t(), (3,), 2.0), r"sum to 2, got \(3,\)"),
        (lambda: PackedExperts(A, B.t(), (3, -1), 2.0), "non-negative"),
        (lambda: PackedExperts(A, B, (2,), 2.0), r"\[R, D_in\] and \[R, D_out\], got \[2, 6\] and \[5, 2\]"),
        (lambda: pack_experts([A], [B], 2.0).append(A, B, trained=2), "trained must be 0 or 1"),
        (lambda: pack_experts([A], [B], 2.0).append(A[:, 1:], B), "an expert must have"),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_inserted_experts_equal_packed_ones() -> None:
    """A reserved pack keeps shapes and addresses, and computes what a pack made at once does."""
    inputs = layer_inputs((4, 9, 1, 6), trained=0)
    packed = inputs.experts()
    grown = pack_experts(inputs.a[:2], inputs.b[:2], inputs.scale).reserve(32, 6)
    addresses = [side.data_ptr() for side in (grown.a, grown.bt, grown.expert_of_row)]
    for e in (2, 3):
        assert grown.insert(inputs.a[e], inputs.b[e]) == e
    assert addresses == [side.data_ptr() for side in (grown.a, grown.bt, grown.expert_of_row)]
    assert grown.ranks == packed.ranks and grown.a.shape == (32, 20) and grown.gate_columns == 6
    assert torch.equal(grown.expert(2)[0], inputs.a[2]) and torch.equal(grown.expert(3)[1], inputs.b[3])
    unused = torch.cat([inputs.gates, torch.full((4, 2), 7.0)], 1)
    for impl in ("reference", "cpu", "triton"):
        y = expert_lora(inputs.x, inputs.weight, None, grown, unused, impl=impl)
        expected = expert_lora(inputs.x, inputs.weight, None, packed, inputs.gates, impl=impl)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    appended = grown.append(inputs.a[0], inputs.b[0])
    assert appended.ranks == (4, 9, 1, 6, 4) and appended.a.shape[0] == 24 and appended.gate_columns == 5


def test_room_survives_copies_and_states() -> None:
    grown = pack_experts([torch.randn(3, 8)], [torch.randn(5, 3)], 1.0).reserve(16, 2)
    copied = copy.deepcopy(grown)
    copied.insert(torch.ones(2, 8), torch.ones(5, 2))
    assert grown.num_experts == 1 and copied.num_experts == 2 and grown.a[3:].eq(0).all()
    grown.insert(torch.zeros(2, 8), torch.zeros(5, 2))
    grown.load_state_dict(copied.state_dict())
    assert torch.equal(grown.a, copied.a) and grown.freeze().gate_columns == 2


def test_room_refusals() -> None:
    packed = pack_experts([torch.randn(3, 8)], [torch.randn(5, 3)], 1.0)
    with pytest.raises(ValueError, match="room must be at least 3 rows and 1 experts, got 2 and 1"):
        packed.reserve(2, 1)
    with pytest.raises(ValueError, match="must find room in a frozen pack, got 2 rows for 0 and 0 free"):
        packed.insert(torch.ones(2, 8), torch.ones(5, 2))
    exact = packed.reserve(3, 1)
    assert torch.equal(exact.a, packed.a) and exact.gate_columns == 1
    grown = packed.reserve(16, 2)
    with pytest.raises(ValueError, match=r"A \[r, 8\] and B \[5, r\]"):
        grown.insert(torch.ones(2, 7), torch.ones(5, 2))
    with pytest.raises(ValueError, match="got 14 rows for 13 and 1 free"):
        grown.insert(torch.ones(14, 8), torch.ones(5, 14))
    with pytest.raises(ValueError, match="a pack with room must be frozen, got 1 trained"):
        PackedExperts(grown.a, grown.bt, (3,), 1.0, trained=1, gate_columns=2)
    with pytest.raises(ValueError, match="gate_columns must be at least 2, got 1"):
        PackedExperts(grown.a, grown.bt, (8, 8), 1.0, gate_columns=1)


@pytest.mark.parametrize(("d_in", "d_out"), [(0, 3), (3, 0)])
def test_a_pack_without_a_width_is_refused(d_in: int, d_out: int) -> None:
    with pytest.raises(ValueError, match=rf"D_in and D_out must be at least 1, got {d_in} and {d_out}"):
        PackedExperts(torch.zeros(2, d_in), torch.zeros(2, d_out), [2], 1.0)


CHANGES: dict[str, Callable[[PackedExperts], object]] = {
    "in-place": lambda pack: pack.bt.mul_(2),
    "of a view": lambda pack: pack.expert(0)[0].zero_(),
    "insert": lambda pack: pack.insert(torch.ones(2, D_IN), torch.ones(D_OUT, 2)),
    "load_state_dict": lambda pack: pack.load_state_dict(
        {name: tensor + 1 for name, tensor in pack.state_dict().items()}
    ),
    "conversion": lambda pack: pack.double().float(),
    "replaced": lambda pack: setattr(pack, "a", pack.a + 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_copies_in_bfloat16_follow_every_change(change: str) -> None:
    pack = pack_experts(*factors(), 1.0).reserve(24, 6)
    first = pack.narrowed()
    assert all(again is copied for again, copied in zip(pack.narrowed(), first, strict=True))
    CHANGES[change](pack)
    for copied, own in zip(pack.narrowed(), (pack.a, pack.bt), strict=True):
        assert torch.equal(copied, own.bfloat16()) and copied.dtype == torch.bfloat16


def test_packs_whose_changes_are_not_counted_are_not_copied() -> None:
    training = pack_experts(*factors(), 1.0, trained=1)
    with torch.inference_mode():
        inferred = pack_experts(*factors(), 1.0)
    halves = pack_experts(*factors(), 1.0).bfloat16()
    for pack in (training, training.freeze(), copy.deepcopy(training).freeze().freeze(), inferred, halves):
        assert pack.narrowed()[0] is pack.a and pack.narrowed()[1] is pack.bt


def test_copies_in_bfloat16_made_in_inference_mode_serve_gradients() -> None:
    pack = pack_experts(*factors(), 1.0)
    with torch.inference_mode():
        pack.narrowed()
    a, _ = pack.narrowed()
    x = torch.ones(2, D_IN, dtype=torch.bfloat16, requires_grad=True)
    nn.functional.linear(x, a).sum().backward()
    assert x.grad is not None and not a.is_inference()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda pack: pickle.loads(pickle.dumps(pack))])
def test_copies_in_bfloat16_are_not_copied_with_the_pack(
    again: Callable[[PackedExperts], PackedExperts],
) -> None:
    pack = pack_experts(*factors(), 1.0)
    size = len(pickle.dumps(pack))
    pack.narrowed()
    other = again(pack)
    assert len(pickle.dumps(pack)) == size and other._copied is None
    other.a.zero_()
    assert not other.narrowed()[0].any() and pack.narrowed()[0].any()
    assert set(pack.state_dict()) == {"a", "bt"}
