"""What the reaper mends: pushes that the database does not know of, and storage that is back while nobody writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.reaper import transitions
from coordinator.service import Service
from coordinator.writer import StorageUnavailable
from tests import fast_task, postgres
from tests.hosting import hosted, registration, report


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with hosted(tmp_path) as made:
        yield made


def test_a_push_that_was_not_written_down_is(service: Service) -> None:
    """As when the coordinator dies between git's answer and its own."""
    store, base = service.store, service.store.study.base
    members = [store.register(registration(name), "autoresearch") for name in ("a", "b")]
    transitions(service)
    assert store.branches() == []
    for member in members:
        fast_task.git(service.hub.path, "update-ref", member.branch, base)
    service.note_push(members[0])
    service.hub_noted = False  # as at every start
    transitions(service)
    assert [(branch.machine, branch.commit) for branch in store.branches()] == [("a", base), ("b", base)]
    events = store.writer.last_event
    service.hub_noted = False
    transitions(service)
    assert store.writer.last_event == events  # nothing is told twice


def test_storage_that_is_away_and_back_is_seen_though_nobody_writes(tmp_path: Path) -> None:
    try:
        server = postgres.Server()
    except postgres.Missing as missing:
        pytest.skip(str(missing))
    try:
        with hosted(tmp_path, database=server.database()) as service:
            transitions(service)
            assert service.fault() is None
            server.stop()
            with pytest.raises(StorageUnavailable):
                transitions(service)
            assert service.fault()
            member = service.store.members.all()
            with pytest.raises(StorageUnavailable):
                service.store.register(registration("a"), "autoresearch")
            server.start()
            transitions(service)
            assert service.fault() is None
            assert service.store.members.all() == member == []
            assert service.store.writer.last_event == 0
            joined = service.store.register(registration("a"), "autoresearch")
            assert service.store.writer.call(service.store.reports.job(joined, joined.uid, report(1))).stored
    finally:
        server.remove()
