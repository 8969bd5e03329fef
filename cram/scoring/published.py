"""The scoring rules behind published numbers, with their defects, for comparison with the strict scorers.

Sources: LAMDA-CL/Prism (and the CRAM release built on it) and Ghy0501/MCITlib. These rules differ from the
strict scorers in two ways. They divide by the number of predictions, so unanswered questions do not count.
And some of them pair a prediction with its answer by position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PublishedRule:
    """One published accuracy.

    Attributes:
        matches: (prediction, answer) -> True if the prediction is right.
        skip: A prediction that contains this text counts as wrong, whatever the answer is.
        pairing: "id" pairs predictions and answers by question id, "position" by position in the file.
        unknown: A prediction without an answer is wrong ("wrong"), left out of both counts ("drop") or an
            error ("raise").
        source: Source of the rule.
    """

    matches: Callable[[str, str], bool]
    source: str
    skip: str | None = None
    pairing: Literal["id", "position"] = "id"
    unknown: Literal["wrong", "drop", "raise"] = "raise"


def _exact_upper(prediction: str, answer: str) -> bool:
    return prediction.upper() == answer.upper()


def _exact_stripped(prediction: str, answer: str) -> bool:
    return prediction.strip().upper() == answer.strip().upper()


def _either_contains(prediction: str, answer: str) -> bool:
    return answer in prediction or prediction in answer


def _prediction_contains(prediction: str, answer: str) -> bool:
    return answer.upper() in prediction.upper()


UNANSWERABLE = "Unanswerable"

RULES: dict[str, PublishedRule] = {
    "mcitlib_accuracy": PublishedRule(
        _exact_upper, "MCITlib eval_deepseek_r1, eval_vqav2, eval_vizwiz: every UCIT and TriGap accuracy"
    ),
    "mcitlib_ocrvqa": PublishedRule(_exact_upper, "MCITlib eval_ocrvqa", skip=UNANSWERABLE),
    "mcitlib_pvqa": PublishedRule(_prediction_contains, "MCITlib eval_pvqa", skip=UNANSWERABLE),
    "mcitlib_imagenet": PublishedRule(_either_contains, "MCITlib eval_imagenet", pairing="position"),
    "prism_accuracy": PublishedRule(
        _exact_stripped, "Prism evaluate_vqav2, evaluate_vizwiz", unknown="wrong"
    ),
    "prism_ocrvqa": PublishedRule(
        _exact_stripped, "Prism evaluate_ocrvqa", skip=UNANSWERABLE, unknown="wrong"
    ),
    "prism_imagenet": PublishedRule(
        _either_contains, "Prism evaluate_imagenet", pairing="position", unknown="drop"
    ),
}


def published_accuracy(
    rule: PublishedRule, predictions: Sequence[tuple[str, str]], answers: Sequence[tuple[str, str]]
) -> float:
    """Return the accuracy (0..100) as the published scorer computes it.

    Args:
        rule: An entry of `RULES`.
        predictions: (question id, prediction) in file order.
        answers: (question id, answer) in file order.

    Raises:
        ValueError: If there is no prediction, or one without an answer, and the published scorer stops there.
    """
    by_id = dict(answers)
    right, total = 0, 0
    for position, (question, prediction) in enumerate(predictions):
        if rule.pairing == "position":
            answer = answers[position][1] if position < len(answers) else None
        else:
            answer = by_id.get(question)
        if answer is None and rule.unknown == "raise":
            raise ValueError(f"every prediction must have an answer, got none for question {question!r}")
        if answer is None and rule.unknown == "drop":
            continue
        total += 1
        skipped = rule.skip is not None and rule.skip in prediction
        right += answer is not None and not skipped and rule.matches(prediction, answer)
    if total == 0 and rule.unknown == "raise":
        raise ValueError("predictions must not be empty, got none")
    return 100.0 * right / total if total else 0.0
