"""Looking: leaderboard, experiments, branches, lineage, ideas, exports."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Header, Query
from fastapi.responses import PlainTextResponse, Response, StreamingResponse

from shared import wire
from shared.wire import Kind, Status

from .. import leaderboard
from ..database import LISTED
from ..service import Service
from .access import Gate
from .bodies import LARGEST
from .examples import EXPERIMENT, LEADERBOARD

Limit = Annotated[int, Query(ge=1, le=LISTED)]
Position = Annotated[int, Query(ge=0, le=LARGEST)]
Accept = Annotated[str, Header()]
_VARY = {"Vary": "Accept"}  #: for caches

#: How a leaderboard is written; where several are equally welcome, the first of them.
_FORMS = ("application/json", "text/plain", "text/tab-separated-values")


def preferred(accept: str) -> str:
    """The form that an Accept header likes best (RFC 9110): the most specific range that fits a form says its quality.

    JSON where it does not care or names nothing that we have.
    """
    ranges: dict[str, float] = {}
    for part in accept.lower().split(","):
        media, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((p[2:].strip() for p in parameters if p.startswith("q=")), "1")
        ranges[media] = float(quality) if re.fullmatch(r"[01](\.\d{0,3})?", quality) else 0.0

    def liked(form: str) -> float:
        fitting = (form, f"{form.partition('/')[0]}/*", "*/*")
        return next((ranges[media] for media in fitting if media in ranges), 0.0)

    best = max(_FORMS, key=liked)
    return best if liked(best) else _FORMS[0]


def router(service: Service, gate: Gate) -> APIRouter:
    routes = APIRouter(tags=["looking"], dependencies=[gate.look])
    store, look = service.store, service.store.look

    @routes.get(
        "/leaderboard",
        response_model=wire.Leaderboard,
        responses={
            200: {
                "content": {
                    "application/json": {"example": LEADERBOARD},
                    "text/tab-separated-values": {},
                    "text/plain": {},
                }
            }
        },
    )
    def board(
        order: Literal["group", "sigmas"] = "group",
        machine_class: str | None = None,
        profile: str | None = None,
        rung: str | None = None,
        machine: str | None = None,
        after: Position = 0,
        limit: Limit = 100,
        accept: Accept = "application/json",
    ) -> Any:
        """Best first within class, profile and rung; or, across classes, by gain in the machine's own sigmas."""
        found = look.leaderboard(order, machine_class, profile, rung, machine, after, limit)
        match preferred(accept):
            case "text/tab-separated-values" as media:
                return PlainTextResponse(leaderboard.to_tsv(found), headers=_VARY, media_type=media)
            case "text/plain":
                return PlainTextResponse(leaderboard.to_text(found), headers=_VARY)
        return Response(found.model_dump_json(), headers=_VARY, media_type="application/json")

    @routes.get("/experiments")
    def experiments(
        machine: str | None = None,
        machine_class: str | None = None,
        status: Annotated[list[Status], Query()] = [],  # noqa: B006  # FastAPI copies it
        profile: str | None = None,
        rung: str | None = None,
        kind: Kind | None = None,
        idea: UUID | None = None,
        suspect: bool | None = None,
        order: Literal["newest", "oldest"] = "newest",
        after: Position | None = None,
        limit: Limit = 100,
    ) -> wire.ExperimentPage:
        """In the order of arrival; `next` of one page is `after` of the following one."""
        return look.experiments(
            machine=machine,
            machine_class=machine_class,
            status=status,
            profile=profile,
            rung=rung,
            kind=kind,
            idea=idea,
            suspect=suspect,
            after=after,
            limit=limit,
            oldest_first=order == "oldest",
        )

    @routes.get(
        "/experiments/{experiment}",
        response_model=wire.ExperimentView,
        responses={200: {"content": {"application/json": {"example": EXPERIMENT}}}},
    )
    def experiment(experiment: str) -> Any:
        """By id, or by the first characters of its id or commit."""
        return Response(look.experiment(look.find(experiment)).model_dump_json(), media_type="application/json")

    @routes.get("/experiments/{experiment}/diff", response_class=PlainTextResponse)
    def diff(experiment: str) -> str:
        """The patch of the mutable files, as `git apply` takes it; empty for a baseline."""
        return look.diff(look.find(experiment))

    @routes.post("/experiments/{experiment}/clear", status_code=204, dependencies=[gate.admin])
    def clear(experiment: str) -> None:
        """Believes a suspect result."""
        store.reports.clear(look.find(experiment))

    @routes.get("/branches")
    def branches() -> list[wire.Branch]:
        """What the hub holds of each machine."""
        return store.branches()

    @routes.get("/lineage/{commit}")
    def lineage(commit: str, limit: Limit = LISTED) -> list[wire.LineageStep]:
        """From a kept commit back to the base, newest first."""
        return look.lineage(commit, limit)

    @routes.get("/ideas")
    def ideas(after: Position | None = None, limit: Limit = 100) -> dict[str, Any]:
        found, following = look.ideas(after, limit)
        return {"ideas": [idea.model_dump(mode="json") for idea in found], "next": following}

    @routes.get("/campaign")
    def campaign() -> wire.CampaignInfo:
        return service.info()

    @routes.get("/export")
    def export(format: Literal["parquet", "tsv"] = "parquet") -> Response:
        """Every experiment, oldest first."""
        if format == "tsv":
            return StreamingResponse(_tsv(look.export()), media_type="text/tab-separated-values")
        return StreamingResponse(_parquet(look.export()), media_type="application/vnd.apache.parquet")

    return routes


_EXPORTED = {
    "id": "string",
    "machine": "string",
    "machine_class": "string",
    "number": "int64",
    "kind": "string",
    "idea": "string",
    "fingerprint": "string",
    "profile": "string",
    "rung": "string",
    "status": "string",
    "score": "float64",
    "mean": "float64",
    "runs": "int64",
    "memory_gb": "float64",
    "seconds": "float64",
    "tested": "string",
    "parent": "string",
    "kept": "string",
    "description": "string",
    "proposer": "string",
    "reason": "string",
    "confirmed": "bool",
    "suspect": "bool",
    "nodes_added": "int64",
    "code_state": "string",
    "digest": "string",
    "edits": "string",
    "diff": "string",
    "decided_at": "int64",
    "position": "int64",
}


def _plain(name: str, value: Any) -> Any:
    if name in ("id", "idea"):
        return str(value)
    return json.dumps(value, sort_keys=True) if name == "edits" else value


def _tsv(chunks: Iterator[list[dict[str, Any]]]) -> Iterator[bytes]:
    """Without diffs; text in one cell stays in one cell."""
    names = [name for name in _EXPORTED if name != "diff"]
    yield ("\t".join(names) + "\n").encode()
    for chunk in chunks:
        rows = []
        for row in chunk:
            cells = ("" if (v := _plain(n, row[n])) is None else " ".join(str(v).split()) for n in names)
            rows.append("\t".join(cells) + "\n")
        yield "".join(rows).encode()


class _Outgoing(io.RawIOBase):
    """A file that only grows: what was written is taken away, its length is remembered."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._length = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._length

    def write(self, data: Any) -> int:
        part = bytes(data)
        self._parts.append(part)
        self._length += len(part)
        return len(part)

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)


def _parquet(chunks: Iterator[list[dict[str, Any]]]) -> Iterator[bytes]:
    """One row group a chunk, sent as it is written: memory holds one chunk."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}
    schema = pa.schema([(name, types[kind]) for name, kind in _EXPORTED.items()])
    sink = _Outgoing()
    with pq.ParquetWriter(sink, schema, compression="zstd") as file:
        for chunk in chunks:
            rows = [{name: _plain(name, row[name]) for name in _EXPORTED} for row in chunk]
            file.write_table(pa.Table.from_pylist(rows, schema))
            yield sink.take()
    yield sink.take()
