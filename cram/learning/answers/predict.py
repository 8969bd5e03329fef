"""Answers to questions that come from outside of a stream: one, many, or the turns of a conversation.

Prompts, pictures and decoding are those of training and evaluation. Every answer says how it was routed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cram.attach import attached
from cram.console import ProgressBar
from cram.learning.answers.generate import generate_answers
from cram.learning.answers.prompts import chat_text, message
from cram.learning.batches import Example, build_prompt, context_of, pad_id
from cram.loading import load_processor
from cram.model.attached import AttachedModel
from cram.routing.query import Route
from cram.streams.types import open_image

if TYPE_CHECKING:
    from PIL import Image

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Turn:
    """One question of a conversation.

    Attributes:
        question: What the user says, without image placeholders.
        images: Opened images or paths that the question shows; empty for none.
        answer: What the model said; empty while it has not answered.
    """

    question: str
    images: tuple[Image.Image | Path, ...] = ()
    answer: str = ""

    @classmethod
    def of(cls, question: str, images: Any = ()) -> Turn:
        """A turn from a question and one image (opened, or a path), several or none.

        Raises:
            ValueError: If the question says nothing.
        """
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"question must be a non-empty string, got {question!r:.200}")
        several = images if isinstance(images, list | tuple) else [] if images is None else [images]
        opened = tuple(Path(image) if isinstance(image, str) else image for image in several)
        return cls(question.strip(), opened)


@dataclass(frozen=True)
class Answer:
    """An answer and how it was routed; as a string it is its text.

    Attributes:
        text: What the model said.
        group: The question's instruction group; None where the method has no groups.
        gates: Expert -> gate, the mean over the decoder layers. Empty where no expert has acted, and where
            every layer made gates of its own.
    """

    text: str
    group: int | None = None
    gates: dict[str, float] | None = None

    def __str__(self) -> str:
        return self.text

    def routing(self) -> str:
        """Group and gates in one line, such as "group 0; colour 0.98, letter 0.02"."""
        named = sorted((self.gates or {}).items(), key=lambda pair: -abs(pair[1]))
        shown = ", ".join(f"{name} {gate:.2f}" for name, gate in named if abs(gate) >= 0.005)
        parts = [f"group {self.group}"] if self.group is not None else []
        return "; ".join([*parts, shown or "no expert by a gate of its own"])


def answer(
    model: nn.Module,
    question: str,
    images: Any = (),
    *,
    processor: Any = None,
    expert: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Answer:
    """Answer one question; see `answer_all`.

    Args:
        model: An attached model.
        question: The user's turn without image placeholders.
        images: One image or several, opened or as paths; none for a question without a picture.
        processor: See `answer_all`.
        expert: See `answer_all`.
        max_new_tokens: See `answer_all`.
    """
    chats = [[Turn.of(question, images)]]
    return answer_all(model, chats, processor=processor, expert=expert, max_new_tokens=max_new_tokens)[0]


def answer_all(
    model: Any,
    conversations: Sequence[Sequence[Turn]],
    *,
    processor: Any = None,
    expert: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    bar: ProgressBar | None = None,
) -> list[Answer]:
    """Answer the last turn of every conversation, greedily; the model's modes are left as they were.

    The last question and all pictures of a conversation decide its route.

    Args:
        model: An attached model.
        conversations: Turns, all but the last one with their answers.
        processor: The model's processor; by default the one that `attach` was given, else the one in the
            model's own folder.
        expert: Name of the expert that answers alone, with gate 1; by default the method routes.
        max_new_tokens: Length limit of an answer.
        bar: Progress, a conversation each.

    Raises:
        ValueError: If an image cannot be read, a question contains an image placeholder, a conversation fills
            the context, the method must be told the task and no expert is named, or the expert is unknown.
    """
    cram = attached(model)
    _check_told(cram, expert)
    processor = _processor(model, cram, processor)
    context = context_of(model)
    prompts = [conversation_prompt(processor, turns) for turns in conversations]
    routings: list[Answer] = [Answer("")] * len(prompts)
    indices_now: list[int] = []

    @contextmanager
    def routed(indices: list[int]) -> Iterator[None]:
        indices_now[:] = indices
        with _routed(cram, [conversations[index] for index in indices], expert):
            yield

    def seen() -> None:
        for row, index in enumerate(indices_now):
            routings[index] = _routing(cram, cram.state.route, row)

    with evaluation(model):
        texts = generate_answers(
            model,
            processor.tokenizer,
            lambda index: _encode(processor, prompts[index], conversations[index], context),
            routed,
            lengths=[len(prompt) for prompt in prompts],
            max_new_tokens=max_new_tokens,
            batch_size=cram.config.eval_batch_size,
            padding=pad_id(processor.tokenizer),
            bar=bar or ProgressBar("answers", max(1, len(prompts)), shown=False),
            seen=seen,
        )
    return [replace(how, text=text) for how, text in zip(routings, texts, strict=True)]


def conversation_prompt(processor: Any, turns: Sequence[Turn]) -> str:
    """The text of a conversation up to where the next answer begins.

    One turn gives exactly the prompt of training.

    Raises:
        ValueError: If there is no turn, or the last question contains the image placeholder.
    """
    if not turns:
        raise ValueError("turns must hold at least one question, got none")
    *earlier, last = turns
    prompt = build_prompt(processor, last.question, len(last.images))
    if not earlier:
        return prompt
    messages = []
    for turn in turns:
        messages += [message("user", turn.question, len(turn.images)), message("assistant", turn.answer)]
    return chat_text(processor, messages[:-1])


class Conversation:
    """A conversation with an attached model; every turn reads the whole of it and is routed anew.

    Args:
        model: An attached model.
        options: Keyword arguments of `answer_all`.

    Attributes:
        turns: The turns that have been answered.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self._model, self._options = model, options
        self.turns: list[Turn] = []

    def ask(self, question: str, images: Any = ()) -> Answer:
        """Answer the next turn; a turn that raises leaves the conversation as it was.

        Args:
            question: What the user says.
            images: Pictures that this turn shows; earlier ones stay in sight.

        Raises:
            ValueError: See `answer_all`.
        """
        turn = Turn.of(question, images)
        found = answer_all(self._model, [[*self.turns, turn]], **self._options)[0]
        self.turns.append(replace(turn, answer=found.text))
        return found


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode inside and gives every module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_told(cram: AttachedModel, expert: str | None) -> None:
    if cram.method.told_task and expert is None:
        raise ValueError(
            f"expert must be named for the method {cram.method.name!r}, one of {cram.expert_names}, got none"
        )


def _processor(model: Any, cram: AttachedModel, given: Any) -> Any:
    """A whole processor: with `tokenizer` and a call that takes images."""
    found = cram.processor if given is None else given
    if hasattr(found, "tokenizer"):
        return found
    source = str(getattr(model, "name_or_path", "") or "")
    if not source:
        raise ValueError(f"processor must be the model's whole processor, got {type(found).__name__}")
    return load_processor(source)


def _encode(processor: Any, prompt: str, turns: Sequence[Turn], context: int | None) -> Example:
    images = [open_image(image) for turn in turns for image in turn.images]
    inputs = processor(text=[prompt], images=images or None, return_tensors="pt")
    made = Example(dict(inputs), torch.zeros(0, dtype=torch.int64))
    if context is not None and made.length >= context:
        raise ValueError(f"prompt must leave room for an answer in {context} tokens, got {made.length}")
    return made


@contextmanager
def _routed(
    cram: AttachedModel, conversations: Sequence[Sequence[Turn]], expert: str | None
) -> Iterator[None]:
    """How a batch is routed: by the named expert, by the forward itself, or by its explicit query."""
    if expert is not None:
        with cram.forced(expert):
            yield
    elif cram.encoder.reuses_vision_tower or not cram.method.uses_queries or not cram.num_experts:
        yield
    else:
        pictures = [[open_image(i) for turn in turns for i in turn.images] for turns in conversations]
        query = cram.encode([turns[-1].question for turns in conversations], pictures)
        with cram.fixed(cram.route(query)):
            yield


def _routing(cram: AttachedModel, route: Route | None, row: int) -> Answer:
    """What an answer says of its route, without a text."""
    if route is None:
        return Answer("", gates={})
    group = None if route.groups is None else int(_row(route.groups, row))
    own = [m for m in cram.modules.values() if m.gating is not None or m.solo is not None]
    if own and not route.overrides_gating:
        return Answer("", group, {})
    gates = _row(route.gates.transpose(0, 1), row).double().mean(0).tolist()
    return Answer("", group, dict(zip(cram.expert_names, gates, strict=True)))


def _row(values: Tensor, row: int) -> Tensor:
    """The entry of a sample; one entry serves all samples."""
    return values[row if len(values) > 1 else 0]
