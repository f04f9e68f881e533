"""Repo: the only place that runs git (through GitPython).

Invariants: hooks, fsmonitor, signing and automatic gc are off for every call, whatever the user's or the repository's
configuration says; commits carry the machine's name, not the user's.
NOT covered: nothing here decides what to commit or reset; see worker/workspace.py.
"""

from __future__ import annotations

import base64
import fcntl
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # a missing git is our message to give, not an import error
import git as gitpython

from .errors import BadInput, SwarmError

_SAFE = (
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "commit.gpgSign=false",
    "gc.auto=0",
    "core.autocrlf=false",
    "advice.detachedHead=false",
    "diff.noprefix=false",
    "diff.mnemonicPrefix=false",
)


NEEDED = (2, 32)  #: `repack --geometric`; GIT_CONFIG_COUNT and `--path-format` came with 2.31

#: Set by a git that runs us (a hook, `git rebase --exec`); they would point our calls at the caller's repository.
_CALLERS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_PREFIX")


def forget_caller() -> None:
    """Drops the variables of a git that started this process; the command line calls it once."""
    for name in _CALLERS:
        os.environ.pop(name, None)


class GitError(SwarmError):
    """git refused; the message holds the command and git's last words."""


def check_version() -> None:
    """An older git would fail hours later, in words about an option. Raises BadInput."""
    needed = f"git {NEEDED[0]}.{NEEDED[1]} or newer is needed"
    try:
        said = Repo(Path("/")).run("version")
    except GitError as error:
        raise BadInput(f"{error}; {needed}") from None
    found = re.search(r"(\d+)\.(\d+)", said)
    if found is None or (int(found[1]), int(found[2])) < NEEDED:
        raise BadInput(f"{said} is too old: {needed}")


class Repo:
    """A working tree (or bare repository) and the git calls we make in it."""

    def __init__(self, path: Path, author: str = "swarm", ceiling: Path | None = None) -> None:
        """`ceiling`: git looks for the repository below this folder only, never in one around it."""
        self.path = path.absolute()
        self.author = author
        self._ceiling = {"GIT_CEILING_DIRECTORIES": str(ceiling.absolute())} if ceiling else {}
        # Without a folder: GitPython would expand `~` and `$X` in it, and use the current one where it is missing.
        self._git = gitpython.Git()

    def run(
        self,
        *arguments: str,
        date: str | None = None,
        strip: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Runs git and returns its output. `date` fixes author and committer time. Raises GitError."""
        environment = {
            **(environment or {}),
            **self._ceiling,
            "GIT_AUTHOR_NAME": self.author,
            "GIT_AUTHOR_EMAIL": f"{self.author}@swarm",
            "GIT_COMMITTER_NAME": self.author,
            "GIT_COMMITTER_EMAIL": f"{self.author}@swarm",
            "GIT_TERMINAL_PROMPT": "0",
            "LC_ALL": "C",
        }
        if date is not None:
            environment |= {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        if not self.path.is_dir():
            raise GitError(f"git {' '.join(arguments[:3])}: {self.path} is gone")
        settings = (part for setting in _SAFE for part in ("-c", setting))
        command = ["git", "-C", str(self.path), "--literal-pathspecs", *settings, *arguments]
        try:
            output = self._execute(command, environment, strip)
        except gitpython.exc.GitCommandNotFound:
            raise GitError("git is not installed or not on PATH") from None
        except gitpython.exc.GitCommandError as error:
            words = f"{error.stderr}\n{error.stdout}".replace("stderr: '", "").replace("stdout: '", "")
            said = " ".join(words.replace("'\n", "\n").split()).strip("' ")
            raise GitError(f"git {' '.join(arguments[:3])} in {self.path}: {said}") from None
        return output

    def _execute(self, command: Sequence[str], environment: Mapping[str, str], strip: bool) -> str:
        """In a session of its own: Ctrl-C is for the worker to act on, not for a git in the middle of a commit.

        A git that SIGINT ended all the same was caught between fork and exec: it has done nothing, so it is run again.
        """
        while True:
            try:
                return str(
                    self._git.execute(
                        command,
                        env=environment,
                        strip_newline_in_stdout=strip,
                        with_exceptions=True,
                        start_new_session=True,
                    )
                )
            except gitpython.exc.GitCommandError as error:
                if error.status != -signal.SIGINT:
                    raise

    # -- looking

    def head(self) -> str:
        return self.run("rev-parse", "HEAD")

    def resolve(self, revision: str) -> str | None:
        """The commit's hash, or None where there is none."""
        try:
            return self.run("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
        except GitError:
            return None

    def top(self) -> Path | None:
        """The working tree's root, or None outside any repository. Raises GitError for one that git will not touch."""
        try:
            return Path(self.run("rev-parse", "--show-toplevel"))
        except GitError as error:
            if "not a git repository" in str(error):
                return None
            raise

    def is_ancestor(self, older: str, newer: str) -> bool:
        """Whether `newer` holds all of `older`'s history."""
        return self.run("merge-base", older, newer) == older

    def show(self, revision: str, path: str) -> str:
        """A file's text at a revision, newlines kept."""
        return self.run("show", f"{revision}:{path}", strip=False)

    def diff(self, before: str, after: str, paths: Sequence[str] = ()) -> str:
        """A patch that `git apply` takes, whatever the user's configuration."""
        return self.run("diff", "--no-color", "--no-ext-diff", "--binary", before, after, "--", *paths, strip=False)

    def changed_paths(self) -> list[str]:
        """Paths that differ from HEAD or are untracked and not ignored, relative to the root."""
        fields = self.run("status", "--porcelain", "-z", "--untracked-files=all", "--no-renames").split("\0")
        return [field[3:] for field in fields if field]

    # -- changing

    def commit(self, paths: Sequence[str], message: str) -> str:
        """Commits these paths, nothing else; an unchanged tree is committed too. Returns the hash."""
        self.run("add", "--force", "--", *paths)
        self.run("commit", "--quiet", "--allow-empty", "--no-verify", "-m", message, "--", *paths)
        return self.head()

    def amend(self, paths: Sequence[str], date: str, message: str | None = None) -> str:
        """Folds paths, nothing else, into HEAD; the same content, message and date give the same hash again."""
        self.run("add", "--force", "--", *paths)
        words = ["--no-edit"] if message is None else ["-m", message]
        flags = ["--quiet", "--amend", "--no-verify", "--allow-empty", f"--date={date}"]
        self.run("commit", *flags, *words, "--", *paths, date=date)
        return self.head()

    def reset_hard(self, revision: str) -> None:
        self.run("reset", "--quiet", "--hard", revision)

    def link(self, ref: str, commit: str, parents: Sequence[str], message: str) -> str:
        """Points `ref` at a new commit with `commit`'s tree and these parents."""
        flags = [part for parent in parents for part in ("-p", parent)]
        new = self.run("commit-tree", f"{commit}^{{tree}}", *flags, "-m", message)
        self.run("update-ref", ref, new)
        return new

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """One process at a time for each repository, all its worktrees together; for work that spans several gits."""
        config = Path(self.run("rev-parse", "--path-format=absolute", "--git-common-dir")) / "config"
        with config.open() as file:  # locked, never written: it is there, and leaves no file behind
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def clear_locks(self, patience_s: float) -> list[str]:
        """Removes lock files that a killed git left behind; returns their names.

        Only for a caller that knows no other git of its own is at work here. A lock that goes by itself within
        `patience_s` belonged to a git that outlived its killed parent and finished.
        """
        folders = {
            Path(self.run("rev-parse", "--path-format=absolute", kind)) for kind in ("--git-dir", "--git-common-dir")
        }
        until = time.monotonic() + patience_s
        while locks := [path for folder in folders for path in _lock_files(folder)]:
            if time.monotonic() > until:
                for path in locks:
                    path.unlink(missing_ok=True)
                return sorted(path.name for path in locks)
            time.sleep(0.02)
        return []

    def exclude(self, patterns: Sequence[str]) -> None:
        """Ignores patterns in this clone only, as one block of info/exclude, without touching any .gitignore."""
        path, text = self._exclude_file()
        if (block := _block(patterns)) not in text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + ("" if text.endswith("\n") or not text else "\n") + block)

    def include(self, patterns: Sequence[str]) -> None:
        """Takes back what `exclude` wrote, and only that."""
        path, text = self._exclude_file()
        if (block := _block(patterns)) in text:
            path.write_text(text.replace(block, ""))

    def _exclude_file(self) -> tuple[Path, str]:
        path = Path(self.run("rev-parse", "--path-format=absolute", "--git-path", "info/exclude"))
        return path, path.read_text() if path.exists() else ""


def _lock_files(git_dir: Path) -> list[Path]:
    return [*git_dir.glob("*.lock"), *(git_dir / "refs").rglob("*.lock")]


def _block(patterns: Sequence[str]) -> str:
    return "\n".join(["# swarm", *patterns]) + "\n"


def init(path: Path, author: str = "swarm") -> Repo:
    path.mkdir(parents=True, exist_ok=True)
    repo = Repo(path, author)
    repo.run("init", "--quiet", "--initial-branch=main")
    return repo


def http_environment(url: str, token: str | None) -> dict[str, str]:
    """What a git that talks to `url` needs in its environment: the token goes nowhere else, and to no other host.

    Never into a remote's URL or an argument: agents read .git/config, and everybody reads process lists.
    """
    settings = {"http.followRedirects": "false", "http.lowSpeedLimit": "1000", "http.lowSpeedTime": "60"}
    if token:
        credentials = base64.b64encode(f"swarm:{token}".encode()).decode()
        settings[f"http.{url}.extraHeader"] = f"Authorization: Basic {credentials}"
    pairs = list(enumerate(settings.items()))
    keys = {f"GIT_CONFIG_KEY_{n}": key for n, (key, _) in pairs}
    values = {f"GIT_CONFIG_VALUE_{n}": value for n, (_, value) in pairs}
    return {"GIT_CONFIG_COUNT": str(len(pairs)), **keys, **values}


def clone(source: Path, path: Path, author: str = "swarm") -> Repo:
    """A full copy of a local repository; objects are copied, the source is never written to."""
    Repo(source).run("clone", "--quiet", "--no-hardlinks", str(source.absolute()), str(path.absolute()))
    return Repo(path, author)
