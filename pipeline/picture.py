"""A closer look at Redis than `overview`: how old waiting work is, who holds what, how replicas feel.

For people (`penstock status`): it asks once more for each stream, replica and worker that has something to tell.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pipeline import keys, scripts
from pipeline.connection import GroupMissing
from pipeline.overview import Overview, look
from pipeline.replicas import STALE_AFTER_S, read_registry
from pipeline.streams import number

if TYPE_CHECKING:
    from pipeline.connection import Link

REGISTERED_FOR_S: Final = 10.0
"""A replica that no worker has named for so long is served by none: workers name theirs at every few renewals."""


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    """How a replica does.

    Attributes:
        word: `ok`, `failing` (its last calls failed), `resting` (its breaker is open), `probed` (its breaker lets one
            call through), `unserved` (no worker that runs is configured with it).
        failures: in a row, up to now.
        rests_ms: until its breaker lets a call through again.
        tokens_per_s: of the last calls; None where none is known.
        quiet_ms: since its last good answer; None where there is none on record.
    """

    word: str
    failures: int
    rests_ms: int
    tokens_per_s: float | None
    quiet_ms: int | None


@dataclass(slots=True)
class Holding:
    """What one consumer has in hand.

    Attributes:
        entries: how many, by stage.
        oldest_ms: how long it has held the one it took first.
    """

    entries: dict[str, int] = field(default_factory=dict)
    oldest_ms: int = 0

    @property
    def total(self) -> int:
        """Entries of all stages."""
        return sum(self.entries.values())


@dataclass(frozen=True, slots=True)
class Picture:
    """Everything at one instant (almost: one command after the other).

    Attributes:
        oldest_ms: age of the oldest entry, in hand or not, of each stream that has one.
        health: by replica.
        holdings: by consumer, of those that hold something; one that is no worker in `seen` has died, and its work is
            about to be taken over.
    """

    seen: Overview
    oldest_ms: dict[str, int]
    health: dict[str, ReplicaHealth]
    holdings: dict[str, Holding]

    @property
    def lapsed(self) -> dict[str, Holding]:
        """What consumers hold that do not live."""
        living = {worker.consumer for worker in self.seen.workers}
        return {name: held for name, held in self.holdings.items() if name not in living}

    def as_json(self) -> dict[str, Any]:
        """Return all of it for scripts: the overview, with what is known more closely in its rows."""
        body = asdict(self.seen)
        for row in body["streams"]:
            row["depth"] = row["waiting"] + row["in_hand"]
            row["oldest_entry_ms"] = self.oldest_ms.get(row["stream"], 0)
        for row in body["replicas"]:
            health = asdict(self.health[row["url"]])
            row |= {"health": health.pop("word"), **health}
        for row in body["workers"]:
            held = self.holdings.get(row["consumer"], Holding())
            row |= {"holds": held.entries, "oldest_held_ms": held.oldest_ms}
        body["lapsed"] = [
            {"consumer": name, "holds": held.entries, "oldest_held_ms": held.oldest_ms}
            for name, held in sorted(self.lapsed.items())
        ]
        return body


async def look_closely(link: Link, *, thorough: bool = True) -> Picture:
    """Look at Redis once.

    Args:
        thorough: see `look`; not for who looks again and again.

    Raises:
        BrokerUnavailable: Redis does not answer.
        CommandRefused: a key is of a wrong type.
    """
    seen = await look(link, thorough=thorough)
    names = [view.stream for view in seen.streams if view.waiting or view.in_hand]
    ages = await link.run(scripts.OLDEST, names, ()) if names else []
    return Picture(
        seen,
        oldest_ms={name: int(age) for name, age in zip(names, ages, strict=True) if age >= 0},
        health=await _health(link, [view.url for view in seen.replicas]),
        holdings=await _holdings(link, [view.stream for view in seen.streams if view.in_hand]),
    )


async def _health(link: Link, urls: list[str]) -> dict[str, ReplicaHealth]:
    now_ms = await link.time_us() // 1000
    registered = read_registry(await link.call("HGETALL", keys.REPLICAS))
    found = {}
    for url in urls:
        fields = ("us_per_token", "failures", "open_until_ms", "seen_ms")
        values = await link.call("HMGET", keys.HEALTH + url, *fields)
        us_per_token, failures, open_until_ms, good_ms = (number(value) for value in values)
        named_ms = registered[url].seen_ms if url in registered else 0
        found[url] = judge(
            now_ms,
            named_ms=named_ms,
            failures=int(failures or 0),
            open_until_ms=int(open_until_ms or 0),
            good_ms=int(good_ms) if good_ms else None,
            us_per_token=us_per_token,
        )
    return found


def judge(
    now_ms: int, *, named_ms: int, failures: int, open_until_ms: int, good_ms: int | None, us_per_token: float | None
) -> ReplicaHealth:
    """Return how a replica does, from what Redis says of it.

    Args:
        named_ms: when a worker last named it as one of its own.
        open_until_ms: when its breaker lets the next call through; 0 where it is closed.
        good_ms: when it last answered well.
    """
    if now_ms - named_ms > REGISTERED_FOR_S * 1000:
        word = "unserved"
    elif open_until_ms > now_ms:
        word = "resting"
    elif open_until_ms:
        word = "probed"
    else:
        word = "failing" if failures else "ok"
    quiet_ms = None if good_ms is None else max(0, now_ms - good_ms)
    is_fresh = quiet_ms is not None and quiet_ms <= STALE_AFTER_S * 1000
    return ReplicaHealth(
        word,
        failures=failures,
        rests_ms=max(0, open_until_ms - now_ms),
        tokens_per_s=round(1e6 / us_per_token, 1) if us_per_token and is_fresh else None,
        quiet_ms=quiet_ms,
    )


async def _holdings(link: Link, streams: list[str]) -> dict[str, Holding]:
    found: dict[str, Holding] = defaultdict(Holding)
    for stream in streams:
        stage = keys.stage_of(stream)
        try:
            rows = (await link.call("XPENDING", stream, stage))[3] or []
            for name, count in rows:
                oldest = await link.call("XPENDING", stream, stage, "-", "+", 1, name)
                held = found[name.decode(errors="replace")]
                held.entries[stage] = held.entries.get(stage, 0) + int(count)
                held.oldest_ms = max(held.oldest_ms, int(oldest[0][2]) if oldest else 0)
        except GroupMissing:
            continue
    return dict(found)
