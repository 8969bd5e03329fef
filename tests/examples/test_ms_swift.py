"""ms-swift with the tuner of `examples/ms_swift.py`: two tasks, a resumed one, and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cram import load
from cram.base import base_folder
from cram.loading import Sources
from cram.streams import load_stream

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
swift = pytest.importorskip("swift", reason="ms-swift is absent: see make swift-tests")
PLUGIN = Path(__file__).resolve().parents[2] / "examples/ms_swift.py"


def rows(folder: Path, task: Any) -> str:
    """A few training samples as ms-swift reads them; returns the file."""
    folder.mkdir()
    lines = []
    for number, sample in enumerate(task.train[:16]):
        picture = folder / f"{number}.png"
        sample.images[0].save(picture)
        turns = (("user", f"<image>{sample.instruction}"), ("assistant", sample.answer))
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages, "images": [str(picture)]}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return str(folder / "rows.jsonl")


def learn(monkeypatch: pytest.MonkeyPatch, out: Path, task: str, dataset: str, *more: str) -> Any:
    """Four steps of `swift sft`; returns what it reports."""
    told = {
        "cram_task": task,
        "cram_clip": str(base_folder() / "clip"),
        "cram_config": json.dumps({"tau_orth": 0.9, "dropout": 0.0, "warmup_fraction": 0.25}),
    }
    for name in told:
        monkeypatch.delenv(name.upper(), raising=False)
    arguments = {
        "model": str(base_folder() / "llava"),
        "model_type": "llava1_5_hf",
        "tuner_type": "cram",
        "external_plugins": str(PLUGIN),
        "model_kwargs": json.dumps(told),
        "dataset": dataset,
        "output_dir": str(out),
        "torch_dtype": "float32",
        "max_steps": "4",
        "save_steps": "2",
        "logging_steps": "1",
        "per_device_train_batch_size": "4",
        "gradient_accumulation_steps": "1",
        "learning_rate": "3e-3",
        "split_dataset_ratio": "0",
        "dataloader_num_workers": "0",
        "dataset_num_proc": "1",
        "report_to": "none",
        "add_version": "false",
        "use_hf": "true",
        "check_model": "false",
    }
    return swift.sft_main(
        [part for name, value in arguments.items() for part in (f"--{name}", value)] + [*more]
    )


def test_two_tasks_a_resumed_one_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = load_stream("builtin").tasks[:2]
    files = [rows(tmp_path / name, task) for name, task in (("first", first), ("second", second))]
    one, two = tmp_path / "one", tmp_path / "two"
    learnt = learn(monkeypatch, one, "first", files[0])
    steps = [entry for entry in learnt["log_history"] if "loss" in entry]
    assert len(steps) == 4 and all(entry["cross_entropy"] > 0 for entry in steps)
    learn(monkeypatch, two, "second", files[1], "--adapters", str(one / "bundle"))

    model, processor, encoder = Sources("builtin").load("cpu")
    handle = load(model, two / "bundle", encoder, processor)
    assert handle.expert_names == ["first", "second"]
    kept = handle.expert_weights(1)

    learn(
        monkeypatch,
        tmp_path / "again",
        "second",
        files[1],
        "--resume_from_checkpoint",
        str(two / "checkpoint-2"),
    )
    model, processor, encoder = Sources("builtin").load("cpu")
    again = load(model, tmp_path / "again/bundle", encoder, processor)
    assert again.expert_names == ["first", "second"]
    for name, pair in again.expert_weights(1).items():
        assert all(torch.equal(*both) for both in zip(pair, kept[name], strict=True))

    answers = swift.infer_main(
        ["--adapters", str(two / "bundle"), "--val_dataset", files[1], "--max_new_tokens", "8"]
        + ["--temperature", "0", "--stream", "false", "--result_path", str(tmp_path / "answers.jsonl")]
    )
    assert len(answers) == 16
    for answer, sample in zip(answers[:4], second.train, strict=False):
        # ms-swift's own prompt: the processor's chat template has a space before ASSISTANT.
        prompt = f"USER: <image>\n{sample.instruction}\nASSISTANT:"
        inputs = processor(text=[prompt], images=[sample.images[0]], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        found = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer["response"] == found
