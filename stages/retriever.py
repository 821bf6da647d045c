"""The retriever stage: finds the sources of a question, as many as its prompt can hold; keeps the index.

Where the index is, `stages/stores.py` hides. Searches of one batch run as one; writes run in the order of their batch,
and are safe before their jobs are done. Which of two operations on one document counts is decided by when they were
accepted (`Job.accepted_us`), never by when they arrive here, so that retries and repeats do no harm.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Final, TypeVar, cast

import structlog

from pipeline.errors import ConfigError, PenstockError, Reject
from pipeline.job import Done, Job
from pipeline.settings import RetrieverSettings, Settings
from pipeline.stage import Context, Outcome, Stage
from stages.index import Hit, IndexBroken, Passage, Search, Written
from stages.prompt import Source, fit, frame_tokens
from stages.stores import Delete, EmbeddedStore, Look, Operation, Put, Standings, Store
from stages.tokens import TokenCount, token_count
from stages.vectors import Dense, Encoded, Models, Sparse, models, unpack

logger = structlog.get_logger()

T = TypeVar("T")
V = TypeVar("V")

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

    def __init__(self, settings: RetrieverSettings, models: Models, store: Store, count: TokenCount) -> None:
        """Prepare; nothing is opened yet.

        Args:
            models: of the encoder; vectors of others are refused.
            store: holds vectors of these models.
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
        self._models = models
        self._store = store
        self._count = lru_cache(_COUNTS)(count)
        self._forgot_us = 0

    async def start(self, context: Context) -> None:
        """Open the index.

        Raises:
            ConfigError: another retriever keeps it, or another encoder filled it.
            NotReady: it cannot be opened for now.
        """
        await self._store.open()

    async def stop(self) -> None:
        """Finish the write in hand, drop what waits behind it, close the index."""
        await self._store.close()

    async def chunks(self) -> int:
        """Return how many chunks the index holds, over all tenants."""
        return await self._store.count()

    async def handle(self, job: Job) -> Done:
        """Do one job."""
        [outcome] = await self.handle_batch([job])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def handle_batch(self, jobs: Sequence[Job]) -> Sequence[Outcome]:
        """Answer the searches as one, write the rest one after another; one outcome per job, in order."""
        writes = [job for job in jobs if job.flow in _WRITES]
        queries = [job for job in jobs if job.flow not in _WRITES]
        answers = iter(await self._answer(queries))
        acknowledgements = iter(await self._written(writes))
        return [next(acknowledgements if job.flow in _WRITES else answers) for job in jobs]

    # --- Questions -----------------------------------------------------------------------------

    async def _answer(self, jobs: Sequence[Job]) -> list[Outcome]:
        dimensions = self._store.dimensions
        searches = [_attempt(self._search, job, dimensions) for job in jobs]
        try:
            hits = iter(await self._store.search_batch([search for search in searches if isinstance(search, Search)]))
        except PenstockError as error:  # the index is out of reach for all of them: to ask for each tells no more
            return [error if isinstance(search, Search) else search for search in searches]
        return [
            _attempt(self._sources, job, next(hits)) if isinstance(search, Search) else search
            for job, search in zip(jobs, searches, strict=True)
        ]

    def _search(self, job: Job, dimensions: int | None) -> Search:
        words, meaning = self._vectors(job, dimensions)
        count = len(words if words is not None else meaning or ())
        if count != 1:
            raise Reject(f"a question came with {count} vectors", code="bad_vector")
        limit = _FETCH * self._top_k(job)
        return Search(_owner(job), words[0] if words else None, limit, meaning[0] if meaning else None)

    def _top_k(self, job: Job) -> int:
        return job.payload.get("top_k") or self._settings.top_k

    def _sources(self, job: Job, found: Sequence[Hit]) -> Done:
        hits = spread(found, self._top_k(job))
        sources = [Source(hit.title, hit.text) for hit in hits]
        budget = self._settings.prompt_tokens - self._count(job.payload.get("system_prompt") or "")
        fitting = fit(job.payload["query"], sources, budget, self._count)
        used = [
            {"document": hit.document, "title": hit.title, "chunk": hit.chunk, "score": hit.score, "text": source.text}
            for hit, source in zip(hits, fitting, strict=False)  # the lowest hits may not have fitted
        ]
        return Done({"sources": used})

    # --- Documents -----------------------------------------------------------------------------

    async def _written(self, jobs: Sequence[Job]) -> list[Outcome]:
        if not jobs:
            return []  # questions must not queue behind somebody's document only to hear that there is nothing to do
        done = await self._store.write([partial(self._operation, job) for job in jobs])
        await self._forget_old_deletions(max(job.accepted_us for job in jobs))
        return [
            written if isinstance(written, Exception) else _done(job, written)
            for job, written in zip(jobs, done, strict=True)
        ]

    def _operation(self, job: Job) -> Operation:
        if job.flow == "document_lookup":
            return Look(_owner(job), job.payload["document_ids"])
        document = job.payload["document_id"]
        if job.flow == "document_deletion":
            return Delete(_owner(job), document, job.accepted_us)
        chunks = job.state["chunks"]
        words, meaning = self._vectors(job, self._store.dimensions)
        for vectors in (words, meaning):
            if vectors is not None and len(vectors) != len(chunks):
                raise Reject(f"{len(chunks)} chunks came with {len(vectors)} vectors", code="bad_vector")
        title = job.payload.get("title") or document
        passages = [
            Passage(
                _label(title, chunk["heading"]),
                chunk["text"],
                words[number] if words else None,
                meaning[number] if meaning else None,
            )
            for number, chunk in enumerate(chunks)
        ]
        return Put(_owner(job), document, job.accepted_us, passages, job.payload.get("digest") or "")

    async def _forget_old_deletions(self, now_us: int) -> None:
        if now_us - self._forgot_us >= _FORGET_EVERY_US:
            self._forgot_us = now_us
            try:
                await self._store.forget_deleted(now_us - _DAY_US)
            except (PenstockError, IndexBroken) as error:  # the writes before are done: they must not fail with it
                logger.warning("deleted documents could not be forgotten; tried again in an hour", why=str(error))

    # --- Vectors -------------------------------------------------------------------------------

    def _vectors(self, job: Job, dimensions: int | None) -> tuple[list[Sparse] | None, list[Dense] | None]:
        """Return the job's vectors by words and by meaning; None for a way that the index is not searched by.

        Args:
            dimensions: of the dense vectors that the index holds, None when it holds none yet.
        """
        try:
            encoded = unpack(job.vector or b"")
        except ValueError as error:
            raise Reject(f"the job's vector cannot be read: {error}", code="bad_vector") from error
        keywords, dense = self._models.keywords, self._models.dense
        if (keywords and keywords not in encoded) or (dense and dense not in encoded):
            message = f"the job was encoded by {' + '.join(encoded) or 'nothing'}, and the index holds {self._models}"
            raise Reject(message, code="encoder_mismatch")
        words: list[Sparse] | None = _of_kind(Sparse, encoded, keywords) if keywords else None
        meaning: list[Dense] | None = _of_kind(array, encoded, dense) if dense else None
        if words is not None and meaning is not None and len(words) != len(meaning):
            message = f"{len(words)} vectors of {keywords} came with {len(meaning)} of {dense}"
            raise Reject(message, code="bad_vector")
        if meaning and dimensions not in (None, len(meaning[0])):
            message = (
                f"the job's vectors of {dense} have {len(meaning[0])} dimensions, and those in the index {dimensions}: "
                "the model behind that name is another one now; set it back, or begin another index and ingest again"
            )
            raise Reject(message, code="encoder_mismatch")
        return words, meaning


def _of_kind(kind: type[V], encoded: Encoded, model: str) -> list[V]:
    vectors = encoded[model]
    if vectors and not isinstance(vectors[0], kind):
        raise Reject(f"the vectors of {model} are of the wrong kind", code="bad_vector")
    return cast("list[V]", vectors)


def spread(hits: Sequence[Hit], top_k: int) -> list[Hit]:
    """Choose *top_k* of *hits*, so that one document does not crowd out the rest.

    Each further chunk of a document counts for four fifths of the one before: another document that is nearly as near
    tells the reader more.

    Args:
        hits: best first.
    """
    seen: dict[str, int] = {}
    weighed = []
    for hit in hits:
        before = seen[hit.document] = seen.get(hit.document, -1) + 1
        weighed.append((hit.score * _SAME_DOCUMENT**before, hit))
    weighed.sort(key=lambda pair: -pair[0])
    return [hit for _, hit in weighed[:top_k]]


def _owner(job: Job) -> str:
    """Return whose chunks a job is about, as the index divides them: a tenant's, or those of one collection of theirs.

    No tenant's name holds a slash.
    """
    collection = job.payload.get("collection")
    return f"{job.tenant}/{collection}" if collection else job.tenant


def _attempt(call: Callable[..., T], *args: Any) -> T | Exception:
    """Call, and return what it raises: one job's failure is no other's."""
    try:
        return call(*args)
    except Exception as error:  # noqa: BLE001 - it becomes the job's outcome, which the worker logs
        return error


def _done(job: Job, written: Written | Standings) -> Done:
    if not isinstance(written, Written):
        return Done({"documents": written})
    counted = "deleted" if job.flow == "document_deletion" else "chunks"
    superseded = {"superseded": True} if written.superseded else {}
    return Done({"document_id": job.payload["document_id"], counted: written.chunks} | superseded)


def _label(title: str, heading: str) -> str:
    """Return what a source is called: its document's title and the headings above it, none twice in a row."""
    if heading == title or heading.startswith(f"{title} > "):
        return heading
    return f"{title} > {heading}" if heading else title


def build(settings: Settings) -> Stage:
    """Return the stage as *settings* say.

    Raises:
        ConfigError: they cannot work, or name a Qdrant server and the package for it is missing.
    """
    filled_by = models(settings.encoder)
    count = token_count(settings.retriever.tokenizer)
    return Retriever(settings.retriever, filled_by, _store(settings.retriever, filled_by), count)


def _store(settings: RetrieverSettings, filled_by: Models) -> Store:
    if not settings.qdrant_url:
        return EmbeddedStore(settings, filled_by)
    try:
        from stages.qdrant_server import connect  # an optional extra: imported only when it is asked for
    except ImportError as error:
        raise ConfigError(
            f"QDRANT_URL names {settings.qdrant_url}, which needs an optional package: pip install 'penstock[qdrant]'"
        ) from error
    return connect(settings, filled_by)
