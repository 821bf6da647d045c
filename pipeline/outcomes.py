"""What follows from what a handler did: plain decisions on values, obeyed by the worker."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from msgspec import Struct

from pipeline.errors import BrokerUnavailable, DeadlineExceeded, NotReady, Reject, RetryLater
from pipeline.flows import FLOWS
from pipeline.job import Completion, Done, Job, Json, error_body
from pipeline.retry import GiveUp, decide_retry

if TYPE_CHECKING:
    from pipeline.settings import RetrySettings

MAX_MESSAGE_CHARS = 500
"""An error's message is for people; a page of HTML from a proxy is cut."""


class Forward(Struct, frozen=True):
    """Hand the job to the next stage of its route."""

    stage: str
    done: Done


class Complete(Struct, frozen=True):
    """The job ends: publish *completion*."""

    completion: Completion
    done: Done | None = None


class Retry(Struct, frozen=True):
    """Run the same stage again after *delay_s*, as attempt *attempt*."""

    delay_s: float
    attempt: int
    error: dict[str, str]


class Bury(Struct, frozen=True):
    """The job ends as failed (or expired, see `Flow.buried_late`), and its story goes to the dead letters."""

    completion: Completion
    reason: str


Decision = Forward | Complete | Retry | Bury


def decide(job: Job, outcome: Done | BaseException, *, worker: str, retry: RetrySettings, rng: Random) -> Decision:
    """Decide what follows a handler's answer or exception."""
    match outcome:
        case Done() if route := job.route if outcome.route is None else outcome.route:
            return Forward(route[0], outcome)
        case Done():
            return Complete(completed(job, outcome, worker), outcome)
        case DeadlineExceeded():
            late = ended(job, worker, "expired", "deadline_exceeded", "the job's deadline has passed")
            return Bury(late, "deadline_exceeded") if FLOWS[job.flow].buried_late else Complete(late)
        case Reject():
            return Bury(failed(job, worker, outcome.code, str(outcome)), outcome.code)
    charged, after_s, code = True, None, "handler_error"
    message = f"{type(outcome).__name__}: {outcome}"
    if isinstance(outcome, RetryLater):
        charged, after_s, code, message = outcome.charged, outcome.after_s, outcome.code, str(outcome)
    if isinstance(outcome, (BrokerUnavailable, NotReady)):  # ours to mend, not the job's doing
        charged, code = False, "redis_unavailable" if isinstance(outcome, BrokerUnavailable) else "not_ready"
    again = decide_retry(
        job.attempt,
        charged=charged,
        after_s=after_s,
        max_retries=retry.max_retries,
        base_s=retry.base_s,
        cap_s=retry.cap_s,
        rng=rng,
        schedule_s=FLOWS[job.flow].retries_s,
        left_s=job.deadline_ms / 1000 - job.at_us / 1e6,
    )
    if isinstance(again, GiveUp):
        return Bury(failed(job, worker, code, message), "attempts_exhausted")
    return Retry(again.delay_s, again.attempt, error_body("retry", code, _short(message)))


def completed(job: Job, done: Done, worker: str) -> Completion:
    """Return the good outcome: of the final state, what the flow shows."""
    return Completion(
        job.id,
        "completed",
        tenant=job.tenant,
        result=_shown(FLOWS[job.flow].result, job.state | done.value),
        worker=worker,
        replica=job.replica,
        attempts=job.attempt,
        timings_ms=job.timings_ms,
    )


def failed(job: Job, worker: str, code: str, message: str) -> Completion:
    """Return the outcome of a job that failed for good."""
    return ended(job, worker, "failed", code, message)


def ended(job: Job, worker: str, status: str, code: str, message: str) -> Completion:
    """Return any other outcome; its result is the story so far of a flow that tells one, else None."""
    return Completion(
        job.id,
        status,  # type: ignore[arg-type]  # callers write literals
        tenant=job.tenant,
        result=_shown(FLOWS[job.flow].story, job.state) or None,
        error=error_body(status, code, _short(message)),
        worker=worker,
        replica=job.replica,
        attempts=job.attempt,
        timings_ms=job.timings_ms,
    )


def _shown(names: Sequence[str], state: Json) -> Json:
    return {name: state[name] for name in names if name in state}


def _short(message: str) -> str:
    return message if len(message) <= MAX_MESSAGE_CHARS else message[: MAX_MESSAGE_CHARS - 1] + "…"
