"""LoRAs that PEFT has written become experts: PEFT's logits, refusals by name, groups, further training."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cram import attach, load, save
from cram.bundle.export import export_lora
from cram.bundle.importer import import_lora, module_path, read_lora
from cram.config import CramConfig
from cram.model.attached import AttachedModel
from tests.cram import factories, runs
from tests.cram.bundle.loras import (
    ALL,
    ATTENTION,
    PUBLISHED,
    WEIGHTS,
    Published,
    edit_config,
    edit_weights,
    language,
    peft_logits,
    publish,
)

QUESTION = "What colour is it?\nAnswer with one word."


def target(family: str, **config: Any) -> tuple[Any, AttachedModel]:
    """A family's tiny model, attached on every linear and without experts."""
    model = factories.MODELS[family]()
    settings = {"target_projections": ALL, "dropout": 0.0, **config}
    return model, attach(model, CramConfig(**settings), factories.clip_encoder(model))


def add(cram: AttachedModel, folder: Path, name: str = "task", question: str = QUESTION) -> int:
    """Import with two samples."""
    return import_lora(cram, folder, name, [question] * 2, [[factories.image(0)], [factories.image(1)]])


@torch.no_grad()
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_lora_gives_pefts_logits_and_comes_out_bit_for_bit(name: str, tmp_path: Path) -> None:
    lora = PUBLISHED[name]
    expected = publish(lora, tmp_path / "lora")
    model, cram = target(lora.family)
    plain = model(**factories.inputs(lora.family)).logits
    add(cram, tmp_path / "lora")
    with cram.forced("task"):
        found = model(**factories.inputs(lora.family)).logits
    assert (found - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    export_lora(model, tmp_path / "out", {"task": 1.0})
    torch.testing.assert_close(peft_logits(lora.family, tmp_path / "out"), expected, atol=1e-5, rtol=1e-5)
    again = read_lora(tmp_path / "out", cram.modules, cram.config.scale)
    for path, pair in cram.expert_weights(0).items():
        assert all(torch.equal(a, b) for a, b in zip(pair, again[path], strict=True)), path
    save(model, tmp_path / "bundle")
    export_lora(model, tmp_path / "third", {"task": 1.0})
    assert same_files(tmp_path / "out", tmp_path / "third")
    stored = tmp_path / "bundle/experts/task" / WEIGHTS
    assert stored.read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    if lora.scale is not None:
        unfolded(lora, model, tmp_path)


def unfolded(lora: Published, model: Any, folder: Path) -> None:
    """Exported with its own scale a LoRA has its own tensors, exactly where a power of two was folded in."""
    export_lora(model, folder / "own", {"task": 1.0}, scale=lora.scale)
    found, original = load_file(folder / "own" / WEIGHTS), load_file(folder / "lora" / WEIGHTS)
    assert len(found) == len(original)
    assert lora.scale is not None
    exact = torch.frexp(torch.tensor(lora.scale / 2.0))[0] == 0.5
    for key, tensor in original.items():
        path = module_path(key.rsplit(".lora_", 1)[0])
        mine = found[f"base_model.model.{path}.lora_{key.rsplit('.lora_', 1)[1]}"]
        if exact or ".lora_A." in key or tensor.dtype != torch.float32:
            assert torch.equal(mine.to(tensor.dtype), tensor), key
        else:
            assert ((mine - tensor).abs() <= torch.finfo(torch.float32).eps * tensor.abs()).all(), key


def same_files(one: Path, other: Path) -> bool:
    return runs.files(one) == runs.files(other)


def test_ranks_of_one_to_128_are_among_the_published_ones() -> None:
    assert len(PUBLISHED) == 10
    ranks = {lora.settings["r"] for lora in PUBLISHED.values()}
    assert {1, 128} <= ranks and {lora.family for lora in PUBLISHED.values()} == set(factories.MODELS)


@pytest.mark.parametrize(
    ("stored", "path"),
    [
        (
            "base_model.model.model.language_model.layers.3.mlp.up_proj",
            "model.language_model.layers.3.mlp.up_proj",
        ),
        ("base_model.model.language_model.model.layers.3.x", "model.language_model.layers.3.x"),
        ("language_model.model.layers.3.x", "model.language_model.layers.3.x"),
        ("language_model.layers.3.x", "model.language_model.layers.3.x"),
        ("base_model.model.model.layers.3.x", "model.language_model.layers.3.x"),
        ("base_model.model.base_model.model.model.layers.3.x", "model.language_model.layers.3.x"),
        (
            "model.vision_tower.vision_model.encoder.layers.3.x",
            "model.vision_tower.vision_model.encoder.layers.3.x",
        ),
        ("model.visual.blocks.3.attn.qkv", "model.visual.blocks.3.attn.qkv"),
        ("base_model.model.lm_head", "lm_head"),
    ],
)
def test_prefixes_of_older_versions_are_translated(stored: str, path: str) -> None:
    assert module_path(stored) == path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 4 on the attention of the tiny LLaVA; not to be written to."""
    folder = tmp_path_factory.mktemp("lora") / "lora"
    settings = {"r": 4, "lora_alpha": 8, "target_modules": language(*ATTENTION)}
    publish(Published(settings, "llava"), folder)
    return folder


Q0 = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
A0 = f"{Q0}.lora_A.weight"


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        def changed(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            change(found)
            return found

        edit_weights(folder, changed)

    return edit


def added(key: str, *shape: int) -> Callable[[Path], None]:
    return tensors(lambda found: found.update({key: torch.ones(*shape)}))


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, lambda t: {k.replace(old, new): v for k, v in t.items()})


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "DoRA": (configured(use_dora=True), "use_dora of .* cannot be carried by an expert, got True"),
    "DoRA's vector": (
        added(f"{Q0}.lora_magnitude_vector", 32),
        "not of these linears .*lora_magnitude_vector",
    ),
    "a bias": (configured(bias="lora_only"), "bias of .* cannot be carried by an expert, got 'lora_only'"),
    "B's bias": (configured(lora_bias=True), "lora_bias of .* cannot be carried"),
    "a trained bias": (added(f"{Q0}.lora_B.bias", 32), r"not of these linears \[.*q_proj.lora_B.bias\]"),
    "whole modules": (configured(modules_to_save=["lm_head"]), r"modules_to_save of .* got \['lm_head'\]"),
    "a whole module": (
        added("base_model.model.lm_head.weight", 8, 8),
        r"not of these linears \[.*lm_head.weight\]",
    ),
    "the head": (added("base_model.model.lm_head.lora_A.weight", 4, 32), r"not of these linears \[.*lm_head"),
    "the vision tower": (
        added("base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight", 4, 24),
        r"not of these linears \[.*vision_tower.*adapted linears \[model.language_model.layers.0",
    ),
    "trained tokens": (configured(trainable_token_indices=[1]), "trainable_token_indices of"),
    "PiSSA": (configured(init_lora_weights="pissa"), "init_lora_weights of .* cannot be carried .*'pissa'"),
    "a field to come": (configured(use_tomorrow={"r": 3}), "use_tomorrow of .* cannot be carried"),
    "another tuner": (configured(peft_type="LOHA"), "peft_type of .* must be 'LORA', got 'LOHA'"),
    "no match at all": (renamed("language_model", "text_tower"), "0 of 14 linears are named; not of these"),
    "half a pair": (
        tensors(lambda t: t.pop(A0)),
        "without A or B .model.language_model.layers.0.self_attn.q_proj",
    ),
    "a lost linear": (
        tensors(lambda t: [t.pop(f"{Q0}.lora_{side}.weight") for side in "AB"]),
        r"every linear that target_modules names, got \[.*\] without \[model.*layers.0.self_attn.q_proj\]",
    ),
    "two names of one linear": (
        added("base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight", 4, 32),
        "repeated .base_model.model.model.language_model.layers.0",
    ),
    "another rank": (configured(r=5), r"must have shape \[5, 32\], got \[4, 32\]"),
    "another width": (
        tensors(lambda t: t.update({A0: torch.ones(4, 31)})),
        r"must have shape \[4, 32\], got \[4, 31\]",
    ),
    "NaN": (tensors(lambda t: t[A0].fill_(float("nan"))), "must be finite, got 128 NaN or Inf"),
    "another type": (
        tensors(lambda t: t.update({A0: t[A0].to(torch.int32)})),
        r"must be one of \('F32', 'F16', 'BF16'\), got I32",
    ),
    "a pickle": (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
        "other formats are not read",
    ),
    "a cut file": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4]),
        "must be a safetensors file, got",
    ),
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "must be a PEFT folder"),
    "an alpha of 0": (configured(lora_alpha=0), "lora_alpha must be a positive number, got 0"),
    "a rank that is a word": (
        configured(rank_pattern={"q_proj": "4"}),
        "rank_pattern must give module names numbers",
    ),
    "a broken pattern": (configured(alpha_pattern={"(": 4}), "pattern must be a regular expression"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_an_expert_cannot_carry_is_refused_by_name(fault: str, plain: Path, tmp_path: Path) -> None:
    change, words = REFUSED[fault]
    folder = tmp_path / "lora"
    folder.mkdir()
    for file in plain.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    _, cram = target("llava")
    read_lora(folder, cram.modules, 2.0)
    change(folder)
    with pytest.raises(ValueError, match=words):
        add(cram, folder)
    assert not cram.num_experts and not len(cram.method.router.groups)


def test_vision_linears_that_bare_names_reach_are_refused(tmp_path: Path) -> None:
    publish(
        Published({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}, "llava"), tmp_path / "l"
    )
    _, cram = target("llava")
    with pytest.raises(ValueError, match=r"4 of 14 linears are named; not of these linears \[.*vision_tower"):
        add(cram, tmp_path / "l")


def test_linears_that_the_bundle_leaves_alone_are_refused(plain: Path) -> None:
    _, cram = target("llava", target_projections=("q_proj", "v_proj"))
    with pytest.raises(ValueError, match=r"not of these linears \[.*k_proj.*adapted linears \[.*q_proj"):
        add(cram, plain)


def test_the_samples_give_group_and_centroid(plain: Path) -> None:
    _, cram = target("llava", group_merge_similarity=1.0, batch_size=1)
    assert add(cram, plain, "one") == 0
    other = "Write a long and detailed story about everything that can be seen here."
    assert add(cram, plain, "two", other) == 1
    assert add(cram, plain, "three", QUESTION) == 0
    method = cram.method
    assert method.expert_groups() == {"one": 0, "two": 1, "three": 0}
    assert method.router.groups.locks == {"one": 0, "two": 1, "three": 0}
    assert method.router.groups.counts.tolist() == [4, 2]
    features = cram.encode([QUESTION] * 2, [[factories.image(0)], [factories.image(1)]]).image
    torch.testing.assert_close(method.router.centroids()[0, 0], features.mean(0))
    route = cram.route(cram.encode([other], [[factories.image(5)]]))
    assert (
        route.groups is not None
        and route.groups.tolist() == [1]
        and route.gates[:, 0, 1].tolist() == [1.0, 1.0]
    )


def refusals(cram: AttachedModel, plain: Path) -> list[tuple[Callable[[], Any], str]]:
    picture = [[factories.image(0)]]
    return [
        (lambda: add(cram, plain, "one"), "expert name must be new|name must be new"),
        (lambda: add(cram, plain, "../two"), "expert name must match"),
        (lambda: import_lora(cram, plain, "two", [], []), "samples must be at least one"),
        (
            lambda: import_lora(cram, plain, "two", [QUESTION, QUESTION], picture),
            "got 2 instructions and 1 lists",
        ),
        (lambda: import_lora(cram, plain, "two", [QUESTION], [[]]), "must show images to join"),
    ]


def test_nothing_changes_where_the_samples_do_not_suffice(plain: Path) -> None:
    _, cram = target("llava")
    add(cram, plain, "one")
    before = cram.method.export_state()
    for call, words in refusals(cram, plain):
        with pytest.raises(ValueError, match=words):
            call()
        after = cram.method.export_state()
        assert after.values == before.values
        assert all(torch.equal(after.tensors[key], each) for key, each in before.tensors.items())
        assert cram.expert_names == ["one"]


def test_a_method_without_groups_is_refused(plain: Path) -> None:
    _, cram = target("llava", method="isolated")
    with pytest.raises(ValueError, match="must have instruction groups to import a LoRA, got 'isolated'"):
        add(cram, plain)


def test_a_text_lora_leads_a_group_of_its_own(plain: Path) -> None:
    _, cram = target("llava")
    assert import_lora(cram, plain, "text", [QUESTION], [[]]) == 0
    assert cram.route(cram.encode([QUESTION], [[]])).gates.flatten().tolist() == [1.0, 1.0]


def test_a_bundle_with_an_import_is_loaded_and_learns_another_task(plain: Path, tmp_path: Path) -> None:
    learner = runs.learner(tmp_path / "run", target_projections=ATTENTION)
    add(learner.cram, plain, "imported")
    save(learner.model, tmp_path / "bundle")
    base, encoder = factories.fresh()
    again = load(base, tmp_path / "bundle", encoder, factories.llava_processor())
    before = again.expert_weights(0)
    train(base, learner.config)
    assert again.expert_names == ["imported", "colour"]
    for path, pair in again.expert_weights(0).items():
        assert all(torch.equal(a, b) for a, b in zip(pair, before[path], strict=True))
    assert any(bool(b.any()) for _, b in again.expert_weights(1).values())
    save(base, tmp_path / "further")
    found = base.cram.answer(factories.image(0), "Which colour", max_new_tokens=2)
    assert re.match(r"group \d; ", found.routing())


def train(model: Any, config: CramConfig) -> None:
    """Train the first task of the tiny stream on a loaded bundle."""
    from cram.console import ProgressBar
    from cram.learning.batches import Budget, EncodedSplit, pad_id
    from cram.learning.training import train_task

    task, processor = runs.two_tasks().tasks[0], factories.llava_processor()
    split, method = EncodedSplit(processor, task.train, Budget(1 << 20)), model.cram.method
    train_task(
        model,
        method,
        split.example,
        task=task.name,
        num_samples=len(task.train),
        padding=pad_id(processor.tokenizer),
        seed=0,
        bar=ProgressBar("train", 5, shown=False),
    )
