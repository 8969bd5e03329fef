"""The definition of `report.json`, the results of a run folder.

Accuracies are percentages (0..100), times are seconds, and tasks are in the order of learning. The file has
either `methods` (one seed) or `seeds` (several seeds, each with its own `methods`, perhaps in its own order
of tasks). The page and the pictures show means over the seeds.

The annotations are evaluated at run time, because `validate_report` reads the keys from these definitions.
"""

import math
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict, cast


class Parameters(TypedDict):
    """Trainable values that stay in the model: of all tasks together, and of each task."""

    total: int
    per_task: dict[str, int]


class Seconds(TypedDict):
    """Wall-clock seconds of training and of evaluation. `per_task` holds the training of each task."""

    train: float
    eval: float
    per_task: dict[str, float]


class Routing(TypedDict):
    """How the test samples of one task were routed after the last task.

    `group_accuracy`: percentage of samples that were routed to the group of their own task.
    `expert_accuracy`: percentage of samples whose largest gate is that of their own task's expert.
    `mean_gates`: mean weight of each expert over samples and layers.
    `gate_entropy`: entropy in nats of a sample's gates (their means over the layers), the mean over
    samples. It is 0 where every sample uses one expert, and log(2) where every sample uses two equally.
    """

    group_accuracy: float
    expert_accuracy: float
    mean_gates: dict[str, float]
    gate_entropy: NotRequired[float]


class Entry(TypedDict):
    """One entry of a comparison.

    `method` is a name in the registry. An entry with another name than its method is an ablation. `changes`
    holds the fields in which the entry's configuration differs from `settings.config`. `told_task` is true if
    the method is told the task at test time. Such an entry is shown but not ranked. `sized_by_cram` is there
    for a method whose size is CRAM's average expert, and false where CRAM did not run beside it.
    """

    method: str
    changes: dict[str, Any]
    told_task: bool
    note: str
    sized_by_cram: NotRequired[bool]


class Stored(TypedDict):
    """The bundle after the last task: count of numbers in its tensors, and bytes of all its files."""

    values: int
    bundle_bytes: int


class Inference(TypedDict):
    """Mean seconds of `generate` on one batch, adapted and bare, with the batch's samples and tokens.

    `prefills` counts the adapted base's passes over the prompt.
    """

    adapted: float
    base: float
    samples: int
    tokens: int
    prefills: NotRequired[float]


class Published(TypedDict):
    """The accuracy of a task by the rule behind published numbers, where it is not the strict one.

    Attributes:
        rule: Name of the rule.
        accuracy: By that rule.
        difference: That accuracy minus the strict one.
    """

    rule: str
    accuracy: float
    difference: float


class MethodReport(TypedDict):
    """One method's run over the whole stream.

    `matrix[t][i]` is the accuracy on task i after task t was learnt, so row t has t + 1 numbers.
    `ranks[task][module]` is the rank of the task's expert in a module, and `groups[task]` its instruction
    group. Only runs of a comparison have the last five keys; `kept_samples` counts the training samples that
    a method keeps of older tasks, if it keeps any. `peak_memory_bytes` is missing where a run was interrupted
    or the system does not count it.
    """

    tasks: list[str]
    matrix: list[list[float]]
    last: float
    avg: float
    mft: float
    bwt: float
    forgetting: float
    parameters: Parameters
    seconds: Seconds
    ranks: NotRequired[dict[str, dict[str, int]]]
    groups: NotRequired[dict[str, int]]
    routing: NotRequired[dict[str, Routing]]
    published: NotRequired[dict[str, Published]]
    entry: NotRequired[Entry]
    stored: NotRequired[Stored]
    inference: NotRequired[Inference]
    kept_samples: NotRequired[int]
    peak_memory_bytes: NotRequired[int]


class Report(TypedDict):
    """The whole file. `stream` names the task stream. The page shows `settings` unchanged.

    `base[task]` is the accuracy of the untrained base on a task, the mean over the seeds.
    """

    stream: str
    base: NotRequired[dict[str, float]]
    methods: NotRequired[dict[str, MethodReport]]
    seeds: NotRequired[dict[str, dict[str, MethodReport]]]
    settings: NotRequired[dict[str, Any]]


METRIC_NAMES = ("last", "avg", "mft", "bwt", "forgetting")


def validate_report(data: object) -> Report:
    """Check that `data`, the content of a `report.json`, follows the schema.

    Raises:
        ValueError: If it does not. The message names the place (`methods.cram.matrix[2]`) and the rule.
    """
    top = _object(data, "report", Report)
    if ("methods" in top) == ("seeds" in top):
        raise ValueError(f"report must have exactly one of 'methods' and 'seeds', got keys {sorted(top)}")
    if not isinstance(top["stream"], str):
        raise ValueError(f"report.stream must be a string, got {top['stream']!r}")
    if "methods" in top:
        _base(top, _methods(top["methods"], "methods")[1])
        return cast(Report, top)
    seeds = _mapping(top["seeds"], "seeds")
    if not all(seed.isdecimal() for seed in seeds):
        raise ValueError(f"seeds must be named by their numbers, got {sorted(seeds)}")
    contents = {seed: _methods(methods, f"seeds.{seed}") for seed, methods in seeds.items()}
    first, *others = contents.values()
    if any((other[0], sorted(other[1])) != (first[0], sorted(first[1])) for other in others):
        raise ValueError(f"seeds must all have the same methods and tasks, got {contents}")
    _base(top, first[1])
    return cast(Report, top)


def _base(top: dict[str, Any], tasks: list[str]) -> None:
    if "base" in top:
        _per_task(top["base"], tasks, "base")


def by_seed(report: Report) -> dict[str, dict[str, MethodReport]]:
    """Return seed -> methods. In a report of one seed that seed is called "0"."""
    return report["seeds"] if "seeds" in report else {"0": report["methods"]}


def _methods(value: object, where: str) -> tuple[list[str], list[str]]:
    """Check the methods of one seed. Return their names and their common tasks."""
    methods = _mapping(value, where)
    tasks: list[str] = []
    for name, method in methods.items():
        found = _method(method, f"{where}.{name}")
        if tasks and found != tasks:
            raise ValueError(
                f"{where}.{name}.tasks must be the tasks of the other methods {tasks}, got {found}"
            )
        tasks = found
    return list(methods), tasks


def _method(value: object, where: str) -> list[str]:
    method = _object(value, where, MethodReport)
    tasks = method["tasks"]
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        raise ValueError(f"{where}.tasks must be a list of task names, got {tasks!r}")
    if len(set(tasks)) != len(tasks):
        raise ValueError(f"{where}.tasks must be unique, got {tasks}")
    _matrix(method["matrix"], len(tasks), f"{where}.matrix")
    for name in METRIC_NAMES:
        _number(method[name], f"{where}.{name}")
    parameters = _object(method["parameters"], f"{where}.parameters", Parameters)
    _number(parameters["total"], f"{where}.parameters.total")
    _per_task(parameters["per_task"], tasks, f"{where}.parameters.per_task")
    seconds = _object(method["seconds"], f"{where}.seconds", Seconds)
    for name in ("train", "eval"):
        _number(seconds[name], f"{where}.seconds.{name}")
    _per_task(seconds["per_task"], tasks, f"{where}.seconds.per_task")
    _optional_parts(method, tasks, where)
    _comparison_parts(method, where)
    return tasks


def _published(value: Any, tasks: list[str], where: str) -> None:
    for task, each in _tasks_only(value, tasks, where).items():
        found = _object(each, f"{where}.{task}", Published)
        if not isinstance(found["rule"], str):
            raise ValueError(f"{where}.{task}.rule must be a name, got {found['rule']!r}")
        for name in ("accuracy", "difference"):
            _number(found[name], f"{where}.{task}.{name}")


def _optional_parts(method: dict[str, Any], tasks: list[str], where: str) -> None:
    if "groups" in method:
        _per_task(method["groups"], tasks, f"{where}.groups")
    if "ranks" in method:
        ranks = _tasks_only(method["ranks"], tasks, f"{where}.ranks")
        for task, modules in ranks.items():
            for module, rank in _mapping(modules, f"{where}.ranks.{task}").items():
                _number(rank, f"{where}.ranks.{task}.{module}")
    if "published" in method:
        _published(method["published"], tasks, f"{where}.published")
    if "routing" in method:
        for task, value in _tasks_only(method["routing"], tasks, f"{where}.routing").items():
            routing = _object(value, f"{where}.routing.{task}", Routing)
            _number(routing["group_accuracy"], f"{where}.routing.{task}.group_accuracy")
            _number(routing["expert_accuracy"], f"{where}.routing.{task}.expert_accuracy")
            _number(routing.get("gate_entropy", 0.0), f"{where}.routing.{task}.gate_entropy")
            for expert, gate in _mapping(routing["mean_gates"], f"{where}.routing.{task}.mean_gates").items():
                _number(gate, f"{where}.routing.{task}.mean_gates.{expert}")


def _comparison_parts(method: dict[str, Any], where: str) -> None:
    for key, kind in (("stored", Stored), ("inference", Inference)):
        if key in method:
            for name, number in _object(method[key], f"{where}.{key}", kind).items():
                _number(number, f"{where}.{key}.{name}")
                if number <= 0:
                    raise ValueError(f"{where}.{key}.{name} must be positive, got {number!r}")
    for key in ("kept_samples", "peak_memory_bytes"):
        if key in method and (type(count := method[key]) is not int or count < 1):
            raise ValueError(f"{where}.{key} must be a positive number, got {count!r}")
    if "entry" in method:
        entry = _object(method["entry"], f"{where}.entry", Entry)
        kinds = {"method": str, "changes": dict, "told_task": bool, "note": str, "sized_by_cram": bool}
        for name, wanted in kinds.items():
            if name in entry and not isinstance(entry[name], wanted):
                raise ValueError(f"{where}.entry.{name} must be a {wanted.__name__}, got {entry[name]!r}")


def _matrix(value: object, num_tasks: int, where: str) -> None:
    if not isinstance(value, list) or len(value) != num_tasks:
        raise ValueError(f"{where} must be a list of {num_tasks} rows, got {value!r}")
    for t, row in enumerate(value):
        if not isinstance(row, list) or len(row) != t + 1:
            raise ValueError(f"{where}[{t}] must be a list of {t + 1} accuracies, got {row!r}")
        for i, accuracy in enumerate(row):
            _number(accuracy, f"{where}[{t}][{i}]")


def _object(value: object, where: str, kind: type) -> dict[str, Any]:
    """Return `value` if it has every required key of the typed dictionary `kind` and no unknown key."""
    found = _mapping(value, where)
    required: frozenset[str] = kind.__required_keys__  # type: ignore[attr-defined]
    known = required | kind.__optional_keys__  # type: ignore[attr-defined]
    missing, unknown = sorted(required - found.keys()), sorted(found.keys() - known)
    if missing or unknown:
        raise ValueError(
            f"{where} must have the keys {sorted(known)}, got missing {missing}, unknown {unknown}"
        )
    return found


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{where} must be a non-empty object, got {value!r}")
    return dict(value)


def _tasks_only(value: object, tasks: list[str], where: str) -> dict[str, Any]:
    found = _mapping(value, where)
    if unknown := sorted(found.keys() - set(tasks)):
        raise ValueError(f"{where} must be keyed by tasks {tasks}, got {unknown}")
    return found


def _per_task(value: object, tasks: list[str], where: str) -> None:
    found = _tasks_only(value, tasks, where)
    if missing := [task for task in tasks if task not in found]:
        raise ValueError(f"{where} must have every task, got none for {missing}")
    for task, number in found.items():
        _number(number, f"{where}.{task}")


def _number(value: object, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value!r}")
