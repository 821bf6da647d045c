"""SendGrid: what became of emails (Event Webhook), and emails that came in (Inbound Parse).

The signature is ECDSA on P-256 with SHA-256, over the time (`X-Twilio-Email-Event-Webhook-Timestamp`, seconds) and
the body, byte by byte: SendGrid's line end behind the JSON counts. What was signed too long ago is refused; within that
time an event counts once by its id. The settings keep ids for longer than that.

A delivery is found by its custom argument `delivery`, where whoever sends it sets one, or by the `Message-ID` we gave
it, which SendGrid calls `smtp-id`. An email that came in has no id of SendGrid's; its own is the sender's to choose. So
what it consists of is its id.
Source: https://www.twilio.com/docs/sendgrid/for-developers/tracking-events/event and, of signatures,
.../getting-started-event-webhook-security-features and .../parsing-email/securing-your-parse-webhooks.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import orjson

from gateway.vendors import MOST_FIELDS, Failure, Notice, Received, Refused, Skipped, Status, Told, own_id, printable
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

MULTIPART: Final = b"multipart/form-data"
SIGNATURE: Final = b"x-twilio-email-event-webhook-signature"
TIMESTAMP: Final = b"x-twilio-email-event-webhook-timestamp"

STATUSES: Final[dict[str, Status]] = {"delivered": "delivered", "bounce": "undelivered", "dropped": "failed"}
"""What becomes of an email; `processed` and `deferred` are on the way, and what people do with it is no delivery."""

MOST_REASON_CHARS: Final = 500
_LONGEST_ID: Final = 200
_OF_US: Final = re.compile(r"<?([0-9a-f]{32})@")
_BOUNDARY: Final = re.compile(rb'boundary="?([^";,\s]{1,70})')
_NAME: Final = re.compile(rb'[;\s]name="([^"]*)"')
_MESSAGE_ID: Final = re.compile(r"^message-id:\s*(<[^<>\s]{1,500}>)", re.IGNORECASE | re.MULTILINE)
_CHARSET: Final = re.compile(
    r"us-ascii|utf-?8|iso-8859-\d{1,2}|windows-\d{3,4}|koi8-[ru]|gb\d{4,5}|gbk|big5|shift_jis|euc-(?:jp|kr)|iso-2022-(?:jp|kr)",
    re.IGNORECASE,
)
"""Of mails; Python knows others that are none, and some of those take long."""


class SendGrid:
    """What SendGrid tells, known by any of the keys: each of its webhooks has one of its own."""

    name = "sendgrid"
    max_bytes: int | None = None

    def __init__(self, public_keys: Sequence[str], max_age_s: float) -> None:
        """Make the verifier.

        Args:
            public_keys: as SendGrid shows them, base64, or as PEM.
            max_age_s: how far the time of a signature may be from ours.

        Raises:
            ConfigError: one is no key on P-256.
        """
        self._keys = [_key(number, text) for number, text in enumerate(public_keys, 1)]
        self._max_age_ms = max_age_s * 1000

    def verify(self, notice: Notice, now_ms: int) -> None:
        """Make sure that SendGrid sent this, and lately.

        Raises:
            Refused: it is not shown.
        """
        if not self._keys:
            raise Refused("no_key")
        signature, timestamp = notice.headers.get(SIGNATURE), notice.headers.get(TIMESTAMP)
        if signature is None or timestamp is None:
            raise Refused("unsigned")
        if not self._is_signed(signature, timestamp + notice.body):
            raise Refused("bad_signature")
        if not (timestamp.isdigit() and len(timestamp) <= 12):
            raise Refused("bad_signature")
        if abs(now_ms - int(timestamp) * 1000) > self._max_age_ms:
            raise Refused("stale")

    def _is_signed(self, given: bytes, text: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
        from cryptography.hazmat.primitives.hashes import SHA256

        try:
            signature = b64decode(given, validate=True)
        except binascii.Error:
            return False
        if b64encode(signature) != given:  # the last letter has bits that mean nothing
            return False
        for key in self._keys:
            try:
                key.verify(signature, text, ECDSA(SHA256()))
            except InvalidSignature:
                continue
            return True
        return False

    def read(self, notice: Notice) -> Sequence[Told | Received | Skipped]:
        """Return what a request of SendGrid's tells: one thing for each event, or an email."""
        if notice.media == MULTIPART:
            return [_email(notice) or "unreadable"]
        try:
            events = orjson.loads(notice.body)
        except orjson.JSONDecodeError:
            return ["unreadable"]
        return [_told(event) for event in events] if isinstance(events, list) else ["unreadable"]


def _key(number: int, text: str) -> EllipticCurvePublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    inner = "".join(line for line in text.split() if line not in {"-----BEGIN", "PUBLIC", "KEY-----", "-----END"})
    try:
        key = load_der_public_key(b64decode(inner, validate=True))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        raise ConfigError(
            f"PENSTOCK_DELIVERIES__SENDGRID_PUBLIC_KEYS: key {number} is no verification key of SendGrid's; "
            "Settings, Mail Settings, Event Webhooks shows it, and it begins with MFkwEwYH"
        )
    return key


# --- events ------------------------------------------------------------------------------------


def _told(event: Any) -> Told | Skipped:
    if not isinstance(event, dict):
        return "unreadable"
    name, event_id = event.get("event"), event.get("sg_event_id")
    if not isinstance(name, str) or not isinstance(event_id, str) or not 0 < len(event_id) <= _LONGEST_ID:
        return "unreadable"
    status = STATUSES.get(name)
    if status is None:
        return "ignored"
    delivery_id = own_id(event.get("delivery")) or _of_message_id(event.get("smtp-id"))
    if delivery_id is None:
        return "unknown_delivery"
    return Told(event_id, delivery_id, status, _failure(name, event))


def _of_message_id(text: object) -> str | None:
    found = _OF_US.match(text) if isinstance(text, str) else None
    return found[1] if found else None


def _failure(name: str, event: Mapping[str, Any]) -> Failure | None:
    if name == "delivered":
        return None
    reason = event.get("reason")
    words = (
        reason.replace("\0", "\ufffd")[:MOST_REASON_CHARS] if isinstance(reason, str) and reason else "no reason given"
    )
    if name == "dropped":
        return Failure("dropped", f"SendGrid did not try: {words}")
    code = "blocked" if event.get("type") == "blocked" else "bounced"
    return Failure(code, f"the recipient's server refused it: {words}")


# --- emails that came in -----------------------------------------------------------------------


def _email(notice: Notice) -> Received | None:
    parts = _parts(notice)
    if not parts or not {"from", "to"} <= parts.keys():
        return None
    charsets = _object(parts.get("charsets"))

    def text(name: str) -> str:
        return _decoded(parts.get(name, b""), charsets.get(name))

    to = _object(parts.get("envelope")).get("to")
    recipient = to[0] if isinstance(to, list) and to and isinstance(to[0], str) else text("to")
    digest = sha256()
    for name, content in sorted(parts.items()):
        digest.update(b"%d:%b%d:%b" % (len(name.encode()), name.encode(), len(content), content))
    named = _MESSAGE_ID.search(text("headers") or text("email"))
    return Received(
        event_id=f"email:{digest.hexdigest()}",
        type="email",
        provider_id=named[1] if named else digest.hexdigest(),
        sender=text("from"),
        recipient=recipient.replace("\0", "\ufffd"),
        subject=text("subject"),
        body=text("text"),
    )


def _decoded(content: bytes, charset: object) -> str:
    """Return a text in the character set that its sender named; in UTF-8 where that is none, or none of mails."""
    if isinstance(charset, str) and _CHARSET.fullmatch(charset):
        with suppress(LookupError):  # windows-999 looks like one, and nobody knows it
            return content.decode(charset, "replace").replace("\0", "\ufffd")
    return printable(content)


def _object(text: bytes | None) -> dict[str, Any]:
    try:
        value = orjson.loads(text or b"")
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _parts(notice: Notice) -> dict[str, bytes] | None:
    """Return the parts of a multipart body by name, without going through it byte by byte; None where it is none.

    The header that names the boundary is not signed, the body is: it begins and ends with the boundary it was made
    with, and with no other. One that stands within a text would make another mail of it.
    """
    found = _BOUNDARY.search(notice.headers.get(b"content-type", b""))
    if found is None:
        return None
    pieces = (b"\r\n" + notice.body).split(b"\r\n--" + found[1], MOST_FIELDS + 1)
    if not 2 < len(pieces) <= MOST_FIELDS or pieces[0] or pieces[-1] not in {b"--", b"--\r\n"}:
        return None
    parts: dict[str, bytes] = {}
    for piece in pieces[1:-1]:
        head, blank, content = piece.partition(b"\r\n\r\n")
        name = _NAME.search(head)
        if not blank or name is None or parts.setdefault(printable(name[1]), content) is not content:
            return None
    return parts
