"""What a check of a running system has made, and how it is taken away again (`penstock verify`).

Whatever a client makes goes by itself after days; a check that is run every hour must not leave that much. So each
thing it makes is noted here by the id that clients know, and afterwards its keys go, and its rows in the history.
Nothing is taken from work that has not ended: a job would find its batch gone, and be a dead letter for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pipeline import keys
from pipeline.batches import webhook_id_of
from pipeline.connection import CommandRefused
from pipeline.job import DEFAULT_TENANT

if TYPE_CHECKING:
    from pipeline.connection import Link

LOOK_EVERY_S: Final = 0.05


@dataclass(slots=True)
class Traces:
    """What was made.

    Attributes:
        tenant: whose all of it is.
        jobs: ids of jobs that leave an outcome and nothing else.
        batches: messages by batch; webhooks that tell of them are known by that.
        reports: ids of their jobs.
        letters: ids of dead letters.
    """

    tenant: str = DEFAULT_TENANT
    jobs: list[str] = field(default_factory=list)
    batches: dict[str, list[str]] = field(default_factory=dict)
    chats: list[str] = field(default_factory=list)
    queues: list[str] = field(default_factory=list)
    users: list[str] = field(default_factory=list)
    reports: list[str] = field(default_factory=list)
    deliveries: list[str] = field(default_factory=list)
    letters: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        made = (self.jobs, self.batches, self.chats, self.queues, self.users, self.deliveries, self.letters)
        return any(made)

    async def unfinished(self, link: Link) -> list[str]:
        """Return what still goes on: jobs and batches, by their ids.

        Raises:
            What `Link.call` does (so for all that follows).
        """
        ids = [*self.jobs, *(message for messages in self.batches.values() for message in messages)]
        ids += self.deliveries + [webhook_id_of(batch_id) for batch_id in self.batches]
        found = [job_id for job_id in dict.fromkeys(ids) if await link.call("EXISTS", keys.LIVE + job_id)]
        for batch_id in self.batches:
            key = keys.BATCH + batch_id
            if await link.call("EXISTS", key) and not await link.call("HEXISTS", key, "closed_ms"):
                found.append(batch_id)
        return found

    async def remove(self, link: Link) -> int:
        """Take everything that has ended out of Redis; return how many keys and dead letters that were."""
        unfinished = set(await self.unfinished(link))
        names = [name for owner, name in self._keys() if owner not in unfinished]
        names += await self._written(link)
        gone = int(await link.call("UNLINK", *names)) if names else 0
        if self.letters:
            gone += int(await link.call("XDEL", keys.DEAD, *self.letters))
        if self.queues:
            members = [keys.of_tenant(self.tenant, queue) for queue in self.queues]
            await link.call("SREM", keys.QUEUES + self.tenant, *members)
        return gone

    async def left(self, link: Link) -> list[str]:
        """Return the keys that are still there."""
        return [name for _, name in self._keys() if await link.call("EXISTS", name)]

    async def _written(self, link: Link) -> list[str]:
        """Return the keys by which others find a report of ours that is, or was being, written."""
        if not self.reports:
            return []
        ours = {report_id.encode() for report_id in self.reports}
        found = []
        async for name in _scan(link, keys.REPORT_MAKING + "*"):
            if await link.call("GET", name) in ours:
                found += [name, keys.REPORT + name.removeprefix(keys.REPORT_MAKING)]
        return found

    def _keys(self) -> list[tuple[str, str]]:
        """Return every key, each with the id of what it belongs to."""
        found = [(job_id, keys.COMPLETION + job_id) for job_id in self.jobs]
        found += [(name, kind + name) for name in self.deliveries for kind in (keys.DELIVERY, keys.COMPLETION)]
        for batch_id, messages in self.batches.items():
            kinds = (keys.BATCH, keys.BATCH_MEMBERS, keys.BATCH_DONE, keys.BATCH_RESULTS, keys.COMPLETION)
            found += [(batch_id, kind + batch_id) for kind in kinds]
            found.append((webhook_id_of(batch_id), keys.COMPLETION + webhook_id_of(batch_id)))
            for message_id in messages:
                found += [(message_id, keys.MESSAGE + message_id), (message_id, keys.COMPLETION + message_id)]
        chat_kinds = (keys.CHAT_QUEUE, keys.CHAT_LOCK, keys.CHAT, keys.CHAT_OPEN, keys.CHAT_SEEN, keys.CHAT_TURNS)
        for chat in (keys.of_tenant(self.tenant, chat_id) for chat_id in self.chats):
            found += [(chat, kind + chat) for kind in (*chat_kinds, keys.CHAT_EVENTS)]
        found += [(queue, keys.QUEUE + keys.of_tenant(self.tenant, queue)) for queue in self.queues]
        for user in (keys.of_tenant(self.tenant, user_id) for user_id in self.users):
            found += [(user, kind + user) for kind in (keys.USER, keys.USER_DATA, keys.INPUT)]
        return found


async def until_recorded(link: Link) -> None:
    """Wait until the history has every event that was told up to now; for ever, while no recorder runs."""
    try:
        about = await link.call("XINFO", "STREAM", keys.EVENTS)
    except CommandRefused:  # nothing was ever told
        return
    last = about[about.index(b"last-generated-id") + 1]
    while True:
        if not await link.call("XRANGE", keys.EVENTS, "-", last, "COUNT", 1):
            return
        await asyncio.sleep(LOOK_EVERY_S)


async def entries_added(link: Link, stream: str) -> int:
    """Return how many entries were ever added to a stream; 0 where there is none."""
    try:
        about = await link.call("XINFO", "STREAM", stream)
    except CommandRefused:
        return 0
    return int(about[about.index(b"entries-added") + 1])


async def tenant_of(link: Link, kind: str, name: str) -> str | None:
    """Return whose key it is that begins with *kind* and ends with *name*; None where there is no such key."""
    if await link.call("EXISTS", kind + name):
        return DEFAULT_TENANT
    async for key in _scan(link, f"{kind}*:{name}"):
        return key.removeprefix(kind).removesuffix(f":{name}")
    return None


async def _scan(link: Link, pattern: str) -> AsyncIterator[str]:
    """Yield the keys of this pattern, walking over all there are."""
    cursor = b"0"
    while True:
        cursor, found = await link.call("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
        for key in found:
            yield key.decode()
        if cursor == b"0":
            return
