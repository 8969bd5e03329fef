"""`AttachedModel`: the handle through which experts are added, trained and made to act."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from cram.config import CramConfig
from cram.families import Family, Matched, family_of, match_linears
from cram.model.factors import Factors, check_factors
from cram.model.frozen.identity import base_values
from cram.model.hooks import ForwardHooks
from cram.model.linear import ExpertLinear
from cram.model.stack import join_stacks
from cram.model.state import Current, ForwardState
from cram.routing.clip import ClipEncoder
from cram.routing.pictures import through_tiles
from cram.routing.prompts import PromptReader
from cram.routing.query import Query, Route, Routes
from cram.values import Values
from cram_kernels import PackedExperts

if TYPE_CHECKING:
    from PIL import Image


class BoundMethod(Routes, Protocol):
    """The part of a method that the handle uses; `cram.methods.base.Method` has all of it."""

    def extra_parameters(self) -> list[nn.Parameter]:
        """What the method trains beside factors and gatings."""

    def experts_replaced(self) -> None:
        """Forget what belonged to the experts before."""

    def release(self) -> None:
        """Take out of the model what the method has put there."""


class AttachedModel:
    """The experts of one model, `model.cram`.

    Attributes:
        config: The configuration.
        method: The method that `config.method` names; it routes every forward. `attach` sets it.
        processor: The model's processor or tokenizer, or None where `attach` was given none.
        encoder: The CLIP encoder.
        family: The model family.
        report: What was matched.
        modules: Full module path -> adapted linear, in model order.
        num_layers: Decoder layers.
        expert_names: Names of all experts, in the order in which they were added.
        pool: Replaced by a new object whenever the experts are replaced, and kept when one is appended.
        hooks: Routes the forwards.
        vision_tower: The model's vision tower.
        own_methods: Methods that stood on the model itself before `attach`, and stand there again after
            `detach`.
        projector: The module that turns its output into embeddings, or None where the tower contains it.
    """

    def __init__(self, model: Any, config: CramConfig, encoder: ClipEncoder, processor: Any = None) -> None:
        """Freezes the model, wraps the matched linears and hooks the model; call `attach` instead."""
        self.config, self.encoder, self.processor = config, encoder, processor
        self._model = model
        self.family: Family = family_of(model)
        self.report: Matched = match_linears(model, self.family, config.target_projections)
        self.num_layers = self.report.num_layers
        self.expert_names: list[str] = []
        self.pool = object()
        self.vision_tower: nn.Module = model.get_submodule(self.family.vision_tower)
        projector = self.family.projector
        self.projector: nn.Module | None = None if projector is None else model.get_submodule(projector)
        self._required_grad = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        self._values_at_attach = base_values(model)
        self._current = Current()
        self.modules: dict[str, ExpertLinear] = {}
        for path, (layer, linear) in self.report.modules.items():
            adapted = ExpertLinear(linear, layer, path, self._current, config.dropout)
            self.modules[path] = adapted.train(linear.training)
            model.set_submodule(path, adapted)
        join_stacks(self.modules)
        reader = PromptReader(model, self.family, encoder, processor)
        self.hooks = ForwardHooks(model, self.family, self.modules, self.num_layers, reader, self._current)
        self._method: BoundMethod | None = None
        self.own_methods: dict[str, Any] = {}

    @property
    def method(self) -> Any:
        """The method; None until `attach` has set it."""
        return self._method

    @method.setter
    def method(self, method: BoundMethod) -> None:
        """Binds the method, once."""
        self._method = self.hooks.method = method

    @property
    def device(self) -> torch.device:
        """Device that the first adapted linear computes on."""
        return next(iter(self.modules.values())).device

    @property
    def base_values(self) -> Values:
        """Some values of every weight of the base, as `cram.model.frozen.identity` compares them.

        They are those at `attach` where a weight has been sharded, quantised or offloaded since.
        """
        return {**self._values_at_attach, **base_values(self._model)}

    @property
    def num_experts(self) -> int:
        """Experts, those in training included."""
        return len(self.expert_names)

    @property
    def in_training(self) -> bool:
        """Whether an expert is being trained."""
        return self.hooks.in_training

    @property
    def is_disabled(self) -> bool:
        """Whether forwards are exactly the base model's, inside `disabled`."""
        return self.hooks.is_disabled

    @property
    def state(self) -> ForwardState:
        """The state of this thread's newest forward, a new object for every prefill and training forward."""
        return self._current.newest

    def encode(self, instructions: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Query:
        """The query of S samples from their instructions and images, for every family; see
        `ClipEncoder.encode`.

        InternVL's processor stretches a picture to square tiles, and a forward reads nothing else. With such
        a processor the pictures are read as it leaves them here, too.
        """
        if self.family.pixels == "tiles" and hasattr(self.processor, "image_token"):
            images = [[through_tiles(each, self.processor) for each in sample] for sample in images]
        return self.encoder.encode(instructions, images)

    def answer(self, images: Any, question: str, **options: Any) -> Any:
        """Answers a question about some images, greedily and by the method's own route.

        Args:
            images: One image or several, opened or as paths; None for a question without a picture.
            question: The user's turn without image placeholders.
            options: `max_new_tokens`, `expert` and `processor`; see `answers.predict.answer_all`.

        Returns:
            A `cram.learning.answers.predict.Answer`: `text`, `group`, and `gates` by expert.
        """
        # Prompts belong to a room above this one, which is loaded by the first question.
        predict = import_module("cram.learning.answers.predict")
        return predict.answer(self._model, question, images, **options)

    def route(self, query: Query) -> Route:
        """The method's route of a query outside of training; a forward uses it inside `fixed`."""
        route: Route = self.method.route(query, False)
        return route

    @contextmanager
    def fixed(self, route: Route | Tensor) -> Iterator[Route]:
        """Every forward inside uses this route, prefill and decode, whatever its inputs.

        This holds in the calling thread, so that threads may use routes of their own at once. A thread that
        is started inside must enter a route itself; its forwards are refused until it does.

        Args:
            route: A route of S samples, or gates [E], [S, E] or [L, S, E]. A forward of B rows takes row b
                for sample b // (B / S), so beams and returned sequences need no care. Gates override gatings
                and solo experts (see `Route`); a route made by the method does not.

        Raises:
            ValueError: If the gates have the wrong shape or are not finite.
        """
        fixed = route if isinstance(route, Route) else self._as_route(route)
        self.hooks.check_route(fixed, fixed.gates.shape[1])
        if not bool(torch.isfinite(fixed.gates).all()):
            raise ValueError("gates must be finite, got NaN or Inf")
        with self.hooks.overridden(fixed):
            yield fixed

    @contextmanager
    def forced(self, expert: str | int) -> Iterator[Route]:
        """Every forward inside uses one expert alone, with weight 1, by name or index.

        Raises:
            ValueError: If there is no such expert.
        """
        names = self.expert_names
        index = names.index(expert) if expert in names else expert
        if not isinstance(index, int) or not 0 <= index < len(names):
            raise ValueError(f"expert must be one of {names} or an index below {len(names)}, got {expert!r}")
        with self.fixed(torch.eye(len(names))[index]) as route:
            yield route

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Every forward inside is exactly the base model's."""
        with self.hooks.overridden(None):
            yield

    def _as_route(self, given: Tensor) -> Route:
        gates = given.float()
        gates = gates[None] if gates.dim() == 1 else gates
        gates = gates.expand(self.num_layers, -1, -1) if gates.dim() == 2 else gates
        if gates.dim() != 3:
            raise ValueError(f"gates must be [E], [S, E] or [L, S, E], got {list(given.shape)}")
        return Route(gates, overrides_gating=True)

    @property
    def shares_a(self) -> bool:
        """Whether all experts of a module have one and the same A."""
        packs = [module.experts for module in self.modules.values()]
        return all(pack is not None and pack.shared_a for pack in packs)

    def expert_weights(self, index: int) -> dict[str, Factors]:
        """Module path -> (a [r, D_in], b [D_out, r]) of one expert, detached."""
        return {path: module.factors([index])[0] for path, module in self.modules.items()}

    def expert_ranks(self, index: int) -> dict[str, int]:
        """Module path -> rank of one expert."""
        return {path: a.shape[0] for path, (a, _) in self.expert_weights(index).items()}

    def add_expert(self, name: str, weights: Mapping[str, Factors], trained: bool = True) -> None:
        """Appends an expert to every module; nothing changes if a check fails.

        Args:
            name: A new name.
            weights: Module path -> (a [r, D_in], b [D_out, r]); a rank may differ per module and be 0.
            trained: Whether it is trained from here on; older experts are frozen.

        Raises:
            ValueError: See `check_expert`.
        """
        self.check_expert(name, weights)
        for path, module in self.modules.items():
            module.append(*weights[path], scale=self.config.scale, trained=trained)
        self.expert_names.append(name)

    def check_expert(self, name: str, weights: Mapping[str, Factors]) -> None:
        """Refuse an expert that cannot be added.

        Raises:
            ValueError: If the name is used, the modules are not exactly the adapted ones, a shape is wrong or
                a value not finite, or something is in training.
        """
        if name in self.expert_names:
            raise ValueError(f"expert name must be new, got {name!r} among {self.expert_names}")
        self._check_weights(weights)
        if self.hooks.solo_in_training:
            raise ValueError(f"the warm-up must end before an expert is added, got a buffer and {name!r}")
        if self.in_training:
            raise ValueError(f"{self.expert_names[-1]!r} must be frozen before adding one, got {name!r}")

    def set_experts(
        self, names: Sequence[str], weights: Sequence[Mapping[str, Factors]], trained: int
    ) -> None:
        """Replaces all experts; nothing changes if a check fails.

        Args:
            names: Distinct names; none for a model without experts.
            weights: Per expert module path -> (a [r, D_in], b [D_out, r]). Where every expert has the same
                tensor a, the pool shares it.
            trained: How many of the last experts are trained from here on.

        Raises:
            ValueError: As for `add_expert`, or if the lengths or `trained` do not fit.
        """
        names = list(names)
        if len(names) != len(weights) or len(set(names)) != len(names) or not 0 <= trained <= len(names):
            raise ValueError(
                f"names must be distinct, one for each of {len(weights)} experts with {trained} of them "
                f"trained, got {names}"
            )
        if self.hooks.solo_in_training:
            raise ValueError(f"the warm-up must end before experts are set, got a buffer and {names}")
        for each in weights:
            self._check_weights(each)
        for path, module in self.modules.items():
            module.set_experts([each[path] for each in weights], self.config.scale, trained)
        self.expert_names, self.pool = names, object()
        self.method.experts_replaced()

    def set_packs(self, names: Sequence[str], packs: Mapping[str, PackedExperts]) -> None:
        """Replaces all experts by packs that are finite and on their modules' devices; copies nothing.

        Nothing changes if a check fails.

        Args:
            names: Distinct names; none for a model without experts.
            packs: Module path -> frozen pack of as many experts; empty without experts.

        Raises:
            ValueError: If the names repeat, or a pack is missing or does not fit its module.
        """
        if len(set(names)) != len(names) or packs.keys() != (self.modules.keys() if names else set()):
            raise ValueError(f"packs must be one per adapted module for distinct names, got {names!r:.200}")
        for path, pack in packs.items():
            module = self.modules[path]
            sizes = (pack.num_experts, pack.in_features, pack.out_features, pack.trained)
            wanted = (len(names), module.in_features, module.out_features, 0)
            if sizes != wanted or pack.a.dtype != torch.float32 or pack.a.device != module.weight.device:
                raise ValueError(
                    f"pack of {path} must be float32 on {module.weight.device} with (experts, in, out, "
                    f"trained) {wanted}, got {pack.a.dtype} on {pack.a.device} with {sizes}"
                )
        for path, module in self.modules.items():
            module.experts = packs.get(path)
        self.expert_names, self.pool = list(names), object()
        self.method.experts_replaced()

    def set_solo(self, weights: Mapping[str, Factors], trained: bool = False) -> None:
        """Lets one expert act alone, in the modules that `weights` names and no other; see `ExpertLinear`.

        Args:
            weights: Module path -> (a [r, D_in], b [D_out, r]); empty for no solo expert at all.
            trained: Whether it is trained from here on.

        Raises:
            ValueError: If a module is unknown or its factors do not fit.
        """
        if unknown := sorted(weights.keys() - self.modules.keys()):
            raise ValueError(f"weights must be of adapted modules, got unknown {unknown}")
        for path, pair in weights.items():
            check_factors(path, *pair, self.modules[path])
        for path, module in self.modules.items():
            module.set_solo(weights.get(path), self.config.scale, trained)

    def _check_weights(self, weights: Mapping[str, Factors]) -> None:
        if weights.keys() != self.modules.keys():
            missing = sorted(self.modules.keys() - weights.keys())
            unknown = sorted(weights.keys() - self.modules.keys())
            raise ValueError(
                f"weights must name the adapted modules, got missing {missing}, unknown {unknown}"
            )
        for path, module in self.modules.items():
            check_factors(path, *weights[path], module)

    def freeze(self) -> None:
        """Ends the training of all experts; they stay in use.

        Raises:
            ValueError: If no expert is in training.
        """
        if not self.in_training:
            raise ValueError("freeze must follow add_expert(trained=True), got no trained expert")
        for module in self.modules.values():
            assert module.experts is not None
            module.experts = module.experts.freeze()

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimiser gets: the factors of a solo expert in training, else those of the experts in
        training and of gatings, and what the method trains besides (CRAM: the newest centroid)."""
        parameters = [p for module in self.modules.values() for p in module.trainable()]
        return [*parameters, *self.method.extra_parameters()]

    def release(self, model: Any) -> None:
        """Takes hooks and adapted linears out of the model again; call `detach` instead."""
        if self._method is not None:
            self._method.release()
        self.hooks.release()
        for path, module in self.modules.items():
            model.set_submodule(path, module.base.train(module.training))
        for parameter in self._required_grad:
            parameter.requires_grad_(True)
