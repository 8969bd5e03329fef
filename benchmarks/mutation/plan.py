"""Which sources are mutated, which tests must notice, and what has been found: one JSON line per mutant."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.markdown import table
from benchmarks.mutation.equivalents import reason
from benchmarks.mutation.lines import file_digest
from benchmarks.mutation.operators import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]
# Sources that have other tests than the file of the same name; quick tests first.
TESTS: dict[str, tuple[str, ...]] = {
    "cram/routing/query.py": ("routing/test_router.py",),
    "cram/routing/prompts.py": (
        "model/test_hooks.py",
        "model/test_generate.py",
        "model/test_every_family.py",
    ),
    "cram/routing/threads.py": ("model/test_threads.py",),
    "cram/routing/means.py": ("routing/test_means.py", "routing/test_router.py", "routing/test_groups.py"),
    "cram/routing/router.py": ("routing/test_router.py",),
    "cram/methods/cram.py": (
        "methods/parts/test_penalty.py",
        "methods/test_base.py",
        "routing/test_router.py",
        "learning/test_learner.py",
    ),
    "cram/methods/base.py": ("methods/test_base.py", "methods/baselines/test_isolated.py"),
    "cram/methods/baselines/isolated.py": ("methods/baselines/test_isolated.py", "methods/test_base.py"),
    "cram/methods/baselines/sequential.py": ("methods/test_base.py",),
    "cram/methods/parts/grouped.py": ("methods/test_base.py", "routing/test_router.py"),
    "cram/methods/parts/warm_up.py": (
        "model/test_linear.py",
        "methods/test_base.py",
        "learning/test_learner.py",
    ),
    "cram/methods/parts/penalty.py": (
        "methods/parts/test_penalty.py",
        "methods/parts/test_penalty_terms.py",
    ),
    "cram/methods/parts/anchors.py": (
        "methods/test_disco.py",
        "methods/test_hide.py",
        "methods/test_smolora.py",
    ),
    "cram/methods/parts/gradients.py": ("methods/test_keeplora.py",),
    "cram/methods/parts/separable.py": ("methods/test_smolora.py",),
    "cram/methods/parts/staged.py": (
        "model/test_linear.py",
        "learning/test_foresight.py",
        "methods/test_base.py",
    ),
    "cram/methods/parts/task/curvature.py": ("methods/test_same.py",),
    "cram/methods/parts/task/mixing.py": ("methods/test_same.py",),
    "cram/methods/parts/task/state.py": ("methods/test_keeplora.py", "methods/test_base.py"),
    "cram/model/frozen/saving.py": ("model/frozen/test_saving.py", "model/test_every_family.py"),
    "cram/model/attached.py": ("test_attach.py", "model/test_linear.py"),
    "cram/model/factors.py": ("model/test_linear.py", "test_attach.py"),
    "cram/model/hooks.py": ("model/test_hooks.py", "model/test_generate.py"),
    "cram/model/state.py": ("model/test_hooks.py", "model/test_gating.py", "model/test_rows.py"),
    "cram/model/override.py": ("model/test_threads.py", "model/test_hooks.py", "test_attach.py"),
    "cram/bundle/bundle.py": (
        "bundle/test_cost.py",
        "bundle/test_bundle.py",
        "bundle/test_bundle_method.py",
        "bundle/test_older_formats.py",
    ),
    "cram/bundle/format.py": (
        "bundle/test_cost.py",
        "bundle/test_bundle.py",
        "bundle/test_bundle_method.py",
        "bundle/test_older_formats.py",
    ),
    "cram/bundle/packs.py": ("bundle/test_cost.py", "bundle/test_bundle.py", "bundle/test_older_formats.py"),
    "cram/bundle/tensors.py": ("bundle/test_cost.py", "bundle/test_bundle.py"),
    "cram/bundle/peft_folder.py": (
        "bundle/test_peft_folder.py",
        "bundle/test_cost.py",
        "bundle/test_bundle.py",
    ),
    "cram/bundle/records.py": ("learning/test_run_folder.py",),
    "cram/bundle/runs.py": ("learning/test_run_folder.py",),
    "cram/families.py": ("test_families.py", "test_attach.py"),
    "cram/attach.py": ("test_attach.py", "model/frozen/test_saving.py"),
    "cram/atomic.py": ("test_atomic.py", "bundle/test_bundle.py", "learning/test_run_folder.py"),
    "cram/learning/run_folder.py": ("learning/test_run_folder.py", "learning/test_learner.py"),
    "cram/learning/answers/evaluate.py": (
        "learning/answers/test_evaluate.py",
        "learning/test_learner.py",
        "test_cli.py",
    ),
    "cram/learning/answers/prompts.py": ("learning/test_batches.py",),
    "cram/learning/replay.py": ("methods/baselines/test_replay.py",),
    "cram/learning/schedule.py": ("learning/test_foresight.py", "learning/test_learner.py"),
    "cram/learning/answers/generate.py": ("learning/test_learner.py", "learning/answers/test_predict.py"),
    "cram/learning/step.py": ("learning/test_learner.py", "learning/test_trainer_options.py"),
    "cram/learning/trainer.py": ("learning/test_trainer.py", "learning/parallel/test_zero.py"),
    "cram/learning/training.py": ("learning/test_learner.py",),
    "cram/compare/board.py": ("compare/test_comparison.py",),
    "cram/scoring/boxes.py": ("scoring/test_scorers.py",),
    "cram/scoring/soft_vqa.py": ("scoring/test_scorers.py",),
    "cram/streams/published.py": (
        "streams/test_registry.py",
        "streams/test_readers.py",
        "streams/test_check.py",
    ),
    "cram/streams/yaml_file.py": (
        "streams/test_readers.py",
        "streams/test_messages.py",
        "streams/test_types.py",
        "streams/test_hostile.py",
    ),
    "cram/streams/real/charts.py": ("streams/real/test_drawing.py", "streams/real/test_tasks.py"),
    "cram/streams/real/compose.py": ("streams/real/test_drawing.py", "streams/real/test_tasks.py"),
    "cram/streams/real/flag_colors.py": ("streams/real/test_drawing.py", "streams/real/test_tasks.py"),
    "cram/streams/real/questions.py": ("streams/real/test_tasks.py",),
    "cram/scoring/captions.py": ("scoring/test_scorers.py",),
    "cram/scoring/published.py": ("scoring/test_scorers.py", "report/test_comparison.py"),
}
# What holds for every method, behind the tests of its own.
EVERY_METHOD = ("tests/cram/methods/test_base.py", "tests/cram/learning/test_checkpoint.py")
KERNELS = "tests/cram_kernels"
KERNEL_TESTS: dict[str, tuple[str, ...]] = {
    "cram_kernels/packing.py": ("test_packing.py", "test_expert_lora_rules.py", "test_shared_a.py"),
    "cram_kernels/dispatch.py": ("test_dispatch.py", "test_places.py"),
    "cram_kernels/expert_lora/api.py": ("test_places.py", "test_expert_lora_rules.py", "test_expert_lora.py"),
    "cram_kernels/expert_lora/reference.py": (
        "test_expert_lora.py",
        "test_expert_lora_rules.py",
        "test_dropout.py",
    ),
    "cram_kernels/expert_lora/cpu.py": (
        "test_expert_lora.py",
        "test_expert_lora_rules.py",
        "test_shared_a.py",
    ),
    "cram_kernels/expert_lora/native.py": (
        "test_expert_lora_native.py",
        "test_shared_a.py",
        "test_stacked.py",
    ),
    "cram_kernels/expert_lora/outputs.py": (
        "test_outputs.py",
        "test_expert_lora_rules.py",
        "test_stacked.py",
    ),
    "cram_kernels/expert_lora/dropout.py": ("test_dropout.py",),
    "cram_kernels/expert_lora/stacked.py": ("test_stacked.py", "test_places.py"),
    "cram_kernels/expert_lora/routed.py": ("test_routed.py", "test_places.py"),
    "cram_kernels/expert_lora/tiles.py": (
        "test_tiles.py",
        "test_expert_lora_triton_rules.py",
        "test_places.py",
    ),
    "cram_kernels/centroid_gates/api.py": ("test_centroid_gates.py", "test_places.py"),
    "cram_kernels/centroid_gates/native.py": ("test_centroid_gates.py", "test_raw_operations.py"),
    "cram_kernels/centroid_gates/reference.py": ("test_centroid_gates.py",),
    "cram_kernels/orthogonality/api.py": ("test_orthogonality.py", "test_places.py"),
    "cram_kernels/orthogonality/basis.py": ("test_orthogonality_basis.py",),
    "cram_kernels/orthogonality/cpu.py": ("test_orthogonality.py",),
    "cram_kernels/orthogonality/native.py": ("test_orthogonality_native.py",),
    "cram_kernels/orthogonality/pooling.py": ("test_orthogonality.py",),
    "cram_kernels/orthogonality/reference.py": ("test_orthogonality.py",),
}
# Rooms that decide no answer, or whose tests start servers and processes.
LEFT_OUT = ("cram/serve/", "cram/report/", "cram/commands/", "cram/base/", "cram/streams/builtin/")


def tests_of(source: str) -> list[str]:
    """The test files that must notice a change of a source; empty if there are none."""
    if source in KERNEL_TESTS:
        return [f"{KERNELS}/{name}" for name in KERNEL_TESTS[source]]
    if source in TESTS:
        return [f"tests/cram/{name}" for name in TESTS[source]]
    path = Path(source)
    mirrored = Path("tests") / path.parent / f"test_{path.name}"
    if not (ROOT / mirrored).is_file():
        return []
    return [mirrored.as_posix(), *(EVERY_METHOD if path.parent.name == "methods" else ())]


def sources() -> list[str]:
    """Every source with tests."""
    found = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "cram").rglob("*.py"))]
    return [*(each for each in found if not each.startswith(LEFT_OUT) and tests_of(each)), *KERNEL_TESTS]


def draw(source: str, count: int, seed: int) -> list[Mutant]:
    """So many mutants of a source, drawn from a seed; all of them if there are no more."""
    found = mutants_of(source, (ROOT / source).read_text(encoding="utf-8"))
    # The first few of a larger draw are the smaller draw.
    Random(f"{seed}/{source}").shuffle(found)
    return sorted(found[:count], key=lambda each: each.index)


def digests(source: str) -> dict[str, str]:
    """Of a source, and of its tests."""
    tests = "".join(file_digest(path) for path in tests_of(source))
    return {"source_digest": file_digest(source), "tests_digest": tests}


def holds(row: dict[str, Any]) -> bool:
    """Whether a verdict still holds: tests are added, so what they noticed once is noticed for good."""
    now = digests(row["source"])
    same = [name for name, digest in now.items() if row[name] == digest]
    return len(same) == 2 or (same == ["source_digest"] and row["status"] != "survived")


def read(log: Path) -> list[dict[str, Any]]:
    """The lines of a log; a line that a killed process left unfinished is no verdict."""
    if not log.is_file():
        return []
    whole = [line for line in log.read_text(encoding="utf-8").split("\n")[:-1] if line.endswith("}")]
    return [json.loads(line) for line in whole]


def of_today(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The verdicts on changes that the sources of today can still have."""
    known: dict[str, set[str]] = {}
    for source in {row["source"] for row in rows if (ROOT / row["source"]).is_file()}:
        known[source] = {each.name for each in draw(source, 1 << 30, 0)}
    return [row for row in rows if row["name"] in known.get(row["source"], set())]


def newest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last verdict on each mutant."""
    return list({row["name"]: row for row in rows}.values())


def unnoticed(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The survivors that are not known as equivalent."""
    return [row for row in rows if row["status"] == "survived" and not reason(row["name"])]


def package_of(source: str) -> str:
    """The folder of a source, which the table counts by."""
    return Path(source).parent.as_posix()


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table by package, and the survivors below it."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        equal = row["status"] == "survived" and reason(row["name"])
        counts.setdefault(package_of(row["source"]), Counter())["equivalent" if equal else row["status"]] += 1
    body = [_row(name, count) for name, count in sorted(counts.items())]
    total = sum(counts.values(), Counter())
    header = ("package", "mutants", "equivalent", "noticed", "survived", "share noticed")
    lost = unnoticed(rows)
    equal = [row for row in rows if row["status"] == "survived" and reason(row["name"])]
    return [
        *table(header, [*body, _row("all", total)]),
        *([""] if lost else []),
        *(
            f"- survived: `{row['source']}:{row['line']}` {row['scope']}: `{row['before']}` became "
            f"`{row['after']}`"
            for row in lost
        ),
        *([""] if equal else []),
        *(
            f"- equivalent: `{row['source']}` {row['scope']}: `{row['before']}` became `{row['after']}`: "
            f"{reason(row['name'])}"
            for row in equal
        ),
    ]


def _row(name: str, count: Counter[str]) -> tuple[str, ...]:
    equal, lost = count["equivalent"], count["survived"]
    noticed = count.total() - equal - lost
    share = f"{100 * noticed / (noticed + lost):.1f} %" if noticed + lost else ""
    return name, str(count.total()), str(equal), str(noticed), str(lost), share
