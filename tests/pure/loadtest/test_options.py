"""What the load tester accepts: options and files of questions."""

from pathlib import Path

import pytest

from loadtest.options import LoadOptions
from loadtest.questions import BUILT_IN, read_questions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url must read http"),
        ({"url": "http://"}, "url must read http"),
        ({"url": "http://host:99999"}, "url must read http"),
        (
            {"url": "http://me:s3@host"},
            "^url must end after the path: give a password as --header",
        ),
        ({"url": "http://host/?key=s3"}, "a query with --path$"),
        ({"seed": 10**20}, "seed must be at most"),
        ({"requests": 10**20}, "requests must be at most"),
        ({"rate": 1e308}, "rate must be above 0 requests per second and at most 1,000,000"),
        ({"timeout_s": 1e308}, "timeout must be above 0 seconds and at most"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"concurrency": 50, "rate": 5.0}, "concurrency belongs to a closed loop: leave it out with --rate"),
        ({"requests": 0}, "requests must be at least 1"),
        ({"duration_s": 0.0}, "duration must be above 0"),
        ({"timeout_s": float("nan")}, "timeout must be above 0"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"processes": 0}, "processes must be at least 1"),
        ({"processes": 51}, "51 processes cannot share 50 connections"),
        ({"pace": "poisson"}, "arrivals belongs to an open loop: give --rate"),
        ({"connections": 5}, "connections belongs to an open loop: give --rate"),
        ({"ramp_from": 1.0}, "ramp-from belongs to an open loop: give --rate"),
        ({"rate": 5.0, "ramp_from": 1.0}, "ramp-from needs --duration"),
        ({"rate": 5.0, "ramp_from": -1.0, "duration_s": 1.0}, "ramp-from must be from 0"),
        ({"rate": 5.0, "pace": "regular"}, "arrivals must be constant or poisson"),
        ({"path": "query"}, "path must begin with /"),
        ({"body": "{"}, "body is no JSON"),
        ({"slo": "fast"}, "slo: 'fast' is no clause"),
        ({"headers": ("x",)}, "header must read"),
        ({"api_key": "a\r\nb: c"}, "api-key must be printable"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, object], message: str) -> None:
    """The message is fit for a command line."""
    with pytest.raises(ValueError, match=message):
        LoadOptions(**options)  # type: ignore[arg-type]  # a table of wrong values


def test_what_a_report_shows_of_the_settings_holds_no_secret() -> None:
    """Neither the key, nor a header's value, nor what stands in the path's query."""
    options = LoadOptions(api_key="s3", headers=("x: s3",), path="/q?key=s3&b")
    assert "s3" not in str(options.shown())
    assert options.shown()["path"] == "/q?key=...&b"


def test_questions_are_the_lines_of_a_file_that_are_not_blank(tmp_path: Path) -> None:
    """Spaces round a question, and lines between questions, are nothing."""
    file = tmp_path / "questions.txt"
    file.write_text("  What is a lease?\n\n\tWer da?\r\n", encoding="utf-8")
    assert read_questions(file) == ("What is a lease?", "Wer da?")


def test_without_a_file_the_built_in_questions_are_asked() -> None:
    """A fresh system can be measured at once."""
    assert read_questions(None) == BUILT_IN


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read"), (b"\n \n", "no question"), (b"\xff\xfe", "UTF-8")]
)
def test_a_file_without_questions_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    """Missing, empty and binary files are told apart."""
    file = tmp_path / "questions.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_questions(file)
