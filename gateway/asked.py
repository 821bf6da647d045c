"""What callers ask for beside the body, in the path and behind the `?`, and how they are told that it cannot be."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import parse_qs

from pydantic import AfterValidator, Field, StringConstraints, TypeAdapter

from gateway.errors import BrokenKey, Problem
from gateway.operation import Call, Parameter
from pipeline.connection import CommandRefused
from pipeline.errors import MalformedEntry
from pipeline.flows import ModelName
from pipeline.job import is_own_id

T = TypeVar("T")

EXAMPLE: Final = "2026-12-01T08:00:00Z"
"""An instant as clients write them."""
_INSTANT: Final = re.compile(
    r"(?P<day>[0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ](?P<minute>(?:[01][0-9]|2[0-3]):[0-5][0-9])"
    r"(?::(?P<second>[0-5][0-9]|60)(?:[.,](?P<fraction>[0-9]+))?)?(?P<offset>[Zz]|[+-][0-9]{2}(?::?[0-9]{2})?)?"
)
_UNESCAPED: Final = re.compile(r"([0-9-]{10}[Tt ][0-9:.,]+) ([0-9]{2}(?::?[0-9]{2})?)")
_EPOCH: Final = datetime.fromtimestamp(0, UTC)
MOST_LISTED: Final = 200
LISTED: Final = 50

ClientName = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._-]+$")]
"""What clients call a chat, a persona, a queue."""
_CLIENT_NAME: Final[TypeAdapter[str]] = TypeAdapter(ClientName)


def storable(text: str) -> str:
    """Return *text*.

    Raises:
        ValueError: the history cannot take it.
    """
    if "\0" in text:
        raise ValueError("holds the character U+0000, which no database takes")
    return text


Text = Annotated[str, StringConstraints(min_length=1), AfterValidator(storable)]
Model = Annotated[ModelName, AfterValidator(storable)]

AFTER: Final = Parameter("after", "`next` of the page before")
LIMIT: Final = Parameter(
    "limit", f"rows in the page, {LISTED} unless said", type=Annotated[int, Field(ge=1, le=MOST_LISTED)]
)


class Asked:
    """What stands behind the `?`, each name once.

    Args:
        known: the names that may stand there.
        often: those of them that may stand there several times.
    """

    def __init__(self, call: Call, known: set[str], *, often: Sequence[str] = ()) -> None:
        self._given = parse_qs(call.query_string, keep_blank_values=True)
        for name, values in sorted(self._given.items()):
            if name not in known:
                raise wrong(name[:128], "there is no such parameter")
            if len(values) > 1 and name not in often:
                raise wrong(name, "given more than once")

    def texts(self, name: str) -> list[str]:
        """Return all values of a name, as they were given."""
        return self._given.get(name, [])

    def text(self, name: str) -> str | None:
        """Return a value as it was given; None where there is none."""
        values = self.texts(name)
        return values[0] if values else None

    def own_id(self, name: str, what: str) -> str | None:
        """Return an id of ours; None where there is none."""
        value = self.text(name)
        if value is not None and not is_own_id(value):
            raise wrong(name, f"this is no id of a {what}")
        return value

    def one_of(self, name: str, choices: Any) -> str | None:
        """Return a value that is one of a literal's; None where there is none."""
        value = self.text(name)
        known: Sequence[str] = choices.__args__
        if value is not None and value not in known:
            raise wrong(name, f"one of {', '.join(known)}")
        return value

    def instant_ms(self, name: str) -> int | None:
        """Return an instant, in milliseconds since the epoch; None where there is none.

        The `+` of an offset may not have been escaped, and is a blank then.
        """
        value = self.text(name)
        return None if value is None else instant_ms(_with_its_plus(value), name)

    def number(self, name: str, default: int, *, least: int = 0, most: int) -> int:
        """Return a number; *default* where there is none."""
        value = self.text(name)
        if value is None:
            return default
        if not (value.isascii() and value.isdigit() and len(value) <= len(str(most)) and least <= int(value) <= most):
            raise wrong(name, f"a number from {least} to {most}")
        return int(value)

    def limit(self) -> int:
        """Return how many rows are wanted."""
        return self.number("limit", LISTED, least=1, most=MOST_LISTED)


def instant_ms(text: str, path: str) -> int:
    """Return an instant as clients write it (RFC 3339, section 5.6 and its notes), in milliseconds since the epoch.

    A leap second is the first one of the next minute, as in POSIX time. What is finer than a millisecond is cut off.

    Args:
        path: where it stands, for whoever is told that it is none.
    """
    found = _INSTANT.fullmatch(text)
    if found is None:
        raise wrong(path, f"an instant as in RFC 3339: {EXAMPLE}, or with an offset, 2026-12-01T09:00:00+01:00")
    if found["offset"] is None:
        raise wrong(path, f"an instant names its offset: end it with Z for UTC, or with one like +01:00 ({EXAMPLE})")
    second, fraction = found["second"] or "00", found["fraction"] or ""
    offset = "+00:00" if found["offset"] in "Zz" else found["offset"]
    try:
        minute = datetime.fromisoformat(f"{found['day']}T{found['minute']}{offset}").astimezone(UTC)
    except (ValueError, OverflowError):
        raise wrong(path, f"there is no such day or offset; an instant looks like {EXAMPLE}") from None
    if second == "60" and (minute.hour, minute.minute) != (23, 59):
        raise wrong(path, "a second 60 stands at the end of a day of UTC only, as leap seconds do")
    return (minute - _EPOCH) // timedelta(milliseconds=1) + int(second) * 1000 + int((fraction + "000")[:3])


def _with_its_plus(text: str) -> str:
    found = _UNESCAPED.fullmatch(text)
    return f"{found[1]}+{found[2]}" if found else text


def due_ms_of(call: Call, text: str | None, path: str, most_s: float) -> int | None:
    """Return when something is to be done, in milliseconds since the epoch; None: at once.

    Args:
        text: as the client wrote it; None where nothing was said.
        most_s: how far ahead it may lie.
    """
    if text is None:
        return None
    wanted_ms, now_ms = instant_ms(text, path), call.front.clock.now_ms()
    if wanted_ms > now_ms + most_s * 1000:
        span = f"{most_s / 86_400:g} days" if most_s >= 86_400 else f"{most_s:g} seconds"
        raise wrong(path, f"at most {span} ahead")
    return wanted_ms if wanted_ms > now_ms else None


def client_name(given: str, path: str) -> str:
    """Return a name that a client has chosen, as it was given.

    Raises:
        Problem: 422, it cannot be one.
    """
    try:
        return _CLIENT_NAME.validate_python(given)
    except ValueError:
        raise wrong(path, "1 to 128 characters out of A-Z a-z 0-9 . _ -") from None


def own_id(call: Call, name: str, what: str) -> str:
    """Return the id in the path; one that we never gave is no record's."""
    given = call.path_id(name)
    if not is_own_id(given):
        raise not_found(what, given)
    return given


def not_found(what: str, given: str) -> Problem:
    """Return the 404 for a record that there is not."""
    return Problem(404, f"{what}_not_found", f"there is no {what} {given[:128]!r}")


def wrong(path: str, message: str, code: str = "invalid_field") -> Problem:
    """Return the 422 that names a field or a parameter."""
    return Problem(422, code, f"{path}: {message}", param=path)


async def from_redis(question: Awaitable[T], job_id: str | None = None) -> T:
    """Ask Redis; a key that holds what Penstock never wrote is an operator's to mend."""
    try:
        return await question
    except (ValueError, KeyError, CommandRefused, MalformedEntry) as error:
        raise BrokenKey(str(error), job_id) from error
