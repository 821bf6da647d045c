"""What an idle system must not hold: load, unfinished work, keys that nothing bounds.

Read from Redis when all is quiet: the load of a replica is the number of its leases, and streams hold unfinished work
only.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

from pipeline import keys

WORK = ("job:*_in*", keys.DELIVERY_QUEUE + "*", keys.INCOMING_QUEUE + "*")
"""Streams that hold unfinished work only."""
_JOBS = {keys.LIVE_INDEX, keys.DELAYED, keys.STAGED, keys.ENTERING}


@dataclass(frozen=True, slots=True)
class Leftovers:
    """Keys that should not be there, by what is wrong with them.

    Attributes:
        load: replicas whose load is not 0, or that hold a lease or a running place.
        endless: keys without a TTL that are not on the bounded list.
        work: streams that hold entries, live records, delayed jobs.
    """

    load: list[str]
    endless: list[str]
    work: list[str]

    def __bool__(self) -> bool:
        return bool(self.load or self.endless or self.work)


async def check(redis: Any) -> Leftovers:
    """Look at every key of a Redis in which nothing should be going on."""
    load, endless, work = [], [], []
    for name in sorted([key.decode(errors="replace") async for key in redis.scan_iter(count=1000)]):
        if name.startswith(keys.LOAD):
            if int(await redis.get(name) or 0) != 0:
                load.append(name)
        elif name.startswith((keys.LEASES, keys.RUNNING)):
            load.append(name)
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in WORK):
            if await redis.xlen(name):
                work.append(name)
        elif name.startswith((keys.LIVE, keys.IN_FLIGHT)) or name in _JOBS:
            work.append(name)
        elif name.startswith(keys.DELIVERY):  # none is unfinished
            if await redis.pttl(name) == -1:
                endless.append(name)
        elif not any(fnmatch.fnmatchcase(name, pattern) for pattern in keys.BOUNDED) and await redis.pttl(name) == -1:
            endless.append(name)
    return Leftovers(load, endless, work)
