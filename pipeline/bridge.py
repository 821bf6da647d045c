"""What a bridge to another broker needs of Redis: requests for reports go in, their responses come out.

A request bears where its response is wanted: the field `reply` of its entry, beside `data`. The script that takes the
request keeps it for as long as the response may be there (`report_reply:<request_id>`), so it is there whenever the
response is, however long the request waited, and a repeated request changes nothing of it. The bridge reads the
responses as a group of its own, passes on those that are wanted on its side, and acknowledges the others: what was
asked through Redis is nobody else's business.

Nothing here is lost by a crash: a request that was not acknowledged on the other side comes again and is known by its
id; a response that was passed on and not forgotten yet is passed on again, as the message of the same id.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import orjson

from pipeline import keys, scripts
from pipeline.group_reader import Entry, GroupReader
from pipeline.job import is_valid_id
from pipeline.reports import data_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.connection import Argument, Link
    from pipeline.settings import RedisSettings

LONGEST_NAME: Final = 255
"""Of a queue, or of a correlation id, in bytes, as AMQP 0-9-1 counts (`shortstr`)."""
RESPONSES_AT_ONCE: Final = 20


@dataclass(frozen=True, slots=True)
class Reply:
    """Where the response to a request is wanted.

    Attributes:
        bridge: the name of the bridge that it goes through.
        to: the queue.
        correlation_id: by which who asked knows it, besides the request's id; None where none was given.
    """

    bridge: str
    to: str
    correlation_id: str | None = None

    def encode(self) -> bytes:
        """Return it as it stands in Redis."""
        return orjson.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes | None) -> Reply | None:
        """Return what `encode` made; None for anything else."""
        try:
            found = cls(**orjson.loads(text or b""))
        except (ValueError, TypeError):
            return None
        names = [found.bridge, found.to, *([] if found.correlation_id is None else [found.correlation_id])]
        if not all(isinstance(name, str) and 0 < len(name.encode()) <= LONGEST_NAME for name in names):
            return None
        return found


@dataclass(frozen=True, slots=True)
class Response:
    """One entry of the responses.

    Attributes:
        data: the response, as it stands in the stream; empty where the entry is gone.
        reply: where it is wanted; None where that is not on this bridge's side.
    """

    entry: bytes
    request_id: str
    data: bytes
    reply: Reply | None


async def put_request(link: Link, data: bytes, reply: Reply, most: int) -> bool:
    """Put a request on the stream; False when *most* wait there already. May be sent again after an unknown reply.

    Raises:
        PenstockError: Redis is away or full, or the stream is of a wrong type.
    """
    word = await link.run(scripts.BRIDGE, (), (data, reply.encode(), most))
    return bool(word == b"added")


class ResponseStream(GroupReader):
    """The stream of responses in the hands of one consumer of the bridge of this name; errors as of `take`."""

    def __init__(self, redis: RedisSettings, bridge: str, consumer: str) -> None:
        super().__init__(redis, keys.REPORT_RESPONSES, f"bridge:{bridge}", consumer, RESPONSES_AT_ONCE)
        self._bridge = bridge

    async def responses(self, entries: Sequence[Entry]) -> list[Response]:
        """Return what entries hold, and where that is wanted."""
        found = [(entry.id, data_of(entry.fields) or b"") for entry in entries]
        ids = [_request_id_of(data) for _, data in found]
        texts = await self.link.call("MGET", *(keys.REPORT_REPLY + (name or "-") for name in ids)) if ids else []
        responses = []
        for (entry, data), name, text in zip(found, ids, texts, strict=True):
            reply = Reply.decode(text) if name else None
            responses.append(
                Response(entry, name, data, reply if reply is not None and reply.bridge == self._bridge else None)
            )
        return responses

    async def forget(self, responses: Sequence[Response]) -> None:
        """Acknowledge responses, and forget where those of this bridge were wanted. May be sent again."""
        args: list[Argument] = [self._group]
        for response in responses:
            args += [response.entry, response.request_id if response.reply else ""]
        if responses:
            await self.link.run(scripts.BRIDGED, (), args)


def _request_id_of(response: bytes) -> str:
    """Return the id of the request that a response answers; "" where that is none of ours."""
    try:
        found = orjson.loads(response)["request_id"]
    except (ValueError, TypeError, KeyError):
        return ""
    return found if is_valid_id(found) else ""
