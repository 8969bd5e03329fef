"""Which experts answer a prompt: the method's choice, a mixture that the client names, or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cram.model.attached import AttachedModel
from cram.model.state import ForwardState
from cram.routing.query import Query, Route, Routes
from cram.serve.engine.versions import Version
from cram.serve.request import Decision, Prompt, RequestError


class InstructedRoutes:
    """Routes by the instruction of the prompt that is being read; stands in for the method in
    `ForwardHooks.method`.

    A forward finds its instruction in the decoded prompt, where a question that holds a template's markers
    looks like several turns. Its image features, which come from the model's own pass, stay.

    Args:
        cram: The model's handle.
        routes: Who is asked.
    """

    def __init__(self, cram: AttachedModel, routes: Routes) -> None:
        self._cram, self._routes = cram, routes
        self._instruction: str | None = None
        self.uses_queries = routes.uses_queries

    @property
    def wants_visual_means(self) -> bool:
        """As the method."""
        return self._routes.wants_visual_means

    @contextmanager
    def reading(self, instruction: str) -> Iterator[None]:
        """Forwards inside read a prompt with this instruction."""
        self._instruction = instruction
        try:
            yield
        finally:
            self._instruction = None

    def route(self, query: Query | None, training: bool) -> Route:
        """The route of the query with the known instruction."""
        if query is not None and self._instruction is not None:
            text = self._cram.encoder.encode_text([self._instruction])
            query = replace(query, text=text.to(query.text.device).expand_as(query.text))
        return self._routes.route(query, training)


class Decider:
    """Decides for the experts that the model has at the moment of the call.

    Args:
        cram: The model's handle.
        routes: Who is asked for automatic routes.

    Attributes:
        routes: Who is to be asked by the forwards of the model.
    """

    def __init__(self, cram: AttachedModel, routes: Routes) -> None:
        self._cram = cram
        self.routes = InstructedRoutes(cram, routes)

    def routed(self, prompt: Prompt, mixture: Mapping[str, float] | None) -> AbstractContextManager[Any]:
        """The context in which a prompt is read.

        Raises:
            RequestError: If the mixture names an unknown expert, or the method cannot choose by itself.
        """
        if mixture is not None:
            gates = self._mixture(mixture)
            # Some methods also adapt the projector, which zero gates would not switch off.
            return self._cram.fixed(gates) if any(mixture.values()) else self._cram.disabled()
        self._check_automatic()
        if not self._cram.num_experts or not self._cram.method.uses_queries:
            return nullcontext()
        if self._cram.encoder.reuses_vision_tower:
            return self.routes.reading(self._instruction(prompt))
        return self._cram.fixed(self._automatic(prompt))

    def continued(self) -> ForwardState:
        """The state with which the answer to the prompt that has just been read is decoded.

        Rows of the base model share batches with others: there, zero gates stand for no experts.
        """
        cram, state = self._cram, self._cram.state
        if state.route is not None or not cram.num_experts:
            return state.continued()
        gates = torch.zeros(cram.num_layers, 1, cram.num_experts)
        return ForwardState(Route(gates, overrides_gating=True), cram.device, decoding=True)

    def splits(self, mixture: Mapping[str, float] | None) -> bool:
        """Whether a prompt may be read in pieces: no linear makes gates from the whole prompt."""
        return mixture is not None or not self._own_gates()

    def dry_run(self, prompt: Prompt, mixture: Mapping[str, float] | None, version: Version) -> Decision:
        """The decision for a prompt that is not answered.

        Raises:
            RequestError: As `routed`.
        """
        if mixture is not None:
            route: Route | None = Route(self._mixture(mixture).expand(self._cram.num_layers, 1, -1))
        else:
            self._check_automatic()
            route = self._automatic(prompt) if self._cram.num_experts else None
        return self.decision(route, mixture, version)

    def decision(
        self, route: Route | None, mixture: Mapping[str, float] | None, version: Version
    ) -> Decision:
        """What a route of one sample tells the client; experts with gate 0 in every layer are left out."""
        names = version.names
        mode = "automatic" if mixture is None else "mixture"
        if not names or (mixture is not None and not any(mixture.values())):
            mode = "base"
        group = None if route is None or route.groups is None else int(route.groups[0])
        if mixture is None and self._own_gates():
            return Decision(mode, version.number, group, None)
        columns = [] if route is None else route.gates[:, 0].cpu().t().tolist()
        named = zip(names if columns else (), columns, strict=True)
        return Decision(mode, version.number, group, {name: gates for name, gates in named if any(gates)})

    def _own_gates(self) -> bool:
        """Whether a linear makes gates of its own, or has experts that act alone."""
        modules = self._cram.modules.values()
        return any(module.gating is not None or module.solo is not None for module in modules)

    def _check_automatic(self) -> None:
        if self._cram.method.told_task:
            raise RequestError(
                f"lora must name the experts, got none: {self._cram.config.method!r} cannot choose"
            )

    def _automatic(self, prompt: Prompt) -> Route:
        query = None
        if self._cram.method.uses_queries:
            query = self._cram.encode([self._instruction(prompt)], [list(prompt.images)])
        return self.routes.route(query, False)

    def _instruction(self, prompt: Prompt) -> str:
        """The instruction as the forwards of training read it."""
        return self._cram.family.without_placeholders(prompt.instruction)

    def _mixture(self, mixture: Mapping[str, float]) -> Tensor:
        """Gates [E]."""
        names = self._cram.expert_names
        if unknown := sorted(mixture.keys() - set(names)):
            raise RequestError(f"lora must name experts among {names!r:.200}, got {unknown!r:.100}")
        return torch.tensor([float(mixture.get(name, 0.0)) for name in names])
