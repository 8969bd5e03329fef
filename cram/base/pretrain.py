"""Train the built-in base on the mixture: `python -m cram.base.pretrain --out FOLDER`.

There are three stages:

1. A tiny CLIP. Its vision tower learns to name the mark in each patch. InfoNCE separates pictures by their
   captions. Supervised contrast draws instructions of one kind together, on the pooled text feature by which
   CRAM groups.
2. A tiny LLaVA on the frozen tower, by the cross-entropy of the answers.
3. The text tower again. It learns to separate instructions by their format sentence.

Computation is in bf16; the kept weights are fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPModel, LlavaForConditionalGeneration, PreTrainedModel

from cram.base.mixture import FORMATS, LEVELS, MARKS, MIXTURE, WORDS
from cram.base.model import (
    EOS,
    IMAGE,
    LAYOUT,
    PAD,
    TEXT_LENGTH,
    build_models,
    image_processor,
    save_base,
    token_id,
    train_tokenizer,
)
from cram.base.pool import IGNORED, Pool, batches, draw_rows, pad, pixels, tokenize
from cram.streams.builtin.draw import COLORS

CONTRAST_WEIGHT = 0.25
CONTRAST_TEMPERATURE = 0.1
IMAGE_FEATURE_NORM = 10.0
CLIP_STEPS, CLIP_RATE = 3200, 2e-3
CLIP_BATCH, CONTRAST_EVERY = 128, 3
FORMAT_STEPS, FORMAT_RATE = 600, 5e-4
HELD_OUT = 2048  # examples


class Losses:
    """The losses of one batch."""

    def __init__(self, llava: LlavaForConditionalGeneration, clip: CLIPModel, tokenizer: Tokenizer) -> None:
        self.llava, self.clip = llava, clip
        self.pad_id = token_id(tokenizer, PAD)

    def answer(self, pool: Pool, index: np.ndarray) -> Tensor:
        """Cross-entropy of the answers. Every sample has the same weight, however long its answer is."""
        ids, labels = self.inputs(pool, index)
        shown = index[pool.has_picture[index]]
        images = pixels(pool, shown, self.llava.dtype) if len(shown) else None
        mask = ids.ne(self.pad_id).long()
        first = int((labels != IGNORED).int().argmax(1).min())
        hidden = self.llava.model(input_ids=ids, pixel_values=images, attention_mask=mask).last_hidden_state
        logits = self.llava.lm_head(hidden[:, first - 1 : -1]).float()
        told = labels[:, first:] != IGNORED
        loss = F.cross_entropy(
            logits.transpose(1, 2), labels[:, first:], ignore_index=IGNORED, reduction="none"
        )
        return (loss.sum(1) / told.sum(1)).mean()

    def inputs(self, pool: Pool, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Token ids and labels, both right-padded [B, T]."""
        ids = pad([pool.prompts[i] + pool.answers[i] for i in index], self.pad_id)
        labels = pad([[IGNORED] * len(pool.prompts[i]) + pool.answers[i] for i in index], IGNORED)
        return ids, labels

    def patches(self, pool: Pool, index: np.ndarray, head: nn.Linear) -> Tensor:
        """Cross-entropy of mark, colour and level in each patch."""
        hidden = self.clip.vision_model(pixels(pool, index, self.llava.dtype)).last_hidden_state[:, 1:]
        labels = torch.from_numpy(pool.patch_labels[index]).long().flatten(0, 1)
        scores = head(hidden).float().flatten(0, 1).split([1 + len(MARKS), len(COLORS), LEVELS], dim=1)
        empty = torch.ones(1 + len(MARKS))
        empty[0] = 0.1
        weights = (empty, None, None)
        terms = [
            F.cross_entropy(s, y, weight=w, ignore_index=IGNORED)
            for s, y, w in zip(scores, labels.T, weights, strict=False)
        ]
        return torch.stack(terms).nansum()

    def text(self, rows: list[list[int]]) -> Tensor:
        """Pooled text features [B, 128]."""
        ids = pad(rows, self.pad_id)
        return self.clip.text_model(input_ids=ids, attention_mask=ids.ne(self.pad_id).long()).pooler_output

    def captions(self, pool: Pool, index: np.ndarray) -> Tensor:
        """InfoNCE of pictures and their captions, both ways."""
        shown = index[pool.has_picture[index]]
        pooled = self.clip.vision_model(pixels(pool, shown, self.llava.dtype)).pooler_output
        caption = self.clip.text_projection(self.text([pool.captions[i] for i in shown]))
        image, caption = (
            F.normalize(x.float(), dim=-1) for x in (self.clip.visual_projection(pooled), caption)
        )
        scores, target = image @ caption.T / CONTRAST_TEMPERATURE, torch.arange(len(shown))
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2

    def question_kinds(self, pool: Pool, index: np.ndarray) -> Tensor:
        """Supervised contrast of the instructions by the kind of their question."""
        return self._by_kind(
            self.text([pool.questions[i] for i in index]), torch.from_numpy(pool.kinds[index])
        )

    def formats(self, pool: Pool, index: np.ndarray, endings: list[list[int]]) -> Tensor:
        """Supervised contrast of instructions by a format sentence at their end, drawn by position."""
        kinds = torch.arange(len(index)) % len(endings)
        texts = [
            pool.questions[i][:-1] + endings[kind] for i, kind in zip(index, kinds.tolist(), strict=True)
        ]
        return self._by_kind(self.text([text[:TEXT_LENGTH] for text in texts]), kinds)

    @staticmethod
    def _by_kind(features: Tensor, kinds: Tensor) -> Tensor:
        unit = F.normalize(F.layer_norm(features.float(), features.shape[-1:]), dim=-1)
        itself = torch.eye(len(kinds), dtype=torch.bool)
        scores = (unit @ unit.T / CONTRAST_TEMPERATURE).masked_fill(itself, -math.inf)
        same = (kinds[:, None] == kinds) & ~itself
        log_share = scores.log_softmax(1).masked_fill(~same, 0.0).sum(1) / same.sum(1).clamp(min=1)
        return -log_share.mean()


class MasterWeights:
    """AdamW on fp32 copies of bf16 parameters."""

    def __init__(self, parameters: list[nn.Parameter], rate: float) -> None:
        self.computed = parameters
        self.kept = [p.detach().float().clone() for p in parameters]
        decayed = [p for p in self.kept if p.ndim > 1]
        plain = [p for p in self.kept if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)

    def step(self, rate: float) -> None:
        """One clipped step. The bf16 weights are then rounded from the fp32 weights."""
        for kept, computed in zip(self.kept, self.computed, strict=True):
            kept.grad = None if computed.grad is None else computed.grad.float()
            computed.grad = None
        nn.utils.clip_grad_norm_(self.kept, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            for kept, computed in zip(self.kept, self.computed, strict=True):
                computed.copy_(kept)


def unique_parameters(*models: nn.Module) -> list[nn.Parameter]:
    """Return the trained parameters of all models, each one once."""
    return list({id(p): p for model in models for p in model.parameters() if p.requires_grad}.values())


def accuracy_by_kind(losses: Losses, pool: Pool) -> dict[str, float]:
    """Return, per kind of example, the percentage of answers in which every token is the most likely one."""
    right: dict[str, list[bool]] = {}
    for index in np.array_split(np.arange(len(pool)), max(1, len(pool) // 64)):
        ids, labels = losses.inputs(pool, index)
        shown = index[pool.has_picture[index]]
        images = pixels(pool, shown, losses.llava.dtype) if len(shown) else None
        with torch.no_grad():
            logits = losses.llava(
                input_ids=ids, pixel_values=images, attention_mask=ids.ne(losses.pad_id).long()
            ).logits
        hit = (logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == IGNORED)
        for i, ok in zip(index, hit.all(1).tolist(), strict=True):
            right.setdefault(MIXTURE[pool.kinds[i]][0].__name__, []).append(ok)
    return {kind: round(100 * float(np.mean(hits)), 1) for kind, hits in sorted(right.items())}


def scale_image_features(losses: Losses, pool: Pool) -> None:
    """Scale the image projection so that features have the length of CLIP ViT-L's (about 10)."""
    index = np.flatnonzero(pool.has_picture)[:512]
    with torch.no_grad():
        pooled = losses.clip.vision_model(pixels(pool, index, losses.llava.dtype)).pooler_output
        length = losses.clip.visual_projection(pooled).norm(dim=-1).mean()
        losses.clip.visual_projection.weight.mul_(IMAGE_FEATURE_NORM / length)


def to_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """Cast parameters only. Rotary frequencies stay exact, as in a loaded checkpoint."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over 100 steps, then half a cosine down to almost nothing."""
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3


def train_clip(losses: Losses, pool: Pool, rng: np.random.Generator, started: float) -> None:
    """First stage: the vision tower, the text tower and their projections."""
    head = nn.Linear(losses.clip.config.vision_config.hidden_size, 1 + len(MARKS) + len(COLORS) + LEVELS)
    head.to(losses.llava.dtype)
    masters = MasterWeights(unique_parameters(losses.clip, head), CLIP_RATE)
    shown = np.flatnonzero(pool.has_picture)
    for step, index in enumerate(batches(pool, CLIP_BATCH, CLIP_STEPS, rng, shown)):
        loss = losses.patches(pool, index, head)
        if step % CONTRAST_EVERY == 0:
            contrast = losses.captions(pool, index) + losses.question_kinds(pool, index)
            loss = loss + CONTRAST_WEIGHT * contrast
        loss.backward()
        masters.step(CLIP_RATE * schedule(step, CLIP_STEPS))
        if (step + 1) % 100 == 0:
            print(f"clip {step + 1} loss {loss.item():.3f} {time.time() - started:.0f} s", flush=True)
    losses.clip.requires_grad_(False)


def train_formats(
    losses: Losses, pool: Pool, tokenizer: Tokenizer, rng: np.random.Generator, started: float
) -> None:
    """Third stage: the text tower learns to separate instructions by the format sentence at their end."""
    towers = (losses.clip.text_model, losses.clip.text_projection)
    for tower in towers:
        tower.requires_grad_(True)
    end = token_id(tokenizer, EOS)
    endings = [[*tokenizer.encode(f" {sentence}").ids, end] for sentence in FORMATS]
    masters = MasterWeights(unique_parameters(*towers), FORMAT_RATE)
    shown = np.flatnonzero(pool.has_picture)
    for step, index in enumerate(batches(pool, CLIP_BATCH, FORMAT_STEPS, rng, shown)):
        loss = losses.captions(pool, index) + losses.formats(pool, index, endings)
        loss.backward()
        masters.step(FORMAT_RATE * schedule(step, FORMAT_STEPS))
        if (step + 1) % 100 == 0:
            print(f"formats {step + 1} loss {loss.item():.3f} {time.time() - started:.0f} s", flush=True)


def train_llava(
    losses: Losses, pool: Pool, rng: np.random.Generator, started: float, steps: int, batch: int, rate: float
) -> float:
    """Second stage: projector and language model on the frozen tower. Return the mean of the last losses."""
    masters = MasterWeights(unique_parameters(losses.llava), rate)
    history: list[float] = []
    for step, index in enumerate(batches(pool, batch, steps, rng, np.arange(len(pool)))):
        loss = losses.answer(pool, index)
        loss.backward()
        masters.step(rate * schedule(step, steps))
        history.append(loss.item())
        if (step + 1) % 100 == 0:
            mean = np.mean(history[-100:])
            print(f"llava {step + 1} loss {mean:.3f} {time.time() - started:.0f} s", flush=True)
    return float(np.mean(history[-100:]))


def pretrain(out: Path, steps: int, batch: int, rate: float, examples: int, seed: int) -> None:
    """Train and save the base with `training.json` (data, steps, loss, held-out accuracy)."""
    torch.manual_seed(seed)
    started = time.time()
    rows, held_rows = draw_rows(seed, examples, 2), draw_rows(seed + 1, HELD_OUT, 2)
    tokenizer = train_tokenizer(
        [f"USER: {IMAGE}\n{row.question} ASSISTANT: {row.answer} {row.caption}" for row in rows[:8000]]
        + [" ".join(WORDS)] * 200
    )
    pool, held = tokenize(rows, tokenizer), tokenize(held_rows, tokenizer)
    llava, clip = build_models(tokenizer)
    for model in (llava, clip):
        to_bfloat16(model).set_attn_implementation("eager")
    losses = Losses(llava, clip, tokenizer)
    print(f"{len(pool)} examples in {time.time() - started:.0f} s", flush=True)
    rng = np.random.default_rng(seed)
    train_clip(losses, pool, rng, started)
    loss = train_llava(losses, pool, rng, started, steps, batch, rate)
    train_formats(losses, pool, tokenizer, rng, started)
    facts = {
        "steps": {"clip": CLIP_STEPS, "llava": steps, "formats": FORMAT_STEPS},
        "batch_size": {"clip": CLIP_BATCH, "llava": batch, "formats": CLIP_BATCH},
        "learning_rate": {"clip": CLIP_RATE, "llava": rate, "formats": FORMAT_RATE},
        "examples": examples,
        "seed": seed,
        "seconds": round(time.time() - started),
        "answer_loss": round(loss, 4),
    }
    write(out, losses, held, tokenizer, facts)


def write(out: Path, losses: Losses, held: Pool, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
    """Save the fp16 checkpoints and `training.json` (facts of the training, held-out accuracy)."""
    accuracy = accuracy_by_kind(losses, held)
    print(accuracy, flush=True)
    llava, clip = build_models(tokenizer)
    llava.load_state_dict(losses.llava.state_dict())
    clip.load_state_dict(losses.clip.state_dict())
    scale_image_features(Losses(llava, clip, tokenizer), held)
    save_base(out, llava, clip, tokenizer, image_processor(), LAYOUT)
    mean = round(float(np.mean(list(accuracy.values()))), 1)
    facts = {**facts, "held_out_accuracy": accuracy, "held_out_mean": mean}
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--examples", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pretrain(args.out, args.steps, args.batch, args.rate, args.examples, args.seed)


if __name__ == "__main__":
    main()
