"""Attaching experts to a model and taking them off again.

`attach` freezes the base model, wraps the target linears of its language model and hooks its forward (see
`cram.model`); `detach` gives back exactly the model that `attach` was given.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from torch import nn

from cram.config import CramConfig
from cram.families import family_of
from cram.methods import METHODS
from cram.model.attached import AttachedModel
from cram.model.frozen.saving import give_back_methods, take_methods
from cram.model.linear import ExpertLinear, is_peft_layer
from cram.routing.clip import ClipEncoder
from cram_kernels import native_libraries

LOGGER = logging.getLogger(__name__)

# Where wrappers keep the model that they wrap: torch.compile, parallel training, FSDP.
WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module")


def attach(model: Any, config: CramConfig, encoder: ClipEncoder, processor: Any = None) -> AttachedModel:
    """Prepares a model for experts: freezes it, wraps the target linears of its language model, hooks its
    forward.

    Without experts the attached model computes exactly what it did before. Experts stay float32 whatever the
    model is cast to, and are used in the dtype of the layer's input.

    `cram.save` saves the experts. The model's own `save_pretrained` writes the base under its own names, so
    that the folder loads as the base. The state dict names modules as they are: an adapted linear's weight is
    `q_proj.base.weight`, beside the experts' tensors.

    Args:
        model: A transformers model of one of the known families.
        config: The configuration; `target_projections` names the linears, `method` the method.
        encoder: CLIP; see `ClipEncoder.from_pretrained(source, model)`.
        processor: The model's processor or tokenizer, with which automatic routing decodes prompts; by
            default the tokenizer is loaded from the model's own folder when it is needed.

    Returns:
        The handle, also `model.cram`; `print(handle.report)` says what was matched.

    Raises:
        ValueError: If the model is attached already, wrapped, a part of a model or has adapters of PEFT, the
            method or its family is unknown, or a projection is not found.
    """
    if any(isinstance(module, ExpertLinear) for module in model.modules()):
        raise ValueError("model must not be attached, got one that has experts already; call detach first")
    if config.method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {config.method!r}")
    _check_whole(model)
    _say_what_is_slow()
    cram = AttachedModel(model, config, encoder, processor)
    cram.method = METHODS[config.method](cram)
    model.cram = cram
    cram.own_methods = take_methods(model)
    return cram


@cache
def _say_what_is_slow() -> None:
    """Warn once per process if PyTorch stands in for the native library."""
    reason = native_libraries()["cpu"]
    if reason is not None:
        LOGGER.warning(
            "the native library is missing, and a slower implementation stands in; `cram info` says how to "
            "mend it (%s)",
            reason,
        )


def _check_whole(model: nn.Module) -> None:
    """Refuse a model that is wrapped, a part of one, or has adapters of PEFT."""
    kind = type(model).__name__
    wrapped = next((name for name in WRAPPED if isinstance(getattr(model, name, None), nn.Module)), None)
    if wrapped is not None:
        raise ValueError(
            f"model must be attached before it is wrapped, got a {kind}; pass `model.{wrapped}`, and wrap it "
            "after that"
        )
    tuned = next((path for path, module in model.named_modules() if is_peft_layer(module)), None)
    if tuned is not None:
        raise ValueError(
            f"model must be without adapters of PEFT, got a {kind} with one at {tuned}; pass what its "
            "`merge_and_unload()` returns (the adapter becomes a part of the base), or that of `unload()`"
        )
    family = family_of(model)
    try:
        model.get_submodule(family.language_model)
    except AttributeError:
        raise ValueError(
            f"model must be a whole one, with `{family.language_model}`, got a {kind}, a part of one; "
            "pass the model that this part was taken from"
        ) from None


def detach(model: Any) -> None:
    """Removes experts, method and hooks; the model is bit for bit the one that `attach` was given.

    Raises:
        ValueError: If the model is not attached.
    """
    cram = attached(model)
    cram.release(model)
    give_back_methods(model, cram.own_methods)
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
