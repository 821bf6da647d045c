"""A Prometheus that watches a running system: started from `deploy/prometheus/`, with short intervals."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

import httpx

from pipeline import leash
from tests.conftest import PATIENCE_S
from tests.monitoring.files import PROMETHEUS
from tests.ports import take_port

INTERVAL: Final = "1s"


class Prometheus:
    """One Prometheus on loopback; use as `with`.

    Args:
        gateway: address of the gateway that names the targets.
    """

    def __init__(self, binary: str, gateway: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="prometheus-")
        self.directory = Path(self._folder.name)
        self.log = self.directory / "log"
        self._config = self._make_config(urlsplit(gateway).netloc)
        self._port = take_port()
        self._binary = binary
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it is asked."""
        return f"http://127.0.0.1:{self._port}"

    def _make_config(self, gateway: str) -> Path:
        """Copy the configuration: another gateway, one second for a quarter of a minute, two for each `for`."""
        shutil.copytree(PROMETHEUS, self.directory / "config")
        config = self.directory / "config" / "prometheus.yml"
        text = config.read_text()
        assert "http://gateway:8000/" in text
        text = text.replace("http://gateway:8000/", f"http://{gateway}/")
        text, changed = re.subn(r"(interval|timeout): \d+s", rf"\1: {INTERVAL}", text)
        assert changed == 4
        config.write_text(text)
        for rules in config.parent.glob("rules/*.yml"):
            rules.write_text(re.sub(r"for: \d+m", "for: 2s", rules.read_text()))
        return config

    async def ask(self, http: httpx.AsyncClient, path: str, **parameters: str) -> Any:
        """Return the data of an answer of its API; one that is an error fails."""
        reply = (await http.get(f"{self.url}/api/v1/{path}", params=parameters)).json()
        assert reply["status"] == "success", (parameters, reply)
        return reply["data"]

    async def query(self, http: httpx.AsyncClient, expression: str) -> list[Any]:
        """Return what an expression gives now."""
        data = await self.ask(http, "query", query=expression)
        found: list[Any] = data["result"]
        return found

    def __enter__(self) -> Self:
        read_end, self._write_end = os.pipe()
        tied = leash.prefix(signal.SIGKILL, read_end)
        options = {
            "config.file": self._config,
            "storage.tsdb.path": self.directory / "data",
            "web.listen-address": f"127.0.0.1:{self._port}",
            "log.level": "warn",
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*tied, self._binary, *(f"--{name}={value}" for name, value in options.items())],
                pass_fds=[read_end],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        os.close(read_end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        os.close(self._write_end)
        self._folder.cleanup()
