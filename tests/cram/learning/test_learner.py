"""The learner: reports, resuming, kills, refusals, and what each method trains."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cram import ContinualLearner
from cram.atomic import read_json
from cram.console import ProgressBar
from cram.learning.answers.evaluate import evaluate_run
from cram.learning.answers.generate import end_ids, generate_answers
from cram.learning.batches import CACHE_BYTES, Budget, EncodedSplit, encode_sample, pad_id, training_batch
from cram.learning.learner import Work
from cram.learning.schedule import batch_order, learning_rate, task_seed, total_steps
from cram.learning.training import answer_loss
from cram.methods import METHODS
from cram.report.schema import validate_report
from cram.scoring.scorers import read_predictions
from cram.streams import Sample, Stream, Task
from tests.cram import factories, runs
from tests.cram.kills import every_end
from tests.cram.runs import files, results, timeless


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CRAM run over three tasks, not to be written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    runs.learner(folder, tasks=runs.stream()).run()
    return folder


def test_a_run_leaves_a_valid_report_predictions_and_bundles(finished: Path) -> None:
    report = validate_report(read_json(finished / "report.json"))
    method = report["methods"]["cram"]
    names = ["colour", "letter", "mixed"]
    assert method["tasks"] == names
    assert [len(row) for row in method["matrix"]] == [1, 2, 3]
    assert method["groups"].keys() == method["ranks"].keys() == method["routing"].keys() == set(names)
    assert all(2 <= rank <= 4 for ranks in method["ranks"].values() for rank in ranks.values())
    assert method["parameters"]["total"] == sum(method["parameters"]["per_task"].values())
    for routing in method["routing"].values():
        assert set(routing["mean_gates"]) == set(names)
        assert sum(routing["mean_gates"].values()) == pytest.approx(1)
    for t, name in enumerate(names):
        folder = finished / "tasks" / f"{t + 1:02d}-{name}"
        assert (folder / "bundle/manifest.json").is_file()
        for i, task in enumerate(runs.stream().tasks[: t + 1]):
            answers = read_predictions(folder / "predictions" / f"{i + 1:02d}-{task.name}.jsonl")
            assert list(answers) == [sample.id for sample in task.test]


def test_groups_follow_the_answer_format(finished: Path) -> None:
    groups = read_json(finished / "report.json")["methods"]["cram"]["groups"]
    assert set(groups.values()) <= {0, 1, 2}
    locks = read_json(finished / "tasks/03-mixed/bundle/cram.json")["method"]["values"]["locks"]
    assert locks == groups


def test_a_finished_run_is_read_and_not_repeated(finished: Path) -> None:
    before = files(finished)
    report = runs.learner(finished, tasks=runs.stream()).run()
    assert report == read_json(finished / "report.json")
    assert files(finished) == before


@pytest.mark.parametrize("method", METHODS)
def test_resuming_after_every_task_equals_an_uninterrupted_run(method: str, tmp_path: Path) -> None:
    whole = runs.learner(tmp_path / "whole", method).run()
    first = runs.learner(tmp_path / "parts", method)
    first.learn(0)
    runs.learner(tmp_path / "parts", method).run()
    again = runs.learner(tmp_path / "parts", method).run()
    assert timeless(again) == timeless(whole)
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


@pytest.mark.parametrize("step", [25, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_write_of_a_task_repeats_nothing_committed(
    finished: Path, tmp_path: Path, step: int
) -> None:
    """Kills before and after the writes of the second task; every rerun ends as the uninterrupted run."""
    two = runs.two_tasks()
    base, run = tmp_path / "base", tmp_path / "run"
    runs.learner(base, tasks=two).learn(0)
    expected = {n: c for n, c in results(finished).items() if n.startswith(("tasks/01", "tasks/02"))}

    def restore() -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(base, run)

    for end in every_end(lambda: runs.learner(run, tasks=two).run(), restore, step):
        committed = {n: content for n, content in results(run).items() if n.startswith("tasks/01")}
        runs.learner(run, tasks=two).run()
        assert committed.items() <= results(run).items(), end
        assert results(run) == expected, end


def test_a_damaged_newest_bundle_is_set_aside_and_learnt_again(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    weights = run / "tasks/03-mixed/bundle/experts/mixed/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    made = runs.learner(run, tasks=runs.stream())
    made._shown = True
    report = made.run()
    said = capsys.readouterr().out
    assert "task 3 is damaged and learnt again" in said and "task 2 of 3 (letter) is finished" in said
    assert timeless(report) == timeless(read_json(finished / "report.json"))
    assert (run / "tasks/damaged-03-mixed").is_dir()


def test_another_configuration_or_stream_is_refused(finished: Path) -> None:
    before = files(finished)
    with pytest.raises(ValueError, match=r"config\.learning_rate = 0\.01 there, 0\.5 here"):
        runs.learner(finished, tasks=runs.stream(), learning_rate=0.5)
    with pytest.raises(ValueError, match=r"method = 'cram' there, 'isolated' here"):
        runs.learner(finished, "isolated", runs.stream())
    with pytest.raises(ValueError, match=r"stream\.sha256"):
        runs.learner(finished)
    assert files(finished) == before


def changed_test(**changes: Any) -> Stream:
    """The stream with its last test sample changed."""
    *others, last = runs.stream().tasks
    return Stream("toy", (*others, replace(last, test=(*last.test[:-1], replace(last.test[-1], **changes)))))


@pytest.mark.parametrize(
    "changes", [{"answer": "else"}, {"id": "other"}, {"instruction": "Why"}, {"images": ()}]
)
def test_a_changed_test_split_is_refused(finished: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"stream\.sha256"):
        runs.learner(finished, tasks=changed_test(**changes))


def repainted(stream: Stream, image: Any) -> Stream:
    """The stream with another picture in its last test sample."""
    *others, last = stream.tasks
    test = (*last.test[:-1], replace(last.test[-1], images=(image,)))
    return Stream("toy", (*others, replace(last, test=test)))


def test_a_changed_picture_is_refused(finished: Path) -> None:
    image = runs.stream().tasks[-1].test[-1].images[0].copy()
    runs.learner(finished, tasks=repainted(runs.stream(), image.copy()))
    image.putpixel((0, 0), (1, 2, 3))
    with pytest.raises(
        ValueError, match=r"configuration: stream\.pictures = '\w+' there, '\w+' here; choose"
    ):
        runs.learner(finished, tasks=repainted(runs.stream(), image))


def learner_on(out: Path, change: Callable[[Any, Any], None]) -> ContinualLearner:
    """A learner of the finished run on a base and a CLIP that `change` has changed."""
    clip = factories.clip_model()
    model = factories.llava(clip=clip)
    change(model, clip)
    encoder = factories.clip_encoder(model, clip)
    return ContinualLearner(
        model, factories.llava_processor(), runs.stream(), runs.config(), out=out, encoder=encoder
    )


@torch.no_grad()
def other_projector(model: Any, clip: Any) -> None:
    model.model.multi_modal_projector.linear_1.bias.add_(0.1)


@torch.no_grad()
def other_text_tower(model: Any, clip: Any) -> None:
    clip.text_model.encoder.layers[0].mlp.fc1.bias.add_(0.1)


@torch.no_grad()
def other_projection(model: Any, clip: Any) -> None:
    clip.visual_projection.weight.add_(0.1)


@pytest.mark.parametrize("change", [other_projector, other_text_tower, other_projection])
def test_other_weights_are_refused(finished: Path, change: Callable[[Any, Any], None]) -> None:
    with pytest.raises(ValueError, match=r"configuration: model\.weights = '\w+' there, '\w+' here; choose"):
        learner_on(finished, change)


def test_a_run_of_an_earlier_version_goes_on(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    record = read_json(run / "run.json")
    for part, name in (("stream", "pictures"), ("stream", "splits"), ("model", "weights")):
        del record["identity"][part][name]
    (run / "run.json").write_text(json.dumps(record))
    learner_on(run, lambda model, clip: None)
    record["identity"]["stream"]["pictures"] = 1
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="pictures must be a str"):
        learner_on(run, lambda model, clip: None)


def test_a_test_changes_nothing_that_a_task_has_learnt(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    made = runs.learner(run, tasks=runs.stream())
    made.run()
    tensors, values = made.method.export_state()
    kept = {name: tensor.clone() for name, tensor in tensors.items()}, copy.deepcopy(values)
    made.evaluate(2)
    tensors, values = made.method.export_state()
    assert values == kept[1]
    assert all(torch.equal(tensors[name], kept[0][name]) for name in kept[0])
    assert made.cram.hooks.on_query == []


@pytest.mark.parametrize(
    ("own", "ends"), [(None, [9]), (2, [2, 9]), (9, [9]), ([2, 5], [2, 5, 9]), ([9], [9])]
)
def test_answers_end_at_the_end_of_the_model_and_of_training(own: Any, ends: list[int]) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
    assert end_ids(model, SimpleNamespace(eos_token_id=9)) == ends


def test_another_base_is_refused(finished: Path) -> None:
    clip = factories.clip_model()
    model = factories.llava(seed=1, clip=clip)
    with pytest.raises(ValueError, match=r"model\.sha256"):
        ContinualLearner(
            model,
            factories.llava_processor(),
            runs.stream(),
            runs.config(),
            out=finished,
            encoder=factories.clip_encoder(model, clip),
        )


def empty(split: str) -> Stream:
    full = runs.two_tasks().tasks[0]
    parts = {"train": full.train, "test": full.test, split: ()}
    return Stream("toy", (Task("colour", parts["train"], parts["test"], "accuracy", 3),))


def repeated() -> Stream:
    full = runs.two_tasks().tasks[0]
    return Stream("toy", (Task("colour", full.train, (*full.test, full.test[0]), "accuracy", 3),))


def named(name: str, scorer: str = "accuracy") -> Stream:
    full = runs.two_tasks().tasks[0]
    return Stream("toy", (Task(name, full.train, full.test, scorer, 3),))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (lambda: empty("train"), "must have train samples"),
        (lambda: empty("test"), "must have test samples"),
        (repeated, "must be unique"),
        (lambda: named("../up"), "must match"),
        (lambda: named("a", "magic"), "scorer of task 'a': scorer must be one of"),
    ],
)
def test_a_faulty_stream_is_refused_before_anything_is_written(
    tasks: Callable[[], Stream], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        runs.learner(tmp_path / "run", tasks=tasks())
    assert not (tmp_path / "run").exists()


def test_unknown_methods_and_occupied_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method must be one of"):
        runs.learner(tmp_path / "run", "magic")
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="must be new, empty or a run"):
        runs.learner(tmp_path)


def test_features_that_are_not_finite_stop_the_run_before_anything_is_written(tmp_path: Path) -> None:
    made = runs.learner(tmp_path / "run")
    with torch.no_grad():
        made.cram.encoder._projection.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="features must be finite"):
        made.run()
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="new learner"):
        made.run()


def test_too_few_steps_for_an_expert_is_an_error(tmp_path: Path) -> None:
    one = runs.two_tasks().tasks[0]
    short = Stream("toy", (Task("colour", one.train[:3], one.test, "accuracy", 3),))
    with pytest.raises(ValueError, match="must have at least 2 steps, got 1"):
        runs.learner(tmp_path / "run", tasks=short, max_steps=None).run()


def test_only_the_new_expert_is_trained_and_the_base_never(tmp_path: Path) -> None:
    made = runs.learner(tmp_path / "run")
    base = {name: value.clone() for name, value in made.model.state_dict().items() if "experts" not in name}
    made.learn(0)
    old = {name: (a.clone(), b.clone()) for name, (a, b) in made.cram.expert_weights(0).items()}
    centroid = made.cram.method.router.centroids()[:, 0].clone()
    made.learn(1)
    for name, (a, b) in made.cram.expert_weights(0).items():
        assert torch.equal(a, old[name][0]) and torch.equal(b, old[name][1])
    assert torch.equal(made.cram.method.router.centroids()[:, 0], centroid)
    now = made.model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in base.items())
    assert made.cram.method.locked_group is None and made.cram.hooks.on_query == []


def test_sequential_trains_one_lora_further(tmp_path: Path) -> None:
    made = runs.learner(tmp_path / "run", "sequential")
    made.learn(0)
    first = {name: b.clone() for name, (_, b) in made.cram.expert_weights(0).items()}
    made.learn(1)
    assert made.cram.expert_names == ["sequential"]
    second = {name: b for name, (_, b) in made.cram.expert_weights(0).items()}
    assert all(not torch.equal(first[name], second[name]) for name in first)
    made.evaluate(0)
    made.evaluate(1)
    parameters = made._report()["methods"]["sequential"]["parameters"]["per_task"]
    assert parameters["letter"] == 0 < parameters["colour"]


def test_isolated_uses_the_lora_of_the_true_task(tmp_path: Path) -> None:
    made = runs.learner(tmp_path / "run", "isolated")
    made.learn(0)
    made.learn(1)
    assert [made.method.gates(name).tolist() for name in ("colour", "letter")] == [[1, 0], [0, 1]]
    with pytest.raises(ValueError, match="must be one of the learnt ones"):
        made.method.gates("other")


def test_gradient_checkpointing_trains_the_same_expert(tmp_path: Path) -> None:
    plain = runs.learner(tmp_path / "plain", dropout=0.0)
    plain.learn(0)
    checked = runs.learner(tmp_path / "checked", dropout=0.0, gradient_checkpointing=True)
    checked.learn(0)
    for name, (a, b) in plain.cram.expert_weights(0).items():
        torch.testing.assert_close(checked.cram.expert_weights(0)[name], (a, b), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_train_fp32_experts(dtype: torch.dtype, tmp_path: Path) -> None:
    clip = factories.clip_model()
    model = factories.llava(clip=clip).to(dtype)
    made = ContinualLearner(
        model,
        factories.llava_processor(),
        named("colour"),
        runs.config(),
        out=tmp_path / "run",
        encoder=factories.clip_encoder(model, clip),
        progress=False,
    )
    made.run()
    weights = made.cram.expert_weights(0).values()
    assert all(a.dtype == torch.float32 and bool(a.isfinite().all()) for a, _ in weights)


def test_loss_is_the_models_own(tmp_path: Path) -> None:
    processor = factories.llava_processor()
    samples = [
        Sample("a", (factories.image(0),), "Short", "yes"),
        Sample("b", (factories.image(1),), "A longer question", "no"),
    ]
    examples = [encode_sample(processor, sample) for sample in samples]
    batch, labels = training_batch(examples, pad_id(processor.tokenizer))
    model = factories.llava()
    with torch.no_grad():
        torch.testing.assert_close(answer_loss(model, batch, labels), model(**batch, labels=labels).loss)


def test_schedule_and_order() -> None:
    config = runs.config(learning_rate=1.0, lr_warmup_ratio=0.2)
    rates = [learning_rate(step, 10, config) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert all(a > b for a, b in zip(rates[2:], rates[3:], strict=False)) and 0 < rates[-1] < 0.05
    order = list(batch_order(5, 4, 2, seed=1))
    assert [len(batch) for batch in order] == [2, 2, 1, 2]
    assert sorted(order[0] + order[1] + order[2]) == list(range(5))
    assert order == list(batch_order(5, 4, 2, seed=1)) != list(batch_order(5, 4, 2, seed=2))
    assert len({task_seed(seed, task) for seed in range(10) for task in range(10)}) == 100
    assert total_steps(5, runs.config(max_steps=None, epochs=2, batch_size=2)) == 6


def test_answers_do_not_depend_on_the_batch_size(finished: Path) -> None:
    made = runs.learner(finished, tasks=runs.stream())
    made.run()
    samples = runs.stream().tasks[0].test + runs.stream().tasks[1].test
    split = EncodedSplit(made.processor, samples, Budget(CACHE_BYTES))
    answers = [
        generate_answers(
            made.model,
            made.processor.tokenizer,
            split.example,
            lambda indices: nullcontext(),
            lengths=[len(sample.instruction) for sample in samples],
            max_new_tokens=4,
            batch_size=size,
            padding=0,
            bar=ProgressBar("", len(samples), shown=False),
        )
        for size in (1, 3, 10)
    ]
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) > 1


def test_rerun_tests_the_newest_state(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    clip = factories.clip_model()
    model = factories.llava(clip=clip)
    encoder = factories.clip_encoder(model, clip)
    found = evaluate_run(run, runs.stream(), model, factories.llava_processor(), encoder, progress=False)
    assert list(found.values()) == read_json(finished / "tasks/03-mixed/result.json")["accuracies"]
    for i, name in enumerate(found):
        again = (run / "eval/toy/predictions" / f"{name}.jsonl").read_bytes()
        assert again == (run / "tasks/03-mixed/predictions" / f"{i + 1:02d}-{name}.jsonl").read_bytes()
    assert not list((run / "eval").rglob(".*"))


def test_text_alone_cannot_join_a_group_of_experts(tmp_path: Path) -> None:
    seen = runs.task("seen", "Which shade", ("lo", "hi"), 90)
    bare = runs.task("bare", "Which shade", ("lo", "hi"), 90, images=0)
    learner = runs.learner(tmp_path / "run", tasks=Stream("toy", (seen, bare)))
    learner.learn(0)
    with pytest.raises(ValueError, match="'bare' must show images in its warm-up .* got text"):
        learner.learn(1)
    assert not (tmp_path / "run/tasks/02-bare").exists()


def test_a_base_is_divided_before_anything_is_learnt(tmp_path: Path) -> None:
    model, encoder = factories.fresh()
    parts = (model, factories.llava_processor(), runs.two_tasks(), runs.config())
    with pytest.raises(ValueError, match="must run in several processes .*, got one"):
        ContinualLearner(*parts, out=tmp_path, encoder=encoder, work=Work(sharded=True))
