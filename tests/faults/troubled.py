"""A stage process with payloads that are its trouble: `python -m tests.faults.troubled NAME`.

The real stage of that name in the real program, but for two words in a query. `KILL-YOUR-WORKER` ends the process as a
crash in native code would (SIGKILL, no clean-up); `BLOCK-<stage>-FOR <seconds>` stops the event loop of a worker of
that stage for that long, between its work and its settle.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from typing import Final

from pipeline.job import Done, Job
from pipeline.settings import Settings
from pipeline.stage import Context, Loop, Outcome, Stage
from stages import __main__ as program

KILL: Final = "KILL-YOUR-WORKER"
_BLOCK: Final = re.compile(r"BLOCK-([a-z]+)-FOR ([0-9]+(?:\.[0-9]+)?)")


def block(stage: str, for_s: float) -> str:
    """Return the words that block a troubled worker of *stage*."""
    return f"BLOCK-{stage}-FOR {for_s:g}"


class Troubled(Stage):
    """A stage that does what another does, unless a payload stops it."""

    def __init__(self, stage: Stage) -> None:
        self.name, self.slots, self.batch, self.placed = stage.name, stage.slots, stage.batch, stage.placed
        self._stage = stage

    async def start(self, context: Context) -> None:
        """Start the other."""
        await self._stage.start(context)

    async def handle(self, job: Job) -> Done:
        """Do one job."""
        _kill(job)
        done = await self._stage.handle(job)
        self._block(job)
        return done

    async def handle_batch(self, jobs: Sequence[Job]) -> Sequence[Outcome]:
        """Do several."""
        for job in jobs:
            _kill(job)
        done = await self._stage.handle_batch(jobs)
        for job in jobs:
            self._block(job)
        return done

    async def stop(self) -> None:
        """Stop the other."""
        await self._stage.stop()

    def _block(self, job: Job) -> None:
        # After the work, so that its outcome leaves before the loop can hear that the entry is another's by now.
        found = _BLOCK.search(str(job.payload.get("query", "")))
        if found and found[1] == self.name:
            time.sleep(float(found[2]))


def _kill(job: Job) -> None:
    if KILL in str(job.payload.get("query", "")):
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """Run as `python -m stages` does."""
    build = program.build

    def build_troubled(name: str, settings: Settings) -> Sequence[Stage | Loop]:
        return [Troubled(built) if isinstance(built, Stage) else built for built in build(name, settings)]

    program.build = build_troubled
    return program.main()


if __name__ == "__main__":
    sys.exit(main())
