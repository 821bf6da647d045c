"""How the mock replica behaves: how long it takes, how often it fails and in what way. Values only.

A behaviour never changes: `Behaviour.changed` returns another one, so a request keeps the behaviour it arrived under
while tests already set the next.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

MAX_LATENCY_S = 86_400.0
MAX_SIGMA = 3.0  # e**3 = 20: one answer in six then takes over 20 medians; more is a typing mistake


@dataclass(frozen=True, slots=True)
class Latency:
    """The time of an answer before its tokens: a fixed span, or lognormal round a median.

    Args:
        median_s: half of the answers take longer; with sigma 0 all take just this. 0 answers at once.
        sigma: standard deviation of the logarithm; 0.5 puts P99 at 3.2 medians, 1.0 at 10.
    Raises:
        ValueError: out of range, or a sigma round a median of 0.
    """

    median_s: float
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.median_s <= MAX_LATENCY_S:
            raise ValueError(f"latency must lie in 0 to {MAX_LATENCY_S:.0f} seconds, not {self.median_s:g}")
        if not 0 <= self.sigma <= MAX_SIGMA:
            raise ValueError(f"latency's sigma must lie in 0 to {MAX_SIGMA:g}, not {self.sigma:g}")
        if self.sigma and not self.median_s:
            raise ValueError("a lognormal latency needs a median above 0")

    def draw_s(self, rng: Random) -> float:
        """Return the next latency in seconds."""
        if not self.sigma:
            return self.median_s
        return rng.lognormvariate(math.log(self.median_s), self.sigma)

    def __str__(self) -> str:
        return f"lognormal:{self.median_s:g},{self.sigma:g}" if self.sigma else f"fixed:{self.median_s:g}"


def parse_latency(text: str) -> Latency:
    """Read `0.05`, `fixed:0.05` or `lognormal:MEDIAN,SIGMA`, in seconds.

    Raises:
        ValueError: none of these forms, or out of range.
    """
    kind, colon, rest = text.strip().partition(":")
    if not colon:
        kind, rest = "fixed", kind
    try:
        numbers = [float(part) for part in rest.split(",")]
    except ValueError:
        numbers = []
    if kind == "fixed" and len(numbers) == 1:
        return Latency(numbers[0])
    if kind == "lognormal" and len(numbers) == 2:
        return Latency(numbers[0], numbers[1])
    raise ValueError(f"latency must read 0.05, fixed:0.05 or lognormal:MEDIAN,SIGMA (seconds), not {text!r}")


class Mode(StrEnum):
    """In which shape answers leave: as they should, or broken in one of the ways seen in the wild."""

    NORMAL = "normal"
    GARBAGE = "garbage"  # 200 with a web page, as from a proxy that has lost its upstream
    EMPTY = "empty"  # valid JSON with no choice and no vector in it
    TRUNCATED = "truncated"  # the connection closes half-way through the body
    STALLED = "stalled"  # half the body, then silence on an open connection
    HANG = "hang"  # not a byte; the slot stays taken until the client leaves


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What every request that arrives from now on meets.

    Args:
        latency: time before the first token.
        tokens_per_second: pace of the tokens after it; 0: all at once.
        slots: requests served at once, the others wait in the order they came; 0: no bound.
        fail_rate: share of requests answered 500, after their latency, as a model that breaks at its work.
        status: every request is refused with this HTTP status, at once and without a slot; None: none is.
        retry_after_s: sent as Retry-After with each error answer; None: not sent.
        mode: the shape of the answers that are neither failed nor refused.
    Raises:
        ValueError: a field out of its range.
    """

    latency: Latency = Latency(0.0)
    tokens_per_second: float = 0.0
    slots: int = 0
    fail_rate: float = 0.0
    status: int | None = None
    retry_after_s: float | None = None
    mode: Mode = Mode.NORMAL

    def __post_init__(self) -> None:
        if not 0 <= self.tokens_per_second < math.inf:
            raise ValueError(f"tokens_per_second must be 0 (no pace) or above, not {self.tokens_per_second:g}")
        if self.slots < 0:
            raise ValueError(f"slots must be 0 (no bound) or above, not {self.slots}")
        if not 0 <= self.fail_rate <= 1:
            raise ValueError(f"fail_rate is a share and must lie in 0 to 1, not {self.fail_rate:g}")
        if self.status is not None and not 400 <= self.status <= 599:
            raise ValueError(f"status must be an error's, 400 to 599, not {self.status}")
        if self.retry_after_s is not None and not 0 <= self.retry_after_s < math.inf:
            raise ValueError(f"retry_after_s must be 0 or above, not {self.retry_after_s:g}")

    def changed(self, patch: Mapping[str, object]) -> Behaviour:
        """Return this behaviour with the fields of *patch*, as JSON gives them; null clears status and retry_after_s.

        Raises:
            ValueError: an unknown field, a wrong type, or out of range.
        """
        known = {field.name for field in fields(self)}
        if unknown := sorted(set(patch) - known):
            raise ValueError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}")
        return replace(self, **{name: _read_field(name, value) for name, value in patch.items()})

    def as_json(self) -> dict[str, object]:
        """Return the fields in the form that `changed` takes."""
        return {**asdict(self), "latency": str(self.latency), "mode": str(self.mode)}


def _read_field(name: str, value: object) -> Any:  # any field's type: `replace` takes them all
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name == "latency" and (is_number or isinstance(value, str)):
        return parse_latency(str(value))
    if name == "mode" and isinstance(value, str):
        try:
            return Mode(value)
        except ValueError:
            raise ValueError(f"mode must be one of {', '.join(Mode)}, not {value!r}") from None
    if name in ("tokens_per_second", "fail_rate") and is_number:
        return value
    if name == "retry_after_s" and (is_number or value is None):
        return value
    if (name == "slots" and is_number and isinstance(value, int)) or (
        name == "status" and (value is None or (is_number and isinstance(value, int)))
    ):
        return value
    raise ValueError(f"{name} cannot be {value!r}")
