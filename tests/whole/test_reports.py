"""Reports through real processes: the page's client, many requests while workers die, personal data, a long report."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest

from pipeline import keys
from tests.conftest import wait_until
from tests.whole.system import END_S, LEASE_S, Json, Outside, System, environment, outside, penstock

ROOT = Path(__file__).parents[2]
KNOWLEDGE = ROOT / "tests" / "knowledge" / "medical"
PATIENT: Json = {
    "age": 44,
    "sex": "female",
    "symptoms": ["headache", "blurred vision"],
    "vitals": {"systolic_mmhg": 185, "diastolic_mmhg": 121},
    "medications": ["ibuprofen"],
}
CANARY = "Zyxwquorn"  # a word that occurs nowhere else


@pytest.fixture(scope="module")
def knowing() -> Iterator[System]:
    """A system of its own, where log lines of every level are written."""
    with System(PENSTOCK_LOG__LEVEL="debug") as running:
        yield running


@pytest.fixture
async def whole(knowing: System) -> AsyncIterator[Outside]:
    """The system, with its knowledge base, ready; afterwards nothing may be left in it."""
    async with outside(knowing) as connected:
        await connected.until_ready()
        await connected.reset()
        code, out, err = await penstock("ingest", str(KNOWLEDGE), "--collection", "medical", "--url", knowing.url)
        assert code == 0, out + err
        yield connected
        await connected.reset()
        await connected.until_idle()


async def ask(whole: Outside, request_id: str, user_id: str = "ann", **fields: Any) -> None:
    """Put a request on the stream."""
    body = {"request_id": request_id, "user_id": user_id, "inputs": PATIENT} | fields
    await whole.redis.xadd(keys.REPORT_REQUESTS, {"data": orjson.dumps(body)})


async def responses(whole: Outside) -> list[Json]:
    """Return all responses there are."""
    return [orjson.loads(fields[b"data"]) for _, fields in await whole.redis.xrange(keys.REPORT_RESPONSES)]


async def answer_to(whole: Outside, request_id: str) -> Json:
    """Wait for the response to one request."""
    found: list[Json] = []

    async def is_there() -> bool:
        found[:] = [one for one in await responses(whole) if one["request_id"] == request_id]
        return bool(found)

    await wait_until(is_there, timeout_s=END_S, every_s=0.05)
    [response] = found
    return response


def client(folder: Path) -> Path:
    """Return a file with the client that the page shows."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "REPORTS.md").read_text(), re.DOTALL)
    [code] = [code for code in found if "from redis import" in code]
    file = folder / "client.py"
    file.write_text(code)
    return file


async def run_client(whole: Outside, folder: Path, inputs: Json, user_id: str = "ann") -> tuple[int, str, str]:
    """Run it as a program of somebody else's, who has `redis` and nothing of ours."""
    arguments = [whole.system.redis_url, user_id, orjson.dumps(inputs).decode()]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", str(client(folder)), *arguments,
        cwd=folder, env=environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_the_client_of_the_page_brings_a_report(whole: Outside, tmp_path: Path) -> None:
    """As text for people: marked, complete, with the sources that were ingested; questions do not see these."""
    code, out, err = await run_client(whole, tmp_path, PATIENT)
    assert code == 0, err
    assert out.startswith("# Medical report\n\n> **Written by a language model**")
    for part in ("Patient", "Summary", "Findings", "Assessment", "To consider", "Sources"):
        assert f"\n## {part}\n" in out
    assert "| Vital signs | blood pressure 185/121 mmHg |" in out
    assert "- [1] " in out
    assert "(hypertension.md)" in out
    assert "(headache.md)" in out
    reply = await whole.ask("What is a crisis of blood pressure?")
    assert not {source["document"] for source in reply.body["sources"]} & {"hypertension.md", "headache.md"}


async def test_the_client_of_the_page_says_what_is_wrong(whole: Outside, tmp_path: Path) -> None:
    """The field is named."""
    code, out, err = await run_client(whole, tmp_path, PATIENT | {"age": -3})
    assert (code, out) == (1, "")
    assert err.startswith("invalid_field: inputs.age: ")


async def test_each_request_is_answered_once_while_workers_die(whole: Outside) -> None:
    """300 requests of 40 people about 100 different things, a tenth sent twice: one response each, one call a thing."""
    rng = Random(7)
    things = [PATIENT | {"age": 20 + number % 60, "notes": f"case {number}"} for number in range(100)]
    asked: dict[str, int] = {}
    await whole.behave(latency="0.1")
    for number in range(300):
        what = number if number < 100 else rng.randrange(100)
        asked[f"many-{number}"] = what
    order = [*asked, *rng.sample(sorted(asked), 30)]
    rng.shuffle(order)
    before = int(await whole.redis.hget(keys.REPORT_COUNTS, "repeated") or 0)
    doomed = iter(("report", "retriever", "encoder", "report", "llm", "report"))
    for position, request_id in enumerate(order):
        await ask(whole, request_id, user_id=f"user{asked[request_id] % 40}", inputs=things[asked[request_id]])
        if position % 50 == 49 and (name := next(doomed, None)):
            await _wait_for(whole, position // 3)
            await _wait_for_successor(whole, name, whole.system.kill(name, signal.SIGKILL))
    await _wait_for(whole, 300)
    await whole.until_idle()
    counts = Counter(one["request_id"] for one in await responses(whole))
    mine = {request_id: count for request_id, count in counts.items() if request_id.startswith("many-")}
    assert mine == dict.fromkeys(asked, 1)
    found = [one for one in await responses(whole) if one["request_id"] in asked]
    assert Counter(one["status"] for one in found) == {"success": 300}
    assert sum(not one["cached"] for one in found) == 100
    for one in found:
        assert f"case {asked[one['request_id']]}" in one["report"]["markdown"]
    assert int(await whole.redis.hget(keys.REPORT_COUNTS, "repeated")) - before == 30
    calls = await whole.records()
    completed = Counter(orjson.dumps(call["messages"]) for call in calls if call["status"] == "completed")
    aborted = sum(call["status"] == "aborted" for call in calls)
    assert len(completed) == 100  # nothing was asked that nobody wanted to know
    # A call that had ended when its worker was killed, and was not settled, is made again: those of one kill at most.
    assert 100 <= completed.total() <= 100 + 16 * 3
    print(f"300 requests, 100 things: {completed.total()} calls completed, {aborted} broken off, 30 repeated")


async def _wait_for(whole: Outside, wanted: int) -> None:
    async def are_there() -> bool:
        found = {one["request_id"] for one in await responses(whole)}
        return sum(str(name).startswith("many-") for name in found) >= wanted

    await wait_until(are_there, timeout_s=END_S, every_s=0.1)


async def _wait_for_successor(whole: Outside, name: str, killed: int) -> None:
    await wait_until(lambda: whole.system.pid_of(name) not in {None, killed}, timeout_s=END_S)


async def test_a_report_that_takes_many_leases_is_written_once(whole: Outside) -> None:
    """Ten minutes at a lease of ten seconds are sixty leases; here some in proportion."""
    await whole.behave(latency=f"{4 * LEASE_S}")
    await ask(whole, "long-1", inputs=PATIENT | {"notes": "a long one"})
    response = await answer_to(whole, "long-1")
    assert response["status"] == "success"
    assert response["duration_ms"] >= 4 * LEASE_S * 1000
    assert [call["status"] for call in await whole.records()] == ["completed"]


async def test_what_is_said_of_people_is_put_out_nowhere(whole: Outside, tmp_path: Path) -> None:
    """Through everything, good and bad, with logs of every level: not in logs, metrics, status, listings of letters."""
    said = {
        "age": 44,
        "sex": "female",
        "symptoms": [f"{CANARY} pain"],
        "notes": CANARY,
        "history": [CANARY],
        "question": f"What of {CANARY}?",
    }
    await ask(whole, "canary-good", user_id="canary", inputs=said)
    report = (await answer_to(whole, "canary-good"))["report"]
    assert CANARY in report["markdown"]  # the search below can find it
    await ask(whole, "canary-field", user_id="canary", inputs=said | {"age": -3, CANARY: CANARY})
    await ask(whole, "canary-type", user_id="canary", inputs=said, report_type=CANARY)
    await whole.redis.xadd(keys.REPORT_REQUESTS, {"data": '{"request_id": "canary-text", "notes": "' + CANARY})
    await whole.behave(mode="garbage")
    await ask(whole, "canary-garbage", user_id="canary", inputs=said | {"notes": f"{CANARY} again"})
    await answer_to(whole, "canary-garbage")
    await whole.behave(mode="normal", status=400)
    await ask(whole, "canary-refused", user_id="canary", inputs=said | {"notes": f"{CANARY} and again"})
    await answer_to(whole, "canary-refused")
    await whole.behave(status=None)
    for request_id in ("canary-field", "canary-type", "canary-text"):
        assert (await answer_to(whole, request_id))["status"] == "error"
    reply = await whole.send("POST", "/reports", {"user_id": "canary", "inputs": said | {"age": 1000}})
    assert reply.status == 422
    accepted = await whole.send("POST", "/reports", {"user_id": "canary", "inputs": said})
    assert accepted.status == 202

    async def is_recorded() -> bool:
        page = await whole.send("GET", "/users/canary/reports")
        rows = page.body["reports"] if page.status == 200 else []  # the recorder may be making its tables yet
        return len(rows) == 4 and all(row["status"] != "pending" for row in rows)

    await wait_until(is_recorded, timeout_s=END_S)

    where = ["--data-dir", str(whole.system.data_dir)]
    put_out = {"log": whole.system.log.read_text()}
    for name, arguments in {
        "dead list": ["dead", "list"],
        "dead list --json": ["dead", "list", "--json"],
        "status": ["status", "--once"],
        "status --json": ["status", "--json"],
    }.items():
        code, out, err = await penstock(*arguments, *where)
        assert code == 0, err
        put_out[name] = out + err
    assert "attempts_exhausted" in put_out["dead list"]
    assert "not_json" in put_out["dead list"]
    for address in await _metrics(whole):
        put_out[address] = (await whole.http.get(address)).text
    assert any("penstock_report_outputs_total" in text for text in put_out.values())
    assert "a request was refused" in put_out["log"]
    assert [name for name, text in put_out.items() if CANARY.casefold() in text.casefold()] == []

    letter = orjson.loads((await penstock("dead", "list", "--json", *where))[1])[0]
    assert CANARY in (await penstock("dead", "show", letter["id"], *where))[1]  # an operator asks for it

    reply = await whole.send("DELETE", "/users/canary")
    assert (reply.status, reply.body["status"]) == (200, "deleted")
    assert (await whole.send("GET", "/users/canary/reports")).body["reports"] == []
    assert (await whole.send("GET", f"/reports/{accepted.body['report_id']}")).status == 404
    left = [one["request_id"] for one in await responses(whole) if CANARY in orjson.dumps(one).decode()]
    assert left == []


async def _metrics(whole: Outside) -> list[str]:
    """Return the addresses of all pages of metrics."""
    names = [keys.WORKER + name.decode() for name in await whole.redis.zrange(keys.WORKERS, 0, -1)]
    records = [orjson.loads(record) for record in await whole.redis.mget(names) if record]
    return [f"{whole.system.url}/metrics", *(f"http://{record['metrics']}/metrics" for record in records)]
