"""Requests in the form of OpenAI's chat completions, read with suspicion.

A field that this server does not act on is refused unless it has the value that changes nothing, so that no
request is answered as if it had been understood.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from cram.families import Family
from cram.serve.request import Prompt, RequestError, Sampling
from cram.streams.types import open_image

AUTOMATIC, BASE = "cram", "base"
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_IMAGES = 16
MAX_MESSAGES = 256
NOT_IMAGES = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

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
# Field that is not acted on -> the values that change nothing; None where no value does.
WITHOUT_EFFECT: dict[str, tuple[Any, ...] | None] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "user": None,
    "metadata": None,
    "safety_identifier": None,
    "prompt_cache_key": None,
}


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
    """Reads requests for one model.

    Args:
        processor: The model's processor.
        family: The model's family.
        max_pixels: Pixels of an image at most.
    """

    def __init__(self, processor: Any, family: Family, max_pixels: int) -> None:
        self._processor, self._max_pixels = processor, max_pixels
        self._placeholder = str(getattr(processor, "image_token", "<image>"))
        self._forbidden = {self._placeholder, *family.placeholders}
        self._template = str(getattr(processor, "chat_template", None) or "")

    def read(self, body: Any) -> ChatRequest:
        """A request from its JSON body.

        Raises:
            RequestError: If anything in it is wrong, unknown or too large.
        """
        given = _checked_fields(body)
        if "model" not in given:
            raise RequestError("model must be given, got none")
        turns, images = self._turns(given.get("messages"))
        text, pictures = self._text(turns), tuple(images)

        def encode() -> Mapping[str, Tensor]:
            return dict(self._processor(text=[text], images=list(pictures) or None, return_tensors="pt"))

        options = given.get("stream_options", {})
        if unknown := sorted(options.keys() - {"include_usage", "include_obfuscation"}):
            raise RequestError(f"stream_options must hold include_usage, got {unknown}")
        return ChatRequest(
            model=given["model"],
            prompt=Prompt(encode, _instruction(turns[-1]), pictures),
            sampling=_sampling(given),
            mixture=_mixture(given["model"], given.get("lora")),
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
            parts = _parts(message.get("content"), place)
            content = []
            for part in parts:
                if part["type"] == "text":
                    content.append({"type": "text", "text": self._clean(part["text"], place)})
                    continue
                if role != "user" or len(images) >= MAX_IMAGES:
                    raise RequestError(
                        f"images must be {MAX_IMAGES} at most and in user messages, got another"
                    )
                images.append(self._image(part["image_url"], place))
                content.append({"type": "image"})
            turns.append({"role": "system" if role == "developer" else role, "content": content})
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

    def _image(self, given: Any, place: int) -> Image.Image:
        url = given.get("url") if isinstance(given, dict) else None
        if not isinstance(url, str) or not url.startswith("data:image/"):
            raise RequestError(
                f"messages[{place}]: image_url.url must be a data URL of an image, got another"
            )
        header, _, data = url.partition(",")
        if not header.endswith(";base64"):
            raise RequestError(f"messages[{place}]: image data must be in base64, got another encoding")
        try:
            content = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise RequestError(
                f"messages[{place}]: image data must be valid base64, got other text"
            ) from None
        try:
            with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
                pixels = image.width * image.height
                if pixels > self._max_pixels:
                    wanted = f"at most {self._max_pixels} pixels"
                    raise RequestError(f"messages[{place}]: an image must have {wanted}, got {pixels}")
                return open_image(image)
        except RequestError:
            raise
        except NOT_IMAGES:
            raise RequestError(
                f"messages[{place}]: image data must be a whole image of {IMAGE_FORMATS}, got other bytes"
            ) from None

    def _text(self, turns: Sequence[dict[str, Any]]) -> str:
        """The prompt up to where the answer begins."""
        if any(turn["role"] == "system" for turn in turns) and "system" not in self._template:
            raise RequestError(
                "messages must have no system message: this model's template has no place for it"
            )
        if self._template:
            return str(
                self._processor.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
            )
        end = self._processor.tokenizer.eos_token
        written = []
        for turn in turns:
            images = self._placeholder * sum(part["type"] == "image" for part in turn["content"])
            text = _instruction(turn)
            user = f"USER: {images}\n{text} " if images else f"USER: {text} "
            written.append(user if turn["role"] == "user" else f"ASSISTANT: {text}{end}")
        return "".join(written) + "ASSISTANT:"


def _checked_fields(body: Any) -> dict[str, Any]:
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
        elif name not in WITHOUT_EFFECT:
            raise RequestError(f"{name!r:.100} is not a known field; known are {sorted(FIELDS)}")
        elif (legal := WITHOUT_EFFECT[name]) is not None and value not in legal:
            raise RequestError(f"{name} is not supported, except with the value {legal[0]!r}")
    return given


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
    return content


def _instruction(turn: Mapping[str, Any]) -> str:
    """The text of a turn."""
    return "".join(part["text"] for part in turn["content"] if part["type"] == "text")


def _sampling(given: Mapping[str, Any]) -> Sampling:
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


def _mixture(model: str, lora: Any) -> dict[str, float] | None:
    """The mixture that a request names by its model or by `lora`.

    An unknown expert is found by the engine, which knows the experts of the moment.
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
