"""Memory that runs out while a prompt joins: the neighbour's answer is its own, or it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from cram.serve.engine.cache import RowCache
from cram.serve.engine.engine import Engine
from cram.serve.engine.limits import Limits
from cram.serve.request import Collector
from tests.cram.factories import routed_llava
from tests.cram.serve.engine.test_cache import HEADS, LAYERS, WIDTH, prefill
from tests.cram.serve.serving import ask, llava_prompt, offline, run

ALLOCATIONS = ("new_zeros", "new_empty", "clone")
COPIES = ("copy_", "__setitem__")


class Scarce(TorchFunctionMode):
    """The k-th call of some functions fails, counted from 0."""

    def __init__(self, names: tuple[str, ...], k: int) -> None:
        super().__init__()
        self._names, self._left = names, k

    @property
    def has_failed(self) -> bool:
        """Whether the call has come."""
        return self._left < 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, or fail."""
        if getattr(func, "__name__", "") in self._names:
            self._left -= 1
            if self._left == -1:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return func(*args, **(kwargs or {}))


@contextmanager
def scarce(method: str, mode: Scarce, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory is scarce in one method of the cache."""
    real = getattr(RowCache, method)

    def short(self: RowCache, *arguments: Any) -> Any:
        with mode:
            return real(self, *arguments)

    with patch.context() as inner:
        inner.setattr(RowCache, method, short)
        yield


@pytest.fixture(scope="module")
def served() -> Any:
    """A model, its processor, a short prompt with its answer, and prompts that make room by moves alone and
    by growth."""
    model, processor, _ = routed_llava()
    short = llava_prompt(processor, "How many?")
    moved, grown = llava_prompt(processor, "x" * 20), llava_prompt(processor, "x" * 300)
    return model, processor, short, offline(model, short, 60), {"move": moved, "grow": grown}


def fail_at(served: Any, how: str, mode: Scarce, patch: pytest.MonkeyPatch) -> tuple[Collector, Collector]:
    """The neighbour and the newcomer of a join in which memory is scarce."""
    model, processor, short, _, newcomers = served
    engine = Engine(model, processor, Limits(piece=4096))
    request, heard = ask(short, max_tokens=60)
    engine.submit(request)
    for _ in range(6):
        engine.turn()
    late, other = ask(newcomers[how], max_tokens=4)
    engine.submit(late)
    with scarce("join", mode, patch):
        run(engine, other)
    run(engine, heard)
    after, again = ask(short, max_tokens=4)
    engine.submit(after)
    run(engine, again)
    assert again.choices[0].token_ids == served[3][:4]
    engine._give_up()
    return heard, other


@pytest.mark.parametrize("how", ["move", "grow"])
@pytest.mark.parametrize("names", [ALLOCATIONS, COPIES], ids=["allocations", "copies"])
def test_a_newcomer_without_memory_changes_no_neighbour(
    served: Any, how: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    survivors, k = 0, 0
    while True:
        mode = Scarce(names, k)
        heard, other = fail_at(served, how, mode, monkeypatch)
        if not mode.has_failed:
            break
        assert other.failed is not None
        if heard.failed is None:
            assert heard.choices[0].token_ids == served[3], k
            survivors += 1
        k += 1
    assert other.failed is None and heard.choices[0].token_ids == served[3]
    assert k and (survivors == k or names == COPIES)


@pytest.mark.parametrize("k", range(2 * LAYERS))
def test_a_cache_that_has_grown_in_part_goes_on(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, made = RowCache(), prefill(30)
    cache.join(made, 1)
    with (
        scarce("join", Scarce(("new_zeros",), k), monkeypatch),
        pytest.raises(torch.OutOfMemoryError),
    ):
        cache.join(prefill(90), 1)
    assert cache.is_whole and cache.lengths() == [30]
    rows = torch.stack([layer.keys[0] for layer in made.layers])
    for _ in range(150):
        cache.reserve_column()
        new = torch.randn(LAYERS, 1, HEADS, 1, WIDTH)
        rows = torch.cat([rows, new[:, 0]], dim=2)
        for layer in range(LAYERS):
            keys, values = cache.update(new[layer], -new[layer], layer)
            assert torch.equal(keys[0], rows[layer])
            assert torch.equal(values[0, :, 30:], -rows[layer, :, 30:])
        cache.advance()
    cache.join(prefill(90), 1)
    assert cache.lengths() == [180, 90]


def test_a_layer_without_room_for_a_column_is_told() -> None:
    cache = RowCache()
    cache.join(prefill(30), 1)
    cache.end = cache.layers[0].keys.shape[2]
    with pytest.raises(AssertionError, match="room for a column"):
        cache.update(*(torch.zeros(1, HEADS, 1, WIDTH) for _ in range(2)), 0)


def test_a_row_that_cannot_be_removed_ends_its_batch_and_not_the_engine(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, short, expected, newcomers = served
    engine = Engine(model, processor, Limits(piece=4096))
    pairs = [ask(each, max_tokens=60) for each in (short, newcomers["move"])]
    for request, _ in pairs:
        engine.submit(request)
    for _ in range(4):
        engine.turn()
    pairs[0][0].cancel()
    with scarce("drop", Scarce(COPIES, 1), monkeypatch):
        engine.turn()
    assert pairs[1][1].failed is not None and pairs[1][1].started is not None
    assert engine.load == (0, 0)
    request, heard = ask(short, max_tokens=8)
    engine.submit(request)
    run(engine, heard)
    assert heard.choices[0].token_ids == expected[:8]
