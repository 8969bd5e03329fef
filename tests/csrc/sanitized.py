"""`make sanitize`: the CPU library under the address and the undefined-behaviour sanitizer.

A copy of `cram_kernels` made of links stands in build/sanitized, with a library that reports the first wrong
access. The kernel tests and thousands of random calls run against it. The exit code is not 0 if anything is
reported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from csrc import build

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build/sanitized"
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g1",
)
TESTS = (
    "test_expert_lora_native.py",
    "test_orthogonality_native.py",
    "test_places.py",
    "test_shared_a.py",
    "test_stacked.py",
    "test_dropout.py",
    "test_centroid_gates.py",
    "test_crossovers.py",
    "test_raw_operations.py",
)
CALLS = 3000
RANDOM_CALLS = """
import sys
from pathlib import Path
import cram_kernels
from tests.fuzz import calls
assert "sanitized" in cram_kernels.__file__, cram_kernels.__file__
calls.prepare(Path())
calls.run(None, range(int(sys.argv[1])), Path()).check()
"""


def link_package(folder: Path) -> Path:
    """Make a package `cram_kernels` whose files are links, without libraries; returns its folder."""
    package = folder / "cram_kernels"
    package.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "cram_kernels").iterdir()):
        link = package / path.name
        if path.suffix not in (".so", ".json") and path.name != "__pycache__" and not link.is_symlink():
            link.symlink_to(path)
    return package


def compile_sanitized(package: Path) -> Path:
    """Compile the CPU library with the sanitizers, unless it is of these sources.

    Raises:
        csrc.build.Unavailable: There is no C++ compiler, or it fails.
    """
    library, known = package / build.LIBRARIES["cpu"], package / "sources"
    if library.is_file() and known.is_file() and known.read_text() == build.digest():
        return library
    usual = build.CXX_FLAGS
    try:
        build.CXX_FLAGS = (*usual, "-O1", *SANITIZERS)
        build.compile_cpu(build.torch_folder(), library)
    finally:
        build.CXX_FLAGS = usual
    known.write_text(build.digest())
    return library


def environment(folder: Path) -> dict[str, str]:
    """Variables under which an interpreter loads the sanitized library."""
    compiler = build.find_compiler()
    found = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    preload = " ".join(done.stdout.strip() for done in found)
    return {
        **os.environ,
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=99",
        "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and run; returns 0 if nothing was reported."""
    words = list(sys.argv[1:] if argv is None else argv)
    calls = words[0] if words else str(CALLS)
    compile_sanitized(link_package(FOLDER))
    run = {"cwd": ROOT, "env": environment(FOLDER), "check": False}
    tests = [f"tests/cram_kernels/{name}" for name in TESTS]
    options = ["-q", "-p", "no:xdist", "-o", f"pythonpath={FOLDER} ."]
    done = [
        subprocess.run([sys.executable, "-c", RANDOM_CALLS, calls], **run),
        subprocess.run([sys.executable, "-m", "pytest", *options, *tests], **run),
    ]
    failed = sum(each.returncode != 0 for each in done)
    print(f"sanitizers: {'nothing reported' if not failed else f'{failed} of {len(done)} runs failed'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
