"""The scoring rules behind published numbers, with their defects, for comparison with the strict scorers.

Sources: LAMDA-CL/Prism (and the CRAM release built on it) and Ghy0501/MCITlib. These rules differ from the
strict scorers in two ways. They divide by the number of predictions, so unanswered questions do not count.
And some of them pair a prediction with its answer by position.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cram.scoring.boxes import OVERLAP, Box, overlap, read_box, read_box_cut
from cram.scoring.soft_vqa import soft_credit


class Question(NamedTuple):
    """What a rule may read of a question.

    Attributes:
        accepted: The accepted answers, at least one.
        text: The question.
        picture: File name of its first picture, or an empty text.
    """

    accepted: tuple[str, ...]
    text: str = ""
    picture: str = ""


@dataclass(frozen=True)
class PublishedRule:
    """One published accuracy.

    Attributes:
        credit: (prediction, question) -> credit from 0 to 1.
        source: Source of the rule.
        skip: A prediction that contains this text counts as wrong, whatever the answer is.
        pairing: "id" pairs predictions and answers by question id, "position" by position in the file.
        unknown: A prediction without an answer is wrong ("wrong"), left out of both counts ("drop") or an
            error ("raise").
        divisor: The accuracy is a share of the "predictions" or of the "questions".
        several: Whether all accepted answers count, and not one alone.
    """

    credit: Callable[[str, Question], float]
    source: str
    skip: str | None = None
    pairing: Literal["id", "position"] = "id"
    unknown: Literal["wrong", "drop", "raise"] = "raise"
    divisor: Literal["predictions", "questions"] = "predictions"
    several: bool = False


def _first(matches: Callable[[str, str], bool]) -> Callable[[str, Question], float]:
    """A rule that compares with the first accepted answer."""
    return lambda prediction, question: float(matches(prediction, question.accepted[0]))


def _exact_upper(prediction: str, answer: str) -> bool:
    return prediction.upper() == answer.upper()


def _exact_lower(prediction: str, answer: str) -> bool:
    return prediction.lower() == answer.lower()


def _exact_stripped(prediction: str, answer: str) -> bool:
    return prediction.strip().upper() == answer.strip().upper()


def _exact_stripped_lower(prediction: str, answer: str) -> bool:
    return prediction.strip().lower() == answer.strip().lower()


def _either_contains(prediction: str, answer: str) -> bool:
    return answer in prediction or prediction in answer


def _prediction_contains(prediction: str, answer: str) -> bool:
    return answer.lower() in prediction.lower()


def _contains_without_blanks(prediction: str, answer: str) -> bool:
    return _packed(answer) in _packed(prediction)


def _packed(text: str) -> str:
    return text.lower().strip().replace(" ", "").replace("\n", "").replace(".", "")


def _choice_without_blanks(prediction: str, answer: str) -> bool:
    return prediction.lower().replace(" ", "").replace(".", "") == answer.lower()


def _contains_as_word(prediction: str, answer: str) -> bool:
    """A word of the answer beside a blank, a point or a comma; phrases and single words by containment."""
    said, wanted = prediction.lower(), answer.lower()
    if " " in wanted:
        return wanted in said
    wanted = wanted.replace(".", "")
    if " " not in said:
        return wanted in said
    return any(part in said for part in (f" {wanted}", f"{wanted} ", f"{wanted}.", f"{wanted},"))


def _any_contained(prediction: str, question: Question) -> float:
    """One of the accepted answers in the prediction, in lower case and without line ends."""
    said = prediction.lower().strip().replace("\n", "")
    return float(any(each.lower().strip().replace("\n", "") in said for each in question.accepted))


EXACT_SCIENCE = ("AI2D", "TQA", "VQA", "SciVerse")


def _science_domain(prediction: str, question: Question) -> float:
    """By the source of the picture: exact, by containment, or the share of the listed states."""
    said, wanted = prediction.lower(), question.accepted[0].lower()
    if question.picture.split("_")[0] in EXACT_SCIENCE:
        return float(said == wanted)
    if "Which states" in question.text:
        states, named = wanted.split(","), said.split(",")
        return sum(state in named for state in states) / len(states)
    return float(wanted in said)


SCIENCE_OPTIONS = "ABCDE"
_SAID_OPTION = re.compile(r"The answer is ([A-Z])\.")
_SAID_OPTION_LOOSE = re.compile(r"The answer is ([A-Z]).")


def science_option(text: str) -> str | None:
    """Return the option of a ScienceQA answer: "The answer is X." found exactly once, else the letter before
    ". " at the beginning, else the text itself where it is an option; None if nothing is found."""
    said = _SAID_OPTION.findall(text)
    if len(said) == 1:
        return str(said[0])
    return _leading_option(text)


def _science_option_legacy(text: str) -> str | None:
    if (option := _leading_option(text)) is not None:
        return option
    said = _SAID_OPTION_LOOSE.findall(text)
    return str(said[0]) if len(said) == 1 else None


def _leading_option(text: str) -> str | None:
    """The letter of "A" and of "A. a dog"."""
    alone = len(text) == 1 or text[1:3] == ". "
    return text[0] if text and alone and text[0] in SCIENCE_OPTIONS else None


def _option_by(parse: Callable[[str], str | None]) -> Callable[[str, Question], float]:
    return lambda prediction, question: float(parse(prediction) == question.accepted[0])


def _soft(prediction: str, question: Question) -> float:
    return soft_credit(prediction, question.accepted)


def _box_by(parse: Callable[[str], Box | None]) -> Callable[[str, Question], float]:
    def credit(prediction: str, question: Question) -> float:
        found, wanted = parse(prediction), read_box(question.accepted[0])
        if wanted is None:
            raise ValueError(f"an answer scored by overlap must be a box, got {question.accepted[0]!r:.100}")
        return float(found is not None and overlap(found, wanted) > OVERLAP)

    return credit


UNANSWERABLE = "Unanswerable"

RULES: dict[str, PublishedRule] = {
    "mcitlib_accuracy": PublishedRule(
        _first(_exact_upper),
        "MCITlib eval_deepseek_r1, eval_vqav2, eval_vizwiz: every UCIT and TriGap accuracy",
    ),
    "mcitlib_ocrvqa": PublishedRule(_first(_exact_lower), "MCITlib eval_ocrvqa", skip=UNANSWERABLE),
    "mcitlib_pvqa": PublishedRule(
        _first(_prediction_contains), "MCITlib eval_pvqa: MLLM-DCL's Med", skip=UNANSWERABLE
    ),
    "mcitlib_imagenet": PublishedRule(_first(_either_contains), "MCITlib eval_imagenet", pairing="position"),
    "mcitlib_scienceqa": PublishedRule(_option_by(_science_option_legacy), "MCITlib eval_science_qa"),
    "mcitlib_textvqa": PublishedRule(_soft, "MCITlib eval_textvqa", several=True),
    "mcitlib_grounding": PublishedRule(_box_by(read_box_cut), "MCITlib eval_grounding"),
    "mcitlib_ai2d": PublishedRule(
        _first(_contains_as_word), "MCITlib eval_ai2d: MLLM-DCL's RS and AD", skip=UNANSWERABLE
    ),
    "mcitlib_sci": PublishedRule(_science_domain, "MCITlib eval_sci: MLLM-DCL's Sci", skip=UNANSWERABLE),
    "mcitlib_finvis": PublishedRule(
        _first(_choice_without_blanks), "MCITlib eval_finvis: MLLM-DCL's Fin", skip=UNANSWERABLE
    ),
    "mcitlib_ocr": PublishedRule(
        _any_contained,
        "MCITlib eval_ocr: MLLM-ACL's OCR; formulas alone are compared without blanks there",
        several=True,
    ),
    "mcitlib_sat": PublishedRule(_first(_contains_without_blanks), "MCITlib eval_sat: MLLM-ACL's VP"),
    "prism_accuracy": PublishedRule(
        _first(_exact_stripped), "Prism evaluate_vqav2, evaluate_vizwiz", unknown="wrong"
    ),
    "prism_ocrvqa": PublishedRule(
        _first(_exact_stripped_lower), "Prism evaluate_ocrvqa", skip=UNANSWERABLE, unknown="wrong"
    ),
    "prism_imagenet": PublishedRule(
        _first(_either_contains), "Prism evaluate_imagenet", pairing="position", unknown="drop"
    ),
    "prism_scienceqa": PublishedRule(
        _option_by(science_option), "Prism evaluate_scienceqa", unknown="drop", divisor="questions"
    ),
    "prism_textvqa": PublishedRule(_soft, "Prism evaluate_textvqa", unknown="drop", several=True),
    "prism_grounding": PublishedRule(_box_by(read_box), "Prism evaluate_grounding", unknown="drop"),
}


def published_accuracy(
    rule: PublishedRule,
    predictions: Sequence[tuple[str, str]],
    answers: Sequence[tuple[str, str | Question]],
) -> float:
    """Return the accuracy (0..100) as the published scorer computes it.

    Args:
        rule: An entry of `RULES`.
        predictions: (question id, prediction) in file order.
        answers: (question id, question) in file order; a text stands for a question with this one answer.

    Raises:
        ValueError: If there is no prediction, or one without an answer, and the published scorer stops there.
    """
    questions = [(name, Question((each,)) if isinstance(each, str) else each) for name, each in answers]
    by_id = dict(questions)
    right, total = 0.0, 0
    for position, (name, prediction) in enumerate(predictions):
        if rule.pairing == "position":
            question = questions[position][1] if position < len(questions) else None
        else:
            question = by_id.get(name)
        if question is None and rule.unknown == "raise":
            raise ValueError(f"every prediction must have an answer, got none for question {name!r}")
        if question is None and rule.unknown == "drop":
            continue
        total += 1
        skipped = rule.skip is not None and rule.skip in prediction
        right += 0.0 if question is None or skipped else rule.credit(prediction, question)
    if total == 0 and rule.unknown == "raise":
        raise ValueError("predictions must not be empty, got none")
    divisor = len(questions) if rule.divisor == "questions" else total
    return 100.0 * right / divisor if divisor else 0.0
