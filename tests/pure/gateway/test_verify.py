"""How the checks of `penstock verify` are chosen, run and shown; what they look at is the whole system's affair."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from rich.console import Console

from gateway.client import GatewayRefused
from gateway.verify import Check, Failed, Skipped, Verdict, as_json, choose, line, shower, summary, verify
from pipeline.errors import BrokerUnavailable

LONG = "http://a-replica-with-a-long-name.models.example.org:8080: no answer within 5 s; " * 3
VERDICTS = [
    Verdict("gateway", "whether it answers", "PASS", "http://127.0.0.1:8000 answers in 3 ms", took_s=0.003),
    Verdict("replicas", "whether they answer", "FAIL", LONG, "start it, or take it out of LLM_URLS " * 3, 5.0),
    Verdict("worker-aggregator", "a worker", "SKIP", "not tried without redis"),
]


class Site:
    """What the checks of a test look at: they note that they ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []


def check(
    name: str,
    *needs: str,
    ends: Exception | None = None,
    within_s: float = 5.0,
    waits: Callable[[], Awaitable[object]] | None = None,
) -> Check[Site]:
    async def run(site: Site) -> str:
        site.ran.append(name)
        if waits is not None:
            await waits()
        if ends is not None:
            raise ends
        return f"{name} is well"

    return Check(name, f"about {name}", run, within_s, needs)


async def stuck(_check: Check[Site]) -> tuple[str, str]:
    return "; it stands in the queue", "look there"


async def judge(*checks: Check[Site]) -> tuple[Site, dict[str, Verdict]]:
    site = Site()
    shown: list[Verdict] = []
    verdicts = await verify(checks, check("clean-up"), site, stuck, shown.append)
    assert shown == verdicts
    return site, {verdict.name: verdict for verdict in verdicts}


# --- Choosing ----------------------------------------------------------------------------------

TABLE = [check("a"), check("b", "a"), check("c"), check("d", "b", "c"), check("e")]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [([], "abcde"), (["a"], "a"), (["d"], "abcd"), (["e", "b"], "abe"), (["d", "d"], "abcd")],
)
def test_a_chosen_check_brings_what_it_needs_in_the_order_of_the_table(names: list[str], chosen: str) -> None:
    """And no more; none chosen are all."""
    assert [check.name for check in choose(TABLE, names)] == list(chosen)


def test_a_name_that_there_is_not_is_refused_with_those_there_are() -> None:
    """Whoever mistypes one sees the right one."""
    with pytest.raises(ValueError, match=r"no check 'f'; there are a, b, c, d, e"):
        choose(TABLE, ["a", "f"])


# --- Running -----------------------------------------------------------------------------------


async def test_a_check_is_not_tried_without_what_it_needs_and_others_are() -> None:
    """What failed is told once; who needs it is skipped, and so is who needs these."""
    site, found = await judge(
        check("a", ends=Failed("a is broken", "mend a")),
        check("b", "a"),
        check("c", "b"),
        check("d", ends=Skipped("not here")),
        check("e", "d"),
        check("f"),
    )
    assert site.ran == ["a", "d", "f", "clean-up"]
    assert {name: verdict.word for name, verdict in found.items()} == {
        "a": "FAIL", "b": "SKIP", "c": "SKIP", "d": "SKIP", "e": "SKIP", "f": "PASS", "clean-up": "PASS",
    }  # fmt: skip
    assert (found["a"].said, found["a"].todo) == ("a is broken", "mend a")
    assert found["c"].said == "not tried without b"
    assert found["d"].said == "not here"


async def test_a_check_whose_time_is_over_tells_where_its_work_stands() -> None:
    """Its own time, not another's; and the next one is made."""
    site, found = await judge(check("slow", within_s=0.01, waits=asyncio.Event().wait), check("next"))
    assert site.ran == ["slow", "next", "clean-up"]
    assert found["slow"].said == "not done within 0.01 s; it stands in the queue"
    assert (found["slow"].word, found["slow"].todo) == ("FAIL", "look there")


@pytest.mark.parametrize(
    ("error", "said", "todo"),
    [
        (GatewayRefused(503, "overloaded", "too much"), "503 overloaded: too much", "penstock status"),
        (GatewayRefused(429, "too_many_in_flight", "later"), "429", "MAX_IN_FLIGHT_PER_KEY"),
        (GatewayRefused(404, "no_such_path", "nothing"), "404", "upgrade"),
        (GatewayRefused(503, "broken_key", "strange"), "503", "gateway.broken_key"),
        (GatewayRefused(500, "internal_error", "a fault"), "500", "log"),
        (BrokerUnavailable("timed out"), "Redis: timed out", "penstock status"),
        (KeyError("job_id"), "KeyError: 'job_id'", "/openapi.json"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_what_no_check_expects_is_a_failure_with_something_to_do(error: Exception, said: str, todo: str) -> None:
    """No traceback, and the others are made."""
    site, found = await judge(check("odd", ends=error), check("next"))
    assert site.ran == ["odd", "next", "clean-up"]
    assert found["odd"].word == "FAIL"
    assert said in found["odd"].said
    assert todo in found["odd"].todo


async def test_the_last_check_is_made_also_when_somebody_interrupts() -> None:
    """What was made has to be removed."""
    site = Site()
    begun = asyncio.Event()

    async def wait() -> None:
        begun.set()
        await asyncio.Event().wait()

    run = verify([check("endless", waits=wait), check("never")], check("clean-up"), site, stuck, lambda _: None)
    running = asyncio.create_task(run)
    await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert site.ran == ["endless", "clean-up"]


async def test_an_interrupt_that_a_check_swallows_ends_the_run_all_the_same() -> None:
    """As a client library does now and then: no further check is made but the last."""
    begun = asyncio.Event()

    async def swallow() -> None:
        begun.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    site = Site()
    checks = [check("first", waits=swallow), check("second")]
    running = asyncio.create_task(verify(checks, check("clean-up"), site, stuck, lambda _verdict: None))
    await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert site.ran == ["first", "clean-up"]


# --- Showing -----------------------------------------------------------------------------------


def shown(*, terminal: bool, width: int) -> str:
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=terminal, width=width, markup=False, highlight=False, color_system="auto"
    )
    show, watch = shower(console)
    for verdict in VERDICTS:
        with watch(check(verdict.name)):
            pass
        show(verdict)
    console.print(summary(VERDICTS, 5.0, console.width), soft_wrap=True)
    return out.getvalue()


def test_lines_fit_a_terminal_and_hang_behind_the_name() -> None:
    """80 columns: nothing is cut off, and names stand alone at the left."""
    text = "\n".join(line(verdict, 80).plain for verdict in VERDICTS) + summary(VERDICTS, 5.0, 80).plain
    assert max(len(row) for row in text.splitlines()) < 80
    assert "".join(LONG.split()) in "".join(text.split())
    first, *more = line(VERDICTS[1], 80).plain.splitlines()
    assert first.startswith("FAIL  replicas          http://a-replica")
    assert len(more) > 2
    assert all(row.startswith(" " * 24) for row in more)


def test_without_a_terminal_there_are_no_colour_codes_and_one_line_each() -> None:
    """Whoever reads a file cuts lines better than we do."""
    rows = shown(terminal=False, width=1_000).splitlines()
    assert "\x1b" not in "".join(rows)
    assert [row.split()[0] for row in rows[:3]] == ["PASS", "FAIL", "SKIP"]
    assert rows[4] == "1 passed, 1 failed, 1 skipped in 5.0 s"
    assert rows[6].startswith("FAIL  replicas ")
    assert rows[7].strip().startswith("to do: start it")


def test_on_a_terminal_verdicts_have_their_colours() -> None:
    """Green, red and yellow; and what is being looked at is shown meanwhile."""
    text = shown(terminal=True, width=80)
    assert "\x1b[32mPASS" in text
    assert "\x1b[1;31mFAIL" in text
    assert "\x1b[33mSKIP" in text


def test_scripts_get_everything() -> None:
    """Counts, and of each check the verdict, what was said, what to do, how long it took."""
    found = as_json(VERDICTS, 5.0)
    assert (found["passed"], found["failed"], found["skipped"], found["took_s"]) == (1, 1, 1, 5.0)
    assert found["checks"][0] == {
        "name": "gateway",
        "verdict": "PASS",
        "about": "whether it answers",
        "said": "http://127.0.0.1:8000 answers in 3 ms",
        "todo": "",
        "took_s": 0.003,
    }
