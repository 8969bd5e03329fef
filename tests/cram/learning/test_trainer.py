"""CramTrainer: the learner's training, gradient accumulation, checkpoints, precision, logs, refusals."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import cram
from cram import CramTrainer, load, save
from cram.learning.batches import training_batch
from cram.learning.checkpoint import mark_complete, newest_complete
from cram.learning.training import Batch, TaskLoop
from cram.streams import Task
from tests.cram import factories, runs
from tests.cram.learning.tasks import collate, examples, experts, fresh, logged, same_group, seeded, trainer

CONFIG = runs.config(dropout=0.0, batch_size=8, lr_warmup_ratio=0.2)


def learnt(out: Path, tasks: tuple[Task, ...], config: Any = CONFIG, **options: Any) -> list[CramTrainer]:
    """Trainers that have learnt some tasks, one after another, on one model."""
    model = fresh(config)
    seeded(model)
    made = []
    for task in tasks:
        made.append(trainer(model, task, out / task.name, **options))
        made[-1].train()
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[CramTrainer]:
    """Two tasks of one group, each with a checkpoint after every step."""
    out = tmp_path_factory.mktemp("whole")
    return learnt(out, same_group(), save_strategy="steps", save_steps=1)


def loop_of(model: Any, task: Task) -> list[float]:
    """The learner's losses on the same samples, eight in every step."""
    loop = TaskLoop(model, model.cram.method, task.name, 5)
    loop.begin(0)
    inputs, labels = training_batch(examples(task), 0)
    model.train()
    for _ in range(5):
        loop.step([Batch(inputs, labels, 8, int((labels[:, 1:] != -100).sum()))], 8)
    loop.end()
    model.eval()
    return loop.losses


def test_a_task_is_learnt_as_by_the_learner(whole: list[CramTrainer]) -> None:
    model = fresh(CONFIG)
    seeded(model)
    for task, made in zip(same_group(), whole, strict=True):
        torch.testing.assert_close(
            loop_of(model, task), logged(made, "cross_entropy"), rtol=1e-4, atol=1e-5, check_dtype=False
        )
    ours, theirs = experts(model), experts(whole[0].model)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert model.cram.method.expert_groups() == whole[0].cram.method.expert_groups() == {"one": 0, "two": 0}
    assert max(logged(whole[1], "penalty")) > 0 and logged(whole[0], "penalty") == [0.0] * 5


def test_accumulation_of_four_forwards_equals_one(whole: list[CramTrainer], tmp_path: Path) -> None:
    four = learnt(tmp_path, same_group(), per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for made, one in zip(four, whole, strict=True):
        for name in ("loss", "cross_entropy", "penalty", "grad_norm"):
            assert logged(made, name) == pytest.approx(logged(one, name), rel=1e-4, abs=1e-6), name
    torch.testing.assert_close(experts(four[0].model), experts(whole[0].model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_resumed_task_equals_an_uninterrupted_one(
    whole: list[CramTrainer], tmp_path: Path, step: int
) -> None:
    """After the buffer's first step, at the switch, and within the expert's steps."""
    first, second = same_group()
    model = fresh(CONFIG)
    one = trainer(model, first, tmp_path / "one")
    seeded(model)
    one.train()
    save(model, tmp_path / "bundle")
    again, encoder = factories.fresh()
    load(again, tmp_path / "bundle", encoder, factories.llava_processor())
    made = trainer(again, second, tmp_path / "two")
    made.train(resume_from_checkpoint=f"{whole[1].args.output_dir}/checkpoint-{step}")
    assert logged(made, "loss") == pytest.approx(logged(whole[1], "loss"), abs=1e-6)
    torch.testing.assert_close(experts(again), experts(whole[0].model), rtol=1e-5, atol=1e-6)


def test_the_newest_complete_checkpoint_is_taken_and_named(
    whole: list[CramTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = Path(shutil.copytree(whole[0].args.output_dir, tmp_path / "out"))
    of = {"task": "one", "earlier experts": []}
    (out / "checkpoint-5/task/state.safetensors").write_bytes(b"cut")
    (out / "checkpoint-4/complete.json").unlink()
    assert newest_complete(out, "task", of) == out / "checkpoint-3"
    said = caplog.text
    assert "checkpoint-5 is passed over" in said and "checkpoint-4 is passed over" in said
    assert f"resuming from {out / 'checkpoint-3'}" in said
    shutil.rmtree(out / "checkpoint-3")
    shutil.rmtree(out / "checkpoint-2")
    shutil.rmtree(out / "checkpoint-1")
    with pytest.raises(ValueError, match="must have a complete checkpoint"):
        newest_complete(out, "task", of)
    made = trainer(fresh(CONFIG), same_group()[0], out)
    with pytest.raises(ValueError, match="must be as complete.json says"):
        made.train(resume_from_checkpoint=str(out / "checkpoint-5"))


def test_a_checkpoint_of_other_experts_is_refused(whole: list[CramTrainer], tmp_path: Path) -> None:
    made = trainer(fresh(CONFIG), same_group()[1], tmp_path)
    with pytest.raises(ValueError, match="another earlier experts"):
        made.train(resume_from_checkpoint=f"{whole[1].args.output_dir}/checkpoint-4")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(
    whole: list[CramTrainer], tmp_path: Path, reentrant: bool
) -> None:
    # transformers 5.23 has new names for these.
    newer = hasattr(TrainingArguments, "activation_checkpointing")
    name = "activation_checkpointing" if newer else "gradient_checkpointing"
    options = {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}
    made = learnt(tmp_path, same_group(), **options)
    assert logged(made[1], "loss") == pytest.approx(logged(whole[1], "loss"), rel=1e-4)


def test_mixed_precision_trains_float32_experts(whole: list[CramTrainer], tmp_path: Path) -> None:
    made = learnt(tmp_path, same_group(), bf16=True)
    assert all(tensor.dtype == torch.float32 for tensor in experts(made[0].model).values())
    losses = logged(made[1], "cross_entropy")
    assert losses != logged(whole[1], "cross_entropy")
    assert losses == pytest.approx(logged(whole[1], "cross_entropy"), rel=0.05)


def test_what_is_logged(whole: list[CramTrainer]) -> None:
    names = {"loss", "cross_entropy", "penalty", "gate_entropy", "tokens_per_second", "groups"}
    steps = [entry for entry in whole[1].state.log_history if "loss" in entry]
    assert all(names <= entry.keys() for entry in steps)
    assert [("rank" in entry, "novelty" in entry) for entry in steps] == [(i > 1, i > 1) for i in range(5)]
    assert all(type(value) in (int, float) for entry in steps for value in entry.values())
    assert all(2 <= entry["rank"] <= 4 and 0 < entry["novelty"] <= 1 for entry in steps[2:])
    assert all(entry["gate_entropy"] > 0 for entry in steps[2:])
    assert all(
        entry["loss"] == pytest.approx(entry["cross_entropy"] + entry["penalty"], rel=1e-4) for entry in steps
    )


def test_a_saved_model_is_a_bundle(whole: list[CramTrainer], tmp_path: Path) -> None:
    whole[1].save_model(str(tmp_path / "elsewhere"))
    whole[1].save_model()
    for folder in (tmp_path / "elsewhere", Path(whole[1].args.output_dir) / "bundle"):
        model, encoder = factories.fresh()
        assert load(model, folder, encoder).expert_names == ["one", "two"]


def test_a_plain_model_and_an_optimiser_are_refused(tmp_path: Path) -> None:
    model, _ = factories.fresh()
    with pytest.raises(ValueError, match="must be attached"):
        trainer(model, same_group()[0], tmp_path)
    attached = fresh(CONFIG)
    made = trainer(attached, same_group()[0], tmp_path)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    with pytest.raises(ValueError, match="optimizers must be left to the trainer"):
        CramTrainer(model=attached, task="one", args=made.args, optimizers=(optimizer, None))
    assert issubclass(CramTrainer, Trainer)


@pytest.mark.parametrize(
    "option",
    [{"label_smoothing_factor": 0.1}, {"auto_find_batch_size": True}],
    ids=lambda option: next(iter(option)),
)
def test_arguments_that_a_task_in_stages_cannot_follow_are_refused(
    tmp_path: Path, option: dict[str, Any]
) -> None:
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name} must be .*, because .*, got {value}"):
        trainer(fresh(CONFIG), same_group()[0], tmp_path, **option)


def test_several_gpus_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="because DataParallel copies the model: .*, got 2"):
        trainer(fresh(CONFIG), same_group()[0], tmp_path)


def test_an_older_checkpoint_goes_when_the_newer_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = []

    def mark(folder: Path) -> None:
        marked.append(sorted(path.name for path in folder.parent.glob("checkpoint-*")))
        mark_complete(folder)

    monkeypatch.setattr("cram.learning.trainer.mark_complete", mark)
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    trainer(fresh(CONFIG), same_group()[0], tmp_path, **options).train()
    assert marked == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"], ["checkpoint-4", "checkpoint-5"]]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]


class StopAt(TrainerCallback):
    """Ends the training after a step, as early stopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_a_task_that_is_stopped_early_keeps_its_expert(tmp_path: Path) -> None:
    model = fresh(CONFIG)
    made = trainer(model, same_group()[0], tmp_path)
    made.add_callback(StopAt(3))
    made.train()
    assert model.cram.expert_names == ["one"] and not model.cram.in_training
    other = trainer(model, same_group()[1], tmp_path)
    other.add_callback(StopAt(1))
    with pytest.raises(
        ValueError, match="must be trained beyond its warm-up of 2 steps, got an end within it"
    ):
        other.train()


@pytest.mark.parametrize("step", [2, 10])
def test_keeplora_refuses_an_end_before_it_knows_what_to_keep(tmp_path: Path, step: int) -> None:
    made = trainer(fresh(runs.config(method="keeplora")), same_group()[0], tmp_path, max_steps=20)
    made.add_callback(StopAt(step))
    with pytest.raises(ValueError, match=r"^a task must end after step 16, got an earlier end"):
        made.train()


def test_the_three_lines_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).resolve().parents[3] / "README.md").read_text()
    (lines,) = re.findall(r"^```py\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert lines.count("\n") == 3
    model, encoder = factories.fresh()
    arguments = trainer(fresh(CONFIG), same_group()[0], tmp_path).args
    scope: dict[str, Any] = {
        "cram": cram,
        "model": model,
        "encoder": encoder,
        "processor": factories.llava_processor(),
        "arguments": arguments,
        "rows": examples(same_group()[0]),
        "batch": collate,
    }
    monkeypatch.chdir(tmp_path)
    exec(compile(lines, "README", "exec"), scope)
    assert (tmp_path / "runs/bundle/experts/colour/adapter_config.json").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dynamo's own, which would end the compilation
def test_a_compiled_model_learns_the_same(whole: list[CramTrainer], tmp_path: Path) -> None:
    made = learnt(tmp_path, same_group(), torch_compile=True, torch_compile_backend="aot_eager")
    for name in ("cross_entropy", "penalty"):
        for compiled, plain in zip(made, whole, strict=True):
            torch.testing.assert_close(logged(compiled, name), logged(plain, name), rtol=1e-4, atol=1e-5)
