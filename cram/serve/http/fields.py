"""The fields of a request beside its messages, in the form of OpenAI's chat completions.

A field that this server does not act on is refused unless it has the value that changes nothing, so that no
request is answered as if it had been understood.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from cram.serve.request import RequestError, Sampling

AUTOMATIC, BASE = "cram", "base"

Check = Callable[[Any], bool]


def _integer(value: Any) -> bool:
    return type(value) is int


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _string(value: Any) -> bool:
    return isinstance(value, str)


# Field -> test of its type and what the value must be.
FIELDS: dict[str, tuple[Check, str]] = {
    "model": (_string, "a string"),
    "messages": (lambda v: isinstance(v, list), "a list"),
    "lora": (lambda v: isinstance(v, list), "a list"),
    "stream": (lambda v: isinstance(v, bool), "a boolean"),
    "stream_options": (lambda v: isinstance(v, dict), "an object"),
    "n": (_integer, "an integer"),
    "max_tokens": (_integer, "an integer"),
    "max_completion_tokens": (_integer, "an integer"),
    "temperature": (_number, "a number"),
    "top_p": (_number, "a number"),
    "seed": (_integer, "an integer"),
    "stop": (lambda v: _string(v) or (isinstance(v, list) and all(map(_string, v))), "one string or several"),
    "logprobs": (lambda v: isinstance(v, bool), "a boolean"),
    "top_logprobs": (_integer, "an integer"),
}
# Field that is not acted on -> the values that change nothing; None where no value changes anything.
Idle = Mapping[str, tuple[Any, ...] | None]
WITHOUT_EFFECT: Idle = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "user": None,
    "metadata": None,
    "safety_identifier": None,
    "prompt_cache_key": None,
}
# What clients send back with an answer that they were given, and the name of who speaks.
IN_MESSAGES: Idle = {"name": None, "tool_calls": ([],), "annotations": ([],)}
# Every model has one resolution.
IN_IMAGES: Idle = {"detail": ("auto", "low", "high")}


def checked_fields(body: Any) -> dict[str, Any]:
    """The fields that are acted on, of the right types; a null field counts as absent."""
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, got {type(body).__name__}")
    given = {}
    for name, value in body.items():
        if value is None:
            continue
        if name in FIELDS:
            test, wanted = FIELDS[name]
            if not test(value):
                raise RequestError(f"{name} must be {wanted}, got {type(value).__name__}")
            given[name] = value
    refuse_others(body, FIELDS, WITHOUT_EFFECT)
    return given


def refuse_others(given: Mapping[str, Any], known: Collection[str], idle: Idle, where: str = "") -> None:
    """Refuse a field that would change the answer if it were acted on.

    Args:
        given: The fields.
        known: Those that are acted on.
        idle: See `WITHOUT_EFFECT`.
        where: What stands before the field's name in an error.

    Raises:
        RequestError: If there is one.
    """
    for name, value in given.items():
        if value is None or name in known:
            continue
        if name not in idle:
            raise RequestError(f"{where}{name!r:.100} is not a known field; known are {sorted(known)}")
        if (legal := idle[name]) is not None and value not in legal:
            raise RequestError(f"{where}{name} is not supported, except with the value {legal[0]!r}")


def sampling(given: Mapping[str, Any]) -> Sampling:
    """How tokens are chosen.

    Raises:
        RequestError: If fields contradict each other or a value is out of range.
    """
    counts = [given[name] for name in ("max_completion_tokens", "max_tokens") if name in given]
    if len(set(counts)) > 1:
        raise RequestError(f"max_completion_tokens and max_tokens must agree, got {counts}")
    logprobs = given.get("logprobs", False)
    if "top_logprobs" in given and not logprobs:
        raise RequestError("top_logprobs must come with logprobs, got it alone")
    stop = given.get("stop", ())
    return Sampling(
        max_tokens=counts[0] if counts else None,
        temperature=_finite(given.get("temperature", 0.0)),
        top_p=_finite(given.get("top_p", 1.0)),
        seed=given.get("seed"),
        n=given.get("n", 1),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=given.get("top_logprobs", 0) if logprobs else None,
    )


def _finite(value: float) -> float:
    """A number as a float; an integer too large for one becomes infinite and is then out of range."""
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def named_mixture(model: str, lora: Any) -> dict[str, float] | None:
    """The mixture that a request names by its model or by `lora`.

    An unknown expert is found by the engine, which knows the experts of the moment.

    Raises:
        RequestError: If the model is unknown or `lora` is no list of experts with scales.
    """
    chosen: dict[str, float] | None = None
    if model == BASE:
        chosen = {}
    elif model.startswith(f"{AUTOMATIC}:"):
        chosen = {model.removeprefix(f"{AUTOMATIC}:"): 1.0}
    elif model != AUTOMATIC:
        raise RequestError(f"model must be one that /v1/models lists, got {model!r:.100}")
    if lora is None:
        return chosen
    if chosen is not None:
        raise RequestError(f"lora must come with the model {AUTOMATIC!r}, got {model!r:.100}")
    mixture: dict[str, float] = {}
    for entry in lora:
        fits = isinstance(entry, dict) and entry.keys() == {"id", "scale"} and _string(entry["id"])
        if not fits or not _number(entry["scale"]) or entry["id"] in mixture:
            raise RequestError("lora must be a list of {id, scale} with distinct names, got another entry")
        mixture[entry["id"]] = _finite(entry["scale"])
    return mixture
