"""What follows from what a handler did."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BrokerUnavailable, DeadlineExceeded, NotReady, Reject, RetryLater
from pipeline.job import Done, Job
from pipeline.outcomes import MAX_MESSAGE_CHARS, Bury, Complete, Decision, Forward, Retry, decide
from pipeline.settings import RetrySettings


def job(route: list[str], attempt: int = 1) -> Job:
    return Job("a1", "query", {"query": "why?"}, route, 1, attempt=attempt, state={"sources": [1], "hidden": 2})


def follow(one: Job, outcome: Done | BaseException) -> Decision:
    return decide(one, outcome, worker="w1", retry=RetrySettings(), rng=Random(1))


def test_done_goes_on_while_there_is_a_route() -> None:
    """To its first stage."""
    done = Done({"x": 1})
    assert follow(job(["retriever", "llm"]), done) == Forward("retriever", done)


def test_done_at_the_end_completes_with_what_the_flow_shows() -> None:
    """Of all that the stages found; the rest stays inside."""
    decision = follow(job([]), Done({"answer": "because", "usage": {"tokens": 3}}))
    assert isinstance(decision, Complete)
    completion = decision.completion
    assert (completion.status, completion.worker, completion.error) == ("completed", "w1", None)
    assert completion.result == {"answer": "because", "sources": [1], "usage": {"tokens": 3}}


def test_deadline_expires_the_job() -> None:
    """It is no failure, and no dead letter."""
    decision = follow(job(["llm"]), DeadlineExceeded())
    assert isinstance(decision, Complete)
    assert decision.completion.status == "expired"


def test_reject_buries_at_once() -> None:
    """With its own code."""
    decision = follow(job(["llm"]), Reject("too long", code="context_too_long"))
    assert isinstance(decision, Bury)
    assert decision.reason == "context_too_long"
    assert decision.completion.error == {"type": "failed", "code": "context_too_long", "message": "too long"}


@given(st.integers(1, 20), st.booleans(), st.none() | st.floats(0, 60))
def test_failure_is_retried_until_attempts_end(attempt: int, charged: bool, after_s: float | None) -> None:
    """Uncharged ones for ever, charged ones three times."""
    decision = follow(job(["llm"], attempt), RetryLater("busy", code="busy", charged=charged, after_s=after_s))
    if charged and attempt > 3:
        assert isinstance(decision, Bury)
        assert decision.reason == "attempts_exhausted"
        assert decision.completion.error is not None
        assert decision.completion.error["code"] == "busy"
        assert decision.completion.attempts == attempt
    else:
        assert isinstance(decision, Retry)
        assert decision.attempt == attempt + charged
        assert decision.delay_s >= (after_s or 0)


@pytest.mark.parametrize("outcome", [ValueError("odd"), TimeoutError(), KeyError("x")])
def test_unknown_exception_is_a_charged_failure(outcome: Exception) -> None:
    """Named, so that the dead letter tells what happened."""
    decision = follow(job(["llm"]), outcome)
    assert isinstance(decision, Retry)
    assert decision.attempt == 2
    assert type(outcome).__name__ in decision.error["message"]


def test_long_message_is_cut() -> None:
    """A page of HTML from a proxy helps nobody."""
    decision = follow(job(["llm"]), Reject("x" * 10_000, code="odd"))
    assert isinstance(decision, Bury)
    assert decision.completion.error is not None
    assert len(decision.completion.error["message"]) == MAX_MESSAGE_CHARS


@pytest.mark.parametrize("outcome", [BrokerUnavailable("away"), NotReady("loading")])
def test_trouble_of_ours_is_not_charged(outcome: Exception) -> None:
    """However often it comes."""
    decision = follow(job(["llm"], attempt=9), outcome)
    assert isinstance(decision, Retry)
    assert decision.attempt == 9


def webhook(attempt: int = 1, left_s: float = 4 * 86_400) -> Job:
    state = {"url": "https://example.com/", "attempts": [{"status": 500}], "hidden": 2}
    return Job("w1", "webhook", {}, [], int(left_s * 1000), attempt=attempt, state=state)


def test_a_flow_may_tell_its_story_whatever_the_end() -> None:
    """Who asks why nothing came wants the attempts above all."""
    story = {"url": "https://example.com/", "attempts": [{"status": 500}]}
    for outcome in (DeadlineExceeded(), Reject("no longer wanted", code="gone")):
        decision = follow(webhook(), outcome)
        assert isinstance(decision, (Bury, Complete))
        assert decision.completion.result == story
    decision = follow(job(["llm"]), DeadlineExceeded())
    assert isinstance(decision, Complete)
    assert decision.completion.result is None


def test_a_flow_may_have_a_schedule_of_its_own() -> None:
    """Ten attempts within its life; the last failure ends it."""
    failure = RetryLater("status 500", code="bad_status")
    delays_s = []
    for attempt in range(1, 10):
        decision = follow(webhook(attempt), failure)
        assert isinstance(decision, Retry)
        delays_s.append(decision.delay_s)
    assert delays_s == sorted(delays_s)
    assert 75 * 3_600 < sum(delays_s) < 4 * 86_400
    assert isinstance(follow(webhook(10), failure), Bury)
    assert isinstance(follow(webhook(9, left_s=3_600), failure), Bury)
