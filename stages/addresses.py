"""HTTP to addresses that strangers name: no redirects, no cookies, no proxies, and no way into our own network.

`pipeline.addresses` decides; here it is obeyed at the one moment that counts, when the connection is made. The resolver
answers with addresses that were judged, all of them, and aiohttp connects to what it answered; TLS still checks the
certificate against the name. A host that is an IP address is never resolved: `read_url` has judged it.
"""

from __future__ import annotations

import socket
import ssl
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


def open_session(
    *, allow_private: bool, tls: ssl.SSLContext, resolver: AbstractResolver | None = None
) -> aiohttp.ClientSession:
    """Return a session for requests to strangers; each makes a connection of its own, to be bounded by the caller.

    Args:
        resolver: who is asked what a name means; None: the system.
    """
    inner = resolver or aiohttp.ThreadedResolver()
    connector = aiohttp.TCPConnector(
        resolver=inner if allow_private else Judged(inner),
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
