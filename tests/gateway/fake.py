"""A pipeline in memory that a test plays by hand: it says what becomes of each job, and when.

It keeps the promises of `Front` that the gateway leans on: one outcome per job, another tenant's job is unknown,
a key is remembered with its body, a refusal leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from pipeline.accepting import Idempotency
from pipeline.clock import Clock
from pipeline.errors import DeadlineExceeded, IdempotencyMismatch, Overloaded, PenstockError
from pipeline.front import Accepted, Front, Health, Standing
from pipeline.job import Completion, Job
from pipeline.overview import Overview
from tests.conftest import PATIENCE_S

GRACE_S = 0.05

NOTHING = Overview(
    streams=[], replicas=[], workers=[], gateways=[], lapsed_workers=0, live_jobs=0, delayed=0, dead_letters=0,
    letters_ever=0, memory_bytes=0, memory_limit_bytes=0, record_backlog=0, record_oldest_ms=0,
)  # fmt: skip
"""A Redis that nobody has worked on yet."""


@dataclass
class Live:
    """A job that was accepted."""

    job: Job
    state: Literal["queued", "running"] = "queued"
    completion: Completion | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class FakeFront(Front):
    """The pipeline, as one test wants it to be.

    Attributes:
        answer: what becomes of each job as soon as it is accepted; None leaves that to the test.
        broken: raised by whatever asks Redis.
        stages: what `health` says of them.
        cancels: ids that were cancelled, in order.
        kept: outcomes that outlive their job, by Idempotency-Key.
        foreign: given back by `wait` and `look` instead of the right outcome.
        picture: what `overview` shows.
        due_ms: when a job that waits is due, by id.
        enlisted: what the gateway says of itself; None: it has signed off.
        knows_api_keys: whether any were made in Redis.
        api_keys: records of these, by digest.
        key_questions: digests that were asked for, in order.
    """

    def __init__(self) -> None:
        self.clock = Clock()
        self.answer: Callable[[Job], Completion] | None = None
        self.broken: PenstockError | None = None
        self.stages: dict[str, str | None] = {"encoder": None, "retriever": None, "llm": None}
        self.loads: dict[str, int] = {}
        self.picture = NOTHING
        self.enlisted: bytes | None = None
        self.knows_api_keys: bool | None = False
        self.api_keys: dict[str, bytes] = {}
        self.key_questions: list[str] = []
        self.cancels: list[str] = []
        self.kept: dict[str, Completion] = {}
        self.foreign: Completion | None = None
        self.jobs: dict[str, Live] = {}
        self.due_ms: dict[str, int] = {}
        self.opened = self.closed = False
        self._keys: dict[str, tuple[str, str]] = {}
        self._waiters: Counter[str] = Counter()
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> Self:
        self.opened = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed = True

    def __repr__(self) -> str:
        return f"<FakeFront jobs={len(self.jobs)} broken={self.broken!r}>"

    # What the gateway asks.

    async def submit(
        self,
        job: Job,
        *,
        idempotency: Idempotency | None = None,
        in_flight_limit: int | None = None,
        wait: bool = True,
    ) -> Accepted:
        self._reach_redis()
        if idempotency is not None and idempotency.key in self._keys:
            body_hash, earlier = self._keys[idempotency.key]
            if body_hash != idempotency.body_hash:
                raise IdempotencyMismatch
            return Accepted(earlier, repeated=True)
        unfinished = sum(live.job.tenant == job.tenant and not live.completion for live in self.jobs.values())
        if in_flight_limit is not None and unfinished >= in_flight_limit:
            raise Overloaded("too many unfinished jobs of this key", code="too_many_in_flight", after_s=2.5)
        if idempotency is not None:
            self._keys[idempotency.key] = (idempotency.body_hash, job.id)
        self.jobs[job.id] = Live(job)
        if self.answer is not None:
            self._end(self.answer(job))
        await self._tell()
        return Accepted(job.id, repeated=False)

    async def wait(self, job_id: str, tenant: str, deadline_ms: int) -> Completion:
        live = self.jobs[job_id]
        self._waiters[job_id] += 1
        await self._tell()
        try:
            async with asyncio.timeout((deadline_ms - self.clock.now_ms()) / 1000 + GRACE_S):
                await live.ended.wait()
        except TimeoutError:
            raise DeadlineExceeded from None
        finally:
            self._waiters[job_id] -= 1
        self._reach_redis()
        assert live.completion is not None
        return self.foreign or live.completion

    async def idempotent_outcome(self, key: str) -> Completion | None:
        return self.kept.get(key)

    async def look(self, job_id: str, tenant: str) -> Completion | Literal["queued", "running"] | None:
        self._reach_redis()
        live = self._of(job_id, tenant)
        if live is None:
            return None
        return self.foreign or live.completion or live.state

    async def standing(self, job_id: str, tenant: str) -> Standing | None:
        self._reach_redis()
        live = self.jobs.get(job_id)
        if live is None or live.completion is not None or live.job.tenant != tenant:
            return None
        return Standing(live.job, live.state, self.due_ms.get(job_id))

    async def cancel(self, job_id: str, tenant: str) -> Literal["cancelled", "cancelling", "finished", "unknown"]:
        self._reach_redis()
        live = self._of(job_id, tenant)
        if live is None:
            return "unknown"
        if live.completion:
            return "finished"
        self.cancels.append(job_id)
        if live.state == "queued":
            self._end(Completion(job_id, "cancelled", tenant))
        await self._tell()
        return "cancelled" if live.state == "queued" else "cancelling"

    def waiters(self, job_id: str) -> int:
        return self._waiters[job_id]

    async def health(self) -> Health:
        return Health(redis=str(self.broken) if self.broken else None, stages=self.stages)

    async def overview(self) -> Overview:
        self._reach_redis()
        return self.picture

    async def api_key(self, digest: str) -> bytes | None:
        self._reach_redis()
        self.key_questions.append(digest)
        return self.api_keys.get(digest)

    async def look_for_api_keys(self) -> bool:
        self._reach_redis()
        self.knows_api_keys = bool(self.api_keys) or bool(self.knows_api_keys)
        return bool(self.api_keys)

    async def enlist(self, record: bytes, ttl_s: float) -> None:
        self.enlisted = record

    async def sign_off(self, record: bytes) -> None:
        self.enlisted = None

    async def replica_loads(self) -> dict[str, int]:
        self._reach_redis()
        return self.loads

    # What a test does.

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until *condition* holds of this pipeline."""
        async with asyncio.timeout(PATIENCE_S), self._changed:
            await self._changed.wait_for(condition)

    async def next_job(self) -> Job:
        """Wait for the first job whose outcome is awaited, and return it."""
        await self.until(lambda: any(count for count in self._waiters.values()))
        return next(self.jobs[job_id].job for job_id, count in self._waiters.items() if count)

    def finish(self, job_id: str, **fields: Any) -> None:
        """End a job: completed, unless *fields* say otherwise."""
        self._end(completed(self.jobs[job_id].job, **fields))

    def keep_and_forget(self, job_id: str) -> None:
        """Drop a finished job, but not what its Idempotency-Key remembers."""
        (key,) = [key for key, (_, kept) in self._keys.items() if kept == job_id]
        completion = self.jobs.pop(job_id).completion
        assert completion is not None
        self.kept[key] = completion

    def _end(self, completion: Completion) -> None:
        live = self.jobs[completion.id]
        assert live.completion is None, "a job has one outcome"
        live.completion = completion
        live.ended.set()

    def _of(self, job_id: str, tenant: str) -> Live | None:
        live = self.jobs.get(job_id)
        return live if live and live.job.tenant == tenant else None

    def _reach_redis(self) -> None:
        if self.broken is not None:
            raise self.broken

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


RESULT = {
    "answer": "asyncio.Queue is a queue for coroutines [1].",
    "sources": [{"document": "asyncio", "title": "asyncio", "chunk": 3, "score": 1.5, "text": "A queue ..."}],
    "model": "mock",
    "usage": {"prompt_tokens": 40, "completion_tokens": 9, "total_tokens": 49},
}


def completed(job: Job, **fields: Any) -> Completion:
    """Return a good outcome of *job*, or another that *fields* describe."""
    values: dict[str, Any] = {
        "status": "completed",
        "tenant": job.tenant,
        "result": RESULT,
        "worker": "llm-1",
        "replica": "http://127.0.0.1:9001",
        "timings_ms": {"encoder_wait": 0.25, "encoder": 0.5, "llm_wait": 0.125, "llm": 0.0625},
        "finished_us": job.at_us,
    }
    return Completion(job.id, **(values | fields))
