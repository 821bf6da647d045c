"""`penstock up` as a person meets it: real processes, real Redis, a question at the end."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import orjson
import pytest
from httpx_aiohttp import AiohttpTransport

from pipeline import local
from pipeline.errors import ConfigError
from tests.cli.conftest import clean_environment, lives
from tests.conftest import PATIENCE_S, wait_until
from tests.ports import take_port

PARTS = [
    "aggregator", "chat", "delivery", "encoder", "gateway", "image", "llm", "mock1", "mock2", "mock3", "recorder",
    "redis", "report", "retriever", "webhook",
]  # fmt: skip
PATH = (
    "/nonexistent" if os.environ.get("TEST_SERVER") == "valkey" else os.environ["PATH"]
)  # then the bundled one is used


@dataclass
class Up:
    """One running `penstock up`."""

    process: asyncio.subprocess.Process
    url: str
    data_dir: Path

    def children(self) -> dict[int, str]:
        """Return its children: process id and command line."""
        found: dict[int, str] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
                command = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == self.process.pid:
                found[int(stat.parent.name)] = command
        return found

    def pid_of(self, words: str) -> int | None:
        return next((pid for pid, command in self.children().items() if words in command), None)

    async def line(self) -> str:
        assert self.process.stdout is not None
        return (await self.process.stdout.readline()).decode()

    async def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return await self.process.wait()


@asynccontextmanager
async def up(data_dir: Path, *options: str) -> AsyncIterator[Up]:
    log = data_dir.with_suffix(".log")
    with log.open("ab") as stderr:
        process = await penstock(
            "up",
            "--data-dir",
            str(data_dir),
            "--port",
            str(take_port()),
            *options,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
        )
    try:
        running = Up(process, "", data_dir)
        word, _, running.url = (await running.line()).strip().partition(" ")
        assert word == "ready", log.read_text()
        yield running
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def penstock(*arguments: str, **streams: object) -> asyncio.subprocess.Process:
    environ = clean_environment(PENSTOCK_WORKER__DRAIN_S="30", PATH=PATH)
    command = [sys.executable, "-m", "penstock", *arguments]
    return await asyncio.create_subprocess_exec(*command, cwd="/", env=environ, **streams)  # type: ignore[arg-type]  # passed on


async def run(*arguments: str) -> tuple[int | None, str, str]:
    process = await penstock(*arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def ask(url: str, question: str) -> httpx.Response:
    """Ask; who is refused asks again, as clients do."""
    async with httpx.AsyncClient(transport=AiohttpTransport(), timeout=PATIENCE_S) as client:
        while (reply := await client.post(f"{url}/query", json={"query": question})).status_code == 503:
            await asyncio.sleep(0.05)
        return reply


async def test_the_first_question_is_answered_from_our_own_documents(short_path: Path) -> None:
    """One command, and there is an answer with sources; what dies comes back; Ctrl-C leaves nothing behind."""
    data_dir = short_path / "data"
    async with up(data_dir, "--ask", "How long does a completion key live?") as running:
        first = await ask(running.url, "What happens to a job when its worker dies?")
        assert first.json()["sources"], "`ready` was said before there was anything to answer from"
        lines = [await running.line() for _ in range(6)]
        assert lines[1] == "How long does a completion key live?\n"
        assert lines[3].strip()
        assert re.match(r"  \[1\] .+", lines[5])

        code, _out, err = await run("up", "--data-dir", str(data_dir), "--port", "0")
        assert (code, f"{data_dir} is in use by process {running.process.pid}" in err) == (2, True)
        assert "Traceback" not in err

        code, out, _err = await run("status", "--data-dir", str(data_dir), "--json")
        assert code == 0
        assert len(orjson.loads(out)["replicas"]) == 3

        victims = [running.pid_of("stages llm"), running.pid_of("unixsocket")]
        for victim in victims:
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
        await wait_until(lambda: running.pid_of("stages llm") not in {None, *victims})
        await wait_until(lambda: running.pid_of("unixsocket") not in {None, *victims})
        assert (await ask(running.url, "What is a lease?")).status_code == 200

        await wait_until(lambda: len(running.children()) == len(PARTS))
        children = running.children()
        assert await running.end(signal.SIGINT) == 0
    assert not any(lives(pid) for pid in children)
    assert not (data_dir / "up.json").exists()


async def test_what_redis_held_is_there_again_after_the_next_start(short_path: Path) -> None:
    """The supervisor and everything with it are killed; the next `up` takes over the files, and no process is left."""
    data_dir = short_path / "data"
    async with up(data_dir) as first:
        await wait_until(lambda: len(first.children()) == len(PARTS))
        children = first.children()
        first.process.kill()
        await first.process.wait()
        async with up(data_dir) as second:  # waits for the first one's Redis to let go of its files
            assert not any(lives(pid) for pid in children)
            answer = await ask(second.url, "How long does a completion key live?")
            assert answer.status_code == 200
            log = data_dir / "redis.log"
            await wait_until(lambda: "append only file rewriting" in log.read_text().lower())
            assert await second.end(signal.SIGTERM) == 0


async def test_a_redis_that_cannot_start_says_why(short_path: Path) -> None:
    """Its own last words come out, and nothing waits for it."""
    (short_path / "redis" / "appendonlydir").mkdir(parents=True)
    (short_path / "redis" / "appendonlydir" / "appendonly.aof.manifest").write_text("no manifest at all\n")
    code, out, err = await run("up", "--port", "0", "--data-dir", str(short_path))
    assert (code, out) == (2, "")
    assert "does not start" in err
    assert "manifest" in err
    assert "Traceback" not in err


async def test_a_busy_port_is_said_at_once(tmp_path: Path) -> None:
    """Before anything is started: one line, exit code 2."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, out, err = await run("up", "--port", str(port), "--data-dir", str(tmp_path / "data"))
    assert (code, out) == (2, "")
    assert err == f"penstock: port {port} of 127.0.0.1 is taken: choose another with --port (0: any free)\n"
    assert not (tmp_path / "data").exists()


def test_a_data_directory_serves_one_at_a_time(tmp_path: Path) -> None:
    """The lock names who holds it, and is free again afterwards."""
    data_dir, owner = tmp_path / "data", f"process {os.getpid()}"
    with local.locked(data_dir), pytest.raises(ConfigError, match=owner), local.locked(data_dir):
        pass
    with local.locked(data_dir):
        pass


def test_a_lock_outlives_its_owner_while_redis_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner is dead, yet its Redis still writes: the next `up` waits, and says so when that lasts too long."""
    monkeypatch.setattr(local, "PREDECESSOR_S", 0.1)
    (tmp_path / "lock").write_text("999999999")
    with (tmp_path / "lock").open() as held_by_redis:
        fcntl.flock(held_by_redis, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="in use by process 999999999"), local.locked(tmp_path):
            pass


def test_a_data_directory_that_cannot_be_made_is_a_wrong_setting(tmp_path: Path) -> None:
    """A file stands in its place."""
    (tmp_path / "data").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"), local.locked(tmp_path / "data"):
        pass


def test_who_runs_here_is_known_only_while_it_lives(tmp_path: Path) -> None:
    """`penstock status` must not be led to a Redis that is gone."""
    assert local.running(tmp_path) is None
    (tmp_path / "up.json").write_text(orjson.dumps({"pid": os.getpid(), "redis_url": "unix:///x"}).decode())
    assert local.running(tmp_path) == {"pid": os.getpid(), "redis_url": "unix:///x"}
    (tmp_path / "up.json").write_text('{"pid": 999999999}')
    assert local.running(tmp_path) is None
    (tmp_path / "up.json").write_text("half a fi")
    assert local.running(tmp_path) is None


def test_a_receiver_of_verify_has_an_address_that_nobody_can_know() -> None:
    """Another one for each start; the port stands near those of `up`, the rest is a secret."""
    one, two = local._receiver_after(8_000), local._receiver_after(65_533)
    assert re.fullmatch(r"http://127\.0\.0\.1:[0-9]+/[A-Za-z0-9_-]{32}", one)
    assert one.rpartition("/")[2] != two.rpartition("/")[2]


def test_an_address_of_another_machine_is_refused() -> None:
    """192.0.2.1 belongs to documentation and to no machine."""
    with pytest.raises(ConfigError, match="cannot listen on"):
        local.free_port("192.0.2.1", 0)
