"""Documents go in and out by jobs, and jobs tell how they stand."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import structlog

from gateway.documents import Standings
from gateway.jobs import MAX_IDS, JobStatuses
from pipeline import keys
from pipeline.connection import Link
from pipeline.job import error_body
from tests.gateway.conftest import Running
from tests.gateway.fake import RESULT, completed


async def test_a_document_is_accepted_with_its_job(gateway: Running) -> None:
    """202 with both ids; the job carries the document, at the priority it asked for."""
    body = {"id": "guide:1", "title": "Guide", "text": "Words.", "metadata": {"page": 1}}
    reply = await gateway.http.post("/documents", json=body | {"priority": "low"})
    assert reply.status_code == 202
    (live,) = gateway.front.jobs.values()
    assert reply.json() == {"id": "guide:1", "job_id": live.job.id}
    assert (live.job.flow, live.job.priority) == ("document", "low")
    assert live.job.payload == {
        "document_id": "guide:1",
        "title": "Guide",
        "text": "Words.",
        "metadata": {"page": 1},
    }


async def test_a_document_is_deleted_by_a_job(gateway: Running) -> None:
    """The id stands percent-encoded in the path."""
    reply = await gateway.http.delete("/documents/guide%3A1")
    assert reply.status_code == 202
    (live,) = gateway.front.jobs.values()
    assert reply.json() == {"id": "guide:1", "job_id": live.job.id}
    assert (live.job.flow, live.job.payload) == ("document_deletion", {"document_id": "guide:1"})


async def test_the_index_is_asked_what_it_holds(gateway: Running) -> None:
    """By a job of its own, whose result is the answer."""
    held = {"guide:1": {"chunks": 2, "digest": "v1"}, "other": None}
    gateway.front.answer = lambda job: completed(job, result={"documents": held})
    reply = await gateway.http.get("/documents", params={"ids": "guide:1,other"})
    assert (reply.status_code, reply.json()) == (200, {"documents": held})
    Standings.model_validate(reply.json(), strict=True)
    (live,) = gateway.front.jobs.values()
    assert (live.job.flow, live.job.payload) == ("document_lookup", {"document_ids": ["guide:1", "other"]})


async def test_a_lookup_that_expires_is_told_as_such(gateway: Running) -> None:
    """Nobody serves the index: that is not the same as an empty one."""
    gateway.front.answer = lambda job: completed(job, status="expired", result=None)
    reply = await gateway.http.get("/documents?ids=a")
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "expired")


async def test_a_documents_collection_travels_with_every_operation(gateway: Running) -> None:
    """In the body, or behind the `?`; one that cannot be a name is refused."""
    await gateway.http.post("/documents", json={"id": "d", "text": "t", "collection": "medical"})
    await gateway.http.delete("/documents/d?collection=medical")
    gateway.front.answer = lambda job: completed(job, result={"documents": {"d": None}})
    await gateway.http.get("/documents?ids=d&collection=medical")
    assert [live.job.payload["collection"] for live in gateway.front.jobs.values()] == ["medical"] * 3
    for request in (
        gateway.http.post("/documents", json={"id": "d", "text": "t", "collection": "a/b"}),
        gateway.http.delete("/documents/d?collection=a%2Fb"),
        gateway.http.get("/documents?ids=d&collection="),
        gateway.http.get("/documents?ids=d&collection=a&collection=b"),
    ):
        reply = await request
        assert (reply.status_code, reply.json()["error"]["param"]) == (422, "collection")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "ids: 1 to 100"),
        ("?ids=", "ids: 1 to 100"),
        ("?ids=" + ",".join(["a"] * 101), "ids: 1 to 100"),
        ("?ids=a,b%20c", "ids[1]: 1 to 100"),
        ("?id=a", "id: there is no such parameter"),
    ],
)
async def test_a_wrong_lookup_is_refused(gateway: Running, query: str, message: str) -> None:
    """And nothing is asked."""
    reply = await gateway.http.get("/documents" + query)
    assert reply.status_code == 422
    assert reply.json()["error"]["message"].startswith(message)
    assert gateway.front.jobs == {}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text": "x"}, "id"),
        ({"id": "", "text": "x"}, "id"),
        ({"id": "a b", "text": "x"}, "id"),
        ({"id": "a" * 129, "text": "x"}, "id"),
        ({"id": 7, "text": "x"}, "id"),
        ({"document_id": "a", "id": "a", "text": "x"}, "document_id"),
        ({"id": "a"}, "text"),
        ({"id": "a", "text": ""}, "text"),
        ({"id": "a", "text": " \n\t\u3000"}, "text"),
        ({"id": "a", "text": ["x"]}, "text"),
        ({"id": "a", "text": "x", "title": "t" * 1_001}, "title"),
        ({"id": "a", "text": "x", "metadata": {"k": {}}}, "metadata.k"),
        ({"id": "a", "text": "x", "metadata": {"k" * 129: 1}}, "metadata." + "k" * 119),
        ({"id": "a", "text": "x", "priority": 1}, "priority"),
        ({"id": "a", "text": "x", "tags": []}, "tags"),
    ],
)
async def test_a_wrong_field_of_a_document_is_named(gateway: Running, body: dict[str, Any], param: str) -> None:
    """By the name that the sender knows, not by ours; a path is shown up to a bound."""
    reply = await gateway.http.post("/documents", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, param)
    assert gateway.front.jobs == {}


async def test_a_document_id_that_is_none_is_422(gateway: Running) -> None:
    """It could never have been accepted."""
    reply = await gateway.http.delete("/documents/a%20b")
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, "id")


async def test_many_jobs_are_looked_at_in_one_request(gateway: Running) -> None:
    """Each by its id; null stands for one that is not known."""
    ids = [
        (await gateway.http.post("/documents", json={"id": f"d{number}", "text": "x"})).json()["job_id"]
        for number in range(4)
    ]
    gateway.front.jobs[ids[1]].state = "running"
    gateway.front.finish(ids[2], result={"document_id": "d2", "chunks": 1})
    error = error_body("rejected", "too_many_chunks", "too long")
    gateway.front.finish(ids[3], status="failed", result=None, error=error)
    reply = await gateway.http.get("/jobs", params={"ids": ",".join([*ids, "unknown"])})
    statuses = JobStatuses.model_validate(reply.json()).jobs
    assert list(statuses) == [*ids, "unknown"]
    assert [status and status.status for status in statuses.values()] == [
        "queued",
        "running",
        "completed",
        "failed",
        None,
    ]
    assert reply.json()["jobs"][ids[2]]["result"] == {"document_id": "d2", "chunks": 1}
    assert reply.json()["jobs"][ids[3]]["error"] == error


async def test_a_job_that_cannot_be_read_is_503_and_harms_no_other(on_redis: httpx.AsyncClient, link: Link) -> None:
    """A stranger wrote its completion: as no JSON, as JSON of another shape, or as a key of a wrong type."""
    good = (await on_redis.post("/query", json={"query": "?", "background": True})).json()["job_id"]
    await link.call("SET", keys.COMPLETION + "bad1", "garbage", "PX", 60_000)
    await link.call("SET", keys.COMPLETION + "bad2", "[]", "PX", 60_000)
    await link.call("HSET", keys.COMPLETION + "bad3", "a", "b")
    await link.call("PEXPIRE", keys.COMPLETION + "bad3", 60_000)
    for bad in ("bad1", "bad2", "bad3"):
        with structlog.testing.capture_logs() as logs:
            reply = await on_redis.get(f"/jobs/{bad}")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "broken_key")
        assert "WRONGTYPE" not in reply.text
        assert [line["event"] for line in logs if "exc_info" not in line] == ["gateway.broken_key"]
    reply = await on_redis.get("/jobs", params={"ids": f"bad1,{good},bad2,bad3"})
    jobs = JobStatuses.model_validate(reply.json()).jobs
    assert [job and job.status for job in jobs.values()] == ["unreadable", "queued", "unreadable", "unreadable"]
    assert jobs["bad3"] is not None
    assert jobs["bad3"].error is not None
    assert jobs["bad3"].error.code == "broken_key"
    assert (await on_redis.post("/jobs/bad3/cancel")).status_code == 503


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("", "ids"),
        ("?ids=", "ids"),
        ("?ids=a,,b", "ids"),
        ("?ids=" + ",".join("x" * (MAX_IDS + 1)), "ids"),
        ("?ids=a&idz=b", "idz"),
    ],
)
async def test_a_wrong_list_of_jobs_is_422(gateway: Running, query: str, param: str) -> None:
    """None, too many, or a parameter that does not exist."""
    reply = await gateway.http.get(f"/jobs{query}")
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, param)


async def test_cancelling_says_what_it_did(gateway: Running) -> None:
    """200 ended at once, 202 its worker was told, 409 too late, 404 never heard of."""
    ids = [
        (await gateway.http.post("/query", json={"query": "?", "background": True})).json()["job_id"] for _ in range(3)
    ]
    gateway.front.jobs[ids[1]].state = "running"
    gateway.front.finish(ids[2])
    replies = [await gateway.http.post(f"/query/{job_id}/cancel") for job_id in [*ids, "unknown"]]
    assert [reply.status_code for reply in replies] == [200, 202, 409, 404]
    assert replies[0].json() == {"job_id": ids[0], "status": "cancelled"}
    assert replies[1].json() == {"job_id": ids[1], "status": "cancelling"}
    assert replies[2].json()["error"]["code"] == "job_finished"
    after = await gateway.http.get(f"/query/{ids[0]}")
    assert after.json()["status"] == "cancelled"


async def test_a_finished_job_shows_its_outcome(gateway: Running) -> None:
    """Result, who did it, how often it was tried and how long it took."""
    job_id = (await gateway.http.post("/query", json={"query": "?", "background": True})).json()["job_id"]
    gateway.front.finish(job_id, attempts=2)
    assert (await gateway.http.get(f"/query/{job_id}")).json() == {
        "job_id": job_id,
        "status": "completed",
        "result": RESULT,
        "error": None,
        "worker": "llm-1",
        "replica": "http://127.0.0.1:9001",
        "attempts": 2,
        "timings_ms": {"encoder_wait": 0.25, "encoder": 0.5, "llm_wait": 0.125, "llm": 0.0625},
    }
