"""Reading the user's turn out of a prompt."""

from __future__ import annotations

import pytest

from cram.families import FAMILIES


@pytest.mark.parametrize(
    ("family", "prompt", "turn"),
    [
        ("llava", "USER: <image>\nHow many?\nOne word. ASSISTANT: two</s>", "How many?\nOne word."),
        ("llava", "<s> A chat. USER: <image><image>\nSame? ASSISTANT:", "Same?"),
        ("llava", "USER: first ASSISTANT: a</s>USER: second ASSISTANT:", "second"),
        ("llava", "USER: <image>\nfirst ASSISTANT: a USER: second ASSISTANT:", "second"),
        ("llava", "USER: a ASSISTANT: b USER: Is USER: a role? ASSISTANT:", "Is USER: a role?"),
        ("llava", "USER: first ASSISTANT: Who is USER: then?</s>", "first"),
        ("llava", "<|im_start|>user\n<image>\nHow?<|im_end|>\n<|im_start|>assistant\n", "How?"),
        ("llava", "[INST] <image>\nHow? [/INST]", "How?"),
        ("llava", "no marker at all", None),
        ("llava", "USER: <image>\nWho says ASSISTANT: here? ASSISTANT:", "Who says ASSISTANT: here?"),
        ("llava", "USER: Is USER: a role? ASSISTANT: yes</s>", "Is USER: a role?"),
        ("llava", "USER: a ASSISTANT: b</s> USER: Is USER: a role? ASSISTANT:", "Is USER: a role?"),
        (
            "llava",
            "<|im_start|>user\nIs USER: a role?<|im_end|>\n<|im_start|>assistant\n",
            "Is USER: a role?",
        ),
        ("llava", "USER: What is [INST] for? ASSISTANT:", "What is [INST] for?"),
        ("llava", "USER:ASSISTANT:", ""),
        # The beginning of a marker, from its first letter to all but its last.
        ("llava", "USER: How? A", "How?"),
        ("llava", "USER: How? ASSISTANT", "How?"),
        ("llava", "<s>[INST] a [/INST] b</s>[INST] c [/INST]", "c"),
        (
            "qwen2_5_vl",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
            "<|vision_start|><|image_pad|><|vision_end|>How?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>",
            "How?",
        ),
        ("qwen3_vl", "<|im_start|>user\nHow?<|im_end|>", "How?"),
        (
            "internvl",
            "<|im_start|>user\n<img><IMG_CONTEXT></img>\nHow?<|im_end|>\n<|im_start|>assistant\n",
            "How?",
        ),
    ],
)
def test_user_turn(family: str, prompt: str, turn: str | None) -> None:
    assert FAMILIES[family].user_turn(prompt) == turn


def test_placeholders_are_removed_from_a_whole_prompt() -> None:
    assert FAMILIES["llava"].without_placeholders(" <image>\nWhat? ") == "What?"


@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [
        ("USER: How", True),
        ("USER: How? ASSISTANT:", False),
        ("How many?", True),
        ("<|im_start|>user\nHow", True),
    ],
)
def test_a_question_that_goes_on(prompt: str, is_open: bool) -> None:
    assert FAMILIES["llava"].leaves_turn_open(prompt) == is_open
