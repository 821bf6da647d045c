"""What the gateway counts. No label is unbounded: codes and outcomes come from our own tables, never from a client."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

OUTCOMES: Final = (
    "completed",
    "failed",
    "expired",
    "cancelled",
    "accepted",  # in the background: its outcome is nobody's answer here
    "disconnected",
    "lost",
    "refused",
    "error",
)

QUERIES: Final = Counter("api_gateway_queries_total", "Queries by how they ended for the client", ["outcome"])
LATENCY: Final = Histogram(
    "api_gateway_query_latency_seconds",
    "From a query's head to its answer, where it was waited for",
    # What a service promises (up to 10 s), then the bounds of its deadlines.
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600),
)
REPLICA_LOAD: Final = Gauge("api_gateway_replica_load", "Jobs now leased to an LLM replica", ["replica"])
REFUSALS: Final = Counter("penstock_gateway_refusals_total", "Requests refused, by error code", ["reason"])

QUERY_OUTCOME: Final = {outcome: QUERIES.labels(outcome) for outcome in OUTCOMES}
