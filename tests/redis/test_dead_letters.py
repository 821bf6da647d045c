"""Dead letters: what an operator sees and may do."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from pipeline import keys
from pipeline.connection import CommandRefused, Link
from pipeline.dead import DeadLetters
from pipeline.errors import Reject
from pipeline.front import Front
from pipeline.job import Done, Job
from pipeline.settings import Settings
from pipeline.stage import Outcome
from tests.conftest import wait_until
from tests.rig import Scripted, ScriptedBatch, ask, echo, everything, letters, query, working


async def refuse(job: Job) -> Done:
    raise Reject("cannot be done", code="impossible")


async def test_dead_job_runs_again_under_a_new_id_and_its_old_outcome_stands(link: Link, settings: Settings) -> None:
    """A retry by hand is a new job; two retries at once make one."""
    letters = DeadLetters(link, settings)
    async with Front(settings, "test") as front:
        async with working(settings, [Scripted("encoder", refuse)]):
            failed = await ask(front, query(front, "again?"))
        assert failed.status == "failed"
        assert failed.error == {"type": "failed", "code": "impossible", "message": "cannot be done"}
        (letter,) = await letters.list(10)
        assert letter.reason == "impossible"
        assert letter.job_id == failed.id
        assert "original" not in letter.summary()

        attempts = await asyncio.gather(
            *(letters.retry(letter.id, front.clock.now_ms()) for _ in range(5)), return_exceptions=True
        )
        revived = [result for result in attempts if isinstance(result, str)]
        assert len(revived) == 1
        assert sum(isinstance(result, Reject) for result in attempts) == 4
        stages = [Scripted(name, echo) for name in ("encoder", "retriever", "llm")]
        async with working(settings, stages):
            await wait_until(lambda: stages[2].seen)
            again = await front.wait(revived[0], "default", front.clock.now_ms() + 10_000)
        assert again.status == "completed"
        assert again.result == {"answer": "again?"}
        assert stages[0].seen[0].retry_of == failed.id
        assert (await front.look(failed.id, "default")) == failed
        assert await letters.count() == 0


async def test_letter_that_holds_no_job_can_be_read_and_thrown_away_only(link: Link, settings: Settings) -> None:
    """Garbage on a stream is kept as it was."""
    letters = DeadLetters(link, settings)
    async with working(settings, [Scripted("encoder", echo)]):
        await link.call("XADD", keys.stream("encoder"), "*", "data", "no json {")
        await wait_until(letters.count)
    (letter,) = await letters.list(10)
    assert (letter.reason, letter.original) == ("not_json", "no json {")
    with pytest.raises(Reject, match="no job that could run again"):
        await letters.retry(letter.id, 0)
    await letters.discard(letter.id)
    with pytest.raises(Reject, match="no dead letter"):
        await letters.discard(letter.id)
    with pytest.raises(Reject, match="no dead letter"):
        await letters.show("nonsense")


async def test_letter_stays_when_its_job_cannot_be_started(link: Link, settings: Settings, front: Front) -> None:
    """Its stream's key is of a wrong type: nothing is changed until an operator has mended it."""
    dead = DeadLetters(link, settings)
    async with working(settings, [Scripted("encoder", refuse)]):
        await ask(front, query(front))
    (letter,) = await dead.list(10)
    stream = keys.stream("encoder")
    await link.call("RENAME", stream, "aside")
    await link.call("SET", stream, "x")
    before = await everything(link)
    with pytest.raises(CommandRefused):
        await dead.retry(letter.id, front.clock.now_ms())
    assert await everything(link) == before
    await link.call("RENAME", "aside", stream)
    await front.cancel(await dead.retry(letter.id, front.clock.now_ms()), "default")
    assert await dead.count() == 0


@pytest.mark.parametrize("odd", [str(2**64), "[" * 300 + "]" * 300], ids=["long number", "deep"])
async def test_job_that_can_be_read_and_not_written_again_is_buried(
    link: Link, settings: Settings, front: Front, monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    """It ends at once, and its batch mates go on and run once: else it would come again and again."""
    jobs = [query(front, text) for text in ("first", "ODD", "last")]
    launch = Job.launch

    def with_what_we_never_write(job: Job) -> tuple[str, bytes]:
        stage, tail = launch(job)
        return stage, tail.replace(b'"ODD"', odd.encode())

    monkeypatch.setattr(Job, "launch", with_what_we_never_write)
    for job in jobs:
        await front.submit(job)
    monkeypatch.undo()

    async def all_done(jobs: Sequence[Job]) -> Sequence[Outcome]:
        return [Done({}) for _ in jobs]

    async def both_mates_went_on() -> bool:
        return bool(await link.call("XLEN", keys.stream("retriever")) == 2)

    stage = ScriptedBatch("encoder", all_done)
    async with working(settings, [stage]):
        ended = await front.wait(jobs[1].id, jobs[1].tenant, jobs[1].deadline_ms)
        await wait_until(both_mates_went_on)
    assert ended.error is not None
    assert (ended.status, ended.error["code"]) == ("failed", "bad_envelope")
    assert stage.calls == [[job.id for job in jobs]]
    assert [letter["job_id"] for letter in await letters(link)] == [jobs[1].id]
