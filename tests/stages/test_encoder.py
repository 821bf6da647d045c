"""The encoder: questions become vectors, documents become chunks with a vector each."""

from __future__ import annotations

import asyncio

import pytest

from pipeline.errors import ConfigError, Reject
from pipeline.job import Done
from pipeline.settings import EncoderSettings, Settings
from stages import encoder
from stages.vectors import KeywordModel, Sparse, unpack
from tests.stages.conftest import CONTEXT, NewJob, Pipe

RIVER = "# Rivers\n\nA river runs to the sea.\n\n## Locks\n\nA lock lifts boats."


async def test_question_becomes_its_vector(pipe: Pipe, new_job: NewJob) -> None:
    """The vector is the model's own, and bears the model's name."""
    done = await pipe.encoder.handle(new_job("query", query="Where do rivers run?"))
    model = KeywordModel("english")
    assert done.vector is not None
    assert unpack(done.vector) == {model.name: [model.query_vector("Where do rivers run?")]}
    assert done.value == {}


async def test_document_becomes_chunks_with_a_vector_each(pipe: Pipe, new_job: NewJob) -> None:
    """Text and heading of each chunk travel readably, the vectors beside them, in the same order."""
    done = await pipe.encoder.handle(new_job("document", document_id="rivers", title="Rivers", text=RIVER))
    assert done.value["chunks"] == [{"text": RIVER, "heading": "Rivers"}]
    assert done.vector is not None
    [vectors] = unpack(done.vector).values()
    assert len(vectors) == 1


async def test_chunk_is_found_by_its_title_and_headings(settings: Settings, new_job: NewJob) -> None:
    """The words around a chunk count as its own."""
    stage = encoder.build(settings)
    await stage.start(CONTEXT)
    done = await stage.handle(new_job("document", document_id="d", title="Canals", text="It was dug by hand."))
    await stage.stop()
    model = KeywordModel("english")
    assert done.vector is not None
    [[vector]] = unpack(done.vector).values()
    assert isinstance(vector, Sparse)
    assert set(model.query_vector("canal").indices) <= set(vector.indices)


async def test_document_of_too_many_chunks_is_refused_with_both_numbers(new_job: NewJob) -> None:
    """The sender learns how long it was and how long it may be; nothing is cut off silently."""
    stage = encoder.build(Settings(encoder=EncoderSettings(chunk_tokens=16, overlap_tokens=0, max_chunks=3)))
    await stage.start(CONTEXT)
    text = "\n\n".join(f"Paragraph number {n} says nothing at all, slowly." for n in range(9))
    with pytest.raises(Reject, match=r"9 chunks, and 3 are allowed") as refusal:
        await stage.handle(new_job("document", document_id="long", text=text))
    await stage.stop()
    assert refusal.value.code == "document_too_long"


async def test_failure_of_one_document_is_no_other_jobs(pipe: Pipe, new_job: NewJob) -> None:
    """In a micro-batch each job has its own outcome, in order."""
    jobs = [
        new_job("query", query="Where?"),
        new_job("document", document_id="blank", text=" \n "),
        new_job("document", document_id="rivers", text=RIVER),
    ]
    question, blank, rivers = await pipe.encoder.handle_batch(jobs)
    assert isinstance(question, Done)
    assert isinstance(rivers, Done)
    assert isinstance(blank, Reject)
    assert blank.code == "document_empty"


async def test_event_loop_goes_on_while_a_long_document_is_cut(pipe: Pipe, new_job: NewJob) -> None:
    """Renewals of the worker's lease run on this loop and must not wait for a document."""
    text = "\n\n".join(f"Paragraph {n} has a few words in it." for n in range(3_000))
    cutting = asyncio.create_task(pipe.encoder.handle(new_job("document", document_id="long", text=text)))
    turns = 0
    while not cutting.done():
        await asyncio.sleep(0)
        turns += 1
    assert (await cutting).value["chunks"]
    assert turns > 10


def test_unknown_language_is_refused_at_start() -> None:
    """The process exits with the name of the setting."""
    with pytest.raises(ConfigError, match=r"encoder\.language"):
        encoder.build(Settings(encoder=EncoderSettings(language="klingon")))
