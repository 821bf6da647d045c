"""API keys that an operator makes and revokes while gateways run: `penstock keys`, beside `PENSTOCK_API_KEYS`.

They stand in one hash, `api_keys`: by its digest what is known of a key, and by `name:<name>` its digest. The key
itself is shown once, when it is made, and kept nowhere. It is 32 random bytes, so its plain SHA-256 gives nothing away.
A name stands for one key for ever: what was revoked stays listed, and whoever still uses it hears so.
History is told of each key, and should Redis lose its data, gateways write them there again.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import orjson

from pipeline import keys, scripts
from pipeline.errors import Reject

if TYPE_CHECKING:
    from pipeline.connection import Link

NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""Of keys and of tenants; without a colon, which parts tenant and id in keys of Redis."""
MARK: Final = "psk_"
"""What every key begins with, so that it is known for one where it should not be, in a commit say."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of a key.

    Attributes:
        revoked_ms: when it was revoked; None while it holds.
    """

    name: str
    tenant: str
    created_ms: int
    revoked_ms: int | None = None

    def encode(self) -> bytes:
        """Return the JSON text in Redis."""
        return orjson.dumps(self)

    def as_json(self) -> dict[str, object]:
        """Return what scripts are shown of it."""
        return asdict(self)

    @classmethod
    def decode(cls, text: bytes) -> ApiKey:
        """Read what stands in Redis.

        Raises:
            ValueError: it is none of ours.
        """
        try:
            body = orjson.loads(text)
            return cls(*(body[name] for name in cls.__slots__))
        except (TypeError, KeyError) as error:
            raise ValueError(f"not an API key's record: {error}") from error


def digest_of(key: bytes) -> str:
    """Return what Redis knows *key* by."""
    return hashlib.sha256(key).hexdigest()


class KeyRing:
    """The hash `api_keys`, as an operator uses it."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def create(self, name: str, tenant: str) -> str:
        """Make a key and return it; nobody can read it afterwards.

        Raises:
            Reject: no such name may be (`malformed_name`), or a key has it already (`name_taken`).
        """
        for what in (name, tenant):
            if not NAME.fullmatch(what):
                message = f"{what[:80]!r} is no name: 1 to 64 out of A-Z a-z 0-9 . _ -"
                raise Reject(message, code="malformed_name")
        key = MARK + secrets.token_urlsafe(32)
        record = ApiKey(name, tenant, await self._link.time_us() // 1000)
        told = {"digest": digest_of(key.encode()), "created_ms": record.created_ms}
        if not await self._keep(digest_of(key.encode()), None, record, 0, told):
            raise Reject(f"there is a key {name!r} already, revoked or not: choose another name", code="name_taken")
        return key

    async def list(self) -> list[ApiKey]:
        """Return all keys, revoked ones too, by name."""
        found = await self._link.call("HGETALL", keys.API_KEYS)
        records = [
            ApiKey.decode(value)
            for field, value in zip(found[::2], found[1::2], strict=True)
            if not field.startswith(keys.API_KEY_NAME.encode())
        ]
        return sorted(records, key=lambda record: record.name)

    async def revoke(self, name: str) -> None:
        """Have a key refused from now on; for a key that is revoked already nothing changes.

        Raises:
            Reject: there is none of that name (`unknown_key`).
        """
        while True:
            digest = await self._link.call("HGET", keys.API_KEYS, keys.API_KEY_NAME + name)
            text = await self._link.call("HGET", keys.API_KEYS, digest) if digest else None
            if text is None:
                raise Reject(f"there is no key {name!r}; `penstock keys list` shows them", code="unknown_key")
            record = ApiKey.decode(text)
            if record.revoked_ms is not None:
                return
            now_ms = await self._link.time_us() // 1000
            revoked = replace(record, revoked_ms=now_ms)
            if await self._keep(digest.decode(), record, revoked, 10, {"revoked_ms": now_ms}):
                return

    async def revive(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write what Redis has lost, from rows of `Records.api_keys`; a name that stands there is left alone."""
        for row in rows:
            record = ApiKey(row["name"], row["tenant"], row["created_ms"], row["revoked_ms"])
            told = {"digest": row["digest"], "created_ms": record.created_ms}
            await self._keep(row["digest"], None, record, 0, told)

    async def _keep(
        self, digest: str, before: ApiKey | None, record: ApiKey, rank: int, told: dict[str, object]
    ) -> bool:
        was = before.encode() if before else b""
        args = (record.name, digest, was, record.encode(), record.tenant, rank, orjson.dumps(told))
        return bool(await self._link.run(scripts.KEEP_KEY, (), args) == b"kept")
