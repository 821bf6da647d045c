"""The mock replica as a server: slots, leaving clients, failures from the seed, behaviours, records, and its end."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.loadtest.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loadtest.conftest import Mock, StartMock

HOUR = 3600


async def start_in_turn(mock: Mock, texts: list[str], ahead: int = 0) -> list[asyncio.Task[int]]:
    """Send one request for each text, each once the one before has arrived; with *ahead* 0 the first takes the slot."""
    tasks = []
    for n, text in enumerate(texts, start=ahead):
        tasks.append(asyncio.create_task(mock.status_of(text)))
        await mock.shows(running=1, waiting=n)
    return tasks


async def cancel(*tasks: asyncio.Task[int]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_slots_are_given_in_the_order_of_arrival(mock: Mock) -> None:
    """One slot, four in line for it: each begins when the one before has ended, in the order they came."""
    await mock.behave(slots=1, latency=HOUR)
    (holder,) = await start_in_turn(mock, ["holder"])
    await mock.behave(latency=0.02)
    line = await start_in_turn(mock, ["a", "b", "c", "d"], ahead=1)
    await cancel(holder)
    assert await asyncio.gather(*line) == [200] * 4
    entries = (await mock.asked())["requests"]
    assert [entry["request_id"] for entry in entries] == ["holder", "a", "b", "c", "d"]
    for before, after in pairwise(entries):
        assert after["began_s"] >= before["ended_s"]


async def test_a_client_that_leaves_frees_its_slot_at_once(mock: Mock) -> None:
    """An answer that would take an hour is given up, and the next in line begins."""
    await mock.behave(slots=1, latency=HOUR)
    (leaving,) = await start_in_turn(mock, ["leaves"])
    await mock.behave(latency=0)
    next_one = asyncio.create_task(mock.status_of("next"))
    await cancel(leaving)
    assert await next_one == 200
    record = await mock.asked()
    assert (record["completed"], record["aborted"], record["running"], record["waiting"]) == (1, 1, 0, 0)
    assert {entry["request_id"]: entry["status"] for entry in record["requests"]} == {
        "leaves": "aborted",
        "next": "completed",
    }


async def test_a_client_that_leaves_the_line_is_skipped(mock: Mock) -> None:
    """Whoever waits behind one that left moves up; a request that never began has no beginning on record."""
    await mock.behave(slots=1, latency=HOUR)
    first, second = await start_in_turn(mock, ["first", "second"])
    await mock.behave(latency=0)
    third = asyncio.create_task(mock.status_of("third"))
    await cancel(second, first)
    assert await third == 200
    await mock.shows(aborted=2)
    entries = {entry["request_id"]: entry for entry in (await mock.asked())["requests"]}
    assert entries["second"]["began_s"] is None
    assert entries["first"]["began_s"] is not None


async def test_a_client_that_leaves_a_stream_ends_it(mock: Mock) -> None:
    """The tokens that nobody reads are not generated."""
    await mock.behave(tokens_per_second=0.5)
    response = await mock.chat("a long story", stream=True)
    assert (await response.content.readline()).startswith(b"data: ")
    response.close()
    await mock.shows(aborted=1, running=0)


async def test_more_slots_let_those_who_wait_begin(mock: Mock) -> None:
    """A bound that is raised while requests wait is felt by them."""
    await mock.behave(slots=1, latency=HOUR)
    tasks = await start_in_turn(mock, ["a", "b", "c"])
    assert (await mock.asked())["waiting"] == 2
    await mock.behave(slots=2)
    assert (await mock.asked())["waiting"] == 1
    await mock.behave(slots=0)
    assert (await mock.asked())["running"] == 3
    await cancel(*tasks)


async def test_failures_come_from_the_seed(start_mock: StartMock) -> None:
    """The share is about the rate; the same seed fails the same requests, another one others."""

    async def statuses(seed: int) -> list[int]:
        mock = start_mock(fail_rate=0.3, seed=seed)
        return [await mock.status_of(str(n)) for n in range(100)]

    one, same, other = await asyncio.gather(statuses(1), statuses(1), statuses(2))
    assert one == same != other
    assert set(one) == {200, 500}
    assert 15 <= one.count(500) <= 45


async def test_a_changed_behaviour_goes_back_to_the_options(mock: Mock) -> None:
    """DELETE ends what a test has set; a wrong change changes nothing."""
    async with mock.session.get(f"{mock.url}/mock/behaviour") as response:
        before = await response.json()
    await mock.behave(status=503, retry_after_s=1.5)
    async with mock.chat("x") as response:
        assert (response.status, response.headers["retry-after"]) == (503, "1.5")
        assert (await response.json())["error"]["type"] == "server_error"
    async with mock.session.post(f"{mock.url}/mock/behaviour", json={"fail_rate": 7}) as response:
        assert response.status == 400
        assert "fail_rate is a share" in (await response.json())["error"]["message"]
    async with mock.session.delete(f"{mock.url}/mock/behaviour") as response:
        assert await response.json() == before
    assert await mock.status_of("y") == 200


async def test_garbage_is_a_page_and_empty_is_json_without_choices(mock: Mock) -> None:
    """Both come with status 200, and both are failures on record."""
    await mock.behave(mode="garbage")
    async with mock.chat("x") as response:
        assert (response.status, response.content_type) == (200, "text/html")
        with pytest.raises(json.JSONDecodeError):
            json.loads(await response.read())
    await mock.behave(mode="empty")
    async with mock.chat("x") as response:
        assert (await response.json())["choices"] == []
    assert (await mock.asked())["failed"] == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_truncated_answer_breaks_off(mock: Mock, stream: bool) -> None:
    """The connection closes half-way through a body that was announced whole."""
    await mock.behave(mode="truncated")
    async with mock.chat("x", stream=stream) as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    assert (await mock.asked())["failed"] == 1


@pytest.mark.parametrize(("mode", "has_head"), [("hang", False), ("stalled", True)])
async def test_a_silent_replica_holds_its_slot_until_the_client_leaves(mock: Mock, mode: str, has_head: bool) -> None:
    """Hanging sends nothing at all, stalling half an answer; neither ever ends by itself."""
    await mock.behave(mode=mode)
    asked = asyncio.create_task(mock.chat("x").__aenter__())
    await mock.shows(running=1)
    if has_head:
        response = await asked
        assert (await response.content.readany()).startswith(b'{"id"')
        assert not response.content.at_eof()
        response.close()
    else:
        assert not asked.done()
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
    await mock.shows(aborted=1, running=0)


async def test_every_request_is_a_line_of_the_record(start_mock: StartMock, tmp_path: Path) -> None:
    """Completed, failed and refused requests are there when their client has the answer, with what was asked."""
    file = tmp_path / "record.jsonl"
    mock = start_mock(record=str(file))
    async with mock.chat("hello") as response:
        await response.read()
    async with mock.chat("lost", model="other") as response:
        assert response.status == 404
    async with mock.session.post(f"{mock.url}/v1/embeddings", json={"model": "m", "input": "text"}) as response:
        assert response.status == 200
    async with mock.session.post(f"{mock.url}/v1/chat/completions", data=b"{") as response:
        assert (await response.json())["error"]["code"] == "invalid_json"
    lines: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["path"], line["status"], line["status_code"]) for line in lines] == [
        ("/v1/chat/completions", "completed", 200),
        ("/v1/chat/completions", "failed", 404),
        ("/v1/embeddings", "completed", 200),
        ("/v1/chat/completions", "failed", 400),
    ]
    hello = lines[0]
    assert hello["messages"] == [{"role": "user", "content": "hello"}]
    assert hello["request_id"] == "hello"
    assert hello["replica"] == mock.url
    assert hello["arrived_s"] <= hello["began_s"] <= hello["ended_s"]
    assert lines[2]["input"] == ["text"]
    assert lines == (await mock.asked())["requests"]


async def test_a_record_that_was_cleared_starts_from_nothing(mock: Mock) -> None:
    """A test may look at its own part alone."""
    await mock.status_of("before")
    async with mock.session.delete(f"{mock.url}/mock/requests") as response:
        assert (await response.json())["completed"] == 0
    await mock.status_of("after")
    assert [entry["request_id"] for entry in (await mock.asked())["requests"]] == ["after"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/livez", 200),
        ("GET", "/nowhere", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/livez", 405),
        ("PUT", "/mock/behaviour", 405),
    ],
)
async def test_other_paths_and_methods_have_json_errors(mock: Mock, method: str, path: str, status: int) -> None:
    """Nobody is sent a stack trace or a bare page."""
    async with mock.session.request(method, f"{mock.url}{path}") as response:
        assert response.status == status
        body = await response.json()
    assert body == {"status": "ok"} if status == 200 else body["error"]["message"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_replica_well_even_with_work_in_hand(
    start_mock: StartMock, number: signal.Signals, tmp_path: Path
) -> None:
    """What is still under way a second later is cut off and recorded as aborted; the exit code is 0."""
    file = tmp_path / "record.jsonl"
    mock = start_mock(latency=str(HOUR), record=str(file))
    (task,) = await start_in_turn(mock, ["cut off"])
    mock.process.send_signal(number)
    assert await task == 500
    assert await asyncio.to_thread(mock.process.wait) == 0
    assert json.loads(file.read_text())["status"] == "aborted"


def test_a_port_that_is_taken_is_named() -> None:
    """The error says where it could not listen."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        program = f"from loadtest.mock import *; run(MockOptions(port={port}))"
        ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in ended.stderr
