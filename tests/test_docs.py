"""What the documents promise: commands parse, code runs, links lead somewhere, tables match the sources."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("docs", "cram", "cram_kernels", "csrc", "benchmarks")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(p for folder in FOLDERS for p in ROOT.glob(f"{folder}/**/*.md"))])
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


def quoted_commands(text: str) -> list[str]:
    """Every command with a word behind it that stands in backquotes within a sentence or a table."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", prose)
    return [span for span in dict.fromkeys(spans) if re.match(r"(make|cram|pip|pytest|python -m) \w", span)]


def check_make(arguments: list[str]) -> None:
    """The targets exist."""
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def check_cram(arguments: list[str]) -> None:
    """The command line accepts the arguments."""
    from cram.cli import COMMANDS as KNOWN
    from cram.cli import parser_for

    if len(arguments) > 1 or arguments[0] not in KNOWN:
        parser_for(arguments).parse_args(arguments)


# Modules that documents run; each has a function `main` and options.
MODULES = (
    "benchmarks",
    "cram.base.pretrain",
    "cram.serve.vllm.front.proxy",
    "cram.streams.real.collect",
    "cram.streams.real.show",
    "tests.cram_kernels.aot",
    "tests.cram_kernels.host",
)


def check_module(arguments: list[str]) -> None:
    """The module has every option that is given to it."""
    option, module, *rest = arguments
    assert option == "-m" and module in MODULES, arguments
    words = rest[:1] if rest and not rest[0].startswith("-") else []
    program = importlib.import_module(f"{module}.__main__" if module == "benchmarks" else module)
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [module, *words, "--help"])
        program.main()
    assert " ".join([module, *words]) in shown.getvalue(), arguments
    known = re.findall(r"--[a-z-]+", shown.getvalue())
    assert {word for word in rest if word.startswith("--")} <= set(known), arguments


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


def check_python3(arguments: list[str]) -> None:
    """An environment is made in the folder that the Makefile uses, or a module has the options."""
    if arguments[:2] != ["-m", "venv"]:
        check_module(arguments)
        return
    assert arguments == ["-m", "venv", ".venv"], arguments


def check_torchrun(arguments: list[str]) -> None:
    """One machine's processes run the command."""
    option, processes, module, name, *rest = arguments
    assert (option, module, name) == ("--nproc-per-node", "-m", "cram") and processes.isdigit(), arguments
    check_cram(rest)


def check_curl(arguments: list[str]) -> None:
    """The server has the route and understands the body."""
    pytest.importorskip("starlette", reason="the server needs the extra `serve`")
    from cram.serve.http.fields import checked_fields, named_mixture, sampling

    url, option, header, data, body = arguments
    assert url == "http://127.0.0.1:8000/v1/chat/completions", arguments
    assert (option, header, data) == ("-H", "Content-Type: application/json", "-d"), arguments
    given = checked_fields(json.loads(body))
    assert given["messages"] and sampling(given)
    named_mixture(given["model"], given.get("lora"))


CHECKS = {
    "torchrun": check_torchrun,
    "curl": check_curl,
    "make": check_make,
    "cram": check_cram,
    "pip": check_pip,
    "pytest": check_pytest,
    "python": check_module,
    "python3": check_python3,
}


def check_command(command: str) -> None:
    """Dispatches one documented command to its check; an unknown program is a failure."""
    program, *arguments = shlex.split(command)
    CHECKS[program.removeprefix(".venv/bin/")](arguments)


COMMANDS = [
    (path.relative_to(ROOT).as_posix(), command)
    for path, text in ((path, path.read_text()) for path in DOCUMENTS)
    for command in dict.fromkeys([*commands(text), *quoted_commands(text)])
]


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
        "torchrun --nproc-per-node 8 -m cram train --no-such-option",
        "python -m no.such.module",
        "python -m benchmarks no-such-program",
        "python -m benchmarks --no-such-option",
        "curl http://127.0.0.1:8000/nowhere -H 'Content-Type: application/json' -d '{}'",
        "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{}'",
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
    import cram.commands
    import cram.compare.comparison
    import cram.loading
    import cram.streams
    from cram.streams import builtin
    from tests.cram.factories import save_all

    save_all(tmp_path / "base")
    # The tiny processor has no chat template of its own; the shipped base has this one.
    shutil.copy(ROOT / "cram/base/assets/llava/chat_template.jinja", tmp_path / "base/llava")
    for module in (cram.base, cram.loading):
        monkeypatch.setattr(module, "base_folder", lambda: tmp_path / "base")
    stream = builtin.build(train_samples=32, test_samples=2)
    # A command that is first imported below this would keep the short stream.
    for found in pkgutil.walk_packages(cram.commands.__path__, "cram.commands."):
        importlib.import_module(found.name)
    monkeypatch.setattr(cram.streams, "load_stream", lambda name: stream if name == "builtin" else None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_code_runs(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after, answer, plain = blocks(README, "python")
    scope: dict[str, Any] = {}
    exec(compile(before, "README before", "exec"), scope)
    adapted = [name for name, _ in scope["model"].named_modules() if name.endswith("lora_A")]
    assert len(adapted) == 8, adapted
    scope = {}
    exec(compile(after, "README after", "exec"), scope)
    assert [len(row) for row in scope["report"]["methods"]["cram"]["matrix"]] == [1, 2, 3, 4, 5, 6]
    assert (tiny_base / "runs/bundle/manifest.json").is_file()
    scope = {}
    capsys.readouterr()
    exec(compile(answer, "README answer", "exec"), scope)
    assert "{'" in capsys.readouterr().out.splitlines()[-1]
    exec(compile(plain, "README generate", "exec"), scope)
    assert capsys.readouterr().out.endswith(f"{scope['model'].cram.state.route.gates}\n")


def test_readme_contexts_exist_and_name_a_task_of_the_builtin_stream() -> None:
    from cram.model.attached import AttachedModel
    from cram.streams.builtin import build

    named = re.findall(r"`with model\.cram\.(\w+)\((?:\"(\w+)\")?\):`", README)
    assert [name for name, _ in named] == ["forced", "disabled"]
    assert all(hasattr(AttachedModel, name) for name, _ in named)
    assert named[0][1] in {task.name for task in build(train_samples=1, test_samples=1).tasks}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_compile(document: Path) -> None:
    for number, code in enumerate(blocks(document.read_text(), "python")):
        compile(code, f"{document.name}, block {number}", "exec")


def write_pictures(folder: Path) -> None:
    """The picture that every row of the documents names."""
    from PIL import Image

    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "rose.png")


def test_own_data_of_the_readme_loads(tmp_path: Path) -> None:
    from cram.streams import load_stream

    (described,), (rows,) = blocks(README, "yaml"), blocks(README, "json")
    write_pictures(tmp_path / "pictures")
    (tmp_path / "garden.yaml").write_text(described)
    for name in re.findall(r"[\w-]+\.json", described):
        (tmp_path / name).write_text(rows)
    stream = load_stream(tmp_path / "garden.yaml")
    assert [(len(task.train), len(task.test)) for task in stream.tasks] == [(1, 1), (1, 1)]


DATA = (ROOT / "docs/data.md").read_text()


def test_layouts_of_the_data_page_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cram.streams import load_stream

    (described,), layouts = blocks(DATA, "yaml"), blocks(DATA, "json")
    root = tmp_path / "root"
    write_pictures(root / "pictures")
    write_pictures(root / "photographs")
    names = ("colour-test", "colour-train", "describe-test", "describe-train")
    for name, layout in zip(names, layouts, strict=True):
        (root / f"{name}.json").write_text(layout)
    captions = {
        "images": [{"id": 1, "file_name": "rose.png"}],
        "annotations": [{"image_id": 1, "caption": "a red flower"}],
    }
    (root / "describe-captions.json").write_text(json.dumps(captions))
    (tmp_path / "garden.yaml").write_text(described)
    monkeypatch.setenv("GARDEN", str(root))
    colour, describe = load_stream(tmp_path / "garden.yaml").tasks
    assert {task.train[0].instruction for task in (colour, describe)} == {"What colour is the flower?"}
    assert describe.test[0].accepted == ("a red flower",)


def test_python_stream_of_the_data_page_is_built() -> None:
    scope: dict[str, Any] = {}
    (code,) = blocks(DATA, "python")
    exec(compile(code, "data page", "exec"), scope)
    assert [task.name for task in scope["stream"].tasks] == ["colour"]


def test_data_page_names_every_key_and_scorer() -> None:
    from cram.scoring.published import RULES
    from cram.scoring.scorers import SCORERS
    from cram.streams.registry import STREAM_KEYS, TASK_KEYS

    tables = " ".join(line for line in DATA.splitlines() if line.startswith("| `"))
    assert all(f"`{key}`" in tables for key in [*STREAM_KEYS, *TASK_KEYS])
    published = set(RULES) | {name for name in SCORERS if name.startswith(("prism_", "mcitlib_"))}
    listed = re.findall(r"^\| `(\w+)` \|", DATA.split("## Scorers")[1], re.MULTILINE)
    assert set(listed) == set(SCORERS) - published
    assert all(name.startswith(("prism_", "mcitlib_")) for name in published)


def test_glossary_holds_its_twelve_words() -> None:
    text = (ROOT / "docs/glossary.md").read_text()
    words = ["buffer", "bundle", "centroid", "expert", "gate", "group"]
    words += ["pack", "query", "run", "segment", "stream", "task"]
    assert sorted(re.findall(r"^\| \*\*(\w+)\*\* \|", text, re.MULTILINE)) == words


def test_citation_and_changelog_name_the_version() -> None:
    version = PROJECT["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1) == version  # type: ignore[union-attr]


@pytest.mark.parametrize("page", ["CHANGELOG.md", "README.md", "CONTRIBUTING.md"])
def test_no_sentence_of_a_page_stands_there_twice(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    lines = Counter(line.strip(" *|.,") for line in text.splitlines() if len(line) > 60)
    assert [line for line, count in lines.items() if count > 1] == []


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


def anchors(text: str) -> set[str]:
    """The anchors of a Markdown text's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def broken_links(document: Path, text: str) -> list[str]:
    """The link targets of a document that are no file in the repository, or no heading of that file."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        inside = path.is_relative_to(ROOT) and path.exists()
        if not inside or (anchor and anchor not in anchors(text if path == document else path.read_text())):
            found.append(target)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    assert not broken_links(document, document.read_text())


@pytest.mark.parametrize("target", ["absent.md", "README.md#absent", "#absent", "../outside.md"])
def test_link_check_can_fail(target: str) -> None:
    assert broken_links(ROOT / "README.md", f"# Title\n[text]({target})") == [target]
    assert not broken_links(ROOT / "README.md", "# A title\n[a](#a-title) [b](docs/code.md#map-of-the-code)")


def test_every_page_of_docs_is_linked_from_the_readme() -> None:
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert pages <= set(re.findall(r"\]\(([^)#]+)\)", README))


def test_page_of_public_names_is_current() -> None:
    program = ROOT / "docs/api.py"
    scope = runpy.run_path(str(program))
    assert program.with_suffix(".md").read_text() == scope["page"](), "run python docs/api.py"


def test_mapped_files_exist_and_every_room_is_mapped() -> None:
    named = set(re.findall(r"^\| `([\w./]+)` \|", (ROOT / "docs/code.md").read_text(), re.MULTILINE))
    assert all((ROOT / name).exists() for name in named), named
    rooms = {f"cram/{path.parent.name}/" for path in (ROOT / "cram").glob("*/__init__.py")}
    assert rooms <= named, rooms - named
