"""Ten thousand commands on a slow network, a fifth of them cancelled: does every reply reach the one who asked?

Several callers take turns on each link, so that a reply which outlives its caller would find another one. Every command
asks for an answer that no other can have: most ECHO a nonce, some so long that it travels in pieces; some run a script,
now and then one that Redis has never seen; some block in BLPOP until somebody pushes the nonce, or in vain.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from pipeline.connection import Link
from pipeline.private_redis import url
from pipeline.scripts import Script
from pipeline.settings import RedisSettings
from tests.faults.proxy import Proxy

LINKS: Final = 20
CALLERS: Final = 3  # per link: one whose command is under way, two who wait for their turn
LATENCY_S: Final = 0.002
JITTER_S: Final = 0.001
CANCELLED_SHARE: Final = 0.2
TRIED_SHARE: Final = 0.3
"""So many are to be cancelled: some have their reply before that."""
CANCELLED_WITHIN_S: Final = 0.02
"""About what a call takes, its turn included, so that a cancellation may find it anywhere on its way."""
LIMIT_S: Final = 50.0
"""Several times what ten thousand commands take."""

_LONG: Final = 100_000
_BLOCK_IN_VAIN_S: Final = 0.003
_CLOSING_S: Final = 5.0
_KEY_TTL_MS: Final = 10_000


_ANSWER: Final = Script("answer", "#!lua\nreturn ARGV[1]")
_FEED: Final = Script("feed", "#!lua\nredis.call('RPUSH', KEYS[1], ARGV[1])\nredis.call('PEXPIRE', KEYS[1], ARGV[2])")


@dataclass(frozen=True, slots=True)
class CancelledCommands:
    """What came of it.

    Attributes:
        commands: how many were asked.
        cancelled: how many were cancelled before they returned.
        answered: how many replies reached a caller, right or wrong.
        wrong: replies that were not what their caller had asked for.
        connections_left: connections that Redis still had some seconds after all links were closed.
        seconds: how long the commands took.
    """

    commands: int
    cancelled: int
    answered: int
    wrong: int
    connections_left: int
    seconds: float


async def cancelled_commands(redis_socket: Path, seed: int, commands: int = 10_000) -> CancelledCommands:
    """Ask *commands* commands through a slow proxy, cancel a fifth, and compare every reply with what was asked.

    The seed decides who asks what, and which calls are cancelled how long after they began; how far a call has come by
    then is up to the machine. Nobody else may use this Redis meanwhile, since its connections are counted.

    Raises:
        TimeoutError: it took far too long.
        PenstockError: a call failed although nothing was broken.
    """
    async with asyncio.timeout(LIMIT_S), AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(Proxy(redis_socket, Random(f"{seed} proxy")))
        proxy.slow(LATENCY_S, JITTER_S)
        direct = Link(RedisSettings(url=url(redis_socket)), "direct")
        patient = RedisSettings(url=proxy.redis_url, connect_timeout_s=20, reply_timeout_s=20)
        links = [Link(patient, f"commands-{number}") for number in range(LINKS)]
        for link in (direct, *links):
            stack.push_async_callback(link.close)
        before = await _connections(direct)
        callers = [_Caller(link, direct, f"{seed}-{number}") for number, link in enumerate(links * CALLERS)]
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number, caller in enumerate(callers):
                group.create_task(caller.ask(len(range(number, commands, len(callers)))), name="caller")
        seconds = time.monotonic() - started
        for link in links:
            await link.close()
        return CancelledCommands(
            commands=commands,
            cancelled=sum(caller.cancelled for caller in callers),
            answered=sum(caller.answered for caller in callers),
            wrong=sum(caller.wrong for caller in callers),
            connections_left=await _left(direct, before),
            seconds=seconds,
        )


class _Caller:
    """Asks one thing after the other over a link that it shares."""

    def __init__(self, link: Link, direct: Link, name: str) -> None:
        self.cancelled = self.answered = self.wrong = 0
        self._link = link
        self._direct = direct
        self._name = name
        self._rng = Random(name)

    async def ask(self, commands: int) -> None:
        """Ask so many commands, each chosen by the rng."""
        for number in range(commands):
            nonce = f"{self._name}-{number}".encode()
            kind = self._rng.random()
            if kind < 0.78:
                await self._expect(nonce, self._link.call("ECHO", nonce))
            elif kind < 0.80:
                text = nonce.ljust(_LONG, b".")
                await self._expect(text, self._link.call("ECHO", text))
            elif kind < 0.89:
                await self._expect(nonce, self._link.run(_ANSWER, (), (nonce,)))
            elif kind < 0.90:
                unseen = Script("unseen", f"{_ANSWER.text} -- {nonce.decode()}")
                await self._expect(nonce, self._link.run(unseen, (), (nonce,)))
            elif kind < 0.95:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._feed(nonce), name="feeder")
                    await self._expect([nonce, nonce], self._link.call("BLPOP", nonce, 0, timeout_s=20))
            else:
                await self._expect(None, self._link.call("BLPOP", nonce, _BLOCK_IN_VAIN_S))

    async def _feed(self, nonce: bytes) -> None:
        await asyncio.sleep(self._rng.uniform(0, 4 * LATENCY_S))  # before the reader blocks, or after
        await self._direct.run(_FEED, (nonce,), (nonce, _KEY_TTL_MS))

    async def _expect(self, expected: object, call: Coroutine[Any, Any, object]) -> None:
        calling = asyncio.create_task(call, name="call")
        try:
            if self._rng.random() < TRIED_SHARE:
                await asyncio.wait([calling], timeout=self._rng.uniform(0, CANCELLED_WITHIN_S))
                calling.cancel()
            await asyncio.wait([calling])
        finally:
            calling.cancel()
        if calling.cancelled():
            self.cancelled += 1
        else:
            self.answered += 1
            self.wrong += calling.result() != expected


async def _connections(link: Link) -> set[bytes]:
    return {row.split()[0] for row in (await link.call("CLIENT", "LIST")).splitlines()}


async def _left(link: Link, before: set[bytes]) -> int:
    """Return how many connections there are that were not there before; those being closed get time to end."""
    give_up = time.monotonic() + _CLOSING_S
    while (left := await _connections(link) - before) and time.monotonic() < give_up:
        await asyncio.sleep(0.01)
    return len(left)
