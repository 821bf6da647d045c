"""The llm stage as the worker sees it: what comes of a job, and how its attempts are counted."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from pipeline.errors import ConfigError, NoReplica, Reject, RetryLater
from pipeline.job import Job
from pipeline.retry import Again, decide_retry
from pipeline.settings import Settings
from stages.http import BrokenAnswer, HungUp, TooLarge, Unreachable
from stages.llm import Llm, build, messages_of, read_error
from stages.openai_protocol import Answer, Failure, Verdict
from stages.prompt import Source, augment
from tests.stages.llm_bench import Build, FakeContext, FakeReplicas, Observation, benches, calls, reply, say


@pytest.fixture
async def bench() -> AsyncIterator[Build]:
    async with benches() as build_bench:
        yield build_bench


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses connections for as long as the test runs."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


# --- Answers ------------------------------------------------------------------------------------


async def test_an_answer_comes_with_model_usage_and_reason(bench: Build) -> None:
    """One good call is all it takes."""
    b = await bench([say("Paris", tokens=2)])
    done = await b.stage.handle(b.job())
    assert done.value == {
        "answer": "Paris",
        "model": "m-1",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        "finish_reason": "stop",
    }


async def test_a_request_carries_id_key_model_and_limits(bench: Build) -> None:
    """The replica can tell who asks for what, and for which job."""
    b = await bench([], api_key="sk-1", temperature=0.5)
    await b.stage.handle(b.job(messages=[{"role": "user", "content": "hi"}], model="other"))
    (exchange,) = b.replicas[0].exchanges
    assert exchange.path == "/v1/chat/completions"
    assert exchange.headers["x-request-id"] == "job-1"
    assert exchange.headers["authorization"] == "bearer sk-1"  # the replica reads lines in lower case
    assert exchange.body == {
        "model": "other",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 99,
        "temperature": 0.5,
        "stream": False,
    }


async def test_an_earlier_stage_may_say_what_is_asked_and_in_which_form(bench: Build) -> None:
    """Its turns, form and length go before everything else."""
    b = await bench([])
    job = b.job(query="why?")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
    turns = [{"role": "user", "content": "as it wrote"}]
    job.state = {"sources": [], "ask": {"messages": turns, "response_format": form, "max_tokens": 4096}}
    await b.stage.handle(job)
    (exchange,) = b.replicas[0].exchanges
    assert (exchange.body["messages"], exchange.body["response_format"]) == (turns, form)
    assert exchange.body["max_tokens"] == 4096


async def test_the_model_setting_stands_in_and_no_key_is_made_up(bench: Build) -> None:
    """What the job leaves open, the settings say."""
    b = await bench([])
    await b.stage.handle(b.job())
    (exchange,) = b.replicas[0].exchanges
    assert exchange.body["model"] == "default-model"
    assert "authorization" not in exchange.headers


def test_question_is_asked_of_the_sources_that_were_found_for_it() -> None:
    """The augmented prompt; else what the sender wrote."""
    job = Job("j", "message", {"prompt": "p", "messages": [{"role": "user", "content": "m"}]}, [], 0)
    assert messages_of(job) == [{"role": "user", "content": "m"}]
    assert messages_of(Job("j", "message", {"prompt": "p"}, [], 0)) == [{"role": "user", "content": "p"}]
    question = Job("j", "query", {"query": "q"}, [], 0)
    with pytest.raises(Reject):
        messages_of(question)
    for found in ([], [{"document": "d", "title": "t", "chunk": 0, "score": 1.0, "text": "words"}]):
        question.state["sources"] = found
        assert messages_of(question) == augment("q", [Source("t", "words")] * len(found))


async def test_every_call_is_observed_once(bench: Build) -> None:
    """Failure and answer are each told to the registry, with time and tokens."""
    b = await bench([reply(500, "")], [say("ok", tokens=5)])
    await b.stage.handle(b.job())
    bad, good = b.registry.observations
    assert (bad.url, bad.ok, bad.refused) == (b.replicas[0].url, False, False)
    assert (good.url, good.ok, good.tokens) == (b.replicas[1].url, True, 5)
    assert bad.duration_s > 0
    assert good.duration_s > 0


async def test_calls_are_counted_and_timed_by_outcome(bench: Build) -> None:
    """The metrics tell answers from failures."""
    b = await bench([reply(500, "")], [])
    before = calls("ok"), calls("replica_error")
    await b.stage.handle(b.job())
    assert (calls("ok"), calls("replica_error")) == (before[0] + 1, before[1] + 1)
    for replica in b.replicas:
        assert REGISTRY.get_sample_value("penstock_llm_call_seconds_count", {"replica": replica.url}) == 1


async def test_a_cookie_of_one_job_is_not_sent_with_the_next(bench: Build) -> None:
    """Jobs share connections, and nothing else."""
    b = await bench([reply(200, '{"choices": [{"message": {"content": "a"}}]}', "set-cookie: session=1; Path=/")])
    await b.stage.handle(b.job())
    await b.stage.handle(b.job())
    assert all("cookie" not in exchange.headers for exchange in b.replicas[0].exchanges)


# --- Another replica, then later ----------------------------------------------------------------


async def test_another_replica_answers_after_an_error_and_the_attempt_is_charged(bench: Build) -> None:
    """An error answer costs one attempt and the failed replica is avoided."""
    b = await bench([reply(500, "")], [say("from the other")])
    job = b.job()
    done = await b.stage.handle(job)
    assert done.value["answer"] == "from the other"
    assert (job.attempt, job.avoid, job.replica) == (2, [b.replicas[0].url], b.replicas[1].url)


async def test_another_replica_answers_after_a_refused_connection_at_no_charge(bench: Build, closed_port: int) -> None:
    """Nobody worked, so nothing is charged; the breaker hears of it."""
    b = await bench(closed_port, [])
    job = b.job()
    await b.stage.handle(job)
    assert (job.attempt, job.avoid) == (1, [b.replicas[0].url])
    assert [(o.ok, o.refused) for o in b.registry.observations] == [(False, True), (True, False)]


async def test_a_failure_with_no_other_replica_is_left_to_the_worker_to_charge(bench: Build) -> None:
    """The attempt is not counted here as well."""
    b = await bench([reply(500, '{"error": {"message": "out of memory"}}')])
    job = b.job()
    error = await b.failure(job)
    assert isinstance(error, RetryLater)
    assert (error.code, error.charged, error.after_s, job.attempt) == ("replica_error", True, None, 1)
    assert str(error) == "the replica answered 500: out of memory"


async def test_the_last_failure_is_the_one_reported(bench: Build, closed_port: int) -> None:
    """A charge already counted in place is not counted again when the next replica is unreachable."""
    b = await bench([reply(500, "")], closed_port)
    job = b.job()
    error = await b.failure(job)
    assert isinstance(error, RetryLater)
    assert (error.code, error.charged, job.attempt) == ("replica_unreachable", False, 2)
    assert job.avoid == [replica.url for replica in b.replicas]


async def test_the_last_attempt_asks_for_no_other_replica(bench: Build) -> None:
    """Four charged calls are the end, however many replicas there are."""
    b = await bench([reply(500, "")], [])
    job = b.job(attempt=4)
    error = await b.failure(job)
    assert isinstance(error, RetryLater)
    assert error.charged
    assert b.replicas[1].exchanges == []


async def test_an_uncharged_failure_on_the_last_attempt_still_moves(bench: Build, closed_port: int) -> None:
    """A refused connection spends no attempt, the last one included."""
    b = await bench(closed_port, [])
    done = await b.stage.handle(b.job(attempt=4))
    assert done.value["answer"] == "hello"


@pytest.mark.parametrize(
    ("status", "headers", "after_s"),
    [(429, ["retry-after: 7"], 7.0), (503, ["retry-after: 7"], 7.0), (429, [], None), (429, ["retry-after: x"], None)],
)
async def test_a_busy_replica_is_obeyed_at_no_charge(
    bench: Build, status: int, headers: list[str], after_s: float | None
) -> None:
    """Retry-After reaches the worker."""
    b = await bench([reply(status, "", *headers)])
    error = await b.failure(b.job())
    assert isinstance(error, RetryLater)
    assert (error.code, error.charged, error.after_s) == ("replica_busy", False, after_s)


async def test_a_wrong_request_is_rejected_without_asking_further(bench: Build) -> None:
    """The sender learns what the replica said; the replica is not blamed, nor thought fast."""
    b = await bench([reply(400, '{"error": {"message": "bad role"}}')], [])
    error = await b.failure(b.job())
    assert isinstance(error, Reject)
    assert (error.code, str(error)) == ("bad_request", "the replica answered 400: bad role")
    assert b.replicas[1].exchanges == []
    assert b.registry.observations == [Observation(b.replicas[0].url, ok=True, duration_s=0.0, tokens=0, refused=False)]


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 6])
async def test_a_job_is_charged_four_calls_in_all(bench: Build, replicas: int) -> None:
    """However the calls spread over replicas and handlings, broken replicas are called four times."""
    b = await bench(*([reply(500, "")] * 4 for _ in range(replicas)))
    job = b.job()
    while True:
        error = await b.failure(job)
        assert isinstance(error, RetryLater)
        again = decide_retry(
            job.attempt, charged=error.charged, after_s=None, max_retries=3, base_s=1, cap_s=1, rng=random.Random(0)
        )
        if not isinstance(again, Again):
            break
        job.attempt = again.attempt
        job.replica = next((url for url in b.registry.urls if url not in job.avoid), job.avoid[0])
    assert sum(len(replica.exchanges) for replica in b.replicas) == 4
    assert len(b.registry.observations) == 4


class ScriptedLlm(Llm):
    """Takes its verdicts from a list."""

    def __init__(self, settings: Settings, verdicts: list[Verdict]) -> None:
        super().__init__(settings.llm, max_retries=settings.retry.max_retries)
        self.verdicts = verdicts
        self.charged = 0

    async def _call(self, job: Job, url: str, model: str, body: bytes) -> Verdict:
        verdict = self.verdicts.pop(0) if self.verdicts else Failure("replica_error", "m")
        self.charged += isinstance(verdict, Failure) and verdict.consequence == "charged"
        return verdict


@given(
    verdicts=st.lists(st.sampled_from([Failure("replica_error", "m"), Failure("replica_busy", "m", "uncharged")])),
    replicas=st.integers(1, 6),
    max_retries=st.integers(0, 5),
)
def test_charged_calls_end_exactly_with_the_attempts(verdicts: list[Verdict], replicas: int, max_retries: int) -> None:
    """Whatever fails where, a job that never succeeds is charged max_retries + 1 calls, not one more or fewer."""
    stage = ScriptedLlm(Settings.model_validate({"retry": {"max_retries": max_retries}}), verdicts)
    registry = FakeReplicas([f"http://r{number}" for number in range(replicas)])
    stage._context = FakeContext(registry)
    job = Job("j", "message", {"prompt": "p"}, [], 0, replica=registry.urls[0])

    async def run() -> None:
        while True:
            with pytest.raises(RetryLater) as caught:
                await stage.handle(job)
            again = decide_retry(
                job.attempt,
                charged=caught.value.charged,
                after_s=None,
                max_retries=max_retries,
                base_s=1,
                cap_s=1,
                rng=random.Random(0),
            )
            if not isinstance(again, Again):
                return
            job.attempt = again.attempt
            job.replica = next((url for url in registry.urls if url not in job.avoid), job.avoid[0])

    asyncio.run(run())
    assert stage.charged == max_retries + 1
    assert sorted(job.avoid) == sorted(set(job.avoid))


async def test_an_unplaced_job_is_an_error_of_the_worker() -> None:
    """The stage never picks a replica itself."""
    stage = ScriptedLlm(Settings(), [Answer("x", "m")])
    with pytest.raises(NoReplica):
        await stage.handle(Job("j", "message", {"prompt": "p"}, [], 0))


# --- Words --------------------------------------------------------------------------------------


async def test_neither_prompts_nor_answers_are_logged(bench: Build) -> None:
    """Every line about a failure names job, attempt and replica; no line above debug quotes anybody."""
    b = await bench([reply(500, '{"error": "cannot do: the secret question"}')], [say("the secret answer")])
    with capture_logs() as lines:
        await b.stage.handle(b.job())
    shown = [line for line in lines if line["log_level"] != "debug"]
    assert "secret" not in json.dumps(shown)
    assert [(line["job_id"], line["attempt"], line["code"], line["worker"]) for line in shown] == [
        ("job-1", 1, "replica_error", "worker-1")
    ]


async def test_of_a_private_flow_nothing_is_quoted_at_any_level(bench: Build) -> None:
    """A replica may echo what it was asked about somebody."""
    b = await bench([reply(500, '{"error": "cannot do: the secret question"}')], [say("the secret answer")])
    job = b.job(flow="report")
    job.state = {"ask": {"messages": [{"role": "user", "content": "the secret question"}]}}
    with capture_logs() as lines:
        await b.stage.handle(job)
    assert lines
    assert "secret" not in json.dumps(lines)


def test_a_key_that_no_header_can_carry_is_a_wrong_setting() -> None:
    """The process ends at its start, not at its first call."""
    for key in ("schlüssel", "two\nlines"):
        with pytest.raises(ConfigError):
            build(Settings.model_validate({"llm": {"api_key": key}}))


async def test_a_stage_that_never_started_can_be_stopped() -> None:
    """A worker that fails on its way up tidies everything alike."""
    await build(Settings()).stop()


def test_the_stage_is_placed_and_has_the_slots_of_its_setting() -> None:
    """The worker places each job before it starts, at most `llm.concurrency` at once."""
    stage = build(Settings.model_validate({"llm": {"concurrency": 11}}))
    assert (stage.name, stage.placed, stage.slots) == ("llm", True, 11)


@pytest.mark.parametrize(
    ("error", "code", "consequence"),
    [
        (Unreachable("slow"), "replica_unreachable", "uncharged"),
        (HungUp("", was_kept=False), "connection_lost", "charged"),
        (HungUp("gone", was_kept=True), "connection_lost", "charged"),
        (BrokenAnswer("short"), "bad_answer", "charged"),
        (TooLarge("long"), "bad_answer", "charged"),
        (ValueError("no address"), "replica_misconfigured", "charged"),
    ],
)
def test_a_call_without_an_answer_is_judged_by_how_far_it_came(
    error: Unreachable | HungUp | BrokenAnswer | ValueError, code: str, consequence: str
) -> None:
    """Only a connection that never came about is free of charge."""
    failure = read_error(error)
    assert (failure.code, failure.consequence, failure.is_healthy) == (code, consequence, False)
    assert failure.is_refused == (code == "replica_unreachable")
