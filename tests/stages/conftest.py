"""What the tests of stages share: settings on a temporary index, and jobs as the worker would hand them over."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.job import Done, Job
from pipeline.settings import RetrieverSettings, Settings
from pipeline.stage import Context, Stage
from stages import encoder, retriever

NewJob = Callable[..., Job]
CONTEXT = cast("Context", None)  # neither stage asks its process for anything


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(retriever=RetrieverSettings(path=tmp_path / "index"))


@pytest.fixture
def new_job() -> NewJob:
    """Return a maker of jobs, each accepted a second after the one before."""
    seconds = count(1)

    def make(flow: str, tenant: str = "default", **payload: Any) -> Job:
        second = next(seconds)
        return Job(
            id=f"job{second}",
            flow=flow,
            tenant=tenant,
            payload=payload,
            route=[],
            deadline_ms=0,
            accepted_us=second * 1_000_000,
        )

    return make


@pytest.fixture
async def pipe(settings: Settings) -> AsyncIterator[Pipe]:
    pipe = Pipe(settings)
    await pipe.start()
    yield pipe
    await pipe.stop()


class Pipe:
    """Encoder and retriever in a row, without the streams between them."""

    def __init__(self, settings: Settings) -> None:
        self.encoder: Stage = encoder.build(settings)
        self.retriever = cast("retriever.Retriever", retriever.build(settings))

    async def start(self) -> None:
        await self.encoder.start(CONTEXT)
        await self.retriever.start(CONTEXT)

    async def stop(self) -> None:
        await self.encoder.stop()
        await self.retriever.stop()

    async def encode(self, *jobs: Job) -> None:
        """Pass *jobs* through the encoder, which leaves its findings in them."""
        for job, outcome in zip(jobs, await self.encoder.handle_batch(jobs), strict=True):
            assert isinstance(outcome, Done), outcome
            job.state |= outcome.value
            job.vector = outcome.vector

    async def run(self, *jobs: Job) -> list[dict[str, Any]]:
        """Return what each of *jobs* comes to after both stages, which take all of them as one batch."""
        await self.encode(*(job for job in jobs if job.flow in {"query", "document"}))
        outcomes = await self.retriever.handle_batch(jobs)
        values = []
        for outcome in outcomes:
            assert isinstance(outcome, Done), outcome
            values.append(outcome.value)
        return values
