"""`swarm backup` and `swarm restore`, beside what the e2e test does with a working swarm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.backup import backup, restore
from coordinator.settings import STATE
from shared.errors import AlreadyThere
from tests import fast_task
from tests.e2e.test_swarm import until, worker
from tests.fast_task import git
from tests.hosting import hosted
from tests.served import served, swarm


def refs(hub: Path) -> str:
    return git(hub, "for-each-ref", "--format=%(refname) %(objectname)")


def test_a_shallow_campaign_comes_back(tmp_path: Path) -> None:
    # Was: "Could not read <parent of the base>, ... did not send all necessary objects".
    source = fast_task.make(tmp_path / "source")
    git(source, "commit", "--quiet", "--allow-empty", "-m", "later")
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{source}", "task")
    campaign, saved = tmp_path / "task", tmp_path / "saved.tar"
    state = campaign / STATE
    with served(campaign) as (url, _), worker(url, "mac", tmp_path / "home"):
        until(lambda: "attic/mac" in refs(state / "hub.git"), "a push")
    done = swarm("backup", saved, "--dir", campaign, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    state.rename(tmp_path / "lost")
    done = swarm("restore", saved, "--dir", campaign, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert refs(state / "hub.git") == refs(tmp_path / "lost" / "hub.git")
    assert git(state / "hub.git", "rev-parse", "--is-shallow-repository") == "true"
    assert git(state / "hub.git", "fsck", "--connectivity-only") == ""
    with served(campaign) as (url, _):
        git(tmp_path, "clone", "--quiet", f"{url}/git/fast.git", "copy")
    assert git(tmp_path / "copy", "log", "--format=%s") == "later"


def test_a_campaign_with_all_its_history_is_not_shallow_afterwards(tmp_path: Path) -> None:
    with hosted(tmp_path) as service:
        settings = service.settings
        backup(settings, tmp_path / "saved.tar")
    state = tmp_path / "new"
    restore(replace(settings, state=state, database=f"sqlite:///{state}/swarm.sqlite"), tmp_path / "saved.tar")
    assert refs(state / "hub.git") == refs(settings.state / "hub.git")
    assert not (state / "hub.git" / "shallow").exists()


def test_tokens_made_before_the_restore_are_not_lost_without_a_word(tmp_path: Path) -> None:
    # Was: a traceback of SQLAlchemy's IntegrityError.
    task, saved = fast_task.make(tmp_path / "task"), tmp_path / "saved.tar"
    made = ("token", "create", "--role", "admin", "--dir", task)
    assert swarm(*made, cwd=tmp_path).returncode == 0
    with served(task):
        assert swarm("backup", saved, "--dir", task, cwd=tmp_path).returncode == 0
    (task / STATE).rename(tmp_path / "lost")
    assert swarm(*made, cwd=tmp_path).returncode == 0
    refused = swarm("restore", saved, "--dir", task, cwd=tmp_path)
    assert refused.returncode == 4
    [line] = refused.stderr.splitlines()
    assert line.startswith(f"swarm: {task / STATE}: ") and "tokens" in line and line.endswith("move it aside first")
    (task / STATE).rename(tmp_path / "aside")
    assert swarm("restore", saved, "--dir", task, cwd=tmp_path).returncode == 0


def test_another_database_that_is_in_use_is_named_as_such(tmp_path: Path) -> None:
    with hosted(tmp_path) as service:
        settings = service.settings
        backup(settings, tmp_path / "saved.tar")
    with pytest.raises(AlreadyThere, match=r"^--db: .*name an empty one$"):
        restore(replace(settings, state=tmp_path / "new"), tmp_path / "saved.tar")
    assert not (tmp_path / "new" / "hub.git").exists()
