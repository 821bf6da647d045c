"""Entries that other programs write: adopted once, or buried at once with the reason."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from pipeline import flows, keys
from pipeline.connection import CommandRefused, Link
from pipeline.front import Front
from pipeline.job import decode, decode_foreign
from pipeline.settings import Settings
from tests.conftest import wait_until
from tests.rig import (
    FIRST,
    Gate,
    Hand,
    Scripted,
    assert_nothing_is_left,
    changed,
    complete,
    echo,
    everything,
    letters,
    outcome,
    query,
    working,
)

NAMES = ("encoder", "retriever", "llm")


@pytest.fixture
async def stages(link: Link, settings: Settings) -> AsyncIterator[dict[str, Scripted]]:
    """Workers on the whole route."""
    stages = {name: Scripted(name, echo) for name in NAMES}
    async with working(settings, list(stages.values())):
        yield stages


async def put(link: Link, stage: str, data: str | bytes) -> bytes:
    """Write an entry as any program could."""
    entry: bytes = await link.call("XADD", keys.stream(stage), "*", "data", data)
    return entry


# --- adopted --------------------------------------------------------------------------------------


async def test_plain_xadd_runs_the_query_route(link: Link, stages: dict[str, Scripted]) -> None:
    """The answer stands under the id that the sender chose."""
    await put(link, "encoder", '{"id":"a1","query":"what is a penstock?"}')
    await wait_until(lambda: outcome(link, "a1"))
    found = await outcome(link, "a1")
    assert found is not None
    assert (found.status, found.tenant, found.result) == ("completed", "default", {"answer": "what is a penstock?"})
    assert [len(stage.seen) for stage in stages.values()] == [1, 1, 1]
    await assert_nothing_is_left(link)


@pytest.mark.parametrize(
    "body", ['{"id":"a1","prompt":"hello"}', '{"id":"a1","messages":[{"role":"user","content":"hello"}],"model":"m"}']
)
async def test_prompt_or_messages_go_straight_to_the_llm_stage(
    link: Link, stages: dict[str, Scripted], body: str
) -> None:
    """Both shapes of the llm stream."""
    await put(link, "llm", body)
    await wait_until(lambda: outcome(link, "a1"))
    assert [len(stage.seen) for stage in stages.values()] == [0, 0, 1]
    assert stages["llm"].seen[0].flow == "message"


async def test_sender_may_choose_priority_and_time(link: Link, settings: Settings) -> None:
    """They stand beside the payload and are not part of it."""
    gate = Gate()
    stage = Scripted("encoder", gate)
    async with working(settings, [stage]):
        await put(link, "encoder", '{"id":"a1","query":"why?","priority":"low","timeout_s":5}')
        await wait_until(lambda: gate.waiting)
        assert await link.call("HGET", keys.LIVE + "a1", "stream") == b"job:encoder_in:low"
        (job,) = stage.seen
        assert job.payload == {"query": "why?"}
        assert 4_000 < job.deadline_ms - job.at_us / 1000 <= 5_000
        gate.open()
        await wait_until(lambda: link.call("XLEN", keys.stream("retriever", "low")))


async def test_foreign_entry_on_a_placed_stage_gets_its_replica(link: Link, settings: Settings) -> None:
    """It is adopted first and placed afterwards, like any other."""
    stage = Scripted("llm", echo, placed=True)
    async with working(changed(settings, llm={"urls": (FIRST,)}), [stage]):
        await put(link, "llm", '{"id":"a1","prompt":"hello"}')
        await wait_until(lambda: outcome(link, "a1"))
        assert stage.seen[0].replica == FIRST
        await assert_nothing_is_left(link)


async def test_adopting_is_done_once_and_by_the_owner(link: Link, settings: Settings, front: Front) -> None:
    """Stranger, older delivery, second sending: refused, nothing written."""
    async with Hand(settings, "owner") as owner, Hand(settings, "stranger") as stranger:
        await put(link, "encoder", '{"id":"a1","query":"why?"}')
        entry = await owner.take_one()
        body = decode_foreign(entry.data or b"")
        job = flows.adopt("encoder", body, now_ms=front.clock.now_ms(), lifetimes=settings.lifetimes.model_dump())
        before = await everything(link)
        assert await stranger.streams.adopt(entry, job) == "lost"
        assert await everything(link) == before
        assert await owner.streams.adopt(entry, job) == "adopted"
        before = await everything(link)
        assert await owner.streams.adopt(entry, job) == "lost"
        assert await everything(link) == before
        ours = await owner.take_one()
        assert decode(ours.data or b"").id == "a1"
        assert await owner.settle(complete(ours)) == ["settled"]


async def test_adopting_onto_a_key_of_a_wrong_type_keeps_the_entry(
    link: Link, settings: Settings, front: Front
) -> None:
    """It is taken from its stream only where it can be put on the next one."""
    async with Hand(settings, "owner") as owner:
        await put(link, "encoder", '{"id":"a1","query":"why?","priority":"high"}')
        entry = await owner.take_one()
        body = decode_foreign(entry.data or b"")
        job = flows.adopt("encoder", body, now_ms=front.clock.now_ms(), lifetimes=settings.lifetimes.model_dump())
        for key in (keys.stream("encoder", "high"), keys.STAMP, keys.LIVE_INDEX, keys.DELAYED):
            await link.call("DEL", key)
            await link.call("LPUSH", key, "a list")
            before = await everything(link)
            with pytest.raises(CommandRefused):
                await owner.streams.adopt(entry, job)
            assert await everything(link) == before
            await link.call("DEL", key)


# --- duplicates -----------------------------------------------------------------------------------


async def test_second_entry_with_a_living_id_is_buried_and_the_first_goes_on(link: Link, settings: Settings) -> None:
    """The first is not touched: no outcome is published in its name."""
    gate = Gate()
    stages = [Scripted("encoder", gate), Scripted("retriever", echo), Scripted("llm", echo)]
    async with working(settings, stages):
        await put(link, "encoder", '{"id":"a1","query":"first"}')
        await wait_until(lambda: gate.waiting)
        await put(link, "encoder", '{"id":"a1","query":"second"}')
        await wait_until(lambda: letters(link))
        assert [letter["reason"] for letter in await letters(link)] == ["duplicate_id"]
        assert await outcome(link, "a1") is None
        gate.open()
        await wait_until(lambda: outcome(link, "a1"))
        before = await outcome(link, "a1")
        assert before is not None
        assert before.result == {"answer": "first"}
        await put(link, "encoder", '{"id":"a1","query":"third"}')
        await wait_until(lambda: _count(link, 2))
        assert await outcome(link, "a1") == before
        await assert_nothing_is_left(link)


async def test_of_fifty_at_once_with_one_id_one_is_adopted(link: Link, settings: Settings) -> None:
    """Over two workers."""
    gate = Gate()
    stages = [Scripted("encoder", gate, slots=32) for _ in range(2)]
    async with working(settings, stages):
        await asyncio.gather(*(put(link, "encoder", '{"id":"a1","query":"why?"}') for _ in range(50)))
        await wait_until(lambda: _count(link, 49))
        assert sum(stage.runs("a1") for stage in stages) == 1
        assert {letter["reason"] for letter in await letters(link)} == {"duplicate_id"}
        gate.open()
        await wait_until(lambda: link.call("XLEN", keys.stream("retriever")))


async def _count(link: Link, number: int) -> bool:
    return int(await link.call("XLEN", keys.DEAD)) == number


# --- buried ---------------------------------------------------------------------------------------

TURNS = '"messages":[{"role":"user","content":"x"}]'
BODY = '"flow":"query","payload":{},"route":[]'
OURS = '{"v":1,"id":"a1",' + BODY
BROKEN: dict[str, tuple[str, str | bytes, str, str | None]] = {
    "not JSON, no id": ("encoder", "hello", "not_json", None),
    "not JSON, an id in it": ("encoder", '{"id": "a1", "query": "wh', "not_json", "a1"),
    "not UTF-8": ("encoder", b'{"id":"a1","query":"\xff"}', "not_json", "a1"),
    "empty": ("encoder", "", "not_json", None),
    "a list": ("encoder", '["a1"]', "not_a_job", None),
    "a number": ("encoder", "1", "not_a_job", None),
    "null": ("encoder", "null", "not_a_job", None),
    "no id": ("encoder", '{"query":"why?"}', "bad_id", None),
    "id with a space": ("encoder", '{"id":"a 1","query":"why?"}', "bad_id", None),
    "id too long": ("encoder", '{"id":"' + "a" * 129 + '","query":"why?"}', "bad_id", None),
    "id a number": ("encoder", '{"id":1,"query":"why?"}', "bad_id", None),
    "unknown field": ("encoder", '{"id":"a1","query":"why?","qurey":"x"}', "invalid_payload", "a1"),
    "wrong type": ("encoder", '{"id":"a1","query":["why?"]}', "invalid_payload", "a1"),
    "empty query": ("encoder", '{"id":"a1","query":"  "}', "invalid_payload", "a1"),
    "too long a life": ("encoder", '{"id":"a1","query":"why?","timeout_s":601}', "invalid_payload", "a1"),
    "no query": ("encoder", '{"id":"a1"}', "invalid_payload", "a1"),
    "bad priority": ("encoder", '{"id":"a1","query":"why?","priority":"urgent"}', "invalid_payload", "a1"),
    "prompt and messages": ("llm", '{"id":"a1","prompt":"x",' + TURNS + "}", "invalid_payload", "a1"),
    "neither": ("llm", '{"id":"a1"}', "invalid_payload", "a1"),
    "no route from here": ("retriever", '{"id":"a1","query":"why?"}', "no_default_route", "a1"),
    "half an envelope": ("encoder", '{"v":1,"id":"a1","flow":"query"}', "bad_envelope", "a1"),
    "torn envelope": ("encoder", '{"v":1,"id":"a1","flow":"qu', "bad_envelope", "a1"),
    "envelope with a strange field": ("encoder", OURS + ',"deadline_ms":1,"odd":1}', "bad_envelope", "a1"),
    "envelope with a wrong type": ("encoder", OURS + ',"deadline_ms":"soon"}', "bad_envelope", "a1"),
    "envelope with a bad id": ("encoder", '{"v":1,"id":"a 1",' + BODY + ',"deadline_ms":1}', "bad_envelope", None),
    "envelope of an unknown flow": (
        "encoder", '{"v":1,"id":"a1","flow":"juggle","payload":{},"route":[],"deadline_ms":1}', "unknown_flow", "a1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
async def test_what_is_no_job_is_buried_at_once(link: Link, stages: dict[str, Scripted], name: str) -> None:
    """With the reason and the original; the sender hears `failed` when an id can be read. It never goes round."""
    stage, data, code, job_id = BROKEN[name]
    await put(link, stage, data)
    await wait_until(lambda: letters(link))
    (letter,) = await letters(link)
    assert letter["reason"] == code
    assert letter["job_id"] == job_id
    assert letter["original"] == (data.decode(errors="replace") if isinstance(data, bytes) else data)
    assert letter["deliveries"] == 1
    if job_id:
        found = await outcome(link, job_id)
        assert found is not None
        assert found.error is not None
        assert (found.status, found.error["code"]) == ("failed", code)
        assert 0 < await link.call("PTTL", keys.COMPLETION + job_id) <= 60_000
    assert not any(stage.seen for stage in stages.values())
    await assert_nothing_is_left(link)


@pytest.mark.parametrize(
    ("fields", "code", "job_id"),
    [
        (["text", "hello"], "no_data", None),
        (["data", '{"id":"a1","query":"why?"}', "priority", "high"], "extra_field", "a1"),
        (["data", '{"id":"a1","query":"why?"}', "vector", b"\x00\x01"], "extra_field", "a1"),
    ],
)
async def test_entry_with_wrong_fields_is_buried(
    link: Link, stages: dict[str, Scripted], fields: list[str | bytes], code: str, job_id: str | None
) -> None:
    """A sender who believes that a second field is read must hear that it is not."""
    await link.call("XADD", keys.stream("encoder"), "*", *fields)
    await wait_until(lambda: letters(link))
    (letter,) = await letters(link)
    assert (letter["reason"], letter["job_id"]) == (code, job_id)
    if job_id:
        found = await outcome(link, job_id)
        assert found is not None
        assert found.status == "failed"
    await assert_nothing_is_left(link)


async def test_broken_entry_cannot_end_another_job_by_naming_it(link: Link, settings: Settings, front: Front) -> None:
    """Only the entry that the live record names may publish an outcome."""
    gate = Gate()
    async with working(settings, [Scripted("encoder", gate)]):
        job = query(front)
        await front.submit(job)
        await wait_until(lambda: gate.waiting)
        await put(link, "encoder", f'{{"id":"{job.id}","query":"wh')
        await put(link, "encoder", f'{{"v":1,"id":"{job.id}","flow":"juggle"}}')
        await wait_until(lambda: _count(link, 2))
        assert await outcome(link, job.id) is None
        assert await link.call("EXISTS", keys.LIVE + job.id) == 1
        gate.open()
        await wait_until(lambda: link.call("XLEN", keys.stream("retriever")))


async def test_envelope_without_a_live_record_ends_among_the_dead_letters(
    link: Link, stages: dict[str, Scripted]
) -> None:
    """Nobody accepted it, or Redis forgot: its story is kept, and the id, if it is free, gets its outcome."""
    await put(
        link,
        "llm",
        '{"v":1,"id":"a1","flow":"message","payload":{"prompt":"x"},"route":[],"deadline_ms":99999999999999}',
    )
    await wait_until(lambda: letters(link))
    assert [letter["reason"] for letter in await letters(link)] == ["orphan"]
    found = await outcome(link, "a1")
    assert found is not None
    assert found.status == "failed"
    await assert_nothing_is_left(link)
