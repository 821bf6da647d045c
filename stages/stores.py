"""What a retriever keeps its index in: the embedded one here, a Qdrant server in `stages/qdrant_server.py`.

Both keep the same promises (see `stages/index.py`): of two operations on one document the greater version wins,
whichever comes first; an operation that is repeated answers as it did; tenants share nothing; what is answered as
written outlives this process; an index that other models filled is refused.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from pipeline.errors import NotReady
from stages.index import EmbeddedIndex, Hit, IndexInUse, Passage, Search, Standing, Written

if TYPE_CHECKING:
    from pipeline.settings import RetrieverSettings
    from stages.vectors import Models

_LOCK_POLL_S: Final = 0.05
FLUSH_EVERY_S: Final = 30.0
"""Between flushes while there are writes; bounds the log, and how much of it is done again after a crash."""


@dataclass(frozen=True, slots=True)
class Put:
    """Make *passages* the chunks of a document; *digest* is its sender's name for what it holds."""

    tenant: str
    document: str
    version: int
    passages: Sequence[Passage]
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Delete:
    """Take a document out."""

    tenant: str
    document: str
    version: int


@dataclass(frozen=True, slots=True)
class Look:
    """Tell how documents stand, behind the writes before: it changes nothing, but keeps its turn."""

    tenant: str
    documents: Sequence[str]


Operation = Put | Delete | Look
Standings = dict[str, Standing | None]
Prepare = Callable[[], Operation]
"""Makes an operation ready; takes its time, for a long document."""


class Store(Protocol):
    """An index as the retriever uses it."""

    @property
    def dimensions(self) -> int | None:
        """Of its dense vectors; None before the first one has come."""

    async def open(self) -> None:
        """Open it.

        Raises:
            ConfigError: it cannot ever be used like this.
            NotReady: it cannot be used for now.
        """

    async def search_batch(self, searches: Sequence[Search]) -> list[list[Hit]]:
        """Return the hits of each search, best first."""

    async def write(self, writes: Sequence[Prepare]) -> list[Written | Standings | Exception]:
        """Do *writes* in order, and bring them where they are safe; the failure of one is no other's."""

    async def forget_deleted(self, before_version: int) -> None:
        """Drop what is known of documents that were deleted with a version below *before_version*."""

    async def count(self) -> int:
        """Return how many chunks it holds, over all tenants."""

    async def close(self) -> None:
        """Finish the write in hand, drop what waits behind it, let go of it."""


class EmbeddedStore:
    """The embedded index.

    Searches run in the event loop's own thread: the index holds the interpreter lock while it searches, so another
    thread would keep the loop waiting all the same, and cost the hand-over besides. Writes are many calls, between
    which the loop gets its turns: they run in one thread, and are on the disk before they are answered.
    """

    def __init__(self, settings: RetrieverSettings, models: Models) -> None:
        self._settings = settings
        self._models = models
        self._index: EmbeddedIndex | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._flushed_s = time.monotonic()  # used by the writer's thread

    @property
    def dimensions(self) -> int | None:
        """Of its dense vectors; None before the first one has come."""
        return self._opened().dimensions

    async def open(self) -> None:
        """Open the index; where another retriever has it, wait for `lock_wait_s`.

        Raises:
            IndexInUse: it kept it.
            ConfigError: another encoder filled it.
            NotReady: it cannot be opened for now.
        """
        give_up_at = time.monotonic() + self._settings.lock_wait_s
        while True:
            try:
                self._index = await asyncio.to_thread(EmbeddedIndex.open, self._settings.path, str(self._models))
            except IndexInUse:
                if time.monotonic() >= give_up_at:
                    raise
                await asyncio.sleep(_LOCK_POLL_S)
            else:
                break
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="index-writer")

    async def search_batch(self, searches: Sequence[Search]) -> list[list[Hit]]:
        """Return the hits of each search, best first."""
        return self._opened().search_batch(searches)

    async def write(self, writes: Sequence[Prepare]) -> list[Written | Standings | Exception]:
        """Do *writes* in order; they are on the disk then. The failure of one is no other's."""
        index = self._opened()
        return await asyncio.get_running_loop().run_in_executor(self._writer, self._write, index, writes)

    async def forget_deleted(self, before_version: int) -> None:
        """Drop what is known of documents that were deleted with a version below *before_version*."""
        index = self._opened()
        await asyncio.get_running_loop().run_in_executor(self._writer, index.forget_deleted, before_version)

    async def count(self) -> int:
        """Return how many chunks it holds, over all tenants."""
        return await asyncio.to_thread(self._opened().count)

    async def close(self) -> None:
        """Finish the write in hand, drop what waits behind it, close the index."""
        if self._writer:
            await asyncio.to_thread(self._writer.shutdown, wait=True, cancel_futures=True)
        if self._index:
            index, self._index = self._index, None
            await asyncio.to_thread(index.close)

    def _write(self, index: EmbeddedIndex, writes: Sequence[Prepare]) -> list[Written | Standings | Exception]:
        done = [_write_one(index, prepare) for prepare in writes]
        index.sync()
        if time.monotonic() - self._flushed_s >= FLUSH_EVERY_S:
            index.flush()
            self._flushed_s = time.monotonic()
        return done

    def _opened(self) -> EmbeddedIndex:
        if self._index is None:
            raise NotReady("the index is not open")
        return self._index

    def __repr__(self) -> str:
        return f"<EmbeddedStore {self._settings.path} {self._models}>"


def _write_one(index: EmbeddedIndex, prepare: Prepare) -> Written | Standings | Exception:
    try:
        match prepare():
            case Put(tenant, document, version, passages, digest):
                return index.put(tenant, document, version, passages, digest)
            case Delete(tenant, document, version):
                return index.delete(tenant, document, version)
            case Look(tenant, documents):
                return {document: index.standing(tenant, document) for document in documents}
    except Exception as error:  # noqa: BLE001 - it becomes the job's outcome, which the worker logs
        return error
