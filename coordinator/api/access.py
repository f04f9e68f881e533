"""Who may call a route: dependencies that give the caller, or refuse."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, Header, Request

from shared.errors import Refused
from shared.wire import INCARNATION, RETIRED, MachineState, Role

from ..auth import Caller, Forbidden, Unauthorized, token_of
from ..database import Conflict
from ..members import Member
from ..service import Service

LOOK = (Role.VIEWER, Role.WORKER, Role.ADMIN)


class Gate:
    """Makes the dependencies of one service's routes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.look = Depends(self.role(*LOOK))
        self.admin = Depends(self.role(Role.ADMIN))

    def role(self, *roles: Role) -> Callable[[Request], Awaitable[Caller]]:
        async def check(request: Request) -> Caller:
            token = token_of(request.headers.get("authorization", ""))
            caller = self._service.tokens.caller(token)
            if caller is None:
                raise self._refusal(token)
            if not caller.may(*roles):
                raise Forbidden(f"a token of role {caller.role} may not do this; it takes {' or '.join(roles)}")
            return caller

        return check

    def may_look(self, request: Request) -> bool:
        """For what anybody may ask and not everybody hears whole. In memory: the database may be what is wrong."""
        caller = self._service.tokens.known(token_of(request.headers.get("authorization", "")))
        return caller is not None and caller.may(*LOOK)

    def _refusal(self, token: str | None) -> Refused:
        """Why a token, or none, does not open. A retired machine must hear that it is, so that its worker ends."""
        former = self._service.tokens.former(token)
        if former is not None and (member := self._service.store.members.by_id(former)).state is MachineState.RETIRED:
            return Conflict(f"{member.name} was retired", RETIRED)
        if token is not None:
            return Unauthorized("this token is not known here, or not any more (`swarm token create` makes one)")
        return Unauthorized("a token is needed: --token or SWARM_TOKEN (`swarm token create` makes one)")

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
