"""Both of torch's modes of gradient checkpointing."""

from __future__ import annotations

from typing import Any

MODES = [{"use_reentrant": False}, {"use_reentrant": True}]


def enable_checkpointing(model: Any, mode: dict[str, bool]) -> None:
    """Without transformers' own hook on the embeddings, which makes their output require grad."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)(mode)
    model.disable_input_require_grads()
