"""What one forward knows: how it was routed, and what its linears left behind.

Every forward gets a `ForwardState` of its own, which the linears read and the loss reads after them. It is
never changed into another forward's: two forwards may run before their backwards, and gradient checkpointing
runs a layer again during the backward with the state of its forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cram.routing.prompts import Call
from cram.routing.query import Query, Route
from cram.routing.threads import PerThread
from cram_kernels import visual_mean


class ForwardState:
    """One forward of an attached model.

    Attributes:
        route: How the experts act; None where none acts.
        query: The features that were read from the forward's own inputs, or None.
        gates: Per decoder layer the route's gates [S, E]; None without a route.
        features: The route's features [S, F], or None.
        disabled: Whether the experts are switched off, so that every linear is its base linear.
        visual: Visual-token positions [B, T] (bool) where the loss needs the inputs' means, else None.
        hidden: By module path the visual-token mean [B, D_in] of the module's input. Detached: the input
            carries a graph only where gradient checkpointing is off.
        mask: Real tokens [B, T] (bool) of a prefill or training forward; None for all.
        memory: What `once` holds; it lives with the KV cache that is made under it.
        decoding: Whether the forward continues a KV cache.
        counted: Whether its samples count in what methods gather over a task; see `ForwardHooks.counted`.
        calls: What the linears of these decode steps have bound, or None where every call is made anew; see
            `cram.model.stack.Bound`.
        prompt: What the query was read from, where that was the forward's own input; grows with its turn.
        turn_is_open: True if more of the question may follow. A single token is then a part of the question,
            and else a generated one.
    """

    turn_is_open = False
    counted = True

    def __init__(
        self,
        route: Route | None = None,
        device: torch.device | str = "cpu",
        *,
        query: Query | None = None,
        memory: dict[str, Tensor] | None = None,
        disabled: bool = False,
        visual: Tensor | None = None,
        mask: Tensor | None = None,
        decoding: bool = False,
    ) -> None:
        """Puts the route's tensors on `device`; `memory` replaces a copy of the route's."""
        features = None if route is None else route.features
        self.route, self.query = route, query
        self.gates = None if route is None else route.gates.to(device).unbind(0)
        self.features = None if features is None else features.to(device)
        self.memory = memory if memory is not None else dict(route.memory) if route is not None else {}
        self.disabled, self.visual, self.mask, self.decoding = disabled, visual, mask, decoding
        self.hidden: dict[str, Tensor] = {}
        self._pooled: tuple[Tensor, Tensor] | None = None
        self._gathered: set[str] = set()
        self.prompt: Call | None = None
        self.calls: dict[Any, Any] | None = None

    @property
    def overrides_gating(self) -> bool:
        """Whether the route's gates are used as they are; see `Route.overrides_gating`."""
        return self.route is not None and self.route.overrides_gating

    @property
    def differs_by_row(self) -> bool:
        """Whether the rows of a batch have gates of their own."""
        return bool(self.memory) or (self.route is not None and self.route.gates.shape[1] > 1)

    def continued(self) -> ForwardState:
        """The state of the decode steps that continue this forward's KV cache: its route and its memory."""
        state = copy.copy(self)
        state.decoding, state.mask, state.visual = True, None, None
        state.hidden, state._pooled = {}, None
        return state.repeated()

    def repeated(self) -> ForwardState:
        """This state, for decode steps of which each makes the same calls as the one before."""
        self.calls = {}
        return self

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returned at the prefill of this cache; outside of decoding it is made anew.

        A generation's rows are those of its prefill, so the tensor fits every decode step; it has no gradient
        there.

        Args:
            name: Unlike all other names of the model: put the module's path in front.
            make: Computes the tensor from the prefill's whole input.

        Raises:
            ValueError: If the cache was made by a forward that made no such tensor.
        """
        if self.decoding:
            if name not in self.memory:
                raise ValueError(f"{name} must come from the prefill of the cache, got a cache without it")
            return self.memory[name]
        made = make()
        self.memory[name] = made.detach()
        return made

    def counts(self, name: str) -> bool:
        """Whether the module `name` may gather from this forward.

        It may once, because checkpointing runs a layer twice. It may not if the samples do not count; see
        `counted`.
        """
        if not self.counted or name in self._gathered:
            return False
        self._gathered.add(name)
        return True

    def keep_visual_mean(self, name: str, x: Tensor) -> None:
        """Keep the mean of x [B, T, D_in] over its visual tokens as `hidden[name]`, where it is wanted.

        Linears that read the same input (q, k and v) share one mean.
        """
        if self.visual is None:
            return
        if self._pooled is None or self._pooled[0] is not x:
            self._pooled = (x, visual_mean(x.detach(), self.visual.to(x.device)))
        self.hidden[name] = self._pooled[1]


class Running(NamedTuple):
    """What one thread runs.

    Attributes:
        state: What linears read.
        newest: The state of the forward that began or ended last.
        outer: The states to which the forwards that run now return, the outermost first.
    """

    state: ForwardState
    newest: ForwardState
    outer: tuple[ForwardState, ...] = ()


class Current:
    """Which state the linears of one model read, in each thread its own.

    The hooks of `cram.model.hooks` enter a forward's state and leave it. A forward may run inside another
    one, in a hook of the user; the outer one then goes on with its own state. With gradients the state is set
    again before every attention block, because checkpointing runs blocks again in an order of its own.
    """

    def __init__(self) -> None:
        """No forward has run yet."""
        before_any = ForwardState()
        self._running: PerThread[Running] = PerThread(Running(before_any, before_any))

    @property
    def state(self) -> ForwardState:
        """What this thread's linears read; a state without a route before the first forward."""
        return self._running.get().state

    @state.setter
    def state(self, state: ForwardState) -> None:
        """Sets the state of this thread's linears."""
        self._running.set(Running(state, state, self._running.get().outer))

    @property
    def newest(self) -> ForwardState:
        """The state of this thread's newest forward, or what was set last."""
        return self._running.get().newest

    def enter(self) -> None:
        """A forward of this thread begins; its state is set next."""
        state, newest, outer = self._running.get()
        self._running.set(Running(state, newest, (*outer, state)))

    def leave(self) -> bool:
        """The innermost forward of this thread ends, with an error or without; False if none had begun."""
        state, _, outer = self._running.get()
        if not outer:
            return False
        # Behind the outermost forward its linears may be called by hand.
        self._running.set(Running(outer[-1] if len(outer) > 1 else state, state, outer[:-1]))
        return True
