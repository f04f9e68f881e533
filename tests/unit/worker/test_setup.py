"""The tag of a day, which machines alone and coordinators write alike."""

from __future__ import annotations

import datetime
from pathlib import Path

from tests import fast_task
from worker.campaign import Campaign
from worker.setup import date_tag, propose_tag

DAY = datetime.date(2026, 3, 5)


def test_a_days_tag_is_the_references() -> None:
    assert date_tag(DAY) == "mar5"
    assert date_tag(datetime.date(2026, 12, 31)) == "dec31"


def test_where_the_days_branch_exists_the_tag_is_numbered(tmp_path: Path) -> None:
    campaign = Campaign.open(fast_task.make(tmp_path / "task"))
    for expected in ("mar5", "mar5-2", "mar5-3"):
        assert propose_tag(campaign, "mac", DAY) == expected
        fast_task.git(campaign.root, "branch", f"autoresearch/{expected}-mac")
