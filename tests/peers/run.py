"""transformers' own model tests on the tiny models of all families, plain and with experts, side by side.

    python -m tests.peers.run FOLDER

Unpacks into FOLDER the tests that the source archive of the installed transformers holds, and runs
`tests/peers/families.py` beside them in every mode. What passes plain must pass with experts, or be listed in
`EXCEPTIONS` with its reason. Nothing of transformers is kept in this repository.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import transformers

HERE = Path(__file__).resolve().parent
MODES = ("plain", "fixed", "automatic")
# Modules that the tests import and the archive leaves out; their tests are not ours to run.
ABSENT = {
    "exporters/test_export.py": "ExportTesterMixin",
    "generation/test_utils.py": "GenerationTesterMixin",
}

FROZEN = "attach freezes the base, and this expert is frozen too: nothing has a gradient"
PIXELS = "the test keeps the image tokens and drops the pixels, which say how to route: refused"
# (modes, pattern of tests, why an attached model does not pass them), for every family.
EXCEPTIONS = (
    (MODES[1:], r"test_training(_gradient_checkpointing(_use_reentrant_(true|false))?)?", FROZEN),
    (MODES[1:], r"test_retain_grad_hidden_states_attentions", FROZEN),
    (MODES[1:], r"test_enable_input_require_grads_with_gradient_checkpointing", FROZEN),
    (MODES[2:], r"test_eager_matches_sdpa_inference_\w+", PIXELS),
    (MODES[2:], r"test_inputs_embeds", "embeddings alone say no question: refused"),
)


def reason_of(mode: str, test: str) -> str | None:
    """Why a test is not passed in a mode, or None."""
    return next((why for modes, rule, why in EXCEPTIONS if mode in modes and re.fullmatch(rule, test)), None)


def unpack(folder: Path) -> None:
    """Fetch the source archive of the installed version and unpack its tests."""
    if (folder / "tests/test_modeling_common.py").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    wanted = f"transformers=={transformers.__version__}"
    subprocess.run(
        [*pip, "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", wanted, "-d", folder],
        check=True,
    )
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", "parameterized"], check=True)
    (archive,) = folder.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as opened:
        members = [m for m in opened.getmembers() if m.isfile() and "/tests/" in m.name]
        for member in members:
            member.name = member.name.split("/", 1)[1]
        opened.extractall(folder, members, filter="data")
    for name, mixin in ABSENT.items():
        file = folder / "tests" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"class {mixin}:\n    pass\n")
    for part in {file.parent for file in (folder / "tests").rglob("*.py")}:
        (part / "__init__.py").touch()


def outcomes(folder: Path, mode: str, chosen: str) -> dict[str, str]:
    """Test -> "passed", "skipped" or the first line of its failure, in one mode."""
    shutil.copy(HERE / "families.py", folder / "test_families.py")
    report = folder / f"{mode}.xml"
    report.unlink(missing_ok=True)
    root = HERE.parents[1]
    paths = os.pathsep.join(map(str, (folder, folder / "site", root)))
    factories = root / "tests/cram/factories.py"
    environment = {**os.environ, "PEER_MODE": mode, "PEER_FACTORIES": str(factories), "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--tb=line"]
    command += [f"--rootdir={folder}", f"--junitxml={report}", "-k", chosen, "test_families.py"]
    subprocess.run(command, cwd=folder, env=environment, check=False, stdout=subprocess.DEVNULL)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}"
        fault = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        if fault is None:
            found[name] = "passed"
        else:
            told = " ".join((fault.get("message") or "").split())
            found[name] = "skipped" if fault.tag == "skipped" else told[:300] or fault.tag
    return found


def main() -> int:
    """Print what is lost in each mode; 1 if something is lost without a reason, or listed and passes."""
    parser = argparse.ArgumentParser(prog="tests.peers.run", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="scratch folder")
    parser.add_argument("-k", default="test_", help="only tests whose name matches, as in pytest")
    arguments = parser.parse_args()
    folder = Path(arguments.folder).resolve()
    unpack(folder)
    found = {mode: outcomes(folder, mode, arguments.k) for mode in MODES}
    passed = [name for name, outcome in found["plain"].items() if outcome == "passed"]
    print(f"plain: {len(passed)} of {len(found['plain'])} passed")
    unexplained = 0
    for mode in MODES[1:]:
        outcome = found[mode]
        lost = [name for name in passed if outcome.get(name) != "passed"]
        reasons = {name: reason_of(mode, name.split("::")[1]) for name in passed}
        print(f"{mode}: {len(passed) - len(lost)} of {len(passed)} passed")
        for reason, count in Counter(reasons[name] for name in lost if reasons[name]).items():
            print(f"  {count} lost: {reason}")
        for name in (name for name in lost if reasons[name] is None):
            print(f"  LOST {name}: {outcome.get(name, 'not run')}")
            unexplained += 1
        for name in (name for name in passed if reasons[name] and name not in lost):
            print(f"  {name} passes and is listed")
            unexplained += 1
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
