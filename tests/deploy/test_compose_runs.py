"""Every service of ours, started from its command and environment in `compose.yaml`, answers a question.

Containers are what no test needs: each service is a plain process here. What a container's network does is done to the
text of its command, environment and health check: the name of a service becomes loopback, a port another one that is
free. Redis is a private one with the options that the file gives, Qdrant a server in small, and both are where the file
says that they are. Prometheus and Grafana are not started.
"""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
from httpx_aiohttp import AiohttpTransport

from tests.cli.conftest import ROOT, clean_environment
from tests.conftest import PATIENCE_S, wait_until
from tests.deploy import compose
from tests.servers import RedisServer

FACT = "The harbour master of Quillmouth keeps seventeen lanterns in the northern shed."
QUESTION = "How many lanterns does the harbour master of Quillmouth keep?"


class Net:
    """What stands for the network between the containers: each port of each service is a free one of loopback."""

    def __init__(self, services: dict[str, Any]) -> None:
        self._services = services
        wanted = [(name, port) for name, service in services.items() for port in service["expose"]]
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in wanted]
        self.ports = {key: str(one.getsockname()[1]) for key, one in zip(wanted, sockets, strict=True)}
        for one in sockets:
            one.close()

    def seen_by(self, name: str, text: str) -> str:
        """Return *text* of the service *name* as it has to be outside of its container."""
        names = "|".join(self._services)
        text = re.sub(rf"\b({names}):(\d+)\b", lambda match: f"127.0.0.1:{self.ports[match[1], match[2]]}", text)
        assert not re.search(rf"://({names})\b", text), text
        own = "|".join(self._services[name]["expose"])
        text = re.sub(rf"\b({own})\b", lambda match: self.ports[name, match[1]], text)
        return text.replace("0.0.0.0", "127.0.0.1")


class Container:
    """One service as a process."""

    def __init__(self, name: str, service: dict[str, Any], net: Net, **changed: str) -> None:
        self.name = name
        self._service = service
        self._net = net
        given = {key: net.seen_by(name, value) for key, value in service.get("environment", {}).items()}
        self._environ = clean_environment(**given | changed)

    async def start(self, log: Path) -> None:
        words = [self._net.seen_by(self.name, word) for word in self._service["command"]]
        with log.open("wb") as out:
            self.process = await self._run("-P", "-m", "penstock", *words, stdout=out, stderr=out)

    async def is_healthy(self) -> bool:
        """Run the health check, as Docker would."""
        kind, program, *words = self._service["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "python")
        assert self.process.returncode is None, f"{self.name} has ended"
        words = [self._net.seen_by(self.name, word) for word in words]
        check = await self._run(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return await check.wait() == 0

    async def stop(self) -> int:
        """Stop as Docker does; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            return await self.process.wait()

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def _run(self, *words: str, **streams: Any) -> asyncio.subprocess.Process:
        stdin = asyncio.subprocess.DEVNULL
        return await asyncio.create_subprocess_exec(
            sys.executable, *words, cwd="/", env=self._environ, stdin=stdin, **streams
        )


@contextmanager
def qdrant_in_small(port: str) -> Iterator[None]:
    words = [sys.executable, "-m", "tests.stages.qdrant_in_small", port]
    with subprocess.Popen(words, cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline(), "it has ended"
            yield
        finally:
            server.kill()


@asynccontextmanager
async def composed(folder: Path) -> AsyncIterator[tuple[dict[str, Container], Net]]:
    """Start Redis and every service of ours that needs no profile; what still runs at the end is killed."""
    services = compose.services()
    net = Net(services)
    words = services["redis"]["command"]
    options = {name.removeprefix("--"): value for name, value in zip(words[1::2], words[2::2], strict=True)}
    options |= {"port": net.ports["redis", "6379"], "bind": "127.0.0.1"}
    async with AsyncExitStack() as stack:
        stack.enter_context(RedisServer(options=options))
        stack.enter_context(qdrant_in_small(net.ports["qdrant", "6333"]))
        running: dict[str, Container] = {}
        for name, service in compose.ours(services).items():
            if service.get("profiles"):
                continue
            changed = {}
            if "DATABASE_URL" in service.get("environment", {}):  # PostgreSQL is tried in tests/history
                changed["DATABASE_URL"] = f"sqlite:///{folder}/history.db"
            running[name] = Container(name, service, net, **changed)
            await running[name].start(folder / f"{name}.log")
            stack.push_async_callback(running[name].kill)
        yield running, net


async def test_a_question_is_answered_by_what_compose_starts(tmp_path: Path) -> None:
    """Every health check passes, a document goes in, its answer comes out, and everything drains when told to stop."""
    async with composed(tmp_path) as (running, net):
        for container in running.values():
            await wait_until(container.is_healthy, every_s=0.2)
        url = f"http://127.0.0.1:{net.ports['gateway', '8000']}"
        async with httpx.AsyncClient(
            base_url=url, transport=AiohttpTransport(trust_env=False), timeout=PATIENCE_S
        ) as http:
            reply = await http.post("/documents", json={"id": "quillmouth", "text": FACT})
            assert reply.status_code == 202, reply.text
            job = f"/jobs/{reply.json()['job_id']}"

            async def is_indexed() -> bool:
                return bool((await http.get(job)).json()["status"] == "completed")

            await wait_until(is_indexed)
            held = await http.get(f"http://127.0.0.1:{net.ports['qdrant', '6333']}/collections/penstock")
            assert held.json()["result"]["points_count"] == 2, "a chunk and a head, and on the server"
            answers = await asyncio.gather(*(http.post("/query", json={"query": QUESTION}) for _ in range(12)))
        assert {answer.status_code for answer in answers} == {200}
        bodies = [answer.json() for answer in answers]
        assert all("seventeen" in body["answer"] for body in bodies)
        assert all(body["sources"][0]["document"] == "quillmouth" for body in bodies)
        mocks = {f"http://127.0.0.1:{port}" for (name, _), port in net.ports.items() if name.startswith("mock_llm_")}
        assert {body["replica"] for body in bodies} == mocks
        assert {body["worker"] for body in bodies} <= {"llm_generator_1", "llm_generator_2", "llm_generator_3"}
        gateway = running.pop("gateway")
        assert await gateway.stop() == 0
        assert set(await asyncio.gather(*(container.stop() for container in running.values()))) == {0}
