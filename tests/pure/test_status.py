"""What `penstock status` makes of a picture: columns, widths, heights, words."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pipeline import keys
from pipeline.connection import CommandRefused
from pipeline.errors import BrokerUnavailable
from pipeline.job import PRIORITIES, Priority
from pipeline.overview import GatewayView, Overview, ReplicaView, StreamView, WorkerView
from pipeline.picture import Holding, Picture, judge
from pipeline.status import Away, away_line, reason_of, render

NOW_MS = 1_700_000_000_000


def stream(name: str, *, waiting: int = 0, in_hand: int = 0, oldest_ms: int = 0) -> StreamView:
    return StreamView(name, waiting, in_hand, oldest_ms, stage="llm", priority=priority_of(name), estimated_lag=waiting)


def priority_of(name: str) -> Priority:
    return next((priority for priority in PRIORITIES if keys.stream("llm", priority) == name), "normal")


def replica(
    url: str, *, calls: int = 0, load: int = 0, breaker_open: bool = False, service_ms: float | None = None
) -> ReplicaView:
    return ReplicaView(
        url,
        slots=16,
        running=calls,
        leases=load,
        breaker_open=breaker_open,
        breaker_tripped=breaker_open,
        service_ms=service_ms,
    )


def picture(workers: int = 2) -> Picture:
    """Return a busy system: a backlog, a replica in trouble, a worker that has died."""
    health = judge(NOW_MS, named_ms=NOW_MS, failures=0, open_until_ms=0, good_ms=NOW_MS - 40, us_per_token=2000)
    broken = judge(NOW_MS, named_ms=NOW_MS, failures=5, open_until_ms=NOW_MS + 3_000, good_ms=None, us_per_token=None)
    urls = ["http://replica-1.models.example.org:8080", "http://replica-2.models.example.org:8080"]
    return Picture(
        Overview(
            streams=[
                stream("job:llm_in:high"),
                stream("job:llm_in", waiting=1_200, in_hand=32, oldest_ms=900),
                stream("job:llm_in:low", waiting=3),
            ],
            replicas=[
                replica(urls[0], calls=16, load=20, service_ms=812.4),
                replica(urls[1], breaker_open=True),
            ],
            workers=[
                WorkerView(f"machine-llm{n}:ab", f"machine-llm{n}", {"llm": None}, "machine", 4_711 + n, "127.0.0.1:9")
                for n in range(workers)
            ],
            gateways=[GatewayView("machine-gateway", "127.0.0.1:8000", "machine", 4_700)],
            lapsed_workers=1,
            live_jobs=1_235,
            delayed=0,
            dead_letters=1,
            letters_ever=1,
            memory_bytes=2 << 20,
            memory_limit_bytes=0,
            record_backlog=0,
            record_oldest_ms=0,
        ),
        oldest_ms={"job:llm_in": 125_000, "job:llm_in:low": 40},
        health={urls[0]: health, urls[1]: broken},
        holdings={"machine-llm0:ab": Holding({"llm": 30}, 900), "machine-old:cd": Holding({"llm": 2}, 70_000)},
    )


def lines(width: int, height: int | None = None, workers: int = 2) -> list[str]:
    """Return what is shown on a terminal of that size."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=True)
    with console.capture() as shown:
        console.print(render(picture(workers), width=width, height=height))
    return [line.rstrip() for line in shown.get().splitlines()]


@pytest.mark.parametrize("width", [80, 160])
def test_everything_that_matters_fits(width: int) -> None:
    """At eighty columns nothing an operator acts on is cut off; at more there is more."""
    shown = lines(width)
    assert max(len(line) for line in shown) <= width
    assert shown[0] == "1235 jobs alive, 0 delayed, 1 dead letter"
    found = {line.split()[0]: line.split() for line in shown if line.strip()}
    assert found["job:llm_in"][:5] == ["job:llm_in", "1232", "1200", "32", "2"]  # 2 min
    assert found["job:llm_in:low"][1:4] == ["3", "3", "0"]
    assert "job:llm_in:high" not in found  # it holds nothing
    scheme = "http://" if width == 160 else ""
    assert found[f"{scheme}replica-1.models.example.org:8080"][1:] == [
        *["20", "16/16", "812", "ms", "500", "ok"],
        *(["0", "40", "ms"] if width == 160 else []),
    ]
    assert found[f"{scheme}replica-2.models.example.org:8080"][1:6] == ["0", "0/16", "resting", "3.0", "s"]
    assert found["machine-llm0"][1:6] == ["4711", "30", "llm", "900", "ms"]
    assert ("127.0.0.1:9" in found["machine-llm0"]) == (width == 160)
    assert found["machine-llm1"][1:] == ["4712", "-", "ready", *(["machine", "127.0.0.1:9"] if width == 160 else [])]
    assert " ".join(found["machine-old"][1:]) == "2 llm 70.0 s gone: being taken over"
    assert found["127.0.0.1:8000"][1:] == ["4700", "machine"]


def test_what_does_not_fit_is_counted() -> None:
    """A terminal of 24 lines and fifty workers: every table is there, and says how much of it is not."""
    shown = lines(80, height=24, workers=50)
    assert len(shown) <= 24
    assert any(line.startswith("worker") for line in shown)
    assert any(line.startswith("replica") for line in shown)
    left_out = next(int(line.split()[1]) for line in shown if line.startswith("and "))
    assert left_out + sum(line.startswith("machine-") for line in shown) == 51


@given(st.integers(1, 100), st.integers(1, 200))
def test_no_size_of_a_terminal_breaks_it(height: int, width: int) -> None:
    """It may be of little use at ten columns, but it is no error."""
    assert lines(width, height)


def test_an_outage_is_told_with_its_length_and_reason() -> None:
    """And what to do where nothing was seen before."""
    away = Away("Redis is away", "no connection to Redis: refused", since_s=100.0)
    told = away_line(away, 112.0, has_picture=True).plain
    assert told.startswith("Redis is away for 12.0 s: no connection to Redis: refused. Trying again.")
    assert "--redis-url" in away_line(away, 112.0, has_picture=False).plain


def test_every_trouble_has_a_reason() -> None:
    """A time-out has no text of its own."""
    assert reason_of(TimeoutError()) == ("Redis is slow", "it answers, but a look took more than 30 s")
    assert reason_of(BrokerUnavailable("no connection to Redis: ")) == ("Redis is away", "no connection to Redis")
    assert reason_of(CommandRefused("WRONGTYPE")) == ("No picture", "WRONGTYPE")
    assert "KeyError" in reason_of(KeyError("worker"))[1]


@pytest.mark.parametrize(
    ("named_ms", "failures", "open_until_ms", "word"),
    [
        (NOW_MS, 0, 0, "ok"),
        (NOW_MS, 2, 0, "failing"),
        (NOW_MS, 5, NOW_MS + 1, "resting"),
        (NOW_MS, 5, NOW_MS, "probed"),
        (NOW_MS - 10_001, 0, 0, "unserved"),
        (0, 5, NOW_MS + 1, "unserved"),
    ],
)
def test_a_replicas_health_is_one_word(named_ms: int, failures: int, open_until_ms: int, word: str) -> None:
    """The gravest one: a replica that nobody is configured with gets no calls, whatever its breaker says."""
    health = judge(
        NOW_MS, named_ms=named_ms, failures=failures, open_until_ms=open_until_ms, good_ms=None, us_per_token=None
    )
    assert health.word == word


def test_an_old_speed_is_no_recent_speed() -> None:
    """What was measured half a minute ago says nothing of now."""
    for quiet_ms, known in ((30_000, True), (30_001, False)):
        health = judge(
            NOW_MS, named_ms=NOW_MS, failures=0, open_until_ms=0, good_ms=NOW_MS - quiet_ms, us_per_token=2000
        )
        assert (health.tokens_per_s is not None) == known


def test_scripts_get_the_same_picture() -> None:
    """The overview's rows, with what is known more closely in them."""
    body = picture().as_json()
    assert body["streams"][1] | {"depth": 1_232, "oldest_entry_ms": 125_000} == body["streams"][1]
    assert body["replicas"][1] | {"health": "resting", "rests_ms": 3_000, "failures": 5} == body["replicas"][1]
    assert body["workers"][0] | {"holds": {"llm": 30}, "oldest_held_ms": 900} == body["workers"][0]
    assert body["workers"][1]["holds"] == {}
    assert body["lapsed"] == [{"consumer": "machine-old:cd", "holds": {"llm": 2}, "oldest_held_ms": 70_000}]


def test_what_waits_to_be_recorded_is_told() -> None:
    """Only while something does: mostly it is written before anybody looks."""
    behind = replace(picture(), seen=replace(picture().seen, record_backlog=12, record_oldest_ms=125_000))
    console = Console(file=io.StringIO(), width=200)
    console.print(render(behind, width=200))
    assert "12 events to be recorded (oldest 2 min)" in console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert "recorded" not in "".join(lines(200))
