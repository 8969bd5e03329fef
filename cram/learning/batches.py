"""From samples to model inputs: the prompt, its tokens and pixels, and padded batches.

Prompts are those of `cram.learning.answers.prompts`. Generation starts from the prompt's tokens. Training
adds the answer and the end token behind the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cram.learning.answers.prompts import chat_text, image_placeholder, message
from cram.streams.types import Sample, open_images

IGNORED = -100
CACHE_BYTES = 4 << 30


@dataclass(frozen=True)
class Example:
    """One encoded sample.

    Attributes:
        inputs: Model inputs of the prompt: `input_ids` [1, T], and pixel tensors as the processor gives them.
        answer: [N] ids of the answer with the end token.
    """

    inputs: dict[str, Tensor]
    answer: Tensor

    @property
    def length(self) -> int:
        """Number of tokens of the prompt."""
        return self.inputs["input_ids"].shape[1]

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.inputs.values())


def build_prompt(processor: Any, instruction: str, num_images: int) -> str:
    """Return the text of a user's turn up to the beginning of the answer, with one placeholder per image.

    Raises:
        ValueError: If the instruction itself contains the image placeholder.
    """
    placeholder = image_placeholder(processor)
    if placeholder in instruction:
        raise ValueError(f"instruction must not contain {placeholder!r}, got {instruction!r:.200}")
    return chat_text(processor, [message("user", instruction, num_images)])


def encode_sample(processor: Any, sample: Sample) -> Example:
    """Encode a sample's prompt, images and answer.

    Raises:
        ValueError: If an image cannot be read, or the instruction contains an image placeholder.
    """
    images = open_images(sample)
    prompt = build_prompt(processor, sample.instruction, len(images))
    inputs = processor(text=[prompt], images=images or None, return_tensors="pt")
    return Example(dict(inputs), _answer_ids(processor.tokenizer, prompt, sample.answer))


def _answer_ids(tokenizer: Any, prompt: str, answer: str) -> Tensor:
    """Ids [N] of the answer and the end token, as the tokenizer cuts the answer behind this prompt.

    If the tokenizer merges prompt and answer at the border, the answer is tokenized on its own.
    """
    spaced = answer if prompt[-1:].isspace() else f" {answer}"
    before = tokenizer(prompt)["input_ids"]
    together = tokenizer(prompt + spaced)["input_ids"]
    if together[: len(before)] == before:
        ids = together[len(before) :]
    else:
        ids = tokenizer(spaced, add_special_tokens=False)["input_ids"]
    return torch.tensor([*ids, tokenizer.eos_token_id])


def context_of(model: Any) -> int | None:
    """Return the tokens of prompt and answer that a model can tell apart; None where it does not say."""
    text = getattr(model.config, "text_config", model.config)
    context = getattr(text, "max_position_embeddings", None)
    return None if context is None else int(context)


def pad_id(tokenizer: Any) -> int:
    """Return the padding id. A tokenizer without one gives the id of the end token."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def collate(examples: Sequence[Example], padding: int, left: bool) -> dict[str, Tensor]:
    """Batch prompts. Per-token inputs are padded on one side to the longest; others are concatenated."""
    longest = max(example.length for example in examples)
    batch: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for example in examples for key in example.inputs):
        rows = []
        for example in examples:
            if key not in example.inputs:
                continue
            value = example.inputs[key]
            if value.shape == (1, example.length):
                gap = longest - example.length
                fill = padding if key == "input_ids" else 0
                value = F.pad(value, (gap, 0) if left else (0, gap), value=fill)
            rows.append(value)
        batch[key] = torch.cat(rows)
    return batch


def to_model(batch: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Move a batch to the model's device. Floating-point inputs get the model's dtype."""
    return {
        key: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for key, value in batch.items()
    }


def training_batch(examples: Sequence[Example], padding: int) -> tuple[dict[str, Tensor], Tensor]:
    """Batch prompts with their answers, padded on the right.

    Returns:
        The model inputs, and labels [B, T]. Labels outside the answers are `IGNORED`.
    """
    whole = [_with_answer(example) for example in examples]
    batch = collate(whole, padding, left=False)
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for row, example in enumerate(examples):
        labels[row, example.length : example.length + len(example.answer)] = example.answer
    return batch, labels


def _with_answer(example: Example) -> Example:
    """The example with its answer behind the prompt. The answer's tokens are attended and of text type."""
    inputs = dict(example.inputs)
    for key, value in example.inputs.items():
        if key == "input_ids":
            inputs[key] = torch.cat([value, example.answer[None]], dim=1)
        elif value.shape == example.inputs["input_ids"].shape:
            tail = value.new_full((1, len(example.answer)), int(key == "attention_mask"))
            inputs[key] = torch.cat([value, tail], dim=1)
    return Example(inputs, example.answer)


@dataclass
class Budget:
    """The number of bytes that encoded samples may still use."""

    left: int


class EncodedSplit:
    """A split's encoded samples. Samples within the budget stay in memory; others are encoded at each use.

    Args:
        processor: The model's processor.
        samples: The split.
        budget: The budget that all splits of a run share.
    """

    def __init__(self, processor: Any, samples: Sequence[Sample], budget: Budget) -> None:
        self._processor, self._samples, self._budget = processor, samples, budget
        self._examples: dict[int, Example] = {}

    def example(self, index: int) -> Example:
        """Return one encoded sample."""
        if (known := self._examples.get(index)) is not None:
            return known
        example = encode_sample(self._processor, self._samples[index])
        if example.num_bytes <= self._budget.left:
            self._budget.left -= example.num_bytes
            self._examples[index] = example
        return example

    def release(self) -> None:
        """Forget everything and give the bytes back."""
        self._budget.left += sum(example.num_bytes for example in self._examples.values())
        self._examples.clear()
