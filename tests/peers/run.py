"""transformers' own model tests on the tiny models of all families, plain and with experts, side by side.

    python -m tests.peers.run FOLDER

Unpacks into FOLDER the tests that the source archive of the installed transformers holds, and runs
`tests/peers/families.py` beside them in every mode. What passes plain must pass with experts, or be listed in
`EXCEPTIONS` with its reason. Nothing of transformers is kept in this repository.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import transformers

HERE = Path(__file__).resolve().parent
MODES = ("plain", "fixed", "automatic")
# Modules that the tests import and the archive leaves out; their tests are not ours to run.
ABSENT = {
    "exporters/test_export.py": "ExportTesterMixin",
    "generation/test_utils.py": "GenerationTesterMixin",
}

# Test -> why an attached model does not pass it, in every family.
FROZEN = "attach freezes the base, and this expert is frozen too: nothing has a gradient"
EXCEPTIONS = {
    "test_enable_input_require_grads_with_gradient_checkpointing": FROZEN,
    "test_retain_grad_hidden_states_attentions": FROZEN,
    "test_training": FROZEN,
    "test_training_gradient_checkpointing": FROZEN,
    "test_training_gradient_checkpointing_use_reentrant_false": FROZEN,
    "test_training_gradient_checkpointing_use_reentrant_true": FROZEN,
}


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
    """Print what is lost in each mode; 1 if something is lost without a reason, or a reason is stale."""
    parser = argparse.ArgumentParser(prog="tests.peers.run", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="scratch folder")
    parser.add_argument("-k", default="test_", help="only tests whose name matches, as in pytest")
    arguments = parser.parse_args()
    folder = Path(arguments.folder).resolve()
    unpack(folder)
    found = {mode: outcomes(folder, mode, arguments.k) for mode in MODES}
    passed = [name for name, outcome in found["plain"].items() if outcome == "passed"]
    print(f"plain: {len(passed)} of {len(found['plain'])} passed")
    unexplained, used = 0, set()
    for mode in MODES[1:]:
        lost = {name: found[mode].get(name, "not run") for name in passed}
        lost = {name: outcome for name, outcome in lost.items() if outcome != "passed"}
        print(f"{mode}: {len(passed) - len(lost)} of {len(passed)} passed")
        for name, outcome in lost.items():
            reason = EXCEPTIONS.get(name.split("::")[1])
            used.add(name.split("::")[1])
            unexplained += reason is None
            print(f"  {name}: {reason or 'LOST: ' + outcome}")
    stale = EXCEPTIONS.keys() - used if arguments.k == "test_" else set()
    for name in sorted(stale):
        print(f"  {name} is listed and passes")
    return int(bool(unexplained or stale))


if __name__ == "__main__":
    sys.exit(main())
