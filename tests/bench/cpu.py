"""How much CPU time a process has taken: its own, and that of children it has waited for.

Own time is read from the process' CPU clock, which Linux keeps for every process and which has a resolution of one
nanosecond (`clock_getcpuclockid(3)`; utime + stime of `/proc/<pid>/stat` are the same time, cut to ticks of 10 ms).
Children that have ended and were waited for count in ticks: Redis has one while it rewrites its append-only file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

CPUCLOCK_SCHED: Final = 2  # linux: include/linux/posix-timers.h; clock id = (~pid << 3) | kind
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


def spent_us(pid: int) -> float:
    """Return the CPU time of a running process so far, all its threads included, in microseconds.

    Raises:
        ProcessLookupError: there is no such process.
    """
    try:
        own_ns = time.clock_gettime_ns((~pid << 3) | CPUCLOCK_SCHED)
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, FileNotFoundError) as error:
        raise ProcessLookupError(f"process {pid} does not run") from error
    return own_ns / 1000 + (int(fields[13]) + int(fields[14])) * 1e6 / TICKS_PER_S


def spent_by(pids: Mapping[str, int]) -> dict[str, float]:
    """Return the CPU time of several processes so far, by name, in microseconds."""
    return {name: spent_us(pid) for name, pid in pids.items()}


def between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return what was spent from one reading to the next."""
    return {name: after[name] - before[name] for name in after}
