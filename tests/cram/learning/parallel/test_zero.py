"""ZeRO-2: its configuration, where the values of a stage are, and a real DeepSpeed in two gloo processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from cram import load, save
from cram.learning.parallel.zero import ZeroStages
from cram_kernels import PackedExperts
from tests.cram import factories, runs
from tests.cram.learning import workers
from tests.cram.learning.tasks import examples, experts, fresh, logged, same_group, seeded, trainer

CONFIGURATION = Path(__file__).resolve().parents[4] / "examples/clusters/zero2.json"
NAMES = ("loss", "cross_entropy", "penalty", "grad_norm")


def accelerator(**changes: Any) -> Any:
    """accelerate's, with the configuration of the examples."""
    config = {**json.loads(CONFIGURATION.read_text()), **changes}
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    return SimpleNamespace(state=state, free_memory=lambda: None)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage"),
        ({"zero_optimization": {}}, "zero_optimization.stage"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device",
        ),
        ({"bf16": {"enabled": True}}, "bf16.enabled"),
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
    ],
)
def test_another_configuration_is_refused(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"^{name} of the DeepSpeed configuration must be"):
        ZeroStages(accelerator(**changes), nn.Linear(1, 1))


@pytest.mark.parametrize("checkpoint", [None, "checkpoint-3"])
def test_a_resumed_training_reads_its_part_of_the_optimiser(
    checkpoint: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer reads the schedule alone then; without a checkpoint it does as ever."""
    calls: list[Any] = []
    made = trainer(fresh(runs.config()), same_group()[0], tmp_path)
    monkeypatch.setattr(made, "_zero", object())
    monkeypatch.setattr(made, "_of", dict)
    monkeypatch.setattr(
        Trainer,
        "_load_optimizer_and_scheduler",
        lambda self, given: calls.append((given, self.is_deepspeed_enabled)),
    )
    monkeypatch.setattr("cram.learning.trainer.read_checkpoint", lambda file, of: (file.parent.name,))
    monkeypatch.setattr("cram.learning.trainer.import_part", lambda optimizer, part: calls.append(part))
    made._load_optimizer_and_scheduler(checkpoint)
    assert calls == ([(None, False)] if checkpoint is None else [checkpoint, (checkpoint, True)])
    assert not made.is_deepspeed_enabled


def test_the_values_of_a_stage_return_to_where_the_model_reads_them() -> None:
    model = nn.ModuleDict({"pack": PackedExperts(torch.zeros(3, 2), torch.zeros(3, 4), (1, 2), 1.0, 1)})
    pack, centroid, empty = model["pack"], nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(0, 2))
    assert isinstance(pack, PackedExperts) and pack.trained_a is not None and pack.trained_b is not None
    names = set(dict(model.named_parameters()))
    stages = ZeroStages(accelerator(), model)
    held = stages.hold([pack.trained_a, pack.trained_b, centroid, empty])
    assert held == [pack.trained_a, pack.trained_b, centroid]
    assert set(held) <= set(model.parameters())
    for parameter in held:  # As an engine does: other storage, other values.
        parameter.data = parameter.data.clone() + 1
    assert not pack.a.any()
    stages.copy_back()
    assert pack.a.sum() == 4 and pack.bt.sum() == 8
    stages.release()
    assert set(dict(model.named_parameters())) == names
    with torch.no_grad():
        pack.trained_a += 1
    assert pack.a.sum() == 8


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 5}
    trainer(fresh(runs.config()), same_group()[0], tmp_path, **options).train()
    made = trainer(fresh(runs.config()), same_group()[0], tmp_path)
    made._zero = ZeroStages(accelerator(), made.model)
    with pytest.raises(ValueError, match="must belong to this training, got another number of ZeRO proc"):
        made.train(resume_from_checkpoint=True)


def zero(rank: int, folder: Path, options: dict[str, Any]) -> None:
    """Two tasks under ZeRO-2 by one trainer; then the second one again, from a checkpoint."""
    # accelerate starts DeepSpeed over NCCL and its like alone.
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu", "MASTER_PORT": "29511"}
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.DEEPSPEED)
    options = {**options, "deepspeed": str(CONFIGURATION), "use_cpu": False}
    first, second = same_group()
    model = fresh(runs.config(dropout=0.0))
    seeded(model)
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    made = trainer(model, first, folder / "out", save_strategy="steps", save_steps=1, **options)
    for task in (first, second):
        if task is second:
            save(model, folder / f"bundle-{rank}")
        made.task, made.train_dataset = task.name, examples(task)
        made.train()
        for name in NAMES:
            found[name] += logged(made, name)
    again, encoder = factories.fresh()
    load(again, folder / f"bundle-{rank}", encoder, factories.llava_processor())
    other = trainer(again, second, folder / "again", **options)
    other.train(resume_from_checkpoint=str(folder / "out/checkpoint-3"))
    if rank == 0:
        resumed = {"losses": logged(other, "loss"), "experts": experts(again)}
        torch.save({**found, "experts": experts(model), "resumed": resumed}, folder / "found")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_zero_2_is_as_plain_processes(tmp_path: Path, accumulation: int) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is absent: make zero-tests")
    options = {
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    workers.together(workers.train_with_trainer, tmp_path / "plain", options)
    workers.together(zero, tmp_path / "zero", options)
    plain, divided = (torch.load(tmp_path / name / "found", weights_only=True) for name in ("plain", "zero"))
    for name in ("loss", "cross_entropy", "penalty"):
        assert divided[name] == pytest.approx(plain[name], abs=1e-4), name
    assert max(plain["penalty"]) > 0
    torch.testing.assert_close(divided["experts"], plain["experts"], rtol=1e-3, atol=1e-4)
    resumed = divided["resumed"]
    assert resumed["losses"] == pytest.approx(divided["loss"][5:], abs=1e-6)
    torch.testing.assert_close(resumed["experts"], divided["experts"], rtol=1e-5, atol=1e-6)
