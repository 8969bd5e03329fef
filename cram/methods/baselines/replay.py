"""Replay-LoRA: sequential LoRA that sees some samples of older tasks again. It stores data.

Faithful to the released code of Prism: there is room for 180 samples, the same number for every task but the
last. The samples that are kept of the older tasks are part of the training data of each later task.

Own readings:
* The kept samples are drawn evenly from a task's training data. The released code keeps a sample of the
  stream with probability 0.7 until the task's room is full, so it keeps the earliest ones.
* With `max_steps`, a task has as many steps as without kept samples.
"""

from __future__ import annotations

from cram.methods.baselines.sequential import SequentialMethod

EXPERT = "replay"


class ReplayMethod(SequentialMethod):
    """The one LoRA of all tasks, trained on the task's samples and on kept ones of the older tasks."""

    name = "replay"
    pool = (EXPERT,)
    kept_samples = 180
