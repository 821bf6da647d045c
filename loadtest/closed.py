"""The closed loop: a fixed number of clients, each sending its next request when it has the answer to the one before.

A closed loop measures what the target does under so many requests in flight; it slows down when the target does, so it
says nothing of what callers meet who do not wait for each other. The HTTP client is aiohttp by itself: httpx's own pool
costs milliseconds of CPU at 50 in flight, and the report would then be about the load tester.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import aiohttp
import orjson
import uvloop

from loadtest.questions import read_questions
from loadtest.report import Report, Sample, render, summarize

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

EXIT_OK = 0  # every request succeeded
EXIT_FAILURES = 1  # the report is written, and at least one request in it failed
EXIT_USAGE = 2  # bad options, or nothing listens at the target; no request was sent
EXIT_INTERRUPTED = 130  # stopped by a signal; the report covers what had ended by then

DEFAULT_REQUESTS = 500

_REACH_S = 0.6  # with the start of the interpreter, a target that takes no connection is reported within a second
_PAUSE_S = 0.05  # after a failed connection: a dead target must not be counted dead a million times a minute
_MAX_CODE_CHARS = 40


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """One load test.

    Args:
        url: base of the target, http or https; the requests go to `/query` under it.
        concurrency: requests in flight.
        requests: end after so many; and
        duration_s: start none after so long; whichever comes first. Neither: DEFAULT_REQUESTS.
        questions: file with one question on each line, asked in turn and over again; None: the built-in ones.
        timeout_s: a request without its whole answer by then has failed.
        api_key: sent as bearer token.
        as_json: the report on stdout is one JSON object.
    Raises:
        ValueError: a field out of its range.
    """

    url: str = "http://127.0.0.1:8000"
    concurrency: int = 50
    requests: int | None = None
    duration_s: float | None = None
    questions: Path | None = None
    timeout_s: float = 60.0
    api_key: str | None = None
    as_json: bool = False

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            is_web = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # no port between 1 and 65535
            is_web = False
        if not is_web:
            raise ValueError(f"url must read http://HOST:PORT or https://HOST:PORT, not {self.url!r}")
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {self.concurrency}")
        if self.requests is not None and self.requests < 1:
            raise ValueError(f"requests must be at least 1, not {self.requests}")
        for name, span_s in (("duration", self.duration_s), ("timeout", self.timeout_s)):
            if span_s is not None and not 0 < span_s < float("inf"):
                raise ValueError(f"{name} must be above 0 seconds, not {span_s:g}")


class Unreachable(Exception):
    """Nothing takes connections at the target."""


def run(options: LoadOptions) -> int:
    """Run the test, write the report to stdout, and return the exit code; a fault is one line on stderr."""
    try:
        questions = read_questions(options.questions)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            report = runner.run(measure(options, questions))
    except (ValueError, Unreachable) as error:
        sys.stderr.write(f"loadtest: {error}\n")
        return EXIT_USAGE
    sys.stdout.write(orjson.dumps(report.as_json()).decode() + "\n" if options.as_json else render(report))
    if report.is_interrupted:
        return EXIT_INTERRUPTED
    return EXIT_FAILURES if report.failed else EXIT_OK


async def measure(options: LoadOptions, questions: Sequence[str]) -> Report:
    """Run the test until it is done, or until SIGINT or SIGTERM, and return what was found.

    Raises:
        Unreachable: nothing takes connections at the target; nothing was sent.
    """
    await _reach(options.url)
    run = _Run(options, questions)
    work = asyncio.create_task(run.all_clients(), name="clients")
    loop = asyncio.get_running_loop()
    handled = (signal.SIGINT, signal.SIGTERM)
    for number in handled:
        loop.add_signal_handler(number, work.cancel)
    try:
        await asyncio.wait({work})
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
        work.cancel()
    if not work.cancelled():
        work.result()  # a fault of the load tester itself comes out here
    return run.report(is_interrupted=work.cancelled())


class _Run:
    """A run under way. The clients append to `_samples`; nobody else writes."""

    def __init__(self, options: LoadOptions, questions: Sequence[str]) -> None:
        self._options = options
        self._target = options.url.rstrip("/") + "/query"
        self._samples: list[Sample] = []
        self._sent = 0
        self._began_s = time.perf_counter()
        self._bodies = self._plan([orjson.dumps({"query": question}) for question in questions])

    async def all_clients(self) -> None:
        options = self._options
        headers = {"content-type": "application/json", "accept": "application/json"}
        if options.api_key is not None:
            headers["authorization"] = f"Bearer {options.api_key}"
        clients = min(options.concurrency, self._requests or options.concurrency)
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=None),  # looked up once, kept for the whole run
                timeout=aiohttp.ClientTimeout(total=options.timeout_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=headers,
            ) as session,
            asyncio.TaskGroup() as tasks,
        ):
            self._began_s = time.perf_counter()
            for n in range(clients):
                tasks.create_task(self._client(session), name=f"client-{n}")

    def report(self, *, is_interrupted: bool) -> Report:
        duration_s = time.perf_counter() - self._began_s
        unfinished = self._sent - len(self._samples)
        return summarize(self._samples, duration_s, unfinished=unfinished, is_interrupted=is_interrupted)

    @property
    def _requests(self) -> int | None:
        has_end = self._options.requests is not None or self._options.duration_s is not None
        return self._options.requests if has_end else DEFAULT_REQUESTS

    def _plan(self, bodies: list[bytes]) -> Iterator[bytes]:
        """Yield the body of each request to send, to whichever client asks next, until the run is over."""
        ends_s = float("inf") if self._options.duration_s is None else self._options.duration_s
        for body in itertools.islice(itertools.cycle(bodies), self._requests):
            if time.perf_counter() - self._began_s >= ends_s:
                return
            self._sent += 1
            yield body

    async def _client(self, session: aiohttp.ClientSession) -> None:
        for body in self._bodies:
            sample = await _ask(session, self._target, body)
            self._samples.append(sample)
            if sample.error == _NO_CONNECTION:
                await asyncio.sleep(_PAUSE_S)


_NO_CONNECTION = "no connection"


async def _ask(session: aiohttp.ClientSession, target: str, body: bytes) -> Sample:
    began_s = time.perf_counter()
    try:
        async with session.post(target, data=body, allow_redirects=False) as response:
            answer = await response.read()
            status = response.status
    except TimeoutError:
        return Sample(time.perf_counter() - began_s, "timeout")
    except aiohttp.ClientConnectorError:
        return Sample(time.perf_counter() - began_s, _NO_CONNECTION)
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, aiohttp.ClientPayloadError):
        return Sample(time.perf_counter() - began_s, "connection lost")
    except aiohttp.ClientError as error:
        return Sample(time.perf_counter() - began_s, type(error).__name__)
    return read_answer(time.perf_counter() - began_s, status, answer)


def read_answer(latency_s: float, status: int, body: bytes) -> Sample:
    """Return the sample of one answer: a success is 200 with a JSON object; an error's kind is its status and code."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = None
    fields = answer if isinstance(answer, dict) else {}
    if status != 200:
        error = fields.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        return Sample(
            latency_s, f"http {status} {code[:_MAX_CODE_CHARS]}" if isinstance(code, str) else f"http {status}"
        )
    if not isinstance(answer, dict):
        return Sample(latency_s, "not json")
    return Sample(latency_s, None, _name(fields.get("worker")), _name(fields.get("replica")))


def _name(value: object) -> str | None:
    # One string for each name instead of one for each answer: a long run holds all its samples.
    return sys.intern(value) if isinstance(value, str) else None


async def _reach(url: str) -> None:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        async with asyncio.timeout(_REACH_S):
            _, writer = await asyncio.open_connection(parts.hostname, port)
    except OSError as error:  # TimeoutError is one
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or "no answer"
        raise Unreachable(f"cannot reach {url}: {why}") from None
    writer.close()
    await writer.wait_closed()
