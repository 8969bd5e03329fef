"""The instruction group of every task of a stream, found before training from the texts alone.

The groups depend on the texts of the training batches and on nothing that is learnt. So a task that cannot be
learnt in its group is named before the first step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from cram.learning.schedule import batch_order, task_seed, total_steps
from cram.methods import Method
from cram.methods.parts.staged import StagedMethod
from cram.methods.parts.warm_up import warmup_steps
from cram.routing.groups import InstructionGroups
from cram.streams.types import Sample, Stream, Task


def check_pictureless(stream: Stream, method: Method) -> list[str]:
    """Find training rows without a picture where they would train nothing.

    A row without a picture is answered by its group's first expert alone. In every later task of the group
    that expert is frozen.

    Args:
        stream: The stream.
        method: The method, with the experts of the tasks that are learnt already.

    Returns:
        One line for each later task of which some rows have no picture.

    Raises:
        ValueError: If no row of a later task has a picture.
    """
    if not isinstance(method, StagedMethod) or not any(map(_pictureless, stream.tasks)):
        return []
    router, lines = method.router, []
    firsts = {group: router.expert_names[router.experts_of(group)[0]] for group in set(router.expert_groups)}
    for task, group in groups_ahead(stream, method):
        first, rows = firsts.setdefault(group, task.name), _pictureless(task)
        if first == task.name or not rows:
            continue
        why = (
            f"task {task.name!r} asks like {first!r} and joins its group, where only the frozen expert of "
            f"{first!r} answers without a picture"
        )
        if len(rows) == len(task.train):
            raise ValueError(f"{rows[0].place}: must show a picture, got none; {why}")
        lines.append(f"{len(rows)} rows without a picture train nothing, first {rows[0].place}; {why}")
    return lines


def groups_ahead(stream: Stream, method: StagedMethod) -> Iterator[tuple[Task, int]]:
    """Yield every task that is not learnt yet, with the group that its training will find."""
    groups = copy.deepcopy(method.router.groups)
    for index, task in enumerate(stream.tasks):
        if task.name not in method.router.expert_names:
            yield task, _group_ahead(groups, method, task, task_seed(method.config.seed, index))


def _group_ahead(groups: InstructionGroups, method: StagedMethod, task: Task, seed: int) -> int:
    config, encoder = method.config, method.cram.encoder
    steps = total_steps(len(task.train), config)
    switch, newest = warmup_steps(steps, config.warmup_fraction), 0
    for step, indices in enumerate(batch_order(len(task.train), steps, config.batch_size, seed)):
        if step == switch:
            groups.lock(task.name, newest)
        texts = [task.train[index].instruction for index in indices]
        newest = groups.observe(task.name, encoder.encode_text(texts))
    return groups.locks[task.name]


def _pictureless(task: Task) -> list[Sample]:
    return [sample for sample in task.train if not sample.images]
