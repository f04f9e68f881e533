"""/healthz and /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..service import VERSION, Service
from .access import Gate


class _Collector:
    """Reads the service when Prometheus asks; nothing is counted twice."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> list[Metric]:
        service = self._service
        states = GaugeMetricFamily("swarm_machines", "Machines by state", labels=["state"])
        members = service.store.members.all()
        for state in sorted({member.state for member in members}):
            states.add_metric([str(state)], sum(member.state is state for member in members))
        tried, kept = service.store.look.totals()
        return [
            states,
            CounterMetricFamily("swarm_experiments", "Experiments decided, baselines not counted", value=tried),
            CounterMetricFamily("swarm_keeps", "Experiments kept", value=kept),
            CounterMetricFamily("swarm_events", "Events committed", value=service.store.writer.last_event),
            GaugeMetricFamily("swarm_listeners", "Event streams open", value=service.stream.listeners),
            CounterMetricFamily("swarm_listeners_dropped", "Slow listeners dropped", value=service.stream.dropped),
            GaugeMetricFamily("swarm_heartbeat_seconds", "Asked between heartbeats", value=service.presence.interval_s),
            GaugeMetricFamily("swarm_storage_ok", "1 when reports are taken", value=service.fault() is None),
        ]


def router(service: Service, gate: Gate) -> APIRouter:
    routes = APIRouter(tags=["health"])
    registry = CollectorRegistry()
    registry.register(_Collector(service))

    @routes.get("/healthz")
    async def health(request: Request) -> Any:
        """200 when reports are taken, else 503 and why. No token needed."""
        fault = service.fault()
        body = {
            "status": "ok" if fault is None else "failing",
            "version": VERSION,
            "campaign": service.store.study.name,
        }
        if fault is not None:
            body["storage"] = fault if gate.may_look(request) else "the coordinator's log says why"
        return JSONResponse(body, 200 if fault is None else 503)

    @routes.get("/metrics", dependencies=[gate.look])
    def metrics() -> Response:
        """For Prometheus; a viewer's token is enough."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return routes
