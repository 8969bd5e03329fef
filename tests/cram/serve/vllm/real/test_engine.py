"""Gates per request and per layer in vLLM's engine, on a CPU, against explicit weight deltas."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import cram
from cram.serve.vllm.export import export_groups
from cram.serve.vllm.group import GROUP_FILE, KEY, GateGroup, encode
from cram.serve.vllm.plugin import seams
from cram.serve.vllm.plugin.gate_table import GateTable
from tests.cram.serve.vllm.real import checkpoints
from tests.cram.serve.vllm.real.worlds import EXPLICIT, LONG, SHORT, Job, World, mixed

# A control must be wrong by far more than any rounding.
WRONG = 0.05


def test_one_batch_of_five_gate_tensors_a_plain_adapter_and_the_base(llava: World) -> None:
    llava.check(mixed(llava))


def test_prefixes_are_shared_by_equal_gates_alone(llava: World) -> None:
    gates = llava.gates(10)
    other = gates.copy()
    other[4, 1] += 0.5
    cached = [llava.check([Job(LONG, (7,), each)])[0] for each in (gates, other, gates)]
    assert cached[:2] == [0, 0] and cached[2] >= 32


def test_equal_layouts_with_other_gates_one_after_another(llava: World) -> None:
    for seed in (20, 22):
        jobs = [Job([5 + seed, *range(40, 58)], (), llava.gates(seed + k)) for k in range(2)]
        llava.check(jobs)


CONTROLS = ("no salt", "gates of layer 0 everywhere", "gates of one")


@pytest.mark.parametrize("control", CONTROLS)
def test_controls_are_found_wrong(llava: World, monkeypatch: pytest.MonkeyPatch, control: str) -> None:
    scale = GateTable.scale
    if control == "no salt":
        monkeypatch.setattr(GateGroup, "salt", lambda self, gates: "cram:|")
    elif control == "gates of one":
        monkeypatch.setattr(
            GateGroup, "rows", lambda self, gates: np.ones((self.layers, self.rank), np.float32)
        )
    else:
        monkeypatch.setattr(GateTable, "scale", lambda self, shrunk, layer: scale(self, shrunk, 0))
    # Gates of its own, since wrong states stay in the prefix cache.
    seed = 30 + 10 * CONTROLS.index(control)
    jobs = [Job(LONG, (8,), llava.gates(seed + k)) for k in range(2)]
    worst = max(llava.differences([job], llava.run([job]))[0] for job in jobs)
    assert worst > WRONG > EXPLICIT, worst


@pytest.mark.parametrize(
    ("value", "who"),
    [
        (None, "group"),
        ([0.5, 0.5], "group"),
        ("A" * 100, "group"),
        (encode(np.full((6, 3), np.nan)), "group"),
        (encode(np.full((6, 3), 1e6)), "group"),
        (["1"] * 18, "group"),
        ([0.2, 0.3, 0.5], "plain"),
        ([0.2, 0.3, 0.5], "base"),
    ],
)
def test_bad_gates_are_refused_and_the_engine_goes_on(llava: World, value: Any, who: str) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    job = Job(SHORT, (), llava.gates(0) if who == "group" else who)
    params = SamplingParams(max_tokens=1, extra_args=None if value is None else {KEY: value})
    with pytest.raises(VLLMValidationError, match="'cram_gates' must"):
        llava.engine.generate([llava.prompt(job)], params, lora_request=llava.request(job), use_tqdm=False)
    assert len(llava.run([Job(SHORT, (), llava.gates(0))], 1)) == 1


def test_a_request_that_avoids_the_front_end_is_refused(llava: World) -> None:
    job = Job(SHORT, (), llava.gates(0))
    engine = llava.engine.llm_engine
    request = engine.input_processor.process_inputs(
        "by hand", llava.prompt(job), llava.sampling(job.who), ("generate",), lora_request=llava.request(job)
    )
    request.external_req_id = request.request_id
    assert request.cache_salt.startswith("cram:")
    for spoil in ("salt", "gates"):
        request.cache_salt = None if spoil == "salt" else request.cache_salt
        if spoil == "gates":
            request.sampling_params.extra_args = None
        with pytest.raises(ValueError, match="must come through the front end|'cram_gates' must be"):
            engine.engine_core.add_request(request)
    llava.check([job])


def damaged(world: World, place: Path, kind: str) -> Path:
    """A copy of group 0 with one fault."""
    folder = place / kind.replace(" ", "-")
    shutil.copytree(world.place / "out" / world.adapters[0].name, folder)
    weights = folder / "adapter_model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        return folder
    if kind == "altered":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(bytes(content))
        return folder
    old, new = {
        "names that match nothing": ("model.language_model.layers", "elsewhere.layers"),
        "a layer that is not there": ("layers.3.mlp", "layers.33.mlp"),
    }[kind]
    save_file({name.replace(old, new): tensor for name, tensor in load_file(weights).items()}, weights)
    from cram.bundle.format import fingerprint

    data = json.loads((folder / GROUP_FILE).read_text())
    (folder / GROUP_FILE).write_text(json.dumps({**data, "weights": fingerprint(weights)}))
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "export the bundle again"),
        ("altered", "must be as exported"),
        ("names that match nothing", "must gate all 42 modules of the group"),
        ("a layer that is not there", "must gate all 42 modules of the group"),
    ],
)
def test_a_damaged_adapter_is_refused_and_the_engine_goes_on(
    llava: World, tmp_path: Path, kind: str, message: str
) -> None:
    from vllm.lora.request import LoRARequest

    folder = damaged(llava, tmp_path, kind)
    with pytest.raises(ValueError, match=message):
        llava.engine.llm_engine.add_lora(LoRARequest(kind, 50, str(folder)))
    llava.check([Job(SHORT, (), llava.gates(0))])


def test_another_bundle_joins_while_the_first_is_served(llava: World, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    model, _, handle = checkpoints.attached(llava.source, llava.handle.encoder.source)
    checkpoints.add(handle, "newest", 1, handle.method.router.centroids()[0, 0])
    cram.save(model, tmp_path / "more")
    adapters = export_groups(tmp_path / "more", llava.place / "out")
    assert adapters[0].name == llava.adapters[0].name
    lora = LoRARequest(adapters[1].name, 60, str(llava.place / "out" / adapters[1].name))
    gates = np.tile(np.array([0.0, 0.0, 1.0], np.float32), (6, 1))
    (output,) = llava.engine.generate(
        [llava.prompt(Job(SHORT, (0,), gates))], llava.sampling(gates), lora_request=lora, use_tqdm=False
    )
    (old,) = llava.run([Job(SHORT, (0,), "base")])
    assert output.outputs[0].logprobs[0] != old.outputs[0].logprobs[0]
    llava.check([Job(SHORT, (0,), llava.gates(0, 1), 1)])


def test_a_changed_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = seams.check()
    monkeypatch.setattr(owners["Worker"], "execute_model", lambda self, output: None)
    with pytest.raises(ValueError, match="execute_model of this vLLM must take"):
        seams.check()
    monkeypatch.undo()
    monkeypatch.delattr(owners["InputBatch"], "make_lora_inputs")
    with pytest.raises(ValueError, match="this vLLM must have .*InputBatch.make_lora_inputs"):
        seams.check()
