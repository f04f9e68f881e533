"""Who may call a route: dependencies that give the caller, or refuse."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, Header, Request

from shared.wire import INCARNATION, Role

from ..auth import Caller, Forbidden, Unauthorized
from ..service import Service
from ..store import Member

LOOK = (Role.VIEWER, Role.WORKER, Role.ADMIN)


def token_of(authorization: str) -> str | None:
    """The token in a Bearer header, or the password of a Basic one (browsers and git)."""
    scheme, _, value = authorization.partition(" ")
    match scheme.lower():
        case "bearer":
            return value.strip() or None
        case "basic":
            try:
                return base64.b64decode(value, validate=True).decode().partition(":")[2] or None
            except (binascii.Error, UnicodeDecodeError):
                return None
    return None


class Gate:
    """Makes the dependencies of one service's routes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.look = Depends(self.role(*LOOK))
        self.admin = Depends(self.role(Role.ADMIN))

    def role(self, *roles: Role) -> Callable[[Request], Awaitable[Caller]]:
        async def check(request: Request) -> Caller:
            caller = self._service.tokens.caller(token_of(request.headers.get("authorization", "")))
            if caller is None:
                raise Unauthorized("a token is needed: --token or SWARM_TOKEN (`swarm token create` makes one)")
            if not caller.may(*roles):
                raise Forbidden(f"a token of role {caller.role} may not do this; it takes {' or '.join(roles)}")
            return caller

        return check

    def speaker(self) -> Any:
        """The machine that is calling, at its present incarnation."""
        service = self._service
        caller = self.role(Role.WORKER)

        async def check(
            name: str, request: Request, incarnation: Annotated[int | None, Header(alias=INCARNATION)] = None
        ) -> Member:
            member = service.speaker(await caller(request), name)
            service.current(member, incarnation)
            return member

        return Depends(check)
