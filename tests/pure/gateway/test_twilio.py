"""What Twilio sends: whether it is Twilio's, and what it tells. The vectors are those that Twilio publishes."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlencode

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.vendors import MOST_FIELDS, Failure, Notice, Received, Refused, Told, form
from gateway.vendors.twilio import FORM, SIGNATURE, Twilio, sign, spellings

NOW_MS = 1_800_000_000_000  # Twilio's signatures carry no time
TOKEN = "12345"
ADDRESS = "https://mycompany.com/myapp.php"
QUERY = b"foo=1&bar=2"
SDK_BODY = urlencode(
    {
        "CallSid": "CA1234567890ABCDE",
        "Digits": "1234",
        "From": "+14158675309",
        "To": "+18005551212",
        "Caller": "+14158675309",
    }
).encode()
JSON_BODY = b'{"property": "value", "boolean": true}'
JSON_QUERY = QUERY + b"&bodySHA256=0a1ff7634d9ab3b95db5c9a2dfe9416e41502b283a80c7cf19632632f96e6620"
JSON_SIGNATURE = b"a9nBmqA0ju/hNViExpshrM61xv4="
DELIVERY = "0123456789abcdef0123456789abcdef"
SID = "SM" + "a" * 32
CALLBACK = {
    "AccountSid": "ACaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "From": "+15017250604",
    "MessageSid": SID,
    "MessageStatus": "sent",
    "SmsSid": SID,
    "SmsStatus": "sent",
    "To": "+15558675310",
}


def notice(body: bytes, signature: bytes | None, query: bytes = QUERY, media: bytes = FORM) -> Notice:
    headers = {b"content-type": media} | ({SIGNATURE: signature} if signature is not None else {})
    return Notice(headers, query, body)


def refusal(twilio: Twilio, given: Notice) -> str:
    with pytest.raises(Refused) as refused:
        twilio.verify(given, NOW_MS)
    return refused.value.reason


def told(fields: dict[str, str], query: bytes = b"delivery=" + DELIVERY.encode()) -> Sequence[object]:
    return Twilio([TOKEN], ADDRESS).read(notice(urlencode(fields).encode(), b"", query))


# --- signatures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "body", "signature"),
    [
        # twilio-python, tests/unit/test_request_validator.py
        (ADDRESS, SDK_BODY, b"RSOYDt4T1cUTdK1PDd93/VVr8B8="),
        ("https://mycompany.com:1234/myapp.php", SDK_BODY, b"RSOYDt4T1cUTdK1PDd93/VVr8B8="),
        ("http://mycompany.com:1234/myapp.php", SDK_BODY, b"Zmvh+3yNM1Phv2jhDCwEM3q5ebU="),
        (ADDRESS, SDK_BODY, b"kvajT1Ptam85bY51eRf/AJRuM3w="),  # signed with :443
        ("http://mycompany.com/myapp.php", SDK_BODY, b"0ZXoZLH/DfblKGATFgpif+LLRf4="),  # signed with :80
        (ADDRESS, b"Sid=CA123&SidAccount=AC123&Digits=5678&Digits=1234", b"IK+Dwps556ElfBT0I3Rgjkr1wJU="),
        # https://www.twilio.com/docs/usage/security, now and as it was
        (
            "https://example.com/myapp.php",
            b"CallSid=CA1234567890ABCDE&Caller=%2B14158675310&Digits=1234&From=%2B14158675310&To=%2B18005551212",
            b"L/OH5YylLD5NRKLltdqwSvS0BnU=",
        ),
        (
            ADDRESS,
            b"To=%2B18005551212&Digits=1234&CallSid=CA1234567890ABCDE&Caller=%2B12349013030&From=%2B12349013030",
            b"0/KCTR6DLpKmkAf8muzZqo1nDgQ=",
        ),
    ],
)
def test_the_published_signatures_of_forms_are_right(address: str, body: bytes, signature: bytes) -> None:
    """Whatever the order of the fields, and whether or not a port was signed."""
    Twilio([TOKEN], address).verify(notice(body, signature), NOW_MS)


def test_the_published_signature_of_a_json_body_is_right() -> None:
    """Its hash stands in the address, which is what is signed."""
    given = notice(JSON_BODY, JSON_SIGNATURE, JSON_QUERY, b"application/json; charset=utf-8")
    Twilio([TOKEN], ADDRESS).verify(given, NOW_MS)


def test_a_body_that_is_no_form_needs_its_hash_in_the_address() -> None:
    """Nobody has signed it otherwise."""
    twilio = Twilio([TOKEN], ADDRESS)
    signature = sign(TOKEN.encode(), ADDRESS.encode() + b"?" + QUERY)
    assert refusal(twilio, notice(JSON_BODY, signature, media=b"application/json")) == "bad_signature"
    assert refusal(twilio, notice(JSON_BODY, signature, media=b"text/plain")) == "bad_signature"
    assert refusal(twilio, notice(JSON_BODY + b" ", JSON_SIGNATURE, JSON_QUERY, b"application/json")) == "bad_signature"


def test_a_hash_in_the_address_does_not_vouch_for_a_form() -> None:
    """A form's fields are signed themselves; those of a body called a form for the purpose are not."""
    assert (
        refusal(Twilio([TOKEN], ADDRESS), notice(b"MessageStatus=sent", JSON_SIGNATURE, JSON_QUERY)) == "bad_signature"
    )


def test_values_count_as_they_are_and_not_as_they_were_written() -> None:
    """Blanks, bytes that are no UTF-8, signs and empty values."""
    text = ADDRESS.encode() + b"?" + QUERY + b"Body1 + 1 = \xff\xc3\xa9Empty"
    twilio = Twilio([TOKEN], ADDRESS)
    for body in (b"Body=1+%2b+1+%3D+%FF%c3%A9&Empty=", b"Empty=&Body=1%20%2B%201%20=%20\xff\xc3\xa9"):
        twilio.verify(notice(body, sign(TOKEN.encode(), text)), NOW_MS)


def test_a_field_that_stands_there_twice_with_one_value_is_signed_once() -> None:
    """As their libraries do it."""
    given = notice(SDK_BODY + b"&Digits=1234", b"RSOYDt4T1cUTdK1PDd93/VVr8B8=")
    Twilio([TOKEN], ADDRESS).verify(given, NOW_MS)


def test_a_field_without_a_sign_between_name_and_value_is_none() -> None:
    """Names and values are joined when they are signed, so that nobody could tell `a&b` from `a=b`."""
    signature = sign(TOKEN.encode(), ADDRESS.encode() + b"?" + QUERY + b"Sid1ab")
    Twilio([TOKEN], ADDRESS).verify(notice(b"Sid=1&a=b", signature), NOW_MS)
    assert refusal(Twilio([TOKEN], ADDRESS), notice(b"Sid=1&a&b", signature)) == "bad_signature"


def test_each_of_several_tokens_counts() -> None:
    """While the account's token is changed, Twilio signs with the old one or the new one."""
    given = notice(SDK_BODY, b"RSOYDt4T1cUTdK1PDd93/VVr8B8=")
    Twilio(["new", TOKEN], ADDRESS).verify(given, NOW_MS)
    Twilio([TOKEN, "old"], ADDRESS).verify(given, NOW_MS)
    assert refusal(Twilio(["new", "old"], ADDRESS), given) == "bad_signature"


def test_without_a_token_or_an_address_nothing_is_right() -> None:
    """A signature with an empty token can be made by anybody."""
    signature = sign(b"", ADDRESS.encode() + b"?" + QUERY)
    assert refusal(Twilio([], ADDRESS), notice(b"", signature)) == "no_key"
    assert refusal(Twilio([TOKEN], ""), notice(b"", sign(TOKEN.encode(), b"?" + QUERY))) == "no_key"
    assert refusal(Twilio([TOKEN], ADDRESS), notice(b"", None)) == "unsigned"


@pytest.mark.parametrize(
    ("address", "both"),
    [
        ("https://a.example/x", ["https://a.example/x", "https://a.example:443/x"]),
        ("http://a.example:8080/x", ["http://a.example:8080/x", "http://a.example/x"]),
        ("https://[2001:db8::1]/x", ["https://[2001:db8::1]/x", "https://[2001:db8::1]:443/x"]),
        ("http://[2001:db8::1]:80/x", ["http://[2001:db8::1]:80/x", "http://[2001:db8::1]/x"]),
    ],
)
def test_an_address_is_spelled_with_and_without_its_port(address: str, both: list[str]) -> None:
    """Twilio does one or the other."""
    assert spellings(address) == both


def test_a_form_of_a_stranger_has_its_bounds() -> None:
    """It is judged before anybody knows whose it is."""
    many = b"&".join([b"a=b"] * MOST_FIELDS)
    assert form(many) is not None
    assert form(many + b"&a=b") is None
    assert refusal(Twilio([TOKEN], ADDRESS), notice(many + b"&a=b", b"x")) == "bad_signature"


changes = st.tuples(st.sampled_from(["replace", "insert", "delete"]), st.integers(0, 10_000), st.integers(0, 255))


def changed(text: bytes, change: tuple[str, int, int]) -> bytes:
    """Return *text* with one byte changed."""
    how, at, byte = change
    at %= len(text)
    return text[:at] + (b"" if how == "delete" else bytes([byte])) + text[at + (how != "insert") :]


@given(changes)
def test_no_byte_of_a_form_can_be_changed(change: tuple[str, int, int]) -> None:
    """What is let through says the same in another spelling."""
    body = urlencode(CALLBACK | {"Body": "1 + 1 = é"}).encode()
    signature = sign(
        TOKEN.encode(), b"".join([ADDRESS.encode(), b"?", QUERY, *(n + v for n, v in sorted(form(body) or ()))])
    )
    twilio, other = Twilio([TOKEN], ADDRESS), changed(body, change)
    twilio.verify(notice(body, signature), NOW_MS)
    try:
        twilio.verify(notice(other, signature), NOW_MS)
    except Refused:
        return
    assert sorted(form(other) or ()) == sorted(form(body) or ())


@given(changes, st.sampled_from(["query", "signature", "token", "address", "json", "json_query"]))
def test_no_byte_of_anything_else_can_be_changed(change: tuple[str, int, int], what: str) -> None:
    """Address, signature, secret, and a body that is covered by its hash."""
    is_json = what.startswith("json")
    query, body = (JSON_QUERY, JSON_BODY) if is_json else (QUERY, SDK_BODY)
    given = {
        "query": query,
        "signature": JSON_SIGNATURE if is_json else b"RSOYDt4T1cUTdK1PDd93/VVr8B8=",
        "token": TOKEN.encode(),
        "address": ADDRESS.encode(),
        "json": body,
    }
    name = "query" if what == "json_query" else what
    other = given | {name: changed(given[name], change)}
    if other == given or (what == "address" and not _is_address(other["address"])):
        return
    twilio = Twilio([other["token"].decode("latin-1")], other["address"].decode("latin-1"))
    media = b"application/json" if is_json else FORM
    assert refusal(twilio, notice(other["json"], other["signature"], other["query"], media)) == "bad_signature"


def _is_address(text: bytes) -> bool:
    """Say whether the settings would take it, and whether it is another address: the port of its scheme is not."""
    try:
        first, second = spellings(text.decode("latin-1"))
    except ValueError:
        return False
    return ADDRESS not in {first, second} and first.isascii() and first.isprintable()


# --- what is told ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "status", "failure"),
    [
        ("sent", "sent", None),
        ("delivered", "delivered", None),
        ("read", "delivered", None),
        ("undelivered", "undelivered", Failure("undelivered", "Twilio says undelivered, and no more")),
        ("failed", "failed", Failure("failed", "Twilio says failed, and no more")),
        ("canceled", "failed", Failure("canceled", "Twilio says canceled, and no more")),
    ],
)
def test_a_callback_tells_what_became_of_a_delivery(word: str, status: str, failure: Failure | None) -> None:
    """Twilio's words for it are ours, or are led back to ours."""
    event_id = f"{CALLBACK['MessageSid']}:{word}"
    assert told(CALLBACK | {"MessageStatus": word}) == [Told(event_id, DELIVERY, status, failure)]  # type: ignore[arg-type]  # text


def test_a_callback_tells_why_a_message_did_not_arrive() -> None:
    """The number is Twilio's, and their page explains it."""
    (found,) = told(CALLBACK | {"MessageStatus": "undelivered", "ErrorCode": "30003"})
    assert isinstance(found, Told)
    assert found.failure == Failure(
        "twilio_30003", "Twilio says undelivered: https://www.twilio.com/docs/api/errors/30003"
    )


@pytest.mark.parametrize("word", ["accepted", "scheduled", "queued", "sending", "receiving", "word-of-tomorrow"])
def test_what_is_on_its_way_changes_nothing(word: str) -> None:
    """Neither do words that Twilio may have one day."""
    assert told(CALLBACK | {"MessageStatus": word}) == ["ignored"]


@pytest.mark.parametrize(
    "query",
    [b"", b"delivery=", b"delivery=../../x", b"delivery=" + DELIVERY.upper().encode(),
     b"&".join([b"delivery=" + DELIVERY.encode()] * 2)],
)  # fmt: skip
def test_a_callback_needs_the_id_of_a_delivery_in_its_address(query: bytes) -> None:
    """What cannot be one of our ids is never looked for."""
    assert told(CALLBACK, query) == ["unknown_delivery"]


def test_of_a_field_with_two_values_neither_counts() -> None:
    """Nobody says which of them is meant."""
    body = urlencode([*CALLBACK.items(), ("MessageStatus", "delivered"), ("SmsStatus", "failed")]).encode()
    assert Twilio([TOKEN], ADDRESS).read(notice(body, b"")) == ["unreadable"]
    twice = urlencode([*CALLBACK.items(), ("MessageStatus", "sent")]).encode()
    assert len(Twilio([TOKEN], ADDRESS).read(notice(twice, b"", b"delivery=" + DELIVERY.encode()))) == 1


def test_a_json_body_tells_the_same_as_a_form() -> None:
    """Numbers are numbers there."""
    body = orjson.dumps(CALLBACK | {"MessageStatus": "failed", "ErrorCode": 30008, "more": {"a": 1}})
    given = notice(body, b"", b"delivery=" + DELIVERY.encode(), b"application/json")
    (found,) = Twilio([TOKEN], ADDRESS).read(given)
    assert isinstance(found, Told)
    assert (found.delivery_id, found.status) == (DELIVERY, "failed")
    assert found.failure is not None
    assert found.failure.code == "twilio_30008"


def test_a_message_from_outside_is_received() -> None:
    """With what came with it, which makes it an mms."""
    sms = {"MessageSid": SID, "SmsStatus": "received", "From": "+1", "To": "+2", "Body": "hello\0", "NumMedia": "0"}
    assert told(sms, b"") == [Received(f"{SID}:received", "sms", SID, "+1", "+2", body="hello\ufffd")]
    mms = sms | {"MediaUrl0": "https://api.twilio.com/a", "MediaUrl1": "https://api.twilio.com/b"}
    (found,) = told(mms, b"")
    assert isinstance(found, Received)
    assert (found.type, found.media) == ("mms", ("https://api.twilio.com/a", "https://api.twilio.com/b"))
    assert told({name: value for name, value in sms.items() if name != "From"}) == ["unreadable"]


@pytest.mark.parametrize("swallowed", range(1, 5))
def test_a_request_that_is_split_elsewhere_tells_nothing_new(swallowed: int) -> None:
    """Names and values are signed joined together: fields that move into the value of the id are signed as before."""
    sms = {"SmsStatus": "received", "From": "+1", "To": "+2", "Body": "hello", "NumMedia": "0", "NumSegments": "1"}
    pairs = sorted((sms | {"MessageSid": SID, "SmsSid": SID, "SmsMessageSid": SID}).items())
    at = [name for name, _ in pairs].index("MessageSid")
    moved = "".join(name + value for name, value in pairs[at : at + 1 + swallowed]).removeprefix("MessageSid")
    other = [*pairs[:at], ("MessageSid", moved), *pairs[at + 1 + swallowed :]]
    text = ADDRESS + "?" + QUERY.decode() + "".join(name + value for name, value in pairs)
    given = notice(urlencode(other).encode(), sign(TOKEN.encode(), text.encode()))
    twilio = Twilio([TOKEN], ADDRESS)
    twilio.verify(given, NOW_MS)
    assert twilio.read(given) == ["unreadable"]


@pytest.mark.parametrize("sid", ["SM" + "A0" * 16, "MM" + "0" * 32])
def test_a_message_is_known_by_a_sid_of_messages(sid: str) -> None:
    """One with media has another prefix."""
    (found,) = told(CALLBACK | {"MessageSid": sid, "SmsSid": sid})
    assert isinstance(found, Told)
    assert found.event_id == f"{sid}:sent"


@pytest.mark.parametrize("sid", ["", "SM1", SID + "a", SID[:-1], SID[:-1] + "g", "CA" + SID[2:], SID + "\n"])
def test_what_is_no_sid_of_messages_names_none(sid: str) -> None:
    """All of them have one length."""
    assert told(CALLBACK | {"MessageSid": sid, "SmsSid": sid}) == ["unreadable"]


def test_texts_and_numbers_are_not_shown_by_repr() -> None:
    """What is logged by accident is nobody's business."""
    (found,) = told({"MessageSid": SID, "SmsStatus": "received", "From": "+1555", "To": "+1666", "Body": "secret"})
    shown = repr(found) + repr(notice(b"secret", b"+1555", b"+1666"))
    assert not any(word in shown for word in ("secret", "1555", "1666"))


@given(
    st.binary() | st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
            st.sampled_from(["MessageSid", "MessageStatus", "SmsStatus", "From", "ErrorCode"]), inner
        )
    ).map(lambda value: orjson.dumps(value)),
    st.binary(),
    st.sampled_from([FORM, b"application/json", b"multipart/form-data", b""]),
)  # fmt: skip
def test_any_bytes_can_be_read(body: bytes, query: bytes, media: bytes) -> None:
    """A parser that fails is one that a stranger can make fail."""
    twilio = Twilio([TOKEN], ADDRESS)
    assert twilio.read(notice(body, b"", query, media))
    assert refusal(twilio, notice(body, b"x", query, media)) == "bad_signature"
