"""Without the plugin, or with a vLLM that has changed, nothing is served wrongly. Each has a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.cram.serve.vllm.real import checkpoints
from tests.cram.serve.vllm.real.checkpoints import exported_llava

ABSENT = """
import sys
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from tests.cram.serve.vllm.real.worlds import engine_of
model, adapter = sys.argv[1:]
engine, params = engine_of(model), SamplingParams(temperature=0, max_tokens=4)
try:
    engine.llm_engine.add_lora(LoRARequest("group", 1, adapter))
    print("loaded")
except ValueError as error:
    print("refused:", error)
print("tokens:", len(engine.generate(["Hello"], params, use_tqdm=False)[0].outputs[0].token_ids))
"""
CHANGED = """
import sys
from vllm.v1.worker.gpu_worker import Worker
from tests.cram.serve.vllm.real.worlds import engine_of
Worker.execute_model = lambda self, output: None
try:
    engine_of(sys.argv[1])
    print("started")
except ValueError as error:
    print("refused:", error)
"""


def said(script: str, *arguments: Path, **variables: str) -> str:
    """What a script prints."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **variables}, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_without_the_plugin_the_folder_of_a_group_is_refused(tmp_path: Path) -> None:
    model, adapter = exported_llava(tmp_path)
    shown = said(ABSENT, model, adapter, VLLM_PLUGINS="stand_in")
    lines = shown.splitlines()
    assert any(line.startswith("refused:") and "bias" in line for line in lines), shown
    assert "loaded" not in lines and "tokens: 4" in lines, shown


def test_a_vllm_with_another_signature_does_not_start(tmp_path: Path) -> None:
    shown = said(CHANGED, checkpoints.llava(tmp_path / "model"))
    assert "refused: cram: Worker.execute_model of this vLLM must take" in shown, shown
