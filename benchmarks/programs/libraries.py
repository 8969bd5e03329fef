"""Sees to the native libraries: those that are missing, old or do not load are built; says what is left.

A library that came from another machine may need other system libraries than this one has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence

from benchmarks import kit, machine
from csrc import build

# A process of its own: what a library was found to be stays so within a process.
_QUESTION = "import json; from cram_kernels import native_libraries; print(json.dumps(native_libraries()))"


def reasons() -> dict[str, str]:
    """Return the libraries that this torch could use and that do not serve, each with the reason."""
    command = [sys.executable, "-c", _QUESTION]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    report = kit.LIBRARIES / build.REPORT
    old = report.is_file() and json.loads(report.read_text())["sources"] != build.digest()
    wanted = build.wanted(build.torch_folder())
    said = {name: found[name] or "it is older than its sources" for name in found if found[name] or old}
    return {name: reason for name, reason in said.items() if name in wanted}


def main(argv: Sequence[str] | None = None) -> int:
    """Build where something is amiss; returns 1 if a library that torch could use is missing in the end."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks libraries", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="build nothing")
    check = parser.parse_args(argv).check
    missing = reasons()
    if missing and not check:
        for name, reason in missing.items():
            print(f"to be built: {build.LIBRARIES[name]}: {reason}", flush=True)
        build.main()
        missing = reasons()
    for name in sorted(build.wanted(build.torch_folder())):
        print(f"{build.LIBRARIES[name]}: {missing.get(name, 'loads')}", flush=True)
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())
