"""What CoordinatorClient makes of an address, and of what a person typed."""

from __future__ import annotations

from contextlib import closing

import pytest

from shared.client import CoordinatorClient, request_of
from shared.errors import BadInput
from shared.wire import Role, TokenOrder


@pytest.mark.parametrize(
    "url",
    ["http://localhost:8420", "https://hub", "http://127.0.0.1:1/", "http://[::1]:8420", "HTTP://hub", "https://a/b"],
)
def test_an_address_has_a_scheme_and_a_host(url: str) -> None:
    with closing(CoordinatorClient(url)) as client:
        assert client.url == url.rstrip("/")


@pytest.mark.parametrize(
    "url", ["localhost:8420", "localhost", "hub.example:8420", "127.0.0.1:8420", "ftp://hub", "http://", "", "//hub", "http://a:b"]
)  # fmt: skip
def test_what_is_no_address_is_refused_at_once(url: str) -> None:
    with pytest.raises(BadInput, match=r"no address of a coordinator: .*one looks like http://localhost:8420"):
        CoordinatorClient(url)


def test_a_request_that_cannot_be_made_names_the_option() -> None:
    assert request_of(TokenOrder, role=Role.JOIN, label="x").label == "x"
    with pytest.raises(BadInput, match=r"^--expires: Input should be greater than 0, found 0$"):
        request_of(TokenOrder, role=Role.JOIN, expires_s=0)
