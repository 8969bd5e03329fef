"""What each decoder layer sees of vLLM's LoRA operations: the same wrapper, with the layer's own gates.

vLLM has one wrapper object for all LoRA linears, which does not know the layer that calls it. A view is an
object of a subclass of the wrapper's class and shares its `__dict__`, so that whatever vLLM writes into the
wrapper reaches every view. It works for each kind of wrapper: CPU, CUDA, ROCm, XPU. Only `add_expand`
differs: the gates multiply the shrunk activations, which also exist where the LoRA is sharded.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from cram.serve.vllm.group import GateGroup
from cram.serve.vllm.plugin.gate_table import GateTable

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
TABLE, LINEARS = "cram_table", "cram_linears"
SHOWN = 5


def layer_view(wrapper: Any, table: GateTable, layer: int) -> Any:
    """The wrapper as one decoder layer sees it."""
    base: Any = type(wrapper)

    class LayerView(base):
        """The wrapper of one layer.

        A graph is traced in one step and serves all later steps. So no graph leaves work out.
        """

        def add_lora_linear(self, *args: Any, **kwargs: Any) -> Any:
            """What the wrapper does. A CPU skips it in steps without adapters."""
            if table.idle and not torch.compiler.is_compiling():
                return None
            return super().add_lora_linear(*args, **kwargs)

        def add_expand(self, y: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            """Gates, then what the wrapper does."""
            if table.acting or torch.compiler.is_compiling():
                table.scale(x, layer)
            return super().add_expand(y, x, *args, **kwargs)

        def add_lora_embedding(self, *args: Any, **kwargs: Any) -> Any:
            """No layer has an embedding."""
            raise NotImplementedError("cram: embeddings cannot be gated")

        def add_lora_logits(self, *args: Any, **kwargs: Any) -> Any:
            """No layer has the output head."""
            raise NotImplementedError("cram: the output head cannot be gated")

    LayerView.__name__ = LayerView.__qualname__ = f"{base.__name__}Layer{layer}"
    view: Any = object.__new__(LayerView)
    view.__dict__ = wrapper.__dict__
    return view


def install_views(manager: Any) -> None:
    """Give every LoRA linear of a decoder layer of the language model the view of its layer.

    Args:
        manager: vLLM's `LoRAModelManager`, whose modules exist. It gets the gate table and the paths of the
            linears as attributes.
    """
    # The language model's wrapper is made first; towers and connectors have others.
    wrapper = next(iter(manager.punica_wrapper_mapping.values()))
    linears = {}
    for name, module in manager.modules.items():
        found = LAYER.search(name)
        if found and module.punica_wrapper is wrapper and "Linear" in type(module).__name__:
            linears[name] = int(found[1])
    table = GateTable(
        1 + max(linears.values(), default=0),
        manager.max_num_seqs,
        wrapper._token_lora_indices.shape[0],
        manager.lora_config.max_lora_rank,
        manager.device,
    )
    views = {layer: layer_view(wrapper, table, layer) for layer in set(linears.values())}
    for name, layer in linears.items():
        manager.modules[name].set_mapping(views[layer])
    setattr(manager, TABLE, table)
    setattr(manager, LINEARS, frozenset(linears))


def check_modules(manager: Any, loaded: set[str], group: GateGroup) -> None:
    """Refuse a group of which a module would have no effect; vLLM takes an adapter that matches nothing.

    Args:
        manager: A manager with views.
        loaded: Paths under which vLLM loaded the group's modules.
        group: The group.

    Raises:
        ValueError: If a module is missing or has no view, or the model has another number of layers.
    """
    placed = set()
    for name in getattr(manager, LINEARS):
        prefix, last = name.rsplit(".", 1)
        placed |= {f"{prefix}.{part}" for part in manager.packed_modules_mapping.get(last, [last])}
    if len(loaded) != len(group.modules) or not loaded <= placed:
        raise ValueError(
            f"cram: the model must gate all {len(group.modules)} modules of the group, got {len(loaded)} "
            f"loaded, {len(loaded & placed)} gated; without effect: {sorted(loaded - placed)[:SHOWN]}"
        )
    layers = getattr(manager, TABLE).layers
    if group.layers != layers:
        raise ValueError(f"cram: the group must have the model's {layers} layers, got {group.layers}")
