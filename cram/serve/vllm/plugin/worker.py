"""The worker's side: which gates a request has, and which row of the gate table each token of a step reads.

execute_model            new requests and their gates, finished requests
make_lora_inputs         order of the requests in the step, tokens of each (model runner V1 or V2)
_set_active_loras        row of every token, before each forward; also in dummy and capture runs
_create_lora_modules     one view of the LoRA operations per decoder layer
_load_adapter            a group is loaded whole or refused
from_local_dir           takes away the mark for which plain vLLM refuses a group
compute_hash             a graph that was compiled without the plugin is never used with it
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cram.serve.vllm.group import FORMAT, MARKER, check_weights, group_at
from cram.serve.vllm.plugin.frontend import gates_of
from cram.serve.vllm.plugin.seams import wrap
from cram.serve.vllm.plugin.views import TABLE, check_modules, install_views

Original = Callable[..., Any]


def install(owners: dict[str, Any]) -> None:
    """Wrap the functions of the worker.

    Args:
        owners: Class name -> class of vLLM.
    """
    _wrap_loading(owners)
    _wrap_steps(owners)

    @wrap(owners["LoRAConfig"], "compute_hash")
    def hashed(original: Original) -> Original:
        return lambda self: f"{original(self)}-cram{FORMAT}"


def _wrap_loading(owners: dict[str, Any]) -> None:
    @wrap(owners["LoRAModelManager"], "_create_lora_modules")
    def create(original: Original) -> Original:
        def _create_lora_modules(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            install_views(self)

        return _create_lora_modules

    @wrap(owners["WorkerLoRAManager"], "_load_adapter")
    def load(original: Original) -> Original:
        def _load_adapter(self: Any, lora_request: Any) -> Any:
            group = group_at(lora_request.lora_path)
            if group is not None:
                check_weights(Path(lora_request.lora_path), group)
            lora = original(self, lora_request)
            if group is not None:
                check_modules(self._adapter_manager, set(lora.loras), group)
            return lora

        return _load_adapter

    @wrap(owners["PEFTHelper"], "from_local_dir")
    def read(original: Original) -> Original:
        def from_local_dir(cls: Any, lora_path: str, *args: Any, **kwargs: Any) -> Any:
            made = original(cls, lora_path, *args, **kwargs)
            if made.bias == MARKER and group_at(lora_path) is not None:
                made.bias = "none"
            return made

        return from_local_dir


def _wrap_steps(owners: dict[str, Any]) -> None:
    language = owners["LoRAModelRunnerMixin"]._set_active_loras.__defaults__[0]
    # Requests and counts of the step in preparation; `_set_active_loras` follows at once in the same thread.
    layout: list[tuple[list[str], Any]] = []

    @wrap(owners["Worker"], "execute_model")
    def execute(original: Original) -> Original:
        def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            table = _table(self.model_runner)
            if table is not None:
                for request in scheduler_output.finished_req_ids:
                    table.forget(request)
                for new in scheduler_output.scheduled_new_reqs:
                    table.remember(new.req_id, gates_of(new.lora_request, new.sampling_params))
            return original(self, scheduler_output, *args, **kwargs)

        return execute_model

    @wrap(owners["InputBatch"], "make_lora_inputs")
    def layout_of_v1(original: Original) -> Original:
        def make_lora_inputs(self: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
            layout[:] = [(list(self.req_ids), np.asarray(num_scheduled_tokens))]
            return original(self, num_scheduled_tokens, *args, **kwargs)

        return make_lora_inputs

    @wrap(owners["LoraState"], "make_lora_inputs")
    def layout_of_v2(original: Original) -> Original:
        def make_lora_inputs(self: Any, req_ids: Any, idx_mapping: Any, num_scheduled_tokens: Any) -> Any:
            layout[:] = [(list(req_ids), np.asarray(num_scheduled_tokens))]
            return original(self, req_ids, idx_mapping, num_scheduled_tokens)

        return make_lora_inputs

    @wrap(owners["LoRAModelRunnerMixin"], "_set_active_loras")
    def activate(original: Original) -> Original:
        def _set_active_loras(
            self: Any, prompts: Any, tokens: Any, requests: Any, mapping_type: Any = language
        ) -> None:
            original(self, prompts, tokens, requests, mapping_type)
            if mapping_type == language:
                order, counts = layout.pop() if layout else (None, None)
                _table(self).prepare(order, counts, tokens)

        return _set_active_loras


def _table(runner: Any) -> Any:
    """The gate table of a model runner, or None where LoRA is off."""
    manager = getattr(runner, "lora_manager", None)
    return None if manager is None else getattr(manager._adapter_manager, TABLE)
