"""CramTrainer under the other arguments of the Trainer: evaluation, loaders, optimisers, pushes, refusals."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from cram import CramTrainer, load, save
from cram.learning.step import gate_entropy
from cram.routing.query import Route
from tests.cram import runs
from tests.cram.learning.tasks import examples, experts, fresh, logged, same_group, seeded, trainer

CONFIG = runs.config(dropout=0.0, batch_size=8, lr_warmup_ratio=0.2)


def learnt(out: Path, config: Any = CONFIG, options: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """A trainer that has learnt one task; `options` are the trainer's."""
    model = fresh(config)
    seeded(model)
    made = trainer(model, same_group()[0], out, partial(CramTrainer, **options or {}), **arguments)
    made.train()
    return made


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A task that is learnt without further arguments."""
    return learnt(tmp_path_factory.mktemp("plain"))


def test_an_evaluation_within_the_training_changes_nothing(plain: Any, tmp_path: Path) -> None:
    def measured(prediction: Any) -> dict[str, float]:
        return {"samples": len(prediction.label_ids)}

    options = {"eval_dataset": examples(same_group()[1]), "compute_metrics": measured}
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    made = learnt(tmp_path, options=options, per_device_eval_batch_size=3, **arguments)
    assert logged(made, "loss") == logged(plain, "loss")
    torch.testing.assert_close(experts(made.model), experts(plain.model), rtol=0, atol=0)
    found = logged(made, "eval_loss")
    assert len(found) == 6 and found == sorted(found, reverse=True)
    assert made.evaluate()["eval_loss"] == pytest.approx(found[-1], rel=1e-6)
    assert made.predict(options["eval_dataset"]).metrics["test_samples"] == 8


def test_an_evaluation_tells_the_task_to_a_method_that_must_be_told(tmp_path: Path) -> None:
    options = {"eval_dataset": examples(same_group()[0])}
    made = learnt(tmp_path, runs.config(method="isolated"), options, eval_strategy="steps", eval_steps=1)
    (*_, last) = logged(made, "eval_loss")
    with made.cram.forced("one"):
        assert made.evaluate()["eval_loss"] == pytest.approx(last, rel=1e-6)


@pytest.mark.parametrize("method", ["many", "hide"])
def test_an_evaluation_measures_the_task_in_training(method: str, tmp_path: Path) -> None:
    """What the older tasks were merged to knows nothing of it."""
    config = runs.config(method=method, dropout=0.0, learning_rate=0.05)
    model = fresh(config)
    for task in same_group():
        rows = examples(task)
        made = trainer(
            model,
            task,
            tmp_path,
            partial(CramTrainer, eval_dataset=rows),
            eval_strategy="steps",
            eval_steps=1,
        )
        made.train()
        found, losses = logged(made, "eval_loss"), logged(made, "loss")
        assert found[-1] < found[0] - 0.2 * (losses[0] - losses[-1]), (found, losses)


def test_a_method_that_replays_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^method must keep no samples, .* got 'replay', which mixes 180"):
        trainer(fresh(runs.config(method="replay")), same_group()[0], tmp_path)


@pytest.mark.parametrize("method", ["branchlora", "smolora", "hide", "many"])
def test_mixed_precision_trains(method: str, tmp_path: Path) -> None:
    made = learnt(tmp_path, runs.config(method=method, dropout=0.0, learning_rate=0.05), bf16=True)
    losses = logged(made, "loss")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "arguments",
    [{"dataloader_num_workers": 1}, {"remove_unused_columns": True}],
    ids=lambda each: next(iter(each)),
)
def test_loaders_change_nothing(plain: Any, tmp_path: Path, arguments: dict[str, Any]) -> None:
    assert logged(learnt(tmp_path, **arguments), "loss") == logged(plain, "loss")


def test_an_uneven_last_window_is_one_step(tmp_path: Path) -> None:
    """Eight samples in steps of six: the last step of an epoch has two, in one forward of two possible."""
    one, parts = (
        learnt(tmp_path, max_steps=6, per_device_train_batch_size=6 // n, gradient_accumulation_steps=n)
        for n in (1, 2)
    )
    for name in ("loss", "cross_entropy", "grad_norm"):
        assert logged(parts, name) == pytest.approx(logged(one, name), rel=1e-4), name


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_optimisers_begin_anew_with_the_expert(tmp_path: Path, name: str) -> None:
    made = learnt(tmp_path, optim=name, learning_rate=1e-3)
    losses, (group,) = logged(made, "loss"), made.optimizer.param_groups
    assert losses[-1] < losses[0]
    assert set(made.optimizer.state) <= set(group["params"])
    assert logged(made, "learning_rate")[:2] == [1e-3, 1e-3]


class InterruptAt(TrainerCallback):
    """Ends the training behind a step and its checkpoint, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [1, 3])
def test_an_interrupted_model_is_made_anew(tmp_path: Path, step: int) -> None:
    """In the buffer's steps and in the expert's."""
    arguments = {"save_strategy": "steps", "save_steps": 1}
    made = trainer(fresh(CONFIG), same_group()[0], tmp_path, **arguments)
    made.add_callback(InterruptAt(step))
    with pytest.raises(KeyboardInterrupt):
        made.train()
    for resumed in (None, True):
        with pytest.raises(
            ValueError, match="model must not be in training, got one whose training was inter"
        ):
            made.train(resume_from_checkpoint=resumed)


def test_a_task_of_another_length_is_not_resumed(tmp_path: Path) -> None:
    """The step at which the expert follows the buffer depends on the length."""
    learnt(tmp_path, save_strategy="steps", save_steps=1)
    other = trainer(fresh(CONFIG), same_group()[0], tmp_path, max_steps=60)
    with pytest.raises(ValueError, match="must belong to this training, got another number of steps"):
        other.train(resume_from_checkpoint=True)


def test_checkpoints_of_an_earlier_task_in_the_same_folder_are_passed_over(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    every = {"save_strategy": "steps", "save_steps": 1}
    made = learnt(tmp_path / "out", **every)
    save(made.model, tmp_path / "first")
    cut = trainer(made.model, same_group()[1], tmp_path / "out", **every)
    cut.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    model = fresh(CONFIG)
    load(model, tmp_path / "first")
    resumed = trainer(model, same_group()[1], tmp_path / "out", **every)
    resumed.train(resume_from_checkpoint=True)
    whole = fresh(CONFIG)
    load(whole, tmp_path / "first")
    seeded(whole)
    trainer(whole, same_group()[1], tmp_path / "whole").train()
    torch.testing.assert_close(experts(model), experts(whole), rtol=0, atol=0)


def test_a_pushed_checkpoint_is_complete_and_a_key_is_not_pushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[set[str]] = []

    class Hub:
        def create_repo(self, *_: Any, **__: Any) -> Any:
            return SimpleNamespace(repo_id="one/two")

        def upload_folder(self, folder_path: str, **_: Any) -> Any:
            pushed.append({path.name for path in Path(folder_path).iterdir()})
            return SimpleNamespace(is_done=lambda: True, result=lambda: None, done=lambda: True)

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    arguments = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_always_push": True}
    with pytest.raises(ValueError, match=r"^hub_token must be None, .*HF_TOKEN instead, got one$"):
        trainer(fresh(CONFIG), same_group()[0], tmp_path, hub_token="key", **arguments)
    learnt(tmp_path, save_strategy="steps", save_steps=5, **arguments)
    assert any({"complete.json", "task"} <= names for names in pushed)


def test_gate_entropy_stays_a_tensor() -> None:
    found = gate_entropy(Route(torch.full((3, 2, 2), 0.5)))
    assert isinstance(found, torch.Tensor) and found.item() == pytest.approx(math.log(2))
    one_hot = gate_entropy(Route(torch.eye(2).expand(3, 2, 2)))
    assert one_hot is not None and one_hot.item() == 0
    assert gate_entropy(None) is None
