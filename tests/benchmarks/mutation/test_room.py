"""A small project in a folder of its own: what its tests notice, and what must be judged afresh."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = {
    "toy/__init__.py": "",
    "toy/sums.py": (
        "START = 1\n\n"
        "def add(a, b):\n    return a + b\n\n"
        "def double(a):\n    return a * 2\n\n"
        "def unused(a):\n    return a - 1\n\n"
        "def apart(a):\n    return a + 5\n\n"
        "def loop(a):\n    while a > 0:\n        a -= 1\n    return a\n"
    ),
    "tests/test_sums.py": (
        "import subprocess\nimport sys\n\nfrom toy import sums\n\n"
        "def test_unwatched():\n    assert sys.gettrace() is None and sums.add(0, 1) == 1\n\n"
        "def test_add():\n    assert sums.add(1, 2) == 3\n\n"
        "def test_double():\n    assert sums.double(2) == 4 + 0 * sums.START\n\n"
        "def test_apart():\n"
        "    code = 'from toy import sums; assert sums.apart(1) == 6'\n"
        "    subprocess.run([sys.executable, '-c', code], check=True)\n\n"
        "def test_loop():\n    assert sums.loop(3) == 0\n"
    ),
}
JUDGE = """
import sys
from pathlib import Path
from benchmarks.mutation import children, lines, room
from benchmarks.mutation.children import Verdict
from benchmarks.mutation.operators import mutants_of
here = Path(sys.argv[1])
for module in (children, lines, room):
    module.ROOT = here
room.SPARE_S = 1
text = (here / "toy/sums.py").read_text()
def work(made):
    for mutant in mutants_of("toy/sums.py", text):
        found = made.judge(mutant, text)
        said = found.status if isinstance(found, Verdict) else "afresh " + str(len(found))
        print("verdict:", mutant.before, "->", mutant.after, "=", said, flush=True)
room.Room(["toy/sums.py"], lambda source: ["tests/test_sums.py"], here, work).enter(["tests/test_sums.py"])
"""


@pytest.mark.slow
def test_a_room_judges_every_mutant_by_the_tests_that_run_it(tmp_path: Path) -> None:
    for name, text in PROJECT.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    command = [sys.executable, "-c", JUDGE, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    lines = [line.removeprefix("verdict: ") for line in done.stdout.splitlines() if "verdict: " in line]
    found = dict(line.rsplit(" = ", 1) for line in lines)
    assert found.pop("START = 1 -> START = 2") == "afresh 5"
    assert found == {
        "return a + b -> return None": "killed",
        "a + b -> a - b": "killed",
        "return a * 2 -> return None": "killed",
        "a * 2 -> a / 2": "killed",
        "a * 2 -> a * 3": "killed",
        "return a - 1 -> return None": "survived",
        "a - 1 -> a + 1": "survived",
        "a - 1 -> a - 2": "survived",
        "return a + 5 -> return None": "killed",
        "a + 5 -> a - 5": "killed",
        "a + 5 -> a + 6": "killed",
        "a > 0 -> a >= 0": "killed",
        "a > 0 -> a > 1": "killed",
        "a -= 1 -> pass": "slow",
        "a -= 1 -> a += 1": "slow",
        "a -= 1 -> a -= 2": "killed",
        "return a -> return None": "killed",
    }
