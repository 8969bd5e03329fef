"""Tokens beside their log-probabilities: the joined bytes of an answer's tokens are the answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cram.serve.engine.sequence import TextStream
from cram.serve.http.replies import Pieces, Replies, byte_alphabet
from cram.serve.request import TokenLogprob
from tests.cram import factories

WORDS = ["<unk>", "<s>", "</s>", "▁", "▁a", "▁red", "▁tomato", "es", "\n", "é"]
PIECES = [*WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
T5 = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
NEW = "<tool>"


def sentence_piece(decoder: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of words and bytes, with one added token that is not special."""
    vocab = {piece: number for number, piece in enumerate(PIECES)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoder
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.add_tokens([NEW])
    return made


def tokens_of(tokenizer: Any, ids: list[int]) -> list[dict[str, Any]]:
    """The entries of an answer's tokens, each with the first token of the answer as alternative."""
    heard = [TokenLogprob(each, -1.0, ((ids[0], -2.0),)) for each in ids]
    found = Replies("cram", Pieces(tokenizer))._logprobs(heard)
    assert found is not None
    content: list[dict[str, Any]] = found["content"]
    return content


def joined(entries: list[dict[str, Any]]) -> str:
    """The text of the bytes of all tokens."""
    return bytes(byte for each in entries for byte in each["bytes"]).decode()


def streamed(tokenizer: Any, ids: list[int]) -> str:
    """The text of an answer as the engine makes it."""
    stream = TextStream(tokenizer)
    return "".join(stream.add(each) for each in ids) + stream.close()


@pytest.mark.parametrize("decoder", [LLAMA, T5])
def test_tokens_of_sentence_piece_keep_their_spaces_and_bytes(decoder: Any) -> None:
    tokenizer = sentence_piece(decoder)
    byte = len(WORDS)
    ids = [4, 5, 6, 7, 3, *(byte + each for each in "é€".encode()), 9, 8, len(PIECES)]
    entries = tokens_of(tokenizer, ids)
    assert [each["token"] for each in entries[:5]] == [" a", " red", " tomato", "es", " "]
    assert entries[5] == {
        "token": "\ufffd",
        "logprob": -1.0,
        "bytes": [0xC3],
        "top_logprobs": [{"token": " a", "logprob": -2.0, "bytes": list(b" a")}],
    }
    assert entries[-1]["token"] == NEW
    # A first token keeps the space that the answer does without.
    assert joined(entries) == " " + streamed(tokenizer, ids) == f" a red tomatoes é€é\n{NEW}"


def test_tokens_of_a_byte_alphabet_have_bytes_also_where_they_are_parts_of_characters() -> None:
    tokenizer = factories.tokenizer()
    text = " Ein Käse,\n\tnaïve 🍅 €"
    ids = tokenizer.encode(text, add_special_tokens=False)
    entries = tokens_of(tokenizer, ids)
    assert joined(entries) == text == streamed(tokenizer, ids)
    assert {"token": "\ufffd", "bytes": [0xC3]}.items() <= entries[text.index("ä")].items()
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())


def test_special_tokens_are_written_as_they_are_and_unused_ids_are_empty() -> None:
    for tokenizer in (factories.tokenizer(), sentence_piece(LLAMA)):
        end, unused = tokens_of(tokenizer, [tokenizer.eos_token_id, 100_000])
        assert end["token"] == "</s>" and end["bytes"] == list(b"</s>")
        assert unused["token"] == "" and unused["bytes"] == []


@pytest.mark.parametrize(
    ("slow", "piece", "content"),
    [
        ({"byte_decoder": {}}, "Ġan", b" an"),
        ({"sp_model": None}, "▁an", b" an"),
        ({"sp_model": None}, "<0xC3>", b"\xc3"),
        ({}, "unused", b"an"),
    ],
)
def test_slow_tokenizers_and_unknown_decoders(slow: dict[str, Any], piece: str, content: bytes) -> None:
    tokenizer = SimpleNamespace(
        added_tokens_decoder={},
        convert_ids_to_tokens=lambda token: piece,
        decode=lambda ids, **settings: "an",
        **slow,
    )
    assert Pieces(tokenizer).of(5) == content
