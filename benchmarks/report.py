"""The Markdown page of a run: first the goals, then one table per operation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import goals, markdown
from benchmarks.cases import GATE_OPS, LAYER_OPS, PART_OPS, STACKED_OPS

BASES = {
    **dict.fromkeys((*LAYER_OPS, *STACKED_OPS), "base"),
    **dict.fromkeys(PART_OPS, "matmul"),
    **dict.fromkeys(GATE_OPS, "plain"),
}
TITLES = {
    "decode": "Decode: one token a request, inference",
    "forward": "Forward, gates given, inference",
    "routed": "Forward with routing in the call, inference",
    "train": "Training step of the layer: forward, dX, gate gradient, gradient of the last expert",
    "stacked": "Forward of q, k and v, which read the same x",
    "stacked-train": "Training step of q, k and v",
    "gates": "Gates of all layers",
    "gates-train": "Gates of all layers with the centroids' gradient",
    "shrink": "SHRINK alone",
    "expand": "EXPAND alone",
    "gram": "GRAM alone",
}
QUIET_LOAD = 0.5
HEADLINE = ("released", "peft", "packed")
MOST_COMPACT = 80
LEGEND = """Cells: median time; in layer tables also what is added to the frozen base linear, as a share.
Every call finds its data cold in the last cache. \\* was called eagerly while the others ran as a CUDA graph.
"""
MEANINGS = {
    "base": "the frozen linear alone",
    "released": "the authors' loop over padded slots, two host reads an expert",
    "loop": "expert by expert, without padding and host reads",
    "peft, peft-9": "one ungated PEFT LoRA of the experts' total rank, of rank 9",
    "packed, compiled": "two packed products in plain PyTorch, and torch.compile of it",
    "grouped": "padded experts through grouped_mm",
    "concatenated": "[x \\| U] [W0 \\| B] as one product, x already lying in the wider buffer",
    "cram (implementation)": "this package: `expert_lora`",
    "one-op, stacked": "`routed_expert_lora`, `stacked_expert_lora`",
    "floor": "the larger of bytes / copy bandwidth and FLOPs / matmul rate, summed over the phases",
}


def write(folder: Path, results: dict[str, Any], committed: dict[str, Any] | None = None) -> Path:
    """Write table.md. `committed` are earlier results of the same machine, for comparison."""
    file = folder / "table.md"
    file.write_text("\n".join(lines(results, committed)) + "\n")
    return file


def lines(results: dict[str, Any], committed: dict[str, Any] | None = None) -> list[str]:
    """Return the page line by line."""
    shown = [f"# {results['environment']['machine']}, suite {results['suite']}", "", _setting(results), ""]
    if _busy(results["environment"]):
        shown += ["**The machine was busy with something else: these figures are not for publication.**", ""]
    if committed is not None:
        shown += [_distance(results, committed), ""]
    checked = goals.checked(results)
    if checked:
        rows = [[g.text, g.wanted, g.found, g.where, "yes" if g.holds else "**no**"] for g in checked]
        header = ["goal", "wanted", "worst", "where", "holds"]
        shown += ["## Goals", "", *markdown.table(header, rows), ""]
    for op, title in TITLES.items():
        cells = [cell for cell in results["cases"] if cell["rows"] and cell["case"]["op"] == op]
        if cells:
            shown += [f"## {title}", "", *_table(cells, BASES[op]), ""]
    shown += _failures(results)
    return [*shown, LEGEND, *markdown.table(("candidate", "is"), list(MEANINGS.items()))]


def compact(results: dict[str, Any]) -> list[str]:
    """Return the goals and one line per case, short enough for the end of a log."""
    shown = [
        f"{'ok  ' if g.holds else 'MISS'} {g.text}: {g.found}, wanted {g.wanted}; {g.where}"
        for g in goals.checked(results)
    ]
    for cell in results["cases"][:MOST_COMPACT]:
        first = BASES[cell["case"]["op"]] if cell["rows"] else ""
        parts = [f"{cell['name']} {cell.get('failed', '')}"]
        for name, row in cell["rows"].items():
            if name == first and "median_us" in row:
                parts.append(duration(row["median_us"]))
            elif name in HEADLINE or name.startswith("cram") or name == "triton":
                ratio = added(cell, name, first)
                parts += [f"{name} {ratio:+.0%}"] if ratio is not None else []
            if "failed" in row:
                parts.append(f"{name} FAILED")
        shown.append(" | ".join(parts))
    return shown + [f"not begun: {name}" for name in results["left_out"][:3]]


def added(cell: dict[str, Any], name: str, base: str) -> float | None:
    """Return (t - t_base) / t_base, or None if a time is missing."""
    times = [cell["rows"].get(n, {}).get("median_us") for n in (name, base)]
    return None if None in times else times[0] / times[1] - 1


def _table(cells: list[dict[str, Any]], base: str) -> list[str]:
    names = [n for n in cells[0]["rows"] if any("median_us" in cell["rows"].get(n, {}) for cell in cells)]
    names += sorted(
        {n for cell in cells for n, row in cell["rows"].items() if "median_us" in row} - set(names)
    )
    rows = []
    for cell in cells:
        label = cell["name"].split("/", 1)[1].replace("/", " ")
        rows.append([label, *(_cell(cell, name, base) for name in names), _floor(cell)])
    return markdown.table(["case", *names, "floor"], rows)


def _cell(cell: dict[str, Any], name: str, base: str) -> str:
    row = cell["rows"].get(name, {})
    if "median_us" not in row:
        return "failed" if "failed" in row else "–"
    graphs = any(other.get("mode") == "graph" for other in cell["rows"].values())
    text = duration(row["median_us"]) + ("*" if graphs and row["mode"] == "eager" else "")
    if base != "base":
        share = row["floor_us"] / row["median_us"]
        return f"{text} ({share:.0%} of floor rate)" if base == "matmul" else text
    return text if name == base else f"{text} ({added(cell, name, base):+.0%})"


def _floor(cell: dict[str, Any]) -> str:
    floors = [r["floor_us"] for n, r in cell["rows"].items() if "floor_us" in r and n != "base"]
    return duration(min(floors)) if floors else "–"


def duration(us: float) -> str:
    """Three digits with a unit."""
    for factor, unit in ((1e6, "s"), (1e3, "ms")):
        if us >= factor:
            return f"{us / factor:.3g} {unit}"
    return f"{us:.3g} µs"


def _setting(results: dict[str, Any]) -> str:
    e, c = results["environment"], results["ceilings"]
    where = e["gpu"]["name"] if "gpu" in e else f"{e['cpu']}, {e['instructions']}, {e['threads']} threads"
    rates = ", ".join(f"{rate / 1e6:.3g} TFLOP/s {dtype}" for dtype, rate in c["flops_per_us"].items())
    versions = ", ".join(f"{name} {v}" for name, v in e["packages"].items() if v)
    return (
        f"{where}; Python {e['python']}, {versions}; commit {e['commit']}; load {e['load']} before and "
        f"{e.get('load_after', '?')} after. "
        f"Ceilings measured: copy {c['bytes_per_us'] / 1e3:.3g} GB/s, matmul {rates}."
    )


def _busy(environment: dict[str, Any]) -> bool:
    """True if other processes took processor time from a CPU run. The run's own threads are subtracted."""
    if environment["device"] != "cpu":
        return False
    after = environment.get("load_after", 0.0) - environment["threads"]
    return environment["load"] > QUIET_LOAD or after > QUIET_LOAD


def _distance(results: dict[str, Any], committed: dict[str, Any]) -> str:
    """Return the distance of the medians from those of the committed run."""
    before = {
        (cell["name"], name): row["median_us"]
        for cell in committed["cases"]
        for name, row in cell["rows"].items()
        if "median_us" in row
    }
    ratios = sorted(
        row["median_us"] / before[cell["name"], name]
        for cell in results["cases"]
        for name, row in cell["rows"].items()
        if "median_us" in row and (cell["name"], name) in before
    )
    if not ratios:
        return "No figure in common with the committed results of this machine."
    middle = ratios[len(ratios) // 2]
    return (
        f"Against this machine's committed results (of {committed['environment']['commit']}): {len(ratios)} "
        f"figures in common, time ratio {middle:.2f} (median), {ratios[0]:.2f} to {ratios[-1]:.2f} over all."
    )


def _failures(results: dict[str, Any]) -> list[str]:
    failed = [f"- {cell['name']}: {cell['failed']}" for cell in results["cases"] if "failed" in cell]
    failed += [
        f"- {cell['name']}, {name}: {row['failed']}"
        for cell in results["cases"]
        for name, row in cell["rows"].items()
        if "failed" in row
    ]
    failed += [f"- not begun: {name}" for name in results["left_out"]]
    return ["## Not measured", "", *failed, ""] if failed else []


def load(file: Path) -> dict[str, Any] | None:
    """Read earlier results, or None."""
    return json.loads(file.read_text()) if file.is_file() else None
