"""A mutant put into modules that are imported: the changed functions get their new code in place."""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator
from types import CodeType, FunctionType

# New code of functions, by qualified name and first line in the unchanged file.
Codes = dict[tuple[str, int], CodeType]
# Functions that get new code.
Places = list[tuple[FunctionType, CodeType]]
# The flag of a function's code, which the body of a class has not.
FUNCTION = 0x02


def changed_functions(path: str, text: str, changed: str) -> Codes | None:
    """The new code of every function that differs.

    Args:
        path: Path of a module, which its code names.
        text: Its text.
        changed: The same after `operators.mutate`.

    Returns:
        None if something differs that runs when the module is imported: its own statements, the body of a
        class, a default value, or a decorator.
    """
    # Compiled from the same spelling, equal statements have equal code.
    texts = (text, ast.unparse(ast.parse(text)), changed)
    real, before, after = (compile(each, path, "exec") for each in texts)
    found: Codes = {}
    same = _own(before) == _own(after) and _compare(real, before, after, found)
    return found if same else None


def functions() -> dict[str, list[FunctionType]]:
    """Every function of this process, by the file of its code."""
    found: dict[str, list[FunctionType]] = {}
    for each in gc.get_objects():
        if type(each) is FunctionType:
            found.setdefault(each.__code__.co_filename, []).append(each)
    return found


def places(alive: list[FunctionType], codes: Codes) -> Places:
    """The functions of a module that get new code; empty if one of the changes fits none of them."""
    found = [(each, codes[_place(each.__code__)]) for each in alive if _place(each.__code__) in codes]
    fits = all(len(each.__code__.co_freevars) == len(code.co_freevars) for each, code in found)
    return found if fits and {id(code) for _, code in found} == {id(code) for code in codes.values()} else []


def _place(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def _compare(real: CodeType, before: CodeType, after: CodeType, found: Codes) -> bool:
    """Collect the changed functions; False if the body of a class differs."""
    for there, old, new in zip(_parts(real), _parts(before), _parts(after), strict=True):
        if old.co_flags & FUNCTION:
            if _whole(old) != _whole(new):
                found[_place(there)] = new
        elif _own(old) != _own(new) or not _compare(there, old, new, found):
            return False
    return True


def _parts(code: CodeType) -> Iterator[CodeType]:
    return (each for each in code.co_consts if isinstance(each, CodeType))


def _own(code: CodeType) -> tuple[object, ...]:
    """What a piece of code does, without the functions within it, and without lines."""
    values = tuple("code" if isinstance(each, CodeType) else repr(each) for each in code.co_consts)
    return code.co_code, values, code.co_names, code.co_varnames, code.co_freevars, code.co_exceptiontable


def _whole(code: CodeType) -> tuple[object, ...]:
    return *_own(code), *(_whole(each) for each in _parts(code))
