"""A gateway as a command line sees it: sends requests, obeys Retry-After, waits for jobs.

Used by `penstock ingest`, `penstock verify` and the first steps of `penstock up`. Knows HTTP only: the gateway may be
anywhere.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

import httpx
import orjson
from httpx_aiohttp import AiohttpTransport

from pipeline.settings import service_url

Json = dict[str, Any]

POLL_FIRST_S: Final = 0.02
POLL_CAP_S: Final = 0.5  # a completion lives 60 s by default: it is seen long before it goes
POLL_AT_ONCE: Final = 100  # the gateway's own bound
RETRY_CAP_S: Final = 30.0
RETRY_BASE_S: Final = 0.2


class Unusable(ValueError):
    """An address or a key that no request can be sent with."""


class GatewayUnreachable(Exception):
    """Nobody answers at the gateway's address."""


class GatewayRefused(Exception):
    """The gateway says no.

    Attributes:
        status: HTTP status.
        code: the error's `code`, for programs.
        headers: of the answer.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


def decide_wait_s(status: int, headers: Mapping[str, str], failures: int) -> float | None:
    """Return how long to wait before sending a request again that got this answer, in seconds; None: it is final.

    429 and 503 mean "later". The wait is the gateway's own Retry-After, else it grows with *failures* in a row.
    """
    if status not in {429, 503}:
        return None
    try:
        asked_s = float(headers.get("retry-after", ""))
    except ValueError:
        asked_s = math.nan
    if not math.isfinite(asked_s):
        asked_s = RETRY_BASE_S * 2.0 ** min(failures, 10)
    return min(max(asked_s, 0.05), RETRY_CAP_S)


def next_poll_s(idle_polls: int) -> float:
    """Return the wait before the next poll, after *idle_polls* in a row that found nothing finished."""
    return float(min(POLL_CAP_S, POLL_FIRST_S * 1.5 ** min(idle_polls, 50)))


class Client:
    """One gateway; use as `async with`.

    Args:
        patience_s: how long to go on while the gateway is overloaded or away.
        on_wait: called with the reason whenever something has to be tried again.

    Raises:
        Unusable: no request can be sent with that *url* or that *api_key*.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        patience_s: float = 120.0,
        on_wait: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        try:
            self.url = service_url(url).rstrip("/")
        except ValueError as error:
            raise Unusable(f"--url: {error}") from error
        if not self.url:
            raise Unusable("--url is empty: name a gateway, like http://127.0.0.1:8000")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise Unusable("the API key holds characters that no HTTP header can carry")
        self._patience_s = patience_s
        self._on_wait = on_wait
        self._waiting: dict[str, asyncio.Future[Json]] = {}
        self._poller: asyncio.Task[None] | None = None
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            transport=AiohttpTransport(trust_env=False),  # the stock pool scans itself on every call
            timeout=httpx.Timeout(30.0, connect=5.0),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._poller:
            self._poller.cancel()
            await asyncio.wait({self._poller})
        await self._http.aclose()

    async def send(
        self, method: str, path: str, body: Json | None = None, *, timeout_s: float = 30.0
    ) -> httpx.Response:
        """Send one request; again while the gateway is overloaded or away. Only for what may be sent twice.

        Raises:
            GatewayUnreachable: it stayed away, or overloaded, for longer than our patience.
            GatewayRefused: any status from 400 up that is not "later"; an answer that is no gateway's.
        """
        give_up_s = time.monotonic() + self._patience_s
        failures = 0
        while True:
            try:
                return await self.send_once(method, path, body, timeout_s=timeout_s)
            except GatewayUnreachable as error:
                reason = str(error)
                after_s = min(RETRY_BASE_S * 2.0 ** min(failures, 10), RETRY_CAP_S)
            except GatewayRefused as refusal:
                later_s = decide_wait_s(refusal.status, refusal.headers, failures)
                if later_s is None:
                    raise
                after_s, reason = later_s, str(refusal)
            failures += 1
            if time.monotonic() + after_s > give_up_s:
                raise GatewayUnreachable(reason)
            self._on_wait(reason)
            await asyncio.sleep(after_s)

    async def send_once(
        self, method: str, path: str, body: Json | None = None, *, timeout_s: float = 30.0
    ) -> httpx.Response:
        """Send one request, whatever becomes of it.

        Raises:
            GatewayUnreachable: there was no answer.
            GatewayRefused: any status from 400 up, "later" too; an answer that is no gateway's.
        """
        timeout = httpx.Timeout(timeout_s, connect=5.0)
        try:
            response = await self._http.request(method, path, json=body, timeout=timeout)
        except httpx.HTTPError as error:
            raise GatewayUnreachable(f"no answer from {self.url}: {error or type(error).__name__}") from error
        if response.status_code >= 400:
            raise _refusal(response)
        _check_is_ours(response)
        return response

    async def events(self, path: str, *, silence_s: float = 60.0) -> AsyncGenerator[tuple[str, Json], None]:
        """Yield what is told at *path* as server-sent events, kind and data, until the caller has heard enough.

        Args:
            silence_s: the longest time without a word; gateways say one every few seconds.

        Raises:
            GatewayUnreachable: nothing comes (any more).
            GatewayRefused: as for `send_once`.
        """
        timeout = httpx.Timeout(silence_s, connect=5.0)
        try:
            async with self._http.stream("GET", path, timeout=timeout) as response:
                if response.status_code >= 400:
                    await response.aread()
                    raise _refusal(response)
                kind = ""
                async for line in response.aiter_lines():
                    name, _, value = line.partition(": ")
                    if name == "event":
                        kind = value
                    elif name == "data":
                        yield kind, orjson.loads(value)
        except (httpx.HTTPError, ValueError) as error:
            raise GatewayUnreachable(f"{self.url} tells no events: {error or type(error).__name__}") from error
        raise GatewayUnreachable(f"{self.url} has ended its events")

    async def check(self) -> None:
        """Make sure that somebody answers, overloaded or not, so that a wrong address is known at once.

        Raises:
            GatewayUnreachable: nobody does.
            GatewayRefused: somebody else does.
        """
        try:
            response = await self._http.get("/livez")
        except httpx.HTTPError as error:
            message = f"no gateway at {self.url} ({error or type(error).__name__}); `penstock up` starts one"
            raise GatewayUnreachable(message) from error
        if response.status_code < 400:
            _check_is_ours(response)

    async def outcome(self, job_id: str) -> Json:
        """Wait until a job has ended, and return its status; `lost` when nothing is known of it any more.

        All jobs waited for are asked about together.

        Raises:
            GatewayUnreachable, GatewayRefused: see `send`.
        """
        ended: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        self._waiting[job_id] = ended
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll(), name="poll jobs")
        try:
            return await ended
        finally:
            self._waiting.pop(job_id, None)

    async def _poll(self) -> None:
        idle_polls = 0
        while self._waiting:
            await asyncio.sleep(next_poll_s(idle_polls))
            idle_polls += 1
            asked = list(self._waiting)[:POLL_AT_ONCE]
            try:
                jobs: Json = (await self.send("GET", f"/jobs?ids={','.join(asked)}")).json()["jobs"]
            except (GatewayUnreachable, GatewayRefused) as error:
                for ended in self._waiting.values():
                    if not ended.done():
                        ended.set_exception(error)
                return
            for job_id in asked:
                status = jobs.get(job_id) or {"status": "lost"}
                if job_id not in self._waiting:  # whoever waited has gone
                    continue
                ended = self._waiting.pop(job_id)
                if status["status"] in {"queued", "running"}:
                    self._waiting[job_id] = ended  # at the end of the line: beyond a hundred, all get their turn
                elif not ended.done():
                    ended.set_result(status)
                    idle_polls = 0

    async def documents(self, ids: Sequence[str], collection: str | None = None) -> Json:
        """Return what the index holds of these documents: by id, `chunks` and `digest`, or None.

        Args:
            collection: where they are looked for; None: among what questions are answered from.

        Raises:
            GatewayUnreachable, GatewayRefused: see `send`.
        """
        try:
            where = f"&collection={collection}" if collection else ""
            path = f"/documents?ids={','.join(ids)}{where}"
            found: Json = (await self.send("GET", path, timeout_s=90)).json()["documents"]
        except GatewayRefused as error:
            if error.status not in {502, 504}:
                raise
            reason = f"the index does not answer ({error}); `penstock status` shows whether the retriever runs"
            raise GatewayUnreachable(reason) from error
        return found

    async def ask(self, question: str) -> Json:
        """Return the answer to *question*, with its sources."""
        answer: Json = (await self.send("POST", "/query", {"query": question}, timeout_s=90)).json()
        return answer


def _check_is_ours(response: httpx.Response) -> None:
    try:
        is_ours = response.status_code < 300 and isinstance(response.json(), dict)
    except ValueError:
        is_ours = False
    if not is_ours:
        # 404, so that nobody tries the next document: whatever stands there takes none.
        message = f"{response.status_code} without any JSON: something else than Penstock's gateway answers there"
        raise GatewayRefused(404, "not_a_gateway", message)


def _refusal(response: httpx.Response) -> GatewayRefused:
    try:
        error = response.json()["error"]
        code, message = str(error.get("code")), str(error["message"])
        param = f"{error['param']}: " if error.get("param") else ""
        if not message.startswith(param):  # some messages begin with the field themselves
            message = param + message
    except (ValueError, KeyError, TypeError):
        code, message = "http", f"HTTP {response.status_code}, not in the words of Penstock"
    return GatewayRefused(response.status_code, code, message, response.headers)
