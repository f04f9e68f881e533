"""The named constants of a mutable file, whatever its kind: found, and set with nothing else changed.

Python goes through `pyedit`. TOML, YAML, INI and the like are read line by line (`key = value`, `key: value`, a number,
string or truth value), which also keeps comments; a TOML table's name is put before its keys (`table.key`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePath

from . import pyedit
from .pyedit import Constant, EditError, Literal

_TABLE = re.compile(r"\s*(?P<list>\[?)\[\s*(?P<name>[\w.\"'-]+(?:[ /:][\w.-]+)*)\s*\]\]?\s*(?:[#;].*)?\Z")
_STRING_OR_COMMENT = re.compile(r"\"[^\"]*\"|'[^']*'|#.*")
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_KEY_VALUE = re.compile(
    r"""(?P<before>\s*(?P<key>[A-Za-z_][\w.-]*)\s*[=:]\s*)
        (?P<value>[+-]?\d[\d_]*(?:\.\d*)?(?:[eE][+-]?\d+)?|"[^"\\]*"|'[^'\\]*'|true|false)
        \s*(?:[#;].*)?\Z""",
    re.VERBOSE,
)


def find(path: str, text: str) -> dict[str, Constant]:
    """Constants by name. A key that stands twice is left out. Raises EditError for Python that does not parse."""
    if PurePath(path).suffix == ".py":
        return pyedit.constants(text)
    found: list[Constant] = []
    table, at, depth, elements = "", 0, 0, 0  # depth: brackets of a TOML list that is still open
    for line in _LINE.findall(text):
        bare = line.rstrip("\r\n")
        heading = _TABLE.match(bare) if not depth else None
        match = _KEY_VALUE.match(bare)
        if heading:
            elements += bool(heading["list"])
            # Each element of an array of tables is a table of its own.
            table = f"{heading['name']}{f'[{elements}]' if heading['list'] else ''}."
        elif match and (value := _value(match["value"])) is not None:
            start = at + len(match["before"].encode())
            end = start + len(match["value"].encode())
            found.append(Constant(table + match["key"], value, start, end, match["value"]))
            depth = 0  # no list holds a line like this
        elif PurePath(path).suffix == ".toml":
            code = _STRING_OR_COMMENT.sub("", bare)
            depth = max(depth + code.count("[") - code.count("]"), 0)
        at += len(line.encode())
    times = Counter(constant.name for constant in found)
    return {constant.name: constant for constant in found if times[constant.name] == 1}


def _value(text: str) -> Literal | None:
    if text in ("true", "false"):
        return text == "true"
    if text[0] in "\"'":
        return text[1:-1]
    plain = text.replace("_", "")
    try:
        return float(plain) if set(plain) & set(".eE") else int(plain)
    except ValueError:
        return None  # more digits than Python reads


def set_values(path: str, text: str, values: Mapping[str, Literal]) -> str:
    """The text with these constants set. Raises EditError for a name that is not there or a text that needs escapes."""
    if PurePath(path).suffix == ".py":
        return pyedit.set_constants(text, values)
    present = find(path, text)
    missing = [name for name in values if name not in present]
    if missing:
        raise EditError(f"{path}: no key {', '.join(missing)}")
    edits = []
    for name, value in values.items():
        if isinstance(value, str) and re.search(r"[\"'\\\x00-\x1f\x7f]", value):
            raise EditError(f"{path}: {name}: {value!r} cannot be written without escapes")
        edits.append((present[name].start, present[name].end, _literal(value, present[name].text)))
    return pyedit.splice(text, edits)


def _literal(value: Literal, like: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        quote = like[0] if like[0] in "\"'" else '"'
        return f"{quote}{value}{quote}"
    # `1e-05` is a string to YAML 1.1; `1.0e-05` is a number everywhere.
    return re.sub(r"^(-?\d+)e", r"\1.0e", pyedit.literal(value, ""))
