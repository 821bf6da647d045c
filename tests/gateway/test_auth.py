"""Who may ask, and whose the jobs are."""

from __future__ import annotations

import httpx
import pytest

from tests.gateway.conftest import Running, Start
from tests.gateway.fake import completed

KEYS = ("alice:key-of-alice", "bob:key-of-bob", "bob:newer-key-of-bob")


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
async def guarded(start: Start) -> Running:
    """A gateway with two tenants."""
    return await start(api_keys=KEYS)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_api_key"),
        ({"authorization": "key-of-alice"}, "missing_api_key"),
        ({"authorization": "Basic key-of-alice"}, "missing_api_key"),
        ({"authorization": "Bearer"}, "missing_api_key"),
        ({"authorization": "Bearer key-of-alic"}, "invalid_api_key"),
        ({"authorization": "Bearer alice:key-of-alice"}, "invalid_api_key"),
    ],
)
async def test_a_stranger_is_refused(guarded: Running, headers: dict[str, str], code: str) -> None:
    """401 with a code and a challenge, and no job was made."""
    reply = await guarded.http.post("/query", json={"query": "?"}, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (401, code)
    assert reply.headers["www-authenticate"].startswith("Bearer")
    assert guarded.front.jobs == {}


@pytest.mark.parametrize(
    ("key", "tenant"), [("key-of-alice", "alice"), ("key-of-bob", "bob"), ("newer-key-of-bob", "bob")]
)
async def test_the_name_of_a_key_is_its_tenant(guarded: Running, key: str, tenant: str) -> None:
    """Also where one name has two keys, as while a key is changed; the scheme's case does not matter."""
    guarded.front.answer = completed
    headers = {"authorization": f"bearer {key}"}
    assert (await guarded.http.post("/query", json={"query": "?"}, headers=headers)).status_code == 200
    assert [live.job.tenant for live in guarded.front.jobs.values()] == [tenant]


async def test_without_keys_everybody_is_the_default_tenant(gateway: Running) -> None:
    """A key that was sent all the same changes nothing."""
    gateway.front.answer = completed
    assert (await gateway.http.post("/query", json={"query": "?"}, headers=_bearer("any"))).status_code == 200
    assert [live.job.tenant for live in gateway.front.jobs.values()] == ["default"]


async def test_another_tenants_job_is_404_on_every_route(guarded: Running) -> None:
    """Seeing and cancelling are its owner's; to others it is like a job that never was."""
    alice, bob = _bearer("key-of-alice"), _bearer("key-of-bob")
    body = {"query": "?", "background": True}
    job_id = (await guarded.http.post("/query", json=body, headers=alice)).json()["job_id"]

    async def seen_by(headers: dict[str, str]) -> list[httpx.Response]:
        return [
            await guarded.http.get(f"/query/{job_id}", headers=headers),
            await guarded.http.get(f"/jobs/{job_id}", headers=headers),
            await guarded.http.post(f"/query/{job_id}/cancel", headers=headers),
            await guarded.http.post(f"/jobs/{job_id}/cancel", headers=headers),
        ]

    assert [reply.status_code for reply in await seen_by(bob)] == [404] * 4
    many = await guarded.http.get("/jobs", params={"ids": job_id}, headers=bob)
    assert many.json() == {"jobs": {job_id: None}}
    assert guarded.front.cancels == []
    assert [reply.status_code for reply in await seen_by(alice)] == [200, 200, 200, 409]


async def test_a_key_has_so_many_jobs_in_flight_and_no_more(start: Start) -> None:
    """The limit is each key's own: 429 for one caller leaves the other alone."""
    gateway = await start(api_keys=KEYS, max_in_flight_per_key=2)
    body = {"query": "?", "background": True}
    for _ in range(2):
        assert (await gateway.http.post("/query", json=body, headers=_bearer("key-of-alice"))).status_code == 202
    refused = await gateway.http.post("/query", json=body, headers=_bearer("key-of-alice"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_in_flight")
    assert refused.headers["retry-after"] == "3"
    assert (await gateway.http.post("/query", json=body, headers=_bearer("key-of-bob"))).status_code == 202


async def test_health_needs_no_key(guarded: Running) -> None:
    """Probes and scrapers come without one."""
    for path in ("/livez", "/readyz", "/healthz", "/metrics", "/sd/targets", "/openapi.json", "/docs"):
        assert (await guarded.http.get(path)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site", "origin": "https://evil.example"},
        {"sec-fetch-site": "same-site"},
    ],
)
async def test_a_page_of_another_site_changes_nothing(gateway: Running, headers: dict[str, str]) -> None:
    """A browser on the same machine reaches a loopback gateway; what it sends for strangers is refused."""
    content = {"id": "a", "text": "poison"}
    reply = await gateway.http.post("/documents", json=content, headers=headers | {"content-type": "text/plain"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "cross_site")
    assert gateway.front.jobs == {}


async def test_a_page_of_our_own_may_ask(gateway: Running) -> None:
    """Same origin by either of the two signs that browsers give."""
    gateway.front.answer = completed
    own = str(gateway.http.base_url)
    for headers in ({"origin": own}, {"sec-fetch-site": "same-origin", "origin": own}, {"sec-fetch-site": "none"}):
        reply = await gateway.http.post("/query", json={"query": "?"}, headers=headers)
        assert reply.status_code == 200
