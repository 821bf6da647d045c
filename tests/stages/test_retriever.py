"""The retriever: sources for a question, documents into the index and out of it."""

from __future__ import annotations

import asyncio
import threading
from array import array
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import cast

import pytest

from pipeline.errors import ConfigError, NotReady, Reject, RetryLater
from pipeline.job import Done, Job
from pipeline.settings import EncoderSettings, RetrieverSettings, Settings
from stages import retriever
from stages.index import Hit, IndexInUse
from stages.prompt import MESSAGE_TOKENS, Source, augment
from stages.retriever import Retriever, spread
from stages.stores import EmbeddedStore
from stages.tokens import estimate
from stages.vectors import Sparse, pack
from tests.stages.conftest import CONTEXT, NewJob, Pipe

LOCKS = "A lock lifts boats from one level of a canal to another."
WEIRS = "A weir is a low dam over which a river flows."


async def test_question_is_answered_from_an_ingested_document(pipe: Pipe, new_job: NewJob) -> None:
    """With its place in the document, and the text that the prompt is going to hold."""
    await pipe.run(
        new_job("document", document_id="locks", title="Locks", text=LOCKS),
        new_job("document", document_id="weirs", title="Weirs", text=WEIRS),
    )
    [found] = await pipe.run(new_job("query", query="What lifts boats?"))
    [source] = found["sources"]
    assert (source["document"], source["title"], source["chunk"], source["text"]) == ("locks", "Locks", 0, LOCKS)
    assert source["score"] > 0


async def test_question_without_a_hit_goes_on_without_sources(pipe: Pipe, new_job: NewJob) -> None:
    """Nothing found is an answer, not a failure; a question of stop words is no exception."""
    for query in ("What lifts boats?", "of the and"):
        [found] = await pipe.run(new_job("query", query=query))
        assert found["sources"] == []


async def test_question_says_how_many_sources_it_wants(pipe: Pipe, new_job: NewJob) -> None:
    """`top_k` of the question goes before the setting."""
    await pipe.run(*(new_job("document", document_id=f"d{n}", text=f"Boat number {n}.") for n in range(8)))
    default, two = await pipe.run(new_job("query", query="boat"), new_job("query", query="boat", top_k=2))
    assert len(default["sources"]) == 5
    assert len(two["sources"]) == 2


async def test_source_is_called_by_title_and_headings(pipe: Pipe, new_job: NewJob) -> None:
    """A document without a title is called by its id."""
    await pipe.run(new_job("document", document_id="guide.md", text="# Canals\n\n## Locks\n\n" + LOCKS))
    [found] = await pipe.run(new_job("query", query="boats"))
    assert found["sources"][0]["title"] == "guide.md > Canals > Locks"


async def test_source_that_does_not_fit_is_not_listed(tmp_path: Path, new_job: NewJob) -> None:
    """`sources` are those really in the prompt, with the text as it stands there."""
    pipe = Pipe(Settings(retriever=RetrieverSettings(path=tmp_path, prompt_tokens=200)))
    await pipe.start()
    long = "Boats pass. " + "They wait for the water to rise, and then they go on to the next one. " * 3
    await pipe.run(*(new_job("document", document_id=f"d{n}", text=long) for n in range(4)))
    [found] = await pipe.run(new_job("query", query="boats"))
    await pipe.stop()
    used = [Source(source["title"], source["text"]) for source in found["sources"]]
    assert 0 < len(used) < 4
    assert sum(estimate(message["content"]) + MESSAGE_TOKENS for message in augment("boats", used)) <= 200


async def test_question_over_the_budget_is_refused_alone(tmp_path: Path, new_job: NewJob) -> None:
    """The other questions of its batch are answered."""
    pipe = Pipe(Settings(retriever=RetrieverSettings(path=tmp_path, prompt_tokens=300)))
    await pipe.start()
    long, short = new_job("query", query="why " * 500), new_job("query", query="why boats?")
    await pipe.encode(long, short)
    refused, answered = await pipe.retriever.handle_batch([long, short])
    await pipe.stop()
    assert isinstance(refused, Reject)
    assert refused.code == "query_too_long"
    assert isinstance(answered, Done)


async def test_changed_document_replaces_its_chunks(pipe: Pipe, new_job: NewJob) -> None:
    """After the second ingest nothing of the first is found."""
    await pipe.run(new_job("document", document_id="d", text=LOCKS))
    [done] = await pipe.run(new_job("document", document_id="d", text=WEIRS))
    assert done == {"document_id": "d", "chunks": 1}
    [boats, dams] = await pipe.run(new_job("query", query="boats"), new_job("query", query="dam"))
    assert boats["sources"] == []
    assert [source["text"] for source in dams["sources"]] == [WEIRS]


async def test_the_index_says_what_it_holds(pipe: Pipe, new_job: NewJob) -> None:
    """Chunks and the sender's digest of what was put last; nothing of what was deleted, or is another tenant's."""
    asked = ["d", "plain", "gone", "nobody"]
    await pipe.run(
        new_job("document", document_id="d", text=WEIRS, digest="old"),
        new_job("document", document_id="d", text=LOCKS, digest="new"),
        new_job("document", document_id="plain", text=LOCKS),
        new_job("document", document_id="gone", text=LOCKS, digest="x"),
        new_job("document_deletion", document_id="gone"),
        new_job("document", "red", document_id="nobody", text=LOCKS, digest="x"),
    )
    [done] = await pipe.run(new_job("document_lookup", document_ids=asked))
    assert done == {
        "documents": {
            "d": {"chunks": 1, "digest": "new"},
            "plain": {"chunks": 1, "digest": ""},
            "gone": None,
            "nobody": None,
        }
    }


async def test_later_accepted_ingest_wins_whichever_is_first(pipe: Pipe, new_job: NewJob) -> None:
    """The one that lost completes and says that it was superseded."""
    older, newer = (new_job("document", document_id="d", text=text) for text in (LOCKS, WEIRS))
    await pipe.run(newer)
    [done] = await pipe.run(older)
    assert done == {"document_id": "d", "chunks": 0, "superseded": True}
    assert await pipe.retriever.chunks() == 1


async def test_operations_of_one_batch_keep_their_order(pipe: Pipe, new_job: NewJob) -> None:
    """Ingest, delete, ingest in one batch leaves the second text, and each is told what it did."""
    values = await pipe.run(
        new_job("document", document_id="d", text=LOCKS),
        new_job("document_deletion", document_id="d"),
        new_job("document", document_id="d", text=WEIRS),
        new_job("document_deletion", document_id="nobody"),
    )
    assert values == [
        {"document_id": "d", "chunks": 1},
        {"document_id": "d", "deleted": 1},
        {"document_id": "d", "chunks": 1},
        {"document_id": "nobody", "deleted": 0},
    ]
    assert await pipe.retriever.chunks() == 1


async def test_job_run_twice_has_the_same_outcome(pipe: Pipe, new_job: NewJob) -> None:
    """An heir may do again what its predecessor had done but not acknowledged."""
    ingest, removal = new_job("document", document_id="d", text=LOCKS), new_job("document_deletion", document_id="d")
    assert await pipe.run(ingest) == await pipe.run(ingest)
    assert await pipe.run(removal) == await pipe.run(removal) == [{"document_id": "d", "deleted": 1}]


async def test_deletion_is_forgotten_after_a_day_of_the_pipelines_time(pipe: Pipe, new_job: NewJob) -> None:
    """No job lives longer than a day, so none that is older can still arrive."""
    early = new_job("document", document_id="d", text=LOCKS)
    removal = new_job("document_deletion", document_id="d")
    await pipe.run(removal)
    assert (await pipe.run(early))[0]["superseded"] is True
    tomorrow = new_job("document_deletion", document_id="other")
    tomorrow.accepted_us += 86_400 * 1_000_000 + 10_000_000
    await pipe.run(tomorrow)
    assert await pipe.run(early) == [{"document_id": "d", "chunks": 1}]


async def test_writes_do_not_fail_with_the_housekeeping_behind_them(
    pipe: Pipe, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are safe by then; and questions of the same batch have nothing to do with either."""

    asked = []

    async def refuse(before: int) -> None:
        asked.append(before)
        raise RetryLater("the Qdrant server is busy", code="index_busy", charged=False)

    monkeypatch.setattr(pipe.retriever._store, "forget_deleted", refuse)
    ingest, question = new_job("document", document_id="d", text=LOCKS), new_job("query", query="locks")
    ingest.accepted_us += 86_400 * 1_000_000  # the housekeeping is due by the pipeline's time
    written, _ = await pipe.run(ingest, question)
    assert written == {"document_id": "d", "chunks": 1}
    assert asked == [ingest.accepted_us - 86_400 * 1_000_000]


async def test_tenants_see_their_own_documents_only(pipe: Pipe, new_job: NewJob) -> None:
    """The same id in two tenants is two documents; a deletion in one leaves the other."""
    await pipe.run(
        new_job("document", "red", document_id="d", text="The red boat."),
        new_job("document", "blue", document_id="d", text="The blue boat."),
    )
    red, nobody = await pipe.run(new_job("query", "red", query="boat"), new_job("query", query="boat"))
    assert [source["text"] for source in red["sources"]] == ["The red boat."]
    assert nobody["sources"] == []
    await pipe.run(new_job("document_deletion", "red", document_id="d"))
    [blue] = await pipe.run(new_job("query", "blue", query="boat"))
    assert [source["text"] for source in blue["sources"]] == ["The blue boat."]


async def test_a_collection_is_searched_by_who_names_it(pipe: Pipe, new_job: NewJob) -> None:
    """The same id in a collection and outside is two documents; no other tenant's collection is that one."""
    await pipe.run(
        new_job("document", document_id="d", text="The plain boat."),
        new_job("document", document_id="d", text="The medical boat.", collection="medical", digest="1"),
        new_job("document", "red", document_id="d", text="The red boat.", collection="medical"),
    )
    outside, inside, other = await pipe.run(
        new_job("query", query="boat"),
        new_job("query", query="boat", collection="medical"),
        new_job("query", query="boat", collection="legal"),
    )
    assert [source["text"] for source in outside["sources"]] == ["The plain boat."]
    assert [source["text"] for source in inside["sources"]] == ["The medical boat."]
    assert other["sources"] == []
    [held] = await pipe.run(new_job("document_lookup", document_ids=["d"], collection="medical"))
    assert held["documents"]["d"]["digest"] == "1"
    await pipe.run(new_job("document_deletion", document_id="d", collection="medical"))
    outside, inside = await pipe.run(
        new_job("query", query="boat"), new_job("query", query="boat", collection="medical")
    )
    assert (len(outside["sources"]), inside["sources"]) == (1, [])


async def test_question_does_not_wait_for_a_document_being_written(pipe: Pipe, new_job: NewJob) -> None:
    """A document is written in a thread of its own, and questions are answered meanwhile."""
    await pipe.run(new_job("document", document_id="d", text=LOCKS))
    finished = threading.Event()
    store = pipe.retriever._store
    assert isinstance(store, EmbeddedStore)
    assert store._writer is not None
    writing = store._writer.submit(finished.wait)
    [found] = await pipe.run(new_job("query", query="boats"))
    assert found["sources"]
    assert not writing.done()
    finished.set()


async def test_vector_of_another_encoder_is_refused_by_both_names(pipe: Pipe, new_job: NewJob) -> None:
    """An encoder process set otherwise than this one must not pass unnoticed."""
    job = new_job("query", query="boat")
    job.vector = pack({"bm25/german/1": [Sparse((1,), (1.0,))]})
    with pytest.raises(Reject, match=r"encoded by bm25/german/1, and the index holds bm25/english") as refusal:
        await pipe.retriever.handle(job)
    assert refusal.value.code == "encoder_mismatch"


@pytest.mark.parametrize("vector", [None, b"", b"PV1", b"rubbish"])
async def test_job_without_a_readable_vector_is_refused(pipe: Pipe, new_job: NewJob, vector: bytes | None) -> None:
    """It can never succeed, so it is not tried again."""
    job = new_job("query", query="boat")
    job.vector = vector
    with pytest.raises(Reject) as refusal:
        await pipe.retriever.handle(job)
    assert refusal.value.code == "bad_vector"


@pytest.fixture
async def hybrid(tmp_path: Path) -> AsyncIterator[Retriever]:
    """A retriever for words and meaning."""
    encoder = EncoderSettings(embeddings_url="http://127.0.0.1:9", embeddings_model="m")
    stage = retriever.build(Settings(encoder=encoder, retriever=RetrieverSettings(path=tmp_path / "hybrid")))
    assert isinstance(stage, Retriever)
    await stage.start(CONTEXT)
    yield stage
    await stage.stop()


WORDS, MEANING = "bm25/english/1", "dense/m"


def encoded(job: Job, *dense: Sequence[float], words: int = 1, chunks: int = 1) -> Job:
    """Return *job* as an encoder of both kinds would hand it on."""
    job.state["chunks"] = [{"text": LOCKS, "heading": ""}] * chunks
    job.vector = pack({WORDS: [Sparse((1,), (1.0,))] * words, MEANING: [array("f", values) for values in dense]})
    return job


async def test_vectors_of_another_length_are_refused_whatever_their_name(hybrid: Retriever, new_job: NewJob) -> None:
    """The model behind a name was exchanged: questions and documents say so, instead of failing inside the index."""
    await hybrid.handle(encoded(new_job("document", document_id="a"), (1, 0, 0)))
    for job in (new_job("query", query="boats"), new_job("document", document_id="b")):
        with pytest.raises(
            Reject, match=r"dense/m have 2 dimensions, and those in the index 3.*ingest again"
        ) as refusal:
            await hybrid.handle(encoded(job, (1, 0)))
        assert refusal.value.code == "encoder_mismatch"
    [source] = (await hybrid.handle(encoded(new_job("query", query="boats"), (1, 0, 0)))).value["sources"]
    assert source["text"] == LOCKS


@pytest.mark.parametrize(("words", "dense", "chunks"), [(2, 1, 1), (1, 2, 1), (1, 1, 2), (0, 0, 1)])
async def test_document_needs_a_vector_of_each_kind_for_every_chunk(
    hybrid: Retriever, new_job: NewJob, words: int, dense: int, chunks: int
) -> None:
    """Anything else was cut or mixed up on its way."""
    job = encoded(new_job("document", document_id="a"), *[(1, 0)] * dense, words=words, chunks=chunks)
    with pytest.raises(Reject) as refusal:
        await hybrid.handle(job)
    assert refusal.value.code == "bad_vector"


async def test_encoder_without_the_dense_model_is_refused(hybrid: Retriever, new_job: NewJob) -> None:
    """Nor is a dense vector under the name of words taken for one."""
    job = new_job("query", query="boats")
    job.vector = pack({WORDS: [Sparse((1,), (1.0,))]})
    with pytest.raises(Reject, match=r"encoded by bm25/english/1, and the index holds bm25/english/1 \+ dense/m"):
        await hybrid.handle(job)
    job.vector = pack({WORDS: [array("f", (1, 0))], MEANING: [array("f", (1, 0))]})
    with pytest.raises(Reject, match="wrong kind"):
        await hybrid.handle(job)


async def test_second_retriever_exits_unless_the_first_lets_go_in_time(settings: Settings, pipe: Pipe) -> None:
    """Without patience it fails at once; with some it takes over when the first one stops."""

    def waiting_for(seconds: float) -> Retriever:
        patience = settings.retriever.model_copy(update={"lock_wait_s": seconds})
        return cast("Retriever", retriever.build(settings.model_copy(update={"retriever": patience})))

    with pytest.raises(IndexInUse, match="QDRANT_URL"):
        await waiting_for(0).start(CONTEXT)
    patient = waiting_for(30)
    waiting = asyncio.create_task(patient.start(CONTEXT))
    await pipe.retriever.stop()
    await waiting
    assert await patient.chunks() == 0
    await patient.stop()


async def test_index_of_another_language_is_refused(settings: Settings, pipe: Pipe) -> None:
    """The operator is told which encoder filled it."""
    await pipe.stop()
    german = settings.model_copy(update={"encoder": EncoderSettings(language="german")})
    with pytest.raises(ConfigError, match=r"filled by bm25/english/\d .* this encoder is bm25/german/\d"):
        await retriever.build(german).start(CONTEXT)


async def test_retriever_that_is_not_open_is_not_ready(settings: Settings, new_job: NewJob) -> None:
    """A job that comes too early is no failure of the job."""
    with pytest.raises(NotReady):
        await retriever.build(settings).handle_batch([new_job("query", query="boat")])


def test_budget_without_room_for_a_question_is_refused_at_start(tmp_path: Path) -> None:
    """Otherwise every question would be refused, one by one."""
    with pytest.raises(ConfigError, match=r"prompt_tokens.*leaves no room"):
        retriever.build(Settings(retriever=RetrieverSettings(path=tmp_path, prompt_tokens=64)))


def test_one_document_does_not_crowd_out_the_others() -> None:
    """A further chunk of the same document must be a quarter nearer than another document's."""
    hits = [Hit(document, "", n, "", score) for n, (document, score) in enumerate([("a", 10), ("a", 9), ("b", 8)])]
    assert [(hit.document, hit.score) for hit in spread(hits, 2)] == [("a", 10), ("b", 8)]
    assert [hit.document for hit in spread(hits[:2], 2)] == ["a", "a"]
    assert [hit.document for hit in spread(hits, 3)] == ["a", "b", "a"]
