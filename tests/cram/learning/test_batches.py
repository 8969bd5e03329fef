"""Prompts, labels and padding."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tokenizers import processors

from cram.learning.batches import (
    IGNORED,
    Budget,
    EncodedSplit,
    build_prompt,
    collate,
    encode_sample,
    pad_id,
    to_model,
    training_batch,
)
from cram.streams import Sample
from tests.cram import factories

PROCESSOR = factories.llava_processor()


def sample(question: str = "How many?", answer: str = "two", images: int = 1) -> Sample:
    return Sample("s", tuple(factories.image(i) for i in range(images)), question, answer)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (0, "USER: How many? ASSISTANT:"),
        (1, "USER: <image>\nHow many? ASSISTANT:"),
        (2, "USER: <image><image>\nHow many? ASSISTANT:"),
    ],
)
def test_prompt_without_a_template_is_the_one_of_llava(images: int, expected: str) -> None:
    assert build_prompt(PROCESSOR, "How many?", images) == expected


def test_prompt_with_a_template_comes_from_it() -> None:
    processor = factories.llava_processor()
    processor.chat_template = (
        "{% for part in messages[0]['content'] %}[{{ part['type'] }}]{% endfor %}"
        "{{ messages[0]['content'][-1]['text'] }}{% if add_generation_prompt %}>{% endif %}"
    )
    assert build_prompt(processor, "Q", 2) == "[image][image][text]Q>"


@pytest.mark.parametrize("adds", [True, False])
def test_what_begins_a_prompt_is_there_once(adds: bool) -> None:
    processor = factories.llava_processor()
    processor.chat_template = "<s>USER: {{ messages[0]['content'][-1]['text'] }} ASSISTANT:"
    if not adds:
        processor.tokenizer._tokenizer.post_processor = processors.Sequence([])
    ids = encode_sample(processor, sample(images=0)).inputs["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1 == ids.index(ids[1])
    theirs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}],
        tokenize=True,
        return_dict=True,
    )
    assert theirs["input_ids"][0] == ids


def test_a_placeholder_in_the_question_is_refused() -> None:
    with pytest.raises(ValueError, match="must not contain '<image>'"):
        build_prompt(PROCESSOR, "see <image>", 1)


def test_labels_are_the_answer_and_the_end_token_and_nothing_else() -> None:
    examples = [encode_sample(PROCESSOR, s) for s in (sample(), sample("Longer question?", "a", 0))]
    batch, labels = training_batch(examples, pad_id(PROCESSOR.tokenizer))
    ids = batch["input_ids"]
    assert ids.shape == labels.shape == batch["attention_mask"].shape
    for row, answer in enumerate((" two", " a")):
        said = labels[row][labels[row] != IGNORED]
        assert torch.equal(said, ids[row][labels[row] != IGNORED])
        assert said[-1] == PROCESSOR.tokenizer.eos_token_id
        assert PROCESSOR.tokenizer.decode(said[:-1]) == answer
        end = examples[row].length + len(said)
        assert batch["attention_mask"][row].sum() == end and not batch["attention_mask"][row, end:].any()
        assert torch.equal(ids[row, : examples[row].length], examples[row].inputs["input_ids"][0])
    assert batch["pixel_values"].shape[0] == 1


def test_collate_pads_on_the_wanted_side() -> None:
    examples = [encode_sample(PROCESSOR, sample(question, images=0)) for question in ("a", "abc")]
    left, right = (collate(examples, 0, left=side) for side in (True, False))
    assert left["attention_mask"].tolist()[0][:2] == [0, 0] == right["attention_mask"].tolist()[0][-2:]
    assert torch.equal(left["input_ids"][0, 2:], right["input_ids"][0, :-2])


def test_a_batch_gets_the_device_of_the_model_and_floats_its_dtype() -> None:
    model = SimpleNamespace(device=torch.device("meta"), dtype=torch.bfloat16)
    batch = to_model({"ids": torch.zeros(2, dtype=torch.int64), "pixels": torch.zeros(2)}, model)
    assert [each.dtype for each in batch.values()] == [torch.int64, torch.bfloat16]
    assert all(each.is_meta for each in batch.values())


def test_split_encodes_once_while_the_budget_lasts() -> None:
    samples = [sample("one?"), sample("two?")]
    size = encode_sample(PROCESSOR, samples[0]).num_bytes
    budget = Budget(size)
    split = EncodedSplit(PROCESSOR, samples, budget)
    assert split.example(0) is split.example(0)
    assert split.example(1) is not split.example(1)
    assert budget.left == 0
    split.release()
    assert budget.left == size
