"""What a mutant changes: one comparison, sum, constant, condition, result, index, argument or statement.

    compare      < for <=, == for !=, is for is not, in for not in
    arithmetic   + for -, * for /, & for |, a sign dropped
    constant     n + 1 for n, False for True
    boolean      and for or, a condition without its not
    nothing      return None
    shift        i + 1 for an index or the bound of a slice
    swap         the first two arguments of a call exchanged
    drop         a statement without effect: a call, a raise, an assignment to a part of an object

Texts, annotations and the words of an error are left alone: they decide no answer.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
# Keywords that guard against a mistake of the caller and change no right answer.
GUARDS = {"strict"}


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        source: Path of the file.
        index: Which of the file's possible changes.
        operator: Kind of change.
        scope: Function or class that it is in.
        before: The changed expression or statement.
        after: What stands there instead.
        line: Line of the file.
        span: First and last line of the statement, or of what stands before its block.
        name: What tells the change from others, whatever its line.
    """

    source: str
    index: int
    operator: str
    scope: str
    before: str
    after: str
    line: int
    span: tuple[int, int]
    name: str


@dataclass(frozen=True)
class Site:
    """A place in a syntax tree, the function that changes it there, and what is to be shown of it then.

    `block` is the list of statements that a dropped one stands in.
    """

    node: ast.AST
    operator: str
    scope: str
    change: Callable[[], None]
    after: ast.AST
    block: list[ast.stmt] | None = None


def mutants_of(source: str, text: str) -> list[Mutant]:
    """Every mutant of a file."""
    tree = ast.parse(text)
    spans = _spans(tree)
    seen: Counter[str] = Counter()
    found = []
    for index, site in enumerate(sites(tree)):
        lines = [each.lineno for each in ast.walk(site.node) if hasattr(each, "lineno")]
        before, line = _shown(site.node), min(lines, default=0)
        undo = _memory(site)
        site.change()
        after = _shown(site.after)
        undo()
        name = f"{source} {site.scope}: {before} -> {after}"
        seen[name] += 1
        name += f" ({seen[name]})" if seen[name] > 1 else ""
        span = spans[id(site.node)]
        found.append(Mutant(source, index, site.operator, site.scope, before, after, line, span, name))
    return found


def _spans(tree: ast.Module) -> dict[int, tuple[int, int]]:
    """Of each node, by its id: the first and last line of its statement without the statement's block."""
    found: dict[int, tuple[int, int]] = {id(tree): (1, 1)}

    def visit(node: ast.AST, span: tuple[int, int]) -> None:
        if isinstance(node, ast.stmt):
            block = getattr(node, "body", None)
            last = node.end_lineno or node.lineno
            span = node.lineno, max(node.lineno, block[0].lineno - 1) if block else last
        found[id(node)] = span
        for child in ast.iter_child_nodes(node):
            visit(child, span)

    visit(tree, (1, 1))
    return found


def _memory(site: Site) -> Callable[[], None]:
    """A function that takes the change of a site back."""
    parts: list[ast.AST] = [site.node, *ast.iter_child_nodes(site.node)]
    fields = [(part, name, value) for part in parts for name, value in ast.iter_fields(part)]
    lists = [value for _, _, value in fields if isinstance(value, list)]
    kept = [(each, list(each)) for each in (*lists, *([] if site.block is None else [site.block]))]

    def undo() -> None:
        for part, name, value in fields:
            setattr(part, name, value)
        for each, content in kept:
            each[:] = content

    return undo


def mutate(text: str, index: int) -> str:
    """The text of a file with the change of that index."""
    tree = ast.parse(text)
    _site(tree, index).change()
    return ast.unparse(ast.fix_missing_locations(tree))


def _site(tree: ast.Module, index: int) -> Site:
    return next(islice(sites(tree), index, None))


def _shown(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())[:160]


def sites(tree: ast.Module) -> Iterator[Site]:
    """Every place that can be changed, in a fixed order."""
    yield from _walk(tree, "module")


def _walk(node: ast.AST, scope: str) -> Iterator[Site]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        scope = node.name if scope == "module" else f"{scope}.{node.name}"
    for operator, change in _changes(node):
        yield Site(node, operator, scope, change, node)
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for place, child in enumerate(value if isinstance(value, list) else [value]):
            if _is_droppable(child):
                empty = ast.Pass()
                change = partial(value.__setitem__, place, empty)
                yield Site(child, "drop", scope, change, empty, value)
            if isinstance(child, ast.AST) and not _left_alone(node, child):
                yield from _walk(child, scope)


def _left_alone(parent: ast.AST, child: ast.AST) -> bool:
    if isinstance(parent, ast.Raise) or isinstance(child, ast.JoinedStr):
        return True
    if isinstance(parent, ast.AnnAssign) and child is parent.annotation:
        return True
    return isinstance(child, ast.keyword) and child.arg in GUARDS


def _changes(node: ast.AST) -> Iterator[tuple[str, Callable[[], None]]]:
    if isinstance(node, ast.Compare):
        for place, kind in enumerate(node.ops):
            if other := COMPARED.get(type(kind)):
                yield "compare", lambda p=place, o=other: node.ops.__setitem__(p, o())
    elif isinstance(node, ast.BinOp | ast.AugAssign):
        if (other := COMPUTED.get(type(node.op))) and not _is_type(node):
            yield "arithmetic", lambda o=other: setattr(node, "op", o())
    elif isinstance(node, ast.BoolOp):
        kind = ast.And if isinstance(node.op, ast.Or) else ast.Or
        yield "boolean", lambda: setattr(node, "op", kind())
    elif isinstance(node, ast.Call):
        yield from _swaps(node)
    elif isinstance(node, ast.Subscript):
        yield from _shifts(node)
    if isinstance(node, ast.Return) and not _is_none(node.value):
        yield "nothing", lambda: setattr(node, "value", ast.Constant(None))
    for name, value in ast.iter_fields(node):
        if isinstance(value, list):
            for place, child in enumerate(value):
                yield from _values(child, lambda new, v=value, p=place: v.__setitem__(p, new))
        else:
            yield from _values(value, lambda new, n=name: setattr(node, n, new))


def _values(child: object, put: Callable[[ast.expr], None]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Changes that put another expression in the place of `child`."""
    if isinstance(child, ast.Constant) and type(child.value) in (int, float, bool):
        value = child.value
        other = not value if isinstance(value, bool) else value + 1
        yield "constant", lambda: put(ast.Constant(other))
    elif isinstance(child, ast.UnaryOp) and isinstance(child.op, ast.Not):
        yield "boolean", lambda: put(child.operand)
    elif isinstance(child, ast.UnaryOp) and isinstance(child.op, ast.USub) and not _is_number(child.operand):
        yield "arithmetic", lambda: put(child.operand)


def _is_number(node: ast.expr) -> bool:
    """Whether `node` is a number; its own change covers its sign."""
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _swaps(node: ast.Call) -> Iterator[tuple[str, Callable[[], None]]]:
    plain = len({ast.dump(each) for each in node.args[:2] if not isinstance(each, ast.Starred)}) == 2
    called = ast.unparse(node.func)
    if plain and called not in ("isinstance", "cast", "getattr", "TypeVar", "NewType"):
        yield "swap", lambda: node.args.__setitem__(slice(0, 2), [node.args[1], node.args[0]])


def _shifts(node: ast.Subscript) -> Iterator[tuple[str, Callable[[], None]]]:
    def later(value: ast.expr) -> ast.BinOp:
        return ast.BinOp(value, ast.Add(), ast.Constant(1))

    index = node.slice
    if isinstance(index, ast.Slice):
        for name in ("lower", "upper"):
            bound = getattr(index, name)
            if bound is not None and not isinstance(bound, ast.Constant):
                yield "shift", lambda n=name, b=bound: setattr(index, n, later(b))


def _is_droppable(node: object) -> bool:
    """Whether a statement is a call, a raise, or an assignment to a part of an object."""
    if isinstance(node, ast.Assign):
        return not isinstance(node.targets[0], ast.Name | ast.Tuple)
    called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    return called or isinstance(node, ast.AugAssign | ast.Raise)


def _is_none(value: ast.expr | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def _is_type(node: ast.AST) -> bool:
    """Whether `a | b` is a type, as in isinstance."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.BitOr):
        return False
    sides = (node.left, node.right)
    return any(
        (isinstance(side, ast.Constant) and side.value is None)
        or (isinstance(side, ast.Name) and (side.id[:1].isupper() or side.id in ("int", "str", "float")))
        or (isinstance(side, ast.Attribute) and side.attr[:1].isupper())
        for side in sides
    )
