"""The reports service over HTTP: asked for, read, listed; people who are deleted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from gateway import reports as service
from gateway.app import create_app
from pipeline import keys
from pipeline.connection import Link
from pipeline.errors import Reject
from pipeline.front import Front
from pipeline.job import Done, Job, new_id
from pipeline.records import Records
from pipeline.settings import Settings
from stages.report import Report
from tests.conftest import PATIENCE_S, wait_until
from tests.gateway.recorded import record
from tests.redis.test_reports import PASSAGES, PATIENT, answer_to, responses
from tests.rig import FIRST, Gate, Scripted, changed, working

Json = dict[str, Any]
TENANTS = {"gateway": {"api_keys": ("anna:key-a", "ben:key-b")}}
ANNA, BEN = {"authorization": "Bearer key-a"}, {"authorization": "Bearer key-b"}


@dataclass
class Service:
    """A gateway, its Redis, and its history, which is written when the test says so."""

    http: httpx.AsyncClient
    link: Link
    front: Front
    records: Records
    gate: Gate

    async def ask(self, headers: dict[str, str] | None = None, /, **body: Any) -> httpx.Response:
        asked = {"user_id": "u1", "inputs": PATIENT} | body
        return await self.http.post("/reports", json=asked, headers=headers or {})

    async def get(self, path: str, headers: dict[str, str] | None = None, /, **query: Any) -> Json:
        reply = await self.http.get(path, params=query, headers=headers or {})
        assert reply.status_code == 200, reply.text
        value: Json = reply.json()
        return value

    async def ended(self, report_id: str, headers: dict[str, str] | None = None) -> Json:
        """Wait for the end of a report, and return it."""
        found: Json = {}

        async def has_ended() -> bool:
            nonlocal found
            found = await self.get(f"/reports/{report_id}", headers)
            return found["status"] not in {"pending", "processing"}

        await wait_until(has_ended)
        return found

    async def record(self) -> None:
        """Do the recorder's work."""
        await record(self.link, self.records)


@pytest.fixture
async def serve(link: Link, front: Front, settings: Settings, records: Records) -> AsyncIterator[Any]:
    """Start the service, with settings that differ in what the test says; its replica answers when the gate is open."""
    async with AsyncExitStack() as stack:

        async def start(**sections: Any) -> Service:
            gate = Gate(_say)
            some = changed(settings, llm={"urls": (FIRST,)}, **sections)
            stages = [
                Scripted("encoder", _pass),
                Scripted("retriever", _find),
                Scripted("llm", gate, placed=True),
                Report(some),
            ]
            await stack.enter_async_context(working(some, stages))
            transport = httpx.ASGITransport(create_app(some, front, records))
            client = httpx.AsyncClient(base_url="http://127.0.0.1", transport=transport, timeout=PATIENCE_S)
            await stack.enter_async_context(client)
            return Service(client, link, front, records, gate)

        yield start


async def _pass(job: Job) -> Done:
    return Done({})


async def _find(job: Job) -> Done:
    return Done({"sources": PASSAGES})


async def _say(job: Job) -> Done:
    if job.payload["inputs"]["age"] == 1:
        raise Reject("the model will not say", code="content_filtered")
    return answer_to(job)


async def test_a_report_is_asked_for_and_read(serve: Any) -> None:
    """Pending, processing, completed: the same from Redis, and from history when Redis has forgotten."""
    one: Service = await serve()
    reply = await one.ask()
    assert reply.status_code == 202, reply.text
    report_id = reply.json()["report_id"]
    await wait_until(lambda: one.gate.waiting)
    assert await one.get(f"/reports/{report_id}") == {
        "report_id": report_id, "status": "processing", "user_id": "u1", "report_type": "medical", "language": "en",
    }  # fmt: skip
    one.gate.open()
    fresh = await one.ended(report_id)
    assert fresh["report"]["content"]["summary"] == "Said of u1."
    assert fresh["cached"] is False
    await one.record()
    after = await one.get(f"/reports/{report_id}")
    await one.link.call("DEL", keys.COMPLETION + report_id)
    assert await one.get(f"/reports/{report_id}") == after
    assert after["report"] == fresh["report"]
    assert after["user_id"] == "u1"
    assert "inputs" not in after
    assert await responses(one.link) == []


async def test_a_failed_report_tells_why(serve: Any) -> None:
    """Before and after it was recorded."""
    one: Service = await serve()
    one.gate.open()
    report_id = (await one.ask(inputs=PATIENT | {"age": 1})).json()["report_id"]
    first = await one.ended(report_id)
    assert (first["status"], first["error"]["code"]) == ("failed", "content_filtered")
    await one.record()
    await one.link.call("DEL", keys.COMPLETION + report_id)
    assert (await one.get(f"/reports/{report_id}"))["error"] == first["error"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"inputs": PATIENT | {"age": -3}}, "inputs.age"),
        ({"report_type": "horoscope"}, "report_type"),
        ({"user_id": "a b"}, "user_id"),
        ({"request_id": "r1"}, "request_id"),
        ({"inputs": None, "age": 4, "sex": "male", "symptoms": []}, "symptoms"),
        ({"reuse_last_input": 1}, "reuse_last_input"),
    ],
)
async def test_a_wrong_field_is_named_and_nothing_begins(serve: Any, body: Json, param: str) -> None:
    """422 with its path."""
    one: Service = await serve()
    reply = await one.ask(**body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, param), reply.text
    assert await one.link.call("ZCARD", keys.LIVE_INDEX) == 0


async def test_an_idempotency_key_is_honoured_and_keeps_no_report(serve: Any) -> None:
    """The same body again is the same report; what the key remembers holds nothing of a person."""
    one: Service = await serve()
    one.gate.open()
    first = await one.ask({"idempotency-key": "k1"})
    again = await one.ask({"idempotency-key": "k1"})
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    await one.ended(first.json()["report_id"])
    [name] = await one.link.call("KEYS", keys.IDEMPOTENCY + "*")
    assert await one.link.call("HEXISTS", name, "outcome") == 0


async def test_a_persons_reports_come_in_pages(serve: Any) -> None:
    """The newest first, without their texts."""
    one: Service = await serve()
    one.gate.open()
    ids = []
    for age in (40, 41, 42):
        ids.append((await one.ask(inputs=PATIENT | {"age": age})).json()["report_id"])
        await one.ended(ids[-1])
    await one.ask(user_id="u2")
    await one.record()
    first = await one.get("/users/u1/reports", limit=2)
    second = await one.get("/users/u1/reports", limit=2, after=first["next"])
    assert [row["report_id"] for row in first["reports"] + second["reports"]] == ids[::-1]
    assert second["next"] is None
    assert "report" not in first["reports"][0]
    assert await one.get("/users/nobody/reports") == {"reports": [], "next": None}
    for query in ({"limit": "0"}, {"after": "x"}, {"odd": "1"}):
        assert (await one.http.get("/users/u1/reports", params=query)).status_code == 422


async def test_a_tenant_sees_and_deletes_its_own(serve: Any) -> None:
    """One name at two tenants is two people; a cached report of one does not serve the other."""
    one: Service = await serve(**TENANTS)
    one.gate.open()
    ids = {}
    for who, headers in (("anna", ANNA), ("ben", BEN)):
        ids[who] = (await one.ask(headers)).json()["report_id"]
        assert (await one.ended(ids[who], headers))["cached"] is False
    await one.record()
    assert (await one.http.get(f"/reports/{ids['anna']}", headers=BEN)).status_code == 404
    assert [row["report_id"] for row in (await one.get("/users/u1/reports", BEN))["reports"]] == [ids["ben"]]
    async with asyncio.TaskGroup() as group:
        deletion = group.create_task(one.http.delete("/users/u1", headers=ANNA))
        await wait_until(lambda: one.link.call("XLEN", keys.EVENTS))
        await one.record()
    assert deletion.result().json() == {"user_id": "u1", "status": "deleted"}
    assert (await one.http.get(f"/reports/{ids['anna']}", headers=ANNA)).status_code == 404
    assert (await one.get(f"/reports/{ids['ben']}", BEN))["status"] == "completed"
    await one.ask(BEN)
    assert (await one.http.get("/reports/x", headers={})).status_code == 401


async def test_a_deletion_says_when_the_history_is_still_to_follow(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """202, and a report in the making is stopped at once."""
    monkeypatch.setattr(service, "ERASED_WITHIN_S", 0.1)
    one: Service = await serve()
    report_id = (await one.ask()).json()["report_id"]
    await wait_until(lambda: one.gate.waiting)
    reply = await one.http.delete("/users/u1")
    assert (reply.status_code, reply.json()) == (202, {"user_id": "u1", "status": "deleting"})
    found = await one.ended(report_id)
    assert (found["status"], found["error"]["code"]) == ("failed", "user_deleted")
    await one.record()
    assert await one.get("/users/u1/reports") == {"reports": [], "next": None}
    assert (await one.http.delete("/users/a%20b")).status_code == 422


async def test_what_is_no_report_is_not_found(serve: Any) -> None:
    """Ids that were never given, and those of other services' jobs."""
    one: Service = await serve()
    query = (await one.http.post("/query", json={"query": "why?", "background": True})).json()["job_id"]
    for report_id in (new_id(), "x", query):
        assert (await one.http.get(f"/reports/{report_id}")).status_code == 404
    one.gate.open()
