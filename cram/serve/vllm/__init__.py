"""Experts as LoRA slots of vLLM: one slot holds a whole instruction group, gated per request and per layer.

`register` is the entry point `vllm.general_plugins` of this distribution. vLLM skips a plugin whose import
fails, but stops where `register` raises. So this module imports nothing of vLLM, and `register` checks all.
"""

from __future__ import annotations


def register() -> None:
    """Make vLLM gate the slots of groups. vLLM calls this in each of its processes, maybe several times.

    Raises:
        ValueError: If the installed vLLM is of another version or lacks a function that the plugin wraps.
    """
    from cram.serve.vllm.plugin import frontend, seams, worker

    owners = seams.check()
    if seams.claim(owners):
        frontend.install(owners)
        worker.install(owners)
