"""Reports over RabbitMQ through real processes: many requests while broker and bridge die, and the page's client."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random

import aio_pika
import orjson
import pytest
from aio_pika.abc import AbstractIncomingMessage

from pipeline import keys
from pipeline.bridge import RESPONSES_AT_ONCE
from tests.amqp.backend import PATIENT, BackEnd, back_end
from tests.conftest import wait_until
from tests.rabbitmq import RabbitServer, a_broker
from tests.whole.system import END_S, Json, Outside, command, environment, penstock

ROOT = Path(__file__).parents[2]
QUEUES = ("report_generation_requests", "report_generation_responses")
CANARY = "Wvutsquorn"  # a word that occurs nowhere else


@pytest.fixture(scope="module")
def broker() -> Iterator[RabbitServer]:
    """One real broker."""
    with a_broker() as server:
        yield server


@pytest.fixture
def rabbitmq(broker: RabbitServer) -> RabbitServer:
    """It, running."""
    return broker.up()


class Bridge:
    """One `penstock bridge amqp`."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def said(self) -> str:
        """What it has said so far."""
        return self._log.read_text()

    async def end(self, number: signal.Signals) -> int:
        """Send it a signal and wait for its end; return its exit code."""
        self.process.send_signal(number)
        async with asyncio.timeout(END_S):
            return await self.process.wait()


@asynccontextmanager
async def bridged(whole: Outside, rabbitmq: RabbitServer, log: Path) -> AsyncIterator[Bridge]:
    """Run a bridge, connected; what still runs at the end is killed."""
    environ = environment(REDIS_URL=whole.system.redis_url, RABBITMQ_URL=rabbitmq.url, PENSTOCK_LOG__LEVEL="debug")
    with log.open("ab") as out:
        process = await asyncio.create_subprocess_exec(
            *command("bridge", "amqp"), cwd="/", env=environ, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out
        )
    try:
        await wait_until(lambda: _is_ready(whole, process.pid), timeout_s=END_S, every_s=0.05)
        yield Bridge(process, log)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _record(whole: Outside, pid: int) -> Json | None:
    """Return what a process says of itself in Redis; None where it does not live."""
    names = [keys.WORKER + name.decode() for name in await whole.redis.zrange(keys.WORKERS, 0, -1)]
    found = [orjson.loads(text) for text in await whole.redis.mget(names) if text] if names else []
    return next((record for record in found if record["pid"] == pid), None)


async def _is_ready(whole: Outside, pid: int) -> bool:
    record = await _record(whole, pid)
    return record is not None and record["loops"] == {"amqp": None}


class Asker:
    """A back end that goes on when its broker went away: it sends again what was not confirmed."""

    def __init__(self, rabbitmq: RabbitServer) -> None:
        self._rabbitmq = rabbitmq
        self.heard: dict[str, list[AbstractIncomingMessage]] = {}

    async def ask(self, requests: list[tuple[str, Json]]) -> None:
        """Send requests one after another, in this order."""
        left = list(requests)
        while left:
            with suppress(*aio_pika.exceptions.CONNECTION_EXCEPTIONS, TimeoutError, asyncio.CancelledError):
                async with self._connected() as backend:
                    while left:
                        request_id, inputs = left[0]
                        await backend.ask(request_id, f"user{request_id}", inputs=inputs)
                        left.pop(0)
            await asyncio.sleep(0.1)  # before the next try to connect

    async def listen(self) -> None:
        """Note what comes back, until cancelled."""
        while True:
            with suppress(*aio_pika.exceptions.CONNECTION_EXCEPTIONS, TimeoutError):
                async with self._connected() as backend:
                    closed = asyncio.ensure_future(backend.channel.closed())
                    await backend.listen()
                    while not closed.done():
                        await asyncio.wait([closed], timeout=0.05)
                        while backend.heard:
                            message = backend.heard.pop(0)
                            self.heard.setdefault(str(message.message_id), []).append(message)
            await asyncio.sleep(0.1)  # before the next try to connect

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[BackEnd]:
        async with back_end(self._rabbitmq.url, *QUEUES) as backend:
            await backend.channel.declare_queue(backend.requests, durable=True)
            yield backend


async def test_each_request_is_answered_once_while_broker_and_bridge_die(
    whole: Outside, rabbitmq: RabbitServer, tmp_path: Path
) -> None:
    """100 requests about 40 things, 20 of them sent twice: one response each, one call a thing."""
    rng = Random(9)
    things = [PATIENT | {"age": 20 + number, "notes": f"case {number}"} for number in range(40)]
    asked = {f"amqp-{number}": number if number < 40 else rng.randrange(40) for number in range(100)}
    order = [*asked, *rng.sample(sorted(asked), 20)]
    rng.shuffle(order)
    await whole.behave(latency="0.1")
    before = int(await whole.redis.hget(keys.REPORT_COUNTS, "repeated") or 0)
    asker = Asker(rabbitmq)
    listening = asyncio.create_task(asker.listen(), name="listen")
    requests = [(request_id, things[asked[request_id]]) for request_id in order]
    try:
        async with bridged(whole, rabbitmq, tmp_path / "first") as first, bridged(whole, rabbitmq, tmp_path / "second"):
            await asker.ask(requests[:40])
            await wait_until(lambda: len(asker.heard) >= 10, timeout_s=END_S)
            asking = asyncio.create_task(asker.ask(requests[40:80]), name="ask")
            for end in (rabbitmq.stop, rabbitmq.kill):
                end()
                rabbitmq.launch()
                await wait_until(rabbitmq.answers, timeout_s=rabbitmq.start_timeout_s, every_s=0.1)
                heard = len(asker.heard)
                await wait_until(lambda: len(asker.heard) > heard, timeout_s=END_S)  # noqa: B023 - used at once
            await asking
            assert await first.end(signal.SIGKILL) == -signal.SIGKILL
            await asker.ask(requests[80:])
            await wait_until(lambda: asker.heard.keys() >= asked.keys(), timeout_s=END_S)
            await wait_until(lambda: _is_settled(whole), timeout_s=END_S)
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
    await whole.until_idle()
    assert asker.heard.keys() == asked.keys()
    for request_id, messages in asker.heard.items():
        assert len({message.body for message in messages}) == 1  # what comes a second time is the same, by the same id
        response = orjson.loads(messages[0].body)
        assert (response["request_id"], response["status"]) == (request_id, "success")
        assert f"case {asked[request_id]}" in response["report"]["markdown"]
    assert int(await whole.redis.hget(keys.REPORT_COUNTS, "repeated")) - before >= 20
    calls = await whole.records()
    completed = Counter(orjson.dumps(call["messages"]) for call in calls if call["status"] == "completed")
    assert (len(completed), completed.total()) == (40, 40)
    again = [message.redelivered for messages in asker.heard.values() for message in messages[1:]]
    # Published again was what had no confirm yet when a broker died, or was not forgotten yet when a bridge did.
    assert again.count(False) <= (2 * 2 + 1) * RESPONSES_AT_ONCE
    said = f"{again.count(True)} responses delivered again by RabbitMQ, {again.count(False)} published again"
    print(f"100 requests, 40 things: {completed.total()} calls; {said}")


async def _is_settled(whole: Outside) -> bool:
    """Every response was published, and nobody holds one."""
    left = [key async for key in whole.redis.scan_iter(match=keys.REPORT_REPLY + "*")]
    return not left and int((await whole.redis.xpending(keys.REPORT_RESPONSES, "bridge:amqp"))["pending"]) == 0


async def test_the_client_of_the_page_brings_a_report(whole: Outside, rabbitmq: RabbitServer, tmp_path: Path) -> None:
    """As a program of somebody else's; the bridge says nothing of people, is shown, and ends when told."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "REPORTS.md").read_text(), re.DOTALL)
    [code] = [code for code in found if "import pika" in code]
    (tmp_path / "client.py").write_text(code)
    said = PATIENT | {"notes": CANARY, "question": f"What of {CANARY}?"}
    async with bridged(whole, rabbitmq, tmp_path / "log") as bridge:
        for inputs, wanted in ((said, "# Medical report\n"), (said | {"age": -3}, "invalid_field: inputs.age: ")):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", str(tmp_path / "client.py"), rabbitmq.url, "ann", orjson.dumps(inputs).decode(),
                cwd=tmp_path, env=environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            async with asyncio.timeout(END_S):
                out, err = await process.communicate()
            assert process.returncode == 0, err.decode()
            assert out.decode().startswith(wanted)
        async with back_end(rabbitmq.url, *QUEUES) as backend:
            await backend.listen()
            await backend.send(f'{{"request_id": "canary", "notes": "{CANARY}'.encode(), correlation_id="c1")
            await wait_until(lambda: "canary" in [one.message_id for one in backend.heard], timeout_s=END_S)
            await wait_until(lambda: _is_settled(whole), timeout_s=END_S)
        record = await _record(whole, bridge.process.pid)
        assert record is not None
        metrics = (await whole.http.get(f"http://{record['metrics']}/metrics")).text
        assert 'penstock_bridge_connected{direction="responses"} 1.0' in metrics
        assert 'penstock_bridge_requests_total{outcome="whole"} 3.0' in metrics
        assert 'penstock_bridge_responses_total{outcome="published"} 3.0' in metrics
        code, out_text, err_text = await penstock("status", "--once", "--data-dir", str(whole.system.data_dir))
        assert code == 0, err_text
        assert "amqp" in out_text
        assert await bridge.end(signal.SIGTERM) == 0
        for text in (bridge.said, metrics, out_text):
            assert CANARY.casefold() not in text.casefold()
    assert await _record(whole, bridge.process.pid) is None


async def test_a_bridge_that_is_refused_says_so_and_ends(whole: Outside, rabbitmq: RabbitServer) -> None:
    """With exit code 2, and without the password."""
    wrong = rabbitmq.url.replace("guest:guest", "guest:swordfish")
    code, out, err = await penstock("bridge", "amqp", REDIS_URL=whole.system.redis_url, RABBITMQ_URL=wrong)
    assert code == 2
    assert "RabbitMQ refuses the credentials in RABBITMQ_URL" in err
    assert "swordfish" not in out + err
