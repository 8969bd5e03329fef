"""Several gloo processes: the same training as one, for the learner and for the Trainer; uneven shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from cram.atomic import read_json
from cram.compare.base_row import measure_base
from cram.learning.parallel.processes import (
    by_first,
    copy_from_first,
    gathered_rows,
    joined,
    own_share,
    rank,
    sum_gradients,
    totals,
    world,
)
from cram.methods import METHODS
from cram.methods.parts.task.sums import GatheredMean, over_processes, own_part
from tests.cram import runs
from tests.cram.learning import workers
from tests.cram.learning.tasks import experts, fresh, logged, same_group, seeded, trainer

PLAIN = {"dropout": 0.0, "batch_size": 4}
# Steps of two samples leave one of three processes idle.
IDLE = {"dropout": 0.0, "batch_size": 2}


def primitives(number: int, folder: Path) -> None:
    """Checks every function of the module from inside two processes."""
    assert (rank(), world()) == (number, 2)
    assert own_share(range(5)) == ([0, 2, 4] if number == 0 else [1, 3])
    assert totals(1.0, number) == [2.0, 1.0]
    rows = torch.arange(4.0).view(2, 2) if number == 0 else torch.zeros(0, 2)
    assert torch.equal(gathered_rows(rows), torch.arange(4.0).view(2, 2))
    a, b, c = (nn.Parameter(torch.full((2,), float(number))) for _ in range(3))
    copy_from_first([a, b, c])
    assert not a.detach().any()
    a.grad, b.grad = torch.full((2,), number + 1.0), torch.ones(2) if number else None
    sum_gradients([a, b, c], 0.5)
    assert a.grad.tolist() == [1.5, 1.5] and b.grad is not None and b.grad.tolist() == [0.5, 0.5]
    assert c.grad is None
    sums = {"sum": torch.full((2,), number + 1.0)}
    whole = over_processes(sums, torch.device("cpu"))
    assert whole["sum"].tolist() == [3.0, 3.0] and sums["sum"].tolist() == [number + 1.0] * 2
    again = over_processes({"sum": own_part(whole["sum"])}, torch.device("cpu"))
    assert torch.equal(again["sum"], whole["sum"])
    seen = GatheredMean(2, torch.device("cpu"))
    for _ in range(number):
        seen.update(torch.tensor([[1.0, 3.0], [2.0, 5.0]]))
    assert seen.mean().tolist() == [1.5, 4.0]
    assert by_first(lambda: number + 7) == 7

    def refuse() -> None:
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        by_first(refuse)
    with pytest.raises(ValueError, match="all processes must train the same shapes"):
        copy_from_first([torch.zeros(number + 1)])
    dist.barrier()


def test_the_primitives_in_two_processes(tmp_path: Path) -> None:
    workers.together(primitives, tmp_path)


@pytest.mark.parametrize(
    ("device", "local", "expected"),
    [
        (None, "3", [3, "nccl", "left"]),
        ("cuda:0", None, [0, "nccl", "left"]),
        ("cpu", "3", ["gloo", "left"]),
    ],
)
def test_a_process_joins_on_the_gpu_that_the_launcher_gave_it(
    device: str | None, local: str | None, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: calls.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("left"))
    with joined(device):
        assert calls == expected[:-1]
    assert calls == expected


def close(left: Any, right: Any) -> None:
    """Compare two reports: tasks, groups and ranks are equal, accuracies and losses are close."""
    for name in ("tasks", "groups", "ranks", "parameters"):
        assert left[name] == right[name], name
    assert left["matrix"] == right["matrix"]


def same_base(folder: Path, one: Path) -> None:
    """Compare what the base answered in several processes with what it answers in one."""
    found = measure_base(runs.learner(one, **PLAIN), one / "base")
    assert read_json(folder / "base/result.json")["accuracies"] == found
    for file in (one / "base/predictions").iterdir():
        assert (folder / "base/predictions" / file.name).read_text() == file.read_text()
    assert not list((folder / "base").rglob(".*part*"))


def test_two_processes_learn_and_test_as_one(tmp_path: Path) -> None:
    """Six samples in steps of four: the last step of an epoch has one sample for each process."""
    workers.together(workers.learn_and_test, tmp_path / "two", PLAIN)
    one = runs.learner(tmp_path / "one", **PLAIN).run()
    two = read_json(tmp_path / "two/run/report.json")
    close(two["methods"]["cram"], one["methods"]["cram"])
    for task in ("01-colour", "02-letter"):
        losses = [read_json(tmp_path / p / f"tasks/{task}/training.json")["loss"] for p in ("one", "two/run")]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    for name in ("01-colour", "02-letter"):
        left, right = (
            (tmp_path / p / f"tasks/02-letter/predictions/{name}.jsonl").read_text()
            for p in ("one", "two/run")
        )
        assert left == right
    evaluated = read_json(tmp_path / "two/run/eval/toy/result.json")
    assert list(evaluated["accuracies"].values()) == two["methods"]["cram"]["matrix"][-1]
    same_base(tmp_path / "two", tmp_path / "base")
    assert not list((tmp_path / "two").rglob(".*part*"))


def test_a_process_whose_samples_have_no_pictures_waits_for_none(tmp_path: Path) -> None:
    """The projector runs only where a forward has pictures; one task has rows of both kinds."""
    workers.together(workers.learn_three, tmp_path / "two", "many", IDLE)
    runs.learner(tmp_path / "one/run", "many", runs.stream(), **IDLE).run()
    runs.same_bundle(tmp_path / "one/run", tmp_path / "two/run")


KINDS = {name: (name, IDLE) for name in METHODS} | {
    "many-inputs": ("many", {**IDLE, "merge_by_inputs": True})
}


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all kinds in three processes, in folders of their names."""
    folder = tmp_path_factory.mktemp("three")
    workers.together(workers.learn_each, folder, KINDS, processes=3)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_in_three_processes_with_idle_ones(kind: str, idle: Path, tmp_path: Path) -> None:
    """Also where they all die within a task and go on from its checkpoint."""
    method, options = KINDS[kind]
    one = runs.learner(tmp_path, method, **options).run()
    for run in (idle / kind / "run", idle / f"{kind}-cut/run"):
        three = read_json(run / "report.json")
        assert three["methods"][method]["parameters"] == one["methods"][method]["parameters"]
        for task in ("01-colour", "02-letter"):
            records = (read_json(each / f"tasks/{task}/training.json") for each in (tmp_path, run))
            losses = [record["loss"] for record in records]
            assert losses[0] == pytest.approx(losses[1], abs=1e-3)
        runs.same_bundle(tmp_path, run)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_in_two_processes_as_in_one(tmp_path: Path, accumulation: int) -> None:
    options = {
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    workers.together(workers.train_with_trainer, tmp_path, options)
    found = torch.load(tmp_path / "found", weights_only=True)
    model = fresh(runs.config(dropout=0.0))
    seeded(model)
    wanted: dict[str, list[float]] = {}
    for task in same_group():
        made = trainer(model, task, tmp_path / "one" / task.name)
        made.train()
        for name in ("loss", "cross_entropy", "penalty"):
            wanted.setdefault(name, []).extend(logged(made, name))
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, abs=1e-4), name
    assert max(wanted["penalty"]) > 0
    torch.testing.assert_close(found["experts"], experts(model), rtol=1e-3, atol=1e-4)


def test_the_trainer_stores_what_all_processes_have_gathered(tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {"same": {}, "keeplora": {}, "many": {"merge_by_inputs": True}}
    options = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    workers.together(workers.resume_with_trainer, tmp_path / "two", kinds, options)
    (tmp_path / "one").mkdir()
    workers.resume_with_trainer(0, tmp_path / "one", kinds, {})
    one, two = (torch.load(tmp_path / name / "found", weights_only=True) for name in ("one", "two"))
    assert set(one) == {name for kind in kinds for name in (kind, f"{kind}, resumed")}
    for name, pairs in one.items():
        for (a, b), (other_a, other_b) in zip(pairs, two[name], strict=True):
            torch.testing.assert_close(other_b @ other_a, b @ a, rtol=1e-3, atol=1e-4, msg=name)


def test_a_sharded_base_gives_the_same_bundle(tmp_path: Path) -> None:
    """FSDP2: starts, steps, saves, and goes on from the bundle."""
    workers.together(workers.learn, tmp_path / "plain", "cram", PLAIN)
    workers.together(workers.learn_sharded, tmp_path / "sharded", PLAIN)
    reports = [read_json(tmp_path / name / "run/report.json") for name in ("plain", "sharded")]
    close(reports[0]["methods"]["cram"], reports[1]["methods"]["cram"])
    same_base(tmp_path / "sharded", tmp_path / "base")
    for name in ("01-colour", "02-letter"):
        plain, sharded = (tmp_path / kind / f"run/tasks/{name}/bundle" for kind in ("plain", "sharded"))
        assert read_json(plain / "cram.json") == read_json(sharded / "cram.json")
        for file in sorted(plain.rglob("*.safetensors")):
            torch.testing.assert_close(
                load_file(sharded / file.relative_to(plain)), load_file(file), rtol=1e-4, atol=1e-6
            )


def test_sharding_needs_several_processes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must run in several processes"):
        workers.sharded_learner(tmp_path, PLAIN)
