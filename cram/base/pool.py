"""The pretraining examples as arrays: drawn in parallel, in the model's chat form, batched by length."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from cram.base.mixture import MARKS, MIXTURE, Mark, draw_example, style_words
from cram.base.model import BOS, EOS, IMAGE, IMAGE_TOKENS, PATCH, TEXT_LENGTH, token_id
from cram.streams.builtin.draw import COLORS, SIZE

IGNORED = -100


@dataclass
class Pool:
    """Examples as arrays: pictures uint8 [N, 48, 48, 3] (zeros for text), token lists, and kinds.

    `patch_labels` [N, 36, 3] holds the mark, colour and level of each patch. Absent values are IGNORED.
    """

    pictures: np.ndarray
    has_picture: np.ndarray
    prompts: list[list[int]]
    answers: list[list[int]]
    questions: list[list[int]]
    captions: list[list[int]]
    kinds: np.ndarray
    patch_labels: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Row:
    """A drawn example in a form that is cheap to send between processes."""

    picture: bytes | None
    question: str
    answer: str
    caption: str
    kind: str
    patch_labels: np.ndarray


def label_patches(marks: tuple[Mark, ...]) -> np.ndarray:
    """Return labels [36, 3] of the patches: mark, colour, level. A patch without a mark has mark class 0."""
    side = SIZE // PATCH
    labels = np.full((side * side, 3), IGNORED, np.int16)
    labels[:, 0] = 0
    for mark in marks:
        column, line = (min(side - 1, max(0, int(v / PATCH))) for v in (mark.x, mark.y))
        color = IGNORED if mark.color is None else list(COLORS).index(mark.color)
        level = IGNORED if mark.level is None else mark.level
        labels[line * side + column] = (1 + MARKS.index(mark.kind), color, level)
    return labels


def _draw_raw(seed: int, count: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        example, kind = draw_example(rng)
        picture = None if example.image is None else example.image.tobytes()
        style = "" if example.image is None else style_words(example.image)
        caption = f"{example.family}, {style}: {example.caption}"
        rows.append(
            Row(picture, example.question, example.answer, caption, kind, label_patches(example.marks))
        )
    return rows


def draw_rows(seed: int, count: int, workers: int) -> list[Row]:
    """Draw `count` examples in parallel. The same seed and worker count give the same rows."""
    shares = [count // 16 + (i < count % 16) for i in range(16)]
    # A forked child may inherit a lock that a thread of torch holds.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        parts = executor.map(_draw_raw, [seed * 1000 + i for i in range(16)], shares)
        return [row for part in parts for row in part]


def tokenize(rows: list[Row], tokenizer: Tokenizer) -> Pool:
    """Turn drawn rows into a pool of arrays and token lists in the model's chat form."""
    pictures = np.zeros((len(rows), SIZE, SIZE, 3), np.uint8)
    kinds = {make.__name__: i for i, (make, _) in enumerate(MIXTURE)}
    bos, eos = token_id(tokenizer, BOS), token_id(tokenizer, EOS)
    kind_ids, patch_labels = (
        np.array([kinds[row.kind] for row in rows]),
        np.stack([row.patch_labels for row in rows]),
    )
    pool = Pool(pictures, np.zeros(len(rows), bool), [], [], [], [], kind_ids, patch_labels)
    for i, row in enumerate(rows):
        image = ""
        if row.picture is not None:
            pictures[i] = np.frombuffer(row.picture, np.uint8).reshape(SIZE, SIZE, 3)
            pool.has_picture[i] = True
            image = IMAGE * IMAGE_TOKENS + "\n"
        pool.prompts.append([bos, *tokenizer.encode(f"USER: {image}{row.question} ASSISTANT:").ids])
        pool.answers.append([*tokenizer.encode(f" {row.answer}").ids, eos])
        pool.questions.append([bos, *tokenizer.encode(row.question).ids[: TEXT_LENGTH - 2], eos])
        pool.captions.append([bos, *tokenizer.encode(row.caption).ids[: TEXT_LENGTH - 2], eos])
    return pool


def batches(
    pool: Pool, size: int, steps: int, rng: np.random.Generator, subset: np.ndarray
) -> Iterator[np.ndarray]:
    """Index batches of similar length over a subset of indices, epoch after epoch."""
    done = 0
    lengths = np.array([len(p) + len(a) for p, a in zip(pool.prompts, pool.answers, strict=True)])
    while done < steps:
        order = rng.permutation(subset)
        chunk = size * 20
        for start in range(0, len(order) - chunk + 1, chunk):
            part = order[start : start + chunk]
            part = part[np.argsort(lengths[part], kind="stable")].reshape(-1, size)
            for row in part[rng.permutation(len(part))]:
                if done == steps:
                    return
                done += 1
                yield row


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Right-padded [B, T]."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def pixels(pool: Pool, index: np.ndarray, dtype: torch.dtype) -> Tensor:
    """CLIP-normalised pictures [B, 3, 48, 48]."""
    values = torch.from_numpy(pool.pictures[index]).permute(0, 3, 1, 2).to(torch.float32) / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return ((values - mean) / std).to(dtype)
