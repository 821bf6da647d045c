"""Twilio: status callbacks of messages, and messages that people send to a number.

The signature (`X-Twilio-Signature`) is HMAC-SHA1 with the account's auth token, over the address that Twilio called and
the fields of the form, sorted, names and values joined without anything between. The address is the public one, of the
settings: what a proxy made of it on the way is not what Twilio signed. Whether Twilio writes a standard port into it
differs, as their libraries say ("since sig generation on back end is inconsistent"), so both spellings count.

A body that is no form is covered by its hash, which stands in the address as `bodySHA256`; without it nobody has signed
the body. There is no time in a signature: an event counts once by its id, which is what there is against repetition.

A delivery is found by the `delivery=` of the callback's address, which is signed too.
Source: https://www.twilio.com/docs/usage/security, and `request_validator.py` of twilio-python 9.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha1, sha256
from hmac import compare_digest, new
from typing import Final
from urllib.parse import urlsplit

import orjson

from gateway.vendors import Failure, Notice, Received, Refused, Skipped, Status, Told, form, own_id, printable

FORM: Final = b"application/x-www-form-urlencoded"
SIGNATURE: Final = b"x-twilio-signature"
BODY_HASH: Final = b"bodySHA256"
DELIVERY: Final = b"delivery"
MOST_BYTES: Final = 64 * 1024
"""A text has 1,600 characters, of at most twelve bytes in a form. Before it is judged a form has to be decoded, and a
megabyte of that would hold up everybody else for a fifth of a second."""
MOST_MEDIA: Final = 10
"""Of one message, as Twilio says (`NumMedia`)."""

STATUSES: Final[dict[str, Status]] = {
    "sent": "sent",
    "delivered": "delivered",
    "read": "delivered",
    "undelivered": "undelivered",
    "failed": "failed",
    "canceled": "failed",
}
"""What Twilio calls what it did; `accepted`, `scheduled`, `queued` and `sending` are on the way to one of them."""

_SID: Final = re.compile(r"(?:SM|MM)[0-9a-fA-F]{32}")
"""Of a message. Its length keeps one event from having several ids: names and values are signed joined together, so the
fields behind an id that may be longer could be moved into it, and the signature would still be right."""
_CODE: Final = re.compile(r"[1-9][0-9]{0,9}")


class Twilio:
    """What Twilio tells, known by any of the account's auth tokens."""

    name = "twilio"
    max_bytes: int | None = MOST_BYTES

    def __init__(self, tokens: Sequence[str], address: str) -> None:
        """Make the verifier.

        Args:
            tokens: the account's auth token; while it is changed, the secondary one too.
            address: the public address of the operation; "": nobody has said what it is.
        """
        self._tokens = [token.encode() for token in tokens]
        self._addresses = [spelling.encode() for spelling in spellings(address)] if address else []

    def verify(self, notice: Notice, now_ms: int) -> None:
        """Make sure that Twilio sent this to the public address.

        Raises:
            Refused: it is not shown.
        """
        if not self._tokens or not self._addresses:
            raise Refused("no_key")
        given = notice.headers.get(SIGNATURE)
        if given is None:
            raise Refused("unsigned")
        fields = self._signed_fields(notice)
        if fields is None:
            raise Refused("bad_signature")
        query = b"?" + notice.query if notice.query else b""
        right = False
        for token in self._tokens:
            for address in self._addresses:
                right |= compare_digest(sign(token, address + query + fields), given)
        if not right:
            raise Refused("bad_signature")

    def _signed_fields(self, notice: Notice) -> bytes | None:
        """Return what the body adds to the signed text; None where the body cannot be what was signed."""
        if notice.media == FORM:
            fields = form(notice.body)
            return None if fields is None else b"".join(name + value for name, value in sorted(set(fields)))
        stated = parameter(notice.query, BODY_HASH)
        if stated is None or not compare_digest(sha256(notice.body).hexdigest().encode(), stated):
            return None
        return b""

    def read(self, notice: Notice) -> Sequence[Told | Received | Skipped]:
        """Return the one thing that a request of Twilio's tells."""
        fields = _fields(notice)
        sid = fields.get("MessageSid") or fields.get("SmsSid") or ""
        status = fields.get("MessageStatus") or fields.get("SmsStatus") or ""
        if not _SID.fullmatch(sid) or not status:
            return ["unreadable"]
        if status == "received":
            return [_received(sid, fields) or "unreadable"]
        known = STATUSES.get(status)
        if known is None:
            return ["ignored"]
        delivery_id = own_id(printable(parameter(notice.query, DELIVERY) or b""))
        if delivery_id is None:
            return ["unknown_delivery"]
        return [Told(f"{sid}:{status}", delivery_id, known, _failure(known, status, fields))]


def sign(token: bytes, text: bytes) -> bytes:
    """Return the signature that Twilio would give *text*."""
    return b64encode(new(token, text, sha1).digest())


def spellings(address: str) -> list[str]:
    """Return an address with and without its port, as it was given first; the port is the scheme's where none was."""
    parts = urlsplit(address)
    if parts.port is None:
        other = f"{parts.netloc.removesuffix(':')}:{443 if parts.scheme == 'https' else 80}"
    else:
        other = parts.netloc.rpartition(":")[0]
    return [address, parts._replace(netloc=other).geturl()]


def parameter(query: bytes, name: bytes) -> bytes | None:
    """Return a parameter of the address; None where it is missing, or stands there more than once."""
    found = [piece[len(name) + 1 :] for piece in query.split(b"&") if piece.startswith(name + b"=")]
    return found[0] if len(found) == 1 else None


def _fields(notice: Notice) -> dict[str, str]:
    """Return the fields by name, without those that have several values: nobody says which of them counts."""
    if notice.media == FORM:
        pairs = [(printable(name), printable(value)) for name, value in form(notice.body) or ()]
    else:
        try:
            value = orjson.loads(notice.body)
        except orjson.JSONDecodeError:
            return {}
        # As in a form, all values are text; numbers are written as such.
        items = value.items() if isinstance(value, dict) else ()
        pairs = [(name, str(item).replace("\0", "\ufffd")) for name, item in items if isinstance(item, str | int)]
    fields: dict[str, str] = {}
    for name, text in pairs:
        if fields.setdefault(name, text) != text:
            fields[name] = ""
    return fields


def _failure(status: Status, word: str, fields: Mapping[str, str]) -> Failure | None:
    if status in {"sent", "delivered"}:
        return None
    code = fields.get("ErrorCode", "")
    if not _CODE.fullmatch(code):
        return Failure(word, f"Twilio says {word}, and no more")
    return Failure(f"twilio_{code}", f"Twilio says {word}: https://www.twilio.com/docs/api/errors/{code}")


def _received(sid: str, fields: Mapping[str, str]) -> Received | None:
    if not fields.get("From") or not fields.get("To"):
        return None
    media = [fields.get(f"MediaUrl{number}", "") for number in range(MOST_MEDIA)]
    media = [address for address in media if address]
    return Received(
        event_id=f"{sid}:received",
        type="mms" if media else "sms",
        provider_id=sid,
        sender=fields["From"],
        recipient=fields["To"],
        body=fields.get("Body", ""),
        media=tuple(media),
    )
