"""`POST /query`: a question in, an answer or a clear reason out."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import httpx
import pytest

from gateway.query import QueryAnswer
from pipeline.errors import BrokerUnavailable, JobLost, Overloaded
from pipeline.job import Completion, error_body
from tests.conftest import PATIENCE_S
from tests.gateway.conftest import Running, Start
from tests.gateway.fake import RESULT, completed


async def _ask_and_leave(gateway: Running, body: dict[str, Any], headers: dict[str, str] | None = None) -> str:
    """Ask, wait until the job is awaited, then close the connection; return the job's id."""
    asking = asyncio.create_task(gateway.http.post("/query", json=body, headers=headers))
    job = await gateway.front.next_job()
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    return job.id


async def test_a_question_is_answered_with_its_sources(gateway: Running) -> None:
    """The answer holds what the design names, and fits the model that describes it."""
    gateway.front.answer = completed
    reply = await gateway.http.post("/query", json={"query": "What is a queue?"})
    assert reply.status_code == 200
    body = reply.json()
    QueryAnswer.model_validate(body)
    assert {name: body[name] for name in RESULT} == RESULT
    assert body["worker"] == "llm-1"
    assert body["replica"] == "http://127.0.0.1:9001"
    assert body["job_id"] in gateway.front.jobs
    assert "metadata" not in body


async def test_the_timings_of_an_answer_add_up(gateway: Running) -> None:
    """Stages, gateway and the way back are the total."""
    gateway.front.answer = completed
    timings = (await gateway.http.post("/query", json={"query": "?"})).json()["timings_ms"]
    total = timings.pop("total")
    assert sum(timings.values()) == pytest.approx(total)
    assert {"gateway", "return", "llm", "llm_wait"} <= timings.keys()
    assert min(timings.values()) >= 0


async def test_what_the_client_asks_for_reaches_the_job(gateway: Running) -> None:
    """Payload, priority and deadline are the request's; metadata comes back unread."""
    gateway.front.answer = completed
    before_ms = gateway.front.clock.now_ms()
    wish = {"query": "  why? ", "top_k": 2, "model": "m", "metadata": {"a": None, "b": 1}}
    reply = await gateway.http.post("/query", json=wish | {"timeout_s": 7, "priority": "high"})
    (live,) = gateway.front.jobs.values()
    assert live.job.payload == wish | {"query": "why?"}
    assert live.job.priority == "high"
    assert 7_000 <= live.job.deadline_ms - before_ms < 9_000
    assert reply.json()["metadata"] == wish["metadata"]


async def test_a_question_in_the_background_is_answered_with_its_job_at_once(gateway: Running) -> None:
    """202 and the id; the status tells the rest."""
    reply = await gateway.http.post("/query", json={"query": "?", "background": True})
    assert reply.status_code == 202
    job_id = reply.json()["job_id"]
    assert (await gateway.http.get(f"/query/{job_id}")).json() == {"job_id": job_id, "status": "queued"}
    gateway.front.finish(job_id)
    status = (await gateway.http.get(f"/query/{job_id}")).json()
    assert (status["status"], status["result"], status["error"]) == ("completed", RESULT, None)


@pytest.mark.parametrize(
    ("outcome", "status", "error"),
    [
        (
            {"status": "failed", "error": error_body("replica", "bad_answer", "the replica sent garbage")},
            502,
            {"type": "replica", "code": "bad_answer", "message": "the replica sent garbage", "param": None},
        ),
        (
            {"status": "expired", "error": error_body("expired", "deadline", "60 s are over")},
            504,
            {"type": "expired", "code": "deadline", "message": "60 s are over", "param": None},
        ),
        (
            {"status": "cancelled"},
            409,
            {"type": "conflict", "code": "cancelled", "message": "the job ended as cancelled", "param": None},
        ),
    ],
)
async def test_a_job_that_does_not_complete_is_an_error_with_its_reason(
    gateway: Running, outcome: dict[str, Any], status: int, error: dict[str, Any]
) -> None:
    """The error is the completion's; the job is named beside it."""
    gateway.front.answer = lambda job: completed(job, result=None, **outcome)
    reply = await gateway.http.post("/query", json={"query": "?"})
    assert reply.status_code == status
    assert reply.json() == {"error": error, "job_id": next(iter(gateway.front.jobs))}


async def test_no_outcome_until_the_deadline_is_504(gateway: Running) -> None:
    """The client is not kept longer than it asked for."""
    reply = await gateway.http.post("/query", json={"query": "?", "timeout_s": 0.01})
    assert reply.status_code == 504
    assert reply.json()["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (BrokerUnavailable("refused"), 503, "redis_unavailable", "1"),
        (Overloaded(after_s=3.2), 503, "overloaded", "4"),
        (Overloaded(code="too_many_in_flight"), 429, "too_many_in_flight", "1"),
    ],
)
async def test_a_refusal_says_when_to_come_back(
    gateway: Running, error: Exception, status: int, code: str, retry_after: str
) -> None:
    """What waiting helps against carries Retry-After."""
    gateway.front.broken = error  # type: ignore[assignment]  # all rows are PenstockErrors
    reply = await gateway.http.post("/query", json={"query": "?"})
    assert (reply.status_code, reply.headers["retry-after"]) == (status, retry_after)
    assert reply.json()["error"]["code"] == code
    assert "job_id" not in reply.json()


async def test_a_lost_job_is_503_and_named(gateway: Running) -> None:
    """Record and completion are both gone: nobody can know, and the client is told."""
    asking = asyncio.create_task(gateway.http.post("/query", json={"query": "?"}))
    job = await gateway.front.next_job()
    gateway.front.broken = JobLost()
    gateway.front.finish(job.id)
    reply = await asking
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "job_lost"
    assert reply.json()["job_id"] == job.id


async def test_a_client_that_disconnects_cancels_its_job(gateway: Running) -> None:
    """Nobody is left to read the answer, so nobody works for it."""
    job_id = await _ask_and_leave(gateway, {"query": "?"})
    await gateway.front.until(lambda: gateway.front.cancels == [job_id])


@pytest.mark.parametrize(
    ("body", "headers"),
    [({"on_disconnect": "continue"}, {}), ({}, {"Idempotency-Key": "k"})],
    ids=["on_disconnect", "idempotency key"],
)
async def test_a_job_that_is_meant_to_go_on_survives_its_client(
    gateway: Running, body: dict[str, Any], headers: dict[str, str]
) -> None:
    """The client said so, or will come back for the answer."""
    job_id = await _ask_and_leave(gateway, {"query": "?"} | body, headers)
    await _request_ended(gateway)
    assert gateway.front.cancels == []
    assert (await gateway.http.get(f"/query/{job_id}")).json()["status"] == "queued"


async def test_a_job_that_somebody_else_waits_for_survives_its_client(gateway: Running) -> None:
    """Another waiter in this gateway keeps the job alive."""
    asking = asyncio.create_task(gateway.http.post("/query", json={"query": "?"}))
    job = await gateway.front.next_job()
    other = asyncio.create_task(gateway.front.wait(job.id, job.tenant, job.deadline_ms))
    await gateway.front.until(lambda: gateway.front.waiters(job.id) == 2)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    await _request_ended(gateway)
    assert gateway.front.cancels == []
    gateway.front.finish(job.id)
    assert (await other).status == "completed"


async def test_redis_away_while_a_client_leaves_is_survived(gateway: Running) -> None:
    """The job cannot be cancelled then; its deadline ends it, and the gateway goes on."""
    asking = asyncio.create_task(gateway.http.post("/query", json={"query": "?"}))
    await gateway.front.next_job()
    gateway.front.broken = BrokerUnavailable("refused")
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    await _request_ended(gateway)
    gateway.front.broken, gateway.front.answer = None, completed
    assert (await gateway.http.post("/query", json={"query": "?"})).status_code == 200


@pytest.mark.parametrize("field", ["id", "tenant"])
async def test_a_reply_that_is_not_ours_is_never_passed_on(gateway: Running, field: str) -> None:
    """Every reply is checked against the id and the tenant it was asked for."""
    gateway.front.answer = completed
    theirs = {"id": "other", "status": "completed", "result": {"answer": "secret"}}
    if field == "tenant":
        gateway.front.answer = lambda job: completed(job, tenant="other", result={"answer": "secret"})
    else:
        gateway.front.foreign = Completion(**theirs)  # type: ignore[arg-type]  # a row of fields
    reply = await gateway.http.post("/query", json={"query": "?"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "job_lost")
    assert "secret" not in reply.text
    looked = await gateway.http.get(f"/query/{next(iter(gateway.front.jobs))}")
    assert looked.status_code == 404


async def test_a_setting_may_shorten_questions(start: Start) -> None:
    """The gateway's own bound is kept too, and names the field."""
    gateway = await start(max_query_chars=10)
    reply = await gateway.http.post("/query", json={"query": "x" * 11})
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, "query")


async def test_many_questions_at_once_get_their_own_answers(gateway: Running) -> None:
    """No answer reaches another's question."""
    gateway.front.answer = lambda job: completed(job, result=RESULT | {"answer": job.payload["query"]})
    replies: list[httpx.Response] = await asyncio.gather(
        *(gateway.http.post("/query", json={"query": f"q{number}"}) for number in range(50))
    )
    assert [reply.json()["answer"] for reply in replies] == [f"q{number}" for number in range(50)]


async def _request_ended(gateway: Running) -> None:
    """Wait until the server runs no request."""
    async with asyncio.timeout(PATIENCE_S):
        while tasks := set(gateway.server.server_state.tasks):
            await asyncio.wait(tasks)
