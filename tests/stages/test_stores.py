"""What every store of an index promises, embedded or on a server: versions, tenants, words and meaning, whose it is.

The server is the client's own local mode, which takes the same way through our code; once as it is, and once behind
the REST interface of a real one.
"""

from __future__ import annotations

import os
import shutil
from array import array
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest
from qdrant_client import AsyncQdrantClient

from pipeline.errors import ConfigError
from pipeline.settings import RetrieverSettings
from stages.index import Hit, Passage, Search, Written
from stages.qdrant_server import ServerStore
from stages.stores import Delete, EmbeddedStore, Look, Operation, Put, Store
from stages.vectors import Dense, Models, Sparse
from tests.stages.qdrant_in_small import rest_client

BOTH = Models("bm25/english/1", "dense/toy")
OpenStore = Callable[[Models], Store]

pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant")


@pytest.fixture(params=["embedded", "server", "rest"])
async def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[OpenStore]:
    """Makes stores that share one index, none of them open yet."""
    if request.param == "embedded":
        yield lambda models: EmbeddedStore(RetrieverSettings(path=tmp_path, lock_wait_s=0), models)
        return
    client = AsyncQdrantClient(":memory:") if request.param == "server" else rest_client()
    yield lambda models: ServerStore(client, "http://test", "documents", models)
    await client.close()


@pytest.fixture
async def store(new_store: OpenStore) -> AsyncIterator[Store]:
    store = new_store(BOTH)
    await store.open()
    yield store
    await store.close()


def words(*indices: int) -> Sparse:
    return Sparse(indices, (1.0,) * len(indices))


def meaning(*values: float) -> Dense:
    return array("f", values)


def passage(text: str, word: int = 1, at: Dense | None = None) -> Passage:
    return Passage("Title", text, words(word), at or meaning(1, 0, 0))


async def put(store: Store, document: str, version: int, *passages: Passage, tenant: str = "default") -> Written:
    return await write(store, Put(tenant, document, version, passages))


async def delete(store: Store, document: str, version: int, tenant: str = "default") -> Written:
    return await write(store, Delete(tenant, document, version))


async def write(store: Store, operation: Put | Delete) -> Written:
    [written] = await store.write([lambda: operation])
    assert isinstance(written, Written), written
    return written


async def find(store: Store, *searches: Search) -> list[list[Hit]]:
    return await store.search_batch(searches)


async def texts(store: Store, tenant: str = "default") -> list[str]:
    [hits] = await find(store, Search(tenant, words(1), 1_000))
    return sorted(hit.text for hit in hits)


async def test_empty_index_answers_and_counts_nothing(store: Store) -> None:
    """Before the first document questions are answered without sources, whichever way they look."""
    by_words, by_both = Search("default", words(1), 5), Search("default", words(1), 5, meaning(1, 0))
    assert await find(store, by_words, by_both, Search("default", None, 5, meaning(1, 0))) == [[], [], []]
    assert await store.count() == 0
    assert store.dimensions is None


async def test_chunk_is_found_by_words_by_meaning_and_by_both(store: Store) -> None:
    """A hit carries all that a prompt needs; what both ways find goes before what one finds."""
    await put(store, "d", 1, passage("neither", 8, meaning(-1, 0, 0)))
    await put(store, "e", 2, passage("words", 1, meaning(-0.9, 0, 0.1)), passage("both", 1, meaning(0, 1, 0)))
    await put(store, "f", 3, passage("meaning", 9, meaning(0, 0.9, 0.1)))
    by_words, by_meaning, by_both = await find(
        store,
        Search("default", words(1), 5),
        Search("default", None, 2, meaning(0, 1, 0)),
        Search("default", words(1), 5, meaning(0, 1, 0)),
    )
    assert {(hit.document, hit.title, hit.chunk, hit.text) for hit in by_words} == {
        ("e", "Title", 0, "words"),
        ("e", "Title", 1, "both"),
    }
    assert [hit.text for hit in by_meaning] == ["both", "meaning"]
    assert by_meaning[0].score == pytest.approx(1.0)
    assert by_both[0].text == "both"
    assert {hit.text for hit in by_both[1:3]} == {"words", "meaning"}
    assert store.dimensions == 3


async def test_question_of_stop_words_is_searched_by_meaning_alone(store: Store) -> None:
    """No word to look for is no reason to find nothing."""
    await put(store, "d", 1, passage("near", 1, meaning(0, 1, 0)))
    [hits] = await find(store, Search("default", words(), 5, meaning(0, 1, 0)))
    assert [hit.text for hit in hits] == ["near"]


async def test_new_version_replaces_all_chunks_of_the_old(store: Store) -> None:
    """A shorter document leaves nothing of the longer one behind."""
    assert await put(store, "d", 1, passage("a"), passage("b"), passage("c")) == Written(3)
    assert await put(store, "d", 2, passage("d")) == Written(1)
    assert await texts(store) == ["d"]
    assert await store.count() == 1


async def test_older_version_that_comes_later_does_nothing(store: Store) -> None:
    """Of two at once the later accepted wins, in whichever order they are worked on; a deletion is one of them."""
    await put(store, "d", 5, passage("new"))
    assert await put(store, "d", 4, passage("old"), passage("older")) == Written(0, superseded=True)
    assert await delete(store, "d", 4) == Written(0, superseded=True)
    assert await texts(store) == ["new"]
    assert await delete(store, "d", 6) == Written(1)
    assert await put(store, "d", 5, passage("ghost")) == Written(0, superseded=True)
    assert await store.count() == 0


async def test_repeated_operation_changes_nothing_and_answers_the_same(store: Store) -> None:
    """A job may run twice: its outcome is that of the first run."""
    for _ in range(2):
        assert await put(store, "d", 1, passage("a"), passage("b")) == Written(2)
        assert await store.count() == 2
    for _ in range(2):
        assert await delete(store, "d", 2) == Written(2)
        assert await store.count() == 0


async def test_deletion_is_remembered_for_as_long_as_an_older_job_may_live(store: Store) -> None:
    """Afterwards the memory of it is dropped; living documents are kept."""
    await put(store, "kept", 1, passage("kept"))
    await delete(store, "early", 2)
    await delete(store, "late", 9)
    await store.forget_deleted(5)
    assert await put(store, "early", 1, passage("x")) == Written(1)
    assert await put(store, "late", 8, passage("x")) == Written(0, superseded=True)
    assert await put(store, "kept", 0, passage("x")) == Written(0, superseded=True)


async def test_look_tells_what_the_writes_before_it_left(store: Store) -> None:
    """In its turn, with the digest of the version that stands; another tenant's document stands nowhere."""
    old, new = (Put("default", "kept", version, [passage("a")], f"digest {version}") for version in (1, 2))
    gone = Put("default", "gone", 3, [passage("b")], "digest 3")
    look = Look("default", ["kept", "gone", "theirs", "never"])
    await put(store, "theirs", 4, passage("c"), tenant="other")
    operations: list[Operation] = [old, new, gone, Delete("default", "gone", 5), look]
    done = await store.write([partial(lambda operation: operation, operation) for operation in operations])
    assert done[-1] == {"kept": {"chunks": 1, "digest": "digest 2"}, "gone": None, "theirs": None, "never": None}
    await put(store, "kept", 6, passage("d"), passage("e"))
    [found] = await store.write([lambda: Look("default", ["kept"])])
    assert found == {"kept": {"chunks": 2, "digest": ""}}


async def test_tenants_share_nothing(store: Store) -> None:
    """The same id in two tenants is two documents; no way of searching finds another's."""
    await put(store, "d", 1, passage("red plan"), tenant="red")
    await put(store, "d", 2, passage("blue plan"), tenant="blue")
    for tenant in ("red", "blue"):
        found = await find(
            store,
            Search(tenant, words(1), 9),
            Search(tenant, None, 9, meaning(1, 0, 0)),
            Search(tenant, words(1), 9, meaning(1, 0, 0)),
        )
        assert [[hit.text for hit in hits] for hits in found] == [[f"{tenant} plan"]] * 3
    assert await find(store, Search("default", words(1), 9, meaning(1, 0, 0))) == [[]]
    await delete(store, "d", 3, "red")
    assert (await texts(store, "red"), await texts(store, "blue")) == ([], ["blue plan"])


async def test_other_tenants_chunks_take_no_place_among_the_hits(store: Store) -> None:
    """However many of them are nearer: the search itself is confined, and not only what is shown of it."""
    await put(store, "d", 1, passage("mine", 1, meaning(0.1, 1, 0)), tenant="red")
    await put(store, "d", 2, *(passage(f"{number}", 1) for number in range(30)), tenant="blue")
    at = meaning(1, 0, 0)
    found = await find(store, Search("red", words(1), 2), Search("red", None, 2, at), Search("red", words(1), 2, at))
    assert [[hit.text for hit in hits] for hits in found] == [["mine"]] * 3


async def test_scores_do_not_tell_what_other_tenants_write(store: Store) -> None:
    """How rare a word is counts among the tenant's own chunks."""
    await put(store, "d", 1, passage("plan", 1), passage("other", 7), tenant="red")
    search = Search("red", words(1), 5)
    before = await find(store, search)
    await put(store, "d", 2, *(passage(f"{number}", 1) for number in range(30)), tenant="blue")
    assert await find(store, search) == before


async def test_failure_of_one_write_is_no_other_writes(store: Store) -> None:
    """Each has its own outcome, in order."""

    def fail() -> Put:
        raise ValueError("broken")

    first, second, third = await store.write(
        [lambda: Put("default", "a", 1, [passage("a")]), fail, lambda: Put("default", "b", 2, [passage("b")])]
    )
    assert (first, third) == (Written(1), Written(1))
    assert isinstance(second, ValueError)


async def test_index_filled_by_another_encoder_is_refused_by_both_names(new_store: OpenStore) -> None:
    """Vectors of two models in one index would be noise; what to do is in the message."""
    first = new_store(BOTH)
    await first.open()
    await put(first, "d", 1, passage("a"))
    if isinstance(first, EmbeddedStore):
        await first.close()
    expected = r"filled by bm25/english/1 \+ dense/toy .* this encoder is bm25/english/1 .*ingest again"
    with pytest.raises(ConfigError, match=expected):
        await new_store(Models("bm25/english/1")).open()
    again = new_store(BOTH)
    await again.open()
    assert (await texts(again), again.dimensions) == (["a"], 3)
    await again.close()


async def test_index_of_meaning_alone_needs_no_words(new_store: OpenStore) -> None:
    """An encoder without BM25 fills an index without sparse vectors."""
    store = new_store(Models(None, "dense/toy"))
    await store.open()
    await put(store, "d", 1, Passage("", "far", None, meaning(1, 0)), Passage("", "near", None, meaning(0, 1)))
    [hits] = await find(store, Search("default", None, 1, meaning(0, 1)))
    assert [hit.text for hit in hits] == ["near"]
    assert await store.count() == 2
    await store.close()


async def test_document_of_many_portions_is_whole(store: Store) -> None:
    """Writing in portions is not seen from outside."""
    wanted = [f"chunk {number:03}" for number in range(150)]
    assert await put(store, "long", 1, *map(passage, wanted)) == Written(150)
    assert await texts(store) == wanted


# --- The embedded one's disk -----------------------------------------------------------------------


async def test_what_is_answered_as_written_outlasts_a_power_cut(tmp_path: Path) -> None:
    """The log alone has reached the disk; all else is as it was when it was flushed last."""
    store = EmbeddedStore(RetrieverSettings(path=tmp_path / "live", lock_wait_s=0), BOTH)
    await store.open()
    await put(store, "old", 1, passage("old"))
    assert store._index is not None
    store._index.flush()
    shutil.copytree(tmp_path / "live", tmp_path / "cut")
    for number in range(40):
        await put(store, f"new{number}", 2, *(passage(f"new {number}.{part}") for part in range(5)))
    await delete(store, "old", 3)
    shutil.rmtree(tmp_path / "cut/shard/wal")
    shutil.copytree(tmp_path / "live/shard/wal", tmp_path / "cut/shard/wal")
    await store.close()
    heir = EmbeddedStore(RetrieverSettings(path=tmp_path / "cut", lock_wait_s=0), BOTH)
    await heir.open()
    assert await heir.count() == 200
    [found] = await heir.write([lambda: Look("default", ["old", "new39"])])
    assert found == {"old": None, "new39": {"chunks": 5, "digest": ""}}
    await heir.close()


async def test_a_write_is_answered_when_the_log_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of it, and the folder that names them; what takes long is done now and then."""
    synced: list[str] = []
    fsync = os.fsync

    def note(opened: int) -> None:
        synced.append(Path(f"/proc/self/fd/{opened}").readlink().name)
        fsync(opened)

    store = EmbeddedStore(RetrieverSettings(path=tmp_path, lock_wait_s=0), BOTH)
    await store.open()
    flushes = 0

    def count() -> None:
        nonlocal flushes
        flushes += 1

    monkeypatch.setattr(store._index, "flush", count)
    await put(store, "d", 1, passage("the first dense vector"))
    monkeypatch.setattr(os, "fsync", note)
    flushes = 0
    await put(store, "d", 2, passage("a"))
    assert {path.name for path in (tmp_path / "shard/wal").iterdir()} | {"wal"} == set(synced)
    assert flushes == 0
    monkeypatch.setattr("stages.stores.FLUSH_EVERY_S", 0.0)
    await put(store, "d", 3, passage("b"))
    assert flushes == 1
    monkeypatch.undo()
    await store.close()
