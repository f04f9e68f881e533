"""Edits to Python source by ast position: only the bytes named by an edit change, to the last comment and blank.

ast gives positions as (line, UTF-8 byte column), so everything here works on the encoded source. f-strings are atomic:
nothing inside one is addressed (before Python 3.12 their inner positions are wrong).
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

Literal = int | float | str | bool

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BOM = "\ufeff"
_CONSTANT_NAME = re.compile(r"[A-Z][A-Z0-9_]*\Z")
_POWER_OF_TWO = re.compile(r"\s*2\s*\*\*\s*\d+\s*\Z")
_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


class EditError(ValueError):
    """The source does not parse, or has no such constant."""


@dataclass(frozen=True)
class Constant:
    """A top-level `NAME = literal` and where its value stands."""

    name: str
    value: Literal
    start: int  #: byte offset of the value
    end: int
    text: str  #: the value as written


def splice(source: str, edits: Iterable[tuple[int, int, str]]) -> str:
    """Replaces byte ranges (start, end) of the UTF-8 encoded source. Raises EditError when ranges overlap."""
    data = source.encode()
    pieces: list[bytes] = []
    at = 0
    for start, end, text in sorted(edits):
        if start < at or end < start:
            raise EditError(f"edits overlap at byte {start}")
        pieces += [data[at:start], text.encode()]
        at = end
    return b"".join([*pieces, data[at:]]).decode()


class Positions:
    """Byte offsets of ast nodes in one source."""

    def __init__(self, source: str) -> None:
        self._data = source.encode()
        self._lines = [0, *(found.end() for found in _LINE_END.finditer(self._data))]
        self._bom = 3 if source.startswith(_BOM) else 0

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """(start, end) of the node, parentheses around it not included."""
        assert node.end_lineno is not None and node.end_col_offset is not None  # set on every parsed node
        return self._offset(node.lineno, node.col_offset), self._offset(node.end_lineno, node.end_col_offset)

    def _offset(self, line: int, column: int) -> int:
        return self._lines[line - 1] + column + (self._bom if line == 1 else 0)

    def text(self, start: int, end: int) -> str:
        return self._data[start:end].decode()


def parse(source: str) -> ast.Module:
    """Raises EditError with line and reason when the source is no valid Python."""
    try:
        return ast.parse(source.removeprefix(_BOM))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise EditError(f"does not parse: {error}") from None


def fold(node: ast.expr) -> Literal | None:
    """The value of a literal or of arithmetic on number literals (`2**14`, `-1e-3`); None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str)):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = fold(node.operand)
        return -inner if _is_number(inner) else None
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = fold(node.left), fold(node.right)
        if _is_number(left) and _is_number(right):
            if isinstance(node.op, ast.Pow) and (abs(left) > 1e6 or abs(right) > 64):
                return None
            try:
                value = _OPERATORS[type(node.op)](left, right)
            except (ArithmeticError, ValueError):
                return None
            return value if isinstance(value, (int, float)) else None
    return None


def _is_number(value: Literal | None) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def constants(source: str) -> dict[str, Constant]:
    """The top-level constants by name, in order: upper-case, assigned exactly once in the whole file, literal value.

    A name that is assigned a second time anywhere is left out: changing the first assignment might change nothing.
    Raises EditError when the source does not parse.
    """
    tree = parse(source)
    stores = Counter(name for node in ast.walk(tree) for name in _bound(node))
    positions = Positions(source)
    found: dict[str, Constant] = {}
    for statement in tree.body:
        target = _single_target(statement)
        if target is None or stores[target[0]] != 1 or not _CONSTANT_NAME.match(target[0]):
            continue
        name, node = target
        try:
            value = fold(node)
        except RecursionError:
            continue  # arithmetic a thousand levels deep is no constant that anyone tunes
        if value is not None:
            start, end = positions.span(node)
            found[name] = Constant(name, value, start, end, positions.text(start, end))
    return found


def _bound(node: ast.AST) -> list[str]:
    """Names that this node assigns, imports, defines or deletes."""
    match node:
        case ast.Name(ctx=ast.Store() | ast.Del()):
            return [node.id]
        case ast.Import() | ast.ImportFrom():
            return [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            return [name]
        case ast.MatchMapping(rest=str(name)):
            return [name]
    return []


def _single_target(statement: ast.stmt) -> tuple[str, ast.expr] | None:
    if isinstance(statement, ast.Assign) and isinstance(target := statement.targets[0], ast.Name):
        return (target.id, statement.value) if len(statement.targets) == 1 else None
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
        return statement.target.id, statement.value
    return None


def set_constants(source: str, values: Mapping[str, Literal]) -> str:
    """The source with these top-level constants set, everything else byte for byte as it was.

    Raises EditError for a name that is no constant by the rule of `constants`.
    """
    present = constants(source)
    missing = [name for name in values if name not in present]
    if missing:
        raise EditError(f"no top-level constant {', '.join(missing)}")
    return splice(
        source, [(c.start, c.end, literal(values[c.name], c.text)) for c in present.values() if c.name in values]
    )


def literal(value: Literal, like: str) -> str:
    """The value as Python text, in the manner of `like`: powers of two stay `2**k`, strings keep their quotes.

    Raises EditError for infinity and nan.
    """
    if isinstance(value, bool):
        return repr(value)
    if isinstance(value, int):
        if _POWER_OF_TWO.match(like) and value > 0 and value & (value - 1) == 0:
            return f"2**{value.bit_length() - 1}"
        return repr(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise EditError(f"{value} has no literal in Python")
        return repr(value)
    # repr prefers single quotes; a single quote in front of the text makes it choose double ones.
    if like.startswith('"') and not like.startswith('"""') and '"' not in value:
        return '"' + repr("'" + value)[2:-1] + '"'
    return repr(value)


def node_count(source: str) -> int:
    """Number of ast nodes, the measure of a Python file's complexity. Raises EditError when it does not parse."""
    return sum(not isinstance(node, ast.expr_context) for node in ast.walk(parse(source)))
