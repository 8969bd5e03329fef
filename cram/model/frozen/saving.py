"""`save_pretrained` of an attached model: it writes the base, under the base's own names.

The experts' modules stand between a decoder layer and its linears. So the state dict of an attached model
names `q_proj.base.weight` and the experts' tensors. A folder with such names would be read back as a base
whose adapted linears are missing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cram.model.linear import ExpertLinear

LOGGER = logging.getLogger(__name__)


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


def base_view(model: nn.Module) -> Any:
    """The model without its experts: modules of its own down to the adapted linears, which are the base's.

    Everything else is shared, and the model goes on working while the view is in use.
    """
    view: Any = _without_experts(model)
    for name in ("save_pretrained", "cram"):
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
