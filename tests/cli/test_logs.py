"""Log lines: what scripts and people get to read."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import orjson
import pytest
import structlog

from pipeline import logs
from pipeline.settings import LogSettings


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave logging as it was found."""
    root = logging.getLogger()
    before = list(root.handlers), root.level
    yield
    structlog.reset_defaults()
    root.handlers[:], root.level = before


def lines(out: io.StringIO) -> list[dict[str, object]]:
    return [orjson.loads(line) for line in out.getvalue().splitlines()]


def test_a_line_is_json_with_time_level_process_and_event_first() -> None:
    """One object per line, in an order that people can read, too."""
    out = io.StringIO()
    logs.configure(LogSettings(format="json"), "encoder", out)
    structlog.get_logger().info("claimed", job_id="a1", attempt=2)
    (line,) = lines(out)
    assert list(line) == ["timestamp", "level", "process", "event", "job_id", "attempt"]
    assert (line["level"], line["process"], line["event"]) == ("info", "encoder", "claimed")


def test_lines_below_the_level_are_left_out() -> None:
    """Debug lines may hold prompts."""
    out = io.StringIO()
    logs.configure(LogSettings(format="json", level="warning"), "llm", out)
    structlog.get_logger().info("quiet")
    structlog.get_logger().warning("loud")
    assert [line["event"] for line in lines(out)] == ["loud"]


def test_other_libraries_speak_the_same_form() -> None:
    """asyncio and uvicorn use the standard library's logging."""
    out = io.StringIO()
    logs.configure(LogSettings(format="json"), "gateway", out)
    logging.getLogger("asyncio").error("task %s failed", "x")
    logging.getLogger("asyncio").info("chatter")
    (line,) = lines(out)
    assert (line["event"], line["logger"], line["process"]) == ("task x failed", "asyncio", "gateway")


def test_an_exception_stays_within_its_line() -> None:
    """A traceback of twenty lines must not become twenty records."""
    out = io.StringIO()
    logs.configure(LogSettings(format="json"), "llm", out)
    try:
        int("broken")
    except ValueError:
        structlog.get_logger().exception("failed")
    (line,) = lines(out)
    assert "ValueError: invalid literal" in str(line["exception"])


def test_people_get_one_short_line() -> None:
    """Time, process, what happened, and pairs; no braces."""
    event = {
        "timestamp": "2026-01-02T03:04:05Z",
        "level": "info",
        "process": "llm",
        "event": "retrying",
        "after_s": 0.5,
    }
    line = logs.render_for_people(None, "info", event)
    plain = line.replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert plain == "03:04:05 llm       retrying  after_s=0.5"


def test_auto_means_json_unless_a_terminal_listens() -> None:
    """A file is not a terminal."""
    out = io.StringIO()
    logs.configure(LogSettings(format="auto"), "llm", out)
    structlog.get_logger().info("hello")
    assert lines(out)[0]["event"] == "hello"
