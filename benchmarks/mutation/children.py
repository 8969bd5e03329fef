"""One mutant in a process of its own, forked from one that has imported everything slow."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import math
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).resolve().parents[2]
# Imported once, before the first child; nothing of this repository is among them.
SLOW = (
    *("torch._dynamo", "transformers", "peft", "pytest", "hypothesis", "safetensors.torch"),
    *("PIL.Image", "yaml", "tokenizers", "transformers.models.clip.image_processing_pil_clip"),
    *(
        f"transformers.models.{name}.modeling_{name}"
        for name in ("clip", "llava", "qwen2_5_vl", "qwen3_vl", "internvl")
    ),
)
# Beside its processor time a child may wait so many times as long for other processes. Its waits for a
# processor do not count.
PATIENCE = 20
# pytest's exit codes.
PASSED, FAILED = 0, 1
PYTEST_WORDS = (
    *("-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", "-rfE"),
    # Plugins are among what the parent has imported.
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
)


@dataclass(frozen=True)
class Verdict:
    """How the tests of a mutant ended.

    Attributes:
        status: "survived", "killed" (a test failed), "broken" (the module does not even load, or the process
            dies), "slow" (over the limit) or "undecided" (it waited for too long).
        seconds: Processor time of the tests.
        said: The first failed test, if there is one.
        code: Exit code of the process, or minus the signal that ended it.
    """

    status: str
    seconds: float
    said: str
    code: int = 0

    @property
    def noticed(self) -> bool:
        """Whether the tests tell the mutant from the source."""
        return self.status != "survived"


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module under its own path from another text, which a traceback shows."""

    def __init__(self, name: str, path: str, changed: Path) -> None:
        super().__init__(name, path)
        self.changed = changed

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.changed.read_text(encoding="utf-8"), str(self.changed), "exec")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, source: Path, changed: Path) -> None:
        self.name, self.source, self.changed = name, source, changed

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        loader = _Loader(fullname, str(self.source), self.changed)
        search = [str(self.source.parent)] if self.source.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            fullname, self.source, loader=loader, submodule_search_locations=search
        )


def prepare() -> None:
    """Import what every child needs."""
    import torch

    # Triton decides at import, as tests/conftest.py says.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in SLOW:
        importlib.import_module(name)
    sys.dont_write_bytecode = True
    hypothesis = sys.modules["hypothesis"]
    # A failed example is enough; the same examples for every mutant.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", phases=phases, derandomize=True, database=None)
    hypothesis.settings.load_profile("mutants")


def module_name(source: str) -> str:
    """The dotted name of a source file."""
    return source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def hand_on(source: str, changed: Path, scratch: Path) -> None:
    """Let the Python processes that this one starts import a changed source.

    Args:
        source: Path of the source below the repository.
        changed: File with its changed text.
        scratch: An existing folder for what those processes run first.
    """
    site = scratch / "site"
    site.mkdir(exist_ok=True)
    lines = (
        "import sys",
        f"sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})",
        "from benchmarks.mutation import children",
        "sys.path.pop(0)",
        f"children.replace({module_name(source)!r}, {str(ROOT / source)!r}, {str(changed)!r})",
    )
    (site / "sitecustomize.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])


def replace(name: str, source: str, changed: str) -> None:
    """Import a module from another file than its source, in this process."""
    sys.meta_path.insert(0, _Finder(name, Path(source), Path(changed)))


def judge(source: str, text: str, tests: Sequence[str], limit_s: float, scratch: Path) -> Verdict:
    """Run tests in a process that imports a changed source.

    Args:
        source: Path of the source below the repository.
        text: Its changed text.
        tests: Names of tests; they run in this order until one test fails.
        limit_s: Tests that take more processor time have noticed something.
        scratch: An existing folder for the changed text and the tests' output.
    """
    changed = scratch / Path(source).name
    changed.write_text(text, encoding="utf-8")

    def work() -> int:
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        replace(module_name(source), str(ROOT / source), str(changed))
        hand_on(source, changed, scratch)
        import pytest

        return int(pytest.main([*PYTEST_WORDS, f"--basetemp={scratch / 'tmp'}", *tests]))

    return fork(work, limit_s, scratch / "log")


def fork(work: Callable[[], int], limit_s: float, log: Path) -> Verdict:
    """Run `work` in a fork of this process.

    Args:
        work: Returns the exit code.
        limit_s: Processor time that it may take.
        log: File for what it prints.
    """
    child = os.fork()
    if not child:
        _be_child(work, limit_s, log)
    status, seconds = _wait(child, PATIENCE * limit_s)
    output = log.read_text(encoding="utf-8", errors="replace").strip()
    failed = [line for line in output.splitlines() if re.match(".?(FAILED|ERROR) ", line)]
    said = (failed or output.splitlines()[-1:] or [""])[0][:200]
    ended = {-signal.SIGXCPU: "slow", -signal.SIGKILL: "undecided"}
    if status in ended:
        return Verdict(ended[status], seconds, "", status)
    kind = {PASSED: "survived", FAILED: "killed"}.get(status, "broken")
    return Verdict(kind, seconds, "" if kind == "survived" else said, status)


def _be_child(work: Callable[[], int], limit_s: float, log: Path) -> None:
    """Do the work and end the process."""
    code = 2
    try:
        os.setsid()
        # A fork begins with no processor time used.
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit_s), math.ceil(limit_s) + 5))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = work()
    finally:
        if (error := sys.exception()) is not None:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, patience_s: float) -> tuple[int, float]:
    """A child's exit code, or minus the signal that ended it, and its processor time."""
    start = time.monotonic()
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        if time.monotonic() - start - _queued(child) > patience_s:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.05)


def _queued(child: int) -> float:
    """Seconds in which a process was ready to run and no processor was free."""
    file = Path(f"/proc/{child}/schedstat")
    return int(file.read_text(encoding="utf-8").split()[1]) / 1e9 if file.is_file() else 0.0
