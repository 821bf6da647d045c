"""`penstock verify` against a whole system: what it says while all is well, and while each part in turn is not."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Final, Self

import asyncpg
import httpx
import orjson
import pytest
from httpx_aiohttp import AiohttpTransport

from pipeline import keys
from pipeline.connection import Link
from pipeline.errors import BrokerUnavailable
from pipeline.overview import look
from pipeline.settings import RedisSettings
from tests.conftest import wait_until
from tests.history.conftest import a_postgres
from tests.ports import take_port
from tests.postgres import PostgresServer
from tests.servers import RedisServer
from tests.whole.system import END_S, Outside, System, command, environment, outside, penstock, penstock_within

KEY: Final = "secret"
BY_MAIL: Final = {"PENSTOCK_DELIVERIES__EMAIL": "smtp"}
"""Emails go out for real; the other types go to the console."""
MAKES: Final = {
    "query", "message", "batch", "history", "chat", "report", "delivery", "webhook", "queue", "retry", "dead-letter",
}  # fmt: skip
STAYS: Final = ("worker:", "reply:", "llm:", "job:completion:", "gateways", "workers", "queues:", "chat_counts")
"""Keys of the system itself, and completions of jobs that no client hears of: they go within a minute."""
TABLES: Final = ("batches", "messages", "webhooks", "chats", "chat_turns", "queues", "reports", "users", "deliveries")


class Outer:
    """A server that the system calls, and that a test may end and start again at its address; use as `with`."""

    def __init__(self, *arguments: str) -> None:
        self.port = take_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._arguments = [part.format(port=self.port) for part in arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it listens."""
        assert self._process is None
        self._process = subprocess.Popen(self._arguments, cwd="/", env=environment(), stdout=subprocess.DEVNULL)
        give_up_s = time.monotonic() + END_S
        while not self._listens():
            assert self._process.poll() is None
            assert time.monotonic() < give_up_s
            time.sleep(0.05)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        """End it as a crash would."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def a_replica() -> Outer:
    return Outer(*command("mock-llm", "--port", "{port}", "--latency", "0.01"))


def a_mail_server() -> Outer:
    return Outer(sys.executable, "-m", "aiosmtpd", "-n", "-l", "127.0.0.1:{port}")


@dataclass(frozen=True)
class Site:
    """One system, and what it stands on, each of which a test may take away."""

    system: System
    redis: RedisServer
    database: PostgresServer
    replicas: tuple[Outer, Outer]
    mail: Outer


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A system with an API key, on a Redis, a PostgreSQL and replicas of the test's own."""
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer(appendonly=True))
        database = stack.enter_context(a_postgres())
        one, two = stack.enter_context(a_replica()), stack.enter_context(a_replica())
        mail = stack.enter_context(a_mail_server())
        system = System(
            "--redis-url",
            redis.url,
            "--llm",
            one.url,
            "--llm",
            two.url,
            DATABASE_URL=database.url(),
            PENSTOCK_API_KEYS=f"ann:{KEY}",
            PENSTOCK_WEBHOOK__ALLOW_PRIVATE="true",
            PENSTOCK_IMAGES__URL=one.url,
            PENSTOCK_SMTP__HOST="127.0.0.1",
            PENSTOCK_SMTP__PORT=str(mail.port),
            PENSTOCK_SMTP__TLS="none",
            **BY_MAIL,
        )
        yield Site(stack.enter_context(system), redis, database, (one, two), mail)


@pytest.fixture
async def whole(site: Site) -> AsyncIterator[Outside]:
    """The system, well; afterwards it must be idle, and is well again."""
    async with outside(site.system) as connected:
        await until_well(site, connected)
        yield connected
        await until_well(site, connected)
        await connected.until_idle()


async def until_well(site: Site, whole: Outside) -> None:
    """Wait until everything runs, and every worker is ready."""

    async def all_is_well() -> bool:
        try:
            seen = await look(link, thorough=False)
        except BrokerUnavailable:
            return False
        ready = {stage for worker in seen.workers for stage, reason in worker.stages.items() if reason is None}
        is_ready = len(ready) == len(STAGES) and len(seen.gateways) == 1
        reply = await whole.send("GET", "/message?limit=1", authorization=f"Bearer {KEY}")
        return is_ready and [view.breaker_tripped for view in seen.replicas] == [False, False] and reply.status == 200

    link = Link(RedisSettings(url=site.redis.url), "test")
    try:
        await whole.reset()
        await wait_until(all_is_well, timeout_s=END_S, every_s=0.2)
    finally:
        await link.close()


WORKERS: Final = (
    "encoder", "retriever", "llm", "aggregator", "webhook", "chat", "image", "report", "delivery", "recorder",
)  # fmt: skip
STAGES: Final = (*(name for name in WORKERS if name != "delivery"), "requests", "sms", "mms", "email", "incoming")


@dataclass(frozen=True)
class Judged:
    """What one run said: exit code, the whole, and each check by its name."""

    code: int
    whole: dict[str, Any]
    by_name: dict[str, dict[str, Any]]

    def names(self, word: str) -> set[str]:
        """Return the checks with this verdict."""
        return {name for name, check in self.by_name.items() if check["verdict"] == word}

    def failed(self, name: str) -> str:
        """Return what is said of a failure, and what to do."""
        check = self.by_name[name]
        assert check["verdict"] == "FAIL", self.whole
        assert check["todo"]
        return f"{check['said']} -> {check['todo']}"


async def judge(site: Site, *options: str, key: str = KEY) -> Judged:
    """Run `penstock verify`, as an operator would beside `up`."""
    code, out, err = await penstock_within(
        END_S,
        "verify",
        "--json",
        "--data-dir",
        str(site.system.data_dir),
        "--api-key",
        key,
        *options,
        DATABASE_URL=site.database.url(),
        **BY_MAIL,
    )
    assert "Traceback" not in err
    found = orjson.loads(out)
    by_name = {check["name"]: check for check in found["checks"]}
    assert len(by_name) == len(found["checks"]) == found["passed"] + found["failed"] + found["skipped"]
    assert (code == 0) == (found["failed"] == 0)
    return Judged(code, found, by_name)


async def keys_of(whole: Outside) -> set[str]:
    """Return the names of all keys, but for what the system itself comes and goes with."""
    found = {key.decode() async for key in whole.redis.scan_iter(count=1000)}
    return {key for key in found if not key.startswith(STAYS)}


async def rows_of(site: Site) -> dict[str, int]:
    """Return how many rows each table of the history has."""
    connection = await asyncpg.connect(site.database.url())
    try:
        return {table: await connection.fetchval(f"SELECT count(*) FROM {table}") for table in TABLES}
    finally:
        await connection.close()


# --- All is well -------------------------------------------------------------------------------


async def test_a_healthy_system_passes_everything_twice_at_once_and_nothing_stays(site: Site, whole: Outside) -> None:
    """Two runs at the same time do not meet; keys, queues, dead letters and rows are those of before."""
    await judge(site)  # what the first run of all makes for good: empty streams, groups
    before, rows, letters = await keys_of(whole), await rows_of(site), await whole.redis.xlen(keys.DEAD)
    for judged in await asyncio.gather(judge(site), judge(site)):
        assert judged.names("PASS") == set(judged.by_name), judged.whole
        assert set(judged.by_name) >= MAKES | {"gateway", "key", "redis", "configuration", "database", "replicas"}
        assert set(judged.by_name) >= {f"worker-{name}" for name in WORKERS}
        assert judged.code == 0
    assert await keys_of(whole) == before
    assert await whole.redis.smembers(keys.QUEUES + "ann") == set()
    assert await whole.redis.xlen(keys.DEAD) == letters
    assert await rows_of(site) == rows
    async for name in whole.redis.scan_iter("job:completion:*"):
        assert await whole.redis.pttl(name) <= 60_000


async def test_people_see_a_line_for_each_check_and_no_colour_codes_where_there_is_no_terminal(
    site: Site, whole: Outside
) -> None:
    """`--only` makes a check and what it needs; the summary ends it."""
    where = ("--api-key", KEY, "--data-dir", str(site.system.data_dir))
    code, out, _ = await penstock_within(END_S, "verify", "--only", "message", *where)
    assert code == 0
    assert "\x1b" not in out
    words = [line.split()[:2] for line in out.splitlines() if line]
    names = ["gateway", "redis", "key", "worker-llm", "worker-aggregator", "message", "clean-up"]
    assert words[:-1] == [["PASS", name] for name in names]
    assert words[-1] == ["7", "passed,"]
    assert "the history" in out  # DATABASE_URL is not known here: what it was told stays, and that is said


async def test_a_check_that_does_not_exist_is_wrong_use(site: Site) -> None:
    """Exit code 2, and the names there are."""
    code, out, err = await penstock("verify", "--only", "quary", "--data-dir", str(site.system.data_dir))
    assert (code, out) == (2, "")
    assert "quary" in err
    assert "query" in err


async def test_an_interrupted_run_cleans_up_all_the_same(site: Site, whole: Outside) -> None:
    """Ctrl-C while something waits for its retry: it is cancelled, and nothing of it stays."""
    before, letters = await keys_of(whole), await whole.redis.xlen(keys.DEAD)
    arguments = ("verify", "--only", "retry", "--api-key", KEY, "--data-dir", str(site.system.data_dir))
    heeded = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    try:
        process = await asyncio.create_subprocess_exec(
            *command(*arguments),
            cwd="/",
            env=environment(DATABASE_URL=site.database.url()),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    finally:
        signal.signal(signal.SIGINT, heeded)
    try:

        async def waits_for_its_retry() -> bool:
            return bool(await whole.redis.zcard(keys.DELAYED))

        await wait_until(waits_for_its_retry, timeout_s=END_S)
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), END_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert b"Traceback" not in err
    assert process.returncode == 130
    assert b"PASS  clean-up" in out
    await whole.until_idle()
    assert await keys_of(whole) == before
    assert await whole.redis.xlen(keys.DEAD) == letters


async def test_what_one_command_starts_passes_everything_and_calls_nobody_else_on_this_machine() -> None:
    """The receiver of verify is the only exception, and its address is known on the data directory only.

    Without that, webhooks to loopback are what they are by default: refused. That is no failure, and no pass either.
    """
    with System() as plain, TemporaryDirectory() as elsewhere:
        where = ("--url", plain.url, "--redis-url", plain.redis_url, "--data-dir", elsewhere)
        code, out, _ = await penstock_within(END_S, "verify", "--data-dir", str(plain.data_dir), "--json")
        unknown, told, _ = await penstock_within(END_S, "verify", "--only", "webhook", *where, "--json")
        other = plain.said["trial_url"] + "x"
        async with httpx.AsyncClient(transport=AiohttpTransport()) as http:
            asked = {"queue_id": "q", "prompt": "Hello", "webhook_url": other}
            refused = await http.post(f"{plain.url}/message/create", json=asked)
    checks = {check["name"]: check["verdict"] for check in orjson.loads(out)["checks"]}
    assert (code, set(checks.values())) == (0, {"PASS"}), out
    assert checks.keys() >= MAKES
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "webhook_url")
    (webhook,) = [check for check in orjson.loads(told)["checks"] if check["name"] == "webhook"]
    assert (unknown, webhook["verdict"]) == (0, "SKIP"), told
    assert "PENSTOCK_WEBHOOK__ALLOW_PRIVATE=true" in webhook["said"]


# --- Something is not --------------------------------------------------------------------------


async def test_a_wrong_api_key_is_told_and_what_needs_none_is_judged(site: Site, whole: Outside) -> None:
    """The key fails; Redis, replicas and workers pass; what asks the gateway is not tried."""
    judged = await judge(site, key="wrong")
    assert judged.names("FAIL") == {"key"}
    assert "--api-key" in judged.failed("key")
    assert judged.names("SKIP") == MAKES | {"database"}
    assert all("key" in judged.by_name[name]["said"] for name in judged.names("SKIP") - {"history"})
    assert judged.code == 1


async def test_a_stopped_worker_is_named_with_the_command_that_starts_it(site: Site, whole: Outside) -> None:
    """What passes its stage is not tried; everything else is, and passes."""
    site.system.kill("encoder", signal.SIGSTOP)
    try:

        async def is_gone() -> bool:
            return not await whole.works(site.system.pid_of("encoder"))

        await wait_until(is_gone, timeout_s=END_S)
        judged = await judge(site)
    finally:
        site.system.kill("encoder", signal.SIGCONT)
    assert judged.names("FAIL") == {"worker-encoder"}
    assert "penstock stage encoder" in judged.failed("worker-encoder")
    assert judged.names("SKIP") == {"query", "report"}
    assert all("worker-encoder" in judged.by_name[name]["said"] for name in ("query", "report"))


async def test_a_replica_that_is_down_is_named_and_the_other_one_does_the_work(site: Site, whole: Outside) -> None:
    """One of two: the replicas fail, the trials pass. Both: no trial is made that needs one."""
    one, two = site.replicas
    two.kill()
    try:
        judged = await judge(site)
        assert judged.names("FAIL") == {"replicas"}
        assert two.url in judged.failed("replicas")
        assert one.url not in judged.by_name["replicas"]["said"]
        assert "LLM_URLS" in judged.failed("replicas")
        assert judged.names("SKIP") == set()
        one.kill()
        judged = await judge(site)
    finally:
        for replica in (one, two):
            replica.kill()
            replica.start()
    assert judged.names("FAIL") == {"replicas"}
    assert "2 of 2 replicas" in judged.failed("replicas")
    need_none = {"queue", "dead-letter", "delivery"}
    assert judged.names("PASS") >= need_none | {"clean-up", "database"}
    assert judged.names("SKIP") == MAKES - need_none


async def test_replicas_that_fail_are_told_by_what_fails_and_its_dead_letters_are_removed(
    site: Site, whole: Outside
) -> None:
    """They answer, and answer 500: each service that asks them fails with the reason, and where to look."""
    before, letters = await keys_of(whole), await whole.redis.xlen(keys.DEAD)
    await whole.behave(status=500)
    judged = await judge(site)
    await whole.reset()
    asks = {"query", "message", "batch", "chat", "report"}
    assert judged.names("FAIL") - {"replicas"} == asks, judged.whole
    for name in asks:
        assert "penstock status" in judged.failed(name)
    assert "500" in judged.failed("query")
    assert judged.names("PASS") >= {"queue", "dead-letter", "retry", "clean-up"}
    assert await keys_of(whole) == before
    assert await whole.redis.xlen(keys.DEAD) == letters


async def test_a_provider_of_deliveries_that_is_down_is_told_with_what_stands_in_the_way(
    site: Site, whole: Outside
) -> None:
    """An email for real arrives; with the mail server down it is still to be sent, and is named as what goes on."""
    address = ("--deliver-to", "ann@example.org", "--only", "delivery")
    judged = await judge(site, *address)
    assert judged.code == 0, judged.whole
    assert judged.by_name["delivery"]["said"].startswith("email by smtp: pending, sending ")
    site.mail.kill()
    try:
        judged = await judge(site, *address)
        assert judged.names("FAIL") == {"delivery", "clean-up"}
        assert "smtp" in judged.failed("delivery")
        assert "does smtp run" in judged.failed("delivery")
        (going_on,) = [name.decode() async for name in whole.redis.scan_iter(keys.DELIVERY + "*")]
        assert going_on.removeprefix(keys.DELIVERY) in judged.failed("clean-up")
        judged = await judge(site, "--only", "delivery")  # to the console: that is no business of the mail server
        assert judged.code == 0, judged.whole
        assert judged.by_name["delivery"]["said"].count(" by console: pending, sending ") == 2
    finally:
        site.mail.start()

    async def is_sent() -> bool:
        return bool(await whole.redis.hget(going_on, "status") == b"sent")

    await wait_until(is_sent, timeout_s=END_S)


async def test_a_database_that_is_away_stops_the_history_and_nothing_else(site: Site, whole: Outside) -> None:
    """The recorder runs and waits; everything works; what was made is still in the events, and that is said."""
    site.database.stop()
    try:
        judged = await judge(site)
    finally:
        site.database.start()
    assert judged.names("FAIL") == {"database"}
    assert "DATABASE_URL" in judged.failed("database")
    assert judged.names("SKIP") == {"history"}
    assert "the history" in judged.by_name["clean-up"]["said"]


async def test_a_gateway_that_does_not_answer_is_told_and_the_workers_are_judged(site: Site, whole: Outside) -> None:
    """Redis, replicas and workers are known without it."""
    site.system.kill("gateway", signal.SIGSTOP)
    try:
        judged = await judge(site)
    finally:
        site.system.kill("gateway", signal.SIGCONT)
    assert judged.names("FAIL") == {"gateway"}
    assert site.system.url in judged.failed("gateway")
    assert "--url" in judged.failed("gateway")
    assert judged.names("PASS") >= {"redis", "replicas", "worker-llm", "worker-recorder"}
    assert judged.names("SKIP") == MAKES | {"key", "database"}


async def test_a_redis_that_is_away_is_told_and_the_gateway_is_judged(site: Site, whole: Outside) -> None:
    """Nothing else can be known, and nothing else is said to fail."""
    site.redis.stop()
    try:
        judged = await judge(site)
    finally:
        site.redis.start()
    assert judged.names("FAIL") == {"redis"}
    assert "--redis-url" in judged.failed("redis")
    assert judged.names("PASS") == {"gateway", "clean-up"}
    assert "not ready" in judged.by_name["gateway"]["said"]


async def test_another_redis_than_the_gateways_is_found_out(site: Site, whole: Outside) -> None:
    """Looking at an empty Redis, nobody would believe what is said of the workers."""
    with RedisServer() as other:
        judged = await judge(site, "--redis-url", other.url, "--only", "configuration")
    assert judged.names("FAIL") == {"configuration"}
    assert "--redis-url" in judged.failed("configuration")
