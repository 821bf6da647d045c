"""Receivers of webhooks: one real HTTP server that believes what `standardwebhooks` verifies, and writes it all down.

One line for every request:

    {"arrived_s", "answered_s", "queue", "webhook_id", "problem", "status", "type", "digest", "batch_id"}

`problem` is null for news that may be believed; `status` is what was answered; `digest` is that of the news' `data`.
Instants are on the wall clock, as the replicas' records are. Each queue has a path of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Final, Self

import orjson
from standardwebhooks.webhooks import WebhookVerificationError

from tests.faults.history import Json
from tests.receivers import News, read_news

THINKS_S: Final = (0.02, 0.4)
"""How long it takes to answer: so long that those who tell it can be met at work."""
FAILS: Final = 0.05
"""Share of first requests of an id that it answers with 500."""


class Receiver:
    """The server; use as `async with`.

    Attributes:
        secrets: of the queues whose news it gets.
        acknowledged: how often it has answered 2xx, by webhook id.
    """

    def __init__(self, path: Path, rng: Random) -> None:
        self.secrets: dict[str, str] = {}
        self.acknowledged: Counter[str] = Counter()
        self._rng = rng
        self._file = path.open("ab", buffering=0)
        self._heard: Counter[str] = Counter()
        self._server: asyncio.Server

    def url(self, queue: str) -> str:
        """Return where the news of a queue go."""
        port = self._server.sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/{queue}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        await self._server.wait_closed()
        self._file.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            news = await read_news(reader)
            arrived_s = time.time()
            line = self._read(news)
            self._heard[news.id] += 1
            fails = self._heard[news.id] == 1 and self._rng.random() < FAILS
            status = 400 if line["problem"] else 500 if fails else 204
            await asyncio.sleep(self._rng.uniform(*THINKS_S))
            if status == 204:
                self.acknowledged[news.id] += 1
            line |= {"arrived_s": arrived_s, "answered_s": time.time(), "status": status}
            self._file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
            writer.write(b"HTTP/1.1 %d X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % status)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # killed while it spoke
        finally:
            writer.close()

    def _read(self, news: News) -> Json:
        queue, problem, body = news.path.lstrip("/"), None, {}
        try:
            body = news.verified(self.secrets[queue])
        except WebhookVerificationError as error:
            problem = str(error)
        data = body.get("data", {})
        return {
            "queue": queue,
            "webhook_id": news.id,
            "problem": problem,
            "type": body.get("type"),
            "batch_id": data.get("batch_id"),
            "digest": digest(data),
        }

    def __repr__(self) -> str:
        return f"<Receiver of {sorted(self.secrets)}>"


def digest(data: Any) -> str:
    """Return what tells one JSON value from another."""
    return hashlib.sha256(orjson.dumps(data, option=orjson.OPT_SORT_KEYS)).hexdigest()
