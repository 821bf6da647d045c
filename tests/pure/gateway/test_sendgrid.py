"""What SendGrid sends: whether it is SendGrid's, and what it tells. The vector is that of their own libraries."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from gateway.vendors import Failure, Notice, Received, Refused, Told
from gateway.vendors.sendgrid import SIGNATURE, TIMESTAMP, SendGrid
from pipeline.errors import ConfigError
from tests.pure.gateway.test_twilio import DELIVERY, changed, changes

# sendgrid-python, test/unit/test_eventwebhook.py
PUBLIC_KEY = (
    "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE83T4O/n84iotIvIW4mdBgQ/7dAfS"
    "mpqIM8kF9mN1flpVKS3GRqe62gw+2fNNRaINXvVpiglSI8eNEc6wEA3F+g=="
)
OTHER_KEY = (
    "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEqTxd43gyp8IOEto2LdIfjRQrIbsd"
    "4SXZkLW6jDutdhXSJCWHw8REntlo7aNDthvj+y7GjUuFDb/R1NGe1OPzpA=="
)
GIVEN_SIGNATURE = b"MEUCIGHQVtGj+Y3LkG9fLcxf3qfI10QysgDWmMOVmxG0u6ZUAiEAyBiXDWzM+uOe5W0JuG+luQAbPIqHh89M15TluLtEZtM="
OTHER_SIGNATURE = b"MEUCIQCtIHJeH93Y+qpYeWrySphQgpNGNr/U+UyUlBkU6n7RAwIgJTz2C+8a8xonZGi6BpSzoQsbVRamr2nlxFDWYNH3j/0="
GIVEN_TIME = b"1600112502"
SIGNED_MS = 1_600_112_502_000
PAYLOAD = (
    b'[{"email":"hello@world.com","event":"dropped","reason":"Bounced Address",'
    b'"sg_event_id":"ZHJvcC0xMDk5NDkxOS1MUnpYbF9OSFN0T0doUTRrb2ZTbV9BLTA",'
    b'"sg_message_id":"LRzXl_NHStOGhQ4kofSm_A.filterdrecv-p3mdw1-756b745b58-kmzbl-18-5F5FC76C-9.0",'
    b'"smtp-id":"<LRzXl_NHStOGhQ4kofSm_A@ismtpd0039p1iad1.sendgrid.net>","timestamp":1600112492}]\r\n'
)
MAX_AGE_S = 300.0
EVENT: dict[str, Any] = {
    "email": "bob@example.com",
    "timestamp": 1_513_299_569,
    "smtp-id": f"<{DELIVERY}@mail.example.com>",
    "event": "delivered",
    "sg_event_id": "event-1",
    "sg_message_id": "message-1",
}


def sendgrid(*keys: str, max_age_s: float = MAX_AGE_S) -> SendGrid:
    return SendGrid(keys or (PUBLIC_KEY,), max_age_s)


def notice(
    body: bytes = PAYLOAD,
    signature: bytes | None = GIVEN_SIGNATURE,
    time: bytes | None = GIVEN_TIME,
    media: bytes = b"application/json",
) -> Notice:
    headers = {b"content-type": media}
    headers |= {SIGNATURE: signature} if signature is not None else {}
    return Notice(headers | ({TIMESTAMP: time} if time is not None else {}), b"", body)


def refusal(vendor: SendGrid, given: Notice, now_ms: int = SIGNED_MS) -> str:
    with pytest.raises(Refused) as refused:
        vendor.verify(given, now_ms)
    return refused.value.reason


def told(*events: Any) -> Sequence[object]:
    return sendgrid().read(notice(orjson.dumps(events)))


def mail(fields: dict[str, bytes], boundary: str = "xYzZY") -> Notice:
    """Return an email that came in, as Inbound Parse sends it."""
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + content + b"\r\n"
        for name, content in fields.items()
    ]
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    return notice(body, media=f"multipart/form-data; boundary={boundary}".encode())


# --- signatures --------------------------------------------------------------------------------


def test_the_published_signature_is_right() -> None:
    """Over the time and the bytes, with the line end behind the JSON; in PEM the key is the same."""
    sendgrid().verify(notice(), SIGNED_MS)
    pem = f"-----BEGIN PUBLIC KEY-----\n{PUBLIC_KEY[:64]}\n{PUBLIC_KEY[64:]}\n-----END PUBLIC KEY-----\n"
    sendgrid(pem).verify(notice(), SIGNED_MS)


def test_the_published_wrong_ones_are_wrong() -> None:
    """Another key, another payload, another signature, no time."""
    assert refusal(sendgrid(OTHER_KEY), notice()) == "bad_signature"
    assert refusal(sendgrid(), notice(b"payload")) == "bad_signature"
    assert refusal(sendgrid(), notice(signature=OTHER_SIGNATURE)) == "bad_signature"
    assert refusal(sendgrid(), notice(time=b"timestamp")) == "bad_signature"
    assert refusal(sendgrid(), notice(PAYLOAD.rstrip())) == "bad_signature"


def test_each_of_several_keys_counts() -> None:
    """Events and emails come with keys of their own."""
    sendgrid(OTHER_KEY, PUBLIC_KEY).verify(notice(), SIGNED_MS)
    sendgrid(PUBLIC_KEY, OTHER_KEY).verify(notice(), SIGNED_MS)


def test_without_a_key_or_a_signature_nothing_is_right() -> None:
    """Nor without the time, which is signed."""
    assert refusal(SendGrid((), MAX_AGE_S), notice()) == "no_key"
    assert refusal(sendgrid(), notice(signature=None)) == "unsigned"
    assert refusal(sendgrid(), notice(time=None)) == "unsigned"


@pytest.mark.parametrize("off_s", [MAX_AGE_S + 0.001, -MAX_AGE_S - 0.001, 86_400.0])
def test_an_old_signature_is_refused_and_so_is_one_of_tomorrow(off_s: float) -> None:
    """Somebody has kept it, or a clock is wrong."""
    assert refusal(sendgrid(), notice(), SIGNED_MS + int(off_s * 1000)) == "stale"


@pytest.mark.parametrize("off_s", [MAX_AGE_S, -MAX_AGE_S])
def test_a_signature_is_right_up_to_its_age(off_s: float) -> None:
    """To the second."""
    sendgrid().verify(notice(), SIGNED_MS + int(off_s * 1000))


def test_a_time_that_is_none_is_refused_even_when_it_is_signed() -> None:
    """Time and body are signed as one text: a digit must not pass from one to the other and change both."""
    private = ec.generate_private_key(ec.SECP256R1())
    key = b64encode(private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()
    for time in (b"", b"-1", b" 1600112502", b"1_600_112_502", b"1" * 13, "\u0661".encode(), b"1e9"):
        signature = b64encode(private.sign(time + PAYLOAD, ec.ECDSA(SHA256())))
        assert refusal(SendGrid((key,), 1e12), notice(signature=signature, time=time)) == "bad_signature"


@pytest.mark.parametrize("letter", [b"N", b"O", b"P"])
def test_a_signature_is_written_in_one_way(letter: bytes) -> None:
    """The last letter has bits that mean nothing to a decoder."""
    assert refusal(sendgrid(), notice(signature=GIVEN_SIGNATURE[:-2] + letter + b"=")) == "bad_signature"


@given(changes, st.sampled_from(["body", "signature", "time"]))
def test_no_byte_can_be_changed(change: tuple[str, int, int], what: str) -> None:
    """Of body, signature and time."""
    given = {"body": PAYLOAD, "signature": GIVEN_SIGNATURE, "time": GIVEN_TIME}
    other = given | {what: changed(given[what], change)}
    if other != given:
        assert refusal(sendgrid(max_age_s=1e12), notice(**other)) == "bad_signature"


@pytest.mark.parametrize("key", ["", "no key", PUBLIC_KEY[:-4], "a-secret-put-here-by-mistake"])
def test_a_key_that_is_none_is_said_at_the_start(key: str) -> None:
    """By its number, with where to find the right one, and without what was given."""
    with pytest.raises(ConfigError, match="key 2 is no verification key") as told:
        sendgrid(PUBLIC_KEY, key)
    assert not key or key not in str(told.value)


def test_a_key_of_another_kind_is_none() -> None:
    """RSA, or another curve."""
    for public in (
        rsa.generate_private_key(65537, 2048).public_key(),
        ec.generate_private_key(ec.SECP384R1()).public_key(),
    ):
        text = b64encode(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()
        with pytest.raises(ConfigError):
            sendgrid(text)


# --- events ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "status", "failure"),
    [
        ({"event": "delivered", "response": "250 OK"}, "delivered", None),
        (
            {"event": "bounce", "type": "bounce", "status": "5.0.0", "reason": "500 unknown recipient"},
            "undelivered",
            Failure("bounced", "the recipient's server refused it: 500 unknown recipient"),
        ),
        (
            {"event": "bounce", "type": "blocked", "reason": "450 too busy"},
            "undelivered",
            Failure("blocked", "the recipient's server refused it: 450 too busy"),
        ),
        (
            {"event": "dropped", "reason": "Bounced Address", "status": "5.0.0"},
            "failed",
            Failure("dropped", "SendGrid did not try: Bounced Address"),
        ),
        ({"event": "dropped"}, "failed", Failure("dropped", "SendGrid did not try: no reason given")),
    ],
)
def test_an_event_tells_what_became_of_a_delivery(event: dict[str, Any], status: str, failure: Failure | None) -> None:
    """In our words."""
    assert told(EVENT | event) == [Told("event-1", DELIVERY, status, failure)]  # type: ignore[arg-type]  # text


@pytest.mark.parametrize("name", ["processed", "deferred", "open", "click", "spamreport", "unsubscribe", "of-tomorrow"])
def test_what_is_on_its_way_and_what_people_do_changes_nothing(name: str) -> None:
    """SendGrid tells of it all the same."""
    assert told(EVENT | {"event": name}) == ["ignored"]


def test_a_delivery_is_known_by_its_own_argument_or_its_message_id() -> None:
    """The argument wins, since a sender set it for this."""
    other = "f" * 32
    cases: list[tuple[dict[str, Any], object]] = [
        ({"delivery": other}, other),
        ({"delivery": "no id"}, DELIVERY),
        ({"smtp-id": f"{DELIVERY}@mail.example.com"}, DELIVERY),
        ({"smtp-id": "<14c5d75ce93.dfd.64b469@ismtpd-555>"}, None),
        ({"smtp-id": f"<x{DELIVERY}@mail.example.com>"}, None),
        ({"smtp-id": None}, None),
    ]
    for event, expected in cases:
        (found,) = told(EVENT | event)
        assert (found.delivery_id if isinstance(found, Told) else None) == expected
        assert isinstance(found, Told) or found == "unknown_delivery"


def test_one_event_without_sense_does_not_spoil_the_others() -> None:
    """SendGrid would send all of them again, and for a day."""
    found = told(EVENT, 7, {}, EVENT | {"sg_event_id": ""}, EVENT | {"event": ["delivered"]}, EVENT | {"event": "open"})
    assert found == [Told("event-1", DELIVERY, "delivered"), *["unreadable"] * 4, "ignored"]


def test_a_reason_is_kept_within_bounds() -> None:
    """It is written by a stranger's mail server."""
    (found,) = told(EVENT | {"event": "dropped", "reason": "x\0" * 10_000})
    assert isinstance(found, Told)
    assert found.failure is not None
    assert len(found.failure.message) < 600
    assert "\0" not in found.failure.message


# --- emails that came in -----------------------------------------------------------------------

MAIL = {
    "headers": b"Received: by mx\nMessage-ID: <abc@example.org>\nFrom: Ann <ann@example.org>",
    "from": b"Ann <ann@example.org>",
    "to": b"Us <us@parse.example.com>",
    "subject": b"Gr\xfc\xdfe",
    "text": b"hello\r\n--not the boundary\r\n",
    "envelope": b'{"to":["us@parse.example.com"],"from":"ann@example.org"}',
    "charsets": b'{"to":"UTF-8","subject":"iso-8859-1","text":"zip","from":"UTF-8"}',
}


def test_an_email_from_outside_is_received() -> None:
    """By its envelope, its fields in their own character sets."""
    (found,) = sendgrid().read(mail(MAIL))
    assert isinstance(found, Received)
    assert (found.type, found.provider_id) == ("email", "<abc@example.org>")
    assert (found.sender, found.recipient) == ("Ann <ann@example.org>", "us@parse.example.com")
    assert (found.subject, found.body) == ("Grüße", "hello\r\n--not the boundary\r\n")


def test_an_email_that_is_sent_again_is_the_same_event() -> None:
    """The boundary and the order are the vendor's, the Message-ID is the sender's: none of them makes the id."""

    def event(given: Notice) -> str:
        (found,) = sendgrid().read(given)
        assert isinstance(found, Received)
        return found.event_id

    again = mail(dict(reversed(MAIL.items())), boundary="another")
    assert event(mail(MAIL)) == event(again)
    assert event(mail(MAIL)) != event(mail(MAIL | {"text": b"other words, same Message-ID"}))


def test_an_email_without_message_id_has_its_event_for_a_name() -> None:
    """Mails exist that have none."""
    (found,) = sendgrid().read(mail(MAIL | {"headers": b"From: x"}))
    assert isinstance(found, Received)
    assert found.event_id == f"email:{found.provider_id}"


@pytest.mark.parametrize(
    "given",
    [
        mail({name: text for name, text in MAIL.items() if name != "from"}),
        mail({}),
        notice(b"", media=b"multipart/form-data"),
        notice(b"", media=b"multipart/form-data; boundary=x"),
        notice(mail(MAIL).body[:-10], media=b"multipart/form-data; boundary=xYzZY"),
        notice(mail(MAIL).body, media=b"multipart/form-data; boundary=other"),
        notice(mail(MAIL).body, media=b"multipart/form-data; boundary=xYz"),
        notice(b"hello\r\n" + mail(MAIL).body, media=b"multipart/form-data; boundary=xYzZY"),
        notice(mail(MAIL).body + b"hello", media=b"multipart/form-data; boundary=xYzZY"),
        notice(b"--x\r\n\r\n--x" * 2_000 + b"--x--", media=b"multipart/form-data; boundary=x"),
    ],
)
def test_what_is_no_email_is_unreadable(given: Notice) -> None:
    """And no error."""
    assert sendgrid().read(given) == ["unreadable"]


def test_a_boundary_that_the_body_does_not_begin_and_end_with_is_none() -> None:
    """Nobody signs the header that names it: one within the text would make a mail of another sender's out of it."""
    inner = mail({"from": b"boss@example.com", "to": b"us@example.com", "text": b"pay"}, boundary="inner").body
    for text in (b"hello\r\n" + inner, inner):
        given = mail(MAIL | {"text": text})
        (found,) = sendgrid().read(given)
        assert isinstance(found, Received)
        assert found.sender == "Ann <ann@example.org>"
        assert sendgrid().read(notice(given.body, media=b"multipart/form-data; boundary=inner")) == ["unreadable"]


def test_a_body_may_end_with_its_last_boundary() -> None:
    """With a line end behind it, or none."""
    given = mail(MAIL)
    assert sendgrid().read(given) == sendgrid().read(
        notice(given.body.removesuffix(b"\r\n"), media=given.headers[b"content-type"])
    )


ODD_CHARSETS = (
    "", "\0", "x-unknown", "unknown-8bit", "windows-999", "windows-932", "iso-8859-12", "iso-8859-99", "gb9999",
    "utf-8\0", "utf-8\n", "base64", "rot13", "hex", "zip", "bz2", "uu", "quopri", "idna", "punycode", "unicode_escape",
    "utf-7", "utf-16", "mbcs", "oem", "undefined", "raw_unicode_escape", "../utf-8", "x" * 100_000,
)  # fmt: skip
named_like_one = st.from_regex(
    r"\A(?:iso-8859-\d{1,2}|windows-\d{3,4}|gb\d{4,5}|koi8-[a-z]|euc-[a-z]{2}|iso-2022-[a-z]{2})\Z"
)


@given(
    st.sampled_from(ODD_CHARSETS) | named_like_one | st.text() | st.none() | st.integers(-9, 9),
    st.binary() | st.sampled_from(["Grüße", "aGVsbG8="]).map(str.encode),
)
def test_any_character_set_may_be_named(charset: object, content: bytes) -> None:
    """Its name is the sender's: what is none of mails is read as UTF-8, and nothing is unpacked that looks packed."""
    charsets = orjson.dumps({"text": charset, "subject": charset})
    (found,) = sendgrid().read(mail(MAIL | {"text": content, "charsets": charsets}, boundary="Zz9"))
    if isinstance(found, Received):  # else the content held the boundary
        assert "\0" not in found.body
        assert orjson.dumps(found.body)
        if charset in ODD_CHARSETS:
            assert found.body == content.decode("utf-8", "replace").replace("\0", "\ufffd")


values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.sampled_from(["event", "sg_event_id", "smtp-id", "delivery", "reason", "type"]), inner)
    ),
)


events = st.fixed_dictionaries(
    {
        "event": st.sampled_from(["bounce", "dropped", "delivered"]),
        "sg_event_id": st.text(min_size=1, max_size=9),
        "delivery": st.just(DELIVERY),
        "reason": values,
    }
)


@given(
    st.binary() | values.map(orjson.dumps) | st.lists(events).map(orjson.dumps),
    st.sampled_from([b"application/json", b"", b"application/x-www-form-urlencoded"]),
)
def test_any_bytes_can_be_read(body: bytes, media: bytes) -> None:
    """A parser that fails is one that a stranger can make fail."""
    sendgrid().read(notice(body, media=media))
    assert refusal(sendgrid(), notice(body)) == "bad_signature"


@given(st.dictionaries(st.sampled_from(sorted(MAIL)), st.binary()), st.sampled_from([b"x", b'"x"', b""]), st.binary())
def test_any_email_can_be_read(fields: dict[str, bytes], boundary: bytes, more: bytes) -> None:
    """Whatever stands in its parts, and behind them."""
    given = mail(MAIL | fields, boundary="x")
    media = b"multipart/form-data; boundary=" + boundary
    assert len(sendgrid().read(notice(given.body + more, media=media))) == 1
