"""`penstock verify`: one check after the other, each with a verdict, and what to do where it is bad.

The checks themselves are in `gateway/checks.py`; here they are chosen, run and shown. A check returns what it saw, or
raises what it found wrong (`Failed`), or why it cannot be made here (`Skipped`). One whose need has not passed is not
tried: it could only repeat what is told already. Whatever happens, also Ctrl-C, what the checks have made is taken away
at the end; that is a check like the others.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar

from rich.text import Text

from gateway.client import GatewayRefused, GatewayUnreachable
from pipeline.errors import PenstockError

if TYPE_CHECKING:
    from rich.console import Console

S = TypeVar("S")
Word = Literal["PASS", "FAIL", "SKIP"]

_COLOURS: Final = {"PASS": "green", "FAIL": "bold red", "SKIP": "yellow"}
_NAME_WIDTH: Final = 17
_INDENT: Final = len("PASS  ") + _NAME_WIDTH + 1


class Failed(Exception):
    """Something is not as it should be.

    Attributes:
        todo: what whoever reads it can do.
    """

    def __init__(self, what: str, todo: str) -> None:
        super().__init__(what)
        self.todo = todo


class Skipped(Exception):
    """It cannot be told from here; the message says why."""


@dataclass(frozen=True, slots=True)
class Check(Generic[S]):
    """One thing that is looked at.

    Attributes:
        about: what it is about, in a few words.
        run: returns what it saw; raises `Failed` or `Skipped`.
        within_s: how long it may take.
        needs: checks without which it says nothing.
        stages: those that its work passes.
    """

    name: str
    about: str
    run: Callable[[S], Awaitable[str]]
    within_s: float = 10.0
    needs: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a check.

    Attributes:
        said: what was seen, or what is wrong, or why it was not tried.
        todo: what to do; "" unless it failed.
    """

    name: str
    about: str
    word: Word
    said: str
    todo: str = ""
    took_s: float = 0.0


def choose(checks: Sequence[Check[S]], names: Iterable[str]) -> list[Check[S]]:
    """Return the checks of these names and all that they need, in the order given; all where none is named.

    Raises:
        ValueError: there is none of a name.
    """
    by_name = {check.name: check for check in checks}
    wanted: set[str] = set()
    waiting = list(names) or list(by_name)
    while waiting:
        name = waiting.pop()
        if name not in by_name:
            raise ValueError(f"there is no check {name!r}; there are {', '.join(by_name)}")
        if name not in wanted:
            wanted.add(name)
            waiting += by_name[name].needs
    return [check for check in checks if check.name in wanted]


async def verify(
    checks: Sequence[Check[S]],
    last: Check[S],
    site: S,
    stuck: Callable[[Check[S]], Awaitable[tuple[str, str]]],
    show: Callable[[Verdict], None],
    watch: Callable[[Check[S]], AbstractContextManager[object]] = lambda _check: nullcontext(),
) -> list[Verdict]:
    """Make the checks, and *last* whatever happens; return all verdicts.

    Args:
        stuck: tells of a check whose time was over where its work stands, and what to do.
        show: told each verdict as soon as there is one.
        watch: a block that is open while a check is made.
    """
    verdicts: list[Verdict] = []

    async def judge(check: Check[S]) -> None:
        with watch(check):
            verdict = await _judge(check, site, verdicts, stuck)
        verdicts.append(verdict)
        show(verdict)

    me = asyncio.current_task()
    assert me is not None
    try:
        for check in checks:
            await judge(check)
            if me.cancelling():  # and yet it came here: now and then a library loses a cancellation on the way
                raise asyncio.CancelledError
    finally:
        await judge(last)
    return verdicts


async def _judge(
    check: Check[S], site: S, before: Sequence[Verdict], stuck: Callable[[Check[S]], Awaitable[tuple[str, str]]]
) -> Verdict:
    missing = [verdict.name for verdict in before if verdict.name in check.needs and verdict.word != "PASS"]
    if missing:
        return Verdict(check.name, check.about, "SKIP", f"not tried without {', '.join(missing)}")
    began_s = time.monotonic()
    word: Word = "FAIL"
    todo = ""
    try:
        async with asyncio.timeout(check.within_s):
            said = await check.run(site)
        word = "PASS"
    except Skipped as reason:
        word, said = "SKIP", str(reason)
    except Failed as found:
        said, todo = str(found), found.todo
    except TimeoutError:
        where, todo = await stuck(check)
        said = f"not done within {check.within_s:g} s{where}"
    except GatewayUnreachable as error:
        said, todo = str(error), "look at the gateway's log, and try again"
    except GatewayRefused as error:
        said, todo = f"the gateway answers {error.status} {error.code}: {error}", _todo(error)
    except PenstockError as error:
        said, todo = f"Redis: {error}", "is it the Redis of this system, and does it work? `penstock status` tells more"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        said = f"what came back cannot be read ({type(error).__name__}: {error})"
        todo = "is it Penstock that answers there, and of this version? See what the gateway says at /openapi.json"
    return Verdict(check.name, check.about, word, said, todo, round(time.monotonic() - began_s, 3))


def _todo(refusal: GatewayRefused) -> str:
    """Return what to do about a refusal that no check knows better."""
    match refusal.status, refusal.code:
        case 401 | 403, _:
            return "give another API key: --api-key, or GATEWAY_API_KEY; `penstock keys create NAME` makes one"
        case 404 | 405, _:
            return "this gateway does not know what is asked: finish the upgrade of all processes"
        case 429, _:
            return "this API key has too much unfinished work: wait, or raise PENSTOCK_GATEWAY__MAX_IN_FLIGHT_PER_KEY"
        case 503, "overloaded":
            return "too much is unfinished, or Redis is short of memory: `penstock status` shows what waits and where"
        case 503, "history_unavailable":
            return "start the database, or mend DATABASE_URL of gateways and recorders"
        case 503, "broken_key":
            return "a key in Redis holds what Penstock never wrote: the gateway's log (`gateway.broken_key`) names it"
        case 503, _:
            return "wait a moment and try again; if it stays, the gateway's log says why"
    return "the gateway's log tells more: look for the request's time"


# --- What people see ---------------------------------------------------------------------------


def line(verdict: Verdict, width: int) -> Text:
    """Return one verdict, in lines of *width* columns."""
    return _entry(verdict, f"{verdict.said} ({verdict.took_s:.2f} s)" if verdict.took_s else verdict.said, width)


def summary(verdicts: Sequence[Verdict], took_s: float, width: int) -> Text:
    """Return what came of all: the counts, and of each failure what to do."""
    counts = Counter(verdict.word for verdict in verdicts)
    text = Text("\n")
    parts = [
        (counts["PASS"], "passed", "PASS"),
        (counts["FAIL"], "failed", "FAIL"),
        (counts["SKIP"], "skipped", "SKIP"),
    ]
    text.append(", ".join(f"{count} {word}" for count, word, _ in parts if count or word == "failed"))
    text.append(f" in {took_s:.1f} s\n")
    text.stylize(_COLOURS["FAIL" if counts["FAIL"] else "PASS"])
    for verdict in verdicts:
        if verdict.word == "FAIL":
            text.append("\n").append(_entry(verdict, verdict.said, width)).append("\n")
            text.append(_hanging(f"to do: {verdict.todo}", width)).append("\n")
    return text


def _entry(verdict: Verdict, said: str, width: int) -> Text:
    text = Text()
    text.append(verdict.word, style=_COLOURS[verdict.word])
    text.append(f"  {verdict.name:<{_NAME_WIDTH}} ", style="bold")
    return text.append(_hanging(said, width).lstrip())


def _hanging(said: str, width: int) -> str:
    """Return *said* in lines that all begin where the first one does, behind the name."""
    space = " " * _INDENT
    lines = wrap(said, max(width - 1, _INDENT + 20), initial_indent=space, subsequent_indent=space)
    return "\n".join(lines)


def shower(
    console: Console,
) -> tuple[Callable[[Verdict], None], Callable[[Check[Any]], AbstractContextManager[object]]]:
    """Return what shows verdicts as they come, and, on a terminal, what is being looked at."""

    def show(verdict: Verdict) -> None:
        console.print(line(verdict, console.width), soft_wrap=True)

    def watch(check: Check[Any]) -> AbstractContextManager[object]:
        if not console.is_terminal:
            return nullcontext()
        return console.status(Text(f"{check.name}: {check.about}", style="dim"))

    return show, watch


def as_json(verdicts: Sequence[Verdict], took_s: float) -> dict[str, Any]:
    """Return everything for scripts."""
    counts = Counter(verdict.word for verdict in verdicts)
    return {
        "passed": counts["PASS"],
        "failed": counts["FAIL"],
        "skipped": counts["SKIP"],
        "took_s": round(took_s, 3),
        "checks": [_row(verdict) for verdict in verdicts],
    }


def _row(verdict: Verdict) -> dict[str, Any]:
    row = asdict(verdict)
    return {"name": row.pop("name"), "verdict": row.pop("word"), **row}
