"""What the gateway takes the provider of emails can send: no delivery is accepted that could only ever fail."""

from __future__ import annotations

import base64
import email
from email.policy import default
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway.deliveries import DeliveryRequest, _order
from gateway.errors import Problem
from pipeline.contacts import read_mailbox
from pipeline.settings import DeliveriesSettings
from stages.providers import Attachment, Outgoing
from stages.providers.smtp import compose

NAMES = st.text("Anné 漢,;:@<>()\\\".'[]=?_-\r\n\0\u2028\u200d☃" + "x" * 5, max_size=220)
LOCALS = st.text("abz09.+_-'=?!#$%&*/^`{|}~éü漢\" @,", min_size=1, max_size=70)
DOMAINS = st.sampled_from(
    ["example.com", "münchen.example", "localhost", "x" * 63 + "." + "y" * 63 + ".example", "☃.example", "a_b.example"]
)
ADDRESSES = st.builds("{}@{}".format, LOCALS, DOMAINS)
MAILBOXES = (
    ADDRESSES
    | st.builds("{} <{}>".format, NAMES, ADDRESSES)
    | st.builds('"{}" <{}>'.format, NAMES, ADDRESSES)
    | st.text(max_size=40)
)


@settings(max_examples=400, deadline=None)
@given(
    MAILBOXES,
    ADDRESSES | st.text(max_size=40),
    st.none() | st.text(max_size=80),
    st.text(min_size=1, max_size=40),
    st.sampled_from(["text/plain", "Text/HTML", "message/rfc822", "multipart/mixed", "application/vnd.a+xml", "a/!"])
    | st.text(max_size=20),
)
@example('"' + "Shop, eve@evil.example, " * 8 + '" <ann@example.com>', "ben@example.com", None, "a", "text/plain")
@example('"' + "Köln, eve@evil.example, " * 8 + '" <ann@example.com>', "bén@example.com", None, "a", "text/plain")
@example("x" * 64 + "@" + "y" * 63 + "." + "z" * 63 + ".example", "ben@example.com", "", "a", "text/plain")
def test_what_is_accepted_can_be_sent_as_it_was_addressed(
    sender: str, to: str, subject: str | None, filename: str, content_type: str
) -> None:
    """One sender and one recipient stand in its head, with the name as it was given, however long; nothing is lost."""
    asked = {
        "from": sender, "to": to, "type": "email", "body": "Hello", "subject": subject,
        "attachments": [{"filename": filename, "content_type": content_type, "content": "SGVsbG8="}],
    }  # fmt: skip
    try:
        request = DeliveryRequest.model_validate(asked)
        order = _order(cast("Any", SimpleNamespace(tenant="default")), request, DeliveriesSettings())
    except (Problem, ValidationError):
        return
    (file,) = order.content["attachments"]
    attachment = Attachment(file["filename"], file["content_type"], base64.b64decode(file["content"]))
    content = order.content
    message = Outgoing(
        "0" * 32, "email", content["from"], content["to"], subject=content.get("subject"), body=content["body"],
        attachments=(attachment,),
    )  # fmt: skip
    mail = compose(message)
    arrived = email.message_from_string(mail.content.decode(), policy=default)  # bytes would be taken for ASCII
    for field, given_text, address in (("From", sender, mail.sender), ("To", to, mail.to)):
        (one,) = arrived[field].addresses
        box = read_mailbox(given_text)
        assert f"{one.username}@{one.domain}" == address == box.address
        # Without blanks: Python reads one between two encoded words, where RFC 2047 (6.2) says that there is none.
        assert one.display_name.split() == box.name.split() or not box.name.isascii()
        assert "".join(one.display_name.split()) == "".join(box.name.split())
    assert mail.utf8 == (not (mail.sender + mail.to).isascii())
    assert max(map(len, mail.content.split(b"\r\n"))) <= 998
    assert [part.get_filename() for part in arrived.iter_attachments()] == [filename]


@pytest.mark.parametrize("name", ["a" * 200, "Ä" * 60, "Ä, B " * 40])
def test_a_name_of_any_length_and_alphabet_is_encoded_in_short_words(name: str) -> None:
    """RFC 2047 allows 75 characters in one; a line has 998 at most."""
    mail = compose(Outgoing("0" * 32, "email", f'"{name}" <ann@example.com>', "ben@example.com", body=""))
    words = mail.content.split(b"\r\nTo: ")[0].split()
    assert all(len(word) <= 75 for word in words if word.startswith(b"=?"))
