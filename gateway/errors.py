"""The error answers: one JSON shape for everything that can go wrong, and the one place that says which status it is.

    {"error": {"message": "...", "type": "...", "param": null | "messages[17].prompt", "code": "..."}}

`type` is a class of failure, `code` is for programs and stable, `message` is for people, `param` is the path of the
field at fault. An answer about a job that was accepted names it beside the error: `"job_id"`. Nothing of a stack trace
ever leaves the process: what is unknown is logged and answered as `internal_error`.
"""

from __future__ import annotations

import math
from typing import Any, Final

from pydantic import ValidationError

from pipeline.connection import CommandRefused, OutOfMemory
from pipeline.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    HistoryUnavailable,
    IdempotencyMismatch,
    JobLost,
    MalformedCursor,
    MaybeAccepted,
    Overloaded,
    PenstockError,
    RotatedLately,
    TooManyPersonas,
    TooManyQueues,
    WrongField,
)
from pipeline.flows import field_path, plain_message
from pipeline.job import Completion, Json

Headers = list[tuple[bytes, bytes]]

TYPES: Final[dict[int, str]] = {
    400: "invalid_request",
    401: "authentication",
    403: "permission",
    404: "not_found",
    405: "invalid_request",
    408: "timeout",
    409: "conflict",
    413: "invalid_request",
    422: "invalid_request",
    429: "rate_limit",
    431: "invalid_request",
    500: "internal",
    502: "job_failed",
    503: "unavailable",
    504: "expired",
}
"""Every error status the gateway gives, with the class of failure it stands for."""

RETRY_SOON_S: Final = 1
"""Retry-After where nothing better is known: an outage is seen to end within about a second."""

_SHOWN_FIELDS: Final = 10  # a body may hold a hundred thousand wrong fields; the answer stays readable
MOST_PATH_CHARS: Final = 128  # of one field's path


class Problem(PenstockError):
    """The request is answered with an error.

    Attributes:
        code: short and stable, for programs.
        param: path of the field at fault, where one is.
        retry_after_s: sent as `Retry-After`, where waiting helps.
        job_id: the job this is about, where one was accepted.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        kind: str | None = None,
        retry_after_s: float | None = None,
        job_id: str | None = None,
        headers: Headers | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.kind = kind or TYPES[status]
        self.retry_after_s = retry_after_s
        self.job_id = job_id
        self._headers = headers or []

    @property
    def value(self) -> Json:
        """The answer."""
        value: Json = {
            "error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code},
        }
        if self.job_id is not None:
            value["job_id"] = self.job_id
        return value

    @property
    def headers(self) -> Headers:
        """Headers beside the usual ones."""
        if self.retry_after_s is None:
            return self._headers
        return [*self._headers, (b"retry-after", b"%d" % max(1, math.ceil(self.retry_after_s)))]


class BrokenKey(Problem):
    """A key under Penstock's name holds what Penstock never wrote: an operator must act, waiting does not help.

    Attributes:
        reason: what Redis or the reader said of it; for the log only.
    """

    def __init__(self, reason: str, job_id: str | None = None) -> None:
        message = "a key in Redis is not what it should be; the gateway's log says more"
        super().__init__(503, "broken_key", message, job_id=job_id)
        self.reason = reason


class ClientGone(Exception):  # an event, not an error: nobody is left to answer
    """The client closed its connection before it had its answer."""


def problem_of(error: PenstockError, job_id: str | None = None) -> Problem | None:
    """Return the answer to an error of the core, None where it is nothing a client should meet.

    Args:
        job_id: the job that was accepted before the error came.
    """
    match error:
        case Problem():
            return error
        case Overloaded(code="too_many_in_flight" | "too_many_waiting"):
            return Problem(429, error.code, str(error), retry_after_s=error.after_s)
        case Overloaded():
            return Problem(503, error.code, str(error), kind="overloaded", retry_after_s=error.after_s)
        case IdempotencyMismatch():
            return Problem(422, "idempotency_mismatch", str(error), param="Idempotency-Key")
        case WrongField():
            return Problem(422, "invalid_field", str(error), param=error.param[:MOST_PATH_CHARS])
        case TooManyQueues():
            return Problem(409, "too_many_queues", str(error), param="queue_id")
        case TooManyPersonas():
            return Problem(409, "too_many_personas", str(error), param="name")
        case RotatedLately():
            return Problem(409, "rotated_lately", str(error), param="queue_id")
        case MalformedCursor():
            return Problem(422, "invalid_cursor", str(error), param="after")
        case HistoryUnavailable():
            message = "the history cannot be read for now"
            return Problem(503, "history_unavailable", message, retry_after_s=RETRY_SOON_S)
        case JobLost():
            return Problem(503, "job_lost", str(error), retry_after_s=RETRY_SOON_S, job_id=job_id)
        case DeadlineExceeded():
            return Problem(504, "deadline_exceeded", str(error), job_id=job_id)
        case OutOfMemory():
            message = "Redis is out of memory; try again later"
            return Problem(503, "overloaded", message, kind="overloaded", retry_after_s=RETRY_SOON_S, job_id=job_id)
        case CommandRefused():
            return BrokenKey(str(error), job_id)
        case MaybeAccepted():
            return Problem(503, "maybe_accepted", str(error), retry_after_s=RETRY_SOON_S, job_id=job_id)
        case BrokerUnavailable():
            message = "Redis cannot be reached for now"
            return Problem(503, "redis_unavailable", message, retry_after_s=RETRY_SOON_S, job_id=job_id)
    return None


def problem_of_outcome(completion: Completion) -> Problem:
    """Return the answer for a job that ended otherwise than completed."""
    status = {"failed": 502, "expired": 504, "cancelled": 409}[completion.status]
    error = completion.error or {}
    return Problem(
        status,
        error.get("code", completion.status),
        error.get("message", f"the job ended as {completion.status}"),
        kind=error.get("type"),
        job_id=completion.id,
    )


def invalid(error: ValidationError, body: Json, *, first: int = 0) -> Problem:
    """Return the 422 that names every wrong field of *body*, the first of them in `param`.

    Args:
        first: number of the element that the list in *body* begins with, where only a part of it was checked.
    """
    found: dict[str, list[str]] = {}
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        path = _path_in(item["loc"], body, first, missing=item["type"] == "missing")
        if path not in found and len(found) == _SHOWN_FIELDS:
            continue
        messages = found.setdefault(path, [])
        message = plain_message(item["type"], item["msg"])
        if message not in messages:
            messages.append(message)
    text = "; ".join(f"{path or 'body'}: {', or '.join(messages)}" for path, messages in found.items())
    return Problem(422, "invalid_field", text, param=next(iter(found)) or None)


def _path_in(location: tuple[int | str, ...], body: Json, first: int, *, missing: bool) -> str:
    """Return *location* as people write it, without the parts that pydantic adds and the body does not have."""
    value: Any = body
    known: list[int | str] = []
    for part in location:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            break
        known.append(part)
    if missing:
        known = list(location)
    if len(known) > 1 and isinstance(known[1], int):
        known[1] += first
    return field_path(tuple(known))[:MOST_PATH_CHARS]
