"""How webhooks stand, wherever that is written, and how they are told anew."""

from __future__ import annotations

from typing import Any, cast

import httpx
import orjson
import pytest

from gateway.app import create_app
from gateway.errors import Problem
from gateway.operation import Call, Gateway
from gateway.operation import Records as Remembering
from gateway.webhooks import WebhookReplayed, WebhookStatus, check_url
from pipeline import flows, keys
from pipeline.connection import Link
from pipeline.front import Front
from pipeline.job import Completion, Job, Json, error_body, new_id
from pipeline.records import Event, Records
from pipeline.settings import Settings
from stages.webhook import build
from tests.conftest import wait_until
from tests.gateway.conftest import Running, Start
from tests.gateway.recorded import record
from tests.receivers import answer, receiving
from tests.rig import changed, working

URL = "https://receiver.example.com/hook"
ATTEMPT = {"at_ms": 1_764_000_000_000, "status": 500, "duration_ms": 12.5}


def told(**more: Any) -> Json:
    return {"url": URL, "event": "batch.completed", "webhook_id": "msg_1", "queue": "orders", "batch_id": "b1"} | more


async def accept(gateway: Running, tenant: str = "default", **payload: Any) -> Job:
    """A webhook on its way, as a batch's end starts it."""
    payload_ = flows.WebhookPayload.model_validate(told(**payload))
    now_ms = gateway.front.clock.now_ms()
    job = flows.new_job("webhook", payload_, job_id=new_id(), now_ms=now_ms, lifetime_s=60, tenant=tenant)
    await gateway.front.submit(job)
    return job


async def look(gateway: Running, webhook_id: str) -> Json:
    reply = await gateway.http.get(f"/webhook/{webhook_id}")
    assert reply.status_code == 200, reply.text
    WebhookStatus.model_validate_json(reply.content)
    body: Json = reply.json()
    return body


async def test_a_webhook_that_waits_says_when_it_goes_on(gateway: Running) -> None:
    """With what happened so far."""
    job = await accept(gateway)
    job.state = told(attempts=[ATTEMPT])
    gateway.front.due_ms[job.id] = 1_764_000_005_250
    assert await look(gateway, job.id) == {
        "id": job.id,
        "status": "pending",
        "webhook_id": "msg_1",
        "url": URL,
        "event": "batch.completed",
        "batch_id": "b1",
        "message_id": None,
        "attempts": [ATTEMPT],
        "next_attempt_at": "2025-11-24T16:00:05.250000Z",
        "error": None,
        "retry_of": None,
    }


async def test_a_webhook_under_way_is_processing(gateway: Running) -> None:
    """Before its first attempt has ended there is none to show."""
    job = await accept(gateway, event="message.completed", message_id="m1")
    gateway.front.jobs[job.id].state = "running"
    found = await look(gateway, job.id)
    assert (found["status"], found["attempts"], found["next_attempt_at"]) == ("processing", [], None)
    assert (found["event"], found["message_id"]) == ("message.completed", "m1")


async def test_a_webhook_that_failed_shows_all_attempts(gateway: Running) -> None:
    """And why it ended."""
    job = await accept(gateway)
    error = error_body("failed", "bad_status", "the receiver answered 500")
    gateway.front.finish(job.id, status="failed", result=told(attempts=[ATTEMPT] * 10), error=error)
    found = await look(gateway, job.id)
    assert (found["status"], found["attempts"], found["error"]) == ("failed", [ATTEMPT] * 10, error)


async def test_other_jobs_are_no_webhooks(gateway: Running) -> None:
    """A question's id is not known here, alive or ended; nor is what is no id at all."""
    payload = flows.QueryPayload(query="why?")
    jobs = [
        flows.new_job("query", payload, job_id=new_id(), now_ms=gateway.front.clock.now_ms(), lifetime_s=60)
        for _ in range(2)
    ]
    for job in jobs:
        await gateway.front.submit(job)
    gateway.front.finish(jobs[1].id)
    for name in (jobs[0].id, jobs[1].id, "unknown", "no%20id", "x" * 200):
        for reply in (await gateway.http.get(f"/webhook/{name}"), await gateway.http.post(f"/webhook/{name}/replay")):
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "webhook_not_found")


async def test_another_tenants_webhook_is_not_found(start: Start) -> None:
    """Alive, ended, to look at and to replay."""
    gateway = await start(api_keys=("acme:one", "other:two"))
    mine, theirs = {"authorization": "Bearer one"}, {"authorization": "Bearer two"}
    alive, ended = await accept(gateway, "acme"), await accept(gateway, "acme")
    gateway.front.finish(ended.id, result=told(attempts=[]))
    for job in (alive, ended):
        assert (await gateway.http.get(f"/webhook/{job.id}", headers=mine)).status_code == 200
        assert (await gateway.http.get(f"/webhook/{job.id}", headers=theirs)).status_code == 404
        assert (await gateway.http.post(f"/webhook/{job.id}/replay", headers=theirs)).status_code == 404


async def test_a_replay_is_a_new_job_with_the_old_news(gateway: Running) -> None:
    """Same webhook id and same time of the event, so a receiver that had it knows it."""
    job = await accept(gateway)
    gateway.front.finish(job.id, status="failed", result=told(at_ms=7, attempts=[ATTEMPT]), error=None)
    reply = await gateway.http.post(f"/webhook/{job.id}/replay")
    assert reply.status_code == 202
    WebhookReplayed.model_validate_json(reply.content)
    new = gateway.front.jobs[reply.json()["id"]].job
    assert reply.json() == {"id": new.id, "retry_of": job.id}
    assert (new.flow, new.route, new.retry_of, new.state) == ("webhook", ["webhook"], job.id, {})
    assert new.payload == told(at_ms=7)
    assert (await look(gateway, new.id))["retry_of"] == job.id


async def test_a_replay_honours_its_idempotency_key(gateway: Running) -> None:
    """A click made twice is one replay."""
    job = await accept(gateway)
    gateway.front.finish(job.id, result=told(attempts=[]))
    replies = [
        await gateway.http.post(f"/webhook/{job.id}/replay", headers={"idempotency-key": "click"}) for _ in range(2)
    ]
    assert replies[0].json() == replies[1].json()
    assert len(gateway.front.jobs) == 2


async def test_what_is_on_its_way_is_not_replayed(gateway: Running) -> None:
    """Two jobs would tell the same news side by side."""
    job = await accept(gateway)
    reply = await gateway.http.post(f"/webhook/{job.id}/replay")
    assert (reply.status_code, reply.json()["error"]["code"]) == (409, "webhook_pending")
    assert len(gateway.front.jobs) == 1


class Remembered:
    """A history of one webhook."""

    def __init__(self, row: Json | None) -> None:
        self.row = row
        self.asked: list[tuple[str, str]] = []

    async def webhook(self, tenant: str, webhook_id: str) -> Json | None:
        self.asked.append((tenant, webhook_id))
        return self.row


async def test_history_knows_what_redis_has_forgotten(front: Front, settings: Settings, link: Link) -> None:
    """What was asked for and how it ended; and it can be replayed from there."""
    row = told(created_ms=7, status="failed", result=told(attempts=[ATTEMPT]), error=None, attempts=10)
    history = Remembered(row)
    transport = httpx.ASGITransport(create_app(settings, front, cast("Remembering", history)))
    async with httpx.AsyncClient(base_url="http://127.0.0.1", transport=transport) as http:
        found = (await http.get("/webhook/w1")).json()
        assert (found["status"], found["url"], found["attempts"]) == ("failed", URL, [ATTEMPT])
        reply = await http.post("/webhook/w1/replay")
        assert reply.status_code == 202
        standing = await front.standing(reply.json()["id"], "default")
        assert standing is not None
        assert (standing.job.payload, standing.job.retry_of) == (told(at_ms=7), "w1")
        history.row = None
        assert (await http.get("/webhook/w2")).status_code == 404
    assert history.asked[-1] == ("default", "w2")


async def test_news_of_a_message_from_outside_is_told_anew_from_history(
    front: Front, settings: Settings, records: Records
) -> None:
    """What the message says is read where it is kept; where that is gone there is nothing to tell."""
    message = {
        "type": "sms",
        "provider": "twilio",
        "provider_id": "SM7",
        "sender": "+1",
        "recipient": "+2",
        "body": "Hi",
    }
    await records.apply([Event("incoming", "m1", "default", 0, 1, message)])
    transport = httpx.ASGITransport(create_app(settings, front, records))
    async with httpx.AsyncClient(base_url="http://127.0.0.1", transport=transport) as http:
        for number, known in enumerate(("m1", "m2")):
            old = told(event="message.received", message_id=known) | {"batch_id": None}
            row = Event("webhook", f"w{number}", "default", 10, 1, {"status": "failed", "result": old})
            await records.apply([Event("webhook", f"w{number}", "default", 0, 1, old), row])
            found = await http.get(f"/webhook/w{number}")
            assert (found.status_code, found.json()["event"]) == (200, "message.received")
        reply = await http.post("/webhook/w0/replay")
        assert (await http.post("/webhook/w1/replay")).status_code == 404
    standing = await front.standing(reply.json()["id"], "default")
    assert standing is not None
    assert standing.job.payload["data"] == {
        "message_id": "m1", "from": "+1", "to": "+2", "type": "sms", "subject": None, "body": "Hi", "media": None,
        "provider": "twilio", "provider_id": "SM7",
    }  # fmt: skip


async def test_replay_names_what_it_repeats_wherever_it_is_read(
    link: Link, front: Front, settings: Settings, records: Records
) -> None:
    """While it lives, when it has ended, and from history."""
    settings = changed(settings, webhook={"allow_private": True})
    await link.call("SET", keys.BATCH_RESULTS + "b1", orjson.dumps({"results": []}), "PX", 60_000)
    transport = httpx.ASGITransport(create_app(settings, front, records))
    async with (
        receiving([answer(200)]) as receiver,
        httpx.AsyncClient(base_url="http://127.0.0.1", transport=transport) as http,
    ):
        old = told(created_ms=7, url=receiver.url)
        await records.apply([Event("webhook", "w1", "default", 0, 1, old), Event("webhook", "w1", "default", 10, 1, {
            "status": "failed", "result": old,
        })])  # fmt: skip
        new = (await http.post("/webhook/w1/replay")).json()["id"]
        assert (await http.get(f"/webhook/{new}")).json()["retry_of"] == "w1"
        async with working(settings, [build(settings)]):
            await wait_until(lambda: link.call("EXISTS", keys.COMPLETION + new))
        found = (await http.get(f"/webhook/{new}")).json()
        assert (found["status"], found["retry_of"]) == ("completed", "w1")
        await record(link, records)
        await link.call("DEL", keys.COMPLETION + new)
        again = (await http.get(f"/webhook/{new}")).json()
        assert again == found


async def test_webhook_that_redis_has_lost_may_be_replayed(front: Front, settings: Settings, link: Link) -> None:
    """History takes it for pending, and there is no outcome that it could still hear of."""
    history = Remembered(told(created_ms=7, status="pending"))
    transport = httpx.ASGITransport(create_app(settings, front, cast("Remembering", history)))
    async with httpx.AsyncClient(base_url="http://127.0.0.1", transport=transport) as http:
        old = await link.call("XADD", keys.EVENTS, "1-1", "kind", "webhook")  # its outcome, perhaps
        assert (await http.get("/webhook/w1")).json()["status"] == "pending"
        assert (await http.post("/webhook/w1/replay")).status_code == 409
        await link.call("XDEL", keys.EVENTS, old)
        found = (await http.get("/webhook/w1")).json()
        assert (found["status"], found["error"]["code"]) == ("failed", "lost")
        assert (await http.post("/webhook/w1/replay")).status_code == 202


async def test_it_is_told_as_it_stands_in_redis(
    link: Link, front: Front, settings: Settings, on_redis: httpx.AsyncClient
) -> None:
    """From the first attempt to the outcome, over the real pipeline."""
    settings = changed(settings, webhook={"allow_private": True})
    await link.call("SET", keys.BATCH_RESULTS + "b1", orjson.dumps({"results": []}), "PX", 60_000)
    async with receiving([answer(503, "retry-after: 60")]) as receiver, working(settings, [build(settings)]):
        payload = flows.WebhookPayload.model_validate(told(url=receiver.url))
        job = flows.new_job("webhook", payload, job_id=new_id(), now_ms=front.clock.now_ms(), lifetime_s=300)
        await front.submit(job, wait=False)
        await wait_until(lambda: link.call("ZSCORE", keys.DELAYED, job.id))
        waiting = WebhookStatus.model_validate_json((await on_redis.get(f"/webhook/{job.id}")).content)
        assert (waiting.status, [one.status for one in waiting.attempts]) == ("pending", [503])
        assert waiting.next_attempt_at is not None
        assert waiting.next_attempt_at.timestamp() * 1000 >= waiting.attempts[0].at_ms + 60_000
        assert (await on_redis.post(f"/jobs/{job.id}/cancel")).json()["status"] == "cancelled"
        ended = WebhookStatus.model_validate_json((await on_redis.get(f"/webhook/{job.id}")).content)
        assert (ended.status, ended.url, len(ended.attempts)) == ("cancelled", receiver.url, 1)


def a_call(settings: Settings) -> Call:
    scope: Any = {"headers": [], "type": "http"}
    return Call(scope, None, Gateway(settings, None, None))  # type: ignore[arg-type]  # it asks for the settings only


def test_a_url_is_looked_at_when_it_is_given() -> None:
    """422 with the path of the field and the reason; nobody is called."""
    check_url(a_call(Settings()), URL, param="webhook_url")
    with pytest.raises(Problem) as caught:
        check_url(a_call(Settings()), "http://127.1/", param="webhook_url")
    assert (caught.value.status, caught.value.param) == (422, "webhook_url")
    assert "four decimal numbers" in caught.value.message
    private = changed(Settings(), webhook={"allow_private": True})
    check_url(a_call(private), "http://localhost:8080/", param="webhook_url")


def test_one_private_url_may_be_allowed_and_no_other() -> None:
    """Where `penstock verify` listens; without a setting the empty text is no such address."""
    own = changed(Settings(), webhook={"trial_url": "http://127.0.0.1:8004/secret"})
    check_url(a_call(own), "http://127.0.0.1:8004/secret", param="webhook_url")
    for other in ("http://127.0.0.1:8004/", "http://127.0.0.1:8004/secret2", "http://127.0.0.1:8005/secret", ""):
        with pytest.raises(Problem):
            check_url(a_call(own), other, param="webhook_url")
    with pytest.raises(Problem):
        check_url(a_call(Settings()), "", param="webhook_url")


async def test_a_completion_without_a_story_is_looked_up_in_history(gateway: Running) -> None:
    """An older version wrote none, say: then it is history that knows."""
    job = await accept(gateway)
    gateway.front.jobs[job.id].completion = Completion(job.id, "cancelled")
    assert (await gateway.http.get(f"/webhook/{job.id}")).status_code == 404
