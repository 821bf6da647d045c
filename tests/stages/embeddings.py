"""A server of `/v1/embeddings` in the test's own event loop: embeds as it is told, or misbehaves as scripted."""

from __future__ import annotations

import asyncio
import base64
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Embed = Callable[[str], Sequence[float]]


class EmbeddingsFake:
    """What the server does and what it was asked.

    Attributes:
        script: what the next requests are answered with; then texts are embedded.
        refuses: texts that hold this are refused with 400.
        asked: the bodies of all requests, in order.
        gate: while cleared, requests wait for it.
    """

    def __init__(self, embed: Embed) -> None:
        self.url = ""
        self.script: list[web.Response] = []
        self.refuses: str | None = None
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.sends_numbers = False
        self._embed = embed

    @property
    def calls(self) -> list[list[str]]:
        """The texts of each request."""
        return [body["input"] for body in self.asked]

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        await self.gate.wait()
        if self.script:
            return self.script.pop(0)
        if self.refuses is not None and any(self.refuses in text for text in body["input"]):
            return web.json_response({"error": {"message": "this text is too long"}}, status=400)
        data = [{"index": n, "embedding": self._form(text)} for n, text in enumerate(body["input"])]
        return web.json_response({"object": "list", "model": body["model"], "data": data[::-1]})  # the index counts

    def _form(self, text: str) -> str | list[float]:
        values = list(self._embed(text))
        return values if self.sends_numbers else base64.b64encode(array("f", values).tobytes()).decode()


@asynccontextmanager
async def embeddings_server(embed: Embed) -> AsyncIterator[EmbeddingsFake]:
    fake = EmbeddingsFake(embed)
    app = web.Application()
    app.router.add_post("/v1/embeddings", fake.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    fake.url = f"http://{host}:{port}"
    try:
        yield fake
    finally:
        fake.gate.set()
        await runner.cleanup()
