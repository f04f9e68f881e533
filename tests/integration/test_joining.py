"""A machine joins for the first time while its coordinator comes and goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.client import CoordinatorClient
from tests import fast_task
from tests.e2e.test_swarm import QUICK, tried, until, worker
from tests.integration.test_data_for_everyone import relayed
from tests.served import served


@pytest.mark.parametrize("request_of_git", ["/info/refs?service=git-upload-pack", "/git-upload-pack"])
def test_a_line_that_breaks_while_it_clones_is_tried_again(tmp_path: Path, request_of_git: str) -> None:
    # Was: exit 1 with git's words.
    home = tmp_path / "home"
    with (
        served(fast_task.make(tmp_path / "task"), env=QUICK) as (url, _),
        relayed(url, breaks=request_of_git) as relay,
        worker(relay.url, "mac", home) as process,
    ):
        until(lambda: tried(CoordinatorClient(url), "mac") > 0 or process.poll() is not None, "an experiment")
        said = (home / "mac.log").read_text()
        assert process.poll() is None, said
        assert "trying again in 1 s" in said
        assert not relay.breaks
    assert not list((home / "mac").glob("*.partial-*"))
