"""What this machine lets a process open: checked before a run, so that no run dies of it half-way."""

from __future__ import annotations

import resource
from pathlib import Path

_OWN = 64  # descriptors that a generator needs beside its connections
_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL_PORTS = 16384  # IANA's range, where the system does not say


class NoRoom(Exception):
    """This machine does not allow as many connections as are needed."""


def room(processes: int) -> int:
    """Return how many connections *processes* may have open together."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ports = local_ports()
    return ports if hard == resource.RLIM_INFINITY else max(processes, min(ports, (hard - _OWN) * processes))


def check(connections: int, processes: int) -> None:
    """Make room for *connections* over all *processes*: raises the soft limit of open files as far as is needed.

    Raises:
        NoRoom: there is none; the message says what to change.
    """
    each = -(-connections // processes)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = each + _OWN
    problem = decide_problem(connections, wanted, None if hard == resource.RLIM_INFINITY else hard, local_ports())
    if problem is not None:
        raise NoRoom(problem)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))  # what is started from here on inherits it


def decide_problem(connections: int, descriptors: int, hard_limit: int | None, ports: int) -> str | None:
    """Return why so many connections cannot be; None: they can.

    Args:
        descriptors: open files that one process needs.
        hard_limit: of open files; None: there is none.
        ports: to one address no more connections than these.
    """
    if hard_limit is not None and descriptors > hard_limit:
        return (
            f"{connections} connections need {descriptors} open files in a process, and {hard_limit} are allowed: "
            "raise the limit (ulimit -Hn), use more --processes, or lower --connections or --concurrency"
        )
    if connections > ports:
        return (
            f"{connections} connections to one address need as many local ports, and there are {ports}: "
            "widen net.ipv4.ip_local_port_range, or lower --connections or --concurrency"
        )
    return None


def local_ports() -> int:
    """Return how many ports connections may leave from."""
    try:
        low, high = map(int, _PORTS.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return _USUAL_PORTS
    return high - low + 1
