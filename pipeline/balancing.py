"""Which replica takes the next job: plain functions on a snapshot, without Redis and without time.

A policy turns a snapshot of the replicas into an order of preference, or into waiting (an empty order).
The placing script goes down that order and takes the first replica that still has a free slot, so the choice may be
a little stale, but the slots are exact.

The default, `expected-finish`, asks for each replica when a job given to it now would be done. A free but slow replica
stays idle while waiting for a faster one is expected to be quicker for every job that waits: the rule that is optimal
for two servers of unequal speed (Lin and Kumar, "Optimal control of a queueing system with two heterogeneous servers",
1984), with the measured queue in place of a computed threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

SAME_SPEED: Final = 1.5
"""Replicas within this factor of the fastest count as equally fast: less is the noise of measuring."""
UNKNOWN_SERVICE_S: Final = 1.0
"""Assumed service time of a replica nobody has heard from, where no other is known either."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica as last seen.

    Attributes:
        slots: calls it may run at once; 1 while its breaker is half open.
        running: calls it runs now.
        leases: jobs assigned to it now, running or waiting.
        service_s: recent time per token x recent tokens per answer, in seconds; None where nothing is known.
        is_stale: its last call ended so long ago that it may have become faster since.
        is_open: whether its breaker keeps callers away.
    """

    url: str
    slots: int
    running: int = 0
    leases: int = 0
    service_s: float | None = None
    is_stale: bool = False
    is_open: bool = False

    @property
    def free(self) -> int:
        """Slots free now."""
        return 0 if self.is_open or self.running > self.slots else self.slots - self.running

    def with_one_more(self) -> Replica:
        """Return the replica as it is when one more job runs there; `dataclasses.replace` takes three times as long."""
        running, leases = self.running + 1, self.leases + 1
        return Replica(self.url, self.slots, running, leases, self.service_s, self.is_stale, self.is_open)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All replicas at one instant.

    Attributes:
        waiting: jobs that wait for a place, besides the one to be placed now.
        turn: counts placements; moves round-robin along.
    """

    replicas: tuple[Replica, ...]
    waiting: int = 0
    turn: int = 0


Policy = Callable[[Snapshot, Random], list[str]]


def expected_finish(snapshot: Snapshot, rng: Random) -> list[str]:
    """Order by when a job placed now is expected to be done; leave out replicas that waiting would beat."""
    replicas = [replica for replica in snapshot.replicas if not replica.is_open]
    service = _service_times(replicas)
    wait = _wait_for_fastest(replicas, service, snapshot.waiting)
    worth = [replica for replica in replicas if replica.free and service[replica.url] <= wait]
    return _in_order([(_expected_s(replica, service[replica.url]), rng.random(), replica.url) for replica in worth])


def least_loaded(snapshot: Snapshot, rng: Random) -> list[str]:
    """Order by running calls, ties at random; never wait while a slot is free."""
    return _in_order([(replica.running, rng.random(), replica.url) for replica in snapshot.replicas if replica.free])


def round_robin(snapshot: Snapshot, rng: Random) -> list[str]:
    """Go round, whatever the load."""
    ring = sorted(replica.url for replica in snapshot.replicas if not replica.is_open)
    start = snapshot.turn % len(ring) if ring else 0
    return ring[start:] + ring[:start]


def random_order(snapshot: Snapshot, rng: Random) -> list[str]:
    """Draw, whatever the load."""
    urls = [replica.url for replica in snapshot.replicas if not replica.is_open]
    rng.shuffle(urls)
    return urls


POLICIES: Final[dict[str, Policy]] = {
    "expected-finish": expected_finish,
    "least-loaded": least_loaded,
    "round-robin": round_robin,
    "random": random_order,
}


def plan(policy: Policy, snapshot: Snapshot, places: int, rng: Random) -> list[list[str]]:
    """Return orders of preference for up to *places* jobs, each taking the earlier ones into account.

    The list ends early where the policy waits.
    """
    orders: list[list[str]] = []
    while len(orders) < places:
        order = policy(snapshot, rng)
        if not order:
            break
        orders.append(order)
        snapshot = _after(snapshot, order)
    return orders


def _after(snapshot: Snapshot, order: Sequence[str]) -> Snapshot:
    replicas = list(snapshot.replicas)
    number_of = {replica.url: number for number, replica in enumerate(replicas) if replica.free}
    taken = next((number_of[url] for url in order if url in number_of), None)
    if taken is not None:
        replicas[taken] = replicas[taken].with_one_more()
    return Snapshot(tuple(replicas), max(0, snapshot.waiting - 1), snapshot.turn + 1)


def _service_times(replicas: Sequence[Replica]) -> dict[str, float]:
    """Fill gaps with the best known time: an unknown replica is tried, and a shunned one is tried again, by one job.

    Without that a replica that was slow once would stay shunned, since nothing is learned of it any more.
    """
    known = [replica.service_s for replica in replicas if replica.service_s is not None]
    best = max(1e-6, min(known, default=UNKNOWN_SERVICE_S))
    times = {}
    for replica in replicas:
        probe = replica.service_s is None or (replica.is_stale and replica.running == 0)
        measured = best if probe else replica.service_s or best
        times[replica.url] = best if measured <= SAME_SPEED * best else measured
    return times


def _expected_s(replica: Replica, service_s: float) -> float:
    return service_s * (1 + replica.running / replica.slots)


def _wait_for_fastest(replicas: Sequence[Replica], service: dict[str, float], waiting: int) -> float:
    """Return when the last waiting job would be done if all of them waited for the fastest replicas, in seconds."""
    if not replicas:
        return 0.0
    fastest = min(service.values())
    fast = [replica for replica in replicas if service[replica.url] <= 2 * fastest]
    if any(replica.free for replica in fast):
        return 2 * fastest  # nothing slower than these is worth considering while one of them is free
    rate = sum(replica.slots / service[replica.url] for replica in fast)
    return (waiting + 1) / rate + fastest


def _in_order(ranked: list[tuple[float, float, str]]) -> list[str]:
    """Return URLs by their first number, those of equal rank by the second, which is drawn."""
    ranked.sort()
    return [url for _, _, url in ranked]
