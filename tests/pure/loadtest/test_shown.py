"""The page, the published schema, and what is shown while a run goes on."""

import io
import json
import re
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from loadtest.crew import Outcome
from loadtest.live import Now, bars, line_of, watch
from loadtest.page import page
from loadtest.report import Report, summarize
from loadtest.slo import parse
from loadtest.tally import Answer, Moment, Tally
from loadtest.verdict import Verdict

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = ROOT / "docs" / "loadtest-report.schema.json"


def a_report(count: int = 200, name: str = "job") -> Report:
    tally = Tally(2.0, 100.0)
    for number in range(count):
        tally.planned += 1
        tally.left(0.1)
        spans = {"gateway": 1.0, "llm_wait": number / 4, "llm": number / 4, "return": 0.5, "total": 1.5 + number / 2}
        answer = Answer(None, f"{name}-{number}", name, f"http://{name}", spans)
        tally.answered(answer, number=number, at_s=number / 10, lag_ms=0.1, service_ms=2.0 + number)
    tally.errors["timeout"] += 3
    moments = [Moment(at / 4, 5, 10, at == 40, [1.0 + at, 5.0 + at]) for at in range(1, count)]
    return summarize(
        Outcome(tally, count / 10, moments=moments),
        is_open=True,
        verdict=Verdict(is_valid=True, warnings=("mind this",)),
        clauses=parse("p99<500ms,errors<0.1%"),
        good_within_ms=500.0,
        manifest={"seed": 1, "settings": {"url": "http://x", "path": "/query"}},
    )


def test_the_page_is_whole_and_asks_nobody_for_anything() -> None:
    """Three plots, the verdict, the manifest; no script, no address to load from, and small."""
    shown = page(a_report(20_000))
    assert len(shown.encode()) < 1_000_000
    assert shown.count("<svg") == 3
    assert not re.search(r"<script|<link(?! rel=\"icon\" href=\"data:,\")|<img|@import|url\(|src=", shown)
    for words in ("Promise broken", "mind this", "Where the time went", "llm_wait", "job-19999", "How to repeat it"):
        assert words in shown


def test_the_page_escapes_what_the_target_said() -> None:
    """A worker may be called anything."""
    assert "<b>evil" not in page(a_report(5, "<b>evil"))


def test_a_page_without_any_success_is_still_a_page() -> None:
    """Nothing is divided by zero, and no plot is drawn of nothing."""
    report = summarize(Outcome(Tally(2.0, None), 0.0), is_open=False, verdict=Verdict(is_valid=True))
    assert "No request succeeded" in page(report)


def test_a_report_is_what_the_published_schema_says() -> None:
    """The schema is made from the report's own fields; after a change to them write it anew as the message says."""
    adapter = TypeAdapter(Report)
    made = json.dumps(adapter.json_schema(mode="serialization"), indent=1, sort_keys=True) + "\n"
    assert SCHEMA.read_text() == made, "python -m tests.pure.loadtest.write_schema"
    for report in (
        a_report(),
        summarize(Outcome(Tally(2.0, None), 0.0), is_open=False, verdict=Verdict(is_valid=True)),
    ):
        as_json = json.dumps(report.as_json())
        assert adapter.validate_json(as_json, strict=True) == report


def test_the_last_second_is_shown_over_all_generators() -> None:
    """Older moments are forgotten; totals are not."""
    now = Now()
    for at_s in (0.25, 0.5, 0.75, 1.0, 1.25):
        for part, late_s in enumerate((0.0, 0.01)):
            now.add(Moment(at_s + late_s, 2, 3, 1, [10.0, 20.0], part))
    now.add(Moment(1.3, 2))  # the same generator once more, at once
    assert (now.in_flight, now.ended, now.failed) == (4, 30, 10)
    assert now.rate == pytest.approx(16, abs=0.1)
    assert (now.percentile_ms(500), now.percentile_ms(990)) == (10.0, 20.0)
    assert line_of(now) == "    1.3 s      16.0 req/s  P50 10.0 ms  P99 20.0 ms  4 in flight  30 ended  10 failed"


def test_without_a_terminal_a_line_is_written_now_and_then() -> None:
    """Every five seconds of the run, and nothing when it is to be quiet."""
    out = io.StringIO()
    with watch(quiet=False, out=out) as watcher:
        for at in range(1, 48):
            watcher.add(Moment(at / 4, 1, 1, 0, [1.0]))
    assert [line.split()[0] for line in out.getvalue().splitlines()] == ["5.0", "10.0"]
    silent = io.StringIO()
    with watch(quiet=True, out=silent) as watcher:
        watcher.add(Moment(60.0, 1))
    assert silent.getvalue() == ""


def test_on_a_terminal_the_figures_stand_in_a_table() -> None:
    """They change in place, and leave nothing behind."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with watch(quiet=False, out=out) as watcher:
        for at in range(1, 20):
            watcher.add(Moment(at / 4, 7, 1, 1, [12.5]))
    shown = out.getvalue()
    assert "in flight" in shown
    assert "12.5 ms" in shown


def test_bars_are_as_high_as_their_values() -> None:
    """The greatest is full, nothing is the lowest."""
    assert bars([0.0, 50.0, 100.0]) == "▁▅█"
    assert bars([0.0]) == "▁"
    assert bars([]) == ""
