"""HTTP to addresses that strangers name: no redirects, no cookies, no proxies, and no way into our own network.

`pipeline.addresses` decides; here it is obeyed at the one moment that counts, when the connection is made. The resolver
answers with addresses that were judged, all of them, and aiohttp connects to what it answered; TLS still checks the
certificate against the name. A host that is an IP address is never resolved: `read_url` has judged it.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import ip_address
from typing import Final

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from pipeline.addresses import is_public

MAX_HEAD_LINE: Final = 8 * 1024
MAX_HEADERS: Final = 100
"""As many as common servers take themselves; without a bound a receiver could fill our memory."""


class NotPublic(Exception):
    """The host's name leads to an address that is not public."""


class System(AbstractResolver):
    """Asks the system, with a thread for each question that may be asked at once.

    The event loop's own threads are four or six: as many names whose name server is silent would hold up all others.
    """

    def __init__(self, at_once: int) -> None:
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="resolver")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses that a name leads to.

        Raises:
            OSError: it leads nowhere.
        """
        ask = partial(
            socket.getaddrinfo, host, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
        )
        rows = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        return [
            ResolveResult(
                hostname=host, host=str(address[0]), port=port, family=kind, proto=protocol, flags=socket.AI_NUMERICHOST
            )
            for kind, _, protocol, _, address in rows
        ]

    async def close(self) -> None:
        """Let the threads end; none is waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Judged(AbstractResolver):
    """Asks another resolver once, and passes its answer on only if every address in it is public."""

    def __init__(self, inner: AbstractResolver) -> None:
        self._inner = inner

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses to connect to.

        Raises:
            NotPublic: one of them is not public.
            OSError: the name leads nowhere.
        """
        found = await self._inner.resolve(host, port, family)
        for one in found:
            if not is_public(ip_address(one["host"])):
                raise NotPublic(f"{host} leads to {one['host']}, which is not a public address")
        return found

    async def close(self) -> None:
        """Close the resolver that is asked."""
        await self._inner.close()


def open_session(*, allow_private: bool, tls: ssl.SSLContext, resolver: AbstractResolver) -> aiohttp.ClientSession:
    """Return a session for requests to strangers; each makes a connection of its own, to be bounded by the caller.

    Args:
        resolver: who is asked what a name means; closed by whoever gave it.
    """
    connector = aiohttp.TCPConnector(
        resolver=resolver if allow_private else Judged(resolver),
        use_dns_cache=False,
        ssl=tls,
        limit=0,
        force_close=True,
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
        max_line_size=MAX_HEAD_LINE,
        max_field_size=MAX_HEAD_LINE,
        max_headers=MAX_HEADERS,
        timeout=aiohttp.ClientTimeout(total=None),  # whoever calls says how long
    )
