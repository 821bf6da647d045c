"""A worker process for the tour: its stage takes jobs and never finishes them. Run with REDIS_URL set."""

from __future__ import annotations

import asyncio
import os

from pipeline.consumer import Consumer
from pipeline.job import Done, Job
from pipeline.settings import load
from pipeline.stage import Stage


class Stuck(Stage):
    """Holds up to four jobs, for ever."""

    name = "encoder"
    slots = 4

    async def handle(self, job: Job) -> Done:
        print(f"holding {job.id}", flush=True)
        await asyncio.Event().wait()
        return Done({})


if __name__ == "__main__":
    asyncio.run(Consumer([Stuck()], load(os.environ)).run())
