"""What a push may bring: git runs this as the hub's pre-receive hook; one bad commit or ref refuses the whole push.

A script of its own (`python -I -S`, standard library only) because it starts for every push: 25 ms, most of it imports.
Invariants: a branch grows by experiments, an attic by links, both only forward; whatever else a push brings is checked
as an experiment. An experiment has one parent, one `Experiment-Id` and changes allowed files only, never their kind.
Trees are compared along allowed paths alone, so one that unfolds to millions of paths costs nothing.
NOT covered: what the files say, whether a score is true, and objects' form (receive.fsckObjects does that, before us).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NoReturn

MAIN = "refs/heads/main"
ATTIC = "refs/attic/"
ABSENT = "0" * 40
FILES = (b"100644", b"100755")  # no symlinks, no submodules, no folders in a file's place
TREE = b"40000"
TRAILER = b"Experiment-Id: "

Paths = dict[bytes, "Paths | None"]  #: allowed paths as a tree: name -> what is allowed below it, None for a file
Entries = dict[bytes, tuple[bytes, str]]  #: a git tree: name -> mode and object


@dataclass(frozen=True)
class Commit:
    tree: str
    parents: tuple[str, ...]
    message: bytes


@dataclass(frozen=True)
class Update:
    old: str
    new: str
    ref: str


def refuse(words: str) -> NoReturn:
    print(f"swarm hub: {words}", file=sys.stderr)
    raise SystemExit(1)


class Objects:
    """Commits and trees, the push's own included, through one `git cat-file`."""

    def __init__(self) -> None:
        self._git = subprocess.Popen(["git", "cat-file", "--batch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._commits: dict[str, Commit] = {}
        self._trees: dict[str, Entries] = {}

    def _read(self, name: str) -> bytes:
        assert self._git.stdin is not None and self._git.stdout is not None
        self._git.stdin.write(f"{name}\n".encode())
        self._git.stdin.flush()
        header = self._git.stdout.readline().split()
        if len(header) != 3:
            refuse(f"object {name[:12]} is missing")
        return self._git.stdout.read(int(header[2]) + 1)[:-1]

    def commit(self, name: str) -> Commit:
        if name not in self._commits:
            head, _, message = self._read(name).partition(b"\n\n")
            tree, *lines = head.decode("latin-1").split("\n")
            parents = []
            for line in lines:
                if not line.startswith("parent "):
                    break  # git, too, reads parents right after the tree and nowhere else
                parents.append(line[7:])
            self._commits[name] = Commit(tree[5:], tuple(parents), message)
        return self._commits[name]

    def tree(self, name: str) -> Entries:
        if name not in self._trees:
            raw, at, entries = self._read(name), 0, {}
            while at < len(raw):
                end = raw.index(b"\0", at)
                mode, _, entry = raw[at:end].partition(b" ")
                entries[entry] = (mode, raw[end + 1 : end + 21].hex())
                at = end + 21
            self._trees[name] = entries
        return self._trees[name]


def listed(news: Iterable[str], known: Iterable[str]) -> list[str]:
    """The commits that `news` hold and `known` do not."""
    asked = "\n".join([*news, *(f"^{name}" for name in known), ""])
    done = subprocess.run(["git", "rev-list", "--stdin"], input=asked, capture_output=True, text=True, check=False)
    if done.returncode:
        refuse(f"these commits cannot be read: {' '.join(done.stderr.split())[:200]}")
    return done.stdout.split()


def chain(objects: Objects, among: set[str], update: Update) -> tuple[list[str], str | None]:
    """First parents from the new tip down, as far as they are in `among`; and the commit that the last stands on."""
    found: list[str] = []
    at: str | None = update.new
    while at in among and at != update.old:
        found.append(at)
        at = next(iter(objects.commit(at).parents), None)
    return found, at


def check_links(objects: Objects, links: list[str], ref: str) -> Iterator[str]:
    """Yields the tested commits that the links hold on to."""
    for name in links:
        link = objects.commit(name)
        if len(link.parents) != 2 or link.parents[1] in links or objects.commit(link.parents[1]).tree != link.tree:
            refuse(
                f"{name[:12]} on {ref} is not an attic link; its parents must be the link before it and "
                "the tested commit, its tree the tested commit's"
            )
        yield link.parents[1]


def check_experiment(objects: Objects, name: str, links: set[str], paths: Paths, allowed: str) -> None:
    commit = objects.commit(name)
    if len(commit.parents) != 1:
        refuse(f"{name[:12]} has {len(commit.parents)} parents; an experiment has one (no merges, no new roots)")
    if commit.parents[0] in links:
        refuse(f"{name[:12]} stands on an attic link, {commit.parents[0][:12]}; start it from your branch")
    if not has_id(commit.message):
        refuse(f"{name[:12]} needs `Experiment-Id: <uuid>` in the last paragraph of its message, once")
    before, after = objects.tree(objects.commit(commit.parents[0]).tree), objects.tree(commit.tree)
    for path, why in wrong(objects, before, after, paths, b""):
        refuse(f"{name[:12]} {why} {shown(path)}; a commit may only change the text of {allowed}")


def wrong(objects: Objects, a: Entries, b: Entries, paths: Paths, folder: bytes) -> Iterator[tuple[bytes, str]]:
    """Each path that differs and may not, with what was done to it."""
    for name in sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name)):
        below, (mode, new) = paths.get(name), b.get(name, (b"", ""))
        if name not in paths:
            yield folder + name, "changes"
        elif name not in b:
            yield folder + name, "deletes"
        elif (below is None and mode not in FILES) or (below is not None and mode != TREE):
            yield folder + name, f"gives mode {mode.decode('latin-1')} to"
        elif below is not None:
            was = a.get(name, (b"", ""))
            old = objects.tree(was[1]) if was[0] == TREE else {}
            yield from wrong(objects, old, objects.tree(new), below, folder + name + b"/")


def as_tree(paths: Iterable[str]) -> Paths:
    below: dict[bytes, list[str]] = {}
    for path in paths:
        folder, _, rest = path.partition("/")
        below.setdefault(folder.encode(), []).extend([rest] if rest else [])
    return {name: as_tree(rest) if rest else None for name, rest in below.items()}


def has_id(message: bytes) -> bool:
    """Whether the last paragraph is made of trailers, as git understands them, and one of them is our id."""
    _, _, last = message.rstrip().rpartition(b"\n\n")
    lines = last.split(b"\n")
    ids = [line.removeprefix(TRAILER) for line in lines if line.startswith(TRAILER)]
    return (
        len(ids) == 1
        and b"\n\n" in message.rstrip()
        and all(line.partition(b": ")[0].replace(b"-", b"").isalnum() and b": " in line for line in lines)
        and [len(part) for part in ids[0].split(b"-")] == [8, 4, 4, 4, 12]
        and not ids[0].replace(b"-", b"").strip(b"0123456789abcdef")
    )


def shown(path: bytes) -> str:
    """On one line and harmless in a terminal, whatever the path holds."""
    text = path.decode("utf-8", "backslashreplace")
    return text[:200] if text.isprintable() else ascii(text)[:200]


def main(lines: Iterable[str], paths: list[str], pushes: list[str], unchecked: str | None) -> None:
    checked = []
    for line in lines:
        update = Update(*line.rstrip("\n").split(" ", 2))
        free = bool(unchecked) and update.ref.startswith(str(unchecked))
        if update.ref == MAIN or not (free or update.ref in pushes):
            refuse(f"{shown(update.ref.encode())} is not yours to push; yours: {', '.join(pushes) or unchecked}")
        if update.new == ABSENT:
            refuse(f"{update.ref} cannot be deleted; no push takes anything away here")
        if free and update.old != ABSENT and listed([update.old], [update.new]):
            refuse(f"{update.ref} only moves forward; {update.new[:12]} does not build on {update.old[:12]}")
        if not free:
            checked.append(update)
    if not checked:
        return
    objects = Objects()
    # Known is what main and these refs' old tips hold, not all that the hub has: another machine's commit is checked
    # too when it comes on our ref, so that nobody's attic link becomes somebody's branch.
    olds = [update.old for update in checked if update.old != ABSENT]
    news = set(listed([update.new for update in checked], [MAIN, *olds]))
    links: dict[str, str] = {}
    on_branches: dict[str, str] = {}
    for update in checked:
        found, foot = chain(objects, news, update)
        if foot != update.old:  # a first push, or a tip that stands on what another of our refs brought earlier
            news |= set(listed([update.new], [MAIN if update.old == ABSENT else update.old]))
            found, foot = chain(objects, news, update)
        if foot != update.old and (update.old != ABSENT or foot is None):
            refuse(f"{update.ref} only moves forward; {update.new[:12]} does not build on its tip or on main")
        attic = update.ref.startswith(ATTIC)
        if attic and not found and update.old == ABSENT:
            refuse(f"{update.new[:12]} on {update.ref} is not an attic link")
        (links if attic else on_branches).update(dict.fromkeys(found, update.ref))
    if both := links.keys() & on_branches.keys():
        name = min(both)
        refuse(f"{name[:12]} is an attic link; {on_branches[name]} takes experiments only")
    tested = set(check_links(objects, list(links), next(iter(links.values()), "")))
    for name in sorted((news - links.keys()) | tested):
        check_experiment(objects, name, set(links), as_tree(paths), ", ".join(paths))


if __name__ == "__main__":
    main(
        (line.decode("utf-8", "backslashreplace") for line in sys.stdin.buffer),
        json.loads(os.environ["SWARM_HUB_PATHS"]),
        json.loads(os.environ["SWARM_HUB_PUSHES"]),
        os.environ.get("SWARM_HUB_UNCHECKED"),
    )
