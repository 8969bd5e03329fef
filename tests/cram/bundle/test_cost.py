"""What a load costs: the memory of the experts and no more, and nothing at all before a refusal."""

from __future__ import annotations

import hashlib
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

from cram import attach, load, save
from cram.atomic import read_json, write_json
from cram.bundle import format as bundle_format
from cram.bundle.tensors import read_tensors
from cram.config import CramConfig
from tests.cram import factories
from tests.cram.bundle.damage import edit_json, resign
from tests.cram.factories import fresh

WEIGHTS = "experts/task0/adapter_model.safetensors"


def bundle(folder: Path, experts: int, rank: int) -> Path:
    """A bundle of CRAM with experts of one rank."""
    model, encoder = fresh()
    cram = attach(model, CramConfig(buffer_rank=9), encoder)
    weights = [
        {
            path: (torch.randn(rank, m.in_features), torch.randn(m.out_features, rank))
            for path, m in cram.modules.items()
        }
        for _ in range(experts)
    ]
    names = [f"task{index}" for index in range(experts)]
    cram.set_experts(names, weights, 0)
    for name in names:
        cram.method.router.add_expert(name, 0, torch.zeros(factories.PROJECTION), trained=False)
    save(model, folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(tmp_path_factory.mktemp("bundle") / "bundle", 2, 3)


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "bundle"))


def peak_of(work: Callable[[], Any]) -> int:
    """Most bytes that tensors and Python's objects held at once beyond those of before."""
    tracemalloc.start()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            kept = work()
        python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert kept is not None and most > 0
    return most + python


def test_a_load_needs_the_memory_of_the_experts_and_a_tenth(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b", 64, 256)
    model, encoder = fresh()
    cram = attach(model, CramConfig(buffer_rank=9), encoder)
    peak = peak_of(lambda: load(model, folder))
    packs = [module.experts for module in cram.modules.values()]
    size = sum(4 * (pack.a.numel() + pack.bt.numel()) for pack in packs if pack is not None)
    assert size > 24_000_000
    assert size <= peak <= 1.1 * size


def test_every_value_is_compared_with_infinity_once(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda tensor: seen.append(tensor.numel()) or real(tensor))
    model, encoder = fresh()
    cram = load(model, saved, encoder)
    packs = [module.experts for module in cram.modules.values()]
    state = cram.method.export_state().tensors.values()
    assert sum(seen) == sum(p.a.numel() + p.bt.numel() for p in packs) + sum(t.numel() for t in state)


def sparse(folder: Path, name: str, size: int) -> None:
    """A file of so many bytes that occupies no disk, and a manifest that agrees with its size."""
    os.truncate(folder / name, size)
    manifest = read_json(folder / "manifest.json")
    manifest["files"][name]["bytes"] = size
    write_json(folder / "manifest.json", manifest)


HUGE = 64 << 30


@pytest.mark.parametrize(
    "name", [WEIGHTS, "method.safetensors", "cram.json", "experts/task0/adapter_config.json"]
)
@pytest.mark.parametrize("agrees", [True, False])
def test_a_huge_file_is_refused_before_it_is_read(
    copied: Path, name: str, agrees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the manifest agrees with its size or not."""
    before = read_json(copied / "manifest.json")
    sparse(copied, name, HUGE)
    if not agrees:
        write_json(copied / "manifest.json", before)
    hashed = []
    real = bundle_format.fingerprint
    monkeypatch.setattr(bundle_format, "fingerprint", lambda path: hashed.append(path) or real(path))
    model, encoder = fresh()
    with pytest.raises(ValueError, match=rf"{name} must have .* bytes .*got .*{HUGE}"):
        load(model, copied, encoder)
    assert copied / name not in hashed and not hasattr(model, "cram")


def test_a_huge_manifest_is_refused(copied: Path) -> None:
    os.truncate(copied / "manifest.json", HUGE)
    with pytest.raises(ValueError, match=r"manifest\.json must have at most \d+ bytes, got"):
        load(fresh()[0], copied)


def test_a_header_larger_than_its_tensors_need_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, file, metadata={"padding": "x" * 1_000_000})
    # Twice the name, 100 bytes and three numbers of 20 digits, and 64 KiB beside.
    limit = 2 * (3 + 100 + 3 * 20) + 65536
    with pytest.raises(ValueError, match=rf"header of .* must have at most {limit} bytes, got 10"):
        read_tensors(file, {"a": (2,)})


def header(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Rewrites a header in place; the manifest agrees."""
    content = (folder / name).read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = change(content[8 : 8 + length])
    (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    resign(folder)


def substitute(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(text: bytes) -> bytes:
        assert old in text
        return text.replace(old, new, 1)

    return change


HEADERS: dict[str, tuple[bytes, bytes]] = {
    "text for a number": (b'"data_offsets":[0,', b'"data_offsets":["0",'),
    "a list for a number": (b'"data_offsets":[0,', b'"data_offsets":[[0],'),
    "infinity": (b'"data_offsets":[0,', b'"data_offsets":[Infinity,'),
    "true": (b'"data_offsets":[0,', b'"data_offsets":[true,'),
    "a huge number": (b'"data_offsets":[0,', b'"data_offsets":[' + b"9" * 401 + b","),
    "more digits than Python reads": (b'"data_offsets":[0,', b'"data_offsets":[' + b"9" * 5000 + b","),
    "a negative number": (b'"data_offsets":[0,', b'"data_offsets":[-4,'),
    "another first byte": (b'"data_offsets":[0,', b'"data_offsets":[4,'),
    "one offset": (b'"data_offsets":[0,', b'"data_offsets":[],"x":[0,'),
    "a list for the type": (b'"dtype":"F32"', b'"dtype":["F32"]'),
    "text for the shape": (b'"shape":[', b'"shape":"3","x":['),
    "a deep list": (b'"shape":[', b'"shape":' + b"[" * 3000 + b"]" * 2999 + b',"x":['),
    "bytes that are no text": (b'"dtype"', b'"\xff\xfe"'),
}


@pytest.mark.parametrize("name", HEADERS)
def test_header_values_of_other_types_are_refused(copied: Path, name: str) -> None:
    header(copied, WEIGHTS, substitute(*HEADERS[name]))
    model, encoder = fresh()
    with pytest.raises(ValueError, match=rf"{WEIGHTS} must ") as refused:
        load(model, copied, encoder)
    assert "\n" not in str(refused.value) and not hasattr(model, "cram")


def test_a_header_that_is_no_object_is_refused(copied: Path) -> None:
    header(copied, WEIGHTS, lambda text: b"[1]")
    with pytest.raises(ValueError, match="must have a safetensors header"):
        load(fresh()[0], copied, fresh()[1])


def test_two_tensors_may_not_share_bytes(copied: Path) -> None:
    def overlap(text: bytes) -> bytes:
        """The second of two equally long tensors gets the place of the first."""
        import json

        entries = json.loads(text)
        named = sorted((e["data_offsets"], name) for name, e in entries.items() if name != "__metadata__")
        for (first, _), (second, name) in zip(named, named[1:], strict=False):
            if second[1] - second[0] == first[1] - first[0] and second != named[-1][0]:
                entries[name]["data_offsets"] = first
                return json.dumps(entries).encode()
        raise AssertionError("no two neighbours are equally long")

    header(copied, WEIGHTS, overlap)
    with pytest.raises(ValueError, match="must begin at byte"):
        load(fresh()[0], copied, fresh()[1])


def set_value(*path: str, to: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return change


DESCRIPTIONS: dict[str, tuple[Callable[[Any], None], str]] = {
    "a count of 2**64": (set_value("method", "values", "counts", to=[2**64]), "counts must be integers"),
    "a group of 2**64": (
        set_value("method", "values", "experts", to=[["task0", 2**64], ["task1", 0]]),
        r"experts must be \[name, group below",
    ),
    "experts without groups": (lambda d: d["method"]["values"].pop("experts"), "experts must be"),
    "experts in another order": (lambda d: d["experts"].reverse(), "experts must be"),
    "another width of images": (
        set_value("encoder", "image_dim", to=17),
        "image_dim of the encoder must be 17",
    ),
    "another width of texts": (set_value("encoder", "text_dim", to=2**70), "text_dim of the encoder must be"),
    "another number of layers": (set_value("num_layers", to=3), "layers of .* must be the model's 2, got 3"),
    "a pool's method": (set_value("config", "method", to="moelora"), "experts of moelora .* must be"),
    "one expert's method": (
        set_value("config", "method", to="sequential"),
        "experts of sequential .* must be",
    ),
    "a shared A of unequal ranks": (
        lambda d: (d.update(shared_a=True), d["experts"][0]["ranks"].update(dict.fromkeys(d["modules"], 1))),
        "with a shared A must be one or more of equal ranks",
    ),
}


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_what_the_method_cannot_have_is_refused_and_nothing_changes(
    copied: Path, saved: Path, name: str, attached: bool
) -> None:
    change, message = DESCRIPTIONS[name]
    edit_json("cram.json", change)(copied)
    model, encoder = fresh()
    config = read_json(copied / "cram.json")["config"]
    cram = attach(model, CramConfig.from_dict(config), encoder) if attached else None
    before = state_of(model)
    with pytest.raises(ValueError, match=message) as refused:
        load(model, copied, None if attached else encoder)
    assert "\n" not in str(refused.value) and str(copied) in str(refused.value)
    assert state_of(model) == before
    if cram is not None and config["method"] == "cram":
        assert load(model, saved) is cram and cram.expert_names == ["task0", "task1"]


def state_of(model: Any) -> dict[str, Any]:
    """Everything that a load may change: modules, values, what needs a gradient, and the handle's state."""
    found: dict[str, Any] = {path: type(module) for path, module in model.named_modules()}
    found |= {f"{path}.grad": p.requires_grad for path, p in model.named_parameters()}
    found["hash"] = hashlib.sha256(
        b"".join(t.numpy().tobytes() for t in model.state_dict().values())
    ).digest()
    found["hooks"] = [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]
    if (cram := getattr(model, "cram", None)) is not None:
        tensors, values = cram.method.export_state()
        found["handle"] = (
            list(cram.expert_names),
            cram.pool,
            values,
            {k: v.tolist() for k, v in tensors.items()},
        )
        found["packs"] = [(module.experts, module.solo) for module in cram.modules.values()]
    return found
