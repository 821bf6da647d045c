"""Metrics of the core, one line each. No label is unbounded: never an id, never a tenant.

`docs/METRICS.md` explains each; a test compares the two.
"""

from __future__ import annotations

from functools import cache

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

from pipeline import histogram

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each one, which nobody asks for

# From what a hand-over costs to what is promised: a third of a lease (3.3 s), a call (30, 120 s), a life (60, 600 s).
_SPANS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 30, 60, 120, 300, 600)

JOBS = Counter("penstock_stage_jobs_total", "Entries let go of, by what became of them", ["stage", "outcome"])
SERVICE_S = histogram.Histogram(
    "penstock_stage_seconds", "Time from reading an entry to settling it", "stage", _SPANS_S
)
WAIT_S = histogram.Histogram("penstock_stage_wait_seconds", "Time from being added to being read", "stage", _SPANS_S)
IN_HAND = Gauge("penstock_stage_in_hand", "Entries in the hands of this process", ["stage"])
READY = Gauge("penstock_stage_ready", "1 when the stage can work", ["stage"])
STALE_WRITES = Counter(
    "penstock_stale_writes_refused_total", "Settles refused because the entry belongs to another delivery", ["stage"]
)
CLAIMED = Counter("penstock_entries_claimed_total", "Entries taken over from consumers presumed dead", ["stage"])
TAKEN_UP = Counter("penstock_entries_taken_up_total", "Own pending entries found that no read had delivered", ["stage"])
ABORTED = Counter("penstock_handlers_aborted_total", "Handlers stopped before they ended", ["stage", "reason"])
LEASES_LOST = Counter("penstock_worker_leases_lost_total", "Times this process found its lease lapsed")
DEAD_LETTERS = Counter("penstock_dead_letters_total", "Entries buried", ["stage", "reason"])
DEAD_DROPPED = Counter("penstock_dead_letters_dropped_total", "Dead letters dropped by age or count", ["stage"])
PROMOTED = Counter(
    "penstock_delayed_promoted_total", "Delayed jobs, and members of new batches, moved onto their streams"
)
EXPIRED = Counter("penstock_waiting_expired_total", "Jobs ended at their deadline while they waited")
LOST = Counter("penstock_jobs_lost_total", "Jobs whose entry had vanished at their deadline")
LOOP_LAG_S = Histogram("penstock_event_loop_lag_seconds", "How late the event loop ran a timer", buckets=_SPANS_S)
BREAKER = Counter("penstock_breaker_transitions_total", "Circuit breaker changes", ["replica", "to"])
TURN_WAIT_S = histogram.Histogram(
    "penstock_redis_turn_wait_seconds",
    "Time a command waited for others on its connection, where it had to",
    "connection",
    (0.0005, 0.001, 0.005, 0.025, 0.1, 0.5, 1, 5),  # few: there are a dozen connections
)
EVENTS = Counter("penstock_record_events_total", "Events of the history, by what became of them", ["record", "outcome"])
RECORD_LAG_S = Histogram(
    "penstock_record_lag_seconds", "Time from an event to its commit in the database", buckets=(*_SPANS_S, 3600, 86_400)
)
DATABASE_UP = Gauge("penstock_record_database_up", "1 when the recorder can write")
DATABASE_OUTAGES = Counter("penstock_record_database_outages_total", "Times the database went away from the recorder")
DELIVERIES_TOLD = Counter(
    "penstock_delivery_told_total",
    "What providers told of deliveries, where it changed something",
    ["stage", "provider", "status"],
)
# From a provider that takes it at once to one whose receiver was away for days.
DELIVERY_SPANS_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 300, 1_800, 3_600, 6 * 3_600, 86_400, 3 * 86_400)
DELIVERED_S = Histogram(
    "penstock_delivery_delivered_seconds",
    "From the time when a delivery was due to the provider's word that it arrived",
    ["stage", "provider"],
    buckets=DELIVERY_SPANS_S,
)

OUTCOMES = (
    "forwarded",
    "completed",
    "retried",
    "failed",
    "expired",
    "cancelled",
    "released",
    "adopted",
    "malformed",
    "orphan",
    "poison",
    "lost",
)
"""Of an entry at a stage."""


class OfStage:
    """What is measured of every job at one stage; looking a label up costs more than counting."""

    def __init__(self, stage: str) -> None:
        for outcome in OUTCOMES:  # a counter that begins at 1 shows no increase
            JOBS.labels(stage, outcome)
        for counter in (STALE_WRITES, CLAIMED, TAKEN_UP, DEAD_DROPPED):
            counter.labels(stage)
        self.wait_s = WAIT_S.labels(stage)
        self.service_s = SERVICE_S.labels(stage)
        self.jobs = cache(lambda outcome: JOBS.labels(stage, outcome))
