"""The folder of a run: its configuration, its finished tasks and its report.

    run.json                    identity (configuration, method, stream, model) and settings of the run
    tasks/01-<name>/            one folder per task, in order
        checkpoints/            states within the training, until the bundle is there
        training.json           seconds and loss of the training
        bundle/                 the state after the task; present as soon as the training is done
        predictions/02-<name>.jsonl   answers to the test samples of each task learnt so far
        result.json             accuracies and routing, written last; present as soon as the task is finished
    report.json                 the report over the finished tasks

The files of a finished task are never written again. Every record is checked when it is read. A result names
its training and its bundle by sha256. One process at a time writes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cram.atomic import LOCK, PARTIAL, locked, recover_folder, write_json
from cram.bundle.format import MANIFEST, read_description
from cram.bundle.records import LATER_FIELDS, MAX_RECORD_BYTES, OWNERS, result_record, sealed, training_record
from cram.bundle.runs import RUN, RUN_FORMAT, read_run
from cram.config import read_config
from cram.methods import Method
from cram.model.attached import AttachedModel
from cram.report.schema import MethodReport, Report, validate_report
from cram.scoring.continual import continual_metrics
from cram.streams.digests import pictures_digest, said
from cram.streams.types import Stream
from cram.values import Values

TRAINING, RESULT = "training.json", "result.json"
# What a process leaves behind that dies before `run.json` is there.
_LEFTOVERS = {LOCK, f".{RUN}{PARTIAL}"}
# Setting that `cram train` writes -> types. A run folder without `order` has the stream's own.
SETTINGS: dict[str, tuple[type, ...]] = {
    "stream": (str,),
    "limit": (int, type(None)),
    "data_root": (str, type(None)),
    "model": (str,),
    "clip": (str, type(None)),
    "dtype": (str, type(None)),
    "order": (int,),
}
BASE_SETTINGS = ("model", "clip", "dtype")
MEND = "give --bundle and --model in place of --run"


def run_settings(
    folder: Path, names: Iterable[str], given: Mapping[str, Any], mend: str = MEND
) -> dict[str, Any]:
    """The settings of a run that a command needs. A run that was made in Python may lack them.

    Args:
        folder: The run folder.
        names: The settings that are needed.
        given: Settings that take the place of the run's. None leaves the run's.
        mend: What the user can do where settings are missing, for the error.

    Raises:
        ValueError: If a setting is missing or of another type, or as `read_run`.
    """
    settings = {"order": 0, **read_run(folder)["settings"]}
    settings |= {name: value for name, value in given.items() if value is not None}
    missing = [n for n in names if n not in settings or not isinstance(settings[n], SETTINGS[n])]
    if missing:
        raise ValueError(
            f"{folder / RUN} must have the settings that `cram train` writes, got no {missing}; {mend}"
        )
    return settings


class RunFolder:
    """Paths and records of one run.

    Args:
        path: The folder. The first write creates it.
        stream: The run's stream.
    """

    def __init__(self, path: str | Path, stream: Stream) -> None:
        self.path = Path(path)
        self.stream = stream

    def task(self, index: int) -> Path:
        """Return the folder of a task. The index starts at 0."""
        return self.path / "tasks" / f"{index + 1:02d}-{self.stream.tasks[index].name}"

    def bundle(self, index: int) -> Path:
        """Return the bundle after a task."""
        return self.task(index) / "bundle"

    def is_trained(self, index: int) -> bool:
        """True if the training of a task has been committed."""
        recover_folder(self.bundle(index))
        return (self.bundle(index) / MANIFEST).is_file()

    def is_finished(self, index: int) -> bool:
        """True if a task has been trained and evaluated; what stands for the result may be damaged."""
        return self.is_trained(index) and (self.task(index) / RESULT).exists()

    def count(self) -> tuple[int, int]:
        """Return the number of finished tasks and of trained tasks, counted from the first without a gap."""
        total = range(len(self.stream.tasks))
        finished = next((i for i in total if not self.is_finished(i)), len(total))
        trained = finished + int(finished < len(total) and self.is_trained(finished))
        return finished, trained

    def fault(self, index: int) -> str | None:
        """What is wrong with a trained task, or None; every file of the bundle is hashed."""
        try:
            read_description(self.bundle(index))
            self.training(index)
        except (ValueError, OSError) as error:
            return str(error)
        return None

    def result_fault(self, index: int) -> str | None:
        """What is wrong with a finished task's result, or None."""
        try:
            self.result(index)
        except (ValueError, OSError) as error:
            return str(error)
        return None

    def check_earlier(self) -> None:
        """Refuse a run in which a task before the newest trained one is not whole.

        Raises:
            ValueError: Naming the file at fault and what to do.
        """
        finished, trained = self.count()
        for index in range(trained - 1):
            if fault := self.result_fault(index):
                raise ValueError(f"{fault}; {self._way_out(index)}")
        for index in range(trained, len(self.stream.tasks)):
            if self.is_trained(index):
                raise ValueError(
                    f"{self.task(finished)} must be whole, got no bundle or no result before "
                    f"{self.task(index).name}; {self._way_out(finished)}"
                )

    def _way_out(self, index: int) -> str:
        name = self.task(index).name
        return f"put it back, or move {name} and the later tasks away to learn from there again"

    def set_aside(self, path: Path) -> Path:
        """Rename a damaged task's folder or result, so that it can be made again; returns the new path."""
        aside = path.with_name(f"damaged-{path.name}")
        if aside.is_dir():
            shutil.rmtree(aside)
        return path.rename(aside)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder as its one writer.

        Raises:
            ValueError: If another process writes there.
        """
        with locked(self.path):
            yield

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Refuse a folder that belongs to another configuration.

        Raises:
            ValueError: If the folder is not a run, or differs. The message names every difference.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out must be a folder, got the file {self.path}")
        file = self.path / RUN
        if not file.is_file():
            if self.path.is_dir() and any(path.name not in _LEFTOVERS for path in self.path.iterdir()):
                raise ValueError(f"out must be new, empty or a run, got {self.path} with other files")
            return
        record = read_run(self.path)["identity"]
        config = read_config({**record["config"], "method": record["method"]}).to_dict()
        del config["method"]
        stored, wanted = _flat({**record, "config": config}), _flat(identity)
        for name, fields in LATER_FIELDS.items():
            for key in fields:
                if key not in record[name]:  # a run of an earlier version
                    wanted.pop(f"{name}.{key}", None)
        if stored != wanted:
            keys = [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]
            listed = ", ".join(f"{key} = {stored.get(key)!r} there, {wanted.get(key)!r} here" for key in keys)
            raise ValueError(f"{self.path} belongs to another configuration: {listed}; choose another folder")

    def write_identity(self, identity: dict[str, Any], settings: dict[str, Any]) -> None:
        """Write `run.json` if it is absent. `settings` are no part of the identity."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / RUN).is_file():
            run = {"format": RUN_FORMAT, "identity": identity, "settings": settings}
            write_json(self.path / RUN, run)

    def state_before(self, index: int) -> str:
        """Return the sha256 of the manifest of the state that a task starts from; empty for the first."""
        return manifest_digest(self.bundle(index - 1)) if index else ""

    def write_training(self, index: int, seconds: float, loss: float) -> None:
        """Record a training. The bundle, written next, commits the training."""
        self.task(index).mkdir(parents=True, exist_ok=True)
        write_json(self.task(index) / TRAINING, sealed({"seconds": seconds, "loss": loss}))

    def training(self, index: int) -> dict[str, Any]:
        """A task's seconds and loss; ValueError or OSError where the record is damaged."""
        return training_record(self.task(index) / TRAINING)

    def predictions(self, index: int, tested: int) -> Path:
        """Return the file with the answers to the test samples of task `tested` after task `index`."""
        return self.task(index) / "predictions" / f"{tested + 1:02d}-{self.stream.tasks[tested].name}.jsonl"

    def write_result(self, index: int, result: dict[str, Any]) -> None:
        """Write a task's result, which finishes the task."""
        write_json(self.task(index) / RESULT, sealed({**result, "of": self._owners(index)}))

    def result(self, index: int) -> dict[str, Any]:
        """A finished task's accuracies, seconds and routing.

        Raises:
            ValueError: If the record is damaged or belongs to another training or bundle.
            OSError: If a file is missing.
        """
        names = [task.name for task in self.stream.tasks[: index + 1]]
        self.training(index)
        return result_record(self.task(index) / RESULT, names, self._owners(index))

    def _owners(self, index: int) -> dict[str, str]:
        files = (self.task(index) / TRAINING, self.bundle(index) / MANIFEST)
        return {name: _sha256(file) for name, file in zip(OWNERS, files, strict=True)}

    def report(self, method: Method, settings: dict[str, Any]) -> Report:
        """Return the report over the finished tasks. The model must be in the state after the last one."""
        cram = method.cram
        finished, _ = self.count()
        results = [self.result(index) for index in range(finished)]
        trainings = [self.training(index) for index in range(finished)]
        names = [task.name for task in self.stream.tasks[:finished]]
        per_task_s = {name: training["seconds"] for name, training in zip(names, trainings, strict=True)}
        matrix = [result["accuracies"] for result in results]
        metrics = continual_metrics(matrix)
        report: MethodReport = {
            "tasks": names,
            "matrix": matrix,
            "last": metrics.last,
            "avg": metrics.avg,
            "mft": metrics.mft,
            "bwt": metrics.bwt,
            "forgetting": metrics.forgetting,
            "parameters": {"total": 0, "per_task": trained_parameters(method, names)},
            "seconds": {
                "train": sum(per_task_s.values()),
                "eval": sum(result["seconds"] for result in results),
                "per_task": per_task_s,
            },
        }
        report["parameters"]["total"] = sum(report["parameters"]["per_task"].values())
        if groups := method.expert_groups():
            owners = {name: cram.expert_names.index(name) for name in names}
            report["ranks"] = {name: cram.expert_ranks(index) for name, index in owners.items()}
            report["groups"] = {name: groups[name] for name in names}
            report["routing"] = results[-1]["routing"]
        if results[-1].get("published"):
            report["published"] = results[-1]["published"]
        return validate_report(
            {"stream": self.stream.name, "methods": {method.name: report}, "settings": settings}
        )


def _sha256(file: Path) -> str:
    size = file.stat().st_size if file.is_file() else None
    if size is None or size > MAX_RECORD_BYTES:
        raise ValueError(f"{file} must be a file of at most {MAX_RECORD_BYTES} bytes, got {size}")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def trained_parameters(method: Method, tasks: list[str]) -> dict[str, int]:
    """Return task -> number of trained values that it added and that are in use after the last task.

    An expert with the name of a task counts for that task, together with its own extra values (CRAM's
    centroid). All other values count for the first task: a pool of experts, gatings, the state of the method.
    """
    cram = method.cram
    packs = [module.experts for module in cram.modules.values() if module.experts is not None]
    a = int(method.trains_a)
    total = sum(a * pack.a.numel() + pack.bt.numel() for pack in packs) + method.trained_values()
    sizes = {name: a * module.in_features + module.out_features for name, module in cram.modules.items()}
    counts = dict.fromkeys(tasks, 0)
    for index, name in enumerate(cram.expert_names):
        if name in counts:
            values = sum(rank * sizes[path] for path, rank in cram.expert_ranks(index).items())
            counts[name] = values + method.values_per_expert()
            total -= values
    counts[tasks[0]] += total
    return counts


def stream_identity(stream: Stream) -> dict[str, Any]:
    """Return name, tasks, and fingerprints: of what all samples say, of their pictures, and of the splits:
    where they end, the answers that are learnt, and the published rule."""
    digest, splits = hashlib.sha256(), hashlib.sha256()
    samples = []
    for task in stream.tasks:
        digest.update(repr((task.name, task.scorer, task.max_new_tokens)).encode())
        splits.update(repr((len(task.train), len(task.test), task.published)).encode())
        splits.update(repr([sample.answer for sample in task.train]).encode())
        for sample in (*task.train, *task.test):
            digest.update(said(sample))
            samples.append(sample)
    names = [task.name for task in stream.tasks]
    return {
        "name": stream.name,
        "tasks": names,
        "sha256": digest.hexdigest(),
        "pictures": pictures_digest(samples),
        "splits": splits.hexdigest(),
    }


def manifest_digest(bundle: Path) -> str:
    """Return the sha256 of a bundle's manifest, which names every file of it."""
    return hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()


def model_identity(cram: AttachedModel, model: Any) -> dict[str, Any]:
    """Return family, dtype, a fingerprint of the first and the last adapted weight, and one of some values
    of every weight of the base and of the encoder."""
    digest = hashlib.sha256()
    encoder, modules = cram.encoder, list(cram.modules.values())
    for module in (modules[0], modules[-1]):
        digest.update(module.weight.detach().float().cpu().numpy().tobytes())
    return {
        "family": cram.family.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "modules": len(modules),
        "encoder": [encoder.text_dim, encoder.image_dim],
        "sha256": digest.hexdigest(),
        "weights": digest_of([encoder.sha256, *_values(cram.base_values), *_values(encoder.values)]),
    }


def _values(found: Values) -> list[list[float]]:
    """Values without the names of their weights, which differ between versions of transformers."""
    return sorted(list(each) for each in found.values())


def without_later(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity as earlier versions wrote it."""
    return {
        name: {key: value for key, value in part.items() if key not in LATER_FIELDS.get(name, ())}
        if isinstance(part, dict)
        else part
        for name, part in identity.items()
    }


def digest_of(value: Any) -> str:
    """Return the sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested objects by dotted path."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat.update(_flat(part, f"{prefix}.{key}" if prefix else str(key)))
    return flat
