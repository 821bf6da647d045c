"""Flows: what each kind of job is asked with, and where it goes."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline import flows
from pipeline.errors import MalformedEntry
from pipeline.flows import FLOWS, FOREIGN
from pipeline.job import Job, decode
from pipeline.keys import LUA_KEYS
from pipeline.settings import Lifetimes

LIFETIMES = Lifetimes().model_dump()


def adopt(stage: str, **body: Any) -> Job:
    return flows.adopt(stage, {"id": "a1", **body}, now_ms=1_000, lifetimes=LIFETIMES)


def test_every_flow_has_a_lifetime_and_a_route() -> None:
    """A row of the table is complete."""
    for name, flow in FLOWS.items():
        assert flow.name == name
        assert flow.lifetime in LIFETIMES
        assert flow.route
        assert flow.call_timeout_s > 0


def test_foreign_streams_lead_to_the_beginning_of_their_flow() -> None:
    """An entry on a stream begins at that stage, never before it."""
    for stage, flow in FOREIGN.items():
        assert FLOWS[flow].route[0] == stage


def test_foreign_query_becomes_a_job() -> None:
    """With the flow's life, counted from now."""
    job = adopt("encoder", query="  why? ", top_k=3)
    assert (job.id, job.flow, job.route) == ("a1", "query", ["encoder", "retriever", "llm"])
    assert job.payload == {"query": "why?", "top_k": 3}
    assert job.deadline_ms == 1_000 + 60_000
    assert (job.tenant, job.priority, job.attempt) == ("default", "normal", 1)
    stage, tail = job.launch()
    assert stage == "encoder"
    assert decode(b'{"v":1,"id":"a1",' + tail).route == ["retriever", "llm"]


def test_foreign_wishes_are_no_payload() -> None:
    """Priority and time-out stand beside it."""
    job = adopt("llm", prompt="hello", priority="high", timeout_s=2.5)
    assert (job.priority, job.deadline_ms, job.payload) == ("high", 3_500, {"prompt": "hello"})


@pytest.mark.parametrize(
    ("stage", "body", "field"),
    [
        ("encoder", {}, "query"),
        ("encoder", {"query": ""}, "query"),
        ("encoder", {"query": "x" * 16_001}, "query"),
        ("encoder", {"query": "x", "top_k": 0}, "top_k"),
        ("encoder", {"query": "x", "topk": 1}, "topk"),
        ("encoder", {"query": "x", "priority": "urgent"}, "priority"),
        ("encoder", {"query": "x", "timeout_s": 0}, "timeout_s"),
        ("encoder", {"query": "x", "timeout_s": "soon"}, "timeout_s"),
        ("encoder", {"query": "x", "metadata": {"a": []}}, "metadata.a"),
        (
            "llm",
            {"messages": [{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}]},
            "messages[1].role",
        ),
        ("llm", {"messages": []}, "messages"),
        ("llm", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "body"),
        ("llm", {}, "body"),
    ],
)
def test_wrong_field_is_named(stage: str, body: dict[str, Any], field: str) -> None:
    """As people write it, and the id is kept so that the sender hears of it."""
    with pytest.raises(MalformedEntry, match=field.replace("[", r"\[")) as caught:
        adopt(stage, **body)
    assert (caught.value.code, caught.value.job_id) == ("invalid_payload", "a1")


def test_all_wrong_fields_are_named() -> None:
    """In one line."""
    with pytest.raises(MalformedEntry) as caught:
        adopt("encoder", query="", top_k=99, odd=1)
    assert all(field in str(caught.value) for field in ("query", "top_k", "odd"))
    assert "odd: there is no such field" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_inner_stage_takes_envelopes_only() -> None:
    """It says where the route begins."""
    with pytest.raises(MalformedEntry) as caught:
        adopt("retriever", query="x")
    assert caught.value.code == "no_default_route"


def test_a_schedule_fits_into_its_flows_life() -> None:
    """With the tenth that jitter adds; else the last retries would never be made."""
    for flow in FLOWS.values():
        if flow.retries_s is not None:
            assert list(flow.retries_s) == sorted(flow.retries_s)
            assert 1.1 * sum(flow.retries_s) < LIFETIMES[flow.lifetime]


def test_scripts_know_the_flows_that_tell_their_story() -> None:
    """They end jobs that wait, and copy the whole state: so it must hold the story and nothing else."""
    assert {flow.name for flow in FLOWS.values() if flow.story} == {LUA_KEYS["telling"]}
