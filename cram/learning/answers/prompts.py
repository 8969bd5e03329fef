"""The text of a conversation up to where the next answer begins.

It follows the processor's chat template. Without a template it is LLaVA-1.5's:

    USER: <image>\nquestion ASSISTANT: answer</s>USER: question ASSISTANT:
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def image_placeholder(processor: Any) -> str:
    """What stands for an image in a prompt."""
    return str(getattr(processor, "image_token", "<image>"))


def message(role: str, text: str, images: int = 0) -> dict[str, Any]:
    """A message as chat templates take it, its images before its text."""
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def message_text(given: Mapping[str, Any]) -> str:
    """The text of a message."""
    return "".join(part["text"] for part in given["content"] if part["type"] == "text")


def chat_text(processor: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt of messages whose last one is the user's.

    It is what a tokenizer must be given that adds its own tokens: none of them is in the ids twice.

    Args:
        processor: The model's processor.
        messages: `{"role", "content"}` with parts of type "image" and "text".
    """
    if getattr(processor, "chat_template", None):
        text = str(processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
        return _begun_once(processor.tokenizer, text)
    placeholder = image_placeholder(processor)
    written = []
    for each in messages:
        text = message_text(each)
        if each["role"] == "user":
            images = placeholder * sum(part["type"] == "image" for part in each["content"])
            written.append(f"USER: {images}\n{text} ASSISTANT:" if images else f"USER: {text} ASSISTANT:")
        else:
            written.append(f" {text}{processor.tokenizer.eos_token or ''}")
    return "".join(written)


def _begun_once(tokenizer: Any, text: str) -> str:
    """A prompt without the token that begins it, where the template writes it and the tokenizer adds it."""
    begin = tokenizer.bos_token
    if not begin or not text.startswith(begin):
        return text
    adds = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(begin) if adds else text
