"""The mock replica: a real HTTP server that speaks the OpenAI protocol and behaves as it is told.

It stands where vLLM, llama.cpp or Ollama would: `/v1/chat/completions` (plain and streaming), `/v1/embeddings`,
`/v1/models` and `/livez`. Answers are extractive (`extractive.py`): a question about a document gets a sentence of it.

Rules:
- The behaviour (`behaviour.py`) that a request meets is the one set when it arrives. Latencies and failures are drawn
  from the seed in the order of arrival, each from a sequence of its own.
- Slots are given out in the order of arrival, as vLLM admits its waiting requests; bad requests and refusals need none.
- A client that goes away ends its request at once, waiting or running: the slot is free, the record says `aborted`.
- Each POST under /v1 leaves exactly one record (`record.py`): a line of the record file the moment it ends, and one of
  the last few thousand at `GET /mock/requests`, where those in hand stand too.

For tests, while it runs: `GET` and `DELETE /mock/requests` (the counts are exact, the list is bounded), `GET`, `POST`
and `DELETE /mock/behaviour` (read it, change some of its fields, go back to the options').

Raw ASGI, since a replica that costs more than the pipeline it stands behind would be measured in the pipeline's place.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import time
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import TYPE_CHECKING
from urllib.parse import unquote

import orjson
import uvicorn
import uvloop

from loadtest.behaviour import Behaviour, Mode, parse_latency
from loadtest.protocol import (
    JSON,
    ApiError,
    Reply,
    Request,
    check_model,
    list_models,
    one_model,
    read_chat,
    read_embeddings,
    read_images,
    read_json,
)
from loadtest.record import Ledger

if TYPE_CHECKING:
    from asyncio import Future, Task
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from starlette.types import Receive, Scope, Send

    from loadtest.record import Entry

MAX_BODY_BYTES = 32 * 1024 * 1024
_KEEP_ALIVE_S = 300  # longer than any client's pool keeps a connection: then none is closed under a request on its way
_GRACE_S = 1  # what is in hand when told to stop has this long to end

_GARBAGE = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>\n"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MockOptions:
    """How a mock replica starts. Latency, pace, slots and fail rate are those of `Behaviour`.

    Args:
        host: address to listen on; one that is no address of this machine fails in `run`.
        port: 0 takes any free one; the ready line names it.
        latency: `0.05`, `fixed:0.05` or `lognormal:MEDIAN,SIGMA`, in seconds.
        seed: latencies and failures are drawn from it.
        record: file that gets one JSON line for each request, at its end; it is appended to, and may be shared.
        models: names served, others are 404; none: any name is served.
    Raises:
        ValueError: a field out of its range.
    """

    host: str = "127.0.0.1"
    port: int = 0
    latency: str = "fixed:0.05"
    tokens_per_second: float = 0.0
    slots: int = 16
    fail_rate: float = 0.0
    seed: int = 0
    record: Path | None = None
    models: tuple[str, ...] = ()
    behaviour: Behaviour = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.host:
            raise ValueError("host must be an address to listen on")
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"port must lie in 0 to 65535, not {self.port}")
        behaviour = Behaviour(parse_latency(self.latency), self.tokens_per_second, self.slots, self.fail_rate)
        object.__setattr__(self, "behaviour", behaviour)


def run(options: MockOptions) -> None:
    """Serve until SIGTERM or SIGINT, then end what is in hand within a second and return.

    One line of JSON on stdout says when and where: `{"ready": "mock-llm", "url": "http://127.0.0.1:40123"}`.

    Raises:
        OSError: the address cannot be listened on or the record not be written; its text names which.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, _listen(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        replica = Replica(options, url)
        try:
            runner.run(_Server(replica).serve(sockets=[listener]))
        finally:
            replica.close()


class Replica:
    """The ASGI application. One event loop runs it; nothing in it is shared with another thread."""

    def __init__(self, options: MockOptions, url: str) -> None:
        self.url = url
        self._options = options
        self._behaviour = options.behaviour
        self._slots = _Slots(options.slots)
        self._ledger = Ledger(url, options.record)
        self._latencies = Random(f"{options.seed}:latency")
        self._failures = Random(f"{options.seed}:failure")
        self._started = int(time.time())

    def __repr__(self) -> str:
        return f"<Replica {self.url} {self._slots!r} {dict(self._ledger.counts)}>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        call = _Call(receive, send, dict(scope["headers"]).get(b"x-request-id"))
        try:
            await self._route(scope["method"], scope["path"], call)
        except ApiError as error:
            with suppress(_ClientGone):
                await call.answer(error.status, error.body)
        except _ClientGone:
            pass
        except Exception:  # the outermost edge: uvicorn's own log is silent, see _Server
            _log.exception("the mock replica failed at %s %s", scope["method"], scope["path"])
            raise
        finally:
            call.close()

    def close(self) -> None:
        """Close the record file."""
        self._ledger.close()

    async def _route(self, method: str, path: str, call: _Call) -> None:
        match method, path:
            case "POST", "/v1/chat/completions":
                await self._serve(call, path, read_chat)
            case "POST", "/v1/embeddings":
                await self._serve(call, path, read_embeddings)
            case "POST", "/v1/images/generations":
                await self._serve(call, path, read_images)
            case "GET", "/v1/models":
                await call.answer(200, list_models(self._options.models, self._started))
            case "GET", "/livez":
                await call.answer(200, b'{"status":"ok"}')
            case "GET", "/mock/requests":
                await call.answer(200, self._ledger.as_json(self._slots.running, self._slots.waiting))
            case "DELETE", "/mock/requests":
                self._ledger.clear()
                await call.answer(200, self._ledger.as_json(self._slots.running, self._slots.waiting))
            case (("GET" | "POST" | "DELETE"), "/mock/behaviour"):
                await self._change(call, method)
            case "GET", _ if path.startswith("/v1/models/"):
                name = unquote(path.removeprefix("/v1/models/"))
                await call.answer(200, one_model(name, self._options.models, self._started))
            case _:
                self._refuse(method, path)

    def _refuse(self, method: str, path: str) -> None:
        made = {"/v1/chat/completions", "/v1/embeddings", "/v1/images/generations"}
        if path in made | {"/v1/models", "/livez", "/mock/requests", "/mock/behaviour"}:
            raise ApiError(405, f"{path} does not take {method}.", code="method_not_allowed")
        raise ApiError(404, f"There is nothing at {path}.", code="not_found")

    async def _change(self, call: _Call, method: str) -> None:
        if method == "POST":
            patch = read_json(await call.body())
            try:
                self._behaviour = self._behaviour.changed(patch)
            except ValueError as error:
                raise ApiError(400, str(error)) from None
        elif method == "DELETE":
            self._behaviour = self._options.behaviour
        self._slots.resize(self._behaviour.slots)
        await call.answer(200, orjson.dumps(self._behaviour.as_json()))

    async def _serve(self, call: _Call, path: str, read: Callable[[bytes], Request]) -> None:
        behaviour = self._behaviour
        entry = self._ledger.open(path, call.request_id)
        try:
            request = read(await call.body())
            entry.asked = request.asked
            check_model(request.model, self._options.models)
            # On record before the last byte leaves: who has the answer finds it there.
            outcome = "completed" if behaviour.mode is Mode.NORMAL else "failed"
            call.before_last = partial(self._ledger.end, entry, outcome, 200)
            await self._work(call, request, behaviour, entry)
            self._ledger.end(entry, "failed", 200)  # an answer that was cut off had no last byte
        except ApiError as error:
            self._ledger.end(entry, "failed", error.status)
            await call.answer(error.status, error.body, behaviour.retry_after_s)
        finally:
            self._ledger.end(entry, "aborted")  # the client left, or this process is stopping

    async def _work(self, call: _Call, request: Request, behaviour: Behaviour, entry: Entry) -> None:
        if behaviour.status is not None:
            raise ApiError(behaviour.status, f"This replica was told to answer {behaviour.status}.", code="refused")
        latency_s = behaviour.latency.draw_s(self._latencies)
        is_failing = self._failures.random() < behaviour.fail_rate
        turn = self._slots.take()
        try:
            if turn is not None:
                await call.wait_for(turn)
            began_s = time.monotonic()
            entry.began_s = time.time()
            if behaviour.mode is Mode.HANG:
                await call.wait_for_end()
            if is_failing:
                await call.wait_until(began_s + latency_s)
                raise ApiError(500, "This replica was told to fail now and then.", code="internal_error")
            reply = request.reply(f"mock-{entry.n}", int(entry.began_s))
            entry.tokens = reply.tokens
            await _send(call, reply, behaviour, began_s + latency_s)
        finally:
            self._slots.give_back(turn)


async def _send(call: _Call, reply: Reply, behaviour: Behaviour, first_token_s: float) -> None:
    """Send *reply* in the shape and at the pace of *behaviour*; *first_token_s* is when its tokens begin, monotonic."""
    pace = behaviour.tokens_per_second
    is_plain = reply.content_type == JSON
    await call.wait_until(first_token_s + (reply.tokens / pace if is_plain and pace else 0.0))
    match behaviour.mode:
        case Mode.GARBAGE:
            await call.answer(200, _GARBAGE, content_type=b"text/html")
        case Mode.EMPTY:
            body = b'{"object":"list","choices":[],"data":[]}' if is_plain else b"data: [DONE]\n\n"
            await call.answer(200, body, content_type=reply.content_type)
        case Mode.TRUNCATED | Mode.STALLED as mode:
            whole = b"".join(reply.parts)
            await call.start(200, reply.content_type, len(whole) if is_plain else None)
            await call.send_part(whole[: len(whole) // 2])
            if mode is Mode.STALLED:
                await call.wait_for_end()
        case _ if is_plain:
            await call.answer(200, reply.parts[0])
        case _:
            await call.start(200, reply.content_type, None)
            await _stream(call, reply.parts, pace, first_token_s)


async def _stream(call: _Call, parts: list[bytes], pace: float, start_s: float) -> None:
    """Send part n at *start_s* + n / *pace*, late ones together, so that the pace holds over the whole answer."""
    sent = 0
    while sent < len(parts):
        due = len(parts)
        if pace:
            # Half a millisecond of mercy: uvloop rounds its timers to whole ones and may wake that much early.
            due = min(due, 1 + int((time.monotonic() - start_s + 0.0005) * pace))
        if due > sent:
            await call.send_part(b"".join(parts[sent:due]), more=due < len(parts))
            sent = due
        else:
            await call.wait_until(start_s + sent / pace)


class _ClientGone(Exception):
    """The client closed the connection before its answer was whole."""


class _Call:
    """One request and its answer. From the first wait on, a watcher reads the connection for the client's leaving."""

    __slots__ = ("_receive", "_send", "_watcher", "before_last", "request_id")

    def __init__(self, receive: Receive, send: Send, request_id: bytes | None) -> None:
        self._receive = receive
        self._send = send
        self._watcher: Task[None] | None = None
        self.request_id = request_id
        self.before_last: Callable[[], None] | None = None  # called just before the last piece of the body is sent

    async def body(self) -> bytes:
        """Return the whole body.

        Raises:
            ApiError: 413, above MAX_BODY_BYTES.
            _ClientGone: it never came whole.
        """
        parts, size = [], 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > MAX_BODY_BYTES:
                raise ApiError(413, f"The body is longer than {MAX_BODY_BYTES} bytes.", code="body_too_large")
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts) if len(parts) > 1 else part

    async def wait_until(self, instant_s: float) -> None:
        """Return at *instant_s* on the monotonic clock, give or take a millisecond; at once when it is past.

        Raises:
            _ClientGone: the client left first.
        """
        delay_s = instant_s - time.monotonic()
        if delay_s > 0 and (await asyncio.wait({self._watch()}, timeout=delay_s))[0]:
            raise _ClientGone

    async def wait_for(self, turn: Future[None]) -> None:
        """Return when *turn* is done.

        Raises:
            _ClientGone: the client left first.
        """
        watcher = self._watch()
        await asyncio.wait({watcher, turn}, return_when=asyncio.FIRST_COMPLETED)
        if watcher.done():
            raise _ClientGone

    async def wait_for_end(self) -> None:
        """Wait until the client leaves.

        Raises:
            _ClientGone: always, in the end.
        """
        await asyncio.wait({self._watch()})
        raise _ClientGone

    async def answer(
        self, status: int, body: bytes, retry_after_s: float | None = None, content_type: bytes = JSON
    ) -> None:
        """Send a whole answer."""
        await self.start(status, content_type, len(body), retry_after_s if status >= 400 else None)
        await self.send_part(body, more=False)

    async def start(
        self, status: int, content_type: bytes, length: int | None, retry_after_s: float | None = None
    ) -> None:
        """Send the head; without a length the body travels in chunks."""
        headers = [(b"content-type", content_type)]
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        if self.request_id is not None:
            headers.append((b"x-request-id", self.request_id))
        if retry_after_s is not None:
            headers.append((b"retry-after", b"%g" % retry_after_s))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def send_part(self, data: bytes, *, more: bool = True) -> None:
        """Send a piece of the body; an answer whose last piece had *more* is cut off by uvicorn when its call ends."""
        if not more and self.before_last is not None:
            self.before_last()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    def close(self) -> None:
        """End the watcher, if there is one."""
        if self._watcher is not None:
            self._watcher.cancel()

    def _watch(self) -> Task[None]:
        # Not before the first wait: a task for each request is a good part of what an answer without latency costs.
        if self._watcher is None:
            self._watcher = asyncio.get_running_loop().create_task(self._until_gone(), name="watch-client")
        return self._watcher

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


class _Slots:
    """A bounded number of requests at work, the others in line."""

    def __init__(self, limit: int) -> None:
        self._limit = limit  # 0: no bound
        self._running = 0
        self._line: deque[Future[None]] = deque()

    def __repr__(self) -> str:
        return f"<slots {self.running}/{self._limit or 'any'}, {self.waiting} waiting>"

    @property
    def running(self) -> int:
        """How many hold a slot."""
        return self._running

    @property
    def waiting(self) -> int:
        """How many stand in line."""
        return len(self._line)

    def take(self) -> Future[None] | None:
        """Take a slot at once (None), or a place in line: a future, done when the slot is given."""
        # Nobody passes the line, not even when a slot is free: it is free only until the line moves up.
        if self._has_room() and not self._line:
            self._running += 1
            return None
        turn: Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        return turn

    def give_back(self, turn: Future[None] | None) -> None:
        """Return what `take` gave, be it a slot or a place in line."""
        if turn is not None and not turn.done():
            self._line.remove(turn)
            return
        self._running -= 1
        self._move_up()

    def resize(self, limit: int) -> None:
        """Change the bound; who holds a slot above a lower one keeps it."""
        self._limit = limit
        self._move_up()

    def _has_room(self) -> bool:
        return not self._limit or self._running < self._limit

    def _move_up(self) -> None:
        while self._line and self._has_room():
            self._running += 1
            self._line.popleft().set_result(None)


class _Server(uvicorn.Server):
    """uvicorn with a ready line, and an end by signal that is an end and not a crash."""

    def __init__(self, replica: Replica) -> None:
        self._url = replica.url
        super().__init__(
            uvicorn.Config(
                replica,
                http="httptools",
                ws="none",
                lifespan="off",
                backlog=2048,
                access_log=False,
                log_config=None,
                # It would complain of each answer that is cut off on purpose; `Replica` logs its own faults.
                log_level="critical",
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_GRACE_S,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets=sockets)
        sys.stdout.write(orjson.dumps({"ready": "mock-llm", "url": self._url}).decode() + "\n")
        sys.stdout.flush()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at SIGTERM or SIGINT; unlike uvicorn's own, do not raise the signal again once all is done."""
        loop = asyncio.get_running_loop()
        handled = (signal.SIGTERM, signal.SIGINT)
        for number in handled:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise OSError(f"the mock replica cannot listen on {host}, port {port}: {error.strerror}") from None
    return listener


def main(arguments: list[str]) -> int:
    """Serve on the port that is given, with the defaults for the rest; return the process's exit code.

    `penstock mock-llm` is for people; its command line takes longer to import than all of this, and `penstock up`
    starts several replicas.
    """
    try:
        run(MockOptions(port=int(arguments[0])))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"penstock: mock-llm: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
