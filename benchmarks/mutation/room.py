"""One process that has imported the sources and their tests; every mutant is judged in a fork of it."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import FunctionType

import pytest

from benchmarks.mutation import children, patches
from benchmarks.mutation.children import ROOT, Verdict
from benchmarks.mutation.lines import Recorder, Test, file_digest, keep, kept
from benchmarks.mutation.operators import Mutant, mutate

# A mutant's tests may take so much longer than those of its source, and some seconds beside that.
FACTOR, SPARE_S = 3, 5
# Beside its own tests a mutant meets those of other files for at most so many seconds.
OTHERS_S = 20


@dataclass
class Room:
    """The collected tests of some sources, as a plugin of pytest.

    Attributes:
        sources: Paths of all sources below the repository; each is imported.
        tests_of: The test files of a source.
        scratch: An existing folder for the lines that tests run, and for what tests print.
        work: Called once when everything is collected.
        known: What each test of a file runs.
        items: pytest's tests by name.
        imported: Functions of each source that ran while everything was imported.
        functions: Functions by the file of their code.
        digests: Of the sources and the test files, before they were imported.
        failed: Name of the last test that failed.
    """

    sources: Sequence[str]
    tests_of: Callable[[str], Sequence[str]]
    scratch: Path
    work: Callable[[Room], None]
    known: dict[str, list[Test]] = field(default_factory=dict)
    items: dict[str, pytest.Item] = field(default_factory=dict)
    imported: dict[str, set[str]] = field(default_factory=dict)
    functions: dict[str, list[FunctionType]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    failed: str = ""

    def enter(self, files: Sequence[str]) -> None:
        """Import the sources, collect the tests of some files, and do the work.

        Raises:
            RuntimeError: A file cannot be collected.
        """
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        self.digests = {path: file_digest(path) for path in (*self.sources, *files)}
        with Recorder(self.sources).recording() as seen:
            self.imported = seen.functions
            for source in self.sources:
                importlib.import_module(children.module_name(source))
            words = [*children.PYTEST_WORDS, "--capture=no", f"--basetemp={self.scratch / 'tmp'}", *files]
            pytest.main(words, plugins=[self])
        if not self.items:
            raise RuntimeError("tests must be collected without errors; pytest says above what is wrong")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Do the work in the place of pytest's own loop."""
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        if not session.testsfailed:
            self.items = {item.nodeid: item for item in session.items}
            self.functions = patches.functions()
            # What is shared with the forks stays where it is.
            gc.freeze()
            self.work(self)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember a failed test."""
        if report.failed:
            self.failed = report.nodeid
            print(f"FAILED {report.nodeid}", flush=True)

    def learn(self, file: str) -> list[Test]:
        """What each test of a file runs of the sources, quick ones first; measured in a fork unless known.

        Raises:
            RuntimeError: A test of the file fails.
        """
        if file not in self.known:
            folder = self.scratch / "lines"
            users = [source for source in self.sources if file in self.tests_of(source)]
            # Of what is imported here, whatever the files have become since.
            digests = {path: self.digests[path] for path in (file, *users)}
            found = kept(folder, file, digests)
            if found is None:
                verdict = self._fork(lambda: self._measure(folder, file), 600)
                found = kept(folder, file, digests)
                if verdict.noticed or found is None:
                    raise RuntimeError(f"{file} must pass on the sources themselves, got {verdict}")
            self.known[file] = sorted(found, key=lambda each: each.seconds)
        return self.known[file]

    def judge(self, mutant: Mutant, text: str) -> Verdict | list[Test]:
        """The verdict of the tests on a mutant.

        Args:
            mutant: The change.
            text: The unchanged text of its source.

        Returns:
            The verdict; or the tests that must judge the mutant in a process of their own, because the change
            acts while modules are imported.
        """
        tests = [each for file in self.tests_of(mutant.source) for each in self.learn(file)]
        path = str(ROOT / mutant.source)
        codes = patches.changed_functions(path, text, mutate(text, mutant.index))
        ran = self.imported.get(mutant.source, set())
        if codes is None or any(name in ran for name, _ in codes):
            return tests
        places = patches.places(self.functions.get(path, []), codes)
        if not places:
            return tests
        running = [each for each in tests if each.runs(mutant.source, mutant.span)]
        # A fixture of a module, or a cache, runs a line in the first of its tests alone.
        rest = [each for each in tests if each not in running]
        seconds = 0.0
        for judges in (running, rest, self._others(mutant)):
            verdict = self._fork(partial(self._pass_with, mutant, text, places, judges), time_limit(judges))
            seconds += verdict.seconds
            if verdict.noticed:
                break
        return replace(verdict, seconds=seconds)

    def _others(self, mutant: Mutant) -> list[Test]:
        """Tests of other files that were measured, quick ones first, as many as fit the time."""
        own = self.tests_of(mutant.source)
        tests = [each for file, tests in self.known.items() if file not in own for each in tests]
        tests = [each for each in tests if each.runs(mutant.source, mutant.span)]
        tests.sort(key=lambda each: each.seconds)
        sums = accumulate(each.seconds for each in tests)
        return [each for each, total in zip(tests, sums, strict=True) if total <= OTHERS_S]

    def _fork(self, work: Callable[[], bool], limit_s: float) -> Verdict:
        """Run `work` in a fork; True means that nothing was noticed."""
        log = self.scratch / "log"
        verdict = children.fork(lambda: children.PASSED if work() else children.FAILED, limit_s, log)
        if verdict.status == "broken" and verdict.code > 0:
            raise RuntimeError(
                f"a fork must end with the tests' result, got: {log.read_text(encoding='utf-8')}"
            )
        return verdict

    def _measure(self, folder: Path, file: str) -> bool:
        recorder, tests = Recorder(self.sources), []
        items = [item for name, item in self.items.items() if name.split("::")[0] == file]
        for item, after in _with_next(items):
            start = time.process_time()
            with recorder.recording() as seen:
                passed = self._run(item, after)
            lines = {source: sorted(found) for source, found in seen.lines.items()}
            tests.append(Test(item.nodeid, time.process_time() - start, lines))
            # A test of memory counts what the recorder holds.
            if not passed and not self._run(item, after):
                return False
        keep(folder, file, self.digests, tests)
        return True

    def _pass_with(self, mutant: Mutant, text: str, places: patches.Places, tests: Sequence[Test]) -> bool:
        """Whether tests pass with new code of some functions, in the processes that they start as well."""
        changed = self.scratch / Path(mutant.source).name
        changed.write_text(mutate(text, mutant.index), encoding="utf-8")
        children.hand_on(mutant.source, changed, self.scratch)
        for function, code in places:
            function.__code__ = code
        items = [self.items[each.name] for each in tests]
        return all(self._run(item, after) for item, after in _with_next(items))

    def _run(self, item: pytest.Item, after: pytest.Item | None) -> bool:
        self.failed = ""
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        return not self.failed


def _with_next(items: Sequence[pytest.Item]) -> Iterator[tuple[pytest.Item, pytest.Item | None]]:
    """Each test with the one after it, for which pytest keeps the fixtures that both use."""
    return zip(items, [*items[1:], None], strict=False)


def time_limit(tests: Sequence[Test]) -> float:
    """Seconds of processor time that a mutant's tests may take."""
    return FACTOR * sum(each.seconds for each in tests) + SPARE_S
