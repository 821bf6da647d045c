"""Who is calling: `Authorization: Bearer <key>`; the name of each key is a tenant.

Without any key configured every caller is the tenant `default`, and then only a loopback address may be bound.
A page in a browser can reach a loopback address too, so what a browser marks as coming from another site may change
nothing (the rule of Go's `http.CrossOriginProtection`).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from gateway.errors import Problem
from pipeline.errors import ConfigError
from pipeline.job import DEFAULT_TENANT
from pipeline.settings import GatewaySettings

_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")  # no colon: it parts tenant and id in keys
_CHALLENGE = [(b"www-authenticate", b'Bearer realm="penstock"')]


class ApiKeys:
    """The configured keys; false when there are none. Holds their hashes only."""

    def __init__(self, pairs: Sequence[str]) -> None:
        """Read `name:key` pairs; one name may have several keys, so that keys can be changed without a gap.

        Raises:
            ConfigError: names every pair that is none, never showing a key.
        """
        wrong: list[str] = []
        self._tenants: list[tuple[bytes, str]] = []
        for number, pair in enumerate(pairs, 1):
            name, colon, key = pair.partition(":")
            if not colon or not key or not _TENANT.fullmatch(name):
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

    def tenant_of(self, headers: Mapping[bytes, bytes]) -> str:
        """Return whose request this is.

        Raises:
            Problem: 401, no key or none of ours.
        """
        if not self._tenants:
            return DEFAULT_TENANT
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            message = "an API key is needed: Authorization: Bearer <key>"
            raise Problem(401, "missing_api_key", message, headers=_CHALLENGE)
        given = _digest(key.strip())
        owner: str | None = None
        for digest, tenant in self._tenants:  # to the end, whichever it is: the time taken tells nothing
            if hmac.compare_digest(digest, given):
                owner = tenant
        if owner is None:
            raise Problem(401, "invalid_api_key", "this API key is not known", headers=_CHALLENGE)
        return owner


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
        ConfigError: the address is not loopback, there is no key, and nobody said `insecure`.
    """
    if keys or settings.insecure or _is_loopback(settings.host):
        return
    raise ConfigError(
        f"PENSTOCK_GATEWAY__HOST: {settings.host!r} can be reached from other machines and no API key is set: "
        "set PENSTOCK_API_KEYS=name:key, or say --insecure"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
