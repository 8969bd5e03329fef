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
from cram.base.real.siblings import MAKERS, Ask, letters
from cram.base.real.tower import FINE, LiteTower
from cram.base.real.wordings import FORMATS, LETTERS, instruction

PICTURES_A_PASS, PASSES_MEASURED = 64, 32
NO_PICTURE = -1


@dataclass
class Row:
    """One question: its picture's index (or `NO_PICTURE`), maker, format, texts and answer.

    `more` holds the questions and answers of further turns.
    """

    picture: int
    maker: str
    form: str
    question: str
    instruction: str
    answer: str
    more: tuple[tuple[str, str], ...] = ()
    options: tuple[str, ...] = ()


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
    """Dialogues without a picture about four options: the letter of each, and the option of two letters."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        row = _row(rng, NO_PICTURE, "lookups", letters(rng)[1][:1])
        names = row.options
        turns = [(f"And {names[i]}?", LETTERS[i]) for i in rng.permutation(len(names))]
        turns += [(f"And option {LETTERS[i]}?", names[i]) for i in rng.permutation(len(names))[:2]]
        row.more = tuple(turns[i] for i in rng.permutation(len(turns)))
        rows.append(row)
    return rows


def _row(rng: np.random.Generator, picture: int, maker: str, asks: list[Ask]) -> Row:
    ask = asks[int(rng.integers(len(asks)))]
    text = instruction(rng, ask.question, list(ask.options), ask.form)
    return Row(picture, maker, ask.form, ask.question, text, ask.answer, options=ask.options)


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
        [f"USER: {shown[row.picture != NO_PICTURE]}{row.instruction} ASSISTANT:" for row in rows]
    )
    answers = [[*each.ids, eos] for each in tokenizer.encode_batch([f" {row.answer}" for row in rows])]
    texts = tokenizer.encode_batch([row.instruction for row in rows])
    ids = [[bos, *asked.ids, *told] for asked, told in zip(prompts, answers, strict=True)]
    labels = [[IGNORED] * (1 + len(asked.ids)) + told for asked, told in zip(prompts, answers, strict=True)]
    for i, row in enumerate(rows):
        for question, answer in row.more:
            asked = tokenizer.encode(f"USER: {question} ASSISTANT:").ids
            told = [*tokenizer.encode(f" {answer}").ids, eos]
            ids[i] += asked + told
            labels[i] += [IGNORED] * len(asked) + told
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
