"""The retriever stage: finds the sources of a question, as many as its prompt can hold; keeps the index.

Searches of one batch run as one, in the event loop's own thread: the index holds the interpreter lock while it
searches, so another thread would keep the loop waiting all the same, and cost the hand-over besides. Writes are many
calls, between which the loop gets its turns: they run in the order of their batch, in one thread, and are on the disk
before their jobs are done. Which of two operations on one document counts is decided by when they were accepted
(`Job.accepted_us`), never by when they arrive here, so that retries and repeats do no harm.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Final, TypeVar

from pipeline.errors import ConfigError, NotReady, Reject
from pipeline.job import Done, Job
from pipeline.settings import RetrieverSettings, Settings
from pipeline.stage import Context, Outcome, Stage
from stages.index import EmbeddedIndex, Hit, IndexInUse, Passage, Search, Written
from stages.prompt import Source, fit, frame_tokens
from stages.tokens import TokenCount, token_count
from stages.vectors import KeywordModel, Sparse, unpack

T = TypeVar("T")

_LOCK_POLL_S: Final = 0.05
_WRITES: Final = frozenset({"document", "document_deletion", "document_lookup"})  # a lookup tells what they left
_FETCH: Final = 4  # hits looked at for each source wanted
_SAME_DOCUMENT: Final = 0.8
_COUNTS: Final = 4096  # of chunks and short texts, at a kilobyte or two each
_LEAST_QUESTION_TOKENS: Final = 50  # fewer would refuse most questions that people ask
_DAY_US: Final = 86_400 * 1_000_000  # no job lives longer, so nothing older than a deleted document can still arrive
_FORGET_EVERY_US: Final = 3_600 * 1_000_000


class Retriever(Stage):
    """Answers searches from the index and writes documents into it."""

    name = "retriever"

    def __init__(self, settings: RetrieverSettings, model: str, count: TokenCount) -> None:
        """Prepare; nothing is opened yet.

        Args:
            model: name of the encoder's model; vectors of another are refused.
            count: the token count that `prompt_tokens` is measured with.
        Raises:
            ConfigError: `prompt_tokens` leaves no room for a question.
        """
        if settings.prompt_tokens < frame_tokens(count) + _LEAST_QUESTION_TOKENS:
            raise ConfigError(
                f"retriever.prompt_tokens ({settings.prompt_tokens}) leaves no room for a question: "
                f"the instructions take {frame_tokens(count)}, and a question {_LEAST_QUESTION_TOKENS}"
            )
        self.slots = settings.slots
        self.batch = settings.batch
        self._settings = settings
        self._model = model
        self._count = lru_cache(_COUNTS)(count)
        self._index: EmbeddedIndex | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._forgot_us = 0  # written and read in the thread of writes only

    async def start(self, context: Context) -> None:
        """Open the index.

        Raises:
            IndexInUse: another retriever has it, and kept it for `lock_wait_s`.
            ConfigError: another encoder filled it.
            NotReady: it cannot be opened for now.
        """
        give_up_at = time.monotonic() + self._settings.lock_wait_s
        while True:
            try:
                self._index = await asyncio.to_thread(EmbeddedIndex.open, self._settings.path, self._model)
            except IndexInUse:
                if time.monotonic() >= give_up_at:
                    raise
                await asyncio.sleep(_LOCK_POLL_S)
            else:
                break
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="index-writer")

    async def stop(self) -> None:
        """Finish the call in hand, drop what waits behind it, close the index."""
        if self._writer:
            await asyncio.to_thread(self._writer.shutdown, wait=True, cancel_futures=True)
        if self._index:
            index, self._index = self._index, None
            await asyncio.to_thread(index.close)

    async def chunks(self) -> int:
        """Return how many chunks the index holds, over all tenants."""
        return await asyncio.to_thread(self._opened().count)

    async def handle(self, job: Job) -> Done:
        """Do one job."""
        [outcome] = await self.handle_batch([job])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def handle_batch(self, jobs: Sequence[Job]) -> Sequence[Outcome]:
        """Answer the searches as one, write the rest one after another; one outcome per job, in order."""
        index = self._opened()
        writes = [job for job in jobs if job.flow in _WRITES]
        queries = [job for job in jobs if job.flow not in _WRITES]
        answers = iter(self._answer(index, queries))
        acknowledgements = iter(await self._written(index, writes))
        return [next(acknowledgements if job.flow in _WRITES else answers) for job in jobs]

    def _opened(self) -> EmbeddedIndex:
        if self._index is None:
            raise NotReady("the index is not open")
        return self._index

    async def _written(self, index: EmbeddedIndex, jobs: Sequence[Job]) -> list[Outcome]:
        if not jobs:
            return []  # questions must not queue behind somebody's document only to hear that there is nothing to do
        return await asyncio.get_running_loop().run_in_executor(self._writer, self._write, index, jobs)

    # --- Questions -----------------------------------------------------------------------------

    def _answer(self, index: EmbeddedIndex, jobs: Sequence[Job]) -> list[Outcome]:
        searches = [_attempt(self._search, job) for job in jobs]
        hits = iter(index.search_batch([search for search in searches if isinstance(search, Search)]))
        return [
            _attempt(self._sources, job, next(hits)) if isinstance(search, Search) else search
            for job, search in zip(jobs, searches, strict=True)
        ]

    def _search(self, job: Job) -> Search:
        vectors = self._vectors(job)
        if len(vectors) != 1:
            raise Reject(f"a question came with {len(vectors)} vectors", code="bad_vector")
        return Search(job.tenant, vectors[0], _FETCH * self._top_k(job))

    def _top_k(self, job: Job) -> int:
        return job.payload.get("top_k") or self._settings.top_k

    def _sources(self, job: Job, found: Sequence[Hit]) -> Done:
        hits = spread(found, self._top_k(job))
        sources = [Source(hit.title, hit.text) for hit in hits]
        fitting = fit(job.payload["query"], sources, self._settings.prompt_tokens, self._count)
        used = [
            {"document": hit.document, "title": hit.title, "chunk": hit.chunk, "score": hit.score, "text": source.text}
            for hit, source in zip(hits, fitting, strict=False)  # the lowest hits may not have fitted
        ]
        return Done({"sources": used})

    # --- Documents -----------------------------------------------------------------------------

    def _write(self, index: EmbeddedIndex, jobs: Sequence[Job]) -> list[Outcome]:
        outcomes = [_attempt(self._write_one, index, job) for job in jobs]
        self._forget_old_deletions(index, max(job.accepted_us for job in jobs))
        index.flush()
        return outcomes

    def _write_one(self, index: EmbeddedIndex, job: Job) -> Done:
        if job.flow == "document_lookup":
            return Done({"documents": {name: index.standing(job.tenant, name) for name in job.payload["document_ids"]}})
        document = job.payload["document_id"]
        if job.flow == "document_deletion":
            return _done(document, "deleted", index.delete(job.tenant, document, job.accepted_us))
        chunks, vectors = job.state["chunks"], self._vectors(job)
        if len(chunks) != len(vectors):
            raise Reject(f"{len(chunks)} chunks came with {len(vectors)} vectors", code="bad_vector")
        title, digest = job.payload.get("title") or document, job.payload.get("digest") or ""
        passages = [
            Passage(_label(title, chunk["heading"]), chunk["text"], vector)
            for chunk, vector in zip(chunks, vectors, strict=True)
        ]
        return _done(document, "chunks", index.put(job.tenant, document, job.accepted_us, passages, digest))

    def _forget_old_deletions(self, index: EmbeddedIndex, now_us: int) -> None:
        if now_us - self._forgot_us >= _FORGET_EVERY_US:
            index.forget_deleted(now_us - _DAY_US)
            self._forgot_us = now_us

    def _vectors(self, job: Job) -> list[Sparse]:
        try:
            encoded = unpack(job.vector or b"")
        except ValueError as error:
            raise Reject(f"the job's vector cannot be read: {error}", code="bad_vector") from error
        if self._model not in encoded:
            message = f"the job was encoded by {', '.join(encoded) or 'nothing'}, and the index holds {self._model}"
            raise Reject(message, code="encoder_mismatch")
        return encoded[self._model]


def spread(hits: Sequence[Hit], top_k: int) -> list[Hit]:
    """Choose *top_k* of *hits*, so that one document does not crowd out the rest.

    Each further chunk of a document counts for four fifths of the one before: another document that is nearly as near
    tells the reader more.

    Args:
        hits: best first.
    """
    seen: Counter[str] = Counter()
    weighed = []
    for hit in hits:
        weighed.append((hit.score * _SAME_DOCUMENT ** seen[hit.document], hit))
        seen[hit.document] += 1
    weighed.sort(key=lambda pair: -pair[0])
    return [hit for _, hit in weighed[:top_k]]


def _attempt(call: Callable[..., T], *args: Any) -> T | Exception:
    """Call, and return what it raises: one job's failure is no other's."""
    try:
        return call(*args)
    except Exception as error:  # noqa: BLE001 - it becomes the job's outcome, which the worker logs
        return error


def _done(document: str, counted: str, written: Written) -> Done:
    superseded = {"superseded": True} if written.superseded else {}
    return Done({"document_id": document, counted: written.chunks} | superseded)


def _label(title: str, heading: str) -> str:
    """Return what a source is called: its document's title and the headings above it, none twice in a row."""
    if heading == title or heading.startswith(f"{title} > "):
        return heading
    return f"{title} > {heading}" if heading else title


def build(settings: Settings) -> Stage:
    """Return the stage as *settings* say."""
    model = KeywordModel(settings.encoder.language).name
    return Retriever(settings.retriever, model, token_count(settings.retriever.tokenizer))
