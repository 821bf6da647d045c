"""The index on a Qdrant server, shared by any number of retrievers.

What it hides:

**Order without a lock.** Two retrievers may write the same document at once. Every write carries its version into the
server: a chunk or a head is only written over one that is not newer, and only older chunks are taken out, each decided
by the server, point by point. A write goes: chunks, head, removal of older chunks, a second look at the head. Whoever
writes the newer head sees to it afterwards that no older chunk is left, and whoever finds a newer head in the second
look takes out what it wrote itself; so, whichever head came last, its owner or the other one cleans up, and nothing of
the older version stays. An operation cut short is simply done again.

**Which models filled it** stands in the collection's metadata. How long a dense vector is comes to be known with the
first one, so that only then the collection gets room for them. Somebody may delete the collection at any time, and
another retriever make it again, for another encoder or with vectors of another length, without any call of ours that
fails: so it is looked at again before every batch of writes, and for searches when the last look is older than
`FRESH_S`.

**Tenants.** Every search and every count of how rare a word is (IDF) is confined to one tenant's chunks; whose chunks
were found is looked at besides.

The client's own local mode takes the same way, so that all of this is tested without a server.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from json import JSONDecodeError
from typing import TYPE_CHECKING, Any, Final

import httpx
from qdrant_client import AsyncQdrantClient
from qdrant_client.common.client_exceptions import QdrantException, ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
from qdrant_client.models import (
    DenseVectorConfig,
    DenseVectorNameConfig,
    Distance,
    FieldCondition,
    Filter,
    IdfCorpusParams,
    IsEmptyCondition,
    KeywordIndexParams,
    KeywordIndexType,
    MatchValue,
    Modifier,
    PayloadField,
    PayloadSchemaType,
    PointStruct,
    Prefetch,
    QueryRequest,
    Range,
    Rrf,
    RrfQuery,
    SearchParams,
    SparseVector,
    SparseVectorParams,
    WriteOrdering,
)

from pipeline.errors import ConfigError, NotReady, Reject, RetryLater
from stages.index import (
    FORMAT,
    MEANING,
    PORTION,
    RRF_K,
    WORDS,
    Hit,
    Passage,
    Search,
    Written,
    chunk_payload,
    hit,
    point_id,
    standing,
)
from stages.stores import Delete, Look, Operation, Prepare, Put, Standings

if TYPE_CHECKING:
    from pipeline.settings import RetrieverSettings
    from stages.vectors import Models

LEAST_VERSION: Final = (1, 19)
"""Of the server: the first that counts how rare a word is among one tenant's chunks."""

FRESH_S: Final = 2.0
"""What is known of the collection may be so old when it is searched; to look costs a call."""

_ORDERING: Final = WriteOrdering.STRONG  # of a replicated collection: conditions hold at one leader only
_METADATA: Final = "penstock"
_CONNECTIONS: Final = 16  # a retriever has a few calls under way, one per batch
_KEEP_ALIVE_S: Final = 4.0  # below the 5 s after which servers of its kind close an idle connection


def connect(settings: RetrieverSettings, models: Models) -> ServerStore:
    """Return the store on the server that *settings* name; nothing is asked of it yet."""
    url = settings.qdrant_url
    key = settings.qdrant_api_key
    client = AsyncQdrantClient(
        url=url,
        api_key=key.get_secret_value() if key else None,
        timeout=settings.qdrant_timeout_s,
        check_compatibility=False,  # `open` looks at the version itself, and says what is missing
        # The client's own choice for a server on this machine is a new connection for every call.
        limits=httpx.Limits(
            max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS, keepalive_expiry=_KEEP_ALIVE_S
        ),
    )
    return ServerStore(client, url, settings.qdrant_collection, models)


class ServerStore:
    """One collection on a server; see `stages.stores.Store`.

    Attributes:
        dimensions: of its dense vectors; None before the first one has come, or where that is not known here yet.
    """

    def __init__(self, client: AsyncQdrantClient, url: str, collection: str, models: Models) -> None:
        self.dimensions: int | None = None
        self._client = client
        self._where = f"collection {collection} on {url}"
        self._collection = collection
        self._models = models
        self._looked_s = -math.inf  # on the monotonic clock

    async def open(self) -> None:
        """Look at the server and at the collection, which is made when missing.

        Raises:
            ConfigError: the server is too old or refuses our key; the collection is not ours, or another encoder's.
            NotReady: the server cannot be reached, or does not answer as it should, for now.
        """
        try:
            with _translated():
                _check_version((await self._client.info()).version, self._where)
                await self._make()
        except RetryLater as error:
            if error.code == "index_refused_credentials":
                raise ConfigError(f"{self._where}: {error}: set QDRANT_API_KEY") from error
            raise NotReady(f"the index cannot be opened: {self._where}: {error}") from error

    async def search_batch(self, searches: Sequence[Search]) -> list[list[Hit]]:
        """Return the hits of each search, best first; all of them are one call.

        Raises:
            RetryLater: the server cannot answer now.
            Reject: the collection is not ours any more.
        """
        try:
            with _translated():
                return await self._search_batch(searches)
        except RetryLater as error:
            self._forget()  # the collection may be another one by now
            if error.code != "index_gone":
                raise
            return [[] for _ in searches]  # somebody deleted the collection; the next write makes it again

    async def _search_batch(self, searches: Sequence[Search]) -> list[list[Hit]]:
        is_old = time.monotonic() - self._looked_s > FRESH_S
        if is_old or (self.dimensions is None and any(search.dense is not None for search in searches)):
            await self._look_again()  # another retriever may have written the first dense vector, or begun anew
        requests = [_request(search, has_meaning=self.dimensions is not None) for search in searches]
        asked = [request for request in requests if request is not None]
        answers = iter(await self._client.query_batch_points(self._collection, asked) if asked else [])
        return [
            [] if request is None else _hits(search.tenant, next(answers).points)
            for search, request in zip(searches, requests, strict=True)
        ]

    async def write(self, writes: Sequence[Prepare]) -> list[Written | Standings | Exception]:
        """Do *writes* in order; the server has them then. The failure of one is no other's."""
        self._looked_s = -math.inf
        return [await self._write(prepare) for prepare in writes]

    async def forget_deleted(self, before_version: int) -> None:
        """Drop what is known of documents that were deleted with a version below *before_version*."""
        deleted = FieldCondition(key="state", match=MatchValue(value="deleted"))
        with _translated():
            await self._delete(Filter(must=[deleted, _version(lt=before_version)]))

    async def count(self) -> int:
        """Return how many chunks it holds, over all tenants."""
        with _translated():
            return await self._count(Filter(must_not=[IsEmptyCondition(is_empty=PayloadField(key="tenant"))]))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    # --- the collection --------------------------------------------------------------------------

    async def _make(self) -> None:
        """Make the collection, unless it is there or another retriever is first, and look at it.

        Raises:
            ConfigError: it is not ours.
        """
        if not await self._client.collection_exists(self._collection):
            try:
                await self._client.create_collection(
                    self._collection,
                    vectors_config={},
                    sparse_vectors_config={WORDS: SparseVectorParams(modifier=Modifier.IDF)},
                    metadata={_METADATA: {"format": FORMAT, "model": str(self._models)}},
                )
            except (UnexpectedResponse, ValueError):  # the latter in local mode
                if not await self._client.collection_exists(self._collection):
                    raise
        await self._look()

    async def _look(self) -> None:
        """See whether the collection is ours, and how long its dense vectors are.

        Raises:
            ConfigError: it is not ours.
        """
        found = await self._client.get_collection(self._collection)
        record = (found.config.metadata or {}).get(_METADATA)
        if not isinstance(record, dict):
            raise ConfigError(
                f"the {self._where} does not say what filled it, so Penstock did not make it: "
                "name another PENSTOCK_RETRIEVER__QDRANT_COLLECTION"
            )
        filled_by, form = record.get("model"), record.get("format")
        if (filled_by, form) != (str(self._models), FORMAT):
            raise ConfigError(
                f"the {self._where} was filled by {filled_by} (format {form}), and this encoder is {self._models} "
                f"(format {FORMAT}): set the encoder back, or name another PENSTOCK_RETRIEVER__QDRANT_COLLECTION "
                "and ingest again"
            )
        if not {"document", "tenant", "state"} <= set(found.payload_schema or {}):  # new, or its making was cut short
            await self._make_payload_indexes()
        vectors = found.config.params.vectors
        meaning = vectors.get(MEANING) if isinstance(vectors, dict) else None
        self.dimensions = meaning.size if meaning else None
        self._looked_s = time.monotonic()

    async def _look_again(self, *, make: bool = False) -> None:
        """Look at the collection while jobs wait for it.

        Args:
            make: make it, where it is gone.

        Raises:
            Reject: it is not ours any more. The process goes on: whoever put another there may put ours back.
        """
        try:
            await (self._make() if make else self._look())
        except ConfigError as error:
            self._forget()
            raise Reject(str(error), code="encoder_mismatch") from error

    def _forget(self) -> None:
        self.dimensions = None
        self._looked_s = -math.inf

    async def _make_room_for(self, dimensions: int) -> None:
        """Let chunks have a dense vector; where another retriever was first, this changes nothing."""
        room = DenseVectorNameConfig(dense=DenseVectorConfig(size=dimensions, distance=Distance.COSINE))
        try:
            await self._client.create_vector_name(self._collection, MEANING, room)
        except (UnexpectedResponse, ValueError):  # the latter in local mode
            await self._look()
            if self.dimensions is None:
                raise
        await self._look()

    async def _make_payload_indexes(self) -> None:
        keyword = PayloadSchemaType.KEYWORD
        tenant = KeywordIndexParams(type=KeywordIndexType.KEYWORD, is_tenant=True)
        for field, schema in (("document", keyword), ("tenant", tenant), ("state", keyword)):
            await self._client.create_payload_index(self._collection, field, schema)

    # --- writing ---------------------------------------------------------------------------------

    async def _write(self, prepare: Prepare) -> Written | Standings | Exception:
        try:
            try:
                return await self._write_here(prepare)
            except RetryLater as error:
                if error.code != "index_gone":
                    raise
            with _translated():  # somebody deleted the collection
                await self._look_again(make=True)
            return await self._write_here(prepare)
        except Exception as error:  # noqa: BLE001 - it becomes the job's outcome, which the worker logs
            return error

    async def _write_here(self, prepare: Prepare) -> Written | Standings:
        with _translated():
            if self._looked_s == -math.inf:
                await self._look_again()
        operation = await asyncio.to_thread(prepare)  # after the look: it compares the lengths of vectors
        with _translated():
            return await self._done(operation)

    async def _done(self, operation: Operation) -> Written | Standings:
        match operation:
            case Put():
                return await self._put(operation)
            case Delete():
                return await self._take_out(operation)
            case Look(tenant, documents):
                return {document: standing(await self._head(tenant, document)) for document in documents}

    async def _put(self, put: Put) -> Written:
        first = put.passages[0].dense if put.passages else None
        if first is not None and self.dimensions is None:
            await self._make_room_for(len(first))
        if first is not None and len(first) != self.dimensions:  # another retriever's first vector came in between
            message = f"vectors of {len(first)} dimensions came for an index of {self.dimensions}"
            raise Reject(message, code="encoder_mismatch")
        head = await self._head(put.tenant, put.document)
        if head and head["version"] > put.version:
            return Written(0, superseded=True)
        if not head or head["version"] < put.version:
            points = [_point(put, number, passage) for number, passage in enumerate(put.passages)]
            for start in range(0, len(points), PORTION):
                await self._upsert(points[start : start + PORTION], put.version)
            await self._write_head(put.tenant, put.document, put.version, "indexed", len(points), put.digest)
        return await self._cleaned_up(put, len(put.passages))

    async def _take_out(self, delete: Delete) -> Written:
        head = await self._head(delete.tenant, delete.document)
        if head and head["version"] > delete.version:
            return Written(0, superseded=True)
        if head and head["version"] == delete.version:
            chunks = int(head["chunks"])
        else:
            # The head goes first: were this cut short, the count could not be found again, but the chunks can.
            chunks = await self._count(_chunks_of(delete.tenant, delete.document))
            await self._write_head(delete.tenant, delete.document, delete.version, "deleted", chunks)
        return await self._cleaned_up(delete, chunks)

    async def _cleaned_up(self, operation: Put | Delete, chunks: int) -> Written:
        """Take out chunks older than the operation; where a newer one has come meanwhile, also its own."""
        tenant, document, version = operation.tenant, operation.document, operation.version
        await self._delete(_chunks_of(tenant, document, _version(lt=version)))
        head = await self._head(tenant, document)
        if head and head["version"] > version:
            await self._delete(_chunks_of(tenant, document, _version(lt=head["version"])))
            return Written(0, superseded=True)
        return Written(chunks)

    async def _head(self, tenant: str, document: str) -> dict[str, Any] | None:
        found = await self._client.retrieve(self._collection, [_id(tenant, document, "head")], with_payload=True)
        return found[0].payload if found else None

    async def _write_head(
        self, tenant: str, document: str, version: int, state: str, chunks: int, digest: str = ""
    ) -> None:
        # No `tenant` and no vector: no search and no count can meet it.
        head = {"head": document, "owner": tenant, "state": state, "version": version, "chunks": chunks}
        head |= {"digest": digest} if digest else {}
        await self._upsert([PointStruct(id=_id(tenant, document, "head"), vector={}, payload=head)], version)

    async def _upsert(self, points: list[PointStruct], version: int) -> None:
        """Write *points*, each unless a newer one is there."""
        older = Filter(must=[_version(lte=version)])
        await self._client.upsert(self._collection, points, update_filter=older, ordering=_ORDERING)

    async def _delete(self, points: Filter) -> None:
        await self._client.delete(self._collection, points, ordering=_ORDERING)

    async def _count(self, chunks: Filter) -> int:
        return (await self._client.count(self._collection, count_filter=chunks, exact=True)).count

    def __repr__(self) -> str:
        return f"<ServerStore {self._where} {self._models}>"


def _request(search: Search, *, has_meaning: bool) -> QueryRequest | None:
    """Return the request, None for a search that cannot find anything."""
    own = _of_tenant(search.tenant)
    ways: list[dict[str, Any]] = []
    if search.vector is not None and search.vector.indices:
        words = SparseVector(indices=list(search.vector.indices), values=list(search.vector.values))
        params = SearchParams(idf=IdfCorpusParams(corpus=own))
        ways.append({"query": words, "using": WORDS, "filter": own, "params": params, "limit": search.limit})
    if search.dense is not None and has_meaning:
        ways.append({"query": search.dense.tolist(), "using": MEANING, "filter": own, "limit": search.limit})
    if not ways:
        return None
    if search.vector is None or search.dense is None:
        return QueryRequest(**ways[0], with_payload=True)
    return QueryRequest(
        prefetch=[Prefetch(**way) for way in ways],
        query=RrfQuery(rrf=Rrf(k=RRF_K)),
        limit=search.limit,
        with_payload=True,
    )


def _hits(tenant: str, points: Sequence[Any]) -> list[Hit]:
    return [hit(point.payload, point.score) for point in points if point.payload["tenant"] == tenant]


def _point(put: Put, number: int, passage: Passage) -> PointStruct:
    vectors: dict[str, Any] = {}
    if passage.vector is not None:
        vectors[WORDS] = SparseVector(indices=list(passage.vector.indices), values=list(passage.vector.values))
    if passage.dense is not None:
        vectors[MEANING] = passage.dense.tolist()
    payload = chunk_payload(put.tenant, put.document, put.version, number, passage)
    return PointStruct(id=_id(put.tenant, put.document, number), vector=vectors, payload=payload)


def _id(tenant: str, document: str, part: int | str) -> str:
    return str(point_id(tenant, document, part))


def _of_tenant(tenant: str) -> Filter:
    return Filter(must=[FieldCondition(key="tenant", match=MatchValue(value=tenant))])


def _chunks_of(tenant: str, document: str, *conditions: FieldCondition) -> Filter:
    names = {"document": document, "tenant": tenant}
    named = [FieldCondition(key=key, match=MatchValue(value=value)) for key, value in names.items()]
    return Filter(must=[*named, *conditions])


def _version(*, lt: int | None = None, lte: int | None = None) -> FieldCondition:
    # A version is a time in microseconds: far below 2 ** 53, so that a float holds it exactly.
    return FieldCondition(key="version", range=Range(lt=lt, lte=lte))


def _check_version(version: str, where: str) -> None:
    numbers = re.match(r"v?(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise ConfigError(f"{where}: this server is Qdrant {version}, and {least} or a later one is needed: update it")


@contextmanager
def _translated() -> Iterator[None]:
    """Raise `RetryLater` for whatever keeps the server from doing what it was asked.

    As everywhere, what did no work charges no attempt: a refused connection, 429, and 503 with Retry-After.
    """
    try:
        yield
    except ResourceExhaustedResponse as error:
        message = f"the Qdrant server is busy: {error}"
        after_s = max(0.0, float(error.retry_after_s))
        raise RetryLater(message, code="index_busy", after_s=after_s, charged=False) from error
    except QdrantException as error:  # 429 with a date in Retry-After, which the client does not read
        raise RetryLater(f"the Qdrant server is busy: {error}", code="index_busy", charged=False) from error
    except UnexpectedResponse as error:
        raise _judge(error) from error
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise RetryLater("the Qdrant server's answer is no JSON", code="index_error") from error
    except AssertionError as error:  # the client's own, over JSON without the part that it looks for
        raise RetryLater(f"the Qdrant server's answer is none of Qdrant's: {error}", code="index_error") from error
    except ResponseHandlingException as error:
        source = error.source
        is_refused = isinstance(source, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
        words = " ".join(str(source).split())[:200] or type(source).__name__
        if is_refused:
            message = f"the Qdrant server cannot be reached: {words}"
            raise RetryLater(message, code="index_unreachable", charged=False) from error
        raise RetryLater(f"the Qdrant server gave no whole answer: {words}", code="index_error") from error


def _judge(error: UnexpectedResponse) -> RetryLater:
    status = error.status_code or 0
    after = error.headers.get("retry-after", "")
    message = f"the Qdrant server answered {status}: {error.content[:200].decode(errors='replace')}"
    if status == 429 or (status == 503 and after):
        after_s = float(after) if after.isdecimal() else None
        return RetryLater(message, code="index_busy", after_s=after_s, charged=False)
    if status in {401, 403}:
        return RetryLater(f"the Qdrant server refused our key ({status})", code="index_refused_credentials")
    return RetryLater(message, code="index_gone" if status == 404 else "index_error")
