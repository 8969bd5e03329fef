"""The long built-in streams of 20 and 50 tasks: a table of domains and questions, in the order of learning.

A domain is a layout in a style. A question belongs to a layout and has a format (`questions.py`). The table
holds every kind of recurrence:

* the same question on another domain ("boards shape" after "sketches shape");
* the same domain with another question, mostly in another format ("charts tallest" after "charts value");
* the same domain with another question in the same format ("balls change" after "balls count"): neither the
  picture nor the format separates the two tasks, only the question does;
* the same task again with new pictures ("sketches shape" a second time, named "sketches-shape-2").

The 20 tasks are the first of the 50. A task's pictures depend on the seed and the task's name alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from cram.streams.builtin.questions import FORMATS, QUESTIONS
from cram.streams.builtin.scenes import LAYOUTS, STYLES, render
from cram.streams.made import BuiltinTask, Drawn

# Domain -> layout and style.
DOMAINS: dict[str, tuple[str, str]] = {
    "sketches": ("single", "paper"),
    "charts": ("bars", "white"),
    "photos": ("pair", "sky"),
    "icons": ("corners", "tiles"),
    "balls": ("crowd", "floor"),
    "boards": ("single", "board"),
    "posters": ("single", "wall"),
    "plates": ("digit", "neon"),
    "beaches": ("pair", "sand"),
    "lamps": ("corners", "neon"),
    "skylines": ("bars", "night"),
    "snow": ("crowd", "snow"),
    "plans": ("bars", "blueprint"),
    "tickets": ("digit", "cloth"),
}

# Domain and question of each task. A row that repeats an earlier one is a revisit.
TABLE: tuple[str, ...] = (
    "sketches shape", "charts value", "photos caption", "icons color", "balls count",
    "boards shape", "charts tallest", "posters warm", "plates read", "beaches colors",
    "icons place", "sketches shape", "lamps caption", "balls change", "skylines tallest",
    "snow count", "plans colors", "photos above", "charts value", "boards color",
    "plans option", "tickets read", "beaches caption", "sketches corners", "lamps color",
    "skylines warm", "photos colors", "snow many", "icons caption", "posters name",
    "charts colors", "plates spell", "balls count", "plans value", "boards round",
    "beaches sizes", "skylines caption", "lamps place", "tickets even", "charts count",
    "posters shape", "photos caption", "snow more", "skylines colors", "plates next",
    "lamps top", "icons color", "posters color", "plans caption", "plates read",
)  # fmt: skip


def make_task(name: str, domain: str, question: str) -> BuiltinTask:
    """A task of the given name that asks a question on a domain."""
    layout, style = DOMAINS[domain]
    asked = QUESTIONS[layout][question]
    form = FORMATS[asked.format]

    def draw(rng: np.random.Generator, split: str) -> Drawn:
        del split
        scene = LAYOUTS[layout](rng)
        text, answer = asked.ask(rng, scene)
        return render(rng, scene, STYLES[style]), f"{text} {form.sentence}".strip(), answer

    return BuiltinTask(zlib.crc32(name.encode()), name, draw, form.scorer, form.max_new_tokens)


def make_tasks(rows: Sequence[str]) -> tuple[BuiltinTask, ...]:
    """The tasks of rows "domain question"; the n-th visit of a row, from the second on, ends in "-n"."""
    tasks = []
    for i, row in enumerate(rows):
        visit = rows[: i + 1].count(row)
        domain, question = row.split()
        tasks.append(make_task(f"{domain}-{question}" + (f"-{visit}" if visit > 1 else ""), domain, question))
    return tuple(tasks)
