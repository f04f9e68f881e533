"""What a person may get wrong is one line and exit code 2, at once; nothing is left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import fast_task
from tests.served import swarm

LONG = "m" * 64


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fast_task.make(tmp_path_factory.mktemp("refusing") / "task")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("token", "create", "--role", "join", "--expires", "0"), "--expires 0: days above 0"),
        (("token", "create", "--role", "join", "--expires", "-1"), "--expires -1: days above 0"),
        (("token", "create", "--role", "join", "--expires", "nan"), "--expires nan: days above 0"),
        (("token", "create", "--role", "join", "--expires", "inf"), "--expires: Input should be a finite number"),
        (("token", "create", "--role", "join", "--label", "x" * 101), "--label: String should have at most 100"),
        (("token", "create", "--role", "worker", "--machine", "Bad_Name"), "--machine: String should match"),
        (("worker", "http://localhost:9", "--name", LONG), f"--name {LONG}: has 64 characters, 63 are the most"),
        (("run", "--yes", "--name", LONG), f"--name {LONG}: has 64 characters"),
        (("worker", "localhost:8420"), "one looks like http://localhost:8420"),
        (("status", "--coordinator", "localhost:8420"), "one looks like http://localhost:8420"),
        (("import", ".", "--coordinator", "localhost"), "one looks like http://localhost:8420"),
        (("machine", "pause", "../tokens"), "'../tokens': no machine's name"),
        (("machine", "rename", "mac", LONG), "no machine's name"),
        (("clear", "../x"), "give an experiment's id"),
    ],
)
def test_bad_input_is_one_line(task: Path, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = swarm(*arguments, cwd=task, SWARM_HOME=str(tmp_path / "home"))
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("swarm: ") and words in line
    assert not (task / ".swarm").exists()
    assert not list((tmp_path / "home").glob("slots/*/machine.json"))


@pytest.mark.parametrize(
    "arguments", [("init", "new"), ("run", "--yes"), ("serve", "."), ("worker", "http://localhost:9"), ("demo",)]
)
def test_a_git_that_is_too_old_is_said_before_anything_is_done(
    task: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\necho git version 2.30.2\n")
    git.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = swarm(*arguments, cwd=task, PATH=path, SWARM_HOME=str(tmp_path / "home"))
    assert done.returncode == 2, done.stderr
    assert done.stderr == "swarm: git version 2.30.2 is too old: git 2.32 or newer is needed\n"
    assert not (task / ".swarm").exists() and not (task / "new").exists() and not (tmp_path / "home").exists()
