"""What takes the place of some methods of a model while it is attached.

`save_pretrained` writes the base, under the base's own names. The experts' modules stand between a decoder
layer and its linears. So the state dict of an attached model names `q_proj.base.weight` and the experts'
tensors. A folder with such names would be read back as a base whose adapted linears are missing.

`generate` tells its forwards where the prompt ends. A prompt may be read in parts, and a single token behind
the first part may be the last one of the question or the first one of the answer: a forward cannot tell.

Continuous batching packs the prompts of all requests into one row, and has threads of its own. It is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn

from cram.model.linear import ExpertLinear

LOGGER = logging.getLogger(__name__)
METHODS = ("save_pretrained", "generate", "init_continuous_batching")


class SaveBase:
    """What `model.save_pretrained` is while the model is attached; Trainer and `push_to_hub` call it too."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(
        self,
        save_directory: Any,
        *arguments: Any,
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Any:
        """Write the base model as its class does, and say that experts are saved by `cram.save`.

        Args:
            save_directory: The folder.
            *arguments: As of the model class.
            state_dict: The model's own state dict (attached or base names), or None for the present one.
            **options: As of the model class.
        """
        if state_dict is not None:
            options["state_dict"] = base_state_dict(self._model, state_dict)
        LOGGER.warning(
            "save_pretrained writes the base model alone; cram.save(model, folder) saves the experts"
        )
        view = base_view(self._model)
        return type(view).save_pretrained(view, save_directory, *arguments, **options)


class Generate:
    """What `model.generate` is while the model is attached.

    It goes on to work as the model's own after `detach`, for a caller who has kept it.
    """

    def __init__(self, model: Any, own: Callable[..., Any] | None = None) -> None:
        self._model, self._own = model, own

    def __call__(self, inputs: Any = None, *arguments: Any, **options: Any) -> Any:
        """Generate as the model's class does, or as what stood on the model in its place before `attach`.

        Args:
            inputs: As of the model class.
            *arguments: As of the model class.
            **options: As of the model class.
        """
        model = self._model
        given = (inputs, options.get("input_ids"), options.get("attention_mask"))
        # With a filled cache the ids may be the new ones alone; the mask is that of the whole prompt.
        lengths = [each.shape[1] for each in given if each is not None and each.dim() == 2]
        generate = self._own or partial(type(model).generate, model)
        positional = (inputs, *arguments) if arguments or inputs is not None else ()
        cram = getattr(model, "cram", None)
        with nullcontext() if cram is None else cram.hooks.generating(max(lengths, default=None)):
            return generate(*positional, **options)


def refuse_continuous_batching(*arguments: Any, **options: Any) -> NoReturn:
    """What `model.init_continuous_batching` is while the model is attached; `generate_batch` calls it too.

    Raises:
        ValueError: Always; the message says what to use.
    """
    raise ValueError(
        "each prompt of an attached model must have a row of its own, got continuous batching, which packs "
        "them; use model.generate, or `cram serve` for many requests at once"
    )


def take_methods(model: Any) -> dict[str, Any]:
    """Put the methods of an attached model in the place of the model's own.

    Returns:
        What stood on the model itself, and not on its class, by name; for `give_back_methods`.
    """
    own = {name: model.__dict__[name] for name in METHODS if name in model.__dict__}
    aside = [name for name in own if name != "generate"]
    if aside:
        LOGGER.warning("the model's own %s is out of use until cram.detach", " and ".join(aside))
    model.save_pretrained, model.generate = SaveBase(model), Generate(model, own.get("generate"))
    model.init_continuous_batching = refuse_continuous_batching
    return own


def give_back_methods(model: Any, own: Mapping[str, Any]) -> None:
    """Take them out again, and put back what stood there; what has been set since `attach` stays."""
    for name in METHODS:
        present = model.__dict__.get(name)
        if isinstance(present, SaveBase | Generate) or present is refuse_continuous_batching:
            del model.__dict__[name]
            model.__dict__.update({name: own[name]} if name in own else {})


def base_view(model: nn.Module) -> Any:
    """The model without its experts: modules of its own down to the adapted linears, which are the base's.

    Everything else is shared, and the model goes on working while the view is in use.
    """
    view: Any = _without_experts(model)
    for name in (*METHODS, "cram"):
        view.__dict__.pop(name, None)
    return view


def base_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names of the base model, without what belongs to experts."""
    adapted = [path for path, module in model.named_modules() if isinstance(module, ExpertLinear)]
    found = {}
    for name, value in state_dict.items():
        path = next((path for path in adapted if name.startswith(f"{path}.")), None)
        if path is None:
            found[name] = value
        elif (own := name[len(path) + 1 :]).startswith("base."):
            found[f"{path}.{own.removeprefix('base.')}"] = value
        elif "." not in own:
            found[name] = value
    return found


def _without_experts(module: nn.Module) -> nn.Module:
    if isinstance(module, ExpertLinear):
        return module.base
    children = {name: child and _without_experts(child) for name, child in module._modules.items()}
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    view = module.__class__.__new__(module.__class__)
    view.__dict__.update(module.__dict__)
    view.__dict__["_modules"] = children
    return view
