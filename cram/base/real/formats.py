"""The routing model's training: a text tower that sees answer formats, and a projection of image features."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from cram.base.model import BOS, EOS, PAD, TEXT_LENGTH, token_id
from cram.base.pool import pad
from cram.base.pretrain import schedule
from cram.base.real.model import RoutingModel
from cram.base.real.pool import Pool
from cram.base.real.tower import FINE
from cram.base.real.wordings import FORMATS, draw_sentence

STEPS, BATCH, RATE = 600, 96, 1e-3
# Share of instructions whose question stands with the sentence of a format drawn at random, and share of
# these whose words are those of two questions in random order. So the sentence decides, not the question.
EXCHANGED, SHUFFLED = 0.5, 0.5
FEATURE_NORM = 10.0  # mean length of image features; CLIP ViT-L's is about the same


def separation(features: Tensor, kinds: Tensor) -> Tensor:
    """How far cosines of text features [B, D] are from 1 within a kind [B] and from 0 between kinds.

    CRAM opens a group for a task that is about as near to its best group as to the second best. So the kinds
    must not only lie apart, but equally far apart; a contrastive loss does not ask for that.
    """
    unit = F.normalize(F.layer_norm(features, features.shape[-1:]), dim=-1)
    same = kinds[:, None] == kinds
    errors = (unit @ unit.T - same.float()).square()
    return errors[same].mean() + errors[~same].mean()


def train_text_tower(
    routing: RoutingModel, pool: Pool, tokenizer: Tokenizer, seed: int, steps: int = STEPS
) -> float:
    """Train the text tower to tell formats apart; return the mean loss of the last 100 steps."""
    rng, started = np.random.default_rng(seed), time.time()
    pad_id, bos, eos = (token_id(tokenizer, token) for token in (PAD, BOS, EOS))
    tower, history = routing.text_model.train(), []
    optimizer = torch.optim.AdamW(tower.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(steps):
        index = rng.integers(len(pool), size=BATCH)
        kinds, rows = pool.forms[index].copy(), [pool.texts[i] for i in index]
        for i in np.flatnonzero(rng.random(BATCH) < EXCHANGED):
            kinds[i] = rng.integers(len(FORMATS))
            asked = pool.rows[index[i]].question
            if rng.random() < SHUFFLED:
                asked += f" {pool.rows[int(rng.integers(len(pool)))].question}"
                asked = " ".join(rng.permutation(asked.split()))
            text = f"{asked} {draw_sentence(rng, FORMATS[kinds[i]])}".strip()
            rows[i] = [bos, *tokenizer.encode(text).ids[: TEXT_LENGTH - 2], eos]
        ids = pad(rows, pad_id)
        features = tower(input_ids=ids, attention_mask=ids.ne(pad_id).long()).pooler_output
        loss = separation(features, torch.from_numpy(kinds))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * schedule(step, steps)
        optimizer.step()
        history.append(loss.item())
        if (step + 1) % 100 == 0:
            print(
                f"formats {step + 1} loss {np.mean(history[-100:]):.3f} {time.time() - started:.0f} s",
                flush=True,
            )
    tower.eval()
    return float(np.mean(history[-100:]))


@torch.no_grad()
def fit_projection(routing: RoutingModel, pool: Pool) -> None:
    """Set the image projection to the main directions of the pooled features, at a length near CLIP's."""
    pooled = pool.features[:, :, FINE:].float().mean(1)
    directions = torch.linalg.svd(pooled.T @ pooled / len(pooled))[2][: routing.config.projection_dim]
    length = (pooled @ directions.T).norm(dim=1).mean()
    routing.visual_projection.weight.copy_(directions * (FEATURE_NORM / length))
