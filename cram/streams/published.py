"""What published benchmarks add to their test rows: answers of several people, and a suffix per question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cram.atomic import read_json
from cram.streams.readers import StreamError, brief
from cram.streams.types import Sample

MAX_BYTES = 4 << 30
# The key of a suffix for all other answers.
OTHER = "*"


def add_human_answers(samples: Sequence[Sample], file: Path) -> list[Sample]:
    """Give samples the answers of several people, from TextVQA's file `{data: [{question_id, answers}]}`.

    Raises:
        StreamError: If the file is malformed or has no answers for a sample.
    """
    try:
        content = read_json(file, MAX_BYTES)
    except (ValueError, OSError) as error:
        raise StreamError(file, None, "(file)", f"must be JSON, got {error}") from error
    rows = content.get("data") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise StreamError(file, None, "data", f"must be a list, got {brief(rows)}")
    answers: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(rows):
        said = row.get("answers") if isinstance(row, dict) else None
        if not isinstance(said, list) or not said or not all(isinstance(each, str) for each in said):
            raise StreamError(file, number, "answers", f"must be a list of texts, got {brief(said)}")
        answers[str(row.get("question_id"))] = tuple(said)
    for sample in samples:
        if sample.id not in answers:
            raise StreamError(file, None, "data", f"must have answers for {sample.source}, got none")
    return [replace(sample, references=answers[sample.id]) for sample in samples]


def with_suffix(samples: Sequence[Sample], suffix: Mapping[str, str]) -> list[Sample]:
    """Add to every question the text that the published evaluation adds.

    Args:
        samples: Test samples.
        suffix: Answer -> text; the answer "*" stands for all others.
    """
    return [
        replace(sample, instruction=sample.instruction + _suffix_of(sample, suffix)) for sample in samples
    ]


def without_suffix(sample: Sample, suffix: Mapping[str, str]) -> str:
    """The question of a sample without the text that `with_suffix` adds, however often it stands there."""
    question, added = sample.instruction, _suffix_of(sample, suffix)
    while added and question.endswith(added):
        question = question.removesuffix(added)
    return question


def _suffix_of(sample: Sample, suffix: Mapping[str, str]) -> str:
    return suffix.get(sample.answer, suffix.get(OTHER, ""))
