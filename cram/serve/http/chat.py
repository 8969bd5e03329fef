"""Requests in the form of OpenAI's chat completions, read with suspicion."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from cram.families import Family
from cram.learning.answers.prompts import chat_text, image_placeholder, message_text
from cram.serve.http.fields import IN_MESSAGES, checked_fields, named_mixture, refuse_others, sampling
from cram.serve.http.images import read_image
from cram.serve.request import Prompt, RequestError, Sampling

MAX_IMAGES = 16
MAX_MESSAGES = 256


@dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Attributes:
        model: As the client named it.
        prompt: What is asked.
        sampling: How tokens are chosen.
        mixture: See `Request`.
        stream: Whether the answer is sent piece by piece.
        usage: Whether a stream ends with the token counts.
    """

    model: str
    prompt: Prompt
    sampling: Sampling
    mixture: Mapping[str, float] | None
    stream: bool
    usage: bool


class ChatReader:
    """Reads requests for one model; may be called from several threads.

    Args:
        processor: The model's processor.
        family: The model's family.
        max_pixels: Pixels of all images of a request together at most.
        max_characters: Characters of all texts of a request together at most.
    """

    def __init__(self, processor: Any, family: Family, max_pixels: int, max_characters: int) -> None:
        # Its own, because a tokenizer is not made to be used by two threads at once.
        self._processor, self._lock = copy.deepcopy(processor), threading.Lock()
        self._max_pixels, self._max_characters = max_pixels, max_characters
        self._forbidden = {image_placeholder(processor), *family.placeholders}
        self._template = str(getattr(processor, "chat_template", None) or "")

    def read(self, body: Any) -> ChatRequest:
        """A request from its JSON body.

        Raises:
            RequestError: If anything in it is wrong, unknown or too large.
        """
        given = checked_fields(body)
        if "model" not in given:
            raise RequestError("model must be given, got none")
        options = given.get("stream_options", {})
        if unknown := sorted(options.keys() - {"include_usage", "include_obfuscation"}):
            raise RequestError(f"stream_options must hold include_usage, got {unknown!r:.100}")
        chosen, mixture = sampling(given), named_mixture(given["model"], given.get("lora"))
        turns, images = self._turns(given.get("messages"))
        return ChatRequest(
            model=given["model"],
            prompt=self._prompt(turns, images),
            sampling=chosen,
            mixture=mixture,
            stream=given.get("stream", False),
            usage=options.get("include_usage") is True,
        )

    def _turns(self, messages: Any) -> tuple[list[dict[str, Any]], list[Image.Image]]:
        """Turns with content parts as chat templates take them, and all images in order."""
        if not messages or len(messages) > MAX_MESSAGES:
            raise RequestError(f"messages must be 1 to {MAX_MESSAGES}, got {len(messages or ())}")
        turns: list[dict[str, Any]] = []
        images: list[Image.Image] = []
        for place, message in enumerate(messages):
            role = message.get("role") if isinstance(message, dict) else None
            if role not in ("system", "developer", "user", "assistant"):
                raise RequestError(
                    f"messages[{place}].role must be system, user or assistant, got {role!r:.50}"
                )
            refuse_others(message, ("role", "content"), IN_MESSAGES, f"messages[{place}].")
            given = message.get("content")
            # An answer may have been empty.
            parts = _parts("" if given is None and role == "assistant" else given, place)
            content = []
            for part in parts:
                if part["type"] == "text":
                    content.append({"type": "text", "text": self._clean(part["text"], place)})
                    continue
                if role != "user" or len(images) >= MAX_IMAGES:
                    raise RequestError(
                        f"images must be {MAX_IMAGES} at most and in user messages, got another"
                    )
                left = self._max_pixels - sum(each.width * each.height for each in images)
                images.append(read_image(part["image_url"], f"messages[{place}]", left))
                content.append({"type": "image"})
            turns.append({"role": "system" if role == "developer" else role, "content": content})
        characters = sum(len(message_text(turn)) for turn in turns)
        if characters > self._max_characters:
            raise RequestError(
                f"messages must have at most {self._max_characters} characters, got {characters}"
            )
        if turns[-1]["role"] != "user":
            raise RequestError(f"messages must end with the user's, got {turns[-1]['role']!r}")
        return turns, images

    def _clean(self, text: str, place: int) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError(f"messages[{place}] must be valid Unicode, got half a character") from None
        found = [each for each in self._forbidden if each in text]
        if found:
            raise RequestError(f"messages[{place}] must not contain {found[0]!r}, which stands for an image")
        return text

    def _prompt(self, turns: list[dict[str, Any]], images: list[Image.Image]) -> Prompt:
        if any(turn["role"] == "system" for turn in turns) and "system" not in self._template:
            raise RequestError(
                "messages must have no system message: this model's template has no place for it"
            )
        with self._lock:
            try:
                text = chat_text(self._processor, turns)
                inputs = self._processor(text=[text], images=images or None, return_tensors="pt")
            except (ValueError, TemplateError) as error:
                raise RequestError(f"messages must fit the model's template, got: {error}") from None
        encoded: Mapping[str, Tensor] = dict(inputs)
        size = sum(each.nbytes for each in encoded.values()) + sum(
            3 * each.width * each.height for each in images
        )
        return Prompt(lambda: encoded, message_text(turns[-1]), tuple(images), size)


def _parts(content: Any, place: int) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise RequestError(f"messages[{place}].content must be text or a list of parts, got another")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if (
            kind not in ("text", "image_url")
            or kind not in part
            or (kind == "text" and not isinstance(part["text"], str))
        ):
            raise RequestError(f"messages[{place}].content must hold text and image_url parts, got another")
        refuse_others(part, ("type", kind), {}, f"messages[{place}].content.")
    return content
