"""Routing the forwards of one attached model.

One forward:

    core pre-hook      remembers input_ids and attention_mask
    vision tower hook  keeps the pooled output (only where the encoder reuses the tower)
    language pre-hook  at prefill: query -> method -> route; while decoding: the route of that prefill
    ExpertLinear       reads the gates of its layer, or makes its own
    language hook      remembers the route with the KV cache that was built under it

The gates are fixed at prefill: the keys and values in a cache were made by the experts of that moment.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cram.config import CramConfig
from cram.families import Family, Matched, family_of, match_linears
from cram.methods import METHODS, Method
from cram.methods.parts.penalty import HistoryBases, Penalty
from cram.model.linear import ExpertLinear, LayerState
from cram.model.stack import join_siblings
from cram.routing.clip import ClipEncoder
from cram.routing.prompts import Call, PromptReader
from cram.routing.query import Query, Route
from cram.routing.router import Router

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class _Override:
    """A route that every forward uses instead of the automatic one; None switches the experts off."""

    route: Route | None
    query: Query | None = None


class RoutedForward:
    """The adapted linears of one model, its hooks, and how each forward is routed.

    Attributes:
        config: The configuration.
        method: The method that `config.method` names; it routes every forward.
        router: Groups, centroids and the current route.
        encoder: The CLIP encoder.
        family: The model family.
        modules: Full module path -> adapted linear, in model order.
        report: What was matched.
        vision_tower: The model's vision tower.
        projector: The module that turns its output into embeddings, or None where the tower contains it.
        locked_group: The group that CRAM's automatic routing uses while the model is in training mode; None
            routes every sample by its own text.
        on_query: Called with every automatic query, before routing; with a listener queries are read also for
            methods that do not use them.
        last_query: The last automatic query.
    """

    method: Method

    def __init__(self, model: Any, config: CramConfig, encoder: ClipEncoder, processor: Any = None) -> None:
        """Wraps the matched linears and hooks the model; call `attach` instead."""
        if config.method not in METHODS:
            raise ValueError(f"method must be one of {sorted(METHODS)}, got {config.method!r}")
        self.config, self.encoder = config, encoder
        self.family: Family = family_of(model)
        self.report: Matched = match_linears(model, self.family, config.target_projections)
        self.router = Router(config, self.report.num_layers)
        self.locked_group: int | None = None
        self.on_query: list[Callable[[Query], None]] = []
        self.last_query: Query | None = None
        self.modules: dict[str, ExpertLinear] = {}
        self._image_token_id = int(model.config.image_token_id)
        self._state = LayerState()
        self._override: _Override | None = None
        self._penalty: Penalty | None = None
        self._bases = HistoryBases()
        self._routes: weakref.WeakKeyDictionary[Any, Route] = weakref.WeakKeyDictionary()
        self._route: Route | None = None
        self._reader = PromptReader(model, self.family, encoder, processor)
        self._required_grad = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        self.vision_tower: nn.Module = model.get_submodule(self.family.vision_tower)
        projector = self.family.projector
        self.projector: nn.Module | None = None if projector is None else model.get_submodule(projector)
        for path, (layer, linear) in self.report.modules.items():
            self.modules[path] = ExpertLinear(linear, layer, path, self._state, config.dropout).train(
                linear.training
            )
            model.set_submodule(path, self.modules[path])
        join_siblings(self.modules)
        self.router.to(next(iter(self.modules.values())).weight.device)
        self._hooks = self._register(model)

    def __getstate__(self) -> dict[str, Any]:
        """Copies leave out routes, whose gates belong to a live autograd graph or to the caches of another
        model."""
        return {**self.__dict__, "_route": None, "_routes": weakref.WeakKeyDictionary()}

    @property
    def num_experts(self) -> int:
        """Experts, the one in training included."""
        return len(self.router.expert_names)

    @property
    def in_training(self) -> bool:
        """Whether an expert is being trained."""
        experts = next(iter(self.modules.values())).experts
        return experts is not None and experts.trained > 0

    @property
    def is_disabled(self) -> bool:
        """Whether forwards are exactly the base model's, inside `disabled`."""
        return self._override is not None and self._override.route is None

    def encode(self, instructions: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Query:
        """The query of S samples from their instructions and images, for every family; see
        `ClipEncoder.encode`."""
        return self.encoder.encode(instructions, images)

    def route(self, query: Query, group: int | None = None) -> Route:
        """The method's route of a query outside of training; a forward uses it inside `fixed`.

        Args:
            query: Features of S samples.
            group: CRAM's instruction group of all samples; None assigns one to each. See `Router.route`.
        """
        return self.method.route(query, False) if group is None else self.router.route(query, group)

    @contextmanager
    def fixed(self, route: Route | Tensor) -> Iterator[Route]:
        """Every forward inside uses this route, prefill and decode, whatever its inputs.

        Args:
            route: A route of S samples, or gates [E], [S, E] or [L, S, E]. A forward of B rows takes row b
                for sample b // (B / S), so beams and returned sequences need no care. Gates are final (see
                `Route`); a route made by the method is not. The penalty is available only under the router's
                current route, whose query is known.

        Raises:
            ValueError: If the gates have the wrong shape or are not finite.
        """
        with self._overridden(_Override(*self._as_route(route))) as override:
            assert override.route is not None
            yield override.route

    @contextmanager
    def forced(self, expert: str | int) -> Iterator[Route]:
        """Every forward inside uses one expert alone, with weight 1, by name or index.

        Raises:
            ValueError: If there is no such expert.
        """
        names = self.router.expert_names
        index = names.index(expert) if expert in names else expert
        if not isinstance(index, int) or not 0 <= index < len(names):
            raise ValueError(f"expert must be one of {names} or an index below {len(names)}, got {expert!r}")
        gates = torch.zeros(self.router.num_layers, 1, len(names))
        gates[:, :, index] = 1.0
        route = Route(gates, torch.tensor([self.router.expert_groups[index]]), final=True)
        with self.fixed(route) as fixed:
            yield fixed

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Every forward inside is exactly the base model's."""
        with self._overridden(_Override(None)):
            yield

    @contextmanager
    def training_group(self, group: int) -> Iterator[None]:
        """Automatic routing in training mode uses this group inside; see `locked_group`."""
        before, self.locked_group = self.locked_group, group
        try:
            yield
        finally:
            self.locked_group = before

    @property
    def _buffered(self) -> bool:
        return next(iter(self.modules.values())).buffer is not None

    def _register(self, model: Any) -> list[Any]:
        core = model.get_submodule(self.family.core)
        language = model.get_submodule(self.family.language_model)
        hooks = [
            core.register_forward_pre_hook(self._reader.before_core, with_kwargs=True),
            language.register_forward_pre_hook(self._before_language, with_kwargs=True),
            language.register_forward_hook(self._after_language),
        ]
        if self.encoder.reuses_vision_tower:
            tower = model.get_submodule(self.family.vision_tower)
            hooks.append(tower.register_forward_hook(self._reader.after_tower))
        return hooks

    def release(self, model: Any) -> None:
        """Takes hooks and adapted linears out of the model again; call `detach` instead."""
        self.method.release()
        for hook in self._hooks:
            hook.remove()
        for path, module in self.modules.items():
            model.set_submodule(path, module.base.train(module.training))
        for parameter in self._required_grad:
            parameter.requires_grad_(True)

    def _before_language(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Sets the layers' state for this forward; may make the embeddings require grad (see below)."""
        call = self._reader.take()
        embeds = kwargs.get("inputs_embeds", kwargs.get("input_ids"))
        if embeds is None:
            embeds = args[0]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        route = self._choose(call, cache, past, module.training)
        if route is not None:
            self._check_route(route, embeds.shape[0])
            self.router.current = route
            made = self._routes.get(cache) if past else None
            route = replace(route, memory=dict(route.memory) if made is None else made.memory)
        self._route = route
        training = module.training and (self._buffered or self.in_training)
        self._state.begin(
            route,
            embeds.device,
            disabled=self.is_disabled,
            visual=self._visual(call) if training else None,
            mask=None if past else _real_tokens(call, kwargs, embeds),
            decoding=bool(past),
        )
        checkpointed = any(getattr(layer, "gradient_checkpointing", False) for layer in module.layers)
        differentiable = training and torch.is_grad_enabled() and embeds.is_floating_point()
        if differentiable and checkpointed and not embeds.requires_grad:
            # Reentrant checkpointing gives a frozen model no gradients at all unless its input requires one.
            return args, {**kwargs, "inputs_embeds": embeds.detach().requires_grad_()}
        return None

    def _after_language(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self._route is not None:
            self._routes[cache] = self._route

    def _choose(self, call: Call | None, cache: Any, past: int, training: bool) -> Route | None:
        """The route of this forward; None where no expert acts."""
        routed = bool(self.num_experts) and not self._buffered
        if self._override is not None:
            if self._override.route is None or not routed:
                return None
            self.router.query = self._override.query
            return self._override.route
        if past:
            if routed and cache not in self._routes:
                raise ValueError(
                    "past_key_values must come from a routed prefill of this model, got an unknown cache"
                )
            if routed and self.method.uses_queries and self._more_images(call):
                raise ValueError(
                    "images must all be in the prefill, got image tokens behind a cache; use cram.fixed"
                )
            return self._routes[cache] if routed else None
        query = None
        if self.on_query or (routed and self.method.uses_queries):
            query = self.last_query = self._reader.query(call)
            for observer in self.on_query:
                observer(query)
        return self.method.route(query, training) if routed else None

    def _more_images(self, call: Call | None) -> bool:
        decoding = call is None or call.input_ids is None or call.input_ids.shape[1] == 1
        return not decoding and self._reader.visual_tokens(call)

    def _visual(self, call: Call | None) -> Tensor | None:
        """Visual-token positions for the penalty, or None where no penalty is due."""
        if self._penalty is None or not self._penalty.needed:
            return None
        if call is None or call.input_ids is None:
            raise ValueError("the penalty must see input_ids to find the visual tokens, got embeddings")
        return visual_token_mask(call.input_ids, self._image_token_id, call.attention_mask)

    def _check_route(self, route: Route, rows: int) -> None:
        layers, samples, experts = route.gates.shape
        if experts != self.num_experts or layers != self.router.num_layers:
            wanted = f"[{self.router.num_layers}, S, {self.num_experts}]"
            raise ValueError(f"gates must be {wanted}, got {list(route.gates.shape)}")
        if not samples or rows % samples:
            raise ValueError(
                f"rows of a forward must be a multiple of the {samples} routed samples, got {rows}"
            )

    def _as_route(self, route: Route | Tensor) -> tuple[Route, Query | None]:
        if isinstance(route, Route):
            query = self.router.query if route is self.router.current else None
        else:
            gates, query = route.float(), None
            gates = gates[None] if gates.dim() == 1 else gates
            gates = gates.expand(self.router.num_layers, -1, -1) if gates.dim() == 2 else gates
            if gates.dim() != 3:
                raise ValueError(f"gates must be [E], [S, E] or [L, S, E], got {list(route.shape)}")
            route = Route(gates, torch.full((gates.shape[1],), -1, device=gates.device), final=True)
        self._check_route(route, route.gates.shape[1])
        if not bool(torch.isfinite(route.gates).all()):
            raise ValueError("gates must be finite, got NaN or Inf")
        return route, query

    @contextmanager
    def _overridden(self, override: _Override) -> Iterator[_Override]:
        before, self._override = self._override, override
        try:
            yield override
        finally:
            self._override = before


def _real_tokens(call: Call | None, kwargs: dict[str, Any], embeds: Tensor) -> Tensor | None:
    """Positions [B, T] (bool) that are not padding, or None where nothing says which those are."""
    mask = kwargs.get("attention_mask") if call is None or call.input_ids is None else call.attention_mask
    if not isinstance(mask, Tensor) or mask.shape != embeds.shape[:2]:
        return None
    return mask.to(embeds.device).bool()


def visual_token_mask(input_ids: Tensor, image_token_id: int, attention_mask: Tensor | None = None) -> Tensor:
    """Visual-token positions [B, T] (bool) of expanded input ids [B, T], without padding."""
    mask = input_ids == image_token_id
    return mask if attention_mask is None else mask & attention_mask.bool()
