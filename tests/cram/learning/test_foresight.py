"""Groups are foretold from the texts, and rows that would train nothing are named before the first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cram.learning.foresight import check_pictureless, groups_ahead
from cram.methods.parts.staged import StagedMethod
from cram.streams.types import Stream, Task
from tests.cram import runs


def without_pictures(task: Task, rows: slice = slice(None)) -> Task:
    """The task, some of whose training rows show nothing."""
    bare = {sample.id for sample in task.train[rows]}
    train = [replace(sample, images=()) if sample.id in bare else sample for sample in task.train]
    return replace(task, train=tuple(train))


def stream(last: Task) -> Stream:
    """Two tasks of one wording and one of another, the one in question last."""
    return Stream("toy", (*runs.two_tasks().tasks, last))


LAST = runs.task("shade", "Which shade", ("lo", "hi"), 90)


def test_the_groups_are_those_that_training_finds(tmp_path: Path) -> None:
    learner = runs.learner(tmp_path, tasks=stream(LAST), max_steps=3)
    assert isinstance(learner.method, StagedMethod)
    ahead = {task.name: group for task, group in groups_ahead(learner.stream, learner.method)}
    assert not len(learner.method.router.groups)
    for index in range(3):
        learner.learn(index)
    assert ahead == learner.method.router.groups.locks
    assert len(set(ahead.values())) == 2
    assert not list(groups_ahead(learner.stream, learner.method))


def test_a_task_that_finds_no_group_of_its_own_is_locked_to_the_newest(tmp_path: Path) -> None:
    """With one group at most, no batch of the second task is alike enough to lock it."""
    learner = runs.learner(tmp_path, max_groups=1, max_steps=3)
    assert isinstance(learner.method, StagedMethod)
    ahead = {task.name: group for task, group in groups_ahead(learner.stream, learner.method)}
    assert ahead == {"colour": 0, "letter": 0}


def test_a_later_task_of_texts_alone_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    learner = runs.learner(tmp_path, tasks=stream(without_pictures(LAST)))
    with pytest.raises(ValueError, match=r"^sample 'shade-train-0': must show a picture, got none; task"):
        learner.run()
    assert not list(tmp_path.glob("tasks/*"))


def test_rows_without_a_picture_in_a_later_task_are_counted(tmp_path: Path) -> None:
    learner = runs.learner(tmp_path, tasks=stream(without_pictures(LAST, slice(2, 4))))
    (line,) = check_pictureless(learner.stream, learner.method)
    assert line.startswith("2 rows without a picture train nothing, first sample 'shade-train-2'; task")
    assert "'colour'" in line


def test_a_task_that_opens_a_group_needs_no_picture(tmp_path: Path) -> None:
    first, second = runs.two_tasks().tasks
    bare = Stream("toy", (without_pictures(first), without_pictures(second)))
    learner = runs.learner(tmp_path, tasks=bare)
    assert not check_pictureless(bare, learner.method)


def test_a_method_without_groups_is_not_asked(tmp_path: Path) -> None:
    tasks = stream(without_pictures(LAST))
    assert not check_pictureless(tasks, runs.learner(tmp_path, "sequential", tasks).method)
