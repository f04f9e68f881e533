"""A fleet's machines have names that a coordinator takes, however long their hosts' are."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from coordinator.fleet import Plan, place
from shared.wire import Name


@pytest.mark.parametrize("host", ["h" * 63, "h" * 200, "h" * 60 + "-" * 9 + "x", "a-" * 40])
def test_a_long_host_name_leaves_room_for_the_slots(host: str) -> None:
    node = {"NodeID": "n", "NodeManagerHostname": host, "NodeManagerAddress": "10.0.0.1", "Resources": {"GPU": 12.0}}
    here = place(node, Plan("http://hub"))
    assert here is not None and len(set(here.names)) == 12
    for number, name in enumerate(here.names):
        assert TypeAdapter(Name).validate_python(name) == name
        assert name.endswith(f"-{number}")
