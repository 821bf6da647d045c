"""Every error Penstock raises, in one tree, sorted by who has to act.

Errors of redis-py and httpx are translated where those libraries are called and nowhere else.
The docstring of a class is its message when none is given.
"""

from __future__ import annotations


class PenstockError(Exception):
    """Something went wrong in Penstock."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message or (type(self).__doc__ or "").strip().splitlines()[0])


# --- The operator acts -------------------------------------------------------------------------


class ConfigError(PenstockError):
    """The settings cannot work; the process exits with code 2 and names every wrong field."""


class NotReady(PenstockError):
    """A stage cannot work yet. It is tried again; `/readyz` shows the reason; jobs wait."""


# --- The sender acts ---------------------------------------------------------------------------


class MalformedEntry(PenstockError):
    """A stream entry is not a job. It is buried at once, never retried.

    Attributes:
        job_id: the id, where one could be read, so that the sender learns of the failure.
        code: the reason in `job:dead`, e.g. `not_json`, `invalid_payload`.
    """

    def __init__(self, message: str, *, code: str, job_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.job_id = job_id


class Reject(PenstockError):
    """The job can never succeed: no retry, outcome `failed`.

    Attributes:
        code: short and stable, for programs, e.g. `context_too_long`.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


OUTCOME_UNKNOWN = "outcome_unknown"
"""Code of a failure after which nobody knows whether a message went out."""


class InDoubt(Reject):
    """A message may have gone out, and nobody can say: it is never sent again by itself; an operator decides."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message, code=OUTCOME_UNKNOWN)


class WrongField(PenstockError):
    """A field of a request is missing, or holds what it cannot hold.

    The message names every such field, and quotes nothing that was given.

    Attributes:
        param: the path of the first one, as people write it.
    """

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


class MalformedCursor(PenstockError):
    """This cursor was not given out by the list that it was sent to."""


NOT_YET = "not_yet"
"""Code of a `RetryLater` by which a job waits for its time, and nothing is wrong: no log tells of it."""

# --- Time acts ---------------------------------------------------------------------------------


class RetryLater(PenstockError):
    """The job failed for now and may succeed later.

    Attributes:
        code: short and stable; becomes the outcome's error code when attempts end.
        after_s: the wait asked for by the other side (Retry-After); None lets the back-off decide.
        charged: whether this counts as an attempt; False for a refusal that did no work.
    """

    def __init__(self, message: str, *, code: str, after_s: float | None = None, charged: bool = True) -> None:
        super().__init__(message)
        self.code = code
        self.after_s = after_s
        self.charged = charged


class DeadlineExceeded(PenstockError):
    """The job's deadline has passed."""


# --- Ownership ---------------------------------------------------------------------------------


class LeaseLost(PenstockError):
    """This consumer's lease lapsed; what it held may belong to another by now."""


# --- Load --------------------------------------------------------------------------------------


class Overloaded(PenstockError):
    """The pipeline holds as much unfinished work as it may; try again later.

    Attributes:
        after_s: a sensible wait before the next try, in seconds.
        code: `overloaded` (ours), `too_many_in_flight` (the caller's own limit).
    """

    def __init__(self, message: str = "", *, code: str = "overloaded", after_s: float = 1.0) -> None:
        super().__init__(message)
        self.code = code
        self.after_s = after_s


class NoReplica(PenstockError):
    """No LLM replica can take the call now."""


class TooManyQueues(PenstockError):
    """This tenant has as many queues as it may: use one of them, or raise PENSTOCK_MESSAGES__MAX_QUEUES."""


class TooManyPersonas(PenstockError):
    """This tenant has as many personas as it may: change one of them, or raise PENSTOCK_CHATS__MAX_PERSONAS."""


class RotatedLately(PenstockError):
    """This secret was replaced within the last day, and the one before it still signs: wait until that has ended."""


class IdempotencyMismatch(PenstockError):
    """This Idempotency-Key was used before with another body."""


# --- The database ------------------------------------------------------------------------------


class HistoryUnavailable(PenstockError):
    """The database of the history cannot be used for now; what is to be written waits in Redis."""


# --- Redis -------------------------------------------------------------------------------------


class BrokerUnavailable(PenstockError):
    """Redis cannot be reached, or refuses to work for now.

    Attributes:
        unknown: True when the command may have run before its reply was lost.
    """

    def __init__(self, message: str = "", *, unknown: bool = False) -> None:
        super().__init__(message)
        self.unknown = unknown


class MaybeAccepted(BrokerUnavailable):
    """Redis did not say whether it took this: send it again under the same Idempotency-Key, then it is done once."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message, unknown=True)


class JobLost(PenstockError):
    """Redis knows nothing of this job any more: neither an outcome nor a live record."""
