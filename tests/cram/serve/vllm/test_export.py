"""Exported groups amount to the experts, keep their names while they stay, and refuse what cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cram
from cram.bundle.format import describe
from cram.serve.vllm import export
from cram.serve.vllm.export import export_groups, exported
from cram.serve.vllm.group import GROUP_FILE, MARKER, check_weights, group_at, read_group
from tests.cram import factories
from tests.cram.serve.vllm.bundles import deltas, small_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle's folder; its export lies beside it in `out`."""
    folder = tmp_path_factory.mktemp("place") / "bundle"
    small_bundle(folder)
    export_groups(folder, folder.parent / "out")
    return folder


def test_an_adapter_with_gates_on_its_rows_is_the_weighted_sum_of_its_experts(bundle: Path) -> None:
    _, handle = small_bundle(bundle.parent / "again")
    first, second = exported(bundle, bundle.parent / "out")
    assert first.group.experts == ("old", "new") and second.group.experts == ("other",)
    for adapter, gates in ((first, {"old": 0.25, "new": -1.5}), (second, {"other": 2.0})):
        group = adapter.group
        tensors = load_file(bundle.parent / "out" / adapter.name / "adapter_model.safetensors")
        table = np.tile(np.array([gates[name] for name in group.experts], np.float32), (group.layers, 1))
        rows = torch.from_numpy(group.rows(table))
        wanted = deltas(handle, gates)
        assert set(group.modules) == set(wanted) and len(tensors) == 2 * len(wanted)
        for path in group.modules:
            a, b = (tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
            assert a.shape[0] == b.shape[1] == group.rank == sum(group.ranks)
            torch.testing.assert_close((b * rows[0]) @ a, wanted[path], rtol=0, atol=1e-5)


def test_the_folder_is_named_by_its_content_and_marked_for_plain_vllm(bundle: Path, tmp_path: Path) -> None:
    names = [adapter.name for adapter in exported(bundle, bundle.parent / "out")]
    assert [adapter.name for adapter in export_groups(bundle, tmp_path)] == names
    assert [name.rsplit("-", 1)[0] for name in names] == ["cram-g0", "cram-g1"]
    config = json.loads((tmp_path / names[0] / "adapter_config.json").read_text())
    assert config["bias"] == MARKER != "none"
    assert config["r"] == config["lora_alpha"] == read_group(tmp_path / names[0]).rank


def test_another_bundle_keeps_the_adapters_of_its_unchanged_groups(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = export_groups(bundle, out)
    model, handle = small_bundle(tmp_path / "unused")
    weights = factories.expert_weights(handle, 9)
    handle.method.add_expert("newest", weights, 1, torch.ones(factories.PROJECTION), trained=False)
    cram.save(model, tmp_path / "more")
    moved = (out / before[0].name).stat().st_mtime_ns
    after = export_groups(tmp_path / "more", out)
    assert after[0].name == before[0].name and (out / before[0].name).stat().st_mtime_ns == moved
    assert after[1].name != before[1].name and after[1].group.experts == ("other", "newest")
    assert [adapter.name for adapter in exported(bundle, out)] == [adapter.name for adapter in before]


def test_a_damaged_adapter_is_found_and_written_again(bundle: Path, tmp_path: Path) -> None:
    first, _ = export_groups(bundle, tmp_path)
    weights = tmp_path / first.name / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"must have \d+ bytes, got \d+; export the bundle again"):
        read_group(weights.parent)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="must be as exported, got an altered file"):
        check_weights(weights.parent, read_group(weights.parent))
    export_groups(bundle, tmp_path)
    assert weights.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format=2), "format of .* must be 1, got 2"),
        (lambda data: data.pop("ranks"), "must have the fields of a group"),
        (lambda data: data.update(ranks=[1]), "must describe experts with ranks"),
        (lambda data: data.update(layers=0), "must describe experts with ranks"),
        (lambda data: data.update(ranks=[600, 1]), "must describe experts with ranks"),
    ],
)
def test_a_wrong_description_is_refused(bundle: Path, tmp_path: Path, change: object, message: str) -> None:
    first, _ = exported(bundle, bundle.parent / "out")
    shutil.copytree(bundle.parent / "out" / first.name, tmp_path / "group")
    file = tmp_path / "group" / GROUP_FILE
    data = json.loads(file.read_text())
    change(data)  # type: ignore[operator]
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        group_at(tmp_path / "group")


def test_a_stopped_export_leaves_no_adapter(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "write_group", lambda folder, group: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_groups(bundle, tmp_path)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    with pytest.raises(ValueError, match="must hold the export of"):
        exported(bundle, tmp_path)
    monkeypatch.undo()
    assert len(export_groups(bundle, tmp_path)) == len(exported(bundle, tmp_path)) == 2


def test_more_rank_than_a_slot_is_refused_with_the_way_out(bundle: Path, tmp_path: Path) -> None:
    description = describe(bundle)
    for expert in description.experts:
        expert.ranks.update(dict.fromkeys(expert.ranks, 300))
    with pytest.raises(ValueError, match=r"got 600 of 2 experts; serve .*--gate-floor .*merge .*two groups"):
        export._check_group(description, 0, [0, 2])
    export._check_group(description, 0, [0])


def test_an_output_head_is_refused(bundle: Path) -> None:
    description = describe(bundle)
    for path in ("lm_head", "model.language_model.embed_tokens", "model.layers.0.mlp.experts.3.up_proj"):
        ranks = {path: 4}
        with pytest.raises(ValueError, match=f"no mixture-of-experts layers.*{path}"):
            expert = type(description.experts[0])("odd", ranks)
            export._check_group(type(description)(**{**vars(description), "experts": (expert,)}), 0, [0])


def test_a_method_without_groups_is_refused(tmp_path: Path) -> None:
    model, encoder = factories.fresh()
    handle = cram.attach(model, cram.CramConfig(method="sequential"), encoder, factories.llava_processor())
    handle.add_expert("sequential", factories.expert_weights(handle, 0))
    cram.save(model, tmp_path / "bundle")
    with pytest.raises(
        ValueError, match="must be of a method with instruction groups for vLLM, got 'sequential'"
    ):
        export_groups(tmp_path / "bundle", tmp_path / "out")
    assert not (tmp_path / "out").exists()
