"""The whole pipeline as separate processes that a scenario starts, kills, freezes and starts again, each by its name.

The same programs that `penstock up` runs, without its supervisor: what dies stays dead until the scenario says
otherwise. Every start of a process is a *generation* with a worker name of its own (`llm-1.3`), so an outcome's
`worker` tells which life of which process wrote it. All of them end with the process that started them (leash).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import aiohttp
import orjson
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from pipeline import keys, leash
from pipeline.job import PRIORITIES
from pipeline.private_redis import wait_until_ready
from tests.cli.conftest import clean_environment
from tests.conftest import PATIENCE_S, wait_until
from tests.faults.proxy import Proxy
from tests.ports import take_port
from tests.servers import server_binary

LEASE_S: Final = 3.0
"""Short, so that a run sees many leases lapse; every bound below is told in leases."""
READY_S: Final = PATIENCE_S
STOP_S: Final = PATIENCE_S
METRICS_WITHIN: Final = aiohttp.ClientTimeout(total=5.0)
METRICS_PATIENCE_S: Final = PATIENCE_S
"""As long as a process may take to start, and one that was frozen or blocked to answer again."""
STAGES: Final = ("encoder", "retriever", "llm")
AFTERWARDS: Final = ("aggregator", "webhook", "recorder")
"""What batches need besides: no other scenario runs them."""
DELIVERY: Final = "delivery"
"""The process of several stages, one for each type of deliveries: it holds work in all of their streams."""
DEADLY: Final = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT})


@dataclass(frozen=True, slots=True)
class Layout:
    """What runs, and how.

    Attributes:
        latency: of the mock replicas, as `penstock mock-llm` takes it.
        redis: further options of Redis' configuration, by name.
        environ: settings of all processes of ours.
        proxied: names of processes that reach Redis through a proxy of their own (`Cluster.proxies`), and of replicas
            that are reached through one.
        modules: what runs instead of `-m stages NAME`, by process name.
        wrap: words before a process' command line, by its name (`faketime`, say).
    """

    encoders: int = 2
    retrievers: int = 1
    llms: int = 2
    aggregators: int = 0
    webhooks: int = 0
    recorders: int = 0
    chats: int = 0
    deliveries: int = 0
    gateways: int = 1
    replicas: int = 3
    latency: str = "0.05"
    fsync: str = "everysec"
    redis: Mapping[str, str] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    proxied: frozenset[str] = frozenset()
    modules: Mapping[str, Sequence[str]] = field(default_factory=dict)
    wrap: Mapping[str, Sequence[str]] = field(default_factory=dict)


class Holding(NamedTuple):
    """An entry in somebody's hands, and how often it was delivered until then."""

    stream: str
    entry_id: bytes
    deliveries: int


def samples(text: str, name: str = "") -> dict[str, float]:
    """Return what an exposition says, by metric with its labels.

    Raises:
        LookupError: it does not know the metric *name*. One with labels that has never counted is known: that is 0.
    """
    family = name.removesuffix("_total")  # OpenMetrics names the family, the older format the samples
    if name and not any(text.find(f"# HELP {known} ") >= 0 for known in (name, family)):
        raise LookupError(f"there is no metric {name}")
    lines = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return {key: float(value) for key, _, value in lines}


def _group_of(stream: str) -> str:
    return "recorder" if stream == keys.EVENTS else keys.stage_of(stream)


class Part:
    """One process: at most one life at a time.

    Attributes:
        generation: how often it was started.
        process: the present or last life.
        may_die: whether a life may end without the suite having ended it (a payload may kill it, say).
    """

    def __init__(self, name: str, command: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.generation = 0
        self.process: asyncio.subprocess.Process | None = None
        self.may_die = False
        self._is_to_end = False  # the suite has told the present life to end
        self._fallen: list[str] = []  # earlier lives that ended all the same
        self._command = command
        self._environ = environ
        self._log = log

    @property
    def stage(self) -> str:
        """Its kind: the name without the number."""
        return self.name.rpartition("-")[0]

    @property
    def worker(self) -> str:
        """The worker name of its present life, as outcomes and consumers show it."""
        return f"{self.name}.{self.generation}"

    @property
    def pid(self) -> int:
        """Process id of the present life."""
        assert self.process is not None, f"{self.name} was never started"
        return self.process.pid

    @property
    def lives(self) -> bool:
        """Whether it runs (or is frozen)."""
        return self.process is not None and self.process.returncode is None

    @property
    def fallen(self) -> list[str]:
        """Its lives that ended without the suite having ended them, each with its exit code."""
        if self.process is None or self.process.returncode is None or self._is_to_end or self.may_die:
            return list(self._fallen)
        return [*self._fallen, f"{self.worker} (exit code {self.process.returncode})"]

    async def start(self) -> None:
        """Start the next life."""
        assert not self.lives, f"{self.name} runs already"
        self._fallen = self.fallen
        self._is_to_end = False
        self.generation += 1
        read_end, write_end = os.pipe()
        try:
            with self._log.open("ab") as log:
                self.process = await asyncio.create_subprocess_exec(
                    *leash.prefix(signal.SIGKILL, read_end),
                    *self._command,
                    cwd="/",
                    env={**self._environ, "PENSTOCK_WORKER__NAME": self.worker},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[read_end],
                    start_new_session=True,
                )
        finally:
            os.close(read_end)
            os.close(write_end)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the present life."""
        if self.lives and number in DEADLY:
            self._is_to_end = True
        os.kill(self.pid, number)

    async def wait(self, timeout_s: float = STOP_S) -> int:
        """Wait for the end of the present life; return its exit code."""
        assert self.process is not None
        async with asyncio.timeout(timeout_s):
            return await self.process.wait()

    async def kill(self) -> None:
        """End the present life as a crash would (SIGKILL)."""
        with suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        await self.wait()

    async def stop(self) -> int:
        """Ask it to drain (SIGTERM) and wait for its end; return its exit code."""
        self.signal(signal.SIGTERM)
        return await self.wait()

    def resident_bytes(self) -> int:
        """Return the memory it holds now."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def cpu_s(self) -> float:
        """Return the CPU time that the present life has used."""
        words = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def __repr__(self) -> str:
        return f"<Part {self.worker} {'lives' if self.lives else 'dead'}>"


def _stages_of(part: Part) -> Sequence[str]:
    return keys.DELIVERY_STAGES if part.stage == DELIVERY else (part.stage,)


class RedisPart(Part):
    """Redis itself: it is there when it answers.

    Attributes:
        rewrites: whether it writes its append-only file anew after every start but the first (docs/OPERATIONS.md).
    """

    rewrites = True

    def __init__(self, folder: Path, fsync: str, options: Mapping[str, str]) -> None:
        self.socket = folder / "redis.sock"
        directory = folder / "redis"
        directory.mkdir()
        all_options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "dir": str(directory),
            "save": "",
            "appendonly": "yes",
            "appendfsync": fsync,
            "maxmemory-policy": "noeviction",
            **options,
        }
        words = [word for name, value in all_options.items() for word in (f"--{name}", value)]
        super().__init__("redis", [server_binary(), *words], clean_environment(), folder / "redis.log")

    async def start(self) -> None:
        """Start it and wait until it answers."""
        await super().start()
        async with asyncio.timeout(READY_S):
            await wait_until_ready(self.socket)
        if self.generation > 1 and self.rewrites:
            async with Redis(unix_socket_path=str(self.socket)) as redis:
                await redis.bgrewriteaof()


class Cluster:
    """All processes of one run; use as `async with`.

    Attributes:
        parts: every process by name: redis, replica-1.., encoder-1.., retriever-1.., llm-1.., gateway-1...
        proxies: the proxies of those that have one, by name.
        redis: a connection of the scenario's own; it repeats no command.
        http: likewise.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout
        self.parts: dict[str, Part] = {}
        self.proxies: dict[str, Proxy] = {}
        self.ports: dict[str, int] = {}
        self.server = RedisPart(folder, layout.fsync, layout.redis)
        pool = BlockingConnectionPool(
            50, timeout=None, connection_class=UnixDomainSocketConnection, path=str(self.server.socket),
            retry=Retry(NoBackoff(), 0),
        )  # fmt: skip
        self.redis: Any = Redis.from_pool(pool)
        self.http: aiohttp.ClientSession

    # --- by name ---------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Part:
        return self.parts[name]

    def of(self, *stages: str) -> list[Part]:
        """Return the processes of some stages (or gateway, replica), in order."""
        return [part for part in self.parts.values() if part.stage in stages]

    @property
    def workers(self) -> list[Part]:
        """All stage processes."""
        return self.of(*STAGES, *AFTERWARDS, "chat", DELIVERY)

    @property
    def gateway_urls(self) -> list[str]:
        """Addresses of the gateways."""
        return [self.url_of(part) for part in self.of("gateway")]

    @property
    def replica_urls(self) -> list[str]:
        """Addresses of the mock replicas."""
        return [self.url_of(part) for part in self.of("replica")]

    def url_of(self, part: Part) -> str:
        """Return where others reach a process: a gateway, a replica (or its proxy), or a worker's metrics."""
        if part.stage == "replica" and part.name in self.proxies:
            return self.proxies[part.name].http_url
        return f"http://127.0.0.1:{self.ports[part.name]}"

    def fallen(self) -> list[str]:
        """Return the processes that ended without the suite having ended them: each is a failure."""
        return [life for part in self.parts.values() for life in part.fallen]

    def records(self) -> list[Path]:
        """Files in which the replicas wrote what they were asked."""
        return [self._record(part.name) for part in self.of("replica")]

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    # --- starting and ending ---------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self.http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=False), timeout=aiohttp.ClientTimeout(total=90)
        )
        try:
            await self._start_all()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def server_version(self) -> str:
        """Return which server this is, with its version."""
        about = await self.redis.info("server")
        if "valkey_version" in about:
            return f"Valkey {about['valkey_version']}"
        return f"Redis {about['redis_version']}"

    async def mend(self) -> None:
        """Undo what a scenario may have left standing when it failed: thaw, start and connect everything."""
        for part in self.parts.values():
            if part.lives:
                with suppress(ProcessLookupError):
                    part.signal(signal.SIGCONT)
        for proxy in self.proxies.values():
            proxy.heal()
        for part in self.parts.values():
            if not part.lives:
                with suppress(AssertionError):  # the scenario was just about to
                    await part.start()
        await self.redis.config_set("maxmemory", 0)
        await self.until_ready()
        await self.behave(mode="normal", status=None, fail_rate=0.0)

    async def __aexit__(self, *_: object) -> None:
        for part in self.parts.values():
            if part.lives:
                await part.kill()
        for proxy in self.proxies.values():
            await proxy.__aexit__(None, None, None)
        await self.http.close()
        await self.redis.aclose()

    async def _start_all(self) -> None:
        layout = self.layout
        self.parts["redis"] = self.server
        await self.server.start()
        for number in range(1, layout.replicas + 1):
            self._add(f"replica-{number}", ["penstock", "mock-llm", "--latency", layout.latency])
            await self._add_proxy(f"replica-{number}")
        names = [
            *(f"encoder-{n}" for n in range(1, layout.encoders + 1)),
            *(f"retriever-{n}" for n in range(1, layout.retrievers + 1)),
            *(f"llm-{n}" for n in range(1, layout.llms + 1)),
            *(f"aggregator-{n}" for n in range(1, layout.aggregators + 1)),
            *(f"webhook-{n}" for n in range(1, layout.webhooks + 1)),
            *(f"recorder-{n}" for n in range(1, layout.recorders + 1)),
            *(f"chat-{n}" for n in range(1, layout.chats + 1)),
            *(f"{DELIVERY}-{n}" for n in range(1, layout.deliveries + 1)),
        ]
        for name in names:
            await self._add_proxy(name)
            self._add(name, layout.modules.get(name, ["stages", name.rpartition("-")[0]]))
        for number in range(1, layout.gateways + 1):
            await self._add_proxy(f"gateway-{number}")
            self._add(f"gateway-{number}", ["gateway"])
        await asyncio.gather(*(part.start() for part in self.parts.values() if part is not self.server))
        await self.until_ready()

    async def _add_proxy(self, name: str) -> None:
        if name in self.layout.proxied:
            own = ("127.0.0.1", self.ports[name]) if name.startswith("replica") else None
            self.proxies[name] = await Proxy(own or self.server.socket).__aenter__()

    def _add(self, name: str, module: Sequence[str]) -> None:
        port = self.ports[name] = take_port()
        command = [*self.layout.wrap.get(name, ()), sys.executable, "-P", "-m", *module]
        environ = {}
        if name.startswith("replica"):
            command += ["--port", str(port), "--record", str(self._record(name))]
        elif name.startswith("gateway"):
            environ["PENSTOCK_GATEWAY__PORT"] = str(port)
        else:
            environ["PENSTOCK_METRICS__PORT"] = str(port)
        proxy = self.proxies.get(name)
        if not name.startswith("replica"):
            environ |= {
                "REDIS_URL": proxy.redis_url if proxy else f"unix://{self.server.socket}",
                "LLM_URLS": ",".join(self.replica_urls),
                "PENSTOCK_WORKER__LEASE_S": f"{LEASE_S:g}",
                "PENSTOCK_RETRIEVER__PATH": str(self.folder / "index"),
                "PENSTOCK_RETRIEVER__TOP_K": "1",
                "PENSTOCK_RETRY__BASE_S": "0.1",
                "PENSTOCK_LLM__BREAKER_OPEN_S": "1",
                "PENSTOCK_LOG__FORMAT": "json",
                **self.layout.environ,
            }
        self.parts[name] = Part(name, command, clean_environment(**environ), self.folder / f"{name}.log")

    # --- looking ---------------------------------------------------------------------------------

    async def until_ready(self) -> None:
        """Wait until every gateway says that questions can be answered."""
        for url in self.gateway_urls:
            await wait_until(lambda url=url: self._is_well(f"{url}/readyz"), timeout_s=READY_S, every_s=0.05)  # type: ignore[misc]
        for part in self.workers:
            await self.until_works(part)

    async def listens(self, part: Part) -> bool:
        """Say whether a gateway or a replica answers HTTP."""
        return await self._is_well(f"{self.url_of(part)}/livez")

    async def _is_well(self, url: str) -> bool:
        try:
            async with self.http.get(url) as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False

    async def until_works(self, part: Part) -> float:
        """Wait until a worker says that it can work; return how long that took, in seconds."""
        began_s = time.monotonic()

        async def works() -> bool:
            values = await self.metrics(part)
            return all(values.get(f'penstock_stage_ready{{stage="{stage}"}}') == 1.0 for stage in _stages_of(part))

        await wait_until(works, timeout_s=READY_S, every_s=0.05)
        return time.monotonic() - began_s

    async def until_answered(self, within_s: float = READY_S) -> float:
        """Ask one question over and over until it is answered; return how long that took, in seconds.

        Raises:
            TimeoutError: it was not answered in time.
        """
        began_s = time.monotonic()
        body = {"query": "Which key does the heron keep?", "timeout_s": within_s}
        async with asyncio.timeout(within_s):
            while True:
                with suppress(aiohttp.ClientError):
                    async with self.http.post(f"{self.gateway_urls[0]}/query", json=body) as answer:
                        if answer.status == 200:
                            return time.monotonic() - began_s
                await asyncio.sleep(0.02)

    async def metrics(self, part: Part) -> dict[str, float]:
        """Return what a process says of itself, by metric with its labels; nothing while nobody listens."""
        try:
            return samples(await self._metrics_text(part))
        except (aiohttp.ClientError, TimeoutError):
            return {}

    async def _metrics_text(self, part: Part) -> str:
        async with self.http.get(f"{self.url_of(part)}/metrics", timeout=METRICS_WITHIN) as answer:
            answer.raise_for_status()
            return await answer.text()

    async def metric(self, name: str, *parts: Part) -> float:
        """Return the sum of a metric over all its labels and over some processes (unless named, all living workers).

        Raises:
            LookupError: a process has no such metric.
            ConnectionError: it does not answer, and goes on living.
        """
        total = 0.0
        for part in parts or [part for part in self.workers if part.lives]:
            values = samples(await self._listen(part), name)
            total += sum(value for key, value in values.items() if key == name or key.startswith(name + "{"))
        return total

    async def _listen(self, part: Part) -> str:
        """Return all metrics of a process, patiently while it starts."""
        give_up_s = time.monotonic() + METRICS_PATIENCE_S
        while True:
            try:
                return await self._metrics_text(part)
            except (aiohttp.ClientError, TimeoutError) as error:
                if time.monotonic() > give_up_s:
                    raise ConnectionError(f"{part!r} does not tell its metrics: {type(error).__name__}") from error
            await asyncio.sleep(0.1)

    async def in_hand(self, part: Part) -> list[Holding]:
        """Return the entries that the present life of a worker holds, as Redis has it."""
        held = []
        streams = [keys.stream(stage, priority) for stage in _stages_of(part) for priority in PRIORITIES]
        for stream in [keys.EVENTS] if part.stage == "recorder" else streams:
            group = _group_of(stream)
            for consumer in await self.redis.xinfo_consumers(stream, group):
                if consumer["name"].decode().startswith(part.worker + ":") and consumer["pending"]:
                    rows = await self.redis.xpending_range(stream, group, "-", "+", 1000, consumer["name"])
                    held += [Holding(stream, row["message_id"], row["times_delivered"]) for row in rows]
        return held

    async def owner(self, stream: str, entry_id: bytes) -> str | None:
        """Return the worker name (`llm-1.3`) that holds an entry; None when nobody does, or the entry is gone."""
        rows = await self.redis.xpending_range(stream, _group_of(stream), entry_id, entry_id, 1)
        return rows[0]["consumer"].decode().partition(":")[0] if rows else None

    async def lost(self, held: Iterable[Holding], part: Part) -> list[Holding]:
        """Return which entries a worker holds no longer."""
        return [one for one in held if await self.owner(one.stream, one.entry_id) != part.worker]

    async def job_ids(self, held: Iterable[Holding]) -> dict[Holding, str]:
        """Return the ids of the jobs in some entries; one that is gone already has none."""
        found = {}
        for one in held:
            for _, fields in await self.redis.xrange(one.stream, one.entry_id, one.entry_id):
                found[one] = str(orjson.loads(fields[b"data"])["id"])
        return found

    async def begun(self, held: Iterable[Holding]) -> list[str]:
        """Return the ids of the deliveries in some entries that may be with their provider at this moment."""
        ids = list((await self.job_ids(one for one in held if one.stream.startswith(keys.DELIVERY_QUEUE))).values())
        return [one for one in ids if await self.redis.hexists(keys.DELIVERY + one, "doubt")]

    async def held_by_workers(self) -> int:
        """Return how many entries all workers together have in hand, as Redis has it."""
        held = 0
        for stage in STAGES:
            for priority in PRIORITIES:
                held += int((await self.redis.xpending(keys.stream(stage, priority), stage))["pending"])
        return held

    async def has_lease(self, part: Part) -> bool:
        """Say whether the present life of a worker has its lease."""
        names = [name.decode() for name in await self.redis.zrange(keys.WORKERS, 0, -1)]
        leases = [keys.WORKER + name for name in names if name.startswith(f"{part.worker}:")]
        return bool(leases and await self.redis.exists(*leases))

    async def live_jobs(self) -> int:
        """Return how many jobs are accepted and not ended."""
        return int(await self.redis.zcard(keys.LIVE_INDEX))

    async def call_of(self, number: int) -> dict[str, Any] | None:
        """Return the call that a replica has at work for request *number*, as its record has it; None without any."""
        for url in self.replica_urls:
            async with self.http.get(f"{url}/mock/requests") as answer:
                for call in (await answer.json())["requests"]:
                    if call["status"] == "running" and f"Request {number}." in str(call.get("messages")):
                        return dict(call)
        return None

    async def behave(self, *names: str, **patch: Any) -> None:
        """Change how mock replicas behave, all of them where none is named."""
        for name in names or [part.name for part in self.of("replica")]:
            url = f"http://127.0.0.1:{self.ports[name]}/mock/behaviour"
            async with self.http.post(url, json=patch) as answer:
                answer.raise_for_status()

    def __repr__(self) -> str:
        return f"<Cluster {self.folder} {list(self.parts.values())}>"
