"""Connections to Redis: one command in flight on each, never a blind retry.

redis-py's client repeats a command whose reply was lost, and so can run an XADD twice; its pool can hand a connection
with a stale reply to the next caller. A `Link` is one connection with neither: it sends one command at a time, is
closed when a call is cancelled or times out, and says whether the command may have run (`BrokerUnavailable.unknown`).
The caller decides what may be sent again. This file is where errors of redis-py and of hiredis end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

import hiredis
import structlog
from redis import exceptions as redis_errors
from redis.asyncio.connection import Connection, UnixDomainSocketConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from pipeline.clock import monotonic_us
from pipeline.errors import BrokerUnavailable, ConfigError, Overloaded, PenstockError, RetryLater
from pipeline.limit import Limit
from pipeline.metrics import TURN_WAIT_S
from pipeline.wire import Wire

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

    from pipeline.clock import Clock
    from pipeline.scripts import Script
    from pipeline.settings import RedisSettings

log = structlog.get_logger(__name__)

A = TypeVar("A")

Argument = str | bytes | int | float

_ELSEWHERE: Final = ("LOADING", "READONLY", "NOAUTH", "WRONGPASS", "ERR max number of clients")
"""Another connection may fare better: after a failover the address leads to the new primary, and each logs in anew."""
_NOT_NOW: Final = (*_ELSEWHERE, "BUSY ", "MASTERDOWN", "CLUSTERDOWN", "MISCONF", "TRYAGAIN", "NOREPLICAS")
"""Redis did not execute the command and may do so later (BUSY: a script runs; MISCONF: persistence fails)."""

OUT_OF_MEMORY_AGAIN_S: Final = 1.0
"""After which a job that Redis had no room for is tried again."""
ANSWER_WITHIN_S: Final = 0.9
"""With Redis away a gateway's client hears 503 within a second."""

_SLICES: Final = 9
"""Redis' time is counted in so many parts; a process that stands still meanwhile loses one of them, not all."""

IN_LINE_FOR_S: Final = 20.0
"""A thousand who come at once have all had their turn by then; many clients give up after thirty seconds."""

_PING_EVERY_S: Final = 1.0
"""A subscription silent for so long is probed: hints are missed no longer than this and one reply's time-out."""
_NOTHING: Final = object()


class GroupMissing(PenstockError):
    """A stream or its consumer group is gone."""


class OutOfMemory(PenstockError):
    """Redis has reached its maxmemory and refuses to grow."""


class CommandRefused(PenstockError):
    """Redis refused a command for a reason that will not pass by itself."""


class Link:
    """One connection, opened when needed, closed when in doubt.

    Attributes:
        connected_at_us: when the present connection was made, on the monotonic clock; None while there is none.
        client_id: what Redis calls the present connection.
    """

    def __init__(self, settings: RedisSettings, name: str) -> None:
        self.name = name
        self.connected_at_us: int | None = None
        self.client_id = 0
        self._settings = settings
        self._turn = _Turn(name)
        self._limit = Limit()
        self._connection = _make_connection(settings, name)
        self._wire: Wire | None = None

    async def open(self, timeout_s: float) -> None:
        """Connect now, where there is no connection, so that what is sent next can be chosen after that wait.

        Raises:
            BrokerUnavailable: no connection was made in time.
        """
        async with self._turn:
            if not self._is_connected():
                await self._connect(timeout_s)

    async def call(self, *args: Argument, timeout_s: float | None = None) -> Any:
        """Run one command and return its reply, bytes as bytes.

        Args:
            timeout_s: how long to wait for the reply; None takes the setting. A blocking command needs more. Where it
                is shorter than the settings say, a connection that has to be made first gets no longer either.

        Raises:
            BrokerUnavailable: no connection, or the reply did not come (`unknown` says whether it may have run).
            GroupMissing, OutOfMemory, CommandRefused: Redis said no; nothing was changed by a plain command.
        """
        async with self._turn:
            return await self._call(args, timeout_s or self._settings.reply_timeout_s)

    async def run(
        self, script: Script, keys: Sequence[Argument], args: Sequence[Argument], *, timeout_s: float | None = None
    ) -> Any:
        """Run a script by its hash, loading it where Redis does not have it; `timeout_s` and errors as for `call`."""
        async with self._turn:
            timeout_s = timeout_s or self._settings.reply_timeout_s
            try:
                return await self._call(("EVALSHA", script.sha, len(keys), *keys, *args), timeout_s)
            except _ScriptMissing:
                return await self._call(("EVAL", script.text, len(keys), *keys, *args), timeout_s)

    async def time_us(self) -> int:
        """Return Redis' clock, in microseconds since the epoch; errors as for `call`."""
        seconds, micros = await self.call("TIME")
        return int(seconds) * 1_000_000 + int(micros)

    def held_for_s(self) -> float:
        """Return how long the present connection has held, in seconds; 0 while there is none."""
        if self.connected_at_us is None or not self._is_connected():
            return 0.0
        return (monotonic_us() - self.connected_at_us) / 1e6

    async def close(self) -> None:
        """Close the connection; a later call opens a new one."""
        self.connected_at_us = self._wire = None
        await self._connection.disconnect(nowait=True)

    async def subscribe(self, *channels: str) -> AsyncGenerator[tuple[str, bytes], None]:
        """Yield (channel, message) as they come. Ends with `BrokerUnavailable` when the connection does.

        The first item is ("", b""): from now on messages are heard; what was said before is not.
        A silent connection is probed with PING, so that a half-open one is noticed.
        """
        async with self._turn:
            try:
                await self._call(("SUBSCRIBE", *channels), self._settings.reply_timeout_s)
                yield "", b""
                while True:
                    message = await self._exchange(None, _PING_EVERY_S)
                    if message is _NOTHING:
                        message = await self._exchange(("PING",), self._settings.reply_timeout_s)
                        if message is _NOTHING:
                            raise BrokerUnavailable("the subscription's connection is dead")
                    if message[0] == b"message":
                        yield message[1].decode(), message[2]
            finally:
                await self.close()  # it hears what nobody waits for, and the next caller would take that for a reply

    async def _call(self, args: Sequence[Argument], timeout_s: float) -> Any:
        if not self._is_connected():
            await self._connect(timeout_s)
        reply = await self._exchange(args, timeout_s)
        if reply is _NOTHING:
            await self.close()
            raise BrokerUnavailable(f"{args[0]!s} timed out after {timeout_s} s", unknown=True)
        return reply

    async def _refusal(self, text: str) -> PenstockError:
        if text.startswith(_ELSEWHERE):
            await self.close()
        return _translate(text)

    async def _connect(self, at_most_s: float) -> None:
        await self.close()  # what is left of the last one
        try:
            async with _time_of_redis(min(self._settings.connect_timeout_s, at_most_s)):
                await self._connection.connect()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
        except redis_errors.AuthenticationError as error:
            raise ConfigError(f"Redis refuses the credentials in its URL: {error}") from error
        except (redis_errors.RedisError, OSError, TimeoutError) as error:
            await self.close()
            raise BrokerUnavailable(f"no connection to Redis: {str(error) or 'timed out'}") from error
        if not self._connection.is_connected:
            raise BrokerUnavailable("no connection to Redis: it was closed meanwhile")
        self._wire = Wire(self._connection)
        self.connected_at_us = monotonic_us()
        self.client_id = await self._call(("CLIENT", "ID"), min(self._settings.reply_timeout_s, at_most_s))

    def _is_connected(self) -> bool:
        return self._wire is not None and not self._wire.is_lost

    async def _exchange(self, args: Sequence[Argument] | None, timeout_s: float) -> Any:
        """Send one command (None: none) and return the next reply, both in time.

        Returns `_NOTHING` when time was over, with the connection still open.
        """
        wire = self._wire
        if wire is None:
            raise BrokerUnavailable("Redis went away: the connection was closed", unknown=True)
        try:
            with self._limit.of(timeout_s):
                if args is not None:
                    wire.send(args)
                reply = await wire.reply()
        except (hiredis.HiredisError, OSError, RuntimeError) as error:  # RuntimeError: uvloop, on a closed transport
            if isinstance(error, TimeoutError) and self._limit.expired:
                return _NOTHING
            await self.close()
            raise BrokerUnavailable(f"Redis went away: {error}", unknown=True) from error
        except BaseException:
            # Cancelled half-way through a command, or while a reply is due: the next caller must never get it.
            await self.close()
            raise
        if type(reply) is hiredis.ReplyError:
            raise await self._refusal(str(reply))
        return reply

    def __repr__(self) -> str:
        return f"<Link {self.name} connected={self.connected_at_us is not None}>"


@asynccontextmanager
async def _time_of_redis(span_s: float) -> AsyncGenerator[None, None]:
    """End the block with `TimeoutError` after *span_s* seconds, without the time that this process itself stood still.

    A thousand requests that arrive together take a second before one of them can look whether Redis has answered. That
    is not Redis' fault, and its answer lies there.
    """
    loop = asyncio.get_running_loop()
    left = _SLICES
    timer: asyncio.TimerHandle

    def ring() -> None:
        nonlocal left, timer
        left -= 1
        if left:
            timer = loop.call_later(span_s / _SLICES, ring)
        else:
            limit.reschedule(loop.time())

    async with asyncio.timeout(None) as limit:
        timer = loop.call_later(span_s / _SLICES, ring)
        try:
            yield
        finally:
            timer.cancel()


class _Turn(asyncio.Lock):
    """The right to use a connection; a wait for it is measured, and where there is none nothing is."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._wait_s = TURN_WAIT_S.labels(name)

    async def __aenter__(self) -> None:
        if not self.locked():
            await self.acquire()
            return
        since_us = monotonic_us()
        await self.acquire()
        self._wait_s.observe((monotonic_us() - since_us) / 1e6)


class _ScriptMissing(PenstockError):
    """Redis does not hold the script."""


def _translate(text: str) -> PenstockError:
    if text.startswith("NOSCRIPT"):
        return _ScriptMissing(text)
    if text.startswith("OOM") or "OOM command" in text:
        return OutOfMemory(text)
    if "NOGROUP" in text or "UNBLOCKED" in text:
        return GroupMissing(text)
    if text.startswith(_NOT_NOW):
        return BrokerUnavailable(f"Redis cannot work now: {text}")
    return CommandRefused(text.removeprefix("ERR "))


def _make_connection(settings: RedisSettings, name: str) -> AbstractConnection:
    try:
        options: dict[str, Any] = dict(parse_url(settings.url))
    except ValueError as error:
        raise ConfigError(f"PENSTOCK_REDIS__URL: {error}") from error
    kind: type[AbstractConnection] = options.pop("connection_class", Connection)
    if kind is not UnixDomainSocketConnection:
        options["socket_keepalive"] = True
    options |= {
        "protocol": 2,
        "client_name": name,
        "socket_timeout": None,
        "socket_connect_timeout": None,  # `_connect` has its own
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
        "health_check_interval": 0,
    }
    return kind(**options)


class Outage:
    """Logs an outage once when it begins and once, with its length, when it ends."""

    def __init__(self, what: str, of: str = "redis") -> None:
        self._what = what
        self._away, self._back = f"{of} is away", f"{of} is back"
        self._since_us: int | None = None

    def begins(self, error: Exception) -> None:
        """Note that something failed."""
        if self._since_us is None:
            self._since_us = monotonic_us()
            log.warning(self._away, at=self._what, error=str(error))

    def ends(self) -> None:
        """Note that it works (again)."""
        if self._since_us is not None:
            away_s = (monotonic_us() - self._since_us) / 1e6
            self._since_us = None
            log.info(self._back, at=self._what, away_s=round(away_s, 3))


class Backoff:
    """The pace of one loop that tries again: each failure in a row is followed by a longer wait.

    Attributes:
        failures: how many there were since the last success.
    """

    def __init__(self, cap_s: float, outage: Outage | None = None) -> None:
        self.failures = 0
        self._cap_s = cap_s
        self._outage = outage  # None: another loop tells of the same trouble

    async def failed(self, error: Exception) -> None:
        """Note that what is needed is away, and wait before the next try."""
        if self._outage is not None:
            self._outage.begins(error)
        await self.wait()

    async def wait(self) -> None:
        """Wait before the next try, without calling it an outage."""
        delay_s = reconnect_delay_s(self.failures, self._cap_s)
        self.failures += 1
        await asyncio.sleep(delay_s)

    def succeeded(self) -> None:
        """Note that it works (again)."""
        self.failures = 0
        if self._outage is not None:
            self._outage.ends()


def reconnect_delay_s(failures: int, cap_s: float) -> float:
    """Return the wait before connection attempt number *failures* + 1, in seconds."""
    return float(min(cap_s, 0.02 * 2.0 ** min(failures, 10)))


async def within(call: Awaitable[A]) -> A:
    """Return what *call* brings, where somebody at a gateway waits for it.

    Raises:
        BrokerUnavailable: nothing came within ANSWER_WITHIN_S; what was asked for may have been done.
    """
    try:
        async with _time_of_redis(ANSWER_WITHIN_S):
            return await call
    except TimeoutError as error:
        raise BrokerUnavailable("Redis does not answer", unknown=True) from error


async def insist(link: Link, script: Script, args: Sequence[Argument], clock: Clock, cap_s: float) -> Any:
    """Run a script that may be sent again, until it answers; its reply begins with Redis' time, for *clock*.

    Args:
        cap_s: the longest wait between two tries.

    Raises:
        BrokerUnavailable: no answer within ANSWER_WITHIN_S; `unknown` where it was sent at all.
        Overloaded: Redis is out of memory.
    """
    backoff = Backoff(cap_s)
    unknown = False  # whether any try so far may have run
    sent_us: int | None = None  # when the present try was sent; None while there is no connection to send it over
    try:
        async with _time_of_redis(ANSWER_WITHIN_S):
            while True:
                try:
                    sent_us = None
                    await link.open(ANSWER_WITHIN_S)
                    sent_us = monotonic_us()
                    reply = await link.run(script, (), args)
                except BrokerUnavailable as error:
                    unknown = unknown or error.unknown
                    sent_us = None
                    await backoff.failed(error)
                except OutOfMemory as error:
                    raise Overloaded("Redis is out of memory; try again later") from error
                else:
                    clock.observe(int(reply[0]), sent_us)
                    return reply
    except TimeoutError as error:
        raise BrokerUnavailable("Redis does not answer", unknown=unknown or sent_us is not None) from error


async def run_in_hand(link: Link, script: Script, args: Sequence[Argument], clock: Clock) -> Any:
    """Run a script for a job in hand; its reply begins with Redis' time, for *clock*.

    Raises:
        RetryLater: Redis is out of memory, which charges the job no attempt.
        BrokerUnavailable: as `Link.run`.
    """
    sent_us = monotonic_us()
    try:
        reply = await link.run(script, (), args)
    except OutOfMemory as error:
        raise RetryLater(str(error), code="out_of_memory", after_s=OUT_OF_MEMORY_AGAIN_S, charged=False) from error
    clock.observe(int(reply[0]), sent_us)
    return reply


class Line:
    """Those who want the same connection, in the order in which they came; the time of each runs from its turn.

    So nobody is refused for those before. When Redis does not answer the one whose turn it is, all who had come by then
    hear so at once: nothing of theirs was sent, and each of them would wait as long again.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._failures = 0

    @asynccontextmanager
    async def turn(self, until_us: int | None = None) -> AsyncGenerator[None, None]:
        """Return a block that is one's turn.

        Args:
            until_us: how long to wait for it, on the monotonic clock; None: for IN_LINE_FOR_S.

        Raises:
            Overloaded: it did not come in time.
            BrokerUnavailable: Redis did not answer those before.
        """
        failures = self._failures
        left_s = IN_LINE_FOR_S if until_us is None else (until_us - monotonic_us()) / 1e6
        try:
            async with asyncio.timeout(left_s):
                await self._turn.acquire()
        except TimeoutError as error:
            raise Overloaded("too many came at once; try again later") from error
        try:
            if failures != self._failures:
                raise BrokerUnavailable("Redis does not answer those before")
            try:
                yield
            except BrokerUnavailable:
                self._failures += 1
                raise
        finally:
            self._turn.release()

    def __repr__(self) -> str:
        return f"<Line taken={self._turn.locked()} failures={self._failures}>"


def parse_info(text: bytes) -> dict[str, str]:
    """Return what INFO says, by name."""
    return dict(line.split(":", 1) for line in text.decode().split("\r\n") if ":" in line)
