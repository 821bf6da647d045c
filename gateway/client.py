"""A gateway as a command line sees it: sends requests, obeys Retry-After, waits for jobs.

Used by `penstock ingest` and by the first steps of `penstock up`. Knows HTTP only: the gateway may be anywhere.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, Self

import httpx
from httpx_aiohttp import AiohttpTransport

Json = dict[str, Any]

POLL_FIRST_S: Final = 0.02
POLL_CAP_S: Final = 1.0  # a completion lives 60 s by default: it is seen long before it goes
RETRY_CAP_S: Final = 30.0
RETRY_BASE_S: Final = 0.2


class GatewayUnreachable(Exception):
    """Nobody answers at the gateway's address."""


class GatewayRefused(Exception):
    """The gateway says no, and would say so again.

    Attributes:
        status: HTTP status.
        code: the error's `code`, for programs.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


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


def next_poll_s(waited_s: float) -> float:
    """Return the wait before asking again for a job that one has waited *waited_s* for: a fifth of that, bounded."""
    return min(POLL_CAP_S, max(POLL_FIRST_S, waited_s / 5))


class Client:
    """One gateway; use as `async with`.

    Args:
        patience_s: how long to go on while the gateway is overloaded or away.
        on_wait: called with the reason whenever something has to be tried again.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        patience_s: float = 120.0,
        on_wait: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self.url = url.rstrip("/")
        self._patience_s = patience_s
        self._on_wait = on_wait
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
        await self._http.aclose()

    async def send(
        self, method: str, path: str, body: Json | None = None, *, timeout_s: float = 30.0
    ) -> httpx.Response:
        """Send one request; again while the gateway is overloaded or away. Only for what may be sent twice.

        Raises:
            GatewayUnreachable: it stayed away, or overloaded, for longer than our patience.
            GatewayRefused: any status from 400 up that is not "later".
        """
        timeout = httpx.Timeout(timeout_s, connect=5.0)
        give_up_s = time.monotonic() + self._patience_s
        failures = 0
        while True:
            try:
                response = await self._http.request(method, path, json=body, timeout=timeout)
            except httpx.HTTPError as error:
                reason = f"no answer from {self.url}: {error or type(error).__name__}"
                after_s = min(RETRY_BASE_S * 2.0 ** min(failures, 10), RETRY_CAP_S)
            else:
                if response.status_code < 400:
                    return response
                refusal = _refusal(response)
                later_s = decide_wait_s(response.status_code, response.headers, failures)
                if later_s is None:
                    raise refusal
                after_s, reason = later_s, str(refusal)
            failures += 1
            if time.monotonic() + after_s > give_up_s:
                raise GatewayUnreachable(reason)
            self._on_wait(reason)
            await asyncio.sleep(after_s)

    async def check(self) -> None:
        """Make sure that somebody answers, overloaded or not, so that a wrong address is known at once.

        Raises:
            GatewayUnreachable: nobody does.
        """
        try:
            await self._http.get("/livez")
        except httpx.HTTPError as error:
            message = f"no gateway at {self.url} ({error or type(error).__name__}); `penstock up` starts one"
            raise GatewayUnreachable(message) from error

    async def outcome(self, path: str) -> Json:
        """Wait until the job whose status stands at *path* has ended, and return that status.

        Raises:
            GatewayUnreachable, GatewayRefused: see `send`; 404 when its outcome is no longer kept.
        """
        began_s = time.monotonic()
        while True:
            status: Json = (await self.send("GET", path)).json()
            if status.get("status") not in {"queued", "running"}:
                return status
            await asyncio.sleep(next_poll_s(time.monotonic() - began_s))

    async def ask(self, question: str) -> Json:
        """Return the answer to *question*, with its sources."""
        answer: Json = (await self.send("POST", "/query", {"query": question}, timeout_s=90)).json()
        return answer


def _refusal(response: httpx.Response) -> GatewayRefused:
    try:
        error = response.json()["error"]
        param = f"{error['param']}: " if error.get("param") else ""
        return GatewayRefused(response.status_code, str(error.get("code")), f"{param}{error['message']}")
    except (ValueError, KeyError, TypeError):
        return GatewayRefused(response.status_code, "http", f"HTTP {response.status_code}")
