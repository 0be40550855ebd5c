"""What a server counts, in Prometheus' format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from tasks.serving.engine import Engine

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("cartwright_requests", "Requests answered", ["endpoint", "status"], registry=registry)
        self.seconds = Histogram(
            "cartwright_request_seconds",
            "From a request's headers to the end of its answer",
            ["endpoint"],
            buckets=SECONDS,
            registry=registry,
        )
        self.tokens = Counter("cartwright_tokens", "Tokens read and written", ["kind"], registry=registry)
        self.no_answer = Counter(
            "cartwright_parse_failures", "Outputs of the model that are no valid answer", ["problem"], registry=registry
        )
        self.reloads = Counter("cartwright_reloads", "Champions taken up while serving", ["result"], registry=registry)
        self.registry_errors = Counter("cartwright_registry_errors", "Times the registry could not be asked", registry=registry)
        self._running = Gauge("cartwright_running", "Texts being answered by the champion", registry=registry)
        self._waiting = Gauge("cartwright_waiting", "Texts waiting for their turn", registry=registry)
        self._champion = Gauge("cartwright_champion_info", "The champion that serves", ["name", "version", "variant"], registry=registry)
        for result in ("ok", "failed"):
            self.reloads.labels(result)

    def show(self, name: str, version: str, variant: str, engine: Engine) -> None:
        """Name the champion, and read the gauges of its engine."""
        self._running.set_function(lambda: engine.running)
        self._waiting.set_function(lambda: engine.waiting)
        self._champion.clear()
        self._champion.labels(name, version, variant).set(1)

    def text(self) -> bytes:
        return generate_latest(self._registry)
