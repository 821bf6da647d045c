"""What a load test is told to do, checked before anything is started."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from loadtest.arrivals import Pace, Plan
from loadtest.questions import read_questions
from loadtest.slo import Clause, parse
from loadtest.target import DEFAULT_TEMPLATE, Address, read_headers, read_template, requests_of, without_values

if TYPE_CHECKING:
    from pathlib import Path

MOST: Final = 10**9  # of whatever is counted
MOST_S: Final = 10**7  # four months
MOST_PER_S: Final = 10**6
DEFAULT_CONCURRENCY: Final = 50
DEFAULT_REQUESTS: Final = 500
DEFAULT_OPEN_S: Final = 30.0
MAX_CONNECTIONS: Final = 10_000  # where nothing else is said; a third of the ports that Linux has by default


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """One load test.

    Args:
        url: base of the target, http or https.
        concurrency: requests in flight in a closed loop; None: DEFAULT_CONCURRENCY.
        requests: end after so many; and
        duration_s: start none after so long; whichever comes first. Neither: DEFAULT_REQUESTS in a closed loop,
            DEFAULT_OPEN_S in an open one.
        questions: file with one question on each line, asked in turn and over again; None: the built-in ones.
        timeout_s: a request without its whole answer by then has failed.
        api_key: sent as bearer token.
        rate: requests per second in an open loop; None: closed loop.
        pace: of the open loop.
        ramp_from: its rate at the start; None: no ramp.
        seed: of everything that is drawn.
        processes: generators.
        connections: at most so many; None: as many as can be needed, and no more than MAX_CONNECTIONS.
        max_lag_ms: a 99th percentile of the send lag above it makes the run invalid.
        slo: a promise, see `loadtest/slo.py`.
        path, body, headers: of the requests; a body has `{{question}}` where a question goes, `@FILE` is read.
    Raises:
        ValueError: a field out of its range, or fields that do not go together, or a file that cannot be read.
    """

    url: str = "http://127.0.0.1:8000"
    concurrency: int | None = None
    requests: int | None = None
    duration_s: float | None = None
    questions: Path | None = None
    timeout_s: float = 60.0
    api_key: str | None = None
    rate: float | None = None
    pace: Pace = "constant"
    ramp_from: float | None = None
    seed: int = 0
    processes: int = 1
    connections: int | None = None
    max_lag_ms: float = 2.0
    slo: str | None = None
    path: str = "/query"
    body: str = DEFAULT_TEMPLATE
    headers: tuple[str, ...] = ()
    address: Address = field(init=False)
    clauses: tuple[Clause, ...] = field(init=False)
    messages: tuple[bytes, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Check every field, and read the files they name."""
        object.__setattr__(self, "address", Address.of(self.url))
        for name, number in (
            ("concurrency", self.concurrency),
            ("requests", self.requests),
            ("processes", self.processes),
            ("connections", self.connections),
        ):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, not {number}")
            if number is not None and number > MOST:
                raise ValueError(f"{name} must be at most {MOST}, not {number}")
        if abs(self.seed) > MOST:
            raise ValueError(f"seed must be at most {MOST}, not {self.seed}")
        for name, value, unit, most in (
            ("duration", self.duration_s, "seconds", MOST_S),
            ("timeout", self.timeout_s, "seconds", MOST_S),
            ("max-lag", self.max_lag_ms, "milliseconds", MOST_S),
            ("rate", self.rate, "requests per second", MOST_PER_S),
        ):
            if value is not None and not 0 < value <= most:
                raise ValueError(f"{name} must be above 0 {unit} and at most {most:,}, not {value:g}")
        self._check_open_loop()
        least = self.clients if self.rate is None else self.connections or MAX_CONNECTIONS
        if self.processes > least:
            raise ValueError(f"{self.processes} processes cannot share {least} connections: lower --processes")
        object.__setattr__(self, "clauses", () if self.slo is None else parse(self.slo))
        template, headers = read_template(self.body), read_headers(self.headers, self.api_key)
        questions = read_questions(self.questions)
        messages = requests_of(self.address, self.path, template, questions, headers)
        object.__setattr__(self, "messages", tuple(messages))

    def _check_open_loop(self) -> None:
        if self.rate is None:
            alone = {
                "ramp-from": self.ramp_from is not None,
                "connections": self.connections is not None,
                "arrivals": self.pace != "constant",
            }
            for name, is_given in alone.items():
                if is_given:
                    raise ValueError(f"{name} belongs to an open loop: give --rate with it")
            return
        if self.concurrency is not None:
            # It is no bound of an open loop: whoever meant wrk2's connections or k6's maxVUs has --connections.
            raise ValueError(
                "concurrency belongs to a closed loop: leave it out with --rate and --saturate, "
                "where --connections bounds what is open"
            )
        if self.pace not in ("constant", "poisson"):
            raise ValueError(f"arrivals must be constant or poisson, not {self.pace!r}")
        if self.ramp_from is not None:
            if not 0 <= self.ramp_from <= MOST_PER_S:
                raise ValueError(f"ramp-from must be from 0 to {MOST_PER_S:,} requests per second")
            if self.duration_s is None:
                raise ValueError("ramp-from needs --duration: the time over which the rate changes")

    @property
    def plan(self) -> Plan | None:
        """The arrivals; None: closed loop."""
        if self.rate is None:
            return None
        duration_s = self.duration_s
        if duration_s is None:
            # Twice the expected time of the last arrival: independent callers may take longer than expected.
            duration_s = DEFAULT_OPEN_S if self.requests is None else 2 * self.requests / self.rate + 10
        return Plan(self.rate, duration_s, self.pace, self.ramp_from, self.requests, self.seed)

    @property
    def clients(self) -> int:
        """Requests in flight of a closed loop; none are kept in an open one."""
        if self.rate is not None:
            return 0
        return DEFAULT_CONCURRENCY if self.concurrency is None else self.concurrency

    @property
    def closed_count(self) -> int | None:
        """Requests of a closed loop; None: until its time is over."""
        has_end = self.requests is not None or self.duration_s is not None
        return self.requests if has_end else DEFAULT_REQUESTS

    @property
    def most_connections(self) -> int:
        """How many connections are open at most, over all processes."""
        if self.rate is None:
            return self.clients
        if self.connections is not None:
            return self.connections
        fastest = max(self.rate, self.ramp_from or 0.0)
        return max(self.processes, min(math.ceil(fastest * self.timeout_s), MAX_CONNECTIONS))

    def shown(self) -> dict[str, Any]:
        """Return the settings as a report shows them: secrets are not."""
        names = [name for name in self.__slots__ if name not in ("address", "clauses", "messages")]
        values = {name: getattr(self, name) for name in names}
        name = None if self.questions is None else str(self.questions)
        values["questions"] = name and name.encode("utf-8", "replace").decode()  # JSON takes no other bytes
        values["path"] = without_values(self.path)
        values["api_key"] = None if self.api_key is None else "(not shown)"
        values["headers"] = [f"{line.partition(':')[0]}: (not shown)" for line in self.headers]
        return values
