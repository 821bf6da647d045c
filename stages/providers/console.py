"""The provider that sends nothing: it prints one line about each message. It is the default, to try things out.

The line is JSON on standard output and says what would have gone out, text and all, unlike everything that is logged:
whoever chooses it wants to see that.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, ClassVar, TextIO

import orjson

from pipeline.errors import RetryLater
from stages.providers import TYPES, Outgoing, Provider, Sent, Type

if TYPE_CHECKING:
    from pipeline.settings import Settings


def build(settings: Settings) -> Provider:
    """Return the provider."""
    del settings  # there is nothing to set
    return Console(sys.stdout)


class Console(Provider):
    """Prints messages."""

    name = "console"
    types: ClassVar[frozenset[Type]] = frozenset(TYPES)

    def __init__(self, out: TextIO) -> None:
        self._out = out

    async def send(self, message: Outgoing) -> Sent:
        """Print the message."""
        shown = {
            "delivery": message.id,
            "type": message.type,
            "from": message.sender,
            "to": message.to,
            "subject": message.subject,
            "body": message.body,
            "html": message.html,
            "attachments": [
                {"filename": one.filename, "content_type": one.content_type, "bytes": len(one.content)}
                if one.content is not None
                else {"filename": one.filename, "content_type": one.content_type, "url": one.url}
                for one in message.attachments
            ],
        }
        line = orjson.dumps({name: value for name, value in shown.items() if value not in (None, [])}).decode()
        try:
            self._out.write(line + "\n")  # in one piece, so that lines of several processes do not mix
            self._out.flush()
        except OSError as error:  # who read it has gone; a line that is printed twice does no harm
            raise RetryLater("standard output takes nothing", code="unreachable", charged=False) from error
        return Sent(f"console-{message.id}")
