"""Markdown tables of the result pages, and their places in documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table line by line.

    Raises:
        ValueError: If a row has another number of cells than the header.
    """
    lines = [_line(header), "|" + "---|" * len(header)]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row must have {len(header)} cells, got {list(row)}")
        lines.append(_line(row))
    return lines


def replaced(text: str, name: str, lines: Iterable[str]) -> str:
    """Return a document with `lines` between its markers <!-- name:begin --> and <!-- name:end -->.

    Raises:
        ValueError: If the markers are missing.
    """
    first, last = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"the document must hold {first.strip()} and {last}, got a text without them")
    return f"{before}{begin}" + "".join(f"{line}\n" for line in lines) + f"{end}{after}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
