"""Writes docs/api.md, the page of the public names, from their docstrings.

python docs/api.py
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_suffix(".md")
# Module -> public names; of classes also the public methods.
NAMES: dict[str, tuple[str, ...]] = {
    "cram": ("attach", "detach", "save", "load", "CramConfig", "ContinualLearner", "CramTrainer"),
    "cram.model.attached": ("AttachedModel",),
    "cram.loading": ("Sources",),
    "cram.streams": ("Stream", "Task", "Sample", "load_stream", "StreamError"),
    "cram.learning.trainer": ("OneTask",),
    "cram.learning.parallel.sharding": ("shard",),
    "cram.learning.answers.predict": ("Answer", "Conversation", "answer_all"),
    "cram.bundle.importer": ("import_lora",),
    "cram.bundle.export": ("export_lora", "merge", "export_merged"),
    "cram_kernels": (
        "expert_lora",
        "centroid_gates",
        "orthogonality_penalty",
        "pack_experts",
        "available_impls",
    ),
}
HEAD = """\
# Public names

Written by `python docs/api.py` from the docstrings. Names that are not listed may change without a note.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for module, names in NAMES.items():
        parts.append(f"\n## {module}\n")
        found = importlib.import_module(module)
        parts += [entry(name, getattr(found, name)) for name in names]
    return "".join(parts)


def entry(name: str, value: Any) -> str:
    """The entry of one name: signature, docstring, and the public methods of a class."""
    text = f"\n### {name}\n\n{fenced(signature(name, value), inspect.getdoc(value) or '')}"
    if inspect.isclass(value):
        for method, member in vars(value).items():
            plain = member.__func__ if isinstance(member, staticmethod | classmethod) else member
            if not method.startswith("_") and inspect.isfunction(plain):
                text += f"\n{fenced(signature(f'{name}.{method}', plain), inspect.getdoc(plain) or '')}"
    return text


def signature(name: str, value: Any) -> str:
    """The call of a name, without annotations, a line."""
    parameters = inspect.signature(value).parameters.values()
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in parameters if each.name != "self"]
    return f"{name}{inspect.Signature(plain)}"


def fenced(call: str, text: str) -> str:
    """A call and its docstring as a block."""
    return f"```text\n{call}\n\n{text}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
