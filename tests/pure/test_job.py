"""The envelope: what is written is what is read, and what is no envelope says so."""

from __future__ import annotations

import string
from contextlib import suppress
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import MalformedEntry
from pipeline.job import (
    OURS,
    PRIORITIES,
    Completion,
    Job,
    decode,
    decode_foreign,
    find_id,
    is_valid_id,
    new_id,
)

ID_CHARACTERS = string.ascii_letters + string.digits + "._:-"
ids = st.text(ID_CHARACTERS, min_size=1, max_size=128)
texts = st.text(st.characters(codec="utf-8"), max_size=20)
numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts, lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=8,
)  # fmt: skip
objects = st.dictionaries(texts, values, max_size=4)
jobs = st.builds(
    Job,
    id=ids,
    flow=st.sampled_from(["query", "message"]),
    payload=objects,
    route=st.lists(st.sampled_from(["retriever", "llm"]), min_size=1, max_size=3),
    deadline_ms=st.integers(0, 2**53),
    tenant=st.text(string.ascii_lowercase, min_size=1, max_size=8),
    priority=st.sampled_from(PRIORITIES),
    state=objects,
    attempt=st.integers(1, 100),
    accepted_us=st.integers(0, 2**53),
    at_us=st.integers(0, 2**53),
    timings_ms=st.dictionaries(st.sampled_from(["llm", "llm_wait"]), st.floats(0, 1e9)),
    avoid=st.lists(st.just("http://one:1")),
    vector=st.none() | st.binary(max_size=32),
    replica=st.none() | st.just("http://one:1"),
    retry_of=st.none() | ids,
)


def envelope(**changes: object) -> bytes:
    body: dict[str, object] = {"v": 1, "id": "a1", "flow": "query", "payload": {}, "route": [], "deadline_ms": 1}
    return orjson.dumps(body | changes)


@given(jobs)
def test_what_is_written_is_what_is_read(job: Job) -> None:
    """Through any number of hops."""
    data = job.encode()
    assert data.startswith(OURS)
    assert decode(data, job.vector) == job
    assert decode(data, job.vector).encode() == data


@given(jobs, st.integers(0, 2**53))
def test_launch_leaves_the_head_to_the_accepting_script(job: Job, accepted_us: int) -> None:
    """Head and tail together are the envelope for the first stage of the route."""
    stage, tail = job.launch()
    data = f'{{"v":1,"id":"{job.id}","accepted_us":{accepted_us},'.encode() + tail
    found = decode(data, job.vector)
    assert stage == job.route[0]
    assert found.route == job.route[1:]
    assert (found.id, found.accepted_us, found.payload, found.state) == (job.id, accepted_us, job.payload, job.state)


@given(ids)
def test_valid_ids_need_no_escaping(text: str) -> None:
    """In JSON, in a key, in a URL."""
    assert is_valid_id(text)
    assert orjson.dumps(text) == f'"{text}"'.encode()


@pytest.mark.parametrize("text", ["", "a" * 129, "a b", "a\n", "é", 'a"', "a/b", "a%", None, 1, ["a"], b"a"])
def test_other_ids_are_refused(text: object) -> None:
    """Also one with a line break at its end."""
    assert not is_valid_id(text)


def test_fresh_ids_differ() -> None:
    """And are valid."""
    found = {new_id() for _ in range(1000)}
    assert len(found) == 1000
    assert all(is_valid_id(text) for text in found)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("flow", 1), ("flow", []), ("payload", []), ("payload", None), ("route", "llm"), ("route", [1]),
        ("deadline_ms", "1"), ("deadline_ms", 1.5), ("deadline_ms", None), ("deadline_ms", True), ("tenant", None),
        ("priority", "urgent"), ("priority", []), ("state", []), ("attempt", "1"), ("at_us", {}),
        ("accepted_us", None), ("timings_ms", {"llm": "1"}), ("timings_ms", []), ("avoid", "x"), ("replica", 1),
        ("vector", "AAAA"), ("odd", 1),
    ],
)  # fmt: skip
def test_field_of_a_wrong_type_is_malformed(field: str, wrong: object) -> None:
    """What would fail later would be tried again and again."""
    decode(envelope())
    with pytest.raises(MalformedEntry) as caught:
        decode(envelope(**{field: wrong}))
    assert (caught.value.code, caught.value.job_id) == ("bad_envelope", "a1")


@pytest.mark.parametrize("field", ["v", "id", "flow", "payload", "route", "deadline_ms"])
def test_missing_field_is_malformed(field: str) -> None:
    """Never a KeyError."""
    body = orjson.loads(envelope())
    del body[field]
    with pytest.raises(MalformedEntry):
        decode(orjson.dumps(body))


@given(st.binary(max_size=64) | values.map(orjson.dumps))
def test_any_bytes_are_a_job_or_malformed(data: bytes) -> None:
    """Whatever stands on a stream, no other error comes out."""
    with suppress(MalformedEntry):
        assert is_valid_id(decode_foreign(data)["id"])
    with pytest.raises(MalformedEntry):
        decode(OURS + data)


@given(ids, st.binary(max_size=16))
def test_id_is_found_in_broken_data(job_id: str, rest: bytes) -> None:
    """So that its sender hears of the failure."""
    assert find_id(b'{"x": 1, "id" : "' + job_id.encode() + b'", "query": ' + rest) == job_id
    assert find_id(b"no id here") is None


@given(
    st.builds(
        Completion, id=ids, status=st.sampled_from(["completed", "failed", "expired", "cancelled"]),
        result=st.none() | objects, replica=st.none() | texts, attempts=st.integers(0, 99),
    )
)  # fmt: skip
def test_completion_survives_its_key(completion: Completion) -> None:
    """What a gateway reads is what a worker wrote."""
    assert Completion.decode(completion.encode()) == completion
    body: dict[str, Any] = orjson.loads(completion.encode())
    assert set(body) == set(Completion.__struct_fields__)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b'{"id":"a"}',
        *(b'{"id":"a","status":%s}' % s for s in (b'"done"', b"null", b"[]")),
    ],
)
def test_what_is_no_completion_says_so(data: bytes) -> None:
    """Another program may have written it."""
    with pytest.raises(ValueError):
        Completion.decode(data)


def test_completion_of_a_newer_version_is_read() -> None:
    """What it added is left out: gateways may be older than workers."""
    body = orjson.loads(Completion("a1", "completed", result={"answer": "x"}).encode())
    assert Completion.decode(orjson.dumps(body | {"news": 1})) == Completion("a1", "completed", result={"answer": "x"})
