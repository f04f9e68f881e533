"""A store on each database, for tests of what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.store import Store
from tests import postgres
from tests.reports import opened


@pytest.fixture(params=postgres.KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield from postgres.fresh(request.param, request.config, tmp_path)


@pytest.fixture
def open_store(url: str) -> Iterator[Callable[..., Store]]:
    stores: list[Store] = []

    def make(**other: Any) -> Store:
        stores.append(opened(url, **other))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., Store]) -> Store:
    return open_store()
