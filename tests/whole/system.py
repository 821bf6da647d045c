"""The whole system as an outsider has it: one `penstock up`, reached by HTTP, by signals and through Redis.

A `System` is started and ended without an event loop, so that many tests may share one; each test opens its own
connections (`Outside`), since these belong to the test's loop.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx
import orjson
from httpx_aiohttp import AiohttpTransport
from redis.asyncio import Redis

from pipeline import keys
from tests.cli.conftest import clean_environment, lives
from tests.conftest import PATIENCE_S, wait_until
from tests.faults.checkers import leftovers
from tests.ports import take_port

Json = dict[str, Any]

LEASE_S: Final = 2.0
END_S: Final = 2 * PATIENCE_S
"""Ends a hang, as `PATIENCE_S` does, where fifteen processes share what processors there are."""
SLACK_S: Final = 25.0
"""What a machine may add to a span that is promised: less than whatever else would end the wait, the 30 s of a call."""
BACKOFF_S: Final = 0.05  # of a client that was refused
PATH: Final = "/nonexistent" if os.environ.get("TEST_SERVER") == "valkey" else os.environ["PATH"]
"""Without a Redis on PATH the one that comes with the wheel is used."""

WORDS: Final = {
    "encoder": "-m stages encoder",
    "retriever": "-m stages retriever",
    "llm": "-m stages llm",
    "aggregator": "-m stages aggregator",
    "report": "-m stages report",
    "delivery": "-m stages delivery",
    "webhook": "-m stages webhook",
    "chat": "-m stages chat",
    "image": "-m stages image",
    "recorder": "-m stages recorder",
    "gateway": "-m gateway",
    "redis": "redis.sock",
}
"""What tells each process of `up` from the others, on its command line."""


def environment(**more: str) -> dict[str, str]:
    """Return the environment of every process here: short spans, so that no test waits long."""
    spans = {
        "PENSTOCK_WORKER__LEASE_S": f"{LEASE_S:g}",
        "PENSTOCK_WORKER__DRAIN_S": "10",
        "PENSTOCK_LLM__BREAKER_OPEN_S": "0.5",
        "PENSTOCK_RETRY__BASE_S": "0.1",
    }
    return clean_environment(**{"PATH": PATH, **spans, **more})


def command(*arguments: str) -> list[str]:
    """Return the command line of `penstock`."""
    return [sys.executable, "-P", "-m", "penstock", *arguments]


async def penstock(*arguments: str, **environ: str) -> tuple[int, str, str]:
    """Run a command to its end; return its exit code and what it said on both streams."""
    return await penstock_within(END_S, *arguments, **environ)


async def penstock_within(within_s: float, /, *arguments: str, **environ: str) -> tuple[int, str, str]:
    """Run a command that may take longer."""
    process = await asyncio.create_subprocess_exec(
        *command(*arguments),
        cwd="/",
        env=environment(**environ),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(within_s):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


class System:
    """One `penstock up`; use as `with`. Leaving kills what still runs, by its id."""

    def __init__(self, *options: str, **environ: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="penstock-", dir="/tmp")  # short: it holds a unix socket
        self.data_dir = Path(self._folder.name) / "data"
        self.log = Path(self._folder.name) / "log"
        self.url = ""
        self._options = options
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start `up` and wait until it is ready and its first documents are indexed. May be repeated after its end."""
        self._close()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command("up", "--port", str(take_port()), "--data-dir", str(self.data_dir), *self._options),
                cwd="/",
                env=environment(**self._environ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.ready_line = self.line()
        word, _, self.url = self.ready_line.strip().partition(" ")
        assert word == "ready", self.log.read_text()[-10_000:]
        give_up_s = time.monotonic() + END_S
        while (self.data_dir / "index.unfilled").exists():
            assert time.monotonic() < give_up_s, self.log.read_text()
            time.sleep(0.02)
        return self

    def line(self) -> str:
        """Return the next line that `up` says on its standard output, or what there is of it when no more comes."""
        assert self._process is not None
        assert self._process.stdout is not None
        said = self._process.stdout.fileno()
        text = b""
        give_up_s = time.monotonic() + END_S
        while not text.endswith(b"\n") and select.select([said], [], [], max(0.0, give_up_s - time.monotonic()))[0]:
            letter = os.read(said, 1)
            if not letter:
                break
            text += letter
        return text.decode()

    @property
    def said(self) -> Json:
        """What `up` says of itself."""
        value: Json = orjson.loads((self.data_dir / "up.json").read_bytes())
        return value

    @property
    def replicas(self) -> list[str]:
        """Addresses of the replicas."""
        return list(self.said["replicas"])

    @property
    def redis_url(self) -> str:
        """Address of the private Redis."""
        return str(self.said["redis_url"])

    @property
    def pid(self) -> int:
        """Process id of `up` itself."""
        assert self._process is not None
        return self._process.pid

    def children(self) -> dict[int, str]:
        """Return the processes that `up` runs: id and command line."""
        found: dict[int, str] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
                words = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == self.pid:
                found[int(stat.parent.name)] = words
        return found

    def pid_of(self, name: str) -> int | None:
        """Return the process id of one part: a stage, the gateway, redis, or the address of a mock replica."""
        words = WORDS.get(name) or f"loadtest.mock {name.rpartition(':')[2]}"
        return next((pid for pid, line in self.children().items() if words in line and lives(pid)), None)

    def kill(self, name: str, number: signal.Signals) -> int:
        """Send a signal to one part; return its process id."""
        pid = self.pid_of(name)
        assert pid is not None, f"{name} does not run"
        os.kill(pid, number)
        return pid

    async def end(self, number: signal.Signals) -> int:
        """Send a signal to `up` and wait for its end; return its exit code."""
        assert self._process is not None
        self._process.send_signal(number)
        return await asyncio.to_thread(self._process.wait, END_S)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        if process is not None:
            left = self.children()
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(END_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            for pid in left:
                if lives(pid):
                    os.kill(pid, signal.SIGKILL)
        self._close()
        self._folder.cleanup()

    def _close(self) -> None:
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()

    def __repr__(self) -> str:
        return f"<System {self.url} {self.data_dir}>"


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of one request.

    Attributes:
        status: HTTP status; 0 where the connection broke.
        began_s: on the monotonic clock, and
        ended_s: likewise.
    """

    status: int
    body: Json
    began_s: float
    ended_s: float
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def took_s(self) -> float:
        """From sending to having the answer whole."""
        return self.ended_s - self.began_s


class Load:
    """Questions that are being asked, over and over, and the replies so far."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.stop = asyncio.Event()

    def statuses(self) -> Counter[int]:
        """Return how many replies had which status."""
        return Counter(reply.status for reply in self.replies)


class Outside:
    """One test's connections to a system."""

    def __init__(self, system: System, http: httpx.AsyncClient, redis: Redis) -> None:
        self.system = system
        self.http = http
        self.redis: Any = redis  # redis-py's types are those of its blocking and its asyncio client at once

    # --- over HTTP -------------------------------------------------------------------------------

    async def send(self, method: str, path: str, body: Json | None = None, /, **headers: str) -> Reply:
        """Send one request to the gateway."""
        began_s = time.monotonic()
        try:
            answer = await self.http.request(method, self.system.url + path, json=body, headers=headers)
        except httpx.HTTPError:
            return Reply(0, {}, began_s, time.monotonic())
        return Reply(answer.status_code, answer.json(), began_s, time.monotonic(), answer.headers)

    async def ask(self, question: str = "What is a lease?", **fields: Any) -> Reply:
        """Ask one question, which lives long enough to see a system start again."""
        return await self.send("POST", "/query", {"query": question, "timeout_s": END_S, **fields})

    async def outcome(self, job_id: str, **headers: str) -> Json:
        """Wait for the outcome of a job."""
        found: Json = {}

        async def has_ended() -> bool:
            nonlocal found
            reply = await self.send("GET", f"/jobs/{job_id}", **headers)
            found = reply.body
            return reply.status == 200 and found["status"] not in {"queued", "running"}

        await wait_until(has_ended, timeout_s=END_S, every_s=0.02)
        return found

    async def ask_many(self, count: int, in_flight: int, **fields: Any) -> list[Reply]:
        """Ask *count* questions, *in_flight* at a time; one that is refused (503) is asked again, as clients do."""
        numbers = iter(range(count))
        replies: list[Reply] = []

        async def client() -> None:
            for number in numbers:
                question = f"What happens to job {number} when its worker dies?"
                while (reply := await self.ask(question, **fields)).status == 503:
                    await asyncio.sleep(BACKOFF_S)
                replies.append(reply)

        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(client())
        return replies

    @asynccontextmanager
    async def under_load(self, in_flight: int, **fields: Any) -> AsyncIterator[Load]:
        """Keep so many questions in flight; leaving the block waits for the replies to the last of them."""
        load = Load()

        async def client() -> None:
            while not load.stop.is_set():
                reply = await self.ask(**fields)
                load.replies.append(reply)
                if reply.status != 200:
                    await asyncio.sleep(BACKOFF_S)

        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(client())
            try:
                await wait_until(lambda: load.replies, timeout_s=END_S)
                yield load
            finally:
                load.stop.set()

    # --- the replicas ----------------------------------------------------------------------------

    async def behave(self, *replicas: str, **patch: Any) -> None:
        """Change how replicas behave; all of them where none is named."""
        for url in replicas or self.system.replicas:
            (await self.http.post(f"{url}/mock/behaviour", json=patch)).raise_for_status()

    async def records(self, *replicas: str) -> list[Json]:
        """Return the replicas' own records of what they were asked, all replicas' where none is named."""
        found: list[Json] = []
        for url in replicas or self.system.replicas:
            found += (await self.http.get(f"{url}/mock/requests")).raise_for_status().json()["requests"]
        return found

    async def reset(self) -> None:
        """Let every replica behave as it did at the start, and forget its records and what was learned of it."""

        async def have_been() -> bool:
            try:
                for url in self.system.replicas:
                    (await self.http.delete(f"{url}/mock/behaviour")).raise_for_status()
                    (await self.http.delete(f"{url}/mock/requests")).raise_for_status()
                    await self.redis.delete(keys.HEALTH + url)
            except httpx.HTTPError:
                return False
            return True

        await wait_until(have_been, timeout_s=END_S, every_s=0.05)

    # --- Redis -----------------------------------------------------------------------------------

    async def pending(self, stage: str) -> list[str]:
        """Return the ids of the jobs that are in the hands of a stage's workers."""
        stream = keys.stream(stage)
        rows = await self.redis.xpending_range(stream, stage, "-", "+", 1000)
        found = []
        for row in rows:
            for _, fields in await self.redis.xrange(stream, row["message_id"], row["message_id"]):
                found.append(str(orjson.loads(fields[b"data"])["id"]))
        return found

    async def has_in_hand(self, stage: str, count: int) -> bool:
        """Say whether a stage's workers hold *count* jobs."""
        return len(await self.pending(stage)) == count

    async def works(self, pid: int | None) -> bool:
        """Say whether a process has taken its lease."""
        leases = [keys.WORKER + name.decode() for name in await self.redis.zrange(keys.WORKERS, 0, -1)]
        records = await self.redis.mget(leases) if leases else []
        return any(record and orjson.loads(record)["pid"] == pid for record in records)

    async def has_live_jobs(self, count: int) -> bool:
        """Say whether *count* jobs are accepted and not ended."""
        return int(await self.redis.zcard(keys.LIVE_INDEX)) == count

    async def until_idle(self) -> None:
        """Wait until nothing is left: work, leases, calls, keys that would stay for ever; fail with what is.

        A replica whose caller has left may notice it later than anybody else.
        """
        left: object = None

        async def is_idle() -> bool:
            nonlocal left
            left = await leftovers.check(self.redis) or await self._calls_in_hand()
            return not left

        try:
            await wait_until(is_idle, timeout_s=END_S, every_s=0.05)
        except TimeoutError:
            raise AssertionError(f"left behind: {left}") from None

    async def _calls_in_hand(self) -> list[Json]:
        found: list[Json] = []
        for url in self.system.replicas:
            with suppress(httpx.HTTPError):  # nobody is there, so nobody has anything in hand
                found += [record for record in await self.records(url) if record["ended_s"] is None]
        return found

    async def until_ready(self) -> None:
        """Wait until the gateway says that questions can be answered."""

        async def is_ready() -> bool:
            return (await self.send("GET", "/readyz")).status == 200

        await wait_until(is_ready, timeout_s=END_S, every_s=0.05)


@asynccontextmanager
async def outside(system: System) -> AsyncIterator[Outside]:
    """Connect to a system."""
    limits = httpx.Limits(max_connections=200)
    async with (
        httpx.AsyncClient(transport=AiohttpTransport(limits=limits), timeout=END_S) as http,
        Redis.from_url(system.redis_url) as redis,
    ):
        yield Outside(system, http, redis)


def calls_of(records: Iterable[Json]) -> Counter[str]:
    """Return how many calls each job made."""
    return Counter(str(record["request_id"]) for record in records)
