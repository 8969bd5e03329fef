"""The rules of CONTRIBUTING.md that a parser can check, and for each rule a proof that it can fail."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE_ROOTS = ("cram", "cram_kernels", "csrc", "benchmarks", "examples", "tests")
IMPLEMENTATIONS = {"reference", "cpu", "triton", "native"}
TEXT_SUFFIXES = {
    ".py",
    ".md",
    ".toml",
    ".yaml",
    ".json",
    ".html",
    ".css",
    ".js",
    ".jinja",
    ".h",
    ".cpp",
    ".cu",
    ".cuh",
    ".cff",
    "",
}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 450, 60, 12
MAX_KERNEL_LINES, MAX_KERNEL_ARGUMENTS = 110, 24
# Distribution of an imported name where the two differ.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "resvg_py": "resvg-py"}

Rule = Callable[[Path, str], Iterator[str]]


def files(*roots: str, suffixes: set[str] | None = None) -> list[Path]:
    """Every file under the given top-level folders (or those files themselves), without build products."""
    found: list[Path] = []
    for root in roots:
        base = ROOT / root
        candidates = [base] if base.is_file() else base.rglob("*")
        found += [p for p in candidates if p.is_file() and "__pycache__" not in p.parts]
    return sorted(p for p in found if suffixes is None or p.suffix in suffixes)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All function definitions, nested ones included."""
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def imported_modules(path: Path, text: str) -> Iterator[tuple[str, str | None]]:
    """(module, imported name or None) of every import in a file; relative modules are made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*prefix, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def import_direction(path: Path, text: str) -> Iterator[str]:
    """`cram` -> `cram_kernels` -> torch; nothing points back, and nothing imports the tests or benchmarks."""
    own = path.relative_to(ROOT).parts[0]
    forbidden = {"cram_kernels": {"cram", "tests", "benchmarks"}, "cram": {"tests", "benchmarks"}}
    for module, _ in imported_modules(path, text):
        if module.split(".")[0] in forbidden.get(own, set()):
            yield f"{own} must not import {module}"


def implementations_apart(path: Path, text: str) -> Iterator[str]:
    """An implementation of an op imports no other implementation (of its op, nor of another kind)."""
    if path.relative_to(ROOT).parts[0] != "cram_kernels" or path.stem not in IMPLEMENTATIONS:
        return
    for module, name in imported_modules(path, text):
        target = f"{module}.{name}" if name in IMPLEMENTATIONS else module
        parts = target.split(".")
        if parts[0] == "cram_kernels" and parts[-1] in IMPLEMENTATIONS:
            same_op = tuple(parts[:-1]) == path.relative_to(ROOT).parts[:-1]
            if same_op or parts[-1] != path.stem:
                yield f"implementation must not import {target}"


def public_kernels_only(path: Path, text: str) -> Iterator[str]:
    """`cram` uses the public names of `cram_kernels`, never its submodules."""
    if path.relative_to(ROOT).parts[0] != "cram":
        return
    for module, name in imported_modules(path, text):
        if module.startswith("cram_kernels."):
            yield f"must import from cram_kernels, got {module}" + (f" ({name})" if name else "")


def small_rooms(path: Path, text: str) -> Iterator[str]:
    """Files and functions a reader can hold in the head."""
    lines = text.count("\n")
    if lines > MAX_FILE_LINES:
        yield f"{lines} lines, at most {MAX_FILE_LINES}"
    for node in functions(ast.parse(text)):
        # Kernels, autograd functions and what is registered as an operation take tensors one by one; all
        # stand behind a short public signature.
        kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
        flat = (
            kernel
            or (bool(node.args.args) and node.args.args[0].arg == "ctx")
            or re.search(rf"(?:\.impl|register_fake)\([^)]*\b{node.name}\b", text) is not None
        )
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        arguments = len(node.args.args) + len(node.args.kwonlyargs)
        if length > (MAX_KERNEL_LINES if kernel else MAX_FUNCTION_LINES):
            yield f"{node.name} has {length} lines"
        if arguments > (MAX_KERNEL_ARGUMENTS if flat else MAX_ARGUMENTS):
            yield f"{node.name} has {arguments} arguments"


def documented(path: Path, text: str) -> Iterator[str]:
    """Every module, public class and public function or method of the packages has a docstring."""
    if path.relative_to(ROOT).parts[0] not in ("cram", "cram_kernels"):
        return
    tree = ast.parse(text)
    if tree.body and not ast.get_docstring(tree):
        yield "module has no docstring"
    stack: list[tuple[str, ast.stmt]] = [("", node) for node in tree.body]
    while stack:
        prefix, node = stack.pop()
        named = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if not named or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield f"{prefix}{node.name} has no docstring"
        if isinstance(node, ast.ClassDef):
            stack += [(f"{node.name}.", child) for child in node.body]


CONVERTER = "released.py"  # reads other people's checkpoints, on request alone


def honest_errors(path: Path, text: str) -> Iterator[str]:
    """No blanket handlers; in the packages no pickle and no warn-and-continue."""
    packaged = path.relative_to(ROOT).parts[0] in ("cram", "cram_kernels")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            caught = (
                {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
                if node.type
                else {"everything"}
            )
            if caught & {"everything", "Exception", "BaseException"}:
                yield f"line {node.lineno}: blanket except"
        if (
            packaged
            and isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("torch.load", "warnings.warn")
            and not (path.name == CONVERTER and "weights_only=True" in ast.unparse(node))
        ):
            yield f"line {node.lineno}: {ast.unparse(node.func)}"
    if packaged and any(module.split(".")[0] == "pickle" for module, _ in imported_modules(path, text)):
        yield "imports pickle"


def plain_words(path: Path, text: str) -> Iterator[str]:
    """No registry hosts, no paths of one machine, no unfinished-work markers."""
    patterns = (
        r"\b(?:huggingface|hf|pypi|pythonhosted|github|pytorch)\.(?:co|org|com|io)\b",
        r"/(?:work|root|home)/\w",
        r"\b(?:TO[D]O|FIX[M]E|X[X]X)\b",
    )
    for pattern in patterns:
        for match in re.finditer(pattern, text):
            yield f"line {text.count(chr(10), 0, match.start()) + 1}: {match.group(0)!r}"


# The rooms of `cram`, from the ground up: a module may import its own room and rooms that stand before it.
ROOMS = (
    "atomic",
    "console",
    "config",
    "families",
    "values",
    "scoring",
    "streams",
    "base",
    "report",
    "routing",
    "loading",
    "model",
    "methods",
    "attach",
    "bundle",
    "learning",
    "serve",
    "compare",
    "commands",
    "cli",
)
MAX_MODULES = 12


def room_of(module: str) -> str | None:
    """The room of a module by its dotted name; None outside of `cram` and for the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "cram" and len(parts) > 1 else None


def imports_downwards(path: Path, text: str) -> Iterator[str]:
    """A room of `cram` imports no room above it."""
    own = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own is None or own.startswith("__"):
        return
    if own not in ROOMS:
        yield f"{own} must be a room in the order {ROOMS}"
        return
    for module, name in imported_modules(path, text):
        target = room_of(module if module != "cram" or name is None else f"cram.{name}")
        if target in ROOMS and ROOMS.index(target) > ROOMS.index(own):
            yield f"{own} must not import {target} above it"


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Every circle of an import graph that a walk in depth finds, as 'a -> b -> a'."""
    state: dict[str, int] = {}
    found: list[str] = []

    def visit(module: str, path: list[str]) -> None:
        state[module] = 1
        for target in sorted(graph[module]):
            if state.get(target) == 1:
                found.append(" -> ".join([*path[path.index(target) :], target]))
            elif target not in state:
                visit(target, [*path, target])
        state[module] = 2

    for module in sorted(graph):
        if module not in state:
            visit(module, [module])
    return found


def loaded_with(module: str, target: str) -> set[str]:
    """What `module` loads with `target`: the target, and the packages around it that it is not in itself."""
    parts = target.split(".")
    around = {".".join(parts[:count]) for count in range(1, len(parts))}
    return {target} | {package for package in around if not f"{module}.".startswith(f"{package}.")}


def import_graph(package: str) -> dict[str, set[str]]:
    """Module -> modules of the same package that it loads, also for type checking alone."""
    paths = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files(package, suffixes={".py"})}
    names = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    graph: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        for module, imported in imported_modules(path, path.read_text(encoding="utf-8")):
            full = f"{module}.{imported}"
            target = full if full in names else module
            if target in names and target != name:
                graph[name] |= loaded_with(name, target)
    return graph


PYTHON_RULES: list[Rule] = [
    import_direction,
    imports_downwards,
    implementations_apart,
    public_kernels_only,
    small_rooms,
    documented,
    honest_errors,
]


def violations(rule: Rule, paths: list[Path]) -> list[str]:
    """'path: what' for everything a rule finds in the given files."""
    return [
        f"{path.relative_to(ROOT)}: {found}"
        for path in paths
        for found in rule(path, path.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize("rule", PYTHON_RULES, ids=lambda rule: rule.__name__)
def test_python_files_keep_the_rule(rule: Rule) -> None:
    found = violations(rule, files(*CODE_ROOTS, suffixes={".py"}))
    assert not found, "\n".join(found)


def test_texts_keep_to_plain_words() -> None:
    documents = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "docs")
    tops = (*documents, "Makefile", "pyproject.toml", ".gitignore", ".ci/run")
    paths = [p for p in files(*CODE_ROOTS, *tops, suffixes=TEXT_SUFFIXES) if p.name != "tokenizer.json"]
    found = violations(plain_words, paths)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", ["cram", "cram_kernels"])
def test_no_import_goes_in_a_circle(package: str) -> None:
    found = circles(import_graph(package))
    assert not found, "\n".join(found)


def test_a_package_is_loaded_with_its_modules() -> None:
    assert loaded_with("cram.real.tasks", "cram.drawn.tasks") == {"cram.drawn", "cram.drawn.tasks"}
    assert loaded_with("cram.drawn", "cram.drawn.tasks") == {"cram.drawn.tasks"}


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a -> b -> c -> a"]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def crowded(modules: list[Path]) -> list[str]:
    """Folders with more modules side by side than a reader can tell apart."""
    folders = Counter(path.parent for path in modules if not path.stem.startswith("__"))
    return [f"{folder}: {count} modules" for folder, count in folders.items() if count > MAX_MODULES]


def test_no_folder_of_cram_is_crowded() -> None:
    assert not crowded(files("cram", suffixes={".py"}))
    assert crowded([Path(f"cram/room/m{index}.py") for index in range(MAX_MODULES + 1)])


BREACHES: list[tuple[Rule, str, str]] = [
    (imports_downwards, "cram/model/linear.py", "from cram.methods import METHODS\n"),
    (imports_downwards, "cram/routing/router.py", "from cram import attach\n"),
    (imports_downwards, "cram/scoring/scorers.py", "from cram.streams.types import Sample\n"),
    (imports_downwards, "cram/attic.py", "import torch\n"),
    (import_direction, "cram_kernels/packing.py", "from cram.config import CramConfig\n"),
    (import_direction, "cram/learning/learner.py", "import benchmarks.run\n"),
    (implementations_apart, "cram_kernels/expert_lora/cpu.py", "from .reference import expert_lora\n"),
    (implementations_apart, "cram_kernels/expert_lora/cpu.py", "from . import reference\n"),
    (
        implementations_apart,
        "cram_kernels/expert_lora/cpu.py",
        "import cram_kernels.orthogonality.reference\n",
    ),
    (public_kernels_only, "cram/model/linear.py", "from cram_kernels.packing import PackedExperts\n"),
    (small_rooms, "cram/config.py", "x = 1\n" * (MAX_FILE_LINES + 1)),
    (small_rooms, "cram/config.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    (small_rooms, "cram/config.py", f"def f({', '.join(f'a{i}' for i in range(MAX_ARGUMENTS + 1))}): ...\n"),
    (
        small_rooms,
        "cram/config.py",
        f"def f({', '.join(f'a{i}' for i in range(MAX_KERNEL_ARGUMENTS + 1))}): ...\nlib.impl('f', f, '')\n",
    ),
    (documented, "cram/config.py", "'''Doc.'''\ndef public():\n    return 1\n"),
    (
        documented,
        "cram/config.py",
        "'''Doc.'''\nclass Public:\n    '''Doc.'''\n    def method(self): return 1\n",
    ),
    (documented, "cram/config.py", "x = 1\n"),
    (honest_errors, "cram/config.py", "try:\n    pass\nexcept Exception:\n    pass\n"),
    (honest_errors, "cram/config.py", "try:\n    pass\nexcept:\n    pass\n"),
    (honest_errors, "cram/config.py", "import torch\ntorch.load('x')\n"),
    (honest_errors, "cram/config.py", "import pickle\n"),
    (plain_words, "README.md", "see https://" + "github" + ".com/somebody\n"),
    (plain_words, "README.md", "weights in " + "/" + "root/models\n"),
    (plain_words, "README.md", "TO" + "DO later\n"),
]


@pytest.mark.parametrize(
    ("rule", "path", "text"), BREACHES, ids=[f"{r.__name__}-{i}" for i, (r, _, _) in enumerate(BREACHES)]
)
def test_rule_catches_a_breach(rule: Rule, path: str, text: str) -> None:
    assert list(rule(ROOT / path, text))


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter at the repository root."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def loads(module: str, names: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Imports a module; fails if that loaded any of `names`."""
    return run_python(
        f"import sys, {module}; found = {set(names)!r} & set(sys.modules); assert not found, found"
    )


def loads_without(module: str, names: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Imports a module where importing any of `names` raises ImportError."""
    return run_python(f"import sys; sys.modules.update(dict.fromkeys({names!r})); import {module}")


HEAVY = ("transformers", "peft", "accelerate", "PIL", "yaml", "matplotlib", "sklearn", "triton")


@pytest.mark.parametrize("module", ["cram_kernels", "cram", "cram.cli"])
@pytest.mark.parametrize("check", [loads, loads_without])
def test_import_needs_only_the_core_dependencies(check: Callable[..., Any], module: str) -> None:
    done = check(module, HEAVY)
    assert done.returncode == 0, done.stderr


def test_import_checks_can_fail() -> None:
    assert "AssertionError: {'torch'}" in loads("cram_kernels", ("torch",)).stderr
    assert "ModuleNotFoundError: import of torch halted" in loads_without("cram_kernels", ("torch",)).stderr


def requirement_names(requirements: list[str]) -> set[str]:
    """Distribution names of requirement strings."""
    return {re.split(r"[\s\[<>=!~;]", requirement)[0].lower() for requirement in requirements}


def test_every_third_party_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    core = requirement_names(project["dependencies"])
    allowed = {
        "cram_kernels": core | requirement_names(extras["triton"]),
        "cram": core.union(
            *(requirement_names(extras[name]) for name in ("hf", "data", "triton", "serve", "collect"))
        ),
    }
    own = {"cram", "cram_kernels", "__future__"} | set(sys.stdlib_module_names)
    for package, distributions in allowed.items():
        for path in files(package, suffixes={".py"}):
            roots = {module.split(".")[0] for module, _ in imported_modules(path, path.read_text())} - own
            missing = {root for root in roots if DISTRIBUTIONS.get(root, root) not in distributions}
            assert not missing, f"{path.relative_to(ROOT)} imports {missing}, not declared for {package}"


def test_every_dependency_is_used() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = {path: path.read_text() for path in files(*CODE_ROOTS, suffixes={".py"})}
    imported = {m.split(".")[0] for path, text in texts.items() for m, _ in imported_modules(path, text)}
    used = {DISTRIBUTIONS.get(root, root) for root in imported}
    declared = requirement_names([*project["dependencies"], *project["optional-dependencies"]["hf"]])
    assert declared <= used, declared - used


def test_scripts_name_tests_that_exist() -> None:
    scripts = [path for path in (ROOT / ".ci").rglob("*") if path.is_file()]
    named = {found for path in scripts for found in re.findall(r"tests/[\w/.]*\w", path.read_text())}
    assert "tests/cram/model" in named
    assert not {name for name in named if not (ROOT / name).exists() and not list(ROOT.glob(f"{name}*.py"))}
