"""The part of a request that routing needs: instruction, images, and the experts that a client names.

All else in a request is for vLLM, which checks it.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cram.families import Family

AUTOMATIC = "cram"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MAX_IMAGES = 16
MAX_EXPERTS = 1024


@dataclass(frozen=True)
class Asked:
    """What a request asks of the router.

    Attributes:
        instruction: Text of the last user turn.
        images: Bytes of all images of the conversation, in order.
    """

    instruction: str
    images: list[bytes] = field(default_factory=list)


def addressed(model: Any) -> bool:
    """Whether a request's model is the mixture or one of its experts."""
    return isinstance(model, str) and (model == AUTOMATIC or model.startswith(f"{AUTOMATIC}:"))


def named_mixture(body: Mapping[str, Any]) -> dict[str, float] | None:
    """Expert -> scale where the request names them, by its model or by `lora`; None for automatic routing.

    Raises:
        ValueError: If `lora` is not a list of {id, scale}, or comes with a model that names the experts.
    """
    model, lora = body["model"], body.get("lora")
    if model != AUTOMATIC:
        if lora is not None:
            raise ValueError(f"lora must come with the model {AUTOMATIC!r}, got {model!r:.100}")
        return {model.removeprefix(f"{AUTOMATIC}:"): 1.0}
    if lora is None:
        return None
    mixture: dict[str, float] = {}
    for entry in lora if isinstance(lora, list) and len(lora) <= MAX_EXPERTS else [None]:
        named = _named_scale(entry)
        if named is None or named[0] in mixture:
            raise ValueError("lora must be a list of {id, scale} with distinct names, got another value")
        mixture[named[0]] = named[1]
    return mixture


def _named_scale(entry: Any) -> tuple[str, float] | None:
    if not isinstance(entry, dict) or entry.keys() != {"id", "scale"}:
        return None
    name, scale = entry["id"], entry["scale"]
    if not isinstance(name, str) or isinstance(scale, bool) or not isinstance(scale, int | float):
        return None
    return name, float(scale) if abs(scale) < 1e9 else math.inf


def check_options(body: Mapping[str, Any]) -> None:
    """Refuse what vLLM would do without the gates, or not at all.

    Args:
        body: A request that experts answer.

    Raises:
        ValueError: If beam search is asked for, or more answers than are returned.
    """
    if body.get("use_beam_search"):
        raise ValueError("use_beam_search must be left out where experts answer, got it; it has no gates")
    best_of, n = body.get("best_of"), body.get("n")
    if best_of is not None and best_of != (1 if n is None else n):
        raise ValueError(f"best_of must be n or left out, got {best_of!r:.50} for n {n!r:.50}")


def read_chat(body: Mapping[str, Any]) -> Asked:
    """The last user turn, and the images of all turns.

    Raises:
        ValueError: If the messages are not of OpenAI's form, or an image is not a data URL.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise ValueError("messages must be a list of objects, got another value")
    instruction, images = None, []
    for place, message in enumerate(messages):
        texts = []
        for part in _parts(message.get("content"), place):
            if part.get("type") == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
            elif part.get("type") == "image_url":
                images.append(_image(part.get("image_url"), place))
            else:
                raise ValueError(f"messages[{place}].content must hold text and image_url parts, got another")
        if message.get("role") == "user":
            instruction = "".join(texts).strip()
    if instruction is None:
        raise ValueError("messages must hold a user message, got none")
    if len(images) > MAX_IMAGES:
        raise ValueError(f"images must be {MAX_IMAGES} at most, got {len(images)}")
    return Asked(instruction, images)


def read_completion(body: Mapping[str, Any], family: Family) -> Asked:
    """The last user turn of a prompt; the whole prompt where no turn is marked.

    Raises:
        ValueError: If the prompt is not one text.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        (prompt,) = prompt
    if not isinstance(prompt, str):
        raise ValueError("prompt must be one text to be routed, got another value; ask for each text alone")
    turn = family.user_turn(prompt)
    return Asked(family.without_placeholders(prompt) if turn is None else turn)


def _parts(content: Any, place: int) -> list[dict[str, Any]]:
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content or ""}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError(f"messages[{place}].content must be text or a list of parts, got another value")
    return content


def _image(given: Any, place: int) -> bytes:
    url = given.get("url") if isinstance(given, dict) else None
    header, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    header = header.lower()
    if not header.startswith("data:image/") or not header.endswith(";base64") or not comma:
        raise ValueError(
            f"messages[{place}]: an image must be a data URL in base64 to be routed, got another; "
            f"or name the experts, as {AUTOMATIC}:expert"
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"messages[{place}]: image data must be valid base64, got other text") from None
