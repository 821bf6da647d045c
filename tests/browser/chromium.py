"""A headless Chromium that cannot reach anything but loopback, moved through its DevTools protocol.

Every name resolves to nothing, so that a page which asks for something from outside shows it: such a request is noted
and fails. Debian's package `chromium` brings the program; without it the tests that need it are skipped by name.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import aiohttp
import pytest

from tests.conftest import PATIENCE_S, wait_until

PROGRAM: Final = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="Debian's package chromium")

_OPTIONS: Final = (
    "--headless=new",
    "--no-sandbox",  # CI is root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-port=0",
)


class Tab:
    """One tab.

    Attributes:
        requests: addresses of everything the page asked for.
        complaints: what the browser logged against it: errors of scripts, what the policy refused, what failed to load.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._socket = socket
        self._numbers = itertools.count(1)
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._loaded = asyncio.Event()

    async def listen(self) -> None:
        """Take what the browser says, until it says no more."""
        async for message in self._socket:
            said = message.json()
            match said.get("method"):
                case None:
                    self._replies.pop(said["id"]).set_result(said)
                case "Network.requestWillBeSent":
                    self.requests.append(said["params"]["request"]["url"])
                case "Log.entryAdded" if said["params"]["entry"]["level"] == "error":
                    self.complaints.append(said["params"]["entry"]["text"])
                case "Runtime.exceptionThrown":
                    self.complaints.append(said["params"]["exceptionDetails"]["text"])
                case "Page.loadEventFired":
                    self._loaded.set()

    async def call(self, method: str, **params: Any) -> Any:
        """Send a command; return its result."""
        number = next(self._numbers)
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        said = await asyncio.wait_for(reply, PATIENCE_S)
        assert "error" not in said, said
        return said["result"]

    async def open(self, url: str, *, width: int = 1280, height: int = 900) -> None:
        """Load a page in a window of that size, from nothing that was kept."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        await self.call("Network.setCacheDisabled", cacheDisabled=True)
        self._loaded.clear()
        await self.call("Page.navigate", url=url)
        await asyncio.wait_for(self._loaded.wait(), PATIENCE_S)

    async def value(self, expression: str) -> Any:
        """Return what a JavaScript expression gives."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until a JavaScript expression holds."""
        await wait_until(lambda: self.value(expression), every_s=0.05)

    async def picture(self, path: Path) -> None:
        """Save what the window shows, for a person to look at."""
        found = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))


@asynccontextmanager
async def tab() -> AsyncIterator[Tab]:
    """Start a browser with one tab; end it afterwards."""
    assert PROGRAM is not None
    with TemporaryDirectory(prefix="penstock-", ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            PROGRAM,
            *_OPTIONS,
            f"--user-data-dir={folder}",
            "about:blank",
            env={"HOME": folder, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            port_file = Path(folder, "DevToolsActivePort")
            await wait_until(lambda: port_file.exists() and port_file.read_text().count("\n"))
            port = port_file.read_text().split()[0]
            async with aiohttp.ClientSession() as http:
                async with http.get(f"http://127.0.0.1:{port}/json/list") as reply:
                    (page,) = [one for one in await reply.json() if one["type"] == "page"]
                async with http.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    opened = Tab(socket)
                    listening = asyncio.create_task(opened.listen(), name="browser")
                    for part in ("Page", "Network", "Log", "Runtime"):
                        await opened.call(f"{part}.enable")
                    yield opened
                await listening
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), PATIENCE_S)
            except TimeoutError:
                process.kill()
                await process.wait()
