"""What is checked of a request before it reaches a worker, and what its prefix may share with others.

Every way into the engine passes `InputProcessor.process_inputs`. There the gates are validated (HTTP 400),
and group and gates go into the cache salt. Without it the prefix cache would mix requests of different gates.
The engine's core checks again: it refuses a request that was made by hand and never saw the front end.

vLLM refuses several greedy answers to one request. Greedy is the default of `cram serve`, and in process the
`n` answers are equal. So the plugin lifts the refusal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cram.serve.vllm.group import KEY, GateGroup, Gates, group_at
from cram.serve.vllm.plugin.seams import wrap

Gated = tuple[GateGroup, Gates]


def gates_of(lora: Any, params: Any) -> Gated | None:
    """Group and gates of a request, or None for the base model and plain adapters.

    Args:
        lora: vLLM's `LoRARequest`, or None.
        params: vLLM's `SamplingParams`, or what else came in its place.

    Raises:
        ValueError: If a group comes without gates or with wrong ones, or gates without a group.
    """
    value = (getattr(params, "extra_args", None) or {}).get(KEY)
    group = None if lora is None else group_at(lora.lora_path)
    if group is None:
        if value is not None:
            raise ValueError(f"'{KEY}' must come with the adapter of a group, got it for another model")
        return None
    return group, group.gates(value)


def check_core(request: Any) -> None:
    """Refuse a request of a group that has no gates, or no salt of these gates.

    Raises:
        ValueError: If `process_inputs` did not make the request.
    """
    gated = gates_of(request.lora_request, request.sampling_params)
    if gated is not None and not (request.cache_salt or "").startswith(gated[0].salt(gated[1])):
        raise ValueError(
            "cram: a request of a group must come through the front end, got one without its salt"
        )


def install(owners: dict[str, Any]) -> None:
    """Wrap the functions of front end and engine core.

    Args:
        owners: Class name -> class of vLLM.
    """
    refusal = owners["VLLMValidationError"]

    @wrap(owners["InputProcessor"], "process_inputs")
    def process(original: Callable[..., Any]) -> Callable[..., Any]:
        def process_inputs(
            self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any
        ) -> Any:
            request = original(self, request_id, prompt, params, *args, **kwargs)
            try:
                gated = gates_of(request.lora_request, params)
            except ValueError as error:
                raise refusal(str(error), parameter=KEY) from None
            if gated is not None:
                group, gates = gated
                request.cache_salt = f"{group.salt(gates)}{request.cache_salt or ''}"
            return request

        return process_inputs

    @wrap(owners["EngineCore"], "preprocess_add_request")
    def preprocess(original: Callable[..., Any]) -> Callable[..., Any]:
        def preprocess_add_request(self: Any, request: Any) -> Any:
            check_core(request)
            return original(self, request)

        return preprocess_add_request

    @wrap(owners["SamplingParams"], "_verify_greedy_sampling")
    def verify(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self: None
