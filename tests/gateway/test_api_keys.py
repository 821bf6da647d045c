"""Keys that were made while gateways run: taken, remembered for a moment, refused once they are revoked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import structlog

from gateway import auth
from gateway.app import create_app
from gateway.errors import Problem
from gateway.metrics import QUERY_OUTCOME
from pipeline import keys
from pipeline.api_keys import ApiKey, KeyRing, digest_of
from pipeline.connection import Link, OutOfMemory
from pipeline.errors import BrokerUnavailable, HistoryUnavailable, Reject
from pipeline.front import Front
from pipeline.records import Event, Records, Row
from pipeline.settings import GatewaySettings, RedisSettings, Settings
from tests.conftest import wait_until
from tests.gateway.conftest import Running, Start
from tests.gateway.fake import FakeFront, completed
from tests.gateway.recorded import record
from tests.rig import changed
from tests.servers import RedisServer


class Time:
    """The gateway's monotonic clock, moved by the test."""

    now_us = 10_000_000

    def __call__(self) -> int:
        return self.now_us

    def passes(self, span_s: float) -> None:
        self.now_us += int(span_s * 1e6)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(auth, "monotonic_us", clock)
    return clock


@pytest.fixture
async def guarded(start: Start, time: Time) -> Running:
    """A gateway with a key in its settings, one that holds and one that was revoked in Redis."""
    running = await start(api_keys=("carol:key-of-carol",))
    running.front.answer = completed
    running.front.knows_api_keys = True
    know(running, ApiKey("laptop", "alice", 1), "key-of-alice")
    know(running, ApiKey("old", "alice", 1, revoked_ms=2), "old-key")
    return running


def know(running: Running, record: ApiKey, key: str) -> None:
    running.front.api_keys[digest_of(key.encode())] = record.encode()


async def ask(running: Running, key: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return await running.http.post("/query", json={"query": "?"}, headers=headers)


def told(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


async def test_keys_of_both_kinds_are_taken(guarded: Running) -> None:
    """Each for its tenant; a stranger hears 401, whose key was revoked hears 403."""
    assert (await ask(guarded, "key-of-alice")).status_code == 200
    assert (await ask(guarded, "key-of-carol")).status_code == 200
    assert [live.job.tenant for live in guarded.front.jobs.values()] == ["alice", "carol"]
    assert told(await ask(guarded, "key-of-nobody")) == (401, "invalid_api_key")
    assert told(await ask(guarded, "old-key")) == (403, "revoked_api_key")
    assert told(await guarded.http.post("/query", json={"query": "?"})) == (401, "missing_api_key")
    assert len(guarded.front.jobs) == 2


async def test_a_key_is_looked_up_once_a_second(guarded: Running, time: Time) -> None:
    """Whatever comes meanwhile; one of the settings never."""
    for _ in range(5):
        await ask(guarded, "key-of-alice")
        await ask(guarded, "key-of-carol")
        await ask(guarded, "old-key")
    assert len(guarded.front.key_questions) == 2
    time.passes(auth.KNOWN_FOR_S + 0.01)
    await ask(guarded, "key-of-alice")
    assert len(guarded.front.key_questions) == 3


async def test_a_revoked_key_is_refused_within_a_second(guarded: Running, time: Time) -> None:
    """What is remembered of it holds no longer."""
    await ask(guarded, "key-of-alice")
    know(guarded, ApiKey("laptop", "alice", 1, revoked_ms=2), "key-of-alice")
    time.passes(auth.KNOWN_FOR_S - 0.01)
    assert (await ask(guarded, "key-of-alice")).status_code == 200
    time.passes(0.02)
    assert told(await ask(guarded, "key-of-alice")) == (403, "revoked_api_key")


async def test_a_key_made_a_moment_ago_is_taken_at_once(guarded: Running) -> None:
    """That it was not known is not remembered."""
    assert (await ask(guarded, "newest")).status_code == 401
    know(guarded, ApiKey("new", "bob", 1), "newest")
    assert (await ask(guarded, "newest")).status_code == 200


async def test_without_redis_known_keys_go_on_for_a_moment(guarded: Running, time: Time) -> None:
    """As long as they are remembered; others, and later these, cannot be told from strangers: 503."""
    await ask(guarded, "key-of-alice")
    guarded.front.broken = BrokerUnavailable("refused")
    look = {"authorization": "Bearer key-of-alice"}
    assert told(await guarded.http.get("/jobs/x", headers=look)) == (503, "redis_unavailable")
    assert guarded.front.key_questions == [digest_of(b"key-of-alice")]  # so it is Redis that the job was asked of
    assert told(await ask(guarded, "key-of-bob")) == (503, "redis_unavailable")
    time.passes(auth.KNOWN_FOR_S + 0.01)
    assert told(await ask(guarded, "key-of-alice")) == (503, "redis_unavailable")


async def test_a_query_whose_caller_cannot_be_told_is_counted(start: Start) -> None:
    """Redis, which knows the keys, is away: that spends our budget, too."""
    running = await start(require_key=True)
    running.front.broken = BrokerUnavailable("refused")
    before = QUERY_OUTCOME["unavailable"]._value.get()
    reply = await ask(running, "x")
    assert reply.status_code == 503
    assert QUERY_OUTCOME["unavailable"]._value.get() == before + 1


async def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many keys there are."""
    monkeypatch.setattr(auth, "MOST_KNOWN", 3)
    front = FakeFront()
    callers = auth.Callers(GatewaySettings(require_key=True), front)
    for number in range(10):
        front.api_keys[digest_of(b"key-%d" % number)] = ApiKey(f"k{number}", "alice", 1).encode()
        assert await callers.tenant_of({b"authorization": b"Bearer key-%d" % number}) == "alice"
        assert len(callers._known) <= 3


async def test_a_broken_record_is_told_as_such(guarded: Running) -> None:
    """A stranger wrote there: no caller gets in, and the operator is told."""
    guarded.front.api_keys[digest_of(b"x")] = b"{}"
    assert told(await ask(guarded, "x")) == (503, "broken_key")


async def test_keys_may_be_required_before_there_is_one(start: Start) -> None:
    """As where all of them are made with `penstock keys create`."""
    running = await start(require_key=True)
    assert told(await ask(running, "any")) == (401, "invalid_api_key")


async def test_a_gateway_that_has_not_looked_yet_looks_before_it_lets_in(start: Start) -> None:
    """In its first moment it does not know whether there are keys, and without Redis it cannot."""
    running = await start()
    running.front.answer = completed
    running.front.knows_api_keys = None
    running.front.broken = BrokerUnavailable("refused")
    assert told(await running.http.post("/query", json={"query": "?"})) == (503, "redis_unavailable")
    running.front.broken = None
    know(running, ApiKey("laptop", "alice", 1), "key-of-alice")
    assert told(await running.http.post("/query", json={"query": "?"})) == (401, "missing_api_key")


async def test_the_limit_of_jobs_in_flight_is_each_keys_own(start: Start) -> None:
    """Also of keys that stand in Redis."""
    running = await start(max_in_flight_per_key=1)
    know(running, ApiKey("laptop", "alice", 1), "key-of-alice")
    running.front.knows_api_keys = True
    body, headers = {"query": "?", "background": True}, {"authorization": "Bearer key-of-alice"}
    assert (await running.http.post("/query", json=body, headers=headers)).status_code == 202
    assert told(await running.http.post("/query", json=body, headers=headers)) == (429, "too_many_in_flight")


# --- on a real Redis ----------------------------------------------------------------------------


@asynccontextmanager
async def on(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """Run a gateway on a real Redis."""
    async with Front(settings, "test") as front:
        transport = httpx.ASGITransport(create_app(settings, front))
        async with httpx.AsyncClient(base_url="http://127.0.0.1", transport=transport) as client:
            yield client


async def status(client: httpx.AsyncClient, key: str | None) -> int:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return (await client.get("/jobs/none", headers=headers)).status_code


async def test_a_key_lives_from_its_making_to_its_revoking(link: Link, settings: Settings) -> None:
    """The first one closes the gateway to strangers, and revoking the last one does not open it again."""
    ring = KeyRing(link)
    async with on(settings) as client:
        assert await status(client, None) == 404
        key = await ring.create("laptop", "alice")
        await wait_until(lambda: has(client, None, 401))
        assert await status(client, key) == 404
        await ring.revoke("laptop")
        await wait_until(lambda: has(client, key, 403))
        assert await status(client, None) == 401
    async with on(settings) as client:  # one that starts afterwards knows it, too
        assert await status(client, None) == 401


async def has(client: httpx.AsyncClient, key: str | None, wanted: int) -> bool:
    return await status(client, key) == wanted


async def lose(link: Link, records: Records) -> None:
    """Write to history what waits for it; then lose all that Redis holds."""
    await record(link, records)
    await link.call("FLUSHALL")


async def who(front: Front, key: str | None) -> str | int:
    """Return the tenant that a gateway takes the caller for, or the status it answers."""
    headers = {} if key is None else {b"authorization": f"Bearer {key}".encode()}
    try:
        return await auth.Callers(GatewaySettings(), front).tenant_of(headers)
    except Problem as problem:
        return problem.status


async def test_redis_that_lost_its_keys_opens_nothing(link: Link, front: Front) -> None:
    """A gateway that has seen a key asks for one for as long as it runs."""
    key = await KeyRing(link).create("laptop", "alice")
    assert await front.look_for_api_keys()
    await link.call("FLUSHALL")
    assert not await front.look_for_api_keys()
    assert [await who(front, one) for one in (None, "anything", key)] == [401, 401, 401]


async def test_gateway_that_starts_on_an_emptied_redis_knows_the_keys(
    link: Link, front: Front, records: Records
) -> None:
    """From history: the key that holds is taken, the revoked one refused as such, and no name may be used again."""
    ring = KeyRing(link)
    key, old = await ring.create("laptop", "alice"), await ring.create("old", "bob")
    await ring.revoke("old")
    known = await ring.list()
    await lose(link, records)
    async with auth.remembered_keys(front, records):
        assert [await who(front, one) for one in (None, key, old)] == [401, "alice", 403]
    assert await ring.list() == known
    with pytest.raises(Reject, match="already"):
        await ring.create("laptop", "bob")


async def test_keys_come_back_while_gateways_run(
    link: Link, front: Front, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often Redis loses them."""
    monkeypatch.setattr(auth, "LOOK_EVERY_S", 0.01)
    async with auth.remembered_keys(front, records):
        assert await who(front, None) == "default"
        key = await KeyRing(link).create("laptop", "alice")
        for _ in range(2):
            await wait_until(front.look_for_api_keys)
            await lose(link, records)
            await wait_until(lambda: is_taken_for(front, key, "alice"))


async def is_taken_for(front: Front, key: str, tenant: str) -> bool:
    return await who(front, key) == tenant


async def test_history_that_is_away_is_asked_again(
    link: Link, front: Front, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway starts without it, and knows its keys once it is back."""
    monkeypatch.setattr(auth, "LOOK_EVERY_S", 0.01)
    key = await KeyRing(link).create("laptop", "alice")
    await lose(link, records)
    known, questions = records.api_keys, 0

    async def away_at_first() -> list[Row]:
        nonlocal questions
        questions += 1
        if questions < 3:
            raise HistoryUnavailable("refused")
        return await known()

    monkeypatch.setattr(records, "api_keys", away_at_first)
    async with auth.remembered_keys(front, records):
        assert questions == 1
        await wait_until(lambda: is_taken_for(front, key, "alice"))
    assert questions == 3


async def test_history_that_has_never_answered_is_an_outage_only_after_a_while(
    front: Front, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a first start its tables are made beside the gateway: nobody is warned of that; of what lasts, everybody."""
    monkeypatch.setattr(auth, "LOOK_EVERY_S", 0.01)

    async def away() -> list[Row]:
        raise HistoryUnavailable("no such table: api_keys")

    monkeypatch.setattr(records, "api_keys", away)
    with structlog.testing.capture_logs() as lines:
        async with auth.remembered_keys(front, records):
            await asyncio.sleep(0.1)
            assert [line["log_level"] for line in lines] == ["info"]
            monkeypatch.setattr(auth, "NOT_YET_S", 0.0)
            await wait_until(lambda: [line["log_level"] for line in lines] == ["info", "warning"])


async def test_names_are_used_once(link: Link) -> None:
    """Whoever makes keys at the same time; what was revoked keeps its name."""
    ring = KeyRing(link)
    made = await asyncio.gather(*(ring.create("one", f"t{n}") for n in range(5)), return_exceptions=True)
    assert sum(isinstance(key, str) for key in made) == 1
    assert {error.code for error in made if isinstance(error, Reject)} == {"name_taken"}
    await ring.revoke("one")
    await ring.revoke("one")
    with pytest.raises(Reject, match="already"):
        await ring.create("one", "t")
    with pytest.raises(Reject, match="keys list"):
        await ring.revoke("two")
    for name, tenant in (("a:b", "t"), ("", "t"), ("x" * 65, "t"), ("a", "t:1")):
        with pytest.raises(Reject, match="is no name"):
            await ring.create(name, tenant)


async def test_the_history_is_told_of_keys(link: Link) -> None:
    """One event when a key is made and one when it is revoked; never the key."""
    ring = KeyRing(link)
    key = await ring.create("laptop", "alice")
    await ring.revoke("laptop")
    made, revoked = [Event.decode(fields) for _, fields in await link.call("XRANGE", keys.EVENTS, "-", "+")]
    (record,) = await ring.list()
    assert made.row() == {
        "tenant": "alice", "name": "laptop", "rank": 0, "digest": digest_of(key.encode()),
        "created_ms": record.created_ms, "revoked_ms": None,
    }  # fmt: skip
    assert revoked.row()["revoked_ms"] == record.revoked_ms
    assert key not in f"{made} {revoked}"


async def test_a_key_is_revoked_while_redis_is_full(link: Link) -> None:
    """It may be the one that fills it."""
    ring = KeyRing(link)
    await ring.create("laptop", "alice")
    await link.call("CONFIG", "SET", "maxmemory", "1")
    try:
        with pytest.raises(OutOfMemory):
            await link.call("SET", "x", "y")
        await ring.revoke("laptop")
    finally:
        await link.call("CONFIG", "SET", "maxmemory", "0")
    (record,) = await ring.list()
    assert record.revoked_ms is not None


async def test_a_key_of_a_wrong_type_is_left_alone(link: Link) -> None:
    """Nothing is written before everything is checked."""
    await link.call("SET", keys.EVENTS, "x")
    with pytest.raises(Exception, match="should be a stream"):
        await KeyRing(link).create("laptop", "alice")
    assert await link.call("EXISTS", keys.API_KEYS) == 0


async def test_many_callers_at_once_ask_redis_together(redis_server: RedisServer, link: Link) -> None:
    """A look-up is one command for all that wait."""
    ring = KeyRing(link)
    made = [await ring.create(f"k{number}", "alice") for number in range(50)]
    settings = changed(Settings(redis=RedisSettings(url=redis_server.url)), gateway={"require_key": True})
    async with Front(settings, "test") as front:
        callers = auth.Callers(GatewaySettings(require_key=True), front)
        await link.call("CONFIG", "RESETSTAT")
        headers = [{b"authorization": f"Bearer {key}".encode()} for key in made]
        assert await asyncio.gather(*(callers.tenant_of(one) for one in headers)) == ["alice"] * 50
        stats = (await link.call("INFO", "commandstats")).decode()
        (line,) = [line for line in stats.splitlines() if line.startswith("cmdstat_hmget:")]
        assert int(line.split("calls=")[1].split(",")[0]) <= 2
