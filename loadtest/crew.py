"""The generators of one run: started together, stopped together, their counts put together.

Each is a process of its own, also when there is only one, so that nothing that is shown or written here disturbs it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

import orjson

from loadtest.tally import Moment, Tally

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Callable, Sequence

    from loadtest.generator import Orders

LEAD_S: Final = 0.05  # from the word to the start, so that every generator has heard it
_END_S: Final = 5.0
_ROOT: Final = Path(__file__).resolve().parents[1]


class GeneratorDied(Exception):
    """A generator ended before its run did; what it counted is lost, and so is the run."""


@dataclass(slots=True)
class Outcome:
    """What all generators of one run found.

    Args:
        busiest: the share of one core that the busiest generator used.
    """

    tally: Tally
    duration_s: float = 0.0
    unfinished: int = 0
    busiest: float = 0.0
    is_interrupted: bool = False
    moments: list[Moment] = field(default_factory=list)


async def send(orders: Sequence[Orders], stopped: asyncio.Event, on_moment: Callable[[Moment], None]) -> Outcome:
    """Run one generator for each of the *orders*, until all are done or *stopped* is set.

    Raises:
        GeneratorDied: one ended before its time.
    """
    outcome = Outcome(Tally(orders[0].limit_ms, orders[0].good_ms))
    generators: list[Process] = []
    try:
        for _ in orders:
            generators.append(await _start())  # noqa: PERF401 - should the next not start, these must be ended
        try:
            for generator, order in zip(generators, orders, strict=True):
                _tell(generator, asdict(order))
            for generator in generators:
                await _hear(generator)
        except GeneratorDied:
            if not stopped.is_set():
                raise
            outcome.is_interrupted = True  # the signal that stopped us met one that was just being started
            return outcome
        start_s = perf_counter() + LEAD_S
        for generator in generators:
            _tell(generator, {"start_s": start_s})
        stopper = asyncio.create_task(_stop(generators, stopped), name="stop")
        try:
            async with asyncio.TaskGroup() as group:
                for generator in generators:
                    group.create_task(_collect(generator, start_s, outcome, on_moment), name="collect")
        except ExceptionGroup as group:  # not `except*`: before Python 3.11.4 it wraps what is raised in it once more
            died = group.subgroup(GeneratorDied)
            raise (died or group).exceptions[0] from None
        finally:
            stopper.cancel()
    finally:
        await asyncio.gather(*(_end(generator) for generator in generators))
    return outcome


async def _start() -> Process:
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "loadtest.generator"),
        env={**os.environ, "PYTHONPATH": path},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # a terminal's Ctrl-C would end it while it is still being started
        limit=1 << 28,  # a tally is one line
    )


async def _collect(generator: Process, start_s: float, outcome: Outcome, on_moment: Callable[[Moment], None]) -> None:
    while True:
        said = await _hear(generator)
        if "moment" in said:
            moment = Moment.from_wire(said["moment"])
            outcome.moments.append(moment)
            on_moment(moment)
            continue
        outcome.tally.merge(said["tally"])
        outcome.duration_s = max(outcome.duration_s, said["ended_s"] - start_s)
        outcome.unfinished += said["unfinished"]
        outcome.busiest = max(outcome.busiest, said["busy"])
        outcome.is_interrupted |= said["is_interrupted"]
        return


def _tell(generator: Process, body: Any) -> None:
    assert generator.stdin is not None
    if generator.stdin.is_closing():
        raise GeneratorDied(f"a generator (process {generator.pid}) ended before the run")
    generator.stdin.write(orjson.dumps(body) + b"\n")


async def _hear(generator: Process) -> Any:
    assert generator.stdout is not None
    line = await generator.stdout.readline()
    if not line.endswith(b"\n"):
        raise GeneratorDied(f"a generator (process {generator.pid}) ended in the middle of the run")
    return orjson.loads(line)


async def _stop(generators: Sequence[Process], stopped: asyncio.Event) -> None:
    await stopped.wait()
    for generator in generators:
        with suppress(GeneratorDied):  # whoever listens to it says so
            _tell(generator, "stop")


async def _end(generator: Process) -> None:
    assert generator.stdin is not None
    generator.stdin.close()  # which ends it, whatever it does
    try:
        async with asyncio.timeout(_END_S):
            await generator.wait()
    except TimeoutError:
        generator.kill()
        await generator.wait()
