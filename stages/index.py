"""The embedded index: Qdrant Edge in this process, one owner of its directory.

What it hides:

**One owner.** A kernel lock on `<path>/owner.lock` is held while the index is open, and freed by the kernel when its
holder dies, however it dies.

**The interpreter lock.** Qdrant Edge (0.9) holds it during every call, so a thread does not keep a long call from
stopping the event loop. So no call is long: writes go in portions of `PORTION` chunks (about 5 ms), and the segments
are never optimised while the index is open: 40 us per chunk in one call, for searches that get no faster (sparse
vectors are searched by posting lists with or without it, and the room of replaced chunks is used again).

**Order.** Every document has a head: a record of the last operation that was completed on it, and its version. An
operation older than the head does nothing; one as old as the head was done before, and answers as it did then. Heads
are written last, so an operation cut short is simply done again, and chunks are numbered, so doing it again writes
the same ones. While a document is being replaced, a search may see some of its old and some of its new chunks.
The head of a deleted document is dropped once it is older than any job can be.

**Durability.** An update is in the write-ahead log when the call returns, which survives this process, and `sync`
brings that log to the disk: opening the index does again what stands there and was not flushed. Whoever acknowledges a
write to somebody else calls `sync` first. `flush` brings everything to the disk and lets the log begin anew; it holds
the interpreter lock while the disk writes, 15 to 80 ms (`sync` takes 1 ms and holds nothing): for now and then only.

**Tenants.** Every search and every count of how rare a word is (IDF) is confined to one tenant's chunks. While there is
one tenant only, the search needs no filter to be so; whose chunks it found is looked at in any case.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypedDict, cast

import orjson
from msgspec import Struct
from qdrant_edge import (
    CountRequest,
    Distance,
    EdgeConfig,
    EdgeShard,
    EdgeSparseVectorParams,
    FacetRequest,
    FieldCondition,
    Filter,
    Fusion,
    IdfParams,
    IsEmptyCondition,
    KeywordIndexParams,
    MatchValue,
    Modifier,
    PayloadSchemaType,
    Point,
    Prefetch,
    Query,
    QueryBatchRequest,
    QueryRequest,
    RangeFloat,
    ScoredPoint,
    SearchParams,
    SparseVector,
    UpdateOperation,
)

from pipeline.errors import ConfigError, NotReady
from stages.vectors import Dense, Sparse

WORDS: Final = "words"
MEANING: Final = "meaning"
PORTION: Final = 64
# Of reciprocal rank fusion: a hit counts 1 / (k + its rank from 0), over both ways. Qdrant's own default. The 60 of the
# first paper on it (Cormack et al., 2009) is for lists of a thousand: over twenty, what both ways find by the way would
# outdo what one of them finds first, an exact name, say.
RRF_K: Final = 2
_KEPT: Final = 4096  # payloads, of a kilobyte or two each
_SEARCH_THREADS: Final = (
    1  # more only look for work, busily: an index that is never optimised has one segment to search
)
_NAMESPACE: Final = uuid.UUID("6f0c3c1e-6d0b-4f7a-9d55-0b7f2f6d9a11")  # any constant: ids must be the same every time
FORMAT: Final = 1

_NO_WORDS: Final = Sparse((), ())

_PointVersion = tuple[int, int]  # a point's id, whose own hash takes Python code, as a number; and its version


class IndexInUse(ConfigError):
    """The index is in use by another retriever."""


class IndexBroken(Exception):
    """The index failed at an operation it should have done."""


class Search(Struct, frozen=True):
    """One search: *limit* chunks of *tenant* nearest to a question.

    Attributes:
        vector: the question's words; None where it is not looked for by words.
        dense: the question's meaning; None where it is not looked for by meaning.
    """

    tenant: str
    vector: Sparse | None
    limit: int
    dense: Dense | None = None


class Hit(Struct, frozen=True):
    """One chunk that was found.

    Attributes:
        chunk: its number within the document, from 0.
        score: greater is nearer: BM25, or the cosine, or for both together what their ranks make (`RRF_K`).
    """

    document: str
    title: str
    chunk: int
    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Passage:
    """One chunk to be indexed: what is shown, and the vectors it is found by."""

    title: str
    text: str
    vector: Sparse | None
    dense: Dense | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """What came of a write.

    Attributes:
        chunks: how many chunks it put in or took out.
        superseded: True when a later operation on the document was there before, so that nothing was done.
    """

    chunks: int
    superseded: bool = False


class Standing(TypedDict):
    """How a document stands in the index: its chunks, and what its sender named its version ("": nothing)."""

    chunks: int
    digest: str


class EmbeddedIndex:
    """An open index. Reads may run in one thread while writes run in another; writes only ever in one.

    Attributes:
        dimensions: of its dense vectors; None before the first one has come. Written by the thread of writes.
    """

    def __init__(self, path: Path, model: str, dimensions: int | None, shard: EdgeShard, lock: int) -> None:
        self.dimensions = dimensions
        self._path = path
        self._model = model
        self._shard = shard
        self._lock = lock
        self._kept: dict[_PointVersion, Any] = {}  # used by searches only, which run in one thread
        # Two say as much as all: that there are others. None is taken out before the index is opened anew.
        self._tenants = {str(tenant.value) for tenant in shard.facet(FacetRequest("tenant", limit=2, exact=True))}

    @classmethod
    def open(cls, path: Path, model: str) -> EmbeddedIndex:
        """Open the index in directory *path*, which is made when missing.

        Args:
            model: name of the model whose vectors it holds; a new index is marked with it.
        Raises:
            IndexInUse: another process has it open.
            ConfigError: another model filled it.
            NotReady: the directory cannot be used, or what is in it cannot be read.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(path / "owner.lock")
        except OSError as error:
            raise NotReady(f"the index cannot be opened: {error.strerror}: {error.filename or path}") from error
        try:
            dimensions = _check_model(path / "collection.json", model)
            with _translated(NotReady, f"the index in {path} cannot be opened"):
                return cls(path, model, dimensions, _open_shard(path / "shard"), lock)
        except OSError as error:
            os.close(lock)
            raise NotReady(f"the index cannot be opened: {error.strerror}: {error.filename or path}") from error
        except BaseException:
            os.close(lock)
            raise

    def search_batch(self, searches: Sequence[Search]) -> list[list[Hit]]:
        """Return the hits of each search, best first."""
        if self.dimensions is None:
            searches = [_by_words(search) for search in searches]
        requests = [_request(search, is_alone=self._tenants <= {search.tenant}) for search in searches]
        with _translated(IndexBroken, "search"):
            answers = self._shard.query_batch(QueryBatchRequest(requests)) if requests else []
        nearest = [[(_version_of(point), point.score) for point in points] for points in answers]
        self._read({point for points in nearest for point, _ in points} - self._kept.keys())
        hits = [
            [hit(self._kept[point], score) for point, score in points if _is_of(search.tenant, self._kept.get(point))]
            for search, points in zip(searches, nearest, strict=True)
        ]
        for point in list(islice(self._kept, max(0, len(self._kept) - _KEPT))):  # the oldest
            del self._kept[point]
        return hits

    def _read(self, points: set[_PointVersion]) -> None:
        """Read what stands with each point into `_kept`, but for those deleted since they were found.

        To read and convert a payload costs more than to find its point, and the same chunks are found again and again,
        so the latest payloads are kept. Every write gives its points a new version.
        """
        if not points:
            return
        versions = dict(points)
        with _translated(IndexBroken, "read"):
            records = self._shard.retrieve([uuid.UUID(int=number) for number in versions], True, False)
        for record in records:
            number = cast("uuid.UUID", record.id).int
            self._kept[number, versions[number]] = record.payload

    def put(self, tenant: str, document: str, version: int, passages: Sequence[Passage], digest: str = "") -> Written:
        """Make *passages* the chunks of the document, in the place of any it had.

        Args:
            version: of two operations on one document the greater version wins, whichever comes first.
            digest: the sender's name for what the document holds; kept for `standing`.
        """
        head = self._head(tenant, document)
        if head and head["version"] >= version:
            return _as_before(head, version)
        if self.dimensions is None and passages and passages[0].dense is not None:
            self._make_room_for(len(passages[0].dense))
        self._tenants.add(tenant)  # before anything of theirs can be found
        points = [
            Point(
                point_id(tenant, document, number),
                _vectors(passage),
                chunk_payload(tenant, document, version, number, passage),
            )
            for number, passage in enumerate(passages)
        ]
        for start in range(0, len(points), PORTION):
            self._update(UpdateOperation.upsert_points(points[start : start + PORTION]))
        left_over = _chunks_of(tenant, document, [FieldCondition("version", match=MatchValue(version))])
        self._update(UpdateOperation.delete_points_by_filter(left_over))
        self._write_head(tenant, document, version, "indexed", len(points), digest)
        return Written(len(points))

    def standing(self, tenant: str, document: str) -> Standing | None:
        """Return how the document stands here; None where it does not."""
        return standing(self._head(tenant, document))

    def _make_room_for(self, dimensions: int) -> None:
        """Let chunks have a dense vector; how long they are is known from the first one only."""
        self._update(UpdateOperation.create_dense_vector(MEANING, dimensions, Distance.Cosine))
        self.flush()  # the file must not tell of more than there is
        _record(self._path / "collection.json", self._model, dimensions)
        self.dimensions = dimensions

    def delete(self, tenant: str, document: str, version: int) -> Written:
        """Take the document out.

        Args:
            version: of two operations on one document the greater version wins, whichever comes first.
        """
        head = self._head(tenant, document)
        if head and head["version"] > version:
            return Written(0, superseded=True)
        chunks = _chunks_of(tenant, document)
        # The head goes first here: were this cut short, the count could not be found again, but the chunks can.
        if not head or head["version"] < version:
            head = self._write_head(tenant, document, version, "deleted", self._count(chunks))
        self._update(UpdateOperation.delete_points_by_filter(chunks))
        return Written(head["chunks"])

    def forget_deleted(self, before_version: int) -> None:
        """Drop what is known of documents that were deleted with a version below *before_version*."""
        old = FieldCondition("version", range=RangeFloat(lt=before_version))
        deleted = FieldCondition("state", match=MatchValue("deleted"))
        self._update(UpdateOperation.delete_points_by_filter(Filter(must=[deleted, old])))

    def sync(self) -> None:
        """See to it that all that was written outlasts a power cut; returns when it does."""
        log = self._path / "shard" / "wal"
        files = sorted(log.glob("*-*")) if log.is_dir() else []  # open-1, closed-7, first-index
        if not any(file.name.startswith("open-") for file in files):  # another Qdrant Edge, which has its log elsewhere
            self.flush()
            return
        with _translated(IndexBroken, "sync"):
            for path in (*files, log):
                opened = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(opened)
                finally:
                    os.close(opened)

    def flush(self) -> None:
        """Bring everything to the disk, not the log of it alone; returns when it is there."""
        with _translated(IndexBroken, "flush"):
            self._shard.flush()

    def count(self, tenant: str | None = None) -> int:
        """Return the number of chunks, of one tenant or of all."""
        if tenant is None:
            return self._count(Filter(must_not=[IsEmptyCondition("tenant")]))
        return self._count(Filter(must=[FieldCondition("tenant", match=MatchValue(tenant))]))

    def close(self) -> None:
        """Flush, close and let go of the directory."""
        try:
            with _translated(IndexBroken, "close"):
                self._shard.close()
        finally:
            os.close(self._lock)

    def __repr__(self) -> str:
        return f"<EmbeddedIndex {self._path}>"

    def _count(self, chunks: Filter) -> int:
        with _translated(IndexBroken, "count"):
            return self._shard.count(CountRequest(filter=chunks, exact=True))

    def _update(self, operation: UpdateOperation) -> None:
        with _translated(IndexBroken, "update"):
            self._shard.update(operation)

    def _head(self, tenant: str, document: str) -> dict[str, Any] | None:
        with _translated(IndexBroken, "read"):
            # The stub calls the last two optional; the call fails without them (qdrant-edge-py 0.9.0).
            records = self._shard.retrieve([point_id(tenant, document, "head")], True, False)
        return cast("dict[str, Any]", records[0].payload) if records else None

    def _write_head(
        self, tenant: str, document: str, version: int, state: str, chunks: int, digest: str = ""
    ) -> dict[str, Any]:
        # No `tenant` and no vector: no search and no count can meet it.
        head = {"head": document, "owner": tenant, "state": state, "version": version, "chunks": chunks}
        head |= {"digest": digest} if digest else {}
        self._update(UpdateOperation.upsert_points([Point(point_id(tenant, document, "head"), {}, head)]))
        return head


def _as_before(head: dict[str, Any], version: int) -> Written:
    return Written(0, superseded=True) if head["version"] > version else Written(head["chunks"])


def point_id(tenant: str, document: str, part: int | str) -> uuid.UUID:
    """Return the id of a document's point: of a chunk by its number, of the head by that word."""
    return uuid.uuid5(_NAMESPACE, f"{tenant}\0{document}\0{part}")


def _chunks_of(tenant: str, document: str, but_not: list[FieldCondition] | None = None) -> Filter:
    return Filter(
        must=[
            FieldCondition("document", match=MatchValue(document)),
            FieldCondition("tenant", match=MatchValue(tenant)),
        ],
        must_not=list(but_not) if but_not else None,
    )


def chunk_payload(tenant: str, document: str, version: int, number: int, passage: Passage) -> dict[str, Any]:
    """Return what stands with the vectors of a chunk."""
    return {
        "tenant": tenant,
        "document": document,
        "version": version,
        "chunk": number,
        "title": passage.title,
        "text": passage.text,
    }


def standing(head: Mapping[str, Any] | None) -> Standing | None:
    """Return what a document's head tells of it; None where it is not indexed."""
    if not head or head["state"] != "indexed":
        return None
    return Standing(chunks=head["chunks"], digest=head.get("digest", ""))


def hit(payload: Mapping[str, Any], score: float) -> Hit:
    """Return the chunk that `chunk_payload` told of."""
    return Hit(payload["document"], payload["title"], payload["chunk"], payload["text"], score)


def _vectors(passage: Passage) -> dict[str, list[float] | SparseVector | list[list[float]]]:
    vectors: dict[str, list[float] | SparseVector | list[list[float]]] = {}
    if passage.vector is not None:
        vectors[WORDS] = SparseVector(list(passage.vector.indices), list(passage.vector.values))
    if passage.dense is not None:
        vectors[MEANING] = passage.dense.tolist()
    return vectors


def _by_words(search: Search) -> Search:
    """Return the search of an index without any dense vector: by words, and finding nothing where there are none."""
    return Search(search.tenant, search.vector or _NO_WORDS, search.limit)


def _request(search: Search, *, is_alone: bool) -> QueryRequest:
    """Return the request; for a tenant that *is_alone*, without the filter, which costs more than all the rest."""
    own = Filter(must=[FieldCondition("tenant", match=MatchValue(search.tenant))])
    confined = None if is_alone else own
    ways: list[tuple[Query, SearchParams | None]] = []
    if search.vector is not None:
        words = SparseVector(list(search.vector.indices), list(search.vector.values))
        ways.append((Query.Nearest(words, using=WORDS), SearchParams(idf=IdfParams(corpus=own))))
    if search.dense is not None:
        ways.append((Query.Nearest(search.dense.tolist(), using=MEANING), None))
    if len(ways) == 1:
        [(query, params)] = ways
        return QueryRequest(limit=search.limit, query=query, filter=confined, params=params, with_payload=False)
    return QueryRequest(
        limit=search.limit,
        prefetches=[Prefetch(search.limit, query, params=params, filter=confined) for query, params in ways],
        query=cast("Fusion", Fusion.Rrf(RRF_K)),  # the stub does not say that it is one
        with_payload=False,
    )


def _version_of(point: ScoredPoint) -> _PointVersion:
    return cast("uuid.UUID", point.id).int, point.version


def _is_of(tenant: str, payload: Any) -> bool:
    """Whether a chunk is still there, and the tenant's own: another's may have come between request and search."""
    return payload is not None and bool(payload["tenant"] == tenant)


def _open_shard(path: Path) -> EdgeShard:
    # IDF: without the modifier every word would weigh the same, however common it is.
    words = EdgeSparseVectorParams(modifier=Modifier.Idf)
    config = EdgeConfig(sparse_vectors={WORDS: words}, max_search_threads=_SEARCH_THREADS)
    if (path / "edge_config.json").exists():
        shard = EdgeShard.load(str(path), config)
    else:
        path.mkdir(exist_ok=True)
        shard = EdgeShard.create(str(path), config)
    if not {"document", "tenant", "state"} <= set(shard.info().payload_schema):  # new, or its making was cut short
        shard.update(UpdateOperation.create_field_index("document", PayloadSchemaType.Keyword))
        shard.update(UpdateOperation.create_field_index("tenant", KeywordIndexParams(is_tenant=True)))
        shard.update(UpdateOperation.create_field_index("state", PayloadSchemaType.Keyword))
        shard.flush()
    return shard


def _take_lock(path: Path) -> int:
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        message = (
            f"the index in {path.parent} is in use by another retriever, and an embedded index has one owner: "
            "set PENSTOCK_RETRIEVER__PATH to give this one its own; to share one, set QDRANT_URL (a Qdrant server)"
        )
        raise IndexInUse(message) from None
    return lock


def _check_model(path: Path, model: str) -> int | None:
    """Compare *model* with what the file says of the collection beside it, or write the file; return the dimensions."""
    if not path.exists():
        _record(path, model, None)
        return None
    try:
        collection = orjson.loads(path.read_bytes())
        filled_by, form, dimensions = collection["model"], collection["format"], collection.get("dimensions")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotReady(f"the index cannot be opened: {path} does not say what filled it: {error}") from error
    if (filled_by, form) != (model, FORMAT):
        raise ConfigError(
            f"the index in {path.parent} was filled by {filled_by} (format {form}), and this encoder is {model} "
            f"(format {FORMAT}): set the encoder back, or name another PENSTOCK_RETRIEVER__PATH and ingest again"
        )
    return cast("int | None", dimensions)


def _record(path: Path, model: str, dimensions: int | None) -> None:
    """Write what fills the collection into the file beside it, whole or not at all."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(orjson.dumps({"format": FORMAT, "model": model, "dimensions": dimensions}))
    fresh.replace(path)


@contextmanager
def _translated(kind: type[Exception], doing: str) -> Iterator[None]:
    """Raise *kind* for whatever Qdrant Edge raises: bare `Exception`s, and panics, which are no `Exception` at all."""
    try:
        yield
    except Exception as error:
        raise kind(f"{doing}: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise kind(f"{doing}: {error}") from error
