"""Scorers: predictions and samples -> one number, from 0 to 100 (only `coco_caption` can exceed 100).

Strict scorers (the default) count every test sample once, whatever was predicted. Published variants follow
the rules behind published numbers (`cram.scoring.published`). Both kinds refuse predictions whose ids are not
exactly the samples' ids.

    accuracy         share of answers equal to an accepted answer, ignoring case, blanks and a final point
    option_letter    share of answers that state the right option letter
    number           share of answers that hold exactly one number, equal to the right one
    vqa_soft         mean agreement with several human answers (VQA, TextVQA)
    box              share of answers that hold one box, which overlaps the right one by more than half
    anls             mean normalised Levenshtein similarity to the nearest accepted answer, 0 below 0.5
    caption          mean of BLEU-1..4, ROUGE-L and CIDEr / 10, x 100
    coco_caption     published convention: mean of BLEU-1..4, ROUGE-L and CIDEr, x 100, at most 250; no METEOR
    prism_anls       published: as anls, without the cut at 0.5
    prism_*, mcitlib_*   the published accuracies of `cram.scoring.published.RULES`
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from unicodedata import normalize

from cram.scoring.boxes import OVERLAP, overlap, read_box
from cram.scoring.captions import CIDER_MAXIMUM, caption_metrics
from cram.scoring.published import RULES, PublishedRule, Question, published_accuracy
from cram.scoring.soft_vqa import soft_credit

ANLS_THRESHOLD = 0.5
NUMBER_TOLERANCE = 1e-6
_OPTION = re.compile(
    r"(?:(?:the )?(?:correct )?(?:answer|option)(?: is)?:? *)?\(?([a-z])\)?(?:[.:,]? *|[.:)] .*)", re.I | re.S
)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")


class Sample(Protocol):
    """The part of a test sample that scoring reads. `cram.streams.Sample` has this part."""

    @property
    def id(self) -> str:
        """The id, which joins a prediction to its sample."""

    @property
    def answer(self) -> str:
        """The answer."""

    @property
    def accepted(self) -> tuple[str, ...]:
        """Every accepted answer, at least one."""

    @property
    def instruction(self) -> str:
        """The question."""

    @property
    def images(self) -> Sequence[Any]:
        """The question's pictures, opened or as paths."""

    @property
    def place(self) -> str:
        """Where an error message finds the sample."""


Scorer = Callable[[Sequence[str], Sequence[Sample]], float]


def score(scorer: str, predictions: Mapping[str, str], samples: Sequence[Sample]) -> float:
    """Score the answers to a test split.

    Args:
        scorer: A name in `SCORERS`.
        predictions: Sample id -> generated text, for exactly the ids of `samples`.
        samples: The test split.

    Raises:
        ValueError: If the scorer is unknown, `samples` is empty or has repeated ids, or predictions are
            missing or left over.
    """
    if scorer not in SCORERS:
        raise ValueError(f"scorer must be one of {sorted(SCORERS)}, got {scorer!r}")
    check_coverage(predictions, samples)
    return SCORERS[scorer]([predictions[sample.id] for sample in samples], samples)


def published_scores(
    scorer: str, predictions: Mapping[str, str], samples: Sequence[Sample]
) -> dict[str, float]:
    """Return the published variants of a strict scorer whose scores differ from the strict score."""
    strict = score(scorer, predictions, samples)
    variants = {name: score(name, predictions, samples) for name in VARIANTS.get(scorer, ())}
    return {name: value for name, value in variants.items() if abs(value - strict) > 1e-9}


def check_coverage(predictions: Mapping[str, str], samples: Sequence[Sample]) -> None:
    """Refuse predictions whose ids are not exactly the ids of the samples.

    Raises:
        ValueError: If ids are missing, unknown or repeated. The message gives their number and the first
        ones.
    """
    ids = [sample.id for sample in samples]
    if not ids:
        raise ValueError("samples must not be empty, got none")
    known = set(ids)
    if len(known) != len(ids):
        raise ValueError(f"sample ids must be unique, got {len(ids) - len(known)} repeated")
    missing = [i for i in ids if i not in predictions]
    extra = [i for i in predictions if i not in known]
    if missing or extra:
        raise ValueError(
            f"predictions must cover exactly the {len(ids)} samples, got {len(missing)} missing "
            f"(first: {missing[:3]}) and {len(extra)} unknown (first: {extra[:3]})"
        )


def check_answers(scorer: str, samples: Sequence[Sample]) -> None:
    """Refuse a scorer that is unknown, or that cannot read the expected answers of a test split.

    Raises:
        ValueError: For the first answer that cannot be read, with the place of its sample.
    """
    if scorer not in SCORERS:
        raise ValueError(f"scorer must be one of {sorted(SCORERS)}, got {scorer!r}")
    read, wanted = _READERS.get(scorer, (len, ""))
    for sample in samples:
        for answer in (sample.answer,) if scorer in RULES else sample.accepted:
            if read(answer) is None:
                raise ValueError(
                    f"{sample.place}: an answer scored by {scorer!r} must be {wanted}, got {answer!r:.100}"
                )


def read_predictions(file: Path) -> dict[str, str]:
    """Read predictions from JSON lines `{question_id, text}`. Other keys are ignored.

    Raises:
        ValueError: If a line is wrong or an id is repeated. The message names the file and the line.
    """
    predictions: dict[str, str] = {}
    # Only "\n" ends a line: JSON strings may hold the other separators of `splitlines`.
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} must be JSON, got {error}") from error
        if not isinstance(row, dict) or "question_id" not in row or not isinstance(row.get("text"), str):
            raise ValueError(
                f"{file}, line {number} must have 'question_id' and a string 'text', got {row!r}"
            )
        question = str(row["question_id"])
        if question in predictions:
            raise ValueError(f"{file}, line {number} must have a new question_id, got {question!r} again")
        predictions[question] = row["text"]
    return predictions


def normalise(text: str) -> str:
    """Return what `accuracy` compares: the text without case, runs of blanks and one final point, in NFC."""
    return " ".join(normalize("NFC", text).casefold().split()).removesuffix(".").rstrip()


def option_letter(text: str) -> str | None:
    """Return the option letter that a text states: "B", "(b)", "B. a dog", "The answer is B."; else None."""
    match = _OPTION.fullmatch(text.strip())
    return match.group(1).upper() if match else None


def single_number(text: str) -> float | None:
    """Return the number of a text that holds exactly one number ("1,200 m" -> 1200.0), else None."""
    found = _NUMBER.findall(text)
    return float(found[0].replace(",", "")) if len(found) == 1 else None


def anls_similarity(prediction: str, answer: str, threshold: float = ANLS_THRESHOLD) -> float:
    """Return 1 - edit distance / longer length of the stripped, lower-cased texts; 0 below the threshold.

    Source: Biten et al. 2019 (ST-VQA), with the threshold 0.5 of the DocVQA evaluation.
    """
    left, right = prediction.strip().lower(), answer.strip().lower()
    longest = max(len(left), len(right))
    similarity = 1.0 - _edit_distance(left, right) / longest if longest else 1.0
    return similarity if similarity >= threshold else 0.0


def _edit_distance(left: str, right: str) -> int:
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def _same_text(prediction: str, answer: str) -> float:
    return float(normalise(prediction) == normalise(answer))


def _same_option(prediction: str, answer: str) -> float:
    expected = option_letter(answer)
    if expected is None:
        raise ValueError(f"an answer scored by 'option_letter' must be an option letter, got {answer!r}")
    return float(option_letter(prediction) == expected)


def _same_number(prediction: str, answer: str) -> float:
    expected = single_number(answer)
    if expected is None:
        raise ValueError(f"an answer scored by 'number' must hold one number, got {answer!r}")
    found = single_number(prediction)
    return float(found is not None and abs(found - expected) <= NUMBER_TOLERANCE * max(1.0, abs(expected)))


def _anls(prediction: str, answer: str) -> float:
    return anls_similarity(normalize("NFC", prediction), normalize("NFC", answer))


def _anls_without_threshold(prediction: str, answer: str) -> float:
    return anls_similarity(prediction, answer, threshold=0.0)


def _best_of_accepted(credit: Callable[[str, str], float]) -> Scorer:
    """Mean over samples of the best credit that any accepted answer gives."""

    def mean_credit(predictions: Sequence[str], samples: Sequence[Sample]) -> float:
        credits = [
            max(credit(prediction, answer) for answer in sample.accepted)
            for prediction, sample in zip(predictions, samples, strict=True)
        ]
        return 100.0 * sum(credits) / len(credits)

    return mean_credit


def _caption(predictions: Sequence[str], samples: Sequence[Sample]) -> float:
    metrics = caption_metrics(predictions, [sample.accepted for sample in samples])
    metrics["CIDEr"] /= CIDER_MAXIMUM
    return 100.0 * sum(metrics.values()) / len(metrics)


def _coco_caption(predictions: Sequence[str], samples: Sequence[Sample]) -> float:
    metrics = caption_metrics(predictions, [sample.accepted for sample in samples])
    return 100.0 * sum(metrics.values()) / len(metrics)


def _published(rule: PublishedRule) -> Scorer:
    def accuracy(predictions: Sequence[str], samples: Sequence[Sample]) -> float:
        ids = [sample.id for sample in samples]
        questions = [_question(sample, rule.several) for sample in samples]
        return published_accuracy(
            rule, list(zip(ids, predictions, strict=True)), list(zip(ids, questions, strict=True))
        )

    return accuracy


def _question(sample: Sample, several: bool) -> Question:
    first = sample.images[0] if sample.images else None
    picture = first.name if isinstance(first, Path) else ""
    accepted = tuple(sample.accepted) if several else (sample.answer,)
    return Question(accepted, sample.instruction, picture)


def _vqa_soft(predictions: Sequence[str], samples: Sequence[Sample]) -> float:
    credits = [
        soft_credit(prediction, sample.accepted)
        for prediction, sample in zip(predictions, samples, strict=True)
    ]
    return 100.0 * sum(credits) / len(credits)


def _same_box(prediction: str, answer: str) -> float:
    expected, found = read_box(answer), read_box(prediction)
    if expected is None:
        raise ValueError(f"an answer scored by 'box' must be a box [x1, y1, x2, y2], got {answer!r}")
    return float(found is not None and overlap(found, expected) > OVERLAP)


SCORERS: dict[str, Scorer] = {
    "accuracy": _best_of_accepted(_same_text),
    "option_letter": _best_of_accepted(_same_option),
    "number": _best_of_accepted(_same_number),
    "vqa_soft": _vqa_soft,
    "box": _best_of_accepted(_same_box),
    "anls": _best_of_accepted(_anls),
    "caption": _caption,
    "coco_caption": _coco_caption,
    "prism_anls": _best_of_accepted(_anls_without_threshold),
    **{name: _published(rule) for name, rule in RULES.items()},
}

# Scorer -> what it reads in an expected answer, and what that must be. The others take any text.
_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "option_letter": (option_letter, "an option letter"),
    "number": (single_number, "a text with one number"),
    **dict.fromkeys(("box", "mcitlib_grounding", "prism_grounding"), (read_box, "a box [x1, y1, x2, y2]")),
}

# Strict scorer -> the published variants that score the same kind of answer.
VARIANTS: dict[str, tuple[str, ...]] = {
    "accuracy": tuple(
        name for name in RULES if not name.endswith(("_scienceqa", "_textvqa", "_grounding", "_sci"))
    ),
    "option_letter": ("mcitlib_scienceqa", "prism_scienceqa", "mcitlib_finvis"),
    "vqa_soft": ("mcitlib_textvqa", "prism_textvqa"),
    "box": ("mcitlib_grounding", "prism_grounding"),
    "anls": ("prism_anls",),
    "caption": ("coco_caption",),
}
