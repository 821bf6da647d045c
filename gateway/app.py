"""The gateway as an ASGI application: the services' rows become routes, and every request gets one answer.

Three layers, plain ASGI, because they are passed by every question: `Edge` (request id; whatever happened becomes an
answer), Starlette's router, `_Endpoint` (method, caller, operation).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Sequence
from contextlib import aclosing
from functools import cache
from typing import Final

import orjson
import structlog
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import (
    chats,
    deliveries,
    discovery,
    documents,
    health,
    incoming,
    jobs,
    messages,
    openapi,
    page,
    query,
    queues,
    reports,
    webhooks,
)
from gateway.auth import Callers, refuse_cross_site
from gateway.errors import RETRY_SOON_S, BrokenKey, ClientGone, Problem, problem_of
from gateway.metrics import REFUSALS
from gateway.operation import Answer, Call, Gateway, Operation, Records, answer
from pipeline.errors import BrokerUnavailable, PenstockError
from pipeline.front import Front
from pipeline.job import Json
from pipeline.settings import Settings

logger = structlog.get_logger()

_UNCHANGING: Final = frozenset({"GET", "HEAD"})


def operations() -> tuple[Operation, ...]:
    """Return every operation of every service, the busy ones first: routes are tried in this order."""
    services = (
        *query.OPERATIONS,
        *documents.OPERATIONS,
        *messages.OPERATIONS,
        *queues.OPERATIONS,
        *chats.OPERATIONS,
        *reports.OPERATIONS,
        *deliveries.OPERATIONS,
        *webhooks.OPERATIONS,
        *incoming.OPERATIONS,
        *jobs.OPERATIONS,
        *health.OPERATIONS,
        *discovery.OPERATIONS,
    )

    @cache
    def description() -> Json:
        return openapi.describe(services)

    @cache
    def page_made() -> bytes:
        return page.render(description())

    async def describe(call: Call) -> Answer:
        """Describe this API to programs."""
        return answer(description())

    async def show(call: Call) -> Answer:
        """Describe this API to people."""
        return Answer(200, page_made(), page.headers(), page.CONTENT_TYPE)

    return (
        *services,
        Operation("GET", "/openapi.json", describe, answers={200: None}, guarded=False),
        Operation("GET", "/docs", show, answers={200: None}, guarded=False),
    )


def create_app(
    settings: Settings, front: Front, records: Records | None = None, stop: asyncio.Event | None = None
) -> ASGIApp:
    """Return the application that serves *front*, and what *records* remember; what streams ends with *stop*.

    Raises:
        ConfigError: the API keys are malformed, or a vendor's key is none.
    """
    callers, vendors = Callers(settings.gateway, front), incoming.vendors(settings)
    gateway = Gateway(settings, front, callers, records, vendors, stop or asyncio.Event())
    return Edge(_router(operations()), gateway)


def _router(rows: Sequence[Operation]) -> Router:
    paths: dict[str, dict[str, Operation]] = {}
    for row in rows:
        paths.setdefault(row.path, {})[row.method] = row
    routes = [Route(path, endpoint=_Endpoint(methods)) for path, methods in paths.items()]
    return Router(routes=routes, redirect_slashes=False, default=_no_such_path)


async def _no_such_path(scope: Scope, receive: Receive, send: Send) -> None:
    raise Problem(404, "no_such_path", f"there is nothing at {scope['path'][:128]}")


class Edge:
    """Gives every request an id and exactly one answer, whatever happens inside."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = scope["call"] = Call(scope, receive, self._gateway)
        request_id = (b"x-request-id", call.request_id.encode())
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if not started:
                started = True
                message["headers"].append(request_id)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            return
        except asyncio.CancelledError:
            # Only the server cancels a request, when its time to drain is over. The task ends here.
            if not started:
                await _send_problem(send_with_id, _stopping(call))
        except Exception as error:  # the outermost edge of the request's task
            problem = _explain(error, call)
            if started:
                raise  # uvicorn closes the connection: better no end than a wrong one
            await _send_problem(send_with_id, problem)


class _Endpoint:
    """One path: chooses the operation by method, learns who calls, sends the answer."""

    def __init__(self, methods: dict[str, Operation]) -> None:
        self._methods = dict(methods)
        if "GET" in methods:
            self._methods["HEAD"] = methods["GET"]
        self._allow = [(b"allow", ", ".join(sorted(self._methods)).encode())]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call: Call = scope["call"]
        method = scope["method"]
        operation = self._methods.get(method)
        if operation is None:
            message = f"{scope['path'][:128]} has no {method}"
            raise Problem(405, "method_not_allowed", message, headers=self._allow)
        if method not in _UNCHANGING:
            refuse_cross_site(call.headers)
        if operation.guarded:
            try:
                call.tenant = await call.gateway.callers.tenant_of(call.headers)
            except BrokerUnavailable:
                operation.unavailable()
                raise
        answer = await operation.run(call)
        if answer.stream is not None:
            async with aclosing(answer.stream) as pieces:
                await _send_stream(send, call, answer, () if method == "HEAD" else pieces)
            return
        await _send(send, answer.status, answer.content_type, answer.headers, answer.body)


def _explain(error: Exception, call: Call) -> Problem:
    """Return the answer to *error*; count what we refused, log what is ours to mend."""
    problem = problem_of(error, call.job_id) if isinstance(error, PenstockError) else None
    if problem is None:
        logger.error("gateway.fault", request_id=call.request_id, path=call.path, exc_info=error)
        return Problem(500, "internal_error", "something went wrong in the gateway; its log knows this request's id")
    if isinstance(problem, BrokenKey):
        logger.error("gateway.broken_key", request_id=call.request_id, path=call.path, reason=problem.reason)
    if call.job_id is None:
        REFUSALS.labels(problem.code).inc()
    return problem


def _stopping(call: Call) -> Problem:
    message = "the gateway is stopping; what it had accepted goes on"
    return Problem(503, "stopping", message, retry_after_s=RETRY_SOON_S, job_id=call.job_id)


async def _send_problem(send: Send, problem: Problem) -> None:
    await _send(send, problem.status, b"application/json", problem.headers, orjson.dumps(problem.value))


async def _send_stream(send: Send, call: Call, answer: Answer, pieces: AsyncIterable[bytes] | tuple[()]) -> None:
    """Send an answer that has no end of its own, while the client is there."""
    lines = [(b"content-type", answer.content_type), *answer.headers]
    async with call.connected():
        await send({"type": "http.response.start", "status": answer.status, "headers": lines})
        if not isinstance(pieces, tuple):
            await send({"type": "http.response.body", "body": answer.body, "more_body": True})
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _send(
    send: Send, status: int, content_type: bytes, headers: Sequence[tuple[bytes, bytes]], body: bytes
) -> None:
    lines = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})
