"""The index on a Qdrant server: several retrievers at once, a server in trouble, and collections that are not ours."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qdrant_client import AsyncQdrantClient

from pipeline.errors import ConfigError, NotReady, Reject, RetryLater
from pipeline.settings import RetrieverSettings, Settings
from stages import retriever
from stages.index import Passage, Search, Written
from stages.qdrant_server import ServerStore
from stages.stores import Delete, Put
from stages.vectors import Models, Sparse, pack
from tests.stages.conftest import CONTEXT
from tests.stages.qdrant_in_small import rest_client

WORDS = Models("bm25/english/1")
BOTH = Models("bm25/english/1", "dense/toy")
ANYTHING = Sparse((1,), (1.0,))

pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant")


@pytest.fixture
async def client() -> AsyncIterator[AsyncQdrantClient]:
    client = AsyncQdrantClient(":memory:")
    yield client
    await client.close()


def store_on(client: Any, models: Models = WORDS) -> ServerStore:
    return ServerStore(client, "http://test", "documents", models)


def put(document: str, version: int, *texts: str, dense: array[float] | None = None) -> Put:
    return Put("default", document, version, [Passage("", text, ANYTHING, dense) for text in texts])


async def texts(store: ServerStore) -> list[str]:
    [hits] = await store.search_batch([Search("default", ANYTHING, 1_000)])
    return sorted(hit.text for hit in hits)


# --- Several retrievers ----------------------------------------------------------------------------


class Hesitant:
    """A client whose calls come to the server in an order of their own."""

    def __init__(self, client: AsyncQdrantClient, rng: random.Random) -> None:
        self._client = client
        self._rng = rng

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        async def later(*args: Any, **kwargs: Any) -> Any:
            for _ in range(self._rng.randrange(4)):
                await asyncio.sleep(0)
            return await call(*args, **kwargs)

        return later


scripts = st.lists(
    st.tuples(st.sampled_from(["put", "delete"]), st.integers(1, 9), st.integers(1, 4)),
    min_size=2,
    max_size=5,
    unique_by=lambda operation: operation[1],
)


@given(scripts, st.integers(0, 2**32))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_retrievers_that_write_one_document_at_once_end_with_its_latest_version(
    client: AsyncQdrantClient, script: list[tuple[str, int, int]], seed: int
) -> None:
    """Every interleaving of their calls leaves the greatest version whole, and nothing of the others."""
    if await client.collection_exists("documents"):
        await client.delete_collection("documents")
    rng = random.Random(seed)
    stores = [store_on(Hesitant(client, rng)) for _ in script]
    await asyncio.gather(*(store.open() for store in stores))

    def operation(verb: str, version: int, size: int) -> Put | Delete:
        if verb == "put":
            return put("d", version, *(f"{version}.{number}" for number in range(size)))
        return Delete("default", "d", version)

    operations = [operation(*step) for step in script]
    # `_done` and not `write`: a thread in between would make the interleaving another one each time.
    await asyncio.gather(*(store._done(one) for store, one in zip(stores, operations, strict=True)))
    verb, version, size = max(script, key=lambda step: step[1])
    expected = [f"{version}.{number}" for number in range(size)] if verb == "put" else []
    assert await texts(stores[0]) == expected


async def test_one_retriever_finds_what_another_wrote_and_their_first_dense_vector(client: AsyncQdrantClient) -> None:
    """No retriever owns a server's index; one that opened it empty learns of dense vectors when they come."""
    first, second = store_on(client, BOTH), store_on(client, BOTH)
    await asyncio.gather(first.open(), second.open())
    near = array("f", (0, 1, 0))
    assert await first.write([lambda: put("d", 1, "found", dense=near)]) == [Written(1)]
    assert second.dimensions is None
    [hits] = await second.search_batch([Search("default", None, 5, near)])
    assert [hit.text for hit in hits] == ["found"]
    assert second.dimensions == 3


async def test_first_dense_vectors_of_two_lengths_do_not_get_into_one_index(client: AsyncQdrantClient) -> None:
    """Of two retrievers with encoders that disagree behind one name, the later is refused."""
    first, second = store_on(client, BOTH), store_on(client, BOTH)
    await first.open()
    await second.open()
    assert await first.write([lambda: put("d", 1, "a", dense=array("f", (0, 1, 0)))]) == [Written(1)]
    [refused] = await second.write([lambda: put("e", 2, "b", dense=array("f", (0, 1)))])
    assert isinstance(refused, Reject)
    assert refused.code == "encoder_mismatch"
    assert "2 dimensions came for an index of 3" in str(refused)


async def test_interrupted_write_is_finished_when_it_is_done_again(client: AsyncQdrantClient) -> None:
    """A retriever died between the new head and the removal of the old chunks; its heir removes them."""
    store = store_on(client)
    await store.open()
    await store.write([lambda: put("d", 1, "a", "b", "c")])
    removal = store._cleaned_up

    async def die(*_: object) -> Written:
        raise ConnectionError

    store._cleaned_up = die  # type: ignore[assignment,method-assign]  # the death
    [died] = await store.write([lambda: put("d", 2, "new")])
    assert isinstance(died, ConnectionError)
    assert await texts(store) == ["b", "c", "new"]
    store._cleaned_up = removal  # type: ignore[method-assign]
    assert await store.write([lambda: put("d", 2, "new")]) == [Written(1)]
    assert await texts(store) == ["new"]


# --- The collection --------------------------------------------------------------------------------


async def test_collection_of_somebody_else_is_left_alone(client: AsyncQdrantClient) -> None:
    """It does not say what filled it; the operator is told which setting names another."""
    await client.create_collection("documents", vectors_config={})
    with pytest.raises(ConfigError, match=r"did not make it.*PENSTOCK_RETRIEVER__QDRANT_COLLECTION"):
        await store_on(client).open()
    assert (await client.get_collection("documents")).points_count == 0


async def test_collection_that_is_deleted_meanwhile_is_made_again() -> None:
    """Whoever deletes it wants to begin anew: questions find nothing, and no process needs a restart for the rest."""
    client = rest_client()
    store = store_on(client, BOTH)
    await store.open()
    await store.write([lambda: put("d", 1, "old")])
    await client.delete_collection("documents")
    assert await texts(store) == []
    assert await store.search_batch([Search("default", ANYTHING, 5, array("f", (1, 0)))]) == [[]]
    assert await store.write([lambda: put("e", 2, "new")]) == [Written(1)]
    assert await texts(store) == ["new"]
    await store.close()


async def test_retriever_learns_that_the_collection_was_made_again_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was deleted and is back, without room for dense vectors, then for shorter ones: no old idea of it is kept."""
    monkeypatch.setattr("stages.qdrant_server.FRESH_S", 1e9)
    client = rest_client()
    first, second = store_on(client, BOTH), store_on(client, BOTH)
    await first.open()
    await first.write([lambda: put("d", 1, "old", dense=array("f", (0, 1, 0)))])
    await client.delete_collection("documents")
    await second.open()
    assert await first.write([lambda: put("e", 2, "new", dense=array("f", (0, 1)))]) == [Written(1)]
    assert first.dimensions == 2
    await client.delete_collection("documents")
    await second.write([lambda: put("f", 3, "newer", dense=array("f", (1, 0, 0, 0)))])
    assert await first.write([lambda: put("g", 4, "newest", dense=array("f", (0, 0, 0, 1)))]) == [Written(1)]
    assert await texts(second) == ["newer", "newest"]
    await first.close()


async def test_search_looks_at_the_collection_when_it_has_not_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no call fails, time tells: the retriever refuses questions by the length that it last heard of."""
    monkeypatch.setattr("stages.qdrant_server.FRESH_S", 0.0)
    client = rest_client()
    first, second = store_on(client, BOTH), store_on(client, BOTH)
    await first.open()
    await first.write([lambda: put("d", 1, "old", dense=array("f", (0, 1, 0)))])
    await client.delete_collection("documents")
    await second.open()
    await second.write([lambda: put("e", 2, "new", dense=array("f", (0, 1)))])
    assert first.dimensions == 3
    await first.search_batch([])
    assert first.dimensions == 2
    await first.close()


async def test_collection_that_became_another_encoders_is_neither_searched_nor_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its words have other stems. Jobs fail with both names; when ours is back, they go on without a restart."""
    monkeypatch.setattr("stages.qdrant_server.FRESH_S", 0.0)
    client = rest_client()
    ours, theirs = store_on(client), store_on(client, Models("bm25/german/1"))
    await ours.open()
    await client.delete_collection("documents")
    await theirs.open()
    with pytest.raises(Reject, match=r"filled by bm25/german/1 .* this encoder is bm25/english/1") as refused:
        await ours.search_batch([Search("default", ANYTHING, 5)])
    assert refused.value.code == "encoder_mismatch"
    [written] = await ours.write([lambda: put("d", 1, "a")])
    assert isinstance(written, Reject)
    assert await theirs.count() == 0
    await client.delete_collection("documents")
    assert await ours.write([lambda: put("d", 2, "a")]) == [Written(1)]
    assert await texts(ours) == ["a"]
    await ours.close()


# --- A server in trouble ---------------------------------------------------------------------------


def ok(result: Any) -> httpx.Response:
    return httpx.Response(200, content=orjson.dumps({"result": result, "status": "ok", "time": 0.0}))


class Troubled:
    """A server that is well until told otherwise."""

    def __init__(self, version: str = "1.20.0") -> None:
        self.version = version
        self.trouble: httpx.Response | Exception | None = None
        self.asked: list[str] = []
        self.client = AsyncQdrantClient(
            "http://test:6333", check_compatibility=False, transport=httpx.MockTransport(self.answer)
        )
        self.store = store_on(self.client)

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(f"{request.method} {request.url.path}")
        if isinstance(self.trouble, Exception):
            raise self.trouble
        if self.trouble is not None:
            return self.trouble
        if request.url.path == "/":
            return httpx.Response(200, content=orjson.dumps({"title": "qdrant", "version": self.version}))
        assert request.url.path == "/collections/documents/exists", request.url
        return httpx.Response(500, text="no further")


TROUBLES = [
    (httpx.Response(429, headers={"retry-after": "7"}, json={"status": {"error": "slow"}}), "index_busy", False, 7.0),
    (httpx.Response(503, headers={"retry-after": "3"}, text="starting"), "index_busy", False, 3.0),
    (httpx.Response(503, text="broken"), "index_error", True, None),
    (httpx.Response(500, text="broken"), "index_error", True, None),
    (httpx.Response(401, text="Must provide an API key"), "index_refused_credentials", True, None),
    (httpx.Response(200, text="no JSON"), "index_error", True, None),
    (httpx.Response(200, content=b"\xff\xfe{"), "index_error", True, None),
    (httpx.Response(200, json={"a": 1}), "index_error", True, None),
    (httpx.Response(200, json=[1]), "index_error", True, None),
    (httpx.Response(429, headers={"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}), "index_busy", False, None),
    (httpx.Response(429, headers={"retry-after": "-5"}), "index_busy", False, 0.0),
    (httpx.ConnectError("refused"), "index_unreachable", False, None),
    (httpx.ReadTimeout("late"), "index_error", True, None),
]


@pytest.mark.parametrize(("trouble", "code", "charged", "after_s"), TROUBLES)
async def test_trouble_becomes_a_retry_that_is_charged_where_work_was_done(
    trouble: httpx.Response | Exception, code: str, charged: bool, after_s: float | None
) -> None:
    """A refused connection, 429, and 503 with Retry-After charge nothing; searches and writes say the same."""
    troubled = Troubled()
    troubled.trouble = trouble
    with pytest.raises(RetryLater) as caught:
        await troubled.store.search_batch([Search("default", ANYTHING, 5)])
    [written] = await troubled.store.write([lambda: put("d", 1, "a")])
    assert isinstance(written, RetryLater)
    for error in (caught.value, written):
        assert (error.code, error.charged, error.after_s) == (code, charged, after_s)
    await troubled.store.close()


async def test_search_that_was_refused_is_not_asked_again_before_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vector that the collection does not know any more, say: what was known of it is doubted at once."""
    monkeypatch.setattr("stages.qdrant_server.FRESH_S", 1e9)
    troubled = Troubled()
    troubled.store.dimensions, troubled.store._looked_s = 3, 0.0
    troubled.trouble = httpx.Response(400, text="Not existing vector name error: meaning")
    for asked in ("POST /collections/documents/points/query/batch", "GET /collections/documents"):
        with pytest.raises(RetryLater, match="Not existing vector name"):
            await troubled.store.search_batch([Search("default", ANYTHING, 5)])
        assert troubled.asked.pop() == asked
    assert troubled.asked == []
    await troubled.store.close()


async def test_start_waits_for_a_server_in_trouble_and_ends_at_one_that_refuses() -> None:
    """One that is away makes the stage wait, with the reason; a wrong key or version ends the process."""
    troubled = Troubled()
    troubled.trouble = httpx.ConnectError("refused")
    with pytest.raises(NotReady, match=r"cannot be opened.*documents on http://test.*cannot be reached: refused"):
        await troubled.store.open()
    troubled.trouble = httpx.Response(403, text="forbidden")
    with pytest.raises(ConfigError, match="set QDRANT_API_KEY"):
        await troubled.store.open()
    with pytest.raises(ConfigError, match=r"Qdrant 1\.18\.2, and 1\.19 or a later one"):
        await Troubled("1.18.2").store.open()
    troubled.trouble = None
    with pytest.raises(NotReady, match="no further"):
        await troubled.store.open()


async def test_batch_of_questions_asks_a_server_in_trouble_once() -> None:
    """Each question is told of it; asking for each by itself would be more of the same."""
    stage = retriever.build(Settings(retriever=RetrieverSettings(qdrant_url="http://test:6333")))
    assert isinstance(stage, retriever.Retriever)
    troubled = Troubled()
    troubled.trouble = httpx.ConnectError("refused")
    stage._store = troubled.store
    from pipeline.job import Job

    vector = pack({"bm25/english/1": [ANYTHING]})
    jobs = [Job(f"j{n}", "query", {"query": "boats"}, [], 0, vector=vector) for n in range(9)]
    outcomes = await stage.handle_batch(jobs)
    assert {type(outcome) for outcome in outcomes} == {RetryLater}
    assert len(troubled.asked) == 1


async def test_nothing_listens_there(unused_tcp_port: int) -> None:
    """The real client, the real refusal: the stage is not ready, and says where it looked."""
    url = f"http://127.0.0.1:{unused_tcp_port}"
    stage = retriever.build(Settings(retriever=RetrieverSettings(qdrant_url=url)))
    with pytest.raises(NotReady, match=url):
        await stage.start(CONTEXT)
    await stage.stop()


def test_missing_package_is_the_operators_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    monkeypatch.setitem(__import__("sys").modules, "stages.qdrant_server", None)
    with pytest.raises(ConfigError, match=r"pip install 'penstock\[qdrant\]'"):
        retriever.build(Settings(retriever=RetrieverSettings(qdrant_url="http://127.0.0.1:6333")))
