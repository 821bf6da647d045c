"""`Idempotency-Key`: the same request sent twice does its work once."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from pipeline.errors import Overloaded
from tests.gateway.conftest import Running, Start
from tests.gateway.fake import completed


async def _ask(gateway: Running, key: str = "k", path: str = "/query", **fields: Any) -> httpx.Response:
    return await gateway.http.post(path, json={"query": "?"} | fields, headers={"Idempotency-Key": key})


async def test_the_same_request_again_gets_the_first_answer(gateway: Running) -> None:
    """One job, the same answer, and a header that says so; order and spacing of fields do not matter."""
    gateway.front.answer = completed
    first = await _ask(gateway, top_k=1)
    again = await gateway.http.post("/query", content=b'{ "top_k": 1, "query": "?" }', headers={"Idempotency-Key": "k"})
    assert [first.status_code, again.status_code] == [200, 200]
    assert len(gateway.front.jobs) == 1
    same = {"job_id", "answer", "sources", "worker", "replica", "model", "usage"}
    assert {name: first.json()[name] for name in same} == {name: again.json()[name] for name in same}
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"


async def test_the_same_request_at_once_waits_for_the_first_answer(gateway: Running) -> None:
    """Both get the outcome of the one job."""
    both = [asyncio.create_task(_ask(gateway)) for _ in range(2)]
    job = await gateway.front.next_job()
    await gateway.front.until(lambda: gateway.front.waiters(job.id) == 2)
    gateway.front.finish(job.id)
    replies = await asyncio.gather(*both)
    assert {reply.json()["job_id"] for reply in replies} == {job.id}
    assert len(gateway.front.jobs) == 1


async def test_a_repeat_is_answered_after_the_completion_is_gone(gateway: Running) -> None:
    """The key remembers the outcome for a day; the completion key lives a minute."""
    first = asyncio.create_task(_ask(gateway))
    job = await gateway.front.next_job()
    gateway.front.finish(job.id)
    await first
    gateway.front.keep_and_forget(job.id)
    again = await _ask(gateway)
    assert (again.status_code, again.json()["job_id"]) == (200, job.id)


async def test_a_failure_is_repeated_too(gateway: Running) -> None:
    """What was accepted has its one outcome, good or bad."""
    gateway.front.answer = lambda job: completed(job, status="failed", result=None)
    assert [(await _ask(gateway)).status_code for _ in range(2)] == [502, 502]
    assert len(gateway.front.jobs) == 1


async def test_another_body_under_the_same_key_is_422(gateway: Running) -> None:
    """The key is the field at fault; nothing is done."""
    gateway.front.answer = completed
    await _ask(gateway)
    reply = await _ask(gateway, top_k=3)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (422, "idempotency_mismatch", "Idempotency-Key")
    assert len(gateway.front.jobs) == 1


async def test_a_refusal_is_not_kept(gateway: Running) -> None:
    """What was refused may be asked again under the same key."""
    gateway.front.broken = Overloaded()
    assert (await _ask(gateway)).status_code == 503
    gateway.front.broken, gateway.front.answer = None, completed
    reply = await _ask(gateway)
    assert reply.status_code == 200
    assert "idempotent-replayed" not in reply.headers


async def test_a_key_belongs_to_one_path_and_one_tenant(start: Start) -> None:
    """The same word elsewhere, or from somebody else, is another key."""
    gateway = await start(api_keys=("a:key-a", "b:key-b"))
    gateway.front.answer = completed
    for tenant in ("a", "b"):
        headers = {"Idempotency-Key": "k", "authorization": f"Bearer key-{tenant}"}
        assert (await gateway.http.post("/query", json={"query": tenant}, headers=headers)).status_code == 200
        document = {"id": "d", "text": tenant}
        assert (await gateway.http.post("/documents", json=document, headers=headers)).status_code == 202
    assert len(gateway.front.jobs) == 4


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "tab\there", "\u00e9"])
async def test_a_malformed_key_is_422(gateway: Running, key: str) -> None:
    """It is refused rather than cut to fit."""
    headers = [(b"idempotency-key", key.encode())]
    reply = await gateway.http.post("/query", json={"query": "?"}, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (422, "invalid_idempotency_key")
    assert gateway.front.jobs == {}
