"""Deliveries: messages to people, while whoever hands them over is killed and frozen, and receivers fail."""

from __future__ import annotations

import asyncio
from itertools import cycle
from random import Random
from typing import Final

from pipeline import keys
from tests.conftest import wait_until
from tests.faults.cell import Cell
from tests.faults.cluster import DELIVERY, LEASE_S, Cluster, Layout, Part
from tests.faults.deliveries import QUIET_S, Receivers, Senders
from tests.faults.nemesis import TRY_FOR_S, WATCH_EVERY_S
from tests.faults.scenarios import reach, scenario

RATE: Final = 50.0  # messages per second: what two cores carry beside all these processes and their restarts
LASTS_AT_LEAST_S: Final = 12.0
"""So that few messages are still on their way when a second fault comes."""
ANSWERS_AFTER_MS: Final = 400.0
"""A receiver with a message: so long that faults fall between a message and its answer."""
FROZEN_S: Final = 2 * LEASE_S
EMAILS: Final = keys.stream("email")
HARM: Final = ("kill", "zombie", "kill")


@scenario(25, jobs=5_000, least=60)
async def deliveries_amid_kills(cell: Cell) -> None:
    """5,000 sms, mms and emails, while delivery workers are killed and frozen, and receivers fail, stall and hang up.

    By the receivers' own record no message is taken twice, what is `sent`, `delivered` or `undelivered` was taken, and
    what has `failed` was not. `unknown` is only what the record shows without an answer, or what was on its way when
    its worker was harmed. Status callbacks come signed, out of order, twice and late, and never lower a status. The
    gateway and the history say the same of each. `--jobs` are messages.
    """
    database = cell.folder / "history.db"
    receivers = Receivers(cell.folder, Random(f"{cell.verdict.number}:{cell.verdict.seed}:receivers"), ANSWERS_AFTER_MS)
    environ = {
        "DATABASE_URL": f"sqlite:///{database}",
        "PENSTOCK_HISTORY__AUTO_UPGRADE": "true",
        **receivers.environ,
    }
    layout = Layout(encoders=1, llms=1, replicas=1, deliveries=2, recorders=1, environ=environ)
    async with cell.running(layout, {"background": 1}) as (cluster, _, nemesis):
        senders = Senders(cluster, cell.deliveries)
        try:
            async with receivers.listening(cluster):
                rate = min(RATE, cell.jobs / LASTS_AT_LEAST_S)
                enough = asyncio.Event()
                sending = cell.background(senders.run(cell.jobs, rate, enough))
                for harm in cycle(HARM):
                    if sending.done() and await senders.are_done():
                        break
                    await nemesis.until_recovered(DELIVERY)  # its survivor is the heir
                    victim = cell.rng.choice(cluster.of(DELIVERY))
                    if not await _has_begun(cluster, victim):
                        continue
                    if harm == "zombie":
                        await nemesis.make_zombie(victim, FROZEN_S, spare_idle=True)
                    elif await nemesis.kill(victim, spare_idle=True):
                        await cluster.until_works(victim)
                    if _met(cell) >= set(HARM):  # on a busy machine this may take longer than the messages last
                        enough.set()
                await sending
                await reach("no message is on its way", senders.are_done, within_s=QUIET_S, every_s=0.2)
            await reach("history was told of all", senders.are_recorded, within_s=QUIET_S, every_s=0.2)
            await senders.look()
            await asyncio.to_thread(senders.read_history, database)
        finally:
            senders.close()
    for harm in set(HARM):
        cell.require(f"a {harm} meets a message that is on its way", harm in _met(cell))


def _met(cell: Cell) -> set[str]:
    """Return which faults have met a message on its way."""
    return {line["fault"] for line in cell.faults_done() if line["begun"]}


async def _has_begun(cluster: Cluster, victim: Part) -> bool:
    """Wait a while until a worker has handed an email over and has no answer yet; say whether it has.

    An email, because nobody tells later what became of it: its heir has nothing to go by but the mark.
    """

    async def has_begun() -> bool:
        held = await cluster.in_hand(victim)
        return bool(await cluster.begun(one for one in held if one.stream == EMAILS))

    try:
        await wait_until(has_begun, timeout_s=TRY_FOR_S, every_s=WATCH_EVERY_S)
    except TimeoutError:
        return False
    return True
