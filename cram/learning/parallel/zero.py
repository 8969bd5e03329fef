"""ZeRO-2 of DeepSpeed for one stage's parameters: each process keeps a part of the optimiser's state.

DeepSpeed binds the parameters that its engine is given, so every stage gets an engine of its own. The engine
also moves the values of its parameters into one flat buffer. The model reads an expert's factors from the
packed storage of its module, so they are copied back there after each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cram_kernels import PackedExperts


class ZeroStages:
    """The engines of a task's stages, one after another.

    Args:
        accelerator: accelerate's, under DeepSpeed.
        model: The attached model.

    Raises:
        NotImplementedError: If the configuration asks for another ZeRO stage, offload, or mixed precision.
    """

    def __init__(self, accelerator: Any, model: nn.Module) -> None:
        _check(accelerator.state.deepspeed_plugin.deepspeed_config)
        self._accelerator, self._model = accelerator, model
        self._held: list[tuple[nn.Parameter, Tensor]] = []
        self._guests: list[str] = []

    def hold(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Note where the model reads some parameters, before an engine takes them.

        An engine knows its parameters by their names in the model, so the model gets those that are none of
        its own (CRAM: the centroid) for the stage.

        Returns:
            Those with values; an engine cannot hold empty ones.
        """
        held = [parameter for parameter in parameters if parameter.numel()]
        self._held = [(parameter, parameter.data) for parameter in held]
        self._mark(True)
        known = set(self._model.parameters())
        for number, parameter in enumerate(each for each in held if each not in known):
            self._guests.append(f"trained_beside_{number}")
            self._model.register_parameter(self._guests[-1], parameter)
        return held

    def copy_back(self) -> None:
        """Copy the values of the parameters to where the model reads them."""
        for parameter, storage in self._held:
            storage.copy_(parameter.data)

    def release(self) -> None:
        """End the engine of the stage; its parameters are what they were before."""
        self.copy_back()
        self._accelerator.free_memory()
        for parameter, storage in self._held:
            parameter.data = storage
        self._mark(False)
        for name in self._guests:
            delattr(self._model, name)
        self._held, self._guests = [], []

    def _mark(self, copied_back: bool) -> None:
        """Tell experts that their packed storage holds the values of the engine's parameters."""
        for module in self._model.modules():
            if isinstance(module, PackedExperts):
                module.copied_back = copied_back


def export_part(optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return this process's part of the optimiser's state: tensors and JSON values by name.

    Args:
        optimizer: As accelerate has prepared it.
    """
    whole = _own_part(optimizer).state_dict()
    named = {
        f"{index}.{key}": value for index, state in whole["state"].items() for key, value in state.items()
    }
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    groups = [
        {key: value for key, value in each.items() if key != "params"} for each in whole["param_groups"]
    ]
    values = {name: value for name, value in named.items() if name not in tensors}
    return tensors, {"state": values, "groups": groups}


def import_part(optimizer: Any, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Take up what `export_part` has returned."""
    own = _own_part(optimizer)
    states: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **values["state"]}.items():
        index, key = name.split(".")
        states.setdefault(int(index), {})[key] = value
    pairs = zip(own.state_dict()["param_groups"], values["groups"], strict=True)
    own.load_state_dict({"state": states, "param_groups": [{**fresh, **kept} for fresh, kept in pairs]})


def _own_part(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser of this process's part, inside accelerate's and DeepSpeed's."""
    own: torch.optim.Optimizer = optimizer.optimizer.optimizer
    return own


def _check(config: dict[str, Any]) -> None:
    """Refuse a configuration of DeepSpeed under which experts would be cast, moved or divided themselves."""
    zero = config.get("zero_optimization", {})
    found = {
        "zero_optimization.stage": (zero.get("stage"), 2),
        "zero_optimization.offload_optimizer.device": (
            _of(zero, "offload_optimizer", "device", "none"),
            "none",
        ),
        "bf16.enabled": (_of(config, "bf16", "enabled", False), False),
        "fp16.enabled": (_of(config, "fp16", "enabled", False), False),
    }
    for name, (value, wanted) in found.items():
        if value != wanted:
            raise NotImplementedError(
                f"{name} of the DeepSpeed configuration must be {wanted!r}, got {value!r}: CramTrainer "
                "divides the optimiser alone, and experts stay float32; load the base in bfloat16 instead"
            )


def _of(config: dict[str, Any], section: str, name: str, default: Any) -> Any:
    return (config.get(section) or {}).get(name, default)
