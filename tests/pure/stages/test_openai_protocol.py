"""The protocol's decisions: tables for what we decided, properties for what we cannot foresee."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import Reject, RetryLater
from stages.openai_protocol import (
    MAX_MESSAGE_CHARS,
    MAX_RETRY_AFTER_S,
    Answer,
    Failure,
    encode_request,
    endpoint,
    read_response,
    retry_after_s,
    shorten,
)

NOW = "Sun, 06 Nov 1994 08:49:37 GMT"

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=10), children, max_size=4),
    max_leaves=12,
)


def _sometimes(value: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return value | json_values


parts = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "thinking", "refusal"]) | json_values,
        "text": _sometimes(st.text(max_size=9)),
        "refusal": _sometimes(st.text(max_size=9)),
    },
)
choices = st.fixed_dictionaries(
    {},
    optional={
        "message": _sometimes(
            st.fixed_dictionaries(
                {},
                optional={
                    "content": _sometimes(st.text(max_size=9) | st.lists(_sometimes(parts), max_size=3)),
                    "refusal": json_values,
                    "tool_calls": json_values,
                },
            )
        ),
        "text": json_values,
        "finish_reason": _sometimes(st.sampled_from(["stop", "length", "content_filter", "tool_calls", "abort"])),
    },
)
usages = st.fixed_dictionaries(
    {},
    optional={
        "completion_tokens": json_values,
        "prompt_tokens": st.integers(),
        "prompt_tokens_details": _sometimes(st.fixed_dictionaries({"cached_tokens": json_values})),
    },
)
answers = st.fixed_dictionaries(
    {},
    optional={
        "choices": _sometimes(st.lists(_sometimes(choices), max_size=2)),
        "model": _sometimes(st.text(max_size=9)),
        "usage": _sometimes(usages),
        "error": _sometimes(st.fixed_dictionaries({}, optional={"message": json_values, "code": json_values})),
        "detail": json_values,
    },
)


def _failure(status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> Failure:
    verdict = read_response(status, headers or {}, body, asked_model="m")
    assert isinstance(verdict, Failure)
    return verdict


def _answer(message: dict[str, Any], **choice: Any) -> Any:
    body = orjson.dumps({"choices": [{"message": message} | choice]})
    return read_response(200, {}, body, asked_model="asked")


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("http://a", "http://a/v1/chat/completions"),
        ("http://a/", "http://a/v1/chat/completions"),
        ("http://a/v1", "http://a/v1/chat/completions"),
        ("http://a/v1/", "http://a/v1/chat/completions"),
        ("http://a/proxy", "http://a/proxy/v1/chat/completions"),
        ("http://a/openai/v1", "http://a/openai/v1/chat/completions"),
        ("http://v1", "http://v1/v1/chat/completions"),
    ],
)
def test_a_base_address_never_gets_its_v1_twice(base: str, expected: str) -> None:
    """Whether or not the operator wrote the closing /v1, the call goes to the same place."""
    assert endpoint(base) == expected


def test_a_request_says_what_is_wanted() -> None:
    """The body names model, turns and limits, and asks for one piece."""
    body = encode_request([{"role": "user", "content": "hi"}], model="m", max_tokens=7, temperature=0.5)
    assert json.loads(body) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 7,
        "temperature": 0.5,
        "stream": False,
    }


@pytest.mark.parametrize(
    ("status", "headers", "code", "consequence", "is_healthy"),
    [
        (400, {}, "bad_request", "reject", True),
        (409, {}, "bad_request", "reject", True),
        (413, {}, "bad_request", "reject", True),
        (418, {}, "bad_request", "reject", True),
        (422, {}, "bad_request", "reject", True),
        (401, {}, "replica_refused_credentials", "charged", False),
        (402, {}, "replica_refused_credentials", "charged", False),
        (403, {}, "replica_refused_credentials", "charged", False),
        (404, {}, "replica_misconfigured", "charged", False),
        (405, {}, "replica_misconfigured", "charged", False),
        (302, {}, "replica_misconfigured", "charged", False),
        (408, {}, "replica_error", "charged", False),
        (425, {}, "replica_error", "charged", False),
        (429, {}, "replica_busy", "uncharged", False),
        (429, {"retry-after": "2"}, "replica_busy", "uncharged", False),
        (500, {}, "replica_error", "charged", False),
        (500, {"retry-after": "2"}, "replica_error", "charged", False),
        (502, {}, "replica_error", "charged", False),
        (503, {}, "replica_error", "charged", False),
        (503, {"retry-after": "soon"}, "replica_error", "charged", False),
        (503, {"retry-after": "0"}, "replica_busy", "uncharged", False),
        (504, {}, "replica_error", "charged", False),
        (599, {}, "replica_error", "charged", False),
        (204, {}, "bad_answer", "charged", False),
    ],
)
def test_a_status_decides_what_follows(
    status: int, headers: dict[str, str], code: str, consequence: str, is_healthy: bool
) -> None:
    """Without a telling body the status alone sorts failures by who must act."""
    failure = _failure(status, headers=headers)
    assert (failure.code, failure.consequence, failure.is_healthy) == (code, consequence, is_healthy)
    assert (failure.status, failure.is_refused) == (status, False)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "bad_answer"),
        (b"<html>Bad Gateway</html>", "bad_answer"),
        (b'{"choices": [{"message": {"content": "cut he', "bad_answer"),
        (b"[1, 2]", "bad_answer"),
        (b"null", "bad_answer"),
        (b"{}", "bad_answer"),
        (b'{"choices": []}', "bad_answer"),
        (b'{"choices": [null]}', "bad_answer"),
        (b'{"choices": [{}]}', "bad_answer"),
        (b'{"choices": [{"message": {"content": null}}]}', "bad_answer"),
        (b'{"choices": [{"message": {"content": 7}}]}', "bad_answer"),
        (b'{"choices": [{"message": {"content": []}}]}', "bad_answer"),
        (b'{"error": {"message": "upstream died"}}', "bad_answer"),
        (b'{"choices": [{"message": {"content": "half"}, "finish_reason": "abort"}]}', "replica_error"),
        (b'{"choices": [{"message": {"content": "half"}, "finish_reason": "error"}]}', "replica_error"),
        (b"data: {}\n\ndata: [DONE]\n\n", "bad_answer"),
        (b'{"choices": [{"message": {"content": "\\ud800"}}]}', "bad_answer"),
        (b"[" * 100_000, "bad_answer"),
    ],
)
def test_a_broken_answer_is_charged_to_its_replica(body: bytes, code: str) -> None:
    """A 200 that holds no answer counts against the replica and is tried elsewhere."""
    failure = _failure(200, body)
    assert (failure.code, failure.consequence, failure.is_healthy) == (code, "charged", False)


def test_an_empty_text_that_ended_by_itself_is_an_answer() -> None:
    """A model may have nothing to say."""
    assert _answer({"content": ""}, finish_reason="stop") == Answer("", "asked", None, "stop")


def test_a_text_is_an_answer_however_it_ended() -> None:
    """A cut-off or filtered text is given as it is, with its reason."""
    for reason in ("length", "content_filter", "tool_calls"):
        assert _answer({"content": "so far", "tool_calls": [{}]}, finish_reason=reason).text == "so far"


def test_a_filter_that_withholds_everything_ends_the_job() -> None:
    """The same prompt would be withheld again."""
    verdict = _answer({"content": None}, finish_reason="content_filter")
    assert (verdict.code, verdict.consequence) == ("content_filtered", "reject")


def test_a_refusal_among_the_parts_is_found() -> None:
    """Content parts may hold the refusal instead of the message."""
    verdict = _answer({"content": [{"type": "refusal", "refusal": "I will not."}]})
    assert (verdict.code, verdict.message) == ("model_refused", "the model refused: I will not.")


def test_counts_that_are_no_counts_are_dropped() -> None:
    """Nothing a replica makes up in `usage` reaches the envelope."""
    usage = {"prompt_tokens": -1, "completion_tokens": 3, "total_tokens": True, "cost": {"deep": [1]}}
    body = orjson.dumps({"choices": [{"message": {"content": "x"}}], "usage": usage})
    verdict = read_response(200, {}, body, asked_model="asked")
    assert isinstance(verdict, Answer)
    assert (verdict.usage, verdict.tokens) == ({"completion_tokens": 3}, 3)


def test_a_missing_usage_is_none() -> None:
    """A replica that does not count is believed."""
    verdict = _answer({"content": "x"})
    assert (verdict.usage, verdict.tokens, verdict.model) == (None, 0, "asked")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("0", 0.0),
        ("7", 7.0),
        (" 1.5 ", 1.5),
        ("86400", MAX_RETRY_AFTER_S),
        ("-3", None),
        ("soon", None),
        ("1e9", None),
        ("nan", None),
        ("", None),
        ("Sun, 06 Nov 1994 08:49:57 GMT", 20.0),
        ("Sun, 06 Nov 1994 08:49:57 -0000", 20.0),
        ("Sun, 06 Nov 1994 08:00:00 GMT", 0.0),
        ("Sun, 06 Nov 2094 08:00:00 GMT", MAX_RETRY_AFTER_S),
        ("Sun, 99 Nov 1994 08:49:57 GMT", None),
    ],
)
def test_retry_after_is_read_bounded_and_never_trusted(value: str | None, expected: float | None) -> None:
    """Seconds and HTTP dates are understood, too long waits cut, garbage ignored."""
    assert retry_after_s(value, NOW) == expected


def test_an_http_date_means_nothing_without_the_replicas_own_clock() -> None:
    """It is compared with the same response's Date, never with our clock."""
    assert retry_after_s("Sun, 06 Nov 1994 08:49:57 GMT") is None


@given(st.text(), st.none() | st.text())
def test_any_retry_after_is_none_or_within_bounds(value: str, date: str | None) -> None:
    """No header can raise or ask for more than the cap."""
    wait = retry_after_s(value, date)
    assert wait is None or 0 <= wait <= MAX_RETRY_AFTER_S


@given(st.integers(100, 999), st.binary(max_size=300))
def test_any_bytes_become_a_verdict(status: int, body: bytes) -> None:
    """Whatever a replica sends, reading it raises nothing."""
    _check(status, body)


@given(st.sampled_from([200, 400, 404, 429, 500, 503]), answers | json_values)
def test_any_json_becomes_a_verdict_that_the_envelope_can_carry(status: int, content: Any) -> None:
    """Whatever JSON a replica sends, the verdict is an answer the envelope can hold or one of the declared errors."""
    _check(status, json.dumps(content).encode())


def _check(status: int, body: bytes) -> None:
    verdict = read_response(status, {}, body, asked_model="asked")
    if isinstance(verdict, Answer):
        assert 200 <= status < 300
        assert orjson.loads(orjson.dumps(verdict))["text"] == verdict.text
        assert verdict.tokens >= 0
        assert verdict.model
    else:
        error = verdict.as_error()
        assert isinstance(error, (Reject, RetryLater))
        assert error.code == verdict.code
        assert len(str(error)) <= MAX_MESSAGE_CHARS + 100


@given(st.text())
def test_a_shortened_text_is_one_short_line(text: str) -> None:
    """What a replica says fits into an error message."""
    line = shorten(text)
    assert len(line) <= MAX_MESSAGE_CHARS
    assert len(line.splitlines()) <= 1
    assert shorten(line) == line


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "the replica answered 400"),
        (b"<html><body>nginx</body></html>", "the replica answered 400"),
        (b"no such thing\n at all", "the replica answered 400: no such thing at all"),
        (b'{"error": "bad role"}', "the replica answered 400: bad role"),
        (b'{"error": {"message": "bad role"}}', "the replica answered 400: bad role"),
        (b'{"message": "bad role"}', "the replica answered 400: bad role"),
        (b'{"detail": "bad role"}', "the replica answered 400: bad role"),
        (b'{"detail": [{"msg": "bad"}, {"msg": "role"}, 7]}', "the replica answered 400: bad; role"),
        (b'{"error": {"message": 7}}', "the replica answered 400"),
    ],
)
def test_the_replicas_own_message_is_passed_on(body: bytes, expected: str) -> None:
    """The sender reads what the replica said, wherever it said it."""
    assert _failure(400, body).message == expected


def test_a_failure_becomes_the_error_that_its_consequence_names() -> None:
    """Reject ends the job; the other two are retried, charged or not."""
    assert isinstance(Failure("bad_request", "m", "reject").as_error(), Reject)
    later = Failure("replica_busy", "m", "uncharged", 3.0).as_error()
    assert isinstance(later, RetryLater)
    assert (later.code, later.charged, later.after_s) == ("replica_busy", False, 3.0)
    later = Failure("replica_error", "m").as_error()
    assert isinstance(later, RetryLater)
    assert later.charged
