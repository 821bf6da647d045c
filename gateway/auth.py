"""Who is calling: `Authorization: Bearer <key>`; each key is a tenant's.

A key stands in the settings (`name:key`, the name is the tenant), or was made with `penstock keys create` and stands in
Redis. The latter is remembered here for a moment, so that a request costs no call of its own, and a revoked key is
refused after that moment everywhere. Where there is no key of either kind every caller is the tenant `default`, and
then only a loopback address may be bound. Once there was one, it stays so: a Redis that has lost its data opens
nothing, and gets its keys again from history.
A page in a browser can reach a loopback address too, so what a browser marks as coming from another site may change
nothing (the rule of Go's `http.CrossOriginProtection`).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import structlog

from gateway.errors import BrokenKey, Problem
from pipeline.addresses import is_loopback
from pipeline.api_keys import NAME, ApiKey, digest_of
from pipeline.clock import monotonic_us
from pipeline.connection import Outage
from pipeline.errors import ConfigError, HistoryUnavailable, PenstockError
from pipeline.front import Front
from pipeline.job import DEFAULT_TENANT
from pipeline.settings import GatewaySettings

if TYPE_CHECKING:
    from gateway.operation import Records

KNOWN_FOR_S: Final = 1.0
"""What was read of a key in Redis holds for so long; so a revoked key is refused after a second at most."""
MOST_KNOWN: Final = 10_000
LOOK_EVERY_S: Final = 1.0
FIRST_LOOK_S: Final = 2.0
"""A gateway that starts waits for its history so long: then it serves, and goes on asking."""
NOT_YET_S: Final = 60.0
"""At a first start the recorder makes the history's tables beside the gateway: until then it is no outage."""

log = structlog.get_logger()

_CHALLENGE = [(b"www-authenticate", b'Bearer realm="penstock"')]


class ApiKeys:
    """The keys of the settings; false when there are none. Holds their hashes only."""

    def __init__(self, pairs: Sequence[str]) -> None:
        """Read `name:key` pairs; one name may have several keys, so that keys can be changed without a gap.

        Raises:
            ConfigError: names every pair that is none, never showing a key.
        """
        wrong: list[str] = []
        self._tenants: list[tuple[bytes, str]] = []
        for number, pair in enumerate(pairs, 1):
            name, colon, key = pair.partition(":")
            if not colon or not key or not NAME.fullmatch(name):
                wrong.append(f"pair {number} is not name:key with a name of 1 to 64 out of A-Z a-z 0-9 . _ -")
            elif not key.isascii() or not key.isprintable() or " " in key:
                wrong.append(f"pair {number}: the key of {name!r} cannot travel in a header")
            elif any(digest == _digest(key.encode()) for digest, _ in self._tenants):
                wrong.append(f"pair {number}: the key of {name!r} was given before")
            else:
                self._tenants.append((_digest(key.encode()), name))
        if wrong:
            raise ConfigError("PENSTOCK_API_KEYS: " + "; ".join(wrong))

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def __repr__(self) -> str:
        return f"<ApiKeys tenants={sorted({tenant for _, tenant in self._tenants})}>"

    def owner_of(self, key: bytes) -> str | None:
        """Return whose key this is, None where it is none of these."""
        given = _digest(key)
        owner: str | None = None
        for digest, tenant in self._tenants:  # to the end, whichever it is: the time taken tells nothing
            if hmac.compare_digest(digest, given):
                owner = tenant
        return owner


class Callers:
    """Tells whose request it is."""

    def __init__(self, settings: GatewaySettings, front: Front) -> None:
        """Read the keys of the settings.

        Raises:
            ConfigError: they are malformed.
        """
        self._configured = ApiKeys(settings.api_keys)
        self._always = settings.require_key or bool(self._configured)
        self._front = front
        self._known: dict[str, tuple[int, ApiKey]] = {}  # by digest: until when, on the monotonic clock, and what

    @property
    def are_guarded(self) -> bool:
        """Whether a key is asked for."""
        return self._always or bool(self._front.knows_api_keys)

    async def tenant_of(self, headers: Mapping[bytes, bytes]) -> str:
        """Return whose request this is.

        Raises:
            Problem: 401, no key or none of ours; 403, it was revoked.
            BrokerUnavailable: the key is to be looked up in Redis, which is away.
        """
        if not self.are_guarded and not (self._front.knows_api_keys is None and await self._front.look_for_api_keys()):
            return DEFAULT_TENANT
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        key = key.strip()
        if scheme.lower() != b"bearer" or not key:
            message = "an API key is needed: Authorization: Bearer <key>"
            raise Problem(401, "missing_api_key", message, headers=_CHALLENGE)
        return self._configured.owner_of(key) or await self._owner_in_redis(key)

    async def _owner_in_redis(self, key: bytes) -> str:
        digest = digest_of(key)
        until_us, record = self._known.get(digest, (0, None))
        now_us = monotonic_us()
        if record is None or until_us < now_us:
            text = await self._front.api_key(digest)
            if text is None:
                raise Problem(401, "invalid_api_key", "this API key is not known", headers=_CHALLENGE)
            try:
                record = ApiKey.decode(text)
            except ValueError as error:
                raise BrokenKey(str(error)) from error
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[digest] = (now_us + int(KNOWN_FOR_S * 1e6), record)
        if record.revoked_ms is not None:
            raise Problem(403, "revoked_api_key", f"the API key {record.name!r} was revoked")
        return record.tenant


@asynccontextmanager
async def remembered_keys(front: Front, records: Records) -> AsyncIterator[None]:
    """Give Redis the API keys again that it has lost and history knows: before the block begins, and in it.

    While the history is away a gateway that never saw a key does not know that there were some.
    """
    keeper = _Keeper(front, records)
    with suppress(TimeoutError):
        async with asyncio.timeout(FIRST_LOOK_S):
            await keeper.look()
    task = asyncio.create_task(keeper.look_forever(), name="remembered-keys")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class _Keeper:
    """Asks history when Redis holds no keys: once, or over and over where there were some."""

    def __init__(self, front: Front, records: Records) -> None:
        self._front = front
        self._records = records
        self._has_asked = False
        self._outage = Outage("gateway api keys", "history or redis")
        self._began_us = monotonic_us()
        self._has_told = False

    async def look(self) -> None:
        try:
            if not await self._front.look_for_api_keys() and (self._front.knows_api_keys or not self._has_asked):
                await self._front.revive_api_keys(await self._records.api_keys())
                self._has_asked = True
        except PenstockError as error:
            never = isinstance(error, HistoryUnavailable) and not self._has_asked
            if never and monotonic_us() - self._began_us < NOT_YET_S * 1e6:
                if not self._has_told:
                    self._has_told = True
                    log.info("history is not there yet; it is asked for API keys again", every_s=LOOK_EVERY_S)
            else:
                self._outage.begins(error)
        else:
            self._outage.ends()

    async def look_forever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await self.look()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def refuse_cross_site(headers: Mapping[bytes, bytes]) -> None:
    """Refuse a change that a browser sends on behalf of another site.

    Raises:
        Problem: 403.
    """
    site = headers.get(b"sec-fetch-site")
    if site is not None:
        same = site in {b"same-origin", b"none"}
    else:
        origin = headers.get(b"origin")
        same = origin is None or urlsplit(origin).netloc == headers.get(b"host")
    if not same:
        raise Problem(403, "cross_site", "a page of another site may not change anything here")


def refuse_open_address(settings: GatewaySettings, keys: ApiKeys) -> None:
    """Refuse to serve strangers without API keys.

    Raises:
        ConfigError: the address is not loopback, no key is asked for, and nobody said `insecure`.
    """
    if keys or settings.insecure or settings.require_key or is_loopback(settings.host):
        return
    raise ConfigError(
        f"PENSTOCK_GATEWAY__HOST: {settings.host!r} can be reached from other machines and no API key is set: "
        "set PENSTOCK_API_KEYS=name:key, or PENSTOCK_GATEWAY__REQUIRE_KEY=true where keys are made with "
        "`penstock keys create`, or say --insecure"
    )
