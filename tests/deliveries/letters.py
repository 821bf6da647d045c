"""Messages to be sent, and what must not be seen of them."""

from __future__ import annotations

import traceback
from typing import Any

from stages.providers import Outgoing

PASSWORD = "correct-horse-battery"
HIDDEN = (PASSWORD, "ann@shop.example", "bob@home.example", "+14155550100", "+14155550101", "Your order", "4711")
"""What appears in the messages below and in credentials; none of it may appear in an error, a log line or a repr."""


def an_email(**changes: Any) -> Outgoing:
    """Return an email."""
    fields: dict[str, Any] = {
        "id": "0123456789abcdef0123456789abcdef",
        "type": "email",
        "sender": "Shop <ann@shop.example>",
        "to": "bob@home.example",
        "subject": "Your order",
        "body": "Order 4711 is on its way.",
    }
    return Outgoing(**{**fields, **changes})


def an_sms(**changes: Any) -> Outgoing:
    """Return a text message."""
    fields: dict[str, Any] = {
        "id": "0123456789abcdef0123456789abcdef",
        "type": "sms",
        "sender": "+14155550100",
        "to": "+14155550101",
        "body": "Order 4711 is on its way.",
    }
    return Outgoing(**{**fields, **changes})


def assert_discreet(*things: object) -> None:
    """Nothing hidden shows, neither in what they are shown as nor in a traceback as it is logged."""
    for thing in things:
        shown = [repr(thing), str(thing)]
        if isinstance(thing, BaseException):
            shown += traceback.format_exception(thing)
            shown = [text for text in shown if 'File "' not in text]  # lines of these tests quote themselves
        found = [(word, text) for word in HIDDEN for text in shown if word in text]
        assert not found
