"""Checkpoints in the layout of the released code: the same experts, groups, centroids and routes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cram
from cram.bundle.released import STATE, WEIGHTS, import_released
from cram.cli import main
from tests.cram import factories
from tests.cram.factories import QUESTIONS, image

SLOTS, RANK = 6, 5
NAMES = ["first", "second", "third"]


def plain() -> Any:
    """The handle of a model without experts."""
    clip = factories.clip_model()
    model = factories.llava(clip=clip)
    config = cram.CramConfig(sigma=1.0, dropout=0.0)
    return cram.attach(model, config, factories.clip_encoder(model, clip), factories.llava_processor())


def original() -> Any:
    """A model with three experts in two groups."""
    handle = plain()
    query = handle.encode(QUESTIONS[:2], [[image(0)], [image(1)]])
    groups = handle.method.router.groups
    for group, name in enumerate(NAMES[:2]):
        groups.import_state(*groups.export_state())
        groups._absorb(group, cram.routing.groups.normalise_text(query.text[group]))
        groups.lock(name, group)
    groups.lock("third", 0)
    for seed, (name, group) in enumerate(zip(NAMES, (0, 1, 0), strict=True)):
        weights = factories.expert_weights(handle, seed, rank=RANK)
        centroid = (
            query.image[seed % 2].expand(handle.num_layers, -1) + torch.arange(handle.num_layers)[:, None]
        )
        handle.method.add_expert(name, weights, group, centroid + seed, trained=False)
    return handle


def write(handle: Any, folder: Path, slots: tuple[int, ...] = (2, 0, 5)) -> Path:
    """The checkpoint of the handle's experts, each in a slot, with noise in the rows beyond a rank."""
    weights: dict[str, torch.Tensor] = {}
    for path, linear in handle.modules.items():
        key = f"base_model.model.{path.replace('model.language_model', 'model')}.lora_cram"
        a = torch.randn(SLOTS, RANK, linear.in_features)
        b = torch.randn(SLOTS, linear.out_features, RANK)
        ranks, used = torch.zeros(SLOTS, dtype=torch.long), torch.zeros(SLOTS, dtype=torch.bool)
        for index, slot in enumerate(slots):
            own_a, own_b = handle.expert_weights(index)[path]
            rank = len(own_a)
            a[slot, :rank], b[slot, :, :rank] = own_a, own_b
            ranks[slot], used[slot] = rank, True
        parts = {
            "expert_A": a,
            "expert_B": b,
            "expert_r": ranks,
            "expert_mask": used,
            "buf_A": a[0],
            "buf_B": b[0],
        }
        weights |= {f"{key}.{part}": value for part, value in parts.items()}
    router = handle.method.router
    centroids = torch.zeros(handle.num_layers, SLOTS, handle.encoder.image_dim)
    centroids[:, list(slots)] = router.centroids()
    state = {
        "group_prototypes": list(router.groups.prototypes),
        "group_counts": router.groups.counts.tolist(),
        "group_tasks": [[0, 2], [1]],
        "group_experts": [[slots[0], slots[2]], [slots[1]]],
        "centroid_vis": centroids,
        "theta": 0.1,
        "task_expert_lock": dict(enumerate(slots)),
    }
    folder.mkdir(exist_ok=True)
    torch.save(weights, folder / WEIGHTS)
    torch.save(state, folder / STATE)
    return folder


def logits(handle: Any, question: int, picture: int) -> torch.Tensor:
    text = [factories.prompt(QUESTIONS[question])]
    batch = handle.processor(text=text, images=[image(picture)], return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = handle._model(**batch).logits
    return found


def test_a_checkpoint_answers_as_the_model_that_it_was_made_of(tmp_path: Path) -> None:
    made, read = original(), plain()
    assert import_released(read, write(made, tmp_path / "released"), NAMES) == NAMES
    assert read.method.expert_groups() == {"first": 0, "second": 1, "third": 0}
    assert read.method.router.groups.locks == made.method.router.groups.locks
    for index in range(3):
        theirs = made.expert_weights(index)
        ours = read.expert_weights(index)
        assert all(
            torch.equal(a, b) for path in theirs for a, b in zip(ours[path], theirs[path], strict=True)
        )
    for question, picture in ((0, 0), (1, 1), (0, 3)):
        assert torch.equal(logits(read, question, picture), logits(made, question, picture))
        assert torch.equal(read.state.route.gates, made.state.route.gates)


def spoil(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        torch.save({**torch.load(folder / STATE), **changes}, folder / STATE)

    return apply


def lose(part: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = torch.load(folder / WEIGHTS)
        torch.save({key: value for key, value in weights.items() if part not in key}, folder / WEIGHTS)

    return apply


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no state": (
        lambda f: (f / STATE).unlink(),
        "must hold adapter_model.bin and cram_state.bin, got no",
    ),
    "an object": (spoil(theta=Path("x")), "must hold tensors and plain values alone"),
    "no zip": (lambda f: (f / WEIGHTS).write_bytes(b"x"), r"adapter_model\.bin must hold tensors and plain"),
    "a lost linear": (lose("layers.1.self_attn.v_proj"), r"none of .*layers\.1\.self_attn\.v_proj"),
    "lost ranks": (lose("expert_r"), "must hold the experts of the model's adapted linears"),
    "other centroids": (
        spoil(centroid_vis=torch.zeros(2, SLOTS, 3)),
        r"must be \[2, slots, 16\], got",
    ),
    "other prototypes": (spoil(group_prototypes=[torch.zeros(7)] * 2), "prototypes must have 20 values"),
    "NaN": (spoil(centroid_vis=torch.full((2, SLOTS, 16), torch.nan)), r"centroid_vis in .* must be finite"),
    "no groups": (spoil(group_tasks=[[], []], group_experts=[[], []]), r"given to the tasks \[\], got"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_checkpoints_are_refused(fault: str, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    folder = write(original(), tmp_path / "released")
    change(folder)
    handle = plain()
    with pytest.raises(ValueError, match=message):
        import_released(handle, folder, NAMES)
    assert handle.num_experts == 0


def test_names_and_model_must_fit(tmp_path: Path) -> None:
    folder = write(original(), tmp_path / "released")
    with pytest.raises(ValueError, match=r"names must be given to the tasks \[0, 1, 2\], got \['one'\]"):
        import_released(plain(), folder, ["one"])
    with pytest.raises(ValueError, match="must have a method with groups and no experts"):
        import_released(original(), folder, NAMES)


def test_the_command_writes_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    factories.save_all(tmp_path / "base")
    folder = write(original(), tmp_path / "released")
    base = ["--model", str(tmp_path / "base/llava"), "--clip", str(tmp_path / "base/clip")]
    out = str(tmp_path / "bundle")
    assert main(["import", str(folder), "--released", *NAMES, *base, "--out", out, "--task", "x"]) == 2
    assert "--task or --released must be given, got both" in capsys.readouterr().err
    assert main(["import", str(folder), "--released", *NAMES, *base, "--out", out]) == 0
    assert "bundle: experts first, second, third" in capsys.readouterr().out
    assert main(["info", out]) == 0
    assert "second: group 1" in capsys.readouterr().out
