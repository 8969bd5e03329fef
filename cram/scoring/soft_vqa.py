"""The soft accuracy of VQA data with several human answers (VQA v2, TextVQA), and its normal form of answers.

    credit(p) = mean over the answers a of min(1, number of other answers equal to p / 3)

Source: the evaluation of VQA (Antol et al. 2015) as the TextVQA evaluator has it. Texts are compared in a
normal form: lower case, without punctuation and articles, numbers up to ten as digits, contractions with
their apostrophes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

AGREEING = 3
# The evaluator passes a flag where the number of replacements belongs, so that only so many points go.
MAX_POINTS = int(re.UNICODE)
ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_POINT = re.compile(r"(?!<=\d)\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've
"""
# A contraction that lacks one apostrophe -> the whole one. The evaluator's own list has one slip.
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def vqa_normal_form(text: str) -> str:
    """Return the normal form of an answer: "The dog's, two!" -> "dog 's 2"."""
    plain = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    plain = plain.strip().replace("\n", " ").replace("\t", " ").strip()
    kept = plain
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in plain or f" {mark}" in plain
        kept = kept.replace(mark, "" if beside_blank or _COMMA_IN_NUMBER.search(plain) else " ")
    kept = _POINT.sub("", kept, count=MAX_POINTS)
    words = [NUMBERS.get(word, word) for word in kept.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_credit(prediction: str, answers: Sequence[str]) -> float:
    """Return the credit (0..1) of a prediction among several human answers.

    A single answer is compared alone, as if all humans had given it.
    """
    counts = Counter(vqa_normal_form(answer) for answer in answers)
    same = counts[vqa_normal_form(prediction)]
    if len(answers) == 1:
        return float(same)
    others = [min(1.0, (same - 1) / AGREEING)] * same + [min(1.0, same / AGREEING)] * (len(answers) - same)
    return sum(others) / len(others) if same else 0.0
