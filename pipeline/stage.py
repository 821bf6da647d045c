"""What a stage is: a function from job to outcome, and how many jobs it wants in hand.

A stage knows no other stage and no Redis. It is one file in `stages/` with a class named after it and a function
`build(settings) -> Stage`; the worker does the rest: reads, calls, settles.

A handler returns `Done`, or raises: `Reject` (can never succeed), `RetryLater` (may succeed later), anything else
(retried with back-off until attempts or the deadline end). It is cancelled at the job's deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pipeline.job import Completion, Done, Job

if TYPE_CHECKING:
    from pipeline.batches import Batches
    from pipeline.chats import Chats
    from pipeline.clock import Clock
    from pipeline.deliveries import Deliveries
    from pipeline.replicas import Replicas
    from pipeline.reports import Reports
    from pipeline.webhooks import Webhooks

A = TypeVar("A")

Outcome = Done | Exception


class Context(Protocol):
    """What the running process offers a stage.

    Attributes:
        worker: name of this worker, as answers show it.
        replicas: the shared registry of LLM replicas.
        batches: the batches in Redis.
        chats: the chats in Redis.
        clock: Redis' time.
        webhooks: results to be told to receivers outside, and the secrets to sign them with.
        reports: finished reports, and who is writing one.
        deliveries: the deliveries in Redis; this process begins those that it has in hand.
    """

    @property
    def worker(self) -> str: ...  # noqa: D102 - the class says it

    @property
    def replicas(self) -> Replicas: ...  # noqa: D102 - the class says it

    @property
    def batches(self) -> Batches: ...  # noqa: D102 - the class says it

    @property
    def chats(self) -> Chats: ...  # noqa: D102 - the class says it

    @property
    def clock(self) -> Clock: ...  # noqa: D102 - the class says it

    @property
    def webhooks(self) -> Webhooks: ...  # noqa: D102 - the class says it

    @property
    def reports(self) -> Reports: ...  # noqa: D102 - the class says it

    @property
    def deliveries(self) -> Deliveries: ...  # noqa: D102 - the class says it


class Stage:
    """One stage. Subclasses override `handle`, or `handle_batch` where work in bulk is cheaper.

    Attributes:
        name: the stage's name: `job:<name>_in` is its stream, its group bears the same name.
        slots: jobs in hand at once, at most.
        batch: jobs given to one call of `handle_batch`; 1 means `handle` is called for each.
        placed: whether each job needs a running place at an LLM replica before it starts.
        drain_s: how long what is in hand may take to end when the process is stopped; None: as all workers.
    """

    name: str
    slots: int = 1
    batch: int = 1
    placed: bool = False
    drain_s: float | None = None

    async def start(self, context: Context) -> None:
        """Open what the stage needs.

        Raises:
            NotReady: cannot work yet; called again after a while.
            ConfigError: cannot ever work like this; the process exits with code 2.
        """

    async def handle(self, job: Job) -> Done:
        """Do one job."""
        raise NotImplementedError

    async def handle_batch(self, jobs: Sequence[Job]) -> Sequence[Outcome]:
        """Do several jobs at once; the answer holds one outcome per job, in order.

        When the call as a whole raises, each job is tried again by itself.
        """
        raise NotImplementedError

    def ended(self, job: Job, completion: Completion) -> None:
        """Hear that the answer of `handle` has ended a job, once it is written: what is counted here is counted once.

        A process that dies meanwhile has counted nothing; one that had lost the job does not hear of it.
        """

    def quiet(self) -> None:
        """Hear that the process is to stop: what only waits in a handler need not wait any longer."""

    async def stop(self) -> None:
        """Close what `start` opened."""


class Loop:
    """A part of a process that has a lease like a stage, and takes no jobs: it works in a way of its own.

    Attributes:
        name: `penstock stage <name>` runs it.
        not_ready: why it cannot work now, None when it can; `penstock status` shows it.
    """

    name: str
    not_ready: str | None = "starting"

    async def run(self, consumer: str, clock: Clock, stop: asyncio.Event) -> None:
        """Work until *stop*, end what is in hand, and return. Cancelled, it leaves that to others.

        Args:
            consumer: this process, as the lease names it.
        """
        raise NotImplementedError


class Stopped(Exception):  # an event, not an error
    """The loop was told to stop while it waited."""


async def unless(waiting: Awaitable[A], *events: asyncio.Event) -> A:
    """Return what *waiting* brings, but wait no longer than until one of *events*: then it is given up.

    A read that is given up leaves what it brings to others.

    Raises:
        Stopped: an event came first.
    """
    wait = asyncio.ensure_future(waiting)
    listening = [asyncio.create_task(event.wait(), name="loop listens") for event in events]
    tasks: list[asyncio.Future[Any]] = [wait, *listening]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not wait.done():
            raise Stopped
        return wait.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
