"""Attaching experts to a model, and the handle `Cram` through which they are added, trained and routed.

`attach` freezes the base model, wraps the target linears of its language model and hooks its forward (see
`cram.model.hooks`); `detach` gives back exactly the model that `attach` was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cram.config import CramConfig
from cram.methods import METHODS
from cram.methods.parts.penalty import Penalty
from cram.model.hooks import RoutedForward
from cram.model.linear import ExpertLinear
from cram.routing.clip import ClipEncoder

Factors = tuple[Tensor, Tensor]


class Cram(RoutedForward):
    """Experts and router of one attached model, `model.cram`; routing is inherited from `RoutedForward`."""

    def __init__(self, model: Any, config: CramConfig, encoder: ClipEncoder, processor: Any = None) -> None:
        """Wraps the matched linears, hooks the model and binds the method; call `attach` instead."""
        super().__init__(model, config, encoder, processor)
        self.method = METHODS[config.method](self)

    def begin_buffer(self) -> None:
        """Starts the warm-up: in every module a LoRA of rank `config.buffer_rank` acts alone, the experts
        are off.

        Raises:
            ValueError: If a buffer exists or an expert is in training.
        """
        if self._buffered or self.in_training:
            raise ValueError(
                "begin_buffer must follow end_buffer and freeze, got a buffer or an expert in training"
            )
        for module in self.modules.values():
            module.begin_buffer(self.config.buffer_rank, self.config.scale)

    def buffers(self) -> dict[str, Factors]:
        """Factors (a [r, D_in], b [D_out, r]) of the warm-up LoRA per module, detached.

        Raises:
            ValueError: If there is no buffer.
        """
        if not self._buffered:
            raise ValueError("buffers must follow begin_buffer, got no buffer")
        return {path: module.buffer_factors() for path, module in self.modules.items()}

    def end_buffer(self) -> None:
        """Drops the warm-up LoRA; without one this does nothing."""
        for module in self.modules.values():
            module.end_buffer()

    def history(self, group: int) -> dict[str, list[Tensor]]:
        """Factors a [r, D_in] of the group's experts per module, oldest first, for `instantiate_expert`."""
        members = self.router.experts_of(group)
        return {path: [a for a, _ in module.factors(members)] for path, module in self.modules.items()}

    def expert_weights(self, index: int) -> dict[str, Factors]:
        """Module path -> (a [r, D_in], b [D_out, r]) of one expert, detached."""
        return {path: module.factors([index])[0] for path, module in self.modules.items()}

    def add_expert(
        self,
        name: str,
        weights: Mapping[str, Factors],
        group: int = 0,
        centroid: Tensor | None = None,
        trained: bool = True,
    ) -> None:
        """Appends an expert to every module and to the router; nothing changes if a check fails.

        Args:
            name: A new name.
            weights: Module path -> (a [r, D_in], b [D_out, r]); a rank may differ per module and be 0.
            group: Its instruction group.
            centroid: [D_q] or [L, D_q], trained with the expert; None for zeros that are not trained.
            trained: Whether it is trained from here on; older experts are frozen.

        Raises:
            ValueError: If the modules are not exactly the adapted ones, a shape is wrong or a value not
                finite.
        """
        self._check_weights(weights)
        if self._buffered:
            raise ValueError(f"end_buffer must come before an expert is added, got a buffer and {name!r}")
        if self.in_training:
            last = self.router.expert_names[-1]
            raise ValueError(f"{last!r} must be frozen before adding one, got {name!r}")
        rows = torch.zeros(self.encoder.image_dim) if centroid is None else centroid
        if rows.shape[-1] != self.encoder.image_dim:
            raise ValueError(
                f"centroid must have D_q={self.encoder.image_dim} columns, got {list(rows.shape)}"
            )
        self.router.add_expert(name, group, rows, trained and centroid is not None)
        for path, module in self.modules.items():
            module.append(*weights[path], scale=self.config.scale, trained=trained)
        self._penalty = None

    def set_experts(
        self, names: Sequence[str], weights: Sequence[Mapping[str, Factors]], trained: int
    ) -> None:
        """Replaces all experts by a pool without groups and centroids; nothing changes if a check fails.

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
        if self._buffered:
            raise ValueError(f"end_buffer must come before experts are set, got a buffer and {names}")
        for each in weights:
            self._check_weights(each)
        self.router.set_experts(names, self.encoder.image_dim)
        for path, module in self.modules.items():
            module.set_experts([each[path] for each in weights], self.config.scale, trained)
        self._penalty = None

    def _check_weights(self, weights: Mapping[str, Factors]) -> None:
        if weights.keys() != self.modules.keys():
            missing = sorted(self.modules.keys() - weights.keys())
            unknown = sorted(weights.keys() - self.modules.keys())
            raise ValueError(
                f"weights must name the adapted modules, got missing {missing}, unknown {unknown}"
            )
        for path, module in self.modules.items():
            _check_factors(path, *weights[path], module.weight)

    def freeze(self) -> None:
        """Ends the training of all experts; they stay in use.

        Raises:
            ValueError: If no expert is in training.
        """
        if not self.in_training:
            raise ValueError("freeze must follow add_expert(trained=True), got no trained expert")
        if self.router.trained_centroid is not None:
            self.router.freeze()
        for module in self.modules.values():
            assert module.experts is not None
            module.experts = module.experts.freeze()
        self._penalty = None

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimiser gets: the buffer's factors, or those of the experts in training, gatings and the
        newest expert's centroid."""
        parameters = [p for module in self.modules.values() for p in module.trainable()]
        if self.router.trained_centroid is not None and not self._buffered:
            parameters.append(self.router.trained_centroid)
        return parameters

    def prepare_penalty(self) -> None:
        """Computes the bases of the penalty for the expert in training; call it once per task, after
        `add_expert`.

        Raises:
            ValueError: If no expert is in training.
        """
        self._penalty = Penalty(self.modules, self.router, self.config, self._bases)

    def penalty(self) -> Tensor:
        """lambda times the orthogonality penalty of the last training forward, a scalar; 0 without older
        experts.

        Raises:
            ValueError: If `prepare_penalty` or a training forward is missing.
        """
        if self._penalty is None:
            raise ValueError("penalty must follow prepare_penalty, got no bases")
        if self._penalty.needed and self._state.visual is None:
            raise ValueError("penalty must follow a forward in training mode, got none since prepare_penalty")
        return self._penalty.value()


def attach(model: Any, config: CramConfig, encoder: ClipEncoder, processor: Any = None) -> Cram:
    """Prepares a model for experts: freezes it, wraps the target linears of its language model, hooks its
    forward.

    Without experts the attached model computes exactly what it did before. Cast the model before attaching:
    experts are kept in float32 and used in the dtype of the layer's input.

    Save an attached model with `cram.save`: its own `save_pretrained` would write the wrapped linears' names.

    Args:
        model: A transformers model of one of the known families.
        config: The configuration; `target_projections` names the linears, `method` the method.
        encoder: CLIP; see `ClipEncoder.from_pretrained(source, model)`.
        processor: The model's processor or tokenizer, with which automatic routing decodes prompts; by
            default the tokenizer is loaded from the model's own folder when it is needed.

    Returns:
        The handle, also `model.cram`; `print(handle.report)` says what was matched.

    Raises:
        ValueError: If the model is attached already, the method or its family is unknown, or a projection is
            not found.
    """
    if any(isinstance(module, ExpertLinear) for module in model.modules()):
        raise ValueError("model must not be attached, got one that has experts already; call detach first")
    model.cram = Cram(model, config, encoder, processor)
    return model.cram


def detach(model: Any) -> None:
    """Removes experts, router and hooks; the model is bit for bit the one that `attach` was given.

    Raises:
        ValueError: If the model is not attached.
    """
    if not isinstance(getattr(model, "cram", None), Cram):
        raise ValueError(f"model must be attached, got a plain {type(model).__name__}")
    model.cram.release(model)
    del model.cram


def attached(model: nn.Module) -> Cram:
    """The model's `Cram`.

    Raises:
        ValueError: If `attach` has not been called on the model.
    """
    cram = getattr(model, "cram", None)
    if not isinstance(cram, Cram):
        raise ValueError(f"model must be attached (cram.attach), got a plain {type(model).__name__}")
    return cram


def _check_factors(path: str, a: Tensor, b: Tensor, weight: Tensor) -> None:
    out_features, in_features = weight.shape
    fits = a.dim() == b.dim() == 2 and a.shape[1] == in_features and b.shape == (out_features, a.shape[0])
    if not fits or not a.is_floating_point() or not b.is_floating_point():
        raise ValueError(
            f"weights of {path} must be float [r, {in_features}] and [{out_features}, r], "
            f"got {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        )
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError(f"weights of {path} must be finite, got NaN or Inf")
