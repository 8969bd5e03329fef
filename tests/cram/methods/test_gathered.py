"""What methods gather over a task: every sample once, also where checkpointing runs its layers again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cram import runs

KINDS: dict[str, dict[str, Any]] = {
    "branchlora": {},
    "same": {},
    "keeplora": {},
    "many": {"merge_by_inputs": True},
}


@pytest.mark.parametrize("method", KINDS)
def test_checkpointing_gathers_the_same(method: str, tmp_path: Path) -> None:
    for name, checkpointing in (("plain", False), ("again", True)):
        options = {**KINDS[method], "dropout": 0.0, "gradient_checkpointing": checkpointing}
        runs.learner(tmp_path / name, method, **options).run()
    runs.same_bundle(tmp_path / "plain", tmp_path / "again")
