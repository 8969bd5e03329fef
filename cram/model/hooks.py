"""The hooks of one attached model: how each forward is routed, and which state its linears read.

One forward:

    core pre-hook       remembers input_ids and attention_mask
    vision tower hook   keeps the pooled output (only where the encoder reuses the tower)
    language pre-hook   makes the forward's state: at prefill query -> method -> route; while decoding the
                        route of the prefill that made the KV cache
    attention pre-hook  tells the linears of its layer which state is theirs (only once gradients were wanted)
    ExpertLinear        reads the gates of its layer, or makes its own
    language hook       remembers the state with the KV cache that was built under it, and leaves the forward

The gates are fixed at prefill: the keys and values in a cache were made by the experts of that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cram.families import Family
from cram.model.cache import CacheStates, given_cache, made_cache
from cram.model.linear import ExpertLinear
from cram.model.override import Override, Overrides
from cram.model.state import Current, ForwardState
from cram.routing.means import without_autocast
from cram.routing.prompts import EXPLICIT, Call, PromptReader, real_tokens
from cram.routing.query import Query, Route, Routes, same_route
from cram.routing.threads import PerThread

# Travels with the keyword arguments from the language model to the attention blocks where gradients are
# wanted: checkpointing runs a layer again, maybe in another thread.
STATE = "cram_state"
# Paths that an error names.
LOST_SHOWN = 3
# Of gates that the same pictures give twice.
ROUNDING = 1e-3


class ForwardHooks:
    """Routes the forwards of one model.

    Attributes:
        method: Who is asked for a route; set once the model has its experts' modules.
        on_query: Called with every automatic query, before routing. With a listener, queries are read also
            for methods that do not use them.
        counted: False while the samples of a training forward stand in for a process's empty share.
        override: Used in this thread in place of the automatic route, if there is one.
    """

    method: Routes

    def __init__(
        self,
        model: Any,
        family: Family,
        modules: Mapping[str, ExpertLinear],
        num_layers: int,
        reader: PromptReader,
        current: Current,
    ) -> None:
        """Hooks the model.

        Args:
            model: The multimodal model.
            family: Where its parts are.
            modules: The adapted linears.
            num_layers: Decoder layers.
            reader: Reads the query of a forward; it has hooks of its own.
            current: Where the linears find the state of their forward.
        """
        self.on_query: list[Callable[[Query], None]] = []
        self.counted = True
        self._overrides = Overrides()
        self._modules = modules
        self._linear = next(iter(modules.values()))
        self._language = model.get_submodule(family.language_model)
        self._num_layers, self._reader, self._current = num_layers, reader, current
        self._image_token_id = int(model.config.image_token_id)
        self._caches = CacheStates()
        self._blocks_are_hooked = False
        # The first route of the generation that a thread is in, and its prompt.
        self._generation: PerThread[tuple[Route, Call] | None] = PerThread(None)
        self._handles = [*reader.register(model), *self._register(model, family)]

    @property
    def override(self) -> Override | None:
        """The override of this thread."""
        return self._overrides.mine

    def _register(self, model: Any, family: Family) -> list[Any]:
        core, language = model.get_submodule(family.core), self._language
        return [
            # Before the vision tower, which may be beyond recording.
            core.register_forward_pre_hook(self._check_recorded),
            language.register_forward_pre_hook(self._before_language, with_kwargs=True),
            language.register_forward_hook(self._after_language, always_call=True),
        ]

    def _register_blocks(self) -> None:
        """Hooks the attention blocks for good: hooks that come and go would trouble other threads."""
        self._handles += [
            layer.self_attn.register_forward_pre_hook(self._before_attention, with_kwargs=True)
            for layer in self._language.layers
        ]
        self._blocks_are_hooked = True

    def release(self) -> None:
        """Takes the hooks out of the model."""
        for handle in self._handles:
            handle.remove()

    @property
    def num_experts(self) -> int:
        """Experts, those in training included."""
        experts = self._linear.experts
        return 0 if experts is None else experts.num_experts

    @property
    def in_training(self) -> bool:
        """Whether an expert is being trained."""
        experts = self._linear.experts
        return experts is not None and experts.trained > 0

    @property
    def solo_in_training(self) -> bool:
        """Whether solo experts are being trained, so that no other expert acts."""
        return self._linear.solo is not None and self._linear.solo.trained > 0

    @property
    def _reads_prompts(self) -> bool:
        """Whether the gates of linears depend on tokens throughout a prompt, and not on the query alone."""
        return self._linear.gating is not None and self._linear.gating.reads_prompts

    @property
    def is_disabled(self) -> bool:
        """Whether forwards are exactly the base model's."""
        return self.override is not None and self.override.route is None

    @contextmanager
    def overridden(self, route: Route | None) -> Iterator[None]:
        """Every forward of this thread inside uses this route; None stands for none at all."""
        with self._overrides.entered(Override(route)):
            yield

    def adopt(self, cache: Any, state: ForwardState) -> None:
        """Forwards that continue `cache`, which was put together from rows of other caches, use `state`."""
        self._caches.adopt(cache, state)

    def check_route(self, route: Route, rows: int) -> None:
        """Refuse a route that does not fit the model or a forward of `rows` rows.

        Raises:
            ValueError: If the gates have another shape, or the rows are no multiple of the samples.
        """
        layers, samples, experts = route.gates.shape
        if experts != self.num_experts or layers != self._num_layers:
            wanted = f"[{self._num_layers}, S, {self.num_experts}]"
            raise ValueError(f"gates must be {wanted}, got {list(route.gates.shape)}")
        if not samples or rows % samples:
            raise ValueError(
                f"rows of a forward must be a multiple of the {samples} routed samples, got {rows}"
            )

    def _before_language(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Makes the forward's state; may make the embeddings require grad (see below)."""
        self._current.enter()
        call = self._reader.take()
        embeds = kwargs.get("inputs_embeds", kwargs.get("input_ids"))
        if embeds is None:
            embeds = args[0]
        cache = given_cache(kwargs)
        continued = cache if self._caches.is_filled(cache, embeds.shape[1]) else None
        training = module.training and (self.solo_in_training or self.in_training)
        # Queries and routes are made outside of traced graphs; a traced decode step only looks its state up.
        arguments = (call, kwargs, embeds, continued, module.training, training)
        make: Any = self._state if continued is not None else partial(_untraced, self._state)
        self._current.state = state = make(*arguments)
        if torch.is_grad_enabled():
            if not self._blocks_are_hooked:
                _untraced(self._register_blocks)
            kwargs = {**kwargs, STATE: state}
        differentiable = training and torch.is_grad_enabled() and embeds.is_floating_point()
        lacking = differentiable and not embeds.requires_grad
        if lacking and any(getattr(layer, "gradient_checkpointing", False) for layer in module.layers):
            # Reentrant checkpointing gives a frozen model no gradients at all unless its input requires one.
            kwargs = {**kwargs, "inputs_embeds": embeds.detach().requires_grad_()}
        return args, kwargs

    def _after_language(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the language model, also of a forward that raised, which has no output."""
        cache, state = made_cache(output), self._current.state
        if not self._current.leave() and output is not None:
            raise RuntimeError(
                "a forward inside of another one must begin in its hooks, got one that a pre-hook ended "
                "before; register that hook without `prepend`"
            )
        # A traced decode step leaves to its cache what is known of it.
        if cache is None or (state.decoding and torch.compiler.is_compiling()):
            return
        if not self._caches.is_remembered(cache, state):
            _untraced(self._caches.keep, cache, state)

    def _before_attention(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Tells the linears of a layer their state, also when checkpointing runs the layer again.

        A forward of another thread that runs while blocks are hooked may call the hook without `kwargs`.
        """
        if kwargs is None or STATE not in kwargs:
            return None
        self._current.state = kwargs[STATE]
        return args, {name: value for name, value in kwargs.items() if name != STATE}

    def _state(
        self,
        call: Call | None,
        kwargs: dict[str, Any],
        embeds: Tensor,
        continued: Any,
        training_mode: bool,
        training: bool,
    ) -> ForwardState:
        """The state of a forward; `continued` is the KV cache that it continues, or None."""
        routed = self.num_experts > 0 and not self.solo_in_training
        self._overrides.check()
        self._check_recorded()
        _check_positions(kwargs, embeds)
        if self.override is None and continued is not None:
            return (
                self._continued(call, continued, len(embeds), training_mode)
                if routed
                else ForwardState(decoding=True)
            )
        self._check_present()
        query = None
        minds_prompts = self.override is None and routed and (self.method.uses_queries or self._reads_prompts)
        if minds_prompts:
            self._check_first(call, kwargs)
        if self.override is not None:
            route = self.override.route if routed else None
        else:
            query = self._query(call, routed)
            route = self._route(query, training_mode) if routed else None
            self._check_generation(call, route)
        if route is not None:
            self.check_route(route, embeds.shape[0])
        prefill = self._caches.get(continued)
        made = ForwardState(
            route,
            embeds.device,
            query=query,
            memory=None if prefill is None or prefill.route is None or route is None else prefill.memory,
            disabled=self.is_disabled,
            visual=self._visual(call) if training and self.method.wants_visual_means else None,
            mask=None if continued is not None else self._real_tokens(call, kwargs, embeds),
            decoding=continued is not None,
        )
        made.counted = self.counted
        if minds_prompts and call is not None and call.input_ids is not None:
            made.prompt = Call(call.input_ids, call.mask)
            made.turn_is_open = not training_mode and self._is_part(call, call, embeds.shape[1])
        return made

    def _continued(self, call: Call | None, cache: Any, rows: int, training_mode: bool) -> ForwardState:
        """The state of the prefill that made a KV cache."""
        state = self._caches.get(cache)
        if state is None or state.route is None:
            raise ValueError(
                f"the KV cache must come from a routed prefill of this model, got another; {EXPLICIT}"
            )
        self.check_route(state.route, rows)
        if self._caches.has_moved_rows(cache):
            raise ValueError(
                "rows of a KV cache must stay at their places, because each has the route of its prompt; got "
                f"a reordered cache; {EXPLICIT}"
            )
        tokens = 1 if call is None or call.input_ids is None else call.input_ids.shape[1]
        if (self.method.uses_queries or self._reads_prompts) and (
            tokens > 1 or state.turn_is_open or self._caches.is_cut_short(cache, state)
        ):
            _untraced(self._check_more, call, state, cache, training_mode)
        return state

    def _check_more(self, call: Call, state: ForwardState, cache: Any, training_mode: bool) -> None:
        """Refuses tokens behind a cache that give their sample another route.

        These are the next part of a prompt, another question behind a prompt that is used again, or guesses
        of assisted generation. The cache was made under the route of its prefill.
        """
        if self._reader.visual_tokens(call):
            raise ValueError(
                f"images must all be in the prefill, got image tokens behind a KV cache; {EXPLICIT}"
            )
        prompt, query = state.prompt, state.query
        if prompt is None or prompt.input_ids is None or state.route is None:
            return
        held = int(cache.get_seq_length())
        whole = prompt.followed_by(call, len(prompt.input_ids) if query is None else len(query), held)
        if query is not None:
            route = self._route(self._reader.query_of_more(whole, query), training_mode)
        if (query is not None and not same_route(route, state.route)) or (
            self._reads_prompts and self._reader.continues_prompt(call, whole, held)
        ):
            raise ValueError(
                "the prompt must be in one prefill, got tokens behind a KV cache that change its route; "
                f"{EXPLICIT}"
            )
        state.prompt = whole
        assert call.input_ids is not None
        state.turn_is_open = self._is_part(call, whole, held + call.input_ids.shape[1])

    def _route(self, query: Query | None, training_mode: bool) -> Route:
        """The method's route; what older tasks were merged to knows nothing of an expert in training."""
        alone = training_mode or (self.in_training and self._linear.solo is not None)
        with nullcontext() if query is None else without_autocast(query.text.device):
            return self.method.route(query, alone)

    def _is_part(self, call: Call, whole: Call, tokens: int) -> bool:
        """Whether more of a prompt may follow a forward, behind which its cache holds so many tokens.

        `generate` tells how long the prompt is. Elsewhere nothing tells a generated token from the next one
        of an open question.
        """
        if call.prompt_tokens is not None:
            return tokens < call.prompt_tokens
        return self._reader.leaves_turn_open(whole)

    @contextmanager
    def generating(self, prompt_tokens: int | None) -> Iterator[None]:
        """Forwards of this thread inside belong to a generation behind a prompt of so many tokens."""
        before = self._generation.get()
        self._generation.set(None)
        try:
            with self._reader.generating(prompt_tokens):
                yield
        finally:
            self._generation.set(before)

    def _check_generation(self, call: Call | None, route: Route | None) -> None:
        """Refuses a second prompt in one generation, as of guidance, that would have other experts."""
        if call is None or call.prompt_tokens is None or route is None or call.input_ids is None:
            return
        first, prompt = self._generation.get() or (route, call.prompt())
        self._generation.set((first, prompt))
        # A generation without a cache reads its pictures anew for every token, on a GPU up to rounding.
        same = not self.method.uses_queries or same_route(route, first, ROUNDING)
        if self._reads_prompts and prompt.input_ids is not None:
            same &= torch.equal(prompt.input_ids, call.input_ids[:, : call.prompt_tokens])
        if not same:
            raise ValueError(
                "all prompts of one generation must have one route, got another prompt (guidance_scale, "
                f"negative_prompt_ids) with another route; {EXPLICIT}"
            )

    def _check_recorded(self, *_: Any) -> None:
        """Refuses to record a forward as a graph that would keep the route of its example."""
        recorded = torch.jit.is_tracing() or torch.compiler.is_exporting()  # type: ignore[attr-defined]
        if recorded and self.override is None and self.num_experts > 0 and not self.solo_in_training:
            raise ValueError(
                "a recorded forward (torch.jit.trace, torch.export) must have a route for all inputs; "
                f"{EXPLICIT}"
            )

    def _check_present(self) -> None:
        """Refuses a prompt or a step where an adapted linear is lost: its experts would not act."""
        if self.is_disabled or not (self.num_experts or self.solo_in_training):
            return
        present = set(self._language.modules())
        lost = [path for path, linear in self._modules.items() if linear not in present]
        if lost:
            named = ", ".join(lost[:LOST_SHOWN]) + " and others" * (len(lost) > LOST_SHOWN)
            raise ValueError(
                f"adapted linears must stay in the model, got another module in place of {named}; put it "
                "back and set its `base` to exchange the frozen linear, or call `cram.detach(model)` before"
            )

    def _check_first(self, call: Call | None, kwargs: dict[str, Any]) -> None:
        """Refuses to route a cache by a first token alone: it is a prompt that comes token by token."""
        single = call is not None and call.input_ids is not None and call.input_ids.shape[1] == 1
        if single and given_cache(kwargs) is not None:
            raise ValueError(
                f"the prompt must be in one prefill, got its first token alone; {EXPLICIT}, or leave out "
                "prefill_chunk_size"
            )

    def _query(self, call: Call | None, routed: bool) -> Query | None:
        """The automatic query of a prefill or training forward, where somebody wants it."""
        if not self.on_query and not (routed and self.method.uses_queries):
            return None
        query = self._reader.query(call)
        for observer in self.on_query:
            observer(query)
        return query

    def _real_tokens(self, call: Call | None, kwargs: dict[str, Any], embeds: Tensor) -> Tensor | None:
        """Positions [B, T] (bool) that are not padding, or None where nothing says which those are."""
        mask = None if call is None else call.mask
        if mask is None:
            mask = real_tokens(kwargs.get("attention_mask"), *embeds.shape[:2])
        return None if mask is None else mask.to(embeds.device)

    def _visual(self, call: Call | None) -> Tensor:
        if call is None or call.input_ids is None:
            raise ValueError("the penalty must see input_ids to find the visual tokens, got embeddings")
        return visual_token_mask(call.input_ids, self._image_token_id, call.mask)


def _untraced(do: Callable[..., Any], *arguments: Any) -> Any:
    """What `do` returns; a graph that is being traced leaves it out."""
    if torch.compiler.is_compiling():
        from cram.model.untraced import done

        return done(do, *arguments)
    return do(*arguments)


def _check_positions(kwargs: Mapping[str, Any], embeds: Tensor) -> None:
    """Refuses positions of other tokens; Qwen's models make one per token of a mask, cached ones too."""
    positions, tokens = kwargs.get("position_ids"), embeds.shape[1]
    if positions is not None and positions.shape[-1] not in (1, tokens):
        raise ValueError(
            f"position_ids must be those of the {tokens} new tokens, got {positions.shape[-1]}; give them "
            "to a forward behind a KV cache, and leave out guidance_scale, which gives none"
        )


def visual_token_mask(input_ids: Tensor, image_token_id: int, attention_mask: Tensor | None = None) -> Tensor:
    """Visual-token positions [B, T] (bool) of expanded input ids [B, T], without padding."""
    mask = input_ids == image_token_id
    return mask if attention_mask is None else mask & attention_mask.bool()
