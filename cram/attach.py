"""Attaching experts to a model and taking them off again.

`attach` freezes the base model, wraps the target linears of its language model and hooks its forward (see
`cram.model`); `detach` gives back exactly the model that `attach` was given.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from cram.config import CramConfig
from cram.methods import METHODS
from cram.model.attached import AttachedModel
from cram.model.linear import ExpertLinear
from cram.routing.clip import ClipEncoder


def attach(model: Any, config: CramConfig, encoder: ClipEncoder, processor: Any = None) -> AttachedModel:
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
    if config.method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {config.method!r}")
    cram = AttachedModel(model, config, encoder, processor)
    cram.method = METHODS[config.method](cram)
    model.cram = cram
    return cram


def detach(model: Any) -> None:
    """Removes experts, method and hooks; the model is bit for bit the one that `attach` was given.

    Raises:
        ValueError: If the model is not attached.
    """
    attached(model).release(model)
    del model.cram


def attached(model: nn.Module) -> AttachedModel:
    """The model's handle.

    Raises:
        ValueError: If `attach` has not been called on the model.
    """
    cram = getattr(model, "cram", None)
    if not isinstance(cram, AttachedModel):
        raise ValueError(f"model must be attached (cram.attach), got a plain {type(model).__name__}")
    return cram
