"""What accepting work has in common, whatever the work: the key under which it is accepted once, and the refusals."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline import keys
from pipeline.errors import IdempotencyMismatch, Overloaded, PenstockError


@dataclass(frozen=True, slots=True)
class Idempotency:
    """An Idempotency-Key as Redis knows it.

    Attributes:
        key: a hash over tenant, path and the header's value.
        body_hash: tells the same request from another one under the same key.
    """

    key: str
    body_hash: str
    ttl_s: float = 86_400.0


def key_arguments(idempotency: Idempotency | None) -> tuple[str, str, int]:
    """Return what accepting scripts are told of a key: as Redis names it ("" none), its body's hash, its life (ms)."""
    if idempotency is None:
        return "", "", 0
    return keys.IDEMPOTENCY + idempotency.key, idempotency.body_hash, int(idempotency.ttl_s * 1000)


def limit_arguments(tenant: str, in_flight_limit: int | None) -> tuple[str, int]:
    """Return what accepting scripts are told of a tenant's limit: the set it counts in ("" none), and the limit."""
    return (keys.IN_FLIGHT + tenant if in_flight_limit is not None else "", in_flight_limit or 0)


def refusal(word: str, in_flight_limit: int | None = None) -> PenstockError:
    """Return what it means that an accepting script has accepted nothing and said *word*."""
    match word:
        case "mismatch":
            return IdempotencyMismatch()
        case "in_flight":
            text = f"this API key has {in_flight_limit} unfinished jobs, as many as it may"
            return Overloaded(text, code="too_many_in_flight")
        case "backlog":
            return Overloaded("the recorder is behind: too much waits to be written to history; try again later")
    return Overloaded()
