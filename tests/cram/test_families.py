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
        ("llava", "<|im_start|>user\n<image>\nHow?<|im_end|>\n<|im_start|>assistant\n", "How?"),
        ("llava", "[INST] <image>\nHow? [/INST]", "How?"),
        ("llava", "no marker at all", None),
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
