"""Where a worker keeps who it is: whole or not at all, for its owner's eyes, one membership for each coordinator."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from shared.errors import BadInput
from tests.conftest import ROOT
from worker.home import Identity, Membership, default_home

HERE = "http://127.0.0.1:8420"
MEMBERSHIP = Membership("swarm_worker_secret", "mac-2", "My Study", "mar5", "/git/my-study.git", "")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_same_slot_is_the_same_machine_at_every_start(tmp_path: Path) -> None:
    first = Identity.open(tmp_path, "Mac Mini")
    assert first.path == tmp_path / "mac-mini" / "machine.json"
    assert Identity.open(tmp_path, "Mac Mini") == first
    assert Identity.open(tmp_path, "other").uid != first.uid


def test_each_coordinator_has_its_own_membership(tmp_path: Path) -> None:
    identity = Identity.open(tmp_path, "mac").joined(HERE, MEMBERSHIP)
    other = replace(MEMBERSHIP, token=None, machine="mac", campaign="other")
    identity = identity.joined("https://head:8420", other)
    again = Identity.open(tmp_path, "mac")
    assert again == identity
    assert again.memberships == {HERE: MEMBERSHIP, "https://head:8420": other}
    assert again.joined(HERE, other).memberships[HERE] == other
    assert again.clone_folder(MEMBERSHIP) == tmp_path / "mac" / "my-study-mar5"
    assert again.clone_folder(other) != again.clone_folder(MEMBERSHIP)


def test_tokens_are_for_the_owners_eyes(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        identity = Identity.open(tmp_path, "mac")
        assert mode(identity.path) == 0o600
        left = identity.path.with_suffix(".tmp")  # of a worker that was killed amid writing, by another's umask
        left.write_text("{")
        left.chmod(0o666)
        identity.joined(HERE, MEMBERSHIP)
    finally:
        os.umask(before)
    assert mode(identity.path) == 0o600
    assert [path.name for path in identity.path.parent.iterdir()] == ["machine.json"]


def test_a_kill_amid_writing_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    identity = Identity.open(tmp_path, "mac")
    code = (
        "import sys; from pathlib import Path; from worker.home import Identity, Membership\n"
        "i = Identity.open(Path(sys.argv[1]), 'mac'); n = 0\n"
        "while True: n += 1; i.joined('u', Membership('t' * 5000, str(n), 'c', 't', 'r', 'f')); print(flush=True)"
    )
    for written in (1, 2, 5, 11, 23):  # then the kill falls anywhere in a write after those
        process = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert all(process.stdout.readline() for _ in range(written))
        process.kill()
        process.communicate()
        found = Identity.open(tmp_path, "mac")
        assert found.uid == identity.uid
        assert all(member.token == "t" * 5000 for member in found.memberships.values())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"uid": "x", "memberships": {}}',
        b'{"uid": 7, "memberships": {}}',
        b'{"uid": "00000000-0000-0000-0000-000000000001"}',
        b'{"uid": "00000000-0000-0000-0000-000000000001", "memberships": []}',
        b'{"uid": "00000000-0000-0000-0000-000000000001", "memberships": {"u": 7}}',
        b'{"uid": "00000000-0000-0000-0000-000000000001", "memberships": {"u": {"token": "t"}}}',
        b'{"uid": "00000000-0000-0000-0000-000000000001", "memberships": {"u": {"token": 1, "machine": "m", '
        b'"campaign": "c", "tag": "t", "repository": "r", "folder": ""}}}',
    ],
)
def test_a_damaged_file_is_said_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mac" / "machine.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"machine\.json: damaged; move it aside"):
        Identity.open(tmp_path, "mac")
    assert path.read_bytes() == content


def test_what_a_later_version_added_is_left_out(tmp_path: Path) -> None:
    identity = Identity.open(tmp_path, "mac").joined(HERE, MEMBERSHIP)
    stored = json.loads(identity.path.read_text())
    stored["memberships"][HERE]["colour"] = "red"
    identity.path.write_text(json.dumps(stored | {"more": 1}))
    assert Identity.open(tmp_path, "mac") == identity


def test_home_is_where_SWARM_HOME_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARM_HOME", str(tmp_path))
    assert default_home() == tmp_path
    monkeypatch.setenv("SWARM_HOME", "")
    assert default_home().name == "ratchet-swarm"
