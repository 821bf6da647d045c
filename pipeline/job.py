"""The envelope: what one stream entry carries, and how it is read and written.

A job is one JSON object that a person can read. Ours begins with `{"v":1,"id":"..."`: scripts find the id there
without parsing, and an entry that does not begin so was written by somebody else (a foreign entry) and is adopted
first. An id is safe inside JSON, in a key and in a URL without escaping.

    {"v": 1, "id": "...", "accepted_us": ..., "flow": "query", "tenant": "default", "priority": "normal",
     "route": ["retriever", "llm"], "deadline_ms": ..., "attempt": 1, "payload": {...}, "state": {...},
     "timings_ms": {"encoder_wait": 0.4}, "at_us": ...}

Where other programs look at a stream, what they look for stands beside these fields (`BESIDE`).
"""

from __future__ import annotations

import os
import re
from typing import Any, Final, Literal, cast, get_args

import msgspec
import orjson

from pipeline.errors import MalformedEntry

Json = dict[str, Any]
Priority = Literal["high", "normal", "low"]
Status = Literal["completed", "failed", "expired", "cancelled"]

PRIORITIES: Final[tuple[Priority, ...]] = get_args(Priority)
OURS: Final = b'{"v":1,"id":"'
DEFAULT_TENANT: Final = "default"

_DELIVERY: Final = ("message_id", "retry_count", "scheduled_at")
BESIDE: Final[dict[str, tuple[str, ...]]] = {
    "delivery_sms": _DELIVERY,
    "delivery_mms": _DELIVERY,
    "delivery_email": _DELIVERY,
    "incoming": ("provider", "headers", "body"),
}
"""By flow: fields for other programs. They stand beside the envelope's own in place of the payload's of the same names;
`message_id` and `retry_count` are made of id and attempt."""

_MADE: Final = frozenset({"message_id", "retry_count"})
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_OWN_ID: Final = re.compile(r"[0-9a-f]{32}")
_VERSION: Final = b'{"v":1,'
_ID_SOMEWHERE = re.compile(rb'"id"\s*:\s*"([A-Za-z0-9._:-]{1,128})"')


def new_id() -> str:
    """Return a fresh job id: 32 hexadecimal digits."""
    return os.urandom(16).hex()


def is_own_id(text: str) -> bool:
    """Say whether this can be an id that we gave: one that we never gave is never made a part of a key."""
    return _OWN_ID.fullmatch(text) is not None


def is_valid_id(text: object) -> bool:
    """Say whether *text* may be an id: 1 to 128 of `A-Z a-z 0-9 . _ : -`."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None


class Job(msgspec.Struct, forbid_unknown_fields=True):
    """One job on its way. A field of another type never comes out of `decode`; nothing looks when one is assigned.

    Attributes:
        flow: the row of `pipeline.flows.FLOWS` it follows.
        route: the stages still to come after the present one.
        payload: what the sender asked for; never changed.
        state: what stages have found so far; each adds to it.
        deadline_ms: instant on Redis' clock after which no stage starts or goes on.
        attempt: 1 for the first; rises with every charged retry at the present stage.
        accepted_us: instant of acceptance on Redis' clock, unique and rising over all jobs.
        at_us: when the last hop let go of it, on Redis' clock; the present wait began then.
        timings_ms: spans so far, `<stage>_wait` and `<stage>` per hop.
        avoid: replicas that failed this job, oldest first; others are tried before them.
        vector: binary companion of the entry (little-endian), None where a stage needs none.
        replica: the LLM replica where it is placed now, or that answered it last.
        retry_of: the dead job that this one repeats by hand.
    """

    id: str
    flow: str
    payload: Json
    route: list[str]
    deadline_ms: int
    tenant: str = DEFAULT_TENANT
    priority: Priority = "normal"
    state: Json = {}
    attempt: int = 1
    accepted_us: int = 0
    at_us: int = 0
    timings_ms: dict[str, float] = {}
    avoid: list[str] = []
    vector: bytes | None = None
    replica: str | None = None
    retry_of: str | None = None

    def launch(self) -> tuple[str, bytes]:
        """Return the first stage of the route, and the envelope for it without its head.

        The head (`v`, `id`, `accepted_us`) is written by the script that accepts the job.
        """
        stage, *rest = self.route
        return stage, orjson.dumps(self._body(rest))[1:]

    def encode(self) -> bytes:
        """Return the envelope as it stands on a stream."""
        return orjson.dumps({"v": 1, "id": self.id, "accepted_us": self.accepted_us, **self._body(self.route)})

    def _body(self, route: list[str]) -> Json:
        body: Json = {
            "flow": self.flow,
            "tenant": self.tenant,
            "priority": self.priority,
            "route": route,
            "deadline_ms": self.deadline_ms,
            "attempt": self.attempt,
            "at_us": self.at_us,
            "payload": self.payload,
            "state": self.state,
            "timings_ms": self.timings_ms,
        }
        if self.avoid:
            body["avoid"] = self.avoid
        if self.replica:
            body["replica"] = self.replica
        if self.retry_of:
            body["retry_of"] = self.retry_of
        if self.flow in BESIDE:
            names = BESIDE[self.flow]
            made = {"message_id": self.id, "retry_count": self.attempt - 1}  # _MADE
            body["payload"] = {name: value for name, value in self.payload.items() if name not in names}
            body |= {name: made[name] if name in made else self.payload.get(name) for name in names}
        return body


_ENVELOPE: Final = msgspec.json.Decoder(Job)


def decode(data: bytes, vector: bytes | None = None) -> Job:
    """Read an envelope of ours.

    Raises:
        MalformedEntry: it begins like one of ours, yet is not a whole envelope; or it does not even begin so.
    """
    try:
        job = _parse(data)
    except (ValueError, TypeError, RecursionError) as error:  # msgspec's errors are ValueErrors
        message = f"the entry begins like an envelope but is not one: {error}"
        raise MalformedEntry(message, code="bad_envelope", job_id=find_id(data)) from error
    job.vector = vector
    return job


def _parse(data: bytes) -> Job:
    """Read an envelope; the version in its head is no field of a job."""
    if not data.startswith(OURS):
        raise ValueError("its version or id is not one of ours")
    body = b"{" + data[len(_VERSION) :]
    try:
        job = _ENVELOPE.decode(body)
    except msgspec.ValidationError:
        job = _with_fields_beside(body)
    if not is_valid_id(job.id):
        raise ValueError("its id is none")
    if job.vector is not None:
        raise ValueError("the vector stands beside the envelope, not in it")
    return job


def _with_fields_beside(body: bytes) -> Job:
    """Read an envelope where fields for other programs stand beside ours (`BESIDE`).

    Raises:
        ValueError: a field is missing, has a wrong type, or is none of an envelope's.
        TypeError: the same, of `flow`.
    """
    fields = orjson.loads(body)
    beside = {name: fields.pop(name) for name in BESIDE.get(fields.get("flow"), ()) if name in fields}
    job = msgspec.convert(fields, Job)
    job.payload |= {name: value for name, value in beside.items() if value is not None and name not in _MADE}
    return job


def decode_foreign(data: bytes) -> Json:
    """Read an entry that another program wrote: a JSON object with an `id`.

    Raises:
        MalformedEntry: not JSON, not an object, or without a usable id.
    """
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        message = f"the entry's `data` is not JSON: {error}"
        raise MalformedEntry(message, code="not_json", job_id=find_id(data)) from error
    if not isinstance(body, dict):
        raise MalformedEntry(f"the entry's `data` is JSON, but a {type(body).__name__} and no object", code="not_a_job")
    if not is_valid_id(body.get("id")):
        message = "the entry needs an `id` of 1 to 128 characters out of A-Z a-z 0-9 . _ : -"
        raise MalformedEntry(message, code="bad_id")
    return cast("Json", body)


def find_id(data: bytes) -> str | None:
    """Return the first thing in broken *data* that looks like a job's id, None where nothing does."""
    found = _ID_SOMEWHERE.search(data)
    return found.group(1).decode() if found else None


class Done(msgspec.Struct, frozen=True):
    """A stage did its part.

    Attributes:
        value: merged into the job's state for the stages to come and for the result.
        vector: goes along to the next stage as the entry's binary field.
        start: further jobs that begin in the same instant as this one moves on.
        route: the stages still to come, in place of those that the job carries; None: those.
    """

    value: Json
    vector: bytes | None = None
    start: tuple[Job, ...] = ()
    route: tuple[str, ...] | None = None


class Completion(msgspec.Struct):
    """The one outcome of a job, as it stands in `job:completion:<id>`.

    Attributes:
        error: `{"type", "code", "message"}`, None when completed.
        worker: who ended the job; None when it ended while waiting.
        replica: URL of the LLM replica that answered, where one did.
        timings_ms: `<stage>_wait` and `<stage>` per hop; the gateway adds its own when it answers.
        finished_us: when it was let go of, on Redis' clock.
    """

    id: str
    status: Status
    tenant: str = DEFAULT_TENANT
    result: Json | None = None
    error: dict[str, str] | None = None
    worker: str | None = None
    replica: str | None = None
    attempts: int = 1
    timings_ms: dict[str, float] = {}
    finished_us: int = 0

    def encode(self) -> bytes:
        """Return the JSON text of the completion key."""
        return orjson.dumps(msgspec.structs.asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> Completion:
        """Read a completion key; fields that a newer version added are left out.

        Raises:
            ValueError: the text is not a completion.
        """
        try:
            return _COMPLETION.decode(data)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ValueError(f"not a completion: {error}") from error


_COMPLETION: Final = msgspec.json.Decoder(Completion)


def error_body(kind: str, code: str, message: str) -> dict[str, str]:
    """Return the `error` of a completion: `type` for classes of failure, `code` for programs, `message` for people."""
    return {"type": kind, "code": code, "message": message}
