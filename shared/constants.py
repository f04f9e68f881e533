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

_TABLE = re.compile(r"\s*\[([^\[\]]+)\]\s*(?:#.*)?\Z")
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
    table, at = "", 0
    for line in text.splitlines(keepends=True):
        bare = line.rstrip("\r\n")
        if heading := _TABLE.match(bare):
            table = heading[1].strip() + "."
        elif match := _KEY_VALUE.match(bare):
            start = at + len(match["before"].encode())
            end = start + len(match["value"].encode())
            found.append(Constant(table + match["key"], _value(match["value"]), start, end, match["value"]))
        at += len(line.encode())
    times = Counter(constant.name for constant in found)
    return {constant.name: constant for constant in found if times[constant.name] == 1}


def _value(text: str) -> Literal:
    if text in ("true", "false"):
        return text == "true"
    if text[0] in "\"'":
        return text[1:-1]
    plain = text.replace("_", "")
    return float(plain) if set(plain) & set(".eE") else int(plain)


def set_values(path: str, text: str, values: Mapping[str, Literal]) -> str:
    """The text with these constants set. Raises EditError for a name that is not there."""
    if PurePath(path).suffix == ".py":
        return pyedit.set_constants(text, values)
    present = find(path, text)
    missing = [name for name in values if name not in present]
    if missing:
        raise EditError(f"{path}: no key {', '.join(missing)}")
    return pyedit.splice(
        text,
        [
            (present[name].start, present[name].end, _literal(value, present[name].text))
            for name, value in values.items()
        ],
    )


def _literal(value: Literal, like: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        quote = like[0] if like[0] in "\"'" else '"'
        return f"{quote}{value}{quote}"
    return repr(value)
