"""A job's life through real workers on a real Redis."""

from __future__ import annotations

from typing import Any

from pipeline import keys
from pipeline.connection import Link
from pipeline.errors import RetryLater
from pipeline.front import Front
from pipeline.job import Done, Job
from pipeline.settings import Settings
from tests.rig import Scripted, ask, assert_nothing_is_left, echo, query, working

ODD: dict[str, Any] = {
    "query": "why?",
    "empty": [],
    "nested": {"also": {}, "list": [[], {}]},
    "long": 9007199254740993,
    "longest": 18446744073709551615,
    "small": 1e-300,
    "text": 'ümlaut \u2028 "quoted" \\ \x7f 🦊 </script>',
}
"""What a JSON library of another language would change."""


async def test_job_passes_its_route_and_leaves_only_its_completion(
    link: Link, settings: Settings, front: Front
) -> None:
    """Three stages, one answer, nothing else left."""
    stages = [Scripted(name, echo) for name in ("encoder", "retriever", "llm")]
    async with working(settings, stages):
        completion = await ask(front, query(front, "hello"))
        assert completion.status == "completed"
        assert completion.result == {"answer": "hello"}
        assert [len(stage.seen) for stage in stages] == [1, 1, 1]
        spans = set(completion.timings_ms)
        assert spans == {"encoder_wait", "encoder", "retriever_wait", "retriever", "llm_wait", "llm"}
        assert min(completion.timings_ms.values()) >= 0
        assert 0 < await link.call("PTTL", keys.COMPLETION + completion.id) <= 60_000
        await assert_nothing_is_left(link)


async def test_payload_and_vector_reach_the_last_stage_unchanged(link: Link, settings: Settings, front: Front) -> None:
    """Through a forward, a retry and a promotion: empty lists, long numbers, odd text, binary zeros."""
    vector = bytes(range(256)) * 3

    async def encode(job: Job) -> Done:
        return Done({"found": []}, vector=vector)

    async def fail_once(job: Job) -> Done:
        if job.attempt == 1:
            raise RetryLater("not yet", code="busy")
        return Done({})

    stages = [Scripted("encoder", encode), Scripted("retriever", fail_once), Scripted("llm", echo)]
    async with working(settings, stages):
        job = query(front)
        job.payload = ODD
        assert (await ask(front, job)).status == "completed"
        first, second = stages[1].seen
        (last,) = stages[2].seen
        assert first.payload == second.payload == last.payload == ODD
        assert first.vector == second.vector == vector
        assert last.vector is None
        assert last.state == {"found": []}
