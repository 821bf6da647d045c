"""Which replica takes the next job: properties of the policies, and a small simulation of what follows from them."""

from __future__ import annotations

import heapq
from collections import Counter
from itertools import count
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.balancing import POLICIES, Replica, Snapshot, plan

SLOTS = 4

replicas = st.builds(
    Replica,
    url=st.sampled_from([f"http://{name}" for name in "abcdef"]),
    slots=st.integers(1, 8),
    running=st.integers(0, 10),
    leases=st.integers(0, 20),
    service_s=st.none() | st.floats(0, 1000),
    is_open=st.booleans(),
)
snapshots = st.builds(
    Snapshot,
    st.lists(replicas, max_size=6, unique_by=lambda replica: replica.url).map(tuple),
    waiting=st.integers(0, 100),
    turn=st.integers(0, 1000),
)
policies = st.sampled_from(sorted(POLICIES))


# --- properties -----------------------------------------------------------------------------------


@given(policies, snapshots, st.integers())
def test_order_names_each_closed_replica_at_most_once(name: str, snapshot: Snapshot, seed: int) -> None:
    """None with an open breaker, none that does not exist."""
    order = POLICIES[name](snapshot, Random(seed))
    assert len(order) == len(set(order))
    assert set(order) <= {replica.url for replica in snapshot.replicas if not replica.is_open}


@given(st.sampled_from(["expected-finish", "least-loaded"]), snapshots, st.integers())
def test_order_by_load_names_free_replicas_only(name: str, snapshot: Snapshot, seed: int) -> None:
    """So an empty order means waiting."""
    order = POLICIES[name](snapshot, Random(seed))
    assert set(order) <= {replica.url for replica in snapshot.replicas if replica.free > 0}


@given(snapshots, st.integers())
def test_expected_finish_never_waits_for_nothing(snapshot: Snapshot, seed: int) -> None:
    """While the fastest replica has a free slot, it or one about as fast is taken."""
    order = POLICIES["expected-finish"](snapshot, Random(seed))
    known = [replica for replica in snapshot.replicas if not replica.is_open and replica.service_s is not None]
    if known and len(known) == len([r for r in snapshot.replicas if not r.is_open]):
        fastest = min(known, key=lambda replica: replica.service_s or 0.0)
        if fastest.free:
            assert order
    if not any(replica.free for replica in snapshot.replicas):
        assert order == []


@given(policies, snapshots, st.integers(0, 40), st.integers())
def test_plan_never_gives_a_replica_more_than_its_free_slots(
    name: str, snapshot: Snapshot, places: int, seed: int
) -> None:
    """Obeyed as the placing script does: down the order, the first with a free slot."""
    free = {replica.url: replica.free for replica in snapshot.replicas}
    orders = plan(POLICIES[name], snapshot, places, Random(seed))
    assert len(orders) <= places
    for order in orders:
        taken = next((url for url in order if free[url] > 0), None)
        if taken is None:
            assert not any(free[url] for url in order)
        else:
            free[taken] -= 1
    if name in {"expected-finish", "least-loaded"}:
        assert len(orders) <= sum(replica.free for replica in snapshot.replicas)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_equal_replicas_get_equal_shares(name: str) -> None:
    """Over a thousand jobs, each ending before the next: within a fifth."""
    rng = Random(5)
    snapshot = Snapshot(tuple(Replica(f"http://{name}", slots=4, service_s=1.0) for name in "abc"))
    shares: Counter[str] = Counter()
    for turn in range(900):
        (order,) = plan(POLICIES[name], Snapshot(snapshot.replicas, turn=turn), 1, rng)
        shares[order[0]] += 1
    assert all(240 <= share <= 360 for share in shares.values()), shares
    assert len(shares) == 3


@pytest.mark.parametrize("name", ["expected-finish", "least-loaded", "round-robin"])
def test_one_plan_spreads_over_equal_replicas(name: str) -> None:
    """Twelve jobs at once over three times four slots: four each."""
    snapshot = Snapshot(tuple(Replica(f"http://{name}", slots=4, service_s=1.0) for name in "abc"), waiting=11)
    orders = plan(POLICIES[name], snapshot, 12, Random(1))
    assert sorted(Counter(order[0] for order in orders).values()) == [4, 4, 4]


def test_slow_replica_stays_idle_while_waiting_is_quicker() -> None:
    """And is used when the queue before the fast ones has grown long enough."""
    fast = [Replica(f"http://{name}", slots=4, running=4, service_s=1.0) for name in "ab"]
    slow = Replica("http://slow", slots=4, service_s=10.0)
    policy = POLICIES["expected-finish"]
    assert policy(Snapshot((*fast, slow), waiting=3), Random(1)) == []
    assert policy(Snapshot((*fast, slow), waiting=200), Random(1)) == ["http://slow"]
    assert POLICIES["least-loaded"](Snapshot((*fast, slow)), Random(1)) == ["http://slow"]


def test_unknown_replica_is_tried() -> None:
    """It is taken for as fast as the fastest known."""
    snapshot = Snapshot((Replica("http://a", slots=4, running=1, service_s=1.0), Replica("http://new", slots=4)))
    assert POLICIES["expected-finish"](snapshot, Random(1))[0] == "http://new"


# --- simulation -----------------------------------------------------------------------------------


def simulate(policy: str, speeds: list[float], load: float, *, jobs: int = 6_000, seed: int = 11) -> list[float]:
    """Return the times in the system, in mean service times of a fast replica, sorted.

    Open loop (Poisson arrivals), one replica per entry of *speeds* with SLOTS slots each, lognormal service;
    *load* is the share of the whole capacity that arrives.
    """
    rng = Random(seed)
    urls = [f"http://{number}" for number in range(len(speeds))]
    rate = load * sum(SLOTS * speed for speed in speeds)
    running = dict.fromkeys(urls, 0)
    estimate: dict[str, float | None] = dict.fromkeys(urls)
    queue: list[float] = []
    times: list[float] = []
    order = count()
    events: list[tuple[float, int, str, float, float]] = []
    arrival = 0.0
    for _ in range(jobs):
        arrival += rng.expovariate(rate)
        heapq.heappush(events, (arrival, next(order), "", arrival, 0.0))
    while events:
        now, _, url, began, span = heapq.heappop(events)
        if url:
            running[url] -= 1
            times.append(now - began)
            known = estimate[url]
            estimate[url] = span if known is None else 0.8 * known + 0.2 * span
        else:
            queue.append(began)
        snapshot = Snapshot(
            tuple(Replica(u, SLOTS, running=running[u], service_s=estimate[u]) for u in urls), max(0, len(queue) - 1)
        )
        for preference in plan(POLICIES[policy], snapshot, len(queue), rng):
            taken = next((u for u in preference if running[u] < SLOTS), None)
            if taken is None:
                break
            running[taken] += 1
            span = rng.lognormvariate(-0.125, 0.5) / speeds[urls.index(taken)]
            heapq.heappush(events, (now + span, next(order), taken, queue.pop(0), span))
    assert len(times) == jobs
    return sorted(times)


def p99(times: list[float]) -> float:
    return times[int(0.99 * len(times))]


@pytest.mark.parametrize(("load", "share"), [(0.5, 0.6), (0.8, 0.6)])
def test_expected_finish_halves_the_tail_with_a_slow_replica(load: float, share: float) -> None:
    """One replica ten times slower: by count it would get its slots' share of the work, and make the tail."""
    by_finish, by_count = (p99(simulate(policy, [1, 1, 0.1], load)) for policy in ("expected-finish", "least-loaded"))
    assert by_finish < share * by_count
    assert by_finish < 9


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_expected_finish_costs_nothing_with_equal_replicas(load: float) -> None:
    """Where nothing is to be gained, nothing is lost."""
    by_finish, by_count = (p99(simulate(policy, [1, 1, 1], load)) for policy in ("expected-finish", "least-loaded"))
    assert by_finish < 1.15 * by_count
    assert by_finish < 6


def test_every_policy_serves_every_job() -> None:
    """Nobody starves, also where a policy waits."""
    for policy in POLICIES:
        simulate(policy, [1, 0.5, 0.1], 0.6, jobs=1_500)
