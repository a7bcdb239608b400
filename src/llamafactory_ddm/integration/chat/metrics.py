"""The metrics of a server, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ...serving.server import Server

PREFIX = "llamafactory_ddm"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """What `/metrics` shows: the server's own counts, and the API's times."""

    def __init__(self, server: Server) -> None:
        """Make the metrics of one server."""
        self._registry = CollectorRegistry()
        self._registry.register(_ServerCounts(server))
        self.responses = Counter(
            f"{PREFIX}_responses",
            "Responses of the API by route and status.",
            ["route", "status"],
            registry=self._registry,
        )
        self.seconds = Histogram(
            f"{PREFIX}_request_seconds",
            "Time from a request to the end of its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_token_seconds = Histogram(
            f"{PREFIX}_first_token_seconds",
            "Time from a request to the first text of its answer that is final.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """Return the metrics as Prometheus reads them."""
        return generate_latest(self._registry)


class _ServerCounts:
    """Reads the counts of a server when they are asked for."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def describe(self) -> Iterator[Metric]:
        """Return nothing: names are those of `collect`, which need not be compared."""
        return iter(())

    def collect(self) -> Iterator[Any]:
        """Yield the metrics."""
        server, stats = self._server, self._server.stats
        requests = CounterMetricFamily(f"{PREFIX}_requests", "Requests that are over, by outcome.", labels=["outcome"])
        for outcome in ("answered", "failed", "cancelled"):
            requests.add_metric([outcome], getattr(stats, outcome))
        yield requests
        for name, text, value in (
            ("tokens", "Tokens of answers.", stats.tokens),
            ("forward_passes", "Joint forward passes.", stats.passes),
            (
                "rows",
                "Texts in all joint forward passes; divided by those, the mean occupancy of the batch.",
                stats.rows,
            ),
            ("positions", "Tokens that went through the model.", stats.columns),
            ("model_seconds", "Time in forward passes.", stats.seconds_model),
            ("busy_seconds", "Time with a text to denoise.", stats.seconds_busy),
        ):
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, value=value)
        for name, text, value in (
            ("rows_running", "Texts in the batch.", server.n_running),
            ("rows_waiting", "Texts that wait.", server.n_waiting),
            ("rows_limit", "Texts that the batch holds at most.", server.limits.max_rows),
        ):
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)
