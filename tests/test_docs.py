"""What the documents promise: commands parse, code runs, tables agree with the sources."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    p for p in (*ROOT.glob("*.md"), *ROOT.glob("c*/**/*.md"), *ROOT.glob("benchmarks/*.md")) if p.is_file()
)
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language in a Markdown text."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Every command of a text's shell blocks, comments cut off and continued lines joined."""
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    return [stripped for line in lines if (stripped := line.split("  #")[0].strip())]


def check_make(arguments: list[str]) -> None:
    """The targets exist."""
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def check_cram(arguments: list[str]) -> None:
    """The command line accepts the arguments."""
    from cram.cli import parser_for

    parser_for(arguments).parse_args(arguments)


def check_pip(arguments: list[str]) -> None:
    """Only torch and this package, with extras that exist, are installed."""
    assert arguments[0] == "install", arguments
    for requirement in (a for a in arguments[1:] if not a.startswith("-")):
        match = re.fullmatch(r"torch==[\d.]+|(?:\.|cram-mcit)(?:\[([a-z,]+)\])?", requirement)
        assert match, requirement
        assert set((match.group(1) or "dev").split(",")) <= set(EXTRAS), requirement


def check_pytest(arguments: list[str]) -> None:
    """Paths and markers exist."""
    markers = {m.split(":")[0] for m in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    flags = dict(zip(arguments, arguments[1:], strict=False))
    assert flags.get("-m", "slow") in markers, arguments
    paths = [a for a in arguments if a.startswith("tests")]
    assert all((ROOT / p).exists() for p in paths), arguments


def check_python(arguments: list[str]) -> None:
    """A program of the benchmarks accepts the arguments; an environment stands where the Makefile has it."""
    if arguments[:2] == ["-m", "benchmarks"]:
        command = [sys.executable, *arguments, "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        words = re.split(r"[\s\[\],]+", done.stdout)
        assert set(arguments) <= set(words), arguments
        return
    assert arguments == ["-m", "venv", ".venv"], arguments


CHECKS = {
    "make": check_make,
    "cram": check_cram,
    "pip": check_pip,
    "pytest": check_pytest,
    "python3": check_python,
}


def check_command(command: str) -> None:
    """Dispatches one documented command to its check; an unknown program is a failure."""
    program, *arguments = shlex.split(command)
    CHECKS[program.removeprefix(".venv/bin/")](arguments)


COMMANDS = [(path.relative_to(ROOT).as_posix(), c) for path in DOCUMENTS for c in commands(path.read_text())]


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=[f"{d}: {c}" for d, c in COMMANDS])
def test_documented_command_is_accepted(document: str, command: str) -> None:
    check_command(command)


@pytest.mark.parametrize(
    "command",
    [
        "make no-such-target",
        "cram train --no-such-option",
        "cram no-such-command",
        "pip install -e '.[no-such-extra]'",
        "pip install torchvision",
        "pytest -m no-such-marker",
        "pytest tests/no_such_folder",
        "python3 -m venv elsewhere",
        "python3 -m benchmarks no-such-program",
        "python3 -m benchmarks gpu --no-such-option",
        "no-such-program",
    ],
)
def test_command_check_can_fail(command: str) -> None:
    with pytest.raises((AssertionError, SystemExit, KeyError)):
        check_command(command)


def test_readme_opens_with_the_two_commands() -> None:
    assert commands(README)[:2] == ["make demo", "make test"]
    assert README.index("make demo") < README.index("**Before**") < README.index("**After**")


@pytest.fixture
def tiny_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder where `base_folder()` is a tiny random model and the built-in stream is short."""
    import cram.base
    import cram.compare.comparison
    import cram.loading
    import cram.streams
    from cram.streams import builtin
    from tests.cram.factories import save_all

    save_all(tmp_path / "base")
    for module in (cram.base, cram.loading):
        monkeypatch.setattr(module, "base_folder", lambda: tmp_path / "base")
    stream = builtin.build(train_samples=32, test_samples=2)
    monkeypatch.setattr(cram.streams, "load_stream", lambda name: stream if name == "builtin" else None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_code_runs(tiny_base: Path) -> None:
    before, after = blocks(README, "python")
    scope: dict[str, Any] = {}
    exec(compile(before, "README before", "exec"), scope)
    adapted = [name for name, _ in scope["model"].named_modules() if name.endswith("lora_A")]
    assert len(adapted) == 8, adapted
    scope = {}
    exec(compile(after, "README after", "exec"), scope)
    assert [len(row) for row in scope["report"]["methods"]["cram"]["matrix"]] == [1, 2, 3, 4, 5, 6]
    assert (tiny_base / "runs/bundle/manifest.json").is_file()


def test_demo_of_the_makefile_runs_and_writes_the_page_that_the_readme_names(tiny_base: Path) -> None:
    from cram.cli import main

    planned = subprocess.run(
        ["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (command,) = [line for line in planned.splitlines() if line.startswith(".venv/bin/cram ")]
    assert main([*shlex.split(command)[1:], "--quick"]) == 0
    page = re.search(r"make demo +# .* writes (\S+)", README)
    assert page and (tiny_base / page.group(1)).is_file()


def test_readme_results_name_their_command() -> None:
    assert README.count("<!-- results:begin -->") == README.count("<!-- results:end -->") == 1
    results = README.split("<!-- results:begin -->")[1].split("<!-- results:end -->")[0]
    figures = re.search(r"\|\s*-?\d", results)
    assert not figures or re.search(r"`(make|cram) \w+", results), (
        "figures without the command that measures them"
    )


def test_ci_runs_the_documented_checks() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    lines = script.read_text().splitlines()
    assert "make test" in lines and any(line.startswith("set -e") for line in lines)


def test_readme_versions_are_those_of_the_package() -> None:
    project = PROJECT["project"]
    declared = {"python": project["requires-python"]}
    for requirement in [*project["dependencies"], *EXTRAS["hf"]]:
        name, specifier = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()  # type: ignore[union-attr]
        declared[name] = specifier
    section = README.split("## Versions")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\w+) \| ([<>=\d.,]+) \|$", section, re.MULTILINE)
    assert {name for name, _ in rows} >= {"python", "torch", "transformers", "peft"}
    assert {name: declared[name] for name, _ in rows} == dict(rows)


def test_readme_names_every_extra() -> None:
    named = re.search(r"^Extras: (.*?)\n\n", README, re.MULTILINE | re.DOTALL)
    assert named and set(re.findall(r"`(\w+)`", named.group(1))) == set(EXTRAS)


def test_linked_and_mapped_files_exist() -> None:
    for document in DOCUMENTS:
        text = document.read_text()
        targets = re.findall(r"\]\(([^)#:]+)\)", text)
        assert all((document.parent / t).exists() for t in targets), (document, targets)
    folder = ""
    for name in re.findall(r"`([\w./]+(?:/|\.py))`", README.split("## Map of the code")[1].split("\n## ")[0]):
        folder = name.split("/")[0] if "/" in name and (ROOT / name.split("/")[0]).is_dir() else folder
        assert (ROOT / name).exists() or (ROOT / folder / name).exists(), name


def test_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    packages = ("cram", "cram_kernels")
    for package in packages:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    # The build hook without its sources: tests/csrc has the wheel with the libraries.
    (tmp_path / "csrc").mkdir()
    shutil.copy(ROOT / "csrc" / "build.py", tmp_path / "csrc")
    command = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    shipped = {n for n in zipfile.ZipFile(wheel).namelist() if n.split("/")[0] in packages}
    present = {
        p.relative_to(ROOT).as_posix() for name in packages for p in (ROOT / name).rglob("*") if p.is_file()
    }
    built = "cram_kernels/native.json"
    present = {p for p in present if "__pycache__" not in p and not p.endswith((".so", built))}
    assert shipped - {built} == present, shipped ^ present
