"""A YAML file as plain values, with the line of each field for error messages."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cram.streams.readers import StreamError, one_line

MAX_YAML_BYTES = 1 << 20
MAX_YAML_LEVELS = 100


def load_yaml(file: Path) -> Any:
    """The value that a YAML file holds.

    Raises:
        StreamError: If the file is no YAML, or larger or deeper than a stream file can be.
    """
    import yaml

    # PyYAML lets through whatever its constructors raise at a value that is not what its tag says.
    faults = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
    if (size := file.stat().st_size) > MAX_YAML_BYTES:
        raise StreamError(file, None, "(file)", f"must have at most {MAX_YAML_BYTES} bytes, got {size}")
    try:
        text = file.read_text(encoding="utf-8")
        _check_depth(yaml.scan(text))
        return yaml.safe_load(text)
    except faults as error:
        raise StreamError(file, None, "(file)", f"must be YAML, got {one_line(error)}") from error


def _check_depth(tokens: Iterable[Any]) -> None:
    """Refuse YAML of more levels than a stream can need; PyYAML's time grows with their square."""
    depth = 0
    for token in tokens:
        kind = type(token).__name__
        depth += kind.endswith("StartToken") and kind.startswith(("Flow", "Block"))
        depth -= kind in ("FlowSequenceEndToken", "FlowMappingEndToken", "BlockEndToken")
        if depth > MAX_YAML_LEVELS:
            raise ValueError(f"more than {MAX_YAML_LEVELS} levels")


def line_of(file: Path, field: str) -> int:
    """The line, from 1, of a field such as "tasks[1].scorer", or of the deepest part of it that exists."""
    import yaml

    node: Any = yaml.compose(file.read_text(encoding="utf-8"))
    found = node.start_mark if node is not None else None
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", field):
        if index and isinstance(node, yaml.SequenceNode) and int(index) < len(node.value):
            node = node.value[int(index)]
            found = node.start_mark
        elif key and isinstance(node, yaml.MappingNode):
            pair = next((pair for pair in node.value if pair[0].value == key), None)
            if pair is None:
                break
            node, found = pair[1], pair[0].start_mark
        else:
            break
    return 1 if found is None else found.line + 1
