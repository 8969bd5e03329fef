"""What the untrained base answers: the row of a report that every method must beat."""

from __future__ import annotations

from pathlib import Path

from cram.atomic import read_json, write_json
from cram.console import ProgressBar
from cram.learning.answers.generate import generate_answers
from cram.learning.answers.journal import write_predictions
from cram.learning.answers.predict import evaluation
from cram.learning.batches import CACHE_BYTES, Budget, EncodedSplit, pad_id
from cram.learning.learner import ContinualLearner
from cram.learning.run_folder import digest_of
from cram.scoring.scorers import score

RESULT = "result.json"


def measure_base(learner: ContinualLearner, folder: Path, shown: bool = False) -> dict[str, float]:
    """Test the base of a learner on every task, with the experts switched off; later calls read the result.

    Args:
        learner: The learner, before or after its run.
        folder: For `result.json` and `predictions/`.
        shown: True if progress is printed.

    Returns:
        Task -> accuracy.

    Raises:
        ValueError: If the folder has the answers of another model or to other samples.
    """
    of = digest_of({name: learner.identity[name] for name in ("stream", "model")})
    if (folder / RESULT).is_file():
        known = read_json(folder / RESULT)
        if known.get("of") != of:
            raise ValueError(
                f"{folder} must have the base's answers to this stream, got those of another base or stream; "
                "remove the folder, or name another one with --out"
            )
        found: dict[str, float] = known["accuracies"]
        return found
    tasks, predictions = learner.stream.tasks, folder / "predictions"
    accuracies: dict[str, float] = {}
    with (
        evaluation(learner.model),
        ProgressBar("test the base", sum(len(task.test) for task in tasks), shown) as bar,
    ):
        for index, task in enumerate(tasks):
            answers = generate_answers(
                learner.model,
                learner.processor.tokenizer,
                EncodedSplit(learner.processor, task.test, Budget(CACHE_BYTES)).example,
                lambda _: learner.cram.disabled(),
                lengths=[len(sample.instruction) for sample in task.test],
                max_new_tokens=task.max_new_tokens,
                batch_size=learner.config.eval_batch_size,
                padding=pad_id(learner.processor.tokenizer),
                bar=bar,
            )
            predictions.mkdir(parents=True, exist_ok=True)
            write_predictions(predictions / f"{index + 1:02d}-{task.name}.jsonl", task.test, answers)
            by_id = {sample.id: answer for sample, answer in zip(task.test, answers, strict=True)}
            accuracies[task.name] = float(score(task.scorer, by_id, task.test))
    write_json(folder / RESULT, {"of": of, "accuracies": accuracies})
    return accuracies
