"""Vendors: who tells us what became of a message, and who brings one from outside. One file is one vendor.

Anybody can call the addresses that a vendor calls, so a vendor is known by its signature and by nothing else. `verify`
judges the bytes as they came; only then does `read` look for a meaning in them. Both are plain functions on values.

- `verify` says nothing, or `Refused` with a reason out of a short list, which is counted.
- `read` takes any bytes and never fails: what it cannot make sense of is `"unreadable"`, one word for each thing told.
- An event has an id, by which it counts once, however often it comes. The id is made of signed bytes only.

What vendors call `queued` or `deferred` changes nothing here: they have the message, as we have said already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, get_args
from urllib.parse import unquote_to_bytes

from pipeline.job import is_own_id

Reason = Literal["no_key", "unsigned", "bad_signature", "stale"]
REASONS: Final[tuple[Reason, ...]] = get_args(Reason)
Status = Literal["sent", "delivered", "undelivered", "failed"]
Skipped = Literal["ignored", "unreadable", "unknown_delivery"]
SKIPPED: Final[tuple[Skipped, ...]] = get_args(Skipped)
"""Told, and of no consequence: of another kind, without sense, or of a message that is none of ours."""

MOST_FIELDS: Final = 1_000
"""Of one form; vendors send some thirty. Sorting those of a stranger must not hold up everybody else."""


class Refused(Exception):
    """It is not shown that the vendor sent this, or sent it now."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


@dataclass(frozen=True, slots=True)
class Notice:
    """A request as it came, before anybody has looked into it.

    Attributes:
        headers: by lower-case name.
        query: what stands behind the `?`, undecoded.
    """

    headers: Mapping[bytes, bytes] = field(repr=False)
    query: bytes = field(repr=False)
    body: bytes = field(repr=False)

    @property
    def media(self) -> bytes:
        """The type of the body in lower case, without its parameters."""
        return self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a message was not delivered.

    Attributes:
        code: for programs.
        message: for people; the vendor's own words, where it has some.
    """

    code: str
    message: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Told:
    """What became of a delivery."""

    event_id: str
    delivery_id: str
    status: Status
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Received:
    """What somebody wrote to us.

    Attributes:
        provider_id: the vendor's name for it; of an email its Message-ID.
        media: addresses of what came with it.
    """

    event_id: str
    type: Literal["sms", "mms", "email"]
    provider_id: str
    sender: str = field(repr=False)
    recipient: str = field(repr=False)
    subject: str | None = field(default=None, repr=False)
    body: str = field(default="", repr=False)
    media: tuple[str, ...] = field(default=(), repr=False)


class Vendor(Protocol):
    """One vendor.

    Attributes:
        name: as in addresses, metrics and records.
        max_bytes: of a request's body; None: as many as of any other request.
    """

    name: str
    max_bytes: int | None

    def verify(self, notice: Notice, now_ms: int) -> None:
        """Make sure that the vendor sent this.

        Args:
            now_ms: the present instant; where signatures carry a time, old ones are refused.

        Raises:
            Refused: it is not shown.
        """

    def read(self, notice: Notice) -> Sequence[Told | Received | Skipped]:
        """Return what a verified request tells, in its order."""


def form(body: bytes) -> list[tuple[bytes, bytes]] | None:
    """Return the fields of a form in their order, as bytes; None where it is no form that a vendor would send.

    A field without `=` is none: signatures join names and values, and could not tell `a&b` from `a=b`.
    """
    if not body:
        return []
    if body.count(b"&") >= MOST_FIELDS:
        return None
    fields: list[tuple[bytes, bytes]] = []
    for piece in body.split(b"&"):
        name, equals, value = piece.partition(b"=")
        if not equals:
            return None
        fields.append((_plain(name), _plain(value)))
    return fields


def _plain(text: bytes) -> bytes:
    return unquote_to_bytes(text.replace(b"+", b" "))


def own_id(value: object) -> str | None:
    """Return *value* if it can be the id of a delivery: what cannot is never made a part of a key."""
    return value if isinstance(value, str) and is_own_id(value) else None


def printable(text: bytes) -> str:
    """Return text as it can be kept anywhere: what is not UTF-8 becomes a sign for that, and so does NUL."""
    return text.decode("utf-8", "replace").replace("\0", "\ufffd")
