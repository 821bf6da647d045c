"""The recorder: what is in the stream comes to be in the database, whoever dies and whatever is away meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from structlog.testing import capture_logs

from pipeline import group_reader, keys, metrics
from pipeline.clock import Clock
from pipeline.connection import Link
from pipeline.consumer import Consumer
from pipeline.dead import DeadLetters
from pipeline.errors import Reject
from pipeline.events import GROUP, EventStream
from pipeline.overview import look
from pipeline.records import Event, Records
from pipeline.settings import Settings
from stages import recorder
from stages.recorder import Recorder
from tests.conftest import PATIENCE_S, wait_until
from tests.history.conftest import a_postgres, new_database
from tests.postgres import PostgresServer
from tests.rig import changed, letters
from tests.wire import Wire


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorder that is told to stop waits for its blocked read to end."""
    monkeypatch.setattr(group_reader, "BLOCK_MS", 20)
    monkeypatch.setattr(group_reader, "LOOK_EVERY_S", 0.02)


@pytest.fixture
def here(settings: Settings, url: str) -> Settings:
    """Settings with the history in this test's database."""
    return changed(settings, history={"url": url, "batch": 10, "auto_upgrade": True})


class Mortal(Consumer):
    """A process with a recorder, that can end as `kill -9` would end it: its lease lapses, and nobody is told."""

    task: asyncio.Task[None]

    async def crash(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        for link in (self._link, self._ticker, self._listener):
            await link.close()

    async def _leave(self) -> None:
        if not self.task.cancelling():
            await super()._leave()


@asynccontextmanager
async def recording(settings: Settings, records: Records | None = None) -> AsyncIterator[Mortal]:
    """Run a recorder; drain it at the end, unless it has crashed before."""
    if records is None:
        records = Records.open(settings.history.url, timeout_s=settings.history.timeout_s)
    process = Mortal([], settings, loops=[Recorder(settings, records)])
    process.task = asyncio.create_task(process.run())
    try:
        yield process
    finally:
        process.stop()
        await asyncio.gather(process.task, return_exceptions=True)
        if not process.task.cancelled():
            process.task.result()


def asked(number: int, **data: Any) -> Event:
    values = {"batch_id": "b1", "queue_id": "q", "position": number, "prompt": f"p{number}", "created_ms": number}
    return Event("message", f"m{number}", "default", 0, 1_000, values | data)


def ended(number: int) -> Event:
    data = {"id": f"m{number}", "status": "completed", "result": {"answer": "a"}, "attempts": 1, "finished_us": 2_000}
    return Event("message", f"m{number}", "default", 10, 2_000, data)


async def tell(link: Link, some: Iterable[Event]) -> None:
    """Append events as the scripts do."""
    for event in some:
        await link.call("XADD", keys.EVENTS, "*", *(part for pair in event.fields().items() for part in pair))


async def nothing_waits(link: Link) -> bool:
    """Say whether all events are acknowledged and gone."""
    return bool(await link.call("XLEN", keys.EVENTS) == 0)


async def statuses(settings: Settings) -> dict[str, str]:
    """Return the status of each message, by id."""
    records = Records.open(settings.history.url)
    rows, _ = await records.messages("default", limit=1_000)
    await records.close()
    return {row["message_id"]: row["status"] for row in rows}


# --- what it does -------------------------------------------------------------------------------


async def test_events_come_into_the_database_and_leave_redis(link: Link, here: Settings) -> None:
    """Acknowledged and deleted; nothing stays pending, and the recorder says how it stands."""
    await tell(link, [event for number in range(25) for event in (asked(number), ended(number))])
    async with recording(here) as process:
        await wait_until(lambda: nothing_waits(link))
        assert await statuses(here) == {f"m{number}": "completed" for number in range(25)}
        assert (await link.call("XPENDING", keys.EVENTS, GROUP))[0] == 0
        await tell(link, [asked(99)])
        await wait_until(lambda: nothing_waits(link))
        await process.renew()
        (worker,) = (await look(link)).workers
        assert (worker.consumer, worker.stages) == (process.name, {"recorder": None})
    assert (await statuses(here))["m99"] == "pending"
    assert await link.call("EXISTS", keys.WORKER + process.name) == 0


async def test_events_that_come_one_by_one_are_written_together(
    link: Link, here: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first at once; those that come soon after it in one transaction. Where many wait, nobody rests for more."""
    monkeypatch.setattr("stages.recorder.REST_S", 5.0)
    records, sizes = Records.open(here.history.url), []
    apply = records.apply

    async def count(events: Sequence[Event]) -> None:
        sizes.append(len(events))
        await apply(events)

    monkeypatch.setattr(records, "apply", count)
    async with recording(here, records):
        await tell(link, [asked(0)])
        await wait_until(lambda: nothing_waits(link))
        for number in range(1, 6):
            await tell(link, [asked(number)])
        await wait_until(lambda: nothing_waits(link))
        assert sizes == [1, 5]
        await tell(link, [asked(number) for number in range(6, 56)])
        began = time.monotonic()
        await wait_until(lambda: nothing_waits(link))
        assert time.monotonic() - began < 20.0  # five transactions: one rest, not five
        monkeypatch.setattr("stages.recorder.REST_S", 60.0)
        await tell(link, [asked(99)])
        await wait_until(lambda: nothing_waits(link))  # it rests now, and stops all the same
        began = time.monotonic()
    assert time.monotonic() - began < 30.0
    assert (await statuses(here))["m99"] == "pending"


async def test_the_rows_of_a_large_batch_are_read_from_their_list(link: Link, here: Settings) -> None:
    """In portions; the list goes with its event, and what is no row goes to the dead letters."""
    rows = [orjson.dumps([f"m{number}", asked(number).data]) for number in range(27)]
    await link.call("RPUSH", keys.ROWS + "b1", *rows, b'["m99"]', b'["m98", {"prompt": 1}]')
    batch = {"queue_id": "q", "request_count": 27, "created_ms": 1}
    await tell(link, [Event("batch", "b1", "default", 0, 1_000, batch, rows=keys.ROWS + "b1"), ended(3)])
    async with recording(here):
        await wait_until(lambda: nothing_waits(link))
    assert await link.call("EXISTS", keys.ROWS + "b1") == 0
    found = await statuses(here)
    assert found == {f"m{number}": "completed" if number == 3 else "pending" for number in range(27)}
    assert [letter["reason"] for letter in await letters(link)] == ["not_an_event", "unfit_value"]


async def test_an_event_that_cannot_be_written_is_buried_and_others_pass(link: Link, here: Settings) -> None:
    """What is wrong can be seen from outside, or only the database finds it; each goes with its reason, alone."""
    records = Records.open(here.history.url)
    await records.upgrade()
    async with records.engine.begin() as connection:
        await connection.exec_driver_sql(REFUSE[records.engine.dialect.name])
    await tell(link, [asked(number) for number in range(7)])
    await link.call("XADD", keys.EVENTS, "*", "kind", "sonnet", "id", "s1", "tenant", "t", "rank", 0, "at_ms", 1,
                    "data", "{}")  # fmt: skip
    await link.call("XADD", keys.EVENTS, "*", "what", "else")
    before = metrics.EVENTS.labels("message", "buried")._value.get()
    async with recording(here):
        await wait_until(lambda: nothing_waits(link))
        assert await statuses(here) == {f"m{number}": "pending" for number in range(7) if number != 4}
        story = {letter["job_id"]: letter for letter in await letters(link)}
        assert {name: letter["reason"] for name, letter in story.items()} == {
            "s1": "unknown_kind", None: "missing_field", "m4": "refused_by_database",
        }  # fmt: skip
        assert "p4 is refused" in story["m4"]["error"]["message"] or "no_p4" in story["m4"]["error"]["message"]
        assert metrics.EVENTS.labels("message", "buried")._value.get() == before + 1
        # Once what was wrong is mended, it is put back.
        async with records.engine.begin() as connection:
            await connection.exec_driver_sql(ALLOW[records.engine.dialect.name])
        dead = DeadLetters(link, here)
        names = {letter.job_id: letter.id for letter in await dead.list(10)}
        assert await dead.retry(names["m4"], 0) == "m4"
        await wait_until(lambda: nothing_waits(link))
        assert (await statuses(here))["m4"] == "pending"
        with pytest.raises(Reject):
            await dead.retry(names[None], 0)
    assert len(await letters(link)) == 2
    await records.close()


REFUSE = {
    "sqlite": "CREATE TRIGGER no_p4 BEFORE INSERT ON messages WHEN NEW.prompt = 'p4' "
    "BEGIN SELECT RAISE(ABORT, 'p4 is refused'); END",
    "postgresql": "ALTER TABLE messages ADD CONSTRAINT no_p4 CHECK (prompt <> 'p4')",
}
ALLOW = {"sqlite": "DROP TRIGGER no_p4", "postgresql": "ALTER TABLE messages DROP CONSTRAINT no_p4"}


async def test_an_event_deleted_by_hand_is_forgotten(link: Link, here: Settings) -> None:
    """It would stay pending for ever."""
    await tell(link, [asked(1), asked(2)])
    clock = Clock()
    stream = EventStream(here, "lost", clock)
    first, _ = await stream.take()
    await stream.close()
    await link.call("XDEL", keys.EVENTS, first.id)
    async with recording(here):
        await wait_until(lambda: nothing_waits(link))
        await wait_until(lambda: is_empty(link))
    assert await statuses(here) == {"m2": "pending"}


async def is_empty(link: Link) -> bool:
    return bool((await link.call("XPENDING", keys.EVENTS, GROUP))[0] == 0)


# --- who dies -----------------------------------------------------------------------------------


class DiesAfter(Records):
    """A database whose recorder is killed when it has committed so many transactions."""

    commits = 0
    dies_at = 2
    died: asyncio.Event

    async def apply(self, some: Sequence[Event]) -> None:
        await super().apply(some)
        self.commits += 1
        if self.commits == self.dies_at:
            self.died.set()
            await asyncio.Event().wait()


async def test_a_recorder_killed_between_commit_and_acknowledgement_leaves_no_gap(link: Link, here: Settings) -> None:
    """The next one writes the same again, which changes nothing, and goes on; the dead one leaves the group."""
    await tell(link, [event for number in range(25) for event in (asked(number), ended(number))])
    records = DiesAfter.open(here.history.url)
    records.died = asyncio.Event()
    async with recording(here, records) as first:
        await records.died.wait()
        await first.crash()
    assert (await link.call("XPENDING", keys.EVENTS, GROUP))[0] == 10
    assert await link.call("XLEN", keys.EVENTS) == 40
    async with recording(here) as second:
        await wait_until(lambda: nothing_waits(link))
        assert await statuses(here) == {f"m{number}": "completed" for number in range(25)}
        await wait_until(lambda: only_consumer(link, second.name))


async def only_consumer(link: Link, name: str) -> bool:
    rows = await link.call("XINFO", "CONSUMERS", keys.EVENTS, GROUP)
    return [row[1].decode() for row in rows] == [name]


async def test_several_recorders_share_the_work(link: Link, here: Settings) -> None:
    """None waits for another, and each event is written."""
    async with recording(here), recording(here), recording(here):
        await tell(link, [event for number in range(100) for event in (ended(number), asked(number))])
        await wait_until(lambda: nothing_waits(link))
        assert set((await statuses(here)).values()) == {"completed"}
    assert len(await statuses(here)) == 100


async def test_an_entry_whose_reply_was_lost_is_taken_up(
    link: Link, here: Settings, redis_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis may serve a blocked read to a connection that is dead; the entry is then a living recorder's own."""
    monkeypatch.setattr(group_reader, "BLOCK_MS", 500)
    async with Wire(redis_server) as wire:
        there = changed(here, redis={"url": wire.url, "reply_timeout_s": 0.2})
        async with recording(there):
            await tell(link, [asked(1)])
            await wait_until(lambda: nothing_waits(link))
            wire.kill("recorder")
            await tell(link, [asked(2)])
            await wait_until(lambda: wire.knows("recorder"))
            await wait_until(lambda: nothing_waits(link))
    assert set(await statuses(here)) == {"m1", "m2"}


async def test_a_group_that_is_gone_is_made_anew(link: Link, here: Settings) -> None:
    """From the beginning: what came meanwhile is not passed over."""
    async with recording(here):
        await tell(link, [asked(1)])
        await wait_until(lambda: nothing_waits(link))
        await link.call("DEL", keys.EVENTS)
        await tell(link, [asked(2)])
        await wait_until(lambda: nothing_waits(link))
    assert set(await statuses(here)) == {"m1", "m2"}


# --- what is away -------------------------------------------------------------------------------


async def test_while_the_database_is_away_events_wait_and_nothing_is_lost(
    link: Link, settings: Settings, postgres_of_its_own: PostgresServer
) -> None:
    """It restarts, crashes, is away for long: two lines tell of each outage, the second with its length."""
    url = await new_database(postgres_of_its_own)
    here = changed(settings, history={"url": url, "batch": 10, "auto_upgrade": True})
    outages = metrics.DATABASE_OUTAGES._value.get()
    with capture_logs() as told:
        async with recording(here) as process:
            (recorder,) = process._loops
            await tell(link, [asked(number) for number in range(20)])
            await wait_until(lambda: nothing_waits(link))
            postgres_of_its_own.stop()
            await tell(link, [asked(number) for number in range(20, 60)])
            await wait_until(lambda: recorder.not_ready is not None)
            await process.renew()
            (worker,) = (await look(link)).workers
            assert "database" in str(worker.stages["recorder"])
            assert await link.call("XLEN", keys.EVENTS) == 40
            postgres_of_its_own.start()
            await wait_until(lambda: nothing_waits(link))
            assert recorder.not_ready is None
            writing = asyncio.create_task(tell(link, [ended(number) for number in range(60)]))
            postgres_of_its_own.crash()
            postgres_of_its_own.start()
            await writing
            await wait_until(lambda: nothing_waits(link))
    assert await statuses(here) == {f"m{number}": "completed" for number in range(60)}
    assert await letters(link) == []
    lines = [line for line in told if line["event"].startswith("the database is")]
    assert [line["event"] for line in lines[:2]] == ["the database is away", "the database is back"]
    assert lines[1]["away_s"] > 0
    assert metrics.DATABASE_OUTAGES._value.get() - outages == len(lines) / 2


@pytest.fixture
def postgres_of_its_own() -> Any:
    """A server that this test may stop."""
    with a_postgres() as server:
        yield server


async def test_a_recorder_told_to_stop_while_the_database_is_away_stops(link: Link, settings: Settings) -> None:
    """What it has in hand is another's at once: its lease is given up."""
    away = changed(settings, history={"url": "postgresql://x@127.0.0.1:1/x"})
    await tell(link, [asked(1)])
    async with recording(away) as process:
        (recorder,) = process._loops
        await wait_until(lambda: "database" in str(recorder.not_ready))
    assert await link.call("XLEN", keys.EVENTS) == 1
    assert await link.call("EXISTS", keys.WORKER + process.name) == 0


async def test_tables_that_are_not_up_to_date_are_waited_for(link: Link, here: Settings) -> None:
    """Somebody runs `penstock db upgrade`; until then it says so, and buries nothing."""
    patient = changed(here, history={"auto_upgrade": False})
    await tell(link, [asked(1)])
    records = Records.open(here.history.url)
    async with recording(patient) as process:
        (recorder,) = process._loops
        await wait_until(lambda: recorder.not_ready not in {None, "starting"})
        await records.upgrade()
        await wait_until(lambda: nothing_waits(link))
    await records.close()
    assert await statuses(here) == {"m1": "pending"}
    assert await letters(link) == []


async def test_single_messages_that_come_together_are_written_without_a_rest_for_each(
    link: Link, here: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a batch of its own, whose rows are a list: one that is no full portion has nothing behind it."""
    monkeypatch.setattr(recorder, "REST_S", 2 * PATIENCE_S)
    for number in range(30):
        rows = f"{keys.ROWS}b{number}"
        await link.call("RPUSH", rows, orjson.dumps([f"m{number}", asked(number).data]))
        data = {"queue_id": "q", "request_count": 1, "created_ms": number}
        await tell(link, [Event("batch", f"b{number}", "default", 0, 1_000, data, rows)])
    async with recording(here):
        await wait_until(lambda: nothing_waits(link))
    assert len(await statuses(here)) == 30
