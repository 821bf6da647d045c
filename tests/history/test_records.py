"""What the history keeps of events, whatever order they come in, and how it is read; on both databases."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.errors import HistoryUnavailable, MalformedCursor, MalformedEntry, Reject
from pipeline.job import Completion, new_id
from pipeline.records import KINDS, METADATA, Event, Records
from tests.conftest import wait_until

QUESTION = {"batch_id": "b1", "queue_id": "q1", "position": 0, "prompt": "why?", "created_ms": 1_000}


def asked(message_id: str, tenant: str = "default", **data: Any) -> Event:
    return Event("message", message_id, tenant, 0, 1_000, QUESTION | data)


def ended(message_id: str, tenant: str = "default", **fields: Any) -> Event:
    values: dict[str, Any] = {"result": {"answer": "so"}, "worker": "w1", "finished_us": 5_000_000}
    completion = Completion(message_id, "completed", tenant, **(values | fields))
    return Event("message", message_id, tenant, 10, 5_000, orjson.loads(completion.encode()))


async def everything(records: Records) -> dict[str, list[tuple[Any, ...]]]:
    """Return all rows of all tables, in the order of their keys."""
    found = {}
    async with records.engine.connect() as connection:
        for name, table in METADATA.tables.items():
            rows = await connection.execute(sa.select(table).order_by(*table.primary_key.columns))
            found[name] = [tuple(row) for row in rows]
    return found


# --- writing ------------------------------------------------------------------------------------


async def test_a_message_is_remembered_with_its_outcome(records: Records) -> None:
    """One row per message, its values as the HTTP answers name them."""
    await records.apply([asked("m1", system_prompt="be brief", retrieve=True, retry_of="m0", schedule_at_ms=900)])
    assert await records.message("default", "m1") == {
        "message_id": "m1", "batch_id": "b1", "queue_id": "q1", "position": 0, "prompt": "why?",
        "system_prompt": "be brief", "model": None, "retrieve": True, "retry_of": "m0", "schedule_at_ms": 900,
        "created_ms": 1_000, "status": "pending", "result": None, "error": None, "worker": None, "replica": None,
        "attempts": None, "timings_ms": None, "finished_ms": None,
    }  # fmt: skip
    await records.apply([ended("m1", replica="http://r", attempts=2, timings_ms={"llm": 1.5})])
    after = await records.message("default", "m1")
    assert after is not None
    assert (after["prompt"], after["status"], after["result"]) == ("why?", "completed", {"answer": "so"})
    assert (after["replica"], after["attempts"], after["timings_ms"]) == ("http://r", 2, {"llm": 1.5})
    assert after["finished_ms"] == 5_000


async def test_other_kinds_are_remembered(records: Records) -> None:
    """Batches, webhooks, queues and API keys."""
    batch = {"queue_id": "q1", "request_count": 3, "created_ms": 7, "webhook_url": "https://x", "webhook_event": "e"}
    closed = {"status": "completed_with_errors", "response_count": 3, "failed_count": 1, "closed_ms": 9}
    payload = {"url": "https://x", "event": "batch.completed", "webhook_id": "msg_1", "queue": "q1", "batch_id": "b1"}
    outcome = orjson.loads(
        Completion("j1", "failed", error={"type": "failed", "code": "gone", "message": "m"}).encode()
    )
    await records.apply(
        [
            Event("batch", "b1", "default", 10, 9, closed),
            Event("batch", "b1", "default", 0, 7, batch),
            Event("webhook", "j1", "default", 0, 11, payload),
            Event("webhook", "j1", "default", 10, 12, outcome),
            Event("queue", "q1", "default", 2, 20, {"model": "new"}),
            Event("queue", "q1", "default", 1, 10, {"model": "old"}),
            Event("key", "k1", "default", 0, 1, {"digest": "d", "created_ms": 1}),
            Event("key", "k1", "default", 10, 2, {"revoked_ms": 2}),
        ]
    )
    assert await records.batch("default", "b1") == {"batch_id": "b1"} | batch | closed
    for name in ("j1", "msg_1"):
        webhook = await records.webhook("default", name)
        assert webhook is not None
        assert {field: webhook[field] for field in payload} == payload
        assert (webhook["status"], webhook["error"]["code"], webhook["created_ms"]) == ("failed", "gone", 11)
    rows = await everything(records)
    assert rows["queues"] == [("default", "q1", 2, {"model": "new"}, 20)]
    assert rows["api_keys"] == [("default", "k1", 10, "d", 1, 2)]


def told(chat: str, rank: int, *texts: str, tenant: str = "default") -> Event:
    """What a chat's script tells: the chat, and in it the turns."""
    rows = [
        [
            f"{chat}/{rank + number}",
            {"chat_id": chat, "seq": rank + number, "role": "user", "text": text, "at_ms": 5, "is_processed": True},
        ]
        for number, text in enumerate(texts)
    ]
    return Event("chat", chat, tenant, rank, rank, {"epoch": 1, "rows": rows})


async def test_a_chats_event_brings_its_turns(records: Records) -> None:
    """Written together, read in order and page by page; another chat's, and another tenant's, are not seen."""
    await records.apply([told("c", 20, "three"), told("c", 10, "one", "two"), told("d", 15, "other")])
    await records.apply([told("c", 10, "one", "two"), told("c", 12, "of acme", tenant="acme")])
    rows, after = await records.chat_turns("default", "c", limit=2)
    assert ([row["text"] for row in rows], after) == (["one", "two"], 11)
    rows, after = await records.chat_turns("default", "c", after=11, limit=2)
    assert ([row["text"] for row in rows], after) == (["three"], None)
    assert rows[0]["is_processed"] is True
    everybody = await everything(records)
    assert ("default", "c", 20, 1, 20) in everybody["chats"]


@pytest.mark.parametrize("rows", [5, [5], [["c/1"]], [["c/1", {"at_ms": "soon"}]], [["c/1", []]]])
def test_a_chats_event_with_turns_that_cannot_be_written_is_malformed(rows: object) -> None:
    """It is known before the database sees it, so that no half of it is written."""
    event = Event("chat", "c", "default", 1, 1, {"epoch": 1, "rows": rows})
    fields = [part.encode() for pair in event.fields().items() for part in pair]
    with pytest.raises(MalformedEntry):
        Event.decode(fields)


STORIES: list[list[Event]] = [
    [asked("m"), ended("m")],
    [asked("m", "other", prompt="mine"), ended("m", "other", attempts=3)],
    [
        Event("batch", "b", "default", 0, 1, {"queue_id": "q", "request_count": 1, "created_ms": 1}),
        Event("batch", "b", "default", 5, 2, {"status": "processing", "response_count": 0}),
        Event("batch", "b", "default", 10, 3, {"status": "completed", "response_count": 1, "closed_ms": 3}),
    ],
    [Event("queue", "q", "default", rank, rank, {"model": str(rank)}) for rank in range(1, 4)],
    [told("c", 10, "one", "two"), told("c", 20, "three")],
    [
        Event("webhook", "w", "default", 0, 1, {"url": "u", "webhook_id": "msg"}),
        Event("webhook", "w", "default", 10, 2, {"status": "completed", "attempts": 2, "finished_us": 2_000}),
    ],
    [
        Event("key", "k", "default", 0, 1, {"digest": "d", "created_ms": 1}),
        Event("key", "k", "default", 10, 2, {"revoked_ms": 2}),
    ],
]
EVENTS = [event for story in STORIES for event in story]


def of_run(event: Event, run: str) -> Event:
    """Return the event as told of a record of this run's own."""
    return Event(event.kind, f"{event.id}-{run}", event.tenant, event.rank, event.at_ms, event.data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    order=st.lists(st.integers(0, len(EVENTS) - 1), max_size=30).flatmap(
        lambda extra: st.permutations([*range(len(EVENTS)), *extra])
    ),
    cuts=st.sets(st.integers(0, 40), max_size=6),
)
@example(order=list(reversed(range(len(EVENTS)))), cuts=set())
async def test_any_order_and_repetition_of_events_gives_the_same_rows(
    records: Records, order: Sequence[int], cuts: set[int]
) -> None:
    """Also cut into transactions anywhere: the property that lets any number of recorders write, as often as needed."""
    wanted, found = new_id(), new_id()
    await records.apply([of_run(event, wanted) for event in EVENTS])
    bounds = [0, *sorted(cut for cut in cuts if cut < len(order)), len(order)]
    for first, last in pairwise(bounds):
        if first < last:
            await records.apply([of_run(EVENTS[number], found) for number in order[first:last]])
    rows = await everything(records)

    def of(run: str) -> list[tuple[Any, ...]]:
        return [(row[1].removesuffix(f"-{run}"), *row) for rows_of in rows.values() for row in rows_of if run in row[1]]

    strip = [(name, row[0], *row[2:]) for name, *row in of(wanted)]
    assert len(strip) == len(STORIES)
    assert [(name, row[0], *row[2:]) for name, *row in of(found)] == strip


async def test_recorders_that_write_the_same_at_once_do_not_block_each_other(records: Records, url: str) -> None:
    """Each has the same events in an order of its own; rows are locked in one order."""
    others = [Records.open(url) for _ in range(4)]
    events = [event for number in range(100) for event in (asked(f"m{number}"), ended(f"m{number}"))]

    async def write(one: Records, seed: int) -> None:
        mine = list(events)
        Random(seed).shuffle(mine)
        for first in range(0, len(mine), 50):
            await one.apply(mine[first : first + 50])

    await asyncio.gather(*(write(one, seed) for seed, one in enumerate(others)))
    rows, _ = await records.messages("default", status="completed", limit=1_000)
    assert len(rows) == 100
    assert all(row["prompt"] == "why?" for row in rows)
    await asyncio.gather(*(one.close() for one in others))


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        ({"kind": "sonnet"}, "unknown_kind"),
        ({"rank": "high"}, "not_an_event"),
        ({"data": "{"}, "not_an_event"),
        ({"data": "[]"}, "not_an_event"),
        ({"data": '{"prompt": 7}'}, "unfit_value"),
        ({"data": '{"created_ms": 9223372036854775808}'}, "unfit_value"),
        ({"data": '{"created_ms": true}'}, "unfit_value"),
        ({"data": '{"retrieve": "yes"}'}, "unfit_value"),
        ({"data": '{"position": 1.5}'}, "unfit_value"),
        ({"rank": "9223372036854775808"}, "unfit_value"),
        ({"rows": "record:rows:x"}, "not_an_event"),
        ({"tenant": None}, "missing_field"),
    ],
)
def test_what_cannot_be_written_is_told_from_what_can(entry: dict[str, str | None], code: str) -> None:
    """Before the database sees it, and the same for both."""
    good = {"kind": "message", "id": "m1", "tenant": "default", "rank": "0", "at_ms": "1", "data": "{}"}
    assert Event.decode(flat(good)).row()["status"] == "pending"
    with pytest.raises(MalformedEntry) as caught:
        Event.decode(flat({name: value for name, value in (good | entry).items() if value is not None}))
    assert caught.value.code == code


def flat(fields: dict[str, str]) -> list[bytes]:
    return [part.encode() for pair in fields.items() for part in pair]


def test_an_event_is_what_its_fields_say() -> None:
    """What a dead letter keeps can be put back."""
    event = Event("batch", "b1", "t", 0, 5, {"queue_id": "q"}, rows="record:rows:b1")
    assert Event.decode(flat(event.fields())) == event


async def test_texts_with_nul_are_kept_without_it(records: Records) -> None:
    """JSON may carry one, PostgreSQL keeps none: it becomes the sign for what cannot be shown."""
    await records.apply([asked("m1", prompt="a\0b"), ended("m1", result={"answer": ["x\0"]})])
    row = await records.message("default", "m1")
    assert row is not None
    assert (row["prompt"], row["result"]) == ("a\ufffdb", {"answer": ["x\ufffd"]})


async def test_what_the_database_refuses_is_told_from_its_absence(records: Records, url: str) -> None:
    """Nothing of a refused transaction stays; a database without tables, or none at all, is no fault of the events."""
    async with records.engine.begin() as connection:
        if url.startswith("sqlite"):
            refuse = "CREATE TRIGGER no BEFORE INSERT ON batches BEGIN SELECT RAISE(ABORT, 'no batch'); END"
        else:
            refuse = "ALTER TABLE batches ADD CONSTRAINT no CHECK (batch_id <> 'b1')"
        await connection.exec_driver_sql(refuse)
    with pytest.raises(Reject, match="no"):
        await records.apply([asked("m1"), Event("batch", "b1", "default", 0, 1, {})])
    assert await records.message("default", "m1") is None
    async with records.engine.begin() as connection:
        await connection.exec_driver_sql("DROP TABLE batches")
    with pytest.raises(HistoryUnavailable, match="penstock db upgrade"):
        await records.batch("default", "b1")
    with pytest.raises(HistoryUnavailable, match="penstock db upgrade"):
        await records.apply([Event("batch", "b1", "default", 0, 1, {})])


async def test_a_database_that_does_not_answer_is_away(records: Records, url: str) -> None:
    """A lock that somebody holds is waited for no longer than the setting says; afterwards all goes on."""
    impatient = Records.open(url, timeout_s=0.3)
    hold = "BEGIN IMMEDIATE" if url.startswith("sqlite") else "LOCK TABLE messages IN ACCESS EXCLUSIVE MODE"
    async with records.engine.begin() as connection:
        await connection.exec_driver_sql(hold)
        with pytest.raises(HistoryUnavailable):
            await impatient.apply([asked("m1")])
    await impatient.apply([asked("m1")])
    assert await records.message("default", "m1")
    await impatient.close()


@pytest.mark.parametrize("url", ["postgresql://me:secret@127.0.0.1:1/history", "sqlite:////proc/none/history.db"])
async def test_no_database_is_said_without_its_password(url: str) -> None:
    """Whoever reads or writes hears that it is away."""
    records = Records.open(url)
    assert "secret" not in repr(records)
    with pytest.raises(HistoryUnavailable) as reading:
        await records.message("default", "m1")
    with pytest.raises(HistoryUnavailable) as writing:
        await records.apply([asked("m1")])
    assert "secret" not in f"{reading.value} {writing.value}"
    await records.close()


async def test_what_one_tenant_forgets_is_gone_and_nothing_else(records: Records) -> None:
    """A batch goes with its messages and its webhooks, a chat with its turns, a delivery; others' stay."""
    told = {"webhook_id": "w", "batch_id": "b1", "url": "https://example.com/hook", "event": "batch.completed"}
    turn = {"seq": 1, "role": "user", "text": "hello", "at_ms": 1_000}

    def all_of(tenant: str, batch_id: str, chat_id: str) -> list[Event]:
        rows = [[f"{tenant}{chat_id}", turn | {"chat_id": chat_id}]]
        return [
            asked(f"m-{tenant}-{batch_id}", tenant, batch_id=batch_id),
            Event("batch", batch_id, tenant, 0, 1_000, {"queue_id": "q1", "request_count": 1, "created_ms": 1_000}),
            Event("webhook", f"msg_{batch_id}", tenant, 0, 1_000, told | {"batch_id": batch_id}),
            Event("chat", chat_id, tenant, 1, 1_000, {"epoch": 1, "rows": rows}),
            Event("delivery", f"d{batch_id}", tenant, 0, 1_000, {"type": "sms", "status": "pending"}),
        ]

    others = [*all_of("ann", "b2", "c2"), *all_of("ben", "b1", "c1")]
    await records.apply(others)
    before = await everything(records)
    await records.apply(all_of("ann", "b1", "c1"))
    assert await records.forget("ann", batches=["b1", "none"], chats=["c1"], deliveries=["db1"]) == 6
    assert await everything(records) == before
    assert await records.forget("ann", batches=["b1"], chats=["c1"]) == 0


# --- reading ------------------------------------------------------------------------------------


async def pages(records: Records, limit: int, **wanted: Any) -> list[list[str]]:
    """Return the ids of all pages of a list of messages."""
    found: list[list[str]] = []
    after = None
    while True:
        rows, after = await records.messages("default", after=after, limit=limit, **wanted)
        found.append([row["message_id"] for row in rows])
        if after is None:
            return found


async def test_lists_come_in_pages_the_newest_first(records: Records) -> None:
    """Each message once, those of one millisecond too; what is new meanwhile does not shift the pages."""
    await records.apply([asked(f"m{number}", created_ms=number // 2) for number in range(9)])
    assert await pages(records, 4) == [["m8", "m7", "m6", "m5"], ["m4", "m3", "m2", "m1"], ["m0"]]
    assert await pages(records, 9) == [[f"m{number}" for number in reversed(range(9))]]
    rows, after = await records.messages("default", limit=4)
    await records.apply([asked("m9", created_ms=9)])
    assert [row["message_id"] for row in (await records.messages("default", after=after, limit=2))[0]] == ["m4", "m3"]
    assert len(rows) == 4


async def test_lists_are_filtered(records: Records) -> None:
    """By queue, status, batch and time, and all of them together."""
    await records.apply(
        [
            asked(f"m{n}", queue_id=f"q{n % 2}", batch_id=f"b{n // 4}", created_ms=n, position=3 - n % 4)
            for n in range(8)
        ]
        + [ended(f"m{n}") for n in (0, 1, 5)]
    )
    assert await pages(records, 3, queue="q1") == [["m7", "m5", "m3"], ["m1"]]
    assert await pages(records, 9, status="completed") == [["m5", "m1", "m0"]]
    assert await pages(records, 9, since_ms=2, until_ms=5) == [["m4", "m3", "m2"]]
    assert await pages(records, 9, queue="q1", status="completed", since_ms=2) == [["m5"]]
    assert await pages(records, 9, queue="q9") == [[]]
    # Members come in the order of their batch.
    assert await pages(records, 3, batch_id="b1") == [["m7", "m6", "m5"], ["m4"]]


async def test_batches_are_listed_alike(records: Records) -> None:
    """The newest first, filtered, in pages."""
    await records.apply(
        [Event("batch", f"b{n}", "default", 0, n, {"queue_id": f"q{n % 2}", "created_ms": n}) for n in range(5)]
    )
    rows, after = await records.batches("default", limit=3)
    assert [row["batch_id"] for row in rows] == ["b4", "b3", "b2"]
    rows, after = await records.batches("default", limit=3, after=after)
    assert ([row["batch_id"] for row in rows], after) == (["b1", "b0"], None)
    rows, _ = await records.batches("default", queue="q1", status="pending", since_ms=2)
    assert [row["batch_id"] for row in rows] == ["b3"]


async def test_lists_of_deliveries_and_reports_read_no_texts(records: Records) -> None:
    """A page of two hundred emails may hold hundreds of megabytes of them. One by one they are whole."""
    long = "x" * 1_000
    email = {"body": long, "html": long, "metadata": {"a": long}, "attachments": [{"filename": long}], "history": []}
    about = {"created_ms": 1, "user_id": "ann", "epoch": "e1", "subject": "Hello", "language": "en"}
    await records.apply([Event("delivery", "d1", "default", 0, 1, about | email)])
    await records.apply([Event("report", "r1", "default", 0, 1, about | {"inputs": {"a": long}})])
    await records.apply([Event("report", "r1", "default", 1, 2, about | {"result": {"report": {"markdown": long}}})])
    for whole, (rows, _), texts in (
        (await records.delivery("default", "d1"), await records.deliveries("default"), {*email}),
        (await records.report("default", "r1"), await records.reports("default", "ann"), {"inputs", "report"}),
    ):
        assert whole is not None
        assert all(whole[name] is not None for name in texts)
        assert rows == [{name: value for name, value in whole.items() if name not in texts}]


async def test_a_tenant_sees_its_own(records: Records) -> None:
    """Another's record is like one that never was, also where both bear one id."""
    await records.apply([asked("m1", "alice", prompt="a"), asked("m1", "bob", prompt="b"), asked("m2", "bob")])
    mine = await records.message("alice", "m1")
    assert mine is not None
    assert mine["prompt"] == "a"
    assert await records.message("alice", "m2") is None
    assert len((await records.messages("alice"))[0]) == 1
    assert await records.messages("default") == ([], None)


async def test_what_has_an_end_and_no_beginning_yet_is_not_listed(records: Records) -> None:
    """Its event is still to come; by its id it is found."""
    await records.apply([ended("m1")])
    assert await records.messages("default") == ([], None)
    assert await records.message("default", "m1")


@pytest.mark.parametrize("cursor", ["", "x", "!!!", "WzFd", "WzEsMl0", "WyJhIiwiYiJd", "WzFlOTksImIiXQ", "e30"])
async def test_a_cursor_of_another_list_is_refused(records: Records, cursor: str) -> None:
    """Whatever it is."""
    with pytest.raises(MalformedCursor):
        await records.messages("default", after=cursor)


def test_every_column_has_a_rule() -> None:
    """A column without one would never change after its row was made."""
    for kind in KINDS.values():
        for column in kind.table.columns:
            assert column.primary_key or column.info["rule"] in {"first", "latest", "earliest"}, column


async def test_closing_waits_for_the_thread_of_somebody_who_was_cancelled(tmp_path: Path) -> None:
    """SQLite waits for a lock in a thread that cannot be cancelled, and which tells the event loop when it is done."""
    file = tmp_path / "history.db"
    records = Records.open(f"sqlite:///{file}")
    await records.upgrade()
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        began: list[bool] = []
        sa.event.listen(records.engine.sync_engine, "before_cursor_execute", lambda *_: began.append(True))
        writing = asyncio.create_task(records.apply([asked("m1")]))
        await wait_until(lambda: began)
        writing.cancel()
        asyncio.get_running_loop().call_later(0.3, other.execute, "ROLLBACK")
        await records.close()
    assert not _threads_of_sqlite()
    with pytest.raises(asyncio.CancelledError):
        await writing


def _threads_of_sqlite() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "_connection_worker_thread" in thread.name]
