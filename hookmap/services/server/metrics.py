"""The text of /metrics, in the format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from hookmap.services.server.models import Models
from hookmap.services.server.sessions import Sessions


class Metrics:
    """The counters of one server."""

    def __init__(self, models: Models, sessions: Sessions) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "hookmap_requests", "Requests, by route and status.", ["route", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "hookmap_request_seconds", "From the request to the end of the answer.", ["route"], registry=self._registry
        )
        self._registry.register(_Now(models, sessions))

    def text(self) -> bytes:
        """The whole document."""
        return generate_latest(self._registry)


class _Now(Collector):
    """Gauges that are read at the moment of asking."""

    def __init__(self, models: Models, sessions: Sessions) -> None:
        self._models, self._sessions = models, sessions

    def collect(self) -> list[GaugeMetricFamily]:
        waiting = GaugeMetricFamily("hookmap_requests_waiting", "Requests in the queue.", labels=["model"])
        running = GaugeMetricFamily("hookmap_requests_running", "Requests that the model works on.", labels=["model"])
        for loaded in self._models.all:
            waiting.add_metric([loaded.name], loaded.scheduler.waiting)
            running.add_metric([loaded.name], loaded.scheduler.running)
        sessions = self._sessions.all()
        count = GaugeMetricFamily("hookmap_sessions", "Sessions held.", value=len(sessions))
        size = GaugeMetricFamily("hookmap_sessions_bytes", "Bytes of them.", value=sum(s.bytes for s in sessions))
        return [waiting, running, count, size]
