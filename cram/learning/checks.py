"""What is checked of a stream before the first step, with the model and its processor at hand.

A fault in the last row of the last task is named before the first task is trained: a picture that cannot be
opened or that the processor refuses, a control token of the model within a text, role markers that hide the
question, a prompt beyond the context.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from cram.config import CramConfig
from cram.console import ProgressBar
from cram.families import Family, family_of
from cram.learning.batches import build_prompt, context_of
from cram.learning.schedule import total_steps
from cram.scoring.scorers import check_answers
from cram.streams.types import Sample, Stream, open_image

# Processors refuse pictures of extreme shape; only such ones are shown to the processor ahead.
THIN = 20
TEXTS_AT_ONCE = 1024
# Adam moves a weight by about the learning rate per step; below this sum of rates nothing is learnt.
LEAST_MOVE = 5e-3

Size = tuple[int, int]


def check_samples(stream: Stream, processor: Any, model: Any, shown: bool = False) -> None:
    """Open every picture once and read every text once.

    Args:
        stream: The stream.
        processor: The model's processor.
        model: The model, whose configuration gives the length of the context.
        shown: True if progress is printed.

    Raises:
        ValueError: For the first fault, with the file and the row of the sample; or if the tokenizer ends
            every text.
    """
    samples = [(sample, 0) for task in stream.tasks for sample in task.train]
    samples += [(sample, task.max_new_tokens) for task in stream.tasks for sample in task.test]
    _check_tokenizer(processor.tokenizer)
    control = control_tokens(processor.tokenizer)
    family = family_of(model)
    for sample, _ in samples:
        _check_texts(sample, control)
        _check_markers(sample, processor, family)
    with ProgressBar("check pictures", len(samples), shown) as bar:
        sizes = _check_pictures([sample for sample, _ in samples], processor, bar)
    context = context_of(model)
    if context is not None:
        _check_lengths(samples, sizes, processor, context)


def check_tests(stream: Stream) -> None:
    """Refuse a test split that could be answered but not scored.

    Raises:
        ValueError: With the task, and with the sample where it is an answer.
    """
    for task in stream.tasks:
        most = task.max_new_tokens
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise ValueError(f"max_new_tokens of task {task.name!r} must be an int >= 1, got {most!r}")
        for field, scorer in (("scorer", task.scorer), ("published", task.published or task.scorer)):
            try:
                check_answers(scorer, task.test)
            except ValueError as error:
                raise ValueError(f"{field} of task {task.name!r}: {error}") from error


def few_steps(stream: Stream, config: CramConfig) -> list[str]:
    """One line per task whose steps are too few to learn anything at the configured rate."""
    lines = []
    for task in stream.tasks:
        steps = total_steps(len(task.train), config)
        if steps * config.learning_rate < LEAST_MOVE:
            wanted = round(LEAST_MOVE / config.learning_rate)
            lines.append(
                f"task {task.name!r} has {steps} steps at learning rate {config.learning_rate:g}, which "
                f"hardly move a weight; give it {wanted} (epochs, max_steps, batch_size) or a higher rate"
            )
    return lines


def control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Matches every token that stands for something else than its text, such as the end of an answer."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {str(token) for token in tokenizer.all_special_tokens}
    names |= {str(token) for token in added if getattr(token, "special", False)}
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _check_tokenizer(tokenizer: Any) -> None:
    """Refuse a tokenizer that ends every text, so that an answer would follow behind the end."""
    if tokenizer("x")["input_ids"][-1] == tokenizer.eos_token_id:
        raise ValueError(
            f"the tokenizer must not end a prompt, got one that adds {tokenizer.eos_token!r}; set its "
            "add_eos_token to false"
        )


def _check_texts(sample: Sample, control: re.Pattern[str]) -> None:
    for field, texts in (
        ("question", (sample.instruction,)),
        ("answer", (sample.answer, *sample.references)),
    ):
        found = next((match for text in texts if (match := control.search(text))), None)
        if found is not None:
            raise ValueError(
                f"{sample.place}: the {field} must hold no control token of the model, got {found[0]!r}"
            )


def _check_markers(sample: Sample, processor: Any, family: Family) -> None:
    """Refuse a row whose prompt is not read back as its question, because a text holds role markers."""
    texts = (sample.instruction, sample.answer)
    found = [marker for pair in family.turns for marker in pair if any(marker in text for text in texts)]
    if not found:
        return
    prompt = build_prompt(processor, sample.instruction, len(sample.images))
    for whole in (prompt, f"{prompt} {sample.answer}{processor.tokenizer.eos_token or ''}"):
        read = family.user_turn(whole)
        if read != sample.instruction.strip():
            raise ValueError(
                f"{sample.place}: question and answer must leave the question readable in its prompt, got "
                f"role markers {found}, which make it {read!r:.200}"
            )


def _check_pictures(samples: Sequence[Sample], processor: Any, bar: ProgressBar) -> list[list[Size]]:
    """The (height, width) of the pictures of each sample; files that several samples show are opened once."""
    known: dict[Path, Size] = {}

    def sizes(sample: Sample) -> list[Size]:
        found = []
        for image in sample.images:
            size = known.get(image) if isinstance(image, Path) else None
            if size is None:
                size = _size(sample, image, processor)
            if isinstance(image, Path):
                known[image] = size
            found.append(size)
        return found

    # Pillow decodes without the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = []
        for found in pool.map(sizes, samples):
            made.append(found)
            bar.advance()
        return made


def _size(sample: Sample, image: Any, processor: Any) -> Size:
    try:
        picture = open_image(image)
        if max(picture.size) > THIN * min(picture.size):
            processor.image_processor(images=[picture], return_tensors="pt")
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{sample.place}: {_named(image)}{error}") from error
    return picture.height, picture.width


def _named(image: Any) -> str:
    return f"picture {image}: " if isinstance(image, Path) else ""


def _check_lengths(
    samples: Sequence[tuple[Sample, int]], sizes: Sequence[list[Size]], processor: Any, context: int
) -> None:
    """Refuse a prompt that is longer than the context together with its answer."""
    rows = iter(zip(samples, sizes, strict=True))
    while part := list(islice(rows, TEXTS_AT_ONCE)):
        prompts = [build_prompt(processor, sample.instruction, len(shown)) for (sample, _), shown in part]
        answers = [sample.answer for (sample, _), _ in part]
        lengths = zip(_tokens(processor, prompts), _tokens(processor, answers), part, strict=True)
        for prompt, answer, ((sample, limit), shown) in lengths:
            needed = prompt + (limit or answer + 1) + sum(_image_tokens(processor, shown)) - len(shown)
            if needed > context:
                raise ValueError(
                    f"{sample.place}: prompt and answer must fit into {context} tokens, got {needed}"
                )


def _tokens(processor: Any, texts: list[str]) -> Iterator[int]:
    return map(len, processor.tokenizer(texts)["input_ids"])


def _image_tokens(processor: Any, sizes: Sequence[Size]) -> list[int]:
    """Language tokens of pictures of these sizes; 1 each where the processor does not count them."""
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is None or not sizes:
        return [1] * len(sizes)
    found: list[int] = count(image_sizes=[list(size) for size in sizes]).num_image_tokens
    return found
