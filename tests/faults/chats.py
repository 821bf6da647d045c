"""People in chats who write in bursts, and what they were told.

Each chat gets a burst of messages, one after another, each under an id of its own: whoever hears no yes says it again,
and it counts once. What a chat was told is read from its stream of events, in Redis, as every gateway would tell it.

One line of JSON each:

    {"event": "sent", "n", "chat", "ids"}                     a burst begins
    {"event": "accepted", "n", "id"}                          the client heard yes
    {"event": "unheard", "n", "id", "code"}                   the client heard something else, and says it again
    {"event": "client_crashed", "n", "code"}                  what it heard, the client could not make sense of
    {"event": "told", "n", "events": [{"type", "message_ids", "message_id", "text"}]}   all that the chat was told
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from pipeline import keys
from tests.faults.history import Json, Writer, read

BURST: Final = 3
"""Messages of one chat."""
AT_ONCE: Final = 50
"""Bursts on their way: more would measure how fast one gateway accepts."""
PATIENCE_S: Final = 120.0
"""How long a client says the same message again."""
AGAIN_S: Final = 0.1

Post = Callable[[str, Json], Awaitable[tuple[int, Json]]]
"""Sends a body to a path; returns status and answer. Status 0: nothing was heard, and `code` in the answer says why."""


class Bursts:
    """Clients of many chats.

    Args:
        path: the file that they write.
    """

    def __init__(self, post: Post, redis: Any, path: Path) -> None:
        self.path = path
        self._post = post
        self._redis = redis
        self._chats: list[str] = []

    async def run(self, chats: int) -> None:
        """Send a burst to so many chats; return when all of it was accepted, or given up."""
        self._chats = [f"burst-{number}" for number in range(1, chats + 1)]
        at_once = asyncio.Semaphore(AT_ONCE)
        with Writer(self.path) as writer:

            async def burst(number: int, chat: str) -> None:
                async with at_once:
                    try:
                        await self._say_all(writer, number, chat)
                    except Exception as error:  # noqa: BLE001 - a client's outermost edge: the judge reads it
                        writer.write("client_crashed", n=number, code=f"{type(error).__name__}: {error}"[:200])

            async with asyncio.TaskGroup() as group:
                for number, chat in enumerate(self._chats, 1):
                    group.create_task(burst(number, chat), name=f"burst {number}")

    async def _say_all(self, writer: Writer, number: int, chat: str) -> None:
        ids = [f"m{number}.{position}" for position in range(BURST)]
        writer.write("sent", n=number, chat=chat, ids=ids)
        for position, message_id in enumerate(ids):
            body = {"user_id": "ann", "text": mark(number, position), "message_id": message_id}
            give_up_s = time.monotonic() + PATIENCE_S
            while time.monotonic() < give_up_s:
                status, answer = await self._post(f"/chat/{chat}/messages", body)
                if status == 202:
                    writer.write("accepted", n=number, id=message_id)
                    break
                writer.write("unheard", n=number, id=message_id, code=answer["error"]["code"])
                await asyncio.sleep(AGAIN_S)

    async def are_told(self) -> bool:
        """Say whether every chat was told of as many messages as were said there."""
        return all(sum(len(event["message_ids"]) for event in told) >= BURST for told in await self._told())

    async def note_what_was_told(self) -> None:
        """Write down what every chat was told."""
        with Writer(self.path) as writer:
            for number, told in enumerate(await self._told(), 1):
                writer.write("told", n=number, events=told)

    async def _told(self) -> list[list[Json]]:
        async with self._redis.pipeline(transaction=False) as asked:
            for chat in self._chats:
                asked.xrange(keys.CHAT_EVENTS + chat)
            found = await asked.execute()
        return [[_shown(orjson.loads(fields[b"data"])) for _, fields in entries] for entries in found]


def mark(number: int, position: int) -> str:
    """Return the text of a message: the replicas know whose it is."""
    return f"Chat {number}, message {position}."


def _shown(event: Json) -> Json:
    return {name: event.get(name) for name in ("type", "message_ids", "message_id", "text")}


# --- what the file says --------------------------------------------------------------------------


@dataclass(slots=True)
class Burst:
    """What is known of one chat, pieced together from the file.

    Attributes:
        ids: of its messages, in the order said.
        accepted: those of which the client heard yes.
        events: what it was told, in order; None when nobody looked.
    """

    n: int
    chat: str
    ids: list[str]
    accepted: set[str] = field(default_factory=set)
    events: list[Json] | None = None
    crashed: str | None = None


def piece_together(path: Path) -> list[Burst]:
    """Return every chat in a file, in the order of sending."""
    found: dict[int, Burst] = {}
    for line in read(path):
        number = line["n"]
        match line["event"]:
            case "sent":
                found[number] = Burst(number, line["chat"], line["ids"])
            case "accepted":
                found[number].accepted.add(line["id"])
            case "client_crashed":
                found[number].crashed = line["code"]
            case "told":
                found[number].events = line["events"]
    return list(found.values())
