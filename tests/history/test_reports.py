"""Reports in the history: who they are about, and people who are forgotten, in whatever order events come."""

from __future__ import annotations

import asyncio
from itertools import permutations
from typing import Any

import orjson
import pytest
import sqlalchemy as sa

from pipeline.errors import MalformedEntry
from pipeline.job import Completion
from pipeline.records import METADATA, Event, Records

OLD, NEW = "0" * 32, "1" * 32


def asked(report_id: str, epoch: str = OLD, at_ms: int = 1_000, user: str = "ann", tenant: str = "default") -> Event:
    about = {"user_id": user, "epoch": epoch, "created_ms": at_ms}
    data = about | {"report_type": "medical", "inputs": {"age": 44}, "language": "en", "request_id": "r1"}
    return Event("report", report_id, tenant, 0, at_ms, data)


def ended(report_id: str, epoch: str = OLD, at_ms: int = 1_000, user: str = "ann", tenant: str = "default") -> Event:
    result = {"cached": False, "hash": "f", "report": {"markdown": "# Report"}}
    completion = Completion(report_id, "completed", tenant, result=result, worker="w", finished_us=(at_ms + 500) * 1000)
    about = {"user_id": user, "epoch": epoch, "created_ms": at_ms}
    return Event("report", report_id, tenant, 10, at_ms + 500, about | orjson.loads(completion.encode()))


def erased(epoch: str = OLD, at_ms: int = 2_000, user: str = "ann", tenant: str = "default") -> Event:
    return Event("erasure", epoch, tenant, 0, at_ms, {"user_id": user, "before_ms": at_ms})


async def people(records: Records) -> list[tuple[Any, ...]]:
    async with records.engine.connect() as connection:
        rows = await connection.execute(sa.text("SELECT user_id, epoch, created_ms, updated_ms FROM users ORDER BY 1"))
        return [tuple(row) for row in rows]


async def text_of_all(records: Records) -> str:
    """Everything that stands in any table."""
    found = []
    async with records.engine.connect() as connection:
        for table in METADATA.tables.values():
            found += [tuple(row) for row in await connection.execute(sa.select(table))]
    return repr(found)


async def test_a_report_is_remembered_with_its_person(records: Records) -> None:
    """One row for the report, one for the person, whose times are those of the first and the last event."""
    await records.apply([asked("j1")])
    pending = await records.report("default", "j1")
    assert pending is not None
    assert (pending["status"], pending["report"], pending["inputs"]) == ("pending", None, {"age": 44})
    await records.apply([ended("j1"), asked("j2", at_ms=1_800)])
    done = await records.report("default", "j1")
    assert done is not None
    assert (done["status"], done["cached"], done["report"]) == ("completed", False, {"markdown": "# Report"})
    assert (done["inputs"], done["finished_ms"], done["created_ms"]) == ({"age": 44}, 1_500, 1_000)
    assert await people(records) == [("ann", OLD, 1_000, 1_800)]
    assert await records.report("other", "j1") is None


async def test_a_persons_reports_are_listed_the_newest_first(records: Records) -> None:
    """In pages; nobody else's, and no other tenant's."""
    await records.apply([asked(f"j{number}", at_ms=1_000 + number) for number in range(5)])
    await records.apply([asked("b1", user="ben"), asked("o1", tenant="other")])
    first, after = await records.reports("default", "ann", limit=3)
    second, end = await records.reports("default", "ann", after=after, limit=3)
    assert [row["report_id"] for row in first + second] == ["j4", "j3", "j2", "j1", "j0"]
    assert end is None
    assert [row["report_id"] for row in (await records.reports("other", "ann"))[0]] == ["o1"]


async def test_who_was_erased_is_nowhere_whatever_the_order(records: Records) -> None:
    """What was asked, what came of it, and the erasure: each order, one by one; who comes back is a new person."""
    for number, order in enumerate(permutations(["asked", "ended", "erased"])):
        user, epoch = f"ann{number}", f"{number:032x}"
        for what in order:
            event = {"asked": asked, "ended": ended, "erased": erased}[what]
            report = () if what == "erased" else (f"j{number}",)
            await records.apply([event(*report, epoch=epoch, user=user)])  # type: ignore[operator]
        assert await records.has_erased("default", epoch)
    assert "ann" not in await text_of_all(records)
    await records.apply(
        [asked("back", epoch=NEW, user="ann0", at_ms=3_000), ended("j0", epoch=f"{0:032x}", user="ann0")]
    )
    assert await people(records) == [("ann0", NEW, 3_000, 3_000)]
    assert not await records.has_erased("default", NEW)


async def test_an_erasure_and_what_it_erases_may_come_in_one_batch(records: Records) -> None:
    """Others of the same batch are written; another tenant's person of that name is another person."""
    events = [asked("j1"), erased(), ended("j1"), asked("j2", NEW, user="ben"), asked("j3", NEW, tenant="other")]
    await records.apply(events)
    assert [row[0] for row in await people(records)] == ["ann", "ben"]
    assert await records.report("default", "j1") is None
    assert await records.report("other", "j3") is not None


async def test_who_was_not_heard_of_for_long_is_erased_by_name(records: Records) -> None:
    """Redis knows an epoch for a week only: what was created before the erasure goes, whatever its epoch."""
    await records.apply([asked("j1"), ended("j1"), asked("j2", epoch=NEW, at_ms=2_500)])
    await records.apply([erased(epoch="f" * 32)])
    assert [row["report_id"] for row in (await records.reports("default", "ann"))[0]] == ["j2"]


async def test_recorders_at_work_at_once_do_not_miss_an_erasure(records: Records, url: str) -> None:
    """One writes a report while the other forgets its person: one after the other."""
    another = Records.open(url)
    try:
        for number in range(30):
            epoch = f"{number:032x}"
            late = [asked(f"j{number}", epoch, user=f"ann{number}"), ended(f"j{number}", epoch, user=f"ann{number}")]
            await asyncio.gather(records.apply(late), another.apply([erased(epoch, user=f"ann{number}")]))
    finally:
        await another.close()
    assert "ann" not in await text_of_all(records)


@pytest.mark.parametrize("data", [{}, {"user_id": 1, "before_ms": 1}, {"user_id": "ann", "before_ms": "now"}])
def test_an_erasure_that_names_nobody_is_malformed(data: dict[str, Any]) -> None:
    """It goes to the dead letters; the recorder goes on."""
    with pytest.raises(MalformedEntry):
        Event("erasure", OLD, "default", 0, 1, data).row()
