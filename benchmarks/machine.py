"""The conditions of the figures: machine, versions, commit, and the machine's two measured ceilings."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import DTYPES
from benchmarks.floors import Ceilings
from benchmarks.timing import Limits, Sampler, interleaved

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "peft", "transformers", "numpy")
_CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,driver_version"
_FALLBACK_CACHE = 32 * 2**20


def environment(device: torch.device) -> dict[str, Any]:
    """Return everything recorded beside the figures. Clocks are read, never set."""
    found: dict[str, Any] = {
        "machine": machine_name(device),
        "device": device.type,
        "cpu": cpu_model(),
        "family": cpu_family(),
        "instructions": instructions(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "commit": commit(),
        "cache_bytes": cache_bytes(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "capability": list(torch.cuda.get_device_capability(device)),
            "processors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            **_clocks(),
        }
    return found


def results_folder() -> Path:
    """Return where results go: $OUT if it is set, else benchmarks/results."""
    return Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")


def load() -> float:
    """Return the mean number of processes that wanted a core over the last minute, this process included."""
    return round(os.getloadavg()[0], 2)


def machine_name(device: torch.device) -> str:
    """Return the name of this machine's results: the GPU, or the CPU with family, instructions and threads,
    and torch's version."""
    release = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower().removeprefix("nvidia ")
    else:
        name = f"{cpu_model()} {cpu_family()} {instructions()} {torch.get_num_threads()} threads".lower()
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") + f"-torch{release}"


def cpu_model() -> str:
    """Return the processor's name, without marks and speed."""
    name = cpu_field("model name")
    return re.sub(r"\((?:R|TM)\)|@.*", "", name).strip() if name else platform.processor() or "cpu"


def cpu_family() -> str:
    """Return family and model of the processor as its maker numbers them, or "" where Linux does not tell.

    Hypervisors give many processors one name; the numbers tell them apart.
    """
    family, model = cpu_field("cpu family"), cpu_field("model")
    return f"{family}.{model}" if family and model else ""


def instructions() -> str:
    """Return the widest instruction set: AMX, or what torch says."""
    flags = (cpu_field("flags") or "").split()
    return "AMX" if "amx_bf16" in flags else str(torch.backends.cpu.get_cpu_capability())


def cpu_field(name: str) -> str | None:
    """Return a field of the first processor, or None where the system does not tell."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.is_file() else ""
    found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def commit() -> str:
    """Return the checkout's commit, with "+" if files differ from it, or "unknown"."""
    run = {"cwd": ROOT, "capture_output": True, "text": True, "check": False}
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run)
        changed = subprocess.run(["git", "status", "--porcelain"], **run)
    except OSError:
        return "unknown"
    return (
        head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else "unknown"
    )


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last cache before memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [
        file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max(
        (int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=_FALLBACK_CACHE
    )


def ceilings(device: torch.device, small: bool = False) -> Ceilings:
    """Measure copy bandwidth and matmul rate on random data: the 10th percentile of the times.

    If a CPU has no fast bfloat16 product, the rate of float32 stands in, because widening can reach that
    rate.
    """
    cuda = device.type == "cuda"
    elements = 2**16 if small else 2**30 if cuda else 2**25
    side = 128 if small else 8192 if cuda else 1536
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    runs = {"copy": lambda: target.copy_(source)}
    widened = not cuda and not fast_halves()
    for name in DTYPES if cuda else ("float32",) if widened else ("float32", "bfloat16"):
        left, right = (torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(2))
        runs[name] = lambda a=left, b=right: a @ b
    for run in runs.values():
        run()
    samplers = {name: Sampler(run, 1, "eager") for name, run in runs.items()}
    found = interleaved(samplers, device, Limits(0.3, 3, 20))
    flops = {name: 2 * side**3 / found[name].low_us for name in DTYPES if name in found}
    if widened:
        flops["bfloat16"] = flops["float32"]
    return Ceilings(8 * elements / found["copy"].low_us, flops)


def fast_halves() -> bool:
    """Return True if torch multiplies bfloat16 at full speed on this CPU."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _clocks() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(zip(_CLOCKS.split(","), (value.strip() for value in found.split(",")), strict=False))


def package_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
