"""Pictures of a run: each candidate's time over the base linear's, and its place under the roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import floors
from benchmarks.cases import LAYER_OPS, STACKED_OPS, Case
from benchmarks.report import duration

# One colour per candidate in all plots. Baselines are grey to brown, so ours stand out.
COLOURS = {
    "released": "#7f7f7f",
    "loop": "#b0a18f",
    "peft": "#c49c94",
    "peft-9": "#dbc6bf",
    "packed": "#6b6b9e",
    "compiled": "#9c9ec4",
    "grouped": "#c7c7c7",
    "concatenated": "#bcbd22",
    "cram cpu": "#1f77b4",
    "cram triton": "#d62728",
    "cram native": "#2ca02c",
    "cram cpu one-op": "#17527d",
    "cram triton one-op": "#8c1a1b",
    "cram native one-op": "#1b6b1b",
    "cram cpu stacked": "#17527d",
    "cram triton stacked": "#8c1a1b",
    "cram native stacked": "#1b6b1b",
}
MARKERS = {
    "released": "x",
    "peft": "^",
    "packed": "s",
    "cram cpu": "o",
    "cram triton": "o",
    "cram native": "o",
}
COLUMNS = 3
OPS = (*LAYER_OPS, *STACKED_OPS)


def write(folder: Path, results: dict[str, Any]) -> list[Path]:
    """Write ratios.png and roofline.png. Return the written files."""
    import matplotlib

    matplotlib.use("Agg")
    cells = [cell for cell in results["cases"] if cell["rows"] and cell["case"]["op"] in OPS]
    cells = [cell for cell in cells if "median_us" in cell["rows"].get("base", {})]
    if not cells:
        return []
    return [
        _ratios(folder / "ratios.png", cells, results),
        _roofline(folder / "roofline.png", cells, results),
    ]


def _spread(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return up to three cells of each operation: the first, the middle and the last."""
    chosen = []
    for op in OPS:
        of_op = [cell for cell in cells if cell["case"]["op"] == op]
        places = sorted({0, len(of_op) // 2, len(of_op) - 1}) if of_op else []
        chosen += [of_op[place] for place in places]
    return chosen


def _ratios(file: Path, cells: list[dict[str, Any]], results: dict[str, Any]) -> Path:
    """Bars from 1 to t / t_base, one panel per case. All panels share one logarithmic axis."""
    from matplotlib import pyplot as plt

    cells = _spread(cells)
    rows = -(-len(cells) // COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(5.2 * COLUMNS, 2.6 * rows), squeeze=False, sharex=True, layout="constrained"
    )
    for axis in axes.flat[len(cells) :]:
        axis.set_axis_off()
    for axis, cell in zip(axes.flat, cells, strict=False):
        base = cell["rows"]["base"]["median_us"]
        timed = {n: row["median_us"] / base for n, row in cell["rows"].items() if "median_us" in row}
        names = [name for name in COLOURS if name in timed][::-1]
        widths = [timed[name] - 1 for name in names]
        axis.barh(names, widths, left=1, color=[COLOURS[name] for name in names])
        axis.set_xscale("log")
        axis.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
        axis.axvline(1, color="black", linewidth=0.8)
        axis.minorticks_off()
        for position, name in enumerate(names):
            text = f" {timed[name] - 1:+.0%}"
            axis.text(max(timed[name], 1), position, text, va="center", fontsize=8)
        axis.tick_params(labelsize=8, labelbottom=True)
        axis.spines[["top", "right"]].set_visible(False)
        title = " ".join(cell["name"].split("/"))
        axis.set_title(f"{title}\nbase {duration(base)}", fontsize=9, loc="left")
    ratios = [row["median_us"] / c["rows"]["base"]["median_us"] for c in cells for row in timed_rows(c)]
    axes[0, 0].set_xlim(min(0.95, min(ratios) * 0.85), max(2.0, max(ratios) * 1.6))
    figure.suptitle(f"Time over the frozen base linear's\n{results['environment']['machine']}")
    return _save(figure, file)


def timed_rows(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a cell that have a figure."""
    return [row for row in cell["rows"].values() if "median_us" in row]


def _roofline(file: Path, cells: list[dict[str, Any]], results: dict[str, Any]) -> Path:
    """Achieved FLOP/s against modelled intensity, under the measured ceilings. One panel per dtype."""
    from matplotlib import pyplot as plt

    ceilings = floors.Ceilings(**results["ceilings"])
    dtypes = [d for d in ceilings.flops_per_us if any(cell["case"]["dtype"] == d for cell in cells)]
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(6.5 * len(dtypes), 4.6), squeeze=False, layout="constrained"
    )
    for axis, dtype in zip(axes.flat, dtypes, strict=True):
        peak = ceilings.flops_per_us[dtype]
        here = [cell for cell in cells if cell["case"]["dtype"] == dtype]
        intensities = []
        for cell in here:
            work = floors.phases(Case(**cell["case"]))
            flops, moved = sum(p.flops for p in work), sum(p.moved_bytes for p in work)
            intensities.append(flops / moved)
            for name, marker in MARKERS.items():
                row = cell["rows"].get(name, {})
                if "median_us" in row:
                    rate = flops / row["median_us"] * 1e6
                    axis.plot(flops / moved, rate, marker, color=COLOURS[name], label=name)
        low, high = min(intensities) / 2, max([*intensities, peak / ceilings.bytes_per_us]) * 2
        roof = [low, peak / ceilings.bytes_per_us, high]
        axis.plot(
            roof, [min(i * ceilings.bytes_per_us, peak) * 1e6 for i in roof], color="black", linewidth=1
        )
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="FLOP / byte of the least traffic",
            ylabel="FLOP/s",
            title=dtype,
        )
        axis.grid(alpha=0.3)
        entries = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        axis.legend(entries.values(), entries.keys(), fontsize=8, frameon=False)
    machine = results["environment"]["machine"]
    figure.suptitle(f"Adapted linear, and the roofline of torch's own copy and product\n{machine}")
    return _save(figure, file)


def _save(figure: Any, file: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file
