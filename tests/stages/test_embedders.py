"""Dense vectors: what is sent, what is made of every answer, and who waits for whom."""

from __future__ import annotations

import asyncio
import base64
import sys
import types
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import orjson
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from pipeline.errors import ConfigError, Reject, RetryLater
from pipeline.job import Done
from pipeline.settings import EncoderSettings, Settings
from stages import encoder
from stages.embedders import BadEmbeddings, Embedder, embedder, encode_with, judge, read_vectors
from stages.vectors import Dense, unpack
from tests.conftest import wait_until
from tests.stages.conftest import CONTEXT, NewJob
from tests.stages.embeddings import EmbeddingsFake, embeddings_server

NewEmbedder = Callable[..., Any]


def lengths(text: str) -> list[float]:
    """Tell texts apart: a vector that says how long its text is."""
    return [float(len(text)), 1.0]


@pytest.fixture
async def server() -> AsyncIterator[EmbeddingsFake]:
    async with embeddings_server(lengths) as fake:
        yield fake


@pytest.fixture
async def new(server: EmbeddingsFake) -> AsyncIterator[NewEmbedder]:
    """Makes embedders that ask the server and are started."""
    async with AsyncExitStack() as stack:

        async def make(**fields: Any) -> Embedder:
            given = {"embeddings_url": server.url, "embeddings_model": "m", **fields}
            made = embedder(EncoderSettings(**given))
            assert made is not None
            await made.start()
            stack.push_async_callback(made.stop)
            return made

        yield make


def calls(outcome: str) -> float:
    return REGISTRY.get_sample_value("penstock_embedding_calls_total", {"outcome": outcome}) or 0.0


# --- What is sent and what comes back ----------------------------------------------------------------


@pytest.mark.parametrize("sends_numbers", [False, True])
async def test_each_text_gets_its_vector_whatever_order_and_form_they_come_in(
    server: EmbeddingsFake, new: NewEmbedder, sends_numbers: bool
) -> None:
    """Base64 is asked for, since it is smaller; a server that sends numbers is understood too."""
    server.sends_numbers = sends_numbers
    made = await new()
    before = calls("ok")
    vectors = await made.embed_passages(["a", "bb", "ccc"])
    assert [vector.tolist() for vector in vectors] == [[1, 1], [2, 1], [3, 1]]
    assert server.asked == [{"model": "m", "input": ["a", "bb", "ccc"], "encoding_format": "base64"}]
    assert calls("ok") == before + 1


async def test_request_carries_key_prefixes_and_dimensions(server: EmbeddingsFake, new: NewEmbedder) -> None:
    """Models that tell questions from passages by a prefix get it, each its own."""
    made = await new(
        embeddings_url=f"{server.url}/v1/",
        embeddings_api_key="sk-1",
        embeddings_dimensions=2,
        query_prefix="query: ",
        passage_prefix="passage: ",
    )
    await made.embed_question("why")
    await made.embed_passages(["because"])
    assert [(body["input"], body["dimensions"]) for body in server.asked] == [
        (["query: why"], 2),
        (["passage: because"], 2),
    ]
    assert {headers["authorization"] for headers in server.headers} == {"Bearer sk-1"}


async def test_long_document_travels_in_several_calls(server: EmbeddingsFake, new: NewEmbedder) -> None:
    """None is larger than it may be, and the vectors come back in the order of the chunks."""
    made = await new(embeddings_batch=4)
    texts = ["x" * n for n in range(1, 12)]
    vectors = await made.embed_passages(texts)
    assert [vector[0] for vector in vectors] == list(range(1, 12))
    assert sorted(map(len, server.calls)) == [3, 4, 4]


async def test_calls_go_over_connections_that_are_kept(server: EmbeddingsFake, new: NewEmbedder) -> None:
    """A connection that the server closed while it lay idle is nobody's failure."""
    made = await new()
    await made.embed_question("one")
    server.script = [web.Response(status=200, body=answer([[1.0]]), headers={"connection": "close"})]
    await made.embed_question("two")
    assert (await made.embed_question("three"))[0] == 5


# --- Gathering ---------------------------------------------------------------------------------------


async def test_questions_that_come_meanwhile_travel_together(server: EmbeddingsFake, new: NewEmbedder) -> None:
    """At rest a question leaves at once; under load one call carries many."""
    made = await new(embeddings_calls=2)
    server.gate.clear()
    questions = [asyncio.create_task(made.embed_question("x" * n)) for n in range(1, 31)]
    await wait_until(lambda: len(server.asked) == 2)
    server.gate.set()
    vectors = await asyncio.gather(*questions)
    assert [vector[0] for vector in vectors] == list(range(1, 31))
    assert len(server.calls) < 6


async def test_question_does_not_wait_behind_a_long_document(server: EmbeddingsFake, new: NewEmbedder) -> None:
    """One place for a call is kept for questions, and a question never travels with chunks."""
    made = await new(embeddings_calls=2, embeddings_batch=1)
    server.gate.clear()
    document = asyncio.create_task(made.embed_passages(["a chunk"] * 50))
    await wait_until(lambda: len(server.asked) == 1)
    question = asyncio.create_task(made.embed_question("a question"))
    await wait_until(lambda: len(server.asked) == 2)
    assert server.calls == [["a chunk"], ["a question"]]
    server.gate.set()
    assert (await question)[0] == len("a question")
    assert len(await document) == 50


async def test_document_gets_on_however_many_questions_come(server: EmbeddingsFake, new: NewEmbedder) -> None:
    """The other way round, one place is kept for chunks: its second does not wait for all the questions."""
    made = await new(embeddings_calls=2, embeddings_batch=1)
    server.gate.clear()
    questions = [asyncio.create_task(made.embed_question("a question"))]
    document = asyncio.create_task(made.embed_passages(["chunk 1", "chunk 2"]))
    await wait_until(lambda: len(server.asked) == 2)
    questions += [asyncio.create_task(made.embed_question("another")) for _ in range(20)]
    await wait_until(lambda: len(made._questions) == 20)
    server.gate.set()
    await asyncio.gather(document, *questions)
    assert len(server.calls) == 23
    assert server.calls.index(["chunk 2"]) < 12


async def test_text_that_is_refused_fails_no_other_job(server: EmbeddingsFake, new: NewEmbedder) -> None:
    """A call that is refused is asked for in halves, until the text is found that cannot be embedded."""
    made = await new(embeddings_calls=2)
    server.refuses = "bad"
    server.gate.clear()
    held = [asyncio.create_task(made.embed_question("first"))]
    await wait_until(lambda: len(server.asked) == 1)
    held.append(asyncio.create_task(made.embed_question("second")))
    await wait_until(lambda: len(server.asked) == 2)
    texts = [f"good {n}" for n in range(6)] + ["bad"] + [f"good {n}" for n in range(6, 9)]
    waiting = [asyncio.create_task(made.embed_question(text)) for text in texts]
    await wait_until(lambda: len(made._questions) == len(texts))
    server.gate.set()
    outcomes = await asyncio.gather(*held, *waiting, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert refused == [outcomes[8]]
    assert any(len(texts) > 1 for texts in server.calls)
    assert isinstance(refused[0], Reject)
    assert refused[0].code == "embeddings_refused"
    assert "too long" in str(refused[0])


async def test_job_that_is_given_up_is_not_sent(server: EmbeddingsFake, new: NewEmbedder) -> None:
    """Its deadline came while its texts waited: the server is spared them."""
    made = await new(embeddings_calls=2, embeddings_batch=1)
    server.gate.clear()
    first = asyncio.create_task(made.embed_passages(["first"]))
    await wait_until(lambda: len(server.asked) == 1)
    second, third = (asyncio.create_task(made.embed_passages([text])) for text in ("second", "third"))
    await wait_until(lambda: len(made._passages) == 2)
    second.cancel()
    await asyncio.wait({second})
    server.gate.set()
    await asyncio.gather(first, third)
    assert server.calls == [["first"], ["third"]]


async def test_stopping_leaves_nobody_waiting(server: EmbeddingsFake, new: NewEmbedder) -> None:
    """Calls under way are broken off, what waits behind them is cancelled, and no task is left."""
    before = asyncio.all_tasks()
    made = await new(embeddings_calls=2, embeddings_batch=1)
    server.gate.clear()
    waiting = [asyncio.create_task(made.embed_passages(["a", "b"])) for _ in range(3)]
    await wait_until(lambda: len(server.asked) == 1)
    await made.stop()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {asyncio.CancelledError}
    assert not made._under_way
    server.gate.set()
    await wait_until(lambda: not {task for task in asyncio.all_tasks() - before if task.get_name() == "embed"})


# --- Trouble -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "headers", "body", "code", "charged", "after_s"),
    [
        (429, {}, "", "embeddings_busy", False, None),
        (429, {"retry-after": "7"}, "", "embeddings_busy", False, 7.0),
        (503, {"retry-after": "3"}, "", "embeddings_busy", False, 3.0),
        (503, {}, '{"error": {"message": "Loading model"}}', "embeddings_busy", False, None),
        (503, {}, "", "embeddings_error", True, None),
        (500, {}, '{"error": "out of memory"}', "embeddings_error", True, None),
        (401, {}, '{"error": {"message": "wrong key sk-12"}}', "embeddings_refused_credentials", True, None),
        (404, {}, '{"error": {"message": "model \'m\' not found"}}', "embeddings_misconfigured", True, None),
        (301, {}, "", "embeddings_misconfigured", True, None),
        (413, {}, "", "embeddings_refused", None, None),
        (400, {}, '{"error": {"message": "input is too long"}}', "embeddings_refused", None, None),
    ],
)  # fmt: skip
def test_error_answer_says_what_follows(
    status: int, headers: dict[str, str], body: str, code: str, charged: bool | None, after_s: float | None
) -> None:
    """What did no work charges no attempt; what can never succeed is not tried again."""
    error = judge(status, headers, body.encode())
    assert isinstance(error, Reject if charged is None else RetryLater)
    assert (error.code, getattr(error, "charged", None), getattr(error, "after_s", None)) == (code, charged, after_s)
    assert str(status) in str(error)
    assert "sk-12" not in str(error)


async def test_server_that_is_away_charges_nothing_and_one_that_is_late_does(
    server: EmbeddingsFake, new: NewEmbedder, unused_tcp_port: int
) -> None:
    """Both say what was waited for."""
    away = await new(embeddings_url=f"http://127.0.0.1:{unused_tcp_port}")
    with pytest.raises(RetryLater, match="cannot be reached") as refused:
        await away.embed_question("why")
    assert (refused.value.code, refused.value.charged) == ("embeddings_unreachable", False)
    late = await new(embeddings_timeout_s=0.05)
    server.gate.clear()
    with pytest.raises(RetryLater, match=r"no whole answer within 0\.05 s") as timed_out:
        await late.embed_question("why")
    assert (timed_out.value.code, timed_out.value.charged) == ("embeddings_timeout", True)


def answer(vectors: Sequence[object], **fields: object) -> bytes:
    return orjson.dumps({"data": [{"index": n, "embedding": vector, **fields} for n, vector in enumerate(vectors)]})


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"<html>", "no JSON"),
        (b"[]", "no list `data`"),
        (b'{"data": [1, 2]}', "no list `data`"),
        (answer([[1.0]]), "1 vectors for 2 texts"),
        (answer([[1.0], [2.0], [3.0]]), "3 vectors for 2 texts"),
        (answer([[1.0], [2.0]], index=0), "`index` 0"),
        (answer([[1.0], [2.0]], index=5), "`index` 5"),
        (answer([[1.0], [2.0]], index="0"), "`index` '0'"),
        (answer([[1.0], [1.0, 2.0]]), "different lengths: 1, 2"),
        (answer([[1.0], []]), "missing or empty"),
        (answer([[1.0], None]), "missing or empty"),
        (answer([[1.0], ["x"]]), "cannot be read"),
        (answer([[1.0], "AAAA!"]), "cannot be read"),
        (answer([[1.0], base64.b64encode(b"12345").decode()]), "cannot be read"),
        (answer([[1.0], [1e39]]), "no number"),
        (answer([[1.0], base64.b64encode(array("f", [float("nan")]).tobytes()).decode()]), "no number"),
    ],
)
def test_answer_that_cannot_be_used_says_why(body: bytes, why: str) -> None:
    """A bad answer is told apart from a good one before any vector of it is used."""
    with pytest.raises(BadEmbeddings, match=why):
        read_vectors(body, 2)


def test_answer_of_other_dimensions_than_asked_for_is_refused() -> None:
    """Some servers do not know the parameter and leave it out silently."""
    with pytest.raises(BadEmbeddings, match="2 dimensions, and 1 were asked for"):
        read_vectors(answer([[1.0, 2.0]]), 1, 1)


@given(st.binary(max_size=60) | st.recursive(st.none() | st.text() | st.floats(), st.lists).map(repr).map(str.encode))
def test_no_answer_does_worse_than_be_refused(body: bytes) -> None:
    """Whatever a server sends, reading it raises nothing else."""
    with pytest.raises(BadEmbeddings):
        read_vectors(body, 1)


async def test_vectors_of_one_document_are_all_of_one_length(new: NewEmbedder) -> None:
    """Each call is right in itself, and between two of them the model behind the name became another."""
    async with embeddings_server(lambda text: [1.0] * len(text)) as liar:
        made = await new(embeddings_url=liar.url, embeddings_batch=1)
        with pytest.raises(RetryLater, match="different lengths: 2, 3, 4") as caught:
            await made.embed_passages(["aaa", "bb", "cccc"])
        assert (caught.value.code, caught.value.charged) == ("bad_embeddings", True)


async def test_bad_answer_is_tried_again_at_a_charge(server: EmbeddingsFake, new: NewEmbedder) -> None:
    """It is the server's failure, and may pass."""
    made = await new()
    server.script = [web.Response(status=200, text="<html>"), web.Response(status=200, body=answer([[1.0], [2.0]]))]
    for why in ("no JSON", "2 vectors for 1 texts"):
        with pytest.raises(RetryLater, match=why) as caught:
            await made.embed_question("why")
        assert (caught.value.code, caught.value.charged) == ("bad_embeddings", True)


def test_key_that_cannot_be_used_is_refused_at_start() -> None:
    """In the name of the setting."""
    fields = {"embeddings_model": "m", "embeddings_url": "http://host", "embeddings_api_key": "two\nlines"}
    with pytest.raises(ConfigError, match=r"encoder\.embeddings_api_key"):
        embedder(EncoderSettings.model_validate(fields))


# --- sentence-transformers ---------------------------------------------------------------------------


class FakeModel:
    """What sentence-transformers' model looks like from here; its vectors say which method made them."""

    def __init__(self, name: str, *, local_files_only: bool) -> None:
        if name == "missing" or not local_files_only:
            raise OSError(f"{name} is no local folder")

    def encode_query(self, texts: list[str], *, show_progress_bar: bool) -> list[Dense]:
        return [array("f", (1, len(text))) for text in texts]

    def encode_document(self, texts: list[str], *, show_progress_bar: bool) -> list[Dense]:
        return [array("f", (2, len(text))) for text in texts]


class OldModel:
    def encode(self, texts: list[str], *, show_progress_bar: bool) -> list[Dense]:
        return [array("f", (3, len(text))) for text in texts]


@pytest.fixture
def sentence_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("sentence_transformers")
    package.SentenceTransformer = FakeModel  # type: ignore[attr-defined]  # a fake package
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)


@pytest.mark.usefixtures("sentence_transformers")
async def test_model_in_this_process_encodes_questions_and_chunks_each_its_own_way() -> None:
    """Models of today bring the prompts for both."""
    made = embedder(EncoderSettings(sentence_transformer="some/model"))
    assert made is not None
    await made.start()
    assert (await made.embed_question("why")).tolist() == [1, 3]
    assert [vector.tolist() for vector in await made.embed_passages(["a", "bb"])] == [[2, 1], [2, 2]]
    await made.stop()


def test_older_model_has_one_way_for_both() -> None:
    """The method of before sentence-transformers 5."""
    assert [vector.tolist() for vector in encode_with(OldModel(), ["a"], True)] == [[3, 1]]


@pytest.mark.usefixtures("sentence_transformers")
async def test_model_that_is_not_on_this_machine_is_not_downloaded() -> None:
    """The operator is told how to fetch it."""
    made = embedder(EncoderSettings(sentence_transformer="missing"))
    assert made is not None
    with pytest.raises(ConfigError, match=r"nothing is downloaded.*hf download missing"):
        await made.start()
    await made.stop()


async def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is large, so it is not there unless it was asked for."""
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    made = embedder(EncoderSettings(sentence_transformer="some/model"))
    assert made is not None
    with pytest.raises(ConfigError, match=r"pip install 'penstock\[sentence-transformers\]'"):
        await made.start()
    await made.stop()


# --- The stage ---------------------------------------------------------------------------------------


async def test_stage_sends_vectors_of_both_kinds_along(server: EmbeddingsFake, new_job: NewJob) -> None:
    """Words and meaning of a question, and of every chunk, under the names of their models."""
    stage = encoder.build(Settings(encoder=EncoderSettings(embeddings_url=server.url, embeddings_model="m")))
    await stage.start(CONTEXT)
    question, document = await stage.handle_batch(
        [
            new_job("query", query="Where do rivers run?"),
            new_job("document", document_id="d.md", text="# A\n\nOne.\n\n" + "word " * 600),
        ]
    )
    await stage.stop()
    assert isinstance(question, Done)
    assert isinstance(document, Done)
    for done, count in ((question, 1), (document, len(document.value["chunks"]))):
        assert {name: len(vectors) for name, vectors in unpack(done.vector or b"").items()} == {
            "bm25/english/1": count,
            "dense/m": count,
        }
    assert len(document.value["chunks"]) > 1


async def test_stage_without_words_sends_meaning_alone(server: EmbeddingsFake, new_job: NewJob) -> None:
    """BM25 can be switched off."""
    settings = EncoderSettings(embeddings_url=server.url, embeddings_model="m", keywords=False)
    stage = encoder.build(Settings(encoder=settings))
    await stage.start(CONTEXT)
    done = await stage.handle(new_job("query", query="why"))
    await stage.stop()
    assert unpack(done.vector or b"") == {"dense/m": [array("f", lengths("why"))]}
