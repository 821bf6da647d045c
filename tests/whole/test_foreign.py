"""Programs that know nothing of ours but Redis: they write to the streams and read the completions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import orjson
import pytest
from redis import Redis

from tests.conftest import wait_until
from tests.whole.system import END_S, Outside


@pytest.fixture
def foreign(whole: Outside) -> Iterator[Any]:
    """A stock redis-py client, as any program has it; untyped, since its types are those of two clients at once."""
    with Redis.from_url(whole.system.redis_url) as client:
        yield client


async def completion_of(foreign: Any, job_id: str) -> dict[str, Any]:
    """Wait for a job's completion."""
    key = f"job:completion:{job_id}"
    await wait_until(lambda: foreign.get(key), timeout_s=END_S)
    text = foreign.get(key)
    assert isinstance(text, bytes)
    assert 0 < foreign.ttl(key) <= 60
    found: dict[str, Any] = orjson.loads(text)
    return found


async def test_a_question_on_the_encoders_stream_is_answered(foreign: Any) -> None:
    """An entry without a route runs the whole query."""
    job_id = f"foreign-{uuid4()}"
    foreign.xadd("job:encoder_in", {"data": f'{{"id":"{job_id}","query":"What is a lease?"}}'})
    found = await completion_of(foreign, job_id)
    assert (found["id"], found["status"], found["error"]) == (job_id, "completed", None)
    assert found["result"]["answer"]
    assert found["result"]["sources"]
    assert {"worker", "replica", "attempts", "timings_ms"} <= set(found)


@pytest.mark.parametrize(
    "asked", [{"prompt": "What is a lease?"}, {"messages": [{"role": "user", "content": "What is a lease?"}]}], ids=list
)
async def test_a_prompt_on_the_llm_stream_is_answered(foreign: Any, asked: dict[str, Any]) -> None:
    """A prompt, or turns, go straight to a replica."""
    job_id = f"foreign-{uuid4()}"
    foreign.xadd("job:llm_in", {"data": orjson.dumps({"id": job_id, **asked})})
    found = await completion_of(foreign, job_id)
    assert found["status"] == "completed"
    assert found["result"]["answer"]
    assert found["replica"]


@pytest.mark.parametrize(
    ("stream", "data", "code"),
    [
        ("job:encoder_in", {"query": ""}, "invalid_payload"),
        ("job:encoder_in", {"query": "What?", "colour": "red"}, "invalid_payload"),
        ("job:llm_in", {}, "invalid_payload"),
        ("job:retriever_in", {"query": "What?"}, "no_default_route"),
    ],
    ids=str,
)
async def test_a_wrong_entry_fails_at_once_and_says_why(
    foreign: Any, stream: str, data: dict[str, Any], code: str
) -> None:
    """Buried, never tried again; who sent it learns of it, since its id can be read."""
    job_id = f"foreign-{uuid4()}"
    foreign.xadd(stream, {"data": orjson.dumps({"id": job_id, **data})})
    found = await completion_of(foreign, job_id)
    assert (found["status"], found["error"]["code"]) == ("failed", code)
    letters = [orjson.loads(fields[b"data"]) for _, fields in foreign.xrevrange("job:dead")]
    (letter,) = (letter for letter in letters if letter["job_id"] == job_id)
    assert (letter["reason"], letter["stream"]) == (code, stream)


async def test_an_id_runs_once_at_a_time(foreign: Any, whole: Outside) -> None:
    """Twice the same id: one call, one completion; the second entry is buried as a duplicate."""
    job_id = f"foreign-{uuid4()}"
    for _ in range(2):
        foreign.xadd("job:llm_in", {"data": orjson.dumps({"id": job_id, "prompt": "What is a lease?"})})
    assert (await completion_of(foreign, job_id))["status"] == "completed"
    await whole.until_idle()
    assert len([record for record in await whole.records() if record["request_id"] == job_id]) == 1
    letters = [orjson.loads(fields[b"data"]) for _, fields in foreign.xrevrange("job:dead")]
    assert [letter["reason"] for letter in letters if job_id in letter["original"]] == ["duplicate_id"]
