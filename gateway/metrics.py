"""What the gateway counts, and what it tells of the pipeline behind it.

Depths, loads and breakers are Redis' own, not a process's: every gateway tells the same of them, made from one look at
Redis (`pipeline/overview.py`) when it is asked. Who adds them up over processes takes the largest, never the sum.

No label is unbounded: codes and outcomes come from our own tables, never from a client.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, get_args

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from gateway.vendors import REASONS, SKIPPED
from pipeline.deliveries import WordOfReceived, WordOfTold
from pipeline.overview import Overview

OUTCOMES: Final = (
    "completed",
    "failed",
    "expired",
    "cancelled",
    "accepted",  # in the background: its outcome is nobody's answer here
    "disconnected",
    "lost",
    "refused",  # for a reason of the client's own: a wrong field, too many jobs in flight
    "unavailable",  # for a reason of ours: overloaded, Redis away, a broken key
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
CHAT_MESSAGES: Final = Counter("penstock_chat_messages_total", "Messages of chats, by what they met", ["outcome"])
CHAT_CLEARED: Final = Counter("penstock_chat_cleared_total", "What clears of chats threw away", ["record"])
INCOMING: Final = Counter(
    "penstock_incoming_total", "What vendors told, by what became of it, or why it was refused", ["provider", "outcome"]
)

QUERY_OUTCOME: Final = {outcome: QUERIES.labels(outcome) for outcome in OUTCOMES}

# One that begins at 1 shows no increase.
for _reason in ("overloaded", "too_many_in_flight", "redis_unavailable", "maybe_accepted"):
    REFUSALS.labels(_reason)
for _outcome in ("started", "joined", "merged", "interrupted", "duplicate"):
    CHAT_MESSAGES.labels(_outcome)
for _record in ("messages", "replies"):
    CHAT_CLEARED.labels(_record)
for _provider in ("twilio", "sendgrid"):
    for _outcome in (*get_args(WordOfTold), *get_args(WordOfReceived), *SKIPPED, *REASONS, "unavailable"):
        INCOMING.labels(_provider, _outcome)


def pipeline_metrics(overview: Overview | None, *, redis_up: bool, max_jobs: int, max_backlog: int) -> list[Metric]:
    """Return what is to be told of the pipeline; None: nothing is known of it now, and nothing old is told.

    Args:
        max_jobs: unfinished jobs from which nothing is accepted any more.
        max_backlog: events not yet recorded from which nothing that is recorded is accepted any more.
    """
    told: list[Metric] = [_gauge("penstock_redis_up", "1 when Redis answers this gateway", redis_up)]
    if overview is None:
        return told
    by_stream = ("stage", "priority")
    streams = [((view.stage, view.priority), view) for view in overview.streams]
    told += [
        _gauges("penstock_stream_waiting", "Entries that no worker has read", by_stream,
                [(of, view.waiting) for of, view in streams]),
        _gauges("penstock_stream_pending", "Entries in the hands of workers", by_stream,
                [(of, view.in_hand) for of, view in streams]),
        _gauges("penstock_stream_oldest_pending_seconds", "How long the longest-held entry has been in hand", by_stream,
                [(of, view.oldest_ms / 1000) for of, view in streams]),
        _gauges("penstock_stream_lag", "Entries to be read, as Redis estimates; absent where it cannot", by_stream,
                [(of, view.estimated_lag) for of, view in streams if view.estimated_lag is not None]),
        _gauges("penstock_stream_lag_known", "1 where Redis can tell the lag", by_stream,
                [(of, view.estimated_lag is not None) for of, view in streams]),
        _gauges("penstock_stage_workers", "Live worker processes, by whether they can work", ("stage", "state"),
                _workers_by_stage(overview)),
        _gauge("penstock_workers_lapsed", "Workers that ended without a word in the last ten minutes",
               overview.lapsed_workers),
        _gauge("penstock_gateways", "Live gateways", len(overview.gateways)),
        _gauge("penstock_jobs_live", "Unfinished jobs", overview.live_jobs),
        _gauge("penstock_jobs_limit", "Unfinished jobs from which nothing is accepted any more", max_jobs),
        _gauge("penstock_jobs_delayed",
               "Jobs that wait for their time: retries, scheduled ones, members of new batches", overview.delayed),
        _gauge("penstock_dead_letters_kept", "Dead letters there are now", overview.dead_letters),
        CounterMetricFamily("penstock_dead_letters_written", "Dead letters ever written", overview.letters_ever),
        _gauge("penstock_redis_memory_bytes", "Memory that Redis uses", overview.memory_bytes),
        _gauge("penstock_redis_memory_limit_bytes", "Redis' maxmemory; 0: none", overview.memory_limit_bytes),
        _gauge("penstock_record_backlog", "Events that the database does not have yet", overview.record_backlog),
        _gauge("penstock_record_backlog_limit", "Events to be recorded from which no more are accepted", max_backlog),
        _gauge("penstock_record_oldest_seconds", "How long the oldest of these events has waited",
               overview.record_oldest_ms / 1000),
        _gauge("penstock_report_requests_waiting", "Requests for reports that no worker has taken",
               overview.report_requests),
        CounterMetricFamily("penstock_report_requests_repeated", "Requests whose id was known already",
                            overview.reports_repeated),
        CounterMetricFamily("penstock_report_responses_dropped", "Responses dropped, since there were too many",
                            overview.responses_dropped),
        _counters("penstock_chat_unanswered", "Messages of chats that ended without an answer, by how", "ended",
                  {"failed": overview.chats_failed, "expired": overview.chats_expired}),
    ]  # fmt: skip
    replicas = [((view.url,), view) for view in overview.replicas]
    told += [
        _gauges("penstock_replica_slots", "Calls that a replica may be given at once", ("replica",),
                [(of, view.slots) for of, view in replicas]),
        _gauges("penstock_replica_running", "Calls that a replica works on", ("replica",),
                [(of, view.running) for of, view in replicas]),
        _gauges("penstock_replica_breaker_open", "1 from a breaker's opening until a call succeeds", ("replica",),
                [(of, view.breaker_tripped) for of, view in replicas]),
    ]  # fmt: skip
    return told


class Told(Collector):
    """What was told, as prometheus-client takes it to make a page of."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """Return the metrics."""
        return self._metrics


def _workers_by_stage(overview: Overview) -> list[tuple[tuple[str, str], int]]:
    """Return how many workers each stage has: ready, and not."""
    reasons: dict[str, list[str | None]] = {view.stage: [] for view in overview.streams}
    for worker in overview.workers:
        for stage, reason in worker.stages.items():
            reasons.setdefault(stage, []).append(reason)
    counts = []
    for stage, found in reasons.items():
        ready = found.count(None)
        counts += [((stage, "ready"), ready), ((stage, "not_ready"), len(found) - ready)]
    return counts


def _gauge(name: str, about: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, about, value)


def _counters(name: str, about: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, about, labels=(label,))
    for of, value in values.items():
        family.add_metric((of,), value)
    return family


def _gauges(
    name: str, about: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, about, labels=labels)
    for of, value in values:
        family.add_metric(of, value)
    return family
