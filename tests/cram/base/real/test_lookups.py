"""Heads that start near a lookup, and the rows that train it: every answer follows from the options."""

from __future__ import annotations

import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from cram.base.model import BOS, EOS, IMAGE, PAD
from cram.base.pool import IGNORED
from cram.base.real.lookups import STEPS_BACK, start_heads
from cram.base.real.pool import LOOKUP_TURNS, NO_PICTURE, Row, draw_lookups, tokenize
from cram.base.real.wordings import LETTERS

LENGTH, ASKED = 30, 5


def attentions(started: bool) -> tuple[Tensor, ...]:
    """Attention [heads, T, T] of each layer for 30 distinct tokens and then one of them again."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=512, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaModel(config).eval()
    torch.nn.init.normal_(model.embed_tokens.weight, std=0.1)
    if started:
        start_heads(model)
    ids = torch.randperm(400)[:LENGTH]
    with torch.no_grad():
        found = model(torch.cat([ids, ids[ASKED : ASKED + 1]])[None], output_attentions=True).attentions
    return tuple(layer[0] for layer in found)


def test_heads_of_the_first_layer_look_back_by_their_steps() -> None:
    first, plain = attentions(True)[0], attentions(False)[0]
    for head, back in enumerate(STEPS_BACK):
        assert first[head].diagonal(-back)[back:].min() > 0.8
        assert plain[head].diagonal(-back)[back:].max() < 0.5


def test_heads_of_later_layers_find_the_same_token() -> None:
    for started, least, most in ((True, 0.1, 1.0), (False, 0.0, 0.06)):
        last = attentions(started)[1][:, -1]
        assert least < last[:, ASKED].min() <= last[:, ASKED].max() < most
    others = attentions(True)[1][:, -1, :-1].clone()
    others[:, ASKED] = 0
    assert attentions(True)[1][:, -1, ASKED].min() > 3 * others.max()


def options_of(row: Row) -> dict[str, str]:
    """Letter -> name, as they stand in the row's text."""
    return dict(
        re.findall(r"\b([A-H])\. (.+?)(?= [B-H]\. |$| What is option| Which option)", row.instruction)
    )


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return draw_lookups(7, 200)


def test_every_turn_asks_for_an_option_and_tells_the_right_one(rows: list[Row]) -> None:
    told = set()
    for row in (row for row in rows if row.roles):
        options = options_of(row)
        turns = [(row.question, row.answer), *row.more]
        assert len(turns) == LOOKUP_TURNS and row.picture == NO_PICTURE and 2 <= len(options) <= len(LETTERS)
        for question, answer in turns:
            name = re.fullmatch(r"(?:Which option is|What is|And) (?:option (?=[A-H]\?))?(.+)\?", question)[1]
            assert answer == (options[name] if name in options else {v: k for k, v in options.items()}[name])
            told.add(answer in LETTERS)
    assert told == {True, False}


def test_bare_lists_name_and_tell_letters_alone(rows: list[Row]) -> None:
    bare = [row for row in rows if not row.roles]
    assert 60 < len(bare) < 140
    for row in bare:
        (first, *rest) = row.more
        listed = row.instruction
        assert all(f"{letter}. {name}" in listed for name, letter in (first, *rest))
        assert {letter for _, letter in row.more} <= set(LETTERS) and len(row.more) == 2 * LOOKUP_TURNS - 1


def test_tokens_have_labels_exactly_where_an_answer_stands(rows: list[Row]) -> None:
    words = sorted({char for row in rows for char in row.instruction + "".join(map("".join, row.more))})
    special = [PAD, BOS, EOS, IMAGE]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*special, "?!", *words])}, unk_token="?!")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    pool = tokenize(torch.zeros(1, 16, 768), rows, tokenizer)
    for row, ids, labels in zip(rows, pool.ids, pool.labels, strict=True):
        answers = [row.answer, *(answer for _, answer in row.more)]
        ends = len(answers) if row.roles else 0
        assert sum(label != IGNORED for label in labels) == sum(len(a) + 1 for a in answers) + ends
        assert all(label in (IGNORED, token) for label, token in zip(labels, ids, strict=True))
        assert ids.count(tokenizer.token_to_id(EOS)) == ends
