"""What a service file is made of: operations, one row each, and the call that each of them serves.

A service declares `OPERATIONS`, a tuple of `Operation`. From these rows `gateway.app` makes the routes and
`gateway.openapi` the description, so neither can know a path, a field or a status that the other does not.
An operation is a function from `Call` to `Answer`; what goes wrong is raised (`gateway.errors`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar, cast

import orjson
from pydantic import BaseModel, ValidationError
from starlette.types import Receive, Scope

from gateway.auth import Callers
from gateway.errors import MOST_PATH_CHARS, BrokenKey, ClientGone, Headers, Problem, invalid
from gateway.idempotency import read_key
from gateway.limits import read_body
from gateway.vendors import Vendor
from pipeline.accepting import Idempotency
from pipeline.clock import monotonic_us
from pipeline.errors import HistoryUnavailable, JobLost
from pipeline.flows import Payload, new_job
from pipeline.front import Accepted, Front
from pipeline.job import DEFAULT_TENANT, Completion, Job, Json, Priority, is_valid_id, new_id
from pipeline.settings import Settings

Model = TypeVar("Model", bound=BaseModel)
SomePayload = TypeVar("SomePayload", bound=Payload)

JSON: Final = b"application/json"
AT_ONCE: Final = 500
"""Elements of a long list that are checked in one go: some 2 ms during which nobody else is served."""
MOST_FIELDS: Final = 1_000
"""Of one JSON object: a body has room for millions of wrong ones, and describing each takes microseconds and memory."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back to the client.

    Attributes:
        stream: what follows the body, piece by piece, for as long as the client stays; None: nothing.
    """

    status: int
    body: bytes
    headers: Headers = field(default_factory=list)
    content_type: bytes = JSON
    stream: AsyncGenerator[bytes, None] | None = None


def answer(value: Json, status: int = 200, headers: Headers | None = None) -> Answer:
    """Return *value* as a JSON answer."""
    return Answer(status, orjson.dumps(value), headers or [])


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter in the path, or in the query string, as the description shows it.

    Attributes:
        type: what it may be, as pydantic spells types; a list is written with commas.
    """

    name: str
    description: str
    required: bool = False
    type: Any = str


@dataclass(frozen=True, slots=True)
class Operation:
    """One method on one path.

    Attributes:
        run: the function; the first line of its docstring is the operation's summary.
        body: model of the request's body, None where none is read.
        answers: model of the answer by status; None for one that is not JSON.
        errors: statuses of the errors it may give, besides those that any operation may.
        guarded: whether it asks for an API key where any is configured.
        idempotent: whether it honours `Idempotency-Key`.
        example: a body that shows the reader how to begin.
        media: type of an answer that is not JSON.
        streams: whether it answers with events for as long as the client stays.
        unavailable: counts a call of which Redis could not tell who makes it; the rest the operation counts itself.
    """

    method: str
    path: str
    run: Callable[[Call], Awaitable[Answer]]
    answers: Mapping[int, type[BaseModel] | None]
    body: type[BaseModel] | None = None
    errors: tuple[int, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    guarded: bool = True
    idempotent: bool = False
    example: Json | None = None
    media: str = "text/plain"
    streams: bool = False
    unavailable: Callable[[], None] = lambda: None


class Records(Protocol):
    """What a gateway reads from history."""

    async def webhook(self, tenant: str, webhook_id: str) -> Json | None:
        """Return what is remembered of a webhook's job, None where nothing is."""

    async def message(self, tenant: str, message_id: str) -> Json | None:
        """Return what is remembered of a message, None where nothing is."""

    async def batch(self, tenant: str, batch_id: str) -> Json | None:
        """Return what is remembered of a batch, None where nothing is."""

    async def completed(self, tenant: str, batch_id: str) -> int:
        """Return how many messages of a batch completed."""

    async def messages(
        self,
        tenant: str,
        *,
        queue: str | None = None,
        status: str | None = None,
        batch_id: str | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> tuple[list[Json], str | None]:
        """Return a page of messages, and the cursor of the next one."""

    async def chat_turns(
        self, tenant: str, chat_id: str, *, after: int = 0, limit: int = 50
    ) -> tuple[list[Json], int | None]:
        """Return a page of what was said in a chat, and the number to go on from."""

    async def persona(self, tenant: str, name: str) -> Json | None:
        """Return what was given last when a persona was set up; None when it never was."""

    async def batches(
        self,
        tenant: str,
        *,
        queue: str | None = None,
        status: str | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> tuple[list[Json], str | None]:
        """Return a page of batches, and the cursor of the next one."""

    async def report(self, tenant: str, report_id: str) -> Json | None:
        """Return what is remembered of a report, None where nothing is."""

    async def reports(
        self, tenant: str, user_id: str, *, after: str | None = None, limit: int = 50
    ) -> tuple[list[Json], str | None]:
        """Return a page of the reports about a person, and the cursor of the next one."""

    async def delivery(self, tenant: str, delivery_id: str) -> Json | None:
        """Return what is remembered of a delivery, None where nothing is."""

    async def deliveries(
        self,
        tenant: str,
        *,
        type: str | None = None,  # noqa: A002 - the column is called so
        status: str | None = None,
        recipient: str | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> tuple[list[Json], str | None]:
        """Return a page of deliveries, and the cursor of the next one."""

    async def incoming(self, tenant: str, incoming_id: str) -> Json | None:
        """Return what is remembered of a message from outside, None where nothing is."""

    async def has_erased(self, tenant: str, epoch: str) -> bool:
        """Say whether an erasure was done."""

    async def api_keys(self) -> list[Json]:
        """Return what is known of all API keys, revoked ones too."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """What all calls share.

    Attributes:
        records: history, where there is one.
        vendors: who may tell us what became of messages, by name.
        stop: set when the gateway is to stop; answers that stream end then.
    """

    settings: Settings
    front: Front
    callers: Callers
    records: Records | None = None
    vendors: Mapping[str, Vendor] = field(default_factory=dict)
    stop: asyncio.Event = field(default_factory=asyncio.Event)


class Call:
    """One request on its way to its answer.

    Attributes:
        headers: by lower-case name; the last of several with one name.
        request_id: the client's, where it sent a valid one, else made here; answered as `x-request-id`.
        started_us: when the request's head had arrived, on the monotonic clock.
        tenant: whose key it was; set before an operation runs.
        job_id: the job that was accepted on its behalf, once one was.
        body: the JSON object that `read` has read.
    """

    __slots__ = (
        "_receive",
        "_repeats",
        "_scope",
        "body",
        "gateway",
        "headers",
        "job_id",
        "request_id",
        "started_us",
        "tenant",
    )

    def __init__(self, scope: Scope, receive: Receive, gateway: Gateway) -> None:
        self._repeats: Idempotency | None = None
        self._scope = scope
        self._receive = receive
        self.gateway = gateway
        self.started_us = monotonic_us()
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = self._request_id()
        self.tenant = DEFAULT_TENANT
        self.job_id: str | None = None
        self.body: Json = {}

    def _request_id(self) -> str:
        sent = self.headers.get(b"x-request-id")
        if sent is not None and is_valid_id(text := sent.decode("latin-1")):
            return text
        return new_id()

    @property
    def front(self) -> Front:
        """The way into the pipeline."""
        return self.gateway.front

    @property
    def path(self) -> str:
        """The path asked for."""
        return cast("str", self._scope["path"])

    @property
    def query_string(self) -> str:
        """What stands behind the `?`, byte by byte."""
        return cast("bytes", self._scope["query_string"]).decode("latin-1")

    def path_id(self, name: str) -> str:
        """Return the id that the path carries as *name*, valid or not."""
        return cast("str", self._scope["path_params"][name])

    @property
    def history(self) -> Records:
        """What is remembered.

        Raises:
            HistoryUnavailable: this gateway has no history.
        """
        if self.gateway.records is None:
            raise HistoryUnavailable
        return self.gateway.records

    async def read_raw(self, max_bytes: int | None = None) -> bytes:
        """Return the body as it came, whatever it is; arguments and errors as for `read`, but for what it holds."""
        return await read_body(self._receive, self.headers, max_bytes or self.gateway.settings.gateway.max_body_bytes)

    async def read(
        self, model: type[Model], max_bytes: int | None = None, *, long: str = "", most: int | None = None
    ) -> Model:
        """Read and check the body.

        Args:
            max_bytes: its largest size; the setting's when None.
            long: the field whose list may be so long that others must have their turn while it is checked.
            most: elements of that list; of a longer one none is looked at.

        Raises:
            Problem: too large, not JSON, not an object, or with wrong fields.
            ClientGone: the client left before its body had arrived.
        """
        raw = await self.read_raw(max_bytes)
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise Problem(400, "not_json", f"the body is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise Problem(400, "not_an_object", "the body must be a JSON object")
        self.body = value
        items = value.get(long)
        if isinstance(items, list) and most is not None and len(items) > most:
            raise Problem(422, "invalid_field", f"{long}: at most {most} in one request", param=long)
        if not isinstance(items, list) or len(items) <= AT_ONCE:
            return _checked(model, value, long=long)
        found = _checked(model, value | {long: items[:AT_ONCE]}, long=long)
        for first in range(AT_ONCE, len(items), AT_ONCE):
            await asyncio.sleep(0)
            more = _checked(model, value | {long: items[first : first + AT_ONCE]}, first, long=long)
            getattr(found, long).extend(getattr(more, long))
        return found

    def job(self, flow: str, payload: Payload, lifetime_s: float, priority: Priority = "normal") -> Job:
        """Return a new job of this call's tenant, due now."""
        return new_job(
            flow,
            payload,
            job_id=new_id(),
            now_ms=self.front.clock.now_ms(),
            lifetime_s=lifetime_s,
            tenant=self.tenant,
            priority=priority,
        )

    @property
    def in_flight_limit(self) -> int | None:
        """How many unfinished jobs this caller may have; None: any number."""
        return self.gateway.settings.gateway.max_in_flight_per_key if self.gateway.callers.are_guarded else None

    async def submit(self, job: Job, *, wait: bool) -> Accepted:
        """Hand *job* to the pipeline; where the call carries an Idempotency-Key, an earlier job may answer for it.

        Raises:
            Problem: the key is malformed.
            PenstockError: not accepted; see `Front.submit`.
        """
        key = read_key(self.headers, self.tenant, self.path, self.body)
        accepted = await self.front.submit(job, idempotency=key, in_flight_limit=self.in_flight_limit, wait=wait)
        if accepted.repeated:
            self._repeats = key
        self.job_id = accepted.job_id
        return accepted

    async def outcome(self, job_id: str, deadline_ms: int) -> Completion:
        """Wait for a job's outcome while the client stays.

        Raises:
            ClientGone: the client left first; the job goes on.
            PenstockError: there is none; see `Front.wait`.
        """
        async with _WhileConnected(self._receive):
            completion = await self._kept_outcome() or await self.front.wait(job_id, self.tenant, deadline_ms)
        if not self.owns(completion, job_id):
            raise JobLost
        return completion

    def connected(self) -> AbstractAsyncContextManager[object]:
        """Return a block that is left with `ClientGone` once the client disconnects."""
        return _WhileConnected(self._receive)

    async def _kept_outcome(self) -> Completion | None:
        """Return the outcome that an Idempotency-Key remembers after the job's completion is gone."""
        if self._repeats is None:
            return None
        try:
            return await self.front.idempotent_outcome(self._repeats.key)
        except ValueError as error:
            raise BrokenKey(str(error)) from error

    def owns(self, completion: Completion, job_id: str) -> bool:
        """Say whether *completion* is of the job asked for, and this caller's own."""
        return completion.id == job_id and completion.tenant == self.tenant


def _refuse_breadth(value: Any, path: str) -> None:
    """Refuse an object with more fields than anybody needs, before anything is said of each of them.

    Raises:
        Problem: this one, or one that is right within it.
    """
    if not isinstance(value, dict):
        return
    for name, inner in (
        (path, value),
        *((f"{path}.{name}", inner) for name, inner in islice(value.items(), MOST_FIELDS)),
    ):
        if isinstance(inner, dict) and len(inner) > MOST_FIELDS:
            name = name.removeprefix(".")[:MOST_PATH_CHARS]
            raise Problem(422, "invalid_field", f"{name or 'body'}: at most {MOST_FIELDS} fields", param=name or None)


def _checked(model: type[Model], value: Json, first: int = 0, *, long: str = "") -> Model:
    _refuse_breadth(value, "")
    items = value.get(long)
    if isinstance(items, list):
        for number, item in enumerate(items, first):
            _refuse_breadth(item, f"{long}[{number}]")
    try:
        return model.model_validate(value, strict=True)
    except ValidationError as error:
        raise invalid(error, value, first=first) from None


def payload_of(request: Payload, model: type[SomePayload]) -> SomePayload:
    """Return the part of a checked request that its job carries."""
    return model.model_validate({name: getattr(request, name) for name in model.model_fields})


class _WhileConnected:
    """Leaves its block with `ClientGone` once the client disconnects.

    Like `asyncio.timeout`, it cancels the task it runs in and takes the cancellation back at the block's end. That
    costs one small task per waiting request, which is less than waiting for two.
    """

    __slots__ = ("_gone", "_receive", "_task", "_watch")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = False

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watch = asyncio.create_task(self._wait_for_disconnect(), name="watch-disconnect")
        return self

    async def _wait_for_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.cancel()  # ends in the next turn of the loop; waiting for that would add one to every answer
        if self._gone and kind is asyncio.CancelledError and self._task.uncancel() == 0:
            raise ClientGone from None
