"""A base model that is too large for one device: its weights are divided between the processes (FSDP2).

Only the decoder layers of the frozen base are sharded, which are nearly all of it. Each layer's weights are
gathered for its forward and again for its backward. Vision tower, embeddings and output layer stay whole,
because they are also used outside of the model's own forward. The experts stay whole too: they are megabytes,
and every stage brings new ones. `cram.learning.parallel.processes` adds up their gradients.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard

from cram.attach import attached
from cram.learning.parallel.processes import world


def shard(model: Any) -> None:
    """Divide the frozen weights of an attached model between the processes.

    Call it once per process, before training. All processes must then run the same number of forwards, also
    in evaluation.

    Args:
        model: The attached model, on this process's device.

    Raises:
        ValueError: If the model is not attached, is sharded already, or there is one process.
    """
    cram = attached(model)
    if world() == 1:
        raise ValueError("shard must run in several processes (torchrun), got one")
    if is_sharded(model):
        raise ValueError("model must not be sharded, got a sharded one")
    whole = _experts(cram)
    language = model.get_submodule(cram.family.language_model)
    for layer in language.layers:
        fully_shard(layer, reshard_after_forward=True, ignored_params=whole)


def is_sharded(model: nn.Module) -> bool:
    """True if the base model's weights are divided between processes."""
    return any(type(parameter.data).__name__ == "DTensor" for parameter in model.parameters())


def _experts(cram: Any) -> set[nn.Parameter]:
    """The parameters of experts and gatings, which stay whole."""
    kept: set[nn.Parameter] = set()
    for module in cram.modules.values():
        for part in (module.experts, module.solo, module.gating):
            if part is not None:
                kept |= set(part.parameters())
    return kept
