"""Strict scorers by hand, published variants against the golden vectors, and the coverage of ids."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest

from cram.scoring import published_scores, read_predictions, score
from cram.scoring.captions import caption_metrics, tokenize
from cram.scoring.published import RULES, Question, published_accuracy, science_option
from cram.scoring.scorers import (
    SCORERS,
    VARIANTS,
    anls_similarity,
    check_answers,
    normalise,
    option_letter,
    single_number,
)
from cram.scoring.soft_vqa import soft_credit, vqa_normal_form
from cram.streams.types import Sample
from tests.conftest import golden_cases, golden_dir

# Golden family -> the test that covers it, or why nothing here scores it.
TESTED = {
    "scorer_vqa": "test_golden_published_accuracies",
    "scorer_anls": "test_golden_anls",
    "scorer_caption": "test_golden_captions",
    "scorer_scienceqa": "test_golden_scienceqa_agrees_with_the_strict_option_scorer",
    "scorer_textvqa": "test_golden_soft_accuracy",
    "scorer_grounding": "test_golden_boxes",
    "scorer_mcitlib_misc": "test_golden_domain_rules",
}
# Endings of the scorers that refuse an answer which is no letter, number or box.
TYPED = ("option_letter", "number", "box", "grounding")
# Key of a golden case's `expected` -> our name for that rule.
GOLDEN_RULES = {
    "prism.evaluate_vqav2": "prism_accuracy",
    "prism.evaluate_ocrvqa": "prism_ocrvqa",
    "prism.evaluate_imagenet": "prism_imagenet",
    "mcitlib.eval_vqav2": "mcitlib_accuracy",
    "mcitlib.eval_vizwiz": "mcitlib_accuracy",
    "mcitlib.eval_deepseek_r1": "mcitlib_accuracy",
    "mcitlib.eval_ocrvqa": "mcitlib_ocrvqa",
    "mcitlib.eval_pvqa": "mcitlib_pvqa",
    "mcitlib.eval_imagenet": "mcitlib_imagenet",
}


def sample(sample_id: str, answer: str, *more: str) -> Sample:
    return Sample(sample_id, (), "question", answer, (answer, *more) if more else ())


def one(scorer: str, prediction: str, *answers: str) -> float:
    return score(scorer, {"q": prediction}, [sample("q", *answers)])


def test_every_golden_scorer_family_is_tested_or_listed() -> None:
    index = json.loads((golden_dir() / "index.json").read_text())
    families = {case["family"] for case in index["cases"] if case["family"].startswith("scorer_")}
    assert families == TESTED.keys()
    assert all(name in globals() for name in TESTED.values())


def cases(family: str) -> list[Any]:
    return [pytest.param(case, id=case["id"]) for case in golden_cases(family)]


@pytest.mark.parametrize("case", cases("scorer_vqa"))
def test_golden_published_accuracies(case: dict[str, Any]) -> None:
    answers = [(str(row["question_id"]), row["answer"]) for row in case["json_inputs"]["annotations"]]
    predictions = [(str(row["question_id"]), row["text"]) for row in case["json_inputs"]["results"]]
    assert case["expected"].keys() == GOLDEN_RULES.keys()
    for key, expected in case["expected"].items():
        rule = RULES[GOLDEN_RULES[key]]
        if "raises" in expected:
            with pytest.raises(ValueError, match="must"):
                published_accuracy(rule, predictions, answers)
        elif "accuracy" in expected:
            assert published_accuracy(rule, predictions, answers) == pytest.approx(expected["accuracy"]), key
        else:
            printed = re.search(r"Accuracy: ([\d.]+)%", expected["result_text"])
            assert printed and f"{published_accuracy(rule, predictions, answers):.2f}" == printed[1], key


def accuracy_of(name: str, case: dict[str, Any], questions: dict[str, Question]) -> float:
    """The accuracy by a published rule of a golden case's predictions."""
    rows = case["json_inputs"]["results"]
    predictions = [(str(row["question_id"]), row["text"]) for row in rows]
    return published_accuracy(RULES[name], predictions, list(questions.items()))


@pytest.mark.parametrize("case", cases("scorer_textvqa"))
def test_golden_soft_accuracy(case: dict[str, Any]) -> None:
    rows = case["json_inputs"]["annotations"]["data"]
    questions = {row["question_id"]: Question(tuple(row["answers"])) for row in rows}
    found = [
        soft_credit(row["text"], questions[row["question_id"]].accepted)
        for row in case["json_inputs"]["results"]
    ]
    assert found == pytest.approx(case["expected"]["per_sample (order of results)"])
    for text, plain in case["expected"]["normalised"].items():
        assert vqa_normal_form(text) == plain
    wanted = case["expected"]["prism.evaluate_textvqa"]["accuracy"]
    assert accuracy_of("prism_textvqa", case, questions) == pytest.approx(wanted)
    assert accuracy_of("mcitlib_textvqa", case, questions) == pytest.approx(wanted)
    samples = [Sample(name, (), "q", each.accepted[0], each.accepted) for name, each in questions.items()]
    predictions = {row["question_id"]: row["text"] for row in case["json_inputs"]["results"]}
    assert score("vqa_soft", predictions, samples) == pytest.approx(wanted)


@pytest.mark.parametrize("blank", [" ", "\n", "\t"])
def test_a_mark_beside_a_blank_joins_wherever_it_stands(blank: str) -> None:
    assert vqa_normal_form("red-green") == "red green"
    assert vqa_normal_form(f"self-{blank}made red-green") == "self made redgreen"
    assert vqa_normal_form(f"self{blank}-made red-green") == "self made redgreen"


@pytest.mark.parametrize("case", cases("scorer_grounding"))
def test_golden_boxes(case: dict[str, Any]) -> None:
    rows = case["json_inputs"]["annotations"]
    questions = {str(row["question_id"]): Question((row["answer_bbox"],)) for row in rows}
    wanted = case["expected"]
    assert accuracy_of("prism_grounding", case, questions) == pytest.approx(
        wanted["prism.evaluate_grounding"]["accuracy"]
    )
    assert accuracy_of("mcitlib_grounding", case, questions) == pytest.approx(
        wanted["prism.evaluate_grounding(legacy)"]["accuracy"]
    )


@pytest.mark.parametrize("case", cases("scorer_mcitlib_misc"))
def test_golden_domain_rules(case: dict[str, Any]) -> None:
    asked = {str(row["question_id"]): row["prompt"] for row in case["json_inputs"]["results"]}
    questions = {
        str(row["question_id"]): Question(
            (row["answer"],), asked[str(row["question_id"])], Path(row["image"]).name
        )
        for row in case["json_inputs"]["annotations"]
    }
    for key, expected in case["expected"].items():
        name = key.replace(".eval", "")
        printed = re.search(r"Accuracy: ([\d.]+)%", expected["result_text"])
        assert printed and f"{accuracy_of(name, case, questions):.2f}" == printed[1], key


def test_the_published_comparisons_of_case() -> None:
    def right(name: str, prediction: str, answer: str) -> bool:
        return published_accuracy(RULES[name], [("q", prediction)], [("q", answer)]) == 100

    # The sharp s is two letters in upper case, and itself in lower case.
    for name in ("mcitlib_accuracy", "prism_accuracy"):
        assert right(name, "STRASSE", "straße")
    for name in ("mcitlib_ocrvqa", "prism_ocrvqa", "mcitlib_pvqa", "mcitlib_sat", "mcitlib_finvis"):
        assert not right(name, "STRASSE", "straße") and right(name, "STRAẞE", "straße"), name


@pytest.mark.parametrize(
    ("text", "option", "legacy"),
    [
        ("C", "C", "C"),
        ("A. a dog", "A", "A"),
        ("The answer is B.", "B", "B"),
        ("The answer is B", None, None),
        ("The answer is B!", None, "B"),
        ("A. Since it is red. The answer is B.", "B", "A"),
        ("The answer is A. The answer is B.", None, None),
        ("The answer is A. The answer is A.", None, None),
        ("A. The answer is A. The answer is B.", "A", "A"),
        ("F. too far", None, None),
        ("I think D", None, None),
        ("a. small", None, None),
        ("A) a dog", None, None),
        ("", None, None),
        ("\nA", None, None),
    ],
)
def test_scienceqa_options(text: str, option: str | None, legacy: str | None) -> None:
    assert science_option(text) == option
    answer = legacy or "A"
    found = published_accuracy(RULES["mcitlib_scienceqa"], [("q", text)], [("q", answer)])
    assert found == (100.0 if legacy else 0.0)


def test_strict_boxes_and_soft_accuracy_by_hand() -> None:
    half = "[0.0, 0.0, 0.5, 1.0]"
    assert one("box", "The box is [0, 0, 1, 1].", "[0,0,1,1]") == 100
    assert one("box", half, "[0,0,1,1]") == 0  # Exactly one half is not more than one half.
    assert one("box", "[0, 0, 0.51, 1]", "[0,0,1,1]") == 100
    assert one("box", "[0, 0, 1]", "[0,0,1,1]") == one("box", "", "[0,0,1,1]") == 0
    assert one("box", "[1, 1, 1, 1]", "[1,1,1,1]") == 0
    with pytest.raises(ValueError, match="must be a box"):
        one("box", "x", "a dog")
    assert one("vqa_soft", "Two dogs.", "2 dogs") == 100
    # One of two answers agrees: the one that agrees counts no other, the other counts one of three.
    assert one("vqa_soft", "yes", "yes", "no") == pytest.approx(100 / 6)


@pytest.mark.parametrize("case", cases("scorer_anls"))
def test_golden_anls(case: dict[str, Any]) -> None:
    answers = {
        str(row["question_id"]): [str(a) for a in row["answer"]]
        if isinstance(row["answer"], list)
        else [row["answer"]]
        for row in case["json_inputs"]["annotations"]
    }
    rows = [(str(row["question_id"]), row["text"]) for row in case["json_inputs"]["results"]]
    known = [(answers[question], text) for question, text in rows if question in answers]
    without_cut = [max(anls_similarity(text, a, threshold=0.0) for a in accepted) for accepted, text in known]
    assert without_cut == pytest.approx([row["anls"] for row in case["expected"]["prism.anls_single"]])
    mean = 100 * sum(without_cut) / len(without_cut) if without_cut else 0.0
    assert mean == pytest.approx(case["expected"]["prism.evaluate_anls"]["anls"])
    with_cut = case["expected"]["m4c.STVQAANLSEvaluator.get_anls (threshold 0.5)"]
    for (accepted, text), expected in zip(known, with_cut, strict=True):
        # Two empty texts are the same text here; the published evaluator divides by zero.
        wanted = 1.0 if expected == "ZeroDivisionError" else expected
        assert max(anls_similarity(text, a) for a in accepted) == pytest.approx(wanted)


@pytest.mark.parametrize("case", cases("scorer_caption"))
def test_golden_captions(case: dict[str, Any]) -> None:
    coco = case["json_inputs"]["annotations"]
    references = [
        [row["caption"] for row in coco["annotations"] if row["image_id"] == image["id"]]
        for image in coco["images"]
    ]
    predictions = [row["text"] for row in case["json_inputs"]["results"]]
    names = {f"BLEU-{n}": f"Bleu_{n}" for n in range(1, 5)} | {"ROUGE-L": "ROUGE_L", "CIDEr": "CIDEr"}
    corpus = caption_metrics(predictions, references)
    assert corpus == pytest.approx(
        {ours: case["expected"]["corpus"][theirs] for ours, theirs in names.items()}
    )
    samples = [sample(f"q{i}", *several) for i, several in enumerate(references)]
    shuffled = dict(reversed([(s.id, text) for s, text in zip(samples, predictions, strict=True)]))
    assert score("coco_caption", shuffled, samples) == pytest.approx(100 * sum(corpus.values()) / 6)
    bounded = sum(corpus.values()) - 0.9 * corpus["CIDEr"]
    assert score("caption", shuffled, samples) == pytest.approx(100 * bounded / 6)
    for image, text, several in zip(case["expected"]["per_image"], predictions, references, strict=True):
        alone = caption_metrics([text], [several])
        for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"):
            assert alone[name] == pytest.approx(image[names[name]], abs=1e-9)


@pytest.mark.parametrize("case", cases("scorer_scienceqa"))
def test_golden_scienceqa_agrees_with_the_strict_option_scorer(case: dict[str, Any]) -> None:
    predicted = {row["question_id"]: row["text"] for row in case["json_inputs"]["results"]}
    samples = [sample(row["question_id"], row["answer"]) for row in case["json_inputs"]["problems"]]
    with_unanswered = {s.id: predicted.get(s.id, "") for s in samples}
    expected = case["expected"]["prism.evaluate_scienceqa"]["accuracy"]
    assert score("option_letter", with_unanswered, samples) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scorer", "prediction", "answers", "expected"),
    [
        ("accuracy", " Two  cats. ", ["two cats"], 100),
        ("accuracy", "", ["two cats"], 0),
        ("accuracy", "cats", ["two cats"], 0),
        ("accuracy", "ja", ["yes", "ja"], 100),
        ("option_letter", "(b) a dog", ["B"], 100),
        ("option_letter", "The answer is B.", ["B"], 100),
        ("option_letter", "answer: b", ["B"], 100),
        ("option_letter", "A dog", ["A"], 0),
        ("option_letter", "A or B", ["A"], 0),
        ("option_letter", "", ["A"], 0),
        ("number", "1,200 m", ["1200"], 100),
        ("number", "-3.50", ["-3.5"], 100),
        ("number", "3 or 4", ["3"], 0),
        ("number", "", ["0"], 0),
        ("anls", "28 May 2008", ["28th of May, 2008", "May 28, 2008"], 100 * 11 / 17),
        ("anls", "abcd", ["wxyz"], 0),
        ("anls", "abxx", ["abyyy"], 0),
        ("prism_anls", "abxx", ["abyyy"], 40),
    ],
)
def test_one_answer(scorer: str, prediction: str, answers: list[str], expected: float) -> None:
    assert one(scorer, prediction, *answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    "letter", ["B", "b.", "(B)", "B)", "B. a dog", "B: a dog", "Option B", "The answer is: B"]
)
def test_option_letter_forms(letter: str) -> None:
    assert option_letter(letter) == "B"


def test_normalise_and_numbers() -> None:
    assert normalise(" A\n B . ") == "a b"
    assert single_number("about .5") == 0.5
    assert single_number("no number") is None
    assert tokenize("The dog's toy; it isn't a ball-pen (3.5 cm).") == [
        "the", "dog", "'s", "toy", "it", "is", "n't", "a", "ball-pen", "3.5", "cm",
    ]  # fmt: skip


@pytest.mark.parametrize(("scorer", "answer"), [("option_letter", "a dog"), ("number", "dog")])
def test_answer_of_the_wrong_kind_is_refused(scorer: str, answer: str) -> None:
    with pytest.raises(ValueError, match=f"scored by '{scorer}' must .* got '{answer}'"):
        one(scorer, "A", answer)


def test_scores_do_not_depend_on_the_order_of_predictions() -> None:
    samples = [sample("1", "red"), sample("2", "blue"), sample("3", "green")]
    predictions = {"3": "green", "1": "red", "2": "green"}
    for name in (name for name in SCORERS if not name.endswith(TYPED)):
        forwards = score(name, predictions, samples)
        assert forwards == score(name, dict(sorted(predictions.items())), samples), name
    assert score("accuracy", predictions, samples) == pytest.approx(200 / 3)


def test_published_variants_are_reported_where_they_differ() -> None:
    samples = [sample("1", "red"), sample("2", "blue")]
    assert published_scores("accuracy", {"1": "red", "2": "green"}, samples) == {}
    differing = published_scores("accuracy", {"1": " red", "2": ""}, samples)
    assert differing["mcitlib_accuracy"] == 0.0
    assert differing["prism_imagenet"] == 100.0
    assert "prism_accuracy" not in differing
    assert published_scores("option_letter", {"1": "A"}, [sample("1", "A")]) == {}
    assert all(
        name in SCORERS for name in (*VARIANTS, *(n for several in VARIANTS.values() for n in several))
    )


@pytest.mark.parametrize(
    ("predictions", "samples", "message"),
    [
        ({"1": "a"}, [sample("1", "a"), sample("2", "b")], r"1 missing \(first: \['2'\]\) and 0 unknown"),
        ({"1": "a", "9": "b"}, [sample("1", "a")], r"0 missing .* and 1 unknown \(first: \['9'\]\)"),
        ({"1": "a"}, [sample("1", "a"), sample("1", "b")], "sample ids must be unique, got 1 repeated"),
        ({}, [], "samples must not be empty"),
    ],
)
def test_ids_must_match_exactly(predictions: dict[str, str], samples: list[Sample], message: str) -> None:
    for name in SCORERS:
        with pytest.raises(ValueError, match=message):
            score(name, predictions, samples)


def test_perfect_captions_score_100_and_the_published_convention_more() -> None:
    captions = [
        "a large red ring left of a small blue star",
        "two green crosses above a pink square",
        "a cup",
    ]
    samples = [sample(str(i), caption) for i, caption in enumerate(captions)]
    predictions = {s.id: f"{s.answer.capitalize()}." for s in samples}
    assert 90 < score("caption", predictions, samples) <= 100
    assert published_scores("caption", predictions, samples)["coco_caption"] > 200
    assert score("caption", {s.id: "" for s in samples}, samples) == pytest.approx(0.0, abs=1e-4)


def test_unknown_scorer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scorer must be one of \['accuracy', .*, got 'bleurt'"):
        score("bleurt", {"1": "a"}, [sample("1", "a")])


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [([], [], "equally many, at least 1, got 0 and 0"), (["a"], [[]], "must have a reference")],
)
def test_caption_corpus_must_be_complete(
    predictions: list[str], references: list[list[str]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        caption_metrics(predictions, references)


def test_read_predictions(tmp_path: Path) -> None:
    file = tmp_path / "merge.jsonl"
    file.write_text('{"question_id": 3, "text": "a"}\n\n{"question_id": "x", "text": "", "prompt": "p"}\n')
    assert read_predictions(file) == {"3": "a", "x": ""}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question_id": "3", "text": "b"}', "line 2 must have a new question_id, got '3' again"),
        ('{"question_id": 4}', "line 2 must have 'question_id' and a string 'text'"),
        ('{"text": "b"}', "line 2 must have 'question_id'"),
        ("{", "line 2 must be JSON"),
    ],
)
def test_faulty_predictions_are_refused(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "merge.jsonl"
    file.write_text('{"question_id": 3, "text": "a"}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_predictions(file)


@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_an_expected_answer_that_cannot_be_scored_is_found_ahead(scorer: str) -> None:
    sample = Sample("1", (), "q", "a dog", ("a dog", "dogs"), source="test.json, row 7")
    try:
        check_answers(scorer, [sample])
    except ValueError as error:
        assert re.match(
            f"test.json, row 7: an answer scored by '{scorer}' must be .*, got 'a dog'", str(error)
        )
        with pytest.raises(ValueError, match="an answer scored by"):
            score(scorer, {"1": "[0, 0, 1, 1]"}, [sample])
    else:
        assert 0 <= score(scorer, {"1": "a cat"}, [sample]) <= 250


@pytest.mark.parametrize("scorer", ["vqa_soft", "mcitlib_textvqa", "prism_textvqa", "mcitlib_ocr"])
def test_the_order_of_several_answers_makes_no_difference(scorer: str) -> None:
    answers = ("coke", "coke", *["pepsi"] * 8)
    found = [
        score(scorer, {"1": "coke"}, [Sample("1", (), "q", "pepsi", order)])
        for order in (answers, answers[::-1])
    ]
    assert found[0] == found[1] > 50


@pytest.mark.parametrize("scorer", ["accuracy", "anls"])
def test_composed_and_decomposed_letters_are_the_same(scorer: str) -> None:
    decomposed = normalize("NFD", "caf\u00e9")
    assert score(scorer, {"1": "caf\u00e9"}, [Sample("1", (), "q", decomposed)]) == 100


def test_a_published_anls_compares_as_published() -> None:
    decomposed = normalize("NFD", "caf\u00e9")
    assert score("prism_anls", {"1": "caf\u00e9"}, [Sample("1", (), "q", decomposed)]) == 60
