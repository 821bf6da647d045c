"""The embedded index: versions, tenants, one owner, and nothing lost to a crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qdrant_edge import QueryRequest

from pipeline.errors import ConfigError, NotReady
from stages import index as index_module
from stages.index import EmbeddedIndex, IndexInUse, Passage, Search, Written
from stages.vectors import Sparse

MODEL = "bm25/english/1"
ANYTHING = Sparse((1,), (1.0,))


@pytest.fixture
def index(tmp_path: Path) -> Iterator[EmbeddedIndex]:
    index = EmbeddedIndex.open(tmp_path, MODEL)
    yield index
    index.close()


def passages(*texts: str) -> list[Passage]:
    return [Passage("Title", text, ANYTHING) for text in texts]


def texts_of(index: EmbeddedIndex, tenant: str = "default") -> list[str]:
    [hits] = index.search_batch([Search(tenant, ANYTHING, 1_000)])
    return sorted(hit.text for hit in hits)


def test_what_was_put_is_found(index: EmbeddedIndex) -> None:
    """A hit carries all that a prompt needs."""
    assert index.put("default", "rivers", 1, passages("It runs.", "It floods.")) == Written(2)
    [[first, second]] = index.search_batch([Search("default", ANYTHING, 5)])
    assert {(hit.document, hit.title, hit.chunk, hit.text) for hit in (first, second)} == {
        ("rivers", "Title", 0, "It runs."),
        ("rivers", "Title", 1, "It floods."),
    }
    assert first.score > 0


def test_rare_word_weighs_more_than_a_common_one(index: EmbeddedIndex) -> None:
    """IDF is on: without it both would score the same."""
    for number in range(9):
        index.put("default", f"common{number}", number, [Passage("", f"common{number}", Sparse((1,), (1.0,)))])
    index.put("default", "rare", 9, [Passage("", "rare", Sparse((2,), (1.0,)))])
    [hits] = index.search_batch([Search("default", Sparse((1, 2), (1.0, 1.0)), 10)])
    assert hits[0].document == "rare"
    assert hits[0].score > 2 * hits[1].score


def test_searches_of_a_batch_are_answered_in_order(index: EmbeddedIndex) -> None:
    """Each search gets its own hits, and an empty vector finds nothing."""
    index.put("default", "one", 1, [Passage("", "one", Sparse((1,), (1.0,)))])
    index.put("default", "two", 2, [Passage("", "two", Sparse((2,), (1.0,)))])
    vectors = [Sparse((2,), (1.0,)), Sparse((), ()), Sparse((1,), (1.0,))]
    answers = index.search_batch([Search("default", vector, 5) for vector in vectors])
    assert [[hit.text for hit in hits] for hits in answers] == [["two"], [], ["one"]]
    assert index.search_batch([]) == []


def test_new_version_replaces_all_chunks_of_the_old(index: EmbeddedIndex) -> None:
    """A shorter document leaves nothing of the longer one behind."""
    index.put("default", "rivers", 1, passages("a", "b", "c"))
    index.put("default", "rivers", 2, passages("d"))
    assert texts_of(index) == ["d"]
    assert index.count() == 1


def test_older_version_that_comes_later_does_nothing(index: EmbeddedIndex) -> None:
    """Of two at once the later accepted wins, in whichever order they are worked on."""
    index.put("default", "rivers", 2, passages("new"))
    assert index.put("default", "rivers", 1, passages("old", "old too")) == Written(0, superseded=True)
    assert index.delete("default", "rivers", 1) == Written(0, superseded=True)
    assert texts_of(index) == ["new"]


def test_ingest_older_than_a_deletion_does_nothing(index: EmbeddedIndex) -> None:
    """A deleted document does not come back through a late retry."""
    assert index.delete("default", "rivers", 5) == Written(0)
    assert index.put("default", "rivers", 4, passages("ghost")) == Written(0, superseded=True)
    assert index.count() == 0
    assert index.put("default", "rivers", 6, passages("risen")) == Written(1)


def test_repeated_operation_changes_nothing_and_answers_the_same(index: EmbeddedIndex) -> None:
    """A job may run twice: its outcome is that of the first run."""
    for _ in range(2):
        assert index.put("default", "rivers", 1, passages("a", "b")) == Written(2)
        assert index.count() == 2
    for _ in range(2):
        assert index.delete("default", "rivers", 2) == Written(2)
        assert index.count() == 0


def test_deletion_is_remembered_for_as_long_as_an_older_job_may_live(index: EmbeddedIndex) -> None:
    """Afterwards the memory of it is dropped, so that it does not grow for ever; living documents are kept."""
    index.put("default", "kept", 1, passages("kept"))
    index.delete("default", "early", 2)
    index.delete("default", "late", 9)
    index.forget_deleted(before_version=5)
    assert index.put("default", "early", 1, passages("nobody remembers")).superseded is False
    assert index.put("default", "late", 8, passages("x")).superseded is True
    assert index.put("default", "kept", 0, passages("x")).superseded is True


def test_tenants_share_nothing(index: EmbeddedIndex) -> None:
    """The same document id in two tenants is two documents, and one tenant's searches see one of them."""
    index.put("red", "plan", 1, passages("red plan"))
    index.put("blue", "plan", 2, passages("blue plan"))
    assert texts_of(index, "red") == ["red plan"]
    assert texts_of(index, "blue") == ["blue plan"]
    assert texts_of(index) == []
    index.delete("red", "plan", 3)
    assert texts_of(index, "blue") == ["blue plan"]
    assert (index.count("red"), index.count("blue"), index.count()) == (0, 1, 1)


def test_scores_are_the_same_with_and_without_other_tenants(index: EmbeddedIndex) -> None:
    """A tenant alone is searched without a filter, which changes nothing but the time it takes."""
    index.put("red", "d", 1, passages("one", "two"))
    index.put("red", "e", 1, passages("three"))
    index.delete("red", "e", 2)
    search = Search("red", ANYTHING, 10)
    alone = index.search_batch([search])
    assert index.search_batch([Search("blue", ANYTHING, 10)]) == [[]]
    index.put("blue", "d", 1, passages("four"))
    assert index.search_batch([search]) == alone


def test_a_tenant_that_comes_during_a_search_is_not_seen_by_another(
    index: EmbeddedIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first chunk of a second tenant may be there before the search that knew of one tenant only."""
    index.put("red", "d", 1, passages("mine"))
    asked = index_module._request

    def ask_and_write(search: Search, *, is_alone: bool) -> QueryRequest:
        request = asked(search, is_alone=is_alone)
        index.put("blue", "d", 1, passages("theirs"))
        return request

    monkeypatch.setattr(index_module, "_request", ask_and_write)
    assert texts_of(index, "red") == ["mine"]


def test_tenants_are_known_again_after_opening(tmp_path: Path) -> None:
    """Whether a tenant is alone is read from the index itself."""
    for tenant in ("red", "blue"):
        index = EmbeddedIndex.open(tmp_path, MODEL)
        index.put(tenant, "d", 1, passages(tenant))
        index.close()
    index = EmbeddedIndex.open(tmp_path, MODEL)
    assert (texts_of(index, "red"), texts_of(index, "blue")) == (["red"], ["blue"])
    index.close()


def test_scores_do_not_tell_what_other_tenants_write(index: EmbeddedIndex) -> None:
    """How rare a word is counts among the tenant's own chunks."""
    index.put("red", "plan", 1, passages("red plan"))
    index.put("red", "other", 2, [Passage("", "other", Sparse((7,), (1.0,)))])
    search = Search("red", ANYTHING, 5)
    before = index.search_batch([search])
    for number in range(50):
        index.put("blue", f"plan{number}", number, passages("blue plan"))
    assert index.search_batch([search]) == before


operations = st.lists(
    st.tuples(st.sampled_from(["put", "delete"]), st.sampled_from(["a", "b"]), st.integers(1, 12), st.integers(1, 3)),
    max_size=14,
    unique_by=lambda operation: operation[2],
)


@given(operations, st.randoms())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_with_any_repeats_ends_the_same(
    index: EmbeddedIndex, script: list[tuple[str, str, int, int]], random: object
) -> None:
    """Only the greatest version of each document decides what the index holds."""
    tenant = os.urandom(8).hex()
    shuffled = [*script, *script[::2]]
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # Hypothesis' Random is no public class
    for verb, document, version, size in shuffled:
        if verb == "put":
            index.put(tenant, document, version, passages(*(f"{document}{version}.{n}" for n in range(size))))
        else:
            index.delete(tenant, document, version)
    expected = []
    for document in ("a", "b"):
        last = max((operation for operation in script if operation[1] == document), key=lambda o: o[2], default=None)
        if last and last[0] == "put":
            expected += [f"{document}{last[2]}.{n}" for n in range(last[3])]
    assert texts_of(index, tenant) == sorted(expected)


def test_document_of_many_portions_is_whole(index: EmbeddedIndex) -> None:
    """Writing in portions is not seen from outside."""
    wanted = [f"chunk {number:03}" for number in range(300)]
    assert index.put("default", "long", 1, passages(*wanted)) == Written(300)
    assert texts_of(index) == wanted


def test_second_owner_is_told_what_to_do(index: EmbeddedIndex, tmp_path: Path) -> None:
    """The directory has one owner; the way to share is in the message."""
    with pytest.raises(IndexInUse, match=r"in use by another retriever.*set QDRANT_URL"):
        EmbeddedIndex.open(tmp_path, MODEL)


def test_closed_index_opens_again_with_all_it_held(tmp_path: Path) -> None:
    """Closing lets go of the lock and loses nothing."""
    first = EmbeddedIndex.open(tmp_path, MODEL)
    first.put("default", "rivers", 1, passages("a", "b"))
    first.close()
    second = EmbeddedIndex.open(tmp_path, MODEL)
    assert texts_of(second) == ["a", "b"]
    second.close()


def test_index_filled_by_another_encoder_is_refused_by_both_names(tmp_path: Path) -> None:
    """Vectors of two models in one index would be noise; the lock is not kept by the refusal."""
    EmbeddedIndex.open(tmp_path, "bm25/english/1").close()
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"filled by bm25/english/1 .* this encoder is bm25/german/1"):
            EmbeddedIndex.open(tmp_path, "bm25/german/1")
    EmbeddedIndex.open(tmp_path, "bm25/english/1").close()


def test_path_that_is_no_directory_is_not_ready_and_says_why(tmp_path: Path) -> None:
    """The reason reaches `/readyz`; the stage is tried again."""
    (tmp_path / "file").touch()
    with pytest.raises(NotReady, match=r"Not a directory.*file/index"):
        EmbeddedIndex.open(tmp_path / "file" / "index", MODEL)


@pytest.mark.parametrize("victim", ["shard/edge_config.json", "segment.json", "collection.json"])
def test_broken_index_is_not_ready_and_says_why(tmp_path: Path, victim: str) -> None:
    """Whatever the engine raises at damage, a panic included, becomes one reason; the lock is not kept by it."""
    index = EmbeddedIndex.open(tmp_path, MODEL)
    index.put("default", "rivers", 1, passages("a"))
    index.close()
    [broken] = tmp_path.glob(f"**/{victim}")
    broken.write_bytes(b"\0garbage")
    for _ in range(2):
        with pytest.raises(NotReady, match=r"the index.*cannot be opened"):
            EmbeddedIndex.open(tmp_path, MODEL)


def test_what_is_kept_of_chunks_is_bounded_and_never_stale(
    index: EmbeddedIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searches keep what they have read; a chunk written anew is read anew, one taken out is gone."""
    monkeypatch.setattr("stages.index._KEPT", 5)
    for version in (1, 2, 3):
        index.put("default", "d", version, passages(*(f"{version}.{n}" for n in range(9))))
        for _ in range(2):
            assert texts_of(index) == [f"{version}.{n}" for n in range(9)]
        assert len(index._kept) == 5
    index.delete("default", "d", 4)
    assert texts_of(index) == []


def test_reads_go_on_in_one_thread_while_another_writes(index: EmbeddedIndex) -> None:
    """A search during a long write sees chunks of either state, and never fails."""
    index.put("default", "long", 1, passages(*(f"old {n}" for n in range(500))))
    writing = threading.Thread(
        target=index.put, args=("default", "long", 2, passages(*(f"new {n}" for n in range(500))))
    )
    writing.start()
    seen = [texts_of(index)]
    while writing.is_alive():
        seen.append(texts_of(index))
    writing.join()
    assert {len(texts) for texts in seen} == {500}
    assert texts_of(index) == sorted(f"new {n}" for n in range(500))


WRITER = """
import json, sys
from pathlib import Path
from stages.index import EmbeddedIndex, Passage
from stages.vectors import Sparse

index = EmbeddedIndex.open(Path(sys.argv[1]), sys.argv[2])
version = 0
while True:
    version += 1
    document, size = f"d{version % 10}", 20 + version % 170
    texts = [f"{version} {number}" for number in range(size)]
    index.put("default", document, version, [Passage("", text, Sparse((1,), (1.0,))) for text in texts])
    if version % 4 == 0:
        index.sync()
    print(json.dumps([document, version, size]), flush=True)
"""


@pytest.mark.parametrize("documents", [7, 30])
def test_nothing_completed_is_lost_to_kill_9(tmp_path: Path, documents: int) -> None:
    """The heir finds the index free at once, every completed document in it, each chunk once."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), MODEL], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        completed = [json.loads(child.stdout.readline()) for _ in range(documents)]
        child.send_signal(signal.SIGKILL)
        # A line may have been cut by the kill; what stands behind it was not reported.
        completed += [json.loads(line) for line in child.stdout.read().splitlines() if line.endswith("]")]
    index = EmbeddedIndex.open(tmp_path, MODEL)
    last = {document: (version, size) for document, version, size in completed}
    # The one in hand when the kill came may be half-way through replacing its predecessor.
    in_hand = f"d{(completed[-1][1] + 1) % 10}"
    [hits] = index.search_batch([Search("default", ANYTHING, 10_000)])
    for document, (version, size) in last.items():
        if document != in_hand:
            found = sorted(hit.text for hit in hits if hit.document == document)
            assert found == sorted(f"{version} {number}" for number in range(size))
    # Doing it again, as the heir will, makes the one in hand whole.
    again = completed[-1][1] + 1
    size = 20 + again % 170
    assert index.put("default", in_hand, again, passages(*(f"{again} {n}" for n in range(size)))) == Written(size)
    [hits] = index.search_batch([Search("default", ANYTHING, 10_000)])
    assert len([hit for hit in hits if hit.document == in_hand]) == size
    index.close()
