"""The training examples of the second base: pictures as features of the frozen tower, questions as tokens.

The tower never changes, so each picture passes through it once. `draw_pictures` keeps 24 KB per picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from cram.base.model import BOS, EOS, IMAGE, TEXT_LENGTH, token_id
from cram.base.pool import IGNORED
from cram.base.real.model import IMAGE_TOKENS, PIXEL_MEAN, PIXEL_STD
from cram.base.real.siblings import MAKERS, Ask, any_names
from cram.base.real.tower import FINE, LiteTower
from cram.base.real.wordings import FORMATS, LETTERS, instruction, list_options

PICTURES_A_PASS, PASSES_MEASURED = 64, 32
NO_PICTURE = -1
LOOKUP_TURNS = 7


@dataclass
class Row:
    """One question: its picture's index (or `NO_PICTURE`), maker, format, texts and answer.

    `more` holds the questions and answers of further turns. Without `roles`, nothing says who speaks.
    """

    picture: int
    maker: str
    form: str
    question: str
    instruction: str
    answer: str
    more: tuple[tuple[str, str], ...] = ()
    roles: bool = True


@dataclass
class Pool:
    """Rows as token lists, beside the features of their pictures, bf16 [N, 16, 768].

    `labels` repeats the tokens of answers and is IGNORED elsewhere. `texts` are what the text tower reads.
    """

    features: Tensor
    rows: list[Row]
    ids: list[list[int]]
    labels: list[list[int]]
    texts: list[list[int]]
    forms: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def pixels(pictures: list[np.ndarray], dtype: torch.dtype) -> Tensor:
    """Preprocessed pictures [B, 3, 128, 128] from uint8 [128, 128, 3]."""
    values = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return ((values - PIXEL_MEAN) / PIXEL_STD).to(dtype, memory_format=torch.channels_last)


def draw_pictures(
    seed: int, count: int, asked: int, tower: LiteTower, *, measure: bool = False
) -> tuple[Tensor, list[Row]]:
    """Draw pictures and `asked` questions about each.

    Args:
        seed: Decides all pictures and questions.
        count: Number of draws; a draw without a picture gives questions alone.
        asked: Questions per draw.
        tower: The frozen tower.
        measure: Set the tower's shift and scale by the first `PASSES_MEASURED` passes.

    Returns:
        Features [N, 16, 768] in bf16, and the rows.
    """
    rng = np.random.default_rng(seed)
    weights = np.array([weight for _, weight in MAKERS])
    kinds = rng.choice(len(MAKERS), size=count, p=weights / weights.sum())
    features, rows, waiting = [], [], []
    pictures = 0
    for kind in kinds:
        make = MAKERS[kind][0]
        picture, asks = make(rng)
        index = NO_PICTURE
        if picture is not None:
            index, pictures = pictures, pictures + 1
            waiting.append(np.asarray(picture))
        rows += [_row(rng, index, make.__name__, asks) for _ in range(asked)]
        if len(waiting) == PICTURES_A_PASS:
            features.append(_run(tower, waiting))
            waiting = []
            if measure and len(features) == PASSES_MEASURED:
                features, measure = [standardise(tower, torch.cat(features))], False
    if waiting:
        features.append(_run(tower, waiting))
    return torch.cat(features), rows


def draw_lookups(seed: int, count: int) -> list[Row]:
    """Rows without a picture: a list of options, then letters asked by name and names asked by letter.

    Half of them are dialogues of `LOOKUP_TURNS` turns; the others are the bare names and letters, the same
    lookup in fewer tokens.
    """
    rng = np.random.default_rng(seed)
    names = any_names()
    words = tuple(sorted({word for name in names for word in name.split()}))
    return [_lookup(rng, words if rng.random() < 0.5 else names, rng.random() < 0.5) for _ in range(count)]


def _lookup(rng: np.random.Generator, names: tuple[str, ...], roles: bool) -> Row:
    options = [names[i] for i in rng.permutation(len(names))[: rng.integers(2, len(LETTERS) + 1)]]
    shown = list_options(options)
    if not roles:
        named = [(options[i], LETTERS[i]) for i in rng.integers(0, len(options), 2 * LOOKUP_TURNS)]
        first = f"{shown} {named[0][0]}"
        return Row(NO_PICTURE, "lists", "letter", first, first, named[0][1], tuple(named[1:]), roles=False)
    turns: list[tuple[str, str]] = []
    for i in rng.integers(0, len(options), LOOKUP_TURNS):
        forward = rng.random() < 0.7
        thing = options[i] if forward else f"option {LETTERS[i]}"
        asked = f"And {thing}?" if turns else f"{'Which option' if forward else 'What'} is {thing}?"
        turns.append((asked, LETTERS[i] if forward else options[i]))
    question, answer = turns[0]
    form = "letter" if answer in LETTERS else "word"
    text = f"{question} {shown}" if rng.random() < 0.7 else f"{shown} {question}"
    return Row(NO_PICTURE, "lookups", form, question, text, answer, tuple(turns[1:]))


def _row(rng: np.random.Generator, picture: int, maker: str, asks: list[Ask]) -> Row:
    ask = asks[int(rng.integers(len(asks)))]
    text = instruction(rng, ask.question, list(ask.options), ask.form)
    return Row(picture, maker, ask.form, ask.question, text, ask.answer)


@torch.no_grad()
def _run(tower: LiteTower, pictures: list[np.ndarray]) -> Tensor:
    return tower(pixels(pictures, tower.dtype)).last_hidden_state.to(torch.bfloat16)


def standardise(tower: LiteTower, features: Tensor) -> Tensor:
    """Set the tower's shift and scale so that these features [N, 16, 768] have mean 0 and deviation 1.

    Returns:
        The features as the tower gives them from then on.
    """
    values = features.float().flatten(0, 1)
    mean, deviation = values.mean(0), values.std(0)
    tower.mean.data.copy_(mean)
    tower.scale.data.copy_(1 / deviation.clamp(min=1e-2 * float(deviation[FINE:].mean())))
    return ((features.float() - tower.mean) * tower.scale).to(features.dtype)


def tokenize(features: Tensor, rows: list[Row], tokenizer: Tokenizer) -> Pool:
    """Rows in the model's chat form, and instructions as the text tower reads them."""
    bos, eos = token_id(tokenizer, BOS), token_id(tokenizer, EOS)
    shown = {True: IMAGE * IMAGE_TOKENS + "\n", False: ""}
    prompts = tokenizer.encode_batch(
        [
            f"USER: {shown[row.picture != NO_PICTURE]}{row.instruction} ASSISTANT:"
            if row.roles
            else row.instruction
            for row in rows
        ]
    )
    ends = {True: [eos], False: []}
    told = tokenizer.encode_batch([f" {row.answer}" for row in rows])
    answers = [each.ids + ends[row.roles] for each, row in zip(told, rows, strict=True)]
    texts = tokenizer.encode_batch([row.instruction for row in rows])
    ids = [[bos, *asked.ids, *told] for asked, told in zip(prompts, answers, strict=True)]
    labels = [[IGNORED] * (1 + len(asked.ids)) + told for asked, told in zip(prompts, answers, strict=True)]
    for i, row in enumerate(rows):
        for question, answer in row.more:
            asked = tokenizer.encode(f"USER: {question} ASSISTANT:" if row.roles else f" {question}").ids
            reply = tokenizer.encode(f" {answer}").ids + ends[row.roles]
            ids[i] += asked + reply
            labels[i] += [IGNORED] * len(asked) + reply
    return Pool(
        features,
        rows,
        ids,
        labels,
        [[bos, *each.ids[: TEXT_LENGTH - 2], eos] for each in texts],
        np.array([FORMATS.index(row.form) for row in rows]),
    )


def batches(pool: Pool, tokens: int, rng: np.random.Generator, subset: np.ndarray) -> Iterator[np.ndarray]:
    """Endless batches of indices of similar length, each of at most `tokens` padded tokens."""
    lengths = np.array([len(ids) for ids in pool.ids])
    while True:
        order = rng.permutation(subset)
        for part in np.array_split(order, max(1, len(order) // 4096)):
            part = part[np.argsort(lengths[part], kind="stable")]
            cuts, start = [], 0
            for end in range(1, len(part) + 1):
                if end == len(part) or (end + 1 - start) * lengths[part[end]] > tokens:
                    cuts.append(part[start:end])
                    start = end
            yield from (cuts[i] for i in rng.permutation(len(cuts)))
